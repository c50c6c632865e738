//! Writing a file, or pointing a link, so that readers see either the old or the new.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

fn beside(path: &Path) -> io::Result<(&Path, PathBuf)> {
    let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    Ok((parent, parent.join(format!(".{name}.new"))))
}

/// Replaces `path` with `content`; its folder is made where it is missing.
pub(crate) fn write(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let failed = |source| Error::WriteFile { path: path.to_owned(), source };
    let (parent, temporary) = beside(path).map_err(failed)?;
    ensure_folder(parent)?;
    // Made anew, so that the mode counts whatever lies there from a run that was cut off.
    let _ = fs::remove_file(&temporary);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary).map_err(failed)?;
    let written = file.write_all(content).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&temporary, path));
    let written = written.and_then(|()| File::open(parent)?.sync_all());
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(failed)
}

/// Points the link `path` at `target`.
pub(crate) fn link(path: &Path, target: &Path) -> Result<()> {
    let failed = |source| Error::WriteFile { path: path.to_owned(), source };
    let (parent, temporary) = beside(path).map_err(failed)?;
    let _ = fs::remove_file(&temporary);
    symlink(target, &temporary).map_err(failed)?;
    fs::rename(&temporary, path).and_then(|()| File::open(parent)?.sync_all()).map_err(failed)
}

fn ensure_folder(path: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o755).create(path);
    made.map_err(|source| Error::WriteFile { path: path.to_owned(), source })
}
