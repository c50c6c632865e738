//! Which images there are, and which name means which: pure bookkeeping, no disk.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::core::{BlobPin, LayerPin, NewImage, content};
use super::reaper::Signal;
use super::record::{ImageRecord, VERSION};
use crate::digest::Digest;
use crate::image::{Image, ImageConfig, ImageId, ImageUser};
use crate::reference::Reference;

/// An image's content with its pins. As long as it lives, so do its layers and blobs.
pub(crate) struct Content {
    pub id: ImageId,
    pub config: Arc<ImageConfig>,
    pub size: u64,
    /// The bottom layer first.
    pub layers: Vec<LayerPin>,
    /// Grows when the image is pulled through another manifest.
    blobs: Mutex<Vec<BlobPin>>,
    signal: Arc<Signal>,
}

impl Content {
    pub(crate) fn new(signal: Arc<Signal>, new: NewImage) -> Self {
        Content {
            id: new.id,
            config: Arc::new(new.config),
            size: new.size,
            layers: new.layers,
            blobs: Mutex::new(new.blobs),
            signal,
        }
    }

    fn add_blobs(&self, more: Vec<BlobPin>) {
        let mut blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        for blob in more {
            if !blobs.iter().any(|have| have.key == blob.key) {
                blobs.push(blob);
            }
        }
    }

    fn blob_digests(&self) -> Vec<Digest> {
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|blob| blob.key).collect()
    }
}

impl Drop for Content {
    fn drop(&mut self) {
        // The pins are dropped after this; they signal too. This is for the record of a removed image.
        self.signal.idle();
    }
}

/// An image that lists show.
struct Listed {
    content: Arc<Content>,
    tags: BTreeSet<String>,
    digests: BTreeSet<String>,
    manifest: Option<Digest>,
    pinned: bool,
    sequence: u64,
}

/// All images.
#[derive(Default)]
pub(crate) struct State {
    images: BTreeMap<ImageId, Listed>,
    names: HashMap<String, ImageId>,
    /// Removed ones that were in use.
    removed: HashMap<ImageId, Weak<Content>>,
    /// Removed ones found at start, until the containers have taken their holds.
    recovered: Vec<Arc<Content>>,
    sequence: u64,
}

impl State {
    /// Takes a record in at start; records come in the order of their sequence.
    pub(crate) fn load(&mut self, record: ImageRecord, content: Arc<Content>) {
        self.sequence = self.sequence.max(record.sequence);
        if record.removed {
            self.removed.insert(record.id, Arc::downgrade(&content));
            self.recovered.push(content);
        } else {
            self.apply(content, vec![record]);
        }
    }

    /// The containers of before have their holds now.
    pub(crate) fn forget_recovered(&mut self) -> Vec<Arc<Content>> {
        std::mem::take(&mut self.recovered)
    }

    /// What the records will say once `new` is in the store: its own one, and of every image that loses a name to it.
    pub(crate) fn prepare(&mut self, signal: &Arc<Signal>, new: NewImage) -> (Arc<Content>, Vec<ImageRecord>) {
        let id = new.id;
        let (tags, digests, manifest) = (new.tags.clone(), new.digests.clone(), new.manifest);
        let existing = self.content(&id);
        let content = match existing {
            Some(content) => {
                content.add_blobs(new.blobs);
                content
            }
            None => content(signal, new),
        };
        let mut records = Vec::new();
        let losers: BTreeSet<ImageId> =
            tags.iter().chain(&digests).filter_map(|name| self.names.get(name).copied()).filter(|owner| *owner != id).collect();
        for loser in losers {
            if let Some(mut record) = self.record(&loser) {
                record.tags.retain(|tag| !tags.contains(tag));
                record.digests.retain(|digest| !digests.contains(digest));
                records.push(record);
            }
        }
        let mut record = self.record(&id).unwrap_or_else(|| ImageRecord {
            version: VERSION,
            id,
            tags: Vec::new(),
            digests: Vec::new(),
            size: content.size,
            manifest,
            blobs: Vec::new(),
            layers: content.layers.iter().map(|layer| layer.key.clone()).collect(),
            pinned: false,
            removed: false,
            sequence: 0,
        });
        record.tags = record.tags.into_iter().chain(tags).collect::<BTreeSet<_>>().into_iter().collect();
        record.digests = record.digests.into_iter().chain(digests).collect::<BTreeSet<_>>().into_iter().collect();
        record.manifest = manifest.or(record.manifest);
        record.blobs = content.blob_digests();
        records.push(record);
        for record in &mut records {
            self.sequence += 1;
            record.sequence = self.sequence;
        }
        (content, records)
    }

