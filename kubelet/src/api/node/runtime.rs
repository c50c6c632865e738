//! Whether the runtime is well, for the node's condition: asks it every five seconds, and every 100 ms until the node is ready for the
//! first time. Also tells the runtime the pods' addresses when the node gets them.

use std::time::Duration;

use berth_cri_api::v1 as cri;
use tokio::sync::watch;
use tokio::time::Instant;

use super::own::OwnNode;
use crate::cri::{self as calls, Runtime};

/// The upstream's period.
const PERIOD: Duration = Duration::from_secs(5);
/// The upstream's period until the node is ready for the first time.
pub(super) const FAST: Duration = Duration::from_millis(100);
/// How long the fast start may last: a node that does not reach its API server, or does not become ready, asks no more often than others.
pub(super) const FAST_START: Duration = Duration::from_secs(120);
/// A runtime that was not well for so long is down.
const DOWN: Duration = Duration::from_secs(30);
/// A listing that is older than this is none, as the upstream's PLEG has it.
const STALE_LISTING: Duration = Duration::from_secs(180);

/// What the runtime said last.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// When it was last ready.
    good: Option<Instant>,
    /// Why it is not ready.
    runtime: Option<String>,
    /// Why its network is not; `None` inside: it is; none at all: it has not said.
    network: Option<Option<String>>,
    pub(super) handlers: Vec<cri::RuntimeHandler>,
    pub(super) features: Option<cri::RuntimeFeatures>,
}

