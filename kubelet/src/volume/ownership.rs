//! Giving a volume to the pod's fsGroup: group, bits and setgid of everything in it. Works on descriptors: what a container that
//! writes the volume meanwhile puts in a place redirects nothing, and no other mount is entered.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

/// Levels that are open at once; deeper trees are an error by name.
const MAX_DEPTH: usize = 4096;
/// A change that takes longer is told of, and again every minute.
const FIRST_NEWS: Duration = Duration::from_secs(30);
const NEWS: Duration = Duration::from_secs(60);

/// What a volume's files are to have.
#[derive(Clone, Copy, Debug)]
pub struct Ownership {
    /// The group.
    pub group: u32,
    /// The volume is mounted read-only: the group needs no more than to read.
    pub read_only: bool,
    /// `fsGroupChangePolicy: OnRootMismatch`: nothing is done where the volume's own folder has group and bits already.
    pub only_on_mismatch: bool,
}

/// Gives the volume's folder and everything below it to the group.
pub fn apply(root: &Path, ownership: Ownership) -> io::Result<()> {
    let top = rustix::fs::open(root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let stat = rustix::fs::fstat(&top)?;
    if ownership.only_on_mismatch && matches(&stat, ownership) {
        return Ok(());
    }
    let mut news = Instant::now() + FIRST_NEWS;
    let mut done = 0u64;
    walk(&top, &mut |parent, name, stat| {
        done += 1;
        if Instant::now() >= news {
            news = Instant::now() + NEWS;
            tracing::info!(reason = "VolumePermissionChangeInProgress", volume = %root.display(), files = done, "permissions are being changed");
        }
        give(parent, name, stat, ownership)
    })?;
    // Last: a change that was cut short is a mismatch.
    give_to(&top, &stat, ownership)
}

/// The bits that a file or folder gets.
fn bits(stat: &Stat, ownership: Ownership) -> u32 {
    let is_dir = FileType::from_raw_mode(stat.st_mode).is_dir();
    let mode = if ownership.read_only { 0o440 } else { 0o660 };
    if is_dir { mode | 0o2110 } else { mode }
}

fn matches(stat: &Stat, ownership: Ownership) -> bool {
    let bits = bits(stat, ownership);
    stat.st_gid == ownership.group && stat.st_mode & bits == bits
}

fn give(parent: BorrowedFd<'_>, name: &CString, stat: &Stat, ownership: Ownership) -> io::Result<()> {
    if FileType::from_raw_mode(stat.st_mode).is_symlink() {
        let changed = rustix::fs::chownat(parent, name, None, Some(Gid::from_raw(ownership.group)), AtFlags::SYMLINK_NOFOLLOW);
        return gone_is_fine(changed.map_err(Into::into));
    }
    if matches(stat, ownership) {
        return Ok(());
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(parent, name, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        file => file?,
    };
    let stat = rustix::fs::fstat(&file)?;
    // Swapped for a link meanwhile: the link itself is of no interest.
    if FileType::from_raw_mode(stat.st_mode).is_symlink() { Ok(()) } else { give_to(&file, &stat, ownership) }
}

fn give_to(file: &OwnedFd, stat: &Stat, ownership: Ownership) -> io::Result<()> {
    rustix::fs::chownat(file, c"", None, Some(Gid::from_raw(ownership.group)), AtFlags::EMPTY_PATH)?;
    // After the owner: a change of owner takes bits away.
    let mode = Mode::from_raw_mode(stat.st_mode & 0o7777 | bits(stat, ownership));
    Ok(rustix::fs::chmod(format!("/proc/self/fd/{}", file.as_raw_fd()), mode)?)
}

fn gone_is_fine(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Sees everything below a folder, folders before what is in them; other mounts are left out.
pub(super) fn walk(top: &OwnedFd, see: &mut dyn FnMut(BorrowedFd<'_>, &CString, &Stat) -> io::Result<()>) -> io::Result<()> {
    let mut levels = vec![(top.try_clone()?, names(top)?)];
    while let Some((folder, left)) = levels.last_mut() {
        let Some(name) = left.pop() else {
            levels.pop();
            continue;
        };
        let stat = match rustix::fs::statat(&*folder, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            stat => stat?,
        };
        if !FileType::from_raw_mode(stat.st_mode).is_dir() {
            see(folder.as_fd(), &name, &stat)?;
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let below = match rustix::fs::openat2(&*folder, &name, flags, Mode::empty(), ResolveFlags::NO_XDEV) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => continue,
            below => below?,
        };
        see(folder.as_fd(), &name, &stat)?;
        if levels.len() >= MAX_DEPTH {
            return Err(io::Error::other(format!("folders are nested deeper than {MAX_DEPTH}")));
        }
        let names = names(&below)?;
        levels.push((below, names));
    }
    Ok(())
}

fn names(folder: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let name = entry?.file_name().to_owned();
        if !matches!(name.as_bytes(), b"." | b"..") {
            names.push(name);
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn everything_gets_group_and_bits_and_links_lead_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("v"), dir.path().join("outside"));
        fs::create_dir_all(root.join("a/b")).unwrap();
        for file in [&root.join("a/b/file"), &outside] {
            fs::write(file, "x").unwrap();
            fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
        }
        fs::set_permissions(root.join("a"), fs::Permissions::from_mode(0o700)).unwrap();
        symlink(&outside, root.join("link")).unwrap();
        let group = rustix::process::getgid().as_raw();
        let ownership = Ownership { group, read_only: false, only_on_mismatch: true };
        apply(&root, ownership).unwrap();
        assert_eq!((mode(&root.join("a/b/file")), mode(&root.join("a")), mode(&outside)), (0o660, 0o2770, 0o600));
        assert_eq!(mode(&root) & 0o2770, 0o2770);
        assert_eq!(fs::metadata(root.join("a/b")).unwrap().gid(), group);
        // The folder itself fits: nothing below is looked at; without the policy everything is.
        fs::set_permissions(root.join("a/b/file"), fs::Permissions::from_mode(0o600)).unwrap();
        apply(&root, ownership).unwrap();
        assert_eq!(mode(&root.join("a/b/file")), 0o600);
        apply(&root, Ownership { only_on_mismatch: false, read_only: true, ..ownership }).unwrap();
        assert_eq!(mode(&root.join("a/b/file")), 0o640);
    }
}
