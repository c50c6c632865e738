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

#[derive(Debug)]
struct State {
    /// Where they are kept; `None`: nowhere.
    file: Option<PathBuf>,
    /// What is on record, or why that is not known: then nothing is bound, and nothing written over it.
    bound: Result<Bound, String>,
}

impl Default for State {
    fn default() -> State {
        State { file: None, bound: Ok(Bound::new()) }
    }
}

/// The bindings of this node. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Bindings(Arc<Mutex<State>>);

impl Bindings {
    /// Those that are on record below the kubelet's folder.
    pub fn load(kubelet_root: &Path) -> Bindings {
        let file = kubelet_root.join("volume-bindings.json");
        let bound = read(&file);
        if let Err(problem) = &bound {
            tracing::error!("{problem}: claims get no volumes");
        }
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
        let known = state.known().map_err(&failed)?;
        if let Some(volume) = known.iter().find(|(_, holder)| **holder == who).map(|(volume, _)| volume.clone()) {
            // Another volume would be an empty one: the claim's data is in this one.
            return objects
                .persistent_volume(&volume)
                .ok_or_else(|| failed(format!("PVC is lost: PersistentVolume {volume:?} not found")));
        }
        // A volume is free again when its document has gone, and that of its claim too.
        let mut bound = known.clone();
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
        state.bound = Ok(bound);
        Ok(volume)
    }
}

/// What is on record. Without a file nothing is; what cannot be read, or is a newer version's, is somebody's claim all the same.
fn read(file: &Path) -> Result<Bound, String> {
    let failed = |why: String| format!("the bindings in {} cannot be read: {why}", file.display());
    let bytes = match std::fs::read(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Bound::new()),
        read => read.map_err(|error| failed(error.to_string()))?,
    };
    let record: Record = serde_json::from_slice(&bytes).map_err(|error| failed(error.to_string()))?;
    match record.version {
        VERSION => Ok(record.bound),
        other => Err(failed(format!("they are of version {other}"))),
    }
}

impl State {
    /// What is on record; read again where that failed before.
    fn known(&mut self) -> Result<&Bound, String> {
        if let (Err(_), Some(file)) = (&self.bound, &self.file) {
            self.bound = read(file);
        }
        self.bound.as_ref().map_err(Clone::clone)
    }

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

    #[test]
    fn bindings_that_cannot_be_read_bind_nothing_and_are_not_written_over() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("volume-bindings.json");
        let held = objects(&[("large", "9Gi"), ("small", "1Gi")], &["a", "b"]);
        bind(&Bindings::load(root.path()), "a", &held).unwrap();
        let good = std::fs::read(&file).unwrap();
        let newer = String::from_utf8(good.clone()).unwrap().replace("\"version\":1", "\"version\":2");
        for bad in ["{half", &newer] {
            std::fs::write(&file, bad).unwrap();
            let bindings = Bindings::load(root.path());
            let error = bind(&bindings, "b", &held).unwrap_err();
            assert!(error.contains("volume-bindings.json cannot be read: "), "{error}");
            assert_eq!(std::fs::read_to_string(&file).unwrap(), bad);
            // What was only out of reach for a while is there again.
            std::fs::write(&file, &good).unwrap();
            assert_eq!(bind(&bindings, "a", &held).unwrap(), "small");
        }
    }
}
