//! The kubelet's main loop: sources in, workers out.

use tokio_util::sync::CancellationToken;

use crate::{Config, Result};

/// A node agent that is ready to run.
#[derive(Debug)]
pub struct Kubelet {
    config: Config,
}

impl Kubelet {
    /// Checks the configuration; touches nothing yet.
    pub fn new(config: Config) -> Result<Kubelet> {
        Ok(Kubelet { config })
    }

    /// Runs until `shutdown` is cancelled. The pods keep running.
    pub async fn run(self, shutdown: CancellationToken) -> Result<()> {
        tracing::info!(node = %self.config.node_name, "kubelet starts");
        shutdown.cancelled().await;
        Ok(())
    }
}
