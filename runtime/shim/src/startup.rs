//! From the descriptors that the agent passed to a shim that is ready to serve. May wait; nothing depends on it yet.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;

use berth_cgroup::Layout;
use berth_linux::prctl::{self, OomScore};
use berth_linux::process::take_inherited_fd;
use berth_linux::session;
use berth_linux::signalfd::SignalFd;
use berth_shim::protocol::{CONFIG_FD, LISTEN_FD, NETNS_FD, NetMode, READY_FD, Ready, SandboxConfig};

use crate::daemon::{Daemon, Parts};
use crate::error::Error;
use crate::exit_record::ExitRecords;
use crate::pod::{self, Pod};
use crate::{cgroups, pause};

const SIGCHLD: i32 = 17;
/// SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGTERM: taken and forgotten. Only a request ends a shim.
const IGNORED: [i32; 6] = [1, 2, 3, 10, 12, 15];
/// The shim's score for the out-of-memory killer: after everything that can be restarted without killing a pod.
const OOM_SCORE_ADJ: i32 = -998;

/// Starts, and tells the agent how it went.
pub fn start() -> Option<Daemon> {
    // Without this descriptor there is nobody to tell anything.
    let listener = take(LISTEN_FD);
    let config = take(CONFIG_FD);
    let ready = take_inherited_fd(READY_FD).ok()?;
    let result = config.and_then(|config| set_up(config, listener?));
    let (message, daemon) = match result {
        Ok(daemon) => (Ready::Ok, Some(daemon)),
        Err(error) => (Ready::Failed(error.full_text()), None),
    };
    let bytes = serde_json::to_vec(&message).ok()?;
    // An agent that has died meanwhile comes back and connects.
    let _ = File::from(ready).write_all(&bytes);
    daemon
}

fn take(number: i32) -> Result<OwnedFd, Error> {
    take_inherited_fd(number).map_err(|source| Error::Inherited { number, source })
}

fn set_up(config: OwnedFd, listener: OwnedFd) -> Result<Daemon, Error> {
    let config = read_config(config)?;
    let given_net = if config.net == NetMode::Given { Some(take(NETNS_FD)?) } else { None };
    // The spawner has made the session already, as a rule.
    let _ = session::new_session();
    let _ = prctl::set_name(c"berth-shim");
    prctl::set_umask(0o022);
    std::env::set_current_dir("/").map_err(Error::io("change to /"))?;
    let mut signals = vec![SIGCHLD];
    signals.extend(IGNORED);
    let signals = SignalFd::new(&signals).map_err(Error::io("make a signalfd"))?;
    prctl::set_child_subreaper(true).map_err(Error::io("become a subreaper"))?;

    let layout = Layout::detect()?;
    cgroups::join(&layout, &config.cgroup)?;
    let oom_score_adj = protect();
    let records = ExitRecords::open(&config.runtime_dir).map_err(Error::io("open the runtime folder"))?;
    pod::separate_mounts()?;
    let mut pod = Pod::default();
    pod.make_namespaces(&config, given_net)?;
    pod.make_shm(&config, &config.runtime_dir.join("shm"))?;
    if config.share_pid {
        pause::start(&mut pod, &config.runtime_dir)?;
    }
    rustix::io::ioctl_fionbio(&listener, true).map_err(|errno| Error::io("prepare the listening socket")(errno.into()))?;
    let parts = Parts { sandbox_id: config.sandbox_id, records, layout, pod, signals, listener, oom_score_adj };
    Daemon::new(parts).map_err(Error::io("make an epoll instance"))
}

fn read_config(fd: OwnedFd) -> Result<SandboxConfig, Error> {
    let mut file = File::from(fd);
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).map_err(Error::io("read the sandbox configuration"))?;
    let config: SandboxConfig = serde_json::from_slice(&bytes).map_err(Error::Config)?;
    if config.version == 0 || config.sandbox_id.is_empty() || !config.runtime_dir.is_absolute() {
        return Err(Error::ConfigValue("version, sandbox_id and an absolute runtime_dir are needed".into()));
    }
    Ok(config)
}

/// Lowers the shim's score where that is allowed; returns the score before, for its children.
fn protect() -> Option<i32> {
    let before = std::fs::read_to_string("/proc/self/oom_score_adj").ok()?.trim().parse().ok()?;
    match prctl::set_oom_score_adj(None, OOM_SCORE_ADJ) {
        Ok(OomScore::Set) => Some(before),
        _ => None,
    }
}
