//! Reading tar streams: v7, ustar, GNU and PAX, sparse files included. Owns the format only; what an entry does to a
//! folder is the applier's.
//!
//! Own code instead of a crate's because a layer's names are bytes, its extended attributes may hold anything, and
//! both readings of a doubtful size (PAX record against header) must be the same one that the digest was made of.

mod header;
mod pax;

use std::io::{self, Read};

use header::{field, header_path, number, signed, until_nul};
use pax::{Pax, PaxSparse};

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
