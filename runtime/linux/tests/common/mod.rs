//! What the kernel tests share: a forked child whose verdict is its exit code.
#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(unsafe_code, reason = "the C library's fork, to leave the harness's threads behind")]

use std::panic::{AssertUnwindSafe, catch_unwind};

use berth_linux::pidfd::{ExitStatus, PidFd};
use berth_linux::process::{CloneArgs, CloneFlags, Fork, clone3, exit_now};

/// Forks a child that runs `body` and exits with its result. A panic in it is 101, with its text on standard error.
pub fn fork(args: CloneArgs<'_>, body: impl FnOnce() -> i32) -> PidFd {
    match clone3(args).expect("clone3") {
        Fork::Child => exit_now(catch_unwind(AssertUnwindSafe(body)).unwrap_or(101)),
        Fork::Parent { pidfd, .. } => pidfd.into(),
    }
}

/// Runs `body` in a process with one thread, which the harness's are not.
pub fn single_threaded(body: impl FnOnce()) {
    // SAFETY: the C library's own fork, which makes its heap usable in the child; the harness's other thread only waits.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        exit_now(if catch_unwind(AssertUnwindSafe(body)).is_ok() { 0 } else { 101 });
    }
    let child = PidFd::open(berth_linux::Pid::from_raw(pid).expect("fork")).expect("open the child");
    let status = child.wait(false).expect("wait").expect("ended");
    assert!(status.success(), "failed in its process: {status:?}");
}

/// Runs `body` in a child and returns how it ended.
pub fn in_child(flags: CloneFlags, body: impl FnOnce() -> i32) -> ExitStatus {
    fork(CloneArgs { flags, ..CloneArgs::default() }, body).wait(false).expect("wait").expect("ended")
}

/// The numbers of this process's open descriptors.
pub fn open_fds() -> Vec<i32> {
    let mut fds: Vec<i32> = std::fs::read_dir("/proc/self/fd")
        .expect("/proc/self/fd")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    fds.sort_unstable();
    // The folder itself was open while it was read.
    fds.pop();
    fds
}
