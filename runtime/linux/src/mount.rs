//! Mounts as descriptors: the mount API of Linux 5.2 and later, with the classic calls where only they can do it. Errors carry what
//! the kernel wrote into the filesystem context. It decides nothing about what is mounted where.

mod context;
mod table;

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

use rustix::fs::{Mode, OFlags};
use rustix::mount::OpenTreeFlags;
pub use rustix::mount::{MoveMountFlags, UnmountFlags};

use crate::syscall::check;
use crate::{Error, Result};

pub use context::{FsContext, fs_context};
pub use table::{MountEntry, mounts, parse_mountinfo};

bitflags::bitflags! {
    /// Attributes of one mount (not of its filesystem).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct MountAttrs: u64 {
        /// Read-only.
        const RDONLY = 0x1;
        /// Set-user-ID bits mean nothing.
        const NOSUID = 0x2;
        /// Device nodes cannot be opened.
        const NODEV = 0x4;
        /// Nothing can be executed.
        const NOEXEC = 0x8;
        /// Access times are never written. (Access times are one choice of three in [`MountAttrs::ATIME`]; none means relative.)
        const NOATIME = 0x10;
        /// Access times are always written.
        const STRICTATIME = 0x20;
        /// The mask of the choice above: to be cleared when one is set by [`mount_setattr`].
        const ATIME = 0x70;
        /// Access times of folders are never written.
        const NODIRATIME = 0x80;
        /// Ids are mapped by a user namespace. Given by the `userns` argument, not by callers.
        const IDMAP = 0x10_0000;
        /// Symbolic links are not followed.
        const NOSYMFOLLOW = 0x20_0000;
    }
}

/// How mounts below a mount spread to its peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// Both ways.
    Shared,
    /// From the peers to here.
    Slave,
    /// Not at all.
    Private,
    /// Not at all, and it cannot be bound elsewhere.
    Unbindable,
}

impl Propagation {
    fn flag(self) -> u64 {
        match self {
            Self::Shared => libc::MS_SHARED,
            Self::Slave => libc::MS_SLAVE,
            Self::Private => libc::MS_PRIVATE,
            Self::Unbindable => libc::MS_UNBINDABLE,
        }
    }
}

/// What [`mount_setattr`] changes.
#[derive(Debug, Clone, Copy, Default)]
pub struct AttrChange<'a> {
    /// Attributes to set.
    pub set: MountAttrs,
    /// Attributes to clear.
    pub clear: MountAttrs,
    /// Propagation to change to.
    pub propagation: Option<Propagation>,
    /// The user namespace whose maps the mount's ids go through. Only for a mount that is attached nowhere.
    pub userns: Option<BorrowedFd<'a>>,
}

#[repr(C)]
struct RawMountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

fn c_path(path: &OsStr) -> io::Result<CString> {
    CString::new(path.as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// A descriptor of the mount at a path below `dir` (absolute paths ignore it; the empty path is `dir` itself). With `clone` it is a new, detached
/// mount of the same tree (a bind); `recursive` takes the mounts below it along.
pub fn open_tree(dir: BorrowedFd<'_>, path: &Path, clone: bool, recursive: bool) -> Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if clone {
        flags |= OpenTreeFlags::OPEN_TREE_CLONE;
    }
    if clone && recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(dir, path, flags)
        .map_err(|e| Error::OpenTree { subject: path.to_string_lossy().into_owned(), source: e.into() })
}

/// Attaches a detached mount (or moves an attached one) to a path below `to_dir`. An empty path means `to_dir` itself: the race-free form,
/// with a descriptor from [`crate::beneath::Root`].
pub fn move_mount(from: BorrowedFd<'_>, to_dir: BorrowedFd<'_>, to_path: &Path, flags: MoveMountFlags) -> Result<()> {
    let mut flags = flags | MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    if to_path.as_os_str().is_empty() {
        flags |= MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    }
    rustix::mount::move_mount(from, "", to_dir, to_path, flags).map_err(|e| {
        let subject = match to_path.as_os_str().is_empty() {
            true => "the given descriptor".to_owned(),
            false => to_path.to_string_lossy().into_owned(),
        };
        Error::MoveMount { subject, source: e.into() }
    })
}

/// Changes the attributes of a mount, or of it and all below it: all or nothing. The empty path is the descriptor itself.
pub fn mount_setattr(fd: BorrowedFd<'_>, path: &Path, recursive: bool, change: AttrChange<'_>) -> Result<()> {
    let inner = || {
        let path = c_path(path.as_os_str())?;
        let mut attr = RawMountAttr {
            attr_set: change.set.bits(),
            attr_clr: change.clear.bits(),
            propagation: change.propagation.map_or(0, Propagation::flag),
            userns_fd: 0,
        };
        if let Some(userns) = change.userns {
            attr.attr_set |= MountAttrs::IDMAP.bits();
            attr.userns_fd = userns.as_raw_fd() as u64;
        }
        let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
        // SAFETY: the path is a C string and the structure is version 0 of mount_attr, whose size is passed; both outlive the call.
        check(unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                fd.as_raw_fd(),
                path.as_ptr(),
                flags,
                ptr::from_ref(&attr),
                size_of::<RawMountAttr>(),
            )
        })
    };
    let fail = |source| Error::MountSetattr { subject: path.to_string_lossy().into_owned(), source };
    inner().map(drop).map_err(fail)
}

