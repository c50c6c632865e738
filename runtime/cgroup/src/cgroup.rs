//! One cgroup in every hierarchy in which it has to be: made, entered, listed, removed.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use berth_linux::Pid;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::layout::Layout;
use crate::path::CgroupPath;
use crate::resources::Resources;
use crate::systemd::Manager;
use crate::{Error, Result, file};

/// How long a deletion pauses, all in all, for processes that are on their way out. Pauses are counted, not the clock: on a machine that
/// stood still meanwhile the processes did too.
const DELETE_PATIENCE: Duration = Duration::from_secs(2);

/// A cgroup's folder in one v1 hierarchy.
#[derive(Debug, Clone)]
struct V1Folder {
    controllers: Vec<String>,
    dir: PathBuf,
}

/// A cgroup: its folders in all hierarchies. Dropping it leaves it as it is.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: CgroupPath,
    v1: Vec<V1Folder>,
    v2: Option<PathBuf>,
}

impl Cgroup {
    /// Names a cgroup without looking whether it exists.
    pub fn at(layout: &Layout, path: &CgroupPath) -> Result<Self> {
        let below = path.fs_path();
        let below = below.trim_start_matches('/');
        let v1 = layout
            .hierarchies()
            .iter()
            .map(|hierarchy| V1Folder { controllers: hierarchy.controllers.clone(), dir: hierarchy.mount.join(below) });
        let v2 = layout.unified().map(|mount| mount.join(below));
        Ok(Self { path: path.clone(), v1: v1.collect(), v2 })
    }

    /// Makes a cgroup in every hierarchy, with its parents. One that exists already is taken. On v2 the parents give it all controllers that
    /// they have; what they cannot give is found out when a limit needs it. A slice of systemd's is started; a scope needs a process:
    /// [`crate::Placement`].
    pub fn create(layout: &Layout, path: &CgroupPath) -> Result<Self> {
        let cgroup = Self::at(layout, path)?;
        if path.is_slice() {
            cgroup.manager().start(path, None, &Resources::default(), cgroup.is_v2())?;
        } else if path.unit().is_some() {
            return Err(Error::NoProcess { path: path.clone() });
        }
        cgroup.create_missing(layout)?;
        Ok(cgroup)
    }

    /// Who makes and removes the unit of a path of systemd's form.
    pub(crate) fn manager(&self) -> Manager {
        Manager::usual()
    }

    /// Makes the folders that are not there yet. On failure those it made are removed.
    pub(crate) fn create_missing(&self, layout: &Layout) -> Result<()> {
        let mut made: Vec<&Path> = Vec::new();
        let result = self.create_folders(layout, &mut made);
        if result.is_err() {
            for dir in made {
                // The first error is the one to report; an empty folder that stays behind is found by its name.
                let _ = rustix::fs::rmdir(dir);
            }
        }
        result
    }

