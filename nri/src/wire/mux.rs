//! The multiplexer: chunks with a connection's number and a length before them.

use super::MAX_MESSAGE;
use super::ttrpc::HEADER as TTRPC_HEADER;
use crate::Error;

/// Bytes before each chunk.
pub(super) const HEADER: usize = 8;
/// The logical connection on which the runtime calls the plugin.
pub(super) const PLUGIN: u32 = 1;
/// The logical connection on which the plugin calls the runtime.
pub(super) const RUNTIME: u32 = 2;
/// The read buffer of Go's bufio, through which plugins read a message's head: a first chunk longer than it can not be read.
const FIRST: usize = 4096;

/// Connection and length of the next chunk.
pub(super) fn header(bytes: [u8; HEADER]) -> Result<(u32, usize), Error> {
    let [a, b, c, d, e, f, g, h] = bytes;
    let (id, length) = (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]) as usize);
    if length > TTRPC_HEADER + MAX_MESSAGE {
        return Err(Error::Protocol { what: "multiplexer", reason: format!("a chunk of {length} bytes") });
    }
    Ok((id, length))
}

/// A whole ttRPC message as chunks: its beginning, then the rest in one piece.
pub(super) fn chunks(id: u32, message: &[u8]) -> Vec<u8> {
    let (first, rest) = message.split_at(message.len().min(FIRST));
    let mut out = Vec::with_capacity(message.len() + 2 * HEADER);
    for part in [first, rest].into_iter().filter(|part| !part.is_empty()) {
        out.extend_from_slice(&id.to_be_bytes());
        out.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend_from_slice(part);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_longer_than_any_message_is_refused() {
        assert_eq!(header([0, 0, 0, 2, 0, 0, 1, 0]).unwrap(), (2, 256));
        assert!(header([0xff; 8]).is_err());
        assert!(header([0, 0, 0, 1, 0, 0x40, 0, 11]).is_err());
        assert!(header([0, 0, 0, 1, 0, 0x40, 0, 10]).is_ok());
    }

    #[test]
    fn a_long_message_is_two_chunks_of_which_the_first_fits_a_readers_buffer() {
        let message = vec![7; 10_000];
        let out = chunks(1, &message);
        assert_eq!(out.len(), message.len() + 16);
        assert_eq!(header(out[..8].try_into().unwrap()).unwrap(), (1, 4096));
        assert_eq!(header(out[8 + 4096..16 + 4096].try_into().unwrap()).unwrap(), (1, 10_000 - 4096));
        assert_eq!(chunks(2, &[1; 10]).len(), 18);
    }
}
