//! One container's log file: append, rotate, reopen. A failure loses entries and counts them; it is never waited for.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use berth_shim::protocol::LogSpec;
use rustix::fs::OFlags;

use super::format::Tag;
use crate::clock;

/// Entries are written in pieces of about this size.
const BATCH: usize = 64 * 1024;

/// Which stream an entry comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or everything of a terminal.
    Stdout,
    /// Standard error output.
    Stderr,
}

impl Stream {
    fn text(self) -> &'static [u8] {
        match self {
            Stream::Stdout => b" stdout",
            Stream::Stderr => b" stderr",
        }
    }
}

/// A log file in CRI format.
#[derive(Debug)]
pub struct LogFile {
    spec: LogSpec,
    /// `None` only between a rotation's rename and an open that failed.
    file: Option<File>,
    /// Bytes in the file: always whole entries.
    length: u64,
    batch: Vec<u8>,
    dropped: u64,
    /// The second in the name of the last rotated file.
    last_rotation: i64,
}

impl LogFile {
    /// Opens the file for appending, making it and its folders when missing.
    pub fn open(spec: LogSpec) -> io::Result<Self> {
        let (file, length) = open_append(&spec.path)?;
        Ok(Self { spec, file: Some(file), length, batch: Vec::new(), dropped: 0, last_rotation: 0 })
    }

    /// A log that could not be opened: everything is dropped until [`LogFile::reopen`] succeeds.
    pub fn closed(spec: LogSpec) -> Self {
        Self { spec, file: None, length: 0, batch: Vec::new(), dropped: 0, last_rotation: 0 }
    }

    /// Adds one entry. It is in the file after the next [`LogFile::flush`].
    pub fn push(&mut self, ns: i64, stream: Stream, tag: Tag, content: &[u8]) {
        let before = self.batch.len();
        clock::push_rfc3339(&mut self.batch, ns);
        self.batch.extend_from_slice(stream.text());
        self.batch.extend_from_slice(tag.text());
        self.batch.extend_from_slice(content);
        self.batch.push(b'\n');
        let over = self.spec.max_bytes > 0 && self.length + self.batch.len() as u64 > self.spec.max_bytes;
        if over && self.length + before as u64 > 0 {
            let entry = self.batch.split_off(before);
            self.flush();
            self.rotate();
            self.batch = entry;
        }
        if self.batch.len() >= BATCH {
            self.flush();
        }
    }

    /// Writes what has been pushed. What cannot be written even at the second try is dropped and counted.
    pub fn flush(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        if self.file.is_none() {
            // A rotation found no room for the new file.
            if let Ok((file, length)) = open_append(&self.spec.path) {
                (self.file, self.length) = (Some(file), length);
            }
        }
        let written = self
            .file
            .as_mut()
            .is_some_and(|file| append(file, self.length, &self.batch) || append(file, self.length, &self.batch));
        if written {
            self.length += self.batch.len() as u64;
        } else {
            self.dropped += self.batch.len() as u64;
        }
        self.batch.clear();
    }

    /// Opens the path anew and lets go of the old file; on an error the old one stays in use.
    pub fn reopen(&mut self) -> io::Result<()> {
        self.flush();
        let (file, length) = open_append(&self.spec.path)?;
        (self.file, self.length) = (Some(file), length);
        Ok(())
    }

    /// Where it is and how it rotates.
    pub fn spec(&self) -> &LogSpec {
        &self.spec
    }

    /// Bytes dropped since the last call.
    pub fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }

    /// Gives back memory while nothing is to be written.
    pub fn shrink(&mut self) {
        self.flush();
        self.batch = Vec::new();
    }

    /// Moves the file aside under the kubelet's naming, starts a new one and removes the oldest beyond the number to keep. When
    /// moving fails, the file goes on growing: better too long than lost.
    fn rotate(&mut self) {
        // Names sort by age, so a second rotation within a second takes the next one.
        let mut seconds = (clock::now_ns() / 1_000_000_000).max(self.last_rotation + 1);
        let target = loop {
            let target = suffixed(&self.spec.path, &clock::rotation_suffix(seconds));
            if std::fs::symlink_metadata(&target).is_err() {
                break target;
            }
            seconds += 1;
        };
        if std::fs::rename(&self.spec.path, &target).is_err() {
            return;
        }
        self.last_rotation = seconds;
        self.file = None;
        if let Ok((file, length)) = open_append(&self.spec.path) {
            (self.file, self.length) = (Some(file), length);
        }
        remove_oldest(&self.spec.path, self.spec.max_files.max(2) as usize - 1);
    }
}

/// Appends all bytes or none: a torn entry would make the rest of the file unreadable.
fn append(file: &mut File, length: u64, bytes: &[u8]) -> bool {
    if file.write_all(bytes).is_ok() {
        return true;
    }
    // Cutting a file cannot fail for want of room; should it fail nevertheless, the torn line is ended at least.
    if file.set_len(length).is_err() {
        let _ = file.write_all(b"\n");
    }
    false
}

fn open_append(path: &Path) -> io::Result<(File, u64)> {
    let open = || {
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o640)
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32)
            .open(path)
    };
    let file = match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(folder) = path.parent() {
                DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
            }
            open()?
        }
        result => result?,
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok((file, metadata.len()))
}

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    PathBuf::from(name)
}

