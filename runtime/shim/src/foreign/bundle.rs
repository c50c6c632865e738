//! The bundle of a foreign runtime: `config.json`, `rootfs` and `mounts/N`. The mounts live in the shim's private mount namespace:
//! the machine never sees them, and they end with the shim at the latest. Runs nothing.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use berth_linux::file;
use berth_linux::mount::{self, AttrChange, Propagation};
use berth_oci::spec::{EnvVar, Namespace, NamespaceType, Process, Root, Spec};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, UnmountFlags};

use super::Error;

/// What the container's request says that only a path can tell a runtime.
pub(super) struct Places {
    /// The root filesystem.
    pub(super) root: PathBuf,
    /// Sources of bind mounts, by destination.
    pub(super) mounts: BTreeMap<String, PathBuf>,
    /// Namespaces to enter.
    pub(super) namespaces: Vec<(NamespaceType, String)>,
    /// The cgroup as text.
    pub(super) cgroup: String,
    /// The lowest `oom_score_adj` that may be set here.
    pub(super) lowest_oom_score: Option<i32>,
    /// Whether the machine limits huge pages.
    pub(super) hugetlb: bool,
}

fn refused(runtime: &str, what: &str) -> Error {
    Error::Refused { runtime: runtime.to_owned(), what: what.to_owned() }
}

/// The spec as another runtime understands it. Pure.
pub(super) fn localize(runtime: &str, mut spec: Spec, places: &Places) -> Result<(Spec, Vec<String>), Error> {
    let mut warnings = Vec::new();
    let readonly = spec.root.as_ref().is_some_and(|root| root.readonly);
    spec.root = Some(Root { path: text(runtime, &places.root)?, readonly });
    for (destination, source) in &places.mounts {
        let clean =
            |path: &str| path.split('/').filter(|part| !part.is_empty() && *part != ".").map(str::to_owned).collect::<Vec<_>>();
        let wanted = clean(destination);
        let found = spec.mounts.iter_mut().find(|mount| clean(&mount.destination) == wanted);
        let mount = found.ok_or_else(|| refused(runtime, &format!("no mount of the spec is at {destination}")))?;
        mount.source = text(runtime, source)?;
        mount.kind = "bind".into();
    }
    for (kind, path) in &places.namespaces {
        match spec.linux.namespaces.iter_mut().find(|namespace| namespace.kind == *kind) {
            Some(namespace) => namespace.path.clone_from(path),
            None => spec.linux.namespaces.push(Namespace { kind: *kind, path: path.clone() }),
        }
    }
    if places.namespaces.iter().any(|(kind, _)| *kind == NamespaceType::User) {
        // The namespace has its maps; with a path and maps, runc wants to be told only one.
        spec.linux.uid_mappings.clear();
        spec.linux.gid_mappings.clear();
    }
    spec.linux.cgroups_path.clone_from(&places.cgroup);
    if let Some(resources) = spec.linux.resources.as_mut().filter(|_| !places.hugetlb) {
        // Kubelets ask for none of every size; runc refuses even that where the controller is missing.
        resources.hugepage_limits.retain(|limit| limit.limit > 0);
    }
    if let Some(process) = &mut spec.process {
        localize_process(runtime, process, places.lowest_oom_score, &mut warnings)?;
    }
    Ok((spec, warnings))
}

/// The same for a process, also of an exec.
pub(super) fn localize_process(
    runtime: &str,
    process: &mut Process,
    lowest_oom_score: Option<i32>,
    warnings: &mut Vec<String>,
) -> Result<(), Error> {
    if process.env.iter().any(|EnvVar(bytes)| std::str::from_utf8(bytes).is_err()) {
        return Err(refused(runtime, "an environment variable is not text (UTF-8), which only the built-in runtime can pass on"));
    }
    if let (Some(lowest), Some(wanted)) = (lowest_oom_score, process.oom_score_adj)
        && wanted < lowest
    {
        warnings.push(format!("oom_score_adj {wanted} may not be set here, {lowest} is kept"));
        process.oom_score_adj = Some(lowest);
    }
    Ok(())
}

fn text(runtime: &str, path: &Path) -> Result<String, Error> {
    path.to_str().map(str::to_owned).ok_or_else(|| refused(runtime, "a path is not text"))
}

/// Makes the bundle's folders.
pub(super) fn make(bundle: &Path) -> Result<(), Error> {
    for folder in [bundle.to_owned(), bundle.join("rootfs"), bundle.join("mounts")] {
        // Passable: a runtime in a user namespace reaches the root through it.
        let made = DirBuilder::new().recursive(true).mode(0o711).create(&folder);
        made.map_err(|source| Error::File { action: "make", path: folder, source })?;
    }
    Ok(())
}

/// Writes `config.json`, for root alone.
pub(super) fn write_config(bundle: &Path, json: &[u8]) -> Result<(), Error> {
    let path = bundle.join("config.json");
    let written = file::write(&path, json, file::PRIVATE).map(drop);
    written.map_err(|source| Error::File { action: "write", path, source })
}

/// Attaches a root.
pub(super) fn attach_root(bundle: &Path, tree: &OwnedFd) -> Result<PathBuf, Error> {
    let place = bundle.join("rootfs");
    mount::move_mount(tree.as_fd(), CWD, &place, MoveMountFlags::empty())?;
    Ok(place)
}

