//! `berth why`: what a sandbox or container is doing, since when, what it waits for and how it failed last. From the register of
//! [`crate::progress`], the board and /proc; without an agent from the records and /proc. Changes nothing, waits for nobody.

mod record;

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub(crate) use record::on_record;

use crate::Server;
use crate::board::Exit;
use crate::cgroups::Cgroups;
use crate::error::Error;
use crate::id::SandboxId;
use crate::processes::{Process, plugins_of};
use crate::progress::{Active, Progress, stamp};
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

/// An operation under way.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Operation {
    /// The CRI call, or what comes nearest.
    pub name: String,
    /// When it began.
    pub since: String,
}

/// What is waited for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Wait {
    /// Who or what, in words.
    pub what: String,
    /// Its process, where it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// How that is: its command, its state and what that means.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub process: String,
}

impl Wait {
    fn of(what: impl Into<String>) -> Self {
        Self { what: what.into(), pid: None, process: String::new() }
    }

    fn for_process(what: impl Into<String>, process: &Process) -> Self {
        Self { what: what.into(), pid: Some(process.pid), process: process.to_string() }
    }
}

/// The next moment at which something happens by itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NextDeadline {
    /// In how many seconds; negative: it has passed.
    pub in_seconds: i64,
    /// Of what.
    pub of: String,
    /// What happens then.
    pub then: String,
}

