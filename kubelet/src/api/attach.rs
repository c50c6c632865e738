//! Volumes that somebody else attaches to this node: which of them are in use, and the wait until they are there. The control plane's
//! controller attaches and detaches; the node says what it uses and never touches a volume that is not attached.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::NodeStatus;
use k8s_openapi::api::storage::v1::{CSIDriver, VolumeAttachment};
use kube::{Api, Client};
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use super::claims::answer;
use super::node::OwnNode;
use crate::pod::PodUid;
use crate::volume::csi::Handle;

impl Handle {
    /// The name that a node's status has for it.
    fn unique_name(&self) -> String {
        format!("kubernetes.io/csi/{}^{}", self.driver, self.handle)
    }

    /// The name of the object that tells of its attachment to a node.
    fn attachment(&self, node: &str) -> String {
        let hash = Sha256::digest(format!("{}{}{node}", self.handle, self.driver).as_bytes());
        hash.iter().fold("csi-".to_owned(), |name, byte| format!("{name}{byte:02x}"))
    }
}

/// Whether volumes of a driver are attached to nodes: so they are unless its object says otherwise.
pub(super) fn is_attached(driver: Option<&CSIDriver>) -> bool {
    driver.is_none_or(|driver| driver.spec.attach_required != Some(false))
}

/// Pauses between looks: short at first, since most attach quickly.
const PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long a step of a pass waits for an attachment, as the upstream does.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// Why the volume cannot be mounted yet, by what the node's object says.
fn obstacle(status: &NodeStatus, name: &str) -> Option<String> {
    if !status.volumes_in_use.iter().flatten().any(|used| used == name) {
        return Some(format!("volume {name} is not in the node's list of volumes in use yet"));
    }
    let attached = status.volumes_attached.iter().flatten().any(|attached| attached.name == name);
    (!attached).then(|| format!("volume {name} is not attached yet according to the node's status"))
}

/// What the attacher says; the error says why the volume is not attached.
fn metadata(attachment: &VolumeAttachment) -> Result<BTreeMap<String, String>, String> {
    let status = attachment.status.as_ref();
    if attachment.metadata.deletion_timestamp.is_some() {
        return Err("the volume is being detached".to_owned());
    }
    if status.is_some_and(|status| status.attached) {
        return Ok(status.and_then(|status| status.attachment_metadata.clone()).unwrap_or_default());
    }
    let error = status.and_then(|status| status.attach_error.as_ref()?.message.clone());
    Err(error.unwrap_or_else(|| "the volume is not attached yet".to_owned()))
}

#[derive(Debug, Default)]
struct State {
    /// Who uses which volume.
    users: BTreeMap<Handle, BTreeSet<PodUid>>,
    /// What the attacher says of those that are attached.
    attached: BTreeMap<Handle, BTreeMap<String, String>>,
}

/// The attached volumes of this node. Clones share them.
#[derive(Clone, Debug)]
pub(super) struct Attachments {
    node: String,
    /// The node's object: its status tells what is in use, and what is attached.
    own: OwnNode,
    state: Arc<Mutex<State>>,
}

