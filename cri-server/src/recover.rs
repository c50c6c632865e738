//! The start: records and living shims give back the state that was. What the records do not own is drained; what a record
//! claims and nobody runs is ended; what is of another boot is NOTREADY and EXITED.

mod drain;
mod fate;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_linux::pidfd::PidFd;
use berth_shim::protocol::{ContainerState as ShimContainer, Phase, Reply, Request};
use tokio::sync::oneshot;

use drain::{drain, drain_strays, end_plugins};
use fate::{as_recorded, container_of, fate, fate_in_shim};

use crate::Server;
use crate::checkpoint;
use crate::container::control;
use crate::error::{Error, file};
use crate::id::{ContainerId, SandboxId, is_id};
use crate::processes::Process;
use crate::records::{self, ContainerRecord, SandboxRecord};
use crate::sandbox::holdings::{Live, ShimProcess};
use crate::sandbox::owner::{self, Mail};
use crate::sandbox::run;
use crate::sandbox::state::{Container, Event, Machine, Op};
use crate::spec::SandboxSpec;
use crate::steps::Step;

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
    let shims = Shims::default();
    for (id, record) in sandboxes {
        let mine = containers.remove(&id).unwrap_or_default();
        let server = server.clone();
        let shims = shims.clone();
        tasks.spawn(async move { bring_back(&server, record, mine, &shims).await });
    }
    let mut short = Ok(());
    while let Some(done) = tasks.join_next().await {
        match done {
            Ok(done) => short = short.and(done),
            Err(error) => tracing::error!(%error, "recovering a pod sandbox"),
        }
    }
    short?;
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
        if let Some(record) = first(&[&live, &kept])? {
            found.sandboxes.insert(id, record);
        }
    }
    for name in ids(&server.paths.kept_containers())? {
        let id = ContainerId::from(name);
        let kept = server.paths.kept_container(&id);
        let durable: Option<ContainerRecord> = first(&[&crate::paths::record(&kept)])?;
        // The agent died before the durable record was written: the state folder of its sandbox has it.
        let sandboxes = durable.as_ref().map_or_else(|| found.sandboxes.keys().collect(), |record| vec![&record.sandbox]);
        let places: Vec<_> = sandboxes.iter().map(|s| crate::paths::record(&server.paths.live_container(s, &id))).collect();
        let live: Option<ContainerRecord> = first(&places.iter().map(PathBuf::as_path).collect::<Vec<_>>())?;
        let record = match (live, durable) {
            (Some(live), durable) => Some(ContainerRecord { exit: live.exit.clone().or(durable.and_then(|d| d.exit)), ..live }),
            (None, durable) => durable,
        };
        match record {
            Some(record) => {
                if record.boot != server.boot {
                    drop_writable_layer(&kept, &server.paths.trash(), &id)?;
                }
                // Of an agent that ended while it made one.
                control::discard(&checkpoint::folder(&kept), &server.paths.trash(), &format!("{id}-checkpoint"))?;
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

/// The first record that is there and whole. One that is torn counts as none. An error is what says nothing of the pod, of which
/// nothing may be undone then: another version wrote the record, or the agent lacks descriptors or memory.
fn first<T: serde::de::DeserializeOwned>(paths: &[&Path]) -> Result<Option<T>, Error> {
    for path in paths {
        match records::load(path) {
            Ok(record) => return Ok(Some(record)),
            Err(Error::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error @ Error::RecordVersion { .. }) => return Err(error),
            Err(error) if verdict(&error) == Verdict::OurTrouble => return Err(error),
            Err(error) => tracing::error!(error = %crate::error::text(&error), "record can not be read"),
        }
    }
    Ok(None)
}

/// A volatile overlay of another boot must never be mounted again: its folders go before anything is created.
fn drop_writable_layer(kept: &Path, trash: &Path, id: &ContainerId) -> Result<(), Error> {
    for name in ["upper", "work"] {
        control::discard(&kept.join(name), trash, &format!("{id}-{name}"))?;
    }
    Ok(())
}

/// One sandbox and its containers. What has to be ended is ended by its owner, in the background: a plugin or a disk that hangs
/// keeps no other pod waiting. The error is the agent's own trouble: nothing was done to the pod, and the agent must not start.
async fn bring_back(
    server: &Arc<Server>,
    record: SandboxRecord,
    containers: Vec<ContainerRecord>,
    shims: &Shims,
) -> Result<(), Error> {
    let id = record.id.clone();
    let spec = Arc::new(record.spec.clone());
    let (mail, inbox) = owner::mailbox();
    let expected = record.boot == server.boot && !record.stopped;
    let mut live = Live::new(id.clone(), spec.clone(), record.cgroup.clone());
    let reached = if expected { reach(server, &mut live, &mail, shims).await? } else { Reached::Gone };
    if expected && matches!(reached, Reached::Gone) {
        // Before the containers': a creator that still works there could make a container's cgroup anew.
        end(server, &record.cgroup, id.as_str()).await;
    }
    if expected && !record.ready {
        let id = id.clone();
        let ends = crate::blocking(move || {
            end_plugins(&id);
            Ok(())
        });
        // It tells by itself what does not end.
        let _ = ends.await;
    }
    let mut machine_containers = BTreeMap::new();
    for container in containers {
        let fate = match &reached {
            // Its removal had begun, and the agent that did it died too: what the shim says of it now is of the removal.
            _ if container.forlorn => None,
            // A shim forgets a container only when it is deleted: this one was being made, or being removed, when the agent
            // died. Nobody was told of the one, and the other is to go.
            Reached::Answers(states) => states
                .iter()
                .find(|s| s.id == container.id.as_str() && !matches!(s.phase, Phase::Creating))
                .map(|state| fate(&container, Some(state), None)),
            Reached::Silent => Some(as_recorded(&container, control::exit_on_file(server, &id, &container.id))),
            Reached::Gone => {
                if expected {
                    end(server, &container.facts.cgroup, container.id.as_str()).await;
                }
                Some(fate(&container, None, control::exit_on_file(server, &id, &container.id)))
            }
        };
        let known = match fate {
            Some(fate) => (container.id.clone(), container_of(server, container, fate)),
            None => forsake(server, container).await,
        };
        machine_containers.insert(known.0, Box::new(known.1));
    }
    if let Reached::Answers(states) = &reached {
        drain_strays(&live, states, &machine_containers).await;
    }
    let ready = !matches!(reached, Reached::Gone);
    if !spec.host_network() && ready {
        live.ips = server.network.attachment(id.as_str()).map(|a| a.pod_ips()).unwrap_or_default();
    }
    let process = live.process.clone();
    // Of this boot, not stopped, and without a shim: what it still holds is given back.
    let rest = expected.then(|| Arc::new(live));
    let mut machine = Machine::recovered(id.clone(), spec.clone(), record.created_at, ready, rest, machine_containers);
    machine.because(match (&reached, record.boot == server.boot, record.stopped, record.ready) {
        (_, _, _, false) => "the agent ended while it was made, and what it has left could not be given back yet",
        (_, _, true, _) => "it was stopped before the agent's last start",
        (_, false, ..) => "the machine has been started anew since it was made",
        (Reached::Gone, ..) => "its shim was found dead at the agent's start",
        _ => "",
    });
    if !record.ready {
        // The agent died while it made this sandbox; nobody was told of it.
        machine.hide(std::time::Instant::now());
        let _ = mail.send(Event::Op(Op::Remove(oneshot::channel().0)));
    } else if expected && !ready {
        let _ = mail.send(Event::Op(Op::Stop(oneshot::channel().0)));
    } else if let (Reached::Silent, Some(process)) = (&reached, process) {
        tokio::spawn(catch_up(server.clone(), id.clone(), spec, record.cgroup, process, mail.clone()));
    }
    server.owners.register(&id, &record.spec.metadata, mail.clone());
    owner::introduce(server, &machine);
    tokio::spawn(owner::own(server.clone(), machine, mail, inbox));
    Ok(())
}

/// A container that goes. That is put on record first: an agent that dies while it removes it leaves it in a state that the next one
/// could take for a container's like any other, which nobody has asked for.
async fn forsake(server: &Arc<Server>, container: ContainerRecord) -> (ContainerId, Container) {
    tracing::info!(container = %container.id, "half made or half removed when the agent ended: removed");
    control::rewrite(server, &container.sandbox, &container.id, |record| record.forlorn = true).await;
    let name = (container.facts.spec.name.clone(), container.facts.spec.attempt);
    (container.id, Container::forlorn(name, container.resources))
}

/// How a shim was found.
enum Reached {
    Answers(Vec<ShimContainer>),
    /// Its process lives and does not answer: stopped, or out of memory. Its pod is shown as it is on record.
    Silent,
    Gone,
}

/// How long the start waits for a shim. A healthy one answers within a millisecond; the start of the agent waits for the slowest.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often a silent shim is tried again.
const AGAIN: Duration = Duration::from_secs(2);

/// The shims that /proc shows, looked at once for all sandboxes whose shim can not be reached.
type Shims = Arc<tokio::sync::OnceCell<BTreeMap<String, i32>>>;

/// What an error of the greeting says.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Nothing of the shim: the agent lacks descriptors or memory.
    OurTrouble,
    /// It does not accept (its queue is full), or says what we do not understand.
    Silent,
    /// Nobody listens, or the connection broke: it is dead or dying.
    Gone,
}

fn verdict(error: &Error) -> Verdict {
    use rustix::io::Errno;
    match error {
        Error::File { source, .. } => match source.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => Verdict::OurTrouble,
            Some(Errno::AGAIN) => Verdict::Silent,
            _ => Verdict::Gone,
        },
        Error::Shim { .. } | Error::Overdue { .. } => Verdict::Silent,
        _ => Verdict::Gone,
    }
}

/// Connects to the shim of a sandbox and asks for its state.
async fn reach(server: &Arc<Server>, live: &mut Live, mail: &Mail, shims: &Shims) -> Result<Reached, Error> {
    let found = match tokio::time::timeout(PATIENCE, greet(server, live, mail)).await {
        Ok(Ok(containers)) => return Ok(Reached::Answers(containers)),
        Ok(Err(error)) => {
            let verdict = verdict(&error);
            if verdict == Verdict::OurTrouble {
                return Err(error);
            }
            tracing::info!(sandbox = %live.id, error = %crate::error::text(&error), "a pod's shim can not be reached");
            if verdict == Verdict::Silent {
                look_for(&live.id).await?
            } else {
                // What can not be looked at is no dead shim: the pod is left as it is, and the start fails.
                let all = shims.get_or_try_init(|| crate::blocking(all_shims)).await?;
                live.shim = None;
                if let Some(process) = all.get(live.id.as_str()).and_then(|pid| watch_shim(*pid, &live.id, mail)) {
                    // What it still does must not outlive what is taken away below.
                    live.process = Some(process);
                    if let Err(error) = live.kill_shim(server).await {
                        tracing::warn!(error = %crate::error::text(&error), "a shim that can not be reached is not killed");
                    }
                }
                return Ok(Reached::Gone);
            }
        }
        Err(_) => look_for(&live.id).await?,
    };
    live.shim = None;
    Ok(match found.and_then(|pid| watch_shim(pid, &live.id, mail)) {
        Some(process) => {
            tracing::warn!(sandbox = %live.id, pid = process.pid, "a pod's shim lives and does not answer: shown as it is on record");
            live.process = Some(process);
            Reached::Silent
        }
        None => Reached::Gone,
    })
}

async fn look_for(id: &SandboxId) -> Result<Option<i32>, Error> {
    let id = id.clone();
    crate::blocking(move || Ok(all_shims()?.get(id.as_str()).copied())).await
}

fn watch_shim(pid: i32, id: &SandboxId, mail: &Mail) -> Option<Arc<ShimProcess>> {
    let pidfd = PidFd::open(rustix::process::Pid::from_raw(pid)?).ok()?;
    // Asked again with the descriptor in hand: the number can not have changed its owner.
    (sandbox_of(pid).ok()?.as_deref() == Some(id.as_str())).then_some(())?;
    run::watch(pid, pidfd.into(), mail.clone()).ok().map(Arc::new)
}

async fn greet(server: &Arc<Server>, live: &mut Live, mail: &Mail) -> Result<Vec<ShimContainer>, Error> {
    let path = run::netns_path(server, &live.id);
    if path.exists() {
        live.netns_path = Some(path);
    }
    run::connect(server, live, mail).await?;
    let shim = live.shim()?.clone();
    let answer = shim.call("ask the shim for its state", Request::State, Vec::new()).await?;
    let Reply::State(state) = answer.reply else { return Err(shim.unexpected("ask the shim for its state")) };
    if live.process.is_none() {
        let pid = rustix::process::Pid::from_raw(state.pid).ok_or_else(|| shim.unexpected("ask the shim for its state"))?;
        let pidfd = PidFd::open(pid).map_err(file("open", "the shim's process"))?;
        live.process = Some(Arc::new(run::watch(state.pid, pidfd.into(), mail.clone())?));
    }
    server.program.adopt(state.pid);
    Ok(state.containers)
}

/// Whose shim a process is, by its command line. One that has ended is nobody's. Blocking.
fn sandbox_of(pid: i32) -> Result<Option<String>, Error> {
    let path = PathBuf::from(format!("/proc/{pid}/cmdline"));
    let line = match std::fs::read(&path) {
        // ESRCH: it ended after its file was opened.
        Err(e)
            if e.kind() == std::io::ErrorKind::NotFound || e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) =>
        {
            return Ok(None);
        }
        other => other.map_err(file("read", path))?,
    };
    Ok(shim_in(&line))
}

