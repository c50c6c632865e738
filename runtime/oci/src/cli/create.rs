//! `create` and `run`.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use berth_cgroup::{Cgroup, CgroupPath, DeviceRule, Layout, Placement, Resources};
use berth_linux::fdpass;
use berth_linux::pidfd::PidFd;
use rustix::fs::{FileType, Mode};

use super::args::Flags;
use super::state::{self, Folder, Record, write_whole};
use super::{Global, Outcome, foreground, id, lifecycle, log, protect};
use crate::chain;
use crate::launch::{Gate, Init, Launch, Parentage, RootSource, Stdio, launch};
use crate::spec::{self, Spec};

pub(super) fn create(global: &Global, flags: &Flags) -> Outcome {
    protect::run_from_sealed_copy(global)?;
    if flags.is("detach") || flags.is("keep") {
        return Err("flag provided but not defined: --detach or --keep belong to run".into());
    }
    let made = make(global, flags, true)?;
    drop(made);
    Ok(0)
}

/// `create`, `start`, and unless detached to wait and `delete`.
pub(super) fn run(global: &Global, flags: &Flags) -> Outcome {
    protect::run_from_sealed_copy(global)?;
    let detach = flags.is("detach");
    // Before anything is made: a signal that comes meanwhile is for the container, which must not be left behind by our end.
    let signals = (!detach).then(foreground::take_signals).transpose()?;
    let made = make(global, flags, detach)?;
    let started = lifecycle::start_folder(&made.folder, &made.record, &made.spec);
    if let Err(error) = started {
        // Why it did not start is what the user has to know.
        let _ = lifecycle::destroy(&made.folder, &made.record);
        return Err(error);
    }
    let Some(signals) = signals else { return Ok(0) };
    let code = foreground::attend(PidFd::from(made.init.pidfd), made.init.console, &signals);
    if !flags.is("keep") {
        lifecycle::destroy(&made.folder, &made.record)?;
    }
    code
}

struct Made {
    folder: Folder,
    record: Record,
    spec: Spec,
    init: Init,
}

fn make(global: &Global, flags: &Flags, detached: bool) -> Result<Made, String> {
    let id = id(flags)?.to_owned();
    if flags.is("no-pivot") {
        return Err("--no-pivot: a root that is not changed by pivot_root is not supported".into());
    }
    if flags.get("pidfd-socket").is_some() {
        return Err("--pidfd-socket: not supported".into());
    }
    let bundle = fs::canonicalize(flags.get("bundle").unwrap_or(".")).map_err(|error| format!("open bundle: {error}"))?;
    let spec = load_spec(&bundle)?;
    let folder = Folder::make(global, &id)?;
    let mut cgroup = None;
    let made = fill(global, flags, detached, &id, &bundle, spec, &folder, &mut cgroup);
    if made.is_err() {
        // The first error is the user's; what cannot be undone is found by its name.
        if let Some(cgroup) = cgroup {
            let _ = cgroup.kill_all();
            let _ = cgroup.delete();
        }
        let _ = folder.remove();
    }
    made
}

fn load_spec(bundle: &Path) -> Result<Spec, String> {
    let path = bundle.join("config.json");
    let text = fs::read(&path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => format!("JSON specification file {} not found", path.display()),
        _ => format!("read {}: {error}", path.display()),
    })?;
    serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", path.display()))
}

#[allow(clippy::too_many_arguments)]
fn fill(
    global: &Global,
    flags: &Flags,
    detached: bool,
    id: &str,
    bundle: &Path,
    spec: Spec,
    folder: &Folder,
    made_cgroup: &mut Option<Cgroup>,
) -> Result<Made, String> {
    let stdio = stdio(&spec, flags, detached)?;
    for fifo in [folder.fifo(), folder.report_fifo()] {
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::from(0o600), 0)
            .map_err(|errno| format!("make {}: {errno}", fifo.display()))?;
    }
    let placement = place(&spec, id, global.systemd_cgroup)?;
    let cgroup = placement.cgroup().clone();
    *made_cgroup = Some(cgroup.clone());
    let mut record = Record {
        version: 1,
        id: id.to_owned(),
        bundle: bundle.to_owned(),
        rootfs: spec.root.as_ref().map(|root| bundle.join(&root.path)).unwrap_or_default(),
        created: log::rfc3339(SystemTime::now()),
        pid: 0,
        began: 0,
        cgroup: Some(cgroup.path().to_string()),
    };
    // Should we be killed from here on, a deletion finds what there is to remove.
    folder.save("config.json", &spec)?;
    folder.save("state.json", &record)?;
    let init = launch(Launch {
        id: id.to_owned(),
        bundle: bundle.to_owned(),
        spec: spec.clone(),
        root: RootSource::Spec,
        cgroup: Some(placement),
        join: Vec::new(),
        mounts: Default::default(),
        stdio,
        gate: Gate::ExecFifo(folder.fifo()),
        parent: Parentage::Caller,
        filter: None,
        preserve_fds: flags.number("preserve-fds")?.unwrap_or(0),
        new_keyring: !flags.is("no-new-keyring"),
    })
    .map_err(|error| match error {
        crate::Error::Spec { .. } => chain(&error),
        _ => format!("unable to start container process: error during container init: {}", chain(&error)),
    })?;
    let mut finish = || {
        if let (Some(console), Some(socket)) = (&init.console, flags.get("console-socket")) {
            send_console(console, socket)?;
        }
        let pid = init.pid.as_raw_nonzero().get();
        (record.began, _) = state::began(pid).ok_or("the container's process is gone")?;
        record.pid = pid;
        folder.save("state.json", &record)?;
        write_pid_file(flags, pid)
    };
    match finish() {
        Ok(()) => {
            init.warnings.iter().for_each(|warning| global.log.warn(warning));
            Ok(Made { folder: folder.clone(), record, spec, init })
        }
        Err(error) => {
            let process = PidFd::from(init.pidfd);
            let _ = process.signal(9);
            let _ = process.wait(false);
            Err(error)
        }
    }
}

