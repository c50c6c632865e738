//! System call filters: an OCI profile becomes a BPF program; berth's own default profile.

use serde::{Deserialize, Serialize};

/// A compiled filter. It can be kept and sent: it is valid on the machine's architecture and this version of berth.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// Instructions as (code, jump if true, jump if false, constant).
    pub instructions: Vec<(u16, u8, u8, u32)>,
    /// Flags of seccomp(2).
    pub flags: u64,
}
