//! Sequences of events and what they lead to. Nothing here touches the system.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::board::ContainerFacts;
use crate::checkpoint::Wanted;
use crate::sandbox::holdings::Live;
use crate::spec::{ContainerSpec, Resources};

struct Rig {
    machine: Machine,
    now: Instant,
    tasks: Vec<Task>,
    events: Vec<(String, Change)>,
    /// Of the checkpoint under way.
    reply: Option<Reply<()>>,
}

type Wait<T> = oneshot::Receiver<Shared<T>>;

fn live() -> Arc<H> {
    Arc::new(Live::new("s".into(), Arc::default(), "/c".into()))
}

fn facts(spec: &ContainerSpec) -> Arc<ContainerFacts> {
    Arc::new(ContainerFacts::of(spec.clone()))
}

fn failure() -> Error {
    Error::Shim { action: "do it", message: "it failed".into() }
}

fn exit(code: i32) -> ProcessExit {
    ProcessExit { code, oom: false, finished_at: 100, start_error: String::new() }
}

impl Rig {
    fn new() -> Self {
        let machine = Machine::new("s".into(), Arc::default());
        Self { machine, now: Instant::now(), tasks: Vec::new(), events: Vec::new(), reply: None }
    }

    /// A ready sandbox.
    fn ready() -> Self {
        let mut rig = Self::new();
        let waiting = rig.run();
        rig.done(Done::Ran(Ok(live())));
        answer_of(waiting).unwrap();
        rig.tasks.clear();
        rig
    }

    fn apply(&mut self, event: Event) {
        let out = self.machine.apply(event, self.now);
        for answer in out.answers {
            answer();
        }
        self.tasks.extend(out.tasks);
        self.events.extend(out.events);
    }

    fn op<T>(&mut self, op: impl FnOnce(Reply<T>) -> Op) -> Wait<T> {
        let (reply, waiting) = oneshot::channel();
        self.apply(Event::Op(op(reply)));
        waiting
    }

    fn run(&mut self) -> Wait<SandboxId> {
        self.op(|reply| Op::Run { spec: Arc::default(), reply })
    }

    fn done(&mut self, done: Done) {
        self.apply(Event::Done(done, None));
    }

    fn create(&mut self, name: &str) -> Wait<ContainerId> {
        let spec = Box::new(ContainerSpec { name: name.into(), ..Default::default() });
        self.op(|reply| Op::CreateContainer { spec, log_directory: String::new(), reply })
    }

    /// The id that the creation under way was given.
    fn creating(&self) -> ContainerId {
        let task = self.tasks.iter().rev().find_map(|t| match t {
            Task::Create { id, .. } => Some(id.clone()),
            _ => None,
        });
        task.expect("a creation is under way")
    }

    fn made(&mut self, id: &ContainerId, name: &str) {
        let spec = ContainerSpec { name: name.into(), ..Default::default() };
        let made = CreatedContainer { facts: facts(&spec), created_at: 1, pid: 7, hold: None };
        self.done(Done::Created { id: id.clone(), result: Ok(made) });
    }

    /// A container that runs.
    fn running(name: &str) -> (Self, ContainerId) {
        let mut rig = Self::ready();
        let waiting = rig.create(name);
        let id = rig.creating();
        rig.made(&id, name);
        answer_of(waiting).unwrap();
        let waiting = rig.op(|reply| Op::StartContainer { id: id.clone(), reply });
        rig.done(Done::Started { id: id.clone(), at: 5, result: Ok(()) });
        answer_of(waiting).unwrap();
        rig.tasks.clear();
        (rig, id)
    }

    fn stop(&mut self, id: &ContainerId, seconds: u64) -> Wait<()> {
        let timeout = Duration::from_secs(seconds);
        self.op(|reply| Op::StopContainer { id: id.clone(), timeout, reply })
    }

    fn state(&self, id: &ContainerId) -> Option<ContainerState> {
        self.machine.containers.get(id).and_then(|container| container.state())
    }

    fn take(&mut self) -> Vec<&'static str> {
        self.tasks.drain(..).map(|t| name(&t)).collect()
    }
}

