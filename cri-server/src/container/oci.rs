//! The OCI spec of a container: a pure function of what was asked, what the image says and what was looked up.

use std::collections::BTreeMap;

use berth_image::ImageConfig;
use berth_linux::caps::CapSet;
use berth_oci::spec::{Device, EnvVar, Linux, Mount, Namespace, NamespaceType, Process, Root, Seccomp, Spec, User};

use super::devices::Granted;
use super::mounts::oci_maps;
use super::security::oci_capabilities;
use super::user::Resolved;
use crate::cgroups::{device_rule, limits};
use crate::error::{Error, invalid};
use crate::id::SandboxId;
use crate::sandbox::files;
use crate::spec::{ContainerSpec, Labels, NamespaceMode, Propagation, SandboxSpec};

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Everything the spec depends on.
pub(crate) struct Inputs<'a> {
    pub(crate) sandbox_id: &'a SandboxId,
    pub(crate) sandbox: &'a SandboxSpec,
    pub(crate) spec: &'a ContainerSpec,
    pub(crate) image: &'a ImageConfig,
    pub(crate) image_name: &'a str,
    pub(crate) user: &'a Resolved,
    pub(crate) volumes: Vec<Mount>,
    pub(crate) devices: Vec<Granted>,
    pub(crate) caps: CapSet,
    pub(crate) ambient: CapSet,
    pub(crate) seccomp: Option<Seccomp>,
    pub(crate) apparmor: String,
    pub(crate) labels: Labels,
    pub(crate) cgroup: String,
    /// The machine has cgroup v2 alone.
    pub(crate) unified: bool,
}

/// The destination of the pod's shared memory.
pub(crate) const SHM: &str = "/dev/shm";

/// Builds the spec.
pub(crate) fn build(inputs: Inputs<'_>) -> Result<Spec, Error> {
    let spec = inputs.spec;
    let security = &spec.security;
    let process = process(&inputs)?;
    let mounts = mounts(&inputs)?;
    let own_users = inputs.sandbox.namespaces.own_users();
    let rules = device_rules(security.privileged, &inputs.devices);
    let mut resources = spec.resources.as_ref().map(limits).unwrap_or_default();
    resources.devices = rules;
    let asks = |p| spec.mounts.iter().any(|m| m.propagation == p);
    let rootfs_propagation = if asks(Propagation::Bidirectional) {
        "rshared"
    } else if asks(Propagation::HostToContainer) {
        "rslave"
    } else {
        "rprivate"
    };
    let paths = |list: &[String]| if security.privileged { Vec::new() } else { list.to_vec() };
    Ok(Spec {
        oci_version: berth_oci::spec::VERSION.into(),
        process: Some(process),
        root: Some(Root { path: String::new(), readonly: security.readonly_rootfs }),
        mounts,
        annotations: annotations(&inputs),
        linux: Linux {
            namespaces: namespaces(&inputs),
            uid_mappings: own_users.map(|u| oci_maps(&u.uids)).unwrap_or_default(),
            gid_mappings: own_users.map(|u| oci_maps(&u.gids)).unwrap_or_default(),
            devices: inputs.devices.into_iter().map(|d| d.device).collect(),
            cgroups_path: inputs.cgroup,
            resources: Some(resources),
            mount_label: inputs.labels.mount,
            rootfs_propagation: rootfs_propagation.into(),
            seccomp: inputs.seccomp,
            masked_paths: paths(&security.masked_paths),
            readonly_paths: paths(&security.readonly_paths),
            ..Default::default()
        },
        ..Default::default()
    })
}

fn device_rules(privileged: bool, devices: &[Granted]) -> Vec<berth_cgroup::DeviceRule> {
    if privileged {
        return vec![device_rule(true, "a", None, None, "rwm")];
    }
    let mut rules = vec![
        device_rule(false, "a", None, None, "rwm"),
        device_rule(true, "c", None, None, "m"),
        device_rule(true, "b", None, None, "m"),
    ];
    // null, zero, full, tty, random, urandom, console, ptmx, pseudo terminals.
    for (major, minor) in [(1, 3), (1, 5), (1, 7), (5, 0), (1, 8), (1, 9), (5, 1), (5, 2)] {
        rules.push(device_rule(true, "c", Some(major), Some(minor), "rwm"));
    }
    rules.push(device_rule(true, "c", Some(136), None, "rwm"));
    for granted in devices {
        let d = &granted.device;
        rules.push(device_rule(true, &d.kind, Some(d.major), Some(d.minor), &granted.access));
    }
    rules
}

