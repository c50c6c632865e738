//! Making processes: clone3 for single-threaded callers, vfork-style spawn for threaded ones, execve and exit.
//! What a child does between fork and exec is its caller's business.

mod spawn;

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType};

use crate::pidfd::PidFd;
use crate::syscall::check;

pub use spawn::{Executable, Spawn, spawn_exec};

bitflags::bitflags! {
    /// What a new process gets of its own.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct CloneFlags: u64 {
        /// The child's parent is the caller's parent.
        const PARENT = libc::CLONE_PARENT as u64;
        /// A new time namespace (for the children of the child).
        const NEWTIME = 0x80;
        /// A new mount namespace.
        const NEWNS = libc::CLONE_NEWNS as u64;
        /// A new cgroup namespace.
        const NEWCGROUP = libc::CLONE_NEWCGROUP as u64;
        /// A new UTS namespace.
        const NEWUTS = libc::CLONE_NEWUTS as u64;
        /// A new IPC namespace.
        const NEWIPC = libc::CLONE_NEWIPC as u64;
        /// A new user namespace.
        const NEWUSER = libc::CLONE_NEWUSER as u64;
        /// A new PID namespace: the child is its init.
        const NEWPID = libc::CLONE_NEWPID as u64;
        /// A new network namespace.
        const NEWNET = libc::CLONE_NEWNET as u64;
    }
}

/// How to make a child by [`clone3`].
#[derive(Debug, Clone, Copy)]
pub struct CloneArgs<'a> {
    /// Namespaces and parentage.
    pub flags: CloneFlags,
    /// The cgroup v2 folder in which the child is born.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// The signal its parent gets when it ends. Not used with [`CloneFlags::PARENT`]: the kernel takes the caller's own.
    pub exit_signal: i32,
}

impl Default for CloneArgs<'_> {
    fn default() -> Self {
        Self { flags: CloneFlags::empty(), cgroup: None, exit_signal: libc::SIGCHLD }
    }
}

/// Which side of a [`clone3`] the caller is on.
#[derive(Debug)]
pub enum Fork {
    /// The new process.
    Child,
    /// The caller, holding the child.
    Parent {
        /// The child's pid in the caller's PID namespace.
        pid: Pid,
        /// The child's descriptor.
        pidfd: OwnedFd,
    },
}

/// The kernel's `struct clone_args`, version 2 (with cgroup).
#[repr(C, align(8))]
#[derive(Default)]
struct RawCloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// `CLONE_INTO_CGROUP`, above the 32 bits of the libc constants.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// The size of `struct clone_args` before it had a cgroup: for kernels that know no more.
const CLONE_ARGS_SIZE_V1: usize = 80;

/// Whether the caller is the only thread of its process: `unshare(CLONE_THREAD)` changes nothing and is refused to all others.
#[must_use]
pub fn is_single_threaded() -> bool {
    // SAFETY: with this flag alone unshare only checks; it takes no pointers.
    unsafe { libc::unshare(libc::CLONE_THREAD) == 0 }
}

/// Forks the calling process into a child with the given namespaces, cgroup and parent.
///
/// Only a process with one thread may call it (the child would otherwise hold copies of locks whose owners do not exist in it): others
/// get an error and nothing happens. Where the kernel cannot place the child in the cgroup by itself, the child joins before this
/// function returns on either side.
pub fn clone3(args: CloneArgs<'_>) -> io::Result<Fork> {
    if !is_single_threaded() {
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, "a process with several threads must not fork"));
    }
    let result = raw_clone3(&args, args.cgroup);
    match (result, args.cgroup) {
        (Err(error), Some(cgroup)) if matches!(error.raw_os_error(), Some(libc::E2BIG | libc::EINVAL)) => {
            clone3_then_join(&args, cgroup)
        }
        (result, _) => result,
    }
}

/// [`clone3`] with the child born in the PID namespace of `process` (a pidfd). The caller's later children are born in `own` again, the
/// PID namespace that the caller is in.
///
/// A caller that could not come back would have every later child in a namespace of somebody else's: it is ended instead. The kernel
/// refuses the way back only while it has no memory for a small structure.
pub fn clone3_beside(process: BorrowedFd<'_>, own: BorrowedFd<'_>, args: CloneArgs<'_>) -> io::Result<Fork> {
    let enter = |namespace| rustix::thread::move_into_thread_name_spaces(namespace, ThreadNameSpaceType::PROCESS_ID);
    enter(process)?;
    let forked = clone3(args);
    if matches!(forked, Ok(Fork::Child)) {
        return forked;
    }
    let back = |_| rustix::thread::move_into_link_name_space(own, Some(LinkNameSpaceType::ProcessID)).is_ok();
    if !(0..1000).any(back) {
        std::process::abort();
    }
    forked
}

