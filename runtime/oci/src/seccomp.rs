//! System call filters: an OCI profile becomes a BPF program; berth's own default profile. Pure: nothing is loaded here.

mod assemble;
mod compile;
mod default;

use serde::{Deserialize, Serialize};

pub use compile::compile;
pub use default::default_profile;

/// A compiled filter. It can be kept and sent: it is valid on the machine's architecture and for this version of berth.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// Instructions as (code, jump if true, jump if false, constant).
    pub instructions: Vec<(u16, u8, u8, u32)>,
    /// Flags of seccomp(2).
    pub flags: u32,
}