/// Writes the pid where the caller wants it, in one piece.
pub(super) fn write_pid_file(flags: &Flags, pid: i32) -> Result<(), String> {
    match flags.get("pid-file") {
        Some(path) => write_whole(&PathBuf::from(path), pid.to_string().as_bytes(), 0o644),
        None => Ok(()),
    }
}

fn stdio(spec: &Spec, flags: &Flags, detached: bool) -> Result<Stdio, String> {
    let process = spec.process.as_ref();
    let terminal = process.is_some_and(|process| process.terminal);
    choose_stdio(terminal, process.and_then(|process| process.console_size), flags, detached)
}

/// The caller's own streams, or a terminal, which must be taken by someone.
pub(super) fn choose_stdio(
    terminal: bool,
    size: Option<spec::ConsoleSize>,
    flags: &Flags,
    detached: bool,
) -> Result<Stdio, String> {
    let socket = flags.get("console-socket");
    match (terminal, detached, socket) {
        (true, true, None) => Err("cannot allocate tty if runc will detach without setting console socket".into()),
        (false, _, Some(_)) | (_, false, Some(_)) => {
            Err("cannot use console socket if runc will not detach or allocate tty".into())
        }
        (true, ..) => {
            let size = size.unwrap_or_default();
            Ok(Stdio::Pty { width: size.width, height: size.height })
        }
        (false, ..) => {
            let copy = |fd: rustix::fd::BorrowedFd<'_>| {
                rustix::io::fcntl_dupfd_cloexec(fd, 3).map_err(|errno| format!("duplicate standard stream: {errno}"))
            };
            let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
            Ok(Stdio::Fds([copy(stdin.as_fd())?, copy(stdout.as_fd())?, copy(stderr.as_fd())?]))
        }
    }
}

/// Hands the terminal's master to who listens on a socket.
pub(super) fn send_console(console: &OwnedFd, socket: &str) -> Result<(), String> {
    let stream = std::os::unix::net::UnixStream::connect(socket).map_err(|error| format!("console socket {socket}: {error}"))?;
    fdpass::send_with_fds(stream.as_fd(), b"/dev/ptmx", &[console.as_fd()])
        .map_err(|error| format!("console socket {socket}: {error}"))?;
    Ok(())
}

/// Prepares the control group. As runc has it, `cgroupsPath` is `slice:prefix:name` with the systemd driver, and a path without it.
fn place(spec: &Spec, id: &str, systemd: bool) -> Result<Placement, String> {
    let text = |error: berth_cgroup::Error| chain(&error);
    let path = match (spec.linux.cgroups_path.as_str(), systemd) {
        ("", false) => CgroupPath::parse(&format!("/{id}")),
        ("", true) => CgroupPath::parse(&format!("system.slice:berth:{id}")),
        (path, _) => CgroupPath::parse(path),
    }
    .map_err(text)?;
    match (path.unit(), systemd) {
        (None, true) => {
            return Err(format!(
                "expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups, got {path} instead"
            ));
        }
        (Some(_), false) => return Err(format!("cgroupsPath {path} is of the systemd form, which needs --systemd-cgroup")),
        _ => {}
    }
    let layout = Layout::detect().map_err(text)?;
    let mut resources: Resources = spec.linux.resources.clone().unwrap_or_default();
    // As runc has it: what no rule allows is forbidden, also where there are no rules, but for the devices that everybody has.
    resources.devices.insert(0, DeviceRule { allow: false, ..DeviceRule::default() });
    resources.devices.extend(crate::default_device_rules());
    Placement::prepare(&layout, &path, &resources).map_err(text)
}
