//! ConfigMaps and Secrets beside the manifests: env, volumes, live changes, and pods that wait for what is missing.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::path::PathBuf;

use support::{Node, eventually};
use tonic::Status;

fn phase(pod: &serde_json::Value) -> &str {
    pod["status"]["phase"].as_str().unwrap_or_default()
}

fn settings(value: &str) -> String {
    format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: settings}}\ndata:\n  level: {value}\n  other: x\n")
}

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  terminationGracePeriodSeconds: 1
  volumes: [{name: conf, configMap: {name: settings, items: [{key: level, path: conf/level}]}}]
  containers:
  - name: c
    image: 'img:1'
    envFrom: [{configMapRef: {name: settings}, prefix: S_}]
    env: [{name: LEVEL, valueFrom: {configMapKeyRef: {name: settings, key: level}}}]
    volumeMounts: [{name: conf, mountPath: /conf}]
";

/// The file of the pod's volume on the host.
fn level(node: &Node, pod: &serde_json::Value) -> PathBuf {
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    node.path("kubelet/pods").join(uid).join("volumes/kubernetes.io~configmap/conf/conf/level")
}

#[tokio::test]
async fn a_config_map_beside_the_manifest_serves_env_and_a_volume_that_follows_it() {
    let mut node = Node::new();
    node.apply("all.yaml", &format!("{}---{POD}", settings("one")));
    node.start().await;
    let pod = node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    {
        let state = node.cri.lock();
        let config = state.configs.values().next().unwrap();
        let env: Vec<_> = config.envs.iter().map(|e| format!("{}={}", e.key, String::from_utf8_lossy(&e.value))).collect();
        assert_eq!(env, ["S_level=one", "S_other=x", "LEVEL=one"]);
        assert_eq!(config.mounts[0].container_path, "/conf");
        assert!(config.mounts[0].readonly, "the kubelet follows the links in there: no container may make any");
    }
    let file = level(&node, &pod);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "one");
    node.apply("all.yaml", &format!("{}---{POD}", settings("two")));
    eventually("the new value", || std::fs::read_to_string(&file).is_ok_and(|text| text == "two")).await;
    let after = node.pod("web-n1").await.unwrap();
    assert_eq!(after["metadata"]["uid"], pod["metadata"]["uid"], "an edit of the ConfigMap is no edit of the pod");
    assert_eq!(node.cri.calls("StopContainer").len(), 0);
}

#[tokio::test]
async fn an_edit_while_the_pod_is_being_started_reaches_its_volume() {
    let mut node = Node::new();
    node.cri.hold("CreateContainer");
    node.apply("all.yaml", &format!("{}---{POD}", settings("one")));
    node.start().await;
    node.cri.wait("the start", |s| s.calls.iter().any(|(_, c)| c.starts_with("CreateContainer"))).await;
    let pod = node.pod("web-n1").await.unwrap();
    let file = level(&node, &pod);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "one");
    // The broken file comes after the edit: when it is told of, the edit has been taken in.
    node.apply("all.yaml", &format!("{}---{POD}", settings("two")));
    node.apply("bad.yaml", "{{{");
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !node.get("/problems").await.1.contains("bad.yaml") {
        assert!(std::time::Instant::now() < limit, "the broken file is not told of");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    node.cri.release("CreateContainer");
    eventually("the new value", || std::fs::read_to_string(&file).is_ok_and(|text| text == "two")).await;
}

#[tokio::test]
async fn a_pod_waits_for_its_config_map_and_starts_when_it_comes() {
    let mut node = Node::new();
    node.apply("web.yaml", POD);
    node.start().await;
    node.wait_pod("web-n1", "Pending", |p| phase(p) == "Pending").await;
    eventually("the volume was tried", || {
        std::fs::read_dir(node.path("kubelet/pods")).is_ok_and(|mut pods| pods.next().is_some())
    })
    .await;
    assert!(node.cri.calls("RunPodSandbox").is_empty());
    node.apply("settings.yaml", &settings("late"));
    let pod = node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    assert_eq!(std::fs::read_to_string(level(&node, &pod)).unwrap(), "late");
}

#[tokio::test]
async fn a_missing_key_is_the_reason_of_the_waiting_container_and_an_edit_starts_it() {
    let mut node = Node::new();
    let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec:\n  containers:\n  - name: c\n    image: 'img:1'\n    \
        env: [{name: A, valueFrom: {configMapKeyRef: {name: settings, key: absent}}}]\n";
    node.apply("web.yaml", text);
    node.apply("settings.yaml", &settings("x"));
    node.start().await;
    let waiting = |p: &serde_json::Value| p["status"]["containerStatuses"][0]["state"]["waiting"].clone();
    let pod = node.wait_pod("web-n1", "waiting", |p| waiting(p)["reason"] == "CreateContainerConfigError").await;
    assert_eq!(waiting(&pod)["message"], "couldn't find key absent in ConfigMap default/settings");
    node.apply("settings.yaml", &format!("{}  absent: here\n", settings("x")));
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
}

