//! Units of systemd that stand for cgroups: started, limited and stopped over D-Bus. systemd owns the cgroup tree where it runs, and these are
//! the calls by which it lets others have a part. Nothing here touches a cgroup's files.

mod bus;
mod properties;
mod wire;

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use berth_linux::Pid;

pub(crate) use bus::Address;
use bus::Bus;
use wire::{Arguments, Property, Value};

use crate::path::CgroupPath;
use crate::resources::Resources;
use crate::{Error, Result};

/// How long one operation may take: systemd's own patience with a client is as long, and a busy one needs some of it.
const PATIENCE: Duration = Duration::from_secs(25);

/// Why systemd did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// No socket of its answers.
    #[error("systemd can not be reached ({tried})")]
    Unreachable {
        /// Each socket, and what was wrong with it.
        tried: String,
    },
    /// The connection failed.
    #[error("{action}")]
    Io {
        /// What was done.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It does not take us for who we are.
    #[error("the authentication was refused")]
    Denied,
    /// What it sent is no D-Bus.
    #[error("it sent {0}")]
    Protocol(&'static str),
    /// It answered with an error.
    #[error("{name}: {message}")]
    Refused {
        /// The error's D-Bus name.
        name: String,
        /// Its text.
        message: String,
    },
    /// The job for it did not end well.
    #[error("its job ended with {result:?}")]
    Job {
        /// What became of it, in systemd's word.
        result: String,
    },
    /// It took too long.
    #[error("systemd took too long: {stage} did not come")]
    Late {
        /// What was waited for.
        stage: String,
    },
}

impl Failure {
    fn is(&self, error: &str) -> bool {
        matches!(self, Self::Refused { name, .. } if name.rsplit('.').next() == Some(error))
    }
}

/// Whether systemd manages this machine, by the folder that it keeps for this question.
#[must_use]
pub fn is_running() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// systemd's manager, reached anew for each operation: its restarts break connections, and the shims are many.
#[derive(Debug, Clone)]
pub(crate) struct Manager {
    addresses: Vec<Address>,
    patience: Duration,
}

impl Manager {
    /// This machine's.
    pub(crate) fn usual() -> Self {
        Self { addresses: Address::usual().into(), patience: PATIENCE }
    }

    /// Starts the unit of a cgroup: a scope with this process in it, or a slice without one. A unit of that name which is there already, of
    /// an earlier container that failed, is cleared away first.
    pub(crate) fn start(&self, path: &CgroupPath, process: Option<Pid>, resources: &Resources, v2: bool) -> Result<()> {
        self.during("start", path, |unit, bus, deadline| {
            let properties = start_properties(bus, path, process, resources, v2, deadline)?;
            let start = |bus: &mut Bus| {
                let arguments = Arguments::default().text(unit).text("replace").properties(&properties).no_units();
                run_job(bus, "StartTransientUnit", &arguments, deadline)
            };
            match start(bus) {
                // A slice that somebody else has started is as good; its limits are set as those of a unit that runs.
                Err(failure) if failure.is("UnitExists") && process.is_none() => {
                    set_properties(bus, unit, resources, v2, deadline)
                }
                Err(failure) if failure.is("UnitExists") => {
                    // Of no use where it did not fail: then the next attempt says that it exists.
                    let _ = bus.manage("ResetFailedUnit", &Arguments::default().text(unit), deadline);
                    start(bus)
                }
                result => result,
            }
        })
    }

    /// Changes the limits of a unit that runs.
    pub(crate) fn set(&self, path: &CgroupPath, resources: &Resources, v2: bool) -> Result<()> {
        self.during("set the limits of", path, |unit, bus, deadline| set_properties(bus, unit, resources, v2, deadline))
    }

    /// Stops a unit and forgets that it failed, if it did. One that is gone is stopped.
    pub(crate) fn stop(&self, path: &CgroupPath) -> Result<()> {
        self.during("stop", path, |unit, bus, deadline| {
            match run_job(bus, "StopUnit", &Arguments::default().text(unit).text("replace"), deadline) {
                Err(failure) if failure.is("NoSuchUnit") => return Ok(()),
                result => result?,
            }
            match bus.manage("ResetFailedUnit", &Arguments::default().text(unit), deadline) {
                Err(failure) if !failure.is("NoSuchUnit") => Err(failure),
                _ => Ok(()),
            }
        })
    }

    fn during(
        &self,
        action: &'static str,
        path: &CgroupPath,
        work: impl FnOnce(&str, &mut Bus, Instant) -> std::result::Result<(), Failure>,
    ) -> Result<()> {
        let unit = path.unit().unwrap_or_default();
        let deadline = Instant::now() + self.patience;
        let result = Bus::open(&self.addresses, deadline).and_then(|mut bus| work(&unit, &mut bus, deadline));
        result.map_err(|source| Error::Systemd { action, unit, source })
    }
}

fn run_job(bus: &mut Bus, member: &str, arguments: &Arguments, deadline: Instant) -> std::result::Result<(), Failure> {
    let job = bus.manage(member, arguments, deadline)?.values()?.into_iter().next().ok_or(Failure::Protocol("no job"))?;
    match bus.wait_for(&job, deadline)?.as_str() {
        "done" => Ok(()),
        result => Err(Failure::Job { result: result.to_owned() }),
    }
}

fn set_properties(
    bus: &mut Bus,
    unit: &str,
    resources: &Resources,
    v2: bool,
    deadline: Instant,
) -> std::result::Result<(), Failure> {
    let properties = limits(bus, resources, v2, deadline)?;
    if properties.is_empty() {
        return Ok(());
    }
    // For as long as the unit runs: what is written to disk would outlive it.
    let arguments = Arguments::default().text(unit).bool(true).properties(&properties);
    bus.manage("SetUnitProperties", &arguments, deadline).map(|_| ())
}

fn limits(bus: &mut Bus, resources: &Resources, v2: bool, deadline: Instant) -> std::result::Result<Vec<Property>, Failure> {
    if *resources == Resources::default() {
        return Ok(Vec::new());
    }
    let groups = std::fs::read_to_string("/proc/devices").unwrap_or_default();
    Ok(properties::of(resources, v2, bus.version(deadline)?, &groups))
}

fn start_properties(
    bus: &mut Bus,
    path: &CgroupPath,
    process: Option<Pid>,
    resources: &Resources,
    v2: bool,
    deadline: Instant,
) -> std::result::Result<Vec<Property>, Failure> {
    let mut out: Vec<Property> = vec![
        ("Description", Value::Text(format!("berth cgroup {path}"))),
        // Nothing orders it after the boot or before the shutdown: pods are ended by those who made them.
        ("DefaultDependencies", Value::Bool(false)),
    ];
    if let Some(process) = process {
        let pid = process.as_raw_nonzero().get().unsigned_abs();
        out.push(("PIDs", Value::Pids(vec![pid])));
        out.push(("Slice", Value::Text(path.slice().unwrap_or_default().to_owned())));
        // The files in it are ours to write, and cgroups below it ours to make.
        out.push(("Delegate", Value::Bool(true)));
        // One that failed is forgotten like others, and its name is free.
        out.push(("CollectMode", Value::Text("inactive-or-failed".into())));
    }
    // Without accounting the controllers are not there to be limited.
    let io = if v2 { "IOAccounting" } else { "BlockIOAccounting" };
    for name in ["CPUAccounting", "MemoryAccounting", "TasksAccounting", io] {
        out.push((name, Value::Bool(true)));
    }
    out.extend(limits(bus, resources, v2, deadline)?);
    Ok(out)
}

#[cfg(test)]
mod tests;
