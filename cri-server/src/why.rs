//! `berth why`: what a sandbox or container is doing, since when, what it waits for and how it failed last. From the register of
//! [`crate::progress`], the board and /proc; without an agent from the records and /proc. Changes nothing, waits for nobody.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::Server;
use crate::cgroups::Cgroups;
use crate::config::Config;
use crate::error::Error;
use crate::id::{SandboxId, is_id};
use crate::paths::Paths;
use crate::processes::{Process, plugins_of};
use crate::progress::{Active, Progress, stamp};
use crate::records::{self, ContainerRecord, SandboxRecord};
use crate::steps::{Past, Step};

/// How many processes in trouble are named.
const NAMED: usize = 5;

/// A step under way.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Stage {
    /// What it does.
    pub step: String,
    /// What it works on.
    pub object: String,
    /// When it began.
    pub since: String,
    /// How long ago that is.
    pub seconds: u64,
    /// How long it may take, in seconds.
    pub limit_seconds: u64,
    /// What happens then.
    pub then: String,
}

/// The last failure.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastError {
    /// The CRI call.
    pub operation: String,
    /// The last step that had begun.
    pub step: String,
    /// The whole text, as the client got it.
    pub error: String,
    /// How undoing what it had made failed at last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<String>,
    /// When.
    pub at: String,
}

/// One answer.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Why {
    /// "pod sandbox" or "container".
    pub kind: String,
    /// Its id.
    pub id: String,
    /// `namespace/name` of the pod, with the container's name behind it.
    pub name: String,
    /// Its state.
    pub state: String,
    /// What that state rests on: the agent's knowledge or only the records.
    pub source: String,
    /// The CRI call under way with its beginning; empty when none is.
    pub operation: String,
    /// The steps under way.
    pub stages: Vec<Stage>,
    /// What it waits for, in words.
    pub waits_for: Vec<String>,
    /// The next moment at which something happens by itself.
    pub next_deadline: String,
    /// How the last operation that failed did.
    pub last_error: Option<LastError>,
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{} {} {}", self.kind, self.name, self.id)?;
        writeln!(f, "  state:      {} ({})", self.state, self.source)?;
        writeln!(f, "  operation:  {}", if self.operation.is_empty() { "none under way" } else { &self.operation })?;
        for stage in &self.stages {
            let about = if stage.object.is_empty() { String::new() } else { format!(" ({})", stage.object) };
            writeln!(f, "  stage:      {}{about}, since {}, {} s", stage.step, stage.since, stage.seconds)?;
        }
        for wait in &self.waits_for {
            writeln!(f, "  waits for:  {wait}")?;
        }
        if !self.next_deadline.is_empty() {
            writeln!(f, "  deadline:   {}", self.next_deadline)?;
        }
        match &self.last_error {
            Some(last) => {
                let during = if last.step.is_empty() { String::new() } else { format!(" at the step \"{}\"", last.step) };
                write!(f, "  last error: {} {}{during}: {}", last.at, last.operation, last.error)?;
                match &last.undo {
                    Some(undo) => write!(f, "\n  not undone: {undo}"),
                    None => Ok(()),
                }
            }
            None => write!(f, "  last error: none"),
        }
    }
}

fn stage(active: &Active) -> Stage {
    let then = match active.step.past() {
        Past::GivenUp => "it is given up",
        Past::GoesOn => "its callers are told; it goes on until it ends",
    };
    Stage {
        step: active.step.text().to_owned(),
        object: active.object.clone(),
        since: stamp(active.since),
        seconds: active.age().as_secs(),
        limit_seconds: active.limit.as_secs(),
        then: then.to_owned(),
    }
}

/// The stage whose limit comes first, as a text.
fn next_deadline(stages: &[Stage]) -> String {
    let Some(next) = stages.iter().min_by_key(|s| s.limit_seconds.saturating_sub(s.seconds)) else { return String::new() };
    match next.limit_seconds.checked_sub(next.seconds) {
        Some(left) => format!("in {left} s, after {} s of \"{}\": {}", next.limit_seconds, next.step, next.then),
        None => format!(
            "passed {} s ago (\"{}\" may take {} s): {}",
            next.seconds - next.limit_seconds,
            next.step,
            next.limit_seconds,
            next.then
        ),
    }
}

