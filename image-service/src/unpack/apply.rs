//! Applies a layer's entries to an empty folder, in overlayfs' own form: whiteouts are 0:0 devices, opaque folders
//! have an attribute. Parents need not be known: what depends on them is noted for [`super::complete`].

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::meta::{self, failed, refused};
use super::resolve::{DIR_READ, Folders, clean, find, split};
use super::tar::{Entry, Kind, Sparse, TarReader};
use crate::error::Error;

const WHITEOUT: &[u8] = b".wh.";
const AUFS: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const BUFFER: usize = 128 * 1024;

/// Owner and mode of a layer's `/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RootMeta {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// A hard link whose target is in a lower layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub path: Vec<u8>,
    pub target: Vec<u8>,
}

/// What applying a layer has brought.
pub(crate) struct Applied {
    pub root: Arc<OwnedFd>,
    /// Folders without an entry of their own.
    pub implied: Vec<Vec<u8>>,
    pub links: Vec<Link>,
    pub dirs: Vec<(Vec<u8>, (i64, u32))>,
    /// When the layer describes `/` itself.
    pub root_meta: Option<RootMeta>,
    pub root_opaque: bool,
    pub bytes: u64,
    pub inodes: u64,
}

impl Applied {
    /// Whether the layer is the same over any other layers.
    pub(crate) fn is_self_contained(&self) -> bool {
        self.implied.is_empty() && self.links.is_empty()
    }

    /// Gives folders their times. Last, because every change inside them sets it.
    pub(crate) fn set_times(&self) -> Result<(), Error> {
        for (path, time) in &self.dirs {
            let (parent, name) = split(path);
            let name: &[u8] = if name.is_empty() { b"." } else { name };
            let done = find(&*self.root, parent)
                .and_then(|parent| rustix::fs::openat(parent, name, DIR_READ, Mode::empty()))
                .and_then(|dir| rustix::fs::futimens(dir, &meta::timestamps(*time)));
            match done {
                // A later entry put something else there.
                Ok(()) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(errno) => return Err(failed(path, "set times")(errno)),
            }
        }
        Ok(())
    }
}

/// Writes one layer.
pub(crate) struct Applier {
    folders: Folders,
    links: Vec<Link>,
    dirs: Vec<(Vec<u8>, (i64, u32))>,
    root_meta: Option<RootMeta>,
    root_opaque: bool,
    bytes: u64,
    inodes: u64,
    buffer: Vec<u8>,
}

impl Applier {
    /// Starts in an empty folder.
    pub(crate) fn new(root: OwnedFd) -> Self {
        Applier {
            folders: Folders::new(root),
            links: Vec::new(),
            dirs: Vec::new(),
            root_meta: None,
            root_opaque: false,
            bytes: 4096,
            inodes: 1,
            buffer: vec![0; BUFFER],
        }
    }

    /// Applies one entry; its data is read from `tar`.
    pub(crate) fn apply<R: Read>(&mut self, entry: &Entry, tar: &mut TarReader<R>) -> Result<(), Error> {
        if entry.uid == u32::MAX || entry.gid == u32::MAX {
            return Err(refused(&entry.path, "the owner is not a valid id"));
        }
        let path = clean(&entry.path)?;
        if path.is_empty() {
            return self.apply_root(entry);
        }
        if path.split(|&byte| byte == b'/').any(|part| part.starts_with(AUFS) && part != OPAQUE) {
            return Ok(());
        }
        let (folder, name) = split(&path);
        let parent = self.folders.ensure(folder)?;
        if name == OPAQUE {
            return self.apply_opaque(&path, folder, &parent);
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            return self.apply_whiteout(&path, &parent, hidden);
        }
        if !self.links.is_empty() {
            self.links.retain(|link| link.path != path);
        }
        match entry.kind {
            Kind::Dir => self.apply_dir(entry, &path, &parent, name),
            Kind::File => self.apply_file(entry, &parent, name, tar),
            Kind::HardLink => self.apply_link(entry, &path, &parent, name),
            Kind::Symlink => {
                self.create(entry, &parent, name, || rustix::fs::symlinkat(entry.link.as_slice(), &*parent, name))?;
                meta::dress_at(parent.as_fd(), name, entry, false)
            }
            Kind::Char | Kind::Block | Kind::Fifo => self.apply_node(entry, &parent, name),
        }
    }

