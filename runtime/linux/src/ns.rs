//! Namespaces as descriptors: open, identify, enter, make, and id maps. The only caller of setns.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags};

use crate::process::CloneFlags;
use crate::syscall::check;
use crate::{Error, Result};

/// The kinds of namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NamespaceKind {
    /// Network.
    Net,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Host and domain name.
    Uts,
    /// Process ids.
    Pid,
    /// Mounts.
    Mount,
    /// User and group ids, capabilities.
    User,
    /// Root of the cgroup view.
    Cgroup,
    /// Monotonic and boot clocks.
    Time,
}

impl NamespaceKind {
    /// All kinds, user first: entering it first is what gives the right to enter the others.
    pub const ALL: [Self; 8] = [Self::User, Self::Mount, Self::Pid, Self::Net, Self::Ipc, Self::Uts, Self::Cgroup, Self::Time];

    /// The flag that clone3 and unshare take.
    #[must_use]
    pub fn clone_flag(self) -> CloneFlags {
        match self {
            Self::Net => CloneFlags::NEWNET,
            Self::Ipc => CloneFlags::NEWIPC,
            Self::Uts => CloneFlags::NEWUTS,
            Self::Pid => CloneFlags::NEWPID,
            Self::Mount => CloneFlags::NEWNS,
            Self::User => CloneFlags::NEWUSER,
            Self::Cgroup => CloneFlags::NEWCGROUP,
            Self::Time => CloneFlags::NEWTIME,
        }
    }

    /// The name of its link in `/proc/<pid>/ns`.
    #[must_use]
    pub fn proc_name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Pid => "pid",
            Self::Mount => "mnt",
            Self::User => "user",
            Self::Cgroup => "cgroup",
            Self::Time => "time",
        }
    }

    fn link_type(self) -> LinkNameSpaceType {
        match self {
            Self::Net => LinkNameSpaceType::Network,
            Self::Ipc => LinkNameSpaceType::InterProcessCommunication,
            Self::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
            Self::Pid => LinkNameSpaceType::ProcessID,
            Self::Mount => LinkNameSpaceType::Mount,
            Self::User => LinkNameSpaceType::User,
            Self::Cgroup => LinkNameSpaceType::ControlGroup,
            Self::Time => LinkNameSpaceType::Time,
        }
    }
}

/// `NS_GET_USERNS` of linux/nsfs.h: `_IO(0xb7, 0x1)`.
const NS_GET_USERNS: u32 = 0xb701;
/// `NS_GET_NSTYPE` of linux/nsfs.h: `_IO(0xb7, 0x3)`.
const NS_GET_NSTYPE: u32 = 0xb703;

fn open_checked(path: &str, kind: NamespaceKind) -> Result<OwnedFd> {
    let fail = |source| Error::OpenNamespace { subject: path.to_owned(), source };
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|e| fail(e.into()))?;
    match namespace_type(fd.as_fd()) {
        Ok(found) if found == kind.clone_flag() => Ok(fd),
        Ok(_) => Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "a namespace of another kind"))),
        Err(_) => Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "not a namespace file"))),
    }
}

fn namespace_type(fd: BorrowedFd<'_>) -> io::Result<CloneFlags> {
    // SAFETY: this request takes no argument and returns the type as its result.
    let bits = check(unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE as _) }.into())?;
    Ok(CloneFlags::from_bits_truncate(bits as u64))
}

/// Opens a namespace of a process, or of the calling thread.
pub fn open_ns(pid: Option<Pid>, kind: NamespaceKind) -> Result<OwnedFd> {
    match pid {
        Some(pid) => open_checked(&format!("/proc/{}/ns/{}", pid.as_raw_nonzero(), kind.proc_name()), kind),
        None => open_checked(&format!("/proc/thread-self/ns/{}", kind.proc_name()), kind),
    }
}

/// Opens the PID or time namespace in which the next child of the calling thread will live. For other kinds it is [`open_ns`].
pub fn open_ns_for_children(kind: NamespaceKind) -> Result<OwnedFd> {
    match kind {
        NamespaceKind::Pid | NamespaceKind::Time => {
            open_checked(&format!("/proc/thread-self/ns/{}_for_children", kind.proc_name()), kind)
        }
        _ => open_ns(None, kind),
    }
}

/// Opens a namespace by the path of a bind of it (`/run/netns/x`, `/proc/1/ns/net`) and checks its kind.
pub fn open_ns_path(path: &Path, kind: NamespaceKind) -> Result<OwnedFd> {
    match path.to_str() {
        Some(path) => open_checked(path, kind),
        None => Err(Error::OpenNamespace {
            subject: path.to_string_lossy().into_owned(),
            source: io::Error::from_raw_os_error(libc::EINVAL),
        }),
    }
}

/// Moves the calling thread into a namespace. A PID or time namespace takes effect for its next child. Mount and user namespaces need a
/// process with one thread.
pub fn setns(fd: BorrowedFd<'_>, kind: NamespaceKind) -> Result<()> {
    rustix::thread::move_into_link_name_space(fd, Some(kind.link_type()))
        .map_err(|e| Error::EnterNamespace { subject: kind.proc_name().to_owned(), source: e.into() })
}

