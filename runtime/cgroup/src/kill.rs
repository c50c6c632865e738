//! Ending and stopping all processes of a cgroup. Every signal goes through a pidfd whose process was seen in the cgroup after the
//! descriptor was opened, so that a reused pid is never hit.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use berth_linux::Pid;
use berth_linux::pidfd::PidFd;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::cgroup::{Cgroup, collect_procs};
use crate::{Error, Result, file};

const SIGKILL: i32 = 9;
/// How long a kill waits for the freezer: a process in an uninterruptible call must not keep the others alive.
const FREEZE_TO_KILL: Duration = Duration::from_millis(100);
/// How long a pause waits.
const FREEZE_PATIENCE: Duration = Duration::from_secs(5);
/// How often new processes are looked for in one kill where nothing can be frozen.
const KILL_ROUNDS: usize = 64;

impl Cgroup {
    /// Kills all processes of the cgroup and of those below it, also those that are being made meanwhile. It does not wait until they are
    /// gone. Frozen cgroups are thawed, since frozen processes cannot end.
    pub fn kill_all(&self) -> Result<()> {
        let mut by_v2 = BTreeSet::new();
        if let Some(dir) = self.v2_dir() {
            if self.tracking_dir().is_some() {
                collect_procs(dir, &mut by_v2)?;
            }
            match file::write_raw(&dir.join("cgroup.kill"), "1") {
                Ok(()) => {}
                // Before Linux 5.14 there is no such file; and a folder that is gone holds no process.
                Err(error) if file::is_gone(&error) => {
                    by_v2.clear();
                    freeze_and_signal(dir, &V2Freezer(dir))?;
                }
                Err(source) => return Err(Error::Signal { path: dir.to_owned(), source }),
            }
            self.thaw()?;
        }
        let Some(dir) = self.tracking_dir() else { return Ok(()) };
        let mut in_v1 = BTreeSet::new();
        collect_procs(dir, &mut in_v1)?;
        if in_v1.is_subset(&by_v2) {
            return Ok(());
        }
        match self.v1_dir("freezer") {
            Some(freezer) => freeze_and_signal(dir, &V1Freezer(freezer)),
            None => signal_until_none_is_new(dir),
        }
    }

    /// Waits until no process is left, as long as `timeout`. False when some are.
    pub fn wait_empty(&self, timeout: Duration) -> Result<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            let pids = self.procs()?;
            if pids.is_empty() {
                return Ok(true);
            }
            for pid in pids {
                // A pid that is gone or reused only makes this round end early or late; the next one looks again.
                let Ok(pidfd) = PidFd::open(pid) else { continue };
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Ok(false);
                }
                // In slices, because a process may also leave the cgroup without ending.
                let ended = pidfd.wait_ended(Some(left.min(Duration::from_millis(200))));
                ended.map_err(|source| Error::Signal { path: self.signal_path(), source })?;
            }
            if Instant::now() >= deadline {
                return Ok(self.procs()?.is_empty());
            }
        }
    }

    /// Kills all processes and waits until they are gone, as long as `timeout`, killing again what slipped through. False when some
    /// are left (in an uninterruptible call).
    pub fn kill_and_wait(&self, timeout: Duration) -> Result<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            self.kill_all()?;
            let left = deadline.saturating_duration_since(Instant::now());
            if self.wait_empty(left.min(Duration::from_millis(500)))? {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
        }
    }

    /// Sends a signal to all processes of the cgroup and of those below it, once each. For SIGKILL use [`Cgroup::kill_all`].
    pub fn signal_all(&self, signal: i32) -> Result<()> {
        for dir in [self.tracking_dir(), self.v2_dir()].into_iter().flatten().take(1) {
            let mut seen = BTreeSet::new();
            signal_round(dir, signal, &mut seen)?;
        }
        Ok(())
    }

    /// Stops all processes where they are, and waits until they are stopped.
    pub fn freeze(&self) -> Result<()> {
        if let Some(dir) = self.v1_dir("freezer") {
            return match V1Freezer(dir).freeze(FREEZE_PATIENCE)? {
                true => Ok(()),
                false => {
                    V1Freezer(dir).thaw()?;
                    Err(Error::FreezeTimeout { path: dir.to_owned() })
                }
            };
        }
        match self.v2_dir() {
            Some(dir) => match V2Freezer(dir).freeze(FREEZE_PATIENCE)? {
                true => Ok(()),
                false => {
                    V2Freezer(dir).thaw()?;
                    Err(Error::FreezeTimeout { path: dir.to_owned() })
                }
            },
            None => Err(Error::MissingController { controller: "freezer".to_owned(), limit: "freeze".to_owned() }),
        }
    }

    /// Lets all processes go on. A cgroup that is not frozen, or gone, stays as it is.
    pub fn thaw(&self) -> Result<()> {
        if let Some(dir) = self.v1_dir("freezer") {
            return V1Freezer(dir).thaw();
        }
        self.v2_dir().map_or(Ok(()), |dir| V2Freezer(dir).thaw())
    }

    /// Whether the processes are stopped (or being stopped).
    pub fn is_frozen(&self) -> Result<bool> {
        if let Some(dir) = self.v1_dir("freezer") {
            let state = file::read_optional(&dir.join("freezer.state"))?;
            return Ok(state.is_some_and(|state| state.trim() != "THAWED"));
        }
        let Some(dir) = self.v2_dir() else { return Ok(false) };
        let state = file::read_optional(&dir.join("cgroup.freeze"))?;
        Ok(state.is_some_and(|state| state.trim() == "1"))
    }

    fn signal_path(&self) -> std::path::PathBuf {
        self.dirs().next().map(Path::to_owned).unwrap_or_default()
    }
}

