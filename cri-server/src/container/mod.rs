//! Containers: from a spec to a process at its gate, and what can be done to it. Runs as tasks of the sandbox's owner.

pub(crate) mod apparmor;
pub(crate) mod ask;
pub(crate) mod control;
pub(crate) mod create;
pub(crate) mod devices;
pub(crate) mod image_volume;
pub(crate) mod layers;
pub(crate) mod mounts;
pub(crate) mod oci;
pub(crate) mod security;
pub(crate) mod selinux;
pub(crate) mod user;
