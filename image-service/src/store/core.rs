//! The store's content and records under their locks: what exists, who uses it, how it becomes durable and how it goes.
//!
//! Everything here blocks on the disk at most as long as a sync takes; async callers come through blocking threads.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::disk::{self, Layout, StagingDir};
use super::pool::{Pin, Pool};
use super::reaper::{self, Signal};
use super::record::{LayerRecord, VERSION};
use super::state::{Content, State};
use crate::digest::Digest;
use crate::error::Error;
use crate::image::{ImageConfig, ImageId};
use crate::unpack::{Applied, Merged, complete};

/// A finished layer.
pub(crate) struct Layer {
    pub record: LayerRecord,
    durable: AtomicBool,
}

/// A blob: an index, a manifest or a configuration.
pub(crate) struct Blob {
    pub size: u64,
    durable: AtomicBool,
}

impl Layer {
    pub(crate) fn stored(record: LayerRecord) -> Self {
        Layer { record, durable: AtomicBool::new(true) }
    }
}

impl Blob {
    pub(crate) fn stored(size: u64) -> Self {
        Blob { size, durable: AtomicBool::new(true) }
    }
}

pub(crate) type LayerPin = Pin<String, Layer>;
pub(crate) type BlobPin = Pin<Digest, Blob>;

/// An unpacked and verified layer that is not in the store yet.
pub(crate) struct Staged {
    pub dir: StagingDir,
    pub applied: Applied,
    pub diff_id: Digest,
}

/// An image whose content is complete.
pub(crate) struct NewImage {
    pub id: ImageId,
    pub config: ImageConfig,
    pub size: u64,
    pub layers: Vec<LayerPin>,
    pub blobs: Vec<BlobPin>,
    pub manifest: Option<Digest>,
    pub tags: Vec<String>,
    pub digests: Vec<String>,
}

/// The store below its async face.
pub(crate) struct Core {
    pub layout: Layout,
    pub layers: Arc<Pool<String, Layer>>,
    pub blobs: Arc<Pool<Digest, Blob>>,
    pub signal: Arc<Signal>,
    pub state: Mutex<State>,
    /// Held while records change on disk; taken before `state`.
    commit: Mutex<()>,
    /// Records were deleted and the folder not synced since.
    unsynced: AtomicBool,
    /// Held as long as the store is open.
    _lock: File,
}

impl Core {
    pub(crate) fn new(layout: Layout, lock: File) -> Self {
        let signal = Signal::new();
        Core {
            layout,
            layers: Pool::new(signal.clone()),
            blobs: Pool::new(signal.clone()),
            signal,
            state: Mutex::default(),
            commit: Mutex::default(),
            unsynced: AtomicBool::new(false),
            _lock: lock,
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn commit_lock(&self) -> MutexGuard<'_, ()> {
        self.commit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A layer that is there already: by itself, or for these parents.
    pub(crate) fn find_layer(&self, diff_id: &Digest, chain_id: &Digest) -> Option<LayerPin> {
        self.layers.pin(&diff_id.hex()).or_else(|| self.layers.pin(&chain_key(chain_id)))
    }

    pub(crate) fn stage(&self) -> Result<StagingDir, Error> {
        StagingDir::new(&self.layout, &self.signal)
    }

    /// Puts a self-contained layer in its place.
    pub(crate) fn place_layer(&self, staged: Staged) -> Result<LayerPin, Error> {
        let key = staged.diff_id.hex();
        self.place_as(key, staged)
    }

    /// Completes a layer that depends on `parents` (the bottom one first) and puts it in its place.
    pub(crate) fn place_over(&self, mut staged: Staged, parents: &[LayerPin], chain_id: &Digest) -> Result<LayerPin, Error> {
        let mut folders = Vec::new();
        for parent in parents.iter().rev() {
            folders.push(disk::open_dir(&self.layout.layer(&parent.key).join("fs"))?);
            if parent.value.record.root_opaque {
                break;
            }
        }
        if staged.applied.root_opaque {
            folders.clear();
        }
        complete(&mut staged.applied, &Merged::new(folders))?;
        self.place_as(chain_key(chain_id), staged)
    }

    fn place_as(&self, key: String, staged: Staged) -> Result<LayerPin, Error> {
        let Staged { dir, applied, diff_id } = staged;
        self.layers.place(key.clone(), |others| {
            let taken: Vec<&str> = others.map(|layer| layer.record.link.as_str()).collect();
            let record = LayerRecord {
                version: VERSION,
                link: link_name(&key, &taken),
                key: key.clone(),
                diff_id,
                bytes: applied.bytes,
                inodes: applied.inodes,
                root_opaque: applied.root_opaque,
                root: applied.root_meta,
            };
            let path = dir.path().join("layer.json");
            let text = to_json(&path, &record)?;
            fs::write(&path, text).map_err(|source| Error::file("write", &path, source))?;
            let target = self.layout.layer(&key);
            if fs::symlink_metadata(&target).is_ok() {
                // Left by a store that could not be read as a whole: nothing knows it, so nothing uses it.
                self.trash(&target)?;
            }
            fs::rename(dir.path(), &target).map_err(|source| Error::file("rename into place", &target, source))?;
            self.link(&record)?;
            Ok(Layer { record, durable: AtomicBool::new(false) })
        })
    }

    /// Makes the short name of a layer.
    pub(crate) fn link(&self, record: &LayerRecord) -> Result<(), Error> {
        let link = self.layout.links().join(&record.link);
        let target = PathBuf::from(format!("../layers/{}/fs", record.key));
        if fs::read_link(&link).is_ok_and(|found| found == target) {
            return Ok(());
        }
        match fs::remove_file(&link) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::file("remove", &link, source)),
        }
        std::os::unix::fs::symlink(target, &link).map_err(|source| Error::file("create the link", &link, source))
    }

