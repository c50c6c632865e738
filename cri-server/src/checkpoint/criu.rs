//! One dump by the installed CRIU: `criu swrk` with one end of a socket pair, one request, one answer. Knows processes and
//! mounts, no container.

use std::collections::BTreeSet;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_linux::mount::parse_mountinfo;
use berth_linux::pidfd::PidFd;
use berth_linux::process::{Executable, Spawn, spawn_exec};
use berth_oci::spec::{NamespaceType, Spec};
use prost::Message;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::io::Interest;
use tokio::sync::OwnedSemaphorePermit;

use super::message::{CGROUPS_SOFT, DUMP, ExternalMount, Options, Request, Response};
use crate::spec::{NamespaceMode, Namespaces};

/// The file in which people who use runc tell CRIU what they want (`tcp-established` and the like); it wins over the request.
const CONFIG_FILE: &str = "/etc/criu/runc.conf";
/// CRIU's log in the work folder, as archives have it.
const LOG_FILE: &str = "dump.log";
/// What it writes before it has a log.
const OUTPUT_FILE: &str = "criu.out";
/// An answer is a small message; CRIU's own limit.
const MAX_ANSWER: usize = 64 << 10;
/// How many of the last errors of a log are told.
const ERRORS_TOLD: usize = 3;
/// It ends by itself after its answer.
const END: Duration = Duration::from_secs(10);

/// The installed CRIU.
pub(super) fn find(path: Option<&OsStr>) -> Option<PathBuf> {
    let folders = path.unwrap_or(OsStr::new("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"));
    let runs = |file: &PathBuf| std::fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    std::env::split_paths(folders).filter(|folder| folder.is_absolute()).map(|folder| folder.join("criu")).find(runs)
}

/// What is to be dumped.
#[derive(Debug)]
pub(super) struct Target {
    pid: i32,
    mounts: Vec<ExternalMount>,
    namespaces: Vec<String>,
    /// What standard streams are, for whoever restores it.
    pub(super) streams: Vec<String>,
}

impl Target {
    /// Looks at the first process of a container. Blocking.
    pub(super) fn look(pid: i32, spec: &Spec, own: &Namespaces) -> std::io::Result<Self> {
        let table = parse_mountinfo(&std::fs::read(format!("/proc/{pid}/mountinfo"))?);
        let mounted: BTreeSet<String> = table.iter().map(|m| m.mount_point.to_string_lossy().into_owned()).collect();
        let is_folder = |path: &str| std::fs::symlink_metadata(format!("/proc/{pid}/root{path}")).is_ok_and(|m| m.is_dir());
        let inode = |kind: &str| std::fs::metadata(format!("/proc/{pid}/ns/{kind}")).map(|m| m.ino());
        let mut namespaces = Vec::new();
        if inode("net")? != std::fs::metadata("/proc/self/ns/net")?.ino() {
            namespaces.push(format!("net[{}]:extRootNetNS", inode("net")?));
        }
        if matches!(own.pid, NamespaceMode::Pod | NamespaceMode::Target) {
            namespaces.push(format!("pid[{}]:extRootPidNS", inode("pid")?));
        }
        let stream = |n: i32| std::fs::read_link(format!("/proc/{pid}/fd/{n}")).map(|l| l.to_string_lossy().into_owned());
        let streams = (0..3).map(|n| stream(n).unwrap_or_else(|_| "/dev/null".into())).collect();
        Ok(Self { pid, mounts: external_mounts(spec, &mounted, is_folder), namespaces, streams })
    }

    fn request(&self, images: &OwnedFd, work: &OwnedFd) -> Request {
        let options = Options {
            images_dir: images.as_raw_fd(),
            pid: Some(self.pid),
            leave_running: Some(true),
            log_level: Some(4),
            log_file: Some(LOG_FILE.into()),
            work_dir: Some(work.as_raw_fd()),
            external_mounts: self.mounts.clone(),
            manage_cgroups: Some(true),
            cgroup_mode: Some(CGROUPS_SOFT),
            external: self.namespaces.clone(),
            orphan_terminals: Some(true),
            config_file: Path::new(CONFIG_FILE).exists().then(|| CONFIG_FILE.into()),
        };
        Request { kind: DUMP, options: Some(options) }
    }
}