/// The classic mount call, with the classic `MS_*` flags. For remounts and for filesystems that know no other way.
pub fn mount_legacy(source: Option<&OsStr>, target: &Path, fstype: Option<&str>, flags: u64, data: Option<&OsStr>) -> Result<()> {
    let pointer = |text: &Option<CString>| text.as_ref().map_or(ptr::null(), |text| text.as_ptr());
    let inner = || {
        let source = source.map(c_path).transpose()?;
        let fstype = fstype.map(|fstype| c_path(OsStr::new(fstype))).transpose()?;
        let data = data.map(c_path).transpose()?;
        let target = c_path(target.as_os_str())?;
        // SAFETY: each pointer is null or a C string that outlives the call; no filesystem here takes binary data.
        check(unsafe { libc::mount(pointer(&source), target.as_ptr(), pointer(&fstype), flags, pointer(&data).cast()) }.into())
    };
    let fail = |source| Error::Mount { subject: target.to_string_lossy().into_owned(), source };
    inner().map(drop).map_err(fail)
}

/// Removes a mount.
pub fn umount(path: &Path, flags: UnmountFlags) -> Result<()> {
    rustix::mount::unmount(path, flags)
        .map_err(|e| Error::Unmount { subject: path.to_string_lossy().into_owned(), source: e.into() })
}

/// Makes the mount at `new_root` the root of this mount namespace and of the process, and detaches the old root with all that is below
/// it. It needs no folder for the old root, and nothing of it stays reachable.
pub fn pivot_root(new_root: BorrowedFd<'_>) -> Result<()> {
    let inner = || -> io::Result<()> {
        let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
        let old_root = rustix::fs::open(c"/", flags, Mode::empty())?;
        rustix::process::fchdir(new_root)?;
        // Both arguments the same: the old root is stacked on the new one and is detached from there.
        rustix::process::pivot_root(c".", c".")?;
        rustix::process::fchdir(&old_root)?;
        // Without this, the unmount would spread to peers of the old root in other namespaces.
        let attr = AttrChange { propagation: Some(Propagation::Slave), ..AttrChange::default() };
        let spread = match mount_setattr(rustix::fs::CWD, Path::new("."), true, attr) {
            // Kernels before 5.12.
            Err(e) if e.raw_errno() == Some(libc::ENOSYS) => {
                mount_legacy(None, Path::new("."), None, libc::MS_SLAVE | libc::MS_REC, None)
            }
            result => result,
        };
        spread.map_err(|e| io::Error::from_raw_os_error(e.raw_errno().unwrap_or(libc::EIO)))?;
        rustix::mount::unmount(c".", UnmountFlags::DETACH)?;
        rustix::process::chdir(c"/")?;
        Ok(())
    };
    inner().map_err(|source| Error::PivotRoot { subject: crate::memfd::proc_path(new_root), source })
}
