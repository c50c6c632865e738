//! `exec`.

use berth_linux::pidfd::PidFd;

use super::args::Flags;
use super::create::{choose_stdio, send_console, write_pid_file};
use super::state::{Folder, Status, check_id, open_cgroup};
use super::{Global, Outcome, foreground, protect};
use crate::launch::{ExecLaunch, Parentage, exec as launch_exec, read_started};
use crate::spec::{Capabilities, Process, Spec};
use crate::{chain, seccomp};

pub(super) fn exec(global: &Global, flags: &Flags) -> Outcome {
    protect::run_from_sealed_copy(global)?;
    for unsupported in ["cgroup", "pidfd-socket"] {
        if flags.get(unsupported).is_some() {
            return Err(format!("--{unsupported}: not supported"));
        }
    }
    let [name, command @ ..] = flags.rest.as_slice() else { return Err("container id cannot be empty".into()) };
    let folder = Folder::of(global, check_id(name)?);
    let record = folder.record()?;
    let spec = folder.spec()?;
    let (status, init) = folder.status(&record);
    let init_pidfd = match (status, init) {
        (Status::Stopped, _) | (_, None) => return Err("cannot exec in a stopped container".into()),
        (Status::Paused, _) if !flags.is("ignore-paused") => return Err("cannot exec in a paused container".into()),
        (_, Some(init)) => init,
    };
    let process = process(flags, &spec, command)?;
    let detached = flags.is("detach");
    let signals = (!detached).then(foreground::take_signals).transpose()?;
    let filter = spec.linux.seccomp.as_ref().map(seccomp::compile).transpose().map_err(|error| chain(&error))?;
    let order = ExecLaunch {
        stdio: choose_stdio(process.terminal, process.console_size, flags, detached)?,
        process,
        init: rustix::process::Pid::from_raw(record.pid).ok_or("the container has no process")?,
        init_pidfd: init_pidfd.into(),
        cgroup: open_cgroup(&record)?,
        filter,
        preserve_fds: flags.number("preserve-fds")?.unwrap_or(0),
    };
    let made = launch_exec(order, Parentage::Caller).map_err(|error| format!("exec failed: {}", chain(&error)))?;
    made.warnings.iter().for_each(|warning| global.log.warn(warning));
    if let Err(error) = read_started(made.started) {
        let _ = PidFd::from(made.pidfd).wait(false);
        return Err(format!("exec failed: {}", error.message));
    }
    let handed = match (&made.console, flags.get("console-socket")) {
        (Some(console), Some(socket)) => send_console(console, socket),
        _ => Ok(()),
    };
    let handed = handed.and_then(|()| write_pid_file(flags, made.pid.as_raw_nonzero().get()));
    let process = PidFd::from(made.pidfd);
    if let Err(error) = handed {
        // Nobody would know of it.
        let _ = process.signal(9);
        let _ = process.wait(false);
        return Err(error);
    }
    match signals {
        Some(signals) => foreground::attend(process, made.console, &signals),
        None => Ok(0),
    }
}

/// From a file, or the container's own with what the options change.
fn process(flags: &Flags, spec: &Spec, command: &[String]) -> Result<Process, String> {
    if let Some(path) = flags.get("process") {
        let text = std::fs::read(path).map_err(|error| format!("read {path}: {error}"))?;
        return serde_json::from_slice(&text).map_err(|error| format!("{path}: {error}"));
    }
    if command.is_empty() {
        return Err("process args cannot be empty".into());
    }
    let mut process = spec.process.clone().unwrap_or_default();
    process.args = command.to_vec();
    process.terminal = flags.is("tty");
    process.oom_score_adj = None;
    if let Some(cwd) = flags.get("cwd") {
        process.cwd = cwd.to_owned();
    }
    process.env.extend(flags.all("env").map(Into::into));
    if let Some(label) = flags.get("process-label") {
        process.selinux_label = label.to_owned();
    }
    if let Some(profile) = flags.get("apparmor") {
        process.apparmor_profile = profile.to_owned();
    }
    process.no_new_privileges |= flags.is("no-new-privs");
    let number = |text: &str| text.parse().map_err(|_| format!("{text:?} is not a number"));
    if let Some(user) = flags.get("user") {
        let (uid, gid) = user.split_once(':').unwrap_or((user, ""));
        process.user.uid = number(uid)?;
        if !gid.is_empty() {
            process.user.gid = number(gid)?;
        }
    }
    for gid in flags.all("additional-gids") {
        process.user.additional_gids.push(number(gid)?);
    }
    let caps: Vec<String> = flags.all("cap").map(str::to_owned).collect();
    if !caps.is_empty() {
        let all = process.capabilities.get_or_insert_with(Capabilities::default);
        for set in [&mut all.bounding, &mut all.effective, &mut all.permitted] {
            set.extend(caps.iter().cloned());
        }
    }
    Ok(process)
}
