//! The end of the machine, told by SIGTERM: every container has its preStop hook, its SIGTERM and its grace, critical pods last; the
//! next start has each pod once.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use berth_e2e::node::{Berth, Half, container_ids, is_running};
use berth_e2e::{SOON, image, memory};
use berth_testkit::{Sandbox, wait_until};

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");

/// Where there is no logind: the sandbox has none.
const CONFIG: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nshutdownGracePeriodByPodPriority:\n\
    - {priority: 0, shutdownGracePeriodSeconds: 20}\n- {priority: 2000000000, shutdownGracePeriodSeconds: 20}\n";
/// Whole seconds of grace of the pod that does not end by itself.
const GRACE: usize = 10;
const PODS: [&str; 4] = ["one", "other", "deaf", "critical"];

/// A pod whose containers write what happens to them into one file. The one called `deaf` goes on after SIGTERM.
fn pod(name: &str, notes: &Path) -> String {
    let class = if name == "critical" { "system-node-critical" } else { "''" };
    let ending = if name == "deaf" { "" } else { "exit 0" };
    let container = |c: &str| {
        format!(
            "  - name: {c}\n    image: {}\n    command: [sh, -c, 'trap \"echo {name}/{c} term >> /notes/all; {ending}\" TERM; \
             echo {name}/{c} start >> /notes/all; while :; do usleep 100000; done']\n    \
             lifecycle: {{preStop: {{exec: {{command: [sh, -c, 'usleep 500000; echo {name}/{c} hook >> /notes/all']}}}}}}\n    \
             volumeMounts: [{{name: notes, mountPath: /notes}}]\n",
            image::BUSYBOX_IMAGE
        )
    };
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  priorityClassName: {class}\n  \
         terminationGracePeriodSeconds: {}\n  volumes: [{{name: notes, hostPath: {{path: {}}}}}]\n  containers:\n{}{}",
        if name == "deaf" { GRACE } else { 15 },
        notes.display(),
        container("a"),
        container("b")
    )
}

/// The processes of the pods' containers.
fn containers_processes() -> usize {
    memory::processes(|_, _, command| command.contains("/notes/all")).len()
}

fn all_run(node: &Berth) -> bool {
    let pods = node.pods();
    let mut names: Vec<_> = pods.iter().filter(|pod| is_running(pod)).map(|pod| pod["metadata"]["name"].clone()).collect();
    names.sort_by_key(ToString::to_string);
    names.dedup();
    pods.len() == PODS.len() && names.len() == PODS.len()
}

/// The machine goes down and comes up again; `runtime` is the node itself, or whose runtime it uses.
fn down_and_up(mut node: Berth, runtime: impl Fn(&Berth) -> berth_e2e::crictl::Crictl) -> Berth {
    let notes = node.dir.dir("notes");
    let config = node.dir.file("config.yaml", CONFIG);
    node.flags.extend(["--config".to_owned(), config.to_string_lossy().into_owned()]);
    node.launch();
    for name in PODS {
        node.write_manifest(&format!("{name}.yaml"), &pod(name, &notes));
    }
    assert!(wait_until(SOON * 2, || all_run(&node)), "{:?}\n{}", node.pods(), node.agent_log());
    let written = || fs::read_to_string(notes.join("all")).unwrap_or_default();
    assert!(wait_until(SOON, || written().lines().count() == 2 * PODS.len()), "{}", written());
    let before: Vec<String> = node.pods().iter().flat_map(container_ids).collect();

    assert!(node.terminate_agent(SOON * 2), "the agent ends: {}", node.agent_log());
    let text = written();
    let ended: Vec<&str> = text.lines().filter(|line| !line.ends_with(" start")).collect();
    let turns = |what: &str| ended.iter().enumerate().filter(|(_, line)| **line == what).map(|(at, _)| at).collect::<Vec<_>>();
    for name in PODS {
        for container in ["a", "b"] {
            let [hook, term] = ["hook", "term"].map(|what| turns(&format!("{name}/{container} {what}")));
            assert_eq!((hook.len(), term.len()), (1, 1), "{name}/{container} has one hook and one SIGTERM: {ended:?}");
            assert!(hook[0] < term[0], "the hook of {name}/{container} comes first: {ended:?}");
        }
    }
    let is_critical: Vec<bool> = ended.iter().map(|line| line.starts_with("critical/")).collect();
    assert!(is_critical.is_sorted(), "the critical pod ends when all others have: {ended:?}");
    assert_eq!(containers_processes(), 0, "what goes on after its SIGTERM is killed");

    node.launch();
    assert!(wait_until(SOON * 2, || all_run(&node)), "{:?}\n{}", node.pods(), node.agent_log());
    let started = |name: &str| written().lines().filter(|line| *line == format!("{name} start")).count();
    for name in PODS {
        assert_eq!([started(&format!("{name}/a")), started(&format!("{name}/b"))], [2, 2], "{name} has started once more");
    }
    let after: Vec<String> = node.pods().iter().flat_map(container_ids).collect();
    assert!(after.iter().all(|id| !before.contains(id)), "{before:?} {after:?}");
    let runtime = runtime(&node);
    assert_eq!(runtime.run(&["ps", "-q"]).lines().count(), 2 * PODS.len(), "{}", runtime.run(&["ps"]));
    assert_eq!(runtime.run(&["pods", "-q", "--state", "ready"]).lines().count(), PODS.len(), "{}", runtime.run(&["pods"]));
    node
}

#[test]
fn a_node_that_goes_down_ends_each_container_in_its_turn_and_has_each_pod_once_afterwards() {
    Sandbox::new().shared_root().test(|| {
        let node = Berth::prepare(Half::Node);
        let archive = image::archive(&node.dir, WEB.as_ref());
        node.run(&["image", "import", &archive.to_string_lossy()]);
        down_and_up(node, Berth::crictl).finish();
    });
}

#[test]
fn a_kubelet_over_another_runtime_ends_each_container_in_its_turn_too() {
    Sandbox::new().shared_root().test(|| {
        let cri = Berth::start(Half::Cri, WEB);
        let mut kubelet = Berth::prepare(Half::Kubelet);
        kubelet.flags = vec!["--container-runtime-endpoint".into(), format!("unix://{}", cri.socket().display())];
        let mut kubelet = down_and_up(kubelet, |_| cri.crictl());
        PODS.iter().for_each(|name| kubelet.remove_manifest(&format!("{name}.yaml")));
        assert!(wait_until(SOON * 2, || kubelet.pods().is_empty()), "{:?}", kubelet.pods());
        kubelet.kill_agent();
        cri.finish();
    });
}
