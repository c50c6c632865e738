//! One plugin: the calls that it has, by the protocol's names, with their time limit; and how it is told events by the older
//! call when it does not have the newer.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use prost::Message;
use tokio_util::sync::CancellationToken;

use crate::api::{
    ConfigureRequest, ConfigureResponse, Container, ContainerUpdate, Event, PodSandbox, StateChangeEvent, SynchronizeRequest,
    SynchronizeResponse,
};
use crate::launch::Child;
use crate::wire::{Connection, MAX_MESSAGE};
use crate::{Config, Error};

const SERVICE: &str = "nri.pkg.api.v1alpha1.Plugin";
/// All events that there are.
const EVENTS: u32 = (1 << (Event::Last as u32 - 1)) - 1;
/// Bytes of one message of a synchronization: below the limit, with room for the frame.
const CHUNK: usize = MAX_MESSAGE - (64 << 10);

/// A plugin that has registered.
pub(crate) struct Plugin {
    /// `10-name`.
    pub(crate) name: String,
    pub(crate) index: String,
    pub(crate) base: String,
    connection: Connection,
    events: u32,
    /// Events that it only knows as StateChange.
    older: AtomicU32,
    timeout: Duration,
    /// Its process, if we started it: it ends with this.
    _child: Option<Child>,
}

/// The bit of an event in masks.
fn bit(event: Event) -> u32 {
    (event as u32).checked_sub(1).map_or(0, |n| 1 << n)
}

impl Plugin {
    /// A plugin that has said its name. Tells it its configuration and learns what it wants to know.
    pub(crate) async fn configure(
        (index, base): (String, String),
        connection: Connection,
        child: Option<Child>,
        text: String,
        config: &Config,
    ) -> Result<Self, Error> {
        let mut plugin = Self {
            name: format!("{index}-{base}"),
            index,
            base,
            connection,
            events: 0,
            older: AtomicU32::new(0),
            timeout: config.request_timeout,
            _child: child,
        };
        let millis = |d: Duration| i64::try_from(d.as_millis()).unwrap_or(i64::MAX);
        let request = ConfigureRequest {
            config: text,
            runtime_name: config.runtime_name.clone(),
            runtime_version: config.runtime_version.clone(),
            registration_timeout: millis(config.registration_timeout),
            request_timeout: millis(config.request_timeout),
            nri_version: VERSION.into(),
        };
        let answer: ConfigureResponse = plugin.call("Configure", &request).await?;
        let asked = answer.events as u32;
        if asked & !EVENTS != 0 {
            let reason = format!("it asked for unknown events ({:#x})", asked & !EVENTS);
            return Err(Error::Join { plugin: plugin.name, reason });
        }
        plugin.events = if asked == 0 { EVENTS } else { asked };
        Ok(plugin)
    }

    /// Whether it wants to know of an event.
    pub(crate) fn wants(&self, event: Event) -> bool {
        self.events & bit(event) != 0
    }

    /// Cancelled when it is gone.
    pub(crate) fn closed(&self) -> &CancellationToken {
        self.connection.closed()
    }

    /// Calls it.
    pub(crate) async fn call<Q: Message, A: Message + Default>(&self, call: &'static str, request: &Q) -> Result<A, Error> {
        let closed = || Error::Closed { plugin: self.name.clone() };
        let nanos = i64::try_from(self.timeout.as_nanos()).unwrap_or(i64::MAX);
        if request.encoded_len() > CHUNK {
            let reason = format!("a request of {} bytes is more than plugins can read", request.encoded_len());
            return Err(Error::Answer { plugin: self.name.clone(), what: format!("{call}: {reason}") });
        }
        let answer = self.connection.call(SERVICE, call, request.encode_to_vec(), nanos);
        match tokio::time::timeout(self.timeout, answer).await {
            Err(_) => Err(Error::Timeout { plugin: self.name.clone(), call, millis: self.timeout.as_millis() }),
            Ok(None) => Err(closed()),
            Ok(Some(Ok(bytes))) => A::decode(bytes.as_slice()).map_err(|e| Error::Protocol { what: call, reason: e.to_string() }),
            Ok(Some(Err(status))) => {
                Err(Error::Refused { plugin: self.name.clone(), call, code: status.code, message: status.message })
            }
        }
    }