/// Attaches a volume under a number. One that is `shared` stays a peer of the machine's mount; others only receive.
pub(super) fn attach(bundle: &Path, number: usize, tree: &OwnedFd, shared: bool) -> Result<PathBuf, Error> {
    let place = bundle.join("mounts").join(number.to_string());
    let file = |source| Error::File { action: "make", path: place.clone(), source };
    let kind = rustix::fs::fstat(tree).map_err(|errno| file(errno.into()))?.st_mode;
    if rustix::fs::FileType::from_raw_mode(kind) == rustix::fs::FileType::Directory {
        std::fs::create_dir(&place).map_err(file)?;
    } else {
        File::create_new(&place).map_err(file)?;
    }
    if !shared {
        let slave = AttrChange { propagation: Some(Propagation::Slave), ..AttrChange::default() };
        mount::mount_setattr(tree.as_fd(), Path::new(""), true, slave)?;
    }
    mount::move_mount(tree.as_fd(), CWD, &place, MoveMountFlags::empty())?;
    Ok(place)
}

/// Undoes the bundle's mounts; what is not mounted is success. They are made private first: taking off what a shared volume
/// holds would take it off the machine too.
pub fn unmount(bundle: &Path) -> Result<(), Error> {
    let mut places: Vec<PathBuf> = match std::fs::read_dir(bundle.join("mounts")) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => Vec::new(),
    };
    places.push(bundle.join("rootfs"));
    let mut first = Ok(());
    for place in places {
        let private = AttrChange { propagation: Some(Propagation::Private), ..AttrChange::default() };
        let done = mount::mount_setattr(CWD, &place, true, private)
            .and_then(|()| mount::umount(&place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW));
        match done {
            // Not a mount point, or not there at all.
            Err(error) if matches!(error.raw_errno(), Some(2 | 22)) => {}
            Err(error) if first.is_ok() => first = Err(Error::Mount(error)),
            _ => {}
        }
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_cgroup::{HugepageLimit, Resources};
    use berth_oci::spec::Mount;

    fn places() -> Places {
        Places {
            root: "/b/rootfs".into(),
            mounts: BTreeMap::new(),
            namespaces: Vec::new(),
            cgroup: "/pod/c".into(),
            lowest_oom_score: Some(0),
            hugetlb: true,
        }
    }

    #[test]
    fn no_huge_pages_are_left_out_only_where_nothing_limits_them() {
        let limit = |limit| HugepageLimit { page_size: "2MB".into(), limit };
        let mut spec = Spec::default();
        spec.linux.resources = Some(Resources { hugepage_limits: vec![limit(0), limit(1)], ..Resources::default() });
        let left = |hugetlb| {
            let (spec, _) = localize("r", spec.clone(), &Places { hugetlb, ..places() }).unwrap();
            spec.linux.resources.unwrap().hugepage_limits
        };
        assert_eq!(left(true), [limit(0), limit(1)]);
        assert_eq!(left(false), [limit(1)]);
    }

    #[test]
    fn descriptors_become_paths_and_the_rest_of_the_spec_stays() {
        let mount = |destination: &str, kind: &str| Mount {
            destination: destination.into(),
            kind: kind.into(),
            source: "x".into(),
            options: vec!["rbind".into(), "ro".into()],
            ..Mount::default()
        };
        let mut spec = Spec { mounts: vec![mount("/proc", "proc"), mount("/a//b/", "bind")], ..Spec::default() };
        spec.root = Some(Root { path: String::new(), readonly: true });
        let new = |kind| Namespace { kind, path: String::new() };
        spec.linux.namespaces = vec![new(NamespaceType::Mount), new(NamespaceType::Network)];
        let wanted = Places {
            mounts: [("/a/b".to_owned(), PathBuf::from("/b/mounts/0"))].into(),
            namespaces: vec![
                (NamespaceType::Network, "/proc/7/fd/9".to_owned()),
                (NamespaceType::Ipc, "/proc/7/fd/10".to_owned()),
            ],
            ..places()
        };
        let (spec, warnings) = localize("r", spec, &wanted).unwrap();
        assert_eq!(warnings, Vec::<String>::new());
        assert_eq!(spec.root, Some(Root { path: "/b/rootfs".into(), readonly: true }));
        assert_eq!(spec.mounts[0], mount("/proc", "proc"));
        assert_eq!((spec.mounts[1].source.as_str(), spec.mounts[1].options.len()), ("/b/mounts/0", 2));
        let paths: Vec<_> = spec.linux.namespaces.iter().map(|n| n.path.as_str()).collect();
        assert_eq!(paths, ["", "/proc/7/fd/9", "/proc/7/fd/10"]);
        assert_eq!(spec.linux.cgroups_path, "/pod/c");
    }

    #[test]
    fn what_another_runtime_cannot_have_is_refused_or_reported_by_name() {
        let mut spec = Spec { process: Some(Process { oom_score_adj: Some(-998), ..Process::default() }), ..Spec::default() };
        let (changed, warnings) = localize("r", spec.clone(), &places()).unwrap();
        assert_eq!(changed.process.unwrap().oom_score_adj, Some(0));
        assert!(warnings[0].contains("-998"), "{warnings:?}");

        spec.process.as_mut().unwrap().env = vec![EnvVar(b"A=\xff".to_vec())];
        let error = localize("r", spec.clone(), &places()).unwrap_err().to_string();
        assert!(error.contains("environment") && error.contains("OCI runtime r"), "{error}");

        let odd = Places { mounts: [("/nowhere".to_owned(), "/m".into())].into(), ..places() };
        let error = localize("r", Spec::default(), &odd).unwrap_err().to_string();
        assert!(error.contains("/nowhere"), "{error}");
    }
}
