//! Owner, mode, extended attributes and times of single files: how they are set and copied.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::fs::{AtFlags, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::tar::Entry;
use crate::error::Error;

/// overlayfs reads these: an image must not be able to set them.
const RESERVED: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];
pub(crate) const OPAQUE: &str = "trusted.overlay.opaque";

/// A closure for `map_err` that names the entry and the call.
pub(crate) fn failed(entry: &[u8], operation: &'static str) -> impl Fn(Errno) -> Error + use<> {
    let entry = String::from_utf8_lossy(entry).into_owned();
    move |errno| Error::LayerApply { entry: entry.clone(), operation, source: errno.into() }
}

pub(crate) fn refused(entry: &[u8], reason: impl Into<String>) -> Error {
    Error::LayerEntry { entry: String::from_utf8_lossy(entry).into_owned(), reason: reason.into() }
}

pub(crate) fn timestamps((seconds, nanos): (i64, u32)) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: i64::from(nanos) };
    Timestamps { last_access: time, last_modification: time }
}

/// Owner before mode, because changing the owner clears set-id bits; attributes last, because both clear capabilities.
pub(crate) fn dress(fd: BorrowedFd<'_>, entry: &Entry) -> Result<(), Error> {
    let owner = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
    rustix::fs::fchown(fd, owner.0, owner.1).map_err(failed(&entry.path, "chown"))?;
    rustix::fs::fchmod(fd, Mode::from_raw_mode(entry.mode)).map_err(failed(&entry.path, "chmod"))?;
    for (name, value) in wanted(entry) {
        let done = rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty());
        tolerate(name, done).map_err(failed(&entry.path, "set extended attribute"))?;
    }
    Ok(())
}

/// As [`dress`] for what cannot be opened: links, devices, fifos.
pub(crate) fn dress_at(parent: BorrowedFd<'_>, name: &[u8], entry: &Entry, mode: bool) -> Result<(), Error> {
    let owner = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
    rustix::fs::chownat(parent, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).map_err(failed(&entry.path, "chown"))?;
    if mode {
        rustix::fs::chmodat(parent, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())
            .map_err(failed(&entry.path, "chmod"))?;
    }
    for (key, value) in wanted(entry) {
        let done = rustix::fs::lsetxattr(in_folder(parent, name), key, value, XattrFlags::empty());
        tolerate(key, done).map_err(failed(&entry.path, "set extended attribute"))?;
    }
    rustix::fs::utimensat(parent, name, &timestamps(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(failed(&entry.path, "set times"))
}

fn wanted(entry: &Entry) -> impl Iterator<Item = (&[u8], &[u8])> {
    entry
        .xattrs
        .iter()
        .map(|(name, value)| (name.as_slice(), value.as_slice()))
        .filter(|(name, _)| !RESERVED.iter().any(|prefix| name.starts_with(prefix)))
}

/// File systems without an attribute's class, and classes that are not ours to set, cost the attribute and not the image.
/// A capability is different: the program would not work.
fn tolerate(name: &[u8], done: Result<(), Errno>) -> Result<(), Errno> {
    match done {
        Err(Errno::NOTSUP | Errno::PERM) if name != b"security.capability" => {
            tracing::debug!(attribute = %String::from_utf8_lossy(name), "extended attribute is not supported here");
            Ok(())
        }
        other => other,
    }
}

/// A path to `name` in `parent`, for the calls that have no directory argument. Only its last component can be a
/// link, and those calls do not follow it.
pub(crate) fn in_folder(parent: BorrowedFd<'_>, name: &[u8]) -> Vec<u8> {
    [format!("/proc/self/fd/{}/", parent.as_raw_fd()).as_bytes(), name].concat()
}

pub(crate) fn set_opaque(dir: BorrowedFd<'_>, entry: &[u8]) -> Result<(), Error> {
    rustix::fs::fsetxattr(dir, OPAQUE, b"y", XattrFlags::empty()).map_err(failed(entry, "mark as opaque"))
}

pub(crate) fn is_opaque(dir: BorrowedFd<'_>) -> bool {
    let mut value = [0u8; 8];
    matches!(rustix::fs::fgetxattr(dir, OPAQUE, &mut value[..]), Ok(1) if value[0] == b'y')
}

/// Copies owner, mode, attributes and times from one open file to another.
pub(crate) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let stat = rustix::fs::fstat(from)?;
    rustix::fs::fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    for (name, value) in attributes(from)? {
        tolerate(&name, rustix::fs::fsetxattr(to, name.as_slice(), &value, XattrFlags::empty()))?;
    }
    rustix::fs::futimens(to, &timestamps((stat.st_mtime, stat.st_mtime_nsec as u32)))?;
    Ok(())
}

fn attributes(from: BorrowedFd<'_>) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut names = vec![0u8; 65536];
    let length = match rustix::fs::flistxattr(from, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Err(errno) => return Err(errno.into()),
    };
    let mut out = Vec::new();
    for name in names[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        if RESERVED.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        let mut value = vec![0u8; 65536];
        let length = rustix::fs::fgetxattr(from, name, &mut value[..])?;
        value.truncate(length);
        out.push((name.to_vec(), value));
    }
    Ok(out)
}

/// Whether a stat result is overlayfs' whiteout.
pub(crate) fn is_whiteout(stat: &rustix::fs::Stat) -> bool {
    rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::CharacterDevice && stat.st_rdev == 0
}

pub(crate) fn is_dir(stat: &rustix::fs::Stat) -> bool {
    rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir()
}

pub(crate) fn is_link(stat: &rustix::fs::Stat) -> bool {
    rustix::fs::FileType::from_raw_mode(stat.st_mode).is_symlink()
}

/// Makes overlayfs' whiteout.
pub(crate) fn make_whiteout(parent: impl AsFd, name: &[u8]) -> Result<(), Errno> {
    rustix::fs::mknodat(parent, name, rustix::fs::FileType::CharacterDevice, Mode::empty(), 0)
}
