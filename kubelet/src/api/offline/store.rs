//! The records of the API's pods below the kubelet's folder, `api-pods/`: reads them all, writes what has changed, removes what nobody
//! has any more. What is to be written is a pure comparison; the form of a file is the record's business.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use sha2::{Digest, Sha256};

use super::super::follow::Held;
use super::super::services::Known;
use super::record::{self, Kept, KeptPod, Unusable};
use super::seal::SealingKey;
use crate::atomic_file;
use crate::objects::{ObjectName, Token};
use crate::pod::PodUid;
use crate::{Error, Result};

/// The folder below the kubelet's.
const FOLDER: &str = "api-pods";
const PODS: &str = "pods";
const TOKENS: &str = "tokens";
const OBJECTS: &str = "objects";
const SERVICES: &str = "services.json";
const NODE: &str = "node.json";
const CONTACT: &str = "contact.json";

type Tokens = BTreeMap<(String, i64), Arc<Token>>;

/// A change of what is on disk.
#[derive(Debug)]
pub(super) enum Write {
    Object(ObjectName, Option<Held>),
    Tokens(PodUid, Tokens),
    Pod(PodUid, Box<KeptPod>),
    Services(Known),
    Node(Arc<Node>),
    Contact(Timestamp),
    RemovePod(PodUid),
    RemoveTokens(PodUid),
    RemoveObject(ObjectName),
}

/// A token is written when it is so much newer than the one on disk: those that live for minutes would wear flash, and a pod that starts
/// without the API server shows old ones too.
const TOKEN_STEP: SignedDuration = SignedDuration::from_hours(1);

fn are_newer(tokens: &Tokens, on_disk: &Tokens) -> bool {
    let is_newer = |(which, token): (&(String, i64), &Arc<Token>)| {
        on_disk.get(which).is_none_or(|old| token.expires.duration_since(old.expires) >= TOKEN_STEP)
    };
    tokens.iter().any(is_newer) || on_disk.keys().any(|which| !tokens.contains_key(which))
}

/// What makes `before` what is `wanted`: nothing is named before it is there, nothing goes before what names it. The contact is written
/// along with something else only. Without a key nothing that is secret is written.
pub(super) fn plan_writes(before: &Kept, wanted: &Kept, has_key: bool) -> Vec<Write> {
    let mut writes = Vec::new();
    for (name, held) in &wanted.objects {
        if before.objects.get(name) != Some(held) && (has_key || !record::is_secret(name)) {
            writes.push(Write::Object(name.clone(), held.clone()));
        }
    }
    for (uid, pod) in &wanted.pods {
        let known = before.pods.get(uid);
        if has_key && !pod.tokens.is_empty() && known.is_none_or(|known| are_newer(&pod.tokens, &known.tokens)) {
            writes.push(Write::Tokens(uid.clone(), pod.tokens.clone()));
        }
        if known.is_none_or(|known| !known.is_same_record(pod)) {
            writes.push(Write::Pod(uid.clone(), Box::new(pod.clone())));
        }
    }
    if let Some(services) = wanted.services.as_ref().filter(|services| before.services.as_ref() != Some(services)) {
        writes.push(Write::Services(services.clone()));
    }
    if let Some(node) = wanted.node.as_ref().filter(|node| before.node.as_ref() != Some(node)) {
        writes.push(Write::Node(node.clone()));
    }
    for (uid, known) in &before.pods {
        let pod = wanted.pods.get(uid);
        if pod.is_none() {
            writes.push(Write::RemovePod(uid.clone()));
        }
        if !known.tokens.is_empty() && pod.is_none_or(|pod| pod.tokens.is_empty()) {
            writes.push(Write::RemoveTokens(uid.clone()));
        }
    }
    let gone = before.objects.keys().filter(|name| !wanted.objects.contains_key(name));
    writes.extend(gone.map(|name| Write::RemoveObject(name.clone())));
    if let Some(contact) = wanted.contact.filter(|_| !writes.is_empty()) {
        writes.push(Write::Contact(contact));
    }
    writes
}

/// What was read, and what could not be.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    pub kept: Kept,
    /// By pod and by object, why it cannot be used.
    pub unusable_tokens: BTreeMap<PodUid, Unusable>,
    pub unusable_objects: BTreeMap<ObjectName, Unusable>,
}

