//! How containers end: by themselves, by a signal, by deletion.

use std::os::fd::AsFd;

use berth_linux::pidfd::ExitStatus;
use berth_shim::protocol::{Event, ExitRecord, Failure, FailureKind, Reply};

use super::containers::Stage;
use super::sweeps::{After, Sweep};
use super::{Daemon, ReplyTo, Wait, failure, system_failure};
use crate::cgroups;
use crate::logs::ToWriter;

impl Daemon {
    /// The first process has been reaped.
    pub(super) fn container_exited(&mut self, id: &str, status: ExitStatus, ended_at_ns: i64) {
        self.finish_starting(id);
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let early_start = container.early_start.take();
        let failed = !container.start_error.is_empty();
        let cgroup = container.cgroup.clone();
        let record = ExitRecord {
            pid: container.pid.map_or(0, |pid| pid.as_raw_nonzero().get()),
            code: if failed { 128 } else { status.code },
            signal: if failed { 0 } else { status.signal.unwrap_or(0) },
            oom: cgroups::oom_killed(&self.parts.layout, &cgroup),
            started_at_ns: container.started_at_ns,
            finished_at_ns: ended_at_ns.max(container.started_at_ns),
            start_error: std::mem::take(&mut container.start_error),
        };
        container.stage = Stage::Ending { record };
        container.stdin = None;
        container.pidfd = None;
        container.doors = None;
        if let Some(to) = early_start {
            self.answer(to, Reply::Error(failure(FailureKind::WrongState, format!("container {id} has ended"))));
        }
        if cgroups::has_processes(&self.parts.layout, &cgroup) {
            self.sweep(Sweep::Kill { cgroup }, After::Ended { id: id.to_owned() });
        } else {
            self.container_ended(id);
        }
    }

    /// Nothing of the container runs any more.
    pub(super) fn container_ended(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let Stage::Ending { record } = &container.stage else {
            return;
        };
        let record = record.clone();
        // On tmpfs, whose only failure is a lack of memory; the record is in the state all the same.
        let _ = self.parts.records.write(id, &record);
        container.stage = Stage::Exited { record: record.clone() };
        let (drained, deleting) = (container.drained, container.deleting);
        self.publish(&Event::Exited { id: id.to_owned(), exit: record });
        if drained {
            self.publish(&Event::LogsDrained { id: id.to_owned() });
        }
        if deleting {
            self.delete_exited(id);
        }
    }

    /// The log writer has written all output.
    pub(super) fn output_drained(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        container.drained = true;
        container.outputs = Vec::new();
        if matches!(container.stage, Stage::Exited { .. }) {
            self.publish(&Event::LogsDrained { id: id.to_owned() });
        }
    }

    pub(super) fn kill(&mut self, to: ReplyTo, id: &str, signal: i32, all: bool) {
        let Some(container) = self.containers.get(id) else {
            return self.answer(to, Reply::Error(Self::no_container(id)));
        };
        if !(1..=64).contains(&signal) {
            return self.answer(to, Reply::Error(failure(FailureKind::Invalid, format!("no signal {signal}"))));
        }
        if matches!(container.stage, Stage::Creating { .. }) {
            let text = format!("container {id} is being created");
            return self.answer(to, Reply::Error(failure(FailureKind::WrongState, text)));
        }
        if all && signal == 9 && !container.cgroup.is_empty() {
            let sweep = Sweep::Kill { cgroup: container.cgroup.clone() };
            return self.sweep(sweep, After::Reply(to));
        }
        if all && !container.cgroup.is_empty() {
            let signalled = cgroups::signal(&self.parts.layout, &container.cgroup, signal);
            let failed = |error| failure(FailureKind::System, crate::error::full_text(&error));
            return self.answer_result(to, signalled.map_err(failed));
        }
        if let (Some(foreign), Some(pidfd), true) = (&container.foreign, &container.pidfd, signal != 9) {
            // The runtime may have its own idea of where a signal goes.
            let sweep = match pidfd.as_fd().try_clone_to_owned() {
                Ok(init) => Sweep::Signal { foreign: foreign.clone(), init: init.into(), signal },
                Err(error) => return self.answer(to, Reply::Error(system_failure("send the signal", &error))),
            };
            return self.sweep(sweep, After::Reply(to));
        }
        let result = container.pidfd.as_ref().map_or(Ok(()), |pidfd| pidfd.signal(signal));
        let result = match result {
            Err(error) if error.raw_os_error() != Some(rustix::io::Errno::SRCH.raw_os_error()) => {
                Err(system_failure("send the signal", &error))
            }
            _ => Ok(()),
        };
        self.answer_result(to, result);
    }

    /// Kills a container that is to be deleted, whatever it is doing.
    pub(super) fn kill_everything(&mut self, id: &str) {
        let creator = self.waits.values().find_map(|wait| match wait {
            Wait::Creating { id: other, creator, .. } if other == id => Some(*creator),
            _ => None,
        });
        if let Some(leader) = creator {
            // With what it has started: hooks. They are in the shim's cgroup, not in the container's.
            return self.sweep(Sweep::KillTree { cgroup: String::new(), leader }, After::Nothing);
        }
        let Some(container) = self.containers.get(id) else {
            return;
        };
        if let Some(pidfd) = &container.pidfd {
            let _ = pidfd.signal(9);
        }
        if !matches!(container.stage, Stage::Creating { .. }) && !container.cgroup.is_empty() {
            let sweep = Sweep::Kill { cgroup: container.cgroup.clone() };
            self.sweep(sweep, After::Nothing);
        }
    }

    pub(super) fn delete(&mut self, to: Option<ReplyTo>, id: &str, force: bool) {
        let Some(container) = self.containers.get_mut(id) else {
            if let Some(to) = to {
                self.answer(to, Reply::Done);
            }
            return;
        };
        let exited = matches!(container.stage, Stage::Exited { .. });
        if !exited && !force && !container.deleting {
            if let Some(to) = to {
                let text = format!("container {id} has not ended");
                self.answer(to, Reply::Error(failure(FailureKind::WrongState, text)));
            }
            return;
        }
        container.deleting = true;
        container.delete_replies.extend(to);
        if exited {
            self.delete_exited(id);
        } else {
            self.kill_everything(id);
        }
    }

    fn delete_exited(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if container.sweeping {
            return;
        }
        container.sweeping = true;
        let sweep = Sweep::Delete { cgroup: container.cgroup.clone(), foreign: container.foreign.clone() };
        self.tell_writer(&ToWriter::Remove { id: id.to_owned() }, Vec::new());
        self.sweep(sweep, After::Deleted { id: id.to_owned() });
    }

    /// The cgroup of a container to be deleted is gone, or could not be removed.
    pub(super) fn deleted(&mut self, id: &str, result: Result<(), Failure>) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        container.sweeping = false;
        let replies = std::mem::take(&mut container.delete_replies);
        if result.is_ok() {
            // In a shutdown nobody has removed the container: how it ended stays for an agent that asks later, and goes with the
            // sandbox's folder.
            if self.shutdown.is_none() {
                self.parts.records.remove(id);
            }
            self.containers.remove(id);
        } else {
            container.deleting = false;
        }
        for to in replies {
            self.answer_result(to, result.clone());
        }
        self.go_on_shutting_down();
    }
}