/// Signals, once each, the processes that are in a folder or below it and not yet in `seen`. True when there were such.
fn signal_round(dir: &Path, signal: i32, seen: &mut BTreeSet<i32>) -> Result<bool> {
    let mut listed = BTreeSet::new();
    collect_procs(dir, &mut listed)?;
    let mut held = Vec::new();
    for pid in listed.difference(seen).copied() {
        if let Some(Ok(pidfd)) = Pid::from_raw(pid).map(PidFd::open) {
            held.push((pid, pidfd));
        }
    }
    if held.is_empty() {
        return Ok(false);
    }
    // What is still listed now is what the descriptor holds: the process was in the cgroup after it was opened.
    let mut still = BTreeSet::new();
    collect_procs(dir, &mut still)?;
    for (pid, pidfd) in held {
        if !still.contains(&pid) {
            continue;
        }
        match pidfd.signal(signal) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {}
            Err(source) => return Err(Error::Signal { path: dir.to_owned(), source }),
        }
        seen.insert(pid);
    }
    Ok(true)
}

/// Without a freezer a process may fork while it is listed: go on until a round finds nobody new.
fn signal_until_none_is_new(dir: &Path) -> Result<()> {
    let mut seen = BTreeSet::new();
    for _ in 0..KILL_ROUNDS {
        if !signal_round(dir, SIGKILL, &mut seen)? {
            break;
        }
    }
    Ok(())
}

/// Freeze, signal all, thaw: nobody forks while being listed. What could not be frozen in time is found by repetition.
fn freeze_and_signal(dir: &Path, freezer: &dyn Freezer) -> Result<()> {
    let frozen = freezer.freeze(FREEZE_TO_KILL);
    let signalled = signal_until_none_is_new(dir);
    // Thawed in any case: the killed can end only then.
    freezer.thaw()?;
    signalled?;
    if !matches!(frozen, Ok(true)) {
        signal_until_none_is_new(dir)?;
    }
    Ok(())
}

trait Freezer {
    /// True when all are stopped in time. A cgroup that is gone is.
    fn freeze(&self, patience: Duration) -> Result<bool>;
    fn thaw(&self) -> Result<()>;
}

struct V1Freezer<'a>(&'a Path);

impl Freezer for V1Freezer<'_> {
    fn freeze(&self, patience: Duration) -> Result<bool> {
        let path = self.0.join("freezer.state");
        let deadline = Instant::now() + patience;
        let mut pause = Duration::from_micros(100);
        loop {
            // Written again each time: v1 may miss a process that was being forked at the first write.
            match file::write_raw(&path, "FROZEN") {
                Err(error) if file::is_gone(&error) => return Ok(true),
                result => result.map_err(|source| Error::Write { path: path.clone(), value: "FROZEN".to_owned(), source })?,
            }
            match file::read_optional(&path)? {
                None => return Ok(true),
                Some(state) if state.trim() == "FROZEN" => return Ok(true),
                Some(_) => {}
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            // v1 has no event for this.
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
    }

    fn thaw(&self) -> Result<()> {
        thaw_file(&self.0.join("freezer.state"), "THAWED")
    }
}

struct V2Freezer<'a>(&'a Path);

impl Freezer for V2Freezer<'_> {
    fn freeze(&self, patience: Duration) -> Result<bool> {
        let path = self.0.join("cgroup.freeze");
        match file::write_raw(&path, "1") {
            Err(error) if file::is_gone(&error) => return Ok(true),
            result => {
                result.map_err(|source| Error::Write { path: path.clone(), value: "1".to_owned(), source })?;
            }
        }
        let events = self.0.join("cgroup.events");
        let fail = |errno: Errno| Error::Read { path: events.clone(), source: errno.into() };
        let fd = rustix::fs::open(&events, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(fail)?;
        let deadline = Instant::now() + patience;
        loop {
            let mut buffer = [0u8; 256];
            let read = match rustix::io::pread(&fd, &mut buffer, 0) {
                Err(Errno::NODEV) => return Ok(true),
                result => result.map_err(fail)?,
            };
            if file::keyed(&String::from_utf8_lossy(&buffer[..read]), "frozen") == Some(1) {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let mut fds = [PollFd::new(&fd, PollFlags::PRI)];
            match rustix::event::poll(&mut fds, Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(fail(errno)),
            }
        }
    }

    fn thaw(&self) -> Result<()> {
        thaw_file(&self.0.join("cgroup.freeze"), "0")
    }
}

fn thaw_file(path: &Path, value: &str) -> Result<()> {
    match file::write_raw(path, value) {
        Err(error) if file::is_gone(&error) => Ok(()),
        result => result.map_err(|source| Error::Write { path: path.to_owned(), value: value.to_owned(), source }),
    }
}
