//! Requests → specs, with every check that needs nothing but the request. What we do not do is refused by name.

use berth_cri_api::v1;

use super::{id_maps, map, mode, profile, propagation, resources};
use crate::error::{Error, invalid};
use crate::spec::{
    ContainerSpec, DeviceSpec, Dns, EnvValue, EnvVar, ImageRequest, ImageVolume, Labels, MountSpec, NamespaceMode, Namespaces,
    PortMapping, Profile, Propagation, SandboxMetadata, SandboxSpec, SeLinux, Security, UserNamespace,
};

/// A sandbox configuration.
pub(crate) fn sandbox(config: v1::PodSandboxConfig, runtime_handler: String) -> Result<SandboxSpec, Error> {
    if config.windows.is_some() {
        return Err(Error::Unsupported { what: "config.windows", reason: "this node runs Linux".into() });
    }
    let metadata = config.metadata.ok_or_else(|| invalid("config.metadata", "missing"))?;
    for (field, value) in [
        ("config.metadata.name", &metadata.name),
        ("config.metadata.namespace", &metadata.namespace),
        ("config.metadata.uid", &metadata.uid),
    ] {
        if value.is_empty() {
            return Err(invalid(field, "empty"));
        }
    }
    let linux = config.linux.unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    if security.run_as_group.is_some() && security.run_as_user.is_none() {
        return Err(invalid("run_as_group", "set without run_as_user"));
    }
    let namespaces = namespaces(security.namespace_options, true)?;
    let mut port_mappings = Vec::new();
    for p in config.port_mappings {
        port_mappings.extend(port_mapping(&p)?);
    }
    let annotations = map(config.annotations);
    if namespaces.network == NamespaceMode::Node {
        port_mappings.clear();
    } else {
        super::bandwidth::check(&annotations)?;
    }
    hostname_is_valid(&config.hostname)?;
    Ok(SandboxSpec {
        metadata: SandboxMetadata {
            name: metadata.name,
            uid: metadata.uid,
            namespace: metadata.namespace,
            attempt: metadata.attempt,
        },
        hostname: config.hostname,
        log_directory: config.log_directory,
        dns: config.dns_config.map(|d| Dns { servers: d.servers, searches: d.searches, options: d.options }),
        port_mappings,
        labels: map(config.labels),
        annotations,
        runtime_handler,
        cgroup_parent: linux.cgroup_parent,
        sysctls: map(linux.sysctls),
        namespaces,
        privileged: security.privileged,
        readonly_rootfs: security.readonly_rootfs,
        resources: linux.resources.map(resources),
        overhead: linux.overhead.map(resources),
        selinux: security.selinux_options.map(selinux).transpose()?,
        labels_of_pod: Labels::default(),
    })
}

fn hostname_is_valid(hostname: &str) -> Result<(), Error> {
    if hostname.len() > 64 || hostname.bytes().any(|b| b == 0 || b == b'\n' || b == b'/') {
        return Err(invalid("config.hostname", format!("{hostname:?} can not be a hostname")));
    }
    Ok(())
}

fn port_mapping(wire: &v1::PortMapping) -> Result<Option<PortMapping>, Error> {
    if wire.host_port == 0 {
        return Ok(None);
    }
    if !wire.host_ip.is_empty() && wire.host_ip.parse::<std::net::IpAddr>().is_err() {
        return Err(invalid("port_mappings.host_ip", format!("{:?} is not an address", wire.host_ip)));
    }
    let protocol = match v1::Protocol::try_from(wire.protocol) {
        Ok(v1::Protocol::Tcp) => "tcp",
        Ok(v1::Protocol::Udp) => "udp",
        Ok(v1::Protocol::Sctp) => "sctp",
        Err(_) => return Err(invalid("port_mappings.protocol", format!("unknown value {}", wire.protocol))),
    };
    let port =
        |field, n: i32| u16::try_from(n).ok().filter(|n| *n > 0).ok_or_else(|| invalid(field, format!("{n} is not a port")));
    Ok(Some(PortMapping {
        protocol: protocol.into(),
        container_port: port("port_mappings.container_port", wire.container_port)?,
        host_port: port("port_mappings.host_port", wire.host_port)?,
        host_ip: wire.host_ip.clone(),
    }))
}

