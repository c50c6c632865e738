//! Events to the API server: each is made there once and then counted. Similar ones are told as one and a flood is cut off by the
//! upstream's rules, the queue is bounded, and what does not fit in it is counted. Decides nothing about what is an event.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, ObjectReference};
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::Status;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::record::{Happened, Recorder};

/// Events that wait to be sent: what a node with all its pods starting at once has to tell.
const QUEUE: usize = 512;
/// So many messages of one reason about one object are told as they are.
const SIMILAR: usize = 10;
/// Unless there was none of them for so long.
const SIMILAR_FOR: Duration = Duration::from_secs(600);
/// So many events of one object are told at once.
const BURST: f64 = 25.0;
/// And then one in so long.
const REFILL: Duration = Duration::from_secs(300);
/// How many objects, reasons and events are remembered; the upstream's is 4096, for a cluster's worth.
const REMEMBERED: usize = 1024;
/// Tries of one event while the server does not answer.
const TRIES: u32 = 12;
/// The longest wait between them.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// What the message of many begins with.
const COMBINED: &str = "(combined from similar events): ";

#[derive(Debug)]
struct Group {
    messages: BTreeSet<u64>,
    last: Instant,
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    last: Instant,
}

#[derive(Clone, Debug)]
struct Told {
    event: Made,
    count: i32,
    last: Instant,
}

/// An event that the server has, or is to have.
#[derive(Clone, Debug)]
struct Made {
    name: String,
    first: k8s_openapi::jiff::Timestamp,
}

/// What has been told so far.
#[derive(Debug, Default)]
struct Correlator {
    groups: BTreeMap<u64, Group>,
    buckets: BTreeMap<u64, Bucket>,
    told: BTreeMap<u64, Told>,
}

/// An event as it is to be told now.
#[derive(Clone, Debug)]
struct Telling {
    happened: Happened,
    made: Made,
    /// How often by now; the first time it is made, then counted.
    count: i32,
}

fn hash(parts: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    hasher.finish()
}

fn about(object: &ObjectReference) -> impl Hash + use<'_> {
    (&object.kind, &object.namespace, &object.name, &object.uid, &object.api_version)
}

/// Forgets what is oldest when there is too much.
fn prune<V>(map: &mut BTreeMap<u64, V>, last: impl Fn(&V) -> Instant) {
    if map.len() > REMEMBERED
        && let Some(oldest) = map.iter().min_by_key(|(_, value)| last(value)).map(|(key, _)| *key)
    {
        map.remove(&oldest);
    }
}

impl Correlator {
    /// What is to be told of this; `None`: there have been too many about its object.
    fn correlate(&mut self, mut happened: Happened, now: Instant) -> Option<Telling> {
        let kind = hash((about(&happened.object), &happened.object.field_path, happened.weight.as_str(), &happened.reason));
        let group = self.groups.entry(kind).or_insert_with(|| Group { messages: BTreeSet::new(), last: now });
        if now.saturating_duration_since(group.last) > SIMILAR_FOR {
            group.messages.clear();
        }
        group.last = now;
        group.messages.insert(hash(&happened.message));
        let key = if group.messages.len() < SIMILAR {
            hash((kind, &happened.message))
        } else {
            group.messages.pop_first();
            happened.message.insert_str(0, COMBINED);
            kind
        };
        prune(&mut self.groups, |group| group.last);
        let object = happened.object.name.clone().unwrap_or_default();
        let made = || Made { name: format!("{object}.{:x}", happened.at.as_nanosecond()), first: happened.at };
        let told = self.told.entry(key).or_insert_with(|| Told { event: made(), count: 0, last: now });
        (told.count, told.last) = (told.count.saturating_add(1), now);
        let telling = Telling { made: told.event.clone(), count: told.count, happened };
        prune(&mut self.told, |told| told.last);
        self.lets_through(&telling.happened.object, now).then_some(telling)
    }

