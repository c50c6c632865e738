//! Control groups of the machine: made, entered, killed, frozen, removed.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use berth_cgroup::{Cgroup, CgroupPath, Error, Layout, Resources};
use berth_testkit::{in_namespaces, wait_until};
use common::{PATIENCE, Shell, create, layouts};

fn resources(json: &str) -> Resources {
    serde_json::from_str(json).unwrap()
}

#[test]
fn a_process_is_put_into_every_hierarchy_and_the_cgroup_removed_from_all() {
    in_namespaces(|| {
        for (name, layout) in layouts() {
            let cgroup = create(&layout);
            assert!(cgroup.exists());
            let shell = Shell::start_in(&cgroup);
            let text = std::fs::read_to_string(format!("/proc/{}/cgroup", shell.child.id())).unwrap();
            let inside = text.lines().filter(|line| line.ends_with(&cgroup.path().to_string())).count();
            assert_eq!(inside, cgroup.dirs().count(), "{name}: {text}");
            assert_eq!(cgroup.procs().unwrap(), [shell.pid()], "{name}");
            let parent = Cgroup::open(&layout, &cgroup.path().parent().unwrap()).unwrap();
            assert_eq!(parent.children().unwrap(), ["inner"]);
            assert_eq!(parent.procs().unwrap(), [shell.pid()], "{name}");
            shell.end();
            // With what is below, and when it is gone already.
            parent.delete().unwrap();
            assert!(!cgroup.exists() && !parent.exists(), "{name}");
            parent.delete().unwrap();
            assert!(cgroup.procs().unwrap().is_empty());
            cgroup.kill_all().unwrap();
            assert!(matches!(Cgroup::open(&layout, cgroup.path()), Err(Error::NotFound { .. })));
        }
    });
}

#[test]
fn whoever_is_put_into_a_part_of_the_hierarchies_is_found_and_killed() {
    in_namespaces(|| {
        for (name, layout) in layouts() {
            let made = create(&layout);
            for nth in 0..made.dirs().count() {
                let cgroup = Cgroup::create(&layout, made.path()).unwrap();
                // One of the hierarchies refuses, as if whoever attaches it had been killed there.
                let folder = cgroup.dirs().nth(nth).unwrap().to_owned();
                std::fs::remove_dir(&folder).unwrap();
                let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
                let pid = berth_linux::Pid::from_raw(child.id().cast_signed()).unwrap();
                assert!(cgroup.attach(pid).is_err(), "{name}: {}", folder.display());
                std::fs::create_dir(&folder).unwrap();
                let is_inside = |dir: &std::path::Path| {
                    let procs = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap();
                    procs.lines().any(|line| line == child.id().to_string())
                };
                if cgroup.dirs().any(is_inside) {
                    assert_eq!(cgroup.procs().unwrap(), [pid], "{name}: {}", folder.display());
                    cgroup.kill_all().unwrap();
                } else {
                    child.kill().unwrap();
                }
                assert_eq!(child.wait().unwrap().signal(), Some(9), "{name}");
                cgroup.delete().unwrap();
            }
        }
    });
}

#[test]
fn creating_what_exists_takes_it() {
    in_namespaces(|| {
        let layout = Layout::detect().unwrap();
        let cgroup = create(&layout);
        let shell = Shell::start_in(&cgroup);
        let again = Cgroup::create(&layout, cgroup.path()).unwrap();
        assert_eq!(again.procs().unwrap(), [shell.pid()]);
        let systemd = CgroupPath::parse("a.slice:b:c").unwrap();
        assert!(matches!(Cgroup::create(&layout, &systemd), Err(Error::NoProcess { .. })));
    });
}

#[test]
fn a_busy_cgroup_is_not_removed_and_said_so() {
    in_namespaces(|| {
        let layout = Layout::detect().unwrap();
        let cgroup = create(&layout);
        let _shell = Shell::start_in(&cgroup);
        let error = cgroup.delete().unwrap_err();
        assert_eq!(error.raw_errno(), Some(rustix::io::Errno::BUSY.raw_os_error()), "{error}");
        assert!(error.to_string().contains("inner"), "{error}");
    });
}

