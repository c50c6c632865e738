//! The CRI socket seen from the verbs that ask a running agent. Owns the connection; holds no state.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use berth_cri_api::MAX_MESSAGE_BYTES;
use berth_cri_api::v1::image_service_client::ImageServiceClient;
use berth_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// The path in a `unix://` endpoint; a bare path is taken as it is.
pub fn socket_path(endpoint: &str) -> PathBuf {
    PathBuf::from(endpoint.strip_prefix("unix://").unwrap_or(endpoint))
}

/// Connects to a CRI server on a unix socket.
///
/// # Errors
/// When nothing listens there.
pub async fn connect(socket: &Path) -> Result<Channel> {
    // Asked first: the channel's own error tells its cause twice.
    UnixStream::connect(socket)
        .await
        .with_context(|| format!("no CRI server answers on {}: is `berth node` or `berth cri` running?", socket.display()))?;
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