#[tokio::test]
async fn objects_outlive_a_restart_with_a_broken_file_and_two_of_a_name_are_told_of() {
    let mut node = Node::new();
    node.apply("a.yaml", &settings("kept"));
    node.apply("web.yaml", POD);
    node.start().await;
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.stop().await;
    node.apply("a.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: [");
    node.apply("b.yaml", &settings("other"));
    node.start().await;
    let pod = node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    assert_eq!(std::fs::read_to_string(level(&node, &pod)).unwrap(), "kept");
    let (_, problems) = node.get("/problems").await;
    assert!(problems.contains("ConfigMap default/settings is already defined by"), "{problems}");
}

#[tokio::test]
async fn a_pull_tries_the_secrets_that_fit_and_an_image_volume_is_pulled_first() {
    let mut node = Node::new();
    node.cri.lock().pullable = vec!["reg.example/app:1".into(), "reg.example/data:1".into()];
    node.cri.fail("PullImage user:wrong", [tonic::Status::unauthenticated("no")]);
    let secret = |name: &str, auth: &str| {
        format!(
            "apiVersion: v1\nkind: Secret\nmetadata: {{name: {name}}}\ntype: kubernetes.io/dockerconfigjson\nstringData:\n  \
            .dockerconfigjson: '{{\"auths\": {{\"reg.example\": {{\"username\": \"user\", \"password\": \"{auth}\"}}}}}}'\n---\n"
        )
    };
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec:\n  imagePullSecrets: [{name: a}, {name: b}]\n  \
        volumes: [{name: data, image: {reference: 'reg.example/data:1'}}]\n  \
        containers: [{name: c, image: 'reg.example/app:1', volumeMounts: [{name: data, mountPath: /data, subPath: sub}]}]\n";
    node.apply("web.yaml", &format!("{}{}{pod}", secret("a", "wrong"), secret("b", "right")));
    node.start().await;
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    let pulls: Vec<_> = node.cri.calls("PullImage").into_iter().map(|(_, call)| call).collect();
    let wanted = [
        "PullImage reg.example/app:1 user:wrong",
        "PullImage reg.example/app:1 user:right",
        "PullImage reg.example/data:1 user:wrong",
    ];
    assert_eq!(pulls, wanted);
    let state = node.cri.lock();
    let mount = &state.configs.values().next().unwrap().mounts[0];
    let image = mount.image.as_ref().unwrap().image.as_str();
    assert_eq!((image, mount.image_sub_path.as_str(), mount.host_path.as_str()), ("reg.example/data:1", "sub", ""));
}

#[tokio::test]
async fn a_runtime_class_names_the_handler_and_a_missing_one_is_waited_for() {
    let mut node = Node::new();
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec:\n  runtimeClassName: other\n  containers: [{name: c, image: 'img:1'}]\n";
    node.apply("web.yaml", pod);
    node.start().await;
    node.wait_pod("web-n1", "Pending", |p| phase(p) == "Pending").await;
    assert!(node.cri.calls("RunPodSandbox").is_empty());
    node.apply("class.yaml", "apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {name: other}\nhandler: runc\n");
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    assert_eq!(node.cri.calls("RunPodSandbox")[0].1, "RunPodSandbox web-n1/0 runc");
}

#[tokio::test]
async fn a_claim_beside_the_manifest_gives_its_volume_and_one_without_is_waited_for() {
    let mut node = Node::new();
    let disk = node.path("disk");
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec:\n  volumes: [{name: v, persistentVolumeClaim: {claimName: data}}]\n  \
        containers: [{name: c, image: 'img:1', volumeMounts: [{name: v, mountPath: /data}]}]\n---\n\
        apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: data}\nspec: {accessModes: [ReadWriteOnce], \
        resources: {requests: {storage: 1Gi}}}\n";
    node.apply("web.yaml", pod);
    node.start().await;
    node.wait_pod("web-n1", "Pending", |p| phase(p) == "Pending").await;
    assert!(node.cri.calls("RunPodSandbox").is_empty());
    let volume = format!(
        "apiVersion: v1\nkind: PersistentVolume\nmetadata: {{name: disk}}\nspec:\n  capacity: {{storage: 2Gi}}\n  \
         accessModes: [ReadWriteOnce]\n  hostPath: {{path: {}, type: DirectoryOrCreate}}\n",
        disk.display()
    );
    node.apply("disk.yaml", &volume);
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    let mount = node.cri.lock().configs.values().next().unwrap().mounts[0].clone();
    assert_eq!((mount.host_path.as_str(), mount.container_path.as_str()), (disk.to_str().unwrap(), "/data"));
    assert!(disk.is_dir() && node.path("kubelet/volume-bindings.json").exists());
}

