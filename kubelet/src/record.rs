//! Kubernetes events of pods: each is a log line, the newest are kept for whoever asks (`/events`), and all are passed on where there is
//! an API server to tell.
//! Decides nothing; identical events are counted, not repeated.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use tokio::sync::mpsc;

use crate::clock::Clock;
use crate::pod;

/// How many different events are kept. One is about half a KiB, and never more than twice what a message may be.
const KEPT: usize = 512;
/// The longest message, as the API server's of `events.k8s.io`: programs write into messages what they like.
const MESSAGE: usize = 1024;

/// The type of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// As it should be.
    Normal,
    /// Somebody should look at it.
    Warning,
}

impl Weight {
    /// As the API has it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Weight::Normal => "Normal",
            Weight::Warning => "Warning",
        }
    }
}

/// What an event says, without the fields that are the same for all of them: a whole one is 1 KiB before its texts.
struct Note {
    name: String,
    object: ObjectReference,
    weight: Weight,
    reason: String,
    message: String,
    count: i32,
    first: Timestamp,
    last: Timestamp,
}

/// One event as it happened, for whoever passes it on.
#[derive(Clone, Debug)]
pub(crate) struct Happened {
    pub object: ObjectReference,
    pub weight: Weight,
    pub reason: String,
    pub message: String,
    pub at: Timestamp,
}

/// The way to whoever passes events on, and how many it had no room for.
#[derive(Default)]
struct Outlet {
    sender: OnceLock<mpsc::Sender<Happened>>,
    dropped: AtomicU64,
}

struct Kept {
    events: VecDeque<Note>,
    next: u64,
}

/// Where events are recorded. Clones share it.
#[derive(Clone)]
pub struct Recorder {
    node: Arc<str>,
    clock: Clock,
    kept: Arc<Mutex<Kept>>,
    outlet: Arc<Outlet>,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recorder({} events)", self.lock().events.len())
    }
}

impl Recorder {
    /// Of a node.
    pub fn new(node: &str, clock: Clock) -> Recorder {
        let kept = Arc::new(Mutex::new(Kept { events: VecDeque::new(), next: 0 }));
        Recorder { node: node.into(), clock, kept, outlet: Arc::default() }
    }

    /// From now on every event goes there too; only the first one to ask gets them.
    pub(crate) fn pass_on(&self, sender: mpsc::Sender<Happened>) {
        let _ = self.outlet.sender.set(sender);
    }

    /// How many could not be passed on since this was last asked.
    pub(crate) fn take_dropped(&self) -> u64 {
        self.outlet.dropped.swap(0, Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An event of a pod, or of one of its containers.
    pub fn event(&self, pod: &Pod, container: Option<&str>, weight: Weight, reason: &str, message: &str) {
        let message = &*cut(message);
        let (name, line) = (pod::format_pod(pod), one_line(message));
        let shown = container.unwrap_or_default();
        match weight {
            Weight::Normal => tracing::info!(pod = %name, container = shown, reason, "{line}"),
            Weight::Warning => tracing::warn!(pod = %name, container = shown, reason, "{line}"),
        }
        let object = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: Some(pod::namespace(pod).to_owned()),
            name: Some(pod::name(pod).to_owned()),
            uid: pod.metadata.uid.clone(),
            field_path: container.map(|container| field_path(pod, container)),
            resource_version: None,
        };
        self.keep(object, pod.metadata.resource_version.as_deref(), weight, (reason, message));
    }

    /// An event of the node itself.
    pub fn node_event(&self, weight: Weight, reason: &str, message: &str) {
        let message = &*cut(message);
        let line = one_line(message);
        match weight {
            Weight::Normal => tracing::info!(reason, "{line}"),
            Weight::Warning => tracing::warn!(reason, "{line}"),
        }
        let object = ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(self.node.to_string()),
            uid: Some(self.node.to_string()),
            ..ObjectReference::default()
        };
        self.keep(object, None, weight, (reason, message));
    }

