//! The verbs, one a file.

pub mod completion;
pub mod cri;
pub mod doctor;
pub mod exec;
pub mod image;
pub mod join;
mod join_check;
pub mod kubelet;
pub mod leaks;
pub mod logs;
pub mod node;
pub mod plan;
pub mod pods;
pub mod ps;
pub mod reset;
pub mod stop;
pub mod why;
