//! The little HTTP/1.1 that an upgrade needs: one request head in, one answer head out.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest request head.
const LIMIT: usize = 32 * 1024;

/// A request head.
#[derive(Debug, Default)]
pub(super) struct Head {
    pub(super) method: String,
    pub(super) path: String,
    headers: Vec<(String, String)>,
}

impl Head {
    /// All values of a header, each of which may be a comma-separated list.
    pub(super) fn list(&self, name: &str) -> Vec<&str> {
        self.headers
            .iter()
            .filter(|(n, _)| n.eq_ignore_ascii_case(name))
            .flat_map(|(_, v)| v.split(','))
            .map(str::trim)
            .filter(|v| !v.is_empty())
            .collect()
    }

    /// The first value of a header.
    pub(super) fn value(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }

    /// Whether a body follows, which no upgrade has.
    pub(super) fn has_body(&self) -> bool {
        self.value("transfer-encoding").is_some() || self.value("content-length").is_some_and(|n| n != "0")
    }

    /// Whether an upgrade to a protocol is asked for.
    pub(super) fn upgrades_to(&self, protocol: &str) -> bool {
        self.list("connection").iter().any(|t| t.eq_ignore_ascii_case("upgrade"))
            && self.list("upgrade").iter().any(|t| t.eq_ignore_ascii_case(protocol))
    }
}

/// Reads a head, byte-exact: what follows it stays in the stream. None at a connection that sends nothing.
pub(super) async fn read_head(io: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Head>> {
    let mut text = Vec::with_capacity(512);
    while !text.ends_with(b"\r\n\r\n") {
        if text.len() >= LIMIT {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "http head is too long"));
        }
        match io.read_u8().await {
            Ok(byte) => text.push(byte),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof && text.is_empty() => return Ok(None),
            Err(e) => return Err(e),
        }
    }
    parse(&text).map(Some).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "http head can not be read"))
}

fn parse(text: &[u8]) -> Option<Head> {
    let text = std::str::from_utf8(text).ok()?;
    let mut lines = text.split("\r\n");
    let mut first = lines.next()?.split(' ');
    let (method, target, version) = (first.next()?, first.next()?, first.next()?);
    if !version.starts_with("HTTP/1.") {
        return None;
    }
    let path = target.split('?').next().unwrap_or_default();
    let headers = lines
        .take_while(|l| !l.is_empty())
        .map(|l| l.split_once(':').map(|(n, v)| (n.trim().to_owned(), v.trim().to_owned())))
        .collect::<Option<_>>()?;
    Some(Head { method: method.to_owned(), path: path.to_owned(), headers })
}

/// An answer that ends the connection.
pub(super) async fn refuse(
    io: &mut (impl AsyncWrite + Unpin),
    status: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> io::Result<()> {
    let mut text = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n",
        body.len()
    );
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    text.push_str(body);
    io.write_all(text.as_bytes()).await?;
    io.shutdown().await
}

/// The answer after which the connection is another protocol's.
pub(super) async fn switch(io: &mut (impl AsyncWrite + Unpin), protocol: &str, headers: &[(&str, &str)]) -> io::Result<()> {
    let mut text = format!("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    io.write_all(text.as_bytes()).await?;
    io.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_head_is_read_to_its_last_byte_and_no_further() {
        let wire = b"POST /exec/abc?x=1 HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v5.channel.k8s.io\r\nX-Stream-Protocol-Version: v4.channel.k8s.io, v3.channel.k8s.io\r\n\r\nREST";
        let mut from = &wire[..];
        let head = read_head(&mut from).await.unwrap().unwrap();
        assert_eq!((head.method.as_str(), head.path.as_str()), ("POST", "/exec/abc"));
        assert!(head.upgrades_to("spdy/3.1") && !head.upgrades_to("websocket"));
        assert_eq!(head.list("x-stream-protocol-version"), ["v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io"]);
        assert_eq!(from, b"REST");
    }

    #[tokio::test]
    async fn what_is_not_http_is_refused() {
        for wire in ["\r\n\r\n", "GET /\r\n\r\n", "GET / SPDY/3\r\n\r\n", "GET / HTTP/1.1\r\nbroken\r\n\r\n"] {
            assert!(read_head(&mut wire.as_bytes()).await.is_err(), "{wire:?}");
        }
    }
}
