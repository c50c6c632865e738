//! Running a command in a container: what it is made of, and ExecSync. The streams of the interactive kind are in `streaming`.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use berth_oci::spec::Process;
use berth_shim::protocol::{ExecExt, ExecSpec, Reply, Request};
use rustix::fs::OFlags;
use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use crate::Server;
use crate::board::ContainerState;
use crate::error::{Error, file};
use crate::id::ContainerId;
use crate::sandbox::holdings::Live;
use crate::sandbox::owner;
use crate::sandbox::state::Op;
use crate::shim::ShimClient;

/// Both streams together stay below what clients accept in one message.
const OUTPUT_LIMIT: usize = berth_cri_api::MAX_MESSAGE_BYTES - 128 * 1024;

/// How long output is read on after the command has ended while somebody else keeps its pipe open.
const DRAIN: Duration = Duration::from_secs(2);

/// Commands that end so soon, as most probes' do, write no more than pipes hold: their output is read in one go afterwards.
const AT_ONCE: Duration = Duration::from_millis(10);

/// A running command. Dropping it kills the command when it still runs.
pub(crate) struct Running {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
    pub(crate) console: Option<OwnedFd>,
    pub(crate) handle: ExecHandle,
}

/// The command itself, without its streams.
pub(crate) struct ExecHandle {
    shim: Arc<ShimClient>,
    container: ContainerId,
    id: String,
    ended: Option<oneshot::Receiver<i32>>,
    code: Option<i32>,
}

impl ExecHandle {
    /// Waits for the command's end. May be asked again, and given up.
    pub(crate) async fn wait(&mut self) -> Result<i32, Error> {
        if let Some(code) = self.code {
            return Ok(code);
        }
        let gone = || Error::ShimGone { id: self.container.as_str().into(), reason: "it ended before the command".into() };
        let Some(ended) = self.ended.as_mut() else { return Err(gone()) };
        let code = ended.await.map_err(|_| gone());
        self.ended = None;
        self.code = code.as_ref().ok().copied();
        code
    }

    /// Kills the command with everything it started.
    pub(crate) async fn kill(&self) -> Result<(), Error> {
        kill(&self.shim, &self.container, &self.id).await
    }
}

async fn kill(shim: &ShimClient, container: &ContainerId, id: &str) -> Result<(), Error> {
    let request = Request::Kill { id: container.as_str().into(), exec: Some(id.to_owned()), signal: 9, all: true };
    shim.call("kill the command", request, Vec::new()).await.map(|_| ())
}

impl Drop for ExecHandle {
    fn drop(&mut self) {
        self.shim.forget_exec(&self.id);
        if self.ended.is_some() {
            let (shim, container, id) = (self.shim.clone(), self.container.clone(), std::mem::take(&mut self.id));
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(async move {
                    let _ = kill(&shim, &container, &id).await;
                });
            }
        }
    }
}

/// A running container by id or prefix, with its sandbox's holdings.
pub(crate) async fn running(server: &Server, id: &str) -> Result<(ContainerId, Arc<Live>), Arc<Error>> {
    let view = server.board.need_container(id)?;
    if view.state != ContainerState::Running {
        return Err(Arc::new(Error::State {
            kind: "container",
            id: view.id.as_str().into(),
            state: view.state.text(),
            wanted: "must be running",
        }));
    }
    let live = owner::submit(server, &view.sandbox, Op::Live).await?;
    Ok((view.id.clone(), live))
}

/// Starts a command in a running container with the container's own user, environment, capabilities and filter.
pub(crate) async fn start(
    server: &Arc<Server>,
    live: &Arc<Live>,
    container: &ContainerId,
    command: Vec<String>,
    stdin: bool,
    tty: bool,
) -> Result<Running, Error> {
    let memfd = match server.repeated.order(container, &command, tty) {
        Some(memfd) => memfd,
        None => {
            let (server, live, container) = (server.clone(), live.clone(), container.clone());
            crate::blocking(move || {
                let memfd = exec_spec(&server, &live, &container, command.clone(), tty)?;
                server.repeated.ran(&container, command, tty, &memfd);
                Ok(memfd)
            })
            .await?
        }
    };
    let shim = live.shim()?.clone();
    let id = ContainerId::random().as_str()[..32].to_owned();
    let ended = shim.watch_exec(&id);
    let request =
        Request::Exec { container: container.as_str().into(), id: id.clone(), ext: ExecExt { stdin, tty, console_size: (0, 0) } };
    // From here on the command is killed when nobody waits any more.
    let handle = ExecHandle { shim: shim.clone(), container: container.clone(), id, ended: Some(ended), code: None };
    let mut answer = shim.call("exec", request, vec![memfd]).await.map_err(|e| match e {
        Error::Start { message, .. } => {
            Error::Shim { action: "exec", message: format!("failed to exec in container: {message}") }
        }
        other => other,
    })?;
    let Reply::Execed { stdin, stdout, stderr, console, .. } = answer.reply else { return Err(shim.unexpected("exec")) };
    Ok(Running {
        stdin: answer.take(stdin),
        stdout: answer.take(stdout),
        stderr: answer.take(stderr),
        console: answer.take(console),
        handle,
    })
}

