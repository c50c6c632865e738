//! Port-forward over plain WebSocket channels: two per port, data and error; the ports come with the request.

use std::sync::Arc;

use bytes::Bytes;
use tokio::time::Instant;

use super::forward;
use super::inbox::{Feeder, Pool, Push, inbox};
use super::websocket::WebSocket;
use super::wires::Out;
use crate::Server;
use crate::error::text;
use crate::id::SandboxId;
use crate::sandbox::owner;
use crate::sandbox::state::Op;

/// Ports of one connection: a channel is one byte, and 255 is taken.
pub(super) const PORTS: usize = 100;
/// Ports of one connection in the base64 form, where a channel is one digit.
pub(super) const PORTS_IN_BASE64: usize = 5;

/// Serves one connection to its end.
pub(super) async fn forward(server: &Arc<Server>, sandbox: &SandboxId, ports: &[u16], mut socket: WebSocket) {
    let live = match owner::submit(server, sandbox, Op::Live).await {
        Ok(live) => live,
        Err(_) => return socket.close().await,
    };
    let pool = Arc::new(Pool::default());
    let mut inputs: Vec<Feeder> = Vec::new();
    let mut tasks = tokio::task::JoinSet::new();
    for (channel, port) in (0u8..).step_by(2).zip(ports) {
        let (data, error) = (Out::WebSocket(socket.channel(channel)), Out::WebSocket(socket.channel(channel + 1)));
        let hello = Bytes::copy_from_slice(&port.to_le_bytes());
        let (feeder, from) = inbox(&pool);
        inputs.push(feeder);
        let (live, port) = (live.clone(), *port);
        tasks.spawn(async move {
            let _ = data.send(hello.clone()).await;
            let _ = error.send(hello).await;
            match forward::connect(&live, port).await {
                Ok(tcp) => {
                    forward::join(tcp, from, &data, None).await;
                }
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
                    if let Some(input) = inputs.get(usize::from(channel / 2)).filter(|_| channel % 2 == 0) {
                        deliver(&pool, &inputs, input, body).await;
                    }
                }
                None => break,
            },
            Some(_) = tasks.join_next() => {
                if tasks.is_empty() {
                    break;
                }
            }
            () = forward::ended(&live) => break,
            () = server.closed() => break,
        }
    }
    tasks.abort_all();
    socket.close().await;
}

/// Gives a message to its port. Where there is no room, ports whose pods have taken nothing for too long are given up, so that the
/// others go on.
async fn deliver(pool: &Pool, inputs: &[Feeder], to: &Feeder, mut body: Bytes) {
    while let Push::Full(back) = to.try_push(body) {
        body = back;
        let limit = |input: &Feeder| input.stuck_since().map(|since| since + forward::PATIENCE);
        let first = inputs.iter().filter_map(limit).min().unwrap_or_else(Instant::now);
        if tokio::time::timeout_at(first, pool.freed()).await.is_err() {
            let now = Instant::now();
            inputs.iter().filter(|input| limit(input).is_some_and(|limit| limit <= now)).for_each(Feeder::discard);
        }
    }
}
