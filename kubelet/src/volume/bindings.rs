//! Which claim has which PersistentVolume, kept on disk: a claim keeps its volume whatever other volumes come, and what one claim
//! wrote is never given to another. Owns `volume-bindings.json` below the kubelet's folder.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::core::v1::PersistentVolume;
use serde::{Deserialize, Serialize};

use super::claim::{self, Bound, Choice, ClaimName};
use crate::atomic_file;
use crate::objects::Objects;

const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    bound: Bound,
}

#[derive(Debug, Default)]
struct State {
    /// Where they are kept; `None`: nowhere.
    file: Option<PathBuf>,
    bound: Bound,
}

/// The bindings of this node. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Bindings(Arc<Mutex<State>>);

impl Bindings {
    /// Those that are on record below the kubelet's folder.
    pub fn load(kubelet_root: &Path) -> Bindings {
        let file = kubelet_root.join("volume-bindings.json");
        let read = std::fs::read(&file).and_then(|bytes| Ok(serde_json::from_slice::<Record>(&bytes)?));
        let bound = match read {
            Ok(record) if record.version == VERSION => record.bound,
            Ok(record) => {
                tracing::warn!(path = %file.display(), version = record.version, "bindings of another version are not read");
                Bound::new()
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Bound::new(),
            Err(error) => {
                tracing::warn!(path = %file.display(), %error, "the bindings of claims are lost");
                Bound::new()
            }
        };
        Bindings(Arc::new(Mutex::new(State { file: Some(file), bound })))
    }

    /// The volume of a claim, bound now where it was not. The error is the kubelet's message. Blocking.
    pub fn volume_of(
        &self,
        namespace: &str,
        name: &str,
        objects: &dyn Objects,
        node: &str,
    ) -> Result<Arc<PersistentVolume>, String> {
        let failed = |why: String| format!("error processing PVC {namespace}/{name}: {why}");
        let Some(wanted) = objects.claim(namespace, name) else {
            return Err(failed(format!("failed to fetch PVC: persistentvolumeclaims {name:?} not found")));
        };
        let who = ClaimName { namespace: namespace.to_owned(), name: name.to_owned() };
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(volume) = state.bound.iter().find(|(_, holder)| **holder == who).map(|(volume, _)| volume.clone()) {
            // Another volume would be an empty one: the claim's data is in this one.
            return objects
                .persistent_volume(&volume)
                .ok_or_else(|| failed(format!("PVC is lost: PersistentVolume {volume:?} not found")));
        }
        // A volume is free again when its document has gone, and that of its claim too.
        let mut bound = state.bound.clone();
        bound.retain(|volume, holder| {
            objects.persistent_volume(volume).is_some() || objects.claim(&holder.namespace, &holder.name).is_some()
        });
        let class = objects.default_storage_class();
        let labels = claim::node_labels(node);
        let volumes = objects.persistent_volumes();
        let choice = Choice { volumes: &volumes, bound: &bound, default_class: class.as_deref(), labels: &labels, node };
        let volume = claim::choose(&wanted, &who, &choice).map_err(|why| failed(format!("PVC is not bound: {why}")))?;
        let volume_name = volume.metadata.name.clone().unwrap_or_default();
        bound.insert(volume_name.clone(), who);
        state.save(&bound).map_err(|e| failed(format!("the binding cannot be recorded: {e}")))?;
        tracing::info!(claim = format!("{namespace}/{name}"), volume = volume_name, "claim is bound");
        state.bound = bound;
        Ok(volume)
    }
}

impl State {
    fn save(&self, bound: &Bound) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let record = Record { version: VERSION, bound: bound.clone() };
        atomic_file::replace(file, &serde_json::to_vec(&record)?, 0o600)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::LocalObjects;
    use crate::source::parse::parse_manifest;

    fn objects(volumes: &[(&str, &str)], claims: &[&str]) -> LocalObjects {
        let volume = |(name, size): &(&str, &str)| {
            format!(
                "apiVersion: v1\nkind: PersistentVolume\nmetadata: {{name: {name}}}\nspec: {{capacity: {{storage: {size}}}, \
                 accessModes: [ReadWriteOnce], hostPath: {{path: /x}}}}\n---\n"
            )
        };
        let claim = |name: &&str| {
            format!(
                "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {{name: {name}}}\nspec: {{accessModes: [ReadWriteOnce], \
                 resources: {{requests: {{storage: 1Gi}}}}}}\n---\n"
            )
        };
        let text: String = volumes.iter().map(volume).chain(claims.iter().map(claim)).collect();
        let held = LocalObjects::default();
        if !text.is_empty() {
            held.replace(parse_manifest(&text).unwrap().objects);
        }
        held
    }

    fn bind(bindings: &Bindings, claim: &str, objects: &LocalObjects) -> Result<String, String> {
        bindings.volume_of("default", claim, objects, "n1").map(|v| v.metadata.name.clone().unwrap())
    }

    #[test]
    fn a_claim_keeps_its_volume_over_restarts_and_whatever_fits_better() {
        let root = tempfile::tempdir().unwrap();
        let first = Bindings::load(root.path());
        assert_eq!(bind(&first, "a", &objects(&[("large", "9Gi")], &["a"])).unwrap(), "large");
        let again = Bindings::load(root.path());
        let more = objects(&[("large", "9Gi"), ("small", "1Gi")], &["a", "b", "c"]);
        assert_eq!(bind(&again, "a", &more).unwrap(), "large");
        assert_eq!(bind(&again, "b", &more).unwrap(), "small");
        let error = bind(&again, "c", &more).unwrap_err();
        assert!(
            error.starts_with("error processing PVC default/c: PVC is not bound: no persistent volumes available"),
            "{error}"
        );
        // What a claim that has gone wrote is nobody else's.
        assert!(bind(&again, "c", &objects(&[("large", "9Gi"), ("small", "1Gi")], &["c"])).is_err());
        let lost = bind(&again, "a", &objects(&[("small", "1Gi")], &["a"])).unwrap_err();
        assert_eq!(lost, "error processing PVC default/a: PVC is lost: PersistentVolume \"large\" not found");
        assert!(bind(&again, "d", &more).unwrap_err().ends_with("persistentvolumeclaims \"d\" not found"));
    }
}
