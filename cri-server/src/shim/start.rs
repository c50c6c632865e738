//! Starting a shim: from a sealed memfd made once, so that one file is installed, pages are shared and no container can
//! overwrite it.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use berth_linux::memfd::{reopen, sealed_memfd};
use berth_linux::mount::{AttrChange, MountAttrs, mount_setattr, open_tree};
use berth_linux::process::{Executable, Spawn, spawn_exec};
use berth_shim::protocol::{CONFIG_FD, LISTEN_FD, NETNS_FD, READY_FD, Ready, SandboxConfig};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, OFlags};

use crate::error::{Error, file};

/// The shim's program: bytes of this build, and the descriptor they run from.
pub(crate) struct Program {
    bytes: &'static [u8],
    fallback: PathBuf,
    open: Mutex<Option<OwnedFd>>,
}

impl Program {
    /// The program, not opened yet. Where memfds may not be executed it is put into the folder `fallback`.
    pub(crate) fn new(bytes: &'static [u8], fallback: PathBuf) -> Self {
        Self { bytes, fallback, open: Mutex::new(None) }
    }

    /// Takes the program of a living shim, if it is the same build: its pages are in memory already.
    pub(crate) fn adopt(&self, pid: i32) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.is_some() {
            return;
        }
        let Ok(mut exe) = File::open(format!("/proc/{pid}/exe")) else { return };
        let same_size = exe.metadata().is_ok_and(|m| m.len() == self.bytes.len() as u64);
        let mut content = Vec::new();
        if same_size && exe.read_to_end(&mut content).is_ok() && content == self.bytes {
            *open = Some(exe.into());
        }
    }

    fn executable(&self) -> Result<OwnedFd, Error> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.is_none() {
            *open = Some(match sealed_memfd("berth-shim", self.bytes, true) {
                Ok(fd) => fd,
                Err(error) => {
                    tracing::info!(%error, "memfds can not be executed here: the shim runs from a file");
                    self.installed()?
                }
            });
        }
        match open.as_ref().map(|fd| fd.as_fd().try_clone_to_owned()) {
            Some(Ok(fd)) => Ok(fd),
            Some(Err(source)) => Err(Error::File { action: "duplicate", path: "berth-shim".into(), source }),
            None => Err(Error::Closing),
        }
    }

    /// The program as a file that nobody may write.
    fn installed(&self) -> Result<OwnedFd, Error> {
        let path = self.fallback.join("berth-shim");
        std::fs::create_dir_all(&self.fallback).map_err(file("create", &self.fallback))?;
        let temporary = self.fallback.join("berth-shim.new");
        let mut new = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o500)
            .open(&temporary)
            .map_err(file("create", &temporary))?;
        new.write_all(self.bytes).map_err(file("write", &temporary))?;
        drop(new);
        std::fs::rename(&temporary, &path).map_err(file("rename", &path))?;
        read_only(&path)
    }

    /// From now on by file: executing a memfd was refused.
    fn fall_back(&self) -> Result<(), Error> {
        let fd = self.installed()?;
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = Some(fd);
        Ok(())
    }
}

/// A file opened through a private read-only mount of it: nothing that gets hold of it as `/proc/<pid>/exe` can write to it.
fn read_only(path: &Path) -> Result<OwnedFd, Error> {
    let failed =
        |e: berth_linux::Error| Error::Linux { action: format!("mount {} read-only", path.display()), source: Box::new(e) };
    let mount = open_tree(CWD, path, true, false).map_err(failed)?;
    let set = MountAttrs::RDONLY | MountAttrs::NOSUID | MountAttrs::NODEV;
    mount_setattr(mount.as_fd(), Path::new(""), false, AttrChange { set, ..Default::default() }).map_err(failed)?;
    reopen(mount.as_fd(), OFlags::RDONLY | OFlags::CLOEXEC).map_err(file("open", path))
}