fn namespaces(wire: Option<v1::NamespaceOption>, sandbox: bool) -> Result<Namespaces, Error> {
    let wire = wire.unwrap_or_default();
    let out = Namespaces {
        network: mode("namespace_options.network", wire.network)?,
        pid: mode("namespace_options.pid", wire.pid)?,
        ipc: mode("namespace_options.ipc", wire.ipc)?,
        target_id: wire.target_id,
        users: wire.userns_options.map(users).transpose()?,
    };
    let shared = |field, m| match m {
        NamespaceMode::Pod | NamespaceMode::Node => Ok(()),
        _ => Err(invalid(field, "must be POD or NODE")),
    };
    shared("namespace_options.network", out.network)?;
    shared("namespace_options.ipc", out.ipc)?;
    if out.pid == NamespaceMode::Target && sandbox {
        return Err(invalid("namespace_options.pid", "TARGET is for containers"));
    }
    if out.pid == NamespaceMode::Target && out.target_id.is_empty() {
        return Err(invalid("namespace_options.target_id", "empty with pid mode TARGET"));
    }
    if out.own_users().is_some()
        && (out.network == NamespaceMode::Node || out.pid == NamespaceMode::Node || out.ipc == NamespaceMode::Node)
    {
        return Err(invalid("namespace_options.userns_options", "can not be combined with a host namespace"));
    }
    Ok(out)
}

fn users(wire: v1::UserNamespace) -> Result<UserNamespace, Error> {
    const FIELD: &str = "namespace_options.userns_options";
    let out = UserNamespace { mode: mode(FIELD, wire.mode)?, uids: id_maps(&wire.uids), gids: id_maps(&wire.gids) };
    match out.mode {
        NamespaceMode::Node => {
            if !out.uids.is_empty() || !out.gids.is_empty() {
                return Err(invalid(FIELD, "mappings with mode NODE"));
            }
            return Ok(out);
        }
        NamespaceMode::Pod => {}
        _ => return Err(invalid(FIELD, "mode must be POD or NODE")),
    }
    for (name, maps) in [("uids", &out.uids), ("gids", &out.gids)] {
        let [map] = maps.as_slice() else {
            return Err(invalid(FIELD, format!("{name} must have exactly one mapping, not {}", maps.len())));
        };
        if map.container != 0 || map.length == 0 {
            return Err(invalid(FIELD, format!("{name} must map the container's id 0")));
        }
        if map.host.checked_add(map.length).is_none() {
            return Err(invalid(FIELD, format!("{name} go beyond the last id")));
        }
    }
    Ok(out)
}

/// A container configuration. What it leaves out of namespaces is as its pod, which has those of `pod`.
pub(crate) fn container(config: v1::ContainerConfig, pod: &Namespaces) -> Result<ContainerSpec, Error> {
    if config.windows.is_some() {
        return Err(Error::Unsupported { what: "config.windows", reason: "this node runs Linux".into() });
    }
    let annotations = map(config.annotations);
    let cdi_devices =
        crate::cdi::requested(config.cdi_devices.iter().map(|d| d.name.as_str()), &annotations).map_err(|name| {
            invalid("annotations", format!("failed to parse CDI device annotations: invalid CDI device name {name:?}"))
        })?;
    let metadata = config.metadata.ok_or_else(|| invalid("config.metadata", "missing"))?;
    if metadata.name.is_empty() {
        return Err(invalid("config.metadata.name", "empty"));
    }
    let image = config.image.ok_or_else(|| invalid("config.image", "missing"))?;
    if image.image.is_empty() {
        return Err(invalid("config.image.image", "empty"));
    }
    if config.log_path.split('/').any(|part| part == "..") || config.log_path.contains(['\0', '\n']) {
        return Err(invalid("config.log_path", format!("{:?} is not a path below the log directory", config.log_path)));
    }
    let linux = config.linux.unwrap_or_default();
    let mut envs = Vec::with_capacity(config.envs.len());
    for pair in config.envs {
        if pair.key.is_empty() || pair.key.contains('=') || pair.key.contains('\0') || pair.value.contains(&0) {
            return Err(invalid("config.envs", format!("{:?} can not be an environment variable", pair.key)));
        }
        envs.push(EnvVar { name: pair.key, value: EnvValue::new(pair.value) });
    }
    if config.stop_signal != 0 && super::signal::linux_number(config.stop_signal).is_none() {
        return Err(invalid("config.stop_signal", format!("unknown value {}", config.stop_signal)));
    }
    Ok(ContainerSpec {
        name: metadata.name,
        attempt: metadata.attempt,
        image: ImageRequest {
            image: image.image,
            user_specified: image.user_specified_image,
            annotations: map(image.annotations),
            runtime_handler: image.runtime_handler,
        },
        command: config.command,
        args: config.args,
        working_dir: config.working_dir,
        envs,
        mounts: config.mounts.into_iter().map(mount).collect::<Result<_, _>>()?,
        devices: config.devices.into_iter().map(device).collect::<Result<_, _>>()?,
        cdi_devices,
        labels: map(config.labels),
        annotations,
        log_path: config.log_path,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        resources: linux.resources.map(resources),
        security: security(linux.security_context.unwrap_or_default(), pod)?,
        stop_signal: config.stop_signal,
    })
}

