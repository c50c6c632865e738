//! nf_tables without nft: messages, expressions, and the one table of an instance.

mod elements;
mod expression;
mod forward;
mod hint;
mod message;
mod table;
mod watch;

pub(crate) use elements::{Element, HostPort, add_host_ports, delete_elements, dump_elements};
pub(crate) use forward::{ensure_forward, remove_forward};
pub use hint::ensure_iptables_hint;
pub(crate) use table::{Nat, delete_table, ensure_table, is_intact};
pub(crate) use watch::{Stop, Watch, watch};
