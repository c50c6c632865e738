//! A netlink socket: bytes out, datagrams in, never shortened in silence. Messages are their callers' business.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::time::Duration;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::syscall::check;

/// `NETLINK_ROUTE`.
pub const ROUTE: i32 = libc::NETLINK_ROUTE;
/// `NETLINK_NETFILTER`: nf_tables, conntrack.
pub const NETFILTER: i32 = libc::NETLINK_NETFILTER;

/// A netlink socket, bound, with extended acknowledgements.
#[derive(Debug)]
pub struct NetlinkSocket {
    fd: OwnedFd,
}

impl AsFd for NetlinkSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<NetlinkSocket> for OwnedFd {
    fn from(socket: NetlinkSocket) -> Self {
        socket.fd
    }
}

impl NetlinkSocket {
    /// Opens a blocking socket in the network namespace of the calling thread, where it stays for its life, and binds it to a port of
    /// the kernel's choice. Errors carry the kernel's text and do not repeat the request.
    pub fn open(protocol: i32) -> io::Result<Self> {
        let protocol = u32::try_from(protocol).ok().and_then(rustix::net::RawProtocol::new);
        let protocol = protocol.map(rustix::net::Protocol::from_raw);
        let fd = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        let socket = Self { fd };
        // Kernels before 4.12 know neither; messages are then only less clear.
        let _ = socket.set_option(libc::NETLINK_EXT_ACK, 1);
        let _ = socket.set_option(libc::NETLINK_CAP_ACK, 1);
        socket.bind(0)?;
        Ok(socket)
    }

    /// Binds the socket to legacy multicast groups (a bit mask).
    pub fn bind(&self, groups: u32) -> io::Result<()> {
        // SAFETY: plain data; all zeroes is a valid address.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        address.nl_groups = groups;
        let length = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
        // SAFETY: pointer and length are those of one sockaddr_nl that outlives the call.
        check(unsafe { libc::bind(self.fd.as_raw_fd(), ptr::from_ref(&address).cast(), length) }.into())?;
        Ok(())
    }

    /// Joins a multicast group by number (`RTNLGRP_*`, `NFNLGRP_*`).
    pub fn join(&self, group: u32) -> io::Result<()> {
        self.set_option(libc::NETLINK_ADD_MEMBERSHIP, group as i32)
    }

    /// Refuses requests with unknown fields, and filters dumps by the request, instead of ignoring (`NETLINK_GET_STRICT_CHK`).
    pub fn set_strict(&self) -> io::Result<()> {
        self.set_option(libc::NETLINK_GET_STRICT_CHK, 1)
    }

    /// Sets a numeric option of the level `SOL_NETLINK`.
    pub fn set_option(&self, option: i32, value: i32) -> io::Result<()> {
        self.set_raw_option(libc::SOL_NETLINK, option, value)
    }

    fn set_raw_option(&self, level: i32, option: i32, value: i32) -> io::Result<()> {
        let length = size_of::<i32>() as libc::socklen_t;
        let fd = self.fd.as_raw_fd();
        // SAFETY: pointer and length are those of one i32 that outlives the call.
        let result = unsafe { libc::setsockopt(fd, level, option, ptr::from_ref(&value).cast(), length) };
        check(result.into())?;
        Ok(())
    }

    /// Sets the sizes of the socket's buffers, over the machine's limit where allowed.
    pub fn set_buffers(&self, send: usize, receive: usize) -> io::Result<()> {
        let clamp = |size: usize| i32::try_from(size).unwrap_or(i32::MAX);
        for (force, plain, size) in
            [(libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, send), (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, receive)]
        {
            self.set_raw_option(libc::SOL_SOCKET, force, clamp(size))
                .or_else(|_| self.set_raw_option(libc::SOL_SOCKET, plain, clamp(size)))?;
        }
        Ok(())
    }

    /// How long [`NetlinkSocket::recv`] waits before it fails with EAGAIN. `None` is for ever.
    pub fn set_receive_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        Ok(rustix::net::sockopt::set_socket_timeout(&self.fd, rustix::net::sockopt::Timeout::Recv, timeout)?)
    }

    /// The port (netlink's address) that the kernel chose.
    pub fn port(&self) -> io::Result<u32> {
        // SAFETY: plain data; all zeroes is a valid address.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        let mut length = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
        let fd = self.fd.as_raw_fd();
        // SAFETY: pointer and length are those of one sockaddr_nl that outlives the call.
        let result = unsafe { libc::getsockname(fd, ptr::from_mut(&mut address).cast(), &mut length) };
        check(result.into())?;
        Ok(address.nl_pid)
    }

    /// Sends one datagram to the kernel: one or several complete messages.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let sent = rustix::io::retry_on_intr(|| rustix::net::send(&self.fd, bytes, SendFlags::empty()))?;
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Receives one whole datagram into `buffer`, which is grown to fit and holds nothing else afterwards. ENOBUFS means that the kernel
    /// dropped messages: what listens for events must look at everything again.
    pub fn recv(&self, buffer: &mut Vec<u8>) -> io::Result<()> {
        let flags = RecvFlags::PEEK | RecvFlags::TRUNC;
        let mut nothing = [0u8; 0];
        let (_, length) = rustix::io::retry_on_intr(|| rustix::net::recv(&self.fd, &mut nothing[..], flags))?;
        buffer.clear();
        buffer.resize(length, 0);
        let (_, received) = rustix::io::retry_on_intr(|| rustix::net::recv(&self.fd, &mut buffer[..], RecvFlags::TRUNC))?;
        if received > buffer.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a netlink datagram was cut"));
        }
        buffer.truncate(received);
        Ok(())
    }
}
