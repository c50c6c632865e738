//! The container's filesystem: mounts, devices, console, and the change of root.
//!
//! Every path is resolved inside the new root (`RESOLVE_IN_ROOT`, no magic links) to a descriptor, and what is attached is
//! attached to that descriptor: a link in the image, or one that is swapped in meanwhile, changes nothing outside.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use berth_linux::beneath::Root;
use berth_linux::memfd::proc_path;
use berth_linux::mount::{self, AttrChange, MountAttrs, MoveMountFlags, Propagation};
use berth_linux::netlink::{self, NetlinkSocket};
use rustix::fs::{CWD, FileType, Mode, OFlags};

use super::devices::{make_device, make_link, mount_console, open_terminal};
use super::paths::{self, Covers};
use super::{Container, Done, During, Failure, PROC_MAGIC, cgroupfs, require_filesystem};
use crate::channel::Channel;
use crate::launch::Stdio;
use crate::plan::{Change, Mount, Source, Step, is_coverable};

const ENOSYS: i32 = 38;
const MS_RDONLY: u64 = 1;
const MS_NOSUID: u64 = 2;
const MS_NODEV: u64 = 4;
const MS_NOEXEC: u64 = 8;
const MS_NOATIME: u64 = 1024;
const MS_NODIRATIME: u64 = 2048;
const MS_STRICTATIME: u64 = 1 << 24;
const MS_NOSYMFOLLOW: u64 = 256;
const MS_REMOUNT_BIND: u64 = 32 | 4096;

/// Attaches a detached tree to what a descriptor names.
pub(super) fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> berth_linux::Result<()> {
    mount::move_mount(tree, target, Path::new(""), MoveMountFlags::empty())
}

/// What remains to be done to a mount once it is attached: where the kernel cannot change detached ones.
#[must_use]
pub(super) struct Later(Option<Change>);

/// Changes attributes of a detached tree. A kernel without mount_setattr does it with a remount after it is attached.
pub(super) fn set_attributes(tree: BorrowedFd<'_>, recursive: bool, change: Change) -> berth_linux::Result<Later> {
    if change.is_empty() {
        return Ok(Later(None));
    }
    let attr = AttrChange { set: change.set, clear: change.clear, ..AttrChange::default() };
    match mount::mount_setattr(tree, Path::new(""), recursive, attr) {
        Err(error) if error.raw_errno() == Some(ENOSYS) => Ok(Later(Some(change))),
        result => result.map(|()| Later(None)),
    }
}

impl Later {
    pub(super) fn finish(self, tree: BorrowedFd<'_>) -> berth_linux::Result<()> {
        let Some(change) = self.0 else { return Ok(()) };
        let path = proc_path(tree);
        // statvfs has the same bits as mount(2) for these, but for the access times.
        let now = rustix::fs::fstatvfs(tree).map_or(0, |stat| stat.f_flag.bits())
            & (MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME);
        let flags = (now & !legacy_flags(change.clear)) | legacy_flags(change.set);
        mount::mount_legacy(None, Path::new(&path), None, flags | MS_REMOUNT_BIND, None)
    }
}

fn legacy_flags(attrs: MountAttrs) -> u64 {
    [
        (MountAttrs::RDONLY, MS_RDONLY),
        (MountAttrs::NOSUID, MS_NOSUID),
        (MountAttrs::NODEV, MS_NODEV),
        (MountAttrs::NOEXEC, MS_NOEXEC),
        (MountAttrs::NOATIME, MS_NOATIME),
        (MountAttrs::NODIRATIME, MS_NODIRATIME),
        (MountAttrs::STRICTATIME, MS_STRICTATIME),
        (MountAttrs::NOSYMFOLLOW, MS_NOSYMFOLLOW),
    ]
    .iter()
    .filter(|(attr, _)| attrs.contains(*attr))
    .fold(0, |flags, (_, flag)| flags | flag)
}

/// Sets how mounts and unmounts spread, for an attached mount.
pub(super) fn set_propagation(mount: BorrowedFd<'_>, recursive: bool, propagation: Propagation) -> berth_linux::Result<()> {
    let attr = AttrChange { propagation: Some(propagation), ..AttrChange::default() };
    match mount::mount_setattr(mount, Path::new(""), recursive, attr) {
        Err(error) if error.raw_errno() == Some(ENOSYS) => {
            let flag = match propagation {
                Propagation::Shared => 1 << 20,
                Propagation::Slave => 1 << 19,
                Propagation::Private => 1 << 18,
                Propagation::Unbindable => 1 << 17,
            };
            let flags = flag | if recursive { 16384 } else { 0 };
            mount::mount_legacy(None, Path::new(&proc_path(mount)), None, flags, None)
        }
        result => result,
    }
}

