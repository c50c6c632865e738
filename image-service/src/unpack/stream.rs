//! A layer's stream: compressed digest and size, decoding, diff-id, entries, all in one pass.
//!
//! Large layers are decoded on a thread of their own while this one writes files; buffers between them are bounded
//! and go round.

use std::io::{self, BufReader, Read};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest as _, Sha256};

use super::apply::{Applied, Applier};
use super::tar::TarReader;
use crate::digest::Digest;
use crate::error::Error;

const CHUNK: usize = 128 * 1024;
/// Fewer compressed bytes than this are not worth a thread.
const THREAD_FROM: u64 = 256 * 1024;
const CHUNKS_UNDER_WAY: usize = 4;

/// What a layer's bytes must turn out to be.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    /// Digest and size as stored or sent; `None` for a layer that is only known by its diff-id.
    pub blob: Option<(Digest, u64)>,
    pub diff_id: Digest,
}

/// Reads a whole layer into the empty folder `root`. The folder's content means nothing unless this succeeds.
pub(crate) fn unpack(source: impl Read + Send + 'static, expected: &Expected, root: OwnedFd) -> Result<Applied, Error> {
    let subject = match &expected.blob {
        Some((digest, _)) => format!("layer {digest}"),
        None => format!("layer {}", expected.diff_id),
    };
    let stream = LayerStream::new(source);
    let large = expected.blob.as_ref().is_none_or(|(_, size)| *size >= THREAD_FROM);
    let (applied, found) = if large {
        let pump = Pump::start(stream).map_err(|source| Error::LayerStream { layer: subject.clone(), source })?;
        apply(pump, root, &subject, |mut pump| {
            drain(&mut pump)?;
            pump.totals.recv().map_err(|_| io::Error::other("the decoder ended early"))?
        })?
    } else {
        apply(stream, root, &subject, |mut stream| {
            drain(&mut stream)?;
            stream.finish()
        })?
    };
    if let Some((digest, size)) = &expected.blob {
        if found.size != *size {
            return Err(Error::SizeMismatch { subject, expected: *size, found: found.size });
        }
        if found.blob != *digest {
            return Err(Error::DigestMismatch { subject, expected: *digest, found: found.blob });
        }
    }
    if found.diff_id != expected.diff_id {
        return Err(Error::DigestMismatch {
            subject: format!("{subject}, uncompressed"),
            expected: expected.diff_id,
            found: found.diff_id,
        });
    }
    Ok(applied)
}

fn apply<R: Read>(
    stream: R,
    root: OwnedFd,
    subject: &str,
    end: impl FnOnce(R) -> io::Result<Totals>,
) -> Result<(Applied, Totals), Error> {
    let broken = |source| Error::LayerStream { layer: subject.to_string(), source };
    let mut tar = TarReader::new(stream);
    let mut applier = Applier::new(root);
    while let Some(entry) = tar.next().map_err(broken)? {
        applier.apply(&entry, &mut tar)?;
    }
    let totals = end(tar.into_inner()).map_err(broken)?;
    Ok((applier.finish()?, totals))
}

fn drain(stream: &mut impl Read) -> io::Result<()> {
    let mut scratch = vec![0; 32 * 1024];
    while stream.read(&mut scratch)? > 0 {}
    Ok(())
}

/// What the whole stream was.
struct Totals {
    blob: Digest,
    size: u64,
    diff_id: Digest,
}

/// Hashes what passes.
pub(crate) struct Hashed<R> {
    inner: R,
    hasher: Sha256,
    size: u64,
}

impl<R: Read> Hashed<R> {
    fn new(inner: R) -> Self {
        Hashed { inner, hasher: Sha256::new(), size: 0 }
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        self.size += count as u64;
        Ok(count)
    }
}

type Compressed<R> = BufReader<io::Chain<io::Cursor<Vec<u8>>, Hashed<R>>>;

/// The decoders; the format is told by the first bytes, as media types are often wrong.
#[allow(clippy::large_enum_variant, reason = "one per layer, and it becomes the large variant at once")]
pub(crate) enum Decoder<R: Read> {
    /// Before the first read.
    Start(Option<Hashed<R>>),
    Gzip(MultiGzDecoder<Compressed<R>>),
    Zstd(zstd::stream::read::Decoder<'static, Compressed<R>>),
    Plain(Compressed<R>),
}

impl<R: Read> Decoder<R> {
    pub(crate) fn new(source: R) -> Self {
        Decoder::Start(Some(Hashed::new(source)))
    }

