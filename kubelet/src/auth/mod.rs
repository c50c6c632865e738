//! Who calls the kubelet's servers and whether they may. Owns identities, the checks and their memory; the servers only
//! ask. What an API server has to be asked goes through [`Reviewer`], so that nothing here knows how one is reached.

mod attributes;
mod cache;
pub(crate) mod certificate;
mod guard;

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;

pub(crate) use certificate::Peer;
pub(crate) use guard::{Guard, Refusal};

/// Who calls.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct User {
    /// The name: a certificate's common name, a token's user.
    pub name: String,
    /// The UID that a token review tells.
    pub uid: String,
    /// The groups: a certificate's organisations.
    pub groups: Vec<String>,
    /// What else a token review tells; passed on to access reviews.
    pub extra: BTreeMap<String, Vec<String>>,
}

/// What a caller wants: a verb on a sub-resource of this node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Attributes {
    /// `get`, `create`, `update`, `patch`, `delete`, or nothing.
    pub verb: &'static str,
    /// The node's name; the resource is `nodes` of version `v1` in the empty group.
    pub node: String,
    /// `proxy`, `metrics`, `stats`, `log`, `pods`…
    pub subresource: &'static str,
}

/// An answer of an API server, or why there is none.
pub type Review<'a, T> = Pin<Box<dyn Future<Output = Result<T, ReviewError>> + Send + 'a>>;

/// The API server did not answer, or not with a review.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReviewError {
    /// It may answer the next time.
    #[error("{0}")]
    NoAnswer(String),
    /// It will say the same again.
    #[error("{0}")]
    Refused(String),
}

/// Asks an API server. One try each; the callers retry and remember.
pub trait Reviewer: std::fmt::Debug + Send + Sync {
    /// `tokenreviews.authentication.k8s.io`: whose token it is; `None` when it is nobody's.
    fn token<'a>(&'a self, token: &'a str) -> Review<'a, Option<User>>;
    /// `subjectaccessreviews.authorization.k8s.io`: whether the user may.
    fn access<'a>(&'a self, user: &'a User, wanted: &'a Attributes) -> Review<'a, bool>;
}
