//! Exec, attach and port-forward for clients: URLs with tokens on a loopback server, SPDY/3.1 and WebSocket. The streams end
//! here; processes and namespaces are others' business.

mod forward;
mod goodbye;
mod http;
mod inbox;
mod legacy;
mod process;
mod serve;
mod sha1;
mod spdy;
mod token;
mod tunnel;
mod websocket;
mod wire;
mod wires;

use std::sync::Arc;

use berth_cri_api::v1;

pub(crate) use serve::listen;
pub(crate) use token::{Request, Tokens};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::Server;
use crate::error::{Error, invalid};
use crate::exec;
use crate::sandbox::owner;
use crate::sandbox::state::Op;

/// Checks an exec and returns its URL.
pub(crate) async fn prepare_exec(server: &Arc<Server>, request: v1::ExecRequest) -> Result<String, Arc<Error>> {
    check(&request.container_id, request.tty, request.stdin, request.stdout, request.stderr)?;
    if request.cmd.is_empty() {
        return Err(invalid("cmd", "empty").into());
    }
    let (container, _) = exec::running(server, &request.container_id).await?;
    let request = Request::Exec {
        container,
        command: request.cmd,
        tty: request.tty,
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
    };
    Ok(server.tokens.url(request)?)
}

/// Checks an attach and returns its URL.
pub(crate) async fn prepare_attach(server: &Arc<Server>, request: v1::AttachRequest) -> Result<String, Arc<Error>> {
    check(&request.container_id, request.tty, request.stdin, request.stdout, request.stderr)?;
    let (container, _) = exec::running(server, &request.container_id).await?;
    let request =
        Request::Attach { container, tty: request.tty, stdin: request.stdin, stdout: request.stdout, stderr: request.stderr };
    Ok(server.tokens.url(request)?)
}

/// Checks a port-forward and returns its URL.
pub(crate) async fn prepare_port_forward(server: &Arc<Server>, request: v1::PortForwardRequest) -> Result<String, Arc<Error>> {
    if request.pod_sandbox_id.is_empty() {
        return Err(invalid("pod_sandbox_id", "empty").into());
    }
    let view = server.board.need_sandbox(&request.pod_sandbox_id)?;
    owner::submit(server, &view.id, Op::Live).await?;
    if request.port.len() > legacy::PORTS {
        return Err(invalid(
            "port",
            format!("{} ports: at most {} go through one connection", request.port.len(), legacy::PORTS),
        )
        .into());
    }
    let ports = request
        .port
        .into_iter()
        .map(|p| u16::try_from(p).ok().filter(|p| *p > 0).ok_or_else(|| invalid("port", format!("{p} is not a port"))))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(server.tokens.url(Request::PortForward { sandbox: view.id.clone(), ports })?)
}

fn check(id: &str, tty: bool, stdin: bool, stdout: bool, stderr: bool) -> Result<(), Error> {
    if id.is_empty() {
        return Err(invalid("container_id", "empty"));
    }
    if tty && stderr {
        return Err(invalid("stderr", "a terminal has one output: tty and stderr can not both be set"));
    }
    if !stdin && !stdout && !stderr {
        return Err(invalid("stdin", "one of stdin, stdout and stderr must be set"));
    }
    Ok(())
}

/// A descriptor in the reactor.
#[allow(deprecated)] // Its safe form; the replacement asks the caller to promise what an OwnedFd is anyway.
pub(crate) fn async_fd(fd: std::os::fd::OwnedFd, interest: Interest) -> std::io::Result<AsyncFd<std::os::fd::OwnedFd>> {
    AsyncFd::with_interest(fd, interest)
}
