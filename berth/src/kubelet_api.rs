//! The kubelet's socket seen from the verbs: one GET at a time. Owns no retry and keeps nothing.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::kubelet_why::Problems;

/// One GET over a unix socket, for a server that closes the connection behind its reply.
async fn get(mut stream: UnixStream, path: &str) -> Result<Vec<u8>> {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").as_bytes()).await?;
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).await?;
    let split = reply.windows(4).position(|w| w == b"\r\n\r\n").context("the kubelet's reply has no end of headers")?;
    let (head, body) = (String::from_utf8_lossy(&reply[..split]).into_owned(), reply.split_off(split + 4));
    if !head.starts_with("HTTP/1.1 200") {
        bail!("the kubelet answered {}", head.lines().next().unwrap_or_default());
    }
    if head.to_ascii_lowercase().contains("transfer-encoding: chunked") { dechunk(&body) } else { Ok(body) }
}

/// Joins the chunks of a chunked body.
fn dechunk(mut body: &[u8]) -> Result<Vec<u8>> {
    let mut whole = Vec::with_capacity(body.len());
    loop {
        let line = body.iter().position(|b| *b == b'\n').context("a chunk without a length")?;
        let length = std::str::from_utf8(&body[..line])?.trim();
        let length = usize::from_str_radix(length.split(';').next().unwrap_or_default(), 16)?;
        let rest = &body[line + 1..];
        if length == 0 {
            return Ok(whole);
        }
        whole.extend_from_slice(rest.get(..length).context("a chunk that is cut short")?);
        body = rest.get(length + 2..).context("a chunk that is cut short")?;
    }
}

/// The kubelet's list of pods; `None` where no kubelet answers.
///
/// # Errors
/// When it answers with something else than a list of pods.
pub async fn pods(socket: &Path) -> Result<Option<Value>> {
    let Ok(stream) = UnixStream::connect(socket).await else { return Ok(None) };
    serde_json::from_slice(&get(stream, "/pods").await?).context("reading the kubelet's pods").map(Some)
}

/// What keeps the kubelet from doing as it is told; `None` where no kubelet answers.
///
/// # Errors
/// When it answers with something else.
pub async fn problems(socket: &Path) -> Result<Option<Problems>> {
    let Ok(stream) = UnixStream::connect(socket).await else { return Ok(None) };
    serde_json::from_slice(&get(stream, "/problems").await?).context("reading the kubelet's problems").map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_joined() {
        assert_eq!(dechunk(b"4\r\nWiki\r\n5;x=y\r\npedia\r\n0\r\n\r\n").expect("whole"), b"Wikipedia");
        assert!(dechunk(b"4\r\nWi").is_err());
    }
}