#[tokio::test]
async fn a_container_takes_its_environment_from_a_file_that_another_wrote() {
    let mut node = Node::new();
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec:\n  volumes: [{name: v}]\n  containers:\n  \
        - {name: c, image: 'img:1', volumeMounts: [{name: v, mountPath: /v}]}\n  \
        - name: reader\n    image: 'img:1'\n    env: [{name: A, valueFrom: {fileKeyRef: {volumeName: v, path: env, key: A}}}]\n";
    node.apply("web.yaml", pod);
    node.start().await;
    let reader = |p: &serde_json::Value| {
        p["status"]["containerStatuses"].as_array().and_then(|all| all.iter().find(|c| c["name"] == "reader")).cloned()
    };
    let pod = node
        .wait_pod("web-n1", "waiting", |p| {
            reader(p).is_some_and(|c| c["state"]["waiting"]["reason"] == "CreateContainerConfigError")
        })
        .await;
    let message = reader(&pod).unwrap()["state"]["waiting"]["message"].as_str().unwrap().to_owned();
    assert!(message.starts_with("couldn't parse env file: \"env\": No such file"), "{message}");
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    let volume = node.path("kubelet/pods").join(uid).join("volumes/kubernetes.io~empty-dir/v");
    std::fs::write(volume.join("env"), "A='from the file'\n").unwrap();
    // Any edit of an object has everything that failed tried again.
    node.apply("settings.yaml", &settings("x"));
    node.wait_pod("web-n1", "Running", |p| reader(p).is_some_and(|c| c["state"]["running"].is_object())).await;
    let state = node.cri.lock();
    let config = state.configs.values().find(|c| c.metadata.as_ref().unwrap().name == "reader").unwrap();
    assert_eq!(config.envs[0].value, b"from the file");
}

#[tokio::test]
async fn a_running_pod_whose_volume_is_lost_is_still_looked_after() {
    let mut node = Node::new();
    std::fs::create_dir(node.path("data")).unwrap();
    let path = node.path("data");
    let volume = format!(
        "apiVersion: v1\nkind: PersistentVolume\nmetadata: {{name: pv}}\nspec:\n  capacity: {{storage: 1Gi}}\n  \
         accessModes: [ReadWriteOnce]\n  hostPath: {{path: {}, type: Directory}}\n",
        path.display()
    );
    let claim = "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: data}\n\
        spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}\n";
    let web = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec:\n  terminationGracePeriodSeconds: 1\n  \
        volumes: [{name: v, persistentVolumeClaim: {claimName: data}}]\n  containers:\n  - name: c\n    image: 'img:1'\n    \
        volumeMounts: [{name: v, mountPath: /v}]\n    livenessProbe: {exec: {command: [alive]}, periodSeconds: 1, failureThreshold: 1}\n";
    node.apply("volume.yaml", &volume);
    node.apply("claim.yaml", claim);
    node.apply("web.yaml", web);
    node.start().await;
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    // A folder of the host that has gone is not looked for again: what mounts it has it.
    std::fs::remove_dir(&path).unwrap();
    node.stop().await;
    node.start().await;
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.cri.exit("c", 1);
    node.cri.wait("it is started again", |s| s.calls.iter().any(|(_, c)| c == "StartContainer c/1")).await;
    // Without the volume's document nobody knows where it is: the container is stopped where it has to be, and not started.
    node.delete("volume.yaml");
    eventually("the lost volume is told of", || node.events().iter().any(|e| e.contains("PVC is lost"))).await;
    node.cri.fail("ExecSync", vec![Status::aborted("exit code 1"); 100]);
    node.cri.wait("it is stopped", |s| s.calls.iter().any(|(_, c)| c.starts_with("StopContainer c/1"))).await;
    assert_eq!(node.cri.calls("StartContainer").len(), 2);
    node.apply("volume.yaml", &volume);
    node.cri.wait("it is started again", |s| s.calls.iter().any(|(_, c)| c == "StartContainer c/2")).await;
}
