//! PAX records: `length key=value` lines that override a header. Knows no stream.

use std::io;

use super::header::until_nul;
use super::invalid;

/// One `x` header's records.
#[derive(Default)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: Option<PaxSparse>,
}

/// What they say of a sparse file.
#[derive(Default)]
pub(super) struct PaxSparse {
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    pub(super) numbers: Vec<u64>,
    pub(super) map_in_data: bool,
}

impl Pax {
    /// Reads the content of one.
    pub(super) fn parse(mut data: &[u8]) -> io::Result<Pax> {
        let mut pax = Pax::default();
        while !data.is_empty() && data[0] != 0 {
            let (key, value, rest) = record(data).ok_or_else(|| invalid("a PAX record is malformed"))?;
            pax.set(key, value)?;
            data = rest;
        }
        Ok(pax)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        let bad = || invalid(format!("PAX record {:?} has a bad value", String::from_utf8_lossy(key)));
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Ok(());
        }
        if value.is_empty() {
            return Ok(());
        }
        match key {
            b"path" => self.path = Some(until_nul(value).to_vec()),
            b"linkpath" => self.link = Some(until_nul(value).to_vec()),
            b"size" => self.size = Some(decimal(value).ok_or_else(bad)?),
            b"uid" => self.uid = Some(decimal(value).and_then(|id| u32::try_from(id).ok()).ok_or_else(bad)?),
            b"gid" => self.gid = Some(decimal(value).and_then(|id| u32::try_from(id).ok()).ok_or_else(bad)?),
            b"mtime" => self.mtime = Some(time(value).ok_or_else(bad)?),
            _ => {
                if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    return self.set_sparse(key, value).ok_or_else(bad);
                }
            }
        }
        Ok(())
    }

    fn set_sparse(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        let sparse = self.sparse.get_or_insert_default();
        match key {
            b"name" => sparse.name = Some(value.to_vec()),
            b"size" | b"realsize" => sparse.real_size = Some(decimal(value)?),
            b"offset" | b"numbytes" => sparse.numbers.push(decimal(value)?),
            b"map" => sparse.numbers = value.split(|&byte| byte == b',').map(decimal).collect::<Option<_>>()?,
            b"major" => sparse.map_in_data = decimal(value)? == 1,
            _ => {}
        }
        Some(())
    }
}

/// `length key=value\n`.
fn record(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = data.iter().position(|&byte| byte == b' ')?;
    let length = usize::try_from(decimal(&data[..space])?).ok()?;
    let body = data.get(space + 1..length)?;
    let body = body.strip_suffix(b"\n")?;
    let equals = body.iter().position(|&byte| byte == b'=')?;
    Some((&body[..equals], &body[equals + 1..], &data[length..]))
}

fn decimal(text: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(text).ok()?;
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// Seconds with an optional fraction, possibly negative.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let (negative, whole) = match whole.strip_prefix('-') {
        Some(whole) => (true, whole),
        None => (false, whole),
    };
    let seconds = i64::try_from(decimal(whole.as_bytes())?).ok()?;
    let mut nanos = 0u32;
    for at in 0..9 {
        let digit = match fraction.as_bytes().get(at) {
            Some(digit @ b'0'..=b'9') => u32::from(digit - b'0'),
            Some(_) => return None,
            None => 0,
        };
        nanos = nanos * 10 + digit;
    }
    Some(match (negative, nanos) {
        (false, _) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}
