//! The way into a cgroup, held open for whoever makes processes in it again and again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::cgroup::Cgroup;
use crate::{Error, Result};

/// The `cgroup.procs` files of a cgroup. Joining by them is one write for each hierarchy and looks up no path, which with the dozen hierarchies
/// of version 1 costs more than the joining itself.
#[derive(Debug)]
pub struct Doors {
    cgroup: Cgroup,
    /// In the order of [`Cgroup::joined_dirs`].
    files: Vec<OwnedFd>,
}

impl Doors {
    /// Opens them. They do not keep the cgroup from being removed.
    pub fn open(cgroup: Cgroup) -> Result<Self> {
        let open = |dir: &Path| {
            let path = dir.join("cgroup.procs");
            let opened = rustix::fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
            opened.map_err(|errno| Error::Attach { pid: 0, path: dir.to_owned(), source: errno.into() })
        };
        let files = cgroup.joined_dirs().map(open).collect::<Result<_>>()?;
        Ok(Self { cgroup, files })
    }

    /// Puts the calling process into the cgroup, in every hierarchy.
    pub fn enter_self(&self) -> Result<()> {
        for (dir, file) in self.cgroup.joined_dirs().zip(&self.files) {
            let written = rustix::io::retry_on_intr(|| rustix::io::write(file, b"0"));
            written.map_err(|errno| Error::Attach { pid: 0, path: dir.to_owned(), source: errno.into() })?;
        }
        Ok(())
    }

    /// Their descriptors.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.files.iter().map(AsFd::as_fd)
    }
}