/// Moves the calling thread into several namespaces of a process at once: all or none.
pub fn setns_of_process(pidfd: BorrowedFd<'_>, flags: CloneFlags) -> Result<()> {
    let types = ThreadNameSpaceType::from_bits_retain((flags - CloneFlags::PARENT).bits() as u32);
    rustix::thread::move_into_thread_name_spaces(pidfd, types)
        .map_err(|e| Error::EnterNamespace { subject: "of process".to_owned(), source: e.into() })
}

/// Gives the calling thread new namespaces. PID and time take effect for its next child.
pub fn unshare(flags: CloneFlags) -> Result<()> {
    let namespaces = UnshareFlags::from_bits_retain((flags - CloneFlags::PARENT).bits() as u32);
    // SAFETY: the flags are namespaces alone: never CLONE_FILES, so no thread loses sight of another's descriptors.
    unsafe { rustix::thread::unshare_unsafe(namespaces) }
        .map_err(|e| Error::Unshare { subject: format!("{namespaces:?}"), source: e.into() })
}

/// Runs a function inside a network namespace, on a thread made for it that ends with it: no thread of a pool ever has another
/// namespace than its neighbours. The function must not start threads or tasks that outlive it.
pub fn with_netns<T: Send>(netns: BorrowedFd<'_>, run: impl FnOnce() -> T + Send) -> Result<T> {
    on_own_thread(|| {
        setns(netns, NamespaceKind::Net)?;
        Ok(run())
    })
}

/// [`with_netns`] for many namespaces, one after another on the same thread: a thread costs more than entering. One that cannot be entered
/// yields none.
pub fn in_each_netns<'a, T: Send>(
    namespaces: impl Iterator<Item = BorrowedFd<'a>> + Send,
    mut run: impl FnMut() -> T + Send,
) -> Result<Vec<Option<T>>> {
    on_own_thread(|| Ok(namespaces.map(|netns| setns(netns, NamespaceKind::Net).ok().map(|()| run())).collect()))
}

fn on_own_thread<T: Send>(run: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("in-netns".to_owned()).spawn_scoped(scope, run);
        let thread = thread.map_err(|source| Error::Thread { subject: "in-netns".to_owned(), source })?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// The identity of a namespace of a process, or of the calling thread, as [`ns_id`] has it: without opening it.
pub fn ns_id_of(pid: Option<Pid>, kind: NamespaceKind) -> Result<(u64, u64)> {
    let path = match pid {
        Some(pid) => format!("/proc/{}/ns/{}", pid.as_raw_nonzero(), kind.proc_name()),
        None => format!("/proc/thread-self/ns/{}", kind.proc_name()),
    };
    match rustix::fs::stat(&path) {
        Ok(stat) => Ok((stat.st_dev, stat.st_ino)),
        Err(errno) => Err(Error::OpenNamespace { subject: path, source: errno.into() }),
    }
}

/// The identity of a namespace: (device, inode). Unique among the namespaces that live now.
pub fn ns_id(fd: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(fd)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// The user namespace that a namespace belongs to.
pub fn owner(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: this request takes no argument and returns a new descriptor.
    let owner = crate::syscall::check_fd(unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_USERNS as _) }.into())?;
    rustix::io::fcntl_setfd(&owner, rustix::io::FdFlags::CLOEXEC)?;
    Ok(owner)
}

/// A range of ids in a user namespace and where they are outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdMap {
    /// The first id inside.
    pub inside: u32,
    /// The first id outside.
    pub outside: u32,
    /// How many.
    pub size: u32,
}

/// Writes the id maps of the user namespace of `pid`. The kernel takes each map once and whole.
pub fn write_id_maps(pid: Pid, uids: &[IdMap], gids: &[IdMap]) -> Result<()> {
    write_map(pid, "gid_map", gids)?;
    write_map(pid, "uid_map", uids)
}

/// Forbids setgroups in the user namespace of `pid`; to be written before the gid map. Needed when the writer lacks CAP_SETGID outside: otherwise
/// dropping a group could give rights that the group denied.
pub fn deny_setgroups(pid: Pid) -> Result<()> {
    let path = format!("/proc/{}/setgroups", pid.as_raw_nonzero());
    write_proc(&path, b"deny").map_err(|source| Error::IdMap { subject: path, source })
}

fn write_map(pid: Pid, file: &str, maps: &[IdMap]) -> Result<()> {
    let path = format!("/proc/{}/{file}", pid.as_raw_nonzero());
    let text: String = maps.iter().map(|map| format!("{} {} {}\n", map.inside, map.outside, map.size)).collect();
    write_proc(&path, text.as_bytes()).map_err(|source| Error::IdMap { subject: path, source })
}

fn write_proc(path: &str, bytes: &[u8]) -> io::Result<()> {
    let fd = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    let written = rustix::io::retry_on_intr(|| rustix::io::write(&fd, bytes))?;
    if written == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}
