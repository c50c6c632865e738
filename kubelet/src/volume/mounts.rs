//! Which mounts lie below a folder. Reads the mount table only.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Mount points below `folder`, outer ones first.
pub fn below(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let folder = fs::canonicalize(folder)?;
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(parse(&table).into_iter().filter(|path| path.starts_with(&folder) && *path != folder).collect())
}

/// Whether `path` itself is a mount point.
pub fn is_mount_point(path: &Path) -> io::Result<bool> {
    let path = fs::canonicalize(path)?;
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(parse(&table).contains(&path))
}

/// Makes a folder's mount a shared one, as the upstream does with its folder; where it is on a mount that is not, the folder is
/// mounted on itself.
pub fn ensure_shared(folder: &Path) -> io::Result<()> {
    let folder = fs::canonicalize(folder)?;
    let entries = berth_linux::mount::mounts().map_err(io::Error::other)?;
    // Of two mounts at one place the later one is seen.
    let own =
        entries.iter().rev().filter(|e| folder.starts_with(&e.mount_point)).max_by_key(|e| e.mount_point.components().count());
    let Some(own) = own.filter(|own| own.shared.is_none()) else { return Ok(()) };
    if own.mount_point != folder {
        rustix::mount::mount_bind_recursive(&folder, &folder)?;
    }
    let flags = rustix::mount::MountPropagationFlags::SHARED | rustix::mount::MountPropagationFlags::REC;
    Ok(rustix::mount::mount_change(&folder, flags)?)
}

/// Takes away the mount of a folder on itself that [`ensure_shared`] made.
pub fn end_sharing(folder: &Path) -> io::Result<()> {
    let folder = fs::canonicalize(folder)?;
    let entries = berth_linux::mount::mounts().map_err(io::Error::other)?;
    let Some(own) = entries.iter().rfind(|e| e.mount_point == folder) else { return Ok(()) };
    let parent = entries.iter().find(|e| e.id == own.parent);
    // Any other mount there is the machine's, not ours: ours shows the very folder that it covers.
    let covers_itself = |parent: &berth_linux::mount::MountEntry| {
        let below = folder.strip_prefix(&parent.mount_point).is_ok_and(|below| parent.root.join(below) == own.root);
        parent.device == own.device && below
    };
    match parent.is_some_and(covers_itself) {
        true => Ok(rustix::mount::unmount(&folder, rustix::mount::UnmountFlags::NOFOLLOW | rustix::mount::UnmountFlags::DETACH)?),
        false => Ok(()),
    }
}

/// Of bytes: paths need not be UTF-8, and whose mount that is has nothing to do with ours.
fn parse(table: &[u8]) -> Vec<PathBuf> {
    table.split(|byte| *byte == b'\n').filter_map(|line| line.split(|byte| *byte == b' ').nth(4)).map(unescape).collect()
}

/// `\040` → blank.
fn unescape(bytes: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let code = bytes.get(i + 1..i + 4).and_then(|d| str::from_utf8(d).ok()).and_then(|d| u8::from_str_radix(d, 8).ok());
        match (bytes[i], code) {
            (b'\\', Some(byte)) => {
                out.push(byte);
                i += 4;
            }
            (byte, _) => {
                out.push(byte);
                i += 1;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaped_paths_are_read() {
        let table = b"36 35 98:0 /a /mnt/a\\040b rw - ext4 /dev/x rw\n37 36 0:5 / /mnt/\xff rw - tmpfs t rw\n";
        assert_eq!(parse(table), [PathBuf::from("/mnt/a b"), PathBuf::from(OsString::from_vec(b"/mnt/\xff".to_vec()))]);
    }

    #[test]
    fn proc_is_a_mount_point() {
        assert!(is_mount_point(Path::new("/proc")).unwrap());
        assert!(below(Path::new("/")).unwrap().contains(&PathBuf::from("/proc")));
    }
}
