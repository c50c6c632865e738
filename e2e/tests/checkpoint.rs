//! CheckpointContainer: with a program that speaks CRIU's RPC where CRIU itself cannot dump, and with the real one as far as that goes.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use berth_e2e::cri::{PidShape, run_pod};
use berth_e2e::crictl::Crictl;
use berth_e2e::node::{Berth, Half};
use berth_e2e::{SOON, output, text};
use berth_testkit::{Sandbox, report_measured, wait_until};

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");
const FAKE: &str = env!("CARGO_BIN_EXE_fake-criu");
/// The first folder of the agent's PATH; in the sandbox an empty one is mounted over it.
const FOLDER: &str = "/usr/local/sbin";

/// Hides the machine's own CRIU, and makes room for another.
fn hide_criu() {
    output(Command::new("mount").args(["-t", "tmpfs", "tmpfs", FOLDER]));
    for place in ["/usr/local/bin/criu", "/usr/sbin/criu", "/usr/bin/criu"] {
        if Path::new(place).exists() {
            output(Command::new("mount").args(["--bind", "/dev/null", place]));
        }
    }
}

fn checkpoint(crictl: &Crictl, id: &str, archive: &Path) -> Result<(), String> {
    let done = crictl.attempt(&["checkpoint", "--export", &archive.to_string_lossy(), id]);
    if done.status.success() { Ok(()) } else { Err(text(&done.stderr)) }
}

fn member(archive: &Path, name: &str) -> String {
    output(Command::new("tar").arg("-xOf").arg(archive).arg(name))
}

fn names(archive: &Path) -> Vec<String> {
    output(Command::new("tar").arg("-tf").arg(archive)).lines().map(|l| l.trim_end_matches('/').to_owned()).collect()
}

/// What a checkpoint must not leave or change.
fn is_as_before(berth: &Berth, crictl: &Crictl, id: &str) {
    assert_eq!(crictl.json(&["inspect", id])["status"]["state"], "CONTAINER_RUNNING");
    assert_eq!(crictl.run(&["exec", "-s", id, "cat", "/made"]), "by the container");
    assert!(wait_until(SOON, || !berth.dir.path().join(format!("root/containers/{id}/checkpoint")).exists()));
}

#[test]
fn without_criu_the_error_says_so() {
    Sandbox::new().test(|| {
        hide_criu();
        let berth = Berth::start(Half::Cri, WEB);
        let crictl = berth.crictl();
        let (_, id) = run_pod(&crictl, &berth.dir, "plain", PidShape::PerContainer, "sleep 1000");
        let archive = berth.dir.path().join("c.tar");
        let error = checkpoint(&crictl, &id, &archive).unwrap_err();
        assert!(error.contains("Unimplemented") && error.contains("criu is not installed"), "{error}");
        assert!(!archive.exists());
        berth.finish();
    });
}

#[test]
fn the_archive_has_what_other_tools_look_for_and_the_container_goes_on() {
    Sandbox::new().test(|| {
        hide_criu();
        fs::copy(FAKE, Path::new(FOLDER).join("criu")).unwrap();
        let berth = Berth::start(Half::Cri, WEB);
        let crictl = berth.crictl();
        let script = "echo by the container > /made; rm /etc/group; echo a line; sleep 1000";
        let (_, id) = run_pod(&crictl, &berth.dir, "shared", PidShape::Shared, script);
        assert!(wait_until(SOON, || crictl.run(&["logs", &id]).contains("a line")));
        let archive = berth.dir.path().join("c.tar");
        checkpoint(&crictl, &id, &archive).unwrap();

        let found = names(&archive);
        for name in ["config.dump", "spec.dump", "status.dump", "status", "container.log", "dump.log", "rootfs-diff.tar"] {
            assert!(found.iter().any(|f| f == name), "{name}: {found:?}");
        }
        let config: serde_json::Value = serde_json::from_str(&member(&archive, "config.dump")).unwrap();
        assert_eq!(config["id"], id.as_str(), "{config}");
        assert_eq!(config["rootfsImageName"], berth_e2e::image::BUSYBOX_IMAGE, "{config}");
        assert!(config["checkpointedTime"].as_str().is_some_and(|t| t.ends_with('Z')), "{config}");
        let spec: serde_json::Value = serde_json::from_str(&member(&archive, "spec.dump")).unwrap();
        assert_eq!(spec["process"]["args"][2], script, "{spec}");
        assert!(member(&archive, "container.log").contains("a line"));

        // What CRIU was asked for, as it understood it.
        let asked = member(&archive, "checkpoint/core-1.img");
        let pid = crictl.json(&["inspect", &id])["info"]["pid"].as_i64().unwrap();
        assert!(asked.contains(&format!("pid={pid}\n")) && asked.contains("leave_running=1"), "{asked}");
        for external in ["/etc/resolv.conf", "/dev/shm"] {
            assert!(asked.contains(external), "{external}: {asked}");
        }
        assert!(asked.contains(":extRootNetNS") && asked.contains(":extRootPidNS"), "{asked}");
        let streams: Vec<String> = serde_json::from_str(&member(&archive, "checkpoint/descriptors.json")).unwrap();
        assert!(streams.len() == 3 && streams[1].starts_with("pipe:"), "{streams:?}");

        let diff = berth.dir.path().join("diff.tar");
        fs::write(&diff, output_bytes(&archive, "rootfs-diff.tar")).unwrap();
        let changed = names(&diff);
        assert!(changed.iter().any(|n| n == "made") && changed.iter().any(|n| n == "etc/.wh.group"), "{changed:?}");
        assert_eq!(member(&diff, "made"), "by the container\n");
        is_as_before(&berth, &crictl, &id);

        // An older archive of the name is replaced.
        checkpoint(&crictl, &id, &archive).unwrap();
        berth.finish();
    });
}

