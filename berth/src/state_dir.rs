//! The state folder: on tmpfs (ours is mounted there where it is not), and held by one agent at a time.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock, statfs};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde::{Deserialize, Serialize};

/// `statfs` type of tmpfs (linux/magic.h).
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// The cap of the tmpfs that we mount: records of some hundred pods take about a mebibyte.
const SIZE: &str = "size=64m,mode=0711";

/// The agent's hold on its state folder; dropped with the process.
pub struct Held {
    _lock: File,
}

#[allow(clippy::useless_conversion, reason = "the type is another one with another C library")]
fn is_tmpfs(path: &Path) -> Result<bool> {
    let found = statfs(path).with_context(|| format!("looking at {}", path.display()))?;
    Ok(i64::try_from(found.f_type) == Ok(TMPFS_MAGIC))
}

/// Takes the lock, within two seconds. [`holder`] has it for an instant when it asks who holds it, and a program that a killed agent was
/// just starting has it until its exec: neither must keep an agent from starting.
fn lock_soon(lock: &File) -> bool {
    (0..100).any(|round| {
        if round > 0 {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok()
    })
}

/// What holds a state folder: the two halves of a node may be two processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// The CRI server.
    Runtime,
    /// The kubelet.
    Kubelet,
}

/// Makes the folder and puts it on tmpfs.
fn prepare(state: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o711).create(state).with_context(|| format!("making {}", state.display()))?;
    // The halves may start at once: one of them mounts. The folder below a mount is another one, and then there is nothing to do.
    let folder = File::open(state).with_context(|| format!("opening {}", state.display()))?;
    flock(&folder, FlockOperation::LockExclusive).with_context(|| format!("locking {}", state.display()))?;
    if !is_tmpfs(state)? {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        let data = std::ffi::CString::new(SIZE)?;
        mount("berth", state, "tmpfs", flags, Some(data.as_c_str()))
            .with_context(|| format!("mounting a tmpfs on {}", state.display()))?;
    }
    Ok(())
}

/// Makes the folder, puts it on tmpfs, and takes the lock that keeps a second agent of this half out.
pub fn hold(state: &Path, half: Half) -> Result<Held> {
    prepare(state)?;
    let path = lock_path(state, half);
    let mut lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    if !lock_soon(&lock) {
        let mut pid = String::new();
        let _ = lock.read_to_string(&mut pid);
        bail!("another berth (pid {}) runs on {}: use another --state, or end that one", pid.trim(), state.display());
    }
    lock.set_len(0)?;
    lock.rewind()?;
    writeln!(lock, "{}", std::process::id())?;
    Ok(Held { _lock: lock })
}

/// Keeps a second agent, or an import, from writing below the same root.
pub fn hold_root(root: &Path) -> Result<Held> {
    DirBuilder::new().recursive(true).mode(0o711).create(root).with_context(|| format!("making {}", root.display()))?;
    let path = root.join("lock");
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!("another berth works below {}", root.display());
    }
    Ok(Held { _lock: lock })
}

fn lock_path(state: &Path, half: Half) -> PathBuf {
    state.join(match half {
        Half::Runtime => "agent.pid",
        Half::Kubelet => "kubelet.pid",
    })
}

/// What the verbs that come after an agent must know of its kubelet: its flags are not theirs.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KubeletNote {
    /// The folder of pods' volumes.
    pub kubelet_root: PathBuf,
    /// Where the pods' cgroups hang.
    pub cgroup_root: Option<String>,
    /// How many seconds its pods may take to end at a SIGTERM; 0: they go on.
    #[serde(default)]
    pub shutdown_seconds: u64,
}

impl KubeletNote {
    /// Of a kubelet with this configuration.
    pub fn of(config: &berth_kubelet::Config) -> KubeletNote {
        KubeletNote {
            kubelet_root: config.kubelet_root.clone(),
            cgroup_root: config.cgroup_root.clone(),
            shutdown_seconds: config.shutdown_steps.iter().map(|step| step.grace.as_secs()).sum(),
        }
    }
}

fn note_path(state: &Path) -> PathBuf {
    state.join("kubelet.json")
}

/// Writes the note.
pub fn note_kubelet(state: &Path, note: &KubeletNote) -> Result<()> {
    let path = note_path(state);
    let temporary = path.with_extension("json.new");
    std::fs::write(&temporary, serde_json::to_vec(note)?)
        .and_then(|()| std::fs::rename(&temporary, &path))
        .with_context(|| format!("writing {}", path.display()))
}

/// Reads the note, where an agent with a kubelet has left one.
pub fn kubelet_note(state: &Path) -> Option<KubeletNote> {
    serde_json::from_slice(&std::fs::read(note_path(state)).ok()?).ok()
}

/// The pid of the agent that holds the folder for a half, where one does.
pub fn holder(state: &Path, half: Half) -> Option<i32> {
    let mut file = File::open(lock_path(state, half)).ok()?;
    if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
        return None;
    }
    let mut pid = String::new();
    file.read_to_string(&mut pid).ok()?;
    pid.trim().parse().ok()
}

/// Unmounts the tmpfs that [`hold`] mounted; one that somebody else mounted stays.
pub fn release(state: &Path) -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("reading mountinfo")?;
    let at = state.canonicalize().with_context(|| format!("looking at {}", state.display()))?;
    let ours = mounts.lines().any(|line| {
        let mut fields = line.split(' ');
        fields.nth(4).map(Path::new) == Some(at.as_path()) && line.contains(" - tmpfs berth ")
    });
    if ours {
        unmount(&at, UnmountFlags::DETACH).with_context(|| format!("unmounting {}", at.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_halves_hold_a_folder_together_and_each_of_them_once() {
        let state = tempfile::tempdir_in("/dev/shm").expect("a folder on tmpfs");
        let pid = i32::try_from(std::process::id()).expect("a pid");
        let runtime = hold(state.path(), Half::Runtime).expect("held");
        assert_eq!((holder(state.path(), Half::Runtime), holder(state.path(), Half::Kubelet)), (Some(pid), None));
        let kubelet = hold(state.path(), Half::Kubelet).expect("held beside it");
        assert_eq!(holder(state.path(), Half::Kubelet), Some(pid));
        let refused = hold(state.path(), Half::Kubelet).err().expect("refused");
        assert!(format!("{refused:#}").contains(&format!("another berth (pid {pid})")), "{refused:#}");
        drop(kubelet);
        assert_eq!((holder(state.path(), Half::Runtime), holder(state.path(), Half::Kubelet)), (Some(pid), None));
        drop(runtime);
    }
}
