//! Volumes: host paths opened in the agent's mount namespace as detached trees, which the shim's side attaches. Checks what
//! needs the host's mount table.

use std::fs::DirBuilder;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use berth_linux::mount::{MountEntry, mounts, open_tree};
use berth_oci::spec::{IdMapping, Mount};
use rustix::fs::{AtFlags, CWD, StatxFlags};

use crate::error::{Error, file, invalid};
use crate::spec::{IdMap, ImageVolume, MountSpec, Propagation};

/// A mount of the OCI spec with its tree.
pub(crate) struct Opened {
    pub(crate) mount: Mount,
    pub(crate) tree: OwnedFd,
}

/// Id maps as the OCI spec has them.
pub(crate) fn oci_maps(maps: &[IdMap]) -> Vec<IdMapping> {
    maps.iter().map(|m| IdMapping { container_id: m.container, host_id: m.host, size: m.length }).collect()
}

/// A detached copy of what is at a host path; the last link is followed.
pub(crate) fn tree(path: &Path) -> Result<OwnedFd, Error> {
    tree_of(path, true)
}

/// [`tree`], or only the one mount that the path is on.
pub(crate) fn tree_of(path: &Path, recursive: bool) -> Result<OwnedFd, Error> {
    open_tree(CWD, path, true, recursive)
        .map_err(|e| Error::Linux { action: format!("open volume {}", path.display()), source: Box::new(e) })
}

/// Opens all volumes of a container. Blocking.
pub(crate) fn open(
    specs: &[MountSpec],
    image: impl Fn(&ImageVolume, &MountSpec) -> Result<OwnedFd, Error>,
) -> Result<Vec<Opened>, Error> {
    let table = if specs.iter().any(|s| s.propagation != Propagation::Private) {
        mounts().map_err(|e| Error::Linux { action: "read the mount table".into(), source: Box::new(e) })?
    } else {
        Vec::new()
    };
    specs
        .iter()
        .map(|spec| match &spec.image {
            Some(volume) => Ok(Opened { mount: image_mount(spec), tree: image(volume, spec)? }),
            None => open_one(spec, &table),
        })
        .collect()
}

fn open_one(spec: &MountSpec, table: &[MountEntry]) -> Result<Opened, Error> {
    let host = Path::new(&spec.host_path);
    match std::fs::metadata(host) {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            DirBuilder::new().recursive(true).mode(0o755).create(host).map_err(file("create volume", host))?;
        }
        Err(e) => return Err(file("open volume", host)(e)),
    }
    if spec.propagation != Propagation::Private {
        check_propagation(spec, host, table)?;
    }
    Ok(Opened { mount: oci_mount(spec), tree: tree(host)? })
}

/// The mount's line of the OCI spec.
pub(crate) fn oci_mount(spec: &MountSpec) -> Mount {
    let access = match (spec.readonly, spec.recursive_readonly) {
        (_, true) => "rro",
        (true, false) => "ro",
        _ => "rw",
    };
    let propagation = match spec.propagation {
        Propagation::Private => "rprivate",
        Propagation::HostToContainer => "rslave",
        Propagation::Bidirectional => "rshared",
    };
    Mount {
        destination: spec.container_path.clone(),
        kind: "bind".into(),
        source: spec.host_path.clone(),
        options: vec!["rbind".into(), access.into(), propagation.into()],
        uid_mappings: oci_maps(&spec.uids),
        gid_mappings: oci_maps(&spec.gids),
    }
}

/// As [`oci_mount`]: an image's tree comes with its ids mapped.
fn image_mount(spec: &MountSpec) -> Mount {
    let mount = oci_mount(spec);
    Mount {
        source: spec.image.as_ref().map_or_else(String::new, |i| i.id.clone()),
        uid_mappings: vec![],
        gid_mappings: vec![],
        ..mount
    }
}

fn check_propagation(spec: &MountSpec, host: &Path, table: &[MountEntry]) -> Result<(), Error> {
    let fd = open_tree(CWD, host, false, false)
        .map_err(|e| Error::Linux { action: format!("open volume {}", host.display()), source: Box::new(e) })?;
    let stat = rustix::fs::statx(fd.as_fd(), c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
        .map_err(|e| file("look at", host)(e.into()))?;
    let Some(entry) = table.iter().find(|m| m.id == stat.stx_mnt_id) else { return Ok(()) };
    let good = match spec.propagation {
        Propagation::Private => true,
        Propagation::HostToContainer => entry.shared.is_some() || entry.master.is_some(),
        Propagation::Bidirectional => entry.shared.is_some(),
    };
    if good {
        return Ok(());
    }
    let what = if spec.propagation == Propagation::Bidirectional { "shared" } else { "shared or slave" };
    Err(invalid(
        "mounts.propagation",
        format!("path {:?} is mounted on {:?} but it is not a {what} mount", spec.host_path, entry.mount_point.display()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_say_access_and_propagation() {
        let cases = [
            (MountSpec::default(), ["rbind", "rw", "rprivate"]),
            (MountSpec { readonly: true, ..Default::default() }, ["rbind", "ro", "rprivate"]),
            (MountSpec { readonly: true, recursive_readonly: true, ..Default::default() }, ["rbind", "rro", "rprivate"]),
            (MountSpec { propagation: Propagation::Bidirectional, ..Default::default() }, ["rbind", "rw", "rshared"]),
            (
                MountSpec { propagation: Propagation::HostToContainer, readonly: true, ..Default::default() },
                ["rbind", "ro", "rslave"],
            ),
        ];
        for (spec, want) in cases {
            assert_eq!(oci_mount(&spec).options, want, "{spec:?}");
        }
    }
}