/// What to run: the request's command and arguments over the image's.
pub(crate) fn args(spec: &ContainerSpec, image: &ImageConfig) -> Result<Vec<String>, Error> {
    let args: Vec<String> = match (spec.command.is_empty(), spec.args.is_empty()) {
        (false, _) => spec.command.iter().chain(&spec.args).cloned().collect(),
        (true, false) => image.entrypoint.iter().chain(&spec.args).cloned().collect(),
        (true, true) => image.entrypoint.iter().chain(&image.cmd).cloned().collect(),
    };
    if args.is_empty() {
        return Err(invalid("config.command", "no command specified, and the image has none"));
    }
    Ok(args)
}

fn process(inputs: &Inputs<'_>) -> Result<Process, Error> {
    let spec = inputs.spec;
    let cwd = [&spec.working_dir, &inputs.image.working_dir].into_iter().find(|d| !d.is_empty()).cloned();
    let cwd = cwd.unwrap_or_else(|| "/".into());
    let user = &inputs.user.user;
    Ok(Process {
        terminal: spec.tty,
        user: User { uid: user.uid, gid: user.gid, umask: None, additional_gids: user.groups.clone() },
        args: args(spec, inputs.image)?,
        env: env(inputs),
        cwd: if cwd.starts_with('/') { cwd } else { format!("/{cwd}") },
        capabilities: Some(oci_capabilities(inputs.caps, inputs.ambient)),
        no_new_privileges: spec.security.no_new_privs,
        apparmor_profile: inputs.apparmor.clone(),
        selinux_label: inputs.labels.process.clone(),
        oom_score_adj: spec.resources.as_ref().map(|r| r.oom_score_adj.clamp(-1000, 1000) as i32),
        ..Default::default()
    })
}

/// HOSTNAME, the image's, the request's; the last value of a name wins and keeps the first's place.
fn env(inputs: &Inputs<'_>) -> Vec<EnvVar> {
    let mut out: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut index: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
    let mut set = |name: &[u8], entry: Vec<u8>| match index.get(name) {
        Some(i) => out[*i].1 = entry,
        None => {
            index.insert(name.to_vec(), out.len());
            out.push((name.to_vec(), entry));
        }
    };
    let mut text = |entry: &str| {
        let name = entry.split('=').next().unwrap_or(entry);
        set(name.as_bytes(), entry.as_bytes().to_vec());
    };
    text(&format!("HOSTNAME={}", files::hostname(inputs.sandbox)));
    text(PATH);
    text(&format!("HOME={}", inputs.user.home));
    if inputs.spec.tty {
        text("TERM=xterm");
    }
    inputs.image.env.iter().for_each(|e| text(e));
    for var in &inputs.spec.envs {
        let entry = [var.name.as_bytes(), b"=", var.value.as_bytes()].concat();
        set(var.name.as_bytes(), entry);
    }
    out.into_iter().map(|(_, entry)| EnvVar(entry)).collect()
}

fn namespaces(inputs: &Inputs<'_>) -> Vec<Namespace> {
    let ns = &inputs.sandbox.namespaces;
    let node = |m| m == NamespaceMode::Node;
    let mut kinds = vec![NamespaceType::Mount];
    if !node(inputs.spec.security.namespaces.pid) {
        kinds.push(NamespaceType::Pid);
    }
    if !node(ns.ipc) {
        kinds.push(NamespaceType::Ipc);
    }
    if !node(ns.network) {
        kinds.extend([NamespaceType::Network, NamespaceType::Uts]);
    }
    if ns.own_users().is_some() {
        kinds.push(NamespaceType::User);
    }
    if inputs.unified && !inputs.spec.security.privileged {
        kinds.push(NamespaceType::Cgroup);
    }
    kinds.into_iter().map(|kind| Namespace { kind, path: String::new() }).collect()
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        destination: destination.into(),
        kind: kind.into(),
        source: source.into(),
        options: options.iter().map(|o| (*o).to_owned()).collect(),
        ..Default::default()
    }
}

/// A path with single slashes and no `.`; always absolute.
pub(crate) fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            other => parts.push(other),
        }
    }
    format!("/{}", parts.join("/"))
}

