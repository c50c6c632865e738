//! A cgroup of the sandbox's own in every hierarchy, and a view of /sys/fs/cgroup that starts there.
//!
//! Names are `berth-test-<pid>-<start time>` of the process outside, which also holds a lock on each folder: a later run removes
//! what nobody holds and no process of that name is behind. A pid says nothing across PID namespaces; the lock does.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

const TOP: &str = "/sys/fs/cgroup";
const PREFIX: &str = "berth-test-";

/// One mounted hierarchy.
#[derive(Debug, Clone)]
struct Hierarchy {
    at: PathBuf,
    v2: bool,
    options: String,
}

/// The sandbox's cgroups, removed on drop.
#[derive(Debug)]
pub struct CgroupTree {
    name: String,
    hierarchies: Vec<Hierarchy>,
    /// Say to other test runs that this one lives.
    _locks: Vec<File>,
}

impl CgroupTree {
    /// Removes what killed sandboxes left and makes this one's cgroups.
    pub fn create() -> io::Result<Self> {
        let hierarchies = hierarchies()?;
        for hierarchy in &hierarchies {
            remove_stale(hierarchy);
        }
        let pid = process::id();
        let mut name = format!("{PREFIX}{pid}-{}", start_time(pid).unwrap_or(0));
        // Several tests of one process run at once.
        let first = hierarchies.first().map(|h| h.at.clone()).unwrap_or_default();
        for n in 0.. {
            let candidate = format!("{name}-{n}");
            match fs::create_dir(first.join(&candidate)) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(io::Error::other(format!("make cgroup {}: {error}", first.join(candidate).display())));
                }
                Ok(()) => {
                    name = candidate;
                    break;
                }
            }
        }
        let mut tree = Self { name, hierarchies, _locks: Vec::new() };
        for hierarchy in &tree.hierarchies {
            let dir = hierarchy.at.join(&tree.name);
            let lock = claim(&dir).map_err(|e| io::Error::other(format!("make cgroup {}: {e}", dir.display())))?;
            tree._locks.push(lock);
            // A new cpuset is empty and takes no process until it has CPUs and memory.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if !hierarchy.v2 && dir.join(file).exists() {
                    fs::write(dir.join(file), fs::read(hierarchy.at.join(file))?)?;
                }
            }
            if !hierarchy.v2 && dir.join("cgroup.clone_children").exists() && dir.join("cpuset.cpus").exists() {
                fs::write(dir.join("cgroup.clone_children"), "1")?;
            }
        }
        Ok(tree)
    }

    /// The cgroups' name, for [`CgroupTree::enter`] by the init.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Moves the calling process into the cgroups, makes them the root of its cgroup namespace, and mounts the hierarchies anew.
    pub fn enter(name: &str) -> io::Result<()> {
        let all = hierarchies()?;
        for hierarchy in &all {
            join(&hierarchy.at.join(name))?;
        }
        unshare(CloneFlags::CLONE_NEWCGROUP)?;
        // This mount namespace is the sandbox's own and private: nothing is unmounted for anybody else.
        umount2(TOP, MntFlags::MNT_DETACH)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        if all.iter().any(|h| h.at != Path::new(TOP)) {
            mount(Some("tmpfs"), TOP, Some("tmpfs"), flags, Some("mode=0755"))?;
        }
        for hierarchy in &all {
            fs::create_dir_all(&hierarchy.at)?;
            let (kind, options) = if hierarchy.v2 { ("cgroup2", None) } else { ("cgroup", Some(hierarchy.options.as_str())) };
            mount(Some(kind), &hierarchy.at, Some(kind), flags, options)
                .map_err(|e| io::Error::other(format!("mount {}: {e}", hierarchy.at.display())))?;
            if hierarchy.v2 {
                // A v2 cgroup that hands controllers down may hold no processes: the root here is one of those.
                let leaf = hierarchy.at.join("testkit");
                fs::create_dir_all(&leaf)?;
                join(&leaf)?;
            }
        }
        Ok(())
    }
}

impl Drop for CgroupTree {
    fn drop(&mut self) {
        for hierarchy in &self.hierarchies {
            remove_tree(&hierarchy.at.join(&self.name));
        }
    }
}

