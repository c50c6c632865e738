//! What is stuck is bounded and named: by its error, by `berth why` and by `berth stop --all`; and the agent's restart in the middle
//! of it changes nothing.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use berth_e2e::cri::{PidShape, file, run_pod, sandbox};
use berth_e2e::node::{Berth, Half};
use berth_e2e::{SOON, image, text, try_output};
use berth_testkit::{Sandbox, wait_for, wait_until};
use serde_json::Value;

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");

/// Above every deadline of a pod's end.
const BOUND: Duration = Duration::from_secs(150);

fn why(berth: &Berth, wanted: &str) -> String {
    let out = try_output(&mut berth.verb(&["why", wanted]));
    format!("{}{}", text(&out.stdout), text(&out.stderr))
}

fn says(berth: &Berth, wanted: &str, parts: &[&str]) {
    let all = || {
        let said = why(berth, wanted);
        parts.iter().all(|part| said.contains(part))
    };
    assert!(wait_until(SOON * 2, all), "{parts:?} not in:\n{}\n{}", why(berth, wanted), berth.agent_log());
}

/// The shim of a sandbox: its oldest process, the others are its forks.
fn shim(pod: &str) -> u32 {
    let found = berth_e2e::memory::processes(|_, _, command| command.starts_with(&format!("berth-shim {pod}")));
    found.iter().map(|process| process.pid).min().expect("the pod has a shim")
}

fn signal(pid: u32, signal: &str) {
    berth_e2e::output(Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]));
}

fn ended(mut child: Child) -> Output {
    let done = wait_until(BOUND, || child.try_wait().unwrap().is_some());
    if !done {
        child.kill().unwrap();
    }
    let out = child.wait_with_output().unwrap();
    assert!(done, "not bounded: {out:?}");
    out
}