/// The sandbox in the command line of a shim. Pure.
fn shim_in(line: &[u8]) -> Option<String> {
    let mut words = line.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into_owned());
    (words.next()? == "berth-shim").then_some(())?;
    words.next().filter(|id| is_id(id))
}

/// The living shims by sandbox: of the processes with a sandbox's id in their command line the oldest. The others are its forks.
/// By /proc and not by cgroup, because a shim that has just been started is not in its cgroup yet. Blocking.
pub(crate) fn all_shims() -> Result<BTreeMap<String, i32>, Error> {
    let mut oldest: BTreeMap<String, Process> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").map_err(file("list", "/proc"))? {
        let entry = entry.map_err(file("list", "/proc"))?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let Some(id) = sandbox_of(pid)? else { continue };
        let Some(process) = Process::of(pid) else { continue };
        let known = oldest.get(&id).is_some_and(|other| (other.started, other.pid) < (process.started, process.pid));
        if !known && process.state != 'Z' {
            oldest.insert(id, process);
        }
    }
    Ok(oldest.into_iter().map(|(id, process)| (id, process.pid)).collect())
}

/// The shim of a sandbox as a process, for those who tell of it: where /proc can not be read there is nothing to tell. Blocking.
pub(crate) fn shim_of(sandbox: &str) -> Option<Process> {
    all_shims().ok()?.get(sandbox).and_then(|pid| Process::of(*pid))
}

