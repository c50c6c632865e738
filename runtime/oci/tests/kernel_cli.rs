//! The verbs of the command line, one after another, on a living container.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod kit;

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::process::Stdio;
use std::time::Duration;

use berth_cgroup::{Memory, Pids, Resources};
use berth_linux::fdpass::recv_with_fds;
use berth_testkit::{in_namespaces, wait_until};
use kit::{Bundle, field};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_container_goes_through_its_states() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("echo started > /began; trap 'exit 3' TERM; while :; do sleep 1 & wait $!; done");
        bundle.spec.annotations.insert("a".into(), "b".into());
        bundle.write();
        let pid_file = bundle.temp.path().join("pid");
        bundle.detached(&["create", "--pid-file", &pid_file.to_string_lossy(), "c"]);
        assert_eq!(bundle.status("c"), "created");
        assert_eq!(std::fs::read_to_string(pid_file).unwrap(), bundle.pid("c").to_string());
        assert!(!bundle.rootfs().join("began").exists());
        assert!(bundle.fails(&["create", "c"]).contains("container with given ID already exists"));
        bundle.ok(&["start", "c"]);
        assert_eq!(bundle.status("c"), "running");
        assert!(wait_until(SOON, || bundle.rootfs().join("began").exists()));
        assert!(bundle.fails(&["start", "c"]).contains("already running"));
        let state: serde_json::Value = serde_json::from_str(&bundle.ok(&["state", "c"])).unwrap();
        assert_eq!((state["id"].as_str(), state["annotations"]["a"].as_str()), (Some("c"), Some("b")));
        assert!(state["created"].as_str().is_some_and(|time| time.ends_with('Z')) && state["rootfs"].is_string());
        let pids: Vec<i32> = serde_json::from_str(&bundle.ok(&["ps", "-f", "json", "c"])).unwrap();
        assert!(pids.contains(&bundle.pid("c")));
        assert!(bundle.ok(&["ps", "c"]).contains("began"));
        assert!(bundle.fails(&["delete", "c"]).contains("is not stopped: running"));
        bundle.ok(&["pause", "c"]);
        assert_eq!(bundle.status("c"), "paused");
        assert!(bundle.fails(&["exec", "c", "true"]).contains("paused"));
        bundle.ok(&["resume", "c"]);
        assert_eq!(bundle.status("c"), "running");
        assert!(bundle.ok(&["list"]).contains("running"));
        bundle.ok(&["kill", "c", "TERM"]);
        assert!(wait_until(SOON, || bundle.status("c") == "stopped"));
        assert!(bundle.fails(&["kill", "c"]).contains("container not running"));
        bundle.ok(&["delete", "c"]);
        assert!(bundle.fails(&["state", "c"]).contains("container does not exist"));
        assert!(bundle.fails(&["delete", "c"]).contains("container does not exist"));
        bundle.ok(&["delete", "--force", "c"]);
    });
}

#[test]
fn deleting_by_force_ends_everything_and_leaves_no_cgroup() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("sleep 1000 & sleep 1000 & wait");
        bundle.spec.linux.cgroups_path = "/berth-oci-test/forced".into();
        bundle.write();
        bundle.detached(&["run", "-d", "c"]);
        bundle.ok(&["pause", "c"]);
        let pid = bundle.pid("c");
        bundle.ok(&["delete", "-f", "c"]);
        assert!(!std::path::Path::new(&format!("/proc/{pid}/exe")).exists());
        let left = kit::tool("find", &["/sys/fs/cgroup", "-maxdepth", "4", "-name", "forced"]);
        assert_eq!(left, "");
    });
}

#[test]
fn an_exec_joins_the_container_completely() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("");
        bundle.process().args = vec!["sleep".into(), "1000".into()];
        bundle.spec.hostname = "inside".into();
        bundle.spec.linux.seccomp = Some(berth_oci::seccomp::default_profile(|_| false));
        bundle.write();
        bundle.detached(&["run", "-d", "c"]);
        let pid = bundle.pid("c");
        let out = bundle.ok(&["exec", "--env", "X=y", "--user", "33:34", "--cwd", "/tmp", "c", "sh", "-c",
            "hostname; echo $X; pwd; cat /proc/1/comm; grep -E '^(Uid|Gid|Seccomp|CapEff|CapBnd):' /proc/self/status; ls /proc/self/fd; cat /proc/self/cgroup; for n in /proc/self/ns/*; do echo ns $n $(readlink $n); done"]);
        for words in ["inside", "y\n", "/tmp", "sleep"] {
            assert!(out.contains(words), "{words}: {out}");
        }
        assert_eq!(field(&out, "Uid").split_whitespace().next(), Some("33"));
        assert_eq!([field(&out, "Seccomp"), field(&out, "CapEff")], ["2", "0000000000000000"]);
        for kind in ["pid", "net", "ipc", "uts", "mnt", "cgroup", "user"] {
            let link = std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
            assert!(out.contains(&format!("ns /proc/self/ns/{kind} {}", link.display())), "{kind}: {out}");
        }
        // It is in the container's control groups: with its namespace, they are the root.
        assert!(
            out.lines().filter(|line| line.contains(":memory:") || line.contains(":pids:")).all(|line| line.ends_with(":/")),
            "{out}"
        );
        assert_eq!(bundle.output(&["exec", "c", "sh", "-c", "exit 5"]).status.code(), Some(5));
        let error = bundle.fails(&["exec", "c", "nosuch"]);
        assert!(error.contains("exec: \"nosuch\": executable file not found in $PATH"), "{error}");
        let process = serde_json::json!({ "args": ["echo", "from a file"], "cwd": "/", "env": [kit::PATH] });
        let file = bundle.temp.file("process.json", process.to_string());
        assert_eq!(bundle.ok(&["exec", "-p", &file.to_string_lossy(), "c"]), "from a file\n");
        let pid_file = bundle.temp.path().join("pid");
        bundle.detached(&["exec", "-d", "--pid-file", &pid_file.to_string_lossy(), "c", "sleep", "1000"]);
        let exec: i32 = std::fs::read_to_string(pid_file).unwrap().parse().unwrap();
        let pids: Vec<i32> = serde_json::from_str(&bundle.ok(&["ps", "-f", "json", "c"])).unwrap();
        assert!(pids.contains(&exec) && pids.contains(&pid));
        bundle.ok(&["kill", "--all", "c", "KILL"]);
        assert!(wait_until(SOON, || bundle.status("c") == "stopped"));
        bundle.ok(&["delete", "c"]);
    });
}

