//! What a client was promised: its pods and containers, and the states that each may show. Pure.

use std::collections::BTreeMap;

use berth_cri_api::v1;

/// How a container's program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Runs until it is killed.
    Sleeps,
    /// Ends by itself with this code.
    Ends(i32),
    /// Ends with this code when it is asked to.
    Obeys(i32),
}

/// What has been promised of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Promise {
    Created,
    Started,
    Stopped,
    /// RemoveContainer was asked: it may be there or not.
    Removing,
}

#[derive(Debug, Clone)]
pub struct Container {
    pub marker: String,
    pub program: Program,
    pub promise: Promise,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PodPromise {
    Ready,
    /// StopPodSandbox was asked: it may be ready or not.
    Stopping,
    Stopped,
    Removing,
}

#[derive(Debug, Clone)]
pub struct Pod {
    pub name: String,
    pub promise: PodPromise,
    /// By id.
    pub containers: BTreeMap<String, Container>,
    /// A creation that was cut off by the death of the shim: there or not.
    pub doubtful: Vec<String>,
}

/// A container as it is listed.
#[derive(Debug, Clone)]
pub struct Seen {
    pub state: v1::ContainerState,
    pub exit_code: i32,
    pub reason: String,
}

/// Whether what is seen of a container may be. `doomed`: its shim was killed, so it may have ended with it.
pub fn check(container: &Container, pod: &Pod, seen: &Seen, doomed: bool) -> Result<(), String> {
    use v1::ContainerState::{ContainerCreated, ContainerExited, ContainerRunning};
    let ending = doomed || pod.promise >= PodPromise::Stopping || container.promise == Promise::Removing;
    let fine = match (container.promise, seen.state) {
        (Promise::Created, ContainerCreated) => true,
        (Promise::Created, ContainerExited) => ending,
        (Promise::Started, ContainerRunning) => true,
        (Promise::Started | Promise::Stopped, ContainerExited) => ends_well(container, seen, ending),
        (Promise::Removing, _) => true,
        _ => false,
    };
    if fine { Ok(()) } else { Err(format!("{container:?} of a pod {:?} (doomed {doomed}) is {seen:?}", pod.promise)) }
}

fn ends_well(container: &Container, seen: &Seen, ending: bool) -> bool {
    const KILLED: i32 = 137;
    let lost = seen.exit_code == 255 && seen.reason == "Unknown";
    let asked = container.promise >= Promise::Stopped;
    match container.program {
        Program::Ends(code) => seen.exit_code == code || (ending && lost) || ((ending || asked) && seen.exit_code == KILLED),
        Program::Obeys(code) => {
            asked && seen.exit_code == code || (ending || asked) && seen.exit_code == KILLED || ending && lost
        }
        Program::Sleeps => (ending || asked) && seen.exit_code == KILLED || ending && lost,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_that_nobody_asked_for_is_a_lie() {
        let pod = Pod { name: "p".into(), promise: PodPromise::Ready, containers: BTreeMap::new(), doubtful: Vec::new() };
        let container = |program, promise| Container { marker: String::new(), program, promise };
        let exited =
            |code, reason: &str| Seen { state: v1::ContainerState::ContainerExited, exit_code: code, reason: reason.into() };
        let sleeps = container(Program::Sleeps, Promise::Started);
        assert!(check(&sleeps, &pod, &exited(137, "Error"), false).is_err());
        assert!(check(&sleeps, &pod, &exited(255, "Unknown"), true).is_ok());
        assert!(check(&sleeps, &pod, &exited(0, "Completed"), true).is_err());
        let ends = container(Program::Ends(3), Promise::Started);
        assert!(check(&ends, &pod, &exited(3, "Error"), false).is_ok());
        assert!(check(&ends, &pod, &exited(255, "Unknown"), false).is_err());
        let created = container(Program::Ends(3), Promise::Created);
        assert!(check(&created, &pod, &exited(3, "Error"), false).is_err());
    }
}