    fn open(&mut self) -> io::Result<()> {
        let Decoder::Start(start) = self else {
            return Ok(());
        };
        let Some(mut source) = start.take() else {
            return Err(io::Error::other("an earlier read failed"));
        };
        let mut magic = vec![0u8; 4];
        let mut got = 0;
        while got < magic.len() {
            match source.read(&mut magic[got..])? {
                0 => break,
                count => got += count,
            }
        }
        magic.truncate(got);
        let gzip = magic.starts_with(&[0x1f, 0x8b]);
        let zstd = magic == [0x28, 0xb5, 0x2f, 0xfd];
        let compressed = BufReader::with_capacity(64 * 1024, io::Cursor::new(magic).chain(source));
        *self = if gzip {
            Decoder::Gzip(MultiGzDecoder::new(compressed))
        } else if zstd {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(compressed)?;
            // Frames with larger windows would need that much memory.
            decoder.window_log_max(27)?;
            Decoder::Zstd(decoder)
        } else {
            Decoder::Plain(compressed)
        };
        Ok(())
    }

    /// Reads what the decoder left over and gives digest and size of all that was read.
    fn finish(self) -> io::Result<(Digest, u64)> {
        let mut compressed = match self {
            Decoder::Start(Some(source)) => BufReader::new(io::Cursor::new(Vec::new()).chain(source)),
            Decoder::Start(None) => return Err(io::Error::other("an earlier read failed")),
            Decoder::Gzip(decoder) => decoder.into_inner(),
            Decoder::Zstd(decoder) => decoder.finish(),
            Decoder::Plain(compressed) => compressed,
        };
        drain(&mut compressed)?;
        let (_, hashed) = compressed.into_inner().into_inner();
        Ok((Digest::from_hasher(hashed.hasher), hashed.size))
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.open()?;
        match self {
            Decoder::Start(_) => Ok(0),
            Decoder::Gzip(decoder) => decoder.read(buffer),
            Decoder::Zstd(decoder) => decoder.read(buffer),
            Decoder::Plain(compressed) => compressed.read(buffer),
        }
    }
}

/// Decoded bytes, hashed on both sides of the decoder.
struct LayerStream<R: Read> {
    decoded: Hashed<Decoder<R>>,
}

impl<R: Read> LayerStream<R> {
    fn new(source: R) -> Self {
        LayerStream { decoded: Hashed::new(Decoder::new(source)) }
    }

    fn finish(self) -> io::Result<Totals> {
        let (blob, size) = self.decoded.inner.finish()?;
        Ok(Totals { blob, size, diff_id: Digest::from_hasher(self.decoded.hasher) })
    }
}

impl<R: Read> Read for LayerStream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.decoded.read(buffer)
    }
}

/// A decoder on its own thread.
struct Pump {
    chunks: Receiver<io::Result<Vec<u8>>>,
    empties: Sender<Vec<u8>>,
    totals: Receiver<io::Result<Totals>>,
    current: Vec<u8>,
    at: usize,
    ended: bool,
}

impl Pump {
    fn start<R: Read + Send + 'static>(stream: LayerStream<R>) -> io::Result<Pump> {
        let (chunk_out, chunks) = sync_channel(CHUNKS_UNDER_WAY);
        let (empties, empty_in) = channel();
        let (totals_out, totals) = channel();
        std::thread::Builder::new().name("image-decode".into()).spawn(move || {
            if pump(stream, &chunk_out, &empty_in).is_some_and(|totals| totals_out.send(totals).is_err()) {
                tracing::debug!("nobody waited for the layer's digests");
            }
        })?;
        Ok(Pump { chunks, empties, totals, current: Vec::new(), at: 0, ended: false })
    }
}

/// Runs until the stream ends or nobody reads any more.
fn pump<R: Read>(
    mut stream: LayerStream<R>,
    chunks: &SyncSender<io::Result<Vec<u8>>>,
    empties: &Receiver<Vec<u8>>,
) -> Option<io::Result<Totals>> {
    loop {
        let mut chunk = empties.try_recv().unwrap_or_default();
        chunk.resize(CHUNK, 0);
        let mut filled = 0;
        let failure = loop {
            if filled == chunk.len() {
                break None;
            }
            match stream.read(&mut chunk[filled..]) {
                Ok(0) => break None,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Some(error),
            }
        };
        let ended = filled < chunk.len();
        chunk.truncate(filled);
        if filled > 0 {
            chunks.send(Ok(chunk)).ok()?;
        }
        if let Some(error) = failure {
            chunks.send(Err(error)).ok()?;
            return None;
        }
        if ended {
            return Some(stream.finish());
        }
    }
}

impl Read for Pump {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.current.len() {
            if self.ended {
                return Ok(0);
            }
            // A failed send only means that the decoder has ended and needs no empty buffer.
            let _ = self.empties.send(std::mem::take(&mut self.current));
            self.at = 0;
            match self.chunks.recv() {
                Ok(chunk) => self.current = chunk?,
                Err(_) => self.ended = true,
            }
        }
        let count = buffer.len().min(self.current.len() - self.at);
        buffer[..count].copy_from_slice(&self.current[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}
