//! The shared, read-mostly picture of all sandboxes and containers: lists, statuses and id lookups are answered from it. Only
//! the owner of a sandbox changes its entries. No lock is held while anything is converted or awaited.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;

use crate::error::Error;
use crate::id::{ContainerId, SandboxId};
use crate::spec::{ContainerSpec, Resources, SandboxSpec};

/// A sandbox as clients see it.
#[derive(Debug, Clone)]
pub(crate) struct SandboxView {
    pub(crate) id: SandboxId,
    pub(crate) spec: Arc<SandboxSpec>,
    pub(crate) ready: bool,
    pub(crate) created_at: i64,
    pub(crate) ips: Vec<IpAddr>,
    /// The process that pins the sandbox: the shim.
    pub(crate) pid: Option<i32>,
    /// The sandbox's cgroup in the kernel's form; containers are next to it or below its parent.
    pub(crate) cgroup: String,
    /// Why it is not ready, for people.
    pub(crate) reason: String,
}

/// The state of a container as clients see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ContainerState {
    Created,
    Running,
    Exited,
}

impl ContainerState {
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Exited => "exited",
        }
    }
}

/// User and groups a container's process runs with.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct RunUser {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

/// What never changes about a container once it is created.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct ContainerFacts {
    pub(crate) spec: ContainerSpec,
    pub(crate) image_id: String,
    /// A name for people.
    pub(crate) image_name: String,
    /// Repo digest, or the id.
    pub(crate) image_ref: String,
    pub(crate) user: RunUser,
    /// Linux number.
    pub(crate) stop_signal: i32,
    /// Absolute, or empty.
    pub(crate) log_path: String,
    /// In the kernel's form.
    pub(crate) cgroup: String,
}

#[cfg(test)]
impl ContainerFacts {
    /// Of a container made as `spec` says, with nothing else about it.
    pub(crate) fn of(spec: ContainerSpec) -> Self {
        Self {
            spec,
            image_id: String::new(),
            image_name: String::new(),
            image_ref: String::new(),
            user: RunUser::default(),
            stop_signal: 15,
            log_path: String::new(),
            cgroup: String::new(),
        }
    }
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Exit {
    pub(crate) code: i32,
    pub(crate) finished_at: i64,
    pub(crate) reason: String,
    pub(crate) message: String,
}

/// A container as clients see it.
#[derive(Debug, Clone)]
pub(crate) struct ContainerView {
    pub(crate) id: ContainerId,
    pub(crate) sandbox: SandboxId,
    pub(crate) facts: Arc<ContainerFacts>,
    pub(crate) resources: Resources,
    pub(crate) state: ContainerState,
    pub(crate) created_at: i64,
    pub(crate) started_at: i64,
    pub(crate) pid: Option<i32>,
    pub(crate) exit: Option<Exit>,
}

/// A view on the board, and the bytes of its list item once somebody has listed it: a view never changes, so neither do they.
#[derive(Debug)]
pub(crate) struct Shown<V> {
    view: V,
    item: OnceLock<Bytes>,
}

impl<V> Shown<V> {
    fn new(view: V) -> Arc<Self> {
        Arc::new(Self { view, item: OnceLock::new() })
    }

    /// The bytes of the list item; `encode` makes them when nobody has asked before.
    pub(crate) fn item(&self, encode: impl FnOnce(&V) -> Bytes) -> Bytes {
        self.item.get_or_init(|| encode(&self.view)).clone()
    }
}

impl<V> Deref for Shown<V> {
    type Target = V;

    fn deref(&self) -> &V {
        &self.view
    }
}

/// A sandbox on the board.
pub(crate) type ShownSandbox = Arc<Shown<SandboxView>>;
/// A container on the board.
pub(crate) type ShownContainer = Arc<Shown<ContainerView>>;

#[derive(Default)]
struct Inner {
    sandboxes: BTreeMap<SandboxId, ShownSandbox>,
    containers: BTreeMap<ContainerId, ShownContainer>,
}

/// The board.
#[derive(Default)]
pub(crate) struct Board {
    inner: RwLock<Inner>,
}

impl Board {
    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows a sandbox, or its new state.
    pub(crate) fn put_sandbox(&self, view: SandboxView) {
        self.write().sandboxes.insert(view.id.clone(), Shown::new(view));
    }

