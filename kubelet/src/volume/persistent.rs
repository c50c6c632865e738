//! Volumes that outlive a pod: what a claim, or the pod itself, names on the machine or on the network. Finds the source, mounts it
//! in the pod's folder. What is in such a volume is never the kubelet's to delete.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use berth_linux::mount::{AttrChange, MountAttrs, MoveMountFlags, mount_setattr, move_mount, open_tree};
use k8s_openapi::api::core::v1::{HostPathVolumeSource, NFSVolumeSource, PersistentVolume, Pod, Volume};

use super::csi::{self, CsiVolume};
use super::ownership::{self, Ownership};
use super::{VolumeContext, claim, create_private_dir, empty_dir, host_path, mounts, nfs};
use crate::execute::with_causes;
use crate::pod;

/// Where a volume's data is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Backing {
    /// A path of the host, used as it is.
    HostPath(HostPathVolumeSource),
    /// A folder of the host, mounted in the pod's folder.
    Local(PathBuf),
    /// An NFS export.
    Nfs(NFSVolumeSource),
    /// What a CSI driver has.
    Csi(Box<CsiVolume>),
}

/// A volume with its source found.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Persistent {
    /// The name of its folder: the PersistentVolume's, or the volume's own.
    name: String,
    /// Where its data is.
    backing: Backing,
    /// The pod may only read it.
    pub(super) read_only: bool,
    /// Mount options.
    options: Vec<String>,
}

impl Persistent {
    /// Where the pod's containers find it.
    pub(super) fn path(&self, pod_dir: &Path) -> PathBuf {
        let plugin = match &self.backing {
            Backing::HostPath(source) => return PathBuf::from(&source.path),
            Backing::Local(_) => "kubernetes.io~local-volume",
            Backing::Nfs(_) => "kubernetes.io~nfs",
            Backing::Csi(_) => return csi::path(pod_dir, &self.name),
        };
        pod_dir.join("volumes").join(plugin).join(&self.name)
    }

    /// Whether it is mounted, where it has to be.
    pub(super) fn is_there(&self, pod_dir: &Path) -> bool {
        let is_mounted = || mounts::is_mount_point(&self.path(pod_dir)).unwrap_or(false);
        matches!(self.backing, Backing::HostPath(_)) || is_mounted()
    }
}

/// The source of a volume that is of one of these kinds; the error is the kubelet's message.
pub(super) fn find(context: &VolumeContext<'_>, volume: &Volume) -> Option<Result<Persistent, String>> {
    if let Some(nfs) = &volume.nfs {
        let read_only = nfs.read_only == Some(true);
        return Some(Ok(Persistent {
            name: volume.name.clone(),
            backing: Backing::Nfs(nfs.clone()),
            read_only,
            options: Vec::new(),
        }));
    }
    if let Some(source) = &volume.csi {
        let found = CsiVolume::inline(context, volume, source);
        return Some(found.map(|csi| Persistent {
            name: volume.name.clone(),
            read_only: csi.read_only,
            backing: Backing::Csi(Box::new(csi)),
            options: Vec::new(),
        }));
    }
    let claim = claim_name(context.pod, volume)?;
    let read_only = volume.persistent_volume_claim.as_ref().is_some_and(|source| source.read_only == Some(true));
    let services = context.services;
    let namespace = pod::namespace(context.pod);
    let found = context
        .objects
        .bound_volume(context.pod, &claim)
        .unwrap_or_else(|| services.claims.volume_of(namespace, &claim, context.objects, &services.node_name));
    Some(found.and_then(|volume| {
        let mut persistent = of_volume(&volume, context)?;
        persistent.read_only |= read_only;
        if let Backing::Csi(csi) = &mut persistent.backing {
            csi.read_only = persistent.read_only;
        }
        Ok(persistent)
    }))
}

/// The claim of a volume that has one: the one it names, or the one that is made for the pod and has its name.
pub(crate) fn claim_name(pod: &Pod, volume: &Volume) -> Option<String> {
    match (&volume.persistent_volume_claim, &volume.ephemeral) {
        (Some(source), _) => Some(source.claim_name.clone()),
        (None, Some(_)) => Some(format!("{}-{}", pod::name(pod), volume.name)),
        (None, None) => None,
    }
}