/// Builds everything below the new root, which is attached over the old one but not entered yet.
pub(super) fn build(
    container: &mut Container,
    channel: &Channel,
    stdio: &mut Stdio,
    master: &mut Option<OwnedFd>,
    warnings: &mut Vec<String>,
) -> Done {
    // Nothing that is mounted from here on may reach the machine's own mount namespace.
    let old_root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).during("open /")?;
    set_propagation(old_root.as_fd(), true, Propagation::Slave).during("detach mounts from the machine's")?;
    let Some(tree) = &container.root else { return Err(Failure::new("no root filesystem")) };
    mount::move_mount(tree.as_fd(), CWD, Path::new("/"), MoveMountFlags::empty()).during("attach root filesystem")?;
    let default = container.plan.propagation.unwrap_or(Propagation::Slave);
    // The root cannot be changed to a shared mount: it becomes one afterwards.
    let before = if default == Propagation::Shared { Propagation::Private } else { default };
    set_propagation(tree.as_fd(), true, before).during("set propagation of the root filesystem")?;
    let root = Root::in_root(tree.try_clone().during("duplicate descriptor")?);
    let mut covers = Covers::default();
    let mut trees = std::mem::take(&mut container.trees);
    for (number, step) in std::mem::take(&mut container.plan.steps).iter().enumerate() {
        let tree = trees.iter().position(|(of, _)| *of == number).map(|at| trees.swap_remove(at).1);
        match step {
            Step::Mount(mount) if mount.source == Source::Cgroup => {
                container.settle(channel)?;
                cgroupfs::mount_view(&root, mount, container, warnings)?;
            }
            Step::Mount(mount) => mount_one(&root, mount, tree, default)?,
            Step::Device(device) => make_device(&root, device, tree)?,
            Step::Link { path, target, replace } => make_link(&root, path, target, *replace)?,
            Step::Console => {
                let Stdio::Pty { width, height } = *stdio else {
                    return Err(Failure::new("process.terminal is set but standard streams were given"));
                };
                let (new_master, slave) = open_terminal(&root, (width, height))?;
                mount_console(&root, &slave)?;
                (*master, *stdio) = (Some(new_master), slave);
            }
            Step::Mask(path) => paths::mask(&root, path, &mut covers)?,
            Step::ReadOnly(path) => paths::read_only(&root, path)?,
        }
    }
    container.settle(channel)?;
    // As runc does: a working directory that the image lacks is made.
    root.mkdir_all(&container.plan.process.cwd, Mode::from(0o755)).map(drop).or_else(|error| match error.raw_os_error() {
        Some(30) => Ok(()),
        _ => Err(error).during(format_args!("make working directory {}", container.plan.process.cwd.display())),
    })
}

/// Makes the new root the only one.
pub(super) fn change_root(container: &mut Container) -> Done {
    let Some(root) = container.root.take() else { return Err(Failure::new("no root filesystem")) };
    let root = root.as_fd();
    mount::pivot_root(root).during("change root")?;
    if let Some(propagation) = container.plan.propagation {
        let new =
            rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).during("open new root")?;
        set_propagation(new.as_fd(), false, propagation).during("set propagation of the root filesystem")?;
    }
    if container.plan.readonly_root {
        let change = Change { set: MountAttrs::RDONLY, clear: MountAttrs::empty() };
        set_attributes(root, false, change).and_then(|later| later.finish(root)).during("make the root read-only")?;
    }
    Ok(())
}

/// The place for a mount: a folder for a folder, a file for anything else. It is made when it is missing.
fn target(root: &Root, destination: &Path, folder: bool) -> Done<OwnedFd> {
    let what = || format!("make mount point {}", destination.display());
    let fd = match root.open_path(destination) {
        Ok(fd) => fd,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            if folder {
                root.mkdir_all(destination, Mode::from(0o755)).during(what())?
            } else {
                if let Some(parent) = destination.parent() {
                    root.mkdir_all(parent, Mode::from(0o755)).during(what())?;
                }
                match root.create_file(destination, Mode::from(0o644)) {
                    Ok(_) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                    Err(error) => return Err(error).during(what()),
                }
                root.open_path(destination).during(what())?
            }
        }
        Err(error) => return Err(error).during(what()),
    };
    // A link of the image must not lead a mount into proc: only its root, and what is known to be harmless, can be covered.
    let magic = rustix::fs::fstatfs(&fd).during(what())?.f_type;
    if magic == PROC_MAGIC && destination != Path::new("/proc") && !is_coverable(destination) {
        return Err(Failure(format!("{} cannot be mounted because it is inside /proc", destination.display())));
    }
    Ok(fd)
}

