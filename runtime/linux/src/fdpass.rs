//! Descriptors over unix sockets (SCM_RIGHTS). A message that lost descriptors on the way is an error, never a short list.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

/// The most descriptors the kernel passes in one message (`SCM_MAX_FD`).
pub const MAX_FDS: usize = 253;

/// Sends bytes with descriptors; returns how many bytes went out. The descriptors ride on the first byte: with a short result, send
/// the rest without them. `bytes` must not be empty.
pub fn send_with_fds(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if bytes.is_empty() || fds.len() > MAX_FDS {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let message = SendAncillaryMessage::ScmRights(fds);
    let mut space = vec![MaybeUninit::uninit(); message.size()];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(message) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let parts = [IoSlice::new(bytes)];
    Ok(rustix::io::retry_on_intr(|| rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL))?)
}

/// Receives bytes and at most `max` descriptors, close-on-exec. More descriptors than that is an error (and they are closed). 0 bytes is
/// the end of the stream.
pub fn recv_with_fds(socket: BorrowedFd<'_>, buffer: &mut [u8], max: usize) -> io::Result<(usize, Vec<OwnedFd>)> {
    let max = max.min(MAX_FDS);
    let mut space = vec![MaybeUninit::uninit(); max * 4 + rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more descriptors in a message than expected"));
    }
    Ok((received.bytes, fds))
}