impl Seen {
    /// Takes an answer. A call that fails leaves everything as it is.
    fn take(&mut self, answer: cri::StatusResponse, now: Instant) {
        let conditions = answer.status.map(|status| status.conditions).unwrap_or_default();
        let find = |name: &str| conditions.iter().find(|condition| condition.r#type == name);
        let bad = |name: &str| match find(name) {
            Some(condition) if condition.status => None,
            Some(condition) => Some(format!("{name}=false reason:{} message:{}", condition.reason, condition.message)),
            None => Some(format!("{name}=false reason: message:")),
        };
        self.runtime = bad("RuntimeReady");
        self.network = Some(bad("NetworkReady"));
        if self.runtime.is_none() {
            self.good = Some(now);
        }
        self.handlers = answer.runtime_handlers;
        self.features = answer.features;
    }

    /// Why the node is not ready. `listed`: when the runtime was last listed.
    pub(super) fn errors(&self, listed: Option<Instant>, now: Instant) -> Vec<String> {
        let mut errors = Vec::new();
        let age = |then: Instant| now.saturating_duration_since(then);
        match self.good {
            None => errors.push("container runtime status check may not have completed yet".to_owned()),
            Some(good) if age(good) > DOWN => errors.push("container runtime is down".to_owned()),
            Some(_) => {}
        }
        match listed {
            None => errors.push("PLEG is not healthy: pleg has yet to be successful".to_owned()),
            Some(listed) if age(listed) > STALE_LISTING => errors.push(format!(
                "PLEG is not healthy: pleg was last seen active {}s ago; threshold is 3m0s",
                age(listed).as_secs()
            )),
            Some(_) => {}
        }
        errors.extend(self.runtime.iter().map(|why| format!("container runtime not ready: {why}")));
        match &self.network {
            None => errors.push("container runtime network not ready: network state unknown".to_owned()),
            Some(network) => errors.extend(network.iter().map(|why| format!("container runtime network not ready: {why}"))),
        }
        errors
    }

    /// Whether no pod is to be worked on. What is not known yet holds nobody up: without a listing no pod is taken up anyway.
    pub(super) fn is_ill(&self, listed: Option<Instant>, now: Instant) -> bool {
        let older = |then: Option<Instant>, limit| then.is_some_and(|then| now.saturating_duration_since(then) > limit);
        self.runtime.is_some() || older(self.good, DOWN) || older(listed, STALE_LISTING)
    }

    /// Whether pods would hear of it.
    fn differs(&self, other: &Seen) -> bool {
        (&self.runtime, &self.network, self.good.is_some()) != (&other.runtime, &other.network, other.good.is_some())
            || self.handlers != other.handlers
    }
}

/// Asks the runtime now and then. Never returns.
pub(super) async fn run(runtime: Runtime, own: OwnNode, seen: watch::Sender<Seen>, ready: watch::Receiver<bool>) {
    ask(|| runtime.status(), own, seen, ready).await;
}

async fn ask<F>(status: impl Fn() -> F, own: OwnNode, seen: watch::Sender<Seen>, ready: watch::Receiver<bool>)
where
    F: Future<Output = crate::Result<cri::StatusResponse>>,
{
    let fast_until = Instant::now() + FAST_START;
    loop {
        match status().await {
            Ok(answer) => {
                let mut next = seen.borrow().clone();
                next.take(answer, Instant::now());
                let changed = seen.send_replace(next.clone()).differs(&next);
                if changed {
                    own.wake();
                }
            }
            Err(error) => tracing::debug!(error = %calls::message(&error), "the runtime does not tell how it is"),
        }
        let pause = if *ready.borrow() || Instant::now() > fast_until { PERIOD } else { FAST };
        tokio::time::sleep(pause).await;
    }
}

/// Tells the runtime the pods' address ranges once the node has them, and when they change. Never returns.
pub(super) async fn tell_pod_cidrs(runtime: Runtime, own: OwnNode) {
    let mut object = own.follow();
    let mut told: Vec<String> = Vec::new();
    loop {
        object.borrow_and_update();
        let wanted = own.pod_cidrs();
        let failed = match wanted.is_empty() || wanted == told {
            true => false,
            false => match runtime.update_pod_cidr(&wanted.join(",")).await {
                Ok(()) => {
                    tracing::info!(cidrs = ?wanted, "the runtime knows the pods' addresses");
                    told = wanted;
                    own.wake();
                    false
                }
                Err(error) => {
                    tracing::warn!(error = %calls::message(&error), cidrs = ?wanted, "the runtime does not take the pods' addresses");
                    true
                }
            },
        };
        tokio::select! {
            changed = object.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(PERIOD), if failed => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(runtime: bool, network: bool) -> cri::StatusResponse {
        let condition = |name: &str, status| cri::RuntimeCondition {
            r#type: name.to_owned(),
            status,
            reason: if status { String::new() } else { "R".to_owned() },
            message: if status { String::new() } else { "m".to_owned() },
        };
        let conditions = vec![condition("RuntimeReady", runtime), condition("NetworkReady", network), condition("Other", false)];
        cri::StatusResponse { status: Some(cri::RuntimeStatus { conditions }), ..cri::StatusResponse::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_runtime_is_asked_fast_for_two_minutes_at_the_most() {
        let asked = std::cell::Cell::new(0);
        let status = || {
            asked.set(asked.get() + 1);
            std::future::ready(Ok(answer(true, true)))
        };
        let (seen, (_, never)) = (watch::Sender::new(Seen::default()), watch::channel(false));
        let asking = ask(status, OwnNode::default(), seen, never);
        let _ = tokio::time::timeout(FAST_START + PERIOD * 20, asking).await;
        assert!((1000..1250).contains(&asked.get()), "{}", asked.get());
    }

    #[tokio::test]
    async fn errors_have_the_upstreams_words() {
        let now = Instant::now();
        let mut seen = Seen::default();
        assert_eq!(
            seen.errors(None, now),
            [
                "container runtime status check may not have completed yet",
                "PLEG is not healthy: pleg has yet to be successful",
                "container runtime network not ready: network state unknown"
            ]
        );
        seen.take(answer(true, false), now);
        assert_eq!(
            seen.errors(Some(now), now),
            ["container runtime network not ready: NetworkReady=false reason:R message:m"],
            "conditions of other types do not count"
        );
        seen.take(answer(true, true), now);
        assert!(seen.errors(Some(now), now).is_empty());
        assert!(!seen.is_ill(Some(now), now), "a network that is not ready holds up those alone that need it");
        let later = now + Duration::from_secs(200);
        assert!(seen.is_ill(Some(now), later) && seen.is_ill(None, now + Duration::from_secs(31)));
        assert!(!seen.is_ill(None, now + Duration::from_secs(29)) && !Seen::default().is_ill(None, now));
        assert_eq!(
            seen.errors(Some(now), later),
            ["container runtime is down", "PLEG is not healthy: pleg was last seen active 200s ago; threshold is 3m0s"]
        );
        seen.take(answer(false, true), now);
        assert!(seen.is_ill(Some(now), now));
        assert_eq!(seen.errors(Some(now), now), ["container runtime not ready: RuntimeReady=false reason:R message:m"]);
    }
}