/// The records on disk.
#[derive(Clone, Debug)]
pub(super) struct Store {
    folder: PathBuf,
    key: Option<SealingKey>,
}

impl Store {
    pub fn below(kubelet_root: &Path, key: Option<SealingKey>) -> Store {
        Store { folder: kubelet_root.join(FOLDER), key }
    }

    pub fn has_key(&self) -> bool {
        self.key.is_some()
    }

    fn pod_file(&self, uid: &PodUid) -> PathBuf {
        self.folder.join(PODS).join(format!("{uid}.json"))
    }

    fn tokens_file(&self, uid: &PodUid) -> PathBuf {
        self.folder.join(TOKENS).join(format!("{uid}.json"))
    }

    fn object_file(&self, name: &ObjectName) -> PathBuf {
        let hash = Sha256::digest(name.to_string().as_bytes());
        let hex = hash.iter().take(16).fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
        self.folder.join(OBJECTS).join(format!("{hex}.json"))
    }

    /// All that can be used; what cannot is told, by name, and left alone. Blocking.
    pub fn load(&self) -> Loaded {
        let mut loaded = Loaded::default();
        for (path, content) in files(&self.folder.join(PODS)) {
            let Some(uid) = uid_of(&path) else { continue };
            match record::read_pod(&uid, &content) {
                Ok(pod) => _ = loaded.kept.pods.insert(uid, pod),
                Err(why) => {
                    tracing::error!(path = %path.display(), why = why.text(), "the record of a pod cannot be used: it does not start without the API server")
                }
            }
        }
        for (uid, pod) in &mut loaded.kept.pods {
            let path = self.tokens_file(uid);
            let Some(content) = read(&path) else { continue };
            match record::read_tokens(self.key.as_ref(), uid, &content) {
                Ok(tokens) => pod.tokens = tokens,
                Err(why) => {
                    tracing::warn!(path = %path.display(), why = why.text(), "the record of a pod's tokens cannot be used");
                    loaded.unusable_tokens.insert(uid.clone(), why);
                }
            }
        }
        let names: BTreeSet<ObjectName> = loaded.kept.pods.values().flat_map(|pod| pod.names.iter().cloned()).collect();
        for name in names {
            let path = self.object_file(&name);
            let Some(content) = read(&path) else { continue };
            let found = record::read_object(self.key.as_ref(), &content);
            match found.and_then(|(found, held)| if found == name { Ok(held) } else { Err(Unusable::Damaged) }) {
                Ok(held) => _ = loaded.kept.objects.insert(name, held),
                Err(why) => {
                    tracing::warn!(object = %name, path = %path.display(), why = why.text(), "the record of an object cannot be used");
                    loaded.unusable_objects.insert(name, why);
                }
            }
        }
        loaded.kept.services = self.read_one(SERVICES, record::read_services);
        loaded.kept.node = self.read_one(NODE, record::read_node).map(Arc::new);
        loaded.kept.contact = self.read_one(CONTACT, record::read_contact);
        loaded
    }

    /// A record that there is one of.
    fn read_one<T>(&self, file: &str, of: impl FnOnce(&[u8]) -> Result<T, Unusable>) -> Option<T> {
        let path = self.folder.join(file);
        let found = of(&read(&path)?);
        found.inspect_err(|why| tracing::warn!(path = %path.display(), why = why.text(), "a record cannot be used")).ok()
    }

    /// Makes one change. Blocking.
    pub fn write(&self, write: &Write) -> Result<()> {
        match write {
            Write::Object(name, held) => {
                self.put(self.object_file(name), record::write_object(self.key.as_ref(), name, held.as_ref()))
            }
            Write::Tokens(uid, tokens) => {
                let content = self.key.as_ref().and_then(|key| record::write_tokens(key, uid, tokens));
                self.put(self.tokens_file(uid), content)
            }
            Write::Pod(uid, pod) => self.put(self.pod_file(uid), record::write_pod(pod)),
            Write::Services(known) => self.put(self.folder.join(SERVICES), Some(record::write_services(known))),
            Write::Node(node) => self.put(self.folder.join(NODE), record::write_node(node)),
            Write::Contact(at) => self.put(self.folder.join(CONTACT), Some(record::write_contact(*at))),
            Write::RemovePod(uid) => remove(self.pod_file(uid)),
            Write::RemoveTokens(uid) => remove(self.tokens_file(uid)),
            Write::RemoveObject(name) => remove(self.object_file(name)),
        }
    }