    /// Moves something away to be deleted in the background.
    pub(crate) fn trash(&self, path: &Path) -> Result<(), Error> {
        let away = self.layout.fresh();
        fs::rename(path, &away).map_err(|source| Error::file("move away", path, source))?;
        self.signal.discard(away);
        Ok(())
    }

    /// Stores a small document under its digest, which the caller has checked.
    pub(crate) fn place_blob(&self, digest: Digest, bytes: &[u8]) -> Result<BlobPin, Error> {
        self.blobs.place(digest, |_| {
            self.layout.write(&self.layout.blob(&digest), bytes, false)?;
            Ok(Blob { size: bytes.len() as u64, durable: AtomicBool::new(false) })
        })
    }

    /// Reads a stored blob.
    pub(crate) fn read_blob(&self, digest: &Digest) -> Result<Vec<u8>, Error> {
        let path = self.layout.blob(digest);
        fs::read(&path).map_err(|source| Error::file("read", &path, source))
    }

    /// Makes an image durable, then lists it.
    pub(crate) fn commit(&self, new: NewImage) -> Result<ImageId, Error> {
        self.sync_content(&new)?;
        let id = new.id;
        let _commit = self.commit_lock();
        let (content, mut changed) = self.state().prepare(&self.signal, new);
        // The younger of two records with one name has it, so a crash in between does no harm.
        changed.sort_by_key(|record| std::cmp::Reverse(record.sequence));
        for record in &changed {
            let path = self.layout.record(&record.id);
            let written = to_json(&path, record).and_then(|text| self.layout.write_durable(&path, &text));
            if let Err(error) = written {
                if record.id == id && !self.state().is_listed(&id) {
                    // It may be there although its folder could not be synced, and would outlive its layers.
                    let _ = fs::remove_file(&path);
                }
                return Err(error);
            }
        }
        self.state().apply(content, changed);
        Ok(id)
    }

    fn sync_content(&self, new: &NewImage) -> Result<(), Error> {
        let layers = || new.layers.iter().filter(|layer| !layer.value.durable.load(Ordering::Acquire));
        if layers().next().is_some() {
            self.layout.sync_all()?;
        } else {
            let blobs: Vec<_> = new.blobs.iter().filter(|blob| !blob.value.durable.load(Ordering::Acquire)).collect();
            for blob in &blobs {
                disk::sync_file(&self.layout.blob(&blob.key))?;
            }
            if !blobs.is_empty() {
                disk::sync_dir(&self.layout.blobs())?;
            }
        }
        layers().for_each(|layer| layer.value.durable.store(true, Ordering::Release));
        new.blobs.iter().for_each(|blob| blob.value.durable.store(true, Ordering::Release));
        Ok(())
    }

    /// Removes the image that a text means, with all its names.
    pub(crate) fn remove(&self, text: &str) -> Result<(), Error> {
        let _commit = self.commit_lock();
        let Some((content, record)) = self.state().take(text) else {
            return Ok(());
        };
        let path = self.layout.record(&content.id);
        if let Some(record) = record {
            // A container uses it: the record keeps its layers over a restart.
            return self.layout.write_durable(&path, &to_json(&path, &record)?);
        }
        self.unsynced.store(true, Ordering::Release);
        remove_file(&path)
    }

