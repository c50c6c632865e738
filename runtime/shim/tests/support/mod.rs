//! A shim under test: the built binary in a sandbox, spoken to over its real socket.
#![allow(dead_code, clippy::unwrap_used, reason = "each test file uses a part; a test panics")]

use std::collections::VecDeque;
use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use berth_linux::fdpass::{recv_with_fds, send_with_fds};
use berth_linux::memfd::sealed_memfd;
use berth_linux::pidfd::PidFd;
use berth_linux::process::{Executable, Spawn, pipe, spawn_exec};
use berth_oci::spec::{Linux, Mount, Namespace, NamespaceType, Process, Root, Spec};
use berth_shim::protocol::{
    CreateExt, Decoder, Event, ExecExt, ExecSpec, ExitRecord, Failure, FromShim, LogSpec, Ready, Reply, Request, SandboxConfig,
    ShimState, ToShim, VERSION, encode,
};
use berth_testkit::TempState;

/// Generous: the tests also run in a guest ten times slower than its host.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a shim.
pub struct Client {
    stream: UnixStream,
    decoder: Decoder,
    seq: u64,
    replies: VecDeque<(u64, Reply, Vec<OwnedFd>)>,
    pub events: VecDeque<Event>,
}

impl Client {
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).expect("connect to the shim");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream, decoder: Decoder::new(), seq: 0, replies: VecDeque::new(), events: VecDeque::new() }
    }

    /// Sends a request without waiting.
    pub fn send(&mut self, request: Request, fds: &[OwnedFd]) -> u64 {
        self.seq += 1;
        let bytes = encode(&ToShim { seq: self.seq, request }, fds.len()).unwrap();
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let sent = send_with_fds(self.stream.as_fd(), &bytes, &borrowed).unwrap();
        assert_eq!(sent, bytes.len());
        self.seq
    }

    /// Takes in one message; false at the end of the stream.
    fn receive(&mut self) -> bool {
        loop {
            if let Some((message, fds)) = self.decoder.next::<FromShim>().unwrap() {
                match message {
                    FromShim::Reply { seq, reply } => self.replies.push_back((seq, reply, fds)),
                    FromShim::Event(event) => self.events.push_back(event),
                }
                return true;
            }
            let mut buffer = [0; 4096];
            let (count, fds) = recv_with_fds(self.stream.as_fd(), &mut buffer, 253).expect("hear the shim in time");
            if count == 0 {
                return false;
            }
            self.decoder.push(&buffer[..count], fds);
        }
    }

    pub fn reply(&mut self, seq: u64) -> (Reply, Vec<OwnedFd>) {
        loop {
            if let Some(at) = self.replies.iter().position(|(other, ..)| *other == seq) {
                let (_, reply, fds) = self.replies.remove(at).unwrap();
                return (reply, fds);
            }
            assert!(self.receive(), "the shim hung up");
        }
    }

    /// A request of a later version.
    pub fn unknown_request(&mut self) -> Reply {
        self.seq += 1;
        let message = serde_json::json!({"seq": self.seq, "request": {"teleport": {"to": "mars"}}});
        let bytes = encode(&message, 0).unwrap();
        send_with_fds(self.stream.as_fd(), &bytes, &[]).unwrap();
        self.reply(self.seq).0
    }

    pub fn call(&mut self, request: Request, fds: &[OwnedFd]) -> (Reply, Vec<OwnedFd>) {
        let seq = self.send(request, fds);
        self.reply(seq)
    }

    /// A request that must succeed.
    pub fn ask(&mut self, request: Request) -> Reply {
        let text = format!("{request:?}");
        match self.call(request, &[]).0 {
            Reply::Error(failure) => panic!("{text}: {failure:?}"),
            reply => reply,
        }
    }

    /// A request that must fail.
    pub fn refused(&mut self, request: Request) -> Failure {
        let text = format!("{request:?}");
        match self.call(request, &[]).0 {
            Reply::Error(failure) => failure,
            reply => panic!("{text}: {reply:?}"),
        }
    }

    /// The next event that `wanted` takes; others stay.
    pub fn event<T>(&mut self, mut wanted: impl FnMut(&Event) -> Option<T>) -> T {
        let mut seen = 0;
        loop {
            while seen < self.events.len() {
                if let Some(value) = wanted(&self.events[seen]) {
                    self.events.remove(seen);
                    return value;
                }
                seen += 1;
            }
            let before = self.events.len();
            assert!(self.receive(), "the shim hung up");
            seen = seen.min(before);
        }
    }

    pub fn exited(&mut self, id: &str) -> ExitRecord {
        self.event(|event| match event {
            Event::Exited { id: other, exit } if other == id => Some(exit.clone()),
            _ => None,
        })
    }

    pub fn drained(&mut self, id: &str) {
        self.event(|event| matches!(event, Event::LogsDrained { id: other } if other == id).then_some(()))
    }

    pub fn exec_exited(&mut self, exec: &str) -> (i32, i32) {
        self.event(|event| match event {
            Event::ExecExited { id, code, signal, .. } if id == exec => Some((*code, *signal)),
            _ => None,
        })
    }

    pub fn state(&mut self) -> ShimState {
        match self.ask(Request::State) {
            Reply::State(state) => state,
            other => panic!("{other:?}"),
        }
    }

    pub fn create(&mut self, id: &str, spec: &Spec, ext: CreateExt) -> Result<i32, Failure> {
        self.create_with(id, spec, ext, Vec::new())
    }

    /// `fds` come behind the spec: their indexes begin with 1.
    pub fn create_with(&mut self, id: &str, spec: &Spec, ext: CreateExt, fds: Vec<OwnedFd>) -> Result<i32, Failure> {
        let mut all = vec![json_memfd(spec)];
        all.extend(fds);
        match self.call(Request::Create { id: id.to_owned(), ext }, &all).0 {
            Reply::Created { pid, .. } => Ok(pid),
            Reply::Error(failure) => Err(failure),
            other => panic!("{other:?}"),
        }
    }

    pub fn start(&mut self, id: &str) -> Result<(), Failure> {
        match self.call(Request::Start { id: id.to_owned() }, &[]).0 {
            Reply::Started { started_at_ns } => {
                assert!(started_at_ns > 0);
                Ok(())
            }
            Reply::Error(failure) => Err(failure),
            other => panic!("{other:?}"),
        }
    }

    /// Pid and streams (stdin, stdout, stderr, console) of a new exec.
    pub fn exec(&mut self, container: &str, id: &str, args: &[&str], ext: ExecExt) -> Result<ExecStreams, Failure> {
        let spec = ExecSpec { process: process(args, ext.tty), filter: None };
        let request = Request::Exec { container: container.to_owned(), id: id.to_owned(), ext };
        let (reply, fds) = self.call(request, &[json_memfd(&spec)]);
        let mut fds: Vec<Option<OwnedFd>> = fds.into_iter().map(Some).collect();
        match reply {
            Reply::Execed { pid, stdin, stdout, stderr, console } => {
                let [stdin, stdout, stderr, console] =
                    [stdin, stdout, stderr, console].map(|index| index.and_then(|index| fds[index as usize].take()));
                Ok(ExecStreams { pid, stdin, stdout, stderr, console })
            }
            Reply::Error(failure) => Err(failure),
            other => panic!("{other:?}"),
        }
    }
}