fn mount(wire: v1::Mount) -> Result<MountSpec, Error> {
    if wire.container_path.is_empty() {
        return Err(invalid("mounts.container_path", "empty"));
    }
    let image = image_volume(&wire)?;
    if image.is_none() && !wire.host_path.starts_with('/') {
        return Err(invalid("mounts.host_path", format!("{:?} is not absolute", wire.host_path)));
    }
    let propagation = propagation(wire.propagation)?;
    if wire.recursive_read_only {
        if !wire.readonly {
            return Err(invalid("mounts.recursive_read_only", "needs readonly"));
        }
        if propagation != Propagation::Private {
            return Err(invalid("mounts.recursive_read_only", "needs propagation PRIVATE"));
        }
    }
    Ok(MountSpec {
        container_path: wire.container_path,
        host_path: wire.host_path,
        readonly: wire.readonly,
        recursive_readonly: wire.recursive_read_only,
        selinux_relabel: wire.selinux_relabel,
        propagation,
        uids: id_maps(&wire.uid_mappings),
        gids: id_maps(&wire.gid_mappings),
        image,
    })
}

fn image_volume(wire: &v1::Mount) -> Result<Option<ImageVolume>, Error> {
    let Some(image) = wire.image.as_ref().filter(|i| !i.image.is_empty()) else {
        if !wire.image_sub_path.is_empty() {
            return Err(invalid("mounts.image_sub_path", "set without an image"));
        }
        return Ok(None);
    };
    if !wire.host_path.is_empty() {
        return Err(invalid("mounts.image", "set together with host_path"));
    }
    if !wire.readonly {
        return Err(invalid("mounts.readonly", "an image can only be mounted read-only"));
    }
    if propagation(wire.propagation)? != Propagation::Private {
        return Err(invalid("mounts.propagation", "an image needs propagation PRIVATE"));
    }
    Ok(Some(ImageVolume { image: image.image.clone(), sub_path: wire.image_sub_path.clone(), id: String::new() }))
}

fn device(wire: v1::Device) -> Result<DeviceSpec, Error> {
    if !wire.permissions.bytes().all(|b| b"rwm".contains(&b)) {
        return Err(invalid("devices.permissions", format!("{:?} is not a subset of \"rwm\"", wire.permissions)));
    }
    let container_path = if wire.container_path.is_empty() { wire.host_path.clone() } else { wire.container_path };
    for (field, path) in [("devices.host_path", &wire.host_path), ("devices.container_path", &container_path)] {
        if !path.starts_with('/') {
            return Err(invalid(field, format!("{path:?} is not absolute")));
        }
    }
    Ok(DeviceSpec { container_path, host_path: wire.host_path, permissions: wire.permissions })
}

fn id(field: &'static str, value: i64) -> Result<u32, Error> {
    u32::try_from(value).ok().filter(|v| *v != u32::MAX).ok_or_else(|| invalid(field, format!("{value} is not an id")))
}

