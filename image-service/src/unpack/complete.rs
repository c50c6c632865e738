//! Completes a layer that depends on those below it, once they are finished: implied folders get the metadata that
//! the lower ones have, hard links into lower layers get a copy of the file. The result belongs to this chain only.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::apply::{Applied, Link};
use super::merged::{Found, Merged};
use super::meta::{self, failed, refused};
use super::resolve::{DIR_READ, Folders, find, split};
use crate::error::Error;

/// Completes `applied` over `parents` and gives its folders their times.
pub(crate) fn complete(applied: &mut Applied, parents: &Merged) -> Result<(), Error> {
    let root = rustix::io::dup(&*applied.root).map_err(failed(b"/", "duplicate the root"))?;
    let mut layer = Completion { folders: Folders::new(root), parents };
    let mut pending = std::mem::take(&mut applied.implied);
    pending.sort();
    let mut at = 0;
    while at < pending.len() {
        let path = pending[at].clone();
        at += 1;
        if let Some(target) = layer.dress_implied(&path)? {
            layer.relocate(&path, &target)?;
            let rewrite = |name: &mut Vec<u8>| {
                if let Some(rest) = below(name, &path) {
                    *name = [target.as_slice(), rest].concat();
                }
            };
            pending[at..].iter_mut().for_each(rewrite);
            applied.links.iter_mut().for_each(|link| rewrite(&mut link.path));
            applied.dirs.iter_mut().for_each(|dir| rewrite(&mut dir.0));
        }
    }
    let mut copied = BTreeSet::new();
    for link in std::mem::take(&mut applied.links) {
        layer.link(&link, &mut copied)?;
        applied.bytes += 4096;
        applied.inodes += 1;
    }
    // Folders made on the way for copies have lower ones to take after, or none.
    let mut made: Vec<Vec<u8>> = layer.folders.implied.values().cloned().collect();
    made.sort();
    for path in made {
        layer.dress_implied(&path)?;
    }
    applied.set_times()
}

struct Completion<'a> {
    folders: Folders,
    parents: &'a Merged,
}

impl Completion<'_> {
    /// Gives an implied folder its lower one's metadata, or the default. Where the layers below have a link
    /// instead, the path that it means is returned: the archive's entries belong there.
    fn dress_implied(&self, path: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        let root = self.folders.root();
        let dir = match find(&*root, path).and_then(|dir| rustix::fs::openat(dir, ".", DIR_READ, Mode::empty())) {
            Ok(dir) => dir,
            // Moved or replaced meanwhile.
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(errno) => return Err(failed(path, "open an implied folder")(errno)),
        };
        let lower = if self.is_cut_off(path)? { None } else { self.parents.at(path).map_err(failed(path, "look below"))? };
        match lower {
            Some(found) if meta::is_dir(&found.stat) => {
                let lower =
                    rustix::fs::openat(&found.fd, ".", DIR_READ, Mode::empty()).map_err(failed(path, "open the folder below"))?;
                meta::copy(lower.as_fd(), dir.as_fd()).map_err(|source| Error::LayerApply {
                    entry: String::from_utf8_lossy(path).into_owned(),
                    operation: "copy the metadata of the folder below",
                    source,
                })?;
                Ok(None)
            }
            Some(found) if meta::is_link(&found.stat) => {
                let target = self.parents.resolve(path).map_err(failed(path, "follow the link below"))?;
                Ok((target != path).then_some(target))
            }
            _ => {
                rustix::fs::futimens(&dir, &meta::timestamps((0, 0))).map_err(failed(path, "set times"))?;
                Ok(None)
            }
        }
    }

    /// Whether the layer itself hides what is below a path.
    fn is_cut_off(&self, path: &[u8]) -> Result<bool, Error> {
        let root = self.folders.root();
        let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at).chain([path.len()]);
        for end in ends {
            let dir = find(&*root, &path[..end])
                .and_then(|dir| rustix::fs::openat(dir, ".", DIR_READ, Mode::empty()))
                .map_err(failed(path, "open a folder"))?;
            if meta::is_opaque(dir.as_fd()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Moves an implied folder's content to where the link below it leads.
    fn relocate(&mut self, path: &[u8], target: &[u8]) -> Result<(), Error> {
        if target == path || below(target, path).is_some() {
            return Err(refused(path, "the layers below have a link to inside itself here"));
        }
        let to = self.folders.ensure(target)?;
        let (folder, name) = split(path);
        let parent = self.folders.ensure(folder)?;
        self.folders.forget();
        let from = rustix::fs::openat(&*parent, name, DIR_READ, Mode::empty()).map_err(failed(path, "open the folder"))?;
        self.merge(&from, &to, path)?;
        rustix::fs::unlinkat(&*parent, name, AtFlags::REMOVEDIR).map_err(failed(path, "remove the implied folder"))
    }

    fn merge(&mut self, from: &OwnedFd, to: &OwnedFd, path: &[u8]) -> Result<(), Error> {
        let list = rustix::fs::Dir::read_from(from).map_err(failed(path, "list the folder"))?;
        let names: Vec<_> = list
            .map(|item| item.map(|item| item.file_name().to_bytes().to_vec()))
            .collect::<Result<_, _>>()
            .map_err(failed(path, "list the folder"))?;
        for name in names.iter().map(Vec::as_slice).filter(|name| !matches!(*name, b"." | b"..")) {
            let source = rustix::fs::openat(from, name, DIR_READ, Mode::empty());
            let present = rustix::fs::openat(to, name, DIR_READ, Mode::empty());
            match (source, present) {
                (Ok(source), Ok(present)) => {
                    self.merge(&source, &present, path)?;
                    rustix::fs::unlinkat(from, name, AtFlags::REMOVEDIR).map_err(failed(path, "remove a merged folder"))?;
                }
                (_, present) => {
                    let exists = rustix::fs::statat(to, name, AtFlags::SYMLINK_NOFOLLOW).is_ok();
                    if exists || present.is_ok() {
                        self.folders.remove(to, name, path)?;
                    }
                    rustix::fs::renameat(from, name, to, name).map_err(failed(path, "move to where the link leads"))?;
                }
            }
        }
        Ok(())
    }

    /// Makes one hard link into the layers below: the file is copied up to its own path first, so that both names
    /// stay one file, as they would in a mounted overlay.
    fn link(&mut self, link: &Link, copied: &mut BTreeSet<Vec<u8>>) -> Result<(), Error> {
        let (folder, name) = split(&link.path);
        let parent = self.folders.ensure(folder)?;
        let (target_folder, target_name) = split(&link.target);
        let resolved = self.parents.resolve(target_folder).map_err(failed(&link.path, "look below"))?;
        let target: Vec<u8> =
            if resolved.is_empty() { target_name.to_vec() } else { [&resolved, b"/".as_slice(), target_name].concat() };
        let (target_folder, target_name) = split(&target);
        let own = find(&*self.folders.root(), target_folder).ok();
        let present = own.as_ref().and_then(|dir| {
            rustix::fs::statat(dir, target_name, AtFlags::SYMLINK_NOFOLLOW).ok().filter(|stat| !meta::is_whiteout(stat))
        });
        if !copied.contains(&target) {
            match self.parents.at(&target).map_err(failed(&link.path, "look below"))? {
                Some(found) if meta::is_dir(&found.stat) => {
                    return Err(refused(&link.path, "a hard link to a folder of a lower layer"));
                }
                // The layer has its own file there by now, or hides it: the link alone keeps the lower one.
                Some(found) if present.is_some() || own.as_ref().is_some_and(|dir| hides(dir, target_name)) => {
                    copied.insert(link.path.clone());
                    return copy_up(&found, &parent, name, &link.path);
                }
                Some(found) => {
                    let own = self.folders.ensure(target_folder)?;
                    copy_up(&found, &own, target_name, &link.path)?;
                    copied.insert(target.clone());
                }
                None if present.is_some() => {}
                None => {
                    return Err(refused(
                        &link.path,
                        format!("a hard link to {:?}, which no layer has", String::from_utf8_lossy(&link.target)),
                    ));
                }
            }
        }
        let own = self.folders.ensure(target_folder)?;
        copied.insert(link.path.clone());
        rustix::fs::linkat(&*own, target_name, &*parent, name, AtFlags::empty()).map_err(failed(&link.path, "link"))
    }
}

fn hides(dir: &OwnedFd, name: &[u8]) -> bool {
    rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| meta::is_whiteout(&stat))
}

