//! The sandbox's files on disk: a folder outside that is [`TESTS_DIR`](super::TESTS_DIR) inside, removed afterwards.
//!
//! Its name says whose it is, PID namespace included, so that a later run can remove what a killed one left.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;

use nix::mount::{MsFlags, mount};

use super::TESTS_DIR;
use super::cgroups::start_time;

const PREFIX: &str = "berth-test-";

/// A folder below `$BERTH_TEST_DIR` or `/tmp`, removed on drop.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// Removes what killed sandboxes left and makes this one's folder.
    pub fn create() -> io::Result<Self> {
        let parent = std::env::var_os("BERTH_TEST_DIR").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
        let namespace = pid_namespace()?;
        remove_stale(&parent, &namespace);
        let pid = process::id();
        let mark = format!("{PREFIX}{namespace}-{pid}-{}-", start_time(pid).unwrap_or(0));
        let dir = tempfile::Builder::new().prefix(&mark).tempdir_in(parent)?;
        Ok(Self(dir.keep()))
    }

    /// Puts the folder to its place in the calling thread's mount namespace.
    pub fn mount(&self) -> io::Result<()> {
        fs::create_dir(TESTS_DIR)?;
        Ok(mount(Some(&self.0), TESTS_DIR, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Best effort: nothing is mounted here outside the sandbox.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn pid_namespace() -> io::Result<String> {
    let link = fs::read_link("/proc/self/ns/pid")?;
    Ok(link.to_string_lossy().chars().filter(char::is_ascii_digit).collect())
}

fn remove_stale(parent: &Path, namespace: &str) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let mut parts = name.strip_prefix(PREFIX).into_iter().flat_map(|rest| rest.split('-'));
        // Processes of another PID namespace cannot be looked up here.
        if parts.next() != Some(namespace) {
            continue;
        }
        let (Some(pid), Some(started)) = (parts.next(), parts.next()) else { continue };
        let alive = pid.parse().ok().and_then(start_time).is_some_and(|time| time.to_string() == started);
        if !alive {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
