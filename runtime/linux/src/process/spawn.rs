//! Starting a program from a process with threads: clone(CLONE_VM | CLONE_VFORK) on a stack of its own and an immediate exec.

use std::ffi::{CString, c_void};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;

use super::c_pointers;
use crate::pidfd::PidFd;
use crate::signalfd::reset_signal_handlers;
use crate::syscall::check;
use crate::{Error, Result};

/// The program to start.
#[derive(Debug)]
pub enum Executable {
    /// A path of the caller's mount namespace. No search in `$PATH`.
    Path(CString),
    /// An open program (a memfd); ELF only, since an interpreter could not open a close-on-exec script again.
    Fd(OwnedFd),
}

/// A program to start with [`spawn_exec`].
#[derive(Debug)]
pub struct Spawn {
    /// What to run.
    pub exe: Executable,
    /// Its arguments, name included.
    pub argv: Vec<CString>,
    /// Its environment.
    pub envp: Vec<CString>,
    /// Its descriptors and their numbers. 0, 1 and 2 are /dev/null where not given; no other descriptor is passed.
    pub fds: Vec<(OwnedFd, RawFd)>,
    /// Its working folder; the caller's when not given.
    pub cwd: Option<CString>,
}

const STACK_SIZE: usize = 64 * 1024;
/// Far above what anybody passes, and low enough that counting above it cannot overflow.
const MAX_TARGET: RawFd = 4096;

/// What the child needs, prepared before the clone because it must not allocate.
struct ChildPlan {
    exe_path: *const libc::c_char,
    exe_fd: RawFd,
    argv: *const *const libc::c_char,
    envp: *const *const libc::c_char,
    cwd: *const libc::c_char,
    /// (source, target), by rising target; sources are rewritten by the child to copies above all targets.
    fds: *mut (RawFd, RawFd),
    fd_count: usize,
    /// The errno of the step that failed, 0 when exec succeeded. Written by the child in the shared memory.
    errno: i32,
}

/// Starts a program in a new session with default signal handling and only the given descriptors. Usable from any thread. The caller
/// owns the child and reaps it through the descriptor. When the program cannot be executed, that is the error.
pub fn spawn_exec(spawn: Spawn) -> Result<(Pid, OwnedFd)> {
    let subject = match &spawn.exe {
        Executable::Path(path) => path.to_string_lossy().into_owned(),
        Executable::Fd(_) => spawn.argv.first().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
    };
    spawn_inner(spawn).map_err(|source| Error::Spawn { subject, source })
}

fn spawn_inner(spawn: Spawn) -> io::Result<(Pid, OwnedFd)> {
    let null = rustix::fs::open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let mut fds: Vec<(RawFd, RawFd)> = spawn.fds.iter().map(|(fd, target)| (fd.as_raw_fd(), *target)).collect();
    for target in 0..3 {
        if !fds.iter().any(|(_, other)| *other == target) {
            fds.push((null.as_raw_fd(), target));
        }
    }
    fds.sort_by_key(|(_, target)| *target);
    if fds.windows(2).any(|pair| pair[0].1 == pair[1].1) || fds[0].1 < 0 || fds[fds.len() - 1].1 > MAX_TARGET {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let (argv, envp) = (c_pointers(&spawn.argv), c_pointers(&spawn.envp));
    let (exe_path, exe_fd) = match &spawn.exe {
        Executable::Path(path) => (path.as_ptr(), -1),
        Executable::Fd(fd) => (ptr::null(), fd.as_raw_fd()),
    };
    let mut plan = ChildPlan {
        exe_path,
        exe_fd,
        argv: argv.as_ptr(),
        envp: envp.as_ptr(),
        cwd: spawn.cwd.as_ref().map_or(ptr::null(), |cwd| cwd.as_ptr()),
        fds: fds.as_mut_ptr(),
        fd_count: fds.len(),
        errno: 0,
    };
    let (pid, pidfd) = clone_vfork(&mut plan)?;
    // SAFETY: the child has exec'd or ended (CLONE_VFORK), so nothing writes this any more; the read must not be taken from before.
    let errno = unsafe { ptr::read_volatile(&raw const plan.errno) };
    if errno != 0 {
        PidFd::from(pidfd).wait(false)?;
        return Err(io::Error::from_raw_os_error(errno));
    }
    Ok((pid, pidfd))
}

fn clone_vfork(plan: &mut ChildPlan) -> io::Result<(Pid, OwnedFd)> {
    let mut stack: Vec<u128> = Vec::with_capacity(STACK_SIZE / size_of::<u128>());
    let mut pidfd: libc::c_int = -1;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: both sets are plain data that the calls fill in; the mask is this thread's only. All signals stay blocked over the clone,
    // so that no handler of ours runs in the child on shared memory.
    let old_mask = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut old: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old);
        old
    };
    // SAFETY: `top` is one past the end of our own allocation and 16-byte aligned; the stack, the plan and all it points to outlive the
    // child's use of them, because CLONE_VFORK suspends this thread until the child has exec'd or exited. The child shares this
    // thread's TLS only while it is suspended.
    let (result, error) = unsafe {
        let top = stack.as_mut_ptr().add(stack.capacity()).cast::<c_void>();
        let result = libc::clone(run_child, top, flags, ptr::from_mut(plan).cast(), ptr::from_mut(&mut pidfd));
        (result, io::Error::last_os_error())
    };
    // SAFETY: restores the mask that the first call stored.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &old_mask, ptr::null_mut()) };
    match Pid::from_raw(result) {
        // SAFETY: CLONE_PIDFD stored a new descriptor of ours.
        Some(pid) if result > 0 => Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) })),
        _ => Err(error),
    }
}

