//! Containers: what the shim knows of them, how they are made and started.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use berth_cgroup::Doors;
use berth_linux::Pid;
use berth_linux::pidfd::PidFd;
use berth_linux::process::pipe;
use berth_oci::StartError;
use berth_shim::protocol::{ContainerState, CreateExt, ExitRecord, Failure, FailureKind, LogSpec, Phase, PidMode, Reply, Runner};

use super::execs::Exec;
use super::sweeps::{After, Sweep};
use super::{Daemon, ReplyTo, Wait, failure, read_to_end, set_nonblocking, system_failure};
use crate::clock;
use crate::creator::{self, ContainerOrder, Streams, Target};
use crate::foreign::Instance;
use crate::logs::LogError;

/// How far a container is.
pub(super) enum Stage {
    /// Its creator works.
    Creating { reply: ReplyTo },
    /// Its init waits at the gate.
    Created { gate: OwnedFd },
    /// The gate is open, `execve` has not been heard of.
    Starting { reply: ReplyTo },
    /// The program runs.
    Running,
    /// Its first process has ended, the rest of its cgroup is being killed.
    Ending { record: ExitRecord },
    /// Nothing of it runs.
    Exited { record: ExitRecord },
}

/// Where its log is.
pub(super) enum LogState {
    /// The writer has not opened it yet.
    Opening,
    /// Open (or there is none).
    Ready,
    /// It could not be opened.
    Failed(LogError),
}

/// A container.
pub struct Container {
    pub(super) id: String,
    pub(super) stage: Stage,
    pub(super) pid: Option<Pid>,
    pub(super) pidfd: Option<PidFd>,
    /// Its cgroup as text; empty = none.
    pub cgroup: String,
    /// Made by a foreign runtime.
    pub(super) foreign: Option<Instance>,
    pub(super) log: Option<LogSpec>,
    pub(super) log_state: LogState,
    /// A start that waits for the log.
    pub(super) early_start: Option<ReplyTo>,
    pub(super) tty: bool,
    pub(super) has_stdin: bool,
    pub(super) stdin_once: bool,
    /// Write end of its stdin pipe.
    pub(super) stdin: Option<OwnedFd>,
    /// Read ends of its output (or the terminal's master), while the writer reads them.
    pub(super) outputs: Vec<OwnedFd>,
    pub(super) drained: bool,
    pub(super) started_at_ns: i64,
    pub(super) start_error: String,
    /// Deletion has been asked for.
    pub(super) deleting: bool,
    /// The cgroup is being removed.
    pub(super) sweeping: bool,
    pub(super) delete_replies: Vec<ReplyTo>,
    /// When something was executed in it last, on the monotonic clock.
    pub(super) last_exec: Option<u64>,
    /// The way into its cgroup, while things are executed in it again and again.
    pub(super) doors: Option<Doors>,
}

fn exec_ids(execs: &BTreeMap<String, Exec>, container: &str) -> Vec<String> {
    execs.iter().filter(|(_, exec)| exec.container == container).map(|(id, _)| id.clone()).collect()
}

impl Container {
    /// Whether this is its first process.
    pub fn is_init(&self, pid: Pid) -> bool {
        self.pid == Some(pid) && !matches!(self.stage, Stage::Ending { .. } | Stage::Exited { .. })
    }

    /// Its first process, when the program runs.
    pub fn running(&self) -> Option<(Pid, &PidFd)> {
        match self.stage {
            Stage::Running => Some((self.pid?, self.pidfd.as_ref()?)),
            _ => None,
        }
    }

    /// Output that the log writer has to read, with where it goes.
    pub fn unread(&self) -> Option<(&[OwnedFd], &Option<LogSpec>)> {
        (!self.drained && !self.outputs.is_empty()).then_some((&self.outputs, &self.log))
    }

