//! Pods of an API server: their life from the watch to the last status, with the server away now and then.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "support/fake_api.rs"]
mod fake_api;
mod support;

use berth_testkit::in_namespaces;
use fake_api::FakeApi;
use serde_json::{Value, json};
use support::{Node, eventually, pod};

async fn start(node: &mut Node, api: &FakeApi) {
    let mut config = node.config().await;
    config.api = Some(api.server());
    node.start_with(config);
}

fn spec(policy: &str) -> Value {
    json!({"nodeName": "n1", "restartPolicy": policy, "terminationGracePeriodSeconds": 3,
        "containers": [{"name": "c", "image": "img:1", "imagePullPolicy": "IfNotPresent"}]})
}

fn phase(api: &FakeApi, name: &str) -> String {
    api.pod(name).map(|pod| pod["status"]["phase"].as_str().unwrap_or_default().to_owned()).unwrap_or_default()
}

async fn runs(api: &FakeApi, name: &str) -> Value {
    eventually(&format!("{name} runs"), || phase(api, name) == "Running").await;
    api.pod(name).unwrap()
}

#[tokio::test]
async fn a_pod_runs_its_status_is_told_and_its_deletion_is_finished() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    start(&mut node, &api).await;
    api.create_pod("a", &spec("Always"));
    api.create_pod("elsewhere", &json!({"nodeName": "n2", "containers": [{"name": "c", "image": "img:1"}]}));
    let pod = runs(&api, "a").await;
    assert_eq!(pod["status"]["hostIP"], "192.0.2.1");
    assert_eq!(pod["metadata"]["annotations"], Value::Null, "the local annotations stay here");
    assert_eq!(api.pod("elsewhere").unwrap()["status"], Value::Null);
    api.delete_pod("a", 2);
    eventually("it has gone", || api.pod("a").is_none()).await;
    node.wait_gone("a").await;
    let stops: Vec<_> = node.cri.calls("StopContainer").into_iter().map(|(_, call)| call).collect();
    assert_eq!(stops, ["StopContainer c/0 2"], "the grace that was asked for");
    let calls = api.lock().calls.clone();
    assert_eq!(calls.iter().filter(|call| *call == "DELETE d/a/").count(), 1, "{calls:?}");
    node.stop().await;
}

#[tokio::test]
async fn the_last_status_is_told_before_the_object_goes_and_a_finalizer_keeps_it() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    start(&mut node, &api).await;
    api.create_pod("a", &spec("Always"));
    runs(&api, "a").await;
    api.change_pod("a", |pod| pod["metadata"]["finalizers"] = json!(["x"]));
    api.delete_pod("a", 1);
    eventually("its deletion is asked for", || api.lock().calls.contains(&"DELETE d/a/".to_owned())).await;
    let pod = api.pod("a").unwrap();
    assert!(["Succeeded", "Failed"].contains(&pod["status"]["phase"].as_str().unwrap()), "{pod:#}");
    assert!(pod["status"]["containerStatuses"][0]["state"]["terminated"].is_object());
    // Whatever happens to the object, it is asked once.
    api.change_pod("a", |pod| pod["metadata"]["labels"] = json!({"l": "x"}));
    api.change_pod("a", |pod| pod["metadata"]["finalizers"] = json!([]));
    api.delete_pod("a", 0);
    node.wait_gone("a").await;
    assert_eq!(api.lock().calls.iter().filter(|call| *call == "DELETE d/a/").count(), 1);
    node.stop().await;
}

#[tokio::test]
async fn a_pod_deleted_by_force_is_ended_with_its_grace() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    start(&mut node, &api).await;
    api.create_pod("a", &spec("Always"));
    runs(&api, "a").await;
    api.delete_pod("a", 0);
    node.wait_gone("a").await;
    let stops: Vec<_> = node.cri.calls("StopContainer").into_iter().map(|(_, call)| call).collect();
    assert_eq!(stops, ["StopContainer c/0 3"]);
    node.stop().await;
}

#[tokio::test]
async fn a_server_that_is_away_ends_no_pod_and_a_new_agent_waits_for_its_word() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    start(&mut node, &api).await;
    api.create_pod("a", &spec("Always"));
    runs(&api, "a").await;
    api.set_down(true);
    node.stop().await;
    start(&mut node, &api).await;
    node.apply("s.yaml", &pod("s", ""));
    node.wait_pod("s-n1", "the manifest's pod runs", |pod| pod["status"]["phase"] == "Running").await;
    assert_eq!(node.cri.calls("StopContainer").len(), 0, "nobody has said that it is not wanted");
    api.set_down(false);
    node.wait_pod("a", "it is known again", |pod| pod["status"]["phase"] == "Running").await;
    assert_eq!(node.cri.calls("RunPodSandbox").len(), 2, "it went on");
    api.delete_pod("a", 1);
    eventually("it has gone", || api.pod("a").is_none()).await;
    node.stop().await;
}

