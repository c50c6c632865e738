//! From a spec to a plan: everything that can be checked and decided without touching the kernel is, before anything is made.
//!
//! Pure. The plan is executed by `init` inside the new process.

mod mounts;
mod process;
pub mod sysctl;

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use berth_linux::caps::{self, CapSet};
use berth_linux::mount::{MountAttrs, Propagation};
use berth_linux::ns::{self, IdMap, NamespaceKind};
use berth_linux::process::CloneFlags;
use rustix::process::Pid;

use crate::Error;
use crate::spec::{self, NamespaceType, Spec};

pub(crate) use mounts::is_coverable;
pub use process::{Capabilities, ProcessPlan, plan_process};

/// What a plan depends on besides the spec.
#[derive(Debug, Clone, Default)]
pub struct Host {
    /// Our own bounding set: nothing beyond it can be given.
    pub bounding: CapSet,
    /// Whether AppArmor labels processes here.
    pub apparmor: bool,
    /// Whether SELinux does.
    pub selinux: bool,
}

/// The identities of a process's namespaces, in the order of [`NamespaceKind::ALL`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Namespaces([(u64, u64); NamespaceKind::ALL.len()]);

impl Namespaces {
    /// Those of a process, or our own.
    pub fn look(process: Option<Pid>) -> Result<Self, Error> {
        let mut ids = [(0, 0); NamespaceKind::ALL.len()];
        for (id, kind) in ids.iter_mut().zip(NamespaceKind::ALL) {
            *id = ns::ns_id_of(process, kind).map_err(Error::Namespace)?;
        }
        Ok(Self(ids))
    }

    /// The kinds that another process has others of.
    #[must_use]
    pub fn other_than(&self, own: &Self) -> CloneFlags {
        let kinds = NamespaceKind::ALL.into_iter().zip(self.0.iter().zip(own.0));
        kinds.filter(|(_, (theirs, own))| *theirs != own).map(|(kind, _)| kind.clone_flag()).collect()
    }
}

impl Host {
    /// Looks at this machine and this process. The answer is the same as long as the process lives and drops no capability.
    #[must_use]
    pub fn look() -> Self {
        let enabled = std::fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with(b"Y"));
        // Mounted only where the kernel has SELinux on.
        let selinux = Path::new("/sys/fs/selinux/enforce").exists();
        Self { bounding: caps::bounding(), apparmor: enabled, selinux }
    }
}

/// What the launcher brings along besides the spec.
#[derive(Debug, Clone, Default)]
pub struct Extension {
    /// Kinds of namespaces that are entered by descriptor.
    pub joined: BTreeSet<NamespaceKind>,
    /// Kinds among the entered ones that turn out to be the caller's own.
    pub shared_with_host: BTreeSet<NamespaceKind>,
    /// Destinations whose mount tree is brought along.
    pub trees: BTreeSet<String>,
    /// Whether the root filesystem is brought along.
    pub root: bool,
}

/// What has to be done, decided.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Namespaces to be made.
    pub new: CloneFlags,
    /// Namespaces to be entered by path.
    pub join_paths: Vec<(NamespaceKind, PathBuf)>,
    /// Maps of a new user namespace: (users, groups).
    pub id_maps: (Vec<IdMap>, Vec<IdMap>),
    /// Whether the process ends up in a user namespace other than the caller's.
    pub in_userns: bool,
    /// Whether the process ends up in a cgroup namespace other than the caller's.
    pub in_cgroupns: bool,
    /// Path of the root filesystem, unless it is brought along.
    pub root: Option<PathBuf>,
    /// Propagation of the root mount and of what is bound below it.
    pub propagation: Option<Propagation>,
    /// What to do inside the new mount namespace, in order, before the root is changed.
    pub steps: Vec<Step>,
    /// Whether the root mount becomes read-only at the end.
    pub readonly_root: bool,
    /// Host name to set.
    pub hostname: Option<String>,
    /// Domain name to set.
    pub domainname: Option<String>,
    /// Kernel parameters: path below /proc/sys, value.
    pub sysctls: Vec<(PathBuf, String)>,
    /// SELinux label of the file systems that are mounted.
    pub mount_label: Option<String>,
    /// The process.
    pub process: ProcessPlan,
    /// What is left out or changed, one sentence each.
    pub warnings: Vec<String>,
}

/// One thing to do below the new root.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Attach a mount.
    Mount(Mount),
    /// Make a device node (or bind the host's).
    Device(spec::Device),
    /// Make a symbolic link, unless something is there.
    Link {
        /// Where.
        path: PathBuf,
        /// To what.
        target: PathBuf,
        /// Whether something that is there is replaced.
        replace: bool,
    },
    /// Make the terminal the container's console.
    Console,
    /// Cover a path so that it cannot be read.
    Mask(PathBuf),
    /// Make a path unwritable.
    ReadOnly(PathBuf),
}

