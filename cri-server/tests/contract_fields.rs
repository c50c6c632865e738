//! What docs/cri.md says of single fields, where no other test shows it: replies repeat what was asked for, lists stream, the pod
//! CIDR may come later.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::HashMap;

use berth_cri_api::v1;
use berth_testkit::in_namespaces;
use futures::TryStreamExt;
use support::{Agent, IMAGE, container};
use tonic::Code;

fn map(entries: &[(&str, &str)]) -> HashMap<String, String> {
    entries.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn run(agent: &Agent, config: v1::PodSandboxConfig) -> Result<String, tonic::Status> {
    let mut client = agent.runtime();
    let request = v1::RunPodSandboxRequest { config: Some(config), runtime_handler: "berth".into() };
    agent.client.block_on(client.run_pod_sandbox(request)).map(|r| r.into_inner().pod_sandbox_id)
}

#[test]
fn a_status_repeats_what_was_asked_for() {
    in_namespaces(|| {
        let agent = Agent::start();
        let mut config = agent.sandbox_config("p");
        config.annotations = map(&[("note", "kept as it is"), ("long", &"x".repeat(200_000))]);
        let options = v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..Default::default() };
        config.linux = Some(v1::LinuxPodSandboxConfig {
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(options.clone()),
                ..Default::default()
            }),
            ..Default::default()
        });
        let pod = run(&agent, config.clone()).unwrap();
        let status = agent.sandbox_status(&pod);
        assert_eq!(
            (&status.metadata, &status.labels, &status.annotations),
            (&config.metadata, &config.labels, &config.annotations)
        );
        assert_eq!(status.runtime_handler, "berth");
        assert_eq!(status.linux.unwrap().namespaces.unwrap().options, Some(options));
        let host = agent.root.join("volume");
        std::fs::create_dir(&host).unwrap();
        let link = agent.root.join("link");
        std::os::unix::fs::symlink(&host, &link).unwrap();
        let mounts = vec![
            v1::Mount {
                container_path: "/a".into(),
                host_path: link.to_string_lossy().into(),
                readonly: true,
                ..Default::default()
            },
            v1::Mount {
                container_path: "/b".into(),
                host_path: agent.root.join("not/there/yet").to_string_lossy().into(),
                ..Default::default()
            },
        ];
        let mut asked = container("c", &["sleep", "1000"]);
        asked.metadata.as_mut().unwrap().attempt = 3;
        let image = asked.image.as_mut().unwrap();
        image.user_specified_image = "busybox:newest".into();
        image.annotations = map(&[("of", "the image")]);
        image.runtime_handler = "berth".into();
        (asked.labels, asked.annotations) = (map(&[("l", "1")]), map(&[("a", "2"), ("empty", "")]));
        asked.mounts = mounts.clone();
        asked.stop_signal = v1::Signal::Sigusr1.into();
        asked.log_path = "/c/3.log".into();
        asked.linux = Some(v1::LinuxContainerConfig {
            resources: Some(v1::LinuxContainerResources {
                cpu_shares: 512,
                memory_limit_in_bytes: 64 << 20,
                ..Default::default()
            }),
            security_context: Some(v1::LinuxContainerSecurityContext {
                run_as_username: "web".into(),
                supplemental_groups: vec![1234],
                namespace_options: Some(v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..Default::default() }),
                ..Default::default()
            }),
        });
        let id = agent.create(&pod, "p", asked.clone()).unwrap();
        let status = agent.container_status(&id);
        assert_eq!((&status.metadata, &status.labels, &status.annotations), (&asked.metadata, &asked.labels, &asked.annotations));
        assert_eq!(status.mounts, mounts, "nothing resolved, nothing added");
        assert_eq!(status.stop_signal, asked.stop_signal);
        assert_eq!(status.log_path, agent.root.join("logs/p/c/3.log").to_string_lossy());
        let image = status.image.unwrap();
        assert_eq!((image.image.as_str(), image.user_specified_image.as_str()), (IMAGE, "busybox:newest"));
        assert_eq!((image.annotations, image.runtime_handler.as_str()), (map(&[("of", "the image")]), "berth"));
        let resources = status.resources.unwrap().linux.unwrap();
        assert_eq!((resources.cpu_shares, resources.memory_limit_in_bytes), (512, 64 << 20));
        let user = status.user.unwrap().linux.unwrap();
        assert_eq!((user.uid, user.gid, user.supplemental_groups), (33, 33, vec![33, 1234, 77]));
        let mut client = agent.runtime();
        agent.client.block_on(async {
            let listed = client.list_containers(v1::ListContainersRequest::default()).await.unwrap().into_inner().containers;
            let item = &listed[0];
            assert_eq!((&item.id, &item.pod_sandbox_id, &item.image_id), (&id, &pod, &status.image_id));
            assert_eq!((&item.labels, &item.annotations, &item.metadata), (&asked.labels, &asked.annotations, &asked.metadata));
            let pods = client.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap().into_inner().items;
            assert_eq!((&pods[0].annotations, pods[0].runtime_handler.as_str()), (&config.annotations, "berth"));
            let whole = client.pod_sandbox_status(v1::PodSandboxStatusRequest { pod_sandbox_id: pod, verbose: false }).await;
            let whole = whole.unwrap().into_inner();
            assert_eq!(whole.containers_statuses.len(), 1);
            assert!(whole.info.is_empty() && whole.timestamp > whole.status.unwrap().created_at);
        });
        agent.finish();
    });
}

