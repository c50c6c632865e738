//! What is kept of the API's pods, and the form it has on disk: JSON, one file each, with Secrets and tokens sealed whole. Says what a
//! file holds and whether one that was read is what it says it is; opens no file.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, PersistentVolume, Pod};
use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::super::follow::Held;
use super::super::services::Known;
use super::seal::SealingKey;
use crate::objects::{ObjectName, Token};
use crate::pod::PodUid;
use crate::typed;

/// Of every file's content.
const VERSION: u32 = 1;

/// What is kept, as it is held: shared with those who use it.
#[derive(Clone, Debug, Default)]
pub(in crate::api) struct Kept {
    pub pods: BTreeMap<PodUid, KeptPod>,
    /// `None` of a name: there is no such object.
    pub objects: BTreeMap<ObjectName, Option<Held>>,
    pub services: Option<Known>,
    /// The node's object, but for its status.
    pub node: Option<Arc<Node>>,
    /// When the API server was last known to be there.
    pub contact: Option<Timestamp>,
}

/// What is kept of one pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub(in crate::api) struct KeptPod {
    pub pod: Arc<Pod>,
    /// The objects that it refers to.
    pub names: BTreeSet<ObjectName>,
    /// The volumes of its claims.
    pub volumes: BTreeMap<String, Arc<PersistentVolume>>,
    /// Its tokens, by audience and life; in a file of their own.
    pub tokens: BTreeMap<(String, i64), Arc<Token>>,
}

impl KeptPod {
    /// The same pod record, whatever its tokens are.
    pub fn is_same_record(&self, other: &KeptPod) -> bool {
        let same_pod = Arc::ptr_eq(&self.pod, &other.pod) || self.pod == other.pod;
        same_pod && self.names == other.names && self.volumes == other.volumes
    }
}

/// An object's name as files have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Named {
    kind: String,
    namespace: String,
    name: String,
}

/// The kinds that are kept.
const KINDS: [&str; 4] = ["ConfigMap", "Secret", "RuntimeClass", "CSIDriver"];

impl Named {
    fn of(name: &ObjectName) -> Named {
        Named { kind: name.kind.to_owned(), namespace: name.namespace.clone(), name: name.name.clone() }
    }

    fn name(self) -> Option<ObjectName> {
        let kind = KINDS.into_iter().find(|kind| *kind == self.kind)?;
        Some(ObjectName { kind, namespace: self.namespace, name: self.name })
    }
}

#[derive(Serialize, Deserialize)]
struct PodFile {
    version: u32,
    pod: Pod,
    names: Vec<Named>,
    volumes: BTreeMap<String, PersistentVolume>,
}

#[derive(Serialize, Deserialize)]
struct ObjectFile {
    version: u32,
    object: Named,
    /// In clear.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    content: Option<Value>,
    /// Sealed; with neither there is no such object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sealed: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct TokensFile {
    version: u32,
    uid: String,
    sealed: String,
}

#[derive(Serialize, Deserialize)]
struct SealedToken {
    audience: String,
    seconds: i64,
    token: String,
    expires: Timestamp,
}

/// Why a file is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unusable {
    /// Not one of ours, or damaged.
    Damaged,
    /// Of another version.
    Version,
    /// Sealed by another key, about something else, or changed since.
    Seal,
    /// Sealed, and there is no key.
    NoKey,
}

impl Unusable {
    pub fn text(self) -> &'static str {
        match self {
            Unusable::Damaged => "it is damaged, or has another's place",
            Unusable::Version => "it is of another version",
            Unusable::Seal => "its seal does not open: another key's, or it was changed",
            Unusable::NoKey => "it is sealed, and there is no sealing key",
        }
    }
}

type Bytes = Vec<u8>;

fn bytes(value: &Value) -> Bytes {
    value.to_string().into_bytes()
}

fn read<T: serde::de::DeserializeOwned>(content: &[u8]) -> Result<T, Unusable> {
    let value: Value = serde_json::from_slice(content).map_err(|_| Unusable::Damaged)?;
    match value.get("version").and_then(Value::as_u64) {
        Some(version) if version == u64::from(VERSION) => typed::read(&value).map_err(|_| Unusable::Damaged),
        Some(_) => Err(Unusable::Version),
        None => Err(Unusable::Damaged),
    }
}

/// What a seal is bound to: nothing sealed can take another's place.
fn about(name: &ObjectName) -> String {
    format!("berth api-pods {VERSION}\n{}\n{}\n{}", name.kind, name.namespace, name.name)
}

