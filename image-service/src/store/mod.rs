//! The image store: the one owner of `<root>/images`.

pub(crate) mod core;
pub(crate) mod disk;
mod open;
mod pool;
pub(crate) mod reaper;
mod record;
mod state;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use self::open::{Problem, images_on_record};

use self::core::Core;
use self::reaper::{Busy, Signal};
use self::state::Content;
use crate::auth::Credentials;
use crate::config::StoreConfig;
use crate::error::Error;
use crate::image::{FsUsage, Image, ImageConfig, ImageId, Rootfs};
use crate::pull::Pulls;
use crate::reference::Reference;

/// All images of one node. Cheap to share; every method may be called at any time.
pub struct ImageStore {
    config: StoreConfig,
    core: Arc<Core>,
    pulls: Pulls,
    problems: Vec<Problem>,
}

/// Keeps an image's layers while a container uses them. Dropping it lets them go.
///
/// Holds do not outlive the process: after a restart each recovered container takes its hold again, then
/// [`ImageStore::start_reaper`] is called.
pub struct Hold {
    content: Arc<Content>,
    links: PathBuf,
}

impl Hold {
    /// The image's ID.
    pub fn id(&self) -> ImageId {
        self.content.id
    }

    /// What the image says about its containers; works even when the image has been removed since.
    pub fn config(&self) -> Arc<ImageConfig> {
        self.content.config.clone()
    }

    /// Where the image's file system is; works even when the image has been removed since.
    pub fn rootfs(&self) -> Rootfs {
        rootfs(&self.content, &self.links)
    }
}

impl ImageStore {
    /// Opens or makes the store: leftovers of unfinished work are deleted, what cannot be read is
    /// reported by [`ImageStore::problems`]. Nothing else is deleted before [`ImageStore::start_reaper`].
    pub async fn open(config: StoreConfig) -> Result<Arc<Self>, Error> {
        let root = config.root.clone();
        let (core, problems) = blocking(move || open::open(&root)).await?;
        let core = Arc::new(core);
        for problem in &problems {
            tracing::warn!(path = %problem.path.display(), reason = problem.reason, "image store: not used");
        }
        let reaped = core.clone();
        std::thread::Builder::new()
            .name("image-reaper".into())
            .spawn(move || reaper::run(&reaped))
            .map_err(|source| Error::file("start the reaper of", &config.root, source))?;
        Ok(Arc::new(ImageStore { config, core, pulls: Pulls::default(), problems }))
    }

    /// What could not be read when the store was opened.
    pub fn problems(&self) -> Vec<Problem> {
        self.problems.clone()
    }

    /// Lets layers and blobs that no image and no [`Hold`] uses be deleted in the background, from now on.
    /// To be called once, when the containers that survived a restart have taken their holds.
    pub fn start_reaper(&self) {
        // Dropped outside the lock.
        let recovered = self.core.state().forget_recovered();
        drop(recovered);
        self.core.signal.arm();
    }

    /// Waits until no pull or import is under way and everything that may be deleted is deleted.
    pub async fn settled(&self) {
        // An error means that the sender is gone, which this store owns.
        let _ = self.core.signal.settled().wait_for(|settled| *settled).await;
    }

    /// Files of the store that nothing owns. Meaningful when no pull is under way and the store has settled.
    pub fn leaks(&self) -> Vec<PathBuf> {
        self.core.leaks()
    }

    /// Pulls an image. Concurrent pulls of one reference with equal credentials share one download; it is
    /// given up when the last caller drops its future. When this returns, the image is durable and listed.
    pub async fn pull(self: &Arc<Self>, reference: &Reference, credentials: Option<Credentials>) -> Result<ImageId, Error> {
        self.pulls.join(&self.core, &self.config.registry, reference, credentials).await
    }

    /// Imports an OCI layout (folder, tar) or a `docker save` archive, plain or compressed with gzip or zstd.
    /// Names come from the archive; `name` is given to an image that has none there.
    pub async fn import(self: &Arc<Self>, path: &Path, name: Option<Reference>) -> Result<Vec<Image>, Error> {
        let (core, path, platform) = (self.core.clone(), path.to_path_buf(), self.config.registry.platform.clone());
        let signal = core.signal.clone();
        busy_blocking(&signal, move || crate::archive::import(&core, &path, name.as_ref(), &platform)).await
    }

