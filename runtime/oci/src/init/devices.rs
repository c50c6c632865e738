//! What stands in /dev: nodes, links, the terminal and the console.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use berth_linux::beneath::Root;
use berth_linux::device::{Device, DeviceKind};
use berth_linux::{mount, tty};
use rustix::fs::{AtFlags, FileType, Gid, Mode, Uid};
use rustix::io::Errno;

use super::rootfs::attach;
use super::{Done, During, require_filesystem};
use crate::launch::Stdio;
use crate::spec;

const DEVPTS_MAGIC: i64 = 0x1cd1;

/// A device node; the machine's own bound over a file where nodes may not be made.
pub(super) fn make_device(root: &Root, device: &spec::Device, tree: Option<OwnedFd>) -> Done {
    let path = Path::new(&device.path);
    let what = || format!("make device {}", device.path);
    if let Some(parent) = path.parent() {
        root.mkdir_all(parent, Mode::from(0o755)).during(what())?;
    }
    if let Some(tree) = tree {
        return bind_file(root, path, &tree, &what());
    }
    let node = Device {
        kind: match device.kind.as_str() {
            "b" => DeviceKind::Block,
            "p" => DeviceKind::Fifo,
            _ => DeviceKind::Char,
        },
        major: device.major,
        minor: device.minor,
    };
    let kind = match node.kind {
        DeviceKind::Block => FileType::BlockDevice,
        DeviceKind::Fifo => FileType::Fifo,
        DeviceKind::Char => FileType::CharacterDevice,
    };
    let mode = Mode::from(device.file_mode.unwrap_or(0o666) & 0o7777);
    let (parent, name) = root.split(path).during(what())?;
    let number = if node.kind == DeviceKind::Fifo { 0 } else { node.number() };
    let make = || rustix::fs::mknodat(&parent, name, kind, mode, number);
    match make() {
        Err(Errno::EXIST) => {
            // Whatever the image has there: the node is ours to define.
            rustix::fs::unlinkat(&parent, name, AtFlags::empty()).and_then(|()| make()).during(what())?;
        }
        result => result.during(what())?,
    }
    if (device.uid, device.gid) != (Some(0), Some(0)) {
        let owner = (device.uid.map(Uid::from_raw), device.gid.map(Gid::from_raw));
        rustix::fs::chownat(&parent, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).during(what())?;
    }
    Ok(())
}

/// Binds one file over another, which is made when missing.
pub(super) fn bind_file(root: &Root, path: &Path, tree: &OwnedFd, what: &str) -> Done {
    match root.create_file(path, Mode::from(0o644)) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error).during(what),
    }
    let target = root.open_path_nofollow(path).during(what)?;
    attach(tree.as_fd(), target.as_fd()).during(what)
}

pub(super) fn make_link(root: &Root, path: &Path, target: &Path, replace: bool) -> Done {
    let what = || format!("link {}", path.display());
    if let Some(parent) = path.parent() {
        root.mkdir_all(parent, Mode::from(0o755)).during(what())?;
    }
    match root.symlink(target, path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            if !replace {
                return Ok(());
            }
            root.remove(path).during(what())?;
            root.symlink(target, path).during(what())
        }
        result => result.during(what()),
    }
}

/// A new terminal of the devpts that the container has: (master, standard streams).
pub(super) fn open_terminal(root: &Root, size: (u16, u16)) -> Done<(OwnedFd, Stdio)> {
    let dir = root.open_folder(Path::new("/dev/pts")).during("open /dev/pts")?;
    require_filesystem(dir.as_fd(), DEVPTS_MAGIC, "/dev/pts is not a devpts filesystem: no terminal can be made")?;
    let pty = tty::open_pty_in(dir.as_fd()).during("open a terminal")?;
    if size != (0, 0) {
        tty::set_window_size(pty.master.as_fd(), size.0, size.1).during("set terminal size")?;
    }
    let copy = || pty.slave.try_clone().during("duplicate terminal");
    Ok((pty.master.try_clone().during("duplicate terminal")?, Stdio::Fds([copy()?, copy()?, copy()?])))
}

pub(super) fn mount_console(root: &Root, stdio: &Stdio) -> Done {
    let Stdio::Fds([slave, ..]) = stdio else { return Ok(()) };
    let tree = mount::open_tree(slave.as_fd(), Path::new(""), true, false).during("mount /dev/console")?;
    bind_file(root, Path::new("/dev/console"), &tree, "mount /dev/console")
}
