//! Follows one object by its name, which is all that a node may see: list and watch with a field selector, again and again. Holds
//! nothing; whoever started it is told each state of the object.

use std::fmt::Debug;
use std::ops::ControlFlow;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::api::storage::v1::CSIDriver;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::WatchStreamExt;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource};
use rand::Rng as _;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::objects::ObjectName;

/// An object as it is held: what pods take from it, without the bookkeeping in its metadata.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Held {
    ConfigMap(Arc<ConfigMap>),
    Secret(Arc<Secret>),
    RuntimeClass(Arc<RuntimeClass>),
    CsiDriver(Arc<CSIDriver>),
}

impl Held {
    /// Whether it can never change: then nobody has to look.
    pub(super) fn is_immutable(&self) -> bool {
        let immutable = match self {
            Held::ConfigMap(map) => map.immutable,
            Held::Secret(secret) => secret.immutable,
            Held::RuntimeClass(_) | Held::CsiDriver(_) => None,
        };
        immutable == Some(true)
    }
}

impl From<ConfigMap> for Held {
    fn from(mut map: ConfigMap) -> Held {
        trim(&mut map.metadata);
        Held::ConfigMap(Arc::new(map))
    }
}

impl From<Secret> for Held {
    fn from(mut secret: Secret) -> Held {
        trim(&mut secret.metadata);
        Held::Secret(Arc::new(secret))
    }
}

impl From<RuntimeClass> for Held {
    fn from(mut class: RuntimeClass) -> Held {
        trim(&mut class.metadata);
        Held::RuntimeClass(Arc::new(class))
    }
}

impl From<CSIDriver> for Held {
    fn from(mut driver: CSIDriver) -> Held {
        trim(&mut driver.metadata);
        Held::CsiDriver(Arc::new(driver))
    }
}

/// Keeps what names the object: the rest of the metadata can be larger than the data, and changes when nothing of it does.
pub(super) fn trim(metadata: &mut ObjectMeta) {
    let ObjectMeta { name, namespace, uid, .. } = std::mem::take(metadata);
    *metadata = ObjectMeta { name, namespace, uid, ..ObjectMeta::default() };
}

/// Follows the object until whoever is told has seen enough. `None`: there is no such object.
pub(super) async fn follow(client: Client, name: ObjectName, tell: impl Fn(Option<Held>) -> ControlFlow<()> + Send) {
    match name.kind {
        "ConfigMap" => follow_one::<ConfigMap>(Api::namespaced(client, &name.namespace), &name, tell).await,
        "Secret" => follow_one::<Secret>(Api::namespaced(client, &name.namespace), &name, tell).await,
        "RuntimeClass" => follow_one::<RuntimeClass>(Api::all(client), &name, tell).await,
        _ => follow_one::<CSIDriver>(Api::all(client), &name, tell).await,
    }
}

/// Seconds of one watch request; with what is added to them they do not all end at once. A watcher that hears nothing for this long
/// takes its connection for dead, so that it may not be much longer.
const WATCH_SECONDS: u32 = 230;
const WATCH_SPREAD: u32 = 60;

/// The first pause after a failure: that a pod is this node's may be news to the API server's own authorizer, for a moment.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest: an edit should not wait for long once the API server is back.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Without a failure for so long the next pause is the first again.
const WELL: Duration = Duration::from_secs(30);

/// Pauses that double, each longer by a part that differs from others'.
struct Pauses {
    next: Duration,
    percent: u32,
    /// When the last one began.
    failed: Option<Instant>,
}

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let now = Instant::now();
        if self.failed.replace(now).is_some_and(|failed| now.saturating_duration_since(failed) > WELL) {
            self.next = FIRST_PAUSE;
        }
        let pause = self.next;
        self.next = (pause * 2).min(LONGEST_PAUSE);
        Some(pause + pause * self.percent / 100)
    }
}

impl Backoff for Pauses {
    /// Nothing: a watcher tells of each list before it has asked for it ([`Event::Init`]), which is taken for a success. A server that
    /// refuses all lists would be asked without a pause. Time alone tells that all is well.
    fn reset(&mut self) {}
}

/// A number that differs from one name to another.
fn spread(name: &str) -> u32 {
    name.bytes().fold(0u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(byte)))
}

/// The pauses between attempts; other ones each time, so that nodes which lost a server together do not ask it together.
pub(super) fn pauses() -> impl Backoff {
    Pauses { next: FIRST_PAUSE, percent: rand::rng().random_range(0..50), failed: None }
}

/// How a watch asks: for one object, and for a time that differs from others'.
pub(super) fn asking(name: &str) -> watcher::Config {
    watcher::Config::default().timeout(WATCH_SECONDS + spread(name) % WATCH_SPREAD)
}

async fn follow_one<K>(api: Api<K>, name: &ObjectName, tell: impl Fn(Option<Held>) -> ControlFlow<()> + Send)
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static + Into<Held>,
{
    let config = asking(&name.name).fields(&format!("metadata.name={}", name.name));
    let mut events = pin!(watcher(api, config).backoff(pauses()));
    let (mut seen, mut failing) = (false, false);
    while let Some(event) = events.next().await {
        let state = match event {
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(object = %name, error = super::message_of_watch(&error), "cannot be followed now");
                }
                continue;
            }
            Ok(Event::Init) => {
                seen = false;
                continue;
            }
            Ok(Event::InitDone) if seen => continue,
            Ok(Event::InitDone | Event::Delete(_)) => None,
            Ok(Event::Apply(object) | Event::InitApply(object)) => {
                seen = true;
                Some(object.into())
            }
        };
        failing = false;
        if tell(state).is_break() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::fake::FakeApi;

    #[tokio::test(start_paused = true)]
    async fn pauses_double_to_ten_seconds_and_begin_again_when_all_was_well_for_long() {
        let mut pauses = Pauses { next: FIRST_PAUSE, percent: 0, failed: None };
        let millis: Vec<u128> = pauses.by_ref().take(9).map(|pause| pause.as_millis()).collect();
        assert_eq!(millis, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        pauses.reset();
        tokio::time::advance(LONGEST_PAUSE).await;
        assert_eq!(pauses.next(), Some(LONGEST_PAUSE));
        tokio::time::advance(WELL + FIRST_PAUSE).await;
        assert_eq!(pauses.next(), Some(FIRST_PAUSE));
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_refuses_every_list_is_asked_ever_more_seldom() {
        let api = FakeApi::default();
        api.set_away(true);
        let name = ObjectName { kind: "ConfigMap", namespace: "ns".into(), name: "a".into() };
        let following = follow(api.client(), name, |_| ControlFlow::Continue(()));
        let _ = tokio::time::timeout(Duration::from_secs(30), following).await;
        let asked = api.asked("configmaps");
        assert!((5..15).contains(&asked), "asked {asked} times in 30 seconds");
    }
}
