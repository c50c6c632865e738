//! Serving gRPC on a unix socket that only root can reach. Knows no service.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Router;

/// Serves until `stop`, in place of whatever socket was there.
pub(crate) async fn serve(routes: Router, path: &Path, stop: CancellationToken) {
    let listener = match bind(path) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the socket cannot be opened");
            return;
        }
    };
    let served = routes.serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled_owned()).await;
    if let Err(error) = served {
        tracing::warn!(path = %path.display(), %error, "the socket is not served any more");
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}
