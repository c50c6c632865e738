//! The second look at the node's object before a pod is refused for its labels or taints. Pods and the node come by watches of their own:
//! the scheduler may have bound a pod by a label that has not come here yet. The object is asked for once for each such pod, by a task;
//! what then is judged stays.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::Api;
use tokio::task::JoinHandle;

use crate::api::node::OwnNode;
use crate::control::{Looked, PodControl};
use crate::pod::PodUid;

/// How long one answer is waited for: as long as the node's status waits for its own.
const LIMIT: Duration = Duration::from_secs(10);
/// So many requests without an answer: what is known has to do.
const FAILURES: u32 = 3;
/// Pauses between requests: the object may be made by somebody else, and late.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

#[derive(Debug)]
enum Look {
    Running(JoinHandle<()>),
    Over(Looked),
}

/// The looks under way and what they have come to.
#[derive(Debug, Default)]
pub(super) struct SecondLooks(BTreeMap<PodUid, Look>);

impl SecondLooks {
    /// What the pod's look has come to; the first question begins it.
    pub fn outcome(&mut self, uid: &PodUid, begin: impl FnOnce() -> JoinHandle<()>) -> Option<Looked> {
        match self.0.entry(uid.clone()).or_insert_with(|| Look::Running(begin())) {
            Look::Running(_) => None,
            Look::Over(looked) => Some(*looked),
        }
    }

    /// A look is over; of a pod that nobody wants any more it does not matter.
    pub fn take(&mut self, uid: PodUid, looked: Looked) {
        if let Some(look) = self.0.get_mut(&uid) {
            *look = Look::Over(looked);
        }
    }

    /// Gives up what concerns other pods than these.
    pub fn retain(&mut self, wanted: impl Fn(&PodUid) -> bool) {
        self.0.retain(|uid, look| {
            let keep = wanted(uid);
            if let (false, Look::Running(task)) = (keep, look) {
                task.abort();
            }
            keep
        });
    }

    /// The pod has been judged.
    pub fn forget(&mut self, uid: &PodUid) {
        self.0.remove(uid);
    }
}

/// Asks for the object and tells the main loop; it ends when there is one, or when nobody answers.
pub(super) fn begin(client: kube::Client, name: String, own: OwnNode, uid: PodUid, control: PodControl) -> JoinHandle<()> {
    tokio::spawn(async move {
        let looked = look(Api::all(client), &name, &own).await;
        control.node_looked(uid, looked);
    })
}

async fn look(nodes: Api<Node>, name: &str, own: &OwnNode) -> Looked {
    let (mut failures, mut pause) = (0, FIRST_PAUSE);
    loop {
        match tokio::time::timeout(LIMIT, nodes.get_opt(name)).await {
            Ok(Ok(Some(node))) => {
                own.set(node);
                return Looked::Anew;
            }
            // It is yet to be made.
            Ok(Ok(None)) => {}
            Ok(Err(_)) | Err(_) => {
                failures += 1;
                if failures == FAILURES {
                    return Looked::Unanswered;
                }
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}