/// What the steps under way hang on.
fn waits(why: &mut Why, active: &[Active], sandbox: &str, shim: Option<&Process>) {
    for one in active {
        match one.step {
            Step::AttachNetwork | Step::DetachNetwork => {
                let plugins = plugins_of(sandbox);
                why.waits_for.extend(plugins.iter().map(|p| format!("CNI plugin {p}")));
                if plugins.is_empty() {
                    why.waits_for.push("the built-in network: the kernel's netlink answers".to_owned());
                }
            }
            Step::AskShim
            | Step::CreateInShim
            | Step::StartInShim
            | Step::KillInShim
            | Step::DeleteInShim
            | Step::ExecInShim
            | Step::ReopenLog
            | Step::EndShim
            | Step::ReapShim => match shim {
                Some(shim) => why.waits_for.push(format!("the pod's shim: {shim}")),
                None => why.waits_for.push("the pod's shim, which has no process any more".to_owned()),
            },
            Step::StartShim => why.waits_for.push("the new shim's word that it is ready".to_owned()),
            Step::OpenVolumes => why.waits_for.push(format!("the file systems of the image and the volumes: {}", one.object)),
            Step::Checkpoint => why.waits_for.push(format!("CRIU, and the archive {}", one.object)),
            Step::AskPlugins => why.waits_for.push(format!("the answers of the NRI plugins to {}", one.object)),
            _ => why.waits_for.push(format!("the kernel: {}", one.object)),
        }
    }
}

/// Processes that can not act, and what the shim started that still works (creators, hooks, foreign runtimes).
fn trouble(why: &mut Why, cgroups: &Cgroups, cgroup: &str, shim: Option<i32>) {
    let processes: Vec<Process> = cgroups.processes(cgroup).into_iter().filter_map(Process::of).collect();
    let stuck = processes.iter().filter(|p| p.trouble().is_some());
    why.waits_for.extend(stuck.take(NAMED).map(|p| format!("process {p}")));
    if shim.is_some() && !why.stages.is_empty() {
        let helpers =
            processes.iter().filter(|p| Some(p.pid) != shim && p.trouble().is_none() && !p.command.starts_with("berth-pause"));
        why.waits_for.extend(helpers.take(NAMED).map(|p| format!("process of the shim: {p}")));
    }
    why.waits_for.sort();
    why.waits_for.dedup();
}

fn last_error(progress: &Progress, subject: &str) -> Option<LastError> {
    let failure = progress.failure(subject)?;
    Some(LastError {
        operation: failure.operation.to_owned(),
        step: failure.step.unwrap_or_default().to_owned(),
        error: failure.error,
        undo: failure.undo,
        at: stamp(failure.at),
    })
}

/// Someone who may be meant: id, name, and the sandbox it is in.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    id: String,
    /// `namespace/pod` or `namespace/pod/container`.
    name: String,
    /// None: it is a sandbox.
    sandbox: Option<String>,
}

/// Whom a text means. A pod's name means the pod with its containers. Pure.
fn choose(all: &BTreeSet<Candidate>, wanted: &str) -> Vec<Candidate> {
    if is_hex(wanted) {
        let by_id: Vec<Candidate> = all.iter().filter(|c| c.id.starts_with(wanted)).cloned().collect();
        if !by_id.is_empty() {
            return by_id;
        }
    }
    let named = |name: &str| {
        let mut parts = name.splitn(3, '/');
        let (namespace, pod, container) = (parts.next(), parts.next().unwrap_or_default(), parts.next());
        let whole = wanted == name
            || container.is_some() && name.strip_suffix(container.unwrap_or_default()) == Some(&format!("{wanted}/"));
        whole || wanted == pod || container.is_some_and(|c| wanted == format!("{pod}/{c}")) || namespace.is_none()
    };
    all.iter().filter(|c| named(&c.name)).cloned().collect()
}