/// Waits for a silent shim to answer, and tells the owner what it says. Ends with the shim's process.
async fn catch_up(
    server: Arc<Server>,
    id: SandboxId,
    spec: Arc<SandboxSpec>,
    cgroup: String,
    process: Arc<ShimProcess>,
    mail: Mail,
) {
    let ended = process.ended.clone();
    let knock = async {
        loop {
            let mut live = Live::new(id.clone(), spec.clone(), cgroup.clone());
            live.process = Some(process.clone());
            // A connection that breaks is no death here: the process is watched.
            let (deaf, _) = owner::mailbox();
            if let Ok(Ok(_)) = tokio::time::timeout(AGAIN, greet(&server, &mut live, &deaf)).await {
                break;
            }
            tokio::time::sleep(AGAIN).await;
        }
        let mut live = Live::new(id.clone(), spec.clone(), cgroup.clone());
        live.process = Some(process.clone());
        let states = greet(&server, &mut live, &mail).await?;
        if !spec.host_network() {
            live.ips = server.network.attachment(id.as_str()).map(|a| a.pod_ips()).unwrap_or_default();
        }
        let fates = states.iter().map(|state| (ContainerId::from(state.id.as_str()), fate_in_shim(state))).collect();
        tracing::info!(sandbox = %id, "a pod's shim that was silent answers");
        let _ = mail.send(Event::Reached { live: Arc::new(live), fates });
        Ok::<(), Error>(())
    };
    tokio::select! {
        told = knock => {
            if let Err(error) = told {
                tracing::warn!(sandbox = %id, error = %crate::error::text(&error), "a pod's shim was lost again");
            }
        }
        () = ended.cancelled() => {}
    }
}

