//! Paths inside a folder that cannot lead out of it: every walk is one openat2 below the folder's descriptor. It never
//! resolves a path by text.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Dir, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// How often a walk that raced a rename is tried again.
const RETRIES: usize = 128;

/// A folder that is the root of all paths given to it.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
    resolve: ResolveFlags,
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Root {
    /// Symbolic links are followed as a process would that is chrooted there: absolute ones and `..` stay inside.
    #[must_use]
    pub fn in_root(fd: OwnedFd) -> Self {
        Self { fd, resolve: ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS }
    }

    /// No symbolic link is followed and no `..` may leave: for trees whose links are not ours to follow (image layers).
    #[must_use]
    pub fn strict(fd: OwnedFd) -> Self {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        Self { fd, resolve }
    }

    /// Opens the folder at `path` as a root that follows links inside ([`Root::in_root`]).
    pub fn open_dir(path: &Path) -> io::Result<Self> {
        Ok(Self::in_root(rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?))
    }

    /// The root's descriptor.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Opens a path below the root. The mode counts only when a file is made.
    pub fn open(&self, path: &Path, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        // With BENEATH an absolute path is an error; what starts with a slash here means the root.
        let relative = path.strip_prefix("/").unwrap_or(path);
        let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
        let mode = if flags.intersects(OFlags::CREATE | OFlags::TMPFILE) { mode } else { Mode::empty() };
        let mut tries = 0;
        loop {
            match rustix::fs::openat2(&self.fd, relative, flags | OFlags::CLOEXEC, mode, self.resolve) {
                Err(Errno::AGAIN | Errno::INTR) if tries < RETRIES => tries += 1,
                result => return Ok(result?),
            }
        }
    }

    /// Opens a path as a location only (O_PATH), links followed.
    pub fn open_path(&self, path: &Path) -> io::Result<OwnedFd> {
        self.open(path, OFlags::PATH, Mode::empty())
    }

    /// Opens a path as a location only; when its last part is a link, the link itself (even in a strict root).
    pub fn open_path_nofollow(&self, path: &Path) -> io::Result<OwnedFd> {
        if path.file_name().is_none() {
            return self.open_path(path);
        }
        let (parent, name) = self.split(path)?;
        Ok(rustix::fs::openat(&parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// Opens a folder for reading.
    pub fn open_folder(&self, path: &Path) -> io::Result<OwnedFd> {
        self.open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
    }

    /// Makes a folder and its missing parents; returns its location. An existing one keeps its mode. A dangling link on the way is an error.
    pub fn mkdir_all(&self, path: &Path, mode: Mode) -> io::Result<OwnedFd> {
        match self.open(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => return result,
        }
        let mut walked = PathBuf::new();
        let mut parent = self.open(Path::new("."), OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
        for component in path.components() {
            match component {
                Component::RootDir | Component::CurDir | Component::Prefix(_) => continue,
                Component::ParentDir => walked.push(".."),
                Component::Normal(name) => {
                    match rustix::fs::mkdirat(&parent, name, mode) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(errno) => return Err(errno.into()),
                    }
                    walked.push(name);
                }
            }
            parent = self.open(&walked, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
        }
        Ok(parent)
    }

    /// Makes a new file, open for reading and writing. What is there already (a link too) is an error.
    pub fn create_file(&self, path: &Path, mode: Mode) -> io::Result<OwnedFd> {
        let (parent, name) = self.split(path)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&parent, name, flags, mode)?)
    }

    /// Makes a symbolic link; its target is any text.
    pub fn symlink(&self, target: &Path, path: &Path) -> io::Result<()> {
        let (parent, name) = self.split(path)?;
        Ok(rustix::fs::symlinkat(target, &parent, name)?)
    }

    /// Makes another name for a file; a link is linked itself, not followed.
    pub fn link(&self, existing: &Path, path: &Path) -> io::Result<()> {
        let (from, from_name) = self.split(existing)?;
        let (to, to_name) = self.split(path)?;
        Ok(rustix::fs::linkat(&from, from_name, &to, to_name, AtFlags::empty())?)
    }

    /// Reads a symbolic link.
    pub fn readlink(&self, path: &Path) -> io::Result<PathBuf> {
        let (parent, name) = self.split(path)?;
        let target = rustix::fs::readlinkat(&parent, name, Vec::new())?;
        Ok(PathBuf::from(OsString::from_vec(target.into_bytes())))
    }

    /// The parent folder's location and the last name of a path: for calls that work on a name in a folder.
    pub fn split<'a>(&self, path: &'a Path) -> io::Result<(OwnedFd, &'a Path)> {
        let name = path.file_name().ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let parent = path.parent().unwrap_or(Path::new("."));
        Ok((self.open(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?, Path::new(name)))
    }

    /// Removes a file, a link or a whole folder. What is not there is no error.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        let (parent, name) = match self.split(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => result?,
        };
        remove_at(parent.as_fd(), name)
    }
}

/// Removes the entry of a folder, with all below it; links are removed, never followed. Depth costs descriptors, not stack.
pub fn remove_at(parent: BorrowedFd<'_>, name: &Path) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(errno) => return Err(errno.into()),
    }
    let mut stack: Vec<(OwnedFd, PathBuf)> = vec![(open_real_dir(parent, name)?, name.to_owned())];
    while let Some((dir, _)) = stack.last() {
        match first_blocking_child(dir)? {
            Some(child) => {
                let opened = open_real_dir(dir.as_fd(), &child)?;
                stack.push((opened, child));
            }
            None => {
                let Some((dir, name)) = stack.pop() else { break };
                drop(dir);
                let above = stack.last().map_or(parent, |(dir, _)| dir.as_fd());
                match rustix::fs::unlinkat(above, &name, AtFlags::REMOVEDIR) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
        }
    }
    Ok(())
}

fn open_real_dir(parent: BorrowedFd<'_>, name: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

/// Removes what can be removed in a folder; returns a sub-folder that is not empty.
fn first_blocking_child(dir: &OwnedFd) -> io::Result<Option<PathBuf>> {
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(errno) => return Err(errno.into()),
        }
        match rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::NOTEMPTY | Errno::EXIST) => {
                return Ok(Some(PathBuf::from(std::ffi::OsStr::from_bytes(name.to_bytes()))));
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(None)
}