    /// Shows a container, or its new state.
    pub(crate) fn put_container(&self, view: ContainerView) {
        self.write().containers.insert(view.id.clone(), Shown::new(view));
    }

    /// Forgets a sandbox.
    pub(crate) fn remove_sandbox(&self, id: &SandboxId) {
        self.write().sandboxes.remove(id);
    }

    /// Forgets a container.
    pub(crate) fn remove_container(&self, id: &ContainerId) {
        self.write().containers.remove(id);
    }

    /// All sandboxes, in the order of their ids.
    pub(crate) fn sandboxes(&self) -> Vec<ShownSandbox> {
        self.read().sandboxes.values().cloned().collect()
    }

    /// The SELinux levels that pods have.
    pub(crate) fn pod_levels(&self) -> BTreeSet<String> {
        let level = |view: &ShownSandbox| crate::container::selinux::level_of(&view.spec.labels_of_pod.process);
        self.read().sandboxes.values().filter_map(level).collect()
    }

    /// All containers, in the order of their ids.
    pub(crate) fn containers(&self) -> Vec<ShownContainer> {
        self.read().containers.values().cloned().collect()
    }

    /// The containers of a sandbox.
    pub(crate) fn containers_of(&self, sandbox: &SandboxId) -> Vec<ShownContainer> {
        self.read().containers.values().filter(|c| c.sandbox == *sandbox).cloned().collect()
    }

    /// The sandbox with an id or a unique prefix of one.
    pub(crate) fn sandbox(&self, id: &str) -> Option<ShownSandbox> {
        find(&self.read().sandboxes, id)
    }

    /// The container with an id or a unique prefix of one.
    pub(crate) fn container(&self, id: &str) -> Option<ShownContainer> {
        find(&self.read().containers, id)
    }

    /// [`Self::sandbox`], or the error for clients.
    pub(crate) fn need_sandbox(&self, id: &str) -> Result<ShownSandbox, Error> {
        self.sandbox(id).ok_or_else(|| Error::NotFound { kind: "pod sandbox", id: id.into() })
    }

    /// [`Self::container`], or the error for clients.
    pub(crate) fn need_container(&self, id: &str) -> Result<ShownContainer, Error> {
        self.container(id).ok_or_else(|| Error::NotFound { kind: "container", id: id.into() })
    }
}

fn find<K, V>(map: &BTreeMap<K, Arc<V>>, id: &str) -> Option<Arc<V>>
where
    K: Ord + std::borrow::Borrow<str>,
{
    if id.is_empty() {
        return None;
    }
    let mut matches = map
        .range::<str, _>((std::ops::Bound::Included(id), std::ops::Bound::Unbounded))
        .take_while(|(key, _)| (*key).borrow().starts_with(id));
    let (key, first) = matches.next()?;
    if key.borrow() == id || matches.next().is_none() { Some(first.clone()) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(id: &str) -> SandboxView {
        SandboxView {
            id: id.into(),
            spec: Arc::default(),
            ready: true,
            created_at: 1,
            ips: vec![],
            pid: None,
            cgroup: String::new(),
            reason: String::new(),
        }
    }

    #[test]
    fn ids_are_found_by_any_unique_prefix_and_by_nothing_else() {
        let board = Board::default();
        for id in ["aab", "aac", "b", "bc"] {
            board.put_sandbox(view(id));
        }
        for (asked, want) in [
            ("aab", Some("aab")),
            ("aa", None),
            ("b", Some("b")),
            ("bc", Some("bc")),
            ("", None),
            ("c", None),
            ("aac", Some("aac")),
        ] {
            assert_eq!(board.sandbox(asked).map(|v| v.id.as_str().to_owned()).as_deref(), want, "{asked}");
        }
    }

    #[test]
    fn listing_110_pods_takes_well_under_a_millisecond() {
        let board = Board::default();
        for i in 0..110 {
            board.put_sandbox(view(&format!("{i:064}")));
        }
        let start = std::time::Instant::now();
        for _ in 0..100 {
            assert_eq!(board.sandboxes().len(), 110);
        }
        assert!(start.elapsed() / 100 < std::time::Duration::from_millis(1));
    }
}
