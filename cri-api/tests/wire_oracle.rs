//! Our declaration of the CRI against another one, on the wire: what one encodes the other decodes to the same (docs/adr/0005).
//! The other is of an older CRI, so only what both know is compared.

use berth_cri_api::v1 as ours;
use k8s_cri::v1 as theirs;
use prost::Message;

/// Ours → theirs → ours: nothing is lost and nothing moves to another field.
fn round_trip<O: Message + Default + PartialEq + std::fmt::Debug, T: Message + Default>(message: &O) -> T {
    let bytes = message.encode_to_vec();
    let read = T::decode(bytes.as_slice()).expect("the oracle decodes what we encode");
    let back = O::decode(read.encode_to_vec().as_slice()).expect("we decode what the oracle encodes");
    assert_eq!(&back, message);
    read
}

fn map(entries: &[(&str, &str)]) -> std::collections::HashMap<String, String> {
    entries.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

#[test]
fn a_pod_sandbox_means_the_same_to_both() {
    let options = ours::NamespaceOption {
        network: ours::NamespaceMode::Node.into(),
        pid: ours::NamespaceMode::Container.into(),
        ipc: ours::NamespaceMode::Pod.into(),
        target_id: "t".into(),
        userns_options: Some(ours::UserNamespace {
            mode: ours::NamespaceMode::Pod.into(),
            uids: vec![ours::IdMapping { host_id: 65536, container_id: 0, length: 65536 }],
            gids: vec![ours::IdMapping { host_id: 65536, container_id: 0, length: 65536 }],
        }),
    };
    let request = ours::RunPodSandboxRequest {
        config: Some(ours::PodSandboxConfig {
            metadata: Some(ours::PodSandboxMetadata { name: "n".into(), uid: "u".into(), namespace: "ns".into(), attempt: 7 }),
            hostname: "h".into(),
            log_directory: "/var/log/pods/x".into(),
            dns_config: Some(ours::DnsConfig {
                servers: vec!["10.96.0.10".into()],
                searches: vec!["a".into()],
                options: vec!["ndots:5".into()],
            }),
            port_mappings: vec![ours::PortMapping {
                protocol: ours::Protocol::Sctp.into(),
                container_port: 80,
                host_port: 8080,
                host_ip: "127.0.0.1".into(),
            }],
            labels: map(&[("a", "b")]),
            annotations: map(&[("c", "d")]),
            linux: Some(ours::LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/podx".into(),
                security_context: Some(ours::LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                    run_as_user: Some(ours::Int64Value { value: 1000 }),
                    readonly_rootfs: true,
                    supplemental_groups: vec![1, 2],
                    privileged: true,
                    seccomp: Some(ours::SecurityProfile {
                        profile_type: ours::security_profile::ProfileType::Localhost.into(),
                        localhost_ref: "/p.json".into(),
                    }),
                    ..Default::default()
                }),
                sysctls: map(&[("net.core.somaxconn", "1024")]),
                overhead: Some(ours::LinuxContainerResources { memory_limit_in_bytes: 1 << 20, ..Default::default() }),
                resources: Some(ours::LinuxContainerResources { cpu_shares: 512, ..Default::default() }),
            }),
            windows: None,
        }),
        runtime_handler: "runc".into(),
    };
    let theirs: theirs::RunPodSandboxRequest = round_trip(&request);
    let config = theirs.config.expect("a config");
    assert_eq!(config.metadata.expect("metadata").attempt, 7);
    let linux = config.linux.expect("linux");
    assert_eq!(linux.security_context.expect("context").run_as_user.expect("a user").value, 1000);
    assert_eq!(linux.resources.expect("resources").cpu_shares, 512);
}