#[allow(deprecated)]
fn security(wire: v1::LinuxContainerSecurityContext, pod: &Namespaces) -> Result<Security, Error> {
    let run_as_user = wire.run_as_user.map(|v| id("run_as_user", v.value)).transpose()?;
    let run_as_group = wire.run_as_group.map(|v| id("run_as_group", v.value)).transpose()?;
    if run_as_group.is_some() && run_as_user.is_none() && wire.run_as_username.is_empty() {
        return Err(invalid("run_as_group", "set without run_as_user or run_as_username"));
    }
    let strict_groups = match v1::SupplementalGroupsPolicy::try_from(wire.supplemental_groups_policy) {
        Ok(v1::SupplementalGroupsPolicy::Merge) => false,
        Ok(v1::SupplementalGroupsPolicy::Strict) => true,
        Err(_) => return Err(invalid("supplemental_groups_policy", "unknown value")),
    };
    if wire.seccomp.is_none() && !wire.seccomp_profile_path.is_empty() {
        return Err(Error::Unsupported { what: "seccomp_profile_path", reason: "deprecated; use seccomp".into() });
    }
    let capabilities = wire.capabilities.unwrap_or_default();
    let apparmor = match wire.apparmor {
        Some(p) => Some(profile("apparmor", p)?),
        None => deprecated_apparmor(&wire.apparmor_profile)?,
    };
    Ok(Security {
        privileged: wire.privileged,
        add_capabilities: capabilities.add_capabilities,
        drop_capabilities: capabilities.drop_capabilities,
        ambient_capabilities: capabilities.add_ambient_capabilities,
        namespaces: match wire.namespace_options {
            Some(options) => namespaces(Some(options), false)?,
            None => pod.clone(),
        },
        run_as_user,
        run_as_group,
        run_as_username: wire.run_as_username,
        supplemental_groups: wire
            .supplemental_groups
            .into_iter()
            .map(|g| id("supplemental_groups", g))
            .collect::<Result<_, _>>()?,
        strict_groups,
        readonly_rootfs: wire.readonly_rootfs,
        no_new_privs: wire.no_new_privs,
        masked_paths: wire.masked_paths,
        readonly_paths: wire.readonly_paths,
        seccomp: wire.seccomp.map(|p| profile("seccomp", p)).transpose()?,
        apparmor,
        selinux: wire.selinux_options.map(selinux).transpose()?,
    })
}