/// One mount, with its options understood.
#[derive(Debug, Clone, PartialEq)]
pub struct Mount {
    /// Absolute, without `.` and `..`.
    pub destination: PathBuf,
    /// What is mounted.
    pub source: Source,
    /// Attributes of this mount.
    pub change: Change,
    /// Attributes of this mount and all below it.
    pub recursive: Change,
    /// Propagation, in the order given; true: recursively.
    pub propagation: Vec<(Propagation, bool)>,
    /// Id mapping: (users, groups, recursively).
    pub idmap: Option<(Vec<IdMap>, Vec<IdMap>, bool)>,
}

/// Attributes to set and to clear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Change {
    /// To set.
    pub set: MountAttrs,
    /// To clear.
    pub clear: MountAttrs,
}

impl Change {
    /// Whether nothing changes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.clear.is_empty()
    }
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file or folder of the host.
    Bind {
        /// Where it is on the host.
        path: PathBuf,
        /// With what is mounted below it.
        recursive: bool,
    },
    /// The tree that was brought along for this destination.
    Given,
    /// A new filesystem.
    Filesystem {
        /// Its type.
        kind: String,
        /// Its device or name.
        source: String,
        /// Its own options; None for one without a value.
        options: Vec<(String, Option<String>)>,
    },
    /// The container's view of the control groups, whatever layout the host has.
    Cgroup,
}

pub(crate) fn refuse(field: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::Spec { field: field.into(), reason: reason.into() }
}

/// Plans a container.
pub fn plan(spec: &Spec, bundle: &Path, extension: &Extension, host: &Host) -> Result<Plan, Error> {
    if !spec.oci_version.is_empty() && !spec.oci_version.starts_with("1.") {
        return Err(refuse("ociVersion", format!("version {} is not supported", spec.oci_version)));
    }
    let mut plan = Plan::default();
    plan_namespaces(&mut plan, spec, extension)?;
    let Some(process) = &spec.process else { return Err(refuse("process", "missing")) };
    plan.process = plan_process(process, host, &mut plan.warnings)?;
    plan.process.personality = match &spec.linux.personality {
        None => None,
        Some(personality) => Some(process::personality(personality)?),
    };
    plan.mount_label = process::plan_selinux("linux.mountLabel", &spec.linux.mount_label, host)?;
    plan_names(&mut plan, spec, extension)?;
    plan.sysctls = sysctl::plan_sysctls(&spec.linux.sysctl, |kind| plan.is_own(kind, extension))?;
    plan_root(&mut plan, spec, bundle, extension)?;
    plan_steps(&mut plan, spec, bundle, extension)?;
    Ok(plan)
}

impl Plan {
    /// Whether the process has a namespace of this kind that is not the caller's.
    fn is_own(&self, kind: NamespaceKind, extension: &Extension) -> bool {
        let joined = extension.joined.contains(&kind) || self.join_paths.iter().any(|(other, _)| *other == kind);
        self.new.contains(kind.clone_flag()) || (joined && !extension.shared_with_host.contains(&kind))
    }
}

/// The kernel's kind for the specification's.
#[must_use]
pub fn namespace_kind(kind: NamespaceType) -> NamespaceKind {
    match kind {
        NamespaceType::Pid => NamespaceKind::Pid,
        NamespaceType::Network => NamespaceKind::Net,
        NamespaceType::Mount => NamespaceKind::Mount,
        NamespaceType::Ipc => NamespaceKind::Ipc,
        NamespaceType::Uts => NamespaceKind::Uts,
        NamespaceType::User => NamespaceKind::User,
        NamespaceType::Cgroup => NamespaceKind::Cgroup,
    }
}

fn plan_namespaces(plan: &mut Plan, spec: &Spec, extension: &Extension) -> Result<(), Error> {
    let mut seen = BTreeSet::new();
    for namespace in &spec.linux.namespaces {
        let kind = namespace_kind(namespace.kind);
        if !seen.insert(kind) {
            return Err(refuse("linux.namespaces", format!("two namespaces of type {}", kind.proc_name())));
        }
        if extension.joined.contains(&kind) {
            continue;
        }
        match namespace.path.as_str() {
            "" => plan.new |= kind.clone_flag(),
            path if path.starts_with('/') => plan.join_paths.push((kind, PathBuf::from(path))),
            path => return Err(refuse("linux.namespaces", format!("path {path} is not absolute"))),
        }
    }
    if !plan.new.contains(CloneFlags::NEWNS) {
        return Err(refuse("linux.namespaces", "a new mount namespace is needed"));
    }
    plan.in_userns = plan.is_own(NamespaceKind::User, extension);
    plan.in_cgroupns = plan.is_own(NamespaceKind::Cgroup, extension);
    let (uids, gids) = (&spec.linux.uid_mappings, &spec.linux.gid_mappings);
    if plan.new.contains(CloneFlags::NEWUSER) {
        if uids.is_empty() || gids.is_empty() {
            return Err(refuse("linux.uidMappings", "a new user namespace needs user and group mappings"));
        }
    } else if !(plan.in_userns || uids.is_empty() && gids.is_empty()) {
        return Err(refuse("linux.uidMappings", "mappings without a user namespace"));
    }
    plan.id_maps = (id_maps(uids), id_maps(gids));
    Ok(())
}