fn name(task: &Task) -> &'static str {
    match task {
        Task::Run => "run",
        Task::Create { .. } => "create",
        Task::Start { .. } => "start",
        Task::Signal { .. } => "signal",
        Task::Kill { .. } => "kill",
        Task::Delete { .. } => "delete",
        Task::Update { .. } => "update",
        Task::ReopenLog { .. } => "reopen",
        Task::Resize { .. } => "resize",
        Task::Checkpoint { .. } => "checkpoint",
        Task::Bury { .. } => "bury",
        Task::TearDown { .. } => "tear down",
        Task::Erase { .. } => "erase",
        Task::KillShim { .. } => "kill shim",
    }
}

fn answer_of<T>(mut waiting: Wait<T>) -> Shared<T> {
    waiting.try_recv().expect("an answer has come")
}

fn unanswered<T>(waiting: &mut Wait<T>) -> bool {
    matches!(waiting.try_recv(), Err(oneshot::error::TryRecvError::Empty))
}

#[test]
fn a_retry_joins_the_run_that_is_under_way() {
    let mut rig = Rig::new();
    let first = rig.run();
    drop(first); // The client gave up.
    let second = rig.run();
    assert_eq!(rig.take(), ["run"]);
    assert!(!rig.machine.listed());
    rig.done(Done::Ran(Ok(live())));
    assert_eq!(answer_of(second).unwrap().as_str(), "s");
    assert!(rig.machine.ready());
}

#[test]
fn a_retry_gets_what_was_made_however_its_first_answer_was_lost_and_another_pod_does_not() {
    let mut rig = Rig::new();
    drop(rig.run());
    rig.done(Done::Ran(Ok(live())));
    for _ in 0..2 {
        let retry = rig.run();
        assert_eq!(answer_of(retry).unwrap().as_str(), "s");
    }
    let spec = Arc::new(SandboxSpec { hostname: "other".into(), ..Default::default() });
    let other = rig.op(|reply| Op::Run { spec, reply });
    assert!(matches!(*answer_of(other).unwrap_err(), Error::Exists { .. }));
}

#[test]
fn a_failed_run_answers_everybody_and_is_over() {
    let mut rig = Rig::new();
    let (run, stop) = (rig.run(), rig.op(Op::Stop));
    rig.done(Done::Ran(not_made(Rest::Nothing)));
    assert!(answer_of(run).is_err());
    assert!(answer_of(stop).is_ok());
    assert!(rig.machine.over() && !rig.machine.listed());
}

fn not_made(rest: Rest) -> Result<Arc<H>, NotMade> {
    Err(NotMade { error: failure(), rest })
}

#[test]
fn what_could_not_be_undone_is_listed_and_tried_again_later_each_time_until_nothing_is_left() {
    let mut rig = Rig::new();
    let run = rig.run();
    rig.tasks.clear();
    rig.done(Done::Ran(not_made(Rest::Held(live()))));
    assert!(answer_of(run).is_err());
    assert!(rig.machine.listed() && rig.machine.holds() && !rig.machine.ready() && !rig.machine.over());
    let mut pauses = Vec::new();
    for _ in 0..7 {
        let due = rig.machine.deadline().expect("a next try");
        pauses.push((due - rig.now).as_secs());
        rig.apply(Event::Tick);
        assert!(rig.take().is_empty(), "not before its time");
        rig.now = due;
        rig.apply(Event::Tick);
        assert_eq!(rig.take(), ["tear down"]);
        rig.done(Done::TornDown { rest: Some(live()), result: Err(failure()) });
    }
    assert_eq!(pauses, [2, 4, 8, 16, 32, 60, 60]);
    rig.now = rig.machine.deadline().unwrap();
    rig.apply(Event::Tick);
    rig.done(Done::TornDown { rest: None, result: Ok(()) });
    rig.take();
    assert!(!rig.machine.over(), "its folders are still there");
    rig.done(Done::Erased(Ok(())));
    assert!(rig.machine.over() && !rig.machine.listed());
}

#[test]
fn clients_can_stop_and_remove_what_could_not_be_undone() {
    let mut rig = Rig::new();
    let _run = rig.run();
    rig.done(Done::Ran(not_made(Rest::Held(live()))));
    rig.tasks.clear();
    let stop = rig.op(Op::Stop);
    let Some(Task::TearDown { told: false, .. }) = rig.tasks.pop() else { panic!("it is on record as half made") };
    rig.done(Done::TornDown { rest: None, result: Ok(()) });
    answer_of(stop).unwrap();
    let remove = rig.op(Op::Remove);
    rig.done(Done::Erased(Ok(())));
    answer_of(remove).unwrap();
    assert!(rig.machine.over());
}

