use super::*;
use crate::spec::{Linux, Namespace, Process, Root};

fn host() -> Host {
    Host { bounding: CapSet::ALL, apparmor: false, selinux: false }
}

fn spec() -> Spec {
    Spec {
        oci_version: "1.2.0".into(),
        process: Some(Process { args: vec!["sh".into()], cwd: "/".into(), ..Process::default() }),
        root: Some(Root { path: "rootfs".into(), readonly: false }),
        linux: Linux {
            namespaces: [NamespaceType::Mount, NamespaceType::Pid, NamespaceType::Ipc, NamespaceType::Uts]
                .map(|kind| Namespace { kind, path: String::new() })
                .to_vec(),
            ..Linux::default()
        },
        ..Spec::default()
    }
}

fn planned(spec: &Spec) -> Result<Plan, Error> {
    plan(spec, Path::new("/bundle"), &Extension::default(), &host())
}

fn refused(change: impl FnOnce(&mut Spec)) -> String {
    let mut spec = spec();
    change(&mut spec);
    planned(&spec).unwrap_err().to_string()
}

fn mount(kind: &str, destination: &str, options: &[&str]) -> spec::Mount {
    spec::Mount {
        destination: destination.into(),
        kind: kind.into(),
        source: "/src".into(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..spec::Mount::default()
    }
}

fn plan_one(mount: spec::Mount) -> Result<Mount, Error> {
    super::mounts::plan_mount(&mount, Path::new("/bundle"), &Extension::default())
}

#[test]
fn of_several_environment_entries_with_one_name_the_last_counts() {
    let mut spec = spec();
    let process = spec.process.as_mut().unwrap();
    process.env = ["A=1", "PATH=/a", "B=2=x", "A=3", "PATH=/b", "C", "A"].map(Into::into).to_vec();
    let plan = planned(&spec).unwrap();
    let env: Vec<_> = plan.process.env.iter().map(|entry| entry.to_str().unwrap()).collect();
    assert_eq!(env, ["B=2=x", "PATH=/b", "C", "A"]);
    assert_eq!(plan.process.path, b"/b");
}

#[test]
fn a_plain_spec_gets_default_devices_and_links() {
    let plan = planned(&spec()).unwrap();
    assert_eq!(plan.root.as_deref(), Some(Path::new("/bundle/rootfs")));
    let devices: Vec<_> = plan
        .steps
        .iter()
        .filter_map(|step| match step {
            Step::Device(device) => Some(device.path.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(devices, ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"]);
    assert!(plan.new.contains(CloneFlags::NEWNS | CloneFlags::NEWPID | CloneFlags::NEWIPC | CloneFlags::NEWUTS));
    let mut bound = spec();
    bound.mounts.push(mount("bind", "/dev", &["rbind"]));
    assert!(!planned(&bound).unwrap().steps.iter().any(|step| matches!(step, Step::Device(_) | Step::Link { .. })));
}

#[test]
fn mount_options_become_attributes_in_the_order_given() {
    let planned = plan_one(mount("bind", "/data/../x", &["rbind", "ro", "nosuid", "rw", "rslave", "noatime", "rro"])).unwrap();
    assert_eq!(planned.destination, Path::new("/x"));
    assert_eq!(planned.source, Source::Bind { path: "/src".into(), recursive: true });
    assert_eq!(planned.change.set, MountAttrs::NOSUID | MountAttrs::NOATIME);
    assert!(planned.change.clear.contains(MountAttrs::RDONLY | MountAttrs::ATIME));
    assert_eq!(planned.recursive.set, MountAttrs::RDONLY);
    assert_eq!(planned.propagation, [(Propagation::Slave, true)]);
    // `relatime` and `rw` begin with an r and are no recursive forms of something.
    let plain = plan_one(mount("bind", "/x", &["bind", "relatime", "rw"])).unwrap();
    assert!(plain.recursive.is_empty());
    let tmpfs = plan_one(mount("tmpfs", "/t", &["nosuid", "mode=1777", "size=64k", "noswap"])).unwrap();
    let Source::Filesystem { options, .. } = tmpfs.source else { panic!() };
    assert_eq!(options, [("mode".into(), Some("1777".into())), ("size".into(), Some("64k".into())), ("noswap".into(), None)]);
}

#[test]
fn mounts_that_cannot_be_right_are_refused_by_name() {
    for (mount, word) in [
        (mount("bind", "/x", &["bind", "size=1"]), "size=1"),
        (mount("", "/x", &[]), "neither a type"),
        (mount("tmpfs", "/", &[]), "root itself"),
        (mount("bind", "/proc/sys/kernel", &["bind"]), "inside /proc"),
        (mount("bind", "/a/../proc/1", &["bind"]), "inside /proc"),
        (mount("tmpfs", "/proc", &[]), "only proc"),
        (mount("bind", "/x", &["remount", "bind"]), "remount"),
        (mount("tmpfs", "/x", &["idmap"]), "only a bind mount"),
    ] {
        let error = plan_one(mount).unwrap_err().to_string();
        assert!(error.contains(word) && error.starts_with("mounts"), "{error}");
    }
    assert!(plan_one(mount("bind", "/proc/meminfo", &["bind"])).is_ok());
}

#[test]
fn a_spec_that_cannot_be_right_is_refused_by_field() {
    for (error, field) in [
        (refused(|spec| spec.process = None), "process: missing"),
        (refused(|spec| spec.process.as_mut().unwrap().args.clear()), "process.args"),
        (refused(|spec| spec.process.as_mut().unwrap().cwd = "tmp".into()), "process.cwd"),
        (refused(|spec| spec.process.as_mut().unwrap().apparmor_profile = "x".into()), "process.apparmorProfile"),
        (refused(|spec| spec.process.as_mut().unwrap().selinux_label = "a:b:c:s0".into()), "process.selinuxLabel"),
        (refused(|spec| spec.linux.mount_label = "a:b:c:s0".into()), "linux.mountLabel"),
        (refused(|spec| spec.process.as_mut().unwrap().oom_score_adj = Some(2000)), "process.oomScoreAdj"),
        (refused(|spec| spec.root = None), "root.path"),
        (refused(|spec| spec.oci_version = "2.0".into()), "ociVersion"),
        (refused(|spec| spec.linux.namespaces.clear()), "linux.namespaces"),
        (
            refused(|spec| spec.linux.namespaces.push(Namespace { kind: NamespaceType::Pid, path: String::new() })),
            "linux.namespaces",
        ),
        (
            refused(|spec| spec.linux.namespaces.push(Namespace { kind: NamespaceType::User, path: String::new() })),
            "linux.uidMappings",
        ),
        (refused(|spec| spec.linux.rootfs_propagation = "odd".into()), "linux.rootfsPropagation"),
        (refused(|spec| spec.linux.masked_paths.push("proc/x".into())), "linux.maskedPaths"),
        (
            refused(|spec| {
                spec.linux.devices.push(spec::Device { path: "/dev/x".into(), kind: "z".into(), ..Default::default() })
            }),
            "linux.devices",
        ),
        (
            refused(|spec| {
                spec.hostname = "a".into();
                spec.linux.namespaces.retain(|namespace| namespace.kind != NamespaceType::Uts);
            }),
            "hostname",
        ),
    ] {
        assert!(error.starts_with(field), "{error} / {field}");
    }
}

#[test]
fn only_parameters_of_own_namespaces_can_be_set() {
    let set = |name: &str| {
        let mut spec = spec();
        spec.linux.sysctl.insert(name.into(), "1".into());
        planned(&spec).map(|plan| plan.sysctls[0].0.display().to_string()).map_err(|error| error.to_string())
    };
    assert_eq!(set("kernel.shm_rmid_forced").unwrap(), "kernel/shm_rmid_forced");
    assert_eq!(set("fs.mqueue.msg_max").unwrap(), "fs/mqueue/msg_max");
    assert!(set("net.ipv4.ip_forward").unwrap_err().contains("host's net namespace"));
    assert!(set("vm.swappiness").unwrap_err().contains("not in a separate kernel namespace"));
    assert!(set("kernel.core_pattern").is_err());
    assert!(set("fs.mqueue.../../../core").is_err());
    let mut own_net = spec();
    own_net.linux.namespaces.push(Namespace { kind: NamespaceType::Network, path: String::new() });
    own_net.linux.sysctl.insert("net/ipv4/conf/eth0.1/forwarding".into(), "1".into());
    assert_eq!(planned(&own_net).unwrap().sysctls[0].0, Path::new("net/ipv4/conf/eth0.1/forwarding"));
    assert_eq!(super::sysctl::path("net.ipv4.conf.eth0/1.forwarding").unwrap(), "net/ipv4/conf/eth0.1/forwarding");
    // A namespace that is entered but is the machine's own gives no right to its parameters.
    let mut joined = spec();
    joined.linux.sysctl.insert("net.ipv4.ip_forward".into(), "1".into());
    let mut extension = Extension { joined: [NamespaceKind::Net].into(), ..Extension::default() };
    assert!(plan(&joined, Path::new("/"), &extension, &host()).is_ok());
    extension.shared_with_host = [NamespaceKind::Net].into();
    assert!(plan(&joined, Path::new("/"), &extension, &host()).is_err());
}

#[test]
fn capabilities_are_cut_to_what_we_have_with_a_warning() {
    let caps = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let mut process = spec().process.unwrap();
    process.capabilities = Some(spec::Capabilities {
        bounding: caps(&["CAP_CHOWN", "CAP_SYS_RESOURCE"]),
        effective: caps(&["CAP_CHOWN"]),
        permitted: caps(&["CAP_CHOWN"]),
        inheritable: Vec::new(),
        ambient: caps(&["CAP_CHOWN"]),
    });
    let resource = CapSet::from_name("CAP_SYS_RESOURCE").unwrap();
    let host = Host { bounding: CapSet::ALL.difference(resource), apparmor: false, selinux: false };
    let mut warnings = Vec::new();
    let plan = plan_process(&process, &host, &mut warnings).unwrap();
    assert_eq!(plan.caps.bounding, CapSet::from_name("CAP_CHOWN").unwrap());
    assert_eq!(plan.caps.ambient, CapSet::EMPTY);
    assert_eq!(warnings.len(), 2);
    assert!(warnings[0].contains("CAP_SYS_RESOURCE") && warnings[1].contains("ambient"));
    process.capabilities = Some(spec::Capabilities { bounding: caps(&["CAP_FROB"]), ..Default::default() });
    assert!(plan_process(&process, &host, &mut warnings).unwrap_err().to_string().contains("CAP_FROB"));
    process.capabilities = Some(spec::Capabilities { effective: caps(&["CAP_CHOWN"]), ..Default::default() });
    assert!(plan_process(&process, &host, &mut warnings).unwrap_err().to_string().contains("not permitted"));
}

#[test]
fn the_last_path_of_the_environment_is_searched() {
    let mut process = spec().process.unwrap();
    process.env = vec!["PATH=/a".into(), "X=1".into(), "PATH=/b::/c".into()];
    let plan = plan_process(&process, &host(), &mut Vec::new()).unwrap();
    assert_eq!(plan.search_path().collect::<Vec<_>>(), [Path::new("/b"), Path::new("."), Path::new("/c")]);
    process.env = vec!["A=\0".into()];
    assert!(plan_process(&process, &host(), &mut Vec::new()).is_err());
}

#[test]
fn a_mount_label_goes_to_what_has_no_labels_of_its_own() {
    let mut spec = spec();
    let label = "system_u:object_r:container_file_t:s0:c1,c2";
    spec.linux.mount_label = label.into();
    spec.process.as_mut().unwrap().selinux_label = "system_u:system_r:container_t:s0:c1,c2".into();
    spec.mounts =
        vec![mount("proc", "/proc", &[]), mount("tmpfs", "/dev", &["mode=755"]), mount("tmpfs", "/a", &["context=own"])];
    let host = Host { selinux: true, ..host() };
    let plan = plan(&spec, Path::new("/"), &Extension::default(), &host).unwrap();
    let contexts: Vec<_> = plan
        .steps
        .iter()
        .filter_map(|step| match step {
            Step::Mount(Mount { source: Source::Filesystem { options, .. }, .. }) => Some(options),
            _ => None,
        })
        .map(|options| options.iter().find(|(key, _)| key == "context").and_then(|(_, value)| value.clone()))
        .collect();
    assert_eq!(contexts, [None, Some(label.to_owned()), Some("own".to_owned())]);
    assert_eq!(plan.mount_label.as_deref(), Some(label));
    assert_eq!(plan.process.selinux.as_deref(), Some("system_u:system_r:container_t:s0:c1,c2"));
}