    fn lets_through(&mut self, object: &ObjectReference, now: Instant) -> bool {
        let bucket = self.buckets.entry(hash(about(object))).or_insert(Bucket { tokens: BURST, last: now });
        let since = now.saturating_duration_since(bucket.last);
        bucket.tokens = (bucket.tokens + since.as_secs_f64() / REFILL.as_secs_f64()).min(BURST);
        bucket.last = now;
        let lets = bucket.tokens >= 1.0;
        if lets {
            bucket.tokens -= 1.0;
        }
        prune(&mut self.buckets, |bucket| bucket.last);
        lets
    }
}

/// Passes on what `recorder` is told from now on, until `stop`.
pub(crate) fn start(recorder: &Recorder, client: kube::Client, stop: &CancellationToken) {
    let (sender, queue) = mpsc::channel(QUEUE);
    recorder.pass_on(sender);
    let pass_on = pass_on(recorder.clone(), client, queue);
    tokio::spawn(stop.clone().run_until_cancelled_owned(pass_on));
}

async fn pass_on(recorder: Recorder, client: kube::Client, mut queue: mpsc::Receiver<Happened>) {
    let mut correlator = Correlator::default();
    // Reasons of events that the server refuses: each is logged once, they are as many as the kubelet has.
    let mut refused = BTreeSet::new();
    while let Some(happened) = queue.recv().await {
        let Some(telling) = correlator.correlate(happened, Instant::now()) else { continue };
        if let Err(error) = tell(&client, &recorder, &telling).await {
            let Telling { happened: Happened { reason, object, .. }, .. } = &telling;
            if is_refused(&error) && !refused.insert(reason.clone()) {
                continue;
            }
            let (error, object) = (&error as &dyn std::error::Error, object.name.as_deref().unwrap_or_default());
            tracing::warn!(reason, object, error, "an event has not reached the API server");
        }
        match recorder.take_dropped() {
            0 => {}
            dropped => tracing::warn!(dropped, "events have not been sent to the API server: it did not take them fast enough"),
        }
    }
}

/// The same name twice in one nanosecond, a namespace that has gone or is going: nobody is told otherwise, and nobody misses it.
fn is_moot(status: &Status) -> bool {
    let causes = || status.details.iter().flat_map(|details| &details.causes);
    matches!(status.code, 404 | 409) || status.code == 403 && causes().any(|cause| cause.reason == "NamespaceTerminating")
}

/// Whether the server will not take the event, however often it is told.
fn is_refused(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code < 500 && status.code != 429)
}