    fn keep(&self, object: ObjectReference, version: Option<&str>, weight: Weight, (reason, message): (&str, &str)) {
        let now = self.clock.now();
        if let Some(sender) = self.outlet.sender.get() {
            let object = ObjectReference { resource_version: version.map(str::to_owned), ..object.clone() };
            let (reason, message) = (reason.to_owned(), message.to_owned());
            if sender.try_send(Happened { object, weight, reason, message, at: now }).is_err() {
                self.outlet.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
        let mut kept = self.lock();
        let same = |note: &Note| note.object == object && note.reason == reason && note.message == message;
        if let Some(at) = kept.events.iter().rposition(same)
            && let Some(mut note) = kept.events.remove(at)
        {
            note.count = note.count.saturating_add(1);
            note.last = now;
            kept.events.push_back(note);
            return;
        }
        kept.next += 1;
        let name = object.name.as_deref().unwrap_or_default();
        let name = format!("{name}.{:x}{:04x}", now.as_nanosecond(), kept.next & 0xffff);
        if kept.events.len() == KEPT {
            kept.events.pop_front();
        }
        let (reason, message) = (reason.to_owned(), message.to_owned());
        kept.events.push_back(Note { name, object, weight, reason, message, count: 1, first: now, last: now });
    }

    /// The event as the API has it.
    pub(crate) fn event_of(&self, happened: &Happened, name: &str, (first, count): (Timestamp, i32)) -> Event {
        let Happened { object, weight, reason, message, at } = happened.clone();
        self.whole(&Note { name: name.to_owned(), object, weight, reason, message, count, first, last: at })
    }

    fn whole(&self, note: &Note) -> Event {
        let mut event = Event {
            involved_object: note.object.clone(),
            type_: Some(note.weight.as_str().to_owned()),
            reason: Some(note.reason.clone()),
            message: Some(note.message.clone()),
            count: Some(note.count),
            first_timestamp: Some(seconds(note.first)),
            last_timestamp: Some(seconds(note.last)),
            source: Some(EventSource { component: Some("kubelet".to_owned()), host: Some(self.node.to_string()) }),
            reporting_component: Some("kubelet".to_owned()),
            reporting_instance: Some(self.node.to_string()),
            ..Event::default()
        };
        event.metadata.name = Some(note.name.clone());
        // Events of the node are in the default namespace, as the upstream's.
        event.metadata.namespace = note.object.namespace.clone().or_else(|| Some("default".to_owned()));
        event
    }

    /// The kept events, the newest last.
    pub fn list(&self) -> Vec<Event> {
        self.lock().events.iter().map(|note| self.whole(note)).collect()
    }
}

/// The beginning of a long message, with dots for the rest.
fn cut(message: &str) -> Cow<'_, str> {
    const DOTS: &str = "...";
    match message.len() <= MESSAGE {
        true => message.into(),
        false => format!("{}{DOTS}", &message[..message.floor_char_boundary(MESSAGE - DOTS.len())]).into(),
    }
}

/// A message as one line of a log: no program's output looks like lines of ours.
fn one_line(message: &str) -> Cow<'_, str> {
    if !message.contains(char::is_control) {
        return message.into();
    }
    let mut line = String::with_capacity(message.len() + 16);
    for c in message.chars() {
        match c.is_control() {
            true => line.extend(c.escape_default()),
            false => line.push(c),
        }
    }
    line.into()
}

fn seconds(now: Timestamp) -> Time {
    Time(crate::observed::whole_second(now))
}

/// `spec.containers{web}`.
fn field_path(pod: &Pod, container: &str) -> String {
    let list = match () {
        () if pod::init_containers(pod).iter().any(|c| c.name == container) => "initContainers",
        () if pod::is_ephemeral(pod, container) => "ephemeralContainers",
        () => "containers",
    };
    format!("spec.{list}{{{container}}}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.name = Some(name.to_owned());
        pod
    }

    #[test]
    fn the_same_event_again_is_counted() {
        let recorder = Recorder::new("n", Clock::default());
        for _ in 0..3 {
            recorder.event(&pod("a"), Some("c"), Weight::Warning, "BackOff", "wait");
            recorder.event(&pod("b"), None, Weight::Normal, "Created", "Container created");
        }
        let found: Vec<_> = recorder.list().iter().map(|e| (e.involved_object.field_path.clone(), e.count)).collect();
        assert_eq!(found, [(Some("spec.containers{c}".to_owned()), Some(3)), (None, Some(3))]);
    }

    #[test]
    fn a_long_message_is_cut_and_logged_as_one_line() {
        let recorder = Recorder::new("n", Clock::default());
        recorder.event(&pod("a"), None, Weight::Warning, "Unhealthy", &"é\n".repeat(5000));
        recorder.node_event(Weight::Warning, "SystemOOM", &"x".repeat(5000));
        for message in recorder.list().into_iter().map(|event| event.message.unwrap()) {
            assert!(message.len() <= MESSAGE && message.len() > MESSAGE - 4 && message.ends_with("..."), "{message}");
        }
        assert_eq!(one_line("a\n\u{1b}[1mWARN é"), "a\\n\\u{1b}[1mWARN é");
    }

    #[test]
    fn only_the_newest_events_are_kept() {
        let recorder = Recorder::new("n", Clock::default());
        for n in 0..KEPT + 2 {
            recorder.event(&pod("a"), None, Weight::Normal, "Started", &n.to_string());
        }
        let events = recorder.list();
        assert_eq!((events.len(), events[0].message.as_deref()), (KEPT, Some("2")));
    }
}
