//! Linux kernel interfaces of berth, the only crate with unsafe code
