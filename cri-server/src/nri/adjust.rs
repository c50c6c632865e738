//! What plugins want of a container that is being made, applied to its OCI spec. What the OCI core does not do is refused by
//! its name: a plugin that asks for it and a container without it must not meet.

use std::collections::BTreeMap;

use berth_nri::api::{self, ContainerAdjustment, LinuxContainerAdjustment, LinuxResources};
use berth_nri::removal;
use berth_oci::spec::{
    Device, Hook, Hooks, Mount, Namespace, NamespaceType, Process, Rlimit, Seccomp, SeccompArg, SeccompRule, Spec,
};
use berth_shim::protocol::PodNamespace;

use super::limits;
use super::messages::NAMESPACES;
use crate::cdi::Registry;
use crate::container::oci;
use crate::error::{Error, invalid};
use crate::spec::Resources;

/// What of an adjustment is not in the OCI spec.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Adjusted {
    /// Namespaces of the pod that the container does not enter.
    pub(crate) stay_out: Vec<PodNamespace>,
    /// A PID namespace other than the one that the request asked for: one of the spec's, or the host's.
    pub(crate) pid: Option<PidNamespace>,
}

/// Whose processes the container sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PidNamespace {
    /// As the OCI spec says.
    Spec,
    /// The host's.
    Host,
}

fn unsupported(what: &'static str, reason: &str) -> Error {
    Error::Unsupported { what, reason: reason.into() }
}

