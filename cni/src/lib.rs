//! Pod networking: the CNI library (conflist chains, foreign plugins by exec) and our own bridge, host-local, loopback and
//! portmap, run in-process or as plugin binaries.
//!
//! [`Network`] is what the CRI server uses: it reads the CNI configuration folder, falls back to a built-in bridge network,
//! and attaches and detaches sandboxes. [`plugin::main`] is the standard plugin protocol over the same code. Netlink and
//! nf_tables messages alone change the kernel; no helper program is run except foreign CNI plugins.
//!
//! Nothing here knows a container, an image or the CRI's messages.

mod cache;
mod chain;
mod cidr;
mod conf;
mod conntrack;
mod default_network;
mod doing;
mod error;
mod exec;
mod host;
mod invocation;
mod kernel;
mod names;
mod netlink;
mod network;
mod nft;
pub mod plugin;
mod plugins;
mod pod;
mod probe;
mod reaper;
mod records;
mod result;
mod sysctl;

pub use cidr::Cidr;
pub use doing::Doing;
pub use error::{Error, KernelError, Result};
pub use network::{Leak, Network, NetworkConfig, NetworkStatus};
pub use nft::ensure_iptables_hint;
pub use pod::{Attachment, Bandwidth, Dns, Netns, PodNetwork, PortMapping, Protocol};
pub use probe::{Probe, probe};
