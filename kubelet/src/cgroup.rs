//! The cgroups above the containers': `kubepods`, one per QoS class, one per pod. Paths are pure; containers' cgroups
//! are the runtime's.

use std::sync::{Arc, Mutex, PoisonError};

use berth_cgroup::{Cgroup, CgroupPath, Cpu, HugepageLimit, Layout, Memory, Pids, Resources};

use crate::resources::{CPU_PERIOD, PodLimits, QosClass, cpu_shares};

/// Which form the runtime wants cgroup parents in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// Folders.
    Cgroupfs,
    /// Slices, which systemd makes when the runtime asks for them.
    Systemd,
}

/// What all pods of the node may have together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllLimits {
    /// Bytes of memory.
    pub memory: i64,
    /// Processors, in thousandths: a weight, not a limit.
    pub cpu_millis: i64,
    /// Processes; `None`: no limit.
    pub pids: Option<i64>,
}

/// What has been changed.
#[derive(Debug, Default)]
struct Changes {
    /// What the burstable pods' requests were when systemd was last told of the slices above the pods'.
    told: Option<i64>,
}

/// The pod cgroups of one node.
#[derive(Clone, Debug)]
pub struct PodCgroups {
    root: String,
    driver: Driver,
    layout: Option<Arc<Layout>>,
    /// What all pods together may have; `None`: everything.
    all: Option<AllLimits>,
    /// One change at a time: a parent is not removed while a child is being made.
    changes: Arc<Mutex<Changes>>,
}

impl PodCgroups {
    /// Below `root` (`/` for the whole machine).
    pub fn new(root: &str, driver: Driver) -> PodCgroups {
        let layout = Layout::detect().inspect_err(|error| tracing::warn!(%error, "pods get no cgroups of their own")).ok();
        let layout = layout.map(Arc::new);
        PodCgroups { root: root.trim_end_matches('/').to_owned(), driver, layout, all: None, changes: Arc::default() }
    }

    /// With limits for all pods together (`enforceNodeAllocatable`).
    pub fn limited(self, all: Option<AllLimits>) -> PodCgroups {
        PodCgroups { all, ..self }
    }

    /// The cgroup parent of a pod's sandbox.
    pub fn pod_path(&self, qos: QosClass, uid: &str) -> String {
        pod_path(&self.root, self.driver, qos, uid)
    }

    /// Where folders are made for pods: slices are systemd's.
    fn folders(&self) -> Option<&Layout> {
        self.layout.as_deref().filter(|_| self.driver == Driver::Cgroupfs)
    }

    /// The pod's cgroup, by its name.
    fn pod(&self, layout: &Layout, qos: QosClass, uid: &str) -> Result<Cgroup, berth_cgroup::Error> {
        Cgroup::at(layout, &parse_path(&self.pod_path(qos, uid), self.driver)?)
    }

    /// Whether the limits of pods are enforced: with systemd's form of paths, only systemd can.
    pub fn has_limits(&self) -> bool {
        self.layout.is_some() && (self.driver == Driver::Cgroupfs || berth_cgroup::systemd::is_running())
    }

    /// Makes the pod's cgroup and sets its limits. Idempotent.
    pub fn ensure_pod(&self, qos: QosClass, uid: &str, limits: &PodLimits) -> Result<(), berth_cgroup::Error> {
        let Some(layout) = self.layout.as_ref().filter(|_| self.has_limits()) else { return Ok(()) };
        let _one = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        // The first pod is not to run a moment without them.
        self.limit_all(layout)?;
        let cgroup = Cgroup::create(layout, self.pod(layout, qos, uid)?.path())?;
        let huge = limits.huge_pages.iter().filter(|(_, bytes)| *bytes > 0);
        cgroup.apply(&Resources {
            cpu: Some(Cpu {
                shares: u64::try_from(limits.cpu_shares).ok(),
                quota: Some(limits.cpu_quota.unwrap_or(-1)),
                period: u64::try_from(if limits.cpu_period > 0 { limits.cpu_period } else { CPU_PERIOD }).ok(),
                ..Default::default()
            }),
            memory: Some(Memory { limit: Some(limits.memory.unwrap_or(-1)), ..Default::default() }),
            pids: limits.pids.map(|limit| Pids { limit: Some(limit) }),
            hugepage_limits: huge.map(|(size, bytes)| HugepageLimit { page_size: size.clone(), limit: *bytes }).collect(),
            ..Default::default()
        })
    }

