//! The node agent: pod sources, workers, plans, status. It knows pods and reaches the runtime by CRI alone.
//!
//! ```text
//! source → v1::Pod → worker: plan(pod, observed, now) → [PodOp] → execute (CRI) → observed' → status → /pods
//! ```

pub mod addresses;
pub mod admission;
pub mod ages;
pub mod api;
mod atomic_file;
pub mod auth;
pub mod backoff;
mod care;
pub mod cgroup;
mod checksum;
pub mod classes;
pub mod clock;
pub mod config;
pub mod configuration;
pub mod container_config;
pub mod control;
mod cpus;
pub mod cri;
pub mod devices;
pub mod dns;
pub mod doing;
pub mod env;
pub mod env_file;
pub mod error;
pub mod events;
pub mod eviction;
pub mod execute;
mod hook_record;
pub mod hooks;
pub mod host_ports;
pub mod hosts;
mod housekeeping;
pub mod image_gc;
pub mod image_name;
mod kubelet;
mod leaks;
mod log_rotation;
pub mod logs;
mod main_loop;
pub mod memory;
pub mod metrics;
pub mod node;
pub mod node_state;
pub mod objects;
pub mod observed;
pub mod oom;
mod orphan;
pub mod plan;
pub mod plan_files;
pub mod pod;
pub mod pod_objects;
pub mod pod_resources;
pub mod preemption;
mod preflight;
pub mod probe;
pub mod pull_secret;
pub mod quantity;
pub mod reasons;
pub mod record;
pub mod resize;
pub mod resources;
pub mod sandbox_config;
mod saved_status;
#[cfg(test)]
mod scene;
pub mod security;
pub mod server;
pub mod shutdown;
mod socket;
pub mod source;
pub mod stats;
pub mod status;
pub mod sysctl;
pub mod table;
pub mod termination;
mod typed;
pub mod userns;
pub mod volume;
pub mod worker;

pub use config::{Config, LogLimits, Timing};
pub use control::{Ending, PodControl};
pub use error::Error;
pub use housekeeping::remove_all;
/// The API type that a manifest describes.
pub use k8s_openapi::api::core::v1::Pod;
pub use kubelet::Kubelet;
pub use leaks::leaks;
pub use plan_files::{PlanNode, PlanReport, plan_files};
pub use server::config::{Authentication, Authorization, ServerConfig, TlsConfig};
pub use source::WARNING;
pub use source::compare::{Change, compare};

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
