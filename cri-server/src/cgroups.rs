//! Where sandboxes and containers are in the cgroup tree, and what is done to their cgroups from outside: ending, limits,
//! statistics. The one user of `berth-cgroup` in this crate.

use std::sync::Arc;

use berth_cgroup::{Cgroup, CgroupPath, Cpu, DeviceRule, HugepageLimit, Layout, Memory};

use crate::error::Error;
use crate::id::{ContainerId, SandboxId};
use crate::spec::Resources;

/// Who makes the cgroups of sandboxes and containers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CgroupDriver {
    /// We do: folders.
    #[default]
    Cgroupfs,
    /// systemd does: scopes.
    Systemd,
}

/// What stands before the id in the name of a scope: tools take what follows the last dash for the container's id.
const SCOPE_PREFIX: &str = "berth";

/// The machine's cgroups as this instance uses them.
#[derive(Debug, Clone)]
pub(crate) struct Cgroups {
    layout: Arc<Layout>,
    driver: CgroupDriver,
    tops: [String; 2],
}

fn failed(action: &'static str, subject: &str) -> impl FnOnce(berth_cgroup::Error) -> Error {
    move |e| Error::Cgroup { action, subject: subject.to_owned(), source: Box::new(e) }
}

impl Cgroups {
    /// Looks at the machine. `instance` names the top cgroup of pods without a parent of their own.
    pub(crate) fn new(instance: &str, driver: CgroupDriver) -> Result<Self, Error> {
        let layout = Layout::detect().map_err(failed("find", "this machine"))?;
        if driver == CgroupDriver::Systemd && !berth_cgroup::systemd::is_running() {
            let reason = "the systemd cgroup driver needs a running systemd (/run/systemd/system), which this machine has not";
            return Err(Error::Unsupported { what: "cgroupDriver: systemd", reason: reason.into() });
        }
        let mut tops = [format!("/berth-{instance}"), format!("/berth.slice/berth-{instance}.slice")];
        if driver == CgroupDriver::Systemd {
            tops.reverse();
        }
        Ok(Self { layout: Arc::new(layout), driver, tops })
    }

    /// A tree of v2 in a folder, for tests.
    #[cfg(test)]
    pub(crate) fn in_tree(mount: &std::path::Path) -> Self {
        let layout = Arc::new(Layout::V2 { mount: mount.into() });
        Self { layout, driver: CgroupDriver::Cgroupfs, tops: ["/berth-x".into(), "/berth.slice/berth-x.slice".into()] }
    }

    /// Who makes cgroups.
    pub(crate) fn driver(&self) -> CgroupDriver {
        self.driver
    }

    /// Whether the machine has cgroup v2 alone.
    pub(crate) fn is_v2(&self) -> bool {
        self.layout.is_v2()
    }

    /// The cgroup of pods without a parent.
    pub(crate) fn top(&self) -> &str {
        &self.tops[0]
    }

    fn parent<'a>(&'a self, parent: &'a str) -> &'a str {
        let trimmed = parent.trim_end_matches('/');
        if trimmed.is_empty() { self.top() } else { trimmed }
    }

    /// The leaf cgroup of a sandbox's shim.
    pub(crate) fn sandbox(&self, parent: &str, id: &SandboxId) -> String {
        self.leaf(parent, id.as_str())
    }

    /// The cgroup of a container; its last component ends with the id.
    pub(crate) fn container(&self, parent: &str, id: &ContainerId) -> String {
        self.leaf(parent, id.as_str())
    }

    fn leaf(&self, parent: &str, id: &str) -> String {
        let parent = self.parent(parent);
        match self.driver {
            CgroupDriver::Cgroupfs => join(parent, id),
            CgroupDriver::Systemd => format!("{}:{SCOPE_PREFIX}:{id}", parent.rsplit('/').next().unwrap_or_default()),
        }
    }

    /// The id of a sandbox or container in the name of its cgroup, as either driver makes them.
    pub(crate) fn id_of(name: &str) -> Option<&str> {
        let id = match name.strip_suffix(".scope") {
            Some(scope) => scope.strip_prefix(SCOPE_PREFIX)?.strip_prefix('-')?,
            None => name,
        };
        crate::id::is_id(id).then_some(id)
    }

