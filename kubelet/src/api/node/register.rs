//! Registration: the object is made, or what is there already is brought into line. Done once in an agent's life: a node that is deleted
//! under a running agent stays deleted, as upstream, so that a drained machine can be taken out of the cluster.

use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};

use super::{Answer, CALL, limited, patch};

/// Makes the object; whether there was none. `fresh`: no device plugin has ever registered on this machine.
pub(super) async fn register(nodes: &Api<Node>, wanted: &Node, fresh: bool) -> Answer<(Node, bool)> {
    let name = wanted.metadata.name.as_deref().unwrap_or_default();
    let error = match limited(CALL, nodes.create(&PostParams::default(), wanted)).await {
        Ok(node) => {
            tracing::info!(node = name, uid = node.metadata.uid, "the node is registered");
            return Ok((node, true));
        }
        Err(error) => error,
    };
    match &error {
        // Admission may refuse the name before the store sees that it is taken.
        kube::Error::Api(status) if status.is_already_exists() || status.is_forbidden() => {}
        _ => return Err(error),
    }
    let Some(existing) = limited(CALL, nodes.get_opt(name)).await? else { return Err(error) };
    let node = match patch::reconcile(wanted, &existing, fresh) {
        None => existing,
        Some(changes) => {
            tracing::info!(node = name, %changes, "the node's object is brought into line");
            limited(CALL, nodes.patch_status(name, &PatchParams::default(), &Patch::Strategic(changes))).await?
        }
    };
    tracing::info!(node = name, uid = node.metadata.uid, "the node was registered before");
    Ok((node, false))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::fake::{calls, refusal, server};
    use super::*;

    fn wanted() -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n", "labels": {"kubernetes.io/hostname": "n"}}})).unwrap()
    }

    async fn registered(answers: Vec<(u16, Value)>) -> (Answer<(Node, bool)>, Vec<String>) {
        let (client, asked) = server(answers);
        let answer = register(&Api::all(client), &wanted(), false).await;
        (answer, calls(&asked))
    }

    #[tokio::test]
    async fn a_new_node_takes_one_call() {
        let (answer, asked) = registered(vec![(201, json!({"metadata": {"name": "n", "uid": "u"}}))]).await;
        assert!(matches!(answer, Ok((_, true))));
        assert_eq!(asked, ["POST /api/v1/nodes"]);
    }

    #[tokio::test]
    async fn a_node_that_is_there_is_patched_where_it_differs() {
        for taken in [refusal(409, "AlreadyExists"), refusal(403, "Forbidden")] {
            let code = u16::try_from(taken["code"].as_u64().unwrap()).unwrap();
            let there = json!({"metadata": {"name": "n", "uid": "u"}});
            let (answer, asked) = registered(vec![(code, taken), (200, there.clone()), (200, there)]).await;
            assert!(matches!(answer, Ok((_, false))));
            assert_eq!(asked, ["POST /api/v1/nodes", "GET /api/v1/nodes/n", "PATCH /api/v1/nodes/n/status"]);
        }
    }

    #[tokio::test]
    async fn a_name_that_is_refused_and_not_there_is_an_error() {
        let (answer, asked) = registered(vec![(403, refusal(403, "Forbidden")), (404, refusal(404, "NotFound"))]).await;
        assert!(answer.is_err());
        assert_eq!(asked.len(), 2);
    }
}