#[test]
fn an_exec_with_a_terminal_hands_it_to_the_console_socket() {
    in_namespaces(|| {
        let bundle = Bundle::new("exec sleep 1000");
        bundle.write();
        bundle.detached(&["run", "-d", "c"]);
        let socket = bundle.temp.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        bundle.detached(&[
            "exec",
            "-d",
            "-t",
            "--console-socket",
            &socket.to_string_lossy(),
            "c",
            "sh",
            "-c",
            "tty; read x; echo got $x; sleep 1000",
        ]);
        let (stream, _) = listener.accept().unwrap();
        let (_, fds) = recv_with_fds(stream.as_fd(), &mut [0; 64], 1).unwrap();
        let mut master = std::fs::File::from(fds.into_iter().next().unwrap());
        master.write_all(b"typed\n").unwrap();
        let mut text = Vec::new();
        assert!(wait_until(SOON, || {
            let mut buffer = [0; 256];
            let read = std::io::Read::read(&mut master, &mut buffer).unwrap_or(0);
            text.extend_from_slice(&buffer[..read]);
            String::from_utf8_lossy(&text).contains("got typed")
        }));
        assert!(String::from_utf8_lossy(&text).contains("/dev/pts/0"));
        bundle.ok(&["delete", "-f", "c"]);
    });
}

#[test]
fn limits_are_set_and_updated() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("exec sleep 1000");
        bundle.spec.linux.cgroups_path = "/berth-oci-test/limited".into();
        bundle.spec.linux.resources = Some(Resources {
            memory: Some(Memory { limit: Some(64 << 20), ..Memory::default() }),
            pids: Some(Pids { limit: Some(20) }),
            ..Resources::default()
        });
        bundle.write();
        bundle.detached(&["run", "-d", "c"]);
        let find = |name: &str| {
            let files = kit::tool("find", &["/sys/fs/cgroup", "-path", &format!("*/limited/{name}")]);
            let file = files.lines().next().unwrap_or_else(|| panic!("no {name}")).to_owned();
            std::fs::read_to_string(file).unwrap().trim().to_owned()
        };
        let v2 = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        let memory = if v2 { "memory.max" } else { "memory.limit_in_bytes" };
        assert_eq!([find("pids.max"), find(memory)], ["20", &(64 << 20).to_string()]);
        bundle.ok(&["update", "--pids-limit", "30", "c"]);
        assert_eq!(find("pids.max"), "30");
        let mut child = bundle.oci(&["update", "--resources", "-", "c"]).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(br#"{"memory":{"limit":134217728}}"#).unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!(find(memory), (128 << 20).to_string());
        bundle.ok(&["delete", "-f", "c"]);
    });
}

#[test]
fn what_is_not_supported_is_refused_by_name_and_logged_as_runc_does() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("true");
        for (args, words) in [
            (&["--systemd-cgroup", "create", "c"][..], "systemd"),
            (&["checkpoint", "c"], "checkpoint"),
            (&["create", "--no-pivot", "c"], "--no-pivot"),
            (&["create", "--frob", "c"], "--frob"),
            (&["run", "../x"], "invalid container ID"),
            (&["frob"], "unknown command"),
        ] {
            bundle.write();
            let error = bundle.fails(args);
            assert!(error.contains(words), "{error}");
        }
        bundle.temp.file("b/config.json", r#"{"ociVersion":"1.0.0","linux":{"intelRdt":{}}}"#);
        assert!(bundle.fails(&["run", "c"]).contains("unknown field `intelRdt`"));
        bundle.process().cwd = "relative".into();
        bundle.write();
        let log = bundle.temp.path().join("log.json");
        bundle.fails(&["--log", &log.to_string_lossy(), "--log-format", "json", "run", "c"]);
        let line: serde_json::Value = serde_json::from_str(std::fs::read_to_string(log).unwrap().trim()).unwrap();
        assert_eq!(line["level"].as_str(), Some("error"));
        assert!(line["msg"].as_str().unwrap().contains("process.cwd") && line["time"].is_string());
        let features: serde_json::Value = serde_json::from_str(&bundle.ok(&["features"])).unwrap();
        assert_eq!(features["linux"]["seccomp"]["enabled"].as_bool(), Some(true));
        assert_eq!(bundle.ok(&["list", "-f", "json"]).trim(), "[]");
    });
}

#[test]
fn the_example_spec_is_one_that_runs() {
    in_namespaces(|| {
        let bundle = Bundle::new("");
        bundle.ok(&["spec"]);
        let path = bundle.temp.path().join("b/config.json");
        let mut spec: berth_oci::spec::Spec = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let process = spec.process.as_mut().unwrap();
        (process.terminal, process.args) = (false, vec!["ls".into(), "/sys/fs/cgroup".into()]);
        std::fs::write(&path, serde_json::to_vec(&spec).unwrap()).unwrap();
        assert!(bundle.ok(&["run", "c"]).contains("pids"));
        assert!(bundle.fails(&["spec"]).contains("exists"));
    });
}
