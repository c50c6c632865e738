//! Records: versioned JSON, written to a temporary file and renamed. Each one exists twice: in the state folder (tmpfs, written
//! before the client is answered, dies with the boot) and in the root folder (durable, committed in groups off the reply path).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use berth_linux::file::{PRIVATE, write as write_file};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::board::{ContainerFacts, Exit};
use crate::error::{Error, file};
use crate::id::{ContainerId, SandboxId};
use crate::spec::{Resources, SandboxSpec};

/// The version this program writes.
pub(crate) const VERSION: u32 = 1;

/// A sandbox on record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct SandboxRecord {
    pub(crate) version: u32,
    pub(crate) id: SandboxId,
    /// The boot it belongs to.
    pub(crate) boot: String,
    pub(crate) created_at: i64,
    /// READY was reached; without it a crash of the agent undoes the sandbox.
    pub(crate) ready: bool,
    /// The sandbox was stopped: nothing of it is expected to live.
    #[serde(default)]
    pub(crate) stopped: bool,
    pub(crate) cgroup: String,
    pub(crate) spec: SandboxSpec,
}

/// A container on record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    pub(crate) version: u32,
    pub(crate) id: ContainerId,
    pub(crate) sandbox: SandboxId,
    pub(crate) boot: String,
    pub(crate) created_at: i64,
    pub(crate) started_at: i64,
    pub(crate) resources: Resources,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) exit: Option<Exit>,
    /// It was found half made, or half removed, and is to go: nobody was ever told of it, or is to be told again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) forlorn: bool,
    pub(crate) facts: ContainerFacts,
}

impl ContainerRecord {
    /// As it may lie on a disk: environments hold secrets, and nobody asks for that of a container that has been made.
    pub(crate) fn without_environment(mut self) -> Self {
        self.facts.spec.envs.clear();
        self
    }
}

/// Reads a record of any version we know.
pub(crate) fn load<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    #[derive(Deserialize)]
    struct OnlyVersion {
        version: u32,
    }
    let bytes = std::fs::read(path).map_err(file("read", path))?;
    let bad = |reason: String| Error::Record { path: path.into(), reason };
    let OnlyVersion { version } = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
    if version != VERSION {
        return Err(Error::RecordVersion { path: path.into(), version, readable: VERSION });
    }
    serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))
}

/// Encodes a record.
pub(crate) fn encode<T: Serialize>(record: &T) -> Vec<u8> {
    // These types have only string keys and no failing serialisers.
    serde_json::to_vec(record).unwrap_or_default()
}

/// Writes a file so that it is there whole or not at all. Not synced: for the state folder.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let temporary = temporary(path);
    write_file(&temporary, bytes, PRIVATE).map_err(file("write", &temporary))?;
    std::fs::rename(&temporary, path).map_err(file("rename", path))
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    path.with_file_name(name)
}

enum Command {
    Put(PathBuf, Vec<u8>),
    Forget(PathBuf),
    Flush(mpsc::Sender<()>),
}

/// The durable side: one thread that commits what has gathered.
pub(crate) struct Durable {
    queue: mpsc::Sender<Command>,
}

impl Durable {
    /// Starts the thread.
    pub(crate) fn start() -> Result<Self, Error> {
        let (queue, rx) = mpsc::channel();
        std::thread::Builder::new()
            .name("records".into())
            .stack_size(128 * 1024)
            .spawn(move || commit_loop(&rx))
            .map_err(file("start the thread of", "records"))?;
        Ok(Self { queue })
    }

    /// Writes a record some milliseconds from now; the latest content wins. Its folder must exist then, or it is dropped:
    /// the thing was removed meanwhile.
    pub(crate) fn put(&self, path: PathBuf, bytes: Vec<u8>) {
        let _ = self.queue.send(Command::Put(path, bytes));
    }

    /// Drops what is still to be written at a path.
    pub(crate) fn forget(&self, path: PathBuf) {
        let _ = self.queue.send(Command::Forget(path));
    }

    /// Waits until everything handed over so far is on disk. Blocking.
    pub(crate) fn flush(&self) {
        let (tx, rx) = mpsc::channel();
        if self.queue.send(Command::Flush(tx)).is_ok() {
            let _ = rx.recv();
        }
    }
}

fn commit_loop(queue: &mpsc::Receiver<Command>) {
    let gather = std::time::Duration::from_millis(20);
    while let Ok(first) = queue.recv() {
        let mut group: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
        let mut flushes = Vec::new();
        let mut next = Some(first);
        while let Some(command) = next {
            match command {
                Command::Put(path, bytes) => {
                    group.insert(path, bytes);
                }
                Command::Forget(path) => {
                    group.remove(&path);
                }
                Command::Flush(done) => flushes.push(done),
            }
            next = if flushes.is_empty() { queue.recv_timeout(gather).ok() } else { queue.try_recv().ok() };
        }
        commit(&group);
        for done in flushes {
            let _ = done.send(());
        }
    }
}