/// Where an answer comes from: the agent's knowledge, or the records alone.
const AGENT: &str = "agent";
const RECORDS: &str = "records";
/// The states of a sandbox, as the CRI has them.
const READY: &str = "READY";
const NOT_READY: &str = "NOTREADY";

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
    /// Its state, in one word.
    pub state: String,
    /// Why it is in that state; may be empty.
    pub reason: String,
    /// What that rests on: "agent" or, where none answers, "records".
    pub source: String,
    /// The operation under way.
    pub operation: Option<Operation>,
    /// The steps under way.
    pub stages: Vec<Stage>,
    /// What it waits for.
    pub waits_for: Vec<Wait>,
    /// The next moment at which something happens by itself.
    pub next_deadline: Option<NextDeadline>,
    /// How the last operation that failed did.
    pub last_error: Option<LastError>,
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{} {} {}", self.kind, self.name, self.id)?;
        let reason = if self.reason.is_empty() { String::new() } else { format!(": {}", self.reason) };
        let source = if self.source == RECORDS { " (on record; no agent says more)" } else { "" };
        writeln!(f, "  state:      {}{reason}{source}", self.state)?;
        match &self.operation {
            Some(operation) => writeln!(f, "  operation:  {}, since {}", operation.name, operation.since)?,
            None => writeln!(f, "  operation:  none under way")?,
        }
        for stage in &self.stages {
            let about = if stage.object.is_empty() { String::new() } else { format!(" ({})", stage.object) };
            writeln!(f, "  stage:      {}{about}, since {}, {} s", stage.step, stage.since, stage.seconds)?;
        }
        for wait in &self.waits_for {
            let process = if wait.process.is_empty() { String::new() } else { format!(": {}", wait.process) };
            writeln!(f, "  waits for:  {}{process}", wait.what)?;
        }
        if let Some(next) = &self.next_deadline {
            match next.in_seconds {
                left @ 0.. => writeln!(f, "  deadline:   in {left} s, {}: {}", next.of, next.then)?,
                passed => writeln!(f, "  deadline:   passed {} s ago, {}: {}", -passed, next.of, next.then)?,
            }
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

/// The stage whose limit comes first.
fn next_deadline(stages: &[Stage]) -> Option<NextDeadline> {
    let next = stages.iter().min_by_key(|s| s.limit_seconds.saturating_sub(s.seconds))?;
    Some(NextDeadline {
        in_seconds: next.limit_seconds.cast_signed().saturating_sub(next.seconds.cast_signed()),
        of: format!("after {} s of \"{}\"", next.limit_seconds, next.step),
        then: next.then.clone(),
    })
}

/// The plugins that run for a sandbox, as an object of its step: empty where the built-in network alone is at work.
fn plugins(server: &Server, sandbox: &str) -> String {
    let doing = server.network.doing(sandbox);
    let one = |d: &berth_cni::Doing| format!("CNI {} of plugin {} in network {}", d.verb, d.plugin, d.network);
    doing.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// A late step of the network names the plugin that it waits for.
pub(crate) fn with_plugin(server: &Server, error: Error) -> Error {
    match error {
        Error::Overdue { step, subject, object, since, limit }
            if step == Step::AttachNetwork.text() || step == Step::DetachNetwork.text() =>
        {
            let named = Some(plugins(server, &subject)).filter(|named| !named.is_empty());
            Error::Overdue { step, subject, object: named.unwrap_or(object), since, limit }
        }
        other => other,
    }
}

/// What a pod is doing at this moment, in words: the oldest step of its own or of its containers.
pub(crate) fn doing(server: &Server, id: &SandboxId) -> Option<String> {
    let containers = server.board.containers_of(id);
    let subjects = std::iter::once(id.as_str()).chain(containers.iter().map(|c| c.id.as_str()));
    let active = subjects.flat_map(|subject| server.progress.active(subject)).min_by_key(|active| active.since)?;
    let stage = stage_of(server, &active, id.as_str());
    let shim = crate::recover::shim_of(id.as_str());
    let shim = shim.filter(|shim| shim.trouble().is_some()).map(|shim| format!("; the pod's shim: {shim}")).unwrap_or_default();
    Some(format!("at the step \"{}\" ({}) since {}{shim}", stage.step, stage.object, stage.since))
}

/// A step of a sandbox or of one of its containers, with the plugin that it waits for.
fn stage_of(server: &Server, active: &Active, sandbox: &str) -> Stage {
    let mut stage = stage(active);
    if matches!(active.step, Step::AttachNetwork | Step::DetachNetwork) {
        let named = plugins(server, sandbox);
        if !named.is_empty() {
            stage.object = named;
        }
    }
    stage
}

/// How it ended, in words.
fn ended(exit: &Exit) -> String {
    let message = if exit.message.is_empty() { String::new() } else { format!(": {}", exit.message) };
    format!("with {} at {} ({}){message}", exit.code, stamp(exit.finished_at), exit.reason)
}

/// What the steps under way hang on.
fn waits(why: &mut Why, doing: &[berth_cni::Doing], active: &[Active], sandbox: &str, shim: Option<&Process>) {
    for one in active {
        match one.step {
            Step::AttachNetwork | Step::DetachNetwork => {
                let processes = plugins_of(sandbox);
                for call in doing {
                    let limit = call.limit.map(|limit| format!(" of {} s", limit.as_secs())).unwrap_or_default();
                    let what = format!(
                        "CNI plugin {} of network {} ({}), for {} s{limit}",
                        call.plugin,
                        call.network,
                        call.verb,
                        call.since.elapsed().as_secs()
                    );
                    match processes.iter().filter(|p| !call.in_process && p.verb == call.verb).collect::<Vec<_>>() {
                        mine if mine.is_empty() => why.waits_for.push(Wait::of(what)),
                        mine => why.waits_for.extend(mine.iter().map(|p| Wait::for_process(what.clone(), &p.process))),
                    }
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
                Some(shim) => why.waits_for.push(Wait::for_process("the pod's shim", shim)),
                None => why.waits_for.push(Wait::of("the pod's shim, which has no process any more")),
            },
            Step::StartShim => why.waits_for.push(Wait::of("the new shim's word that it is ready")),
            Step::OpenVolumes => {
                why.waits_for.push(Wait::of(format!("the file systems of the image and the volumes: {}", one.object)));
            }
            Step::Checkpoint => why.waits_for.push(Wait::of(format!("CRIU, and the archive {}", one.object))),
            Step::AskPlugins => why.waits_for.push(Wait::of(format!("the answers of the NRI plugins to {}", one.object))),
            _ => why.waits_for.push(Wait::of(format!("the kernel: {}", one.object))),
        }
    }
}

/// Processes that can not act, and what the shim started that still works (creators, hooks, foreign runtimes).
fn trouble(why: &mut Why, cgroups: &Cgroups, cgroup: &str, shim: Option<i32>) {
    let processes: Vec<Process> = cgroups.processes(cgroup).into_iter().filter_map(Process::of).collect();
    let stuck = processes.iter().filter(|p| p.trouble().is_some());
    why.waits_for.extend(stuck.take(NAMED).map(|p| Wait::for_process("process", p)));
    if shim.is_some() && !why.stages.is_empty() {
        let helpers =
            processes.iter().filter(|p| Some(p.pid) != shim && p.trouble().is_none() && !p.command.starts_with("berth-pause"));
        why.waits_for.extend(helpers.take(NAMED).map(|p| Wait::for_process("process of the shim", p)));
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

/// Whether it could not be made: nothing is left of it but how that failed.
fn is_gone(server: &Server, id: &str) -> bool {
    let there = server.board.sandbox(id).is_some() || server.board.container(id).is_some();
    !there && server.progress.running(id).is_none() && server.owners.get(&id.into()).is_none()
}

/// Attempts that failed in the order of time, the newest last; what there is comes after them. Pure.
fn in_order(mut all: Vec<Candidate>, failed_at: impl Fn(&str) -> i64, is_gone: impl Fn(&str) -> bool) -> Vec<Candidate> {
    all.sort_by_cached_key(|c| match is_gone(&c.id) {
        true => (false, failed_at(&c.id)),
        false => (true, 0),
    });
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
            let chosen =
                in_order(chosen, |id| server.progress.failure(id).map_or(0, |failure| failure.at), |id| is_gone(&server, id));
            let answers: Vec<Why> = chosen.iter().map(|c| describe(&server, c)).collect();
            let _ = tx.send(if answers.is_empty() { Err(not_found(&wanted)) } else { Ok(answers) });
        })
        .map_err(crate::error::file("start the thread of", "why"))?;
    rx.await.map_err(|_| Error::Closing)?
}

/// State and reason of a sandbox.
fn sandbox_state(server: &Server, id: &str) -> (&'static str, String) {
    match server.board.sandbox(id) {
        Some(view) if view.ready => (READY, String::new()),
        Some(view) => (NOT_READY, view.reason.clone()),
        None if server.owners.get(&id.into()).is_some() => ("changing", "it is being made or removed".to_owned()),
        None => ("gone", "it could not be made".to_owned()),
    }
}

/// State and reason of a container.
fn container_state(server: &Server, id: &str, under_way: bool) -> (&'static str, String) {
    match server.board.container(id) {
        Some(view) => (view.state.text(), view.exit.as_ref().map(ended).unwrap_or_default()),
        None if under_way => ("changing", "it is being created".to_owned()),
        None => ("gone", "it could not be made".to_owned()),
    }
}

fn describe(server: &Server, candidate: &Candidate) -> Why {
    let (id, progress) = (candidate.id.as_str(), &server.progress);
    let sandbox = candidate.sandbox.as_deref().unwrap_or(id);
    let active = progress.active(id);
    let running = progress.running(id);
    let mut why = Why {
        id: candidate.id.clone(),
        name: candidate.name.clone(),
        source: AGENT.to_owned(),
        operation: running.map(|r| Operation { name: r.operation.to_owned(), since: stamp(r.since) }),
        stages: active.iter().map(|active| stage_of(server, active, sandbox)).collect(),
        last_error: last_error(progress, id),
        ..Default::default()
    };
    why.next_deadline = next_deadline(&why.stages);
    let parent = server.owners.held().get(sandbox).map(|h| h.cgroup_parent.clone()).unwrap_or_default();
    let shim = crate::recover::shim_of(sandbox);
    let (state, reason) = match &candidate.sandbox {
        None => sandbox_state(server, id),
        Some(_) => container_state(server, id, why.operation.is_some()),
    };
    (why.state, why.reason) = (state.to_owned(), reason);
    waits(&mut why, &server.network.doing(sandbox), &active, sandbox, shim.as_ref());
    if candidate.sandbox.is_none() {
        why.kind = "pod sandbox".into();
        trouble(&mut why, &server.cgroups, &server.cgroups.sandbox(&parent, &sandbox.into()), shim.as_ref().map(|s| s.pid));
        if let Some(left) = progress.again_in(id) {
            why.next_deadline = Some(NextDeadline {
                in_seconds: left.as_secs().cast_signed(),
                of: "the next try".to_owned(),
                then: "what is left of it is given back".to_owned(),
            });
        }
        return why;
    }
    why.kind = "container".into();
    if let Some(shim) = shim.as_ref().filter(|s| s.trouble().is_some()) {
        why.waits_for.push(Wait::for_process("the pod's shim", shim));
    }
    trouble(&mut why, &server.cgroups, &server.cgroups.container(&parent, &id.into()), None);
    if active.is_empty() {
        stopping(server, &mut why);
    }
    why
}

/// A container that was asked to end: nothing is under way but its own end.
fn stopping(server: &Server, why: &mut Why) {
    let Some(grace) = server.progress.in_grace(&why.id) else { return };
    let view = server.board.container(&why.id);
    let signal = view.as_ref().map_or(15, |view| view.facts.stop_signal);
    let since = stamp(grace.since);
    why.reason = format!("stopping: asked to end by signal {signal} at {since}");
    why.operation = Some(Operation { name: "StopContainer".to_owned(), since });
    let process = view.and_then(|view| view.pid).and_then(Process::of);
    why.waits_for.push(match &process {
        Some(process) => Wait::for_process("the container's first process", process),
        None => Wait::of("the container's first process"),
    });
    let now = std::time::Instant::now();
    let left = grace.until.saturating_duration_since(now).as_secs().cast_signed();
    let passed = now.saturating_duration_since(grace.until).as_secs().cast_signed();
    why.next_deadline = Some(NextDeadline {
        in_seconds: left - passed,
        of: "the end of its grace period".to_owned(),
        then: "SIGKILL to all its processes".to_owned(),
    });
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
    fn failed_attempts_are_told_by_their_time_and_what_there_is_last() {
        let all = ["aaaa1", "bbbb2", "cccc3", "dddd4"].map(|id| one(id, "default/web", None)).to_vec();
        let at = |id: &str| match id {
            "aaaa1" => 30,
            "cccc3" => 20,
            "dddd4" => 10,
            _ => 99,
        };
        let ids: Vec<String> = in_order(all, at, |id| id != "bbbb2").into_iter().map(|c| c.id).collect();
        assert_eq!(ids, ["dddd4", "cccc3", "aaaa1", "bbbb2"]);
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
        assert!(next_deadline(&[]).is_none());
        let text = |stages: &[Stage]| Why { next_deadline: next_deadline(stages), ..Default::default() }.to_string();
        assert!(text(&[stage("a", 1, 60), stage("b", 5, 10)]).contains("deadline:   in 5 s, after 10 s of \"b\": then"));
        assert!(text(&[stage("a", 70, 60)]).contains("deadline:   passed 10 s ago, after 60 s of \"a\""));
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
}