/// The mounts whose content stays where it is: volumes, the pod's files, devices, cgroups that are bound in, and files that are
/// masked by `/dev/null`.
fn external_mounts(spec: &Spec, mounted: &BTreeSet<String>, is_folder: impl Fn(&str) -> bool) -> Vec<ExternalMount> {
    let own_cgroups = spec.linux.namespaces.iter().any(|n| n.kind == NamespaceType::Cgroup);
    let mut found: Vec<ExternalMount> = Vec::new();
    let mut add = |mount_point: &str, name: &str| {
        if !found.iter().any(|m| m.mount_point == mount_point) {
            found.push(ExternalMount { mount_point: mount_point.to_owned(), name: name.to_owned() });
        }
    };
    for mount in &spec.mounts {
        match mount.kind.as_str() {
            "bind" => add(&mount.destination, &mount.destination),
            "cgroup" if !own_cgroups => {
                let below = format!("{}/", mount.destination);
                mounted.iter().filter(|m| m.starts_with(&below)).for_each(|m| add(m, m));
            }
            _ => {}
        }
    }
    for device in spec.linux.devices.iter().filter(|device| mounted.contains(&device.path)) {
        add(&device.path, &device.path);
    }
    for path in spec.linux.masked_paths.iter().filter(|path| mounted.contains(*path) && !is_folder(path)) {
        add(path, "/dev/null");
    }
    found
}

/// A running CRIU, and what tells others that its folder is in use until it is reaped; dropped, it is killed.
struct Process(Option<(PidFd, OwnedSemaphorePermit)>);

impl Process {
    async fn end(mut self) {
        let Some((pidfd, busy)) = self.0.take() else { return };
        reap(pidfd, busy).await;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some((pidfd, busy)) = self.0.take() {
            let _ = pidfd.signal(9);
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(reap(pidfd, busy));
            }
        }
    }
}

/// Waits for its end, and makes one when it does not come. One in uninterruptible sleep is left to its disk.
async fn reap(pidfd: PidFd, busy: OwnedSemaphorePermit) {
    let ended = crate::blocking(move || {
        let _busy = busy;
        if !pidfd.wait_ended(Some(END)).unwrap_or(false) {
            let _ = pidfd.signal(9);
            let _ = pidfd.wait_ended(Some(END));
        }
        let _ = pidfd.wait(true);
        Ok(())
    });
    let _ = ended.await;
}

/// Dumps into `work/checkpoint`, with CRIU's log in `work`. The error is for the user. Given up, it kills CRIU; the
/// container then goes on, but may have been caught in the middle.
pub(super) async fn dump(program: &Path, target: &Target, work: &Path, busy: OwnedSemaphorePermit) -> Result<(), String> {
    let said = |what: &'static str| move |e: std::io::Error| format!("{what}: {e}");
    let open = |path: &Path| File::open(path).map(OwnedFd::from).map_err(|e| format!("open {}: {e}", path.display()));
    let (images_fd, work_fd) = (open(&work.join("checkpoint"))?, open(work)?);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
    let (ours, theirs) = pair.map_err(|e| said("make a socket pair")(e.into()))?;
    rustix::io::ioctl_fionbio(&theirs, false).map_err(|e| said("make a socket pair")(e.into()))?;
    let process = start(program, theirs, work, busy)?;
    let request = target.request(&images_fd, &work_fd).encode_to_vec();
    let socket = crate::streaming::async_fd(ours, Interest::READABLE).map_err(said("watch criu"))?;
    let sent =
        rustix::io::retry_on_intr(|| rustix::net::send(socket.get_ref().as_fd(), &request, rustix::net::SendFlags::NOSIGNAL));
    let answer = match sent {
        // It ended before it took the request: its output says why.
        Err(_) => None,
        Ok(_) => receive(&socket).await.map_err(said("hear criu"))?,
    };
    process.end().await;
    match answer {
        Some(answer) if answer.success => Ok(()),
        answer => Err(reason(answer.as_ref(), work)),
    }
}

fn start(program: &Path, socket: OwnedFd, work: &Path, busy: OwnedSemaphorePermit) -> Result<Process, String> {
    let word = |text: &[u8]| CString::new(text).map_err(|e| format!("criu: {e}"));
    let path = word(program.as_os_str().as_bytes())?;
    let output = File::create(work.join(OUTPUT_FILE)).map_err(|e| format!("make {OUTPUT_FILE}: {e}"))?;
    let again = output.try_clone().map_err(|e| format!("duplicate a descriptor: {e}"))?;
    let search = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    let spawn = Spawn {
        exe: Executable::Path(path.clone()),
        argv: vec![path, c"swrk".to_owned(), c"3".to_owned()],
        envp: vec![word(&[b"PATH=", search.as_bytes()].concat())?],
        fds: vec![(output.into(), 1), (again.into(), 2), (socket, 3)],
        cwd: Some(word(work.as_os_str().as_bytes())?),
    };
    let (_, pidfd) = spawn_exec(spawn).map_err(|e| crate::error::text(&e))?;
    Ok(Process(Some((pidfd.into(), busy))))
}

