//! What pods leave in the kernel as long as they exist: links, network namespaces, cgroups, mounts. Counted from outside, so that
//! nothing can be hidden in work that is done later.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;

/// How long the traces of stopped pods may take to vanish before the round is void.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(2);

/// Counts of the traces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traces {
    links: usize,
    namespaces: usize,
    cgroups: usize,
    mounts: usize,
}

/// The hierarchies that can hold cgroups of pods.
#[derive(Debug, Clone)]
pub struct Hierarchies(Vec<PathBuf>);

impl Hierarchies {
    /// Those that are mounted here.
    pub fn find() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let cgroup = |line: &str| {
            let (left, right) = line.split_once(" - ")?;
            let kind = right.split(' ').next()?;
            matches!(kind, "cgroup" | "cgroup2").then(|| left.split(' ').nth(4).map(PathBuf::from))?
        };
        let mut all: Vec<PathBuf> = mounts.lines().filter_map(cgroup).filter(|p| p.starts_with("/sys/fs/cgroup")).collect();
        all.sort();
        all.dedup();
        Ok(Self(all))
    }

    /// Makes a pod's cgroup everywhere, as a kubelet does.
    pub fn make(&self, path: &str) -> Result<()> {
        self.0.iter().try_for_each(|top| Ok(fs::create_dir_all(top.join(path))?))
    }

    /// Removes a pod's cgroup and what is left below it; what is busy stays and is counted as a trace.
    pub fn remove(&self, path: &str) {
        for top in &self.0 {
            remove_cgroup(&top.join(path));
        }
    }

    /// The cgroups below this one in all hierarchies, itself not counted.
    fn count(&self, path: &str) -> usize {
        self.0.iter().map(|top| below(&top.join(path))).sum()
    }

    /// The file of a cgroup that some v1 controller or the unified hierarchy has, read as a process of it is told.
    pub fn read_of_process(&self, pid: i64, controller: &str, file: &str) -> Option<String> {
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let path_of = |wanted: &str| {
            cgroups.lines().find_map(|line| {
                let mut parts = line.splitn(3, ':').skip(1);
                let (controllers, path) = (parts.next()?, parts.next()?);
                controllers.split(',').any(|c| c == wanted).then(|| path.trim_start_matches('/').to_owned())
            })
        };
        let own = |top: &&PathBuf| {
            top.file_name().is_some_and(|n| n.as_bytes().split(|&b| b == b',').any(|c| c == controller.as_bytes()))
        };
        let dir = match self.0.iter().find(own) {
            Some(top) => top.join(path_of(controller)?),
            None => Path::new("/sys/fs/cgroup").join(path_of("")?),
        };
        Some(fs::read_to_string(dir.join(file)).ok()?.trim().to_owned())
    }
}

fn children(dir: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path())
}

fn below(dir: &Path) -> usize {
    children(dir).map(|child| 1 + below(&child)).sum()
}

fn remove_cgroup(dir: &Path) {
    children(dir).for_each(|child| remove_cgroup(&child));
    let _ = fs::remove_dir(dir);
}

/// The links of this network namespace.
fn links() -> usize {
    fs::read_to_string("/proc/self/net/dev").unwrap_or_default().lines().count()
}

/// The network namespaces that a process is in, holds open or has mounted.
fn namespaces() -> usize {
    let mut seen = BTreeSet::new();
    let mut add = |path: &Path| {
        if let Ok(target) = fs::read_link(path) {
            let target = target.to_string_lossy().into_owned();
            if target.starts_with("net:[") {
                seen.insert(target);
            }
        }
    };
    for process in children(Path::new("/proc")).filter(|p| p.join("ns/net").symlink_metadata().is_ok()) {
        add(&process.join("ns/net"));
        for fd in fs::read_dir(process.join("fd")).into_iter().flatten().flatten() {
            add(&fd.path());
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    seen.extend(mounts.lines().filter_map(|l| l.split(' ').nth(3)).filter(|root| root.starts_with("net:[")).map(str::to_owned));
    seen.len()
}

impl Traces {
    /// What there is now.
    pub fn count(hierarchies: &Hierarchies) -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines().count();
        Self { links: links(), namespaces: namespaces(), cgroups: hierarchies.count(""), mounts }
    }

    /// The same, with room for links that stay, such as a bridge, and for the cgroup that holds the pods'.
    #[must_use]
    pub fn with_room(self, links: usize, hierarchies: &Hierarchies) -> Self {
        Self { links: self.links + links, cgroups: self.cgroups + hierarchies.0.len(), ..self }
    }

    /// Waits until links, network namespaces and the cgroups below `parent` are as few as in this count, and says how long that took; what
    /// is cheap to ask is asked first, so that waiting costs little. None when the patience ran out.
    pub async fn wait_gone(self, hierarchies: &Hierarchies, parent: &str, pods: usize) -> Option<Duration> {
        let begun = Instant::now();
        // The pods' own cgroups are the kubelet's, that is ours: they stay.
        let own = pods * hierarchies.0.len();
        while begun.elapsed() < PATIENCE {
            if links() <= self.links && hierarchies.count(parent) <= own && namespaces() <= self.namespaces {
                return Some(begun.elapsed());
            }
            tokio::time::sleep(POLL).await;
        }
        None
    }

    /// Waits until everything is as in this count; else says what is left.
    pub async fn wait_same(self, hierarchies: &Hierarchies) -> Result<(), String> {
        let begun = Instant::now();
        loop {
            let now = Self::count(hierarchies);
            let more = [
                ("links", now.links, self.links),
                ("network namespaces", now.namespaces, self.namespaces),
                ("cgroups", now.cgroups, self.cgroups),
                ("mounts", now.mounts, self.mounts),
            ];
            let left: Vec<_> = more.iter().filter(|(_, now, then)| now > then).collect();
            if left.is_empty() {
                return Ok(());
            }
            if begun.elapsed() > PATIENCE {
                let texts: Vec<_> = left.iter().map(|(what, now, then)| format!("{} {what}", now - then)).collect();
                return Err(format!("left behind: {}", texts.join(", ")));
            }
            tokio::time::sleep(POLL * 5).await;
        }
    }
}
