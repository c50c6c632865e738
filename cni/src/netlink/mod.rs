//! Netlink: attributes, requests and replies as bytes. What the messages mean is said in the files below and in `nft`.

pub(crate) mod attributes;
pub(crate) mod link;
pub(crate) mod route;
pub(crate) mod socket;

pub(crate) use attributes::{Attributes, attributes};
pub(crate) use socket::{Failure, Message, Request, Socket};

/// Flags of the netlink header.
pub(crate) mod flags {
    pub(crate) const REQUEST: u16 = 0x1;
    pub(crate) const ACK: u16 = 0x4;
    pub(crate) const DUMP: u16 = 0x300;
    pub(crate) const EXCL: u16 = 0x200;
    pub(crate) const CREATE: u16 = 0x400;
}