fn is_hex(text: &str) -> bool {
    text.len() >= 4 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

fn not_found(wanted: &str) -> Error {
    Error::NotFound { kind: "pod sandbox or container", id: wanted.to_owned() }
}

fn candidates(server: &Server) -> BTreeSet<Candidate> {
    let mut all = BTreeSet::new();
    for (id, m) in server.owners.named() {
        all.insert(Candidate { id: id.as_str().into(), name: format!("{}/{}", m.namespace, m.name), sandbox: None });
    }
    for view in server.board.containers() {
        let pod = server.board.sandbox(view.sandbox.as_str());
        let pod = pod.map_or_else(String::new, |p| format!("{}/{}", p.spec.metadata.namespace, p.spec.metadata.name));
        let name = format!("{pod}/{}", view.facts.spec.name);
        all.insert(Candidate { id: view.id.as_str().into(), name, sandbox: Some(view.sandbox.as_str().into()) });
    }
    // What is being made, and what could not be made, is on no board.
    let running = server.progress.all_running().into_iter().map(|(id, r)| (id, r.name));
    let failed = server.progress.failures().into_iter().map(|(id, f)| (id, f.name));
    for (id, name) in running.chain(failed) {
        if all.iter().any(|c| c.id == id) {
            continue;
        }
        let held = server.owners.held();
        let sandbox = held.iter().find(|(_, h)| h.containers.contains(id.as_str())).map(|(s, _)| s.as_str().to_owned());
        let sandbox = sandbox.or_else(|| (name.matches('/').count() > 1).then(String::new));
        all.insert(Candidate { id, name, sandbox });
    }
    all
}

/// Asks the running server.
pub(crate) async fn ask(server: &Arc<Server>, wanted: &str) -> Result<Vec<Why>, Error> {
    let (server, wanted) = (server.clone(), wanted.to_owned());
    // A thread of its own: the pool's may all be stuck, which is what is asked about.
    let (tx, rx) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("why".into())
        .spawn(move || {
            let chosen = choose(&candidates(&server), &wanted);
            let answers: Vec<Why> = chosen.iter().map(|c| describe(&server, c)).collect();
            let _ = tx.send(if answers.is_empty() { Err(not_found(&wanted)) } else { Ok(answers) });
        })
        .map_err(crate::error::file("start the thread of", "why"))?;
    rx.await.map_err(|_| Error::Closing)?
}

fn describe(server: &Server, candidate: &Candidate) -> Why {
    let (id, progress) = (candidate.id.as_str(), &server.progress);
    let active = progress.active(id);
    let running = progress.running(id);
    let mut why = Why {
        id: candidate.id.clone(),
        name: candidate.name.clone(),
        source: "as the agent knows it".to_owned(),
        operation: running.map(|r| format!("{}, since {}", r.operation, stamp(r.since))).unwrap_or_default(),
        stages: active.iter().map(stage).collect(),
        last_error: last_error(progress, id),
        ..Default::default()
    };
    let sandbox = candidate.sandbox.as_deref().unwrap_or(id);
    let parent = server.owners.held().get(sandbox).map(|h| h.cgroup_parent.clone()).unwrap_or_default();
    let leaf = server.cgroups.sandbox(&parent, &sandbox.into());
    let shim = crate::recover::all_shims().get(sandbox).and_then(|pid| Process::of(*pid));
    match &candidate.sandbox {
        None => {
            why.kind = "pod sandbox".into();
            why.state = match server.board.sandbox(id) {
                Some(view) if view.ready => "READY",
                Some(_) if progress.again_in(id).is_some() => "NOTREADY: it could not be made, and not be undone yet",
                Some(_) => "NOTREADY",
                None if server.owners.get(&id.into()).is_some() => "being made or removed",
                None => "gone: it could not be made",
            }
            .into();
            waits(&mut why, &active, sandbox, shim.as_ref());
            trouble(&mut why, &server.cgroups, &leaf, shim.as_ref().map(|s| s.pid));
        }
        Some(_) => {
            why.kind = "container".into();
            why.state = server.board.container(id).map_or_else(
                || if why.operation.is_empty() { "gone: it could not be made".to_owned() } else { "being created".to_owned() },
                |view| match &view.exit {
                    Some(exit) => {
                        format!("exited with {} at {} ({}) {}", exit.code, stamp(exit.finished_at), exit.reason, exit.message)
                    }
                    None => view.state.text().to_owned(),
                },
            );
            waits(&mut why, &active, sandbox, shim.as_ref());
            if let Some(shim) = shim.as_ref().filter(|s| s.trouble().is_some()) {
                why.waits_for.push(format!("the pod's shim: {shim}"));
            }
            trouble(&mut why, &server.cgroups, &server.cgroups.container(&parent, &id.into()), None);
        }
    }
    why.next_deadline = match progress.grace_left(id) {
        Some(left) if active.is_empty() => {
            why.waits_for.push("the container's first process, which was asked to end".to_owned());
            format!("in {} s it is killed", left.as_secs())
        }
        _ => match progress.again_in(id) {
            Some(left) => format!("in {} s what is left of it is undone again", left.as_secs()),
            None => next_deadline(&why.stages),
        },
    };
    why
}

fn read_all<T: serde::de::DeserializeOwned>(folders: &[std::path::PathBuf]) -> Vec<T> {
    let mut seen = BTreeSet::new();
    let mut out = Vec::new();
    for folder in folders {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if is_id(&name)
                && let Ok(record) = records::load(&crate::paths::record(&entry.path()))
                && seen.insert(name)
            {
                out.push(record);
            }
        }
    }
    out
}

