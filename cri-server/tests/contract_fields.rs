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
