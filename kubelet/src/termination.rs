//! Termination messages: the file that a container leaves, or the end of its log. Reads, never writes.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Most that a message may have.
const MAX_MESSAGE: u64 = 4096;
const MAX_LOG_LINES: usize = 80;
const MAX_LOG_BYTES: usize = 2048;
/// How much of the log's end is looked at: 80 lines of 2 KiB hold more than enough.
const LOG_TAIL: u64 = 64 * 1024;

/// Where a message may be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// The mounted file on the host.
    pub file: Option<PathBuf>,
    /// The log, where it stands in for an empty file.
    pub log: Option<PathBuf>,
}

/// The message; empty when there is none, the error's text when it cannot be read.
pub async fn read(source: &Source) -> String {
    let source = source.clone();
    tokio::task::spawn_blocking(move || read_blocking(&source)).await.unwrap_or_default()
}

fn read_blocking(source: &Source) -> String {
    let message = match source.file.as_deref().map(|file| tail(file, MAX_MESSAGE)) {
        None => String::new(),
        Some(Ok(message)) => message,
        Some(Err(e)) if e.kind() == io::ErrorKind::NotFound => String::new(),
        Some(Err(e)) => return format!("error reading termination message: {e}"),
    };
    match &source.log {
        Some(log) if message.is_empty() => match tail(log, LOG_TAIL) {
            Ok(text) => last_lines(&text),
            Err(_) => String::new(),
        },
        _ => message,
    }
}

/// The last bytes of a file that a container may have replaced: no links followed, no waiting.
fn tail(path: &Path, most: u64) -> io::Result<String> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC;
    let flags = i32::try_from(flags.bits()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut file = File::options().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(most)))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The last lines of a CRI log without their headers.
fn last_lines(log: &str) -> String {
    let mut text: Vec<&str> = Vec::new();
    let mut bytes = 0;
    for line in log.lines().rev().take(MAX_LOG_LINES) {
        let Some(content) = line.splitn(4, ' ').nth(3) else { continue };
        bytes += content.len() + 1;
        text.push(content);
        if bytes >= MAX_LOG_BYTES {
            break;
        }
    }
    text.reverse();
    let joined = text.iter().map(|line| format!("{line}\n")).collect::<String>();
    let cut = joined.len().saturating_sub(MAX_LOG_BYTES);
    let start = (cut..joined.len()).find(|i| joined.is_char_boundary(*i)).unwrap_or(joined.len());
    joined[start..].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_wins_and_the_log_stands_in() {
        let folder = tempfile::tempdir().unwrap();
        let (file, log) = (folder.path().join("m"), folder.path().join("0.log"));
        std::fs::write(&log, "2026-01-01T00:00:00.0Z stdout F one\n2026-01-01T00:00:00.0Z stderr F two words\n").unwrap();
        let source = Source { file: Some(file.clone()), log: Some(log.clone()) };
        assert_eq!(read_blocking(&source), "one\ntwo words\n");
        std::fs::write(&file, "said").unwrap();
        assert_eq!(read_blocking(&source), "said");
        std::fs::write(&file, "x".repeat(5000)).unwrap();
        assert_eq!(read_blocking(&source).len(), 4096);
        assert_eq!(read_blocking(&Source::default()), "");
    }

    #[test]
    fn a_link_or_a_fifo_in_place_of_the_file_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("m");
        std::os::unix::fs::symlink("/etc/passwd", &file).unwrap();
        let text = read_blocking(&Source { file: Some(file.clone()), log: None });
        assert!(text.starts_with("error reading termination message"), "{text}");
        std::fs::remove_file(&file).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        let text = read_blocking(&Source { file: Some(file), log: None });
        assert!(text.contains("not a regular file"), "{text}");
    }

    #[test]
    fn log_tails_are_cut_to_80_lines_and_2_kib() {
        let log: String = (0..200).map(|i| format!("t stdout F line {i}\n")).collect();
        let text = last_lines(&log);
        assert_eq!(text.lines().count(), 80);
        assert!(text.ends_with("line 199\n"));
        let long: String = (0..10).map(|i| format!("t stdout F {i}{}\n", "é".repeat(500))).collect();
        assert!(last_lines(&long).len() <= 2048);
    }
}