#[test]
fn the_next_of_the_name_drives_the_undoing_and_is_told_why_it_has_to_wait() {
    let mut rig = Rig::new();
    let _run = rig.run();
    rig.done(Done::Ran(not_made(Rest::Held(live()))));
    rig.tasks.clear();
    let next = rig.run();
    assert_eq!(rig.take(), ["tear down"]);
    rig.done(Done::TornDown { rest: Some(live()), result: Err(failure()) });
    assert!(matches!(*answer_of(next).unwrap_err(), Error::Shim { .. }), "not that the name is taken");
    let mut next = rig.run();
    rig.done(Done::TornDown { rest: None, result: Ok(()) });
    let out = rig.machine.apply(Event::Done(Done::Erased(Ok(())), None), rig.now);
    assert!(out.heirs.len() == 1 && unanswered(&mut next), "a new owner makes it");
}

#[test]
fn what_an_agent_left_half_made_is_shown_when_it_can_not_be_undone() {
    let mut rig = Rig::new();
    let mut machine = Machine::recovered("s".into(), Arc::default(), 1, false, Some(live()), BTreeMap::new());
    machine.hide(Instant::now());
    rig.machine = machine;
    let _removal = rig.op(Op::Remove);
    assert_eq!(rig.take(), ["tear down"]);
    assert!(!rig.machine.listed());
    rig.done(Done::TornDown { rest: Some(live()), result: Err(failure()) });
    assert!(rig.machine.listed() && rig.machine.deadline().is_some());
}

#[test]
fn creations_of_one_name_join_and_a_failed_one_frees_the_name() {
    let mut rig = Rig::ready();
    let (first, second) = (rig.create("a"), rig.create("a"));
    assert_eq!(rig.tasks.len(), 1);
    let id = rig.creating();
    rig.done(Done::Created { id, result: Err(failure()) });
    assert!(answer_of(first).is_err() && answer_of(second).is_err());
    let third = rig.create("a");
    let id = rig.creating();
    rig.made(&id, "a");
    assert_eq!(answer_of(third).unwrap(), id);
    let fourth = rig.create("a");
    assert_eq!(answer_of(fourth).unwrap(), id, "a retry whose first answer was lost");
    let spec = Box::new(ContainerSpec { name: "a".into(), tty: true, ..Default::default() });
    let other = rig.op(|reply| Op::CreateContainer { spec, log_directory: String::new(), reply });
    assert!(matches!(*answer_of(other).unwrap_err(), Error::Exists { .. }));
}

#[test]
fn a_name_that_is_being_given_up_is_waited_for() {
    let (mut rig, id) = Rig::running("a");
    let _remove = rig.op(|reply| Op::RemoveContainer { id: id.clone(), reply });
    let mut next = rig.create("a");
    rig.apply(Event::Exited { id: id.clone(), exit: exit(137) });
    rig.take();
    assert!(unanswered(&mut next));
    rig.done(Done::Deleted { id: id.clone(), result: Ok(()) });
    assert_ne!(rig.creating(), id);
    let young = rig.creating();
    rig.made(&young, "a");
    assert_eq!(answer_of(next).unwrap(), young);

    let remove = rig.op(Op::Remove);
    let mut run = rig.run();
    rig.apply(Event::Exited { id: young.clone(), exit: exit(137) });
    rig.done(Done::TornDown { rest: None, result: Ok(()) });
    rig.done(Done::Deleted { id: young, result: Ok(()) });
    let out = rig.machine.apply(Event::Done(Done::Erased(Ok(())), None), rig.now);
    assert_eq!(out.heirs.len(), 1, "a new owner makes it");
    assert!(unanswered(&mut run));
    drop(remove);
}

#[test]
fn those_who_wait_for_a_late_step_are_told_and_it_goes_on() {
    let mut rig = Rig::ready();
    let first = rig.create("a");
    let id = rig.creating();
    rig.take();
    rig.apply(Event::Overdue { container: Some(id.clone()), error: failure().into() });
    assert!(answer_of(first).is_err());
    let retry = rig.create("a");
    assert!(answer_of(retry).is_err(), "told at once while it lasts");
    assert!(rig.take().is_empty(), "not begun again");
    rig.made(&id, "a");
    let retry = rig.create("a");
    assert_eq!(answer_of(retry).unwrap(), id);
}

