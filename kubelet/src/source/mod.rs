//! Where pods come from: text → v1::Pod → defaults → validation → static identity.

pub mod accepted;
pub mod compare;
pub mod defaults;
pub mod fields;
pub mod file;
pub mod manifest;
pub mod object;
pub mod parse;
pub mod references;
pub mod static_pod;
mod storage;
pub mod validate;
mod watch;
pub mod yaml;

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

use crate::objects::Object;

/// Which source a set of pods comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SourceName {
    /// Manifest files.
    File,
}

/// What begins the problems of an update that refuse nothing.
pub const WARNING: &str = "warning: ";

/// All pods that a source stands for now.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceUpdate {
    /// The source.
    pub source: SourceName,
    /// Its pods, complete: one that is not here any more is to end.
    pub pods: Vec<Arc<Pod>>,
    /// UIDs that began a life since the last update: what is left of an earlier pod of that UID is not theirs.
    pub fresh: BTreeSet<String>,
    /// The objects that its files hold.
    pub objects: Vec<Object>,
    /// What its files say that cannot be carried out, as `file:line: message`; behind [`WARNING`] what has no effect.
    pub problems: Vec<String>,
    /// Pods that have another file's name, since the last update: each with why.
    pub rejected: Vec<(Arc<Pod>, String)>,
}
