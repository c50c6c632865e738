//! The CRI socket seen from the verbs that ask a running agent. Owns the connection; holds no state.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use berth_cri_api::MAX_MESSAGE_BYTES;
use berth_cri_api::v1::image_service_client::ImageServiceClient;
use berth_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// The path in a `unix://` endpoint; a bare path is taken as it is.
///
/// # Errors
/// When it names another kind of endpoint, or no absolute path.
pub fn socket_path(endpoint: &str) -> Result<PathBuf> {
    let path = match endpoint.split_once("://") {
        Some(("unix", path)) => path,
        Some((kind, _)) => {
            bail!("endpoint {endpoint:?}: the CRI is served on unix sockets alone, not over {kind}: say unix:///PATH")
        }
        None => endpoint.strip_prefix("unix:").unwrap_or(endpoint),
    };
    if !path.starts_with('/') {
        bail!("endpoint {endpoint:?}: an absolute path is needed, as in unix:///run/berth/berth.sock");
    }
    Ok(PathBuf::from(path))
}

/// Connects to our own CRI server on a unix socket.
///
/// # Errors
/// When nothing listens there.
pub async fn connect(socket: &Path) -> Result<Channel> {
    reach(socket, ": is `berth node` or `berth cri` running?").await
}

/// Connects to anybody's CRI server on a unix socket.
///
/// # Errors
/// When nothing listens there.
pub async fn connect_to_any(socket: &Path) -> Result<Channel> {
    reach(socket, "").await
}

async fn reach(socket: &Path, advice: &str) -> Result<Channel> {
    // Asked first: the channel's own error tells its cause twice.
    UnixStream::connect(socket).await.with_context(|| format!("no CRI server answers on {}{advice}", socket.display()))?;
    let path = socket.to_owned();
    // The authority is never resolved: the connector ignores it.
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
        .with_context(|| format!("opening the CRI on {}", socket.display()))
}

/// The runtime service's client, with CRI's message limit.
pub fn runtime(channel: Channel) -> RuntimeServiceClient<Channel> {
    RuntimeServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

/// The image service's client, with CRI's message limit.
pub fn images(channel: Channel) -> ImageServiceClient<Channel> {
    ImageServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_for_our_own_socket_it_is_asked_whether_we_run() {
        let nobody = Path::new("/nosuch/cri.sock");
        let error = connect_to_any(nobody).await.expect_err("nobody").to_string();
        assert_eq!(error, "no CRI server answers on /nosuch/cri.sock");
        let error = connect(nobody).await.expect_err("nobody").to_string();
        assert_eq!(error, "no CRI server answers on /nosuch/cri.sock: is `berth node` or `berth cri` running?");
    }

    #[test]
    fn only_unix_sockets_are_endpoints() {
        for endpoint in ["unix:///run/b.sock", "unix:/run/b.sock", "/run/b.sock"] {
            assert_eq!(socket_path(endpoint).expect("a path"), Path::new("/run/b.sock"));
        }
        for (endpoint, why) in [
            ("tcp://127.0.0.1:7070", "not over tcp"),
            ("npipe:////./pipe/x", "not over npipe"),
            ("run/b.sock", "absolute"),
            ("unix://b.sock", "absolute"),
            ("", "absolute"),
        ] {
            let error = socket_path(endpoint).expect_err("refused").to_string();
            assert!(error.contains(why) && error.contains(endpoint), "{error}");
        }
    }
}
