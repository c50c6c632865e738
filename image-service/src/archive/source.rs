//! Files by name out of a folder or a tar, without unpacking the tar.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Error;
use crate::store::core::Core;
use crate::store::disk::StagingDir;
use crate::unpack::clean;
use crate::unpack::stream::Decoder;
use crate::unpack::tar::{Kind, TarReader};

const MAX_LINKS: usize = 8;

/// Where an archive's files are.
pub(crate) struct Source {
    path: PathBuf,
    kind: Place,
    /// Holds the decompressed copy of a compressed tar.
    _staged: Option<StagingDir>,
}

enum Place {
    Folder,
    Tar { file: Arc<File>, items: HashMap<String, Item> },
}

enum Item {
    Data { offset: u64, length: u64 },
    Link(String),
}

impl Source {
    pub(crate) fn open(core: &Core, path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::file("open", path, source);
        if std::fs::metadata(path).map_err(failed)?.is_dir() {
            return Ok(Source { path: path.to_path_buf(), kind: Place::Folder, _staged: None });
        }
        let mut file = File::open(path).map_err(failed)?;
        let mut magic = [0u8; 4];
        let got = file.read_at(&mut magic, 0).map_err(failed)?;
        let mut staged = None;
        if magic[..got].starts_with(&[0x1f, 0x8b]) || magic[..got] == [0x28, 0xb5, 0x2f, 0xfd] {
            let dir = core.stage()?;
            let copy = dir.path().join("archive");
            let failed = |source| Error::file("decompress", path, source);
            let mut plain = File::options().read(true).write(true).create_new(true).open(&copy).map_err(failed)?;
            io::copy(&mut Decoder::new(file), &mut plain).map_err(failed)?;
            plain.rewind().map_err(failed)?;
            file = plain;
            staged = Some(dir);
        }
        let items = scan(&file)
            .map_err(|error| Error::Archive { path: path.to_path_buf(), reason: format!("not an archive: {error}") })?;
        Ok(Source { path: path.to_path_buf(), kind: Place::Tar { file: Arc::new(file), items }, _staged: staged })
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        match &self.kind {
            Place::Folder => self.path.join(name).is_file(),
            Place::Tar { items, .. } => items.contains_key(name),
        }
    }

    /// Reads a small file whole.
    pub(crate) fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, Error> {
        let (stream, length) = self.stream(name)?;
        if length > limit {
            return Err(self.refused(format!("{name} is larger than {limit} bytes")));
        }
        let mut bytes = Vec::new();
        stream.take(limit).read_to_end(&mut bytes).map_err(|source| Error::file("read", &self.path, source))?;
        Ok(bytes)
    }

    /// A file's bytes and how many there are.
    pub(crate) fn stream(&self, name: &str) -> Result<(Box<dyn Read + Send>, u64), Error> {
        match &self.kind {
            Place::Folder => {
                if clean(name.as_bytes())?.as_slice() != name.as_bytes() {
                    return Err(self.refused(format!("{name} is not a plain name")));
                }
                let path = self.path.join(name);
                let failed = |source| Error::file("open", &path, source);
                let file = File::open(&path).map_err(failed)?;
                let length = file.metadata().map_err(failed)?.len();
                Ok((Box::new(file), length))
            }
            Place::Tar { file, items } => {
                let mut name = plain(name.as_bytes()).unwrap_or_default();
                for _ in 0..MAX_LINKS {
                    match items.get(&name) {
                        Some(Item::Data { offset, length }) => {
                            let slice = Slice { file: file.clone(), at: *offset, end: offset + length };
                            return Ok((Box::new(slice), *length));
                        }
                        Some(Item::Link(target)) => name = target.clone(),
                        None => break,
                    }
                }
                Err(self.refused(format!("{name} is missing")))
            }
        }
    }

    fn refused(&self, reason: String) -> Error {
        Error::Archive { path: self.path.clone(), reason }
    }
}

fn plain(name: &[u8]) -> Option<String> {
    clean(name).ok().and_then(|name| String::from_utf8(name).ok())
}

/// Where each file of a tar begins.
fn scan(file: &File) -> io::Result<HashMap<String, Item>> {
    let mut tar = TarReader::new(BufReader::with_capacity(16 * 1024, file));
    let mut items = HashMap::new();
    while let Some(entry) = tar.next()? {
        let folder = |name: &str| name.rfind('/').map_or(String::new(), |at| name[..at].to_string());
        if let Some(name) = plain(&entry.path) {
            let target = |from: &str| plain(&[from.as_bytes(), b"/", &entry.link].concat());
            let item = match entry.kind {
                Kind::File if entry.sparse.is_none() => Some(Item::Data { offset: tar.position(), length: entry.size }),
                // Old Docker links a layer that two images share.
                Kind::Symlink => target(&folder(&name)).map(Item::Link),
                Kind::HardLink => target("").map(Item::Link),
                _ => None,
            };
            items.extend(item.map(|item| (name, item)));
        }
        tar.seek_over_data()?;
    }
    Ok(items)
}

/// A part of a file, read without moving its position.
struct Slice {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl Read for Slice {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.end - self.at).unwrap_or(usize::MAX).min(buffer.len());
        let got = self.file.read_at(&mut buffer[..want], self.at)?;
        if got == 0 && want > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at += got as u64;
        Ok(got)
    }
}
