//! How the node presents itself to the API server: the document's fields and the flags of it, into [`NodeSettings`]. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Taint;
use serde_json::{Map, Value};

use super::flags::{CLOUD_PROVIDER, NODE_LABELS};
use super::settings::{Reader, wrong};
use super::value::at;
use crate::Result;
use crate::config::{Config, NodeSettings};
use crate::source::validate::is_qualified_name;

/// Labels of Kubernetes' own domains that a node may give itself; NodeRestriction refuses the others.
const OWN_LABELS: [&str; 11] = [
    "kubernetes.io/hostname",
    "kubernetes.io/os",
    "kubernetes.io/arch",
    "beta.kubernetes.io/os",
    "beta.kubernetes.io/arch",
    "topology.kubernetes.io/zone",
    "topology.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "failure-domain.beta.kubernetes.io/region",
    "node.kubernetes.io/instance-type",
    "beta.kubernetes.io/instance-type",
];
/// Domains of labels that a node may give itself.
const OWN_DOMAINS: [&str; 2] = ["kubelet.kubernetes.io", "node.kubernetes.io"];

/// What the value of a label, or of a taint, may be: nothing, or up to 63 characters of a name.
fn is_label_value(text: &str) -> bool {
    text.is_empty() || !text.contains('/') && is_qualified_name(text)
}

/// Changes `config` as the document and the flags say.
pub(super) fn apply(document: &Map<String, Value>, flags: &BTreeMap<&'static str, String>, config: &mut Config) -> Result<()> {
    let reader = Reader(document);
    let mut node = NodeSettings { addresses_given: config.node.addresses_given, ..NodeSettings::default() };
    if let Some(register) = reader.bool("registerNode") {
        node.register = register;
    }
    node.taints = taints(&reader)?;
    if let Some(id) = reader.text("providerID") {
        id.clone_into(&mut node.provider_id);
    }
    if let Some(most) = reader.int("nodeStatusMaxImages", -1, i64::from(i32::MAX))? {
        node.max_images = usize::try_from(most).ok();
    }
    if let Some(period) = reader.period("nodeStatusUpdateFrequency")? {
        // Whoever says how often the status is looked at means how often it is sent, too.
        (node.update, node.report) = (period, period);
    }
    if let Some(period) = reader.period("nodeStatusReportFrequency")? {
        node.report = period;
    }
    if let Some(seconds) = reader.int("nodeLeaseDurationSeconds", 0, i64::from(i32::MAX))?.filter(|seconds| *seconds > 0) {
        node.lease_seconds = i32::try_from(seconds).unwrap_or(i32::MAX);
    }
    match flags.get(CLOUD_PROVIDER).map(String::as_str).unwrap_or_default() {
        "" => {}
        "external" => node.external_cloud = true,
        other => return wrong("--cloud-provider", format!("{other:?} is neither empty nor external")),
    }
    node.labels = labels(flags.get(NODE_LABELS).map(String::as_str).unwrap_or_default())?;
    config.node = node;
    Ok(())
}

fn taints(reader: &Reader<'_>) -> Result<Vec<Taint>> {
    const FIELD: &str = "registerWithTaints";
    let mut taints = Vec::new();
    for item in at(reader.0, FIELD).and_then(Value::as_array).into_iter().flatten() {
        let taint = match serde_json::from_value::<Taint>(item.clone()) {
            Ok(taint) => taint,
            Err(error) => return wrong(FIELD, format!("{item} is no taint: {error}")),
        };
        if !["NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&taint.effect.as_str()) {
            return wrong(FIELD, format!("invalid taint effect: {}", taint.effect));
        }
        if !is_qualified_name(&taint.key) || !is_label_value(taint.value.as_deref().unwrap_or_default()) {
            return wrong(FIELD, format!("{item} is no taint: its key or value is not one of a label"));
        }
        taints.push(taint);
    }
    Ok(taints)
}

fn labels(text: &str) -> Result<BTreeMap<String, String>> {
    const FLAG: &str = "--node-labels";
    let mut labels = BTreeMap::new();
    for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
        let Some((key, value)) = pair.split_once('=') else { return wrong(FLAG, format!("{pair:?} is not KEY=VALUE")) };
        if !is_qualified_name(key) || !is_label_value(value) {
            return wrong(FLAG, format!("{pair:?} is no label"));
        }
        let domain = key.split_once('/').map_or("", |(domain, _)| domain);
        let is_in = |domain: &str, of: &str| domain == of || domain.strip_suffix(of).is_some_and(|rest| rest.ends_with('.'));
        let kubernetes = is_in(domain, "kubernetes.io") || is_in(domain, "k8s.io");
        if kubernetes && !OWN_LABELS.contains(&key) && !OWN_DOMAINS.iter().any(|own| is_in(domain, own)) {
            return wrong(FLAG, format!("unknown 'kubernetes.io' or 'k8s.io' labels specified with --node-labels: [{key}]"));
        }
        labels.insert(key.to_owned(), value.to_owned());
    }
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::configuration::Configuration;

    fn applied(flags: &[(&str, &str)]) -> Result<NodeSettings> {
        let mut configuration = Configuration::default();
        for (flag, text) in flags {
            configuration.set_flag(flag, text)?;
        }
        let mut config = Config::new("n", tonic::transport::Endpoint::from_static("http://unused").connect_lazy());
        configuration.apply(&mut config)?;
        Ok(config.node)
    }

    #[tokio::test]
    async fn taints_labels_and_the_cloud_come_from_flags() {
        let flags = [
            ("register-with-taints", "dedicated=gpu:NoSchedule,drained:NoExecute"),
            ("node-labels", "disk=ssd,node.kubernetes.io/pool=a"),
            ("cloud-provider", "external"),
            ("provider-id", "cloud://7"),
        ];
        let node = applied(&flags).unwrap();
        let taints: Vec<_> = node.taints.iter().map(|t| (t.key.as_str(), t.value.as_deref(), t.effect.as_str())).collect();
        assert_eq!(taints, [("dedicated", Some("gpu"), "NoSchedule"), ("drained", None, "NoExecute")]);
        assert_eq!(node.labels.keys().map(String::as_str).collect::<Vec<_>>(), ["disk", "node.kubernetes.io/pool"]);
        assert!(node.external_cloud && node.provider_id == "cloud://7");
    }

    #[tokio::test]
    async fn what_the_api_server_would_refuse_is_refused_at_start() {
        for (flag, text, problem) in [
            ("cloud-provider", "aws", "neither empty nor external"),
            ("node-labels", "node-role.kubernetes.io/control-plane=", "labels specified with --node-labels"),
            ("node-labels", "a b=c", "is no label"),
            ("node-labels", "alone", "is not KEY=VALUE"),
            ("register-with-taints", "a=b:Never", "invalid taint effect"),
            ("register-with-taints", "ab", "is not KEY=VALUE:EFFECT"),
        ] {
            let error = applied(&[(flag, text)]).unwrap_err().to_string();
            assert!(error.contains(problem), "{flag} {text}: {error}");
        }
    }

    #[tokio::test]
    async fn the_report_follows_the_update_unless_it_is_given() {
        let seconds = |node: NodeSettings| (node.update.as_secs(), node.report.as_secs());
        assert_eq!(seconds(applied(&[]).unwrap()), (10, 300));
        assert_eq!(seconds(applied(&[("node-status-update-frequency", "4s")]).unwrap()), (4, 4));
    }
}
