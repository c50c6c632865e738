//! Waits until the cluster takes a node for Ready. Looks only, and at the Node object alone: whatever the reason, there is one truth.

use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::api::Api;

/// The first look is soon, because a node is Ready in a second or two; later ones cost a cluster nothing that anybody would notice.
const FIRST_LOOK: Duration = Duration::from_millis(100);
const SLOWEST_LOOK: Duration = Duration::from_secs(2);

/// Whether a Node's own condition says that it is Ready.
pub fn is_ready(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Returns when the node is Ready, however long that takes: an API server that is away, a certificate that nobody has approved
/// and an object that is not there yet are all the same to it.
pub async fn until_ready(client: &Client, node: &str) {
    let nodes = Api::<Node>::all(client.clone());
    let mut pause = FIRST_LOOK;
    while !nodes.get_opt(node).await.is_ok_and(|found| found.as_ref().is_some_and(is_ready)) {
        tokio::time::sleep(pause).await;
        pause = (pause * 5 / 4).min(SLOWEST_LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_ready_condition_counts() {
        for (conditions, expected) in [
            (r#"[{"type": "Ready", "status": "True"}]"#, true),
            (r#"[{"type": "Ready", "status": "False"}]"#, false),
            (r#"[{"type": "Ready", "status": "Unknown"}]"#, false),
            (r#"[{"type": "MemoryPressure", "status": "True"}]"#, false),
            ("[]", false),
        ] {
            let node = format!(r#"{{"metadata": {{}}, "status": {{"conditions": {conditions}}}}}"#);
            assert_eq!(is_ready(&serde_json::from_str(&node).unwrap()), expected, "{conditions}");
        }
        assert!(!is_ready(&Node::default()));
    }
}
