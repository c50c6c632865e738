//! Reading tar streams: v7, ustar, GNU and PAX, sparse files included. Owns the format only; what an entry does to a
//! folder is the applier's.
//!
//! Own code instead of a crate's because a layer's names are bytes, its extended attributes may hold anything, and
//! both readings of a doubtful size (PAX record against header) must be the same one that the digest was made of.

use std::io::{self, Read};

const BLOCK: usize = 512;
/// PAX records and GNU long names larger than this are refused.
const MAX_EXTENSION: u64 = 1 << 20;
const MAX_SPARSE_CHUNKS: usize = 1 << 20;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    HardLink,
    Symlink,
    Char,
    Block,
    Dir,
    Fifo,
}

/// One entry's header, long names and PAX records already merged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub kind: Kind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Bytes of data in the stream.
    pub size: u64,
    pub mtime: (i64, u32),
    pub device: (u32, u32),
    /// Names without the `SCHILY.xattr.` prefix.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub sparse: Option<Sparse>,
}

/// Where a sparse file's data goes.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct Sparse {
    pub real_size: u64,
    /// Offset and length; ascending.
    pub chunks: Vec<(u64, u64)>,
}

/// The entries of one stream.
pub(crate) struct TarReader<R> {
    inner: R,
    /// Of the current entry's data.
    left: u64,
    padding: u64,
    /// Bytes taken from `inner`.
    position: u64,
}

impl<R: Read + io::Seek> TarReader<io::BufReader<R>> {
    /// Passes over the current entry's data without reading it.
    pub(crate) fn seek_over_data(&mut self) -> io::Result<()> {
        let rest = self.left + self.padding;
        let step = i64::try_from(rest).map_err(|_| invalid("an entry is too large"))?;
        self.inner.seek_relative(step)?;
        self.position += rest;
        self.left = 0;
        self.padding = 0;
        Ok(())
    }
}

impl<R: Read> TarReader<R> {
    pub(crate) fn new(inner: R) -> Self {
        TarReader { inner, left: 0, padding: 0, position: 0 }
    }

    /// The next entry, or `None` at the archive's end. Data of the current one that was not read is skipped.
    pub(crate) fn next(&mut self) -> io::Result<Option<Entry>> {
        let mut pax = Pax::default();
        let mut long_path = None;
        let mut long_link = None;
        loop {
            self.skip_rest()?;
            let Some(block) = self.header()? else {
                return Ok(None);
            };
            let size = number(&block[124..136]).ok_or_else(|| invalid("size is not a number"))?;
            match block[156] {
                b'x' => pax = Pax::parse(&self.extension(size)?)?,
                b'g' => {
                    // Global records are comments (git's commit id) in practice; Docker and containerd ignore them too.
                    self.extension(size)?;
                }
                b'L' => long_path = Some(until_nul(&self.extension(size)?).to_vec()),
                b'K' => long_link = Some(until_nul(&self.extension(size)?).to_vec()),
                flag => return self.entry(&block, flag, size, pax, long_path, long_link).map(Some),
            }
        }
    }

