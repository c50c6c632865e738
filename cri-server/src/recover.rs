//! The start: records and living shims give back the state that was. What the records do not own is drained; what a record
//! claims and nobody runs is ended; what is of another boot is NOTREADY and EXITED.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use berth_linux::pidfd::PidFd;
use berth_shim::protocol::{ContainerState as ShimContainer, Phase, Reply, Request};
use tokio::sync::mpsc;

use crate::Server;
use crate::board::Exit;
use crate::container::control;
use crate::error::{Error, file};
use crate::id::{ContainerId, SandboxId, is_id};
use crate::records::{self, ContainerRecord, SandboxRecord};
use crate::sandbox::holdings::Live;
use crate::sandbox::owner::{self, Mail};
use crate::sandbox::run;
use crate::sandbox::state::{Container, Machine, ProcessExit, exit_record};
use crate::spec::SandboxSpec;

/// What the disk says.
#[derive(Default)]
struct Found {
    sandboxes: BTreeMap<SandboxId, SandboxRecord>,
    containers: BTreeMap<SandboxId, Vec<ContainerRecord>>,
}

/// Brings everything back. Quick: one connection and three messages for each living shim, all at once.
pub(crate) async fn recover(server: &Arc<Server>) -> Result<(), Error> {
    let found = {
        let server = server.clone();
        crate::blocking(move || read(&server)).await?
    };
    let Found { sandboxes, mut containers } = found;
    let mut tasks = tokio::task::JoinSet::new();
    for (id, record) in sandboxes {
        let mine = containers.remove(&id).unwrap_or_default();
        let server = server.clone();
        tasks.spawn(async move { bring_back(&server, record, mine).await });
    }
    while let Some(done) = tasks.join_next().await {
        if let Err(error) = done {
            tracing::error!(%error, "recovering a pod sandbox");
        }
    }
    // Containers whose sandbox has no record belong to nobody.
    for orphan in containers.into_values().flatten() {
        tracing::info!(container = %orphan.id, "container without a sandbox: drained");
        let spec = SandboxSpec::default();
        if let Err(error) = control::delete(server, &orphan.sandbox, None, &spec, &orphan.id).await {
            tracing::warn!(container = %orphan.id, error = %crate::error::text(&error), "draining a container");
        }
    }
    drain(server).await;
    Ok(())
}

fn ids(folder: &Path) -> Result<Vec<String>, Error> {
    let mut out = Vec::new();
    let entries = match std::fs::read_dir(folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(out),
        other => other.map_err(file("list", folder))?,
    };
    for entry in entries {
        let name = entry.map_err(file("list", folder))?.file_name().to_string_lossy().into_owned();
        if is_id(&name) {
            out.push(name);
        }
    }
    Ok(out)
}

/// Reads all records: the state folder's of this boot win over the durable ones. Writable layers of another boot go. Blocking.
fn read(server: &Server) -> Result<Found, Error> {
    let mut found = Found::default();
    for name in ids(&server.paths.kept_sandboxes())?.into_iter().chain(ids(&server.paths.live_sandboxes())?) {
        let id = SandboxId::from(name);
        let live = crate::paths::record(&server.paths.live_sandbox(&id));
        let kept = crate::paths::record(&server.paths.kept_sandbox(&id));
        if let Some(record) = first(&[&live, &kept]) {
            found.sandboxes.insert(id, record);
        }
    }
    for name in ids(&server.paths.kept_containers())? {
        let id = ContainerId::from(name);
        let kept = server.paths.kept_container(&id);
        let durable: Option<ContainerRecord> = first(&[&crate::paths::record(&kept)]);
        let live: Option<ContainerRecord> = match &durable {
            Some(record) => first(&[&crate::paths::record(&server.paths.live_container(&record.sandbox, &id))]),
            // The agent died before the durable record was written: the state folder of its sandbox has it.
            None => found.sandboxes.keys().find_map(|s| first(&[&crate::paths::record(&server.paths.live_container(s, &id))])),
        };
        let record = match (live, durable) {
            (Some(live), durable) => Some(ContainerRecord { exit: live.exit.clone().or(durable.and_then(|d| d.exit)), ..live }),
            (None, durable) => durable,
        };
        match record {
            Some(record) => {
                if record.boot != server.boot {
                    drop_writable_layer(&kept, &server.paths.trash(), &id)?;
                }
                found.containers.entry(record.sandbox.clone()).or_default().push(record);
            }
            None => {
                tracing::info!(container = %id, "container without a record: drained");
                control::discard(&kept, &server.paths.trash(), id.as_str())?;
            }
        }
    }
    Ok(found)
}

