//! Notices that somebody else removed our table or a part of it (`nft flush ruleset`, a firewall's restart).

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use berth_linux::netlink::{NETFILTER, NetlinkSocket};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::message::parse;
use super::table::is_loss;
use super::{elements, forward};
use crate::error::KernelError;
use crate::netlink::attributes::{as_string, find};
use crate::netlink::socket::decode;
use crate::{Error, Result};

/// `NFNLGRP_NFTABLES`
const GROUP: u32 = 7;
/// Removals come in bursts, and two who repair the same table must not keep each other busy.
const PAUSE: Duration = Duration::from_millis(50);

/// Ends a watch when it is dropped.
#[derive(Debug)]
pub(crate) struct Stop(Arc<OwnedFd>);

impl Drop for Stop {
    fn drop(&mut self) {
        // A counter of 64 bits takes one more.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }
}

/// Opens a watch in the calling thread's network namespace. Changes by the sockets in `own` (their ports) are ours.
pub(crate) fn watch(table: &str, own: HashSet<u32>) -> Result<(Watch, Stop)> {
    let error = |source: KernelError| Error::netlink("watch nf_tables table", table)(source);
    let socket = NetlinkSocket::open(NETFILTER).and_then(|socket| socket.join(GROUP).map(|()| socket));
    let socket = socket.map_err(|e| error(e.into()))?;
    let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| error(std::io::Error::from(e).into()))?;
    let stop = Arc::new(stop);
    Ok((Watch { socket, stop: Arc::clone(&stop), table: table.to_owned(), own }, Stop(stop)))
}

/// A watch on one table, to be run in a thread of its own.
#[derive(Debug)]
pub(crate) struct Watch {
    socket: NetlinkSocket,
    stop: Arc<OwnedFd>,
    table: String,
    own: HashSet<u32>,
}

impl Watch {
    /// Calls `on_loss` after each burst of removals by others, until the watch is stopped.
    pub(crate) fn run(self, mut on_loss: impl FnMut()) {
        let mut buffer = Vec::new();
        let mut lost = false;
        loop {
            match self.wait(lost.then_some(PAUSE)) {
                Event::Stop => return,
                Event::Quiet => {
                    lost = false;
                    on_loss();
                }
                Event::Message => match self.socket.recv(&mut buffer) {
                    Ok(()) => lost |= self.is_loss(&buffer),
                    // The kernel dropped events: look at everything again.
                    Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NOBUFS.raw_os_error()) => lost = true,
                    Err(error) => {
                        tracing::warn!(%error, table = self.table, "nf_tables table is no longer watched");
                        return;
                    }
                },
            }
        }
    }

    fn wait(&self, timeout: Option<Duration>) -> Event {
        let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
        loop {
            let mut fds = [PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN), PollFd::new(&self.socket, PollFlags::IN)];
            match poll(&mut fds, timeout.as_ref()) {
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return Event::Stop,
                Ok(0) => return Event::Quiet,
                Ok(_) if !fds[0].revents().is_empty() => return Event::Stop,
                Ok(_) => return Event::Message,
            }
        }
    }

    fn is_loss(&self, datagram: &[u8]) -> bool {
        let mut messages = Vec::new();
        decode(datagram, &mut messages);
        messages.iter().filter(|message| !self.own.contains(&message.port)).any(|message| {
            parse(message).is_some_and(|(kind, body)| {
                // The table's name is attribute 1 in messages about tables, chains, rules, sets and elements alike.
                let table = find(body, 1).map(as_string).unwrap_or_default();
                table == self.table && (is_loss(kind) || elements::is_loss(kind)) || forward::concerns(&table, kind)
            })
        })
    }
}

enum Event {
    Stop,
    /// Nothing more came for a while.
    Quiet,
    Message,
}
