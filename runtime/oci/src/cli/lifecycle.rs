//! What is done to a container that exists: start, state, kill, delete, list, ps, pause, resume.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use berth_linux::signalfd::signal_number;
use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};

use super::args::Flags;
use super::state::{Folder, Record, Status, check_id, open_cgroup};
use super::{Global, Outcome, id};
use crate::chain;
use crate::hooks::{HookState, run_hooks};
use crate::launch::read_started;
use crate::spec::{self, Spec};

/// How long a killed container may take to be gone.
const PATIENCE: Duration = Duration::from_secs(10);

fn find(global: &Global, flags: &Flags) -> Result<(Folder, Record), String> {
    let folder = Folder::of(global, id(flags)?);
    let record = folder.record()?;
    Ok((folder, record))
}

pub(super) fn start(global: &Global, flags: &Flags) -> Outcome {
    let (folder, record) = find(global, flags)?;
    match folder.status(&record).0 {
        Status::Created => {}
        Status::Creating => return Err("cannot start a container that is being created".into()),
        Status::Stopped => return Err("cannot start a container that has stopped".into()),
        Status::Running => return Err("cannot start an already running container".into()),
        Status::Paused => return Err("cannot start a paused container".into()),
    }
    start_folder(&folder, &record, &folder.spec()?)?;
    Ok(0)
}

/// Opens the gate and waits until the program was executed or could not be.
pub(super) fn start_folder(folder: &Folder, record: &Record, spec: &Spec) -> Result<(), String> {
    let open = |path: &Path, flags| {
        rustix::fs::open(path, flags | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())
            .map_err(|_| "cannot start a container that has stopped".to_owned())
    };
    let report = open(&folder.report_fifo(), OFlags::RDONLY)?;
    // Only the process holds it: without a reader it is gone.
    let gate = open(&folder.fifo(), OFlags::WRONLY)?;
    rustix::fs::fcntl_setfl(&report, OFlags::empty()).map_err(|errno| format!("wait for the start: {errno}"))?;
    rustix::io::write(&gate, b"s").map_err(|errno| format!("start: {errno}"))?;
    drop(gate);
    let started = read_started(report);
    let _ = fs::remove_file(folder.fifo());
    if let Err(error) = started {
        // It ends at once; who asks for its state next is to see that.
        if let Some(process) = folder.status(record).1 {
            let _ = process.wait_ended(Some(PATIENCE));
        }
        return Err(error.message);
    }
    if let Some(hooks) = &spec.hooks {
        run_hooks("poststart", &hooks.poststart, &hook_state(record, spec, "running")).map_err(|error| {
            // The specification's rule: the container does not go on.
            if let Some(process) = folder.status(record).1 {
                let _ = process.signal(9);
                let _ = process.wait_ended(Some(PATIENCE));
            }
            chain(&error)
        })?;
    }
    Ok(())
}

fn hook_state<'a>(record: &'a Record, spec: &'a Spec, status: &'a str) -> HookState<'a> {
    let pid = if status == "stopped" { 0 } else { record.pid };
    HookState { id: &record.id, bundle: &record.bundle, status, pid, spec }
}

fn describe(folder: &Folder, record: &Record) -> Value {
    let (status, process) = folder.status(record);
    let annotations = folder.spec().map(|spec| spec.annotations).unwrap_or_default();
    json!({
        "ociVersion": spec::VERSION,
        "id": record.id,
        "pid": if process.is_some() { record.pid } else { 0 },
        "status": status.name(),
        "bundle": record.bundle,
        "rootfs": record.rootfs,
        "created": record.created,
        "annotations": annotations,
        "owner": "",
    })
}

pub(super) fn state(global: &Global, flags: &Flags) -> Outcome {
    let (folder, record) = find(global, flags)?;
    let text = serde_json::to_string_pretty(&describe(&folder, &record)).map_err(|error| error.to_string())?;
    println!("{text}");
    Ok(0)
}

pub(super) fn kill(global: &Global, flags: &Flags) -> Outcome {
    let (name, signal) = match flags.rest.as_slice() {
        [name] => (name, "SIGTERM"),
        [name, signal] => (name, signal.as_str()),
        _ => return Err("container id cannot be empty".into()),
    };
    // 0 only asks whether there is somebody to be signalled.
    let number = if signal == "0" { Some(0) } else { signal_number(signal) };
    let number = number.ok_or_else(|| format!("unknown signal {signal:?}"))?;
    let folder = Folder::of(global, check_id(name)?);
    let record = folder.record()?;
    let (status, process) = folder.status(&record);
    if flags.is("all") {
        let Some(cgroup) = open_cgroup(&record)? else { return Err("container has no control group".into()) };
        let killed = if number == 9 { cgroup.kill_all() } else { cgroup.signal_all(number) };
        return killed.map(|()| 0).map_err(|error| chain(&error));
    }
    let Some(process) = process else { return Err("container not running".into()) };
    process.signal(number).map_err(|error| match error.raw_os_error() {
        Some(3) => "container not running".to_owned(),
        _ => format!("signal the container's process: {error}"),
    })?;
    if number != 9 {
        return Ok(0);
    }
    let Some(cgroup) = open_cgroup(&record)? else { return Ok(0) };
    // Without a PID namespace of its own, the others would live on.
    if folder.spec().is_ok_and(|spec| !has_own_pids(&spec)) {
        cgroup.kill_all().map_err(|error| chain(&error))?;
    } else if status == Status::Paused {
        // A frozen process of v1 dies only when it is thawed.
        cgroup.thaw().map_err(|error| chain(&error))?;
    }
    Ok(0)
}