#[test]
fn a_pod_that_is_to_end_does_not_wait_for_a_shim_that_answers_nobody() {
    let (mut rig, id) = Rig::running("a");
    let mut stop = rig.op(Op::Stop);
    assert_eq!(rig.take(), ["kill"]);
    let silent =
        Error::Overdue { step: "kill", subject: "a".into(), object: String::new(), since: String::new(), limit: Duration::ZERO };
    rig.done(Done::Signalled { id, result: Err(silent) });
    assert_eq!(rig.take(), ["kill shim"]);
    assert!(unanswered(&mut stop));
    rig.apply(Event::ShimGone);
    rig.done(Done::Killed(Ok(())));
    rig.done(Done::Lost(BTreeMap::new()));
    assert_eq!(rig.take(), ["bury", "tear down"]);
    rig.done(Done::TornDown { rest: None, result: Ok(()) });
    assert!(answer_of(stop).is_ok());
}

#[test]
fn a_creation_that_a_disk_holds_keeps_the_rest_of_a_dead_pod_from_nothing() {
    let mut rig = Rig::ready();
    let _first = rig.create("a");
    let id = rig.creating();
    rig.apply(Event::Overdue { container: Some(id.clone()), error: failure().into() });
    let stop = rig.op(Op::Stop);
    rig.apply(Event::ShimGone);
    rig.take();
    rig.done(Done::Lost(BTreeMap::new()));
    assert_eq!(rig.take(), ["tear down"]);
    rig.done(Done::TornDown { rest: None, result: Ok(()) });
    assert!(answer_of(stop).is_ok());
    let remove = rig.op(Op::Remove);
    assert!(answer_of(remove).is_err(), "its folders may not go yet");
    rig.done(Done::Created { id, result: Err(failure()) });
    assert_eq!(rig.take(), ["erase"]);
}

#[test]
fn a_container_that_was_made_as_its_shim_died_ends_with_its_pod() {
    let mut rig = Rig::ready();
    let _first = rig.create("a");
    let id = rig.creating();
    rig.apply(Event::ShimGone);
    rig.done(Done::Lost(BTreeMap::new()));
    rig.take();
    rig.made(&id, "a");
    assert_eq!(rig.machine.containers[&id].exit().map(|e| e.code), Some(255));
    assert_eq!(rig.take(), ["tear down"]);
}

#[test]
fn what_a_silent_shim_knew_counts_once_it_answers() {
    let (mut rig, running) = Rig::running("a");
    let _second = rig.create("b");
    let lost = rig.creating();
    rig.made(&lost, "b");
    let fate = Fate { started_at: 5, pid: Some(9), exit: Some(exit(3)) };
    rig.apply(Event::Reached { live: live(), fates: BTreeMap::from([(running.clone(), fate)]) });
    assert_eq!(rig.machine.containers[&running].exit().map(|e| e.code), Some(3));
    assert_eq!(rig.machine.containers[&lost].exit().map(|e| e.code), Some(255));
    assert!(rig.machine.ready());
}

#[test]
fn why_a_program_did_not_start_outlives_the_shim_that_knew_it() {
    let (mut rig, id) = Rig::running("a");
    rig.apply(Event::ShimGone);
    let end = ProcessExit { start_error: "no such file".into(), ..exit(128) };
    rig.done(Done::Lost(BTreeMap::from([(id.clone(), end)])));
    let exit = rig.machine.containers[&id].exit().unwrap().clone();
    assert_eq!((exit.code, exit.reason.as_str(), exit.message.as_str()), (128, "StartError", "no such file"));
}

#[test]
fn a_container_that_nobody_waited_for_goes_to_the_retry() {
    let mut rig = Rig::ready();
    drop(rig.create("a"));
    let id = rig.creating();
    rig.made(&id, "a");
    let retry = rig.create("a");
    assert_eq!(answer_of(retry).unwrap(), id);
}

#[test]
fn a_failed_start_leaves_the_container_exited_128_with_the_reason() {
    let mut rig = Rig::ready();
    let _created = rig.create("a");
    let id = rig.creating();
    rig.made(&id, "a");
    let start = rig.op(|reply| Op::StartContainer { id: id.clone(), reply });
    // The shim reports the end as well, before the answer.
    rig.apply(Event::Exited { id: id.clone(), exit: exit(128) });
    rig.done(Done::Started { id: id.clone(), at: 9, result: Err(failure()) });
    assert!(answer_of(start).is_err());
    let exit = rig.machine.containers[&id].exit().unwrap().clone();
    assert_eq!((exit.code, exit.reason.as_str(), exit.message.as_str()), (128, "StartError", "it failed"));
}

