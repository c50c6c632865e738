//! Which of the pods on record start while the API server is away, and why the others do not. Pure.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::api::core::v1::{PersistentVolume, Pod};
use k8s_openapi::jiff::Timestamp;

use super::record::{KeptPod, is_secret};
use super::store::Loaded;
use crate::api::follow::Held;
use crate::api::{attach, wanted};
use crate::configuration::parse_duration;
use crate::objects::ObjectName;
use crate::pod::{self, PodUid};
use crate::pod_objects::Need;
use crate::source::Withheld;
use crate::status::is_terminal_phase;
use crate::volume::{self, persistent};

/// The annotation with a pod's own limit: a duration, or `unlimited`.
pub(super) const MAX_AGE: &str = "berth/offline-max-age";

/// What pods are judged by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Judge {
    pub has_key: bool,
    /// Of pods that do not say their own.
    pub max_age: Option<Duration>,
    pub now: Timestamp,
}

/// The limit that a pod says, if it says one.
fn own_limit(pod: &Pod) -> Option<Result<Option<Duration>, String>> {
    let text = pod::annotation(pod, MAX_AGE)?;
    Some(if text == "unlimited" { Ok(None) } else { parse_duration(text).map(Some) })
}

/// The pod's limit. `None`: it may start however long the API server is away. A limit that nobody can read is none of time: whoever wrote it
/// did not mean that the pod may always start.
pub(super) fn limit(pod: &Pod, node: Option<Duration>) -> Option<Duration> {
    own_limit(pod).map_or(node, |own| own.unwrap_or(Some(Duration::ZERO)))
}

/// How long the API server had not been seen. `None`: nobody knows, as this machine's clock is behind that time: one without a battery
/// begins anywhere in the past. Pods do not wait for a clock.
fn age(contact: Timestamp, now: Timestamp) -> Option<Duration> {
    Duration::try_from(now.duration_since(contact)).ok()
}

/// Why the pod is too old to be started.
fn too_old(pod: &Pod, contact: Option<Timestamp>, judge: Judge) -> Option<String> {
    let limit = limit(pod, judge.max_age)?;
    let seconds = limit.as_secs();
    if let Some(Err(error)) = own_limit(pod) {
        return Some(format!("annotation {MAX_AGE}: {error}"));
    }
    if limit.is_zero() {
        // Whatever the clock says.
        return Some("it never starts without the API server".to_owned());
    }
    let Some(contact) = contact else {
        return Some(format!("it is not known when the API server was last there; the pod may start {seconds}s after that"));
    };
    let age = age(contact, judge.now)?;
    (age >= limit).then(|| {
        format!(
            "the API server was last there {}s ago, at {contact}; the pod may start until {seconds}s after that",
            age.as_secs()
        )
    })
}

/// The objects that the pod cannot start without. Images that are there need no pull secret.
fn required(kept: &KeptPod) -> BTreeSet<ObjectName> {
    let pod = &*kept.pod;
    let mut names = wanted::needed(pod, Need::Volumes);
    names.extend(wanted::needed(pod, Need::RuntimeClass));
    for container in pod::all_containers(pod) {
        names.extend(wanted::needed(pod, Need::Environment(container)));
    }
    names.extend(kept.volumes.values().flat_map(|volume| wanted::of_volume(volume)));
    names
}

/// Whether a controller attaches the volume to nodes.
fn is_attached(loaded: &Loaded, volume: &PersistentVolume) -> bool {
    let Some(handle) = crate::volume::csi::Handle::of(volume) else { return false };
    let driver = loaded.kept.objects.get(&wanted::csi_driver(&handle.driver));
    match driver {
        Some(Some(Held::CsiDriver(driver))) => attach::is_attached(Some(driver)),
        _ => true,
    }
}

