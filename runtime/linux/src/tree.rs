//! Removing folders of any depth and width: what a container or an image left behind is hostile input.
//!
//! Neither the stack nor the number of open descriptors grows with the depth. std's `remove_dir_all` keeps a descriptor and a stack
//! frame a level: a container that nests enough folders makes it fail, and takes the agent's last descriptor meanwhile. What
//! lies deeper than [`MAX_DEPTH`] is first moved up here.
//! No link is followed. Whoever calls [`remove_all`] sees to it that nothing is mounted below; [`remove_all_on_one_mount`] asks
//! the kernel, at every folder.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

/// Levels that are open at once, two descriptors each. Trees that people make are less deep.
const MAX_DEPTH: usize = 48;
/// How often a folder is read again when somebody else still writes into it.
const MAX_PASSES: usize = 64;
const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A folder that is being emptied.
struct Level {
    fd: OwnedFd,
    entries: Dir,
    /// Its name in the folder above; empty for the topmost.
    name: Vec<u8>,
}

impl Level {
    fn open(parent: impl AsFd, name: &[u8], reach: Reach) -> Result<Self, Errno> {
        let fd = match reach {
            Reach::Anywhere => rustix::fs::openat(parent, name, FOLDER, Mode::empty())?,
            // A mount point is EXDEV, also where the same filesystem is mounted once more.
            Reach::OneMount => rustix::fs::openat2(parent, name, FOLDER, Mode::empty(), ResolveFlags::NO_XDEV)?,
        };
        let entries = Dir::read_from(&fd)?;
        Ok(Self { fd, entries, name: name.to_vec() })
    }
}

/// Whether a removal may go into other mounts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    Anywhere,
    OneMount,
}

/// As [`remove_all`], but what is mounted at the path or below it stays, with all that is in it, and is an error (EXDEV, EBUSY).
pub fn remove_all_on_one_mount(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(Errno::INVAL.into()) };
    let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::open(parent, folder, Mode::empty()) {
        Err(Errno::NOENT) => Ok(()),
        opened => Ok(remove_at(opened?.as_fd(), name.as_bytes(), Reach::OneMount, &mut |_| {})?),
    }
}

/// Removes a file, a link or a folder with everything below it. What is gone already is a success. Goes on after an error and
/// returns the first one.
pub fn remove_all(path: &Path) -> io::Result<()> {
    Ok(remove_all_at(CWD, path.as_os_str().as_bytes(), |_| {})?)
}

/// As [`remove_all`], for a name in an open folder. `entering` sees every folder before it is emptied.
pub fn remove_all_at(parent: BorrowedFd<'_>, name: &[u8], mut entering: impl FnMut(BorrowedFd<'_>)) -> Result<(), Errno> {
    remove_at(parent, name, Reach::Anywhere, &mut entering)
}

fn remove_at(parent: BorrowedFd<'_>, name: &[u8], reach: Reach, entering: &mut impl FnMut(BorrowedFd<'_>)) -> Result<(), Errno> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(errno) => return Err(errno),
    }
    let mut passes = 0;
    while passes < MAX_PASSES {
        let level = match Level::open(parent, name, reach) {
            Ok(level) => level,
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(errno),
        };
        // Moving up is progress, however deep the tree is: such a pass does not count.
        if empty(level, reach, entering)? {
            continue;
        }
        match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            // Somebody wrote meanwhile.
            Err(Errno::NOTEMPTY | Errno::EXIST) => passes += 1,
            Err(errno) => return Err(errno),
        }
    }
    Err(Errno::NOTEMPTY)
}

