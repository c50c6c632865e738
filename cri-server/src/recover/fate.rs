//! What became of a container while no agent looked: from its record, from what its shim knows, and from the exit on file.

use std::sync::Arc;

use berth_shim::protocol::{ContainerState as ShimContainer, Phase};

use crate::Server;
use crate::board::Exit;
use crate::records::ContainerRecord;
use crate::sandbox::run;
use crate::sandbox::state::{Container, Fate, ProcessExit, exit_record};

/// What a shim that answers late knows of a container.
pub(super) fn fate_in_shim(state: &ShimContainer) -> Fate {
    let started = if state.started_at_ns == 0 && matches!(state.phase, Phase::Running) { 1 } else { state.started_at_ns };
    Fate { started_at: started, pid: Some(state.pid), exit: state.exit.as_ref().map(run::process_exit) }
}

/// A container from its record and from what its shim knows.
pub(super) fn container_of(
    server: &Server,
    record: ContainerRecord,
    (started_at, pid, exit): (i64, Option<i32>, Option<Exit>),
) -> Container {
    let volumes = record.facts.spec.mounts.iter().filter_map(|m| m.image.as_ref());
    let holds = std::iter::once(&record.facts.image_id)
        .chain(volumes.map(|i| &i.id))
        .filter_map(|id| id.parse().ok())
        .filter_map(|id| server.images.hold(&id).inspect_err(|error| tracing::debug!(%error, "image of a container")).ok())
        .collect();
    let hold = Some(Arc::new(holds));
    Container::recovered(Arc::new(record.facts), record.resources, record.created_at, started_at, pid, exit, hold)
}

/// [`fate`] while the shim is silent: what is on record, and what it wrote before.
pub(super) fn as_recorded(record: &ContainerRecord, on_file: Option<ProcessExit>) -> (i64, Option<i32>, Option<Exit>) {
    let exit = record.exit.clone().or_else(|| on_file.as_ref().map(exit_record));
    (record.started_at, None, exit)
}

/// (started at, pid, exit) of a container after a restart of the agent.
pub(super) fn fate(
    record: &ContainerRecord,
    shim: Option<&ShimContainer>,
    on_file: Option<ProcessExit>,
) -> (i64, Option<i32>, Option<Exit>) {
    if let Some(exit) = &record.exit {
        return (record.started_at, None, Some(exit.clone()));
    }
    let recorded = |exit: &ProcessExit| {
        let mut exit = exit_record(exit);
        exit.finished_at = exit.finished_at.max(record.started_at);
        exit
    };
    match shim {
        Some(state) => {
            let started = if state.started_at_ns != 0 { state.started_at_ns } else { record.started_at };
            match (&state.phase, &state.exit) {
                (_, Some(exit)) => (started, None, Some(recorded(&run::process_exit(exit)))),
                (Phase::Running, None) => (started.max(1), Some(state.pid), None),
                _ => (0, Some(state.pid), None),
            }
        }
        None => {
            let lost = || Exit {
                code: 255,
                finished_at: crate::clock::now_ns(),
                reason: "Unknown".into(),
                message: "its end was not seen".into(),
            };
            (record.started_at, None, Some(on_file.as_ref().map_or_else(lost, recorded)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_shim::protocol::ExitRecord;

    fn record(started_at: i64, exit: Option<Exit>) -> ContainerRecord {
        ContainerRecord {
            version: 1,
            id: "c".into(),
            sandbox: "s".into(),
            boot: "b".into(),
            created_at: 1,
            started_at,
            resources: Default::default(),
            exit,
            forlorn: false,
            facts: crate::board::ContainerFacts::of(Default::default()),
        }
    }

    fn shim(phase: Phase, started_at_ns: i64, exit: Option<ExitRecord>) -> ShimContainer {
        ShimContainer {
            id: "c".into(),
            phase,
            pid: 7,
            started_at_ns,
            exit,
            cgroup: String::new(),
            log: None,
            logs_drained: false,
            tty: false,
            stdin: false,
            stdin_once: false,
            stdin_open: false,
            execs: vec![],
        }
    }

    fn ended(code: i32, start_error: &str) -> ExitRecord {
        ExitRecord { pid: 7, code, signal: 0, oom: false, started_at_ns: 2, finished_at_ns: 3, start_error: start_error.into() }
    }

    #[test]
    fn a_container_has_the_same_state_after_a_restart_of_the_agent() {
        let running = fate(&record(0, None), Some(&shim(Phase::Running, 5, None)), None);
        assert_eq!(running, (5, Some(7), None));
        let created = fate(&record(0, None), Some(&shim(Phase::Created, 0, None)), None);
        assert_eq!(created, (0, Some(7), None));
        let exited = fate(&record(2, None), Some(&shim(Phase::Exited, 2, Some(ended(3, "")))), None).2.unwrap();
        assert_eq!((exited.code, exited.reason.as_str(), exited.finished_at), (3, "Error", 3));
        let failed = fate(&record(0, None), Some(&shim(Phase::Exited, 0, Some(ended(128, "no such file")))), None).2.unwrap();
        assert_eq!((failed.code, failed.reason.as_str(), failed.message.as_str()), (128, "StartError", "no such file"));
    }

    #[test]
    fn a_container_whose_shim_is_gone_is_exited_255_unless_its_end_is_on_record() {
        let lost = fate(&record(2, None), None, None).2.unwrap();
        assert_eq!((lost.code, lost.reason.as_str()), (255, "Unknown"));
        let seen =
            fate(&record(2, None), None, Some(ProcessExit { code: 0, oom: false, finished_at: 9, start_error: String::new() }))
                .2
                .unwrap();
        assert_eq!((seen.code, seen.reason.as_str()), (0, "Completed"));
        let kept = Exit { code: 4, finished_at: 5, reason: "Error".into(), message: String::new() };
        assert_eq!(fate(&record(2, Some(kept.clone())), None, None).2.unwrap(), kept);
    }
}