    fn create_folders<'a>(&'a self, layout: &Layout, made: &mut Vec<&'a Path>) -> Result<()> {
        for (folder, hierarchy) in self.v1.iter().zip(layout.hierarchies()) {
            let is_cpuset = folder.controllers.iter().any(|name| name == "cpuset");
            if make_folder(&folder.dir, &hierarchy.mount, is_cpuset)? {
                made.push(&folder.dir);
            }
        }
        if let (Some(dir), Some(mount)) = (&self.v2, layout.unified()) {
            if make_folder(dir, mount, false)? {
                made.push(dir);
            }
            if layout.is_v2() {
                enable_controllers(dir, mount)?;
            }
        }
        Ok(())
    }

    /// Takes a cgroup that exists in at least one hierarchy.
    pub fn open(layout: &Layout, path: &CgroupPath) -> Result<Self> {
        let cgroup = Self::at(layout, path)?;
        if cgroup.exists() { Ok(cgroup) } else { Err(Error::NotFound { path: path.clone() }) }
    }

    /// Its name.
    #[must_use]
    pub fn path(&self) -> &CgroupPath {
        &self.path
    }

    /// Whether it exists in any hierarchy.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.dirs().any(Path::is_dir)
    }

    /// Its folders, v1 first.
    pub fn dirs(&self) -> impl Iterator<Item = &Path> {
        self.v1.iter().map(|folder| folder.dir.as_path()).chain(self.v2.as_deref())
    }

    /// Whether its limits are those of v2.
    #[must_use]
    pub fn is_v2(&self) -> bool {
        self.v1.iter().all(|folder| folder.controllers.iter().all(|name| name.starts_with("name="))) && self.v2.is_some()
    }

    /// Its folder in the v1 hierarchy that has a controller.
    #[must_use]
    pub fn v1_dir(&self, controller: &str) -> Option<&Path> {
        let has = |folder: &&V1Folder| folder.controllers.iter().any(|name| name == controller);
        self.v1.iter().find(has).map(|folder| folder.dir.as_path())
    }

    /// Its folder in the v2 hierarchy, in a hybrid layout too.
    #[must_use]
    pub fn v2_dir(&self) -> Option<&Path> {
        self.v2.as_deref()
    }

    /// The v2 folder's descriptor: a process made with it is born inside ([`berth_linux::process::clone3`]), which on a pure v2 layout is all that
    /// is needed, and costs no lock. In a hybrid layout [`Cgroup::attach`] must follow for the v1 hierarchies.
    pub fn dirfd(&self) -> Result<Option<OwnedFd>> {
        let Some(dir) = &self.v2 else { return Ok(None) };
        match rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => Ok(Some(fd)),
            Err(errno) => Err(Error::Read { path: dir.clone(), source: errno.into() }),
        }
    }

    /// The v2 folder in which a process of this cgroup is, when that is one below this. Where processes have moved themselves into cgroups of their own
    /// making, the kernel takes no process in here any more: who belongs to them has to join one of those.
    pub fn dirfd_beside(&self, pid: Pid) -> Result<Option<OwnedFd>> {
        let Some(dir) = &self.v2 else { return Ok(None) };
        let text = file::read(Path::new(&format!("/proc/{}/cgroup", pid.as_raw_nonzero())))?;
        let Some(below) = v2_path_below(&self.path.fs_path(), &text) else { return Ok(None) };
        let dir = dir.join(below);
        match rustix::fs::open(&dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => Ok(Some(fd)),
            Err(errno) => Err(Error::Read { path: dir, source: errno.into() }),
        }
    }

    /// Puts a process into the cgroup, in every hierarchy.
    pub fn attach(&self, pid: Pid) -> Result<()> {
        self.attach_number(pid.as_raw_nonzero().get())
    }

    /// Puts the calling process into the cgroup, whatever its PID namespace.
    pub fn attach_self(&self) -> Result<()> {
        self.attach_number(0)
    }

    /// Its folders in the order in which they are joined: first where processes are looked for, so that whoever is cut off in between leaves one that
    /// is found, and killed, by the next.
    pub(crate) fn joined_dirs(&self) -> impl Iterator<Item = &Path> {
        let first = self.tracking_dir();
        first.into_iter().chain(self.dirs().filter(move |dir| Some(*dir) != first))
    }

    fn attach_number(&self, pid: i32) -> Result<()> {
        for dir in self.joined_dirs() {
            let fail = |source| Error::Attach { pid, path: dir.to_owned(), source };
            file::write_raw(&dir.join("cgroup.procs"), &pid.to_string()).map_err(fail)?;
        }
        Ok(())
    }

    /// The processes in the cgroup and in those below it.
    pub fn procs(&self) -> Result<Vec<Pid>> {
        let mut pids = BTreeSet::new();
        for dir in [self.tracking_dir(), self.v2.as_deref()].into_iter().flatten() {
            collect_procs(dir, &mut pids)?;
        }
        Ok(pids.into_iter().filter_map(Pid::from_raw).collect())
    }

    /// How many processes are in the cgroup and in those below it.
    pub fn process_count(&self) -> Result<usize> {
        match self.tracking_dir().or(self.v2_dir()) {
            Some(dir) => count_procs(dir),
            None => Ok(0),
        }
    }

    /// The v1 folder by which processes are found: the one that can freeze them, else any with a controller, else any.
    pub(crate) fn tracking_dir(&self) -> Option<&Path> {
        ["freezer", "pids", "memory", "devices"]
            .iter()
            .find_map(|name| self.v1_dir(name))
            .or_else(|| self.v1.first().map(|folder| folder.dir.as_path()))
    }

    /// The names of the cgroups directly below, of all hierarchies.
    pub fn children(&self) -> Result<Vec<String>> {
        let mut names = BTreeSet::new();
        for dir in self.dirs() {
            names.extend(child_names(dir)?);
        }
        Ok(names.into_iter().collect())
    }

    /// Removes the cgroup and those below it. What is gone already is no error; what is busy is tried again until the processes that are on
    /// their way out have left, for a bounded time.
    pub fn delete(&self) -> Result<()> {
        // systemd removes what it has made; what is left is of hierarchies that it does not manage. Those go also when it does not answer.
        let stopped = if self.path.unit().is_some() { self.manager().stop(&self.path) } else { Ok(()) };
        self.delete_folders().and(stopped)
    }

    fn delete_folders(&self) -> Result<()> {
        let mut left = DELETE_PATIENCE;
        for dir in self.dirs() {
            remove_tree(dir, &mut left).map_err(|(path, source)| Error::Delete { path, source })?;
        }
        Ok(())
    }
}

