//! A plain HTTP GET, with nothing between the test and the socket.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

/// The body of `http://address:port/path`.
///
/// # Errors
/// When the server cannot be reached within two seconds or does not answer 200.
pub fn page(address: &str, port: u16, path: &str) -> Result<String, String> {
    let ip: IpAddr = address.parse().map_err(|e| format!("{address:?}: {e}"))?;
    let fetched = || -> std::io::Result<String> {
        let timeout = Duration::from_secs(2);
        let mut stream = TcpStream::connect_timeout(&SocketAddr::new(ip, port), timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply)?;
        Ok(reply)
    };
    let reply = fetched().map_err(|e| format!("{address}:{port}{path}: {e}"))?;
    match reply.split_once("\r\n\r\n") {
        Some((head, body)) if head.contains(" 200 ") => Ok(body.to_owned()),
        _ => Err(format!("{address}:{port}{path}: {reply:?}")),
    }
}