    /// Reads the current entry's data.
    pub(crate) fn read_data(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if want == 0 {
            return Ok(0);
        }
        let got = self.inner.read(&mut buffer[..want])?;
        if got == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "archive ends inside an entry"));
        }
        self.left -= got as u64;
        self.position += got as u64;
        Ok(got)
    }

    /// Offset of the next byte of the stream: of the current entry's data, right after [`TarReader::next`].
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// What follows the archive's end.
    pub(crate) fn into_inner(self) -> R {
        self.inner
    }

    fn entry(
        &mut self,
        block: &[u8; BLOCK],
        flag: u8,
        size: u64,
        pax: Pax,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> io::Result<Entry> {
        let path = pax.path.or(long_path).unwrap_or_else(|| header_path(block));
        let link = pax.link.or(long_link).unwrap_or_else(|| until_nul(&block[157..257]).to_vec());
        let kind = match flag {
            b'0' | 0 | b'7' if path.ends_with(b"/") => Kind::Dir,
            b'0' | 0 | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Char,
            b'4' => Kind::Block,
            b'5' => Kind::Dir,
            b'6' => Kind::Fifo,
            other => {
                let name = String::from_utf8_lossy(&path).into_owned();
                return Err(invalid(format!("entry {name:?} is of the unknown type {:?}", char::from(other))));
            }
        };
        // Only files carry data; what others say about their size means nothing.
        let size = if kind == Kind::File { pax.size.unwrap_or(size) } else { 0 };
        self.left = size;
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
        let mut entry = Entry {
            path,
            link,
            kind,
            mode: field(&block[100..108], "mode")? & 0o7777,
            uid: pax.uid.map_or_else(|| field(&block[108..116], "uid"), Ok)?,
            gid: pax.gid.map_or_else(|| field(&block[116..124], "gid"), Ok)?,
            size,
            mtime: match pax.mtime {
                Some(mtime) => mtime,
                None => (signed(&block[136..148]).ok_or_else(|| invalid("mtime is not a number"))?, 0),
            },
            device: match kind {
                Kind::Char | Kind::Block => (field(&block[329..337], "major")?, field(&block[337..345], "minor")?),
                _ => (0, 0),
            },
            xattrs: pax.xattrs,
            sparse: None,
        };
        if kind == Kind::File {
            if flag == b'S' {
                entry.sparse = Some(self.gnu_sparse(block)?);
            } else if let Some(sparse) = pax.sparse {
                self.pax_sparse(&mut entry, sparse)?;
            }
        }
        if let Some(sparse) = &entry.sparse {
            check_sparse(sparse, self.left)?;
            entry.size = self.left;
        }
        Ok(entry)
    }

    /// The old GNU form: four chunks in the header, more in blocks behind it.
    fn gnu_sparse(&mut self, block: &[u8; BLOCK]) -> io::Result<Sparse> {
        let mut sparse = Sparse {
            real_size: number(&block[483..495]).ok_or_else(|| invalid("sparse size is not a number"))?,
            chunks: Vec::new(),
        };
        push_chunks(&mut sparse.chunks, &block[386..482])?;
        let mut more = block[482] != 0;
        while more {
            let mut extension = [0u8; BLOCK];
            self.fill(&mut extension)?;
            push_chunks(&mut sparse.chunks, &extension[..504])?;
            more = extension[504] != 0;
        }
        Ok(sparse)
    }

    /// The PAX forms 0.0, 0.1 (map in the records) and 1.0 (map in front of the data).
    fn pax_sparse(&mut self, entry: &mut Entry, sparse: PaxSparse) -> io::Result<()> {
        if let Some(name) = sparse.name {
            entry.path = name;
        }
        let real_size = sparse.real_size.ok_or_else(|| invalid("sparse file without its real size"))?;
        let chunks = if sparse.map_in_data { self.sparse_map()? } else { pairs(&sparse.numbers)? };
        entry.sparse = Some(Sparse { real_size, chunks });
        Ok(())
    }

    fn sparse_map(&mut self) -> io::Result<Vec<(u64, u64)>> {
        let mut numbers = Vec::new();
        let mut wanted = None;
        let mut current: Option<u64> = None;
        loop {
            let mut block = [0u8; BLOCK];
            if self.left < BLOCK as u64 {
                return Err(invalid("sparse map is cut off"));
            }
            self.fill(&mut block)?;
            self.left -= BLOCK as u64;
            for byte in block {
                match byte {
                    b'0'..=b'9' => {
                        let digit = u64::from(byte - b'0');
                        current = current.unwrap_or(0).checked_mul(10).and_then(|value| value.checked_add(digit));
                        if current.is_none() {
                            return Err(invalid("sparse map holds too large a number"));
                        }
                    }
                    b'\n' => {
                        let value = current.take().ok_or_else(|| invalid("sparse map has an empty line"))?;
                        match wanted {
                            None => {
                                let count = usize::try_from(value).ok().filter(|&count| count <= MAX_SPARSE_CHUNKS);
                                wanted = Some(count.ok_or_else(|| invalid("sparse map has too many chunks"))? * 2);
                            }
                            Some(_) => numbers.push(value),
                        }
                        if wanted == Some(numbers.len()) {
                            return pairs(&numbers);
                        }
                    }
                    _ => return Err(invalid("sparse map is not made of numbers")),
                }
            }
        }
    }

    fn header(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let mut block = [0u8; BLOCK];
        if !self.fill_or_end(&mut block)? {
            return Ok(None);
        }
        if block == [0u8; BLOCK] {
            let mut second = [0u8; BLOCK];
            if self.fill_or_end(&mut second)? && second != [0u8; BLOCK] {
                return Err(invalid("a single zero block inside the archive"));
            }
            return Ok(None);
        }
        let expected = number(&block[148..156]).ok_or_else(|| invalid("not a tar header"))?;
        let (mut unsigned, mut signed) = (0u64, 0i64);
        for (at, &byte) in block.iter().enumerate() {
            let byte = if (148..156).contains(&at) { b' ' } else { byte };
            unsigned += u64::from(byte);
            signed += i64::from(byte as i8);
        }
        if expected != unsigned && i64::try_from(expected) != Ok(signed) {
            return Err(invalid("tar header checksum is wrong"));
        }
        Ok(Some(block))
    }

    fn extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > MAX_EXTENSION {
            return Err(invalid("an extended header is larger than 1 MiB"));
        }
        let mut data = vec![0u8; size as usize];
        self.fill(&mut data)?;
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
        Ok(data)
    }

    fn skip_rest(&mut self) -> io::Result<()> {
        let mut scratch = [0u8; 8192];
        let mut rest = self.left + self.padding;
        self.left = 0;
        self.padding = 0;
        while rest > 0 {
            let step = rest.min(scratch.len() as u64) as usize;
            self.fill(&mut scratch[..step])?;
            rest -= step as u64;
        }
        Ok(())
    }

    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.inner.read_exact(buffer)?;
        self.position += buffer.len() as u64;
        Ok(())
    }

    /// False when the stream ends exactly here.
    fn fill_or_end(&mut self, block: &mut [u8; BLOCK]) -> io::Result<bool> {
        let mut got = 0;
        while got < BLOCK {
            match self.inner.read(&mut block[got..]) {
                Ok(0) if got == 0 => return Ok(false),
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "archive ends inside a header")),
                Ok(count) => got += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.position += BLOCK as u64;
        Ok(true)
    }
}