/// Copies something that is no folder, with everything that belongs to it.
fn copy_up(found: &Found, parent: &OwnedFd, name: &[u8], entry: &[u8]) -> Result<(), Error> {
    let kind = FileType::from_raw_mode(found.stat.st_mode);
    if kind == FileType::RegularFile {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&found.fd));
        let read = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(failed(entry, "open the file below"))?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let write =
            rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o600)).map_err(failed(entry, "create a copy"))?;
        let (mut from, mut to) = (std::fs::File::from(read), std::fs::File::from(write));
        return std::io::copy(&mut from, &mut to).and_then(|_| meta::copy(from.as_fd(), to.as_fd())).map_err(|source| {
            Error::LayerApply {
                entry: String::from_utf8_lossy(entry).into_owned(),
                operation: "copy from the layer below",
                source,
            }
        });
    }
    let stat = &found.stat;
    if kind.is_symlink() {
        let target = rustix::fs::readlinkat(&found.fd, "", Vec::new()).map_err(failed(entry, "read the link below"))?;
        rustix::fs::symlinkat(target.as_c_str(), parent, name).map_err(failed(entry, "create a copy"))?;
    } else {
        rustix::fs::mknodat(parent, name, kind, Mode::from_raw_mode(0o600), stat.st_rdev)
            .map_err(failed(entry, "create a copy"))?;
    }
    let owner = (rustix::fs::Uid::from_raw(stat.st_uid), rustix::fs::Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(parent, name, Some(owner.0), Some(owner.1), AtFlags::SYMLINK_NOFOLLOW).map_err(failed(entry, "chown"))?;
    if !kind.is_symlink() {
        rustix::fs::chmodat(parent, name, Mode::from_raw_mode(stat.st_mode & 0o7777), AtFlags::empty())
            .map_err(failed(entry, "chmod"))?;
    }
    let time = meta::timestamps((stat.st_mtime, stat.st_mtime_nsec as u32));
    rustix::fs::utimensat(parent, name, &time, AtFlags::SYMLINK_NOFOLLOW).map_err(failed(entry, "set times"))
}

/// The rest of `name`, with its slash, when it is inside `folder`.
fn below<'a>(name: &'a [u8], folder: &[u8]) -> Option<&'a [u8]> {
    name.strip_prefix(folder).filter(|rest| rest.first() == Some(&b'/'))
}