    fn put(&self, path: PathBuf, content: Option<Vec<u8>>) -> Result<()> {
        let failed = |path: &Path, source: io::Error| Error::WriteFile { path: path.to_owned(), source };
        let content = content.ok_or_else(|| failed(&path, io::ErrorKind::InvalidData.into()))?;
        let folder = path.parent().unwrap_or(&self.folder);
        crate::volume::create_private_dir(&self.folder)
            .and_then(|()| crate::volume::create_private_dir(folder))
            .map_err(|source| Error::CreateDir { path: folder.to_owned(), source })?;
        atomic_file::replace(&path, &content, 0o600).map_err(|source| failed(&path, source))
    }

    /// Removes all of it. Blocking.
    pub fn remove(&self) -> Result<()> {
        match fs::remove_dir_all(&self.folder) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Remove { path: self.folder.clone(), source }),
            _ => Ok(()),
        }
    }

    /// Removes the files that nothing of what is kept has: of a pod that could not be read, sealed by another key. Without a key what is
    /// sealed stays as long as its pod does: a key that was not found at one start may be there at the next. Blocking.
    pub fn sweep(&self, kept: &Kept) {
        let mut known: BTreeSet<PathBuf> = kept.objects.keys().map(|name| self.object_file(name)).collect();
        known.extend(kept.pods.keys().map(|uid| self.pod_file(uid)));
        known.extend(kept.pods.iter().filter(|(_, pod)| !pod.tokens.is_empty()).map(|(uid, _)| self.tokens_file(uid)));
        if !self.has_key() {
            known.extend(kept.pods.keys().map(|uid| self.tokens_file(uid)));
            let names = kept.pods.values().flat_map(|pod| &pod.names);
            known.extend(names.filter(|name| record::is_secret(name)).map(|name| self.object_file(name)));
        }
        for folder in [PODS, TOKENS, OBJECTS] {
            for entry in fs::read_dir(self.folder.join(folder)).into_iter().flatten().flatten() {
                let path = entry.path();
                if !known.contains(&path)
                    && let Err(error) = fs::remove_file(&path)
                {
                    tracing::warn!(path = %path.display(), %error, "a record that nobody has stays");
                }
            }
        }
    }
}

/// Takes down in what is on disk that a change was made.
pub(super) fn apply(kept: &mut Kept, write: Write) {
    match write {
        Write::Object(name, held) => _ = kept.objects.insert(name, held),
        Write::Tokens(uid, tokens) => kept.pods.entry(uid).or_default().tokens = tokens,
        Write::Pod(uid, pod) => {
            let tokens = kept.pods.remove(&uid).map(|before| before.tokens).unwrap_or_default();
            kept.pods.insert(uid, KeptPod { tokens, ..*pod });
        }
        Write::Services(known) => kept.services = Some(known),
        Write::Node(node) => kept.node = Some(node),
        Write::Contact(at) => kept.contact = Some(at),
        Write::RemovePod(uid) => {
            // Its tokens' file goes by its own change, which is planned with this one.
            kept.pods.remove(&uid);
        }
        Write::RemoveTokens(uid) => {
            if let Some(pod) = kept.pods.get_mut(&uid) {
                pod.tokens.clear();
            }
        }
        Write::RemoveObject(name) => _ = kept.objects.remove(&name),
    }
}

fn remove(path: PathBuf) -> Result<()> {
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Remove { path, source }),
        _ => Ok(()),
    }
}

fn uid_of(path: &Path) -> Option<PodUid> {
    PodUid::new(path.file_name()?.to_str()?.strip_suffix(".json")?)
}

/// A file's content; one that is there and cannot be read is as good as damaged.
fn read(path: &Path) -> Option<Vec<u8>> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        read => Some(read.unwrap_or_default()),
    }
}

fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter_map(|path| read(&path).map(|content| (path, content))).collect()
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