pub(crate) fn id_maps(mappings: &[spec::IdMapping]) -> Vec<IdMap> {
    mappings.iter().map(|map| IdMap { inside: map.container_id, outside: map.host_id, size: map.size }).collect()
}

fn plan_names(plan: &mut Plan, spec: &Spec, extension: &Extension) -> Result<(), Error> {
    for (field, name, planned) in
        [("hostname", &spec.hostname, &mut plan.hostname), ("domainname", &spec.domainname, &mut plan.domainname)]
    {
        if name.len() > 64 || name.contains('\0') {
            return Err(refuse(field, "longer than 64 bytes or not a name"));
        }
        *planned = (!name.is_empty()).then(|| name.clone());
    }
    if (plan.hostname.is_some() || plan.domainname.is_some()) && !plan.is_own(NamespaceKind::Uts, extension) {
        return Err(refuse("hostname", "cannot be set without a uts namespace of the container's own"));
    }
    Ok(())
}

fn plan_root(plan: &mut Plan, spec: &Spec, bundle: &Path, extension: &Extension) -> Result<(), Error> {
    plan.readonly_root = spec.root.as_ref().is_some_and(|root| root.readonly);
    if !extension.root {
        match &spec.root {
            Some(root) if !root.path.is_empty() => plan.root = Some(bundle.join(&root.path)),
            _ => return Err(refuse("root.path", "missing")),
        }
    }
    plan.propagation = match spec.linux.rootfs_propagation.as_str() {
        "" => None,
        name => match mounts::propagation(name) {
            Some((propagation, _)) => Some(propagation),
            None => return Err(refuse("linux.rootfsPropagation", format!("unknown propagation {name}"))),
        },
    };
    Ok(())
}

/// The nodes that every container has: path below /dev, major, minor.
const DEFAULT_DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

fn plan_steps(plan: &mut Plan, spec: &Spec, bundle: &Path, extension: &Extension) -> Result<(), Error> {
    let mut own_dev = true;
    for mount in &spec.mounts {
        let mut mount = mounts::plan_mount(mount, bundle, extension)?;
        if let (Some(label), Source::Filesystem { kind, options, .. }) = (&plan.mount_label, &mut mount.source) {
            mounts::add_label(kind, options, label);
        }
        own_dev &= mount.destination != Path::new("/dev") || !matches!(mount.source, Source::Bind { .. } | Source::Given);
        plan.steps.push(Step::Mount(mount));
    }
    if own_dev {
        plan_devices(plan, spec)?;
    }
    if plan.process.terminal {
        plan.steps.push(Step::Console);
    }
    for path in &spec.linux.masked_paths {
        plan.steps.push(Step::Mask(absolute("linux.maskedPaths", path)?));
    }
    for path in &spec.linux.readonly_paths {
        plan.steps.push(Step::ReadOnly(absolute("linux.readonlyPaths", path)?));
    }
    Ok(())
}

fn plan_devices(plan: &mut Plan, spec: &Spec) -> Result<(), Error> {
    let mut devices = Vec::new();
    for device in &spec.linux.devices {
        if !matches!(device.kind.as_str(), "c" | "u" | "b" | "p") {
            return Err(refuse("linux.devices", format!("{}: unknown type {:?}", device.path, device.kind)));
        }
        let path = absolute("linux.devices", &device.path)?;
        devices.push(spec::Device { path: path.to_string_lossy().into_owned(), ..device.clone() });
    }
    for (name, major, minor) in DEFAULT_DEVICES {
        let path = format!("/dev/{name}");
        if !devices.iter().any(|device| device.path == path) {
            devices.push(spec::Device {
                kind: "c".into(),
                path,
                major,
                minor,
                file_mode: Some(0o666),
                uid: Some(0),
                gid: Some(0),
            });
        }
    }
    plan.steps.extend(devices.into_iter().map(Step::Device));
    for (path, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        plan.steps.push(Step::Link { path: path.into(), target: target.into(), replace: false });
    }
    plan.steps.push(Step::Link { path: "/dev/ptmx".into(), target: "pts/ptmx".into(), replace: true });
    Ok(())
}

/// An absolute path with `.` and `..` taken out of its text; what remains is resolved inside the root.
pub(crate) fn absolute(field: &str, path: &str) -> Result<PathBuf, Error> {
    if !path.starts_with('/') || path.contains('\0') {
        return Err(refuse(field, format!("{path:?} is not an absolute path")));
    }
    let mut clean = PathBuf::from("/");
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Ok(clean)
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
