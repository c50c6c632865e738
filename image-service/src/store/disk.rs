//! The store's folders and how files get into them: whole or not at all.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FlockOperation, Mode, OFlags};

use super::reaper::Signal;
use crate::digest::Digest;
use crate::error::Error;
use crate::image::ImageId;

/// Paths of the store.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    root: PathBuf,
}

/// Takes the lock, within two seconds: a program that a killed agent was just starting holds it until its exec.
fn lock_soon(lock: &File) -> Result<(), rustix::io::Errno> {
    const PAUSE: std::time::Duration = std::time::Duration::from_millis(20);
    let mut left = 100;
    loop {
        match rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if left > 0 => left -= 1,
            taken => return taken,
        }
        std::thread::sleep(PAUSE);
    }
}

impl Layout {
    /// Makes what is missing and takes the store's lock.
    pub(crate) fn open(root: &Path) -> Result<(Self, File), Error> {
        // Only root may look inside: layers hold set-uid programs and device nodes.
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        let layout = Layout { root: root.to_path_buf() };
        for dir in [root.join("blobs/sha256"), layout.layers(), layout.links(), layout.records(), layout.staging()] {
            builder.create(&dir).map_err(|source| Error::file("create", &dir, source))?;
        }
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        fs::set_permissions(root, private).map_err(|source| Error::file("set the mode of", root, source))?;
        let path = root.join("lock");
        let lock = File::create(&path).map_err(|source| Error::file("create", &path, source))?;
        lock_soon(&lock).map_err(|errno| Error::file("another process uses the store: lock", &path, errno))?;
        Ok((layout, lock))
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    pub(crate) fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    pub(crate) fn layer(&self, key: &str) -> PathBuf {
        self.layers().join(key)
    }

    pub(crate) fn links(&self) -> PathBuf {
        self.root.join("l")
    }

    pub(crate) fn records(&self) -> PathBuf {
        self.root.join("records")
    }

    pub(crate) fn record(&self, id: &ImageId) -> PathBuf {
        self.records().join(format!("{}.json", id.hex()))
    }

    pub(crate) fn staging(&self) -> PathBuf {
        self.root.join("staging")
    }

    /// A name in the staging folder that nothing has.
    pub(crate) fn fresh(&self) -> PathBuf {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        loop {
            let name = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = self.staging().join(name);
            if fs::symlink_metadata(&path).is_err() {
                return path;
            }
        }
    }

    /// Writes a file that is there as a whole or not at all, and stays after a power cut when this returns.
    pub(crate) fn write_durable(&self, path: &Path, bytes: &[u8]) -> Result<(), Error> {
        self.write(path, bytes, true)?;
        sync_dir(path.parent().unwrap_or(Path::new("/")))
    }

    /// Writes a file that is there as a whole or not at all while the machine runs.
    pub(crate) fn write(&self, path: &Path, bytes: &[u8], sync: bool) -> Result<(), Error> {
        let staged = self.fresh();
        let done = (|| {
            let mut file = File::create_new(&staged).map_err(|source| Error::file("create", &staged, source))?;
            file.write_all(bytes).map_err(|source| Error::file("write", &staged, source))?;
            if sync {
                file.sync_all().map_err(|source| Error::file("sync", &staged, source))?;
            }
            fs::rename(&staged, path).map_err(|source| Error::file("rename into place", path, source))
        })();
        if done.is_err() {
            // Nothing to report beyond the first failure: the next start deletes it.
            let _ = fs::remove_file(&staged);
        }
        done
    }

    /// Makes everything written to the store's file system so far durable.
    pub(crate) fn sync_all(&self) -> Result<(), Error> {
        let root = open_dir(&self.root)?;
        rustix::fs::syncfs(root).map_err(|errno| Error::file("sync the file system of", &self.root, errno))
    }
}

/// Makes names added to or taken from a folder durable.
pub(crate) fn sync_dir(path: &Path) -> Result<(), Error> {
    let dir = File::open(path).map_err(|source| Error::file("open", path, source))?;
    dir.sync_all().map_err(|source| Error::file("sync", path, source))
}

/// Makes one file's content durable.
pub(crate) fn sync_file(path: &Path) -> Result<(), Error> {
    sync_dir(path)
}

pub(crate) fn open_dir(path: &Path) -> Result<OwnedFd, Error> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| Error::file("open", path, errno))
}

/// A folder under construction; what is not moved away is deleted in the background.
pub(crate) struct StagingDir {
    path: PathBuf,
    signal: Arc<Signal>,
}

impl StagingDir {
    pub(crate) fn new(layout: &Layout, signal: &Arc<Signal>) -> Result<Self, Error> {
        let path = layout.fresh();
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(|source| Error::file("create", &path, source))?;
        Ok(StagingDir { path, signal: signal.clone() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for StagingDir {
    fn drop(&mut self) {
        self.signal.discard(std::mem::take(&mut self.path));
    }
}