fn has_own_pids(spec: &Spec) -> bool {
    spec.linux.namespaces.iter().any(|namespace| namespace.kind == spec::NamespaceType::Pid && namespace.path.is_empty())
}

pub(super) fn delete(global: &Global, flags: &Flags) -> Outcome {
    let force = flags.is("force");
    let folder = Folder::of(global, id(flags)?);
    let record = match folder.record() {
        Ok(record) => record,
        // A creation that was cut short has a folder and nothing in it.
        Err(_) if force => {
            folder.remove()?;
            return Ok(0);
        }
        Err(error) => return Err(error),
    };
    let (status, _) = folder.status(&record);
    if !force && matches!(status, Status::Creating | Status::Running | Status::Paused) {
        return Err(format!("cannot delete container {} that is not stopped: {}", record.id, status.name()));
    }
    destroy(&folder, &record)?;
    Ok(0)
}

/// Ends what still runs and removes all that was made.
pub(super) fn destroy(folder: &Folder, record: &Record) -> Result<(), String> {
    if let Some(process) = folder.status(record).1 {
        let _ = process.signal(9);
        if let Some(cgroup) = open_cgroup(record)? {
            // A frozen process does not die.
            let _ = cgroup.thaw();
        }
        if !process.wait_ended(Some(PATIENCE)).map_err(|error| format!("wait for the container's end: {error}"))? {
            return Err(format!("the container's process {} does not end", record.pid));
        }
        // Ours to reap when we are `run`; else somebody else's.
        let _ = process.wait(true);
    }
    if let Some(cgroup) = open_cgroup(record)? {
        if cgroup.exists() {
            cgroup.kill_and_wait(PATIENCE).map_err(|error| chain(&error))?;
        }
        cgroup.delete().map_err(|error| chain(&error))?;
    }
    let spec = folder.spec();
    folder.remove()?;
    if let Ok(spec) = spec
        && let Some(hooks) = &spec.hooks
    {
        // The container is gone: a failing hook is told and changes nothing.
        if let Err(error) = run_hooks("poststop", &hooks.poststop, &hook_state(record, &spec, "stopped")) {
            eprintln!("berth oci: warning: {}", chain(&error));
        }
    }
    Ok(())
}

pub(super) fn pause(global: &Global, flags: &Flags) -> Outcome {
    let (folder, record) = find(global, flags)?;
    match folder.status(&record).0 {
        Status::Running | Status::Created => {}
        status => return Err(format!("container not running: {}", status.name())),
    }
    let Some(cgroup) = open_cgroup(&record)? else { return Err("container has no control group".into()) };
    cgroup.freeze().map(|()| 0).map_err(|error| chain(&error))
}

pub(super) fn resume(global: &Global, flags: &Flags) -> Outcome {
    let (folder, record) = find(global, flags)?;
    if folder.status(&record).0 != Status::Paused {
        return Err("container not paused".into());
    }
    let Some(cgroup) = open_cgroup(&record)? else { return Err("container has no control group".into()) };
    cgroup.thaw().map(|()| 0).map_err(|error| chain(&error))
}

pub(super) fn ps(global: &Global, flags: &Flags) -> Outcome {
    let record = Folder::of(global, id(flags)?).record()?;
    let Some(cgroup) = open_cgroup(&record)? else { return Err("container has no control group".into()) };
    let pids: Vec<i32> = match cgroup.exists() {
        true => cgroup.procs().map_err(|error| chain(&error))?.iter().map(|pid| pid.as_raw_nonzero().get()).collect(),
        false => Vec::new(),
    };
    match flags.get("format").unwrap_or("table") {
        "json" => println!("{}", json!(pids)),
        "table" => {
            println!("{:<10} {:<10} CMD", "UID", "PID");
            for pid in pids {
                let (uid, command) = process_line(pid);
                println!("{uid:<10} {pid:<10} {command}");
            }
        }
        other => return Err(format!("invalid format option {other:?}")),
    }
    Ok(0)
}

fn process_line(pid: i32) -> (String, String) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let uid = status.lines().find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().next().map(str::to_owned));
    let mut command = Vec::new();
    // Only as much as fits a line.
    let _ = fs::File::open(format!("/proc/{pid}/cmdline")).map(|file| file.take(4096).read_to_end(&mut command));
    let command = String::from_utf8_lossy(&command).replace('\0', " ").trim().to_owned();
    (uid.unwrap_or_default(), command)
}

pub(super) fn list(global: &Global, flags: &Flags) -> Outcome {
    let mut all = Vec::new();
    let entries = match fs::read_dir(&global.root) {
        Ok(entries) => entries.filter_map(Result::ok).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(format!("read {}: {error}", global.root.display())),
    };
    for entry in entries {
        let folder = Folder { path: entry.path() };
        // One that is being made or removed right now is no container yet or any more.
        let Ok(record) = folder.record() else { continue };
        all.push(describe(&folder, &record));
    }
    all.sort_by(|a, b| a["id"].as_str().cmp(&b["id"].as_str()));
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match (flags.is("quiet"), flags.get("format").unwrap_or("table")) {
        (true, _) => all.iter().for_each(|one| println!("{}", text(&one["id"]))),
        (false, "json") => println!("{}", Value::from(all)),
        (false, "table") => {
            println!("{:<24} {:<10} {:<10} {:<40} CREATED", "ID", "PID", "STATUS", "BUNDLE");
            for one in &all {
                let [id, pid, status, bundle, created] = ["id", "pid", "status", "bundle", "created"].map(|key| text(&one[key]));
                println!("{id:<24} {pid:<10} {status:<10} {bundle:<40} {created}");
            }
        }
        (false, other) => return Err(format!("invalid format option {other:?}")),
    }
    Ok(0)
}
