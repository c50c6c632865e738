//! The workloads. Each is a function of a running server; its metrics begin with its name and a dot.

pub mod api;
pub mod exec;
pub mod grace;
pub mod idle;
pub mod life;
pub mod logs;
pub mod many;
pub mod node;
pub mod pull;

use crate::cri::Shape;

/// How much of everything.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// Pods of a life cycle, by how many at a time: 1, 4, 8.
    pub life: [usize; 3],
    /// Pods of the burst, and of the stop until nothing is left.
    pub burst: usize,
    /// Pods of the smaller and of the larger density.
    pub density: [usize; 2],
    /// ExecSync calls, one at a time and four at a time.
    pub execs: [usize; 2],
    /// Calls of each list.
    pub lists: usize,
    /// Payload of the log, in MiB.
    pub log_mib: usize,
    /// Pulls.
    pub pulls: usize,
    /// Containers that ignore SIGTERM.
    pub grace: usize,
}

impl Scale {
    /// For figures.
    pub const FULL: Self =
        Self { life: [15, 32, 40], burst: 100, density: [20, 110], execs: [60, 100], lists: 20, log_mib: 64, pulls: 5, grace: 3 };
    /// For whether it works.
    pub const QUICK: Self =
        Self { life: [3, 5, 8], burst: 6, density: [3, 8], execs: [5, 8], lists: 3, log_mib: 2, pulls: 1, grace: 2 };
}

/// The life cycles by name: how many at a time, in which shape.
pub const LIVES: [(&str, usize, Shape); 5] = [
    ("life1", 1, Shape::PerContainer),
    ("life4", 4, Shape::PerContainer),
    ("life8", 8, Shape::PerContainer),
    ("life1-shared", 1, Shape::Shared),
    ("life4-shared", 4, Shape::Shared),
];

/// The densities with few pods.
pub const DENSITIES: [(&str, Shape); 2] = [("density20", Shape::PerContainer), ("density20-shared", Shape::Shared)];