#[test]
fn an_exit_that_overtakes_the_answer_to_the_start_is_not_lost() {
    let mut rig = Rig::ready();
    let _created = rig.create("a");
    let id = rig.creating();
    rig.made(&id, "a");
    let start = rig.op(|reply| Op::StartContainer { id: id.clone(), reply });
    rig.apply(Event::Exited { id: id.clone(), exit: exit(0) });
    assert_eq!(rig.state(&id), Some(ContainerState::Created));
    rig.done(Done::Started { id: id.clone(), at: 500, result: Ok(()) });
    assert!(answer_of(start).is_ok());
    let exit = rig.machine.containers[&id].exit().unwrap();
    assert_eq!((exit.reason.as_str(), exit.finished_at), ("Completed", 500), "an end is never before its start");
}

#[test]
fn a_stop_signals_waits_and_kills_and_a_later_call_can_shorten_it() {
    let (mut rig, id) = Rig::running("a");
    let mut slow = rig.stop(&id, 60);
    assert_eq!(rig.take(), ["signal"]);
    assert_eq!(rig.machine.deadline(), Some(rig.now + Duration::from_secs(60)));
    rig.now += Duration::from_secs(1);
    let mut fast = rig.stop(&id, 2);
    assert!(rig.take().is_empty(), "the stop signal is sent once");
    assert_eq!(rig.machine.deadline(), Some(rig.now + Duration::from_secs(2)));
    rig.now += Duration::from_secs(2);
    rig.apply(Event::Tick);
    assert_eq!(rig.take(), ["kill"]);
    assert!(unanswered(&mut slow) && unanswered(&mut fast));
    rig.apply(Event::Exited { id: id.clone(), exit: exit(137) });
    assert!(answer_of(slow).is_ok() && answer_of(fast).is_ok());
    assert_eq!(rig.state(&id), Some(ContainerState::Exited));
    assert_eq!(rig.machine.deadline(), None);
}

#[test]
fn a_stop_without_time_kills_at_once_and_a_failed_kill_is_tried_again() {
    let (mut rig, id) = Rig::running("a");
    let _stop = rig.stop(&id, 0);
    assert_eq!(rig.take(), ["kill"]);
    rig.done(Done::Signalled { id: id.clone(), result: Err(failure()) });
    rig.now += Duration::from_secs(1);
    rig.apply(Event::Tick);
    assert_eq!(rig.take(), ["kill"]);
}

#[test]
fn stopping_what_does_not_run_is_nothing_to_do() {
    let mut rig = Rig::ready();
    let _created = rig.create("a");
    let id = rig.creating();
    rig.made(&id, "a");
    rig.take();
    let stop = rig.stop(&id, 5);
    assert!(answer_of(stop).is_ok());
    let unknown = rig.stop(&"nobody".into(), 5);
    assert!(answer_of(unknown).is_ok());
    assert!(rig.take().is_empty());
}

#[test]
fn removing_a_running_container_kills_it_first() {
    let (mut rig, id) = Rig::running("a");
    let mut remove = rig.op(|reply| Op::RemoveContainer { id: id.clone(), reply });
    assert_eq!(rig.take(), ["kill"]);
    rig.apply(Event::Exited { id: id.clone(), exit: exit(137) });
    assert_eq!(rig.take(), ["delete"]);
    assert!(unanswered(&mut remove));
    rig.done(Done::Deleted { id: id.clone(), result: Ok(()) });
    assert!(answer_of(remove).is_ok());
    assert!(rig.machine.containers.is_empty());
}

#[test]
fn a_failed_removal_keeps_the_container_and_a_later_call_resumes() {
    let (mut rig, id) = Rig::running("a");
    rig.apply(Event::Exited { id: id.clone(), exit: exit(0) });
    let first = rig.op(|reply| Op::RemoveContainer { id: id.clone(), reply });
    rig.take();
    rig.done(Done::Deleted { id: id.clone(), result: Err(failure()) });
    assert!(answer_of(first).is_err());
    assert_eq!(rig.state(&id), Some(ContainerState::Exited));
    let second = rig.op(|reply| Op::RemoveContainer { id: id.clone(), reply });
    assert_eq!(rig.take(), ["delete"]);
    rig.done(Done::Deleted { id, result: Ok(()) });
    assert!(answer_of(second).is_ok());
}