/// The process to run, from the container's OCI spec. Blocking.
fn exec_spec(server: &Server, live: &Live, container: &ContainerId, command: Vec<String>, tty: bool) -> Result<OwnedFd, Error> {
    let path = server.paths.oci_spec(&live.id, container);
    let bytes = std::fs::read(&path).map_err(file("read", &path))?;
    let unreadable = |e: serde_json::Error| Error::Record { path: path.clone(), reason: e.to_string() };
    let (base, filter) = match server.filters.of(container) {
        Some(filter) => (serde_json::from_slice::<Known>(&bytes).map_err(unreadable)?.process, filter),
        None => {
            let spec: berth_oci::spec::Spec = serde_json::from_slice(&bytes).map_err(unreadable)?;
            let filter = spec.linux.seccomp.as_ref().map(|p| server.filters.get(p)).transpose()?;
            server.filters.remember(container, filter.clone());
            (spec.process, filter)
        }
    };
    let base = base.unwrap_or_default();
    let mut env = base.env.clone();
    if tty && !env.iter().any(|e| e.0.starts_with(b"TERM=")) {
        env.push("TERM=xterm".into());
    }
    let process = Process { args: command, terminal: tty, console_size: None, env, ..base };
    let json = order(process, filter.as_ref().map(|f| f.json.as_slice())).map_err(unreadable)?;
    berth_linux::memfd::sealed_memfd("exec-spec", &json, false).map_err(file("make", "exec-spec"))
}

/// Orders of commands that are run again and again, as a probe's is every second: the same sealed file tells the shim each time.
#[derive(Default)]
pub(crate) struct Repeated(Mutex<HashMap<ContainerId, Vec<Ran>>>);

/// A command that was run.
struct Ran {
    command: Vec<String>,
    tty: bool,
    /// Its order, since it was run a second time.
    order: Option<OwnedFd>,
}

/// More commands than a container has probes, and more containers than a node has; beyond it there is forgetting.
const COMMANDS: usize = 4;
const CONTAINERS: usize = 512;

impl Repeated {
    fn lock(&self) -> MutexGuard<'_, HashMap<ContainerId, Vec<Ran>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The order of a command, when it is known. Opened anew: shims before this read it from where the last one stopped.
    fn order(&self, id: &ContainerId, command: &[String], tty: bool) -> Option<OwnedFd> {
        let known = self.lock();
        let ran = known.get(id)?.iter().find(|ran| ran.tty == tty && ran.command == command)?;
        berth_linux::memfd::reopen(ran.order.as_ref()?.as_fd(), OFlags::RDONLY).ok()
    }

    /// A command is run by this order.
    fn ran(&self, id: &ContainerId, command: Vec<String>, tty: bool, order: &OwnedFd) {
        let mut known = self.lock();
        if known.len() >= CONTAINERS && !known.contains_key(id) {
            known.clear();
        }
        let of = known.entry(id.clone()).or_default();
        if let Some(ran) = of.iter_mut().find(|ran| ran.tty == tty && ran.command == command) {
            ran.order = order.try_clone().ok();
            return;
        }
        if of.len() >= COMMANDS {
            of.remove(0);
        }
        of.push(Ran { command, tty, order: None });
    }

    /// The container is gone.
    pub(crate) fn forget(&self, id: &ContainerId) {
        self.lock().remove(id);
    }
}

/// Of a container's OCI spec, what an exec needs when the filter is known: the profile is by far the most of it.
#[derive(Deserialize)]
struct Known {
    #[serde(default)]
    process: Option<Process>,
}

/// An [`ExecSpec`] with a filter that is JSON already: a thousand instructions.
fn order(process: Process, filter: Option<&[u8]>) -> Result<Vec<u8>, serde_json::Error> {
    let mut json = serde_json::to_vec(&ExecSpec { process, filter: None })?;
    if let Some(filter) = filter {
        json.truncate(json.len().saturating_sub(1));
        json.extend_from_slice(b",\"filter\":");
        json.extend_from_slice(filter);
        json.push(b'}');
    }
    Ok(json)
}

/// What ExecSync returns.
pub(crate) struct Output {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) code: i32,
}

