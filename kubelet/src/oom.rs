//! Which process the kernel has killed for want of memory, as it tells in its log (`/dev/kmsg`): an event of the node where the machine
//! had none left, of the pod where a container was over its limit. Reads the log from now on and reports; that a container has ended
//! by it is the runtime's word.

use std::fs::OpenOptions;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use rustix::fs::OFlags;
use tokio::io::unix::AsyncFd;

use crate::care::Care;
use crate::pod;
use crate::record::Weight;

/// The longest record that the kernel gives (`PRINTK_MESSAGE_MAX`).
const MAX_RECORD: usize = 8192;

/// A process that the kernel has killed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Killed {
    /// Its number.
    pub pid: u32,
    /// Its name.
    pub process: String,
    /// The cgroup that was over its limit; `None`: the machine had no memory left.
    pub limited: Option<String>,
    /// The cgroup of the process.
    pub cgroup: String,
}

/// Reads a record of the kernel's log; `None` where it is about something else. The kernel writes these lines since 5.0:
/// `6,1,2,-;oom-kill:constraint=CONSTRAINT_MEMCG,…,oom_memcg=/a,task_memcg=/a/b,task=cat,pid=7,uid=0`, with `global_oom` in the place of
/// `oom_memcg`.
pub fn parse_record(record: &str) -> Option<Killed> {
    let text = record.split_once(';').map_or(record, |(_, text)| text);
    let fields = text.lines().next()?.strip_prefix("oom-kill:")?;
    // A process may be called anything, commas included: what stands behind its name is read from the end.
    let (fields, rest) = fields.split_once(",task=")?;
    let (rest, _uid) = rest.rsplit_once(",uid=")?;
    let (process, pid) = rest.rsplit_once(",pid=")?;
    let field = |key: &str| fields.split(',').find_map(|field| field.strip_prefix(key)?.strip_prefix('='));
    Some(Killed {
        pid: pid.parse().ok()?,
        process: process.to_owned(),
        limited: field("oom_memcg").map(str::to_owned),
        cgroup: field("task_memcg")?.to_owned(),
    })
}

/// The pod whose cgroup it is, and the container, where it is known by its ID. Slices of systemd write `_` for `-`.
fn owner<'a>(cgroup: &str, pods: &'a [Arc<Pod>]) -> Option<(&'a Arc<Pod>, Option<String>)> {
    let is_of = |part: &str, uid: &str| {
        let name = part.strip_suffix(".slice").unwrap_or(part);
        let own = |name: &str| name == uid || name.replace('_', "-") == uid;
        name.rsplit_once("-pod").is_some_and(|(_, rest)| own(rest)) || name.strip_prefix("pod").is_some_and(own)
    };
    let owner = pods.iter().find(|pod| cgroup.split('/').any(|part| is_of(part, pod::uid(pod))))?;
    let status = owner.status.as_ref();
    let all = status.into_iter().flat_map(|s| [&s.container_statuses, &s.init_container_statuses]).flatten().flatten();
    let container = all.into_iter().find(|status| {
        let id = status.container_id.as_deref().and_then(|id| id.split_once("://")).map_or("", |(_, id)| id);
        !id.is_empty() && cgroup.contains(id)
    });
    Some((owner, container.map(|status| status.name.clone())))
}

fn report(killed: &Killed, care: &Care) {
    let Killed { pid, process, limited, cgroup } = killed;
    if limited.is_none() {
        let text = format!("System OOM encountered, victim process: {process}, pid: {pid}");
        care.recorder.node_event(Weight::Warning, "SystemOOM", &text);
        return;
    }
    let pods = care.table.list();
    if let Some((pod, container)) = owner(cgroup, &pods) {
        let text = format!("Memory cgroup out of memory: killed process {pid} ({process})");
        care.recorder.event(pod, container.as_deref(), Weight::Warning, "OOMKilling", &text);
    }
}