    /// The cgroup that holds a sandbox's cgroup and its containers'.
    pub(crate) fn pod(&self, parent: &str) -> String {
        self.parent(parent).to_owned()
    }

    fn path(&self, text: &str, subject: &str) -> Result<CgroupPath, Error> {
        CgroupPath::parse(text).map_err(failed("name", subject))
    }

    /// Refuses what can not be the parent of a sandbox's cgroup.
    pub(crate) fn check_parent(&self, parent: &str) -> Result<(), Error> {
        let bad = |reason: &str| crate::error::invalid("linux.cgroup_parent", format!("{parent:?}: {reason}"));
        let unit = self.leaf(parent, "x");
        // All of it, also what systemd's form leaves out: its folders follow from the slice's name.
        for text in [join(self.parent(parent), "x"), unit] {
            match CgroupPath::parse(&text) {
                Ok(_) => {}
                Err(_) if self.driver == CgroupDriver::Systemd && !text.starts_with('/') => {
                    return Err(bad(
                        "with the systemd cgroup driver it must end in the name of a slice, as in /a.slice/a-b.slice",
                    ));
                }
                Err(berth_cgroup::Error::BadPath { reason, .. }) => return Err(bad(reason)),
                Err(error) => return Err(failed("name", parent)(error)),
            }
        }
        Ok(())
    }

    /// The parent of a sandbox's cgroup exists after this; slices are systemd's, which makes them with the scope. Blocking.
    pub(crate) fn ensure_parent(&self, sandbox_cgroup: &str, subject: &str) -> Result<(), Error> {
        let path = self.path(sandbox_cgroup, subject)?;
        if let Some(parent) = path.parent() {
            Cgroup::create(&self.layout, &parent).map_err(failed("create parent", subject))?;
        }
        Ok(())
    }

    /// Kills everything in a cgroup and removes it; gone is success.
    pub(crate) async fn remove(&self, text: &str, subject: &str) -> Result<(), Error> {
        let (this, text, subject) = (self.clone(), text.to_owned(), subject.to_owned());
        crate::blocking(move || this.remove_now(&text, &subject)).await
    }

    /// Removes the cgroups of pods without a parent, also that of the driver which is not in use (any more). Blocking.
    pub(crate) fn remove_tops(&self) -> Result<(), Error> {
        let subject = "this instance";
        for top in &self.tops {
            // A folder of this name that systemd has not made is no unit of its.
            let slice = CgroupPath::of_slice(top).filter(|_| berth_cgroup::systemd::is_running());
            let path = slice.map_or_else(|| self.path(top, subject), Ok)?;
            let cgroup = Cgroup::at(&self.layout, &path).map_err(failed("open", subject))?;
            if cgroup.exists() {
                cgroup.kill_all().map_err(failed("kill", subject))?;
                cgroup.delete().map_err(failed("remove", subject))?;
            }
        }
        Ok(())
    }

    /// Where pods without a parent of their own are: by the driver in use, then by the other one.
    pub(crate) fn tops(&self) -> &[String; 2] {
        &self.tops
    }

    /// [`Self::remove`], blocking.
    pub(crate) fn remove_now(&self, text: &str, subject: &str) -> Result<(), Error> {
        // What can not be a cgroup's name was refused when it should have been made: there is none.
        let Ok(path) = CgroupPath::parse(text) else { return Ok(()) };
        let cgroup = Cgroup::at(&self.layout, &path).map_err(failed("open", subject))?;
        if !cgroup.exists() {
            return Ok(());
        }
        cgroup.kill_all().map_err(failed("kill", subject))?;
        cgroup.delete().map_err(failed("remove", subject))
    }

    /// Applies limits. Blocking.
    pub(crate) fn update(&self, text: &str, subject: &str, resources: &berth_cgroup::Resources) -> Result<(), Error> {
        let path = self.path(text, subject)?;
        let cgroup = Cgroup::open(&self.layout, &path).map_err(failed("open", subject))?;
        cgroup.update(resources).map_err(failed("limit", subject))
    }

