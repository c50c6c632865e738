//! Security contexts of pod and container to the CRI's fields: users, groups, capabilities, profiles, paths, namespaces.
//! Pure; `seccomp` profiles are named, not read.

use std::path::Path;

use berth_cri_api::v1 as cri;
use k8s_openapi::api::core::v1::{
    AppArmorProfile, Container, Pod, PodSecurityContext, SELinuxOptions, SeccompProfile, SecurityContext,
};

use crate::pod;

/// What an image says about its user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageUser {
    /// Numeric user.
    pub uid: Option<i64>,
    /// User by name.
    pub username: String,
}

/// Paths hidden from containers that are not privileged.
const MASKED: &[&str] = &[
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];

/// Paths read-only for containers that are not privileged.
const READONLY: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

fn int(value: i64) -> cri::Int64Value {
    cri::Int64Value { value }
}

fn contexts<'a>(pod: &'a Pod, container: &'a Container) -> (PodSecurityContext, SecurityContext) {
    (pod::spec(pod).security_context.clone().unwrap_or_default(), container.security_context.clone().unwrap_or_default())
}

/// Which namespaces a pod shares with the host, and how its containers share theirs.
pub fn namespace_options(pod: &Pod) -> cri::NamespaceOption {
    let spec = pod::spec(pod);
    let host = |wanted: Option<bool>, otherwise: cri::NamespaceMode| match wanted {
        Some(true) => cri::NamespaceMode::Node,
        _ => otherwise,
    };
    let own_pid = match spec.share_process_namespace {
        Some(true) => cri::NamespaceMode::Pod,
        _ => cri::NamespaceMode::Container,
    };
    let userns = spec.host_users.map(|_| cri::UserNamespace { mode: cri::NamespaceMode::Node.into(), ..Default::default() });
    cri::NamespaceOption {
        network: host(spec.host_network, cri::NamespaceMode::Pod).into(),
        ipc: host(spec.host_ipc, cri::NamespaceMode::Pod).into(),
        pid: host(spec.host_pid, own_pid).into(),
        target_id: String::new(),
        userns_options: userns,
    }
}

/// Groups beside the primary one: fsGroup first.
fn supplemental_groups(context: &PodSecurityContext) -> Vec<i64> {
    context.fs_group.into_iter().chain(context.supplemental_groups.iter().flatten().copied()).collect()
}

fn groups_policy(context: &PodSecurityContext) -> cri::SupplementalGroupsPolicy {
    match context.supplemental_groups_policy.as_deref() {
        Some("Strict") => cri::SupplementalGroupsPolicy::Strict,
        _ => cri::SupplementalGroupsPolicy::Merge,
    }
}

fn selinux(options: Option<&SELinuxOptions>) -> Option<cri::SeLinuxOption> {
    let options = options?;
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    Some(cri::SeLinuxOption {
        user: text(&options.user),
        role: text(&options.role),
        r#type: text(&options.type_),
        level: text(&options.level),
    })
}

fn security_profile(kind: cri::security_profile::ProfileType, local: String) -> cri::SecurityProfile {
    cri::SecurityProfile { profile_type: kind.into(), localhost_ref: local }
}

fn seccomp(profile: Option<&SeccompProfile>, seccomp_root: &Path) -> cri::SecurityProfile {
    use cri::security_profile::ProfileType;
    match profile.map(|p| (p.type_.as_str(), p.localhost_profile.as_deref().unwrap_or_default())) {
        Some(("RuntimeDefault", _)) => security_profile(ProfileType::RuntimeDefault, String::new()),
        Some(("Localhost", name)) => {
            security_profile(ProfileType::Localhost, seccomp_root.join(name).to_string_lossy().into_owned())
        }
        _ => security_profile(ProfileType::Unconfined, String::new()),
    }
}

/// Gives a container without a seccomp profile of its own or of its pod the runtime's default one (`seccompDefault`).
pub fn default_seccomp(pod: &Pod, container: &Container, security: &mut cri::LinuxContainerSecurityContext) {
    let (of_pod, own) = contexts(pod, container);
    if own.seccomp_profile.is_none() && of_pod.seccomp_profile.is_none() {
        security.seccomp = Some(security_profile(cri::security_profile::ProfileType::RuntimeDefault, String::new()));
    }
}

fn apparmor(profile: Option<&AppArmorProfile>) -> Option<cri::SecurityProfile> {
    use cri::security_profile::ProfileType;
    let profile = profile?;
    Some(match profile.type_.as_str() {
        "Unconfined" => security_profile(ProfileType::Unconfined, String::new()),
        "Localhost" => security_profile(ProfileType::Localhost, profile.localhost_profile.clone().unwrap_or_default()),
        _ => security_profile(ProfileType::RuntimeDefault, String::new()),
    })
}

/// Whether any container of the pod is privileged.
fn any_privileged(pod: &Pod) -> bool {
    let all = pod::init_containers(pod).iter().chain(&pod::spec(pod).containers);
    all.into_iter().any(|c| c.security_context.as_ref().and_then(|s| s.privileged) == Some(true))
}