#[test]
fn stopping_a_sandbox_ends_its_containers_waits_for_creations_and_then_tears_down() {
    let (mut rig, id) = Rig::running("a");
    let _creation = rig.create("b");
    let young = rig.creating();
    rig.take();
    let mut stop = rig.op(Op::Stop);
    assert!(!rig.machine.ready());
    assert_eq!(rig.take(), ["kill"]);
    rig.apply(Event::Exited { id, exit: exit(137) });
    assert!(rig.take().is_empty(), "a creation is under way");
    rig.made(&young, "b");
    assert_eq!(rig.take(), ["kill"]);
    rig.apply(Event::Exited { id: young, exit: exit(137) });
    assert_eq!(rig.take(), ["tear down"]);
    assert!(unanswered(&mut stop));
    rig.done(Done::TornDown { rest: None, result: Ok(()) });
    assert!(answer_of(stop).is_ok());
    let late = rig.create("c");
    assert!(matches!(*answer_of(late).unwrap_err(), Error::State { .. }));
}

#[test]
fn stop_resumes_after_a_failed_teardown() {
    let mut rig = Rig::ready();
    let first = rig.op(Op::Stop);
    rig.take();
    rig.done(Done::TornDown { rest: Some(live()), result: Err(failure()) });
    assert!(answer_of(first).is_err());
    assert!(rig.machine.listed() && !rig.machine.ready());
    assert!(rig.take().is_empty(), "not tried again by itself");
    let second = rig.op(Op::Stop);
    assert_eq!(rig.take(), ["tear down"]);
    rig.done(Done::TornDown { rest: None, result: Ok(()) });
    assert!(answer_of(second).is_ok());
    let third = rig.op(Op::Stop);
    assert!(answer_of(third).is_ok());
}

#[test]
fn removing_a_sandbox_stops_it_deletes_its_containers_and_then_itself() {
    let (mut rig, id) = Rig::running("a");
    let mut remove = rig.op(Op::Remove);
    assert_eq!(rig.take(), ["kill"]);
    rig.apply(Event::Exited { id: id.clone(), exit: exit(137) });
    assert_eq!(rig.take(), ["tear down"]);
    rig.done(Done::TornDown { rest: None, result: Ok(()) });
    assert_eq!(rig.take(), ["delete"]);
    rig.done(Done::Deleted { id, result: Ok(()) });
    assert_eq!(rig.take(), ["erase"]);
    assert!(unanswered(&mut remove));
    rig.done(Done::Erased(Ok(())));
    assert!(answer_of(remove).is_ok());
    assert!(rig.machine.over());
}

#[test]
fn the_death_of_the_shim_is_the_death_of_the_pod() {
    let (mut rig, id) = Rig::running("a");
    let mut stop = rig.stop(&id, 60);
    rig.take();
    rig.apply(Event::ShimGone);
    rig.apply(Event::ShimGone);
    assert_eq!(rig.take(), ["bury"]);
    assert!(!rig.machine.ready());
    assert!(unanswered(&mut stop));
    rig.done(Done::Lost(BTreeMap::new()));
    assert!(answer_of(stop).is_ok());
    let exit = rig.machine.containers[&id].exit().unwrap();
    assert_eq!((exit.code, exit.reason.as_str()), (255, "Unknown"));
    assert_eq!(rig.take(), ["tear down"]);
    rig.done(Done::TornDown { rest: None, result: Ok(()) });
    assert!(rig.machine.listed() && !rig.machine.ready());
}

#[test]
fn an_exit_that_the_dead_shim_had_recorded_counts() {
    let (mut rig, id) = Rig::running("a");
    rig.apply(Event::ShimGone);
    rig.done(Done::Lost(BTreeMap::from([(id.clone(), exit(3))])));
    assert_eq!(rig.machine.containers[&id].exit().unwrap().code, 3);
}

#[test]
fn limits_change_only_when_they_were_applied() {
    let (mut rig, id) = Rig::running("a");
    for (result, want) in [(Err(failure()), 0), (Ok(()), 512)] {
        let resources = Box::new(Resources { cpu_shares: 512, ..Default::default() });
        let good = result.is_ok();
        let waiting = rig.op(|reply| Op::Update { id: id.clone(), resources, by_plugin: false, reply });
        let Some(Task::Update { id: of, merged, reply, .. }) = rig.tasks.pop() else { panic!("no update") };
        rig.done(Done::Updated { id: of, resources: merged, reply, result });
        assert_eq!(answer_of(waiting).is_ok(), good);
        assert_eq!(rig.machine.containers[&id].resources.cpu_shares, want);
    }
}

