//! The mount table of a process: /proc/<pid>/mountinfo, parsed.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::{Error, Result};

/// One line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// The mount's id.
    pub id: u64,
    /// The id of the mount it is attached to.
    pub parent: u64,
    /// The device number of its filesystem.
    pub device: (u32, u32),
    /// The folder of the filesystem that is mounted.
    pub root: PathBuf,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// Options of the mount, by commas.
    pub options: String,
    /// Its peer group, when it is shared.
    pub shared: Option<u64>,
    /// Its master's peer group, when it is a slave.
    pub master: Option<u64>,
    /// Whether it cannot be bound.
    pub unbindable: bool,
    /// The filesystem's type.
    pub fstype: String,
    /// The filesystem's source.
    pub source: String,
    /// Options of the filesystem, by commas.
    pub super_options: String,
}

impl MountEntry {
    /// Whether the mount has an option.
    #[must_use]
    pub fn has_option(&self, option: &str) -> bool {
        self.options.split(',').any(|other| other == option)
    }
}

/// The mounts that the calling process sees.
pub fn mounts() -> Result<Vec<MountEntry>> {
    load("/proc/self/mountinfo")
}

fn load(path: &str) -> Result<Vec<MountEntry>> {
    let bytes = std::fs::read(path).map_err(|source| Error::Read { subject: path.to_owned(), source })?;
    Ok(parse_mountinfo(&bytes))
}

/// Parses the text of a mountinfo file. Lines that are none are left out.
#[must_use]
pub fn parse_mountinfo(bytes: &[u8]) -> Vec<MountEntry> {
    bytes.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut next = || fields.next();
    let id = number(next()?)?;
    let parent = number(next()?)?;
    let device = std::str::from_utf8(next()?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let root = path(next()?);
    let mount_point = path(next()?);
    let options = text(next()?);
    let (mut shared, mut master, mut unbindable) = (None, None, false);
    loop {
        let field = next()?;
        if field == b"-" {
            break;
        } else if let Some(group) = field.strip_prefix(b"shared:") {
            shared = number(group);
        } else if let Some(group) = field.strip_prefix(b"master:") {
            master = number(group);
        } else if field == b"unbindable" {
            unbindable = true;
        }
    }
    Some(MountEntry {
        id,
        parent,
        device: (major.parse().ok()?, minor.parse().ok()?),
        root,
        mount_point,
        options,
        shared,
        master,
        unbindable,
        fstype: text(next()?),
        source: text(next()?),
        super_options: next().map(text).unwrap_or_default(),
    })
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(&unescape(field)).into_owned()
}

fn path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(field)))
}

/// Undoes the kernel's escapes: a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        if let (b'\\', Some([a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7'])) = (first, tail.get(..3)) {
            out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = &tail[3..];
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_line_is_parsed_with_its_escapes_and_optional_fields() {
        let text = b"36 35 98:0 /mnt1 /mnt\\040two rw,noatime shared:1 master:7 - ext3 /dev/root rw,errors=continue\nnonsense\n\
            37 36 0:5 / /a\\134b ro unbindable - tmpfs none rw\n";
        let entries = parse_mountinfo(text);
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].mount_point, Path::new("/mnt two"));
        assert_eq!((entries[0].shared, entries[0].master), (Some(1), Some(7)));
        assert_eq!(entries[0].device, (98, 0));
        assert!(entries[0].has_option("noatime"));
        assert_eq!(entries[1].mount_point, Path::new("/a\\b"));
        assert!(entries[1].unbindable);
    }
}