fn first<T: serde::de::DeserializeOwned>(paths: &[&Path]) -> Option<T> {
    paths.iter().find_map(|path| match records::load(path) {
        Ok(record) => Some(record),
        Err(Error::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::error!(error = %crate::error::text(&error), "record can not be read");
            None
        }
    })
}

/// A volatile overlay of another boot must never be mounted again: its folders go before anything is created.
fn drop_writable_layer(kept: &Path, trash: &Path, id: &ContainerId) -> Result<(), Error> {
    for name in ["upper", "work"] {
        control::discard(&kept.join(name), trash, &format!("{id}-{name}"))?;
    }
    Ok(())
}

/// One sandbox and its containers.
async fn bring_back(server: &Arc<Server>, record: SandboxRecord, containers: Vec<ContainerRecord>) {
    let id = record.id.clone();
    let spec = Arc::new(record.spec.clone());
    let (mail, inbox) = mpsc::unbounded_channel();
    let mut live = Live::new(id.clone(), spec.clone(), record.cgroup.clone());
    let same_boot = record.boot == server.boot;
    let reached = if same_boot && !record.stopped { reach(server, &mut live, &mail).await } else { None };
    if !record.ready {
        // The agent died while it made this sandbox; nobody was told of it.
        undo(server, &live, &containers).await;
        return;
    }
    let ready = reached.is_some();
    let states = reached.unwrap_or_default();
    let mut machine_containers = BTreeMap::new();
    for container in containers {
        let shim_state = states.iter().find(|s| s.id == container.id.as_str());
        if !ready && same_boot && !record.stopped {
            end(server, &container).await;
        }
        let on_file = control::exit_on_file(server, &id, &container.id);
        machine_containers.insert(container.id.clone(), container_of(server, container, shim_state, on_file));
    }
    for stray in states.iter().filter(|s| !machine_containers.contains_key(s.id.as_str())) {
        tracing::info!(container = %stray.id, "container without a record: drained");
        if let Ok(shim) = live.shim() {
            let request = Request::Delete { id: stray.id.clone(), force: true };
            let _ = shim.call("delete container", request, Vec::new()).await;
        }
    }
    if !spec.host_network() && ready {
        live.ips = server.network.attachment(id.as_str()).map(|a| a.pod_ips()).unwrap_or_default();
    }
    // Of this boot, not stopped, and without a shim: what it still holds is given back in the background.
    let rest = if ready {
        Some(Arc::new(live))
    } else if same_boot && !record.stopped {
        let live = Arc::new(live);
        match live.give_back(server).await {
            Ok(()) => None,
            Err(error) => {
                tracing::warn!(sandbox = %id, error = %crate::error::text(&error), "giving back what a dead pod held");
                Some(live)
            }
        }
    } else {
        None
    };
    let machine = Machine::recovered(id.clone(), spec, record.created_at, ready, rest, machine_containers);
    server.owners.register(&id, &record.spec.metadata, mail.clone());
    owner::introduce(server, &machine);
    tokio::spawn(owner::own(server.clone(), machine, mail, inbox));
}