/// Removes the oldest rotated files of `path` until `keep` are left.
fn remove_oldest(path: &Path, keep: usize) {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return;
    };
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    let mut rotated: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|other| other.strip_prefix(name).is_some_and(is_rotation_suffix))
        .collect();
    rotated.sort_unstable();
    let surplus = rotated.len().saturating_sub(keep);
    for old in &rotated[..surplus] {
        let _ = std::fs::remove_file(folder.join(old));
    }
}

/// `.20060102-150405`, with what a compressor may have put behind it.
fn is_rotation_suffix(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() >= 16 && bytes[0] == b'.' && bytes[9] == b'-' && (1..16).all(|at| at == 9 || bytes[at].is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn spec(path: PathBuf, max_bytes: u64, max_files: u32) -> LogSpec {
        LogSpec { path, max_bytes, max_files }
    }

    #[test]
    fn entries_are_appended_in_the_cri_format_below_folders_made_for_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pod/container/0.log");
        let mut log = LogFile::open(spec(path.clone(), 0, 0)).unwrap();
        log.push(0, Stream::Stdout, Tag::Full, b"hello");
        log.push(1, Stream::Stderr, Tag::Partial, b"");
        log.flush();
        drop(log);
        let mut log = LogFile::open(spec(path.clone(), 0, 0)).unwrap();
        log.push(2, Stream::Stdout, Tag::Full, b"again");
        log.flush();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            "1970-01-01T00:00:00.000000000Z stdout F hello\n\
             1970-01-01T00:00:00.000000001Z stderr P \n\
             1970-01-01T00:00:00.000000002Z stdout F again\n"
        );
    }

    #[test]
    fn rotation_keeps_whole_entries_below_the_limit_and_the_newest_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        std::fs::write(folder.path().join("0.log.other"), "kept").unwrap();
        let mut log = LogFile::open(spec(path.clone(), 200, 3)).unwrap();
        // 48 bytes each: four fit into a file.
        for n in 0..18 {
            log.push(n, Stream::Stdout, Tag::Full, format!("line{n:03}").as_bytes());
        }
        log.flush();
        let names = names(folder.path());
        assert_eq!(names.len(), 4, "{names:?}");
        assert_eq!(names[0], "0.log");
        assert_eq!(names[3], "0.log.other");
        let mut text = String::new();
        for name in [&names[1], &names[2], &names[0]] {
            let part = std::fs::read_to_string(folder.path().join(name)).unwrap();
            assert!(part.len() <= 200, "{name} has {}", part.len());
            text.push_str(&part);
        }
        let last: Vec<&str> = text.lines().map(|line| &line[line.len() - 3..]).collect();
        assert_eq!(last, ["008", "009", "010", "011", "012", "013", "014", "015", "016", "017"]);
    }

    #[test]
    fn an_entry_longer_than_the_limit_gets_a_file_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        let mut log = LogFile::open(spec(path.clone(), 100, 5)).unwrap();
        log.push(0, Stream::Stdout, Tag::Full, &[b'x'; 300]);
        log.push(0, Stream::Stdout, Tag::Full, b"short");
        log.flush();
        assert_eq!(names(folder.path()).len(), 2);
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("short\n"));
    }

    #[test]
    fn reopening_follows_the_path_and_a_failure_keeps_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("logs/0.log");
        let mut log = LogFile::open(spec(path.clone(), 0, 0)).unwrap();
        log.push(0, Stream::Stdout, Tag::Full, b"one");
        let old = folder.path().join("logs/0.log.20240101-000000");
        std::fs::rename(&path, &old).unwrap();
        log.reopen().unwrap();
        log.push(0, Stream::Stdout, Tag::Full, b"two");
        log.flush();
        assert!(std::fs::read_to_string(&old).unwrap().ends_with("one\n"));
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("two\n"));

        let away = folder.path().join("away");
        std::fs::rename(folder.path().join("logs"), &away).unwrap();
        std::fs::write(folder.path().join("logs"), "in the way").unwrap();
        log.reopen().unwrap_err();
        log.push(0, Stream::Stdout, Tag::Full, b"three");
        log.flush();
        assert!(std::fs::read_to_string(away.join("0.log")).unwrap().ends_with("three\n"));
        assert_eq!(log.take_dropped(), 0);
    }

    #[test]
    fn what_is_not_a_regular_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link.log");
        std::os::unix::fs::symlink("/etc/hostname", &link).unwrap();
        LogFile::open(spec(link, 0, 0)).unwrap_err();
        LogFile::open(spec("/dev/null".into(), 0, 0)).unwrap_err();
    }

    #[test]
    fn a_full_disk_loses_whole_entries_and_counts_them() {
        // /dev/full takes nothing; it is put in by hand, because open() refuses it.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        let mut log = LogFile::open(spec(path.clone(), 0, 0)).unwrap();
        let good = log.file.replace(File::options().append(true).open("/dev/full").unwrap());
        log.push(0, Stream::Stdout, Tag::Full, b"lost");
        log.flush();
        assert_eq!(log.take_dropped(), 45);
        log.file = good;
        log.push(0, Stream::Stdout, Tag::Full, b"kept");
        log.flush();
        assert_eq!(log.take_dropped(), 0);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1970-01-01T00:00:00.000000000Z stdout F kept\n");
    }
}
