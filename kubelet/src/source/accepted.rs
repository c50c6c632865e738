//! The accepted pods of each manifest file, on disk: a file that is broken when the kubelet starts still stands for the
//! pods it stood for, and UIDs outlive changes of the way they are computed. One small file per manifest.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::static_pod::{AcceptedFile, StaticPod, digest};
use crate::atomic_file;
use crate::error::Error;
use crate::objects::Object;
use crate::typed;

const VERSION: u32 = 1;

/// Which file has what several hold; not there while nothing is held twice.
const OWNERS: &str = "owners";

/// The folder of records.
#[derive(Clone, Debug)]
pub struct AcceptedStore {
    folder: PathBuf,
}

impl AcceptedStore {
    /// The store below the kubelet's folder.
    pub fn below(kubelet_root: &Path) -> AcceptedStore {
        AcceptedStore { folder: kubelet_root.join("static-pods") }
    }

    /// All readable records; an unreadable one is reported and left alone.
    pub fn load(&self) -> Vec<AcceptedFile> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            match fs::read(&path).map(|bytes| typed::from_bytes::<AcceptedFile>(&bytes)) {
                Ok(Ok(record)) if record.version == VERSION => records.push(record),
                Ok(Ok(record)) => {
                    tracing::warn!(path = %path.display(), version = record.version, "record of another version");
                }
                Ok(Err(error)) => tracing::warn!(path = %path.display(), %error, "unreadable record"),
                Err(error) => tracing::warn!(path = %path.display(), %error, "unreadable record"),
            }
        }
        records.sort_by(|a, b| a.path.cmp(&b.path));
        records
    }

    /// Records what `path` stands for now.
    pub fn save(&self, path: &Path, pods: &[StaticPod], objects: &[Object]) -> Result<(), Error> {
        fs::create_dir_all(&self.folder).map_err(|source| Error::CreateDir { path: self.folder.clone(), source })?;
        let record = AcceptedFile { version: VERSION, path: path.to_owned(), pods: pods.to_vec(), objects: objects.to_vec() };
        let file = self.file_of(path);
        let text = typed::to_bytes(&record).unwrap_or_default();
        atomic_file::replace(&file, &text, 0o600).map_err(|source| Error::WriteFile { path: file, source })
    }

    /// Forgets `path`.
    pub fn remove(&self, path: &Path) -> Result<(), Error> {
        let file = self.file_of(path);
        match fs::remove_file(&file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::Remove { path: file, source: e }),
            _ => Ok(()),
        }
    }

    /// Which file has what several hold; nothing where no record is.
    pub fn load_owners(&self) -> BTreeMap<String, PathBuf> {
        let path = self.folder.join(OWNERS);
        let read = match fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return BTreeMap::new(),
            read => read.map_err(|e| e.to_string()),
        };
        let owners = read.and_then(|bytes| typed::from_bytes(&bytes).map_err(|e| e.to_string()));
        owners.unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), error, "unreadable record");
            BTreeMap::new()
        })
    }

    /// Records which file has what several hold.
    pub fn save_owners(&self, owners: &BTreeMap<String, PathBuf>) -> Result<(), Error> {
        let path = self.folder.join(OWNERS);
        if owners.is_empty() {
            return match fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::Remove { path, source: e }),
                _ => Ok(()),
            };
        }
        fs::create_dir_all(&self.folder).map_err(|source| Error::CreateDir { path: self.folder.clone(), source })?;
        let text = typed::to_bytes(owners).unwrap_or_default();
        atomic_file::replace(&path, &text, 0o600).map_err(|source| Error::WriteFile { path, source })
    }

    fn file_of(&self, path: &Path) -> PathBuf {
        self.folder.join(format!("{}.json", digest(&[&path.to_string_lossy()])))
    }
}
