//! The verbs of people without a cluster: what they print, pass on and leave behind.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Stdio;

use berth_e2e::image::BUSYBOX_IMAGE;
use berth_e2e::node::{Berth, Half};
use berth_e2e::{SOON, text, try_output};
use berth_testkit::{Sandbox, wait_until};
use nix::pty::{Winsize, openpty};

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");

fn pod(name: &str, containers: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  terminationGracePeriodSeconds: 1\n  containers:\n{containers}"
    )
}

fn shell(name: &str, script: &str) -> String {
    format!("  - {{name: {name}, image: '{BUSYBOX_IMAGE}', command: [sh, -c, {script:?}]}}\n")
}

#[test]
fn exec_passes_standard_input_on_and_ends_with_the_exit_code() {
    Sandbox::new().shared_root().test(|| {
        let berth = Berth::start(Half::Node, WEB);
        berth.write_manifest("sh.yaml", &pod("sh", &(shell("a", "sleep 1000") + &shell("b", "sleep 1000"))));
        berth.wait_running("sh");
        let mut exec = berth.verb(&["exec", "-i", "sh-e2e", "--", "sh", "-c", "cat; echo done >&2; exit 3"]);
        let mut child = exec.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let sent = "0123456789abcdef".repeat(20_000);
        let mut stdin = child.stdin.take().unwrap();
        let bytes = sent.clone();
        let writer = std::thread::spawn(move || stdin.write_all(bytes.as_bytes()).unwrap());
        let out = child.wait_with_output().unwrap();
        writer.join().unwrap();
        assert_eq!((out.status.code(), text(&out.stdout) == sent), (Some(3), true));
        assert_eq!(text(&out.stderr), "Defaulted container \"a\" out of: a, b\ndone\n");
        // Without -i the command has no input, and does not wait for one.
        let out = try_output(&mut berth.verb(&["exec", "sh-e2e", "-c", "b", "--", "sh", "-c", "cat; hostname"]));
        assert_eq!((text(&out.stdout), text(&out.stderr)), ("sh-e2e\n".into(), String::new()));
        let out = try_output(&mut berth.verb(&["exec", "sh-e2e", "-c", "b", "--", "/no/such"]));
        assert!(!out.status.success() && text(&out.stderr).contains("/no/such"), "{out:?}");
        let out = try_output(berth.verb(&["exec", "-it", "sh-e2e", "-c", "b", "--", "true"]).stdin(Stdio::null()));
        assert!(out.status.success() && text(&out.stderr).contains("not a terminal"), "{out:?}");
        berth.finish();
    });
}

#[test]
fn exec_with_a_terminal_is_interactive_and_follows_its_size() {
    Sandbox::new().shared_root().test(|| {
        let berth = Berth::start(Half::Node, WEB);
        berth.write_manifest("sh.yaml", &pod("sh", &shell("a", "sleep 1000")));
        berth.wait_running("sh");
        let size = Winsize { ws_row: 33, ws_col: 99, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(Some(&size), None).unwrap();
        let end = |fd: &OwnedFd| Stdio::from(fd.try_clone().unwrap());
        let mut exec = berth.verb(&["exec", "-i", "-t", "sh-e2e", "--", "sh"]);
        let mut child = exec.stdin(end(&pty.slave)).stdout(end(&pty.slave)).stderr(end(&pty.slave)).spawn().unwrap();
        drop((exec, pty.slave));
        let mut terminal = File::from(pty.master);
        let mut screen = terminal.try_clone().unwrap();
        let reader = std::thread::spawn(move || {
            let (mut shown, mut buffer) = (Vec::new(), [0; 1024]);
            // The last slave's end is an error of the master.
            while let Ok(n @ 1..) = screen.read(&mut buffer) {
                shown.extend_from_slice(&buffer[..n]);
            }
            text(&shown)
        });
        terminal.write_all(b"while [ \"$(stty size)\" != '33 99' ]; do :; done; tty; echo size is right; exit 7\n").unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(7));
        let shown = reader.join().unwrap();
        assert!(shown.contains("/dev/pts/") && shown.contains("\r\nsize is right\r\n"), "{shown}");
        berth.finish();
    });
}