/// The child: system calls only, no allocation, no locks, no panics, no return but to `_exit`.
extern "C" fn run_child(plan: *mut c_void) -> libc::c_int {
    let plan = plan.cast::<ChildPlan>();
    // SAFETY: the parent passed its plan and sleeps until we exec or exit: this is the only access to it.
    let plan = unsafe { &mut *plan };
    let error = match child_steps(plan) {
        Ok(never) => match never {},
        Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
    };
    // SAFETY: as above; volatile, because the compiler cannot see that the parent reads it.
    unsafe { ptr::write_volatile(&raw mut plan.errno, error) };
    127
}

fn child_steps(plan: &mut ChildPlan) -> io::Result<std::convert::Infallible> {
    // SAFETY: pointers and length are those of the parent's vector, which outlives us; nobody else uses it now.
    let fds = unsafe { std::slice::from_raw_parts_mut(plan.fds, plan.fd_count) };
    reset_signal_handlers();
    // SAFETY: no pointers. It cannot fail: a new process leads no group.
    unsafe { libc::setsid() };
    if !plan.cwd.is_null() {
        // SAFETY: a C string of the parent's that outlives us.
        check(unsafe { libc::chdir(plan.cwd) }.into())?;
    }
    place_fds(fds, &mut plan.exe_fd)?;
    // SAFETY: an empty set; the handlers are default by now, so that a pending signal does what it would do to the new program.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
    }
    // SAFETY: all strings and arrays are null-terminated and outlive us.
    unsafe {
        if plan.exe_path.is_null() {
            libc::syscall(libc::SYS_execveat, plan.exe_fd, c"".as_ptr(), plan.argv, plan.envp, libc::AT_EMPTY_PATH);
        } else {
            libc::execve(plan.exe_path, plan.argv, plan.envp);
        }
    }
    Err(io::Error::last_os_error())
}

/// Gives each descriptor its number and leaves every other one close-on-exec.
fn place_fds(fds: &mut [(RawFd, RawFd)], exe_fd: &mut RawFd) -> io::Result<()> {
    let above = fds.iter().fold(0, |max, (_, target)| max.max(*target)) + 1;
    // First copy all sources above all targets, so that no step overwrites a source that a later one needs.
    for (source, _) in fds.iter_mut() {
        *source = lift(*source, above)?;
    }
    if *exe_fd >= 0 {
        *exe_fd = lift(*exe_fd, above)?;
    }
    let mut next = 0;
    for (source, target) in fds.iter() {
        if next < *target {
            cloexec_range(next, *target - 1)?;
        }
        // SAFETY: numbers only, in this process's own copy of the descriptor table; dup2 clears close-on-exec.
        check(unsafe { libc::dup2(*source, *target) }.into())?;
        next = *target + 1;
    }
    cloexec_range(next, RawFd::MAX)
}

fn lift(fd: RawFd, above: RawFd) -> io::Result<RawFd> {
    // SAFETY: numbers only, in this process's own copy of the descriptor table.
    let copy = check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, above) }.into())?;
    Ok(copy as RawFd)
}

fn cloexec_range(first: RawFd, last: RawFd) -> io::Result<()> {
    // SAFETY: numbers only, in this process's own copy of the descriptor table.
    check(unsafe { libc::syscall(libc::SYS_close_range, first as u32, last as u32, libc::CLOSE_RANGE_CLOEXEC) })?;
    Ok(())
}
