//! Opening a store: what an earlier process left is read, checked and either taken in or cleared away.

use std::fs;
use std::path::{Path, PathBuf};

use super::core::{Blob, Core, Layer, NewImage, content};
use super::disk::Layout;
use super::record::{self, ImageRecord, LayerRecord, Unreadable};
use crate::digest::Digest;
use crate::error::Error;
use crate::image::{Image, ImageUser};
use crate::manifest::parse_config;

/// Something in the store that could not be read when it was opened, and was left where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file or folder.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// Reads the store at `root`.
pub(crate) fn open(root: &Path) -> Result<(Core, Vec<Problem>), Error> {
    let (layout, lock) = Layout::open(root)?;
    let core = Core::new(layout, lock);
    let mut problems = Vec::new();
    for leftover in children(&core.layout.staging())? {
        core.signal.discard(leftover);
    }
    load_layers(&core, &mut problems)?;
    load_blobs(&core)?;
    let complete = load_images(&core, &mut problems)?;
    clear_unnamed(&core, complete);
    check_links(&core)?;
    Ok((core, problems))
}

/// The images that the records of the store at `root` list, without the store's lock and without a change to anything: for
/// looking while nobody serves it. A store that was never made holds none.
pub fn images_on_record(root: &Path) -> Result<Vec<Image>, Error> {
    let dir = root.join("records");
    if fs::symlink_metadata(&dir).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
        return Ok(Vec::new());
    }
    let records = children(&dir)?.into_iter().filter_map(|path| record::load::<ImageRecord>(&path).ok());
    let listed = records.filter(|record| !record.removed).map(|record| Image {
        id: record.id,
        repo_tags: record.tags,
        repo_digests: record.digests,
        size: record.size,
        user: ImageUser::Unset,
        pinned: record.pinned,
    });
    Ok(listed.collect())
}

fn children(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let items = fs::read_dir(dir).map_err(|source| Error::file("list", dir, source))?;
    let mut paths = Vec::new();
    for item in items {
        paths.push(item.map_err(|source| Error::file("list", dir, source))?.path());
    }
    paths.sort();
    Ok(paths)
}

fn load_layers(core: &Core, problems: &mut Vec<Problem>) -> Result<(), Error> {
    for path in children(&core.layout.layers())? {
        let file = path.join("layer.json");
        match record::load::<LayerRecord>(&file) {
            Ok(record) if path.file_name().is_some_and(|name| name == record.key.as_str()) => {
                core.layers.place(record.key.clone(), |_| Ok::<_, Error>(Layer::stored(record)))?;
            }
            Err(Unreadable::Later(reason)) => problems.push(Problem { path: file, reason }),
            Ok(_) => problems.push(Problem { path: file, reason: "the record is of another layer".into() }),
            // Its image, if there is one, will say what is missing.
            Err(Unreadable::Damaged(_)) => core.trash(&path)?,
        }
    }
    Ok(())
}

fn load_blobs(core: &Core) -> Result<(), Error> {
    for path in children(&core.layout.blobs())? {
        let digest = path.file_name().and_then(|name| name.to_str()).and_then(Digest::from_hex);
        let size = fs::symlink_metadata(&path).map_err(|source| Error::file("stat", &path, source))?.len();
        match digest {
            Some(digest) => drop(core.blobs.place(digest, |_| Ok::<_, Error>(Blob::stored(size)))?),
            None => core.trash(&path)?,
        }
    }
    Ok(())
}

/// False when a record could not be read, so that nobody knows what it names.
fn load_images(core: &Core, problems: &mut Vec<Problem>) -> Result<bool, Error> {
    let mut records = Vec::new();
    let mut complete = true;
    for path in children(&core.layout.records())? {
        match record::load::<ImageRecord>(&path) {
            Ok(record) if path == core.layout.record(&record.id) => records.push(record),
            Ok(_) => {
                complete = false;
                problems.push(Problem { path, reason: "the record is of another image".into() });
            }
            Err(unreadable) => {
                complete = false;
                problems.push(Problem { path, reason: unreadable.reason().to_string() });
            }
        }
    }
    records.sort_by_key(|record| record.sequence);
    for record in records {
        let path = core.layout.record(&record.id);
        match load_image(core, &record) {
            Ok(new) => {
                let content = content(&core.signal, new);
                core.state().load(record, content);
            }
            Err(reason) => problems.push(Problem { path, reason }),
        }
    }
    Ok(complete)
}

fn load_image(core: &Core, record: &ImageRecord) -> Result<NewImage, String> {
    let mut layers = Vec::new();
    for key in &record.layers {
        layers.push(core.layers.pin(key).ok_or_else(|| format!("layer {key} is missing"))?);
    }
    let mut blobs = Vec::new();
    for digest in &record.blobs {
        blobs.push(core.blobs.pin(digest).ok_or_else(|| format!("blob {digest} is missing"))?);
    }
    let bytes = core.read_blob(&record.id.digest()).map_err(|error| error.to_string())?;
    if Digest::of(&bytes) != record.id.digest() {
        return Err("the configuration does not have its digest".into());
    }
    let (config, _) = parse_config("configuration", &bytes).map_err(|error| error.to_string())?;
    Ok(NewImage {
        id: record.id,
        config,
        size: record.size,
        layers,
        blobs,
        manifest: record.manifest,
        tags: record.tags.clone(),
        digests: record.digests.clone(),
    })
}

/// Content without an image may never have reached the disk, so it is not reused. It is deleted now, unless a record
/// that could not be read may be the one that names it.
fn clear_unnamed(core: &Core, delete: bool) {
    if !delete {
        core.layers.take_idle(|_, _| true);
        core.blobs.take_idle(|_, _| true);
        return;
    }
    let failed = |error: Error| {
        tracing::warn!(%error, "cannot delete content that no image names");
        true
    };
    core.layers.take_idle(|key, _| core.trash(&core.layout.layer(key)).map_or_else(failed, |()| true));
    core.blobs.take_idle(|digest, _| core.trash(&core.layout.blob(digest)).map_or_else(failed, |()| true));
}

fn check_links(core: &Core) -> Result<(), Error> {
    let mut links = Vec::new();
    core.layers.fold(Ok(()), |done: Result<(), Error>, _, layer| {
        links.push(core.layout.links().join(&layer.record.link));
        done.and_then(|()| core.link(&layer.record))
    })?;
    for path in children(&core.layout.links())? {
        if !links.contains(&path) {
            super::core::remove_file(&path)?;
        }
    }
    Ok(())
}