/// From /proc/<pid>/cgroup: the path in v2 below a cgroup, unless it is that itself or another.
fn v2_path_below(own: &str, text: &str) -> Option<PathBuf> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    let below = Path::new(path).strip_prefix(own).ok()?;
    let plain = below.components().all(|part| matches!(part, Component::Normal(_)));
    (plain && !below.as_os_str().is_empty()).then(|| below.to_owned())
}

/// Makes a folder and its parents below a mount. True when the folder itself is new.
fn make_folder(dir: &Path, mount: &Path, is_cpuset: bool) -> Result<bool> {
    let fail = |source| Error::Create { path: dir.to_owned(), source };
    let made = match rustix::fs::mkdir(dir, Mode::from_raw_mode(0o755)) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(Errno::NOENT) => {
            let parent = dir.parent().filter(|parent| parent.starts_with(mount) && *parent != mount);
            let parent = parent.ok_or_else(|| fail(Errno::NOENT.into()))?;
            make_folder(parent, mount, is_cpuset)?;
            match rustix::fs::mkdir(dir, Mode::from_raw_mode(0o755)) {
                Ok(()) => true,
                Err(Errno::EXIST) => false,
                Err(errno) => return Err(fail(errno.into())),
            }
        }
        Err(errno) => return Err(fail(errno.into())),
    };
    if is_cpuset {
        inherit_cpuset(dir, mount)?;
    }
    Ok(made)
}

/// v1 takes no process into a cpuset without processors and memory nodes, and a new one has none.
fn inherit_cpuset(dir: &Path, mount: &Path) -> Result<()> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let path = dir.join(name);
        let Some(own) = file::read_optional(&path)? else { continue };
        if !own.trim().is_empty() {
            continue;
        }
        let Some(parent) = dir.parent().filter(|parent| parent.starts_with(mount)) else { continue };
        if parent != mount {
            inherit_cpuset(parent, mount)?;
        }
        let value = file::read(&parent.join(name))?;
        file::write(&path, value.trim())?;
    }
    Ok(())
}