/// Applies an adjustment; `limits` are the container's in the CRI's words. Blocking: CDI spec files are read.
pub(crate) fn adjust(
    cdi: &Registry,
    spec: &mut Spec,
    asked: &mut Option<Resources>,
    wanted: ContainerAdjustment,
) -> Result<Adjusted, Error> {
    let linux = wanted.linux.unwrap_or_default();
    refuse(&linux)?;
    merge(&mut spec.annotations, wanted.annotations);
    if let Some(process) = &mut spec.process {
        env(process, &wanted.env)?;
        if !wanted.args.is_empty() {
            process.args = wanted.args;
        }
        for limit in wanted.rlimits {
            process.rlimits.retain(|l| l.kind != limit.r#type);
            process.rlimits.push(Rlimit { kind: limit.r#type, hard: limit.hard, soft: limit.soft });
        }
        if let Some(score) = linux.oom_score_adj {
            let score = i32::try_from(score.value).ok().filter(|s| (-1000..=1000).contains(s));
            process.oom_score_adj =
                Some(score.ok_or_else(|| invalid("NRI adjustment", "oom_score_adj is not from -1000 to 1000"))?);
        }
    }
    if let Some(hooks) = wanted.hooks {
        add_hooks(spec.hooks.get_or_insert_with(Hooks::default), hooks)?;
    }
    let names: Vec<String> = wanted.cdi_devices.into_iter().map(|d| d.name).collect();
    cdi.inject(spec, &names)?;
    for device in linux.devices {
        set_device(spec, device)?;
    }
    if let Some(policy) = linux.seccomp_policy {
        spec.linux.seccomp = Some(seccomp(policy));
    }
    let adjusted = namespaces(spec, linux.namespaces)?;
    merge(&mut spec.linux.sysctl, linux.sysctl);
    if let Some(resources) = &linux.resources {
        set_resources(spec, resources);
        let mut changed = limits::kept(resources);
        if changed.memory_swap_limit == 0 {
            changed.memory_swap_limit = changed.memory_limit; // As in the spec.
        }
        *asked = Some(asked.take().unwrap_or_default().merged(&changed));
    }
    if let Some(score) = linux.oom_score_adj {
        asked.get_or_insert_default().oom_score_adj = score.value;
    }
    for mount in wanted.mounts {
        set_mount(spec, mount);
    }
    Ok(adjusted)
}

/// What we do not do, by the names of the fields.
fn refuse(linux: &LinuxContainerAdjustment) -> Result<(), Error> {
    let resources = linux.resources.clone().unwrap_or_default();
    let class = |class: &Option<api::OptionalString>| class.as_ref().is_some_and(|c| !c.value.is_empty());
    let rdt = linux.rdt.clone().unwrap_or_default();
    for (is_set, what, reason) in [
        (!linux.cgroups_path.is_empty(), "NRI adjustment linux.cgroups_path", "a container's cgroup is named after it"),
        (linux.io_priority.is_some(), "NRI adjustment linux.io_priority", "berth sets no I/O priorities"),
        (linux.scheduler.is_some(), "NRI adjustment linux.scheduler", "berth sets no scheduling policies"),
        (linux.memory_policy.is_some(), "NRI adjustment linux.memory_policy", "berth sets no memory policies"),
        (
            linux.net_devices.keys().any(|k| removal(k).is_none()),
            "NRI adjustment linux.net_devices",
            "berth does not move interfaces into containers",
        ),
        (
            rdt.clos_id.is_some() || rdt.schemata.is_some() || rdt.enable_monitoring.is_some() || class(&resources.rdt_class),
            "NRI adjustment linux.rdt",
            "berth does not set up cache allocation (resctrl)",
        ),
        (class(&resources.blockio_class), "NRI adjustment linux.resources.blockio_class", "berth has no block I/O classes"),
    ] {
        if is_set {
            return Err(unsupported(what, reason));
        }
    }
    Ok(())
}

/// Keys with values; `-key` takes one away.
fn merge(target: &mut BTreeMap<String, String>, wanted: BTreeMap<String, String>) {
    for key in wanted.keys().filter_map(|key| removal(key)) {
        target.remove(key);
    }
    target.extend(wanted.into_iter().filter(|(key, _)| removal(key).is_none()));
}

fn env(process: &mut Process, wanted: &[api::KeyValue]) -> Result<(), Error> {
    for entry in wanted {
        match removal(&entry.key) {
            Some(name) => {
                let is_it = |e: &[u8]| e.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&b'='));
                process.env.retain(|e| !is_it(&e.0));
            }
            None if entry.key.is_empty() || entry.key.contains(['=', '\0']) || entry.value.contains('\0') => {
                return Err(invalid("NRI adjustment", format!("{:?} can not be an environment variable", entry.key)));
            }
            None => oci::set_env(&mut process.env, format!("{}={}", entry.key, entry.value).as_bytes()),
        }
    }
    Ok(())
}

fn add_hooks(to: &mut Hooks, from: api::Hooks) -> Result<(), Error> {
    let hook = |h: api::Hook| {
        if !h.path.starts_with('/') {
            return Err(invalid("NRI adjustment", format!("hook path {:?} is not absolute", h.path)));
        }
        let timeout = h.timeout.and_then(|t| u32::try_from(t.value).ok()).filter(|t| *t > 0);
        Ok(Hook { path: h.path, args: h.args, env: h.env, timeout })
    };
    for (point, hooks) in [
        (&mut to.prestart, from.prestart),
        (&mut to.create_runtime, from.create_runtime),
        (&mut to.create_container, from.create_container),
        (&mut to.start_container, from.start_container),
        (&mut to.poststart, from.poststart),
        (&mut to.poststop, from.poststop),
    ] {
        for one in hooks {
            point.push(hook(one)?);
        }
    }
    Ok(())
}

fn set_device(spec: &mut Spec, device: api::LinuxDevice) -> Result<(), Error> {
    if let Some(path) = removal(&device.path) {
        spec.linux.devices.retain(|d| d.path != path);
        return Ok(());
    }
    let number =
        |n: i64| u32::try_from(n).map_err(|_| invalid("NRI adjustment", format!("{:?}: {n} is no device number", device.path)));
    if !device.path.starts_with('/') || !matches!(device.r#type.as_str(), "b" | "c" | "u" | "p") {
        return Err(invalid("NRI adjustment", format!("{:?} of the type {:?} is no device", device.path, device.r#type)));
    }
    // Reading is always meant; writing where the mode lets anybody.
    let writes = device.file_mode.is_some_and(|m| m.value & 0o222 != 0) || device.file_mode.is_none();
    let access = format!("r{}{}", if writes { "w" } else { "" }, if device.r#type == "b" { "m" } else { "" });
    let node = Device {
        major: number(device.major)?,
        minor: number(device.minor)?,
        kind: device.r#type,
        path: device.path,
        file_mode: device.file_mode.map(|m| m.value & 0o7777),
        uid: device.uid.map(|v| v.value),
        gid: device.gid.map(|v| v.value),
    };
    oci::set_device(spec, node, &access);
    Ok(())
}

fn seccomp(policy: api::LinuxSeccomp) -> Seccomp {
    let arg = |a: api::LinuxSeccompArg| SeccompArg { index: a.index, value: a.value, value_two: a.value_two, op: a.op };
    let rule = |s: api::LinuxSyscall| SeccompRule {
        names: s.names,
        action: s.action,
        errno_ret: s.errno_ret.map(|v| v.value),
        args: s.args.into_iter().map(arg).collect(),
    };
    Seccomp {
        default_action: policy.default_action,
        default_errno_ret: policy.default_errno.map(|v| v.value),
        architectures: policy.architectures,
        flags: policy.flags,
        listener_path: policy.listener_path,
        listener_metadata: policy.listener_metadata,
        syscalls: policy.syscalls.into_iter().map(rule).collect(),
    }
}

/// Takes namespaces away, so that the container has the host's, or gives it existing ones by their paths.
fn namespaces(spec: &mut Spec, wanted: Vec<api::LinuxNamespace>) -> Result<Adjusted, Error> {
    let mut out = Adjusted::default();
    for namespace in wanted {
        let removed = removal(&namespace.r#type);
        let name = removed.unwrap_or(&namespace.r#type);
        let Some((kind, _)) = NAMESPACES.iter().find(|(_, n)| *n == name) else {
            return Err(invalid("NRI adjustment", format!("namespace {name:?} is unknown")));
        };
        let kind = *kind;
        if removed.is_none() && !namespace.path.is_empty() && !namespace.path.starts_with('/') {
            return Err(invalid("NRI adjustment", format!("namespace path {:?} is not absolute", namespace.path)));
        }
        match kind {
            NamespaceType::Network => out.stay_out.push(PodNamespace::Net),
            NamespaceType::Ipc => out.stay_out.push(PodNamespace::Ipc),
            NamespaceType::Uts => out.stay_out.push(PodNamespace::Uts),
            NamespaceType::Pid => out.pid = Some(if removed.is_some() { PidNamespace::Host } else { PidNamespace::Spec }),
            NamespaceType::Cgroup => {}
            NamespaceType::Mount | NamespaceType::User => {
                return Err(unsupported(
                    "NRI adjustment linux.namespaces",
                    "mount and user namespaces are the runtime's to make",
                ));
            }
        }
        spec.linux.namespaces.retain(|n| n.kind != kind);
        if removed.is_none() {
            spec.linux.namespaces.push(Namespace { kind, path: namespace.path });
        }
    }
    Ok(out)
}

fn set_resources(spec: &mut Spec, wanted: &LinuxResources) {
    let to = spec.linux.resources.get_or_insert_default();
    if let Some(from) = &wanted.memory {
        let memory = to.memory.get_or_insert_default();
        if let Some(limit) = from.limit {
            // Without a wish for swap there is none: it would else be what the request had, below the new limit.
            (memory.limit, memory.swap) = (Some(limit.value), Some(limit.value));
        }
        memory.swap = from.swap.map(|v| v.value).or(memory.swap);
        memory.reservation = from.reservation.map(|v| v.value).or(memory.reservation);
        memory.kernel = from.kernel.map(|v| v.value).or(memory.kernel);
        memory.kernel_tcp = from.kernel_tcp.map(|v| v.value).or(memory.kernel_tcp);
        memory.swappiness = from.swappiness.map(|v| v.value).or(memory.swappiness);
        memory.disable_oom_killer = from.disable_oom_killer.map(|v| v.value).or(memory.disable_oom_killer);
        memory.use_hierarchy = from.use_hierarchy.map(|v| v.value).or(memory.use_hierarchy);
    }
    if let Some(from) = &wanted.cpu {
        let cpu = to.cpu.get_or_insert_default();
        let text = |text: &String| (!text.is_empty()).then(|| text.clone());
        cpu.shares = from.shares.map(|v| v.value).or(cpu.shares);
        cpu.quota = from.quota.map(|v| v.value).or(cpu.quota);
        cpu.period = from.period.map(|v| v.value).or(cpu.period);
        cpu.realtime_runtime = from.realtime_runtime.map(|v| v.value).or(cpu.realtime_runtime);
        cpu.realtime_period = from.realtime_period.map(|v| v.value).or(cpu.realtime_period);
        cpu.cpus = text(&from.cpus).or(cpu.cpus.take());
        cpu.mems = text(&from.mems).or(cpu.mems.take());
    }
    for limit in &wanted.hugepage_limits {
        to.hugepage_limits.retain(|l| l.page_size != limit.page_size);
        to.hugepage_limits.push(berth_cgroup::HugepageLimit { page_size: limit.page_size.clone(), limit: limit.limit });
    }
    to.unified.extend(wanted.unified.clone());
    if let Some(pids) = &wanted.pids {
        to.pids = Some(berth_cgroup::Pids { limit: Some(pids.limit) });
    }
    to.devices.extend(wanted.devices.iter().map(|d| berth_cgroup::DeviceRule {
        allow: d.allow,
        kind: (!d.r#type.is_empty()).then(|| d.r#type.clone()),
        major: d.major.map(|v| v.value),
        minor: d.minor.map(|v| v.value),
        access: (!d.access.is_empty()).then(|| d.access.clone()),
    }));
}

fn set_mount(spec: &mut Spec, mount: api::Mount) {
    if let Some(destination) = removal(&mount.destination) {
        let destination = oci::clean(destination);
        spec.mounts.retain(|m| m.destination != destination);
        return;
    }
    // The root has to let through what a volume is to let through.
    let propagation = &mut spec.linux.rootfs_propagation;
    let has = |option: &str| mount.options.iter().any(|o| o == option);
    if has("rshared") {
        *propagation = "rshared".into();
    } else if has("rslave") && propagation != "rshared" {
        *propagation = "rslave".into();
    }
    oci::set_mount(
        spec,
        Mount {
            destination: mount.destination,
            kind: mount.r#type,
            source: mount.source,
            options: mount.options,
            ..Default::default()
        },
    );
}

#[cfg(test)]
mod tests {
    use berth_nri::api::{
        KeyValue, LinuxCpu, LinuxMemory, LinuxNamespace, OptionalInt, OptionalInt64, OptionalUInt64, PosixRlimit,
    };

    use super::*;

    fn spec() -> Spec {
        let process = Process { env: vec!["A=1".into(), "AB=2".into()], args: vec!["old".into()], ..Default::default() };
        let mut spec = Spec { process: Some(process), ..Default::default() };
        spec.annotations.insert("gone".into(), "x".into());
        spec.linux.namespaces = vec![
            Namespace { kind: NamespaceType::Network, path: String::new() },
            Namespace { kind: NamespaceType::Mount, path: String::new() },
        ];
        spec.mounts = vec![Mount { destination: "/old".into(), ..Default::default() }];
        spec
    }

    fn apply(wanted: ContainerAdjustment) -> Result<(Spec, Option<Resources>, Adjusted), Error> {
        let (mut spec, mut asked) = (spec(), None);
        adjust(&Registry::new(vec![]), &mut spec, &mut asked, wanted).map(|adjusted| (spec, asked, adjusted))
    }

    fn linux(linux: LinuxContainerAdjustment) -> ContainerAdjustment {
        ContainerAdjustment { linux: Some(linux), ..Default::default() }
    }

    #[test]
    fn process_annotations_and_mounts_are_changed_and_taken_away() {
        let pair = |k: &str, v: &str| KeyValue { key: k.into(), value: v.into() };
        let (spec, _, _) = apply(ContainerAdjustment {
            annotations: BTreeMap::from([("-gone".into(), String::new()), ("new".into(), "y".into())]),
            env: vec![pair("-A", ""), pair("B", "3")],
            args: vec!["new".into()],
            rlimits: vec![PosixRlimit { r#type: "RLIMIT_CORE".into(), hard: 2, soft: 1 }],
            mounts: vec![
                api::Mount { destination: "-/old".into(), ..Default::default() },
                api::Mount { destination: "/new".into(), options: vec!["rbind".into(), "rslave".into()], ..Default::default() },
            ],
            ..Default::default()
        })
        .unwrap();
        let process = spec.process.unwrap();
        assert_eq!(process.env, vec!["AB=2".into(), "B=3".into()]);
        assert_eq!((process.args[0].as_str(), process.rlimits[0].hard), ("new", 2));
        assert_eq!(spec.annotations, BTreeMap::from([("new".into(), "y".into())]));
        assert_eq!((spec.mounts.len(), spec.mounts[0].destination.as_str()), (1, "/new"));
        assert_eq!(spec.linux.rootfs_propagation, "rslave");
    }

    #[test]
    fn limits_reach_the_spec_and_the_containers_status() {
        let memory = LinuxMemory { limit: Some(OptionalInt64 { value: 64 << 20 }), ..Default::default() };
        let cpu = LinuxCpu { shares: Some(OptionalUInt64 { value: 77 }), cpus: "0".into(), ..Default::default() };
        let resources = LinuxResources {
            memory: Some(memory),
            cpu: Some(cpu),
            pids: Some(api::LinuxPids { limit: 9 }),
            ..Default::default()
        };
        let oom_score_adj = Some(OptionalInt { value: 300 });
        let wanted = linux(LinuxContainerAdjustment { resources: Some(resources), oom_score_adj, ..Default::default() });
        let (spec, asked, _) = apply(wanted).unwrap();
        let asked = asked.unwrap();
        assert_eq!((asked.memory_limit, asked.cpu_shares, asked.oom_score_adj), (64 << 20, 77, 300));
        assert_eq!(asked.memory_swap_limit, 64 << 20);
        let got = spec.linux.resources.unwrap();
        let memory = got.memory.unwrap();
        assert_eq!((memory.limit, memory.swap), (Some(64 << 20), Some(64 << 20)));
        assert_eq!((got.cpu.unwrap().shares, got.pids.unwrap().limit), (Some(77), Some(9)));
        assert_eq!(spec.process.unwrap().oom_score_adj, Some(300));
    }

    #[test]
    fn namespaces_are_taken_away_or_given_by_path() {
        let namespace = |kind: &str, path: &str| LinuxNamespace { r#type: kind.into(), path: path.into() };
        let wanted = linux(LinuxContainerAdjustment {
            namespaces: vec![namespace("-network", ""), namespace("pid", "/proc/1/ns/pid")],
            ..Default::default()
        });
        let (spec, _, adjusted) = apply(wanted).unwrap();
        assert_eq!(adjusted, Adjusted { stay_out: vec![PodNamespace::Net], pid: Some(PidNamespace::Spec) });
        let kinds: Vec<_> = spec.linux.namespaces.iter().map(|n| (n.kind, n.path.as_str())).collect();
        assert_eq!(kinds, [(NamespaceType::Mount, ""), (NamespaceType::Pid, "/proc/1/ns/pid")]);
    }

    #[test]
    fn what_is_not_done_is_refused_by_its_name() {
        let net = BTreeMap::from([("eth9".to_owned(), api::LinuxNetDevice::default())]);
        let class = || Some(api::OptionalString { value: "gold".into() });
        for (wanted, name) in [
            (LinuxContainerAdjustment { cgroups_path: "/x".into(), ..Default::default() }, "cgroups_path"),
            (
                LinuxContainerAdjustment { io_priority: Some(api::LinuxIoPriority::default()), ..Default::default() },
                "io_priority",
            ),
            (LinuxContainerAdjustment { scheduler: Some(api::LinuxScheduler::default()), ..Default::default() }, "scheduler"),
            (LinuxContainerAdjustment { memory_policy: Some(Default::default()), ..Default::default() }, "memory_policy"),
            (LinuxContainerAdjustment { net_devices: net, ..Default::default() }, "net_devices"),
            (
                LinuxContainerAdjustment {
                    rdt: Some(api::LinuxRdt { clos_id: class(), ..Default::default() }),
                    ..Default::default()
                },
                "rdt",
            ),
            (
                LinuxContainerAdjustment {
                    resources: Some(LinuxResources { blockio_class: class(), ..Default::default() }),
                    ..Default::default()
                },
                "blockio_class",
            ),
            (
                LinuxContainerAdjustment {
                    namespaces: vec![LinuxNamespace { r#type: "-user".into(), path: String::new() }],
                    ..Default::default()
                },
                "namespaces",
            ),
        ] {
            let error = apply(linux(wanted)).unwrap_err();
            assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn devices_get_their_rule_and_bad_ones_are_refused() {
        let device = |path: &str, kind: &str, major| api::LinuxDevice {
            path: path.into(),
            r#type: kind.into(),
            major,
            file_mode: Some(api::OptionalFileMode { value: 0o444 }),
            ..Default::default()
        };
        let one = |d| linux(LinuxContainerAdjustment { devices: vec![d], ..Default::default() });
        let (spec, _, _) = apply(one(device("/dev/x", "c", 240))).unwrap();
        assert_eq!(spec.linux.devices[0].major, 240);
        assert_eq!(spec.linux.resources.unwrap().devices[0].access.as_deref(), Some("r"));
        for bad in [device("dev/x", "c", 1), device("/dev/x", "z", 1), device("/dev/x", "c", -1)] {
            assert!(apply(one(bad)).is_err());
        }
    }
}
