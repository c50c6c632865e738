//! SPDY inside of WebSocket messages: their bytes, joined, are the connection. Message borders mean nothing.

use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::forward;
use super::spdy::Session;
use super::websocket::WebSocket;
use super::wire::Peer;
use crate::Server;
use crate::id::SandboxId;

/// What is on the way between the two protocols, in each direction.
const BUFFER: usize = 64 * 1024;
/// The messages we make, as the usual clients make them.
const MESSAGE: usize = 32 * 1024;

/// Serves a port-forward to its end.
pub(super) async fn forward(server: &Arc<Server>, sandbox: &SandboxId, mut socket: WebSocket) {
    let (ours, theirs) = tokio::io::duplex(BUFFER);
    // Whether the client is there is known here: the session learns it by the end of the bytes.
    let Ok(session) = Session::start(theirs, Peer::unknown(), forward::LIMITS) else { return socket.close().await };
    let (mut read, mut write) = tokio::io::split(ours);
    let raw = socket.raw();
    let down = tokio::spawn(async move {
        let mut buffer = vec![0u8; MESSAGE];
        while let Ok(n) = read.read(&mut buffer).await {
            if n == 0 || raw.send(Bytes::copy_from_slice(&buffer[..n])).await.is_err() {
                return;
            }
        }
    });
    // Beside the session, not in turn with it: a session that waits for its pairs to be taken must not stop this.
    let up = async {
        while let Some(bytes) = socket.next_raw().await {
            if write.write_all(&bytes).await.is_err() {
                break;
            }
        }
        let _ = write.shutdown().await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = forward::spdy(server, sandbox, session) => {}
        () = up => {}
    }
    let _ = down.await;
    socket.close().await;
}