/// Checked on every machine, as containerd does; in force where SELinux is.
fn selinux(wire: v1::SeLinuxOption) -> Result<SeLinux, Error> {
    let part = |name: &str, value: &str| match value.bytes().all(|b| b.is_ascii_graphic() && !b":\"".contains(&b)) {
        true => Ok(()),
        false => Err(invalid("selinux_options", format!("the format of '{name}' {value:?} is not correct"))),
    };
    part("user", &wire.user)?;
    part("role", &wire.role)?;
    part("type", &wire.r#type)?;
    if !level_is_valid(&wire.level) {
        return Err(invalid("selinux_options", format!("the format of 'level' {:?} is not correct", wire.level)));
    }
    Ok(SeLinux { user: wire.user, role: wire.role, kind: wire.r#type, level: wire.level })
}

/// `s0`, `s0-s1`, `s0:c1,c2`, `s0:c1.c5,c9`: sensitivities of one digit, categories of one to four, each alone or as a range.
fn level_is_valid(level: &str) -> bool {
    let sensitivity = |text: &str| text.strip_prefix('s').is_some_and(|d| d.len() == 1 && d.bytes().all(|b| b.is_ascii_digit()));
    let category =
        |text: &str| text.strip_prefix('c').is_some_and(|d| (1..=4).contains(&d.len()) && d.bytes().all(|b| b.is_ascii_digit()));
    let range = |text: &str| match text.split_once('.') {
        Some((from, to)) => category(from) && category(to),
        None => category(text),
    };
    let (sensitivities, categories) = match level.split_once(':') {
        Some((sensitivities, categories)) => (sensitivities, Some(categories)),
        None => (level, None),
    };
    level.is_empty()
        || (match sensitivities.split_once('-') {
            Some((low, high)) => sensitivity(low) && sensitivity(high),
            None => sensitivity(sensitivities),
        } && categories.is_none_or(|list| list.split(',').all(range)))
}

fn deprecated_apparmor(text: &str) -> Result<Option<Profile>, Error> {
    match text {
        "" => Ok(None),
        "runtime/default" => Ok(Some(Profile::RuntimeDefault)),
        "unconfined" => Ok(Some(Profile::Unconfined)),
        other => match other.strip_prefix("localhost/") {
            Some(name) if !name.is_empty() => Ok(Some(Profile::Localhost(name.into()))),
            _ => Err(invalid("apparmor_profile", format!("{other:?} is not a profile"))),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta() -> Option<v1::PodSandboxMetadata> {
        Some(v1::PodSandboxMetadata { name: "a".into(), uid: "u".into(), namespace: "n".into(), attempt: 2 })
    }

    fn with_users(users: v1::UserNamespace) -> v1::PodSandboxConfig {
        v1::PodSandboxConfig {
            metadata: meta(),
            linux: Some(v1::LinuxPodSandboxConfig {
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(v1::NamespaceOption { userns_options: Some(users), ..Default::default() }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn one(container: u32) -> Vec<v1::IdMapping> {
        vec![v1::IdMapping { container_id: container, host_id: 1000, length: 100_000 }]
    }

    #[test]
    fn a_sandbox_without_options_shares_one_pid_namespace() {
        let spec = sandbox(v1::PodSandboxConfig { metadata: meta(), ..Default::default() }, String::new()).unwrap();
        assert_eq!(spec.namespaces, Namespaces::default());
        assert_eq!(spec.namespaces.pid, NamespaceMode::Pod);
    }

    #[test]
    fn a_log_stays_below_its_directory() {
        let config = |path: &str| v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: "c".into(), attempt: 0 }),
            image: Some(v1::ImageSpec { image: "i".into(), ..Default::default() }),
            log_path: path.into(),
            ..Default::default()
        };
        for (path, good) in
            [("c/0.log", true), ("", true), ("a..b/0.log", true), ("../0.log", false), ("c/../../x", false), ("a\0", false)]
        {
            assert_eq!(container(config(path), &Namespaces::default()).is_ok(), good, "{path:?}");
        }
    }

    #[test]
    fn a_container_without_namespace_options_is_as_its_pod() {
        let asked = |options: Option<v1::NamespaceOption>| v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: "c".into(), attempt: 0 }),
            image: Some(v1::ImageSpec { image: "i".into(), ..Default::default() }),
            linux: Some(v1::LinuxContainerConfig {
                security_context: Some(v1::LinuxContainerSecurityContext { namespace_options: options, ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        };
        for mode in [NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Node] {
            let pod = Namespaces { pid: mode, ..Default::default() };
            assert_eq!(container(asked(None), &pod).unwrap().security.namespaces, pod);
            let said = container(asked(Some(v1::NamespaceOption::default())), &pod).unwrap();
            assert_eq!(said.security.namespaces.pid, NamespaceMode::Pod, "POD is 0, and said");
        }
    }

    #[test]
    fn a_sandbox_has_no_container_to_target() {
        let options = v1::NamespaceOption { pid: v1::NamespaceMode::Target.into(), target_id: "c".into(), ..Default::default() };
        assert!(namespaces(Some(options.clone()), true).is_err());
        assert!(namespaces(Some(options.clone()), false).is_ok());
        assert!(namespaces(Some(v1::NamespaceOption { target_id: String::new(), ..options }), false).is_err());
    }

    #[test]
    fn a_mapped_port_needs_numbers_and_an_address_that_can_be() {
        let good = v1::PortMapping {
            protocol: v1::Protocol::Sctp.into(),
            container_port: 80,
            host_port: 8080,
            host_ip: "fd00::1".into(),
        };
        let mapped = port_mapping(&good).unwrap().unwrap();
        assert_eq!((mapped.protocol.as_str(), mapped.host_port, mapped.host_ip.as_str()), ("sctp", 8080, "fd00::1"));
        assert_eq!(port_mapping(&v1::PortMapping { host_port: 0, ..good.clone() }).unwrap(), None);
        for bad in [
            v1::PortMapping { protocol: 7, ..good.clone() },
            v1::PortMapping { host_port: -1, ..good.clone() },
            v1::PortMapping { host_port: 65536, ..good.clone() },
            v1::PortMapping { container_port: 0, ..good.clone() },
            v1::PortMapping { host_ip: "localhost".into(), ..good.clone() },
        ] {
            assert!(port_mapping(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn user_namespaces_need_one_mapping_with_id_zero() {
        let ns = |mode: v1::NamespaceMode, uids, gids| v1::UserNamespace { mode: mode.into(), uids, gids };
        let cases = [
            (ns(v1::NamespaceMode::Pod, one(0), one(0)), true),
            (ns(v1::NamespaceMode::Node, vec![], vec![]), true),
            (ns(v1::NamespaceMode::Pod, [one(0), one(5)].concat(), one(0)), false),
            (ns(v1::NamespaceMode::Pod, one(1), one(1)), false),
            (ns(v1::NamespaceMode::Pod, vec![], vec![]), false),
            (ns(v1::NamespaceMode::Container, one(0), one(0)), false),
            (ns(v1::NamespaceMode::Target, one(0), one(0)), false),
        ];
        for (users, good) in cases {
            assert_eq!(sandbox(with_users(users.clone()), String::new()).is_ok(), good, "{users:?}");
        }
    }

    #[test]
    fn recursive_read_only_needs_readonly_and_private() {
        use v1::MountPropagation::{PropagationBidirectional, PropagationHostToContainer, PropagationPrivate};
        for (readonly, propagation, good) in [
            (true, PropagationPrivate, true),
            (false, PropagationPrivate, false),
            (true, PropagationHostToContainer, false),
            (true, PropagationBidirectional, false),
        ] {
            let wire = v1::Mount {
                container_path: "/c".into(),
                host_path: "/h".into(),
                readonly,
                recursive_read_only: true,
                propagation: propagation.into(),
                ..Default::default()
            };
            assert_eq!(mount(wire).is_ok(), good);
        }
    }

    #[test]
    fn an_image_volume_is_read_only_and_has_no_host_path() {
        let good = v1::Mount {
            container_path: "/c".into(),
            readonly: true,
            image: Some(v1::ImageSpec { image: "a".into(), ..Default::default() }),
            image_sub_path: "etc".into(),
            ..Default::default()
        };
        let want = ImageVolume { image: "a".into(), sub_path: "etc".into(), id: String::new() };
        assert_eq!(mount(good.clone()).unwrap().image, Some(want));
        let shared = v1::MountPropagation::PropagationBidirectional.into();
        for bad in [
            v1::Mount { readonly: false, ..good.clone() },
            v1::Mount { host_path: "/h".into(), ..good.clone() },
            v1::Mount { propagation: shared, ..good.clone() },
            v1::Mount { image: None, host_path: "/h".into(), ..good.clone() },
        ] {
            assert!(mount(bad.clone()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_group_needs_a_user() {
        let group = Some(v1::Int64Value { value: 5 });
        for (wire, good) in [
            (v1::LinuxContainerSecurityContext { run_as_group: group, ..Default::default() }, false),
            (
                v1::LinuxContainerSecurityContext {
                    run_as_group: group,
                    run_as_user: Some(v1::Int64Value { value: 1 }),
                    ..Default::default()
                },
                true,
            ),
            (
                v1::LinuxContainerSecurityContext { run_as_group: group, run_as_username: "nobody".into(), ..Default::default() },
                true,
            ),
        ] {
            assert_eq!(security(wire.clone(), &Namespaces::default()).is_ok(), good, "{wire:?}");
        }
    }

    #[test]
    fn no_seccomp_message_is_unconfined_and_an_empty_one_is_the_default() {
        let security = |wire| security(wire, &Namespaces::default());
        let none = security(v1::LinuxContainerSecurityContext::default()).unwrap();
        assert_eq!(none.seccomp, None);
        let empty =
            security(v1::LinuxContainerSecurityContext { seccomp: Some(v1::SecurityProfile::default()), ..Default::default() })
                .unwrap();
        assert_eq!(empty.seccomp, Some(Profile::RuntimeDefault));
    }

    #[test]
    fn a_level_has_the_form_that_labels_have() {
        for good in ["", "s0", "s0-s1", "s0:c1", "s0:c1,c2", "s0:c1.c5,c1023", "s0-s0:c0.c1023"] {
            assert!(level_is_valid(good), "{good}");
        }
        for bad in ["s", "c4", "s10", "s0:", "s0,c4,c5", "s0:c1,", "s0:c12345", "s0:c1.c2.c3", "s0:c1 ", "s0-s1-s2", "s0\n"] {
            assert!(!level_is_valid(bad), "{bad}");
            let error = selinux(v1::SeLinuxOption { level: bad.into(), ..Default::default() }).unwrap_err();
            assert!(error.to_string().contains("the format of 'level'"), "{error}");
        }
        assert!(selinux(v1::SeLinuxOption { r#type: "a:b".into(), ..Default::default() }).is_err());
    }

    #[test]
    fn the_new_apparmor_field_wins_over_the_deprecated_one() {
        let security = |wire| security(wire, &Namespaces::default());
        #[allow(deprecated)]
        let both = security(v1::LinuxContainerSecurityContext {
            apparmor: Some(v1::SecurityProfile { profile_type: 1, localhost_ref: String::new() }),
            apparmor_profile: "localhost/x".into(),
            ..Default::default()
        })
        .unwrap();
        assert_eq!(both.apparmor, Some(Profile::Unconfined));
    }
}
