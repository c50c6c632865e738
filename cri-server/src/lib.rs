//! The CRI server: sandboxes, containers, streaming and records. Owns the lifecycles of pods on this node; knows no API
//! server and no kubelet. Protobuf stops in `edge`, `convert` and the two places that make replies (`stats`, `events`).

mod board;
mod cdi;
mod cgroups;
mod checkpoint;
mod clock;
mod config;
mod container;
mod convert;
mod edge;
mod error;
mod events;
mod exec;
mod handlers;
mod id;
mod leaks;
mod metrics;
mod nri;
mod paths;
mod processes;
mod progress;
mod reaper;
mod records;
mod recover;
mod sandbox;
mod server;
mod shim;
mod spec;
mod stats;
mod steps;
mod stop;
mod streaming;
mod why;

use std::sync::Arc;
use std::time::Duration;

use berth_cri_api::MAX_MESSAGE_BYTES;
use berth_cri_api::v1::image_service_server::ImageServiceServer;

pub use berth_nri::Config as NriConfig;
pub use cgroups::CgroupDriver;
pub use config::{Config, RuntimeHandler};
pub use edge::{ImageEdge, RuntimeApi};
pub use error::Error;
pub(crate) use server::{Server, blocking};
pub use steps::Deadlines;
pub use stop::POD_ENDS;
pub use why::{Operation, Why};

/// A running CRI server. Dropping it without [`CriServer::shutdown`] loses nothing either: pods live in their shims.
pub struct CriServer {
    server: Arc<Server>,
}

impl CriServer {
    /// Recovers from the records and the living shims, starts the streaming server, and is ready to serve.
    pub async fn start(config: Config) -> Result<Self, Error> {
        let server = Arc::new(Server::open(config).await?);
        for problem in server.handlers.missing() {
            tracing::warn!(error = %problem, "pods with this handler are refused until its program is there");
        }
        recover::recover(&server).await?;
        server.images.start_reaper();
        streaming::listen(&server).await?;
        // Pods run without plugins rather than not at all.
        if let Err(error) = server.nri.start(Arc::new(nri::Node::of(&server))).await {
            tracing::warn!(error = %error::text(&error), "no NRI plugins");
        }
        // What was read and run at the start is not needed again.
        berth_linux::heap::trim();
        if let Err(error) = berth_linux::code::forget() {
            tracing::debug!(%error, "the code that ran at the start stays mapped");
        }
        Ok(Self { server })
    }

    /// The two services, for any number of listeners (`tonic::transport::Server::builder().add_service(..)`).
    pub fn services(&self) -> (RuntimeApi, ImageServiceServer<ImageEdge>) {
        let runtime = RuntimeApi::new(self.server.clone());
        let image = ImageServiceServer::new(ImageEdge { server: self.server.clone() })
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        (runtime, image)
    }

    /// Takes no new sandboxes and streams, lets the operations under way end (at most 10 s; what is cut off then is undone at the
    /// next start), and writes the records out. Pods stay.
    pub async fn shutdown(&self) {
        self.server.close();
        self.server.tasks.close();
        if tokio::time::timeout(Duration::from_secs(10), self.server.tasks.wait()).await.is_err() {
            tracing::warn!("operations are still under way: the next start undoes them");
        }
        self.server.nri.stop();
        let server = self.server.clone();
        let _ = blocking(move || {
            server.durable.flush();
            Ok(())
        })
        .await;
    }

    /// Stops and removes every pod (`berth stop --all`): each container gets `grace` to end, each pod [`POD_ENDS`] more. The error
    /// names each pod that has not ended then, and the step it is at; what has ended stays ended.
    pub async fn stop_all(&self, grace: Duration) -> Result<(), Error> {
        let pods = self.server.owners.named();
        let ends = pods.iter().map(|(id, m)| stop::pod(&self.server, id, format!("{}/{}", m.namespace, m.name), grace));
        let errors: Vec<Arc<Error>> =
            futures::future::join_all(ends).await.into_iter().filter_map(Result::err).map(Arc::new).collect();
        if !errors.is_empty() {
            return Err(Error::Many(errors));
        }
        self.server.network.settle(Duration::from_secs(5)).await;
        self.server.network.remove_all().await.map_err(|e| Error::Network {
            action: "remove the",
            id: "all".into(),
            source: Box::new(e),
        })?;
        let server = self.server.clone();
        blocking(move || {
            server.cgroups.remove_tops()?;
            server.reaper.settle();
            Ok(())
        })
        .await
    }

    /// Loads an OCI layout, an OCI archive or a `docker save` archive: each image's id with its tags.
    pub async fn import(&self, path: &std::path::Path) -> Result<Vec<(String, Vec<String>)>, Error> {
        let images = self.server.images.import(path, None).await.map_err(|e| Error::Image {
            action: "import",
            image: path.display().to_string(),
            source: Box::new(e),
        })?;
        Ok(images.into_iter().map(|image| (image.id.to_string(), image.repo_tags)).collect())
    }

    /// Takes one name from an image that has others; the name in full.
    pub async fn untag(&self, name: &str) -> Result<String, Error> {
        self.server.images.untag(name).await.map_err(|e| Error::Image {
            action: "untag",
            image: name.to_owned(),
            source: Box::new(e),
        })
    }

    /// What a sandbox or container is doing, waits for and failed at last. `wanted`: an id or its beginning, a pod's name, or
    /// `namespace/name`. Asks no owner, no shim and no disk: it answers whatever is stuck.
    pub async fn why(&self, wanted: &str) -> Result<Vec<Why>, Error> {
        why::ask(&self.server, wanted).await
    }

    /// [`Self::why`] where no agent runs or it does not answer: from the records and from what /proc says.
    pub fn why_on_record(config: &Config, wanted: &str) -> Result<Vec<Why>, Error> {
        why::on_record(config, wanted)
    }

    /// [`Self::leaks`] where no agent runs: reads the records, recovers and drains nothing.
    pub async fn leaks_on_record(config: Config) -> Result<Vec<String>, Error> {
        leaks::on_record(config).await
    }

    /// Everything of this instance on the machine that no record owns: one line each. `settle`: waits for pending deletions
    /// first, at most 5 s.
    pub async fn leaks(&self, settle: bool) -> Vec<String> {
        leaks::leaks(&self.server, settle).await
    }
}
