//! The fields of a header block: names, and numbers in octal or base 256.

use std::io;

use super::{BLOCK, invalid};

pub(super) fn header_path(block: &[u8; BLOCK]) -> Vec<u8> {
    let name = until_nul(&block[..100]);
    // GNU's magic is "ustar  " and its archives have other things where the prefix would be.
    if &block[257..263] == b"ustar\0" {
        let prefix = until_nul(&block[345..500]);
        if !prefix.is_empty() {
            return [prefix, b"/", name].concat();
        }
    }
    name.to_vec()
}

pub(super) fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

pub(super) fn field(bytes: &[u8], name: &str) -> io::Result<u32> {
    number(bytes)
        .and_then(|value| u32::try_from(value).ok())
        .ok_or_else(|| invalid(format!("header field {name} is not a number that fits")))
}

pub(super) fn number(bytes: &[u8]) -> Option<u64> {
    signed(bytes).and_then(|value| u64::try_from(value).ok())
}

/// Octal text, or base 256 when the first bit is set.
pub(super) fn signed(bytes: &[u8]) -> Option<i64> {
    if bytes[0] & 0x80 != 0 {
        let negative = bytes[0] & 0x40 != 0;
        let mut value: i128 = if negative { -1 } else { 0 };
        for (at, &byte) in bytes.iter().enumerate() {
            let byte = match (at, negative) {
                (0, false) => byte & 0x7f,
                _ => byte,
            };
            value = (value << 8) | i128::from(byte);
        }
        return i64::try_from(value).ok();
    }
    let text = bytes.iter().copied().skip_while(|byte| matches!(byte, b' ' | 0));
    let mut value = 0i64;
    for byte in text {
        match byte {
            b'0'..=b'7' => value = value.checked_mul(8)?.checked_add(i64::from(byte - b'0'))?,
            b' ' | 0 => break,
            _ => return None,
        }
    }
    Some(value)
}