fn spawn(command: &mut Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn a_pod_whose_shim_is_stopped_is_named_and_ends_in_a_bounded_time() {
    Sandbox::new().test(|| {
        let mut berth = Berth::start(Half::Cri, WEB);
        let crictl = berth.crictl();
        let (pod, _) = run_pod(&crictl, &berth.dir, "frozen", PidShape::PerContainer, "sleep 1000");
        signal(shim(&pod), "STOP");
        says(&berth, &pod, &["is stopped by a signal", "kill -CONT"]);
        // The next agent finds it silent, and its pod still ends.
        berth.kill_agent();
        berth.launch();
        let out = ended(spawn(crictl.command(&["stopp", &pod]).args::<_, &str>([])));
        assert!(out.status.success() || text(&out.stderr).contains("Deadline"), "{out:?}");
        assert!(wait_until(BOUND, || crictl.json(&["inspectp", &pod])["status"]["state"] == "SANDBOX_NOTREADY"));
        says(&berth, &pod, &["NOTREADY: it was stopped by StopPodSandbox"]);
        berth.finish();
    });
}

#[test]
fn stop_all_is_bounded_with_a_stopped_shim() {
    Sandbox::new().test(|| {
        let berth = Berth::start(Half::Cri, WEB);
        let crictl = berth.crictl();
        let (pod, _) = run_pod(&crictl, &berth.dir, "frozen", PidShape::PerContainer, "trap '' TERM; sleep 1000");
        signal(shim(&pod), "STOP");
        let out = ended(spawn(&mut berth.verb(&["stop", "--all", "--timeout", "1"])));
        assert!(out.status.success(), "{out:?}");
        berth.finish();
    });
}

/// A CNI plugin `slow` that hangs as long as a file named like its verb is there.
fn with_slow_plugin(half: Half) -> Berth {
    let mut berth = Berth::prepare(half);
    let (bin, conf) = (berth.dir.dir("cni-bin"), berth.dir.dir("cni-conf"));
    let script = format!(
        "#!/bin/sh\ncat > /dev/null\nwhile [ -e {root}/hang-$CNI_COMMAND ]; do sleep 0.2; done\n\
         [ $CNI_COMMAND = ADD ] && echo '{{\"cniVersion\":\"1.0.0\",\"ips\":[{{\"address\":\"10.1.2.3/24\"}}]}}'\nexit 0\n",
        root = berth.dir.path().display()
    );
    fs::write(bin.join("slow"), script).unwrap();
    fs::set_permissions(bin.join("slow"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(conf.join("10.conflist"), r#"{"cniVersion":"1.0.0","name":"slow-net","plugins":[{"type":"slow"}]}"#).unwrap();
    // Longer than a plugin's first 30 s, so that the deadline is seen to be the configured one.
    let text = "apiVersion: berth/v1alpha1\nkind: NodeConfiguration\ndeadlines: {cniPlugin: 32s}\n";
    let config = berth.dir.file("config.yaml", text);
    for (flag, value) in [("--cni-conf-dir", &conf), ("--cni-bin-dir", &bin), ("--config", &config)] {
        berth.flags.extend([flag.to_owned(), value.to_string_lossy().into_owned()]);
    }
    let archive = image::archive(&berth.dir, WEB.as_ref());
    berth.run(&["image", "import", &archive.to_string_lossy()]);
    berth.launch();
    berth
}

#[test]
fn a_cni_plugin_that_hangs_is_named_with_network_and_step_and_killed_at_its_deadline() {
    Sandbox::new().timeout(Some(BOUND * 3)).test(|| {
        let mut berth = with_slow_plugin(Half::Cri);
        let crictl = berth.crictl();
        let hang = |verb: &str| fs::write(berth.dir.path().join(format!("hang-{verb}")), "").unwrap();
        let heal = |berth: &Berth, verb: &str| fs::remove_file(berth.dir.path().join(format!("hang-{verb}"))).unwrap();
        hang("ADD");
        let config = file(&berth.dir, "pod.json", &sandbox(&berth.dir, "late", PidShape::PerContainer));
        let run = || {
            let mut command = crictl.command(&[]);
            command.args(["--timeout", "120s", "runp", &config]);
            spawn(&mut command)
        };
        let child = run();
        says(&berth, "late", &["RunPodSandbox, since", "CNI ADD of plugin slow in network slow-net", "of 32 s", "/slow"]);
        let out = ended(child);
        let error = text(&out.stderr);
        for part in ["set up network", "plugin", "slow-net", "(ADD) did not end within 32s and was killed"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert_eq!(crictl.run(&["pods", "-q"]), "", "what failed is undone");
        says(&berth, "late", &["RunPodSandbox at the step \"set up the network\"", "was killed"]);

        // The agent's death in the middle of an ADD: the next one ends the plugin, which would go on, and undoes it.
        let child = run();
        says(&berth, "late", &["CNI ADD of plugin slow"]);
        let program = berth.dir.path().join("cni-bin/slow").to_string_lossy().into_owned();
        let plugins = || berth_e2e::memory::processes(|_, _, command| command.contains(&program));
        berth.kill_agent();
        ended(child);
        assert!(!plugins().is_empty(), "it hangs without its agent");
        berth.launch();
        assert!(wait_until(SOON, || plugins().is_empty()), "{}", berth.agent_log());
        heal(&berth, "ADD");
        assert!(wait_until(BOUND, || crictl.run(&["pods", "-q"]).is_empty()));
        assert!(wait_until(BOUND, || berth.run(&["leaks"]).trim().is_empty()), "{}", berth.run(&["leaks"]));

        // And in the middle of a DEL: it is named as what it is, and the next one goes on with it.
        let pod = crictl.run(&["runp", &config]);
        fs::write(berth.dir.path().join("hang-DEL"), "").unwrap();
        let child = spawn(crictl.command(&["stopp", &pod]).args::<_, &str>([]));
        says(&berth, &pod, &["StopPodSandbox, since", "CNI DEL of plugin slow in network slow-net"]);
        berth.kill_agent();
        ended(child);
        heal(&berth, "DEL");
        berth.launch();
        crictl.run(&["stopp", &pod]);
        crictl.run(&["rmp", &pod]);
        berth.finish();
    });
}

fn shell(name: &str, image: &str, script: &str) -> String {
    format!("  - {{name: {name}, image: '{image}', imagePullPolicy: IfNotPresent, command: [sh, -c, {script:?}]}}\n")
}

fn manifest(name: &str, rest: &str, containers: &str) -> String {
    format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n{rest}  containers:\n{containers}")
}

#[test]
fn why_tells_what_the_kubelet_knows() {
    Sandbox::new().shared_root().timeout(Some(BOUND * 3)).test(|| {
        let mut berth = Berth::start(Half::Node, WEB);
        let busybox = image::BUSYBOX_IMAGE;
        let volume = "  volumes: [{name: c, configMap: {name: not-there}}]\n";
        for (name, rest, containers) in [
            ("no-image", "", shell("a", "absent.test/none:1", "true")),
            ("no-map", volume, shell("a", busybox, "sleep 1000").replace('}', ", volumeMounts: [{name: c, mountPath: /c}]}")),
            ("no-class", "  runtimeClassName: not-known\n", shell("a", busybox, "sleep 1000")),
            ("crashes", "", shell("a", busybox, "exit 3")),
            (
                "slow-end",
                "  terminationGracePeriodSeconds: 600\n",
                shell("a", busybox, "trap '' TERM; while :; do sleep 1; done"),
            ),
        ] {
            berth.write_manifest(&format!("{name}.yaml"), &manifest(name, rest, &containers));
        }
        berth.write_manifest("refused.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: refused}\nspec: {containerz: []}\n");
        berth.wait_running("slow-end");
        says(&berth, "no-image-e2e", &["pod default/no-image-e2e", "container:  a waiting", "absent.test/none:1"]);
        says(&berth, "no-map-e2e", &["FailedMount", "not-there"]);
        says(&berth, "no-class-e2e", &["RuntimeClass not-known"]);
        says(&berth, "crashes-e2e", &["CrashLoopBackOff", "starts again in", "its last run ended with 3 (Error)"]);
        says(&berth, "refused", &["manifest refused by the kubelet", "refused.yaml"]);
        berth.remove_manifest("slow-end.yaml");
        let stopping = ["Terminating", "running: stopping: asked to end by signal 15", "StopContainer, since", "SIGKILL to all"];
        says(&berth, "slow-end-e2e", &stopping);
        // What it prints for machines is one list, and its states are words.
        let json: Value = serde_json::from_str(&berth.run(&["why", "slow-end-e2e", "-o", "json"])).unwrap();
        let all = json.as_array().unwrap();
        let of = |kind: &str| all.iter().find(|a| a["kind"] == kind).unwrap_or_else(|| panic!("{kind}: {json}"));
        assert_eq!((&of("pod")["state"], &of("container")["state"]), (&"Terminating".into(), &"running".into()));
        assert_eq!(of("container")["operation"]["name"], "StopContainer");
        assert!(of("container")["nextDeadline"]["inSeconds"].as_i64().is_some_and(|s| s > 0), "{json}");
        // The same after the agent's restart.
        berth.kill_agent();
        berth.launch();
        says(&berth, "no-map-e2e", &["FailedMount", "not-there"]);
        says(&berth, "crashes-e2e", &["CrashLoopBackOff", "starts again in"]);
        berth.finish();
    });
}

#[test]
fn a_dead_shim_is_the_reason_of_its_sandbox_and_an_end_has_one_space() {
    Sandbox::new().test(|| {
        let mut berth = Berth::start(Half::Cri, WEB);
        let crictl = berth.crictl();
        let (pod, container) = run_pod(&crictl, &berth.dir, "doomed", PidShape::PerContainer, "sleep 1000");
        signal(shim(&pod), "KILL");
        says(&berth, &pod, &["NOTREADY: its shim died at"]);
        says(&berth, &container, &["exited: with 255"]);
        assert!(!why(&berth, &container).contains("  ("), "{}", why(&berth, &container));
        let said = wait_for(SOON, || Some(why(&berth, "doomed"))).unwrap();
        assert!(said.contains("pod sandbox default/doomed") && said.contains("container default/doomed/"), "{said}");
        berth.kill_agent();
        let out = try_output(&mut berth.verb(&["why", &container]));
        assert!(text(&out.stdout).contains("exited: "), "{out:?}");
        berth.launch();
        berth.finish();
    });
}
