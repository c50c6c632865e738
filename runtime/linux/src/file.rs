//! Regular files that are written with the mode they are to have. Knows no format and does not sync.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::OFlags;

/// Mode of a file that root alone may read: environment variables hold secrets, and the folders above can be passed by anybody.
pub const PRIVATE: u32 = 0o600;

/// Writes a file with exactly this mode, whatever the umask is and whatever was there before; no link is followed. The content
/// comes after the mode: who may not read the file never sees a part of it.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<File> {
    let mut open = OpenOptions::new();
    open.write(true).create(true).truncate(true).mode(mode).custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    let mut file = open.open(path)?;
    if file.metadata()?.permissions().mode() & 0o7777 != mode {
        file.set_permissions(Permissions::from_mode(mode))?;
    }
    file.write_all(bytes)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_file_has_the_wanted_mode_also_where_one_that_all_may_read_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "earlier and longer").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        write(&path, b"secret", PRIVATE).unwrap();
        assert_eq!((std::fs::read(&path).unwrap(), mode(&path)), (b"secret".to_vec(), 0o600));
        write(&path, b"7", 0o644).unwrap();
        assert_eq!(mode(&path), 0o644);
    }

    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link"));
        std::fs::write(&target, "mine").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(write(&link, b"x", PRIVATE).is_err());
        assert_eq!(std::fs::read(&target).unwrap(), b"mine");
    }
}