#[tokio::test]
async fn what_is_over_at_the_server_does_not_run_again() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    api.create_pod("a", &spec("Never"));
    let ended = json!({"phase": "Succeeded", "startTime": "2026-01-01T00:00:00Z", "containerStatuses": [
        {"name": "c", "image": "img:1", "imageID": "x", "ready": false, "restartCount": 0, "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}]});
    api.change_pod("a", |pod| pod["status"] = ended.clone());
    start(&mut node, &api).await;
    api.create_pod("b", &spec("Always"));
    runs(&api, "b").await;
    node.wait_pod("a", "it is known", |pod| pod["status"]["phase"] == "Succeeded").await;
    assert_eq!(node.cri.calls("RunPodSandbox").len(), 1);
    let told = api.pod("a").unwrap();
    assert_eq!((&told["status"]["phase"], &told["status"]["containerStatuses"]), (&ended["phase"], &ended["containerStatuses"]));
    node.stop().await;
}

#[tokio::test]
async fn a_pod_that_is_not_let_in_has_failed_and_can_be_deleted() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    start(&mut node, &api).await;
    let mut asks = spec("Always");
    asks["nodeSelector"] = json!({"no": "where"});
    api.create_pod("a", &asks);
    eventually("it is rejected", || phase(&api, "a") == "Failed").await;
    let status = api.pod("a").unwrap()["status"].take();
    assert_eq!((&status["reason"], &status["containerStatuses"]), (&json!("NodeAffinity"), &Value::Null));
    api.delete_pod("a", 1);
    eventually("it has gone", || api.pod("a").is_none()).await;
    assert_eq!(node.cri.calls("RunPodSandbox").len(), 0);
    node.stop().await;
}

#[tokio::test]
async fn an_added_container_starts_once_in_the_running_pod() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    start(&mut node, &api).await;
    api.create_pod("a", &spec("Always"));
    runs(&api, "a").await;
    let eye = json!([{"name": "eye", "image": "img:1", "imagePullPolicy": "IfNotPresent", "targetContainerName": "c"}]);
    api.change_pod("a", |pod| pod["spec"]["ephemeralContainers"] = eye);
    let running = |state: &str| {
        let pod = api.pod("a").unwrap();
        pod["status"]["ephemeralContainerStatuses"][0]["state"][state].is_object()
    };
    eventually("it runs", || running("running")).await;
    node.cri.exit("eye", 3);
    eventually("it has ended", || running("terminated")).await;
    let pod = node.pod("a").await.unwrap();
    assert_eq!(pod["status"]["phase"], "Running");
    assert_eq!(pod["status"]["containerStatuses"][0]["restartCount"], 0);
    assert_eq!(node.cri.calls("CreateContainer eye").len(), 1);
    node.stop().await;
}

#[tokio::test]
async fn while_a_resize_waits_all_else_of_the_pod_goes_on() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    start(&mut node, &api).await;
    let mut gated = spec("Always");
    gated["readinessGates"] = json!([{"conditionType": "gate"}]);
    gated["containers"][0]["resources"] = json!({"requests": {"cpu": "10m"}});
    api.create_pod("a", &gated);
    runs(&api, "a").await;
    let condition = |type_: &str| {
        let conditions = api.pod("a").unwrap()["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.into_iter().find(|condition| condition["type"] == type_).unwrap_or_default()
    };
    api.change_pod("a", |pod| pod["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "9000"}}));
    eventually("the resize is refused", || condition("PodResizePending")["reason"] == "Infeasible").await;
    assert_eq!(condition("Ready")["status"], "False");
    let eye = json!([{"name": "eye", "image": "img:1", "imagePullPolicy": "IfNotPresent", "targetContainerName": "c"}]);
    api.change_pod("a", |pod| {
        pod["spec"]["ephemeralContainers"] = eye;
        let gate = json!({"type": "gate", "status": "True"});
        pod["status"]["conditions"].as_array_mut().unwrap().push(gate);
    });
    eventually("the gate counts", || condition("Ready")["status"] == "True").await;
    node.cri.wait("the added container runs", |s| s.running().len() == 2).await;
    assert_eq!(condition("PodResizePending")["reason"], "Infeasible");
    let allocated = api.pod("a").unwrap()["status"]["containerStatuses"][0]["allocatedResources"].take();
    assert_eq!(allocated, json!({"cpu": "10m"}));
    assert!(node.cri.calls("UpdateContainerResources").is_empty() && node.cri.calls("StopContainer").is_empty());
    let told = node.events().into_iter().filter(|event| event.starts_with("ResizeInfeasible")).count();
    assert_eq!(told, 1, "{:#?}", node.events());
    api.change_pod("a", |pod| pod["status"]["phase"] = json!("Failed"));
    node.cri.wait("others have declared it over", |s| s.running().is_empty()).await;
    node.stop().await;
}

#[tokio::test]
async fn nobody_is_ended_for_a_pod_that_is_rejected_for_its_port() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    let mut config = node.config().await;
    config.api = Some(api.server());
    config.max_pods = 2;
    node.start_with(config);
    let mut with_port = spec("Always");
    with_port["containers"][0]["ports"] = json!([{"containerPort": 80, "hostPort": 80}]);
    api.create_pod("a", &with_port);
    api.create_pod("b", &spec("Always"));
    runs(&api, "a").await;
    runs(&api, "b").await;
    with_port["priority"] = json!(2_000_000_000);
    api.create_pod("critical", &with_port);
    eventually("it is rejected", || phase(&api, "critical") == "Failed").await;
    assert_eq!(api.pod("critical").unwrap()["status"]["reason"], "NodePorts");
    api.create_pod("c", &spec("Always"));
    eventually("there is no room for others", || phase(&api, "c") == "Failed").await;
    let events = node.events();
    let told = |reason: &str| events.iter().filter(|event| event.starts_with(reason)).count();
    assert_eq!((told("Preempting"), told("NodePorts"), told("OutOfpods")), (0, 1, 1), "{events:#?}");
    assert!(node.cri.calls("StopContainer").is_empty());
    node.stop().await;
}

#[tokio::test]
async fn what_is_wrong_with_the_manifests_stays_told_when_the_api_speaks() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    node.apply("broken.yaml", "{apiVersion: v1, kind: Pod, metadata: {name: x}, spec: {containers: 7}}");
    start(&mut node, &api).await;
    node.apply("s.yaml", &pod("s", ""));
    node.wait_pod("s-n1", "the manifests have been read", |_| true).await;
    let told = async || node.get("/problems").await.1.contains("broken.yaml");
    assert!(told().await);
    api.create_pod("a", &spec("Always"));
    runs(&api, "a").await;
    assert!(told().await);
    node.stop().await;
}

#[tokio::test]
async fn a_pod_that_waits_for_the_end_of_another_one_of_its_name_says_so() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    start(&mut node, &api).await;
    api.create_pod("a", &spec("Always"));
    let first = runs(&api, "a").await;
    node.cri.hold("StopContainer");
    api.delete_pod("a", 0);
    api.create_pod("a", &spec("Always"));
    eventually("it says what it waits for", || api.pod("a").unwrap()["status"]["reason"] == "NameTaken").await;
    let status = api.pod("a").unwrap()["status"].take();
    assert!(status["message"].as_str().unwrap().contains(first["metadata"]["uid"].as_str().unwrap()), "{status}");
    assert_eq!(status["phase"], "Pending");
    node.cri.release("StopContainer");
    let second = runs(&api, "a").await;
    assert_eq!(second["status"]["reason"], Value::Null);
    node.stop().await;
}