fn about_tokens(uid: &str) -> String {
    format!("berth api-pods {VERSION}\ntokens\n{uid}")
}

/// A pod's file.
pub(super) fn write_pod(kept: &KeptPod) -> Option<Bytes> {
    let file = PodFile {
        version: VERSION,
        pod: Pod::clone(&kept.pod),
        names: kept.names.iter().map(Named::of).collect(),
        volumes: kept.volumes.iter().map(|(claim, volume)| (claim.clone(), PersistentVolume::clone(volume))).collect(),
    };
    typed::to_bytes(&file).ok()
}

/// What a pod's file holds, which has to be that pod's.
pub(super) fn read_pod(uid: &PodUid, content: &[u8]) -> Result<KeptPod, Unusable> {
    let file: PodFile = read(content)?;
    let names: Option<BTreeSet<ObjectName>> = file.names.into_iter().map(Named::name).collect();
    if PodUid::of(&file.pod).as_ref() != Some(uid) || file.pod.spec.is_none() {
        return Err(Unusable::Damaged);
    }
    Ok(KeptPod {
        pod: Arc::new(file.pod),
        names: names.ok_or(Unusable::Damaged)?,
        volumes: file.volumes.into_iter().map(|(claim, volume)| (claim, Arc::new(volume))).collect(),
        tokens: BTreeMap::new(),
    })
}

/// Whether an object of this kind is on disk in its seal alone.
pub(super) fn is_secret(name: &ObjectName) -> bool {
    name.kind == "Secret"
}

/// An object's file. `None`: it is secret, and there is no key.
pub(super) fn write_object(key: Option<&SealingKey>, name: &ObjectName, held: Option<&Held>) -> Option<Bytes> {
    let mut file = ObjectFile { version: VERSION, object: Named::of(name), content: None, sealed: None };
    let value = match held {
        None => Value::Null,
        Some(Held::ConfigMap(object)) => serde_json::to_value(&**object).ok()?,
        Some(Held::Secret(object)) => serde_json::to_value(&**object).ok()?,
        Some(Held::RuntimeClass(object)) => serde_json::to_value(&**object).ok()?,
        Some(Held::CsiDriver(object)) => serde_json::to_value(&**object).ok()?,
    };
    // That there is no such Secret is sealed too: else whoever writes on the disk could take one away.
    match is_secret(name) {
        true => file.sealed = Some(key?.seal(&about(name), &bytes(&value))?),
        false => file.content = Some(value).filter(|value| !value.is_null()),
    }
    typed::to_bytes(&file).ok()
}

/// The object of a file.
pub(super) fn read_object(key: Option<&SealingKey>, content: &[u8]) -> Result<(ObjectName, Option<Held>), Unusable> {
    let file: ObjectFile = read(content)?;
    let name = file.object.name().ok_or(Unusable::Damaged)?;
    let value = match (is_secret(&name), file.sealed, file.content) {
        (true, Some(sealed), None) => {
            let clear = key.ok_or(Unusable::NoKey)?.open(&about(&name), &sealed).ok_or(Unusable::Seal)?;
            serde_json::from_slice(&clear).map_err(|_| Unusable::Damaged)?
        }
        (false, None, content) => content.unwrap_or(Value::Null),
        _ => return Err(Unusable::Damaged),
    };
    if value.is_null() {
        return Ok((name, None));
    }
    let damaged = |_| Unusable::Damaged;
    let held = match name.kind {
        "ConfigMap" => Held::ConfigMap(Arc::new(typed::read(&value).map_err(damaged)?)),
        "Secret" => Held::Secret(Arc::new(typed::read(&value).map_err(damaged)?)),
        "RuntimeClass" => Held::RuntimeClass(Arc::new(typed::read(&value).map_err(damaged)?)),
        _ => Held::CsiDriver(Arc::new(typed::read(&value).map_err(damaged)?)),
    };
    Ok((name, Some(held)))
}

/// The tokens of a pod, sealed.
pub(super) fn write_tokens(key: &SealingKey, uid: &PodUid, tokens: &BTreeMap<(String, i64), Arc<Token>>) -> Option<Bytes> {
    let all: Vec<SealedToken> = tokens
        .iter()
        .map(|((audience, seconds), token)| SealedToken {
            audience: audience.clone(),
            seconds: *seconds,
            token: token.text.clone(),
            expires: token.expires,
        })
        .collect();
    let sealed = key.seal(&about_tokens(uid.as_str()), &serde_json::to_vec(&all).ok()?)?;
    serde_json::to_vec(&TokensFile { version: VERSION, uid: uid.to_string(), sealed }).ok()
}