    /// For [`berth_shim::protocol::Request::State`].
    pub fn state(&self, execs: &BTreeMap<String, Exec>) -> ContainerState {
        let (phase, exit) = match &self.stage {
            Stage::Creating { .. } => (Phase::Creating, None),
            Stage::Created { .. } => (Phase::Created, None),
            Stage::Starting { .. } | Stage::Running | Stage::Ending { .. } => (Phase::Running, None),
            Stage::Exited { record } => (Phase::Exited, Some(record.clone())),
        };
        ContainerState {
            id: self.id.clone(),
            phase,
            pid: self.pid.map_or(0, |pid| pid.as_raw_nonzero().get()),
            started_at_ns: self.started_at_ns,
            exit,
            cgroup: self.cgroup.clone(),
            log: self.log.clone(),
            logs_drained: self.drained,
            tty: self.tty,
            stdin: self.has_stdin,
            stdin_once: self.stdin_once,
            stdin_open: if self.tty { self.has_stdin && !self.drained } else { self.stdin.is_some() },
            execs: exec_ids(execs, &self.id),
        }
    }
}

/// Pipes of a container, both ends.
struct Pipes {
    stdin: Option<OwnedFd>,
    outputs: Vec<OwnedFd>,
    theirs: Streams,
}

fn make_pipes(tty: bool, stdin: bool) -> std::io::Result<Pipes> {
    if tty {
        let theirs = Streams { stdin: None, output: None };
        return Ok(Pipes { stdin: None, outputs: Vec::new(), theirs });
    }
    let (stdin_reader, stdin_writer) = match stdin {
        true => pipe().map(|(reader, writer)| (Some(reader), Some(writer)))?,
        false => (None, None),
    };
    let (stdout_reader, stdout_writer) = pipe()?;
    let (stderr_reader, stderr_writer) = pipe()?;
    for reader in [&stdout_reader, &stderr_reader] {
        set_nonblocking(reader)?;
    }
    Ok(Pipes {
        stdin: stdin_writer,
        outputs: vec![stdout_reader, stderr_reader],
        theirs: Streams { stdin: stdin_reader, output: Some([stdout_writer, stderr_writer]) },
    })
}

impl Daemon {
    pub(super) fn no_container(id: &str) -> Failure {
        failure(FailureKind::NotFound, format!("no container {id}"))
    }

    pub(super) fn create(&mut self, to: ReplyTo, id: String, ext: CreateExt, fds: Vec<OwnedFd>) {
        if let Err(failure) = self.try_create(to, id, ext, fds) {
            self.answer(to, Reply::Error(failure));
        }
    }

    fn try_create(&mut self, to: ReplyTo, id: String, ext: CreateExt, fds: Vec<OwnedFd>) -> Result<(), Failure> {
        let odd = |c: char| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
        if id.is_empty() || id.len() > 128 || id.starts_with('.') || id.contains(odd) {
            return Err(failure(FailureKind::Invalid, format!("bad container id {id:?}")));
        }
        if self.containers.contains_key(&id) {
            return Err(failure(FailureKind::AlreadyExists, format!("container {id} exists")));
        }
        let target = match &ext.pid {
            PidMode::Target(target) => match self.containers.get(target).and_then(Container::running) {
                Some((pid, pidfd)) => {
                    let copy =
                        pidfd.as_fd().try_clone_to_owned().map_err(|error| system_failure("prepare a container", &error))?;
                    Some(Target { pid, pidfd: copy.into() })
                }
                None => return Err(failure(FailureKind::WrongState, format!("container {target} does not run"))),
            },
            _ => None,
        };
        let system = |error: std::io::Error| system_failure("prepare a container", &error);
        let (gate_reader, gate) = pipe().map_err(system)?;
        let Pipes { stdin, outputs, theirs: streams } = make_pipes(ext.tty, ext.stdin).map_err(system)?;
        let foreign = match &ext.runner {
            Runner::Builtin => None,
            Runner::External(runtime) => Some(Instance::new(runtime.clone(), &id, &ext.bundle)),
        };
        let container = Container {
            id: id.clone(),
            stage: Stage::Creating { reply: to },
            pid: None,
            pidfd: None,
            cgroup: ext.cgroup.clone(),
            foreign: foreign.clone(),
            log: ext.log.clone(),
            log_state: LogState::Opening,
            early_start: None,
            tty: ext.tty,
            has_stdin: ext.stdin,
            stdin_once: ext.stdin_once,
            stdin,
            outputs,
            drained: false,
            started_at_ns: 0,
            start_error: String::new(),
            deleting: false,
            sweeping: false,
            delete_replies: Vec::new(),
            last_exec: None,
            doors: None,
        };
        let order = ContainerOrder {
            id: &id,
            foreign: foreign.as_ref(),
            ext,
            fds,
            pod: &self.parts.pod,
            target,
            gate: gate_reader,
            streams,
            layout: &self.parts.layout,
            oom_score_adj: self.parts.oom_score_adj,
        };
        let (link, creator) = creator::start(|link| creator::create(order, link)).map_err(system)?;
        self.add_wait(Wait::Creating { id: id.clone(), link, gate, creator }).map_err(system)?;
        self.containers.insert(id, container);
        Ok(())
    }

