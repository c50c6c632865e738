//! Processes: clone3, pidfds and spawning, with the real kernel.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::ffi::CString;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use berth_linux::memfd::sealed_memfd;
use berth_linux::pidfd::{PidFd, waitid_any};
use berth_linux::process::{
    CloneArgs, CloneFlags, Executable, Fork, Spawn, clone3, exit_now, is_single_threaded, pipe, spawn_exec,
};
use berth_testkit::in_namespaces;
use common::{fork, in_child, single_threaded};

fn c(text: &str) -> CString {
    CString::new(text).unwrap()
}

fn shell(script: &str, fds: Vec<(OwnedFd, i32)>) -> Spawn {
    Spawn {
        exe: Executable::Path(c("/bin/sh")),
        argv: vec![c("sh"), c("-c"), c(script)],
        envp: vec![c("PATH=/usr/bin:/bin")],
        fds,
        cwd: None,
    }
}

#[test]
fn a_threaded_process_may_not_fork() {
    let (release, wait) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || wait.recv());
    assert!(!is_single_threaded());
    let error = clone3(CloneArgs::default()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ResourceBusy);
    drop(release);
    let _ = thread.join();
}

#[test]
fn a_child_of_a_new_pid_namespace_is_its_init_and_knows_its_thread_id() {
    in_namespaces(|| {
        single_threaded(|| {
            let status = in_child(CloneFlags::NEWPID | CloneFlags::NEWUTS, || {
                let own = rustix::process::getpid().as_raw_nonzero().get();
                let thread = rustix::thread::gettid().as_raw_nonzero().get();
                // The C library's cached thread id is what its recursive locks compare; std's own handle must work too.
                let _guard = std::io::stdout().lock();
                if own == 1 && thread == 1 { 42 } else { 1 }
            });
            assert_eq!((status.code, status.signal), (42, None));
        })
    });
}

#[test]
fn the_pidfd_tells_signals_and_liveness() {
    in_namespaces(|| {
        single_threaded(|| {
            // The child has the writing end too, so that its read never ends.
            let (reader, _writer) = pipe().unwrap();
            let child = fork(CloneArgs::default(), || {
                let mut byte = [0u8; 1];
                let _ = rustix::io::read(&reader, &mut byte);
                0
            });
            assert!(child.is_alive().unwrap());
            assert_eq!(child.wait(true).unwrap(), None);
            child.signal(libc::SIGKILL).unwrap();
            assert!(child.wait_ended(Some(Duration::from_secs(10))).unwrap());
            assert!(!child.is_alive().unwrap());
            let status = child.wait(false).unwrap().unwrap();
            assert_eq!((status.code, status.signal), (137, Some(libc::SIGKILL)));
            assert_eq!(child.signal(libc::SIGTERM).unwrap_err().raw_os_error(), Some(libc::ESRCH));
        })
    });
}

#[test]
fn a_child_with_its_parents_parent_is_reaped_by_that_one() {
    in_namespaces(|| {
        single_threaded(|| {
            let (reader, writer) = pipe().unwrap();
            let creator = fork(CloneArgs::default(), || {
                let flags = CloneFlags::PARENT;
                match clone3(CloneArgs { flags, ..CloneArgs::default() }).unwrap() {
                    Fork::Child => exit_now(7),
                    Fork::Parent { pid, .. } => {
                        rustix::io::write(&writer, &pid.as_raw_nonzero().get().to_ne_bytes()).unwrap();
                        0
                    }
                }
            });
            let mut bytes = [0u8; 4];
            std::fs::File::from(reader).read_exact(&mut bytes).unwrap();
            assert_eq!(creator.wait(false).unwrap().unwrap().code, 0);
            let (pid, status) = waitid_any(false).unwrap().unwrap();
            assert_eq!(pid.as_raw_nonzero().get(), i32::from_ne_bytes(bytes));
            assert_eq!(status.code, 7);
            assert!(waitid_any(true).unwrap().is_none());
        })
    });
}