    /// Ends what still runs in the pod's cgroup and removes it, whatever its class was. One that is gone is removed.
    pub fn remove_pod(&self, uid: &str) -> Result<(), berth_cgroup::Error> {
        let Some(layout) = &self.layout else { return Ok(()) };
        let _one = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        for qos in [QosClass::Guaranteed, QosClass::Burstable, QosClass::BestEffort] {
            let cgroup = self.pod(layout, qos, uid)?;
            if cgroup.exists() {
                cgroup.kill_all()?;
                cgroup.delete()?;
            }
        }
        Ok(())
    }

    /// Whether anything runs in the pod's cgroup.
    pub fn has_processes(&self, uid: &str) -> Result<bool, berth_cgroup::Error> {
        let Some(layout) = &self.layout else { return Ok(false) };
        for qos in [QosClass::Guaranteed, QosClass::Burstable, QosClass::BestEffort] {
            let cgroup = self.pod(layout, qos, uid)?;
            if cgroup.exists() && cgroup.process_count()? > 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The UIDs of the pods that have a cgroup. Slices tell nothing: those of all kubelets of the machine are in one.
    pub fn pods(&self) -> Result<Vec<String>, berth_cgroup::Error> {
        let Some(layout) = self.folders() else { return Ok(Vec::new()) };
        let mut uids = Vec::new();
        for parent in ["", "/burstable", "/besteffort"] {
            let parent = CgroupPath::parse(&format!("{}/kubepods{parent}", self.root))?;
            let children = Cgroup::at(layout, &parent)?.children()?;
            uids.extend(children.into_iter().filter_map(|name| name.strip_prefix("pod").map(str::to_owned)));
        }
        Ok(uids)
    }

    /// Memory of all pods without the page cache that could go; `None` while no pod has a cgroup. With systemd all kubelets share it.
    pub fn working_set(&self) -> Result<Option<u64>, berth_cgroup::Error> {
        let Some(layout) = &self.layout else { return Ok(None) };
        let cgroup = self.top(layout)?;
        if !cgroup.exists() {
            return Ok(None);
        }
        Ok(Some(cgroup.brief_stats()?.memory.working_set))
    }

    /// The cgroup of all pods.
    fn top(&self, layout: &Layout) -> Result<Cgroup, berth_cgroup::Error> {
        let path = match self.driver {
            Driver::Cgroupfs => format!("{}/kubepods", self.root),
            Driver::Systemd => format!("{}/kubepods.slice", self.root),
        };
        Cgroup::at(layout, &parse_path(&path, self.driver)?)
    }

    /// Sets the limits of all pods together.
    fn limit_all(&self, layout: &Layout) -> Result<(), berth_cgroup::Error> {
        let Some(all) = self.all else { return Ok(()) };
        let cgroup = Cgroup::create(layout, self.top(layout)?.path())?;
        cgroup.apply(&Resources {
            cpu: Some(Cpu { shares: u64::try_from(cpu_shares(all.cpu_millis)).ok(), ..Default::default() }),
            memory: Some(Memory { limit: Some(all.memory), ..Default::default() }),
            pids: all.pids.map(|limit| Pids { limit: Some(limit) }),
            ..Default::default()
        })
    }

    /// Sets the shares of the QoS cgroups: together the burstable pods weigh what they request.
    pub fn update_qos(&self, burstable_millis: i64) -> Result<(), berth_cgroup::Error> {
        let Some(layout) = self.layout.as_ref().filter(|_| self.has_limits()) else { return Ok(()) };
        let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        // Files are written again, should somebody have changed them; systemd keeps what it was told, and each telling is a dialogue.
        let slices = self.driver == Driver::Systemd;
        if slices && changes.told == Some(burstable_millis) {
            return Ok(());
        }
        self.limit_all(layout)?;
        for (name, shares) in [("burstable", cpu_shares(burstable_millis)), ("besteffort", 2)] {
            let cgroup = Cgroup::create(layout, &self.class_path(name)?)?;
            let cpu = Cpu { shares: u64::try_from(shares).ok(), ..Default::default() };
            cgroup.apply(&Resources { cpu: Some(cpu), ..Default::default() })?;
        }
        changes.told = slices.then_some(burstable_millis);
        Ok(())
    }

    /// The cgroup of a QoS class that has one.
    fn class_path(&self, name: &str) -> Result<CgroupPath, berth_cgroup::Error> {
        let text = match self.driver {
            Driver::Cgroupfs => format!("{}/kubepods/{name}", self.root),
            Driver::Systemd => format!("{}/kubepods.slice/kubepods-{name}.slice", self.root),
        };
        parse_path(&text, self.driver)
    }

    /// Removes the QoS cgroups and their parent when no pod is left in them.
    pub fn remove_empty(&self) -> Result<(), berth_cgroup::Error> {
        let Some(layout) = self.folders() else { return Ok(()) };
        let _one = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        for name in ["/kubepods/burstable", "/kubepods/besteffort", "/kubepods"] {
            let cgroup = Cgroup::at(layout, &CgroupPath::parse(&format!("{}{name}", self.root))?)?;
            if cgroup.exists() && cgroup.children()?.is_empty() && cgroup.procs()?.is_empty() {
                cgroup.delete()?;
            }
        }
        Ok(())
    }
}

/// A path of one of the two forms; text that is no slice's stays a folder's.
fn parse_path(text: &str, driver: Driver) -> Result<CgroupPath, berth_cgroup::Error> {
    let slice = CgroupPath::of_slice(text).filter(|_| driver == Driver::Systemd);
    slice.map_or_else(|| CgroupPath::parse(text), Ok)
}

/// `/kubepods/burstable/pod<uid>`, or the slice of that name.
fn pod_path(root: &str, driver: Driver, qos: QosClass, uid: &str) -> String {
    let class = match qos {
        QosClass::Guaranteed => None,
        QosClass::Burstable => Some("burstable"),
        QosClass::BestEffort => Some("besteffort"),
    };
    match (driver, class) {
        (Driver::Cgroupfs, None) => format!("{root}/kubepods/pod{uid}"),
        (Driver::Cgroupfs, Some(class)) => format!("{root}/kubepods/{class}/pod{uid}"),
        (Driver::Systemd, class) => {
            let uid = uid.replace('-', "_");
            match class {
                None => format!("{root}/kubepods.slice/kubepods-pod{uid}.slice"),
                Some(class) => {
                    format!("{root}/kubepods.slice/kubepods-{class}.slice/kubepods-{class}-pod{uid}.slice")
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_systemd_a_pods_cgroup_is_its_slice_and_no_folder_is_made() {
        let cgroups = PodCgroups::new("/berth-x", Driver::Systemd);
        let Some(layout) = cgroups.layout.clone() else { return };
        let pod = cgroups.pod(&layout, QosClass::Burstable, "a-b").unwrap();
        assert_eq!(pod.path().unit().as_deref(), Some("kubepods-burstable-poda_b.slice"));
        cgroups.ensure_pod(QosClass::Burstable, "a-b", &PodLimits::default()).unwrap();
        assert!(!pod.exists() && !cgroups.has_processes("a-b").unwrap());
        cgroups.remove_pod("a-b").unwrap();
    }

    #[test]
    fn paths_are_the_upstreams_in_both_forms() {
        let cases = [
            (Driver::Cgroupfs, QosClass::Guaranteed, "/kubepods/poda-b"),
            (Driver::Cgroupfs, QosClass::Burstable, "/kubepods/burstable/poda-b"),
            (Driver::Cgroupfs, QosClass::BestEffort, "/kubepods/besteffort/poda-b"),
            (Driver::Systemd, QosClass::Guaranteed, "/kubepods.slice/kubepods-poda_b.slice"),
            (Driver::Systemd, QosClass::BestEffort, "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-poda_b.slice"),
        ];
        for (driver, qos, expected) in cases {
            assert_eq!(pod_path("", driver, qos, "a-b"), expected);
        }
        assert_eq!(pod_path("/x", Driver::Cgroupfs, QosClass::Guaranteed, "u"), "/x/kubepods/podu");
    }
}
