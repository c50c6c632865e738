//! Against an API server in memory.

use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::*;
use crate::api::fake::FakeApi;
use crate::control::Order;

const MAPS: &str = "/api/v1/namespaces/ns/configmaps";
const SERVICES: &str = "/api/v1/services";

struct Fixture {
    api: FakeApi,
    objects: ApiObjects,
    orders: UnboundedReceiver<Order>,
    own: OwnNode,
    stop: CancellationToken,
    _root: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Fixture {
        let (api, root) = (FakeApi::default(), tempfile::tempdir().unwrap());
        let channel = tonic::transport::Endpoint::from_static("http://unused").connect_lazy();
        let mut config = Config::new("n1", channel);
        config.kubelet_root = root.path().to_owned();
        let (control, orders) = PodControl::new();
        let (own, stop) = (OwnNode::default(), CancellationToken::new());
        let objects = ApiObjects::start(&config, api.client(), own.clone(), control, &stop);
        Fixture { api, objects, orders, own, stop, _root: root }
    }

    async fn ready(&self, pod: &Pod, need: Need<'_>) {
        self.objects.ready(pod, need, &CancellationToken::new()).await;
    }

    /// The pods that are told next of a change.
    async fn told(&mut self) -> Vec<String> {
        let order = tokio::time::timeout(Duration::from_secs(30), self.orders.recv()).await.expect("nobody is told").unwrap();
        let Order::ObjectsChanged(pods) = order else { panic!("{order:?}") };
        pods.iter().map(ToString::to_string).collect()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn pod(uid: &str, spec: Value) -> Pod {
    serde_json::from_value(json!({"metadata": {"name": uid, "namespace": "ns", "uid": uid}, "spec": spec})).unwrap()
}

/// A pod that mounts these volumes, by name.
fn mounting(uid: &str, volumes: Value) -> Pod {
    let mounts: Vec<Value> = volumes.as_array().unwrap().iter().map(|v| json!({"name": v["name"], "mountPath": "/v"})).collect();
    pod(uid, json!({"containers": [{"name": "c", "volumeMounts": mounts}], "volumes": volumes}))
}

fn map_volume(uid: &str) -> Pod {
    mounting(uid, json!([{"name": "v", "configMap": {"name": "m"}}]))
}

fn map(value: &str) -> Value {
    json!({"metadata": {"name": "m", "namespace": "ns", "labels": {"a": "b"}}, "data": {"a": value}})
}

fn value(objects: &ApiObjects) -> Option<String> {
    objects.config_map("ns", "m").unwrap().map(|map| map.data.as_ref().unwrap()["a"].clone())
}

#[tokio::test]
async fn pods_that_name_an_object_share_one_watch_and_are_told_of_its_changes() {
    let mut fixture = Fixture::new();
    fixture.api.put(MAPS, map("one"));
    let [a, b] = ["a", "b"].map(map_volume);
    fixture.ready(&a, Need::Volumes).await;
    fixture.ready(&b, Need::Volumes).await;
    fixture.ready(&pod("c", json!({"containers": []})), Need::Volumes).await;
    assert_eq!(value(&fixture.objects).as_deref(), Some("one"));
    assert_eq!(fixture.objects.config_map("ns", "m").unwrap().unwrap().metadata.labels, None, "only what pods take is held");
    // A change of the metadata alone is none to a pod.
    fixture.api.put(MAPS, map("one"));
    fixture.api.put(MAPS, map("two"));
    assert_eq!(fixture.told().await, ["a", "b"]);
    assert_eq!(value(&fixture.objects).as_deref(), Some("two"));
    fixture.api.delete(MAPS, "m");
    assert_eq!(fixture.told().await, ["a", "b"]);
    assert_eq!(value(&fixture.objects), None);
    assert_eq!(fixture.api.asked(&format!("GET {MAPS}?")), 2, "a list and a watch");
    assert!(fixture.orders.try_recv().is_err(), "nobody was told of what they had waited for");
}

#[tokio::test]
async fn the_last_pods_end_ends_the_watch() {
    let fixture = Fixture::new();
    fixture.api.put(MAPS, map("one"));
    for uid in ["a", "b"] {
        fixture.ready(&map_volume(uid), Need::Volumes).await;
    }
    let uid = |text| PodUid::new(text).unwrap();
    fixture.objects.release(&uid("a"));
    assert!(fixture.objects.config_map("ns", "m").is_ok());
    fixture.objects.release(&uid("b"));
    let error = fixture.objects.config_map("ns", "m").unwrap_err();
    assert_eq!(error, "object \"ns\"/\"m\" not registered");
    wait_until("the watch ends", || fixture.api.watches() <= 1).await;
}

async fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let limit = tokio::time::Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(tokio::time::Instant::now() < limit, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn an_immutable_object_is_not_followed_after_its_first_answer() {
    let fixture = Fixture::new();
    let mut object = map("one");
    object["immutable"] = json!(true);
    fixture.api.put(MAPS, object);
    wait_until("the services are followed", || fixture.api.watches() == 1).await;
    fixture.ready(&map_volume("a"), Need::Volumes).await;
    assert_eq!(value(&fixture.objects).as_deref(), Some("one"));
    fixture.ready(&map_volume("b"), Need::Volumes).await;
    assert_eq!(fixture.api.asked(&format!("GET {MAPS}?")), 1);
    assert_eq!(fixture.api.watches(), 1);
}

#[tokio::test]
async fn without_an_answer_an_object_is_unknown_and_its_pod_is_told_when_it_comes() {
    let mut fixture = Fixture::new();
    fixture.api.put(MAPS, map("one"));
    fixture.api.set_away(true);
    fixture.ready(&map_volume("a"), Need::Volumes).await;
    let error = fixture.objects.config_map("ns", "m").unwrap_err();
    assert_eq!(error, "failed to sync configmap cache: timed out waiting for the condition");
    fixture.api.set_away(false);
    // Services may come first.
    while value_known(&fixture.objects).is_none() {
        assert_eq!(fixture.told().await, ["a"]);
    }
    fixture.api.set_away(true);
    assert_eq!(value(&fixture.objects).as_deref(), Some("one"), "what was read last is served");
}

fn value_known(objects: &ApiObjects) -> Option<String> {
    objects.config_map("ns", "m").ok()?.map(|map| map.data.as_ref().unwrap()["a"].clone())
}

#[tokio::test]
async fn a_step_that_is_cancelled_waits_no_longer() {
    let fixture = Fixture::new();
    fixture.api.set_away(true);
    let cancel = CancellationToken::new();
    cancel.cancel();
    let begun = std::time::Instant::now();
    fixture.objects.ready(&map_volume("a"), Need::Volumes, &cancel).await;
    assert!(begun.elapsed() < FIRST_ANSWER);
}

fn token_volume(uid: &str) -> Pod {
    let sources = json!([{"serviceAccountToken": {"path": "t", "expirationSeconds": 600}}]);
    mounting(uid, json!([{"name": "t", "projected": {"sources": sources}}]))
}

#[tokio::test]
async fn a_token_is_asked_for_once_and_a_missing_account_is_named() {
    let fixture = Fixture::new();
    let pod = token_volume("a");
    fixture.ready(&pod, Need::Volumes).await;
    let error = fixture.objects.token(&pod, "", 600).unwrap_err();
    assert_eq!(error, "failed to fetch token: serviceaccounts \"default\" not found");
    fixture.api.put("/api/v1/namespaces/ns/serviceaccounts", json!({"metadata": {"name": "default"}}));
    for _ in 0..2 {
        fixture.ready(&pod, Need::Volumes).await;
    }
    assert_eq!(fixture.objects.token(&pod, "", 600).unwrap().text, "token-1");
    assert!(fixture.objects.token(&token_volume("b"), "", 600).is_err(), "a token is one pod's");
    fixture.objects.release(&PodUid::new("a").unwrap());
    assert!(fixture.objects.token(&pod, "", 600).is_err());
}

#[tokio::test]
async fn services_are_awaited_by_pods_of_the_api_and_not_by_the_nodes_own() {
    let fixture = Fixture::new();
    fixture.api.set_away(true);
    let own_pod = serde_json::from_value(
        json!({"metadata": {"name": "s", "uid": "s", "annotations": {"kubernetes.io/config.source": "file"}}}),
    );
    let (own_pod, of_api): (Pod, Pod) = (own_pod.unwrap(), pod("a", json!({"containers": [{"name": "c"}]})));
    assert!(fixture.objects.service_variables(&of_api).unwrap_err().contains("services have not yet been read"));
    assert_eq!(fixture.objects.service_variables(&own_pod), Ok(Vec::new()));
    fixture.api.put(
        SERVICES,
        json!({"metadata": {"name": "kubernetes", "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 443}]}}),
    );
    fixture.api.set_away(false);
    let container = pod::spec(&of_api).containers[0].clone();
    wait_for_services(&fixture, &of_api, &container).await;
    let found = fixture.objects.service_variables(&of_api).unwrap();
    assert!(found.contains(&("KUBERNETES_SERVICE_HOST".to_owned(), b"10.96.0.1".to_vec())), "{found:?}");
}

async fn wait_for_services(fixture: &Fixture, pod: &Pod, container: &k8s_openapi::api::core::v1::Container) {
    for _ in 0..40 {
        fixture.ready(pod, Need::Environment(container)).await;
        if fixture.objects.service_variables(pod).is_ok() {
            return;
        }
    }
    panic!("the services are not read");
}

const CLAIMS: &str = "/api/v1/namespaces/ns/persistentvolumeclaims";
const VOLUMES: &str = "/api/v1/persistentvolumes";
const DRIVERS: &str = "/apis/storage.k8s.io/v1/csidrivers";

fn claimed(uid: &str) -> Pod {
    mounting(uid, json!([{"name": "d", "persistentVolumeClaim": {"claimName": "data"}}]))
}

fn put_claim(api: &FakeApi, source: Value) {
    let mut spec = json!({"claimRef": {"name": "data", "uid": "c1"}});
    spec.as_object_mut().unwrap().extend(source.as_object().unwrap().clone());
    api.put(VOLUMES, json!({"metadata": {"name": "pv1"}, "spec": spec}));
    api.put(
        CLAIMS,
        json!({"metadata": {"name": "data", "uid": "c1"}, "spec": {"volumeName": "pv1"}, "status": {"phase": "Bound"}}),
    );
}

#[tokio::test]
async fn a_claims_volume_is_asked_for_until_it_is_bound_and_then_no_more() {
    let fixture = Fixture::new();
    let pod = claimed("a");
    fixture.ready(&pod, Need::Volumes).await;
    let error = fixture.objects.bound_volume(&pod, "data").unwrap().unwrap_err();
    assert!(error.contains("persistentvolumeclaims \"data\" not found"), "{error}");
    put_claim(&fixture.api, json!({"hostPath": {"path": "/x"}}));
    fixture.ready(&pod, Need::Volumes).await;
    let asked = fixture.api.asked(CLAIMS);
    fixture.ready(&pod, Need::Volumes).await;
    assert_eq!(fixture.api.asked(CLAIMS), asked);
    let volume = fixture.objects.bound_volume(&pod, "data").unwrap().unwrap();
    assert_eq!(volume.metadata.name.as_deref(), Some("pv1"));
    assert_eq!(fixture.own.volumes_in_use(), Some(Vec::new()), "a path of the host is attached to nobody");
}

#[tokio::test]
async fn a_drivers_volume_is_used_when_its_attachment_says_so_and_is_in_use_until_the_pod_has_gone() {
    let fixture = Fixture::new();
    put_claim(&fixture.api, json!({"csi": {"driver": "d", "volumeHandle": "h"}}));
    fixture.api.put(DRIVERS, json!({"metadata": {"name": "d"}, "spec": {"tokenRequests": [{"audience": "vault"}]}}));
    fixture.api.put("/api/v1/namespaces/ns/serviceaccounts", json!({"metadata": {"name": "default"}}));
    let pod = claimed("a");
    let name = "kubernetes.io/csi/d^h";
    let status = json!({"volumesInUse": [name], "volumesAttached": [{"name": name, "devicePath": ""}]});
    let attachment = Attachments::new("n1", OwnNode::default(), Vec::new());
    let handle = volume::csi::Handle { driver: "d".to_owned(), handle: "h".to_owned() };
    let attachment = attachment.name_of(&handle);
    let attach = async {
        wait_until("the volume is in use", || fixture.own.volumes_in_use() == Some(vec![name.to_owned()])).await;
        assert!(fixture.objects.bound_volume(&pod, "data").unwrap().is_err(), "nobody mounts it before");
        fixture.api.put(
            "/apis/storage.k8s.io/v1/volumeattachments",
            json!({"metadata": {"name": attachment},
            "spec": {"attacher": "d", "nodeName": "n1", "source": {"persistentVolumeName": "pv1"}},
            "status": {"attached": true, "attachmentMetadata": {"device": "x"}}}),
        );
        let node = json!({"metadata": {"name": "n1", "uid": "n", "resourceVersion": "1"}, "status": status});
        fixture.own.set(serde_json::from_value(node).unwrap());
    };
    tokio::join!(fixture.ready(&pod, Need::Volumes), attach);
    assert!(fixture.objects.bound_volume(&pod, "data").unwrap().is_ok());
    assert_eq!(fixture.objects.publish_context("d", "h")["device"], "x");
    assert_eq!(fixture.objects.token(&pod, "vault", 3600).unwrap().text, "token-1", "the driver's tokens are there");
    fixture.objects.release(&PodUid::new("a").unwrap());
    assert_eq!(fixture.own.volumes_in_use(), Some(Vec::new()));
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_runs_is_not_held_up_by_a_volume_that_is_attached_no_more() {
    let fixture = Fixture::new();
    put_claim(&fixture.api, json!({"csi": {"driver": "d", "volumeHandle": "h"}}));
    fixture.api.put(DRIVERS, json!({"metadata": {"name": "d"}, "spec": {}}));
    for (need, waits) in [(Need::VolumesAgain, false), (Need::Volumes, true)] {
        let begun = tokio::time::Instant::now();
        fixture.ready(&claimed("a"), need).await;
        let why = fixture.objects.bound_volume(&claimed("a"), "data").unwrap().unwrap_err();
        assert!(why.contains("is not in the node's list of volumes in use yet"), "{why}");
        assert_eq!(begun.elapsed() > Duration::from_secs(60), waits, "{need:?} {:?}", begun.elapsed());
    }
}
