//! Control groups: v1, v2 and hybrid layouts, limits, statistics and events.
//!
//! A [`Layout`] says what is mounted, a [`CgroupPath`] names a cgroup in it, and a [`Cgroup`] is that cgroup in every hierarchy in which it has
//! to be. Nothing here knows what runs in a cgroup, and nothing here touches a cgroup that it was not told to.

mod cgroup;
mod devices;
mod doors;
mod error;
mod file;
mod kill;
mod layout;
mod limits;
mod oom;
mod path;
mod placement;
mod resources;
mod stats;
pub mod systemd;

pub use cgroup::Cgroup;
pub use doors::Doors;
pub use error::{Error, Result};
pub use layout::{Hierarchy, Layout};
pub use limits::convert;
pub use oom::OomWatch;
pub use path::CgroupPath;
pub use placement::Placement;
pub use resources::{
    BlockIo, Cpu, DeviceRule, HugepageLimit, InterfacePriority, Memory, Network, Pids, Rdma, Resources, ThrottleDevice,
    WeightDevice,
};
pub use stats::{BlockIoEntry, CpuStats, HugetlbStats, IoStats, MemoryStats, PidsStats, Pressure, PressureLine, Stats};
