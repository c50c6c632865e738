//! Header blocks: name-value pairs in one zlib context per direction with SPDY's preset dictionary.

use std::collections::BTreeMap;
use std::io;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// The dictionary of the SPDY/3 draft.
const DICTIONARY: &[u8] = include_bytes!("dictionary.bin");
/// A header block larger than this is an attack.
const LIMIT: usize = 64 * 1024;

/// Names in lower case, with their values.
pub(crate) type Headers = BTreeMap<String, String>;

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("spdy header block: {what}"))
}

/// Reads header blocks of one direction.
pub(super) struct Inflater {
    zlib: Decompress,
}

impl Inflater {
    pub(super) fn new() -> Self {
        Self { zlib: Decompress::new(true) }
    }

    pub(super) fn read(&mut self, block: &[u8]) -> io::Result<Headers> {
        let plain = self.inflate(block)?;
        parse(&plain).ok_or_else(|| broken("cut off"))
    }

    fn inflate(&mut self, block: &[u8]) -> io::Result<Vec<u8>> {
        let mut plain = Vec::with_capacity(1024);
        let mut input = block;
        loop {
            if plain.len() == plain.capacity() {
                plain.reserve(4096);
            }
            let before = self.zlib.total_in();
            let filled = plain.len();
            let result = self.zlib.decompress_vec(input, &mut plain, FlushDecompress::Sync);
            input = &input[(self.zlib.total_in() - before) as usize..];
            match result {
                Err(e) if e.needs_dictionary().is_some() => {
                    self.zlib.set_dictionary(DICTIONARY).map_err(|e| broken(&e.to_string()))?;
                }
                Err(e) => return Err(broken(&e.to_string())),
                Ok(Status::StreamEnd) => return Ok(plain),
                Ok(_) if plain.len() > LIMIT => return Err(broken("too long")),
                Ok(_) if input.is_empty() && plain.len() < plain.capacity() => return Ok(plain),
                // Neither input taken nor output made: the block can not be what it claims.
                Ok(_) if self.zlib.total_in() == before && plain.len() == filled && plain.len() < plain.capacity() => {
                    return Err(broken("stuck"));
                }
                Ok(_) => {}
            }
        }
    }
}

fn parse(plain: &[u8]) -> Option<Headers> {
    let mut rest = plain;
    let mut number = || -> Option<usize> {
        let (head, tail) = rest.split_first_chunk::<4>()?;
        rest = tail;
        Some(u32::from_be_bytes(*head) as usize)
    };
    let count = number()?;
    let mut headers = Headers::new();
    for _ in 0..count {
        let mut text = || -> Option<String> {
            let (head, tail) = rest.split_first_chunk::<4>()?;
            let length = u32::from_be_bytes(*head) as usize;
            let value = tail.get(..length)?;
            rest = &tail[length..];
            Some(String::from_utf8_lossy(value).into_owned())
        };
        let name = text()?.to_ascii_lowercase();
        headers.insert(name, text()?);
    }
    Some(headers)
}

/// Writes header blocks of one direction.
pub(super) struct Deflater {
    zlib: Compress,
}

impl Deflater {
    pub(super) fn new() -> io::Result<Self> {
        let mut zlib = Compress::new(Compression::fast(), true);
        zlib.set_dictionary(DICTIONARY).map_err(|e| broken(&e.to_string()))?;
        Ok(Self { zlib })
    }

    pub(super) fn write(&mut self, headers: &Headers) -> io::Result<Vec<u8>> {
        let mut plain = Vec::new();
        plain.extend_from_slice(&(headers.len() as u32).to_be_bytes());
        for (name, value) in headers {
            for text in [name, value] {
                plain.extend_from_slice(&(text.len() as u32).to_be_bytes());
                plain.extend_from_slice(text.as_bytes());
            }
        }
        let mut out = Vec::with_capacity(plain.len() + 256);
        let start = self.zlib.total_in();
        loop {
            let taken = (self.zlib.total_in() - start) as usize;
            self.zlib.compress_vec(&plain[taken..], &mut out, FlushCompress::Sync).map_err(|e| broken(&e.to_string()))?;
            if (self.zlib.total_in() - start) as usize == plain.len() && out.len() < out.capacity() {
                return Ok(out);
            }
            out.reserve(1024);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_one_connection_share_a_context() {
        let (mut deflate, mut inflate) = (Deflater::new().unwrap(), Inflater::new());
        for i in 0..50 {
            let headers: Headers = [("streamtype".to_owned(), "stdout".to_owned()), ("n".to_owned(), i.to_string())].into();
            let block = deflate.write(&headers).unwrap();
            assert_eq!(inflate.read(&block).unwrap(), headers);
        }
        let empty = deflate.write(&Headers::new()).unwrap();
        assert!(inflate.read(&empty).unwrap().is_empty());
    }

    #[test]
    fn the_dictionary_is_the_drafts() {
        assert_eq!(DICTIONARY.len(), 1423);
        let (mut a, mut b) = (1u32, 0u32);
        for byte in DICTIONARY {
            a = (a + u32::from(*byte)) % 65521;
            b = (b + a) % 65521;
        }
        assert_eq!(b << 16 | a, 0xe3c6_a7c2);
    }

    #[test]
    fn garbage_is_an_error_and_not_an_endless_loop() {
        assert!(Inflater::new().read(b"this is no zlib stream").is_err());
        assert!(Inflater::new().read(b"").is_err());
        let mut deflate = Deflater::new().unwrap();
        let big: Headers = [("a".to_owned(), "b".repeat(1 << 20))].into();
        let block = deflate.write(&big).unwrap();
        assert!(Inflater::new().read(&block).is_err());
    }
}