    /// A creator has something to say, or has ended.
    pub(super) fn read_creator(&mut self, token: u64) {
        let Some(Wait::Creating { link, .. }) = self.waits.get_mut(&token) else {
            return;
        };
        let Some((report, fds)) = creator::take_report(link) else {
            return;
        };
        let Some(Wait::Creating { id, gate, .. }) = self.end_wait(token) else {
            return;
        };
        let left_nothing = report.left_nothing();
        match report.into_made(fds) {
            Ok(made) => self.container_made(&id, gate, made),
            Err(failure) => {
                let known = self.containers.get(&id).map(|container| (container.cgroup.clone(), container.foreign.clone()));
                let (cgroup, foreign) = known.unwrap_or_default();
                if left_nothing && foreign.is_none() {
                    return self.not_created(&id, failure, Ok(()));
                }
                // What a creator that died, or another runtime that failed, had made is unknown: without the gate an init at it ends, the
                // cgroup is emptied and removed.
                self.sweep(Sweep::Delete { cgroup, foreign }, After::NotCreated { id, failure });
            }
        }
    }

    /// `undone` says whether what the creator had made is gone.
    pub(super) fn not_created(&mut self, id: &str, mut failure: Failure, undone: Result<(), Failure>) {
        if let Some(container) = self.containers.remove(id) {
            if let Err(left) = &undone {
                failure.message = format!("{}; undoing that failed too: {left}", failure.message);
            }
            if let Stage::Creating { reply } = container.stage {
                self.answer(reply, Reply::Error(failure));
            }
            for to in container.delete_replies {
                self.answer(to, undone.clone().map_or_else(Reply::Error, |()| Reply::Done));
            }
        }
        self.go_on_shutting_down();
    }