/// Has all parents give their controllers to their children. A controller that cannot be given (processes in the parent, real-time processes) is
/// left out here and named when a limit needs it.
fn enable_controllers(dir: &Path, mount: &Path) -> Result<()> {
    let Some(parent) = dir.parent().filter(|parent| parent.starts_with(mount)) else { return Ok(()) };
    if parent != mount {
        enable_controllers(parent, mount)?;
    }
    let available = file::read(&parent.join("cgroup.controllers"))?;
    let control = parent.join("cgroup.subtree_control");
    let enabled = file::read(&control)?;
    let missing: Vec<String> = available
        .split_whitespace()
        .filter(|name| !enabled.split_whitespace().any(|other| other == *name))
        .map(|name| format!("+{name}"))
        .collect();
    if missing.is_empty() || file::write_raw(&control, &missing.join(" ")).is_ok() {
        return Ok(());
    }
    for one in missing {
        let _ = file::write_raw(&control, &one);
    }
    Ok(())
}

pub(crate) fn child_names(dir: &Path) -> Result<Vec<String>> {
    let fail = |source| Error::Read { path: dir.to_owned(), source };
    let entries = match std::fs::read_dir(dir) {
        Err(error) if file::is_gone(&error) => return Ok(Vec::new()),
        result => result.map_err(fail)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = match entry {
            Err(error) if file::is_gone(&error) => break,
            result => result.map_err(fail)?,
        };
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

/// The pids in a folder and below it. A folder that is gone has none; a threaded one lists its threads' processes elsewhere.
pub(crate) fn collect_procs(dir: &Path, pids: &mut BTreeSet<i32>) -> Result<()> {
    if let Some(text) = file::read_optional(&dir.join("cgroup.procs"))? {
        // 0 is a process outside of our PID namespace, which nobody here can name.
        pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
    }
    for name in child_names(dir)? {
        collect_procs(&dir.join(name), pids)?;
    }
    Ok(())
}

/// The processes in a folder and below it, of other PID namespaces too.
fn count_procs(dir: &Path) -> Result<usize> {
    let own = file::read_optional(&dir.join("cgroup.procs"))?.map_or(0, |text| text.lines().count());
    // A folder has a link of its own, one in its parent, and one in each folder below; where that is not counted it is 1.
    if rustix::fs::stat(dir).is_ok_and(|stat| stat.st_nlink == 2) {
        return Ok(own);
    }
    child_names(dir)?.iter().try_fold(own, |sum, name| Ok(sum + count_procs(&dir.join(name))?))
}

/// `left`: for how long it may still pause.
fn remove_tree(dir: &Path, left: &mut Duration) -> std::result::Result<(), (PathBuf, io::Error)> {
    let mut pause = Duration::from_micros(250);
    loop {
        let errno = match rustix::fs::rmdir(dir) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(errno) => errno,
        };
        if !matches!(errno, Errno::BUSY | Errno::NOTEMPTY | Errno::INTR) {
            return Err((dir.to_owned(), errno.into()));
        }
        let children = child_names(dir).unwrap_or_default();
        for name in &children {
            remove_tree(&dir.join(name), left)?;
        }
        if left.is_zero() {
            // Its last child may just have gone.
            return match rustix::fs::rmdir(dir) {
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                Err(errno) => Err((dir.to_owned(), errno.into())),
            };
        }
        pause = pause.min(*left);
        *left -= pause;
        if children.is_empty() {
            // The kernel tells nobody when a cgroup's last dying process is through.
            std::thread::sleep(pause);
        }
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_below_its_cgroup_only() {
        for (text, below) in [
            ("1:name=systemd:/pods/c/x\n0::/pods/c/init.scope\n", Some("init.scope")),
            ("0::/pods/c/a/b\n", Some("a/b")),
            ("0::/pods/c\n", None),
            ("0::/pods/cc/a\n", None),
            ("0::/pods/c/../d\n", None),
            ("0::/../pods/c/a\n", None),
            ("4:memory:/pods/c/a\n", None),
        ] {
            assert_eq!(v2_path_below("/pods/c", text).as_deref(), below.map(Path::new), "{text}");
        }
    }
}