fn mounts(inputs: &Inputs<'_>) -> Result<Vec<Mount>, Error> {
    let security = &inputs.spec.security;
    let sys_access = if security.privileged { "rw" } else { "ro" };
    let mut out = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", sys_access]),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", sys_access]),
    ];
    let access = if security.readonly_rootfs { "ro" } else { "rw" };
    for name in files::NAMES {
        out.push(mount(&format!("/etc/{name}"), "bind", name, &["rbind", "rprivate", access]));
    }
    out.push(mount(SHM, "bind", SHM, &["rbind", "rprivate", "rw"]));
    let mut volumes = inputs.volumes.clone();
    for volume in &mut volumes {
        volume.destination = clean(&volume.destination);
    }
    for (i, volume) in volumes.iter().enumerate() {
        if volumes[..i].iter().any(|other| other.destination == volume.destination) {
            return Err(invalid("mounts.container_path", format!("{:?} is named twice", volume.destination)));
        }
        if volume.destination == "/" {
            return Err(invalid("mounts.container_path", "a volume can not cover the root"));
        }
    }
    out.retain(|m| !volumes.iter().any(|v| v.destination == m.destination));
    volumes.sort_by_key(|v| v.destination.matches('/').count());
    out.extend(volumes);
    Ok(out)
}

/// Sets one variable: a name that is there keeps its place.
pub(crate) fn set_env(env: &mut Vec<EnvVar>, entry: &[u8]) {
    let name = |entry: &[u8]| entry.iter().position(|b| *b == b'=').map(|at| entry[..at].to_vec());
    let wanted = name(entry);
    match env.iter_mut().find(|e| wanted.is_some() && name(&e.0) == wanted) {
        Some(there) => there.0 = entry.to_vec(),
        None => env.push(EnvVar(entry.to_vec())),
    }
}

/// Gives the container a device node, in place of one at the same path, and the right to use it.
pub(crate) fn set_device(spec: &mut Spec, device: Device, access: &str) {
    let rule = device_rule(true, &device.kind, Some(device.major), Some(device.minor), access);
    spec.linux.devices.retain(|d| d.path != device.path);
    if matches!(device.kind.as_str(), "b" | "c") {
        spec.linux.resources.get_or_insert_default().devices.push(rule);
    }
    spec.linux.devices.push(device);
}

/// Adds a mount, in place of one at the same destination. Mounts stay sorted: what is above comes first.
pub(crate) fn set_mount(spec: &mut Spec, mut mount: Mount) {
    mount.destination = clean(&mount.destination);
    spec.mounts.retain(|m| m.destination != mount.destination);
    let depth = |m: &Mount| m.destination.matches('/').count();
    let at = spec.mounts.iter().rposition(|m| depth(m) <= depth(&mount)).map_or(0, |at| at + 1);
    // Nothing that hides it may come later, and nothing below it earlier.
    let below = format!("{}/", mount.destination);
    let at = spec.mounts.iter().position(|m| m.destination.starts_with(&below)).map_or(at, |first| at.min(first));
    spec.mounts.insert(at, mount);
}

/// Whether a mount binds something of the host.
pub(crate) fn is_bind(mount: &Mount) -> bool {
    mount.kind == "bind" || mount.options.iter().any(|o| o == "bind" || o == "rbind")
}

