//! Image volumes: the layers of an image, or a folder or file of them, as one read-only tree. It is put together on a thread in
//! a mount namespace of its own, which ends with it; the tree outlives both. Never out of the image: links are followed inside.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use berth_image::Rootfs;
use berth_linux::beneath::Root;
use berth_linux::mount::{self, AttrChange, MountAttrs, MoveMountFlags, Propagation};
use berth_linux::ns::{self, NamespaceKind};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::error::Error;

/// Slave mounts, recursively, for mount(2).
const MS_REC_SLAVE: u64 = 1 << 14 | 1 << 19;

/// The tree of an image. `userns`: whose ids the files have. Blocking.
pub(crate) fn tree(image: &str, rootfs: &Rootfs, sub_path: &str, userns: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Error> {
    let fail = |source: Box<dyn std::error::Error + Send + Sync>| Error::ImageVolume {
        image: image.to_owned(),
        sub_path: sub_path.to_owned(),
        source,
    };
    std::thread::scope(|scope| {
        let worker = std::thread::Builder::new()
            .name("image-volume".into())
            .spawn_scoped(scope, || assemble(rootfs, Path::new(sub_path.trim_start_matches('/')), userns))
            .map_err(|e| fail(Box::new(e)))?;
        match worker.join() {
            Ok(made) => made.map_err(|e| fail(Box::new(e))),
            Err(_) => Err(fail("its thread panicked".into())),
        }
    })
}

fn os(subject: &str) -> impl FnOnce(Errno) -> berth_linux::Error {
    let subject = subject.to_owned();
    move |errno| berth_linux::Error::Open { subject, source: errno.into() }
}

/// Layers are attached under short names: an overlay's options fit into one page however many there are, and kernels before
/// 6.15 take only attached ones.
fn assemble(rootfs: &Rootfs, sub_path: &Path, userns: Option<BorrowedFd<'_>>) -> berth_linux::Result<OwnedFd> {
    ns::unshare(NamespaceKind::Mount.clone_flag())?;
    nothing_spreads()?;
    let layers: Vec<OwnedFd> = rootfs
        .lowers
        .iter()
        .map(|name| {
            let layer = mount::open_tree(CWD, &rootfs.links_dir.join(name), true, false)?;
            if userns.is_some() {
                mount::mount_setattr(layer.as_fd(), Path::new(""), false, AttrChange { userns, ..AttrChange::default() })?;
            }
            Ok(layer)
        })
        .collect::<berth_linux::Result<_>>()?;
    let context = mount::fs_context("tmpfs")?;
    context.set_string("size", "64k")?.create()?;
    let folder = context.mount(MountAttrs::empty())?;
    mount::move_mount(folder.as_fd(), CWD, &rootfs.links_dir, MoveMountFlags::MOVE_MOUNT_T_SYMLINKS)?;
    rustix::process::fchdir(&folder).map_err(os("layer folder"))?;
    let make = |name: &str| rustix::fs::mkdirat(&folder, name, Mode::from(0o755)).map_err(os(name));
    let mut lowers = Vec::new();
    for (number, layer) in layers.iter().enumerate() {
        let name = number.to_string();
        make(&name)?;
        mount::move_mount(layer.as_fd(), folder.as_fd(), Path::new(&name), MoveMountFlags::empty())?;
        lowers.push(name);
    }
    // An overlay that is only read needs two layers at least.
    lowers.push("empty".into());
    make("empty")?;
    make("merged")?;
    let options = format!("lowerdir={}", lowers.join(":"));
    mount::mount_legacy(Some("overlay".as_ref()), Path::new("merged"), Some("overlay"), 0, Some(options.as_ref()))?;
    let merged = rustix::fs::open("merged", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let merged = merged.map_err(os("merged layers"))?;
    if sub_path.as_os_str().is_empty() {
        return mount::open_tree(merged.as_fd(), Path::new(""), true, false);
    }
    let part = Root::in_root(merged)
        .open_path(sub_path)
        .map_err(|source| berth_linux::Error::Open { subject: sub_path.display().to_string(), source })?;
    mount::open_tree(part.as_fd(), Path::new(""), true, false)
}

/// What is mounted here stays here.
fn nothing_spreads() -> berth_linux::Result<()> {
    let attr = AttrChange { propagation: Some(Propagation::Slave), ..AttrChange::default() };
    match mount::mount_setattr(CWD, Path::new("/"), true, attr) {
        // Kernels before 5.12.
        Err(error) if error.raw_errno() == Some(Errno::NOSYS.raw_os_error()) => {
            mount::mount_legacy(None, Path::new("/"), None, MS_REC_SLAVE, None)
        }
        result => result,
    }
}