#[test]
fn a_container_means_the_same_to_both() {
    let config = ours::ContainerConfig {
        metadata: Some(ours::ContainerMetadata { name: "c".into(), attempt: 3 }),
        image: Some(ours::ImageSpec { image: "i".into(), user_specified_image: "u".into(), ..Default::default() }),
        command: vec!["sh".into()],
        args: vec!["-c".into(), "true".into()],
        working_dir: "/w".into(),
        envs: vec![ours::KeyValue { key: "K".into(), value: b"V".to_vec() }],
        mounts: vec![ours::Mount {
            container_path: "/c".into(),
            host_path: "/h".into(),
            readonly: true,
            propagation: ours::MountPropagation::PropagationBidirectional.into(),
            uid_mappings: vec![ours::IdMapping { host_id: 1, container_id: 2, length: 3 }],
            recursive_read_only: true,
            ..Default::default()
        }],
        devices: vec![ours::Device { container_path: "/dev/x".into(), host_path: "/dev/y".into(), permissions: "rwm".into() }],
        labels: map(&[("a", "b")]),
        annotations: map(&[("c", "d")]),
        log_path: "0.log".into(),
        stdin: true,
        stdin_once: true,
        tty: true,
        linux: Some(ours::LinuxContainerConfig {
            resources: Some(ours::LinuxContainerResources {
                cpu_period: 100_000,
                cpu_quota: 20_000,
                oom_score_adj: -997,
                cpuset_cpus: "0-1".into(),
                hugepage_limits: vec![ours::HugepageLimit { page_size: "2MB".into(), limit: 4 << 20 }],
                unified: map(&[("memory.high", "1")]),
                memory_swap_limit_in_bytes: 9,
                ..Default::default()
            }),
            security_context: Some(ours::LinuxContainerSecurityContext {
                capabilities: Some(ours::Capability {
                    add_capabilities: vec!["NET_ADMIN".into()],
                    drop_capabilities: vec!["ALL".into()],
                    add_ambient_capabilities: vec!["KILL".into()],
                }),
                run_as_username: "nobody".into(),
                no_new_privs: true,
                masked_paths: vec!["/proc/kcore".into()],
                readonly_paths: vec!["/proc/sys".into()],
                ..Default::default()
            }),
        }),
        cdi_devices: vec![ours::CdiDevice { name: "v/c=n".into() }],
        ..Default::default()
    };
    let theirs: theirs::ContainerConfig = round_trip(&config);
    assert_eq!(theirs.envs[0].value.as_bytes().to_vec(), b"V".to_vec());
    assert_eq!(theirs.cdi_devices[0].name, "v/c=n");
    assert_eq!(theirs.linux.expect("linux").security_context.expect("context").run_as_username, "nobody");
}

#[test]
fn replies_mean_the_same_to_both() {
    let status = ours::ContainerStatus {
        id: "a".into(),
        state: ours::ContainerState::ContainerExited.into(),
        created_at: 1,
        started_at: 2,
        finished_at: 3,
        exit_code: 137,
        image_ref: "r".into(),
        reason: "OOMKilled".into(),
        message: "m".into(),
        log_path: "/l".into(),
        ..Default::default()
    };
    let read: theirs::ContainerStatus = round_trip(&status);
    assert_eq!(
        (read.exit_code, read.state, read.reason.as_str()),
        (137, theirs::ContainerState::ContainerExited as i32, "OOMKilled")
    );
    let image = ours::Image {
        id: "sha256:x".into(),
        repo_tags: vec!["t".into()],
        size: 5,
        uid: Some(ours::Int64Value { value: 0 }),
        pinned: true,
        ..Default::default()
    };
    let read: theirs::Image = round_trip(&image);
    assert_eq!((read.size, read.pinned, read.uid.map(|u| u.value)), (5, true, Some(0)));
    let stats = ours::ContainerStats {
        cpu: Some(ours::CpuUsage {
            timestamp: 1,
            usage_core_nano_seconds: Some(ours::UInt64Value { value: 2 }),
            ..Default::default()
        }),
        memory: Some(ours::MemoryUsage { working_set_bytes: Some(ours::UInt64Value { value: 3 }), ..Default::default() }),
        ..Default::default()
    };
    let read: theirs::ContainerStats = round_trip(&stats);
    assert_eq!(read.memory.and_then(|m| m.working_set_bytes).map(|v| v.value), Some(3));
}

#[test]
fn an_environment_value_may_be_any_bytes() {
    let entry = ours::KeyValue { key: "K".into(), value: vec![0xff, 0xfe] };
    let bytes = entry.encode_to_vec();
    assert_eq!(ours::KeyValue::decode(bytes.as_slice()).expect("ours takes bytes").value, [0xff, 0xfe]);
}
