//! What a sandbox promises, seen from inside and from outside.
#![allow(clippy::unwrap_used, clippy::zombie_processes)]

use std::fs;
use std::process::Command;

use berth_testkit::{Sandbox, TempState, in_namespaces, wait_until};

fn mountinfo() -> String {
    fs::read_to_string("/proc/self/mountinfo").unwrap()
}

#[test]
fn inside_are_a_fresh_network_a_tmpfs_on_run_and_own_processes() {
    in_namespaces(|| {
        let links = Command::new("ip").arg("address").output().unwrap();
        let links = String::from_utf8(links.stdout).unwrap();
        let names = ["lo", "uplink0@", "uplink0-far@"];
        let links_found = links.lines().filter(|l| !l.starts_with(' ')).count();
        assert!(links_found == 3 && names.iter().all(|n| links.contains(&format!(": {n}"))), "{links}");
        assert!(links.contains("uplink0") && links.contains("10.77.0.1/24"), "{links}");
        assert!(mountinfo().lines().any(|l| l.contains(" /run ") && l.contains("- tmpfs ")));
        assert!(!mountinfo().contains("shared:"));
        assert!(std::process::id() < 10, "own PID namespace");
    });
}

#[test]
fn inside_every_cgroup_hierarchy_starts_at_the_sandbox() {
    in_namespaces(|| {
        let file = TempState::new().file("x", "on disk");
        assert!(file.starts_with("/run/t"));
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        assert!(own.lines().all(|l| l.ends_with(":/") || l.ends_with(":/testkit")), "{own}");
        for dir in ["memory", "cpuset", "freezer"] {
            let dir = format!("/sys/fs/cgroup/{dir}");
            if fs::exists(&dir).unwrap() {
                fs::create_dir(format!("{dir}/inner")).unwrap();
            }
        }
    });
    for dir in ["memory", "cpuset"] {
        assert!(!fs::exists(format!("/sys/fs/cgroup/{dir}/inner")).unwrap());
    }
}

#[test]
fn a_failure_inside_is_a_failure_outside() {
    let outcome = std::panic::catch_unwind(|| Sandbox::new().test(|| panic!("on purpose")));
    assert!(outcome.is_err());
}

#[test]
fn orphans_are_reaped_by_the_init() {
    in_namespaces(|| {
        let out =
            Command::new("/bin/busybox").args(["sh", "-c", "/bin/busybox sleep 0.05 >/dev/null & echo $!"]).output().unwrap();
        let pid = String::from_utf8(out.stdout).unwrap();
        assert!(wait_until(std::time::Duration::from_secs(5), || { !fs::exists(format!("/proc/{}", pid.trim())).unwrap() }));
    });
}

#[test]
fn a_shared_root_stays_among_its_own() {
    Sandbox::new().shared_root().test(|| assert!(mountinfo().contains(" / / ") && mountinfo().contains("shared:")));
}

#[test]
fn a_frozen_process_does_not_keep_the_sandbox() {
    in_namespaces(|| {
        let dir = "/sys/fs/cgroup/freezer/cold";
        if fs::create_dir_all(dir).is_err() || !fs::exists(format!("{dir}/freezer.state")).unwrap() {
            berth_testkit::skip!("needs the v1 freezer");
        }
        let child = Command::new("/bin/busybox").args(["sleep", "100"]).spawn().unwrap();
        fs::write(format!("{dir}/cgroup.procs"), child.id().to_string()).unwrap();
        fs::write(format!("{dir}/freezer.state"), "FROZEN").unwrap();
    });
}

#[test]
fn a_killed_sandbox_leaves_no_process_and_the_next_one_removes_its_cgroups() {
    let mark = format!("3{}", std::process::id());
    let program = ["/bin/busybox", "sleep", mark.as_str()];
    let mut outer = Command::new(env!("CARGO_BIN_EXE_berth-sandbox")).args(program).spawn().unwrap();
    let sleeping = || {
        let all = fs::read_dir("/proc").unwrap().flatten();
        all.filter(|e| {
            fs::read(e.path().join("cmdline")).is_ok_and(|line| line.starts_with(b"/bin/busybox\0sleep\0") && find(&line, &mark))
        })
        .count()
    };
    let ten = std::time::Duration::from_secs(10);
    assert!(wait_until(ten, || sleeping() == 1));
    outer.kill().unwrap();
    outer.wait().unwrap();
    assert!(wait_until(ten, || sleeping() == 0), "the kernel ends everything inside");

    let left = format!("berth-test-{}-", outer.id());
    let leftover = || {
        let tops = fs::read_dir("/sys/fs/cgroup").unwrap().flatten().filter_map(|top| fs::read_dir(top.path()).ok());
        tops.flatten().flatten().any(|e| e.file_name().to_string_lossy().starts_with(&left))
    };
    assert!(Command::new(env!("CARGO_BIN_EXE_berth-sandbox")).arg("true").status().unwrap().success());
    assert!(wait_until(ten, || !leftover()));
}

fn find(line: &[u8], mark: &str) -> bool {
    line.split(|b| *b == 0).any(|argument| argument == mark.as_bytes())
}

#[test]
fn a_signal_to_a_sandbox_reaches_its_program() {
    let script = "trap 'echo told; exit 7' TERM; echo ready; while :; do /bin/busybox sleep 0.01; done";
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth-sandbox"));
    let mut outer = command.args(["/bin/busybox", "sh", "-c", script]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(outer.stdout.take().unwrap()));
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    // The sandbox's init, process 1 of its namespace, takes signals from a moment after its program's start on: until then the
    // kernel drops them. So it is told until it hears.
    let heard = std::sync::atomic::AtomicBool::new(false);
    let pid = nix::unistd::Pid::from_raw(outer.id() as i32);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            wait_until(std::time::Duration::from_secs(20), || {
                nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
                heard.load(std::sync::atomic::Ordering::Relaxed)
            })
        });
        assert_eq!(lines.next().unwrap().unwrap(), "told");
        heard.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(outer.wait().unwrap().code(), Some(7));
}