    /// Calls it; where it has no such call, by StateChange.
    pub(crate) async fn tell<Q: Message, A: Message + Default>(
        &self,
        event: Event,
        call: &'static str,
        request: &Q,
        pod: &PodSandbox,
        container: Option<&Container>,
    ) -> Result<A, Error> {
        if self.older.load(Ordering::Relaxed) & bit(event) == 0 {
            match self.call(call, request).await {
                Err(error) if error.is_unimplemented() => {
                    tracing::info!(plugin = self.name, call, "an older NRI plugin: it is told by StateChange");
                    self.older.fetch_or(bit(event), Ordering::Relaxed);
                }
                answer => return answer,
            }
        }
        let change = StateChangeEvent { event: event.into(), pod: Some(pod.clone()), container: container.cloned() };
        self.call::<_, crate::api::Empty>("StateChange", &change).await.map(|_| A::default())
    }

    /// Tells it all there is; in several messages where one would be too long.
    pub(crate) async fn synchronize(
        &self,
        pods: Vec<PodSandbox>,
        containers: Vec<Container>,
    ) -> Result<Vec<ContainerUpdate>, Error> {
        let mut parts = split(pods, containers);
        let last = parts.pop().unwrap_or_default();
        for part in parts {
            let answer: SynchronizeResponse = self.call("Synchronize", &part).await?;
            if !answer.more || !answer.update.is_empty() {
                let reason = "it can not be told everything in several messages, and one would be too long".into();
                return Err(Error::Join { plugin: self.name.clone(), reason });
            }
        }
        let answer: SynchronizeResponse = self.call("Synchronize", &last).await?;
        Ok(answer.update)
    }
}

/// The version of the protocol that we were written to.
const VERSION: &str = "v0.12.0";

fn split(pods: Vec<PodSandbox>, containers: Vec<Container>) -> Vec<SynchronizeRequest> {
    /// Tag and length of an element.
    const OVERHEAD: usize = 8;
    let mut parts = vec![SynchronizeRequest::default()];
    let mut size = OVERHEAD;
    let mut next = |parts: &mut Vec<SynchronizeRequest>, length: usize| {
        size += length + OVERHEAD;
        if size > CHUNK {
            size = length + 2 * OVERHEAD;
            if let Some(last) = parts.last_mut() {
                last.more = true;
            }
            parts.push(SynchronizeRequest::default());
        }
        parts.len() - 1
    };
    for pod in pods {
        let at = next(&mut parts, pod.encoded_len());
        parts[at].pods.push(pod);
    }
    for container in containers {
        let at = next(&mut parts, container.encoded_len());
        parts[at].containers.push(container);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_there_is_fits_into_messages_and_none_is_lost() {
        let big = |id: usize| Container { id: id.to_string(), env: vec!["x".repeat(100_000)], ..Default::default() };
        let pods: Vec<PodSandbox> = (0..3).map(|i| PodSandbox { id: i.to_string(), ..Default::default() }).collect();
        let parts = split(pods, (0..100).map(big).collect());
        assert!(parts.len() > 2);
        assert!(parts.iter().all(|p| p.encoded_len() <= CHUNK));
        assert_eq!(parts.iter().map(|p| p.containers.len()).sum::<usize>(), 100);
        assert_eq!(parts.iter().map(|p| p.pods.len()).sum::<usize>(), 3);
        assert!(parts[..parts.len() - 1].iter().all(|p| p.more) && !parts[parts.len() - 1].more);
        assert_eq!(split(vec![], vec![]).len(), 1, "an empty node is told, too");
    }

    #[test]
    fn the_mask_has_a_bit_for_each_event() {
        assert_eq!((bit(Event::Unknown), bit(Event::RunPodSandbox)), (0, 1));
        assert_eq!(bit(Event::ValidateContainerAdjustment), 1 << 13);
        assert_eq!(EVENTS, 0x3fff);
    }
}
