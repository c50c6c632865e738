//! Folders inside one root, found and made without ever leaving it.
//!
//! The kernel resolves what exists (openat2, RESOLVE_IN_ROOT); what is missing is made by a walk that opens one
//! component at a time without following links and expands links itself. Nobody else writes to the root meanwhile.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use berth_linux::tree::remove_all_at;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::meta;
use crate::error::Error;

const MAX_LINKS: usize = 40;
const DIR_PATH: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
pub(crate) const DIR_READ: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A root folder and what was made in it on the way.
pub(crate) struct Folders {
    root: Arc<OwnedFd>,
    last: Option<(Vec<u8>, Arc<OwnedFd>)>,
    /// Folders that no entry has described: inode → path from the root, without links.
    pub implied: HashMap<u64, Vec<u8>>,
    pub made: u64,
}

impl Folders {
    pub(crate) fn new(root: OwnedFd) -> Self {
        Folders { root: Arc::new(root), last: None, implied: HashMap::new(), made: 0 }
    }

    pub(crate) fn root(&self) -> Arc<OwnedFd> {
        self.root.clone()
    }

    /// To be called after anything was removed: names may mean other folders now.
    pub(crate) fn forget(&mut self) {
        self.last = None;
    }

    /// The folder that a clean path means, links inside the root followed. Missing ones are made.
    pub(crate) fn ensure(&mut self, path: &[u8]) -> Result<Arc<OwnedFd>, Error> {
        if path.is_empty() {
            return Ok(self.root.clone());
        }
        if let Some((last, fd)) = &self.last
            && last == path
        {
            return Ok(fd.clone());
        }
        let fd = match find(&*self.root, path) {
            Ok(fd) => Arc::new(fd),
            Err(Errno::NOENT | Errno::NOTDIR) => self.walk(path)?,
            Err(errno) => return Err(meta::failed(path, "open the parent folder")(errno)),
        };
        self.last = Some((path.to_vec(), fd.clone()));
        Ok(fd)
    }

    fn walk(&mut self, path: &[u8]) -> Result<Arc<OwnedFd>, Error> {
        let mut at: Vec<(Vec<u8>, Arc<OwnedFd>)> = Vec::new();
        let mut pending: VecDeque<Vec<u8>> = path.split(|&byte| byte == b'/').map(<[u8]>::to_vec).collect();
        let mut links = 0;
        while let Some(name) = pending.pop_front() {
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    at.pop();
                    continue;
                }
                _ => {}
            }
            let parent = at.last().map_or_else(|| self.root.clone(), |(_, fd)| fd.clone());
            match rustix::fs::openat(&*parent, name.as_slice(), DIR_PATH | OFlags::NOFOLLOW, Mode::empty()) {
                Ok(fd) => at.push((name, Arc::new(fd))),
                Err(Errno::NOENT) => {
                    let fd = self.make(&parent, &name, &at, path)?;
                    at.push((name, Arc::new(fd)));
                }
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    let stat = rustix::fs::statat(&*parent, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW)
                        .map_err(meta::failed(path, "stat a parent folder"))?;
                    if meta::is_link(&stat) {
                        links += 1;
                        if links > MAX_LINKS {
                            return Err(meta::failed(path, "open the parent folder")(Errno::LOOP));
                        }
                        let target = rustix::fs::readlinkat(&*parent, name.as_slice(), Vec::new())
                            .map_err(meta::failed(path, "read a link"))?;
                        let target = target.as_bytes();
                        if target.starts_with(b"/") {
                            at.clear();
                        }
                        for part in target.split(|&byte| byte == b'/').rev() {
                            pending.push_front(part.to_vec());
                        }
                    } else if meta::is_whiteout(&stat) {
                        // Removed and made anew by the same layer: what lies below must not show through.
                        rustix::fs::unlinkat(&*parent, name.as_slice(), AtFlags::empty())
                            .map_err(meta::failed(path, "replace a whiteout"))?;
                        let fd = self.make(&parent, &name, &at, path)?;
                        let dir = rustix::fs::openat(&fd, ".", DIR_READ, Mode::empty())
                            .map_err(meta::failed(path, "open the parent folder"))?;
                        meta::set_opaque(dir.as_fd(), path)?;
                        at.push((name, Arc::new(fd)));
                    } else {
                        return Err(meta::refused(path, "a parent is not a folder"));
                    }
                }
                Err(errno) => return Err(meta::failed(path, "open a parent folder")(errno)),
            }
        }
        Ok(at.last().map_or_else(|| self.root.clone(), |(_, fd)| fd.clone()))
    }

    fn make(&mut self, parent: &OwnedFd, name: &[u8], at: &[(Vec<u8>, Arc<OwnedFd>)], path: &[u8]) -> Result<OwnedFd, Error> {
        rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)).map_err(meta::failed(path, "make a parent folder"))?;
        rustix::fs::chmodat(parent, name, Mode::from_raw_mode(0o755), AtFlags::empty())
            .map_err(meta::failed(path, "chmod a parent folder"))?;
        let fd = rustix::fs::openat(parent, name, DIR_PATH | OFlags::NOFOLLOW, Mode::empty())
            .map_err(meta::failed(path, "open a parent folder"))?;
        let stat = rustix::fs::fstat(&fd).map_err(meta::failed(path, "stat a parent folder"))?;
        let mut canonical: Vec<u8> = Vec::new();
        for (part, _) in at {
            canonical.extend_from_slice(part);
            canonical.push(b'/');
        }
        canonical.extend_from_slice(name);
        self.implied.insert(stat.st_ino, canonical);
        self.made += 1;
        Ok(fd)
    }

    /// Removes whatever `name` is, folders with their content.
    pub(crate) fn remove(&mut self, parent: impl AsFd, name: &[u8], entry: &[u8]) -> Result<(), Error> {
        self.forget();
        let implied = &mut self.implied;
        let forget = |folder: BorrowedFd<'_>| {
            if let Ok(stat) = rustix::fs::fstat(folder) {
                implied.remove(&stat.st_ino);
            }
        };
        remove_all_at(parent.as_fd(), name, forget).map_err(meta::failed(entry, "replace"))
    }
}

/// An existing folder inside `root`.
pub(crate) fn find(root: impl AsFd, path: &[u8]) -> Result<OwnedFd, Errno> {
    let path: &[u8] = if path.is_empty() { b"." } else { path };
    rustix::fs::openat2(root, path, DIR_PATH, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

/// Splits a clean path into its folder and its last component.
pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

/// Without leading, doubled and trailing slashes and `.`; `..` is resolved as text, and refused when it leads out.
pub(crate) fn clean(path: &[u8]) -> Result<Vec<u8>, Error> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                if parts.pop().is_none() {
                    return Err(meta::refused(path, "the name leads out of the layer"));
                }
            }
            part => parts.push(part),
        }
    }
    Ok(parts.join(&b'/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cleaned_as_text_and_refused_when_they_lead_out() {
        let cases: [(&str, Option<&str>); 9] = [
            ("./", Some("")),
            ("/", Some("")),
            ("a//b/./c/", Some("a/b/c")),
            ("/etc/passwd", Some("etc/passwd")),
            ("a/../b", Some("b")),
            ("a/..", Some("")),
            ("../x", None),
            ("a/../../x", None),
            ("..", None),
        ];
        for (path, expected) in cases {
            assert_eq!(clean(path.as_bytes()).ok(), expected.map(|path| path.as_bytes().to_vec()), "{path}");
        }
    }
}
