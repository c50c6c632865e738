//! Cgroups by their text, as the protocol has them: an empty text is no cgroup. What waits is for forked children only.

use std::time::Duration;

use berth_cgroup::{Cgroup, CgroupPath, Layout, Placement, Resources};
use berth_linux::Pid;

use crate::error::Error;

/// How long killed processes may take to go.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether processes are born in their cgroup: all of it that counts is of v2.
pub fn takes_births(layout: &Layout) -> bool {
    let named = |controllers: &[String]| controllers.iter().all(|name| name.starts_with("name="));
    layout.unified().is_some() && layout.hierarchies().iter().all(|hierarchy| named(&hierarchy.controllers))
}

/// A container's cgroup, without looking whether it exists.
pub fn at(layout: &Layout, text: &str) -> berth_cgroup::Result<Option<Cgroup>> {
    if text.is_empty() {
        return Ok(None);
    }
    Cgroup::at(layout, &CgroupPath::parse(text)?).map(Some)
}

/// Makes the shim's own cgroup and moves the calling process into it.
pub fn join(layout: &Layout, text: &str) -> Result<(), Error> {
    if !text.is_empty() {
        Placement::enter(layout, &CgroupPath::parse(text)?)?;
    }
    Ok(())
}

/// Prepares a container's cgroup with its limits. On failure it is not there.
pub fn prepare(layout: &Layout, text: &str, resources: Option<&Resources>) -> berth_cgroup::Result<Option<Placement>> {
    if text.is_empty() {
        return Ok(None);
    }
    let none = Resources::default();
    Placement::prepare(layout, &CgroupPath::parse(text)?, resources.unwrap_or(&none)).map(Some)
}

/// A container's cgroup.
pub fn open(layout: &Layout, text: &str) -> berth_cgroup::Result<Option<Cgroup>> {
    if text.is_empty() {
        return Ok(None);
    }
    Cgroup::open(layout, &CgroupPath::parse(text)?).map(Some)
}

/// Kills all processes and waits until they are gone.
pub fn kill(layout: &Layout, text: &str) -> Result<(), Error> {
    match at(layout, text)? {
        Some(cgroup) if !cgroup.kill_and_wait(PATIENCE)? => Err(Error::Helper(format!("processes in cgroup {text} do not end"))),
        _ => Ok(()),
    }
}

/// Kills all processes and removes the cgroup.
pub fn remove(layout: &Layout, text: &str) -> Result<(), Error> {
    kill(layout, text)?;
    match at(layout, text)? {
        Some(cgroup) => Ok(cgroup.delete()?),
        None => Ok(()),
    }
}

/// Whether a process of it was killed for want of memory.
pub fn oom_killed(layout: &Layout, text: &str) -> bool {
    at(layout, text).ok().flatten().is_some_and(|cgroup| cgroup.oom_kills().is_ok_and(|kills| kills > 0))
}

/// The processes in it.
pub fn processes(layout: &Layout, text: &str) -> Vec<Pid> {
    at(layout, text).ok().flatten().and_then(|cgroup| cgroup.procs().ok()).unwrap_or_default()
}

/// Sends a signal to all its processes, once each.
pub fn signal(layout: &Layout, text: &str, signal: i32) -> berth_cgroup::Result<()> {
    at(layout, text)?.map_or(Ok(()), |cgroup| cgroup.signal_all(signal))
}

/// Whether a process is in it.
pub fn has_processes(layout: &Layout, text: &str) -> bool {
    !processes(layout, text).is_empty()
}