    /// Gives all processes of a cgroup an OOM score; what may not be lowered is reported and stays. Blocking.
    pub(crate) fn set_oom_score(&self, text: &str, subject: &str, score: i64) -> Result<Vec<String>, Error> {
        let path = self.path(text, subject)?;
        let cgroup = Cgroup::open(&self.layout, &path).map_err(failed("open", subject))?;
        let mut warnings = Vec::new();
        for pid in cgroup.procs().map_err(failed("list the processes of", subject))? {
            let file = format!("/proc/{}/oom_score_adj", pid.as_raw_nonzero());
            match std::fs::write(&file, score.to_string()) {
                Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
                    warnings.push(format!("oom_score_adj can not be lowered to {score}: {e}"));
                }
                Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => {
                    return Err(crate::error::invalid("linux.oom_score_adj", format!("{score} is not in -1000..1000")));
                }
                _ => {} // Written, or the process has just ended.
            }
        }
        Ok(warnings)
    }

    /// Statistics; none when the cgroup is gone. Blocking.
    pub(crate) fn stats(&self, text: &str) -> Option<berth_cgroup::Stats> {
        let path = CgroupPath::parse(text).ok()?;
        Cgroup::open(&self.layout, &path).ok()?.stats().ok()
    }

    /// The numbers that CRI's statistics tell; none when the cgroup is gone. Blocking.
    pub(crate) fn brief_stats(&self, text: &str) -> Option<berth_cgroup::Stats> {
        let path = CgroupPath::parse(text).ok()?;
        Cgroup::open(&self.layout, &path).ok()?.brief_stats().ok()
    }

    /// How many processes are in a cgroup and below it; 0 when it is gone. Blocking.
    pub(crate) fn process_count(&self, text: &str) -> usize {
        let cgroup = CgroupPath::parse(text).and_then(|path| Cgroup::at(&self.layout, &path));
        cgroup.and_then(|c| c.process_count()).unwrap_or_default()
    }

    /// Whether a cgroup is there and holds no process. Blocking.
    pub(crate) fn is_idle(&self, text: &str) -> bool {
        let cgroup = CgroupPath::parse(text).and_then(|path| Cgroup::open(&self.layout, &path));
        cgroup.and_then(|c| c.procs()).is_ok_and(|pids| pids.is_empty())
    }

    /// The processes in a cgroup and below it; none when it is gone. Blocking.
    pub(crate) fn processes(&self, text: &str) -> Vec<i32> {
        let cgroup = CgroupPath::parse(text).and_then(|path| Cgroup::open(&self.layout, &path));
        let pids = cgroup.and_then(|c| c.procs()).unwrap_or_default();
        pids.into_iter().map(|pid| pid.as_raw_nonzero().get()).collect()
    }

    /// Whether the machine has a controller for containers.
    pub(crate) fn has_controller(&self, name: &str) -> bool {
        self.layout.controllers().iter().any(|controller| controller == name)
    }

    /// The names of the cgroups below one. Blocking.
    pub(crate) fn children(&self, text: &str) -> Vec<String> {
        let cgroup = CgroupPath::parse(text).and_then(|path| Cgroup::open(&self.layout, &path));
        cgroup.and_then(|c| c.children()).unwrap_or_default()
    }
}

fn join(parent: &str, name: &str) -> String {
    if parent.starts_with('/') { format!("{parent}/{name}") } else { format!("/{parent}/{name}") }
}

fn some(value: i64) -> Option<i64> {
    (value != 0).then_some(value)
}

fn positive(value: i64) -> Option<u64> {
    u64::try_from(value).ok().filter(|v| *v != 0)
}

fn text(value: &str) -> Option<String> {
    (!value.is_empty()).then(|| value.to_owned())
}

/// CRI limits as cgroup limits; zero and empty are absent.
pub(crate) fn limits(resources: &Resources) -> berth_cgroup::Resources {
    berth_cgroup::Resources {
        memory: Some(Memory {
            limit: some(resources.memory_limit),
            swap: some(resources.memory_swap_limit),
            ..Default::default()
        })
        .filter(|m| m.limit.is_some() || m.swap.is_some()),
        cpu: Some(Cpu {
            shares: positive(resources.cpu_shares),
            quota: some(resources.cpu_quota),
            period: positive(resources.cpu_period),
            cpus: text(&resources.cpuset_cpus),
            mems: text(&resources.cpuset_mems),
            ..Default::default()
        })
        .filter(|c| *c != Cpu::default()),
        hugepage_limits: resources
            .hugepages
            .iter()
            .map(|(page_size, limit)| HugepageLimit { page_size: page_size.clone(), limit: *limit })
            .collect(),
        unified: resources.unified.clone(),
        ..Default::default()
    }
}