    /// Lists what [`State::prepare`] prepared, after it was written.
    pub(crate) fn apply(&mut self, content: Arc<Content>, mut records: Vec<ImageRecord>) {
        records.sort_by_key(|record| record.sequence);
        for record in records {
            let content = match self.images.get(&record.id) {
                Some(listed) => listed.content.clone(),
                None if record.id == content.id => content.clone(),
                None => continue,
            };
            self.names.retain(|_, owner| *owner != record.id);
            for name in record.tags.iter().chain(&record.digests) {
                if let Some(loser) = self.names.insert(name.clone(), record.id)
                    && let Some(listed) = self.images.get_mut(&loser)
                {
                    listed.tags.remove(name);
                    listed.digests.remove(name);
                }
            }
            self.removed.remove(&record.id);
            let listed = Listed {
                content,
                tags: record.tags.into_iter().collect(),
                digests: record.digests.into_iter().collect(),
                manifest: record.manifest,
                pinned: record.pinned,
                sequence: record.sequence,
            };
            self.images.insert(record.id, listed);
        }
    }

    /// Takes the image that a text means off the list. The record is what must be kept of it when it is in use.
    pub(crate) fn take(&mut self, text: &str) -> Option<(Arc<Content>, Option<ImageRecord>)> {
        let id = self.find(text)?;
        let record = self.record(&id);
        let listed = self.images.remove(&id)?;
        self.names.retain(|_, owner| *owner != id);
        self.sequence += 1;
        if Arc::strong_count(&listed.content) == 1 {
            return Some((listed.content, None));
        }
        self.removed.insert(id, Arc::downgrade(&listed.content));
        let record = record.map(|record| ImageRecord {
            tags: Vec::new(),
            digests: Vec::new(),
            removed: true,
            sequence: self.sequence,
            ..record
        });
        Some((listed.content, record))
    }

    /// What the record of the image that `name` means will say without it; `None` for its last tag and for what is no tag.
    pub(crate) fn without_name(&mut self, name: &str) -> Option<(String, Arc<Content>, ImageRecord)> {
        let full = Reference::parse(name).ok()?.repo_tag()?;
        let id = *self.names.get(&full)?;
        let mut record = self.record(&id)?;
        record.tags.retain(|tag| *tag != full);
        if record.tags.is_empty() {
            return None;
        }
        self.sequence += 1;
        record.sequence = self.sequence;
        Some((full, self.content(&id)?, record))
    }

    /// Removed images that nobody uses any more.
    pub(crate) fn take_abandoned(&mut self) -> Vec<ImageId> {
        let abandoned: Vec<ImageId> =
            self.removed.iter().filter(|(_, content)| content.strong_count() == 0).map(|(id, _)| *id).collect();
        abandoned.iter().for_each(|id| drop(self.removed.remove(id)));
        abandoned
    }

    /// An image's content, listed or removed but in use.
    pub(crate) fn content(&self, id: &ImageId) -> Option<Arc<Content>> {
        match self.images.get(id) {
            Some(listed) => Some(listed.content.clone()),
            None => self.removed.get(id).and_then(Weak::upgrade),
        }
    }

    pub(crate) fn is_listed(&self, id: &ImageId) -> bool {
        self.images.contains_key(id)
    }

    /// The image that a text means.
    pub(crate) fn find(&self, text: &str) -> Option<ImageId> {
        if let Ok(id) = text.parse::<ImageId>() {
            return self.images.contains_key(&id).then_some(id);
        }
        if let Ok(reference) = Reference::parse(text)
            && let Some(id) = self.by_reference(&reference)
        {
            return Some(id);
        }
        self.by_prefix(text.strip_prefix("sha256:").unwrap_or(text))
    }

    fn by_reference(&self, reference: &Reference) -> Option<ImageId> {
        let name = match reference.digest() {
            Some(digest) => reference.repo_digest(digest),
            None => reference.repo_tag()?,
        };
        self.names.get(&name).copied()
    }

    fn by_prefix(&self, prefix: &str) -> Option<ImageId> {
        if prefix.is_empty() || !prefix.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        let mut matching = self.images.keys().filter(|id| id.hex().starts_with(prefix));
        match (matching.next(), matching.next()) {
            (Some(id), None) => Some(*id),
            _ => None,
        }
    }

    pub(crate) fn image(&self, text: &str) -> Option<Image> {
        let id = self.find(text)?;
        self.images.get(&id).map(image)
    }

    pub(crate) fn list(&self) -> Vec<Image> {
        self.images.values().map(image).collect()
    }

    /// File names of all records.
    pub(crate) fn record_names(&self) -> Vec<String> {
        self.images.keys().chain(self.removed.keys()).map(|id| format!("{}.json", id.hex())).collect()
    }

    fn record(&self, id: &ImageId) -> Option<ImageRecord> {
        let listed = self.images.get(id)?;
        Some(ImageRecord {
            version: VERSION,
            id: *id,
            tags: listed.tags.iter().cloned().collect(),
            digests: listed.digests.iter().cloned().collect(),
            size: listed.content.size,
            manifest: listed.manifest,
            blobs: listed.content.blob_digests(),
            layers: listed.content.layers.iter().map(|layer| layer.key.clone()).collect(),
            pinned: listed.pinned,
            removed: false,
            sequence: listed.sequence,
        })
    }
}

fn image(listed: &Listed) -> Image {
    Image {
        id: listed.content.id,
        repo_tags: listed.tags.iter().cloned().collect(),
        repo_digests: listed.digests.iter().cloned().collect(),
        size: listed.content.size,
        user: ImageUser::parse(&listed.content.config.user),
        pinned: listed.pinned,
    }
}
