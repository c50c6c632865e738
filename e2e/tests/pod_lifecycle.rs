//! A static pod from its manifest to its removal, seen as a user sees it.
#![allow(clippy::unwrap_used)]

use berth_e2e::node::{Berth, Half, container_ids, is_running, restarts};
use berth_e2e::{SOON, fetch, memory, output};
use berth_testkit::sandbox::NODE_IP;
use berth_testkit::{Sandbox, wait_for, wait_until};

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");

/// The sample of the manifests folder, with another greeting.
fn web_pod(greeting: &str) -> String {
    include_str!("../../manifests/web.yaml").replace("hello from berth", greeting)
}

/// The memory limit of the cgroup that a process is in, and that cgroup.
fn memory_limit(pid: u32) -> (String, String) {
    let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let of = |field: &str| cgroups.lines().find_map(|l| l.split_once(field).map(|(_, path)| path.to_owned()));
    let (path, file) = match of(":memory:") {
        Some(path) => (path.clone(), format!("/sys/fs/cgroup/memory{path}/memory.limit_in_bytes")),
        None => of("0::").map(|path| (path.clone(), format!("/sys/fs/cgroup{path}/memory.max"))).unwrap(),
    };
    (std::fs::read_to_string(file).unwrap().trim().to_owned(), path)
}

fn page(address: &str, port: u16, path: &str) -> String {
    let mut last = String::new();
    let got = wait_for(SOON, || fetch::page(address, port, path).map_err(|e| last = e).ok());
    got.unwrap_or_else(|| panic!("{last}"))
}

#[test]
fn a_manifest_becomes_a_pod_and_its_edits_restarts_and_removal_follow() {
    Sandbox::new().shared_root().test(|| {
        let node = Berth::start(Half::Node, WEB);
        node.write_manifest("web.yaml", &web_pod("first"));
        let pod = node.wait_running("web");
        let ip = pod["status"]["podIP"].as_str().unwrap().to_owned();

        assert!(page(&ip, 8080, "/").starts_with("first"));
        assert!(page(NODE_IP, 18080, "/by-host-port").starts_with("first"));
        assert!(page("127.0.0.1", 18080, "/by-loopback").starts_with("first"));
        assert!(wait_until(SOON, || node.logs("web-e2e").iter().any(|line| line.ends_with("/by-host-port"))));
        assert_eq!(node.run(&["exec", "web-e2e", "--", "id", "-u"]).trim(), "33");
        let web = memory::processes(|_, name, _| name == "demo-web");
        let (limit, cgroup) = memory_limit(web[0].pid);
        assert_eq!(limit, (32 << 20).to_string());
        assert!(cgroup.contains("/kubepods/burstable/pod"), "{cgroup}");

        // A crash: the container is started again, the pod and its address stay.
        let first = container_ids(&pod);
        assert!(page(&ip, 8080, "/crash").contains("crashing"));
        let pod = node.wait_pod("web", "restarted", |pod| is_running(pod) && restarts(pod) == 1);
        assert_eq!(pod["status"]["podIP"], ip.as_str());
        assert_ne!(container_ids(&pod), first);
        let ended = &pod["status"]["containerStatuses"][0]["lastState"]["terminated"];
        assert_eq!(ended["exitCode"], 42, "{ended}");
        assert!(page(&ip, 8080, "/").starts_with("first"));

        // An edit is another pod: another UID and another sandbox.
        let uid = pod["metadata"]["uid"].clone();
        node.write_manifest("web.yaml", &web_pod("second"));
        let pod = node.wait_pod("web", "replaced", |pod| is_running(pod) && pod["metadata"]["uid"] != uid);
        let ip = pod["status"]["podIP"].as_str().unwrap().to_owned();
        assert!(page(&ip, 8080, "/").starts_with("second"));
        assert!(page(NODE_IP, 18080, "/").starts_with("second"));

        // A broken file leaves the running pod alone and is named.
        let uid = pod["metadata"]["uid"].clone();
        node.write_manifest("broken.yaml", "apiVersion: v1\nkind: Pod\nspec: [");
        assert!(wait_until(SOON, || node.agent_log().contains("broken.yaml")));
        assert_eq!(node.wait_running("web")["metadata"]["uid"], uid);
        node.remove_manifest("broken.yaml");

        node.remove_manifest("web.yaml");
        assert!(wait_until(SOON, || node.pods().is_empty()), "{:?}", node.pods());
        assert!(wait_until(SOON, || fetch::page(NODE_IP, 18080, "/").is_err()));
        node.finish();
    });
}

#[test]
fn init_containers_volumes_and_a_finished_pod_end_as_they_say() {
    Sandbox::new().test(|| {
        let node = Berth::start(Half::Node, WEB);
        node.write_manifest(
            "job.yaml",
            "apiVersion: v1\nkind: Pod\nmetadata: {name: job}\nspec:\n  restartPolicy: Never\n  initContainers:\n  - name: first\n    \
             image: berth.test/busybox:1\n    command: [sh, -c, 'echo from-init > /shared/note']\n    volumeMounts: [{name: work, mountPath: /shared}]\n  \
             containers:\n  - name: main\n    image: berth.test/busybox:1\n    command: [sh, -c, 'cat /shared/note; exit 3']\n    \
             volumeMounts: [{name: work, mountPath: /shared, readOnly: true}]\n  volumes: [{name: work, emptyDir: {medium: Memory}}]\n",
        );
        let pod = node.wait_pod("job", "Failed", |pod| pod["status"]["phase"] == "Failed");
        assert_eq!(pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"], 3, "{pod}");
        assert!(wait_until(SOON, || node.logs("job-e2e -c main") == ["from-init"]), "{:?}", node.logs("job-e2e -c main"));
        node.remove_manifest("job.yaml");
        assert!(wait_until(SOON, || node.pods().is_empty()));
        node.finish();
    });
}

#[test]
fn two_nodes_on_one_machine_do_not_touch_each_other() {
    Sandbox::new().test(|| {
        let one = Berth::start(Half::Node, WEB);
        let mut other = Berth::prepare(Half::Node);
        let archive = one.dir.path().join("images.tar");
        other.run(&["image", "import", &archive.to_string_lossy()]);
        other.flags = vec!["--pod-cidr".into(), "10.99.0.0/24".into()];
        other.launch();
        one.write_manifest("web.yaml", &web_pod("one"));
        other.write_manifest("web.yaml", &web_pod("other").replace("          hostPort: 18080\n", ""));
        let ip = |node: &Berth| node.wait_running("web")["status"]["podIP"].as_str().unwrap().to_owned();
        let (one_ip, _) = (ip(&one), ip(&other));
        other.finish();
        assert!(page(&one_ip, 8080, "/").starts_with("one"));
        assert!(page(NODE_IP, 18080, "/").starts_with("one"));
        one.finish();
        assert!(output(std::process::Command::new("ip").args(["-brief", "link"])).lines().count() <= 3);
    });
}