/// ExecSync: runs a command to its end and collects its output. After `timeout` it is killed with all it started.
pub(crate) async fn sync(
    server: &Arc<Server>,
    id: &str,
    command: Vec<String>,
    timeout: Option<Duration>,
) -> Result<Output, Arc<Error>> {
    let (container, live) = running(server, id).await?;
    let text = command.join(" ");
    let mut running = start(server, &live, &container, command, false, false).await?;
    let budget = Budget::default();
    let (stdout, stderr) = (Sink::default(), Sink::default());
    let work = async {
        if let Ok(code) = tokio::time::timeout(AT_ONCE, running.handle.wait()).await {
            let code = code?;
            let ended = |fd: &mut Option<OwnedFd>, sink| fd.take_if(|fd| read_now(fd, &budget, sink)).is_some() || fd.is_none();
            if ended(&mut running.stdout, &stdout) & ended(&mut running.stderr, &stderr) {
                return Ok(code);
            }
        }
        let collecting = {
            let stdout = collect(running.stdout.take(), budget.clone(), stdout.clone());
            let stderr = collect(running.stderr.take(), budget, stderr.clone());
            async { tokio::join!(stdout, stderr) }
        };
        tokio::select! {
            biased;
            _ = collecting => {}
            code = wait_then_drain(&mut running.handle) => return code,
        }
        running.handle.wait().await
    };
    let ended = match timeout {
        Some(limit) => match tokio::time::timeout(limit, work).await {
            Ok(ended) => ended,
            Err(_) => {
                if let Err(error) = running.handle.kill().await {
                    tracing::debug!(error = %crate::error::text(&error), "killing a command that timed out");
                }
                let _ = tokio::time::timeout(Duration::from_secs(5), running.handle.wait()).await;
                return Err(Arc::new(Error::Timeout { command: text, seconds: limit.as_secs() }));
            }
        },
        None => work.await,
    };
    let code = ended?;
    Ok(Output { stdout: take(&stdout), stderr: take(&stderr), code })
}

/// The end of the command, and a little time for output that others hold open.
async fn wait_then_drain(handle: &mut ExecHandle) -> Result<i32, Error> {
    let code = handle.wait().await?;
    tokio::time::sleep(DRAIN).await;
    Ok(code)
}

#[derive(Clone)]
struct Budget(Arc<std::sync::atomic::AtomicUsize>);

impl Default for Budget {
    fn default() -> Self {
        Self(Arc::new(std::sync::atomic::AtomicUsize::new(OUTPUT_LIMIT)))
    }
}

type Sink = Arc<Mutex<Vec<u8>>>;

fn take(sink: &Sink) -> Vec<u8> {
    std::mem::take(&mut *sink.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Budget {
    /// Keeps of what was read as much as is still allowed.
    fn keep(&self, bytes: &[u8], sink: &Sink) {
        use std::sync::atomic::Ordering;
        let left = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| Some(left.saturating_sub(bytes.len())));
        let granted = left.unwrap_or(0).min(bytes.len());
        sink.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&bytes[..granted]);
    }
}

/// Reads what a pipe holds, without waiting. True: that was its end.
fn read_now(pipe: &OwnedFd, budget: &Budget, sink: &Sink) -> bool {
    if rustix::io::ioctl_fionbio(pipe, true).is_err() {
        return false;
    }
    let mut buffer = [0u8; 4096];
    loop {
        match rustix::io::retry_on_intr(|| rustix::io::read(pipe, &mut buffer)) {
            Ok(0) => return true,
            Ok(n) => budget.keep(&buffer[..n], sink),
            Err(_) => return false,
        }
    }
}

/// Reads a stream to its end; what is over the shared budget is read and thrown away.
async fn collect(fd: Option<OwnedFd>, budget: Budget, sink: Sink) {
    let Some(mut pipe) = fd.and_then(reader) else { return };
    let mut buffer = vec![0u8; 16 * 1024];
    loop {
        match pipe.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(n) => budget.keep(&buffer[..n], &sink),
        }
    }
}

/// The read end of a pipe, for async use.
pub(crate) fn reader(fd: OwnedFd) -> Option<pipe::Receiver> {
    pipe::Receiver::from_owned_fd(fd).inspect_err(|error| tracing::warn!(%error, "output of a command can not be read")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_with_a_filter_that_was_text_already_is_read_as_one_that_was_made_whole() {
        let process = Process { args: vec!["true".into()], ..Process::default() };
        let filter = berth_oci::seccomp::Filter { instructions: vec![(32, 0, 0, 4), (6, 1, 2, 0x7fff_0000)], flags: 2 };
        let text = serde_json::to_vec(&filter).expect("JSON");
        for (filter, text) in [(Some(filter), Some(text.as_slice())), (None, None)] {
            let read: ExecSpec = serde_json::from_slice(&order(process.clone(), text).expect("JSON")).expect("an order");
            assert_eq!(read, ExecSpec { process: process.clone(), filter });
        }
    }

    #[test]
    fn a_known_containers_process_is_read_past_everything_else() {
        let text = br#"{"ociVersion":"1","linux":{"seccomp":{"defaultAction":"SCMP_ACT_ERRNO"}},"process":{"args":["sleep"],"cwd":"/"}}"#;
        let known: Known = serde_json::from_slice(text).expect("read");
        assert_eq!(known.process.expect("a process").args, ["sleep"]);
    }
}