/// Ends what a dead shim left in a cgroup.
async fn end(server: &Arc<Server>, cgroup: &str, subject: &str) {
    let remove = server.cgroups.remove(cgroup, subject);
    if let Err(error) = server.progress.step(subject, Step::RemoveCgroup, cgroup, remove).await {
        tracing::warn!(subject, error = %crate::error::text(&error), "ending what a dead shim left");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_another_version_stops_the_start_and_a_torn_one_counts_as_none() {
        let folder = tempfile::tempdir().unwrap();
        let (torn, newer, gone) = (folder.path().join("torn"), folder.path().join("newer"), folder.path().join("gone"));
        std::fs::write(&torn, "{\"version\":1,\"id").unwrap();
        std::fs::write(&newer, "{\"version\":2}").unwrap();
        assert_eq!(first::<SandboxRecord>(&[&gone, &torn]).unwrap(), None);
        let error = first::<SandboxRecord>(&[&torn, &newer]).unwrap_err().to_string();
        assert!(error.contains("newer") && error.contains("version 2"), "{error}");
    }

    #[test]
    fn a_shim_is_known_by_its_command_line() {
        let id = "0123456789abcdef".repeat(4);
        assert_eq!(shim_in(format!("berth-shim\0{id}\0").as_bytes()), Some(id.clone()));
        for line in [String::new(), "berth-shim\0".into(), "berth-shim\0short\0".into(), format!("sleep\0{id}\0")] {
            assert_eq!(shim_in(line.as_bytes()), None);
        }
    }

    #[test]
    fn a_pod_is_not_ended_for_what_the_agent_itself_lacks_or_does_not_understand() {
        let io = |errno: rustix::io::Errno| file("connect to", "/shim.sock")(errno.into());
        use rustix::io::Errno;
        for (error, want) in [
            (io(Errno::MFILE), Verdict::OurTrouble),
            (io(Errno::NFILE), Verdict::OurTrouble),
            (io(Errno::NOMEM), Verdict::OurTrouble),
            (io(Errno::AGAIN), Verdict::Silent),
            (Error::Shim { action: "ask", message: "the shim's answer is of another kind".into() }, Verdict::Silent),
            (io(Errno::CONNREFUSED), Verdict::Gone),
            (io(Errno::NOENT), Verdict::Gone),
            (Error::ShimGone { id: "s".into(), reason: "the connection ended".into() }, Verdict::Gone),
        ] {
            assert_eq!(verdict(&error), want, "{error}");
        }
    }
}