fn security(pid: v1::NamespaceMode) -> v1::LinuxPodSandboxConfig {
    let options = v1::NamespaceOption { pid: pid.into(), ..Default::default() };
    v1::LinuxPodSandboxConfig {
        security_context: Some(v1::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() }),
        ..Default::default()
    }
}

/// What a tool sees of the network in a namespace.
fn addresses(namespace: &str) -> String {
    let out = std::process::Command::new("nsenter").args([namespace, "ip", "-j", "addr"]).output().unwrap();
    assert!(out.status.success(), "{namespace}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// The path of a namespace in a verbose status.
fn path<'a>(info: &'a serde_json::Value, kind: &str) -> Option<&'a str> {
    let entries = info["runtimeSpec"]["linux"]["namespaces"].as_array().unwrap();
    entries.iter().find(|entry| entry["type"] == kind).unwrap_or_else(|| panic!("no {kind}: {entries:?}"))["path"].as_str()
}

#[test]
fn a_verbose_status_leads_tools_into_the_pods_namespaces() {
    in_namespaces(|| {
        let agent = Agent::start();
        let ns = |pid: i64, kind: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        let with = |name: &str, pid| v1::PodSandboxConfig { linux: Some(security(pid)), ..agent.sandbox_config(name) };
        for (name, mode) in [("own", v1::NamespaceMode::Container), ("shared", v1::NamespaceMode::Pod)] {
            let pod = run(&agent, with(name, mode)).unwrap();
            let ip = agent.sandbox_status(&pod).network.unwrap().ip;
            let info = agent.sandbox_info(&pod);
            for kind in ["network", "ipc", "uts"] {
                assert!(path(&info, kind).is_some(), "{kind}");
            }
            assert!(addresses(&format!("--net={}", path(&info, "network").unwrap())).contains(&ip));
            let (pid, shim) = (info["pid"].as_i64().unwrap(), info["shimPid"].as_i64().unwrap());
            // A pod that shares its processes has one in it from the beginning.
            assert_eq!(pid == shim, name == "own");
            let id = agent.run_script(&pod, name, "c", "exec sleep 1000");
            let info = agent.sandbox_info(&pod);
            let pid = info["pid"].as_i64().unwrap();
            assert_eq!(pid, i64::from(agent.container_pid(&id)));
            assert!(addresses(&format!("--net=/proc/{pid}/ns/net")).contains(&ip));
            let inside = agent.container_info(&id);
            assert!(addresses(&format!("--net={}", path(&inside, "network").unwrap())).contains(&ip));
            assert_eq!(std::fs::read_link(path(&inside, "uts").unwrap()).unwrap(), ns(pid, "uts"));
            assert_eq!(path(&inside, "mount"), None);
            assert_eq!(path(&inside, "pid").is_some(), name == "shared", "its own PID namespace has no path");
            let eth0 = &info["cniResult"]["Interfaces"]["eth0"];
            assert_eq!(eth0["IPConfigs"][0]["IP"], ip.as_str());
            assert_eq!(eth0["Sandbox"].as_str(), path(&info, "network"));
            assert_eq!(info["cniResult"]["Interfaces"]["lo"]["IPConfigs"][0]["IP"], "127.0.0.1");
            assert!(info["cniResult"]["Routes"][0]["dst"].is_string(), "{}", info["cniResult"]);
        }
        agent.finish();
    });
}

