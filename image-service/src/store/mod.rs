//! The image store: the one owner of `<root>/images`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::auth::Credentials;
use crate::config::StoreConfig;
use crate::error::Error;
use crate::image::{FsUsage, Image, ImageConfig, ImageId, Rootfs};
use crate::reference::Reference;

/// All images of one node. Cheap to share; every method may be called at any time.
pub struct ImageStore {
    config: StoreConfig,
}

/// Something in the store that could not be read when it was opened, and was left where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file or folder.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// Keeps an image's layers while a container uses them. Dropping it lets them go.
///
/// Holds do not outlive the process: after a restart each recovered container takes its hold again, then
/// [`ImageStore::start_reaper`] is called.
pub struct Hold {
    id: ImageId,
}

impl Hold {
    /// The image's ID.
    pub fn id(&self) -> ImageId {
        self.id
    }

    /// What the image says about its containers; works even when the image has been removed since.
    pub fn config(&self) -> Arc<ImageConfig> {
        Arc::new(ImageConfig::default())
    }
}

impl ImageStore {
    /// Opens or makes the store: leftovers of unfinished work are deleted, what cannot be read is
    /// reported by [`ImageStore::problems`]. Nothing else is deleted before [`ImageStore::start_reaper`].
    pub async fn open(config: StoreConfig) -> Result<Arc<Self>, Error> {
        Ok(Arc::new(ImageStore { config }))
    }

    /// What could not be read when the store was opened.
    pub fn problems(&self) -> Vec<Problem> {
        Vec::new()
    }

    /// Lets layers and blobs that no image and no [`Hold`] uses be deleted in the background, from now on.
    /// To be called once, when the containers that survived a restart have taken their holds.
    pub fn start_reaper(&self) {}

    /// Pulls an image. Concurrent pulls of one reference with equal credentials share one download; it is
    /// given up when the last caller drops its future. When this returns, the image is durable and listed.
    pub async fn pull(self: &Arc<Self>, reference: &Reference, credentials: Option<Credentials>) -> Result<ImageId, Error> {
        let _ = credentials;
        Err(Error::Unsupported { subject: reference.to_string(), reason: "pulling is not implemented yet".into() })
    }

    /// Imports an OCI layout (folder, tar) or a `docker save` archive, plain or compressed with gzip or zstd.
    /// Names come from the archive; `name` is given to an image that has none there.
    pub async fn import(self: &Arc<Self>, path: &Path, name: Option<Reference>) -> Result<Vec<Image>, Error> {
        let _ = name;
        Err(Error::Archive { path: path.to_path_buf(), reason: "importing is not implemented yet".into() })
    }

    /// The image that a text means: an ID with or without `sha256:`, a unique prefix of one, a name with tag,
    /// without tag (`latest`), or with digest.
    pub fn status(&self, text: &str) -> Option<Image> {
        let _ = text;
        None
    }

    /// All images, sorted by ID.
    pub fn list(&self) -> Vec<Image> {
        Vec::new()
    }

    /// Removes the image that a text means, with all its names. Unknown is success. When it returns the image is
    /// gone from lists and disk records; its files are deleted later, once no container uses them.
    pub async fn remove(self: &Arc<Self>, text: &str) -> Result<(), Error> {
        let _ = text;
        Ok(())
    }

    /// What the store takes on disk; kept up to date, never walked.
    pub fn fs_usage(&self) -> FsUsage {
        FsUsage { mountpoint: self.config.root.clone(), bytes: 0, inodes: 0 }
    }

    /// Where the image's file system is.
    pub fn rootfs(&self, id: &ImageId) -> Result<Rootfs, Error> {
        Err(Error::NoImage { id: id.to_string() })
    }

    /// What the image says about its containers.
    pub fn config(&self, id: &ImageId) -> Result<Arc<ImageConfig>, Error> {
        Err(Error::NoImage { id: id.to_string() })
    }

    /// Keeps the image's layers until the guard is dropped. Also works for an image that was removed while
    /// another hold kept it, or before a restart.
    pub fn hold(&self, id: &ImageId) -> Result<Hold, Error> {
        Err(Error::NoImage { id: id.to_string() })
    }
}
