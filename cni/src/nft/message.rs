//! Messages of nf_tables: their numbers, and the transaction around them.

use crate::error::KernelError;
use crate::netlink::{Attributes, Failure, Message, Request, Socket, flags};

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// `NFPROTO_INET`: one table for both families.
const FAMILY: u8 = 1;
/// `NLM_F_APPEND`
const APPEND: u16 = 0x800;

pub(super) const NEW_TABLE: u8 = 0;
pub(super) const DEL_TABLE: u8 = 2;
pub(super) const NEW_CHAIN: u8 = 3;
pub(super) const GET_CHAIN: u8 = 4;
pub(super) const DEL_CHAIN: u8 = 5;
pub(super) const NEW_RULE: u8 = 6;
pub(super) const GET_RULE: u8 = 7;
pub(super) const DEL_RULE: u8 = 8;
pub(super) const NEW_SET: u8 = 9;
pub(super) const DEL_SET: u8 = 11;
pub(super) const NEW_ELEMENT: u8 = 12;
pub(super) const GET_ELEMENT: u8 = 13;
pub(super) const DEL_ELEMENT: u8 = 14;

/// An element of a list in the netlink attributes.
pub(super) const LIST_ELEMENT: u16 = 1;
const HEADER: usize = 4;

fn body(family: u8, resource: u16, attributes: &Attributes) -> Vec<u8> {
    let mut body = vec![family, 0];
    body.extend_from_slice(&resource.to_be_bytes());
    body.extend_from_slice(attributes.as_bytes());
    body
}

fn request(kind: u8, flags: u16, attributes: &Attributes) -> Request {
    request_in(FAMILY, kind, flags, attributes)
}

fn request_in(family: u8, kind: u8, flags: u16, attributes: &Attributes) -> Request {
    Request { kind: SUBSYSTEM << 8 | u16::from(kind), flags, body: body(family, 0, attributes) }
}

/// Request: put a rule at the head of a chain of another family's table.
pub(super) fn insert_rule_in(family: u8, attributes: &Attributes) -> Request {
    request_in(family, NEW_RULE, flags::ACK | flags::CREATE, attributes)
}

/// Request: delete a rule of another family's table.
pub(super) fn delete_rule_in(family: u8, attributes: &Attributes) -> Request {
    request_in(family, DEL_RULE, flags::ACK, attributes)
}

/// Request: one object of another family's table, or a dump.
pub(super) fn get_in(family: u8, kind: u8, attributes: &Attributes) -> Request {
    request_in(family, kind, flags::ACK, attributes)
}

/// Request: create, or nothing where the same exists.
pub(super) fn create(kind: u8, attributes: &Attributes) -> Request {
    request(kind, flags::ACK | flags::CREATE, attributes)
}

/// Request: create in another family's table, or the table itself; nothing where the same exists.
pub(super) fn create_in(family: u8, kind: u8, attributes: &Attributes) -> Request {
    request_in(family, kind, flags::ACK | flags::CREATE, attributes)
}

/// Request: append (a rule to its chain).
pub(super) fn append(kind: u8, attributes: &Attributes) -> Request {
    request(kind, flags::ACK | flags::CREATE | APPEND, attributes)
}

/// Request: delete.
pub(super) fn delete(kind: u8, attributes: &Attributes) -> Request {
    request(kind, flags::ACK, attributes)
}

/// Request: a dump.
pub(super) fn get(kind: u8, attributes: &Attributes) -> Request {
    request(kind, 0, attributes)
}

/// All or nothing: the requests as one transaction. The index of a failure is that of the request.
pub(super) fn commit(socket: &mut Socket, requests: Vec<Request>) -> Result<(), Failure> {
    let mark = |kind| Request { kind, flags: 0, body: body(0, SUBSYSTEM, &Attributes::new()) };
    let mut batch = Vec::with_capacity(requests.len() + 2);
    batch.push(mark(BATCH_BEGIN));
    batch.extend(requests);
    batch.push(mark(BATCH_END));
    match socket.run(&batch) {
        Ok(_) => Ok(()),
        Err(failure) => Err(Failure { index: failure.index.and_then(|i| i.checked_sub(1)), error: failure.error }),
    }
}

/// The kind of an nf_tables message and its attributes.
pub(super) fn parse(message: &Message) -> Option<(u8, &[u8])> {
    let [kind, subsystem] = message.kind.to_ne_bytes().map(u16::from);
    let (kind, subsystem) = if cfg!(target_endian = "little") { (kind, subsystem) } else { (subsystem, kind) };
    if subsystem != SUBSYSTEM {
        return None;
    }
    Some((u8::try_from(kind).ok()?, message.body.get(HEADER..)?))
}

/// Whether the kernel says that the table, the map or the element does not exist.
pub(super) fn is_absent(error: &KernelError) -> bool {
    error.errno == Some(rustix::io::Errno::NOENT.raw_os_error())
}
