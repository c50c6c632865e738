//! Making a sandbox: folders and records, shim, namespaces, network. Undone in reverse at the first error.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use berth_linux::pidfd::PidFd;
use berth_shim::protocol::{
    Event as ShimEvent, IdMapping, NetMode, NsMode, PodNamespace, Reply, Request, SandboxConfig, UserNamespace, VERSION,
};
use tokio_util::sync::CancellationToken;

use super::files;
use super::holdings::{self, Live, ShimProcess};
use super::owner::Mail;
use super::state::{Event, NotMade, ProcessExit, Rest};
use crate::Server;
use crate::convert::bandwidth;
use crate::error::{Error, file};
use crate::id::SandboxId;
use crate::records::{self, SandboxRecord};
use crate::shim::ShimClient;
use crate::spec::{IdMap, NamespaceMode, SandboxSpec};
use crate::steps::Step;

/// Size of a pod's /dev/shm, as everywhere.
const SHM_BYTES: u64 = 64 << 20;

/// What the shim is told about a sandbox.
pub(crate) fn shim_config(id: &SandboxId, spec: &SandboxSpec, cgroup: &str, server: &Server) -> SandboxConfig {
    let ns = &spec.namespaces;
    let node = |mode| mode == NamespaceMode::Node;
    let maps = |maps: &[IdMap]| {
        maps.iter().map(|m| IdMapping { container_id: m.container, host_id: m.host, size: m.length }).collect::<Vec<_>>()
    };
    let mut sysctls = std::collections::BTreeMap::new();
    if !spec.host_network() {
        sysctls.insert("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned());
        if ns.own_users().is_none() {
            sysctls.insert("net.ipv4.ping_group_range".to_owned(), "0 2147483647".to_owned());
        }
    }
    sysctls.extend(spec.sysctls.clone());
    SandboxConfig {
        version: VERSION,
        sandbox_id: id.as_str().into(),
        runtime_dir: server.paths.live_sandbox(id),
        cgroup: cgroup.into(),
        hostname: files::hostname(spec),
        sysctls,
        net: if node(ns.network) { NetMode::Host } else { NetMode::New },
        ipc: if node(ns.ipc) { NsMode::Host } else { NsMode::New },
        uts: if node(ns.network) { NsMode::Host } else { NsMode::New },
        share_pid: ns.pid == NamespaceMode::Pod,
        user: ns.own_users().map(|u| UserNamespace { uid_mappings: maps(&u.uids), gid_mappings: maps(&u.gids) }),
        shm_size: if node(ns.ipc) { 0 } else { SHM_BYTES },
        mount_label: spec.labels_of_pod.mount.clone(),
    }
}

/// The record of a sandbox.
pub(crate) fn record(id: &SandboxId, spec: &SandboxSpec, created_at: i64, cgroup: &str, server: &Server) -> SandboxRecord {
    SandboxRecord {
        version: records::VERSION,
        id: id.clone(),
        boot: server.boot.clone(),
        created_at,
        ready: false,
        stopped: false,
        cgroup: cgroup.into(),
        spec: spec.clone(),
    }
}

/// Makes the sandbox. Whatever fails, it is undone; what can not be undone stays on record and is handed back.
pub(crate) async fn run(
    server: Arc<Server>,
    id: SandboxId,
    spec: Arc<SandboxSpec>,
    created_at: i64,
    mail: Mail,
) -> Result<Arc<Live>, NotMade> {
    let cgroup = server.cgroups.sandbox(&spec.cgroup_parent, &id);
    let mut live = Live::new(id, spec, cgroup);
    match build(&server, &mut live, created_at, &mail).await {
        Ok(()) => Ok(Arc::new(live)),
        Err(error) => {
            server.progress.pin(live.id.as_str());
            let rest = undo(&server, live, &error).await;
            Err(NotMade { error, rest })
        }
    }
}

/// Undoes what was made before the error.
async fn undo(server: &Arc<Server>, live: Live, error: &Error) -> Rest {
    let failed = |undo: &Error| {
        tracing::warn!(sandbox = %live.id, error = %crate::error::text(undo), "a sandbox that failed is not undone: tried again");
    };
    // DEL has failed a moment ago: it is not asked for a second time while somebody waits for the answer.
    let owed = matches!(error, Error::Network { source, .. }
        if matches!(source.downcast_ref(), Some(berth_cni::Error::NotUndone { .. })));
    if owed {
        failed(error);
        return Rest::Held(Arc::new(live));
    }
    if let Err(undo) = live.give_back(server).await {
        failed(&undo);
        return Rest::Held(Arc::new(live));
    }
    match erase(server, &live.id).await {
        Ok(()) => Rest::Nothing,
        Err(undo) => {
            failed(&undo);
            Rest::Folders
        }
    }
}

async fn build(server: &Arc<Server>, live: &mut Live, created_at: i64, mail: &Mail) -> Result<(), Error> {
    let mut record = record(&live.id, &live.spec, created_at, &live.cgroup, server);
    let (pid, pidfd) = {
        let (server, id, spec, record) = (server.clone(), live.id.clone(), live.spec.clone(), record.clone());
        crate::blocking(move || prepare(&server, &id, &spec, &record)).await?
    };
    live.process = Some(Arc::new(watch(pid, pidfd, mail.clone())?));
    connect(server, live, mail).await?;
    if !live.spec.host_network() {
        attach(server, live).await?;
    }
    crate::nri::run_pod(server, live).await?;
    record.ready = true;
    let (state, kept) =
        (crate::paths::record(&server.paths.live_sandbox(&live.id)), crate::paths::record(&server.paths.kept_sandbox(&live.id)));
    let bytes = records::encode(&record);
    server.durable.put(kept, bytes.clone());
    let object = state.display().to_string();
    let write = crate::blocking(move || records::write(&state, &bytes));
    let written = server.progress.step(live.id.as_str(), Step::WriteRecord, object, write).await;
    if written.is_err() {
        crate::nri::undo_run_pod(server, live).await;
    }
    written
}

/// Folders, record, files, shim.
fn prepare(server: &Server, id: &SandboxId, spec: &SandboxSpec, record: &SandboxRecord) -> Result<(i32, OwnedFd), Error> {
    let folder = server.paths.live_sandbox(id);
    let making = server.progress.begin(id.as_str(), Step::MakeFolders, folder.display().to_string());
    std::fs::create_dir_all(folder.join("containers")).map_err(file("create", &folder))?;
    let kept = server.paths.kept_sandbox(id);
    std::fs::create_dir_all(&kept).map_err(file("create", &kept))?;
    records::write(&crate::paths::record(&folder), &records::encode(record))?;
    files::write(&folder, spec, &server.config)?;
    server.cgroups.ensure_parent(&record.cgroup, id.as_str())?;
    drop(making);
    let _starting = server.progress.begin(id.as_str(), Step::StartShim, "berth-shim");
    let config = shim_config(id, spec, &record.cgroup, server);
    crate::shim::start(&server.program, &config, &server.paths.socket(id), None, server.progress.limit(Step::StartShim))
}

/// Watches a shim's process: its end is an event at once.
pub(crate) fn watch(pid: i32, pidfd: OwnedFd, mail: Mail) -> Result<ShimProcess, Error> {
    let io = |source| Error::File { action: "watch", path: "berth-shim".into(), source };
    let watched = crate::streaming::async_fd(pidfd.try_clone().map_err(io)?, tokio::io::Interest::READABLE).map_err(io)?;
    let ended = CancellationToken::new();
    let token = ended.clone();
    tokio::spawn(async move {
        let _ = watched.readable().await;
        // A child of ours is reaped; of another agent's shim somebody else is the parent.
        let _ = PidFd::from(watched.into_inner()).wait(true);
        token.cancel();
        let _ = mail.send(Event::ShimGone);
    });
    Ok(ShimProcess { pid, pidfd: PidFd::from(pidfd), ended })
}

/// Connects to the shim and fetches the namespaces.
pub(crate) async fn connect(server: &Server, live: &mut Live, mail: &Mail) -> Result<(), Error> {
    let socket = server.paths.socket(&live.id);
    let stream = crate::shim::connect(&socket).map_err(file("connect to", &socket))?;
    let (events, gone) = (mail.clone(), mail.clone());
    let id = live.id.clone();
    let client = ShimClient::new(
        id.as_str(),
        server.progress.clone(),
        stream,
        move |event| match event {
            ShimEvent::Exited { id, exit } => {
                let exit = process_exit(&exit);
                let _ = events.send(Event::Exited { id: id.into(), exit });
            }
            ShimEvent::PauseExited { pid } => tracing::debug!(pid, "the pause process of a pod has ended"),
            _ => {}
        },
        // A broken connection to a living shim is a shim that can not be used: it counts as dead.
        move |_| {
            let _ = gone.send(Event::ShimGone);
        },
    )
    .map_err(file("watch", &socket))?;
    let client = Arc::new(client);
    live.shim = Some(client.clone());
    client.greet().await?;
    let answer = client.call("fetch the namespaces", Request::Namespaces, Vec::new()).await?;
    let Reply::Namespaces { kinds, pause } = &answer.reply else { return Err(client.unexpected("fetch the namespaces")) };
    live.pause = *pause;
    let kinds = kinds.clone();
    for (kind, fd) in kinds.into_iter().zip(answer.into_fds()) {
        match kind {
            PodNamespace::Net => live.netns = Some(fd),
            PodNamespace::User => live.userns = Some(fd),
            _ => {}
        }
    }
    Ok(())
}

/// The shim's record of an exit in our words.
pub(crate) fn process_exit(exit: &berth_shim::protocol::ExitRecord) -> ProcessExit {
    ProcessExit { code: exit.code, oom: exit.oom, finished_at: exit.finished_at_ns, start_error: exit.start_error.clone() }
}

/// The name of a network namespace for foreign plugins.
pub(crate) fn netns_path(server: &Server, id: &SandboxId) -> std::path::PathBuf {
    format!("/run/netns/berth-{}-{}", server.instance, &id.as_str()[..13.min(id.as_str().len())]).into()
}

async fn attach(server: &Arc<Server>, live: &mut Live) -> Result<(), Error> {
    let failed = |source| Error::Network { action: "set up", id: live.id.as_str().into(), source };
    let Some(netns) = &live.netns else { return Err(failed("the shim has no network namespace".into())) };
    if server.network.needs_netns_path() {
        let path = netns_path(server, &live.id);
        let (fd, to) = (netns.try_clone().map_err(|e| failed(Box::new(e)))?, path.clone());
        crate::blocking(move || holdings::bind(&fd, &to)).await?;
        live.netns_path = Some(path);
    }
    let Some(netns) = live.cni_netns() else { return Err(failed("the network namespace can not be duplicated".into())) };
    let pod = live.pod_network();
    if pod.bandwidth.is_some() && !server.network.limits_bandwidth() {
        warn_of_bandwidth(&live.spec);
    }
    let attach = async { server.network.attach(&pod, netns).await.map_err(|e| failed(Box::new(e))) };
    let attachment = server.progress.step(live.id.as_str(), Step::AttachNetwork, "CNI ADD", attach).await?;
    live.ips = attachment.pod_ips();
    Ok(())
}

/// A limit that is asked for and that the network does not have.
fn warn_of_bandwidth(spec: &SandboxSpec) {
    for annotation in [bandwidth::INGRESS, bandwidth::EGRESS] {
        if let Some(value) = spec.annotations.get(annotation) {
            let (namespace, pod) = (&spec.metadata.namespace, &spec.metadata.name);
            let reason = "no plugin of its network has the capability bandwidth; the built-in network has none";
            tracing::warn!(pod = format!("{namespace}/{pod}"), annotation, value, reason, "a pod's bandwidth is not limited");
        }
    }
}

/// Removes the folders and records of a sandbox.
pub(crate) async fn erase(server: &Arc<Server>, id: &SandboxId) -> Result<(), Error> {
    let (live, kept) = (server.paths.live_sandbox(id), server.paths.kept_sandbox(id));
    server.durable.forget(crate::paths::record(&kept));
    let (trash, name) = (server.paths.trash(), id.as_str().to_owned());
    let object = live.display().to_string();
    let work = crate::blocking(move || {
        // Renamed, not emptied: a record may just be on its way into it.
        crate::container::control::discard(&kept, &trash, &name)?;
        remove_folder(&live)
    });
    server.progress.step(id.as_str(), Step::Erase, object, work).await?;
    server.reaper.wake();
    Ok(())
}

/// Removes a folder; gone is success. What is mounted in it stays, and is an error. A container may have nested folders in it deeper
/// than a stack. Blocking.
pub(crate) fn remove_folder(path: &std::path::Path) -> Result<(), Error> {
    berth_linux::tree::remove_all_on_one_mount(path).map_err(file("remove", path))
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::fs::{Mode, OFlags};

    use super::*;
    use crate::spec::SandboxMetadata;

    /// Keeps the text of what is logged.
    #[derive(Clone, Default)]
    struct Heard(Arc<std::sync::Mutex<String>>);

    impl tracing::field::Visit for Heard {
        fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
            self.0.lock().unwrap().push_str(&format!("{field}={value:?} "));
        }
    }

    impl tracing::Subscriber for Heard {
        fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
            true
        }

        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }

        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

        fn event(&self, event: &tracing::Event<'_>) {
            event.record(&mut self.clone());
        }

        fn enter(&self, _: &tracing::span::Id) {}

        fn exit(&self, _: &tracing::span::Id) {}
    }

    #[test]
    fn a_bandwidth_that_is_not_limited_is_told_with_pod_and_annotation() {
        let metadata = SandboxMetadata { name: "web".into(), namespace: "shop".into(), ..Default::default() };
        let annotations = [(bandwidth::EGRESS.to_owned(), "10M".to_owned())].into();
        let heard = Heard::default();
        let spec = SandboxSpec { metadata, annotations, ..Default::default() };
        tracing::subscriber::with_default(heard.clone(), || warn_of_bandwidth(&spec));
        let text = heard.0.lock().unwrap().clone();
        for part in ["shop/web", bandwidth::EGRESS, "10M"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains(bandwidth::INGRESS), "{text}");
    }

    #[test]
    fn a_folder_that_a_container_nested_deeper_than_a_stack_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let doomed = dir.path().join("doomed");
        std::fs::create_dir(&doomed).unwrap();
        let open = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut deepest: OwnedFd = rustix::fs::open(&doomed, open, Mode::empty()).unwrap();
        for _ in 0..1_000 {
            rustix::fs::mkdirat(&deepest, "d", Mode::RWXU).unwrap();
            deepest = rustix::fs::openat(&deepest, "d", open, Mode::empty()).unwrap();
        }
        let path = doomed.clone();
        // A frame for each level would not fit.
        let small = std::thread::Builder::new().stack_size(64 << 10);
        small.spawn(move || remove_folder(&path)).unwrap().join().unwrap().unwrap();
        assert!(!doomed.exists());
        remove_folder(&doomed).unwrap();
    }
}
