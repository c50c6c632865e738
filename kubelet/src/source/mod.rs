//! Where pods come from: text → v1::Pod → defaults → validation → static identity. Pods of the API server come as they are: it has
//! defaulted and validated them.

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
    /// The API server.
    Api,
}

impl SourceName {
    /// Which source a pod comes from, as its annotation says; none: nobody can tell.
    pub fn of(pod: &Pod) -> Option<SourceName> {
        SourceName::from_annotation(crate::pod::annotation(pod, crate::pod::CONFIG_SOURCE)?)
    }

    /// The source that the annotation names.
    pub fn from_annotation(value: &str) -> Option<SourceName> {
        match value {
            "file" => Some(SourceName::File),
            "api" => Some(SourceName::Api),
            _ => None,
        }
    }

    /// As the annotation has it.
    pub fn as_str(self) -> &'static str {
        match self {
            SourceName::File => "file",
            SourceName::Api => "api",
        }
    }
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
    /// What the source last said is all that is known: a pod that is not here may still be wanted.
    pub is_remembered: bool,
    /// Pods that are not started on what the source last said.
    pub withheld: Vec<Withheld>,
}

/// The reason in the status of a withheld pod. That is for this machine: the API server is not told it when it is back, as the pod starts then.
pub(crate) const OFFLINE: &str = "Offline";

/// A pod that its source wanted when it was last heard, and that is not started before it is heard again.
#[derive(Clone, Debug, PartialEq)]
pub struct Withheld {
    /// The pod.
    pub pod: Arc<Pod>,
    /// Why it is not started.
    pub why: String,
    /// Where it runs already, it is looked after.
    pub runs_on: bool,
}
