//! Metrics and statistics of real pods over a real socket.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use berth_cri_api::v1;
use berth_testkit::{in_namespaces, wait_until};
use support::{Agent, container};

const SOON: Duration = Duration::from_secs(20);

/// A pod with a container that has limits and wrote something.
fn busy(agent: &Agent) -> (String, String) {
    let pod = agent.run_sandbox("one");
    let mut config = container("c", &["sleep", "1000"]);
    let resources = v1::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 20_000,
        cpu_shares: 1024,
        memory_limit_in_bytes: 64 << 20,
        ..Default::default()
    };
    config.linux = Some(v1::LinuxContainerConfig { resources: Some(resources), ..Default::default() });
    let id = agent.create(&pod, "one", config).unwrap();
    agent.start_container(&id).unwrap();
    agent.exec(&id, &["sh", "-c", "for i in 1 2 3; do echo $i > /tmp/$i; done"], 10).unwrap();
    (pod, id)
}

fn values(metrics: &[v1::Metric]) -> BTreeMap<&str, Vec<&v1::Metric>> {
    let mut out: BTreeMap<&str, Vec<&v1::Metric>> = BTreeMap::new();
    metrics.iter().for_each(|metric| out.entry(&metric.name).or_default().push(metric));
    out
}

#[test]
fn every_metric_that_is_described_has_a_value_with_its_labels() {
    in_namespaces(|| {
        let agent = Agent::start();
        let (pod, id) = busy(&agent);
        let mut client = agent.runtime();
        let (described, listed) = agent.client.block_on(async {
            let described = client.list_metric_descriptors(v1::ListMetricDescriptorsRequest {}).await.unwrap().into_inner();
            let listed = client.list_pod_sandbox_metrics(v1::ListPodSandboxMetricsRequest {}).await.unwrap().into_inner();
            (described.descriptors, listed.pod_metrics)
        });
        assert_eq!((listed.len(), listed[0].pod_sandbox_id.as_str()), (1, pod.as_str()));
        assert_eq!(listed[0].container_metrics.len(), 1);
        let of_container = &listed[0].container_metrics[0];
        assert_eq!(of_container.container_id, id);
        let all: Vec<v1::Metric> = listed[0].metrics.iter().chain(&of_container.metrics).cloned().collect();
        let all = values(&all);
        for descriptor in &described {
            assert!(!descriptor.help.is_empty());
            let got = all.get(descriptor.name.as_str()).unwrap_or_else(|| panic!("no value: {}", descriptor.name));
            for metric in got {
                assert_eq!(metric.label_values.len(), descriptor.label_keys.len(), "{metric:?}");
                assert!(metric.value.is_some() && metric.timestamp > 0, "{metric:?}");
            }
        }
        let names: BTreeSet<&str> = described.iter().map(|d| d.name.as_str()).collect();
        assert!(all.keys().all(|name| names.contains(name)));
        let one = |name: &str| all[name][0].value.as_ref().unwrap().value;
        assert_eq!((one("container_spec_cpu_quota"), one("container_spec_memory_limit_bytes")), (20_000, 64 << 20));
        assert_eq!((one("container_processes"), one("container_spec_cpu_shares")), (1, 1024));
        assert!(one("container_memory_usage_bytes") > 0 && one("container_fs_limit_bytes") > 0);
        assert!(one("container_file_descriptors") >= 3 && one("container_ulimits_soft") > 0);
        let labels = &all["container_processes"][0].label_values;
        assert_eq!((&labels[..3], labels[4].as_str()), (&["one", "test", "c"].map(str::to_owned)[..], support::IMAGE));
        assert!(labels[3].ends_with(&id), "{labels:?}");
        assert_eq!(all["container_network_receive_bytes_total"][0].label_values[5], "eth0");
        let streamed = agent.client.block_on(async {
            let mut stream = client.stream_pod_sandbox_metrics(v1::StreamPodSandboxMetricsRequest {}).await.unwrap().into_inner();
            stream.message().await.unwrap().unwrap().pod_sandbox_metrics
        });
        assert_eq!(streamed[0].pod_sandbox_id, pod);
        agent.finish();
    });
}

#[test]
fn statistics_advance_and_tell_rates_layers_networks_and_processes() {
    in_namespaces(|| {
        let agent = Agent::start();
        let (pod, id) = busy(&agent);
        let mut client = agent.runtime();
        let mut read = || {
            let request = v1::ContainerStatsRequest { container_id: id.clone() };
            agent.client.block_on(client.container_stats(request)).unwrap().into_inner().stats.unwrap()
        };
        let first = read();
        let layer = first.writable_layer.unwrap();
        // The folder, /tmp and three files.
        assert!(layer.inodes_used.unwrap().value >= 5 && layer.used_bytes.unwrap().value > 0);
        assert!(layer.timestamp > 0);
        // A rate needs two samples that are apart.
        let mut later = None;
        assert!(wait_until(SOON, || {
            later = Some(read());
            later.as_ref().and_then(|stats| stats.cpu.as_ref()?.usage_nano_cores).is_some()
        }));
        let (first, later) = (first.cpu.unwrap(), later.unwrap().cpu.unwrap());
        assert!(later.timestamp > first.timestamp);
        assert!(later.usage_core_nano_seconds.unwrap().value >= first.usage_core_nano_seconds.unwrap().value);
        // A pod that is gone, or a container, is no error of the list.
        let gone = agent.run_script(&pod, "one", "gone", "exit 0");
        let mut client = agent.runtime();
        agent.client.block_on(client.remove_container(v1::RemoveContainerRequest { container_id: gone })).unwrap();
        let list = v1::ListPodSandboxStatsRequest::default();
        let stats = agent.client.block_on(client.list_pod_sandbox_stats(list)).unwrap().into_inner().stats;
        let linux = stats[0].linux.clone().unwrap();
        let network = linux.network.unwrap();
        assert_eq!(network.default_interface.unwrap().name, "eth0");
        assert!(network.interfaces.iter().any(|i| i.name == "eth0"));
        assert!(linux.process.unwrap().process_count.unwrap().value >= 1);
        assert_eq!(linux.containers.len(), 1);
        assert!(linux.memory.unwrap().usage_bytes.unwrap().value > 0);
        agent.finish();
    });
}