    /// Takes one name from an image that has others.
    pub(crate) fn untag(&self, name: &str) -> Result<String, Error> {
        let _commit = self.commit_lock();
        let Some((full, content, record)) = self.state().without_name(name) else {
            return Err(Error::NotFound { reference: name.to_string() });
        };
        let path = self.layout.record(&record.id);
        self.layout.write_durable(&path, &to_json(&path, &record)?)?;
        self.state().apply(content, vec![record]);
        Ok(full)
    }

    /// Takes what nobody uses out of the store; returns what is to be deleted.
    pub(crate) fn collect_idle(&self) -> Vec<PathBuf> {
        {
            let _commit = self.commit_lock();
            for id in self.state().take_abandoned() {
                if let Err(error) = remove_file(&self.layout.record(&id)) {
                    tracing::warn!(%error, "cannot delete the record of a removed image");
                }
                self.unsynced.store(true, Ordering::Release);
            }
            if self.unsynced.swap(false, Ordering::AcqRel) && !reaper::sync_records(self) {
                self.unsynced.store(true, Ordering::Release);
                return Vec::new();
            }
        }
        let mut doomed = Vec::new();
        self.layers.take_idle(|key, layer| {
            let away = self.layout.fresh();
            let moved = fs::rename(self.layout.layer(key), &away)
                .map_err(|source| Error::file("move away", &self.layout.layer(key), source))
                .and_then(|()| remove_file(&self.layout.links().join(&layer.record.link)));
            if let Err(error) = &moved {
                tracing::warn!(%error, "cannot delete a layer");
            }
            doomed.push(away);
            moved.is_ok()
        });
        self.blobs.take_idle(|digest, _| {
            let removed = remove_file(&self.layout.blob(digest));
            if let Err(error) = &removed {
                tracing::warn!(%error, "cannot delete a blob");
            }
            removed.is_ok()
        });
        doomed
    }

    /// Files and folders of the store that nothing owns.
    pub(crate) fn leaks(&self) -> Vec<PathBuf> {
        let known_layers = self.layers.fold(Vec::new(), |mut all, key, layer| {
            all.push((key.clone(), layer.record.link.clone()));
            all
        });
        let known_blobs = self.blobs.fold(Vec::new(), |mut all, digest, _| {
            all.push(digest.hex());
            all
        });
        let records = self.state().record_names();
        let mut leaks = list(&self.layout.staging(), |_| false);
        leaks.extend(list(&self.layout.layers(), |name| known_layers.iter().any(|(key, _)| key == name)));
        leaks.extend(list(&self.layout.links(), |name| known_layers.iter().any(|(_, link)| link == name)));
        leaks.extend(list(&self.layout.blobs(), |name| known_blobs.iter().any(|hex| hex == name)));
        leaks.extend(list(&self.layout.records(), |name| records.iter().any(|record| record == name)));
        leaks
    }
}

/// The content of an image record that is to be listed or kept.
pub(crate) fn content(signal: &Arc<Signal>, new: NewImage) -> Arc<Content> {
    Arc::new(Content::new(signal.clone(), new))
}

fn list(dir: &Path, known: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(items) = fs::read_dir(dir) else {
        return Vec::new();
    };
    items.flatten().filter(|item| !item.file_name().to_str().is_some_and(&known)).map(|item| item.path()).collect()
}

pub(crate) fn remove_file(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(Error::file("remove", path, source)),
        _ => Ok(()),
    }
}

fn to_json(path: &Path, record: &impl serde::Serialize) -> Result<Vec<u8>, Error> {
    serde_json::to_vec_pretty(record).map_err(|source| Error::Json { subject: path.display().to_string(), source })
}

fn chain_key(chain_id: &Digest) -> String {
    format!("chain-{}", chain_id.hex())
}

/// Seven letters and digits from the key, others when another layer has them.
fn link_name(key: &str, taken: &[&str]) -> String {
    let mut text = key.to_string();
    loop {
        let digest = Digest::of(text.as_bytes()).hex();
        // 35 bits in base 32.
        let bits = u64::from_str_radix(&digest[..9], 16).unwrap_or_default();
        let name: String =
            (0..7).map(|at| char::from(b"0123456789abcdefghijklmnopqrstuv"[(bits >> (5 * at)) as usize & 31])).collect();
        if !taken.contains(&name.as_str()) {
            return name;
        }
        text.push('+');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_names_are_short_and_unique() {
        let first = link_name("abc", &[]);
        assert_eq!(first.len(), 7);
        assert_eq!(link_name("abc", &[]), first);
        let second = link_name("abc", &[&first]);
        assert!(second.len() == 7 && second != first);
        assert_ne!(link_name("abd", &[]), first);
    }
}
