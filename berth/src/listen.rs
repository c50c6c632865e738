//! Serves the CRI: on a unix socket for others, and over memory for the kubelet of the same process.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail};
use berth_cri_server::CriServer;
use hyper_util::rt::TokioIo;
use tokio::io::DuplexStream;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Server};

/// Bytes that may wait in one direction of the in-memory connection.
const DUPLEX_BYTES: usize = 64 * 1024;

/// Binds the socket, for root only; a socket that nobody listens on any more is replaced.
pub fn bind(path: &Path) -> Result<UnixListener> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                bail!("somebody else listens on {}", path.display());
            }
            std::fs::remove_file(path).with_context(|| format!("removing the old socket {}", path.display()))?;
        }
        Ok(_) => bail!("{} exists and is not a socket", path.display()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("looking at {}", path.display())),
    }
    let listener = UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))
        .with_context(|| format!("setting the mode of {}", path.display()))?;
    Ok(listener)
}

/// Serves on the socket until `stop`; calls under way are finished.
pub async fn serve(server: &CriServer, listener: UnixListener, stop: CancellationToken) -> Result<()> {
    let (runtime, images) = server.services();
    Server::builder()
        .add_service(runtime)
        .add_service(images)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled_owned())
        .await
        .context("serving the CRI")
}

/// A channel to the server that never leaves this process; the server's half runs as a task until `stop`.
pub async fn in_memory(server: &CriServer, stop: CancellationToken) -> Result<Channel> {
    let (sender, receiver) = mpsc::channel::<std::io::Result<DuplexStream>>(1);
    let (runtime, images) = server.services();
    tokio::spawn(
        Server::builder()
            .add_service(runtime)
            .add_service(images)
            .serve_with_incoming_shutdown(ReceiverStream::new(receiver), stop.cancelled_owned()),
    );
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_| {
            let sender = sender.clone();
            async move {
                let (ours, theirs) = tokio::io::duplex(DUPLEX_BYTES);
                sender.send(Ok(theirs)).await.map_err(|_| std::io::Error::from(std::io::ErrorKind::ConnectionRefused))?;
                Ok::<_, std::io::Error>(TokioIo::new(ours))
            }
        }))
        .await
        .context("connecting the kubelet to the CRI in memory")
}
