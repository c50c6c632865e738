//! A filesystem being configured: options in, a detached mount out, the kernel's own words in the errors.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fd::AsRawFd;
use rustix::mount::{FsMountFlags, FsOpenFlags};

use super::MountAttrs;
use crate::syscall::check_fd;
use crate::{Error, Result};

/// A filesystem being configured.
#[derive(Debug)]
pub struct FsContext {
    fd: OwnedFd,
    fstype: String,
}

/// Starts to configure a filesystem of this type.
pub fn fs_context(fstype: &str) -> Result<FsContext> {
    match rustix::mount::fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(fd) => Ok(FsContext { fd, fstype: fstype.to_owned() }),
        Err(errno) => Err(Error::FsOpen { subject: fstype.to_owned(), source: errno.into() }),
    }
}

impl FsContext {
    /// Sets an option with a value (`source`, `lowerdir+`, `size`).
    pub fn set_string(&self, key: &str, value: impl rustix::path::Arg) -> Result<&Self> {
        let result = rustix::mount::fsconfig_set_string(&self.fd, key, value);
        self.configured(key, result)
    }

    /// Sets an option that has no value (`ro`, `userxattr`).
    pub fn set_flag(&self, key: &str) -> Result<&Self> {
        let result = rustix::mount::fsconfig_set_flag(&self.fd, key);
        self.configured(key, result)
    }

    /// Sets an option whose value is a descriptor.
    pub fn set_fd(&self, key: &str, value: BorrowedFd<'_>) -> Result<&Self> {
        let result = rustix::mount::fsconfig_set_fd(&self.fd, key, value);
        self.configured(key, result)
    }

    fn configured(&self, key: &str, result: rustix::io::Result<()>) -> Result<&Self> {
        match result {
            Ok(()) => Ok(self),
            Err(errno) => Err(Error::FsConfig { subject: self.subject(Some(key)), source: errno.into() }),
        }
    }

    /// Makes the filesystem (or finds the one that exists, for types that have only one).
    pub fn create(&self) -> Result<&Self> {
        match rustix::mount::fsconfig_create(&self.fd) {
            Ok(()) => Ok(self),
            Err(errno) => Err(Error::FsCreate { subject: self.subject(None), source: errno.into() }),
        }
    }

    /// A detached mount of the filesystem. To be attached with [`super::move_mount`].
    pub fn mount(&self, attrs: MountAttrs) -> Result<OwnedFd> {
        let flags = FsMountFlags::FSMOUNT_CLOEXEC.bits();
        // SAFETY: numbers only. (rustix's own form cannot carry the attributes added after Linux 5.2.)
        let result = unsafe { libc::syscall(libc::SYS_fsmount, self.fd.as_raw_fd(), flags, attrs.bits() as u32) };
        check_fd(result).map_err(|source: io::Error| Error::FsMount { subject: self.subject(None), source })
    }

    /// The type, the option and what the kernel wrote about it.
    fn subject(&self, key: Option<&str>) -> String {
        let mut subject = self.fstype.clone();
        if let Some(key) = key {
            subject.push_str(", ");
            subject.push_str(key);
        }
        for message in self.messages() {
            subject.push_str(": ");
            subject.push_str(&message);
        }
        subject
    }

    /// The errors and warnings that the kernel wrote since the last call. Each read takes one.
    fn messages(&self) -> Vec<String> {
        let mut messages = Vec::new();
        let mut buffer = [0u8; 1024];
        while messages.len() < 16 {
            match rustix::io::read(&self.fd, &mut buffer) {
                Ok(read) if read > 0 => {
                    let text = String::from_utf8_lossy(&buffer[..read]);
                    // "e text", "w text" or "i text".
                    let text = text.trim_end().get(2..).unwrap_or_default();
                    if !text.is_empty() {
                        messages.push(text.to_owned());
                    }
                }
                _ => break,
            }
        }
        messages
    }
}

impl AsFd for FsContext {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
