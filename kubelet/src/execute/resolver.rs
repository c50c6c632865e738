//! What a pod's resolver configuration leaves out is told with each sandbox. What is left out is decided in [`crate::dns`].

use k8s_openapi::api::core::v1::Pod;

use super::Executor;
use crate::dns::{NodeDns, dns_config, lacks_cluster_servers};
use crate::pod;
use crate::record::Weight;

impl Executor {
    /// The events of a pod whose resolver gets less than it was to get. Without a cluster nobody expects the cluster's servers.
    pub(super) fn tell_resolver(&self, pod: &Pod, node: &NodeDns) {
        for warning in dns_config(pod, node).1 {
            self.recorder.event(pod, None, Weight::Warning, "DNSConfigForming", &warning);
        }
        if self.config.api.is_some() && lacks_cluster_servers(pod, node) {
            let policy = pod::spec(pod).dns_policy.as_deref().unwrap_or("ClusterFirst");
            let text = format!(
                "kubelet does not have ClusterDNS IP configured and cannot create Pod using {policy:?} policy. Falling back to \"Default\" policy."
            );
            self.recorder.node_event(Weight::Warning, "MissingClusterDNS", &text);
            let text = format!("pod: {:?}. {text}", pod::format_pod(pod));
            self.recorder.event(pod, None, Weight::Warning, "MissingClusterDNS", &text);
        }
    }
}
