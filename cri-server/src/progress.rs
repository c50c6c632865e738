//! What every operation is doing at this moment, since when and until when, and how the last one failed. Written by the executors,
//! read by `berth why` and by the watch over deadlines. Has a lock of its own, held for moments: a stuck owner, shim or disk
//! never keeps anybody from asking. Must not decide anything.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::steps::{Deadlines, Past, Step};

/// Of how many sandboxes and containers the last failure is remembered.
const FAILURES: usize = 512;

/// A step that has begun and not ended.
#[derive(Debug, Clone)]
pub(crate) struct Active {
    pub(crate) subject: String,
    pub(crate) step: Step,
    /// What it works on: a plugin, a path, a process.
    pub(crate) object: String,
    /// Unix nanoseconds.
    pub(crate) since: i64,
    begun: Instant,
    pub(crate) limit: Duration,
    told: bool,
}

impl Active {
    /// How long it has been going on.
    pub(crate) fn age(&self) -> Duration {
        self.begun.elapsed()
    }

    fn error(&self) -> Error {
        Error::Overdue {
            step: self.step.text(),
            subject: self.subject.clone(),
            object: self.object.clone(),
            since: stamp(self.since),
            limit: self.limit,
        }
    }
}

/// An operation under way.
#[derive(Debug, Clone)]
pub(crate) struct Running {
    /// The CRI verb.
    pub(crate) operation: &'static str,
    /// As in [`Failure`].
    pub(crate) name: String,
    /// Unix nanoseconds.
    pub(crate) since: i64,
}

/// The last failed operation of a sandbox or container.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    /// The CRI verb.
    pub(crate) operation: &'static str,
    /// For people: `namespace/name` of the pod, or of the container within it.
    pub(crate) name: String,
    /// The last step that had begun.
    pub(crate) step: Option<&'static str>,
    pub(crate) error: String,
    /// Unix nanoseconds.
    pub(crate) at: i64,
    /// How undoing what it had made failed at last.
    pub(crate) undo: Option<String>,
}

/// The operation that gives back what a RunPodSandbox has left that could not be undone.
pub(crate) const UNDO: &str = "undoing of RunPodSandbox";

/// A container that was asked to end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grace {
    /// Unix nanoseconds.
    pub(crate) since: i64,
    /// When it is killed.
    pub(crate) until: Instant,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    active: BTreeMap<u64, Active>,
    last: BTreeMap<String, Step>,
    /// The step that an operation failed at, while what it made is undone.
    pinned: BTreeMap<String, Step>,
    /// When what is left of a failed sandbox is undone again.
    again: BTreeMap<String, Instant>,
    /// By subject, the latest last: a checkpoint goes on while its container is asked to end.
    running: BTreeMap<String, Vec<Running>>,
    graces: BTreeMap<String, Grace>,
    failures: BTreeMap<String, Failure>,
    order: VecDeque<String>,
}

impl Inner {
    fn ended(&mut self, subject: &str, operation: &str) {
        if let Some(mine) = self.running.get_mut(subject) {
            mine.retain(|running| running.operation != operation);
            if mine.is_empty() {
                self.running.remove(subject);
            }
        }
    }
}

/// The register of what goes on.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    inner: Mutex<Inner>,
    deadlines: Deadlines,
}

/// A step under way; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Under {
    progress: Arc<Progress>,
    key: u64,
}

impl Drop for Under {
    fn drop(&mut self) {
        self.progress.lock().active.remove(&self.key);
    }
}

/// A time as people read it.
pub(crate) fn stamp(ns: i64) -> String {
    let whole = i128::from(ns) - i128::from(ns.rem_euclid(1_000_000));
    let time = time::OffsetDateTime::from_unix_timestamp_nanos(whole).unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    time.format(&time::format_description::well_known::Rfc3339).unwrap_or_default()
}

