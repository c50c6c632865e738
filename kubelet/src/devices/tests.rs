//! Devices without plugins: who has what, and what becomes of it.

use super::state::{Allocation, Link, State};
use super::wire::v1beta1 as wire;
use super::*;

fn set(names: &str) -> BTreeSet<String> {
    names.split_whitespace().map(str::to_owned).collect()
}

fn state() -> State {
    State::resume(BTreeMap::new(), ["v.io/d".to_owned()], Instant::now())
}

fn list(devices: &[(&str, bool, &[i64])]) -> wire::ListAndWatchResponse {
    let device = |(id, healthy, nodes): &(&str, bool, &[i64])| wire::Device {
        id: (*id).to_owned(),
        health: if *healthy { "Healthy" } else { "Unhealthy" }.to_owned(),
        topology: Some(wire::TopologyInfo { nodes: nodes.iter().map(|id| wire::NumaNode { id: *id }).collect() }),
    };
    wire::ListAndWatchResponse { devices: devices.iter().map(device).collect() }
}

fn plugin() -> Plugin {
    Plugin::unconnected()
}

#[tokio::test]
async fn only_the_newest_plugins_list_counts_and_its_end_takes_the_devices_away() {
    let mut state = state();
    assert!(state.awaits("v.io/d"));
    assert!(!state.awaits("v.io/other") && !state.knows("v.io/other"), "what nobody has offered is not waited for");
    assert_eq!(state.health("v.io/d", "a"), "Unknown");
    let first = plugin();
    let old = state.connected("v.io/d", first.clone());
    let new = state.connected("v.io/d", plugin());
    assert!(first.replaced.is_cancelled());
    assert!(!state.listed("v.io/d", old, list(&[("x", true, &[])])));
    assert!(state.awaits("v.io/d"), "nothing is known of it before its first list");
    assert!(state.listed("v.io/d", new, list(&[("a", true, &[]), ("b", false, &[])])));
    assert!(!state.listed("v.io/d", new, list(&[("a", true, &[]), ("b", false, &[])])), "the same again is no change");
    assert_eq!(state.capacity()["v.io/d"], (2, 1));
    assert_eq!((state.health("v.io/d", "a"), state.health("v.io/d", "b")), ("Healthy", "Unhealthy"));
    assert!(!state.disconnected("v.io/d", old, Instant::now()));
    assert!(state.disconnected("v.io/d", new, Instant::now()));
    assert_eq!(state.capacity()["v.io/d"], (2, 0));
    assert!(!state.awaits("v.io/d"), "it is known, and out of order");
}

#[tokio::test(start_paused = true)]
async fn a_resource_is_forgotten_five_minutes_after_its_plugin() {
    let mut state = state();
    let now = Instant::now();
    assert!(!state.forget_lost(now + std::time::Duration::from_secs(299)));
    assert!(state.forget_lost(now + std::time::Duration::from_secs(300)));
    assert!(state.resources.is_empty());
    let number = state.connected("v.io/d", plugin());
    assert!(!state.forget_lost(now + std::time::Duration::from_secs(900)));
    state.disconnected("v.io/d", number, now);
    assert!(matches!(state.resources["v.io/d"].link, Link::Down(_)));
    assert!(state.forget_lost(now + std::time::Duration::from_secs(900)));
}

#[tokio::test]
async fn what_is_given_or_held_is_taken_until_it_comes_back() {
    let mut state = state();
    let number = state.connected("v.io/d", plugin());
    state.listed("v.io/d", number, list(&[("a", true, &[0]), ("b", true, &[0, 1]), ("c", true, &[])]));
    state.hold("v.io/d", &set("c"));
    state.give(("u1", "main", "v.io/d"), &set("a b"), wire::ContainerAllocateResponse::default());
    let given = &state.allocations["u1"]["main"]["v.io/d"];
    let by_node: Vec<_> = given.by_node.iter().map(|(node, ids)| (*node, ids.join(" "))).collect();
    assert_eq!(by_node, [(0, "a b".to_owned()), (1, "b".to_owned())]);
    assert_eq!(given.ids(), set("a b"));
    assert_eq!(state.pool("v.io/d").taken, set("a b c"));
    state.let_go("v.io/d", &set("c"));
    assert!(!state.retain(|uid| uid == "u1"));
    assert_eq!(state.pool("v.io/d").taken, set("a b"));
    assert!(state.retain(|_| false));
    assert_eq!(state.pool("v.io/d").taken, set(""));
}

#[test]
fn the_health_of_devices_is_in_the_containers_status() {
    let root = tempfile::tempdir().unwrap();
    let (control, _orders) = PodControl::new();
    let devices = Devices::load(root.path(), control, Metrics::default());
    let allocation = Allocation { by_node: [(-1, vec!["a".to_owned()])].into(), ..Allocation::default() };
    let resources = [("v.io/d".to_owned(), allocation)].into();
    devices.lock().allocations.insert("u1".to_owned(), [("main".to_owned(), resources)].into());
    let mut pod = Pod::default();
    pod.metadata.uid = Some("u1".to_owned());
    let container = k8s_openapi::api::core::v1::ContainerStatus { name: "main".to_owned(), ..Default::default() };
    let mut status = PodStatus { container_statuses: Some(vec![container]), ..PodStatus::default() };
    devices.add_health(&pod, &mut status);
    let told = status.container_statuses.unwrap().remove(0).allocated_resources_status.unwrap().remove(0);
    let health = told.resources.unwrap().remove(0);
    assert_eq!((told.name.as_str(), health.resource_id.as_str(), health.health.as_deref()), ("v.io/d", "a", Some("Unknown")));
}