/// The answer; none when CRIU ends without one.
async fn receive(socket: &tokio::io::unix::AsyncFd<OwnedFd>) -> std::io::Result<Option<Response>> {
    let mut buffer = vec![0u8; MAX_ANSWER];
    loop {
        let mut ready = socket.readable().await?;
        let received = ready.try_io(|fd| {
            let (count, _) = rustix::net::recv(fd.get_ref(), &mut buffer[..], rustix::net::RecvFlags::empty())?;
            Ok(count)
        });
        match received {
            Ok(Ok(0)) => return Ok(None),
            Ok(Ok(count)) => {
                let answer = Response::decode(&buffer[..count]).map_err(std::io::Error::other)?;
                // Others are notices, which are not asked for.
                if answer.kind == DUMP || !answer.success {
                    return Ok(Some(answer));
                }
            }
            Ok(Err(error)) if error.raw_os_error() == Some(rustix::io::Errno::CONNRESET.raw_os_error()) => return Ok(None),
            Ok(Err(error)) => return Err(error),
            Err(_) => {}
        }
    }
}

fn reason(answer: Option<&Response>, work: &Path) -> String {
    let read = |name: &str| std::fs::read(work.join(name)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let log = read(LOG_FILE).ok().map(|log| last_errors(&log)).filter(|errors| !errors.is_empty());
    let log = log.or_else(|| read(OUTPUT_FILE).ok().map(|text| last_errors(&text)).filter(|errors| !errors.is_empty()));
    let mut text = String::from("criu could not dump it");
    let told = answer.and_then(|a| a.text.clone()).filter(|t| !t.is_empty());
    if answer.is_none() {
        text.push_str(" and ended without an answer");
    }
    if let Some(errno) = answer.and_then(|a| a.errno).filter(|n| *n != 0) {
        text.push_str(&format!(" (errno {errno})"));
    }
    for part in told.into_iter().chain(log) {
        text.push_str(": ");
        text.push_str(&part);
    }
    text
}

/// The last lines of a log that CRIU marks as errors.
fn last_errors(log: &str) -> String {
    let errors: Vec<&str> = log.lines().filter_map(|line| line.find("Error").map(|at| line[at..].trim())).collect();
    errors[errors.len().saturating_sub(ERRORS_TOLD)..].join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_oci::spec::{Device, Mount, Namespace};

    #[test]
    fn what_is_not_the_containers_own_is_external() {
        let mount =
            |kind: &str, destination: &str| Mount { kind: kind.into(), destination: destination.into(), ..Mount::default() };
        let mut spec = Spec {
            mounts: vec![mount("proc", "/proc"), mount("bind", "/v"), mount("cgroup", "/sys/fs/cgroup"), mount("bind", "/v")],
            ..Spec::default()
        };
        spec.linux.masked_paths = vec!["/proc/kcore".into(), "/proc/acpi".into(), "/proc/absent".into()];
        let device = |path: &str| Device { path: path.into(), ..serde_json::from_str(r#"{"path":"","type":"c"}"#).unwrap() };
        spec.linux.devices = vec![device("/dev/fuse"), device("/dev/made")];
        let all = ["/", "/v", "/sys/fs/cgroup", "/sys/fs/cgroup/cpu", "/proc/kcore", "/proc/acpi", "/dev/fuse"];
        let mounted: BTreeSet<String> = all.iter().map(|m| (*m).to_owned()).collect();
        let names = |spec: &Spec| {
            let found = external_mounts(spec, &mounted, |path| path == "/proc/acpi");
            found.into_iter().map(|m| (m.mount_point, m.name)).collect::<Vec<_>>()
        };
        let same = |path: &str| (path.to_owned(), path.to_owned());
        let masked = ("/proc/kcore".to_owned(), "/dev/null".to_owned());
        assert_eq!(names(&spec), [same("/v"), same("/sys/fs/cgroup/cpu"), same("/dev/fuse"), masked.clone()]);
        spec.linux.namespaces = vec![Namespace { kind: NamespaceType::Cgroup, path: String::new() }];
        assert_eq!(names(&spec), [same("/v"), same("/dev/fuse"), masked]);
    }

    #[test]
    fn the_last_errors_of_a_log_are_told() {
        let log = "(00.01) Warn  x\n(00.02) Error (a.c:1): one\n(00.03) Error (b.c:2): two\n(00.04) Error (c.c:3): three\n\
                   (00.05) Error (d.c:4): four\n(00.06) pie: ok\n";
        assert_eq!(last_errors(log), "Error (b.c:2): two; Error (c.c:3): three; Error (d.c:4): four");
        assert_eq!(last_errors("fine\n"), "");
    }

    #[test]
    fn only_a_program_in_an_absolute_folder_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = format!("relative:{}", dir.path().display());
        assert_eq!(find(Some(path.as_ref())), None);
        std::fs::write(dir.path().join("criu"), "").unwrap();
        assert_eq!(find(Some(path.as_ref())), None, "not executable");
        std::fs::set_permissions(dir.path().join("criu"), std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find(Some(path.as_ref())), Some(dir.path().join("criu")));
    }
}