fn is_folder(fd: BorrowedFd<'_>) -> Done<bool> {
    let stat = rustix::fs::fstat(fd).during("stat mount source")?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// How a tree came to be, which decides what is still to be done to it.
#[derive(PartialEq)]
enum Made {
    /// Bound from the machine: it has the attributes and the propagation of its source.
    Bound,
    /// A new filesystem, detached.
    New,
    /// A new filesystem, already attached by mount(2).
    Attached,
}

fn mount_one(root: &Root, mount: &Mount, tree: Option<OwnedFd>, default: Propagation) -> Done {
    let destination = mount.destination.display();
    let what = || format!("mount {destination}");
    let (tree, made) = match (tree, &mount.source) {
        (Some(tree), _) => (tree, Made::Bound),
        (None, Source::Filesystem { kind, source, options }) => new_mount(root, mount, kind, source, options)?,
        (None, _) => return Err(Failure(format!("mount {destination}: nothing to mount was brought along"))),
    };
    if made == Made::Bound && mount.destination == Path::new("/proc") {
        // What stands there is believed by every program that asks who it is or what it may.
        require_filesystem(tree.as_fd(), PROC_MAGIC, "/proc: only a proc filesystem can be mounted there")?;
    }
    let own = if made == Made::Bound { mount.change } else { Change::default() };
    let once = set_attributes(tree.as_fd(), false, own).during(what())?;
    let recursively = set_attributes(tree.as_fd(), true, mount.recursive).during(what())?;
    if made != Made::Attached {
        let target = target(root, &mount.destination, is_folder(tree.as_fd())?)?;
        attach(tree.as_fd(), target.as_fd()).during(what())?;
    }
    once.finish(tree.as_fd()).during(what())?;
    recursively.finish(tree.as_fd()).during(what())?;
    if mount.propagation.is_empty() && made == Made::Bound {
        set_propagation(tree.as_fd(), true, default).during(what())?;
    }
    for (propagation, recursive) in &mount.propagation {
        set_propagation(tree.as_fd(), *recursive, *propagation).during(what())?;
    }
    Ok(())
}

type Options = [(String, Option<String>)];

/// The longest value that the new mount API takes.
const MAX_VALUE: usize = 255;

fn new_mount(root: &Root, mount: &Mount, kind: &str, source: &str, options: &Options) -> Done<(OwnedFd, Made)> {
    let what = || format!("mount {}", mount.destination.display());
    if matches!(kind, "proc" | "sysfs") {
        require_plain_folder(root, &mount.destination, kind)?;
    }
    let fits = options.iter().all(|(_, value)| value.as_ref().is_none_or(|value| value.len() <= MAX_VALUE));
    let failed = match fits {
        true => match filesystem(kind, source, options, mount.change) {
            Ok(tree) => return Ok((tree, Made::New)),
            Err(error) => Some(error),
        },
        false => None,
    };
    if let Some(error) = failed.filter(|error| error.raw_errno() != Some(ENOSYS)) {
        return Err(error).during(what());
    }
    let target = target(root, &mount.destination, true)?;
    // Labels hold commas.
    let text = |(key, value): &(String, Option<String>)| match value {
        Some(value) if value.contains(',') => format!("{key}=\"{value}\""),
        Some(value) => format!("{key}={value}"),
        None => key.clone(),
    };
    let data: Vec<String> = options.iter().map(text).collect();
    let path = proc_path(target.as_fd());
    let flags = legacy_flags(mount.change.set);
    mount::mount_legacy(Some(source.as_ref()), Path::new(&path), Some(kind), flags, Some(data.join(",").as_ref()))
        .during(what())?;
    Ok((root.open_path(&mount.destination).during(what())?, Made::Attached))
}

pub(super) fn filesystem(kind: &str, source: &str, options: &Options, change: Change) -> berth_linux::Result<OwnedFd> {
    let context = mount::fs_context(kind)?;
    if !source.is_empty() {
        context.set_string("source", source)?;
    }
    for (key, value) in options {
        match value {
            Some(value) => context.set_string(key, value.as_str())?,
            None => context.set_flag(key)?,
        };
    }
    let virtual_kinds =
        ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "overlay", "debugfs", "tracefs", "bpf"];
    if change.set.contains(MountAttrs::RDONLY) && !virtual_kinds.contains(&kind) {
        context.set_flag("ro")?;
    }
    context.create()?;
    context.mount(change.set)
}

/// A new proc or sysfs must lie where it seems to: with a link on the way, what is masked below it would be something else.
fn require_plain_folder(root: &Root, destination: &Path, kind: &str) -> Done {
    let strict = Root::strict(root.as_fd().try_clone_to_owned().during("duplicate descriptor")?);
    match strict.open(destination, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW, Mode::empty()) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(_) => Err(Failure(format!("filesystem {kind:?} must be mounted on an ordinary folder: {}", destination.display()))),
    }
}

/// `RTM_NEWLINK` for the first link of a new network namespace, which is always the loopback: up.
pub(super) fn loopback_up() -> Done {
    const IFF_UP: u32 = 1;
    let socket = NetlinkSocket::open(netlink::ROUTE).during("open netlink socket")?;
    let mut message = Vec::with_capacity(32);
    message.extend(32u32.to_ne_bytes());
    message.extend(16u16.to_ne_bytes());
    // NLM_F_REQUEST | NLM_F_ACK
    message.extend(5u16.to_ne_bytes());
    message.extend([0; 8]);
    // ifinfomsg: family, padding, type, index 1, flags, mask of flags
    message.extend([0; 4]);
    message.extend(1i32.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    socket.send(&message).during("set the loopback up")?;
    let mut reply = Vec::new();
    socket.recv(&mut reply).during("set the loopback up")?;
    let errno = reply.get(16..20).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_ne_bytes);
    match errno {
        0 => Ok(()),
        errno => Err(std::io::Error::from_raw_os_error(-errno)).during("set the loopback up"),
    }
}