    /// The image that a text means: an ID with or without `sha256:`, a unique prefix of one, a name with tag,
    /// without tag (`latest`), or with digest.
    pub fn status(&self, text: &str) -> Option<Image> {
        self.core.state().image(text)
    }

    /// All images, sorted by ID.
    pub fn list(&self) -> Vec<Image> {
        self.core.state().list()
    }

    /// Removes the image that a text means, with all its names. Unknown is success. When it returns the image is
    /// gone from lists and disk records; its files are deleted later, once no container uses them.
    pub async fn remove(self: &Arc<Self>, text: &str) -> Result<(), Error> {
        let (core, text) = (self.core.clone(), text.to_string());
        blocking(move || core.remove(&text)).await
    }

    /// Takes one name from an image that has others, and returns the name in full. The last name, and what is no name of an
    /// image, is an error.
    pub async fn untag(self: &Arc<Self>, name: &str) -> Result<String, Error> {
        let (core, name) = (self.core.clone(), name.to_string());
        blocking(move || core.untag(&name)).await
    }

    /// What the store takes on disk; kept up to date, never walked.
    pub fn fs_usage(&self) -> FsUsage {
        let (bytes, inodes) = self.core.layers.fold((0, 0), |(bytes, inodes), _, layer| {
            // The layer's own folder, its record and its link.
            (bytes + layer.record.bytes + 8192, inodes + layer.record.inodes + 3)
        });
        let (bytes, inodes) = self
            .core
            .blobs
            .fold((bytes, inodes), |(bytes, inodes), _, blob| (bytes + blob.size.next_multiple_of(4096), inodes + 1));
        FsUsage { mountpoint: self.core.layout.root().to_path_buf(), bytes, inodes }
    }

    /// Where the image's file system is.
    pub fn rootfs(&self, id: &ImageId) -> Result<Rootfs, Error> {
        self.hold(id).map(|hold| hold.rootfs())
    }

    /// What the image says about its containers.
    pub fn config(&self, id: &ImageId) -> Result<Arc<ImageConfig>, Error> {
        self.hold(id).map(|hold| hold.config())
    }

    /// Keeps the image's layers until the guard is dropped. Also works for an image that was removed while
    /// another hold kept it, or before a restart.
    pub fn hold(&self, id: &ImageId) -> Result<Hold, Error> {
        let content = self.core.state().content(id).ok_or_else(|| Error::NoImage { id: id.to_string() })?;
        Ok(Hold { content, links: self.core.layout.links() })
    }
}

impl Drop for ImageStore {
    fn drop(&mut self) {
        self.core.signal.stop();
    }
}

fn rootfs(content: &Content, links: &Path) -> Rootfs {
    let mut lowers = Vec::new();
    let mut root = None;
    for layer in content.layers.iter().rev() {
        let record = &layer.value.record;
        root = root.or(record.root);
        lowers.push(record.link.clone());
        if record.root_opaque {
            break;
        }
    }
    let (root_mode, root_uid, root_gid) = root.map_or((0o755, 0, 0), |root| (root.mode, root.uid, root.gid));
    Rootfs { links_dir: links.to_path_buf(), lowers, root_mode, root_uid, root_gid }
}

/// Runs what blocks on a thread for it.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(_) => Err(Error::Worker { task: "blocking work of the image store" }),
    }
}

/// As [`blocking`] for work that may leave something over when nobody waits for it any more.
pub(crate) async fn busy_blocking<T: Send + 'static>(
    signal: &Arc<Signal>,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let busy = Busy::new(signal);
    // The result is dropped before the guard, also when it is dropped unseen.
    match tokio::task::spawn_blocking(move || (work(), busy)).await {
        Ok((done, _busy)) => done,
        Err(_) => Err(Error::Worker { task: "blocking work of the image store" }),
    }
}
