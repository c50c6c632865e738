//! Covering paths so that they cannot be read or written. What is covered is a descriptor that was resolved inside the
//! root: a link that the image or a volume put there leads nowhere else.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use berth_linux::beneath::Root;
use berth_linux::mount::{self, MountAttrs, MoveMountFlags};
use rustix::fs::{FileType, Mode, OFlags};

use super::rootfs::{attach, set_attributes};
use super::{Done, During, Failure};
use crate::plan::Change;

/// What covers.
#[derive(Default)]
pub(super) struct Covers {
    /// The machine's /dev/null.
    null: Option<OwnedFd>,
    /// An empty folder that is attached somewhere: further covers are clones of it.
    empty: Option<OwnedFd>,
}

/// The path inside the root, or None when there is no such thing (which needs no cover).
fn resolve(root: &Root, path: &Path) -> Done<Option<OwnedFd>> {
    match root.open_path(path) {
        Ok(fd) => Ok(Some(fd)),
        // Not there, not a folder on the way, or a chain of links that leads nowhere.
        Err(error) if matches!(error.raw_os_error(), Some(2 | 20 | 40)) => Ok(None),
        Err(error) => Err(error).during(format_args!("open {}", path.display())),
    }
}

/// Covers a path: a file with the null device, a folder with an empty one that cannot be written.
pub(super) fn mask(root: &Root, path: &Path, covers: &mut Covers) -> Done {
    let Some(target) = resolve(root, path)? else { return Ok(()) };
    let what = || format!("mask {}", path.display());
    let stat = rustix::fs::fstat(&target).during(what())?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        let null = match covers.null.take() {
            Some(null) => null,
            None => open_null()?,
        };
        let tree = mount::open_tree(null.as_fd(), Path::new(""), true, false).during(what())?;
        covers.null = Some(null);
        return attach(tree.as_fd(), target.as_fd()).during(what());
    }
    let tree = match &covers.empty {
        Some(empty) => mount::open_tree(empty.as_fd(), Path::new(""), true, false).during(what())?,
        None => empty_folder().during(what())?,
    };
    attach(tree.as_fd(), target.as_fd()).during(what())?;
    covers.empty.get_or_insert(tree);
    Ok(())
}

/// The machine's null device, checked to be that.
fn open_null() -> Done<OwnedFd> {
    let fd = rustix::fs::open("/dev/null", OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .during("open /dev/null")?;
    let stat = rustix::fs::fstat(&fd).during("stat /dev/null")?;
    match FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == rustix::fs::makedev(1, 3) {
        true => Ok(fd),
        false => Err(Failure::new("/dev/null of this machine is not the null device")),
    }
}

fn empty_folder() -> berth_linux::Result<OwnedFd> {
    let context = mount::fs_context("tmpfs")?;
    context.set_string("nr_blocks", "1")?.set_string("mode", "755")?.create()?;
    context.mount(MountAttrs::RDONLY | MountAttrs::NOSUID | MountAttrs::NODEV | MountAttrs::NOEXEC)
}

/// Makes a path and all below it unwritable.
pub(super) fn read_only(root: &Root, path: &Path) -> Done {
    let Some(target) = resolve(root, path)? else { return Ok(()) };
    let what = || format!("make {} read-only", path.display());
    let tree = mount::open_tree(target.as_fd(), Path::new(""), true, true).during(what())?;
    let change = Change { set: MountAttrs::RDONLY, clear: MountAttrs::empty() };
    let later = set_attributes(tree.as_fd(), true, change).during(what())?;
    move_onto(tree.as_fd(), target.as_fd()).during(what())?;
    later.finish(tree.as_fd()).during(what())
}

fn move_onto(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> berth_linux::Result<()> {
    mount::move_mount(tree, target, Path::new(""), MoveMountFlags::empty())
}