/// What the pod needs and is not on record.
fn missing(loaded: &Loaded, uid: &PodUid, kept: &KeptPod, judge: Judge) -> Option<String> {
    if loaded.kept.services.is_none() {
        // Every container has their addresses in its environment.
        return Some("the cluster's Services are not on record".to_owned());
    }
    let no_key = "secrets are kept with a sealing key only, and there is none";
    for name in required(kept) {
        if loaded.kept.objects.contains_key(&name) {
            continue;
        }
        let why = match loaded.unusable_objects.get(&name) {
            Some(why) => why.text(),
            None if is_secret(&name) && !judge.has_key => no_key,
            None => "it had not been read when the API server went",
        };
        return Some(format!("{name} is not on record: {why}"));
    }
    if let Some((audience, _)) = wanted::tokens(&kept.pod).into_iter().find(|token| !kept.tokens.contains_key(token)) {
        let why = match loaded.unusable_tokens.get(uid) {
            Some(why) => why.text(),
            None if !judge.has_key => no_key,
            None => "it had not been given when the API server went",
        };
        let account = pod::spec(&kept.pod).service_account_name.as_deref().unwrap_or("default");
        let audience = if audience.is_empty() { String::new() } else { format!(" for {audience}") };
        return Some(format!("the token of service account {account}{audience} is not on record: {why}"));
    }
    let mut claims = volume::used(&kept.pod).into_iter().filter_map(|volume| persistent::claim_name(&kept.pod, volume));
    if let Some(claim) = claims.clone().find(|claim| kept.volumes.get(claim).is_some_and(|volume| is_attached(loaded, volume))) {
        // It may be another node's by now, and two that write to it destroy it.
        return Some(format!("whether the volume of claim {claim} is attached to this node only the API server can tell"));
    }
    let claim = claims.find(|claim| !kept.volumes.contains_key(claim))?;
    Some(format!("the volume of claim {claim} is not on record: it had not been found when the API server went"))
}