/// Empties a folder. True when something too deep was moved into it instead, to be removed by the next pass.
fn empty(top: Level, reach: Reach, entering: &mut impl FnMut(BorrowedFd<'_>)) -> Result<bool, Errno> {
    entering(top.fd.as_fd());
    let mut levels = vec![top];
    let mut first_error = None;
    let mut moved = 0u64;
    while let Some(level) = levels.last_mut() {
        let entry = match level.entries.next() {
            Some(Ok(entry)) => entry,
            ended => {
                if let Some(Err(errno)) = ended {
                    first_error.get_or_insert(errno);
                }
                if let Err(errno) = close(&mut levels) {
                    first_error.get_or_insert(errno);
                }
                continue;
            }
        };
        let name = entry.file_name().to_bytes();
        let done = match entry.file_type() {
            _ if name == b"." || name == b".." => Ok(()),
            FileType::Directory => descend(&mut levels, name, reach, &mut moved, entering),
            kind => match rustix::fs::unlinkat(&level.fd, name, AtFlags::empty()) {
                Err(Errno::NOENT) => Ok(()),
                Err(Errno::ISDIR | Errno::PERM) if kind == FileType::Unknown => {
                    descend(&mut levels, name, reach, &mut moved, entering)
                }
                done => done,
            },
        };
        if let Err(errno) = done {
            first_error.get_or_insert(errno);
        }
    }
    first_error.map_or(Ok(moved > 0), Err)
}

/// Leaves the deepest level and removes its folder, unless it is the topmost.
fn close(levels: &mut Vec<Level>) -> Result<(), Errno> {
    let (Some(done), Some(parent)) = (levels.pop(), levels.last()) else { return Ok(()) };
    match rustix::fs::unlinkat(&parent.fd, done.name.as_slice(), AtFlags::REMOVEDIR) {
        // Not empty: an error below is noted already, or somebody writes and the next pass sees it.
        Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
        done => done,
    }
}

/// Goes into a folder of the deepest level, or moves it up where that would be too deep.
fn descend(
    levels: &mut Vec<Level>,
    name: &[u8],
    reach: Reach,
    moved: &mut u64,
    entering: &mut impl FnMut(BorrowedFd<'_>),
) -> Result<(), Errno> {
    let Some(deepest) = levels.last() else { return Ok(()) };
    if levels.len() >= MAX_DEPTH {
        return move_up(levels, name, moved);
    }
    match Level::open(&deepest.fd, name, reach) {
        Ok(below) => {
            entering(below.fd.as_fd());
            levels.push(below);
            Ok(())
        }
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Moves a folder of the deepest level into the topmost, under a name that nobody has.
fn move_up(levels: &[Level], name: &[u8], moved: &mut u64) -> Result<(), Errno> {
    let (Some(top), Some(from)) = (levels.first(), levels.last()) else { return Ok(()) };
    for number in *moved.. {
        let to = format!(".deep-{number}");
        match rustix::fs::renameat_with(&from.fd, name, &top.fd, to.as_str(), RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {}
            done => {
                *moved = number + 1;
                return done;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a chain of `depth` folders named `d` below `top`, with a file in the last.
    fn nest(top: &Path, depth: usize) {
        let mut at = rustix::fs::openat(CWD, top, FOLDER, Mode::empty()).unwrap();
        for _ in 0..depth {
            rustix::fs::mkdirat(&at, "d", Mode::from_raw_mode(0o755)).unwrap();
            at = rustix::fs::openat(&at, "d", FOLDER, Mode::empty()).unwrap();
        }
        rustix::fs::openat(&at, "last", OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::from_raw_mode(0o600)).unwrap();
    }

    #[test]
    fn a_tree_deeper_than_a_stack_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let doomed = dir.path().join("doomed");
        std::fs::create_dir(&doomed).unwrap();
        nest(&doomed, 3_000);
        let path = doomed.clone();
        let small = std::thread::Builder::new().stack_size(64 << 10).spawn(move || remove_all(&path)).unwrap();
        small.join().unwrap().unwrap();
        assert!(!doomed.exists());
    }

    #[test]
    fn wide_and_deep_branches_go_together_and_names_like_ours_do_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let doomed = dir.path().join("doomed");
        for branch in ["a", "b", ".deep-0", ".deep-1"] {
            std::fs::create_dir_all(doomed.join(branch)).unwrap();
            nest(&doomed.join(branch), 3 * MAX_DEPTH);
        }
        remove_all(&doomed).unwrap();
        assert!(!doomed.exists());
    }

    #[test]
    fn a_link_is_removed_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("kept");
        std::fs::create_dir(&kept).unwrap();
        std::fs::write(kept.join("file"), "x").unwrap();
        let doomed = dir.path().join("doomed");
        std::fs::create_dir(&doomed).unwrap();
        std::os::unix::fs::symlink(&kept, doomed.join("inner")).unwrap();
        std::os::unix::fs::symlink(&kept, dir.path().join("outer")).unwrap();
        remove_all(&doomed).unwrap();
        remove_all(&dir.path().join("outer")).unwrap();
        remove_all(&dir.path().join("never was")).unwrap();
        assert!(kept.join("file").exists());
        assert!(!doomed.exists() && !dir.path().join("outer").is_symlink());
    }
}
