//! Extended attributes of open files, of O_PATH descriptors and of symbolic links too.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use crate::memfd::proc_path;

/// How often a value that grows while it is read is tried again.
const RETRIES: usize = 8;

fn read_sized(
    query: impl Fn() -> rustix::io::Result<usize>,
    read: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
) -> rustix::io::Result<Vec<u8>> {
    for _ in 0..RETRIES {
        let mut buffer = vec![0u8; query()?];
        if buffer.is_empty() {
            return Ok(buffer);
        }
        match read(&mut buffer) {
            Err(Errno::RANGE) => {}
            Err(errno) => return Err(errno),
            Ok(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
        }
    }
    Err(Errno::RANGE)
}

fn absent(errno: Errno) -> bool {
    matches!(errno, Errno::NODATA | Errno::OPNOTSUPP)
}

/// Sets an attribute of the file behind a descriptor (O_PATH too; there a symbolic link cannot be meant: see [`set_in_folder`]).
pub fn set(fd: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> io::Result<()> {
    match rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty()) {
        Err(Errno::BADF) => Ok(rustix::fs::setxattr(proc_path(fd), name, value, XattrFlags::empty())?),
        result => Ok(result?),
    }
}

/// Reads an attribute of the file behind a descriptor; `None` when there is none or the filesystem has none at all.
pub fn get(fd: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<Vec<u8>>> {
    let path = proc_path(fd);
    let query = || rustix::fs::getxattr_query(path.as_str(), name);
    match read_sized(query, |buffer| rustix::fs::getxattr(path.as_str(), name, buffer)) {
        Ok(value) => Ok(Some(value)),
        Err(errno) if absent(errno) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// The names of all attributes of the file behind a descriptor.
pub fn list(fd: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    let path = proc_path(fd);
    let query = || rustix::fs::listxattr_query(path.as_str());
    match read_sized(query, |buffer| rustix::fs::listxattr(path.as_str(), buffer)) {
        Ok(names) => Ok(names
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty())
            .filter_map(|name| CString::new(name).ok())
            .collect()),
        Err(errno) if absent(errno) => Ok(Vec::new()),
        Err(errno) => Err(errno.into()),
    }
}

/// Removes an attribute; one that is not there is no error.
pub fn remove(fd: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    match rustix::fs::removexattr(proc_path(fd), name) {
        Err(errno) if !absent(errno) => Err(errno.into()),
        _ => Ok(()),
    }
}

/// Sets an attribute of an entry of a folder without following it: for symbolic links. `name` must be one name, not a path.
pub fn set_in_folder(folder: BorrowedFd<'_>, entry: &Path, name: &CStr, value: &[u8]) -> io::Result<()> {
    if entry.components().count() != 1 || entry.file_name().is_none() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let path = Path::new(&proc_path(folder)).join(entry);
    Ok(rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())?)
}