#[test]
fn logs_find_the_run_before_in_a_crash_loop_and_say_why_a_container_waits() {
    Sandbox::new().shared_root().test(|| {
        let berth = Berth::start(Half::Node, WEB);
        berth.write_manifest("loop.yaml", &pod("loop", &shell("a", "echo run of $$; exit 1")));
        berth.write_manifest("wait.yaml", &pod("wait", "  - {name: a, image: 'berth.test/absent:1', imagePullPolicy: Never}\n"));
        berth.wait_pod("loop", "CrashLoopBackOff", |p| {
            p["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff"
        });
        let previous = berth.run(&["logs", "-p", "loop-e2e"]);
        assert!(previous.starts_with("run of "), "{previous}");
        assert!(berth.run(&["pods"]).contains("CrashLoopBackOff"));
        berth.wait_pod("wait", "ErrImageNeverPull", |p| {
            p["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "ErrImageNeverPull"
        });
        let refused = try_output(&mut berth.verb(&["logs", "wait-e2e"]));
        let said = text(&refused.stderr);
        assert!(!refused.status.success() && said.contains("is waiting to start: ErrImageNeverPull"), "{said}");
        berth.finish();
    });
}

#[test]
fn a_follower_outlives_the_agent() {
    Sandbox::new().shared_root().test(|| {
        let mut berth = Berth::start(Half::Node, WEB);
        berth.write_manifest("tick.yaml", &pod("tick", &shell("a", "n=0; while :; do echo $n; n=$((n+1)); sleep 0.2; done")));
        berth.wait_running("tick");
        let mut follow = berth.verb(&["logs", "-f", "tick-e2e"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut out = follow.stdout.take().unwrap();
        let mut read_until = |wanted: u32| {
            let (mut seen, mut byte) = (String::new(), [0]);
            while !seen.ends_with(&format!("\n{wanted}\n")) && out.read(&mut byte).unwrap() == 1 {
                seen.push(char::from(byte[0]));
            }
            seen
        };
        read_until(3);
        berth.kill_agent();
        assert!(read_until(12).starts_with("4\n5\n"), "no line is lost while there is no agent");
        berth.launch();
        assert!(read_until(15).starts_with("13\n14\n"));
        follow.kill().unwrap();
        follow.wait().unwrap();
        berth.finish();
    });
}

#[test]
fn images_are_listed_without_an_agent_and_removed_by_name() {
    Sandbox::new().shared_root().test(|| {
        let berth = Berth::start(Half::Node, WEB);
        berth.write_manifest("sh.yaml", &pod("sh", &shell("a", "sleep 1000")));
        berth.wait_running("sh");
        let refused = try_output(&mut berth.verb(&["image", "rm", BUSYBOX_IMAGE]));
        assert!(!refused.status.success() && text(&refused.stderr).contains("is used by a of pod default/sh-e2e"), "{refused:?}");
        let gone = berth.run(&["image", "rm", "--force", BUSYBOX_IMAGE]);
        assert!(gone.starts_with(&format!("untagged: {BUSYBOX_IMAGE}\ndeleted: sha256:")), "{gone}");
        // Right behind the manifest's removal: nothing of the pod may stay.
        berth.remove_manifest("sh.yaml");
        berth.run(&["stop", "--all", "--timeout", "1"]);
        assert!(wait_until(SOON, || !berth.answers()));
        let listed = berth.run(&["images"]);
        assert!(listed.contains("berth.test/web") && !listed.contains("busybox"), "{listed}");
        let folders = |name: &str| std::fs::read_dir(berth.dir.path().join(name)).unwrap().count();
        assert_eq!(folders("kubelet/pods"), 0);
        let refused = try_output(&mut berth.verb(&["ps"]));
        let said = text(&refused.stderr);
        assert_eq!(said.matches("os error").count(), 1, "{said}");
        berth.finish();
    });
}