fn raw_clone3(args: &CloneArgs<'_>, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Fork> {
    let mut pidfd: libc::c_int = -1;
    let mut raw = RawCloneArgs {
        flags: args.flags.bits() | libc::CLONE_PIDFD as u64,
        pidfd: ptr::from_mut(&mut pidfd) as u64,
        exit_signal: if args.flags.contains(CloneFlags::PARENT) { 0 } else { args.exit_signal as u64 },
        ..RawCloneArgs::default()
    };
    let mut size = CLONE_ARGS_SIZE_V1;
    if let Some(cgroup) = cgroup {
        raw.flags |= CLONE_INTO_CGROUP;
        raw.cgroup = cgroup.as_raw_fd() as u64;
        size = size_of::<RawCloneArgs>();
    }
    if let Some(address) = tid_address() {
        raw.flags |= (libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID) as u64;
        raw.child_tid = address;
    }
    // SAFETY: no CLONE_VM, so the child runs on a copy of this address space and the pointers in `raw` (alive for the whole call) are
    // written in the side they belong to; the process has one thread, so no lock is held by another; a zero stack means
    // a copy of the caller's. The size passed is that of a published version of the structure.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, ptr::from_mut(&mut raw), size) })?;
    match Pid::from_raw(pid as i32) {
        None => Ok(Fork::Child),
        Some(pid) => {
            // SAFETY: the kernel stored a new descriptor here because CLONE_PIDFD was given and the call succeeded.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Fork::Parent { pid, pidfd })
        }
    }
}

/// Where the C library keeps this thread's id, so that the child's copy is set right (as its own fork does). `None` where the kernel
/// does not tell; then only functions that trust the cached id (recursive locks, raise) would see the parent's.
fn tid_address() -> Option<u64> {
    let mut address: u64 = 0;
    // SAFETY: PR_GET_TID_ADDRESS stores one pointer to the address given, which is ours and large enough.
    let result = unsafe { libc::prctl(libc::PR_GET_TID_ADDRESS, ptr::from_mut(&mut address)) };
    (result == 0 && address != 0).then_some(address)
}

/// For kernels without CLONE_INTO_CGROUP: the child writes itself into the cgroup and reports through a pipe.
fn clone3_then_join(args: &CloneArgs<'_>, cgroup: BorrowedFd<'_>) -> io::Result<Fork> {
    let procs = rustix::fs::openat(cgroup, c"cgroup.procs", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    match raw_clone3(args, None)? {
        Fork::Child => {
            drop(reader);
            if let Err(errno) = rustix::io::write(&procs, b"0") {
                // The parent turns this into its error; when even this fails, it sees the end of the child.
                let _ = rustix::io::write(&writer, &errno.raw_os_error().to_ne_bytes());
                exit_now(1);
            }
            let _ = rustix::io::write(&writer, &0i32.to_ne_bytes());
            Ok(Fork::Child)
        }
        Fork::Parent { pid, pidfd } => {
            drop(writer);
            let mut report = [0u8; 4];
            let outcome = File::from(reader).read_exact(&mut report);
            let errno = i32::from_ne_bytes(report);
            if outcome.is_ok() && errno == 0 {
                return Ok(Fork::Parent { pid, pidfd });
            }
            if !args.flags.contains(CloneFlags::PARENT) {
                PidFd::from(pidfd).wait(false)?;
            }
            outcome?;
            Err(io::Error::from_raw_os_error(errno))
        }
    }
}

/// Pointers to C strings with the null that ends them: what execve takes.
pub(crate) fn c_pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}

/// Replaces this process by the program at `path`. Returns only the error.
#[must_use]
pub fn execve(path: &CStr, argv: &[CString], envp: &[CString]) -> io::Error {
    let (argv, envp) = (c_pointers(argv), c_pointers(envp));
    // SAFETY: all three are null-terminated and live until the call returns, which it does only on failure.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    io::Error::last_os_error()
}

/// Replaces this process by the program that the descriptor holds. Returns only the error. A script needs the descriptor
/// without close-on-exec, because its interpreter opens it again.
#[must_use]
pub fn fexecve(fd: BorrowedFd<'_>, argv: &[CString], envp: &[CString]) -> io::Error {
    let (argv, envp) = (c_pointers(argv), c_pointers(envp));
    // SAFETY: as in `execve`; the empty path with AT_EMPTY_PATH means the descriptor itself.
    unsafe { libc::syscall(libc::SYS_execveat, fd.as_raw_fd(), c"".as_ptr(), argv.as_ptr(), envp.as_ptr(), libc::AT_EMPTY_PATH) };
    io::Error::last_os_error()
}

/// Ends this process at once: no destructors, no exit handlers, no flushing. For forked children.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit takes no pointers and does not return.
    unsafe { libc::_exit(code) }
}

/// Makes `target` (0, 1, 2, ...) another name of `fd`, kept over exec. What `target` was before is closed.
///
/// Only for numbers that no owned descriptor of the process has: a forked child setting up its stdio.
pub fn dup_onto(fd: BorrowedFd<'_>, target: i32) -> io::Result<()> {
    if fd.as_raw_fd() == target {
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
        return Ok(());
    }
    // SAFETY: dup2 takes no pointers; that nobody owns `target` is this function's documented condition.
    check(unsafe { libc::dup2(fd.as_raw_fd(), target) }.into())?;
    Ok(())
}

/// Takes over a descriptor that this process was started with (3, 4, ... as the spawner arranged), marking it close-on-exec.
/// Each number can be taken only once and only before the process opens anything else.
pub fn take_inherited_fd(number: i32) -> io::Result<OwnedFd> {
    if number < 3 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: borrowed only for the two calls below, which check that it is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = rustix::io::fcntl_getfd(borrowed)?;
    if flags.contains(rustix::io::FdFlags::CLOEXEC) {
        // Every descriptor that this program makes is close-on-exec, and no inherited one can be: it was taken already.
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: open, inherited (no close-on-exec before this call), and marked so that it cannot be taken twice.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A pipe whose ends are close-on-exec: (reader, writer).
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?)
}
