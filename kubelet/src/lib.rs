//! The node agent: pod sources, workers, plans, status. It knows pods and reaches the runtime by CRI alone.
//!
//! ```text
//! source → v1::Pod → worker: plan(pod, observed, now) → [PodOp] → execute (CRI) → observed' → status → /pods
//! ```

pub mod backoff;
pub mod clock;
pub mod config;
pub mod cri;
pub mod error;
mod kubelet;
pub mod plan_files;

pub use config::{Config, LogLimits, Timing};
pub use error::Error;
pub use kubelet::Kubelet;
pub use plan_files::{PlanReport, plan_files};

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