/// A rule of the devices cgroup.
pub(crate) fn device_rule(allow: bool, kind: &str, major: Option<u32>, minor: Option<u32>, access: &str) -> DeviceRule {
    DeviceRule {
        allow,
        kind: Some(kind.to_owned()),
        major: major.map(i64::from),
        minor: minor.map(i64::from),
        access: Some(access.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_limits_are_absent() {
        assert_eq!(limits(&Resources::default()), berth_cgroup::Resources::default());
        let got = limits(&Resources { cpu_quota: -1, memory_limit: 5, ..Default::default() });
        assert_eq!(got.cpu.unwrap().quota, Some(-1));
        assert_eq!(got.memory.unwrap().limit, Some(5));
    }

    fn cgroups(driver: CgroupDriver, top: &str) -> Cgroups {
        let layout = Arc::new(Layout::V2 { mount: "/sys/fs/cgroup".into() });
        Cgroups { layout, driver, tops: [top.into(), String::new()] }
    }

    #[test]
    fn a_leaf_is_a_folder_or_a_scope_in_the_parents_slice_and_its_id_is_found_in_its_name() {
        let id = "a".repeat(64);
        let (fs, systemd) =
            (cgroups(CgroupDriver::Cgroupfs, "/berth-x"), cgroups(CgroupDriver::Systemd, "/berth.slice/berth-x.slice"));
        let of = |cgroups: &Cgroups, parent: &str| cgroups.container(parent, &id.as_str().into());
        let pod = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podu_1.slice";
        assert_eq!(of(&fs, "/kubepods/podu-1"), format!("/kubepods/podu-1/{id}"));
        assert_eq!(of(&fs, ""), format!("/berth-x/{id}"));
        assert_eq!(of(&systemd, pod), format!("kubepods-burstable-podu_1.slice:berth:{id}"));
        assert_eq!(of(&systemd, ""), format!("berth-x.slice:berth:{id}"));
        let path = CgroupPath::parse(&of(&systemd, pod)).unwrap().fs_path();
        assert_eq!(path, format!("{pod}/berth-{id}.scope"));
        assert_eq!(Cgroups::id_of(path.rsplit('/').next().unwrap()), Some(id.as_str()));
        assert_eq!(Cgroups::id_of(&id), Some(id.as_str()));
        for other in ["init.scope", "berth-x.scope", "system.slice"] {
            assert_eq!(Cgroups::id_of(other), None, "{other}");
        }
        systemd.ensure_parent(&of(&systemd, pod), "s").unwrap();
        assert!(systemd.check_parent("/no/slice").unwrap_err().to_string().contains("the name of a slice"));
        // A sandbox that was refused for it can still be undone.
        systemd.remove_now(&of(&systemd, "/no/slice"), "s").unwrap();
    }

    #[test]
    fn what_can_not_be_a_parent_is_refused_by_its_field() {
        for driver in [CgroupDriver::Cgroupfs, CgroupDriver::Systemd] {
            let cgroups = cgroups(driver, "/berth.slice/berth-x.slice");
            for good in ["", "/", "/kubepods.slice/kubepods-podu_1.slice", "kubepods.slice/", "/a.slice"] {
                cgroups.check_parent(good).unwrap();
            }
            let long = format!("/{}.slice", "x".repeat(300));
            for bad in ["relative/../../x.slice", "..", "/a.slice/../b.slice", &long, "/a\nb.slice", "/a\0.slice"] {
                let error = cgroups.check_parent(bad).unwrap_err();
                assert!(matches!(error, Error::Invalid { .. }), "{driver:?} {bad:?}: {error}");
                assert!(error.to_string().contains("linux.cgroup_parent"), "{error}");
            }
        }
        cgroups(CgroupDriver::Cgroupfs, "/top").check_parent("pods/a:b:c").unwrap();
    }

    #[test]
    fn a_parent_without_a_slash_and_of_systemds_form_is_a_plain_path() {
        assert_eq!(join("/test.slice", "ab"), "/test.slice/ab");
        assert_eq!(join("pods", "ab"), "/pods/ab");
    }
}