#[test]
fn updates_of_one_container_are_done_one_after_the_other_and_none_is_lost() {
    let (mut rig, id) = Rig::running("a");
    let of = |resources| |reply| Op::Update { id: id.clone(), resources: Box::new(resources), by_plugin: false, reply };
    let shares = rig.op(of(Resources { cpu_shares: 512, ..Default::default() }));
    let mut memory = rig.op(of(Resources { memory_limit: 1 << 20, ..Default::default() }));
    for waiting in [shares, {
        assert!(unanswered(&mut memory));
        memory
    }] {
        let Some(Task::Update { id, merged, reply, .. }) = rig.tasks.pop() else { panic!("no update") };
        assert!(rig.tasks.iter().all(|task| !matches!(task, Task::Update { .. })), "both at once");
        rig.done(Done::Updated { id, resources: merged, reply, result: Ok(()) });
        answer_of(waiting).unwrap();
    }
    let now = &rig.machine.containers[&id].resources;
    assert_eq!((now.cpu_shares, now.memory_limit), (512, 1 << 20));
}

#[test]
fn a_resized_pod_is_what_was_put_on_record_and_the_teardown_waits_for_that() {
    let (mut rig, _) = Rig::running("a");
    let limits = |shares| Resources { cpu_shares: shares, ..Default::default() };
    let op = |resources, overhead| |reply| Op::Resize { resize: Box::new(Resize { resources, overhead }), reply };
    let resized = |rig: &mut Rig, result| {
        let Some(Task::Resize { spec, reply, .. }) = rig.tasks.pop() else { panic!("no resize") };
        rig.done(Done::Resized { spec, reply, result });
    };
    let failed = rig.op(op(Some(limits(9)), None));
    let mut second = rig.op(op(Some(limits(1)), Some(limits(2))));
    resized(&mut rig, Err(failure()));
    assert!(answer_of(failed).is_err() && rig.machine.spec.resources.is_none() && unanswered(&mut second));
    resized(&mut rig, Ok(()));
    answer_of(second).unwrap();
    // What is not named stays.
    let last = rig.op(op(Some(limits(3)), None));
    let mut stopping = rig.op(Op::Stop);
    rig.apply(Event::Tick);
    for id in rig.machine.containers.keys().cloned().collect::<Vec<_>>() {
        rig.apply(Event::Exited { id, exit: exit(0) });
    }
    assert!(!rig.tasks.iter().any(|task| matches!(task, Task::TearDown { .. })) && unanswered(&mut stopping));
    rig.tasks.retain(|task| matches!(task, Task::Resize { .. }));
    resized(&mut rig, Ok(()));
    answer_of(last).unwrap();
    let spec = &rig.machine.spec;
    assert_eq!((spec.resources.clone(), spec.overhead.clone()), (Some(limits(3)), Some(limits(2))));
    assert_eq!(rig.take(), ["tear down"]);
    assert!(answer_of(rig.op(op(None, None))).is_err(), "a stopped pod can not be resized");
}

#[test]
fn what_can_not_be_erased_is_shown_and_plugins_hear_of_the_end_of_those_that_ran_alone() {
    let mut rig = Rig::new();
    let mut machine = Machine::recovered("s".into(), Arc::default(), 1, false, None, BTreeMap::new());
    machine.hide(Instant::now());
    rig.machine = machine;
    let _removal = rig.op(Op::Remove);
    assert!(matches!(rig.tasks.pop(), Some(Task::Erase { told: false })));
    let out = rig.machine.apply(Event::Done(Done::Erased(Err(failure())), None), rig.now);
    assert!(out.sandbox_changed && rig.machine.listed());
    rig.now += Duration::from_secs(10);
    rig.apply(Event::Tick);
    assert!(matches!(rig.tasks.pop(), Some(Task::Erase { told: false })), "it never ran, shown or not");

    let mut ran = Rig::ready();
    let _removal = ran.op(Op::Remove);
    assert!(matches!(ran.tasks.pop(), Some(Task::TearDown { told: true, .. })));
    ran.done(Done::TornDown { rest: None, result: Ok(()) });
    assert!(matches!(ran.tasks.pop(), Some(Task::Erase { told: true })));
}

