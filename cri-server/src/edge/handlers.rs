//! RuntimeClass handlers at the edge: what Status says of them, and pods that ask one for more than it can.

use berth_cri_api::v1;

use super::runtime::RuntimeEdge;
use crate::error::Error;
use crate::handlers::BUILTIN;
use crate::server::Features;
use crate::spec::SandboxSpec;

impl RuntimeEdge {
    /// One entry per handler, and the one with the empty name for the default: clients look features up by the name they will ask for.
    pub(super) async fn runtime_handlers(&self) -> Vec<v1::RuntimeHandler> {
        let kernel = self.server.features;
        let mut handlers = vec![wire("", kernel), wire(BUILTIN, kernel)];
        for name in self.server.handlers.names() {
            let features = match self.server.handlers.features(name, kernel).await {
                Ok(features) => features,
                Err(error) => {
                    let text = crate::error::text(&error);
                    if self.server.is_news(&text) {
                        tracing::warn!(handler = name, error = text, "a runtime handler does not tell its features (said once)");
                    }
                    Features { recursive_readonly: false, user_namespaces: false }
                }
            };
            handlers.push(wire(name, features));
        }
        handlers
    }

    /// Whether a pod's handler can do what the pod asks for.
    pub(super) async fn can_have(&self, spec: &SandboxSpec) -> Result<(), Error> {
        if spec.namespaces.own_users().is_none() {
            return Ok(());
        }
        let features = self.server.handlers.features(&spec.runtime_handler, self.server.features).await?;
        if features.user_namespaces {
            return Ok(());
        }
        let reason = format!("the runtime handler {:?} has no user namespaces with idmapped mounts", spec.runtime_handler);
        Err(Error::Unsupported { what: "namespace_options.userns_options", reason })
    }
}

fn wire(name: &str, features: Features) -> v1::RuntimeHandler {
    v1::RuntimeHandler {
        name: name.into(),
        features: Some(v1::RuntimeHandlerFeatures {
            recursive_read_only_mounts: features.recursive_readonly,
            user_namespaces: features.user_namespaces,
        }),
    }
}