#[test]
fn a_child_can_be_born_in_a_cgroup() {
    in_namespaces(|| {
        single_threaded(|| {
            let layout = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
            let Some(line) = layout.lines().find(|line| line.contains(" - cgroup2 ")) else {
                eprintln!("no cgroup v2 hierarchy is mounted: nothing to test");
                return;
            };
            let dir = format!("{}/berth-test-{}", line.split(' ').nth(4).unwrap(), std::process::id());
            std::fs::create_dir(&dir).unwrap();
            let folder = std::fs::File::open(&dir).unwrap();
            let args = CloneArgs { cgroup: Some(folder.as_fd()), ..CloneArgs::default() };
            let own = dir.rsplit('/').next().unwrap().to_owned();
            let child = fork(args, || {
                let text = std::fs::read_to_string("/proc/self/cgroup").unwrap();
                i32::from(!text.lines().any(|line| line.starts_with("0::") && line.ends_with(&own)))
            });
            let status = child.wait(false).unwrap().unwrap();
            std::fs::remove_dir(&dir).unwrap();
            assert_eq!(status.code, 0);
        })
    });
}

#[test]
fn a_spawned_program_gets_its_descriptors_by_number_and_no_others() {
    let (reader, writer) = pipe().unwrap();
    // Not close-on-exec and with numbers that collide with the targets: the worst that a careless library leaves behind.
    let (left, left_other) = pipe().unwrap();
    rustix::io::fcntl_setfd(&left, rustix::io::FdFlags::empty()).unwrap();
    let three = sealed_memfd("three", b"three", false).unwrap();
    let five = sealed_memfd("five", b"five", false).unwrap();
    let script = "cat <&3; echo; cat <&5; echo; ls /proc/self/fd | tr '\\n' ' '; echo; grep SigIgn /proc/self/status";
    let spawn = shell(script, vec![(five, 5), (writer, 1), (three, 3)]);
    let (_, pidfd) = spawn_exec(spawn).unwrap();
    let mut text = String::new();
    std::fs::File::from(reader).read_to_string(&mut text).unwrap();
    assert_eq!(PidFd::from(pidfd).wait(false).unwrap().unwrap().code, 0);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(&lines[..2], ["three", "five"]);
    // ls has one more open: the folder that it reads.
    let numbers: Vec<&str> = lines[2].split(' ').filter(|part| part.parse::<i32>().is_ok()).collect();
    assert_eq!(&numbers[..5], ["0", "1", "2", "3", "4"], "{text}");
    assert!(numbers.len() == 6 && numbers[5] == "5", "{text}");
    // The standard library ignores SIGPIPE in this process; the program must not.
    let ignored = u64::from_str_radix(lines[3].trim_start_matches("SigIgn:\t"), 16).unwrap();
    assert_eq!(ignored & 1 << (libc::SIGPIPE - 1), 0, "{text}");
    drop((left, left_other));
}

#[test]
fn spawning_what_cannot_be_executed_is_an_error_and_leaves_no_child() {
    let mut spawn = shell("true", Vec::new());
    spawn.exe = Executable::Path(c("/no/such/program"));
    let error = spawn_exec(spawn).unwrap_err();
    assert_eq!(error.raw_errno(), Some(libc::ENOENT));
    assert_eq!(error.to_string(), "spawn /no/such/program");

    let text = sealed_memfd("text", b"no program", true).unwrap();
    let mut spawn = shell("true", Vec::new());
    spawn.exe = Executable::Fd(text);
    assert_eq!(spawn_exec(spawn).unwrap_err().raw_errno(), Some(libc::ENOEXEC));
}

#[test]
fn many_threads_can_spawn_at_once_from_a_sealed_memfd() {
    let program = sealed_memfd("busybox", &std::fs::read("/bin/busybox").unwrap_or_default(), true).unwrap();
    if rustix::fs::fstat(&program).unwrap().st_size == 0 {
        berth_testkit::skip!("busybox is not installed");
    }
    std::thread::scope(|scope| {
        for number in 0..8 {
            let program = program.try_clone().unwrap();
            scope.spawn(move || {
                for _ in 0..10 {
                    let exe = Executable::Fd(program.try_clone().unwrap());
                    let argv = vec![c("sh"), c("-c"), c(&format!("exit {number}"))];
                    let spawn = Spawn { exe, argv, envp: Vec::new(), fds: Vec::new(), cwd: Some(c("/")) };
                    let (_, pidfd) = spawn_exec(spawn).unwrap();
                    assert_eq!(PidFd::from(pidfd).wait(false).unwrap().unwrap().code, number);
                }
            });
        }
    });
}