    /// Ends the layer. When nothing depends on parents it is finished.
    pub(crate) fn finish(self) -> Result<Applied, Error> {
        let mut implied: Vec<Vec<u8>> = self.folders.implied.values().cloned().collect();
        // Parents come before their children.
        implied.sort();
        let applied = Applied {
            root: self.folders.root(),
            links: self.links,
            dirs: self.dirs,
            root_meta: self.root_meta,
            root_opaque: self.root_opaque,
            bytes: self.bytes + 4096 * self.folders.made,
            inodes: self.inodes + self.folders.made,
            implied,
        };
        if applied.is_self_contained() {
            applied.set_times()?;
        }
        Ok(applied)
    }

    fn apply_root(&mut self, entry: &Entry) -> Result<(), Error> {
        if entry.kind != Kind::Dir {
            return Err(refused(&entry.path, "the layer's root is not a folder"));
        }
        let dir = rustix::fs::openat(&*self.folders.root(), ".", DIR_READ, Mode::empty())
            .map_err(failed(&entry.path, "open the root"))?;
        meta::dress(dir.as_fd(), entry)?;
        self.root_meta = Some(RootMeta { mode: entry.mode, uid: entry.uid, gid: entry.gid });
        self.dirs.push((Vec::new(), entry.mtime));
        Ok(())
    }

    fn apply_opaque(&mut self, path: &[u8], folder: &[u8], parent: &OwnedFd) -> Result<(), Error> {
        if folder.is_empty() {
            // overlayfs does not look for the mark on a layer's root: the lower layers are left out of the mount.
            self.root_opaque = true;
            return Ok(());
        }
        let dir = rustix::fs::openat(parent, ".", DIR_READ, Mode::empty()).map_err(failed(path, "open the folder"))?;
        meta::set_opaque(dir.as_fd(), path)
    }