/// What the records and /proc say.
pub(crate) fn on_record(config: &Config, wanted: &str) -> Result<Vec<Why>, Error> {
    let resolved = |p: &std::path::Path| std::fs::canonicalize(p).unwrap_or_else(|_| p.to_owned());
    let (root, state) = (resolved(&config.root), resolved(&config.state));
    let paths = Paths::new(&root, &state);
    let cgroups = Cgroups::new(&berth_linux::instance::InstanceId::of_state_dir(&state).to_string(), config.cgroup_driver)?;
    let boot = berth_linux::boot::boot_id().unwrap_or_default();
    // The state folder's win: they are of this boot and written first.
    let sandboxes: Vec<SandboxRecord> = read_all(&[paths.live_sandboxes(), paths.kept_sandboxes()]);
    let folders: Vec<_> =
        sandboxes.iter().map(|s| paths.live_sandbox(&s.id).join("containers")).chain([paths.kept_containers()]).collect();
    let containers: Vec<ContainerRecord> = read_all(&folders);
    let pod = |id: &SandboxId| {
        let found = sandboxes.iter().find(|s| s.id == *id);
        found.map_or_else(String::new, |s| format!("{}/{}", s.spec.metadata.namespace, s.spec.metadata.name))
    };
    let mut all: BTreeSet<Candidate> =
        sandboxes.iter().map(|s| Candidate { id: s.id.as_str().into(), name: pod(&s.id), sandbox: None }).collect();
    all.extend(containers.iter().map(|c| Candidate {
        id: c.id.as_str().into(),
        name: format!("{}/{}", pod(&c.sandbox), c.facts.spec.name),
        sandbox: Some(c.sandbox.as_str().into()),
    }));
    let mut answers = Vec::new();
    for chosen in choose(&all, wanted) {
        let mut why = Why {
            id: chosen.id.clone(),
            name: chosen.name,
            source: "on record; no agent says more".into(),
            ..Default::default()
        };
        let sandbox = chosen.sandbox.as_deref().unwrap_or(&chosen.id);
        let Some(record) = sandboxes.iter().find(|s| s.id.as_str() == sandbox) else { continue };
        let shim = crate::recover::all_shims().get(sandbox).and_then(|pid| Process::of(*pid));
        if let Some(shim) = &shim {
            why.waits_for.extend(shim.trouble().map(|_| format!("the pod's shim: {shim}")));
        }
        let gone = record.boot != boot || shim.is_none();
        let mut cgroup = record.cgroup.clone();
        if let Some(container) = containers.iter().find(|c| c.id.as_str() == chosen.id) {
            why.kind = "container".into();
            why.state = container_state(container, exit_code(&paths, container), gone);
            cgroup = container.facts.cgroup.clone();
        } else {
            why.kind = "pod sandbox".into();
            why.state = match (record.ready, record.stopped, gone) {
                (false, ..) => "half made when the agent ended: the next start undoes it",
                (_, true, _) => "stopped",
                (_, _, true) => "its shim is dead: NOTREADY at the next start",
                _ => "READY, kept by its shim",
            }
            .into();
        }
        why.waits_for.extend(plugins_of(sandbox).iter().map(|p| format!("CNI plugin {p}")));
        trouble(&mut why, &cgroups, &cgroup, None);
        answers.push(why);
    }
    if answers.is_empty() { Err(not_found(wanted)) } else { Ok(answers) }
}

