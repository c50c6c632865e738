//! Sources of bind mounts as detached trees, opened where the launcher sees them and with its rights: the process that
//! attaches them may have neither.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use berth_linux::device::{Device, DeviceKind};
use berth_linux::mount::{self, AttrChange};
use rustix::fs::CWD;

use crate::Error;
use crate::plan::{Mount, Source, Step};
use crate::spec;

/// Maps the ids of a detached tree.
pub(super) fn idmap_tree(tree: BorrowedFd<'_>, userns: BorrowedFd<'_>, recursive: bool) -> berth_linux::Result<()> {
    let change = AttrChange { userns: Some(userns), ..AttrChange::default() };
    mount::mount_setattr(tree, Path::new(""), recursive, change)
}

/// The trees that the plan's steps need, by step. `given` are those brought along, by destination; `mapped` makes the user
/// namespace of a mount's mapping.
pub(super) fn open_trees(
    steps: &[Step],
    mut given: impl FnMut(&Mount) -> Option<OwnedFd>,
    mut mapped: impl FnMut(&Mount) -> Result<Option<OwnedFd>, Error>,
    bind_devices: bool,
) -> Result<Vec<(usize, OwnedFd)>, Error> {
    let mut trees = Vec::new();
    for (number, step) in steps.iter().enumerate() {
        let (tree, mount) = match step {
            Step::Mount(mount) => {
                let tree = match &mount.source {
                    Source::Bind { path, recursive } => mount::open_tree(CWD, path, true, *recursive)
                        .map_err(|source| Error::Bind { path: path.clone(), source })?,
                    Source::Given => match given(mount) {
                        Some(tree) => tree,
                        None => continue,
                    },
                    Source::Filesystem { .. } | Source::Cgroup => continue,
                };
                (tree, mount)
            }
            Step::Device(device) if bind_devices => {
                trees.push((number, open_device(device)?));
                continue;
            }
            _ => continue,
        };
        if let (Some(userns), Some((.., recursive))) = (mapped(mount)?, &mount.idmap) {
            let path = || mount.destination.clone();
            idmap_tree(tree.as_fd(), userns.as_fd(), *recursive).map_err(|source| match source.raw_errno() {
                Some(22) => Error::IdmapUnsupported { path: path(), source },
                _ => Error::Bind { path: path(), source },
            })?;
        }
        trees.push((number, tree));
    }
    Ok(trees)
}

/// The machine's own node of a device, where nodes may not be made.
fn open_device(device: &spec::Device) -> Result<OwnedFd, Error> {
    let path = Path::new(&device.path);
    let fail = |source| Error::Bind { path: path.to_owned(), source };
    let wrong = || {
        fail(berth_linux::Error::Open {
            subject: format!("the machine's {}", device.path),
            source: std::io::Error::new(std::io::ErrorKind::InvalidInput, "not the device that is wanted"),
        })
    };
    let tree = mount::open_tree(CWD, path, true, false).map_err(fail)?;
    let found = Device::of_path(path).ok().flatten().ok_or_else(wrong)?;
    let is_block = device.kind == "b";
    let same = (found.kind == DeviceKind::Block) == is_block && (found.major, found.minor) == (device.major, device.minor);
    if same { Ok(tree) } else { Err(wrong()) }
}