fn of_volume(volume: &PersistentVolume, context: &VolumeContext<'_>) -> Result<Persistent, String> {
    let node = &context.services.node_name;
    let name = volume.metadata.name.clone().unwrap_or_default();
    let spec = volume.spec.clone().unwrap_or_default();
    if !claim::fits_node(&spec, &context.objects.node_labels(node), node) {
        return Err(format!("NodeAffinity check failed for volume {name:?}: no matching NodeSelectorTerms"));
    }
    let mut read_only = false;
    let backing = if let Some(source) = spec.host_path {
        Backing::HostPath(source)
    } else if let Some(source) = spec.local {
        Backing::Local(source.path.into())
    } else if let Some(source) = spec.nfs {
        read_only = source.read_only == Some(true);
        Backing::Nfs(source)
    } else if let Some(source) = spec.csi.clone() {
        read_only = source.read_only == Some(true);
        Backing::Csi(Box::new(CsiVolume::persistent(&name, source, &spec)))
    } else {
        return Err(format!("volume {name:?} is of a type that berth does not support"));
    };
    Ok(Persistent { name, backing, read_only, options: spec.mount_options.unwrap_or_default() })
}

/// Mounts it unless it is mounted. `begun`: the pod's containers have it already.
pub(super) fn set_up(context: &VolumeContext<'_>, volume: &Persistent, begun: bool) -> Result<(), String> {
    let target = volume.path(context.dir);
    match &volume.backing {
        Backing::HostPath(source) => host_path::set_up(source, begun),
        Backing::Local(_) if begun && volume.is_there(context.dir) => Ok(()),
        Backing::Csi(csi) => csi::set_up(context, csi),
        Backing::Local(path) => set_up_local(context, path, &target, volume.read_only),
        Backing::Nfs(source) => {
            make_mount_point(&target)?;
            if mounts::is_mount_point(&target).map_err(|e| format!("look at {}: {e}", target.display()))? {
                return Ok(());
            }
            nfs::mount(source, &volume.options, &target, volume.read_only)
        }
    }
}

pub(super) fn make_mount_point(target: &Path) -> Result<(), String> {
    create_private_dir(target).map_err(|e| format!("create {}: {e}", target.display()))
}

/// What of the pod's security context a volume's files get.
pub(super) fn ownership(context: &VolumeContext<'_>, read_only: bool) -> Option<Ownership> {
    let security = pod::spec(context.pod).security_context.as_ref();
    let policy = security.and_then(|s| s.fs_group_change_policy.as_deref());
    let group = empty_dir::fs_group(context.pod)?;
    Some(Ownership { group, read_only, only_on_mismatch: policy == Some("OnRootMismatch") })
}

fn set_up_local(context: &VolumeContext<'_>, path: &Path, target: &Path, read_only: bool) -> Result<(), String> {
    let failed = |what: &str, e: &dyn std::error::Error| format!("{what} {}: {}", path.display(), with_causes(e));
    let kind = match fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(format!("path {:?} does not exist", path.display())),
        Err(e) => return Err(failed("look at", &e)),
    };
    if kind.is_block_device() {
        return Err(format!(
            "local volume {} is a block device: not supported by berth yet, mount its file system",
            path.display()
        ));
    }
    if !kind.is_dir() {
        return Err(format!("local volume {} is not a directory", path.display()));
    }
    make_mount_point(target)?;
    if mounts::is_mount_point(target).map_err(|e| failed("look at", &e))? {
        return Ok(());
    }
    // Before it is mounted: what is cut short is done again.
    if let Some(ownership) = ownership(context, read_only).filter(|_| !read_only) {
        ownership::apply(path, ownership).map_err(|e| failed("give to the fsGroup", &e))?;
    }
    let tree = open_tree(rustix::fs::CWD, path, true, false).map_err(|e| failed("open", &e))?;
    attach(tree.as_fd(), target, read_only).map_err(|e| failed("mount", &e))
}

/// Puts a mount in its place.
pub(super) fn attach(mount: std::os::fd::BorrowedFd<'_>, target: &Path, read_only: bool) -> berth_linux::Result<()> {
    if read_only {
        let change = AttrChange { set: MountAttrs::RDONLY, ..AttrChange::default() };
        mount_setattr(mount, Path::new(""), false, change)?;
    }
    move_mount(mount, rustix::fs::CWD, target, MoveMountFlags::empty())
}