/// Starts a shim and waits until it is ready or has failed, at most for `limit`: then it is killed. Blocking: a few milliseconds.
/// Returns its pidfd; this process is its parent and has to reap it.
pub(crate) fn start(
    program: &Program,
    config: &SandboxConfig,
    socket: &Path,
    netns: Option<OwnedFd>,
    limit: Duration,
) -> Result<(i32, OwnedFd), Error> {
    let spawned = spawn(program, config, socket, netns.as_ref());
    let (pid, pidfd, ready) = match spawned {
        Err(Error::Linux { source, .. }) if refused(&*source) => {
            program.fall_back()?;
            spawn(program, config, socket, netns.as_ref())?
        }
        other => other?,
    };
    let mut text = Vec::new();
    let read = read_until(ready, &mut text, Instant::now() + limit);
    let failed = match (read, serde_json::from_slice::<Ready>(&text)) {
        (Ok(_), Ok(Ready::Ok)) => return Ok((pid, pidfd)),
        (Err(e), _) if e.kind() == std::io::ErrorKind::TimedOut => {
            format!("the shim (pid {pid}) was not ready after {} s and is killed", limit.as_secs())
        }
        (Ok(_), Ok(Ready::Failed(message))) => message,
        (Ok(0), _) => "the shim died at its start".into(),
        (Ok(_), Err(e)) => format!("the shim's report can not be read: {e}"),
        (Err(e), _) => format!("the shim's report can not be read: {e}"),
    };
    let pidfd = berth_linux::pidfd::PidFd::from(pidfd);
    let _ = pidfd.signal(9);
    let _ = pidfd.wait(false);
    Err(Error::Shim { action: "start the shim", message: failed })
}

/// Reads the shim's report to its end.
fn read_until(ready: OwnedFd, text: &mut Vec<u8>, until: Instant) -> std::io::Result<usize> {
    const REPORT: usize = 64 * 1024;
    let mut ready = File::from(ready);
    let mut buffer = [0u8; 4096];
    while text.len() < REPORT {
        let left = until.saturating_duration_since(Instant::now());
        let wait = Timespec { tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&ready, PollFlags::IN)], Some(&wait)) {
            Ok(0) => return Err(std::io::ErrorKind::TimedOut.into()),
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
            Ok(_) => {}
        }
        match ready.read(&mut buffer)? {
            0 => break,
            n => text.extend_from_slice(&buffer[..n]),
        }
    }
    Ok(text.len())
}

fn refused(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    error
        .downcast_ref::<berth_linux::Error>()
        .and_then(berth_linux::Error::raw_errno)
        .is_some_and(|n| n == rustix::io::Errno::ACCESS.raw_os_error() || n == rustix::io::Errno::PERM.raw_os_error())
}

fn spawn(
    program: &Program,
    config: &SandboxConfig,
    socket: &Path,
    netns: Option<&OwnedFd>,
) -> Result<(i32, OwnedFd, OwnedFd), Error> {
    let json = serde_json::to_vec(config)
        .map_err(|e| Error::Shim { action: "encode the shim's configuration", message: e.to_string() })?;
    let io =
        |action: &'static str| move |source: std::io::Error| Error::File { action, path: PathBuf::from("berth-shim"), source };
    let config_fd = sealed_memfd("berth-sandbox", &json, false).map_err(io("make the configuration of"))?;
    let listener = super::bind(socket).map_err(file("bind", socket))?;
    let (ready, ready_write) = berth_linux::process::pipe().map_err(io("make a pipe for"))?;
    let mut fds = vec![(config_fd, CONFIG_FD), (listener, LISTEN_FD), (ready_write, READY_FD)];
    if let Some(netns) = netns {
        fds.push((netns.try_clone().map_err(io("duplicate the netns for"))?, NETNS_FD));
    }
    let text = |s: &str| CString::new(s).unwrap_or_default();
    let (pid, pidfd) = spawn_exec(Spawn {
        exe: Executable::Fd(program.executable()?),
        argv: vec![text("berth-shim"), text(&config.sandbox_id)],
        envp: Vec::new(),
        fds,
        cwd: Some(text("/")),
    })
    .map_err(|e| Error::Linux { action: "start the shim".into(), source: Box::new(e) })?;
    Ok((pid.as_raw_nonzero().get(), pidfd, ready))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shim_that_runs_from_a_file_can_not_be_written_through_its_own_descriptor() {
        berth_testkit::in_namespaces(|| {
            let dir = berth_testkit::TempState::new();
            let bytes = std::fs::read("/bin/busybox").unwrap().leak();
            let program = Program::new(bytes, dir.path().join("shim"));
            program.fall_back().unwrap();
            let exe = program.executable().unwrap();
            let written = std::fs::OpenOptions::new().write(true).open(berth_linux::memfd::proc_path(exe.as_fd()));
            assert_eq!(written.unwrap_err().raw_os_error(), Some(rustix::io::Errno::ROFS.raw_os_error()));
            let text = |s: &str| CString::new(s).unwrap();
            let spawn = Spawn { exe: Executable::Fd(exe), argv: vec![text("true")], envp: vec![], fds: vec![], cwd: None };
            let (_, pidfd) = spawn_exec(spawn).unwrap();
            let status = berth_linux::pidfd::PidFd::from(pidfd).wait(false).unwrap().unwrap();
            assert!(status.success());
        });
    }
}