#[test]
fn a_container_that_leaves_its_namespaces_out_starts_in_every_pod() {
    in_namespaces(|| {
        let agent = Agent::start();
        let config = v1::PodSandboxConfig { linux: Some(security(v1::NamespaceMode::Container)), ..agent.sandbox_config("p") };
        let pod = run(&agent, config).unwrap();
        agent.run_script(&pod, "p", "c", "exec sleep 1000");
        let mut explicit = container("d", &["true"]);
        explicit.linux = Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(v1::NamespaceOption::default()),
                ..Default::default()
            }),
            ..Default::default()
        });
        assert_eq!(agent.create(&pod, "p", explicit).unwrap_err().code(), Code::InvalidArgument);
        agent.finish();
    });
}

#[test]
fn the_pods_files_belong_to_the_root_of_its_user_namespace() {
    in_namespaces(|| {
        let agent = Agent::start();
        let ids = vec![v1::IdMapping { host_id: 200_000, container_id: 0, length: 65_536 }];
        let mut linux = security(v1::NamespaceMode::Container);
        let options = linux.security_context.as_mut().unwrap().namespace_options.as_mut().unwrap();
        options.userns_options = Some(v1::UserNamespace { mode: v1::NamespaceMode::Pod.into(), uids: ids.clone(), gids: ids });
        let pod = run(&agent, v1::PodSandboxConfig { linux: Some(linux), ..agent.sandbox_config("p") }).unwrap();
        let id = agent.run_script(&pod, "p", "c", "exec sleep 1000");
        let seen = agent.exec(&id, &["ls", "-ln", "/etc/resolv.conf", "/etc/hostname", "/etc/hosts"], 10).unwrap();
        let seen = String::from_utf8(seen.stdout).unwrap();
        let owners: Vec<_> = seen.lines().map(|line| line.split_whitespace().skip(2).take(2).collect::<Vec<_>>()).collect();
        assert_eq!(owners, [["0", "0"]; 3], "{seen}");
        let info = agent.sandbox_info(&pod);
        assert!(path(&info, "user").is_some() && info["runtimeSpec"]["linux"]["uidMappings"][0]["hostID"] == 200_000);
        agent.finish();
    });
}

#[test]
fn a_bad_cgroup_parent_or_bandwidth_is_refused_before_anything_is_made() {
    in_namespaces(|| {
        let agent = Agent::start();
        let long = "x".repeat(300);
        for parent in ["relative/../../x", long.as_str(), "/a\nb", "/a\0b"] {
            let mut config = agent.sandbox_config("p");
            config.linux = Some(v1::LinuxPodSandboxConfig { cgroup_parent: parent.into(), ..Default::default() });
            let error = run(&agent, config).unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{parent:?}: {error}");
            assert!(error.message().contains("linux.cgroup_parent"), "{error}");
        }
        let mut config = agent.sandbox_config("p");
        config.annotations = map(&[("kubernetes.io/egress-bandwidth", "fast")]);
        let error = run(&agent, config.clone()).unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains("kubernetes.io/egress-bandwidth"), "{error}");
        assert_eq!(std::fs::read_dir(agent.state.join("sandboxes")).unwrap().count(), 0);
        config.annotations = map(&[("kubernetes.io/egress-bandwidth", "10M")]);
        run(&agent, config).unwrap();
        agent.finish();
    });
}

#[test]
fn what_a_linux_node_can_not_mean_is_refused_by_its_name() {
    in_namespaces(|| {
        let agent = Agent::start();
        let with = |change: fn(&mut v1::PodSandboxConfig)| {
            let mut config = agent.sandbox_config("p");
            change(&mut config);
            run(&agent, config).unwrap_err()
        };
        let sysctl = |name: &str| {
            let mut config = agent.sandbox_config("p");
            config.linux = Some(v1::LinuxPodSandboxConfig { sysctls: map(&[(name, "1")]), ..Default::default() });
            run(&agent, config).unwrap_err()
        };
        assert!(with(|c| c.windows = Some(Default::default())).message().contains("config.windows"));
        let port =
            |host_ip: &str| v1::PortMapping { host_port: 80, container_port: 80, host_ip: host_ip.into(), ..Default::default() };
        let mut config = agent.sandbox_config("p");
        config.port_mappings = vec![port("not-an-address")];
        assert!(run(&agent, config).unwrap_err().message().contains("port_mappings.host_ip"));
        assert!(sysctl("kernel.core_pattern").message().contains("kernel.core_pattern"));
        let pod = agent.run_sandbox("p");
        let id = agent.run_script(&pod, "p", "c", "exec sleep 1000");
        let mut client = agent.runtime();
        let windows =
            v1::UpdateContainerResourcesRequest { container_id: id, windows: Some(Default::default()), ..Default::default() };
        let refused = agent.client.block_on(client.update_container_resources(windows)).unwrap_err();
        assert_eq!((refused.code(), refused.message().contains("windows")), (Code::Unimplemented, true));
        agent.finish();
    });
}