impl Progress {
    /// Nothing goes on yet.
    pub(crate) fn new(deadlines: Deadlines) -> Self {
        Self { inner: Mutex::default(), deadlines }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long a step may take.
    pub(crate) fn limit(&self, step: Step) -> Duration {
        step.limit(&self.deadlines)
    }

    /// A step begins; it ends when the value is dropped.
    pub(crate) fn begin(self: &Arc<Self>, subject: &str, step: Step, object: impl Into<String>) -> Under {
        self.begin_within(subject, step, object, self.limit(step))
    }

    /// [`Self::begin`] of a step whose limit the client has set.
    pub(crate) fn begin_within(self: &Arc<Self>, subject: &str, step: Step, object: impl Into<String>, limit: Duration) -> Under {
        let active = Active {
            subject: subject.to_owned(),
            step,
            object: object.into(),
            since: crate::clock::now_ns(),
            begun: Instant::now(),
            limit,
            told: false,
        };
        let mut inner = self.lock();
        inner.next += 1;
        let key = inner.next;
        inner.active.insert(key, active);
        inner.last.insert(subject.to_owned(), step);
        drop(inner);
        Under { progress: self.clone(), key }
    }

    /// Does a step. Past its limit it is given up with an error, or goes on, as the table says.
    pub(crate) async fn step<T>(
        self: &Arc<Self>,
        subject: &str,
        step: Step,
        object: impl Into<String>,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let under = self.begin(subject, step, object);
        match step.past() {
            Past::GoesOn => work.await,
            Past::GivenUp => match tokio::time::timeout(self.limit(step), work).await {
                Ok(result) => result,
                Err(_) => Err(self.error_of(&under)),
            },
        }
    }

    fn error_of(&self, under: &Under) -> Error {
        self.lock().active.get(&under.key).map_or(Error::Cancelled { what: "a step" }, Active::error)
    }

    /// The step of a subject that has just passed its limit. Each is told once.
    pub(crate) fn overdue(&self, subject: &str) -> Option<Error> {
        let mut inner = self.lock();
        let late = inner
            .active
            .values_mut()
            .find(|a| !a.told && a.subject == subject && a.step.past() == Past::GoesOn && a.age() > a.limit)?;
        late.told = true;
        Some(late.error())
    }

    /// What goes on for a subject, the oldest first.
    pub(crate) fn active(&self, subject: &str) -> Vec<Active> {
        self.lock().active.values().filter(|a| a.subject == subject).cloned().collect()
    }

    /// An operation begins.
    pub(crate) fn operate(&self, subject: &str, name: &str, operation: &'static str) {
        let running = Running { operation, name: name.to_owned(), since: crate::clock::now_ns() };
        let mut inner = self.lock();
        inner.pinned.remove(subject);
        let mine = inner.running.entry(subject.to_owned()).or_default();
        mine.retain(|other| other.operation != operation);
        mine.push(running);
    }

    /// The operation under way; of several the one that began last.
    pub(crate) fn running(&self, subject: &str) -> Option<Running> {
        self.lock().running.get(subject)?.last().cloned()
    }

    /// The latest operation under way of every subject that has one.
    pub(crate) fn all_running(&self) -> BTreeMap<String, Running> {
        self.lock().running.iter().filter_map(|(subject, all)| Some((subject.clone(), all.last()?.clone()))).collect()
    }

    /// The operation of a subject has failed at the step that began last; those that follow undo it.
    pub(crate) fn pin(&self, subject: &str) {
        let mut inner = self.lock();
        if let Some(step) = inner.last.get(subject).copied() {
            inner.pinned.insert(subject.to_owned(), step);
        }
    }

    /// When what is left of a failed sandbox is undone again; none: nothing is left, or it is being undone.
    pub(crate) fn again(&self, subject: &str, at: Option<Instant>) {
        match at {
            Some(at) => self.lock().again.insert(subject.to_owned(), at),
            None => self.lock().again.remove(subject),
        };
    }

    /// How long until then.
    pub(crate) fn again_in(&self, subject: &str) -> Option<Duration> {
        self.lock().again.get(subject).map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// A container was asked to end and is killed then; none: no longer.
    pub(crate) fn grace(&self, subject: &str, until: Option<Instant>) {
        match until {
            Some(until) => {
                let fresh = || Grace { since: crate::clock::now_ns(), until };
                self.lock().graces.entry(subject.to_owned()).or_insert_with(fresh).until = until;
            }
            None => _ = self.lock().graces.remove(subject),
        }
    }

    /// Since when and until when a container that was asked to end is waited for.
    pub(crate) fn in_grace(&self, subject: &str) -> Option<Grace> {
        self.lock().graces.get(subject).copied()
    }

    /// Remembers how an operation failed. One that fails of itself, as a wrong request does, needs no step.
    pub(crate) fn failed(&self, subject: &str, name: String, operation: &'static str, error: &Error) {
        let mut inner = self.lock();
        if !matches!(error, Error::Overdue { .. }) {
            inner.ended(subject, operation);
        }
        let error = crate::error::text(error);
        if let Some(first) = inner.failures.get_mut(subject).filter(|_| operation == UNDO) {
            // What made it fail is what counts.
            first.undo = Some(error);
            return;
        }
        let step = inner.pinned.get(subject).or(inner.last.get(subject)).map(|s| s.text());
        let failure = Failure { operation, name, step, error, at: crate::clock::now_ns(), undo: None };
        if inner.failures.insert(subject.to_owned(), failure).is_none() {
            inner.order.push_back(subject.to_owned());
        }
        while inner.order.len() > FAILURES {
            if let Some(oldest) = inner.order.pop_front() {
                inner.failures.remove(&oldest);
                inner.last.remove(&oldest);
                inner.pinned.remove(&oldest);
            }
        }
    }

    /// An operation succeeded: an earlier failure of the same kind is history.
    pub(crate) fn succeeded(&self, subject: &str, operation: &'static str) {
        self.lock().ended(subject, operation);
        if self.lock().failures.get(subject).is_some_and(|f| f.operation == operation) {
            self.forget(subject);
        }
    }

    /// The subject is gone. How it could not be made stays known; nothing else does.
    pub(crate) fn over(&self, subject: &str) {
        self.grace(subject, None);
        self.again(subject, None);
        if let Some(failure) = self.lock().failures.get_mut(subject) {
            failure.undo = None;
        }
        if self.lock().failures.get(subject).is_some_and(|f| f.operation == "RunPodSandbox" || f.operation == "CreateContainer") {
            return;
        }
        self.forget(subject);
    }

    fn forget(&self, subject: &str) {
        let mut inner = self.lock();
        inner.last.remove(subject);
        inner.pinned.remove(subject);
        if inner.failures.remove(subject).is_some() {
            inner.order.retain(|s| s != subject);
        }
    }

    /// The last failure of a subject.
    pub(crate) fn failure(&self, subject: &str) -> Option<Failure> {
        self.lock().failures.get(subject).cloned()
    }

    /// All remembered failures by subject.
    pub(crate) fn failures(&self) -> BTreeMap<String, Failure> {
        self.lock().failures.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn short() -> Arc<Progress> {
        Arc::new(Progress::new(Deadlines { create_container: Duration::ZERO, ..Default::default() }))
    }

    #[test]
    fn a_step_past_its_limit_names_itself_its_object_and_its_beginning_once() {
        let progress = short();
        let under = progress.begin("c1", Step::CreateInShim, "hook /bin/x");
        assert!(progress.overdue("c2").is_none());
        let text = progress.overdue("c1").unwrap().to_string();
        for part in ["create the container's process", "c1", "hook /bin/x", "since 20"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(progress.overdue("c1").is_none(), "told once");
        drop(under);
        assert!(progress.active("c1").is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_be_given_up_is_and_what_may_not_goes_on() {
        let progress = short();
        let never = std::future::pending::<Result<(), Error>>();
        let error = progress.step("s", Step::AskShim, "shim", never).await.unwrap_err();
        assert!(matches!(error, Error::Overdue { step: "ask the shim", .. }), "{error}");
        let late = async {
            tokio::time::sleep(Duration::from_secs(3600)).await;
            Ok(7)
        };
        assert_eq!(progress.step("s", Step::CreateInShim, "", late).await.unwrap(), 7);
    }

    #[test]
    fn an_operation_that_another_one_met_is_under_way_again_when_that_has_ended() {
        let progress = short();
        let name = |progress: &Progress| progress.running("c").map(|running| running.operation);
        progress.operate("c", "default/web/a", "CheckpointContainer");
        progress.operate("c", "default/web/a", "StopContainer");
        assert_eq!(name(&progress), Some("StopContainer"));
        progress.succeeded("c", "StopContainer");
        assert_eq!(name(&progress), Some("CheckpointContainer"));
        progress.failed("c", "default/web/a".into(), "CheckpointContainer", &Error::Closing);
        assert_eq!((name(&progress), progress.all_running().len()), (None, 0));
    }

    #[test]
    fn the_last_failure_is_kept_with_its_step_until_the_subject_is_gone() {
        let progress = short();
        drop(progress.begin("s", Step::AttachNetwork, "bridge"));
        progress.failed("s", "default/web".into(), "RunPodSandbox", &Error::Closing);
        let failure = progress.failure("s").unwrap();
        assert_eq!((failure.step, failure.operation), (Some("set up the network"), "RunPodSandbox"));
        progress.forget("s");
        assert!(progress.failure("s").is_none());
        for n in 0..FAILURES + 10 {
            progress.failed(&n.to_string(), String::new(), "x", &Error::Closing);
        }
        assert_eq!(progress.failures().len(), FAILURES);
    }
}