#[test]
fn all_processes_are_killed_even_those_that_fork() {
    in_namespaces(|| {
        for (name, layout) in layouts() {
            let cgroup = create(&layout);
            let inner = Cgroup::create(&layout, &cgroup.path().child("deeper").unwrap()).unwrap();
            // A v2 group that hands controllers down holds no processes itself.
            let wide = Cgroup::create(&layout, &cgroup.path().child("wide").unwrap()).unwrap();
            if !cgroup.is_v2() {
                cgroup.apply(&resources(r#"{"pids":{"limit":150}}"#)).unwrap();
            }
            let mut forker = Shell::start_in(&wide);
            // Bounded: it makes processes for a while, each of which makes others.
            forker.send(
                "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); (sleep 0.02; sleep 0.02; true) & [ $((i % 50)) = 0 ] && wait; done",
            );
            let sleeper = Shell::start_in(&inner);
            assert!(wait_until(PATIENCE, || cgroup.procs().unwrap().len() > 10), "{name}");
            assert!(cgroup.kill_and_wait(PATIENCE).unwrap(), "{name}");
            assert!(cgroup.procs().unwrap().is_empty(), "{name}");
            let mut forker = forker.child;
            assert_eq!(forker.wait().unwrap().signal(), Some(9), "{name}");
            assert_eq!(sleeper.end().signal(), Some(9), "{name}");
            cgroup.delete().unwrap();
        }
    });
}

#[test]
fn a_cgroup_can_be_removed_right_after_the_kill() {
    in_namespaces(|| {
        for (name, layout) in layouts() {
            let cgroup = create(&layout);
            let mut shells: Vec<Shell> = (0..5).map(|_| Shell::start_in(&cgroup)).collect();
            cgroup.kill_all().unwrap();
            cgroup.delete().unwrap_or_else(|error| panic!("{name}: {error}"));
            for shell in &mut shells {
                assert_eq!(shell.child.wait().unwrap().signal(), Some(9));
            }
        }
    });
}

#[test]
fn frozen_processes_stand_still_and_can_be_killed() {
    in_namespaces(|| {
        for (name, layout) in layouts() {
            let cgroup = create(&layout);
            let mut shell = Shell::start_in(&cgroup);
            if name == "v1 without a freezer" {
                assert!(matches!(cgroup.freeze(), Err(Error::MissingController { .. })));
                cgroup.thaw().unwrap();
                continue;
            }
            assert_eq!(shell.ask("echo 1"), "1");
            assert!(!cgroup.is_frozen().unwrap());
            cgroup.freeze().unwrap();
            assert!(cgroup.is_frozen().unwrap(), "{name}");
            let state = match cgroup.v1_dir("freezer") {
                Some(dir) => std::fs::read_to_string(dir.join("freezer.state")).unwrap(),
                None => std::fs::read_to_string(cgroup.v2_dir().unwrap().join("cgroup.events")).unwrap(),
            };
            assert!(state.contains("FROZEN") || state.contains("frozen 1"), "{name}: {state}");
            cgroup.thaw().unwrap();
            assert_eq!(shell.ask("echo 2"), "2");
            cgroup.freeze().unwrap();
            assert!(cgroup.kill_and_wait(PATIENCE).unwrap(), "{name}");
            assert_eq!(shell.child.wait().unwrap().signal(), Some(9), "{name}");
        }
    });
}

#[test]
fn a_signal_reaches_every_process_once() {
    in_namespaces(|| {
        for (name, layout) in layouts() {
            let cgroup = create(&layout);
            let mut shell = Shell::start_in(&cgroup);
            assert_eq!(shell.ask("trap 'echo got' USR1; echo ready"), "ready");
            cgroup.signal_all(10).unwrap();
            assert_eq!(shell.ask("echo after"), "got", "{name}");
        }
    });
}

#[test]
fn waiting_for_an_empty_cgroup_ends_with_its_time() {
    in_namespaces(|| {
        let cgroup = create(&Layout::detect().unwrap());
        let shell = Shell::start_in(&cgroup);
        assert!(!cgroup.wait_empty(Duration::from_millis(20)).unwrap());
        shell.end();
        assert!(cgroup.wait_empty(PATIENCE).unwrap());
    });
}