/// The sandbox's security context.
pub fn sandbox_security(pod: &Pod) -> cri::LinuxSandboxSecurityContext {
    let context = pod::spec(pod).security_context.clone().unwrap_or_default();
    cri::LinuxSandboxSecurityContext {
        namespace_options: Some(namespace_options(pod)),
        selinux_options: selinux(context.se_linux_options.as_ref()),
        run_as_user: context.run_as_user.map(int),
        // The runtime refuses a group without a user.
        run_as_group: context.run_as_user.and(context.run_as_group).map(int),
        supplemental_groups: supplemental_groups(&context),
        supplemental_groups_policy: groups_policy(&context).into(),
        privileged: any_privileged(pod),
        seccomp: Some(security_profile(cri::security_profile::ProfileType::RuntimeDefault, String::new())),
        ..Default::default()
    }
}

/// A container's security context, or why the container may not start.
pub fn container_security(
    pod: &Pod,
    container: &Container,
    image: &ImageUser,
    seccomp_root: &Path,
    thermal_paths: &[String],
) -> Result<cri::LinuxContainerSecurityContext, String> {
    let (of_pod, own) = contexts(pod, container);
    let user = own.run_as_user.or(of_pod.run_as_user);
    check_non_root(pod, container, user, image)?;
    let privileged = own.privileged == Some(true);
    let masks = !privileged && own.proc_mount.as_deref() != Some("Unmasked");
    let paths = |list: &[&str]| list.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>();
    let mut masked_paths = if masks { paths(MASKED) } else { Vec::new() };
    if masks {
        masked_paths.extend(thermal_paths.iter().cloned());
    }
    let capabilities = own.capabilities.as_ref().map(|c| cri::Capability {
        add_capabilities: c.add.clone().unwrap_or_default(),
        drop_capabilities: c.drop.clone().unwrap_or_default(),
        add_ambient_capabilities: Vec::new(),
    });
    let (run_as_user, run_as_username) = match user {
        Some(uid) => (Some(int(uid)), String::new()),
        None => match image.uid {
            Some(uid) => (Some(int(uid)), String::new()),
            None => (None, image.username.clone()),
        },
    };
    let profile = own.seccomp_profile.as_ref().or(of_pod.seccomp_profile.as_ref());
    Ok(cri::LinuxContainerSecurityContext {
        capabilities,
        privileged,
        namespace_options: Some(namespace_options(pod)),
        selinux_options: selinux(own.se_linux_options.as_ref().or(of_pod.se_linux_options.as_ref())),
        run_as_user,
        run_as_group: own.run_as_group.or(of_pod.run_as_group).map(int),
        run_as_username,
        readonly_rootfs: own.read_only_root_filesystem == Some(true),
        supplemental_groups: supplemental_groups(&of_pod),
        supplemental_groups_policy: groups_policy(&of_pod).into(),
        no_new_privs: own.allow_privilege_escalation == Some(false),
        masked_paths,
        readonly_paths: if masks { paths(READONLY) } else { Vec::new() },
        seccomp: Some(seccomp(profile, seccomp_root)),
        apparmor: apparmor(own.app_armor_profile.as_ref().or(of_pod.app_armor_profile.as_ref())),
        ..Default::default()
    })
}

