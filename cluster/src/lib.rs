//! The way to a Kubernetes API server: kubeconfig files, a client whose certificates are exchanged while it works, discovery of a
//! kubeadm cluster, TLS bootstrap and rotation. Knows no pod and no kubelet; whoever has its client needs no other way.

mod access;
mod atomic;
mod certificate;
mod connection;
mod connector;
mod csr;
pub mod discovery;
mod error;
mod identity;
pub mod join;
pub mod kubeconfig;
mod limit;
mod ready;
mod resolver;
mod store;
mod token;
mod transport;

pub use certificate::Certificate;
pub use connection::{Clients, Connection, Limits};
pub use error::{Error, Result, chain as explain};
pub use identity::{Identity, Names, Serving, Tally};
pub use kubeconfig::Kubeconfig;
pub use limit::Limit;
pub use ready::until_ready;
pub use store::Store;
pub use token::{Pin, Token};
pub use transport::Pings;