/// Makes the folder if need be, and locks it. Another run may be removing it meanwhile: it is made again then.
fn claim(dir: &Path) -> io::Result<File> {
    for _ in 0..1000 {
        fs::create_dir_all(dir)?;
        if let Ok(folder) = File::open(dir)
            && folder.try_lock().is_ok()
            && fs::metadata(dir).is_ok_and(|now| folder.metadata().is_ok_and(|held| held.ino() == now.ino()))
        {
            return Ok(folder);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(io::ErrorKind::ResourceBusy.into())
}

fn join(dir: &Path) -> io::Result<()> {
    fs::write(dir.join("cgroup.procs"), "0").map_err(|e| io::Error::other(format!("join cgroup {}: {e}", dir.display())))
}

/// Thaws every v1 cgroup in view: frozen processes cannot be killed.
pub fn thaw_all() {
    // Inside a sandbox the view starts at the sandbox's own cgroup; anywhere else this must do nothing.
    if std::env::var_os(super::CGROUP).is_some() {
        thaw(&Path::new(TOP).join("freezer"));
    }
}

fn thaw(dir: &Path) {
    let state = dir.join("freezer.state");
    if state.exists() {
        let _ = fs::write(state, "THAWED");
    }
    for child in children(dir) {
        thaw(&child);
    }
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

/// Kills what runs in the tree and removes it; bounded, best effort.
fn remove_tree(dir: &Path) {
    for child in children(dir) {
        remove_tree(&child);
    }
    for _ in 0..200 {
        match fs::remove_dir(dir) {
            Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => {
                thaw(dir);
                let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
                for pid in procs.lines().filter_map(|l| l.parse().ok()).filter(|pid| *pid > 1) {
                    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            _ => return,
        }
    }
}

fn remove_stale(hierarchy: &Hierarchy) {
    for dir in children(&hierarchy.at) {
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut parts = name.strip_prefix(PREFIX).into_iter().flat_map(|rest| rest.split('-'));
        let (Some(pid), Some(started)) = (parts.next(), parts.next()) else {
            continue;
        };
        // Held while it is removed: whoever wants it meanwhile waits.
        let Ok(folder) = File::open(&dir) else { continue };
        let alive = pid.parse().ok().and_then(start_time).is_some_and(|time| time.to_string() == started);
        if !alive && folder.try_lock().is_ok() {
            remove_tree(&dir);
        }
    }
}

/// Field 22 of /proc/PID/stat: with the pid it names a process for good.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// The hierarchies mounted under /sys/fs/cgroup; the last mount at a place is the one in view.
fn hierarchies() -> io::Result<Vec<Hierarchy>> {
    Ok(parse(&fs::read_to_string("/proc/thread-self/mountinfo")?))
}

fn parse(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let (Some(at), mut right) = (left.split(' ').nth(4), right.split(' ')) else {
            continue;
        };
        let (kind, options) = (right.next().unwrap_or_default(), right.nth(1).unwrap_or_default());
        if !matches!(kind, "cgroup" | "cgroup2") || !Path::new(at).starts_with(TOP) {
            continue;
        }
        let wanted: Vec<&str> =
            options.split(',').filter(|o| !matches!(*o, "rw" | "ro") && !o.contains("release_agent")).collect();
        found.retain(|h| h.at != Path::new(at));
        found.push(Hierarchy { at: at.into(), v2: kind == "cgroup2", options: wanted.join(",") });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_read_from_mountinfo() {
        let found = parse(
            "23 1 0:1 / /sys rw - sysfs sysfs rw\n31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
             37 31 0:34 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:4 - cgroup cgroup rw,cpu,cpuacct\n\
             40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/x,name=systemd\n\
             41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        );
        let seen: Vec<_> = found.iter().map(|h| (h.at.to_str().unwrap(), h.v2, h.options.as_str())).collect();
        assert_eq!(
            seen,
            [
                ("/sys/fs/cgroup/cpu,cpuacct", false, "cpu,cpuacct"),
                ("/sys/fs/cgroup/systemd", false, "xattr,name=systemd"),
                ("/sys/fs/cgroup/unified", true, ""),
            ]
        );
    }

    #[test]
    fn what_somebody_holds_is_not_removed_though_no_process_here_has_its_name() {
        let tree = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy { at: tree.path().into(), v2: false, options: String::new() };
        // No process has this pid: it stands for one of another PID namespace.
        let dir = tree.path().join(format!("{PREFIX}4000000000-1-0"));
        let own = tree.path().join(format!("{PREFIX}{}-{}-0", process::id(), start_time(process::id()).unwrap()));
        fs::create_dir(&own).unwrap();
        let lock = claim(&dir).unwrap();
        remove_stale(&hierarchy);
        assert!(dir.exists() && own.exists());
        drop(lock);
        remove_stale(&hierarchy);
        assert!(!dir.exists(), "nobody holds it any more");
        assert!(own.exists(), "its process lives");
    }

    #[test]
    fn a_process_has_a_start_time_and_a_dead_one_has_none() {
        assert!(start_time(process::id()).is_some_and(|t| t > 0));
        assert_eq!(start_time(u32::MAX), None);
    }
}