    fn container_made(&mut self, id: &str, gate: OwnedFd, made: creator::Made) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let Stage::Creating { reply } = container.stage else {
            return;
        };
        let unclaimed = self.take_unclaimed(made.pid, &made.pidfd);
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        container.pid = Some(made.pid);
        container.pidfd = Some(made.pidfd);
        if let Some(console) = made.console {
            let _ = set_nonblocking(&console);
            container.outputs = vec![console];
        }
        container.stage = Stage::Created { gate };
        let deleting = container.deleting;
        if let Err(error) = self.add_wait(Wait::Starting { id: id.to_owned(), fd: made.started, text: Vec::new() }) {
            // Without it nobody would hear how the start went; the descriptor limit is all that can be behind it.
            let failure = system_failure("watch a container's start", &error);
            self.answer(reply, Reply::Error(failure));
            return self.delete(None, id, true);
        }
        self.add_output(id);
        let created = Reply::Created { pid: made.pid.as_raw_nonzero().get(), warnings: made.warnings };
        self.answer(reply, created);
        if let Some((status, ended_at)) = unclaimed {
            self.container_exited(id, status, ended_at);
        } else if deleting {
            self.kill_everything(id);
        }
    }

    pub(super) fn start(&mut self, to: ReplyTo, id: &str) {
        let Some(container) = self.containers.get_mut(id) else {
            return self.answer(to, Reply::Error(Self::no_container(id)));
        };
        let result = match (&container.stage, &container.log_state) {
            (Stage::Created { .. }, _) if container.early_start.is_some() || container.deleting => {
                Err(failure(FailureKind::WrongState, format!("container {id} is being started or deleted")))
            }
            (Stage::Created { .. }, LogState::Opening) => {
                container.early_start = Some(to);
                Ok(())
            }
            (Stage::Created { .. }, LogState::Failed(error)) => {
                Err(Failure { kind: FailureKind::Log, message: error.message.clone(), errno: error.errno })
            }
            (Stage::Created { .. }, LogState::Ready) => container.open_gate(to),
            _ => Err(failure(FailureKind::WrongState, format!("container {id} is not waiting for its start"))),
        };
        if let Err(failure) = result {
            self.answer(to, Reply::Error(failure));
        }
    }

    /// The log writer has opened a container's log, or not.
    pub(super) fn log_opened(&mut self, id: &str, error: Option<LogError>) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        container.log_state = match error {
            None => LogState::Ready,
            Some(error) => LogState::Failed(error),
        };
        if let Some(to) = container.early_start.take() {
            self.start(to, id);
        }
    }

    /// A later opening has succeeded.
    pub(super) fn log_reopened(&mut self, id: &str) {
        if let Some(container) = self.containers.get_mut(id) {
            container.log_state = LogState::Ready;
        }
    }

    /// The `started` pipe has ended: the program runs, or `text` says why not.
    pub(super) fn container_started(&mut self, id: &str, text: &[u8]) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let Stage::Starting { reply } = container.stage else {
            // The init ended at its gate.
            return;
        };
        container.stage = Stage::Running;
        let answer = match start_error(text) {
            None => Reply::Started { started_at_ns: container.started_at_ns },
            Some(error) => {
                container.start_error = error.message.clone();
                Reply::Error(error)
            }
        };
        self.answer(reply, answer);
    }

    /// Whether its `started` pipe has already ended; read here because its end and the exit race.
    pub(super) fn finish_starting(&mut self, id: &str) {
        let waiting = |wait: &Wait| matches!(wait, Wait::Starting { id: other, .. } if other == id);
        let Some(token) = self.waits.iter().find(|(_, wait)| waiting(wait)).map(|(token, _)| *token) else {
            return;
        };
        if let Some(Wait::Starting { fd, mut text, .. }) = self.end_wait(token) {
            read_to_end(&fd, &mut text);
            self.container_started(id, &text);
        }
    }
}

impl Container {
    fn open_gate(&mut self, to: ReplyTo) -> Result<(), Failure> {
        let Stage::Created { gate } = &self.stage else {
            return Err(failure(FailureKind::WrongState, format!("container {} is not waiting for its start", self.id)));
        };
        let now = clock::now_ns();
        rustix::io::retry_on_intr(|| rustix::io::write(gate, b"\n"))
            .map_err(|errno| system_failure("open the container's gate", &errno.into()))?;
        self.started_at_ns = now;
        self.stage = Stage::Starting { reply: to };
        Ok(())
    }
}

/// What a `started` pipe said, as a failure.
pub(super) fn start_error(text: &[u8]) -> Option<Failure> {
    if text.is_empty() {
        return None;
    }
    let error = serde_json::from_slice(text)
        .unwrap_or_else(|_| StartError { message: String::from_utf8_lossy(text).into_owned(), errno: None });
    Some(Failure { kind: FailureKind::Start, message: error.message, errno: error.errno })
}