/// The tokens of a pod's file.
pub(super) fn read_tokens(
    key: Option<&SealingKey>,
    uid: &PodUid,
    content: &[u8],
) -> Result<BTreeMap<(String, i64), Arc<Token>>, Unusable> {
    let file: TokensFile = read(content)?;
    if file.uid != uid.as_str() {
        return Err(Unusable::Damaged);
    }
    let clear = key.ok_or(Unusable::NoKey)?.open(&about_tokens(uid.as_str()), &file.sealed).ok_or(Unusable::Seal)?;
    let all: Vec<SealedToken> = serde_json::from_slice(&clear).map_err(|_| Unusable::Damaged)?;
    Ok(all
        .into_iter()
        .map(|one| ((one.audience, one.seconds), Arc::new(Token { text: one.token, expires: one.expires })))
        .collect())
}

/// The services that pods see.
pub(super) fn write_services(known: &Known) -> Bytes {
    let all: Vec<_> = known.iter().map(|((namespace, name), one)| json!([namespace, name, one])).collect();
    bytes(&json!({"version": VERSION, "services": all}))
}

pub(super) fn read_services(content: &[u8]) -> Result<Known, Unusable> {
    #[derive(Deserialize)]
    struct File {
        services: Vec<(String, String, super::super::services::Reachable)>,
    }
    let file: File = read(content)?;
    Ok(file.services.into_iter().map(|(namespace, name, one)| ((namespace, name), one)).collect())
}

/// What of the node's object pods go by: labels, taints and the pods' addresses.
pub(super) fn trim_node(node: &Node) -> Node {
    let mut kept = Node::default();
    kept.metadata.name.clone_from(&node.metadata.name);
    kept.metadata.labels.clone_from(&node.metadata.labels);
    if let Some(spec) = &node.spec {
        let kept = kept.spec.get_or_insert_default();
        kept.taints.clone_from(&spec.taints);
        kept.pod_cidr.clone_from(&spec.pod_cidr);
        kept.pod_cidrs.clone_from(&spec.pod_cidrs);
    }
    kept
}

pub(super) fn write_node(node: &Node) -> Option<Bytes> {
    Some(bytes(&json!({"version": VERSION, "node": serde_json::to_value(node).ok()?})))
}

pub(super) fn read_node(content: &[u8]) -> Result<Node, Unusable> {
    #[derive(Deserialize)]
    struct File {
        node: Node,
    }
    Ok(read::<File>(content)?.node)
}

pub(super) fn write_contact(at: Timestamp) -> Bytes {
    bytes(&json!({"version": VERSION, "at": at.to_string()}))
}

