//! Importing images from files: OCI layouts (folder or tar) and `docker save` archives.

mod source;

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use self::source::Source;
use crate::config::Platform;
use crate::digest::Digest;
use crate::error::Error;
use crate::image::{Image, ImageId};
use crate::manifest::{self, Descriptor, Manifest, Parsed};
use crate::pull::import_layer;
use crate::reference::Reference;
use crate::store::core::{BlobPin, Core, NewImage};

const CONTAINERD_NAME: &str = "io.containerd.image.name";
const OCI_NAME: &str = "org.opencontainers.image.ref.name";
const MAX_INDEX_DEPTH: usize = 3;

/// Imports every image of `path` that is for `platform`.
pub(crate) fn import(core: &Core, path: &Path, name: Option<&Reference>, platform: &Platform) -> Result<Vec<Image>, Error> {
    let source = Source::open(core, path)?;
    let archive = Archive { core, path, source, name, platform };
    let ids = if archive.source.has("index.json") {
        archive.oci()?
    } else if archive.source.has("manifest.json") {
        archive.docker()?
    } else if archive.source.has("repositories") {
        return Err(archive.refused("archives of Docker before 1.10 are not supported"));
    } else {
        return Err(archive.refused("neither an OCI layout nor a docker save archive: no index.json and no manifest.json"));
    };
    let mut images: BTreeMap<ImageId, Image> = BTreeMap::new();
    let state = core.state();
    for id in ids {
        // Removed again already: nothing to report.
        images.extend(state.image(&id.to_string()).map(|image| (id, image)));
    }
    Ok(images.into_values().collect())
}

struct Archive<'a> {
    core: &'a Core,
    path: &'a Path,
    source: Source,
    name: Option<&'a Reference>,
    platform: &'a Platform,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

