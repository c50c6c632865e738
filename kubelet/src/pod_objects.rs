//! Where a pod's objects are looked up: beside the manifests for the node's own pods, at the API server for the others. Holds
//! neither; what a step of a pass needs is asked for here before the step looks it up, since a look-up never waits.

use std::path::Path;

use k8s_openapi::api::core::v1::{Container, Pod};
use tokio_util::sync::CancellationToken;

use crate::api::objects::ApiObjects;
use crate::env::Variable;
use crate::objects::{LocalObjects, Objects};
use crate::pod::{self, PodUid};

/// What a step of a pass is about to look up.
#[derive(Clone, Copy, Debug)]
pub enum Need<'a> {
    /// What the pod's volumes show and where they are.
    Volumes,
    /// The same for a pod that has begun: its other steps do not wait for what may take long.
    VolumesAgain,
    /// What the environment of one container refers to.
    Environment(&'a Container),
    /// The pod's RuntimeClass.
    RuntimeClass,
    /// The Secrets that images are pulled with.
    PullSecrets,
}

/// The objects of all pods. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct PodObjects {
    /// Those beside the manifests.
    local: LocalObjects,
    /// Those of the API server; `None`: the node stands alone.
    api: Option<ApiObjects>,
}

impl PodObjects {
    /// Of a node that belongs to an API server, or stands alone.
    pub fn new(api: Option<ApiObjects>) -> PodObjects {
        PodObjects { local: LocalObjects::default(), api }
    }

    /// The objects beside the manifests.
    pub fn local(&self) -> &LocalObjects {
        &self.local
    }

    /// Those of the API server.
    pub(crate) fn api(&self) -> Option<&ApiObjects> {
        self.api.as_ref()
    }

    /// The API server's, for a pod that has come from it.
    fn api_of(&self, pod: &Pod) -> Option<&ApiObjects> {
        self.api.as_ref().filter(|_| !pod::is_static(pod))
    }

    /// Where a pod's objects are looked up.
    pub fn of(&self, pod: &Pod) -> &dyn Objects {
        match self.api_of(pod) {
            Some(api) => api,
            None => &self.local,
        }
    }

    /// Whether an API server's admission has judged the pod and written what its classes give into it.
    pub fn is_admitted(&self, pod: &Pod) -> bool {
        self.api_of(pod).is_some()
    }

    /// Waits, for a bounded time, until what a step looks up can be looked up. What is not known by then the look-ups tell.
    pub async fn ready(&self, pod: &Pod, need: Need<'_>, cancel: &CancellationToken) {
        if let Some(api) = self.api_of(pod) {
            api.ready(pod, need, cancel).await;
        }
    }

    /// The variables of the services that the pod can see.
    pub fn service_variables(&self, pod: &Pod) -> Result<Vec<Variable>, String> {
        self.api.as_ref().map_or_else(|| Ok(Vec::new()), |api| api.service_variables(pod))
    }

    /// Volumes of pods that nobody knows any more are not in use for ever.
    pub fn forget_strays(&self, known: &[PodUid], kubelet_root: &Path) {
        if let Some(api) = &self.api {
            api.forget_strays(known, kubelet_root);
        }
    }

    /// The pod is gone: what only it refers to is not looked at any more.
    pub fn release(&self, uid: &PodUid) {
        if let Some(api) = &self.api {
            api.release(uid);
        }
    }
}
