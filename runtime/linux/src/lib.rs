//! Linux kernel interfaces of berth: the only crate with unsafe code.
//!
//! One noun a file. Only [`std::os::fd::OwnedFd`] and [`std::os::fd::BorrowedFd`] cross this interface; every descriptor made
//! here is close-on-exec. Nothing here knows what a container, a pod or an image is. Where rustix has a safe call that
//! needs nothing added, callers use rustix.
#![allow(unsafe_code)]

mod error;
mod syscall;

pub mod arch;
pub mod beneath;
pub mod boot;
pub mod bpf;
pub mod caps;
pub mod child;
pub mod code;
pub mod creds;
pub mod device;
pub mod epoll;
pub mod eventfd;
pub mod fdpass;
pub mod file;
pub mod heap;
pub mod inotify;
pub mod instance;
pub mod memfd;
pub mod mount;
pub mod netlink;
pub mod ns;
pub mod pidfd;
pub mod prctl;
pub mod process;
pub mod rlimit;
pub mod seccomp;
pub mod session;
pub mod signalfd;
pub mod sparse;
pub mod tree;
pub mod tty;
pub mod xattr;

pub use error::{Error, Result};
pub use instance::InstanceId;
pub use rustix::process::Pid;
