//! `berth logs`: the CRI log of a container, as `kubectl logs` prints it; follows over rotations.

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use berth_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use berth_cri_api::v1::{ContainerState, ContainerStatusRequest};
use tonic::transport::Channel;

use crate::{cli, client, find};

/// How often a follower looks for more: what `kubectl logs -f` users perceive as at once.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(100);

/// One entry of a CRI log: time, stream, tag and content. Lines that are not in CRI form give none.
fn parse(line: &[u8]) -> Option<(&[u8], &[u8], bool, &[u8])> {
    let mut parts = line.splitn(4, |b| *b == b' ');
    let (time, stream, tag) = (parts.next()?, parts.next()?, parts.next()?);
    let full = tag.split(|b| *b == b':').next() == Some(b"F");
    Some((time, stream, full, parts.next().unwrap_or_default()))
}

/// Turns entries into text: partial ones are joined up to the full one that ends them; stderr goes to stderr.
fn print(line: &[u8], timestamps: bool, at_start: &mut bool) -> std::io::Result<()> {
    let Some((time, stream, full, content)) = parse(line) else { return std::io::stdout().write_all(line) };
    let mut text = Vec::with_capacity(content.len() + 48);
    if timestamps && *at_start {
        text.extend_from_slice(time);
        text.push(b' ');
    }
    text.extend_from_slice(content);
    if full {
        text.push(b'\n');
    }
    *at_start = full;
    if stream == b"stderr" { std::io::stderr().write_all(&text) } else { std::io::stdout().write_all(&text) }
}

/// The bytes after the start of the last `lines` full entries.
fn tail(bytes: &[u8], lines: usize) -> &[u8] {
    let mut left = lines;
    let mut end = bytes.len();
    while end > 0 {
        let start = bytes[..end - 1].iter().rposition(|b| *b == b'\n').map_or(0, |p| p + 1);
        // A partial entry belongs to the full one behind it.
        if parse(&bytes[start..end]).is_none_or(|(_, _, full, _)| full) {
            if left == 0 {
                return &bytes[end..];
            }
            left -= 1;
        }
        end = start;
    }
    bytes
}

async fn running(client: &mut RuntimeServiceClient<Channel>, id: &str) -> Result<bool> {
    let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
    match client.container_status(request).await {
        Ok(reply) => Ok(reply
            .into_inner()
            .status
            .is_some_and(|s| matches!(s.state(), ContainerState::ContainerRunning | ContainerState::ContainerCreated))),
        Err(status) if status.code() == tonic::Code::NotFound => Ok(false),
        Err(status) => bail!("{}", status.message()),
    }
}

struct Follower {
    path: PathBuf,
    file: std::fs::File,
    rest: Vec<u8>,
}

impl Follower {
    /// Reads what there is and hands out the complete lines.
    fn read_lines(&mut self) -> std::io::Result<Vec<u8>> {
        self.file.read_to_end(&mut self.rest)?;
        let end = self.rest.iter().rposition(|b| *b == b'\n').map_or(0, |p| p + 1);
        let kept = self.rest.split_off(end);
        Ok(std::mem::replace(&mut self.rest, kept))
    }

    /// Goes over to the new file when the path names another one, after the old one was read to its end.
    fn rotate(&mut self) -> std::io::Result<bool> {
        let Ok(now) = std::fs::metadata(&self.path) else { return Ok(false) };
        let held = self.file.metadata()?;
        if (now.dev(), now.ino()) == (held.dev(), held.ino()) {
            return Ok(false);
        }
        self.file = std::fs::File::open(&self.path)?;
        Ok(true)
    }
}

/// Prints the log, and goes on with it when asked to.
pub async fn run(socket: &Path, args: &cli::Logs) -> Result<()> {
    let mut client = client::runtime(client::connect(socket).await?);
    let container = find::container(&mut client, &args.name, args.container.as_deref(), args.previous).await?;
    let request = ContainerStatusRequest { container_id: container.id.clone(), verbose: false };
    let status = client.container_status(request).await?.into_inner().status.context("the agent sent no status")?;
    if status.log_path.is_empty() {
        bail!("container {} was made without a log", container.id);
    }
    let path = PathBuf::from(status.log_path);
    let mut file = std::fs::File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    let mut at_start = true;
    if let Some(lines) = args.tail {
        let mut all = Vec::new();
        file.read_to_end(&mut all)?;
        let skipped = all.len() - tail(&all, lines).len();
        file.seek(SeekFrom::Start(skipped as u64))?;
    }
    let mut follower = Follower { path, file, rest: Vec::new() };
    loop {
        // Asked before reading: whatever a container wrote before it ended is in the file by then.
        let alive = args.follow && running(&mut client, &container.id).await?;
        loop {
            for line in follower.read_lines()?.split_inclusive(|b| *b == b'\n') {
                print(line.strip_suffix(b"\n").unwrap_or(line), args.timestamps, &mut at_start)?;
            }
            if !follower.rotate()? {
                break;
            }
        }
        std::io::stdout().flush()?;
        if !alive {
            return Ok(());
        }
        tokio::time::sleep(FOLLOW_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &[u8] = b"2026-01-01T00:00:00.000000000Z stdout F one\n2026-01-01T00:00:00.000000000Z stdout P tw\n\
        2026-01-01T00:00:00.000000000Z stdout F o\n2026-01-01T00:00:00.000000000Z stderr F three\n";

    #[test]
    fn entries_are_parsed_and_foreign_lines_are_not() {
        let (time, stream, full, content) = parse(b"2026-01-01T00:00:00Z stdout F a b  c").expect("CRI form");
        assert_eq!((time, stream, full, content), (&b"2026-01-01T00:00:00Z"[..], &b"stdout"[..], true, &b"a b  c"[..]));
        assert!(!parse(b"t stdout P half").expect("CRI form").2);
        assert!(parse(b"plain").is_none());
    }

    #[test]
    fn tail_counts_joined_lines() {
        assert_eq!(tail(LOG, 1), b"2026-01-01T00:00:00.000000000Z stderr F three\n");
        assert!(tail(LOG, 2).starts_with(b"2026-01-01T00:00:00.000000000Z stdout P tw"));
        assert_eq!(tail(LOG, 9), LOG);
        assert_eq!(tail(LOG, 0), b"");
    }
}
