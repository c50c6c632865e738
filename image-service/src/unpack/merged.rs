//! The view that finished layers give together, read without mounting them: what overlayfs would show.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::meta;
use super::resolve::DIR_READ;

const MAX_LINKS: usize = 40;

/// Finished layers' folders, the top one first.
pub(crate) struct Merged {
    layers: Vec<OwnedFd>,
}

/// Something that the merged view shows.
pub(crate) struct Found {
    /// `O_PATH`, not followed when it is a link.
    pub fd: OwnedFd,
    pub stat: Stat,
}

impl Merged {
    pub(crate) fn new(layers: Vec<OwnedFd>) -> Self {
        Merged { layers }
    }

    /// What stands at a path without links in its folders.
    pub(crate) fn at(&self, path: &[u8]) -> Result<Option<Found>, Errno> {
        let mut live: Vec<&OwnedFd> = self.layers.iter().collect();
        let mut end = 0;
        loop {
            let last = match path[end..].iter().position(|&byte| byte == b'/') {
                Some(slash) => {
                    end += slash;
                    false
                }
                None => {
                    end = path.len();
                    true
                }
            };
            let mut top = None;
            let mut folders = Vec::new();
            for layer in live {
                let Some(found) = open(layer, &path[..end])? else {
                    continue;
                };
                if meta::is_whiteout(&found.stat) {
                    break;
                }
                if !meta::is_dir(&found.stat) {
                    top.get_or_insert(found);
                    break;
                }
                folders.push(layer);
                let opaque =
                    rustix::fs::openat(&found.fd, ".", DIR_READ, Mode::empty()).is_ok_and(|dir| meta::is_opaque(dir.as_fd()));
                top.get_or_insert(found);
                if opaque {
                    break;
                }
            }
            if last || folders.is_empty() {
                return Ok(if last { top } else { None });
            }
            live = folders;
            end += 1;
        }
    }

    /// Resolves all links in a path, the last component's too, inside the view. What does not exist is kept as text.
    pub(crate) fn resolve(&self, path: &[u8]) -> Result<Vec<u8>, Errno> {
        let mut done: Vec<Vec<u8>> = Vec::new();
        let mut pending: VecDeque<Vec<u8>> = path.split(|&byte| byte == b'/').map(<[u8]>::to_vec).collect();
        let mut links = 0;
        while let Some(name) = pending.pop_front() {
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    done.pop();
                    continue;
                }
                _ => done.push(name),
            }
            if let Some(found) = self.at(&done.join(&b'/'))?
                && meta::is_link(&found.stat)
            {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::LOOP);
                }
                done.pop();
                let target = rustix::fs::readlinkat(&found.fd, "", Vec::new())?;
                let target = target.as_bytes();
                if target.starts_with(b"/") {
                    done.clear();
                }
                for part in target.split(|&byte| byte == b'/').rev() {
                    pending.push_front(part.to_vec());
                }
            }
        }
        Ok(done.join(&b'/'))
    }
}

fn open(layer: &OwnedFd, path: &[u8]) -> Result<Option<Found>, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    match rustix::fs::openat2(layer, path, flags, Mode::empty(), resolve) {
        Ok(fd) => {
            let stat = rustix::fs::fstat(&fd)?;
            Ok(Some(Found { fd, stat }))
        }
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(errno) => Err(errno),
    }
}