/// Tells one event, several times where the server does not answer.
async fn tell(client: &kube::Client, recorder: &Recorder, telling: &Telling) -> Result<(), kube::Error> {
    let namespace = telling.happened.object.namespace.as_deref().unwrap_or("default");
    let api: Api<Event> = Api::namespaced(client.clone(), namespace);
    let event = recorder.event_of(&telling.happened, &telling.made.name, (telling.made.first, telling.count));
    let (mut pause, mut tries) = (Duration::from_secs(1), 1);
    loop {
        let error = match send(&api, &event).await {
            Err(kube::Error::Api(status)) if is_moot(&status) => return Ok(()),
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        if is_refused(&error) || tries == TRIES {
            return Err(error);
        }
        tokio::time::sleep(pause).await;
        (pause, tries) = ((pause * 2).min(LONGEST_PAUSE), tries + 1);
    }
}

async fn send(api: &Api<Event>, event: &Event) -> Result<(), kube::Error> {
    let name = event.metadata.name.as_deref().unwrap_or_default();
    if event.count > Some(1) {
        let patch = json!({"count": event.count, "lastTimestamp": event.last_timestamp, "message": event.message});
        match api.patch(name, &PatchParams::default(), &Patch::Strategic(patch)).await {
            // Events are kept for an hour.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            patched => return patched.map(|_| ()),
        }
    }
    api.create(&PostParams::default(), event).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::node::fake::{calls, refusal, server};
    use crate::record::Weight;
    use k8s_openapi::jiff::Timestamp;

    fn happened(object: &str, reason: &str, message: &str) -> Happened {
        Happened {
            object: ObjectReference { name: Some(object.to_owned()), ..ObjectReference::default() },
            weight: Weight::Normal,
            reason: reason.to_owned(),
            message: message.to_owned(),
            at: Timestamp::UNIX_EPOCH,
        }
    }

    #[tokio::test]
    async fn a_refusal_is_an_error_unless_the_namespace_is_going() {
        let forbidden = |causes: serde_json::Value| {
            let mut refusal = refusal(403, "Forbidden");
            refusal["details"] = json!({"causes": causes});
            (403, refusal)
        };
        let going = forbidden(json!([{"reason": "NamespaceTerminating", "field": "metadata.namespace"}]));
        for (answer, passes) in [(forbidden(json!([])), false), (going, true), ((409, refusal(409, "AlreadyExists")), true)] {
            let telling = Correlator::default().correlate(happened("a", "R", "m"), Instant::now()).unwrap();
            let (client, asked) = server(vec![answer.clone()]);
            let told = tell(&client, &Recorder::new("n1", crate::clock::Clock::default()), &telling).await;
            assert_eq!((told.is_ok(), calls(&asked).len()), (passes, 1), "{answer:?}");
        }
    }

    #[tokio::test]
    async fn the_same_event_is_made_once_and_then_counted() {
        let (mut correlator, now) = (Correlator::default(), Instant::now());
        let first = correlator.correlate(happened("a", "BackOff", "m"), now).unwrap();
        let second = correlator.correlate(happened("a", "BackOff", "m"), now).unwrap();
        assert_eq!((first.count, second.count, first.made.name == second.made.name), (1, 2, true));
        let other = correlator.correlate(happened("b", "BackOff", "m"), now).unwrap();
        assert_eq!(other.count, 1);
    }

    #[tokio::test]
    async fn many_similar_events_are_told_as_one() {
        let (mut correlator, start) = (Correlator::default(), Instant::now());
        let mut tell = |n: usize, at: Instant| {
            let telling = correlator.correlate(happened("a", "Unhealthy", &format!("m{n}")), at).unwrap();
            (telling.happened.message, telling.count)
        };
        for n in 1..10 {
            assert_eq!(tell(n, start), (format!("m{n}"), 1));
        }
        assert_eq!(tell(10, start), (format!("{COMBINED}m10"), 1));
        assert_eq!(tell(11, start), (format!("{COMBINED}m11"), 2));
        let later = start + SIMILAR_FOR + Duration::from_secs(1);
        assert_eq!(tell(12, later), ("m12".to_owned(), 1));
    }

    #[tokio::test]
    async fn a_flood_about_one_object_is_cut_off_and_others_are_told() {
        let (mut correlator, start) = (Correlator::default(), Instant::now());
        let mut told = |object: &str, at: Instant| correlator.correlate(happened(object, "R", "m"), at).map(|t| t.count);
        for n in 1..=25 {
            assert_eq!(told("a", start), Some(n));
        }
        assert_eq!(told("a", start), None);
        assert_eq!(told("b", start), Some(1));
        assert_eq!(told("a", start + REFILL), Some(27), "what was not told is counted");
        assert_eq!(told("a", start + REFILL), None);
    }

    #[tokio::test]
    async fn what_is_remembered_is_bounded() {
        let (mut correlator, now) = (Correlator::default(), Instant::now());
        for n in 0..REMEMBERED + 50 {
            correlator.correlate(happened(&n.to_string(), "R", "m"), now);
        }
        let kept = [correlator.groups.len(), correlator.buckets.len(), correlator.told.len()];
        assert_eq!(kept, [REMEMBERED; 3]);
    }
}