pub(super) fn read_contact(content: &[u8]) -> Result<Timestamp, Unusable> {
    #[derive(Deserialize)]
    struct File {
        at: Timestamp,
    }
    Ok(read::<File>(content)?.at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> SealingKey {
        SealingKey::parse(&[byte; 32]).unwrap()
    }

    fn name(kind: &'static str, name: &str) -> ObjectName {
        ObjectName { kind, namespace: "ns".to_owned(), name: name.to_owned() }
    }

    fn secret(value: &str) -> Held {
        let object = json!({"metadata": {"name": "s", "namespace": "ns"}, "stringData": {"a": value}});
        Held::Secret(Arc::new(serde_json::from_value(object).unwrap()))
    }

    #[test]
    fn a_secret_is_read_back_by_its_key_and_name_alone() {
        let (secret, s) = (secret("hunter2"), name("Secret", "s"));
        let file = write_object(Some(&key(1)), &s, Some(&secret)).unwrap();
        assert!(!String::from_utf8_lossy(&file).contains("hunter2"));
        assert_eq!(read_object(Some(&key(1)), &file), Ok((s.clone(), Some(secret.clone()))));
        assert_eq!(read_object(Some(&key(2)), &file), Err(Unusable::Seal));
        assert_eq!(read_object(None, &file), Err(Unusable::NoKey));
        let renamed = String::from_utf8(file).unwrap().replace("\"name\":\"s\"", "\"name\":\"t\"");
        assert_eq!(read_object(Some(&key(1)), renamed.as_bytes()), Err(Unusable::Seal), "another Secret's record");
        assert_eq!(write_object(None, &s, Some(&secret)), None, "without a key it is not written");
        let absent = write_object(Some(&key(1)), &s, None).unwrap();
        assert_eq!(read_object(Some(&key(1)), &absent), Ok((s, None)));
    }

    #[test]
    fn a_secret_in_clear_is_not_believed() {
        let clear = json!({"version": 1, "object": {"kind": "Secret", "namespace": "ns", "name": "s"}, "content": {"data": {}}});
        assert_eq!(read_object(Some(&key(1)), &bytes(&clear)), Err(Unusable::Damaged));
        let absent = json!({"version": 1, "object": {"kind": "Secret", "namespace": "ns", "name": "s"}});
        assert_eq!(read_object(Some(&key(1)), &bytes(&absent)), Err(Unusable::Damaged));
    }

    #[test]
    fn other_objects_are_in_clear() {
        let map = json!({"metadata": {"name": "m", "namespace": "ns"}, "data": {"a": "b"}});
        let map = Held::ConfigMap(Arc::new(serde_json::from_value(map).unwrap()));
        for held in [Some(map), None] {
            let file = write_object(None, &name("ConfigMap", "m"), held.as_ref()).unwrap();
            assert_eq!(read_object(None, &file), Ok((name("ConfigMap", "m"), held)));
        }
    }

    #[test]
    fn tokens_are_the_pods_own() {
        let (a, b) = (PodUid::new("a").unwrap(), PodUid::new("b").unwrap());
        let token = Arc::new(Token { text: "eyJhbGci".to_owned(), expires: Timestamp::from_second(1000).unwrap() });
        let tokens: BTreeMap<_, _> = [((String::new(), 3607), token)].into();
        let file = write_tokens(&key(1), &a, &tokens).unwrap();
        assert!(!String::from_utf8_lossy(&file).contains("eyJhbGci"));
        assert!(read_tokens(Some(&key(1)), &a, &file).unwrap() == tokens);
        assert_eq!(read_tokens(Some(&key(1)), &b, &file).err(), Some(Unusable::Damaged));
        let moved = String::from_utf8(file.clone()).unwrap().replace("\"uid\":\"a\"", "\"uid\":\"b\"");
        assert_eq!(read_tokens(Some(&key(1)), &b, moved.as_bytes()).err(), Some(Unusable::Seal));
        assert_eq!(read_tokens(None, &a, &file).err(), Some(Unusable::NoKey));
    }

    #[test]
    fn a_pod_is_read_back_under_its_own_uid() {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "a", "uid": "u1", "deletionTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"containers": [{"name": "c", "image": "i"}]}}))
            .unwrap();
        let volume: PersistentVolume = serde_json::from_value(json!({"metadata": {"name": "pv"}})).unwrap();
        let kept = KeptPod {
            pod: Arc::new(pod),
            names: [name("Secret", "s"), name("ConfigMap", "m")].into(),
            volumes: [("data".to_owned(), Arc::new(volume))].into(),
            tokens: BTreeMap::new(),
        };
        let file = write_pod(&kept).unwrap();
        assert!(read_pod(&PodUid::new("u1").unwrap(), &file).unwrap() == kept);
        for (uid, content) in [("u2", &file[..]), ("u1", &file[..file.len() / 2]), ("u1", b""), ("u1", b"[]")] {
            assert_eq!(read_pod(&PodUid::new(uid).unwrap(), content).err(), Some(Unusable::Damaged));
        }
        let newer = String::from_utf8(file).unwrap().replacen("\"version\":1", "\"version\":2", 1);
        assert_eq!(read_pod(&PodUid::new("u1").unwrap(), newer.as_bytes()).err(), Some(Unusable::Version));
    }

    #[test]
    fn services_node_and_contact_are_read_back() {
        let text = json!({"version": 1, "services": [["ns", "web", {"address": "10.0.0.1", "ports": [{"name": "", "number": 80, "protocol": "TCP"}]}]]});
        let known = read_services(&bytes(&text)).unwrap();
        assert_eq!(write_services(&known), bytes(&text));
        let node: Node = serde_json::from_value(json!({"metadata": {"name": "n", "labels": {"a": "b"}, "resourceVersion": "7"},
            "spec": {"podCIDRs": ["10.244.1.0/24"], "providerID": "x"}, "status": {"phase": "y"}}))
        .unwrap();
        let trimmed = trim_node(&node);
        assert_eq!((trimmed.status.as_ref(), trimmed.metadata.resource_version.as_ref()), (None, None));
        assert_eq!(read_node(&write_node(&trimmed).unwrap()), Ok(trimmed));
        let at = Timestamp::from_second(1_800_000_000).unwrap();
        assert_eq!(read_contact(&write_contact(at)), Ok(at));
    }
}
