//! Small JSON records: written beside their place and moved there, so that a reader never sees half of one.

use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// Writes a record; its folder is made.
pub(crate) fn write<T: Serialize>(path: &Path, record: &T) -> Result<()> {
    let bytes = serde_json::to_vec(record).map_err(Error::decode(path.display().to_string()))?;
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(Error::file("create folder", folder))?;
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = Path::new(&temporary);
    fs::write(temporary, bytes).map_err(Error::file("write", temporary))?;
    fs::rename(temporary, path).map_err(Error::file("rename to", path))
}

/// Reads a record; none if there is none.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(Error::decode(path.display().to_string())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::file("read", path)(error)),
    }
}

/// Deletes a record; one that is gone is no error.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::file("delete", path)(error)),
        _ => Ok(()),
    }
}

/// The records of a folder that can be read; unfinished ones are left out, unreadable ones are reported in the log.
pub(crate) fn list<T: DeserializeOwned>(folder: &Path) -> Result<Vec<T>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::file("list", folder)(error)),
    };
    let mut records = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_none_or(|e| e != "new")) {
        match read(&path) {
            Ok(record) => records.extend(record),
            Err(error) => tracing::warn!(path = %path.display(), error = error.chain_text(), "unreadable network record"),
        }
    }
    Ok(records)
}

/// The running boot's id.
pub(crate) fn boot_id() -> Result<String> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    Ok(fs::read_to_string(path).map_err(Error::file("read", path))?.trim().to_owned())
}
