//! A pod sandbox with its containers: the owner task, its state machine, and the slow work it starts.

pub(crate) mod files;
pub(crate) mod holdings;
pub(crate) mod owner;
pub(crate) mod run;
pub(crate) mod state;