fn check_non_root(pod: &Pod, container: &Container, user: Option<i64>, image: &ImageUser) -> Result<(), String> {
    let (of_pod, own) = contexts(pod, container);
    if own.run_as_non_root.or(of_pod.run_as_non_root) != Some(true) {
        return Ok(());
    }
    let place = format!("(pod: {:?}, container: {})", pod::format_pod(pod), container.name);
    match (user, image.uid) {
        (Some(0), _) => Err(format!("container's runAsUser breaks non-root policy {place}")),
        (Some(_), _) => Ok(()),
        (None, Some(0)) => Err(format!("container has runAsNonRoot and image will run as root {place}")),
        (None, Some(_)) => Ok(()),
        (None, None) if image.username.is_empty() => {
            Err(format!("container has runAsNonRoot and image will run as root {place}"))
        }
        (None, None) => Err(format!(
            "container has runAsNonRoot and image has non-numeric user ({}), cannot verify user is non-root {place}",
            image.username
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{defaults::apply_defaults, parse::parse_manifest};

    fn pod(spec: &str) -> Pod {
        let text = format!("{{apiVersion: v1, kind: Pod, metadata: {{name: a, uid: u}}, spec: {spec}}}");
        let mut pod = parse_manifest(&text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        pod
    }

    fn security(spec: &str, image: &ImageUser) -> Result<cri::LinuxContainerSecurityContext, String> {
        let pod = pod(spec);
        container_security(&pod, &pod::spec(&pod).containers[0], image, Path::new("/k/seccomp"), &["/t".to_owned()])
    }

    #[test]
    fn namespaces_follow_the_host_switches() {
        use cri::NamespaceMode::{Container, Node, Pod};
        let cases = [
            ("hostNetwork: false", (Pod, Pod, Container)),
            ("hostNetwork: true", (Node, Pod, Container)),
            ("hostIPC: true, hostPID: true", (Pod, Node, Node)),
            ("shareProcessNamespace: true", (Pod, Pod, Pod)),
        ];
        for (spec, expected) in cases {
            let options = namespace_options(&pod(&format!("{{containers: [{{name: c, image: i}}], {spec}}}")));
            assert_eq!((options.network(), options.ipc(), options.pid()), expected, "{spec}");
            assert!(options.userns_options.is_none());
        }
    }

    #[test]
    fn container_fields_override_pod_fields_one_by_one() {
        let spec = "{securityContext: {runAsUser: 1000, runAsGroup: 2000, fsGroup: 3000, supplementalGroups: [4000], seccompProfile: {type: RuntimeDefault}}, \
            containers: [{name: c, image: i, securityContext: {runAsUser: 5, seccompProfile: {type: Localhost, localhostProfile: p.json}, \
            readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, capabilities: {add: [NET_ADMIN], drop: [ALL]}}}]}";
        let found = security(spec, &ImageUser { uid: Some(7), username: String::new() }).unwrap();
        assert_eq!((found.run_as_user, found.run_as_group), (Some(int(5)), Some(int(2000))));
        assert_eq!(found.supplemental_groups, [3000, 4000]);
        assert!(found.readonly_rootfs && found.no_new_privs && !found.privileged);
        let seccomp = found.seccomp.unwrap();
        assert_eq!(seccomp.localhost_ref, "/k/seccomp/p.json");
        let capabilities = found.capabilities.unwrap();
        assert_eq!(
            (capabilities.add_capabilities, capabilities.drop_capabilities),
            (vec!["NET_ADMIN".to_owned()], vec!["ALL".to_owned()])
        );
        assert_eq!(found.masked_paths.len(), MASKED.len() + 1);
        assert_eq!(found.readonly_paths.len(), 5);
    }

    #[test]
    fn the_images_user_is_used_when_the_pod_names_none() {
        let spec = "{containers: [{name: c, image: i}]}";
        let found = security(spec, &ImageUser { uid: Some(101), username: String::new() }).unwrap();
        assert_eq!(found.run_as_user, Some(int(101)));
        let found = security(spec, &ImageUser { uid: None, username: "nginx".into() }).unwrap();
        assert_eq!((found.run_as_user, found.run_as_username.as_str()), (None, "nginx"));
    }

    #[test]
    fn privileged_containers_see_everything() {
        let found =
            security("{containers: [{name: c, image: i, securityContext: {privileged: true}}]}", &ImageUser::default()).unwrap();
        assert!(found.privileged && found.masked_paths.is_empty() && found.readonly_paths.is_empty());
    }

    #[test]
    fn the_runtime_is_told_the_selinux_labels_of_the_container_or_else_of_the_pod() {
        let pod = "securityContext: {seLinuxOptions: {user: u, role: r, type: t, level: 's0:c1,c2'}}";
        let label = |user: &str, role: &str, kind: &str, level: &str| {
            let [user, role, r#type, level] = [user, role, kind, level].map(str::to_owned);
            Some(cri::SeLinuxOption { user, role, r#type, level })
        };
        let own = ", securityContext: {seLinuxOptions: {type: own_t}}";
        for (own, expected) in [("", label("u", "r", "t", "s0:c1,c2")), (own, label("", "", "own_t", ""))] {
            let found = security(&format!("{{{pod}, containers: [{{name: c, image: i{own}}}]}}"), &ImageUser::default()).unwrap();
            assert_eq!(found.selinux_options, expected);
        }
        let sandbox = sandbox_security(&self::pod(&format!("{{{pod}, containers: [{{name: c, image: i}}]}}")));
        assert_eq!(sandbox.selinux_options, label("u", "r", "t", "s0:c1,c2"));
    }

    #[test]
    fn run_as_non_root_is_checked_against_pod_and_image() {
        let spec = |user: &str| format!("{{securityContext: {{runAsNonRoot: true{user}}}, containers: [{{name: c, image: i}}]}}");
        let numeric = |uid| ImageUser { uid: Some(uid), username: String::new() };
        let named = ImageUser { uid: None, username: "www".into() };
        let cases = [
            ("", numeric(0), Some("image will run as root")),
            ("", numeric(5), None),
            ("", ImageUser::default(), Some("image will run as root")),
            ("", named.clone(), Some("non-numeric user (www)")),
            (", runAsUser: 0", numeric(5), Some("breaks non-root policy (pod: \"a_default(u)\", container: c)")),
            (", runAsUser: 5", named, None),
        ];
        for (user, image, expected) in cases {
            match (security(&spec(user), &image), expected) {
                (Ok(_), None) => {}
                (Err(e), Some(text)) => assert!(e.contains(text), "{e}"),
                (found, expected) => panic!("{user} {image:?}: {found:?} {expected:?}"),
            }
        }
    }
}
