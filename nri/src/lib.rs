//! NRI (v1alpha1, as of 0.12): plugins that connect to the runtime's socket, or are started by it, and see and adjust pods and
//! containers. Owns the wire (multiplexer and ttRPC), the plugins with their order, and the merging of what they ask for. Knows
//! no CRI and no OCI spec: the runtime is behind the [`Runtime`] trait.

#[allow(missing_docs, clippy::all, reason = "generated")]
pub mod api {
    //! The messages, generated from our own nri.proto.
    include!(concat!(env!("OUT_DIR"), "/nri.pkg.api.v1alpha1.rs"));
}

mod adjust;
mod error;
mod gate;
mod join;
mod launch;
mod owners;
mod plugin;
mod relay;
mod resources;
mod wire;

use std::path::PathBuf;
use std::time::Duration;

use futures::future::BoxFuture;

pub use adjust::removal;
pub use error::Error;
pub use gate::Pass;
pub use join::Nri;
pub use relay::{Created, Updated};

use api::{Container, ContainerEviction, ContainerUpdate, PodSandbox};

/// Where plugins are found and how long they may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// No plugins at all.
    pub disable: bool,
    /// The socket that plugins connect to.
    pub socket_path: PathBuf,
    /// Programs that are started with the runtime: `10-name`.
    pub plugin_path: PathBuf,
    /// Their configurations: `10-name.conf`, else `name.conf`.
    pub plugin_config_path: PathBuf,
    /// From the connection to the registration.
    pub registration_timeout: Duration,
    /// For each request to a plugin.
    pub request_timeout: Duration,
    /// The runtime as plugins are told its name.
    pub runtime_name: String,
    /// Its version.
    pub runtime_version: String,
}

impl Default for Config {
    /// The defaults of NRI itself, which containerd has too.
    fn default() -> Self {
        Self {
            disable: false,
            socket_path: "/var/run/nri/nri.sock".into(),
            plugin_path: "/opt/nri/plugins".into(),
            plugin_config_path: "/etc/nri/conf.d".into(),
            registration_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(2),
            runtime_name: "berth".into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
        }
    }
}

/// What plugins ask of the runtime.
pub trait Runtime: Send + Sync + 'static {
    /// All pods, and all containers that have not ended, as they are at this moment.
    fn snapshot(&self) -> BoxFuture<'static, (Vec<PodSandbox>, Vec<Container>)>;

    /// Changes limits and ends containers; gives back the updates that failed although their failure counts.
    fn change(
        &self,
        updates: Vec<ContainerUpdate>,
        evictions: Vec<ContainerEviction>,
    ) -> BoxFuture<'static, Vec<ContainerUpdate>>;
}