/// What a streaming list sends.
async fn all<T>(list: impl Future<Output = Result<tonic::Response<tonic::Streaming<T>>, tonic::Status>>) -> Vec<T> {
    list.await.unwrap().into_inner().try_collect().await.unwrap()
}

#[test]
fn streaming_lists_carry_every_item_and_no_empty_message() {
    in_namespaces(|| {
        let agent = Agent::start();
        let mut client = agent.runtime();
        agent.client.block_on(async {
            let none: Vec<_> = all(client.stream_containers(v1::StreamContainersRequest::default())).await;
            assert!(none.is_empty(), "an empty list is a stream that ends");
        });
        let pod = agent.run_sandbox("p");
        let ids: Vec<String> =
            (0..70).map(|n| agent.create(&pod, "p", container(&format!("c{n}"), &["sleep", "1000"])).unwrap()).collect();
        agent.start_container(&ids[0]).unwrap();
        let mut images = agent.images();
        agent.client.block_on(async {
            let lists: Vec<_> = all(client.stream_containers(v1::StreamContainersRequest::default())).await;
            assert!(lists.len() > 1 && lists.iter().all(|l| !l.containers.is_empty()));
            let mut seen: Vec<_> = lists.into_iter().flat_map(|l| l.containers).map(|c| c.id).collect();
            let mut want = ids.clone();
            seen.sort();
            want.sort();
            assert_eq!(seen, want);
            let pods: Vec<_> = all(client.stream_pod_sandboxes(v1::StreamPodSandboxesRequest::default())).await;
            assert_eq!(pods.iter().flat_map(|l| &l.pod_sandboxes).count(), 1);
            let stats: Vec<_> = all(client.stream_container_stats(v1::StreamContainerStatsRequest::default())).await;
            assert!(stats.iter().flat_map(|l| &l.container_stats).any(|s| s.attributes.as_ref().is_some_and(|a| a.id == ids[0])));
            let stats: Vec<_> = all(client.stream_pod_sandbox_stats(v1::StreamPodSandboxStatsRequest::default())).await;
            assert_eq!(stats.iter().flat_map(|l| &l.pod_sandbox_stats).count(), 1);
            let stored: Vec<_> = all(images.stream_images(v1::StreamImagesRequest::default())).await;
            assert_eq!(stored.iter().flat_map(|l| &l.images).count(), 1);
        });
        agent.finish();
    });
}

#[test]
fn a_pod_cidr_that_was_configured_stays() {
    in_namespaces(|| {
        let agent = Agent::tuned(|config| config.pod_cidrs = vec!["10.124.4.0/24".into()]);
        let network_config = Some(v1::NetworkConfig { pod_cidr: "10.123.4.0/24".into() });
        let request = v1::UpdateRuntimeConfigRequest { runtime_config: Some(v1::RuntimeConfig { network_config }) };
        agent.client.block_on(agent.runtime().update_runtime_config(request)).unwrap();
        let pod = agent.run_sandbox("p");
        let network = agent.sandbox_status(&pod).network.unwrap();
        assert!(network.ip.starts_with("10.124.4."), "{}", network.ip);
        agent.finish();
    });
}

#[test]
fn a_pod_cidr_given_later_is_where_the_next_pods_addresses_come_from() {
    in_namespaces(|| {
        // As where the kubelet is told the node's range by the API server, which comes after the runtime's start.
        let agent = Agent::tuned(|config| config.pod_cidrs.clear());
        let mut client = agent.runtime();
        let mut update = |cidr: &str| {
            let network_config = Some(v1::NetworkConfig { pod_cidr: cidr.into() });
            let request = v1::UpdateRuntimeConfigRequest { runtime_config: Some(v1::RuntimeConfig { network_config }) };
            agent.client.block_on(client.update_runtime_config(request)).map(drop)
        };
        for bad in ["nonsense", "10.1.0.0/33", "10.1.0.0/24,nonsense"] {
            assert_eq!(update(bad).unwrap_err().code(), Code::InvalidArgument, "{bad}");
        }
        update("10.123.4.0/24,fd12:3456::/112").unwrap();
        update("").unwrap();
        let pod = agent.run_sandbox("p");
        let network = agent.sandbox_status(&pod).network.unwrap();
        assert!(network.ip.starts_with("10.123.4."), "{}", network.ip);
        assert!(network.additional_ips[0].ip.starts_with("fd12:3456::"), "{:?}", network.additional_ips);
        agent.finish();
    });
}