fn open(path: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = i32::try_from((OFlags::NONBLOCK | OFlags::CLOEXEC).bits()).unwrap_or(0);
    let mut file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    // What was before this kubelet is not its news.
    let _ = file.seek(SeekFrom::End(0));
    // `register` is unsafe for types that may lie about their descriptor; an OwnedFd cannot.
    #[expect(deprecated)]
    AsyncFd::new(OwnedFd::from(file))
}

/// Watches the kernel's log for as long as it can be read.
pub(crate) async fn run(care: Care) {
    let path = &care.config.kernel_log;
    let log = match open(path) {
        Ok(log) => log,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "what the kernel kills for want of memory is not told by name");
            return;
        }
    };
    let mut buffer = vec![0; MAX_RECORD];
    loop {
        let Ok(mut ready) = log.readable().await else { return };
        match ready.try_io(|log| Ok(rustix::io::read(log, &mut buffer)?)) {
            Ok(Ok(0)) => return,
            Ok(Ok(length)) => {
                let records = String::from_utf8_lossy(&buffer[..length]);
                records.lines().filter_map(parse_record).for_each(|killed| report(&killed, &care));
            }
            // Records that were overwritten before they were read; the next read goes on behind them.
            Ok(Err(error)) if error.raw_os_error() == Some(rustix::io::Errno::PIPE.raw_os_error()) => {}
            Ok(Err(error)) => {
                tracing::warn!(path = %path.display(), %error, "the kernel's log is not read any more");
                return;
            }
            Err(_would_block) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{ContainerStatus, PodStatus};

    const UID: &str = "0d3c9a52-77aa-4c1c-8d5f-0b1f5e1b7a11";

    #[test]
    fn the_killed_process_is_read_from_the_kernels_line() {
        let limited = "6,1405,7712345,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=x,mems_allowed=0,\
            oom_memcg=/kubepods/podu1,task_memcg=/kubepods/podu1/abc,task=a,pid=b (x),pid=4711,uid=0\n SUBSYSTEM=x\n";
        let killed = parse_record(limited).unwrap();
        assert_eq!((killed.pid, killed.process.as_str()), (4711, "a,pid=b (x)"));
        assert_eq!((killed.limited.as_deref(), killed.cgroup.as_str()), (Some("/kubepods/podu1"), "/kubepods/podu1/abc"));
        let system = "6,1,2,-;oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,\
            task_memcg=/user.slice,task=stress,pid=99,uid=1000";
        let killed = parse_record(system).unwrap();
        assert_eq!((killed.pid, killed.process.as_str(), killed.limited), (99, "stress", None));
        for other in
            ["6,1,2,-;Memory cgroup out of memory: Killed process 7 (cat)", "", "6,1;oom-kill:constraint=x", ";oom-kill:,task=a"]
        {
            assert_eq!(parse_record(other), None, "{other}");
        }
    }

    #[test]
    fn pods_are_known_by_their_cgroups_of_both_drivers() {
        let id = "c".repeat(64);
        let mut pod = Pod::default();
        pod.metadata.uid = Some(UID.into());
        let status = ContainerStatus { name: "web".into(), container_id: Some(format!("berth://{id}")), ..Default::default() };
        pod.status = Some(PodStatus { container_statuses: Some(vec![status]), ..Default::default() });
        let pods = [Arc::new(pod)];
        let container = |cgroup: &str| owner(cgroup, &pods).map(|(_, container)| container);
        let web = Some(Some("web".to_owned()));
        let underscores = UID.replace('-', "_");
        assert_eq!(container(&format!("/kubepods/burstable/pod{UID}/{id}")), web);
        assert_eq!(
            container(&format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{underscores}.slice/cri-{id}.scope"
            )),
            web
        );
        assert_eq!(container(&format!("/kubepods/pod{UID}/{}", "d".repeat(64))), Some(None));
        assert_eq!(container(&format!("/kubepods/pod{UID}0/{id}")), None);
        assert_eq!(container("/user.slice"), None);
    }
}