/// The names other tools look for.
fn annotations(inputs: &Inputs<'_>) -> BTreeMap<String, String> {
    let m = &inputs.sandbox.metadata;
    [
        ("container-type", "container"),
        ("sandbox-id", inputs.sandbox_id.as_str()),
        ("sandbox-name", &m.name),
        ("sandbox-namespace", &m.namespace),
        ("sandbox-uid", &m.uid),
        ("container-name", &inputs.spec.name),
        ("image-name", inputs.image_name),
    ]
    .into_iter()
    .map(|(k, v)| (format!("io.kubernetes.cri.{k}"), v.to_owned()))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::RunUser;
    use crate::spec::{EnvValue, EnvVar as SpecVar, Namespaces, Security};

    fn with<T>(spec: &ContainerSpec, image: &ImageConfig, volumes: Vec<Mount>, use_it: impl FnOnce(Inputs<'_>) -> T) -> T {
        let user = Resolved { user: RunUser { uid: 1, gid: 2, groups: vec![2, 3] }, home: "/root".into() };
        use_it(Inputs {
            sandbox_id: &"ab".into(),
            sandbox: &SandboxSpec { hostname: "pod".into(), ..Default::default() },
            spec,
            image,
            image_name: "i",
            user: &user,
            volumes,
            devices: vec![],
            caps: CapSet::EMPTY,
            ambient: CapSet::EMPTY,
            seccomp: None,
            apparmor: String::new(),
            labels: Labels::default(),
            cgroup: "/c".into(),
            unified: false,
        })
    }

    fn list(items: &[&str]) -> Vec<String> {
        items.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn command_replaces_the_entrypoint_and_arguments_the_images() {
        let image = ImageConfig { entrypoint: list(&["e"]), cmd: list(&["c"]), ..Default::default() };
        let spec = |command: &[&str], a: &[&str]| ContainerSpec { command: list(command), args: list(a), ..Default::default() };
        for (command, a, want) in [
            (vec!["x"], vec!["y"], vec!["x", "y"]),
            (vec!["x"], vec![], vec!["x"]),
            (vec![], vec!["y"], vec!["e", "y"]),
            (vec![], vec![], vec!["e", "c"]),
        ] {
            assert_eq!(args(&spec(&command, &a), &image).unwrap(), want);
        }
        assert!(args(&spec(&[], &[]), &ImageConfig::default()).is_err());
    }

    #[test]
    fn later_environment_wins_and_values_may_be_any_bytes() {
        let image = ImageConfig { env: list(&["A=image", "PATH=/i"]), cmd: list(&["c"]), ..Default::default() };
        let spec = ContainerSpec {
            envs: vec![
                SpecVar { name: "A".into(), value: EnvValue::new(b"spec".to_vec()) },
                SpecVar { name: "B".into(), value: EnvValue::new(vec![0xff]) },
            ],
            ..Default::default()
        };
        let env = with(&spec, &image, vec![], |i| build(i).unwrap().process.unwrap().env);
        let raw: Vec<Vec<u8>> = env.into_iter().map(|e| e.0).collect();
        assert_eq!(raw[0], b"HOSTNAME=pod");
        assert!(raw.contains(&b"A=spec".to_vec()) && raw.contains(&b"PATH=/i".to_vec()) && raw.contains(&b"B=\xff".to_vec()));
        assert_eq!(raw.iter().filter(|e| e.starts_with(b"A=")).count(), 1);
    }

    #[test]
    fn a_volume_takes_the_place_of_what_the_runtime_would_mount_there() {
        let image = ImageConfig { cmd: list(&["c"]), ..Default::default() };
        let volume = |d: &str| Mount { destination: d.into(), kind: "bind".into(), source: "/mine".into(), ..Default::default() };
        let spec = ContainerSpec::default();
        let mounts = with(&spec, &image, vec![volume("/a/b"), volume("/etc//hosts"), volume("/a")], |i| build(i).unwrap().mounts);
        let hosts: Vec<_> = mounts.iter().filter(|m| m.destination == "/etc/hosts").collect();
        assert_eq!((hosts.len(), hosts[0].source.as_str()), (1, "/mine"));
        let at = |d: &str| mounts.iter().position(|m| m.destination == d).unwrap();
        assert!(at("/a") < at("/a/b"));
        assert!(with(&spec, &image, vec![volume("/a"), volume("/a/")], |i| build(i).is_err()));
    }

    #[test]
    fn host_namespaces_are_left_out_and_privileged_has_no_masks() {
        let image = ImageConfig { cmd: list(&["c"]), ..Default::default() };
        let spec = ContainerSpec {
            security: Security {
                privileged: true,
                masked_paths: list(&["/proc/kcore"]),
                namespaces: Namespaces { pid: NamespaceMode::Node, ..Default::default() },
                ..Default::default()
            },
            ..Default::default()
        };
        let host =
            SandboxSpec { namespaces: Namespaces { network: NamespaceMode::Node, ..Default::default() }, ..Default::default() };
        let oci = with(&spec, &image, vec![], |i| build(Inputs { sandbox: &host, ..i }).unwrap());
        let kinds: Vec<_> = oci.linux.namespaces.iter().map(|n| n.kind).collect();
        assert_eq!(kinds, [NamespaceType::Mount, NamespaceType::Ipc]);
        assert!(oci.linux.masked_paths.is_empty());
        assert_eq!(oci.linux.resources.unwrap().devices.len(), 1);
    }
}