/// Connects to the shim of a sandbox and asks for its state; none when it is dead.
async fn reach(server: &Arc<Server>, live: &mut Live, mail: &Mail) -> Option<Vec<ShimContainer>> {
    let path = run::netns_path(server, &live.id);
    if path.exists() {
        live.netns_path = Some(path);
    }
    let result = async {
        run::connect(live, &server.paths.socket(&live.id), mail).await?;
        let shim = live.shim()?.clone();
        let answer = shim.call("ask the shim for its state", Request::State, Vec::new()).await?;
        let Reply::State(state) = answer.reply else { return Err(shim.unexpected("ask the shim for its state")) };
        let pid = rustix::process::Pid::from_raw(state.pid).ok_or_else(|| shim.unexpected("ask the shim for its state"))?;
        let pidfd = PidFd::open(pid).map_err(file("open", "the shim's process"))?;
        live.process = Some(run::watch(state.pid, pidfd.into(), mail.clone())?);
        server.program.adopt(state.pid);
        Ok(state.containers)
    };
    match result.await {
        Ok(containers) => Some(containers),
        Err(error) => {
            tracing::info!(sandbox = %live.id, error = %crate::error::text(&error), "the shim of a pod is gone");
            None
        }
    }
}

async fn undo(server: &Arc<Server>, live: &Live, containers: &[ContainerRecord]) {
    for container in containers {
        let _ = control::delete(server, &live.id, Some(live), &live.spec, &container.id).await;
    }
    let result = match live.give_back(server).await {
        Ok(()) => run::erase(server, &live.id).await,
        Err(error) => Err(error),
    };
    if let Err(error) = result {
        tracing::warn!(sandbox = %live.id, error = %crate::error::text(&error), "undoing a half-made pod sandbox");
    }
}

async fn end(server: &Arc<Server>, container: &ContainerRecord) {
    if let Err(error) = server.cgroups.remove(&container.facts.cgroup, container.id.as_str()).await {
        tracing::warn!(container = %container.id, error = %crate::error::text(&error), "ending the container of a dead shim");
    }
}

/// A container from its record and from what its shim knows.
fn container_of(
    server: &Server,
    record: ContainerRecord,
    shim: Option<&ShimContainer>,
    on_file: Option<ProcessExit>,
) -> Container {
    let volumes = record.facts.spec.mounts.iter().filter_map(|m| m.image.as_ref());
    let holds = std::iter::once(&record.facts.image_id)
        .chain(volumes.map(|i| &i.id))
        .filter_map(|id| id.parse().ok())
        .filter_map(|id| server.images.hold(&id).inspect_err(|error| tracing::debug!(%error, "image of a container")).ok())
        .collect();
    let hold = Some(Arc::new(holds));
    let (started_at, pid, exit) = fate(&record, shim, on_file);
    Container::recovered(Arc::new(record.facts), record.resources, record.created_at, started_at, pid, exit, hold)
}

/// (started at, pid, exit) of a container after a restart of the agent.
fn fate(
    record: &ContainerRecord,
    shim: Option<&ShimContainer>,
    on_file: Option<ProcessExit>,
) -> (i64, Option<i32>, Option<Exit>) {
    if let Some(exit) = &record.exit {
        return (record.started_at, None, Some(exit.clone()));
    }
    let recorded = |exit: &ProcessExit| {
        let mut exit = exit_record(exit);
        exit.finished_at = exit.finished_at.max(record.started_at);
        exit
    };
    match shim {
        Some(state) => {
            let started = if state.started_at_ns != 0 { state.started_at_ns } else { record.started_at };
            match (&state.phase, &state.exit) {
                (_, Some(exit)) => {
                    let start_error = exit.start_error.clone();
                    let mut exit = recorded(&run::process_exit(exit));
                    if !start_error.is_empty() {
                        exit = Exit { code: 128, reason: "StartError".into(), message: start_error, ..exit };
                    }
                    (started, None, Some(exit))
                }
                (Phase::Running, None) => (started.max(1), Some(state.pid), None),
                _ => (0, Some(state.pid), None),
            }
        }
        None => {
            let lost = || Exit {
                code: 255,
                finished_at: crate::clock::now_ns(),
                reason: "Unknown".into(),
                message: "its end was not seen".into(),
            };
            (record.started_at, None, Some(on_file.as_ref().map_or_else(lost, recorded)))
        }
    }
}

