//! `run` and `exec` without `--detach`: signals, exit codes, terminals, and what a failure leaves behind.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod kit;

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use berth_linux::pidfd::PidFd;
use berth_oci::spec::{Hook, Hooks, NamespaceType};
use berth_testkit::{in_namespaces, wait_until};
use kit::Bundle;
use rustix::process::Pid;

const SOON: Duration = Duration::from_secs(20);

fn signal(child: &Child, number: i32) {
    PidFd::open(Pid::from_child(child)).unwrap().signal(number).unwrap();
}

/// A hook that says `<path>.reached` and goes on when somebody writes to the fifo at `path`.
fn blocking_hook(path: &Path) -> Hooks {
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let path = path.display();
    let hook = Hook {
        path: "/bin/sh".into(),
        args: vec!["sh".into(), "-c".into(), format!("touch {path}.reached; read x < {path}")],
        env: vec![kit::PATH.into()],
        timeout: Some(30),
    };
    Hooks { create_runtime: vec![hook], ..Hooks::default() }
}

fn reached(path: &Path) -> bool {
    path.with_extension("reached").exists()
}

#[test]
fn signals_of_every_kind_reach_the_container_and_its_code_is_ours() {
    in_namespaces(|| {
        let bundle = Bundle::new("trap 'exit 7' ALRM; trap 'exit 8' 40; echo > /ready; while :; do sleep 0.05; done");
        for (number, code) in [(14, 7), (40, 8)] {
            bundle.write();
            let mut child = bundle.oci(&["run", "c"]).spawn().unwrap();
            assert!(wait_until(SOON, || bundle.rootfs().join("ready").exists()));
            signal(&child, number);
            assert_eq!(child.wait().unwrap().code(), Some(code));
            std::fs::remove_file(bundle.rootfs().join("ready")).unwrap();
        }
        assert_eq!(bundle.ok(&["list", "-q"]), "");
    });
}

#[test]
fn a_signal_during_the_creation_ends_the_container_and_not_only_us() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("exec sleep 1000");
        // Not PID 1, for whom a signal without a handler is nothing.
        bundle.spec.linux.namespaces.retain(|namespace| namespace.kind != NamespaceType::Pid);
        let fifo = bundle.temp.path().join("fifo");
        bundle.spec.hooks = Some(blocking_hook(&fifo));
        bundle.write();
        let mut child = bundle.oci(&["run", "c"]).spawn().unwrap();
        assert!(wait_until(SOON, || reached(&fifo)));
        signal(&child, 15);
        std::fs::write(&fifo, "\n").unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
        assert_eq!(bundle.ok(&["list", "-q"]), "");
    });
}

#[test]
fn a_creation_that_was_killed_is_removed_with_its_control_group() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("true");
        bundle.spec.linux.cgroups_path = "/berth-oci-test/cut-short".into();
        let fifo = bundle.temp.path().join("fifo");
        bundle.spec.hooks = Some(blocking_hook(&fifo));
        bundle.write();
        let mut child = bundle.oci(&["create", "c"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        assert!(wait_until(SOON, || reached(&fifo)));
        assert_eq!(bundle.status("c"), "creating");
        child.kill().unwrap();
        child.wait().unwrap();
        std::fs::write(&fifo, "\n").unwrap();
        let groups = || kit::tool("find", &["/sys/fs/cgroup", "-maxdepth", "4", "-name", "cut-short"]);
        assert_ne!(groups(), "");
        assert!(bundle.fails(&["start", "c"]).contains("being created"));
        assert!(bundle.fails(&["delete", "c"]).contains("is not stopped: creating"));
        bundle.ok(&["delete", "--force", "c"]);
        assert_eq!(groups(), "");
        assert!(bundle.fails(&["state", "c"]).contains("does not exist"));
    });
}

#[test]
fn a_terminal_that_nobody_has_open_any_more_is_not_polled_for_ever() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("exec <&- >&- 2>&-; : > /closed; while [ ! -e /stop ]; do sleep 0.05; done; exit 4");
        bundle.process().terminal = true;
        bundle.write();
        let mut child = bundle.oci(&["run", "c"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        assert!(wait_until(SOON, || bundle.rootfs().join("closed").exists()));
        let ticks = || -> u64 {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
            let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
            fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
        };
        let before = ticks();
        // A time that is to pass: 50 ticks, of which a loop that never sleeps would take most.
        std::thread::sleep(Duration::from_millis(500));
        let used = ticks() - before;
        assert!(used < 15, "{used} ticks");
        std::fs::write(bundle.rootfs().join("stop"), "").unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(4));
    });
}

#[test]
fn a_console_socket_goes_with_detached_terminals_only() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("true");
        for terminal in [false, true] {
            bundle.process().terminal = terminal;
            bundle.write();
            let error = bundle.fails(&["run", "--console-socket", "/nowhere", "c"]);
            assert!(error.contains("cannot use console socket"), "{error}");
        }
    });
}

#[test]
fn an_exec_that_cannot_be_handed_over_is_not_left_running() {
    in_namespaces(|| {
        let bundle = Bundle::new("exec sleep 1000");
        bundle.write();
        bundle.detached(&["run", "-d", "c"]);
        let exec = |args: &[&str]| {
            let words: Vec<&str> = ["exec", "-d"].iter().chain(args).chain(&["c", "sleep", "1234"]).copied().collect();
            let output = bundle.output(&words);
            assert_eq!(output.status.code(), Some(255), "{}", String::from_utf8_lossy(&output.stderr));
        };
        exec(&["--pid-file", "/nowhere/at/all"]);
        exec(&["-t", "--console-socket", "/nowhere/at/all"]);
        let processes = bundle.ok(&["ps", "c"]);
        assert!(processes.contains("sleep 1000") && !processes.contains("sleep 1234"), "{processes}");
        assert_eq!(bundle.output(&["exec", "c", "nosuch"]).status.code(), Some(255));
        bundle.ok(&["delete", "-f", "c"]);
    });
}

#[test]
fn a_paused_container_can_be_killed_and_asked_after() {
    in_namespaces(|| {
        let bundle = Bundle::new("exec sleep 1000");
        bundle.write();
        bundle.detached(&["run", "-d", "c"]);
        bundle.ok(&["kill", "c", "0"]);
        bundle.ok(&["pause", "c"]);
        bundle.ok(&["kill", "c", "KILL"]);
        assert!(wait_until(SOON, || bundle.status("c") == "stopped"));
        assert!(bundle.fails(&["kill", "c", "0"]).contains("not running"));
        assert!(bundle.fails(&["ps", "c", "aux"]).contains("too many arguments"));
        bundle.ok(&["delete", "c"]);
    });
}

#[test]
fn a_failing_poststart_hook_stops_the_container() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("exec sleep 1000");
        let failing = Hook { path: "/bin/false".into(), ..Hook::default() };
        bundle.spec.hooks = Some(Hooks { poststart: vec![failing], ..Hooks::default() });
        bundle.write();
        bundle.detached(&["create", "c"]);
        assert!(bundle.fails(&["start", "c"]).contains("poststart hook #0"));
        assert_eq!(bundle.status("c"), "stopped");
        bundle.ok(&["delete", "c"]);
    });
}