fn output_bytes(archive: &Path, name: &str) -> Vec<u8> {
    Command::new("tar").arg("-xOf").arg(archive).arg(name).output().unwrap().stdout
}

#[test]
fn what_criu_says_reaches_the_user_and_nothing_is_left() {
    Sandbox::new().test(|| {
        hide_criu();
        let criu = PathBuf::from(FOLDER).join("criu");
        fs::copy(FAKE, &criu).unwrap();
        let mut berth = Berth::start(Half::Cri, WEB);
        let crictl = berth.crictl();
        let script = "echo by the container > /made; sleep 1000";
        let (pod, id) = run_pod(&crictl, &berth.dir, "plain", PidShape::PerContainer, script);
        let archive = berth.dir.path().join("c.tar");
        for (mode, told) in [
            ("refuse", "criu could not dump it (errno 95): no: Error (fake.c:1): a mount is strange"),
            ("die", "criu could not dump it and ended without an answer: Error (fake.c:2): this kernel is not for me"),
        ] {
            fs::write(criu.with_extension("mode"), mode).unwrap();
            let error = checkpoint(&crictl, &id, &archive).unwrap_err();
            assert!(error.contains(told), "{mode}: {error}");
            assert!(!archive.exists());
            is_as_before(&berth, &crictl, &id);
        }

        // One that never ends: another checkpoint does not wait for it, and the agent's end ends it.
        fs::write(criu.with_extension("mode"), "hang").unwrap();
        let mut first = crictl.command(&["checkpoint", "--export", &archive.to_string_lossy(), &id]).spawn().unwrap();
        let running = || !berth_e2e::memory::processes(|_, _, command| command.contains("criu swrk")).is_empty();
        assert!(wait_until(SOON, running));
        let second = checkpoint(&crictl, &id, &archive).unwrap_err();
        assert!(second.contains("FailedPrecondition") && second.contains("being checkpointed"), "{second}");
        output(Command::new("kill").arg(berth.pid().to_string()));
        assert!(wait_until(SOON, || !running()), "criu outlives the agent");
        first.wait().unwrap();
        berth.kill_agent();
        berth.launch();
        is_as_before(&berth, &crictl, &id);

        // `why` names it, and a kill of the container does not wait for it.
        let mut cut = crictl.command(&["checkpoint", "--export", &archive.to_string_lossy(), &id]).spawn().unwrap();
        assert!(wait_until(SOON, running));
        let why = berth.run(&["why", &id]);
        assert!(why.contains("checkpoint the container") && why.contains("c.tar"), "{why}");
        crictl.run(&["stop", "--timeout", "0", &id]);
        assert!(!cut.wait().unwrap().success() && wait_until(SOON, || !running()), "criu outlives the container");
        let log = berth.agent_log();
        for step in ["pod sandbox runs", "container created", "container started", "container exited"] {
            assert!(log.contains(step), "{step}: {log}");
        }
        let error = checkpoint(&crictl, &id, &archive).unwrap_err();
        assert!(error.contains("FailedPrecondition") && error.contains("only running containers"), "{error}");
        crictl.run(&["rmp", "-f", &pod]);
        berth.finish();
    });
}

/// CRIU 3.17 does not know the vDSO of kernels from 6.16 on; where it cannot dump, its own words must come.
#[test]
fn the_machines_own_criu_dumps_or_says_why_not() {
    Sandbox::new().test(|| {
        let checked = Command::new("criu").arg("check").output();
        let Ok(checked) = checked else {
            return report_measured("criu is not installed: not tried");
        };
        let berth = Berth::start(Half::Cri, WEB);
        let crictl = berth.crictl();
        let script = "echo by the container > /made; sleep 1000";
        let (_, id) = run_pod(&crictl, &berth.dir, "plain", PidShape::PerContainer, script);
        let archive = berth.dir.path().join("c.tar");
        match checkpoint(&crictl, &id, &archive) {
            Ok(()) => assert!(names(&archive).iter().any(|n| n.starts_with("checkpoint/pages-")), "{:?}", names(&archive)),
            Err(error) => {
                assert!(!checked.status.success(), "`criu check` is content: {error}");
                assert!(error.contains("criu could not dump it") && error.contains("Error ("), "{error}");
                report_measured("criu cannot dump on this kernel: only its error was tested");
            }
        }
        is_as_before(&berth, &crictl, &id);
        berth.finish();
    });
}
