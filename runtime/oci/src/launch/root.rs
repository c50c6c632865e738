//! The root filesystem as a detached tree: a folder of the machine, or an overlay mounted for this container alone.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use berth_linux::memfd::proc_path;
use berth_linux::mount::{self, FsContext, MountAttrs, MoveMountFlags, Propagation};
use berth_linux::ns;
use berth_linux::process::{CloneArgs, CloneFlags, Fork, clone3, exit_now};
use rustix::fs::{CWD, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::RootSource;
use super::trees::idmap_tree;
use crate::Error;
use crate::channel::{Channel, Report};

/// The longest value that the new mount API takes.
const MAX_VALUE: usize = 255;

/// Opens or mounts the root, detached. `userns`: the user namespace that its lower layers are mapped into, and its root's ids
/// outside. `label`: the SELinux label of an overlay's files. Only a process with one thread may call it.
pub fn open_root(
    source: RootSource,
    path: Option<&Path>,
    userns: Option<(BorrowedFd<'_>, (u32, u32))>,
    label: Option<&str>,
) -> Result<OwnedFd, Error> {
    match (source, path) {
        (RootSource::Spec, path) => {
            let path = path.unwrap_or(Path::new(""));
            mount::open_tree(CWD, path, true, true).map_err(|source| Error::Root { path: path.to_owned(), source })
        }
        (RootSource::Overlay { dir, lowers, upper, work, volatile }, _) => {
            let overlay = Overlay { dir, lowers, upper, work, volatile, label: label.map(str::to_owned) };
            match userns {
                None => overlay.mount_plain(),
                Some((userns, ids)) => overlay.mount_mapped(userns, ids),
            }
        }
    }
}

struct Overlay {
    dir: OwnedFd,
    lowers: Vec<String>,
    upper: PathBuf,
    work: PathBuf,
    volatile: bool,
    /// SELinux label of all files.
    label: Option<String>,
}

impl Overlay {
    fn fail(&self, source: berth_linux::Error) -> Error {
        Error::Root { path: self.upper.clone(), source }
    }

    fn os(&self, what: &str, errno: Errno) -> Error {
        self.fail(berth_linux::Error::Open { subject: what.to_owned(), source: errno.into() })
    }

    /// Lower names are relative to the folder: it is the working directory while the overlay is configured.
    fn mount_plain(&self) -> Result<OwnedFd, Error> {
        let here = rustix::fs::open(".", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let here = here.map_err(|errno| self.os("working directory", errno))?;
        rustix::process::fchdir(&self.dir).map_err(|errno| self.os("layer folder", errno))?;
        let mounted = self.configure(&self.lowers).map_err(|source| self.fail(source));
        rustix::process::fchdir(&here).map_err(|errno| self.os("working directory", errno))?;
        mounted
    }

    fn configure(&self, lowers: &[String]) -> berth_linux::Result<OwnedFd> {
        let joined = lowers.join(":");
        if joined.len() <= MAX_VALUE {
            return self.configure_with(|context| context.set_string("lowerdir", joined.as_str()).map(drop));
        }
        let one_by_one =
            |context: &FsContext| lowers.iter().try_for_each(|lower| context.set_string("lowerdir+", lower.as_str()).map(drop));
        match self.configure_with(one_by_one) {
            // Kernels before 6.7 have no such option, and those before 6.5 say so only when the mount is made: a string of all layers is then
            // handed over by mount(2).
            Err(error) if error.raw_errno() == Some(22) => self.mount_long(&joined),
            result => result,
        }
    }

    fn configure_with(&self, set_lowers: impl Fn(&FsContext) -> berth_linux::Result<()>) -> berth_linux::Result<OwnedFd> {
        let context = mount::fs_context("overlay")?;
        context.set_string("source", "overlay")?;
        set_lowers(&context)?;
        let upper = set_path(&context, "upperdir", &self.upper)?;
        let work = set_path(&context, "workdir", &self.work)?;
        if self.volatile {
            context.set_flag("volatile")?;
        }
        if let Some(label) = &self.label {
            context.set_string("context", label.as_str())?;
        }
        context.create()?;
        drop((upper, work));
        context.mount(MountAttrs::empty())
    }

    /// All layers in one page of options, in a mount namespace that exists only for this.
    fn mount_long(&self, lowers: &str) -> berth_linux::Result<OwnedFd> {
        let volatile = if self.volatile { ",volatile" } else { "" };
        // Labels hold commas.
        let label = self.label.as_ref().map_or_else(String::new, |label| format!(",context=\"{label}\""));
        let data =
            format!("lowerdir={lowers},upperdir={},workdir={}{volatile}{label}", self.upper.display(), self.work.display());
        in_mount_namespace(|| {
            mount::mount_legacy(Some("overlay".as_ref()), &self.work, Some("overlay"), 0, Some(data.as_ref()))?;
            mount::open_tree(CWD, &self.work, true, false)
        })
    }

    /// The lower layers mapped into the user namespace. What is written is stored with the machine's ids of that namespace, so
    /// the upper folder must belong to its root.
    fn mount_mapped(&self, userns: BorrowedFd<'_>, (uid, gid): (u32, u32)) -> Result<OwnedFd, Error> {
        rustix::fs::chownat(CWD, &self.upper, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), rustix::fs::AtFlags::empty())
            .map_err(|errno| self.os("upper folder", errno))?;
        // Copied here: a descriptor of this mount namespace is none of the child's below.
        let mut layers = Vec::new();
        for lower in &self.lowers {
            let tree = mount::open_tree(self.dir.as_fd(), Path::new(lower), true, false).map_err(|source| self.fail(source))?;
            idmap_tree(tree.as_fd(), userns, false).map_err(|source| self.fail(source))?;
            layers.push(tree);
        }
        let place =
            rustix::fs::readlink(proc_path(self.dir.as_fd()), Vec::new()).map_err(|errno| self.os("layer folder", errno))?;
        let place = PathBuf::from(OsString::from_vec(place.into_bytes()));
        // Kernels before 6.15 take only layers that are attached in the mounter's own mount namespace.
        in_mount_namespace(|| {
            let folder = mount::fs_context("tmpfs")?;
            folder.set_string("size", "64k")?.create()?;
            let folder = folder.mount(MountAttrs::empty())?;
            let io = |subject: &str, errno: Errno| berth_linux::Error::Open { subject: subject.to_owned(), source: errno.into() };
            let mut names = Vec::new();
            mount::move_mount(folder.as_fd(), CWD, &place, MoveMountFlags::MOVE_MOUNT_T_SYMLINKS)?;
            rustix::process::fchdir(&folder).map_err(|errno| io("layer folder", errno))?;
            for (number, layer) in layers.iter().enumerate() {
                let name = number.to_string();
                rustix::fs::mkdirat(&folder, &name, Mode::from(0o700)).map_err(|errno| io("layer folder", errno))?;
                mount::move_mount(layer.as_fd(), folder.as_fd(), Path::new(&name), MoveMountFlags::empty())?;
                names.push(name);
            }
            self.configure(&names)
        })
        .map_err(|source| self.fail(source))
    }
}

/// Gives a path as it is where it fits, so that mountinfo shows it, and by descriptor where it is too long.
fn set_path(context: &FsContext, key: &str, path: &Path) -> berth_linux::Result<Option<OwnedFd>> {
    if path.as_os_str().len() <= MAX_VALUE {
        context.set_string(key, path)?;
        return Ok(None);
    }
    let fd = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| berth_linux::Error::Open { subject: path.display().to_string(), source: errno.into() })?;
    context.set_string(key, proc_path(fd.as_fd()).as_str())?;
    Ok(Some(fd))
}

/// Runs in a child with a mount namespace of its own and takes the mount that it makes out of it.
fn in_mount_namespace(make: impl FnOnce() -> berth_linux::Result<OwnedFd>) -> berth_linux::Result<OwnedFd> {
    let fail = |source| berth_linux::Error::Spawn { subject: "mount namespace".to_owned(), source };
    let (ours, theirs) = Channel::pair().map_err(fail)?;
    match clone3(CloneArgs { flags: CloneFlags::NEWNS, ..CloneArgs::default() }).map_err(fail)? {
        Fork::Child => {
            let made = detach_all().and_then(|()| make());
            let _ = match &made {
                Ok(mount) => theirs.report(&Report::Ready(Vec::new()), &[mount.as_fd()]),
                Err(error) => theirs.report(&Report::Failed(crate::error::chain(error)), &[]),
            };
            exit_now(0)
        }
        Fork::Parent { pidfd, .. } => {
            drop(theirs);
            let heard = ours.hear();
            berth_linux::pidfd::PidFd::from(pidfd).wait(false).map_err(fail)?;
            match heard.map_err(fail)? {
                (Report::Ready(_), Some(mount)) => Ok(mount),
                (Report::Failed(text), _) => Err(fail(std::io::Error::other(text))),
                _ => Err(fail(std::io::ErrorKind::UnexpectedEof.into())),
            }
        }
    }
}

fn detach_all() -> berth_linux::Result<()> {
    let attr = mount::AttrChange { propagation: Some(Propagation::Slave), ..mount::AttrChange::default() };
    match mount::mount_setattr(CWD, Path::new("/"), true, attr) {
        Err(error) if error.raw_errno() == Some(38) => {
            const MS_REC_SLAVE: u64 = 16384 | 1 << 19;
            mount::mount_legacy(None, Path::new("/"), None, MS_REC_SLAVE, None)
        }
        result => result,
    }
}

/// A user namespace with these maps that nobody lives in: for mapping mounts before the container's own exists.
pub(super) fn user_namespace(uids: &[ns::IdMap], gids: &[ns::IdMap]) -> Result<OwnedFd, Error> {
    let (ours, theirs) = Channel::pair().map_err(Error::Channel)?;
    match clone3(CloneArgs { flags: CloneFlags::NEWUSER, ..CloneArgs::default() }).map_err(Error::Clone)? {
        Fork::Child => {
            // Lives until the launcher has what it needs.
            drop(ours);
            let _ = theirs.wait_go();
            exit_now(0)
        }
        Fork::Parent { pid, pidfd } => {
            drop(theirs);
            let opened = ns::write_id_maps(pid, uids, gids)
                .map_err(Error::IdMap)
                .and_then(|()| ns::open_ns(Some(pid), ns::NamespaceKind::User).map_err(Error::Namespace));
            drop(ours);
            berth_linux::pidfd::PidFd::from(pidfd).wait(false).map_err(Error::Clone)?;
            opened
        }
    }
}