/// Why the pod is not started; `None`: it is.
pub(super) fn withhold(loaded: &Loaded, uid: &PodUid, kept: &KeptPod, judge: Judge) -> Option<Withheld> {
    let phase = kept.pod.status.as_ref().and_then(|status| status.phase.as_deref());
    if pod::is_deleting(&kept.pod) || is_terminal_phase(phase) {
        // Nothing of it is started.
        return None;
    }
    let withheld = |why: String, runs_on: bool| Some(Withheld { pod: kept.pod.clone(), why, runs_on });
    if let Some(why) = missing(loaded, uid, kept, judge) {
        return withheld(why, false);
    }
    too_old(&kept.pod, loaded.kept.contact, judge).and_then(|why| withheld(why, true))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;
    use crate::api::services::Known;
    use crate::objects::Token;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn kept(annotations: Value, spec: Value) -> KeptPod {
        let pod = json!({"metadata": {"name": "a", "namespace": "ns", "uid": "u", "annotations": annotations}, "spec": spec});
        KeptPod { pod: Arc::new(serde_json::from_value(pod).unwrap()), ..KeptPod::default() }
    }

    fn plain() -> Value {
        json!({"containers": [{"name": "c", "image": "i"}]})
    }

    /// Records without an object.
    fn read() -> Loaded {
        let mut loaded = Loaded::default();
        loaded.kept.services = Some(Known::default());
        loaded
    }

    fn name(kind: &'static str, name: &str) -> ObjectName {
        ObjectName { kind, namespace: "ns".to_owned(), name: name.to_owned() }
    }

    fn why(loaded: &Loaded, kept: &KeptPod, judge: Judge) -> String {
        withhold(loaded, &PodUid::new("u").unwrap(), kept, judge).map(|withheld| withheld.why).unwrap_or_default()
    }

    const JUDGE: Judge = Judge { has_key: true, max_age: None, now: Timestamp::UNIX_EPOCH };

    #[test]
    fn a_pod_starts_until_its_age_and_whatever_a_clock_behind_says() {
        let hour = Some(Duration::from_secs(3600));
        for (own, node, now, starts) in [
            (None, None, 1_000_000_000, true),
            (None, hour, 10_000 + 3599, true),
            (None, hour, 10_000 + 3600, false),
            (None, hour, 5, true),
            (None, Some(Duration::ZERO), 5, false),
            (Some("0"), hour, 5, false),
            (Some("10m"), hour, 10_000 + 601, false),
            (Some("2h"), hour, 10_000 + 3601, true),
            (Some("unlimited"), hour, 1_000_000_000, true),
            (Some("0"), None, 10_000, false),
        ] {
            let annotations = own.map_or(json!({}), |own| json!({MAX_AGE: own}));
            let mut loaded = read();
            loaded.kept.contact = Some(at(10_000));
            let judge = Judge { max_age: node, now: at(now), ..JUDGE };
            let withheld = withhold(&loaded, &PodUid::new("u").unwrap(), &kept(annotations, plain()), judge);
            assert_eq!(withheld.is_none(), starts, "{own:?} {node:?} {now}");
            let is_why = |why: &str| why.contains("last there") || why.contains("never starts");
            assert!(withheld.is_none_or(|withheld| withheld.runs_on && is_why(&withheld.why)));
        }
        let unread = kept(json!({MAX_AGE: "7d"}), plain());
        assert!(
            why(&read(), &unread, JUDGE).starts_with("annotation berth/offline-max-age: "),
            "who limits does not mean always"
        );
        let unknown = why(&read(), &kept(json!({}), plain()), Judge { max_age: hour, ..JUDGE });
        assert!(unknown.contains("not known when"), "{unknown}");
    }

    #[test]
    fn a_pod_without_its_secrets_or_token_is_named_with_the_reason() {
        let env = json!({"containers": [{"name": "c", "image": "i", "env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}],
            "imagePullSecrets": [{"name": "pull"}]});
        let pod = kept(json!({}), env);
        let keyless = Judge { has_key: false, ..JUDGE };
        let mut loaded = read();
        assert_eq!(
            why(&loaded, &pod, keyless),
            "Secret ns/s is not on record: secrets are kept with a sealing key only, and there is none"
        );
        assert_eq!(why(&loaded, &pod, JUDGE), "Secret ns/s is not on record: it had not been read when the API server went");
        loaded.unusable_objects.insert(name("Secret", "s"), super::super::record::Unusable::Seal);
        assert!(why(&loaded, &pod, JUDGE).contains("its seal does not open"));
        loaded.kept.objects.insert(name("Secret", "s"), None);
        assert_eq!(why(&loaded, &pod, JUDGE), "", "that there is none is known; an image that is there needs no pull secret");

        let token = json!({"containers": [{"name": "c", "image": "i", "volumeMounts": [{"name": "t", "mountPath": "/t"}]}], "serviceAccountName": "robot",
            "volumes": [{"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}}]}}]});
        let mut pod = kept(json!({}), token);
        assert!(why(&loaded, &pod, keyless).starts_with("the token of service account robot is not on record: secrets are kept"));
        pod.tokens.insert((String::new(), 3607), Arc::new(Token { text: "t".to_owned(), expires: at(0) }));
        assert_eq!(why(&loaded, &pod, JUDGE), "", "however old it is: nobody is there to take it");
    }

    #[test]
    fn without_the_services_no_container_has_its_environment() {
        assert_eq!(why(&Loaded::default(), &kept(json!({}), plain()), JUDGE), "the cluster's Services are not on record");
    }

    #[test]
    fn a_claim_needs_its_volume() {
        let claim = json!({"containers": [{"name": "c", "image": "i", "volumeMounts": [{"name": "d", "mountPath": "/d"}]}],
            "volumes": [{"name": "d", "persistentVolumeClaim": {"claimName": "data"}}]});
        let mut pod = kept(json!({}), claim);
        assert!(why(&read(), &pod, JUDGE).contains("claim data"));
        pod.volumes.insert("data".to_owned(), Arc::default());
        assert_eq!(why(&read(), &pod, JUDGE), "");
    }

    #[test]
    fn what_is_to_end_or_is_over_needs_nothing() {
        let env = json!({"containers": [{"name": "c", "image": "i", "envFrom": [{"secretRef": {"name": "s"}}]}]});
        let mut pod = kept(json!({MAX_AGE: "0"}), env);
        assert_ne!(why(&read(), &pod, JUDGE), "");
        let mut over = Pod::clone(&pod.pod);
        over.status.get_or_insert_default().phase = Some("Succeeded".to_owned());
        pod.pod = Arc::new(over);
        assert_eq!(why(&read(), &pod, JUDGE), "");
    }
}