fn exit_code(paths: &Paths, container: &ContainerRecord) -> Option<i32> {
    let bytes = std::fs::read(paths.exit_record(&container.sandbox, &container.id)).ok()?;
    serde_json::from_slice::<berth_shim::protocol::ExitRecord>(&bytes).ok().map(|r| r.code)
}

fn container_state(container: &ContainerRecord, on_file: Option<i32>, shim_gone: bool) -> String {
    match (&container.exit, on_file) {
        (Some(exit), _) => format!("exited with {} at {} ({})", exit.code, stamp(exit.finished_at), exit.reason),
        (None, Some(code)) => format!("exited with {code}"),
        (None, None) if shim_gone => "ended with its shim: EXITED 255 at the next start".into(),
        _ if container.started_at != 0 => "running".into(),
        _ => "created".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(id: &str, name: &str, sandbox: Option<&str>) -> Candidate {
        Candidate { id: id.into(), name: name.into(), sandbox: sandbox.map(str::to_owned) }
    }

    #[test]
    fn a_pod_is_meant_by_its_name_and_one_container_by_its_own() {
        let all = BTreeSet::from([
            one("aaaa1", "default/web", None),
            one("bbbb2", "default/web/app", Some("aaaa1")),
            one("cccc3", "other/db", None),
        ]);
        let ids = |wanted: &str| choose(&all, wanted).iter().map(|c| c.id.clone()).collect::<Vec<_>>();
        for (wanted, want) in [
            ("web", vec!["aaaa1", "bbbb2"]),
            ("default/web", vec!["aaaa1", "bbbb2"]),
            ("default/web/app", vec!["bbbb2"]),
            ("web/app", vec!["bbbb2"]),
            ("bbbb", vec!["bbbb2"]),
            ("db", vec!["cccc3"]),
            ("nothing", vec![]),
            ("default/db", vec![]),
        ] {
            assert_eq!(ids(wanted), want, "{wanted}");
        }
    }

    #[test]
    fn the_next_deadline_is_the_first_one_and_a_passed_one_says_so() {
        let stage = |step: &str, seconds, limit_seconds| Stage {
            step: step.into(),
            object: String::new(),
            since: String::new(),
            seconds,
            limit_seconds,
            then: "then".into(),
        };
        assert_eq!(next_deadline(&[]), "");
        assert!(next_deadline(&[stage("a", 1, 60), stage("b", 5, 10)]).starts_with("in 5 s, after 10 s of \"b\""));
        assert!(next_deadline(&[stage("a", 70, 60)]).starts_with("passed 10 s ago"));
    }

    #[test]
    fn the_text_names_stage_object_since_and_the_last_error() {
        let why = Why {
            kind: "container".into(),
            stages: vec![Stage {
                step: "start the program".into(),
                object: "shim 7".into(),
                since: "2026-01-01T00:00:00Z".into(),
                seconds: 3,
                limit_seconds: 30,
                then: String::new(),
            }],
            last_error: Some(LastError {
                operation: "StartContainer".into(),
                step: "x".into(),
                error: "boom".into(),
                undo: None,
                at: "t".into(),
            }),
            ..Default::default()
        };
        let text = why.to_string();
        for part in ["start the program (shim 7), since 2026-01-01T00:00:00Z, 3 s", "StartContainer at the step \"x\": boom"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_container_on_record_has_the_state_that_its_next_agent_will_show() {
        let mut record = ContainerRecord {
            version: 1,
            id: "c".into(),
            sandbox: "s".into(),
            boot: String::new(),
            created_at: 1,
            started_at: 2,
            resources: Default::default(),
            exit: None,
            facts: crate::board::ContainerFacts::of(Default::default()),
        };
        assert_eq!(container_state(&record, None, false), "running");
        assert_eq!(container_state(&record, Some(3), false), "exited with 3");
        assert!(container_state(&record, None, true).contains("255"));
        record.started_at = 0;
        assert_eq!(container_state(&record, None, false), "created");
    }
}