pub struct ExecStreams {
    pub pid: i32,
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    pub console: Option<OwnedFd>,
}

/// Everything until the end; a terminal ends with EIO. Bounded.
pub fn read_all(fd: OwnedFd) -> String {
    let mut text = Vec::new();
    read_until(&fd, &mut text, |_| false);
    String::from_utf8_lossy(&text).into_owned()
}

/// Reads until `enough` or the end.
pub fn read_until(fd: &OwnedFd, text: &mut Vec<u8>, enough: impl Fn(&[u8]) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !enough(text) {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = rustix::event::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut fds = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN)];
        let ready = rustix::event::poll(&mut fds, Some(&left)).unwrap();
        assert!(ready > 0, "no end in time after {:?}", String::from_utf8_lossy(text));
        let mut buffer = [0; 65536];
        match rustix::io::read(fd, &mut buffer) {
            Ok(0) | Err(rustix::io::Errno::IO) => return,
            Ok(count) => text.extend_from_slice(&buffer[..count]),
            Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

pub fn json_memfd<T: serde::Serialize>(value: &T) -> OwnedFd {
    sealed_memfd("test", &serde_json::to_vec(value).unwrap(), false).unwrap()
}

/// A running shim.
pub struct Shim {
    pub state: TempState,
    pub pid: i32,
    pub pidfd: PidFd,
    pub socket: PathBuf,
    pub runtime_dir: PathBuf,
    pub rootfs: PathBuf,
}

impl Shim {
    pub fn start() -> Self {
        Self::start_with(|_| {}).unwrap()
    }

    pub fn start_with(change: impl FnOnce(&mut SandboxConfig)) -> Result<Self, String> {
        let state = TempState::new();
        let runtime_dir = state.dir("sandbox");
        let rootfs = state.dir("rootfs");
        let socket = state.path().join("shim.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut config = SandboxConfig {
            version: VERSION,
            sandbox_id: "s1".to_owned(),
            runtime_dir: runtime_dir.clone(),
            cgroup: "/pod/s1".to_owned(),
            hostname: "the-pod".to_owned(),
            shm_size: 1 << 20,
            mount_label: String::new(),
            ..SandboxConfig::default()
        };
        change(&mut config);
        let (ready, ready_writer) = pipe().unwrap();
        let spawn = Spawn {
            exe: Executable::Path(shim_path()),
            argv: vec![c"berth-shim".to_owned(), CString::new(config.sandbox_id.clone()).unwrap()],
            envp: Vec::new(),
            fds: vec![(json_memfd(&config), 3), (listener.into(), 4), (ready_writer, 5)],
            cwd: None,
        };
        let (pid, pidfd) = spawn_exec(spawn).unwrap();
        let pidfd = PidFd::from(pidfd);
        let text = read_all(ready);
        match serde_json::from_str(&text) {
            Ok(Ready::Ok) => {}
            Ok(Ready::Failed(text)) => {
                assert!(pidfd.wait_ended(Some(PATIENCE)).unwrap());
                return Err(text);
            }
            Err(_) => panic!("the shim died: {text:?} {:?}", pidfd.wait(true)),
        }
        Ok(Self { state, pid: pid.as_raw_nonzero().get(), pidfd, socket, runtime_dir, rootfs })
    }

    /// A subscribed connection.
    pub fn client(&self) -> Client {
        let mut client = Client::connect(&self.socket);
        match client.ask(Request::Hello { version: VERSION }) {
            Reply::Hello { version: 1, pid, .. } => assert_eq!(pid, self.pid),
            other => panic!("{other:?}"),
        }
        client.ask(Request::Subscribe);
        client
    }

    pub fn make_rootfs(&self) {
        berth_testkit::rootfs::busybox_rootfs(&self.rootfs);
    }

    /// A spec that runs `args` in the root filesystem.
    pub fn spec(&self, args: &[&str]) -> Spec {
        let kinds = [NamespaceType::Mount, NamespaceType::Pid, NamespaceType::Network, NamespaceType::Ipc, NamespaceType::Uts];
        let mount = |destination: &str, kind: &str, options: &[&str]| Mount {
            destination: destination.to_owned(),
            kind: kind.to_owned(),
            source: kind.to_owned(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Mount::default()
        };
        Spec {
            oci_version: "1.2.0".to_owned(),
            process: Some(process(args, false)),
            root: Some(Root { path: self.rootfs.to_str().unwrap().to_owned(), readonly: false }),
            mounts: vec![
                mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
                mount("/dev", "tmpfs", &["nosuid", "mode=755", "size=65536k"]),
                mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
                mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev"]),
            ],
            linux: Linux {
                namespaces: kinds.into_iter().map(|kind| Namespace { kind, path: String::new() }).collect(),
                ..Linux::default()
            },
            ..Spec::default()
        }
    }

    /// What a container usually gets: a cgroup, a log, the pod's /dev/shm.
    pub fn ext(&self, id: &str) -> CreateExt {
        CreateExt {
            cgroup: format!("/pod/{id}"),
            log: Some(LogSpec { path: self.log_path(id), max_bytes: 0, max_files: 0 }),
            shm: true,
            ..CreateExt::default()
        }
    }

    pub fn log_path(&self, id: &str) -> PathBuf {
        self.state.path().join("logs").join(id).join("0.log")
    }

    /// Lines of a log: (stream, tag, content).
    pub fn log(&self, id: &str) -> Vec<(String, String, String)> {
        parse_log(&std::fs::read_to_string(self.log_path(id)).unwrap_or_default())
    }

    /// Creates and starts.
    pub fn run(&self, client: &mut Client, id: &str, args: &[&str]) -> i32 {
        let pid = client.create(id, &self.spec(args), self.ext(id)).unwrap();
        client.start(id).unwrap();
        pid
    }

    pub fn shut_down(&self, client: &mut Client) {
        client.ask(Request::Shutdown { force: true });
        assert!(self.pidfd.wait_ended(Some(PATIENCE)).unwrap(), "the shim has not ended");
    }
}

/// Lines of a log text: (stream, tag, content).
pub fn parse_log(text: &str) -> Vec<(String, String, String)> {
    text.lines()
        .map(|line| {
            let mut parts = line.splitn(4, ' ');
            let stamp = parts.next().unwrap();
            assert!(stamp.len() == 30 && stamp.ends_with('Z') && &stamp[10..11] == "T", "{line}");
            let mut next = || parts.next().unwrap_or_else(|| panic!("torn line {line:?}")).to_owned();
            (next(), next(), next())
        })
        .collect()
}

pub fn process(args: &[&str], terminal: bool) -> Process {
    Process {
        terminal,
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        env: vec!["PATH=/bin:/usr/bin".into()],
        cwd: "/".to_owned(),
        ..Process::default()
    }
}

/// Processes whose command line has this text in it.
pub fn processes_with(text: &str) -> Vec<i32> {
    let own = std::process::id() as i32;
    let mut pids = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let mut line = Vec::new();
        if pid != own
            && File::open(entry.path().join("cmdline")).and_then(|mut file| file.read_to_end(&mut line)).is_ok()
            && String::from_utf8_lossy(&line).contains(text)
        {
            pids.push(pid);
        }
    }
    pids
}

/// Children of a process, by name.
pub fn children_named(parent: i32, name: &str) -> Vec<i32> {
    let mut pids = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        let (front, back) = stat.rsplit_once(')').unwrap();
        let comm = front.split_once('(').unwrap().1;
        if comm == name && back.split_whitespace().nth(1) == Some(&parent.to_string()) {
            pids.push(pid);
        }
    }
    pids
}

/// The shim of this build, or the one that `BERTH_SHIM` names.
fn shim_path() -> CString {
    let named = std::env::var("BERTH_SHIM").ok();
    CString::new(named.unwrap_or_else(|| env!("CARGO_BIN_EXE_berth-shim").to_owned())).unwrap()
}