/// What nobody claims: folders without a record, network leftovers.
async fn drain(server: &Arc<Server>) {
    let owned: BTreeSet<String> = server.owners.ids().iter().map(|id| id.as_str().to_owned()).collect();
    // The board knows every pod by now; those of another boot, and stopped ones, have nothing of the network any more.
    let ready = server.board.sandboxes().iter().filter(|v| v.ready).map(|v| v.id.as_str().to_owned()).collect();
    if let Err(error) = server.network.reconcile(&ready).await {
        tracing::warn!(%error, "cleaning up the network");
    }
    let this = server.clone();
    let result = crate::blocking(move || {
        for name in ids(&this.paths.live_sandboxes())?.into_iter().filter(|n| !owned.contains(n)) {
            tracing::info!(sandbox = name, "pod sandbox without a record: drained");
            let id = SandboxId::from(name);
            run::remove_folder(&this.paths.live_sandbox(&id))?;
        }
        for name in ids(&this.paths.kept_sandboxes())?.into_iter().filter(|n| !owned.contains(n)) {
            run::remove_folder(&this.paths.kept_sandbox(&SandboxId::from(name)))?;
        }
        this.reaper.wake();
        Ok(())
    })
    .await;
    if let Err(error) = result {
        tracing::warn!(error = %crate::error::text(&error), "draining what nobody claims");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_shim::protocol::ExitRecord;

    fn record(started_at: i64, exit: Option<Exit>) -> ContainerRecord {
        ContainerRecord {
            version: 1,
            id: "c".into(),
            sandbox: "s".into(),
            boot: "b".into(),
            created_at: 1,
            started_at,
            resources: Default::default(),
            exit,
            facts: crate::board::ContainerFacts {
                spec: Default::default(),
                image_id: String::new(),
                image_name: String::new(),
                image_ref: String::new(),
                user: Default::default(),
                stop_signal: 15,
                log_path: String::new(),
                cgroup: String::new(),
            },
        }
    }

    fn shim(phase: Phase, started_at_ns: i64, exit: Option<ExitRecord>) -> ShimContainer {
        ShimContainer {
            id: "c".into(),
            phase,
            pid: 7,
            started_at_ns,
            exit,
            cgroup: String::new(),
            log: None,
            logs_drained: false,
            tty: false,
            stdin: false,
            stdin_once: false,
            stdin_open: false,
            execs: vec![],
        }
    }

    fn ended(code: i32, start_error: &str) -> ExitRecord {
        ExitRecord { pid: 7, code, signal: 0, oom: false, started_at_ns: 2, finished_at_ns: 3, start_error: start_error.into() }
    }

    #[test]
    fn a_container_has_the_same_state_after_a_restart_of_the_agent() {
        let running = fate(&record(0, None), Some(&shim(Phase::Running, 5, None)), None);
        assert_eq!(running, (5, Some(7), None));
        let created = fate(&record(0, None), Some(&shim(Phase::Created, 0, None)), None);
        assert_eq!(created, (0, Some(7), None));
        let exited = fate(&record(2, None), Some(&shim(Phase::Exited, 2, Some(ended(3, "")))), None).2.unwrap();
        assert_eq!((exited.code, exited.reason.as_str(), exited.finished_at), (3, "Error", 3));
        let failed = fate(&record(0, None), Some(&shim(Phase::Exited, 0, Some(ended(128, "no such file")))), None).2.unwrap();
        assert_eq!((failed.code, failed.reason.as_str(), failed.message.as_str()), (128, "StartError", "no such file"));
    }

    #[test]
    fn a_container_whose_shim_is_gone_is_exited_255_unless_its_end_is_on_record() {
        let lost = fate(&record(2, None), None, None).2.unwrap();
        assert_eq!((lost.code, lost.reason.as_str()), (255, "Unknown"));
        let seen = fate(&record(2, None), None, Some(ProcessExit { code: 0, oom: false, finished_at: 9 })).2.unwrap();
        assert_eq!((seen.code, seen.reason.as_str()), (0, "Completed"));
        let kept = Exit { code: 4, finished_at: 5, reason: "Error".into(), message: String::new() };
        assert_eq!(fate(&record(2, Some(kept.clone())), None, None).2.unwrap(), kept);
    }
}