#[tokio::test]
async fn a_static_pod_has_a_mirror_with_its_status_that_comes_again_and_goes_with_it() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    node.apply("s.yaml", &pod("s", "").replace("metadata: {name: s}", "metadata: {name: s, namespace: d}"));
    start(&mut node, &api).await;
    let first = runs(&api, "s-n1").await;
    assert_eq!(first["metadata"]["ownerReferences"][0]["name"], "n1");
    assert_eq!(
        first["metadata"]["annotations"]["kubernetes.io/config.mirror"],
        first["metadata"]["annotations"]["kubernetes.io/config.hash"]
    );
    api.delete_pod("s-n1", 30);
    eventually("it is there again", || {
        api.pod("s-n1")
            .is_some_and(|again| again["metadata"]["uid"] != first["metadata"]["uid"] && again["status"]["phase"] == "Running")
    })
    .await;
    assert_eq!(node.cri.calls("StopContainer").len(), 0);
    node.delete("s.yaml");
    eventually("it goes with its pod", || api.pod("s-n1").is_none()).await;
    node.stop().await;
}

/// Whether the node's condition Ready has this status, and what it says.
fn readiness(api: &FakeApi) -> (bool, String) {
    let node = api.node("n1").unwrap_or_default();
    let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let ready = conditions.into_iter().find(|condition| condition["type"] == "Ready").unwrap_or_default();
    (ready["status"] == "True", ready["message"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn a_label_that_no_watch_has_told_of_yet_is_seen_before_a_pod_is_refused_for_it() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    start(&mut node, &api).await;
    eventually("the node is Ready", || readiness(&api).0).await;
    api.label_node_silently("n1", "disk");
    let mut asks = spec("Always");
    asks["nodeSelector"] = json!({"disk": ""});
    api.create_pod("a", &asks);
    runs(&api, "a").await;
    asks["nodeSelector"] = json!({"disk": "no"});
    api.create_pod("b", &asks);
    eventually("it is rejected", || phase(&api, "b") == "Failed").await;
    let reads = || api.lock().calls.iter().filter(|call| *call == "GET /n1/").count();
    let before = reads();
    api.create_pod("c", &asks);
    eventually("it is rejected", || phase(&api, "c") == "Failed").await;
    assert_eq!(reads(), before + 1, "one look for each pod");
    node.stop().await;
}

#[tokio::test]
async fn no_pod_is_worked_on_while_the_runtime_is_not_ready() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    node.cri.lock().ill = true;
    start(&mut node, &api).await;
    let why = "container runtime not ready: RuntimeReady=false reason:Why message:because";
    let says_why = || matches!(readiness(&api), (false, message) if message.contains(why));
    eventually("the node says why it is not Ready", says_why).await;
    api.create_pod("a", &spec("Always"));
    eventually("it is known", || phase(&api, "a") == "Pending").await;
    node.apply("s.yaml", &pod("s", ""));
    node.wait_pod("s-n1", "the manifest's pod is known too", |_| true).await;
    let well_at = tokio::time::Instant::now();
    node.cri.lock().ill = false;
    runs(&api, "a").await;
    node.wait_pod("s-n1", "the manifest's pod runs", |pod| pod["status"]["phase"] == "Running").await;
    let begun = node.cri.calls("RunPodSandbox").into_iter().map(|(at, _)| at).min().unwrap();
    assert!(begun >= well_at);
    eventually("the node is Ready", || readiness(&api).0).await;
    node.stop().await;
}

#[tokio::test]
async fn a_pod_waits_for_the_room_of_one_that_ends_and_is_not_lost() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    let mut config = node.config().await;
    config.api = Some(api.server());
    config.max_pods = 1;
    node.start_with(config);
    api.create_pod("a", &spec("Always"));
    runs(&api, "a").await;
    api.create_pod("refused", &spec("Always"));
    eventually("there is no room beside a pod that stays", || phase(&api, "refused") == "Failed").await;
    api.delete_pod("refused", 0);
    node.cri.hold("StopContainer");
    // The scheduler knows nothing of it any more, and sends the next one at once.
    api.delete_pod("a", 0);
    api.create_pod("b", &spec("Always"));
    let reason = |pod: &Value| pod["status"]["reason"].as_str().unwrap_or_default().to_owned();
    eventually("it says what it waits for", || api.pod("b").is_some_and(|pod| reason(&pod) == "OutOfpods")).await;
    assert_eq!(phase(&api, "b"), "Pending");
    node.cri.release("StopContainer");
    let pod = runs(&api, "b").await;
    assert_eq!(reason(&pod), "");
    node.stop().await;
}

#[test]
fn a_pod_whose_first_tokens_are_refused_runs_in_its_first_pass() {
    // The volume with the token is a tmpfs.
    in_namespaces(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut node, api) = (Node::new(), FakeApi::default());
            start(&mut node, &api).await;
            api.lock().refused_tokens = 2;
            let token = json!({"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}});
            let mut with_token = spec("Always");
            with_token["volumes"] = json!([{"name": "t", "projected": {"sources": [token]}}]);
            with_token["containers"][0]["volumeMounts"] = json!([{"name": "t", "mountPath": "/t"}]);
            let made = api.create_pod("a", &with_token);
            runs(&api, "a").await;
            let volume =
                format!("kubelet/pods/{}/volumes/kubernetes.io~projected/t/token", made["metadata"]["uid"].as_str().unwrap());
            assert_eq!(std::fs::read_to_string(node.path(&volume)).unwrap(), "a-token");
            let asked = api.lock().calls.iter().filter(|call| *call == "POST d/default/token").count();
            assert_eq!(asked, 3, "two were refused");
            assert!(!node.events().iter().any(|event| event.contains("FailedMount")), "{:?}", node.events());
            api.delete_pod("a", 1);
            node.wait_gone("a").await;
            node.stop().await;
        });
    });
}