    /// A whiteout hides what lower layers have, never what this layer has.
    fn apply_whiteout(&mut self, path: &[u8], parent: &OwnedFd, hidden: &[u8]) -> Result<(), Error> {
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(refused(path, "the whiteout hides nothing"));
        }
        match rustix::fs::statat(parent, hidden, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {
                meta::make_whiteout(parent, hidden).map_err(failed(path, "make a whiteout"))?;
                self.inodes += 1;
                Ok(())
            }
            Ok(stat) if meta::is_dir(&stat) => {
                let dir = rustix::fs::openat(parent, hidden, DIR_READ, Mode::empty()).map_err(failed(path, "open the folder"))?;
                meta::set_opaque(dir.as_fd(), path)
            }
            Ok(_) => Ok(()),
            Err(errno) => Err(failed(path, "stat")(errno)),
        }
    }

    fn apply_dir(&mut self, entry: &Entry, path: &[u8], parent: &OwnedFd, name: &[u8]) -> Result<(), Error> {
        let mut opaque = false;
        match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
            Ok(()) => self.count(4096),
            Err(Errno::EXIST) => {
                let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed(&entry.path, "stat"))?;
                if !meta::is_dir(&stat) {
                    opaque = meta::is_whiteout(&stat);
                    self.folders.remove(parent, name, &entry.path)?;
                    rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700))
                        .map_err(failed(&entry.path, "make the folder"))?;
                    self.count(4096);
                }
            }
            Err(errno) => return Err(failed(&entry.path, "make the folder")(errno)),
        }
        let dir = rustix::fs::openat(parent, name, DIR_READ, Mode::empty()).map_err(failed(&entry.path, "open the folder"))?;
        if !self.folders.implied.is_empty() {
            let stat = rustix::fs::fstat(&dir).map_err(failed(&entry.path, "stat"))?;
            self.folders.implied.remove(&stat.st_ino);
        }
        meta::dress(dir.as_fd(), entry)?;
        if opaque {
            meta::set_opaque(dir.as_fd(), &entry.path)?;
        }
        self.dirs.push((path.to_vec(), entry.mtime));
        Ok(())
    }

    fn apply_file<R: Read>(&mut self, entry: &Entry, parent: &OwnedFd, name: &[u8], tar: &mut TarReader<R>) -> Result<(), Error> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = self.create(entry, parent, name, || rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o600)))?;
        let mut file = File::from(fd);
        match &entry.sparse {
            None => self.copy(entry, tar, |bytes| file.write_all(bytes))?,
            Some(sparse) => self.copy_sparse(entry, sparse, tar, &file)?,
        }
        self.bytes = self.bytes.saturating_add(entry.size.div_ceil(4096).saturating_mul(4096));
        meta::dress(file.as_fd(), entry)?;
        rustix::fs::futimens(&file, &meta::timestamps(entry.mtime)).map_err(failed(&entry.path, "set times"))
    }

    fn copy<R: Read>(
        &mut self,
        entry: &Entry,
        tar: &mut TarReader<R>,
        mut write: impl FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<(), Error> {
        loop {
            let count = tar.read_data(&mut self.buffer).map_err(|source| Error::LayerStream {
                layer: format!("entry {:?}", String::from_utf8_lossy(&entry.path)),
                source,
            })?;
            if count == 0 {
                return Ok(());
            }
            write(&self.buffer[..count]).map_err(|source| Error::LayerApply {
                entry: String::from_utf8_lossy(&entry.path).into_owned(),
                operation: "write",
                source,
            })?;
        }
    }

    fn copy_sparse<R: Read>(&mut self, entry: &Entry, sparse: &Sparse, tar: &mut TarReader<R>, file: &File) -> Result<(), Error> {
        rustix::fs::ftruncate(file, sparse.real_size).map_err(failed(&entry.path, "set the size"))?;
        let mut chunks = sparse.chunks.iter().copied().filter(|chunk| chunk.1 > 0);
        let mut chunk = chunks.next();
        self.copy(entry, tar, |mut bytes| {
            while let Some((offset, length)) = chunk {
                let count = usize::try_from(length).unwrap_or(usize::MAX).min(bytes.len());
                file.write_all_at(&bytes[..count], offset)?;
                bytes = &bytes[count..];
                chunk = match length - count as u64 {
                    0 => chunks.next(),
                    rest => Some((offset + count as u64, rest)),
                };
                if bytes.is_empty() {
                    break;
                }
            }
            Ok(())
        })
    }

    fn apply_link(&mut self, entry: &Entry, path: &[u8], parent: &OwnedFd, name: &[u8]) -> Result<(), Error> {
        let target = clean(&entry.link)?;
        if target.is_empty() {
            return Err(refused(&entry.path, "a hard link to the layer's root"));
        }
        if target == path {
            return Err(refused(&entry.path, "a hard link to itself"));
        }
        let (folder, last) = split(&target);
        let source = match find(&*self.folders.root(), folder) {
            Ok(source) => match rustix::fs::statat(&source, last, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if meta::is_dir(&stat) => return Err(refused(&entry.path, "a hard link to a folder")),
                Ok(stat) if !meta::is_whiteout(&stat) => Some(source),
                Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => None,
                Err(errno) => return Err(failed(&entry.path, "stat the link's target")(errno)),
            },
            Err(Errno::NOENT | Errno::NOTDIR) => None,
            Err(errno) => return Err(failed(&entry.path, "open the link's target")(errno)),
        };
        match source {
            Some(source) => {
                self.create(entry, parent, name, || rustix::fs::linkat(&source, last, parent, name, AtFlags::empty()))?;
                self.inodes -= 1;
            }
            None => {
                // What stood here before is replaced by the link, now or when the target is known.
                match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(_) => self.folders.remove(parent, name, &entry.path)?,
                    Err(Errno::NOENT) => {}
                    Err(errno) => return Err(failed(&entry.path, "stat")(errno)),
                }
                self.links.push(Link { path: path.to_vec(), target });
            }
        }
        Ok(())
    }

    fn apply_node(&mut self, entry: &Entry, parent: &OwnedFd, name: &[u8]) -> Result<(), Error> {
        let kind = match entry.kind {
            Kind::Char => FileType::CharacterDevice,
            Kind::Block => FileType::BlockDevice,
            _ => FileType::Fifo,
        };
        let device = match entry.kind {
            Kind::Fifo => 0,
            _ => rustix::fs::makedev(entry.device.0, entry.device.1),
        };
        self.create(entry, parent, name, || rustix::fs::mknodat(parent, name, kind, Mode::from_raw_mode(0o600), device))?;
        meta::dress_at(parent.as_fd(), name, entry, true)
    }

    /// Makes something new under a name, in place of what is there.
    fn create<T>(
        &mut self,
        entry: &Entry,
        parent: &OwnedFd,
        name: &[u8],
        make: impl Fn() -> Result<T, Errno>,
    ) -> Result<T, Error> {
        let made = match make() {
            Err(Errno::EXIST) => {
                self.folders.remove(parent, name, &entry.path)?;
                make()
            }
            made => made,
        };
        self.count(0);
        made.map_err(failed(&entry.path, "create"))
    }

    fn count(&mut self, bytes: u64) {
        self.inodes += 1;
        self.bytes += bytes;
    }
}
