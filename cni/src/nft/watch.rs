//! Notices that somebody else removed our table or a part of it (`nft flush ruleset`, a firewall's restart).

use std::collections::HashSet;

use berth_linux::netlink::{NETFILTER, NetlinkSocket};

use super::elements;
use super::message::parse;
use super::table::is_loss;
use crate::netlink::attributes::{as_string, find};
use crate::netlink::socket::decode;
use crate::{Error, Result};

/// `NFNLGRP_NFTABLES`
const GROUP: u32 = 7;

/// Opens the socket in the calling thread's network namespace; the watch then blocks in its own thread until `on_loss` says
/// that it is over. Changes by the sockets in `own` (their ports) are ours.
pub(crate) fn watch(table: &str, own: &HashSet<u32>) -> Result<Watch> {
    let socket = NetlinkSocket::open(NETFILTER).and_then(|socket| socket.join(GROUP).map(|()| socket));
    let socket = socket.map_err(|e| Error::netlink("watch nf_tables table", table)(e.into()))?;
    Ok(Watch { socket, table: table.to_owned(), own: own.clone() })
}

/// A watch on one table.
#[derive(Debug)]
pub(crate) struct Watch {
    socket: NetlinkSocket,
    table: String,
    own: HashSet<u32>,
}

impl Watch {
    /// Calls `on_loss` after each burst of removals by others, until it returns false.
    pub(crate) fn run(self, mut on_loss: impl FnMut() -> bool) {
        let mut buffer = Vec::new();
        loop {
            let lost = match self.socket.recv(&mut buffer) {
                Ok(()) => self.is_loss(&buffer),
                // The kernel dropped events: look at everything again.
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NOBUFS.raw_os_error()) => true,
                Err(_) => return,
            };
            if lost && !on_loss() {
                return;
            }
        }
    }

    fn is_loss(&self, datagram: &[u8]) -> bool {
        let mut messages = Vec::new();
        decode(datagram, &mut messages);
        messages.iter().filter(|message| !self.own.contains(&message.port)).any(|message| {
            parse(message).is_some_and(|(kind, body)| {
                // The table's name is attribute 1 in messages about tables, chains, rules, sets and elements alike.
                (is_loss(kind) || elements::is_loss(kind)) && find(body, 1).map(as_string).as_deref() == Some(&self.table)
            })
        })
    }
}
