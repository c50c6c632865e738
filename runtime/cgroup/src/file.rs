//! Reading and writing the files of a cgroup: one write is one command, and it never creates a file.

use std::io;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::{Error, Result};

/// Writes a value; the file must exist.
pub(crate) fn write(path: &Path, value: &str) -> Result<()> {
    write_raw(path, value).map_err(|source| Error::Write { path: path.to_owned(), value: value.to_owned(), source })
}

pub(crate) fn write_raw(path: &Path, value: &str) -> io::Result<()> {
    let fd = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    let written = rustix::io::retry_on_intr(|| rustix::io::write(&fd, value.as_bytes()))?;
    if written == value.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Reads a file.
pub(crate) fn read(path: &Path) -> Result<String> {
    read_raw(path).map_err(|source| Error::Read { path: path.to_owned(), source })
}

pub(crate) fn read_raw(path: &Path) -> io::Result<String> {
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    // The size that the kernel tells of these files means nothing, so it is not asked. A page holds what most of them say.
    let (mut bytes, mut page) = (Vec::new(), [0u8; 4096]);
    loop {
        let read = rustix::io::retry_on_intr(|| rustix::io::read(&fd, &mut page))?;
        if read == 0 {
            break;
        }
        bytes.extend_from_slice(&page[..read]);
    }
    String::from_utf8(bytes).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Reads a file that may be missing (its controller is not there, the cgroup is gone, the kernel is older).
pub(crate) fn read_optional(path: &Path) -> Result<Option<String>> {
    match read_raw(path) {
        Ok(text) => Ok(Some(text)),
        // ENODEV: the cgroup was removed while the file was open. EOPNOTSUPP: the feature is switched off.
        Err(error) if is_gone(&error) || error.raw_os_error() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()) => Ok(None),
        Err(source) => Err(Error::Read { path: path.to_owned(), source }),
    }
}

/// Whether an error says that a cgroup or its file does not exist (any more).
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error())
}

/// A file with one number, or `max`, which is `u64::MAX`.
pub(crate) fn read_number(path: &Path) -> Result<Option<u64>> {
    Ok(read_optional(path)?.and_then(|text| number(&text)))
}

/// A number, or `max`.
pub(crate) fn number(text: &str) -> Option<u64> {
    match text.trim() {
        "max" => Some(u64::MAX),
        text => text.parse().ok(),
    }
}

/// The value of a key in a file of lines `key value`.
pub(crate) fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        if name == key { number(value) } else { None }
    })
}