impl Attachments {
    /// With what an earlier kubelet has left mounted: that is in use until its pods are gone.
    pub(super) fn new(node: &str, own: OwnNode, mounted: Vec<(PodUid, Handle)>) -> Attachments {
        let attachments = Attachments { node: node.to_owned(), own, state: Arc::default() };
        let mut state = attachments.lock();
        for (uid, volume) in mounted {
            state.users.entry(volume).or_default().insert(uid);
        }
        attachments.tell(&state);
        drop(state);
        attachments
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the node's status say what is in use.
    fn tell(&self, state: &State) {
        self.own.set_volumes_in_use(state.users.keys().map(Handle::unique_name).collect());
    }

    /// The pod uses the volume from now on.
    pub(super) fn take(&self, uid: &PodUid, volume: &Handle) {
        let mut state = self.lock();
        if state.users.entry(volume.clone()).or_default().insert(uid.clone()) {
            self.tell(&state);
        }
    }

    /// Who uses any.
    pub(super) fn users(&self) -> BTreeSet<PodUid> {
        self.lock().users.values().flatten().cloned().collect()
    }

    /// The pod uses none any more.
    pub(super) fn release(&self, uid: &PodUid) {
        let mut state = self.lock();
        let State { users, attached } = &mut *state;
        let before = users.len();
        users.retain(|_, pods| {
            pods.remove(uid);
            !pods.is_empty()
        });
        attached.retain(|volume, _| users.contains_key(volume));
        if users.len() != before {
            self.tell(&state);
        }
    }

    /// The name of the object that tells of a volume's attachment here.
    pub(super) fn name_of(&self, volume: &Handle) -> String {
        volume.attachment(&self.node)
    }

    /// What the attacher says of a volume.
    pub(super) fn publish_context(&self, volume: &Handle) -> BTreeMap<String, String> {
        self.lock().attached.get(volume).cloned().unwrap_or_default()
    }

    /// Waits until the pod's volume is attached, and no longer than that; it is looked once at the least. The error is the kubelet's message.
    pub(super) async fn wait(&self, client: &Client, uid: &PodUid, volume: &Handle, patience: Duration) -> Result<(), String> {
        self.take(uid, volume);
        if self.lock().attached.contains_key(volume) {
            return Ok(());
        }
        let limit = Instant::now() + patience;
        let mut pause = PAUSE;
        loop {
            let why = match self.look(client, volume).await {
                Ok(context) => {
                    self.lock().attached.insert(volume.clone(), context);
                    return Ok(());
                }
                Err(why) => why,
            };
            if Instant::now() + pause > limit {
                return Err(format!("{why}: timed out waiting for the condition"));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn look(&self, client: &Client, volume: &Handle) -> Result<BTreeMap<String, String>, String> {
        let status = self.own.current().and_then(|node| node.status.clone()).unwrap_or_default();
        if let Some(why) = obstacle(&status, &volume.unique_name()) {
            return Err(why);
        }
        let attachments: Api<VolumeAttachment> = Api::all(client.clone());
        metadata(&answer(attachments.get(&self.name_of(volume))).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume() -> Handle {
        Handle { driver: "disk.example".to_owned(), handle: "vol-1".to_owned() }
    }

    #[test]
    fn a_volume_has_one_name_in_the_nodes_status_and_one_for_its_attachment() {
        assert_eq!(volume().unique_name(), "kubernetes.io/csi/disk.example^vol-1");
        let name = volume().attachment("n1");
        assert!(name.starts_with("csi-") && name.len() == 4 + 64);
        let expected = Sha256::digest(b"vol-1disk.examplen1");
        assert_eq!(name[4..6], format!("{:02x}", expected[0]));
        assert_ne!(name, volume().attachment("n2"));
    }

    #[test]
    fn it_is_mounted_only_when_it_is_reported_and_attached() {
        let name = volume().unique_name();
        let status = |used: bool, attached: bool| -> NodeStatus {
            let used = if used { vec![name.clone()] } else { Vec::new() };
            let attached = if attached { serde_json::json!([{"name": name, "devicePath": ""}]) } else { serde_json::json!([]) };
            serde_json::from_value(serde_json::json!({"volumesInUse": used, "volumesAttached": attached})).unwrap()
        };
        assert!(obstacle(&status(false, true), &name).unwrap().contains("in use"));
        assert!(obstacle(&status(true, false), &name).unwrap().contains("not attached"));
        assert_eq!(obstacle(&status(true, true), &name), None);
        let attachment = |status: serde_json::Value| -> VolumeAttachment {
            serde_json::from_value(serde_json::json!({"metadata": {"name": "a"}, "spec": {"attacher": "d", "nodeName": "n",
                "source": {"persistentVolumeName": "pv"}}, "status": status}))
            .unwrap()
        };
        let told = metadata(&attachment(serde_json::json!({"attached": true, "attachmentMetadata": {"device": "/dev/x"}})));
        assert_eq!(told.unwrap()["device"], "/dev/x");
        let error = metadata(&attachment(serde_json::json!({"attached": false, "attachError": {"message": "no room"}})));
        assert_eq!(error.unwrap_err(), "no room");
        let document =
            |spec| serde_json::from_value::<CSIDriver>(serde_json::json!({"metadata": {"name": "d"}, "spec": spec})).unwrap();
        assert!(is_attached(None) && is_attached(Some(&document(serde_json::json!({})))));
        assert!(!is_attached(Some(&document(serde_json::json!({"attachRequired": false})))));
    }

    #[test]
    fn a_volume_is_in_use_until_its_last_pod_has_gone() {
        let own = OwnNode::default();
        let [a, b] = ["a", "b"].map(|uid| PodUid::new(uid).unwrap());
        let attachments = Attachments::new("n1", own.clone(), vec![(a.clone(), volume())]);
        assert_eq!(own.volumes_in_use(), Some(vec![volume().unique_name()]), "what is mounted already is in use");
        attachments.take(&b, &volume());
        attachments.release(&a);
        assert_eq!(own.volumes_in_use().map(|list| list.len()), Some(1));
        attachments.release(&b);
        assert_eq!(own.volumes_in_use(), Some(Vec::new()));
        assert!(attachments.users().is_empty());
    }
}