/// Writes all files, syncs them, then names them.
fn commit(group: &BTreeMap<PathBuf, Vec<u8>>) {
    let mut written = Vec::with_capacity(group.len());
    for (path, bytes) in group {
        let temporary = temporary(path);
        match write_file(&temporary, bytes, PRIVATE) {
            Ok(file) => written.push((temporary, path, file)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => tracing::error!(path = %path.display(), %error, "record not written"),
        }
    }
    for (_, path, file) in &written {
        if let Err(error) = file.sync_data() {
            tracing::error!(path = %path.display(), %error, "record not synced");
        }
    }
    for (temporary, path, _) in &written {
        match std::fs::rename(temporary, path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                tracing::error!(path = %path.display(), error = %e, "record not renamed");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox() -> SandboxRecord {
        SandboxRecord {
            version: VERSION,
            id: "ab".into(),
            boot: "b".into(),
            created_at: 1,
            ready: true,
            stopped: false,
            cgroup: "/kubepods/podx/ab".into(),
            spec: SandboxSpec { labels: [("k".into(), "v".into())].into(), ..Default::default() },
        }
    }

    /// Version 1 as it lies on users' disks: this text must stay readable for ever.
    const SANDBOX_V1: &str = r#"{"version":1,"id":"ab","boot":"b","created_at":1,"ready":true,"stopped":false,"cgroup":"/kubepods/podx/ab","spec":{"metadata":{"name":"","uid":"","namespace":"","attempt":0},"hostname":"","log_directory":"","dns":null,"port_mappings":[],"labels":{"k":"v"},"annotations":{},"runtime_handler":"","cgroup_parent":"","sysctls":{},"namespaces":{"network":"pod","pid":"pod","ipc":"pod"},"privileged":false,"readonly_rootfs":false}}"#;

    const CONTAINER_V1: &str = r#"{"version":1,"id":"cd","sandbox":"ab","boot":"b","created_at":1,"started_at":2,"resources":{"cpu_period":0,"cpu_quota":0,"cpu_shares":2,"memory_limit":0,"memory_swap_limit":0,"oom_score_adj":0,"cpuset_cpus":"","cpuset_mems":"","hugepages":[],"unified":{}},"exit":{"code":137,"finished_at":3,"reason":"OOMKilled","message":""},"facts":{"spec":{"name":"c","attempt":1,"image":{"image":"i","user_specified":"","annotations":{},"runtime_handler":""},"command":[],"args":[],"working_dir":"","envs":[{"name":"A","value":"b"}],"mounts":[],"devices":[],"labels":{},"annotations":{},"log_path":"","stdin":false,"stdin_once":false,"tty":false,"resources":null,"security":{"privileged":false,"add_capabilities":[],"drop_capabilities":[],"ambient_capabilities":[],"namespaces":{"network":"pod","pid":"container","ipc":"pod"},"run_as_user":null,"run_as_group":null,"run_as_username":"","supplemental_groups":[],"strict_groups":false,"readonly_rootfs":false,"no_new_privs":false,"masked_paths":[],"readonly_paths":[],"seccomp":"runtimeDefault","apparmor":null},"stop_signal":0},"image_id":"sha256:x","image_name":"i:latest","image_ref":"i@sha256:y","user":{"uid":0,"gid":0,"groups":[0]},"stop_signal":15,"log_path":"","cgroup":"/kubepods/podx/cd"}}"#;

    #[test]
    fn version_1_is_written_and_read_as_it_lies_on_disk() {
        assert_eq!(String::from_utf8(encode(&sandbox())).unwrap(), SANDBOX_V1);
        let dir = tempfile::tempdir().unwrap();
        let path = record_path(dir.path());
        write(&path, SANDBOX_V1.as_bytes()).unwrap();
        assert_eq!(load::<SandboxRecord>(&path).unwrap(), sandbox());
        write(&path, CONTAINER_V1.as_bytes()).unwrap();
        let container: ContainerRecord = load(&path).unwrap();
        assert_eq!(container.exit.as_ref().unwrap().code, 137);
        assert_eq!(String::from_utf8(encode(&container)).unwrap(), CONTAINER_V1);
        let bare = CONTAINER_V1.replace(r#"{"name":"A","value":"b"}"#, "");
        assert_eq!(String::from_utf8(encode(&container.without_environment())).unwrap(), bare);
    }

    fn record_path(dir: &Path) -> PathBuf {
        crate::paths::record(dir)
    }

    #[test]
    fn a_record_of_another_version_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = record_path(dir.path());
        write(&path, br#"{"version":9,"new":1}"#).unwrap();
        let text = load::<SandboxRecord>(&path).unwrap_err().to_string();
        assert!(text.contains("version 9"), "{text}");
    }

    #[test]
    fn the_latest_content_of_a_group_wins_and_removed_folders_are_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let durable = Durable::start().unwrap();
        let path = dir.path().join("record.json");
        durable.put(path.clone(), b"1".to_vec());
        durable.put(path.clone(), b"2".to_vec());
        durable.put(dir.path().join("gone/record.json"), b"x".to_vec());
        durable.flush();
        assert_eq!(std::fs::read(&path).unwrap(), b"2");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn only_root_may_read_a_record() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (live, kept) = (dir.path().join("live.json"), dir.path().join("kept.json"));
        write(&live, b"1").unwrap();
        let durable = Durable::start().unwrap();
        durable.put(kept.clone(), b"1".to_vec());
        durable.flush();
        for path in [live, kept] {
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{}", path.display());
        }
    }
}