/// An entry of `docker save`'s `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Archive<'_> {
    fn refused(&self, reason: impl Into<String>) -> Error {
        Error::Archive { path: self.path.to_path_buf(), reason: reason.into() }
    }

    fn json<T: for<'de> Deserialize<'de>>(&self, name: &str) -> Result<T, Error> {
        let bytes = self.source.read(name, manifest::MAX_DOCUMENT)?;
        let subject = format!("{name} of {}", self.path.display());
        serde_json::from_slice(&bytes).map_err(|source| Error::Json { subject, source })
    }

    fn oci(&self) -> Result<Vec<ImageId>, Error> {
        let index: Index = self.json("index.json")?;
        let wanted = |descriptor: &&Descriptor| match &descriptor.platform {
            None => true,
            Some(platform) => platform.os == self.platform.os && platform.architecture == self.platform.architecture,
        };
        let mut ids = Vec::new();
        for descriptor in index.manifests.iter().filter(wanted) {
            let name = self.name_of(&descriptor.annotations)?;
            ids.push(self.oci_image(descriptor, name.as_ref())?);
        }
        if ids.is_empty() {
            let platform = format!("{}/{}", self.platform.os, self.platform.architecture);
            return Err(self.refused(format!("no image for platform {platform}")));
        }
        Ok(ids)
    }

    /// The image's full name. `latest` and the like are tags without a name and say nothing.
    fn name_of(&self, annotations: &BTreeMap<String, String>) -> Result<Option<Reference>, Error> {
        let full = |key: &str| annotations.get(key).filter(|name| key == CONTAINERD_NAME || name.contains(['/', ':']));
        match full(CONTAINERD_NAME).or_else(|| full(OCI_NAME)) {
            Some(name) => Reference::parse(name).map(Some),
            None => Ok(self.name.cloned()),
        }
    }

    fn oci_image(&self, descriptor: &Descriptor, name: Option<&Reference>) -> Result<ImageId, Error> {
        let top = descriptor.digest()?;
        let mut blobs = Vec::new();
        let mut digest = top;
        for _ in 0..MAX_INDEX_DEPTH {
            let bytes = self.blob(&digest)?;
            let subject = format!("{digest} of {}", self.path.display());
            let parsed = manifest::parse(&subject, &bytes)?;
            blobs.push(self.core.place_blob(digest, &bytes)?);
            match parsed {
                Parsed::Manifest(content) => return self.oci_manifest(digest, &content, blobs, name, top),
                Parsed::Index(manifests) => digest = manifest::choose(&subject, &manifests, self.platform)?.digest()?,
            }
        }
        Err(self.refused("an index that holds indexes that hold indexes"))
    }

    fn oci_manifest(
        &self,
        digest: Digest,
        content: &Manifest,
        mut blobs: Vec<BlobPin>,
        name: Option<&Reference>,
        top: Digest,
    ) -> Result<ImageId, Error> {
        let config_digest = content.config.digest()?;
        let bytes = self.blob(&config_digest)?;
        let subject = format!("configuration {config_digest}");
        let (config, diff_ids) = manifest::parse_config(&subject, &bytes)?;
        let subject = self.path.display().to_string();
        manifest::check_config(&subject, &config, &diff_ids, content.layers.len(), self.platform)?;
        blobs.push(self.core.place_blob(config_digest, &bytes)?);
        let mut layers = Vec::new();
        let chain = manifest::chain_ids(&diff_ids);
        for ((layer, diff_id), chain_id) in content.layers.iter().zip(diff_ids).zip(chain) {
            let blob = layer.digest()?;
            layers.push(match self.core.find_layer(&diff_id, &chain_id) {
                Some(pin) => pin,
                None => {
                    let source = self.source.stream(&blob_name(&blob))?.0;
                    import_layer(self.core, source, Some((blob, layer.size)), diff_id, &chain_id, &layers)?
                }
            });
        }
        let size = content.layers.iter().map(|layer| layer.size).sum::<u64>() + content.config.size;
        self.core.commit(NewImage {
            id: ImageId::new(config_digest),
            config,
            size,
            layers,
            blobs,
            manifest: Some(digest),
            tags: name.and_then(Reference::repo_tag).into_iter().collect(),
            digests: name.map(|name| name.repo_digest(top)).into_iter().collect(),
        })
    }

    fn blob(&self, digest: &Digest) -> Result<Vec<u8>, Error> {
        let bytes = self.source.read(&blob_name(digest), manifest::MAX_DOCUMENT)?;
        match Digest::of(&bytes) {
            found if found == *digest => Ok(bytes),
            found => Err(Error::DigestMismatch { subject: format!("blob of {}", self.path.display()), expected: *digest, found }),
        }
    }

    fn docker(&self) -> Result<Vec<ImageId>, Error> {
        let saved: Vec<Saved> = self.json("manifest.json")?;
        if saved.is_empty() {
            return Err(self.refused("manifest.json names no image"));
        }
        saved.iter().map(|saved| self.docker_image(saved)).collect()
    }

    fn docker_image(&self, saved: &Saved) -> Result<ImageId, Error> {
        let bytes = self.source.read(&saved.config, manifest::MAX_DOCUMENT)?;
        let config_digest = Digest::of(&bytes);
        let (config, diff_ids) = manifest::parse_config(&saved.config, &bytes)?;
        let subject = self.path.display().to_string();
        manifest::check_config(&subject, &config, &diff_ids, saved.layers.len(), self.platform)?;
        let mut names = Vec::new();
        for tag in saved.repo_tags.iter().flatten() {
            names.push(Reference::parse(tag)?);
        }
        if names.is_empty() {
            names.extend(self.name.cloned());
        }
        let mut layers = Vec::new();
        let mut size = bytes.len() as u64;
        let chain = manifest::chain_ids(&diff_ids);
        for ((name, diff_id), chain_id) in saved.layers.iter().zip(diff_ids).zip(chain) {
            let (source, length) = self.source.stream(name)?;
            size += length;
            layers.push(match self.core.find_layer(&diff_id, &chain_id) {
                Some(pin) => pin,
                None => import_layer(self.core, source, None, diff_id, &chain_id, &layers)?,
            });
        }
        self.core.commit(NewImage {
            id: ImageId::new(config_digest),
            config,
            size,
            layers,
            blobs: vec![self.core.place_blob(config_digest, &bytes)?],
            manifest: None,
            tags: names.iter().filter_map(Reference::repo_tag).collect(),
            digests: Vec::new(),
        })
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}
