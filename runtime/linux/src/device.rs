//! Device numbers and device nodes.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode};

/// The kind of a device node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// A character device (`c`, `u`).
    Char,
    /// A block device (`b`).
    Block,
    /// A named pipe (`p`).
    Fifo,
}

impl DeviceKind {
    fn file_type(self) -> FileType {
        match self {
            Self::Char => FileType::CharacterDevice,
            Self::Block => FileType::BlockDevice,
            Self::Fifo => FileType::Fifo,
        }
    }
}

/// A device node: what it is and its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// Its kind.
    pub kind: DeviceKind,
    /// Its major number.
    pub major: u32,
    /// Its minor number.
    pub minor: u32,
}

impl Device {
    /// The device at a path (links followed); `None` when the path is no device.
    pub fn of_path(path: &Path) -> io::Result<Option<Self>> {
        let stat = rustix::fs::stat(path)?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::CharacterDevice => DeviceKind::Char,
            FileType::BlockDevice => DeviceKind::Block,
            FileType::Fifo => DeviceKind::Fifo,
            _ => return Ok(None),
        };
        Ok(Some(Self { kind, major: rustix::fs::major(stat.st_rdev), minor: rustix::fs::minor(stat.st_rdev) }))
    }

    /// The number as the kernel packs it.
    #[must_use]
    pub fn number(&self) -> u64 {
        rustix::fs::makedev(self.major, self.minor)
    }
}

/// Makes a node in a folder with exactly this mode and owner (the umask does not count).
pub fn make_node(folder: BorrowedFd<'_>, name: &Path, device: Device, mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
    let mode = Mode::from_raw_mode(mode & 0o7777);
    rustix::fs::mknodat(folder, name, device.kind.file_type(), mode, device.number())?;
    // The folder is not yet anybody's who could put a link in the node's place.
    if let Some((uid, gid)) = owner {
        let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
        rustix::fs::chownat(folder, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    }
    rustix::fs::chmodat(folder, name, mode, AtFlags::empty())?;
    Ok(())
}