/// Begins a checkpoint: what cuts it, and the answer.
fn checkpointing(rig: &mut Rig, id: &ContainerId) -> (CancellationToken, Wait<()>) {
    let wanted = Box::new(Wanted { program: "/criu".into(), location: "/c.tar".into(), limit: Duration::from_secs(9) });
    let waiting = rig.op(|reply| Op::Checkpoint { id: id.clone(), wanted: wanted.clone(), reply });
    let second = answer_of(rig.op(|reply| Op::Checkpoint { id: id.clone(), wanted, reply }));
    assert!(second.is_err_and(|e| e.to_string().contains("being checkpointed")), "one at a time");
    let Some(Task::Checkpoint { cut, reply, .. }) = rig.tasks.pop() else { panic!("no checkpoint") };
    rig.reply = Some(reply);
    (cut, waiting)
}

#[test]
fn a_checkpoint_goes_on_within_the_grace_and_is_cut_by_the_kill_and_the_removal_waits_for_its_end() {
    let (mut rig, id) = Rig::running("a");
    let (cut, waiting) = checkpointing(&mut rig, &id);
    let stopping = rig.stop(&id, 10);
    assert_eq!(rig.take(), ["signal"]);
    assert!(!cut.is_cancelled(), "the container may end in its time");
    rig.now += Duration::from_secs(11);
    rig.apply(Event::Tick);
    assert_eq!(rig.take(), ["kill"]);
    assert!(cut.is_cancelled());
    rig.apply(Event::Exited { id: id.clone(), exit: exit(137) });
    answer_of(stopping).unwrap();
    let mut removing = rig.op(|reply| Op::RemoveContainer { id: id.clone(), reply });
    assert!(rig.take().is_empty() && unanswered(&mut removing), "it works in the container's folder still");
    let reply = rig.reply.take().expect("the checkpoint's");
    rig.done(Done::Checkpointed { id: id.clone(), reply, result: Err(failure()) });
    assert!(answer_of(waiting).is_err());
    assert_eq!(rig.take(), ["delete"]);
}

#[test]
fn a_checkpoint_ends_with_its_container_and_a_stopped_one_gets_none() {
    let (mut rig, id) = Rig::running("a");
    let (cut, _waiting) = checkpointing(&mut rig, &id);
    rig.apply(Event::Exited { id: id.clone(), exit: exit(0) });
    assert!(cut.is_cancelled());
    let wanted = Box::new(Wanted { program: "/criu".into(), location: "/c.tar".into(), limit: Duration::ZERO });
    assert!(answer_of(rig.op(|reply| Op::Checkpoint { id: id.clone(), wanted, reply })).is_err());
}

#[test]
fn that_a_sandbox_stopped_is_announced_once_and_before_its_deletion() {
    let of = |rig: &Rig| rig.events.iter().filter(|(s, _)| s == "s").map(|(_, c)| *c).collect::<Vec<_>>();
    let mut rig = Rig::ready();
    let _stopping = rig.op(Op::Stop);
    rig.done(Done::TornDown { rest: Some(live()), result: Err(failure()) });
    assert_eq!(of(&rig), [Change::Created, Change::Started], "it is not down yet");
    for _ in 0..2 {
        let _stopping = rig.op(Op::Stop);
        rig.done(Done::TornDown { rest: None, result: Ok(()) });
    }
    let _removing = rig.op(Op::Remove);
    rig.done(Done::Erased(Ok(())));
    assert_eq!(of(&rig), [Change::Created, Change::Started, Change::Stopped, Change::Deleted]);

    let mut dead = Rig::ready();
    dead.apply(Event::ShimGone);
    dead.done(Done::Lost(BTreeMap::new()));
    dead.done(Done::TornDown { rest: None, result: Ok(()) });
    assert_eq!(of(&dead), [Change::Created, Change::Started, Change::Stopped], "a shim's death stops its pod");
}

#[test]
fn what_happened_is_announced_once_and_in_order() {
    let (mut rig, id) = Rig::running("a");
    rig.apply(Event::Exited { id: id.clone(), exit: exit(0) });
    rig.apply(Event::Exited { id: id.clone(), exit: exit(0) });
    let of: Vec<Change> = rig.events.iter().filter(|(s, _)| *s == id.as_str()).map(|(_, c)| *c).collect();
    assert_eq!(of, [Change::Created, Change::Started, Change::Stopped]);
}
