//! The node's lease: the sign of life that the controllers go by. Renewed whether the node is ready or not. A lease is made only for a
//! node that there is, since it belongs to it.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;

use super::{Answer, NodeAgent, jittered, limited, pauses};

/// Where the leases of nodes are.
const NAMESPACE: &str = "kube-node-lease";
/// A lease is renewed in this part of its duration.
const PART: u32 = 4;
/// Immediate attempts of a renewal, as the upstream.
const TRIES: u32 = 5;

/// The lease as it should be from now on; `last` is the one before.
fn lease(node: &Node, last: Option<&Lease>, seconds: i32, now: Timestamp) -> Lease {
    let mut lease = last.cloned().unwrap_or_default();
    let name = node.metadata.name.clone().unwrap_or_default();
    lease.metadata.name = Some(name.clone());
    lease.metadata.namespace = Some(NAMESPACE.to_owned());
    lease.metadata.managed_fields = None;
    let owner = OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: name.clone(),
        uid: node.metadata.uid.clone().unwrap_or_default(),
        ..OwnerReference::default()
    };
    lease.metadata.owner_references = Some(vec![owner]);
    let micros = Timestamp::from_microsecond(now.as_microsecond()).unwrap_or(now);
    let spec = lease.spec.take().unwrap_or_default();
    lease.spec = Some(LeaseSpec {
        holder_identity: Some(name),
        lease_duration_seconds: Some(seconds),
        renew_time: Some(MicroTime(micros)),
        ..spec
    });
    lease
}

/// Keeps the lease. Never returns.
pub(super) async fn run(agent: NodeAgent) {
    let seconds = agent.config.node.lease_seconds;
    let period = Duration::from_secs(u64::try_from(seconds).unwrap_or(1).max(1)) / PART;
    let leases: Api<Lease> = Api::namespaced(agent.api.heartbeats.clone(), NAMESPACE);
    let mut kept = Keeper { leases, last: None, limit: period };
    let mut object = agent.own.follow();
    let mut pause = pauses();
    loop {
        let Some(node) = object.borrow_and_update().clone() else {
            kept.last = None;
            if object.changed().await.is_err() {
                return;
            }
            continue;
        };
        match kept.keep(&node, seconds, agent.config.clock.now()).await {
            Ok(()) => {
                agent.own.note_contact(agent.config.clock.now());
                pause = pauses();
                tokio::time::sleep(jittered(period, 4)).await;
            }
            Err(error) => {
                tracing::warn!(node = node.metadata.name, %error, "the node's lease is not renewed");
                // A lease that was there is tried again in its time; one that is yet to be made, soon.
                let soon = pause.next().unwrap_or(period);
                tokio::time::sleep(if kept.last.is_some() { jittered(period, 4) } else { soon }).await;
            }
        }
    }
}

struct Keeper {
    leases: Api<Lease>,
    last: Option<Lease>,
    limit: Duration,
}

impl Keeper {
    /// Makes the lease or renews it.
    async fn keep(&mut self, node: &Node, seconds: i32, now: Timestamp) -> Answer<()> {
        let name = node.metadata.name.as_deref().unwrap_or_default();
        let mut tries = TRIES;
        loop {
            let wanted = lease(node, self.last.as_ref(), seconds, now);
            let sent = match &self.last {
                Some(_) => limited(self.limit, self.leases.replace(name, &PostParams::default(), &wanted)).await,
                None => limited(self.limit, self.leases.create(&PostParams::default(), &wanted)).await,
            };
            tries -= 1;
            match sent {
                Ok(lease) => {
                    self.last = Some(lease);
                    return Ok(());
                }
                Err(error) if tries == 0 => return Err(error),
                Err(error) => match &error {
                    // Somebody has deleted it.
                    kube::Error::Api(status) if status.is_not_found() && self.last.is_some() => self.last = None,
                    // Another agent's, an earlier one's, or changed by somebody: it is taken as it is.
                    kube::Error::Api(status) if status.is_already_exists() || status.is_conflict() => {
                        self.last = limited(self.limit, self.leases.get_opt(name)).await?;
                    }
                    _ if self.last.is_none() => return Err(error),
                    _ => {}
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_belongs_to_its_node_and_is_renewed_in_place() {
        let mut node = Node::default();
        node.metadata.name = Some("n".to_owned());
        node.metadata.uid = Some("u".to_owned());
        let first = lease(&node, None, 40, Timestamp::from_nanosecond(1_234_567_891).unwrap());
        let owner = &first.metadata.owner_references.as_ref().unwrap()[0];
        assert_eq!((owner.kind.as_str(), owner.uid.as_str(), owner.controller), ("Node", "u", None));
        let spec = first.spec.clone().unwrap();
        assert_eq!((spec.holder_identity.as_deref(), spec.lease_duration_seconds), (Some("n"), Some(40)));
        assert_eq!(spec.renew_time.unwrap().0.as_nanosecond(), 1_234_567_000, "microseconds are what the API keeps");
        let mut read = first;
        read.metadata.resource_version = Some("7".to_owned());
        node.metadata.uid = Some("again".to_owned());
        let next = lease(&node, Some(&read), 40, Timestamp::from_second(9).unwrap());
        assert_eq!(next.metadata.resource_version.as_deref(), Some("7"));
        assert_eq!(next.metadata.owner_references.unwrap()[0].uid, "again", "a node that was made again owns it");
    }

    async fn kept(last: Option<Lease>, answers: Vec<(u16, serde_json::Value)>) -> (Answer<()>, Vec<String>) {
        let (client, asked) = super::super::fake::server(answers);
        let leases = Api::namespaced(client, NAMESPACE);
        let mut keeper = Keeper { leases, last, limit: Duration::from_secs(5) };
        let mut node = Node::default();
        node.metadata.name = Some("n".to_owned());
        let kept = keeper.keep(&node, 40, Timestamp::from_second(9).unwrap()).await;
        let short = |call: &String| call.split(' ').next().unwrap_or_default().to_owned();
        (kept, super::super::fake::calls(&asked).iter().map(short).collect())
    }

    #[tokio::test]
    async fn a_lease_is_made_taken_over_or_made_again() {
        use super::super::fake::refusal;
        let lease = || serde_json::json!({"metadata": {"name": "n", "resourceVersion": "1"}});
        let had = || serde_json::from_value::<Lease>(lease()).ok();
        let (kept_, asked) = kept(None, vec![(201, lease())]).await;
        assert!(kept_.is_ok() && asked == ["POST"], "{asked:?}");
        let (kept_, asked) = kept(None, vec![(409, refusal(409, "AlreadyExists")), (200, lease()), (200, lease())]).await;
        assert!(kept_.is_ok() && asked == ["POST", "GET", "PUT"], "another agent's: {asked:?}");
        let (kept_, asked) = kept(had(), vec![(404, refusal(404, "NotFound")), (201, lease())]).await;
        assert!(kept_.is_ok() && asked == ["PUT", "POST"], "deleted: {asked:?}");
        let (kept_, asked) = kept(had(), vec![(409, refusal(409, "Conflict")), (200, lease()), (200, lease())]).await;
        assert!(kept_.is_ok() && asked == ["PUT", "GET", "PUT"], "changed by somebody: {asked:?}");
        let (kept_, asked) = kept(had(), Vec::new()).await;
        assert!(kept_.is_err() && asked.len() == 5, "five attempts: {asked:?}");
    }
}