/// One `x` header's records.
#[derive(Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: Option<PaxSparse>,
}

#[derive(Default)]
struct PaxSparse {
    name: Option<Vec<u8>>,
    real_size: Option<u64>,
    numbers: Vec<u64>,
    map_in_data: bool,
}

impl Pax {
    fn parse(mut data: &[u8]) -> io::Result<Pax> {
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

fn header_path(block: &[u8; BLOCK]) -> Vec<u8> {
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

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

fn field(bytes: &[u8], name: &str) -> io::Result<u32> {
    number(bytes)
        .and_then(|value| u32::try_from(value).ok())
        .ok_or_else(|| invalid(format!("header field {name} is not a number that fits")))
}

fn number(bytes: &[u8]) -> Option<u64> {
    signed(bytes).and_then(|value| u64::try_from(value).ok())
}

/// Octal text, or base 256 when the first bit is set.
fn signed(bytes: &[u8]) -> Option<i64> {
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

fn push_chunks(chunks: &mut Vec<(u64, u64)>, bytes: &[u8]) -> io::Result<()> {
    for pair in bytes.chunks_exact(24) {
        if pair[0] == 0 {
            break;
        }
        let (offset, length) = (number(&pair[..12]), number(&pair[12..]));
        let (Some(offset), Some(length)) = (offset, length) else {
            return Err(invalid("sparse map is not made of numbers"));
        };
        chunks.push((offset, length));
    }
    if chunks.len() > MAX_SPARSE_CHUNKS {
        return Err(invalid("sparse map has too many chunks"));
    }
    Ok(())
}

fn pairs(numbers: &[u64]) -> io::Result<Vec<(u64, u64)>> {
    if !numbers.len().is_multiple_of(2) {
        return Err(invalid("sparse map has an odd count of numbers"));
    }
    Ok(numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}

fn check_sparse(sparse: &Sparse, data: u64) -> io::Result<()> {
    let (mut end, mut sum) = (0u64, 0u64);
    for &(offset, length) in &sparse.chunks {
        let Some(next) = offset.checked_add(length).filter(|_| offset >= end) else {
            return Err(invalid("sparse map is not ascending"));
        };
        end = next;
        sum += length;
    }
    if end > sparse.real_size || sum != data {
        return Err(invalid("sparse map does not fit its data"));
    }
    Ok(())
}

fn invalid(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

#[cfg(test)]
#[path = "tar_tests.rs"]
mod tests;
