//! Port-forward over plain WebSocket channels: two per port, data and error; the ports come with the request.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::forward;
use super::websocket::WebSocket;
use super::wires::Out;
use crate::Server;
use crate::error::text;
use crate::id::SandboxId;
use crate::sandbox::owner;
use crate::sandbox::state::Op;

/// Serves one connection to its end.
pub(super) async fn forward(server: &Arc<Server>, sandbox: &SandboxId, ports: &[u16], mut socket: WebSocket) {
    let live = match owner::submit(server, sandbox, Op::Live).await {
        Ok(live) => live,
        Err(_) => return socket.close().await,
    };
    let mut inputs: Vec<Option<mpsc::Sender<Bytes>>> = Vec::new();
    let mut tasks = tokio::task::JoinSet::new();
    for (i, port) in ports.iter().enumerate().take(100) {
        let (data, error) = (Out::WebSocket(socket.channel(2 * i as u8)), Out::WebSocket(socket.channel(2 * i as u8 + 1)));
        let hello = Bytes::copy_from_slice(&port.to_le_bytes());
        let _ = data.send(hello.clone()).await;
        let _ = error.send(hello).await;
        let (sender, receiver) = mpsc::channel(64);
        inputs.push(Some(sender));
        let (live, port) = (live.clone(), *port);
        tasks.spawn(async move {
            match forward::connect(&live, port).await {
                Ok(tcp) => forward::join(tcp, receiver, &data).await,
                Err(failed) => {
                    let _ = error.send(format!("error forwarding port {port}: {}", text(&failed)).into()).await;
                }
            }
        });
    }
    loop {
        tokio::select! {
            message = socket.next() => match message {
                Some((channel, body)) => {
                    let slot = inputs.get_mut(usize::from(channel / 2)).filter(|_| channel % 2 == 0);
                    if let Some(input) = slot
                        && let Some(sender) = input
                        && sender.send(body).await.is_err()
                    {
                        *input = None;
                    }
                }
                None => break,
            },
            Some(_) = tasks.join_next() => {
                if tasks.is_empty() {
                    break;
                }
            }
        }
    }
    tasks.abort_all();
    socket.close().await;
}
