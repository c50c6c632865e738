//! One client with pods of its own: does something at random, insists until it is done, and checks everything it sees.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use berth_cri_api::MAX_MESSAGE_BYTES;
use berth_cri_api::v1;
use berth_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use berth_e2e::image::BUSYBOX_IMAGE;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use crate::eyes;
use crate::model::{Container, Pod, PodPromise, Program, Promise, Seen, check};
use crate::random::Random;

/// How long one operation may be insisted on. Agents come and go meanwhile.
const INSIST: Duration = Duration::from_secs(60);
/// An operation that took longer is named in the output, as a hint for whoever reads of a failure.
const SLOW: Duration = Duration::from_secs(3);
/// How long the death of a shim may take to show.
const SHOWS: Duration = Duration::from_secs(20);
const MOST_PODS: usize = 3;
const MOST_CONTAINERS: usize = 4;
const LABEL: &str = "chaos-client";

/// What clients and killers share.
pub struct Shared {
    socket: PathBuf,
    /// Operations to be done.
    pub goal: u64,
    pub done: AtomicU64,
    /// Calls that a client gave up and asked again.
    pub cut: AtomicU64,
    /// Restarts of the agent so far.
    pub restarts: AtomicU64,
    doomed: Mutex<BTreeSet<String>>,
    failed: AtomicBool,
    until: Instant,
}

impl Shared {
    pub fn new(socket: PathBuf, goal: u64, until: Instant) -> Self {
        let (done, cut, restarts) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        Self { socket, goal, done, cut, restarts, doomed: Mutex::default(), failed: AtomicBool::new(false), until }
    }

    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Acquire)
    }

    /// A client has failed: nothing more will come.
    pub fn stuck(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Said before a shim is killed.
    pub fn killed(&self, sandbox: &str) {
        self.doomed.lock().unwrap().insert(sandbox.to_owned());
    }

    fn is_doomed(&self, sandbox: &str) -> bool {
        self.doomed.lock().unwrap().contains(sandbox)
    }
}

type Failure = String;

/// What insisting led to.
enum Insisted<T> {
    Done(T),
    /// The shim of the pod was killed and the call says so.
    Doomed,
}

pub struct Client {
    number: u64,
    seed: u64,
    random: Random,
    shared: Arc<Shared>,
    logs: PathBuf,
    /// By sandbox id.
    pods: BTreeMap<String, Pod>,
    named: u64,
}

/// Whether the call may have been done or not: the agent died, or the client gave up.
fn is_lost(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Cancelled)
        || matches!(status.code(), Code::Unknown | Code::Internal)
            && (status.message().contains("transport") || status.message().contains("h2 protocol"))
}

/// A connection of its own for each call: what one agent leaves of a connection is not the next one's.
async fn connect(path: PathBuf) -> Result<RuntimeServiceClient<Channel>, Status> {
    let socket = tower::service_fn(move |_| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://localhost").connect_with_connector(socket).await;
    let channel = channel.map_err(|error| Status::unavailable(format!("connect: {error}")))?;
    Ok(RuntimeServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
}

/// The end of a long text.
fn last(text: &str) -> &str {
    &text[text.len().saturating_sub(400)..]
}

impl Client {
    pub fn new(number: u64, seed: u64, shared: Arc<Shared>, logs: PathBuf) -> Self {
        Self { number, seed, random: Random::new(seed, number), shared, logs, pods: BTreeMap::new(), named: 0 }
    }

    /// Works until all operations are done, then removes everything.
    pub async fn work(mut self) -> Result<(), Failure> {
        let result = self.everything().await.map_err(|failure| format!("client {}: {failure}", self.number));
        if result.is_err() {
            self.shared.failed.store(true, Ordering::Release);
        }
        result
    }

    async fn everything(&mut self) -> Result<(), Failure> {
        while self.shared.done() < self.shared.goal && !self.shared.stuck() && Instant::now() < self.shared.until {
            self.one().await?;
            self.shared.done.fetch_add(1, Ordering::AcqRel);
            self.verify().await?;
        }
        for id in self.pods.keys().cloned().collect::<Vec<_>>() {
            if self.random.below(2) == 0 {
                self.stop_pod(&id).await?;
            }
            self.remove_pod(&id).await?;
        }
        let list = self.sandboxes().await?;
        if list.is_empty() { Ok(()) } else { Err(format!("removed and still listed: {list:?}")) }
    }

    async fn one(&mut self) -> Result<(), Failure> {
        let pods: Vec<String> = self.pods.keys().cloned().collect();
        let Some(pod) = self.random.pick(&pods).cloned() else { return self.run_pod().await };
        let containers: Vec<String> = self.pods[&pod].containers.keys().cloned().collect();
        let container = self.random.pick(&containers).cloned();
        let ready = self.pods[&pod].promise == PodPromise::Ready;
        match (self.random.below(20), container) {
            (0..=2, _) if pods.len() < MOST_PODS => self.run_pod().await,
            (3..=7, _) | (8.., None) if ready && containers.len() < MOST_CONTAINERS => self.create(&pod).await,
            (8..=11, Some(container)) if ready => self.start(&pod, &container).await,
            (12..=13, Some(container)) if ready => self.exec(&pod, &container).await,
            (14, Some(container)) => self.stop(&pod, &container).await,
            (15, Some(container)) => self.remove(&pod, &container).await,
            (16, _) => self.stop_pod(&pod).await,
            (17, _) => self.remove_pod(&pod).await,
            (18, _) => self.stats().await,
            _ => self.sandboxes().await.map(|_| ()),
        }
    }

    /// Calls until there is an answer that is not "the agent went away"; one time in four the first call is given up early.
    async fn insist<T, F>(
        &mut self,
        what: &str,
        pod: Option<&str>,
        call: impl Fn(RuntimeServiceClient<Channel>) -> F,
    ) -> Result<Insisted<T>, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let begun = Instant::now();
        let mut early = (self.random.below(4) == 0).then(|| Duration::from_micros(self.random.below(20_000)));
        let mut texts: Vec<String> = Vec::new();
        loop {
            let limit = early.take().unwrap_or(INSIST);
            let cut = limit < INSIST;
            let path = self.shared.socket.clone();
            let answer = tokio::time::timeout(limit, async { call(connect(path).await?).await }).await;
            match answer {
                Ok(Ok(response)) => {
                    if begun.elapsed() > SLOW {
                        println!("SLOW {what} of {pod:?}: {} ms, after {} tries", begun.elapsed().as_millis(), texts.len());
                    }
                    return Ok(Insisted::Done(response.into_inner()));
                }
                Err(_) if cut => {
                    self.shared.cut.fetch_add(1, Ordering::AcqRel);
                    texts.push("given up".into());
                    continue;
                }
                Err(_) => {
                    let connections = eyes::connections(&self.shared.socket);
                    return Err(format!("{what}: no answer in {} s (before: {texts:?})\n{connections}", INSIST.as_secs()));
                }
                Ok(Err(status)) => {
                    texts.push(format!("{:?} {}", status.code(), status.message()));
                    let doomed = pod.is_some_and(|id| self.shared.is_doomed(id));
                    if doomed && (status.code() != Code::Unavailable || status.message().contains("shim")) {
                        return Ok(Insisted::Doomed);
                    }
                    if !is_lost(&status) {
                        return Err(format!("{what}: {texts:?}"));
                    }
                }
            }
            if begun.elapsed() > INSIST {
                return Err(format!("{what}: not done in {} s: {texts:?}", INSIST.as_secs()));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn name(&mut self, kind: &str) -> String {
        self.named += 1;
        format!("{kind}-{}-{}", self.number, self.named)
    }

    async fn run_pod(&mut self) -> Result<(), Failure> {
        let name = self.name("pod");
        // crictl's shape, with a pause, and the kubelet's.
        let pid = if self.random.below(3) == 0 { v1::NamespaceMode::Pod } else { v1::NamespaceMode::Container };
        let options = v1::NamespaceOption { pid: pid.into(), ..Default::default() };
        let config = v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.clone(),
                uid: name.clone(),
                namespace: "chaos".into(),
                attempt: 0,
            }),
            log_directory: self.logs.join(&name).to_string_lossy().into_owned(),
            labels: HashMap::from([(LABEL.into(), self.number.to_string())]),
            linux: Some(v1::LinuxPodSandboxConfig {
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let begun = Instant::now();
        let id = loop {
            let request = v1::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
            let call = |mut runtime: RuntimeServiceClient<Channel>| {
                let request = request.clone();
                async move { runtime.run_pod_sandbox(request).await }
            };
            match self.insist("RunPodSandbox", None, call).await {
                Ok(Insisted::Done(answer)) => break answer.pod_sandbox_id,
                // Its shim was killed while it was made: nobody can say whose it was. Asked again, it is made anew, or the dead
                // one of the name is there and has to go first.
                Ok(Insisted::Doomed) => {}
                Err(failure) if failure.contains("AlreadyExists") => {
                    let dead = self.listed().await?.into_iter().find(|s| s.metadata.as_ref().is_some_and(|m| m.name == name));
                    let Some(dead) = dead.clone().filter(|s| self.shared.is_doomed(&s.id)) else {
                        return Err(format!("the name {name} is taken by {dead:?}: {}", last(&failure)));
                    };
                    self.pods.insert(dead.id.clone(), Self::pod(&name));
                    return Ok(());
                }
                Err(failure) if failure.contains("shim") && begun.elapsed() < INSIST => {}
                Err(failure) => return Err(failure),
            }
        };
        self.pods.insert(id, Self::pod(&name));
        Ok(())
    }

    fn pod(name: &str) -> Pod {
        Pod { name: name.to_owned(), promise: PodPromise::Ready, containers: BTreeMap::new(), doubtful: Vec::new() }
    }

    async fn create(&mut self, pod: &str) -> Result<(), Failure> {
        let name = self.name("c");
        let marker = format!("chaos-{}-{name}", self.seed);
        let code = i32::try_from(1 + self.random.below(90)).unwrap();
        let (program, script) = match self.random.below(3) {
            0 => (Program::Sleeps, "trap '' TERM; while :; do sleep 1; done".to_owned()),
            1 => (Program::Ends(code), format!("usleep {}; exit {code}", self.random.below(400_000))),
            _ => (Program::Obeys(code), format!("trap 'exit {code}' TERM; while :; do sleep 0.1; done")),
        };
        let options = v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..Default::default() };
        let config = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: name.clone(), attempt: 0 }),
            image: Some(v1::ImageSpec { image: BUSYBOX_IMAGE.into(), ..Default::default() }),
            command: ["sh", "-c", script.as_str(), marker.as_str()].map(str::to_owned).to_vec(),
            labels: HashMap::from([(LABEL.into(), self.number.to_string())]),
            log_path: format!("{name}.log"),
            linux: Some(v1::LinuxContainerConfig {
                security_context: Some(v1::LinuxContainerSecurityContext {
                    namespace_options: Some(options),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request = v1::CreateContainerRequest { pod_sandbox_id: pod.to_owned(), config: Some(config), sandbox_config: None };
        let call = |mut runtime: RuntimeServiceClient<Channel>| {
            let request = request.clone();
            async move { runtime.create_container(request).await }
        };
        let created = self.insist("CreateContainer", Some(pod), call).await?;
        let Some(pod) = self.pods.get_mut(pod) else { return Ok(()) };
        match created {
            Insisted::Done(answer) => {
                let container = Container { marker, program, promise: Promise::Created };
                if pod.containers.insert(answer.container_id, container).is_some() {
                    return Err("two containers have one id".into());
                }
            }
            Insisted::Doomed => pod.doubtful.push(name),
        }
        Ok(())
    }

    async fn start(&mut self, pod: &str, id: &str) -> Result<(), Failure> {
        if self.pods[pod].containers[id].promise != Promise::Created {
            return Ok(());
        }
        let request = v1::StartContainerRequest { container_id: id.to_owned() };
        let call = |mut runtime: RuntimeServiceClient<Channel>| {
            let request = request.clone();
            async move { runtime.start_container(request).await }
        };
        match self.insist("StartContainer", Some(pod), call).await {
            Ok(Insisted::Done(_)) => {}
            Ok(Insisted::Doomed) => {
                // Started or not: its end is the pod's.
                self.promise(pod, id, Promise::Removing);
                return Ok(());
            }
            // An earlier call had started it, and its answer was lost.
            Err(failure) if failure.contains("FailedPrecondition") && failure.contains("[\"") => {
                let state = self.seen(id).await?.map(|s| s.state);
                let started = [v1::ContainerState::ContainerRunning, v1::ContainerState::ContainerExited];
                if !state.is_some_and(|s| started.contains(&s)) {
                    return Err(format!("{failure}, and it is {state:?}"));
                }
            }
            Err(failure) => return Err(failure),
        }
        self.promise(pod, id, Promise::Started);
        Ok(())
    }

    fn promise(&mut self, pod: &str, id: &str, promise: Promise) {
        if let Some(container) = self.pods.get_mut(pod).and_then(|p| p.containers.get_mut(id)) {
            container.promise = container.promise.max(promise);
        }
    }

    async fn exec(&mut self, pod: &str, id: &str) -> Result<(), Failure> {
        let container = &self.pods[pod].containers[id];
        if container.promise != Promise::Started || matches!(container.program, Program::Ends(_)) {
            return Ok(());
        }
        let word = format!("word-{}", self.random.next());
        let command = ["sh", "-c", &format!("echo {word}; exit 5")].map(str::to_owned).to_vec();
        let request = v1::ExecSyncRequest { container_id: id.to_owned(), cmd: command, timeout: 30 };
        let call = |mut runtime: RuntimeServiceClient<Channel>| {
            let request = request.clone();
            async move { runtime.exec_sync(request).await }
        };
        let Insisted::Done(answer) = self.insist("ExecSync", Some(pod), call).await? else { return Ok(()) };
        let output = String::from_utf8_lossy(&answer.stdout).into_owned();
        // Killed with the shim, it may have been cut off.
        let whole = answer.exit_code == 5 && output == format!("{word}\n");
        if whole || self.shared.is_doomed(pod) { Ok(()) } else { Err(format!("ExecSync: {} {output:?}", answer.exit_code)) }
    }

    async fn stop(&mut self, pod: &str, id: &str) -> Result<(), Failure> {
        let timeout = i64::try_from(self.random.below(2)).unwrap();
        // Of one whose start was cut off with its shim nobody can say; stopping what was only created changes nothing.
        let started = matches!(self.pods[pod].containers[id].promise, Promise::Started | Promise::Stopped);
        if started {
            self.promise(pod, id, Promise::Stopped);
        }
        let request = v1::StopContainerRequest { container_id: id.to_owned(), timeout };
        let call = |mut runtime: RuntimeServiceClient<Channel>| {
            let request = request.clone();
            async move { runtime.stop_container(request).await }
        };
        let stopped = self.insist("StopContainer", Some(pod), call).await?;
        let seen = self.seen(id).await?;
        let ended = seen.as_ref().is_none_or(|s| s.state == v1::ContainerState::ContainerExited);
        if started && !ended && matches!(stopped, Insisted::Done(_)) {
            return Err(format!("StopContainer was answered and {id} is {seen:?}"));
        }
        Ok(())
    }

    async fn remove(&mut self, pod: &str, id: &str) -> Result<(), Failure> {
        self.promise(pod, id, Promise::Removing);
        let request = v1::RemoveContainerRequest { container_id: id.to_owned() };
        let call = |mut runtime: RuntimeServiceClient<Channel>| {
            let request = request.clone();
            async move { runtime.remove_container(request).await }
        };
        if matches!(self.insist("RemoveContainer", Some(pod), call).await?, Insisted::Doomed) {
            return Ok(());
        }
        let container = self.pods.get_mut(pod).and_then(|p| p.containers.remove(id)).unwrap();
        match (self.seen(id).await?, eyes::marked(&container.marker)) {
            (None, 0) => Ok(()),
            (seen, running) => Err(format!("{id} is removed and {seen:?} with {running} processes")),
        }
    }

    async fn stop_pod(&mut self, pod: &str) -> Result<(), Failure> {
        let promise = &mut self.pods.get_mut(pod).unwrap().promise;
        *promise = (*promise).max(PodPromise::Stopping);
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: pod.to_owned() };
        let call = |mut runtime: RuntimeServiceClient<Channel>| {
            let request = request.clone();
            async move { runtime.stop_pod_sandbox(request).await }
        };
        self.finish("StopPodSandbox", call).await?;
        let promise = &mut self.pods.get_mut(pod).unwrap().promise;
        *promise = (*promise).max(PodPromise::Stopped);
        Ok(())
    }

    async fn remove_pod(&mut self, pod: &str) -> Result<(), Failure> {
        self.pods.get_mut(pod).unwrap().promise = PodPromise::Removing;
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: pod.to_owned() };
        let call = |mut runtime: RuntimeServiceClient<Channel>| {
            let request = request.clone();
            async move { runtime.remove_pod_sandbox(request).await }
        };
        self.finish("RemovePodSandbox", call).await?;
        let gone = self.pods.remove(pod).unwrap();
        let running: usize = gone.containers.values().map(|c| eyes::marked(&c.marker)).sum();
        if running == 0 { Ok(()) } else { Err(format!("pod {pod} is removed and {running} of its processes run")) }
    }

    /// Stopping and removing a pod always succeed in the end, also after the death of its shim.
    async fn finish<T, F>(&mut self, what: &str, call: impl Fn(RuntimeServiceClient<Channel>) -> F) -> Result<(), Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.insist(what, None, call).await.map(|_| ())
    }

    async fn stats(&mut self) -> Result<(), Failure> {
        let request = v1::ListContainerStatsRequest::default();
        let call = |mut runtime: RuntimeServiceClient<Channel>| {
            let request = request.clone();
            async move { runtime.list_container_stats(request).await }
        };
        self.finish("ListContainerStats", call).await
    }

    fn labels(&self) -> HashMap<String, String> {
        HashMap::from([(LABEL.into(), self.number.to_string())])
    }

    async fn listed(&mut self) -> Result<Vec<v1::PodSandbox>, Failure> {
        let filter = v1::PodSandboxFilter { label_selector: self.labels(), ..Default::default() };
        let request = v1::ListPodSandboxRequest { filter: Some(filter) };
        let call = |mut runtime: RuntimeServiceClient<Channel>| {
            let request = request.clone();
            async move { runtime.list_pod_sandbox(request).await }
        };
        match self.insist("ListPodSandbox", None, call).await? {
            Insisted::Done(answer) => Ok(answer.items),
            Insisted::Doomed => Ok(Vec::new()),
        }
    }

    /// The client's sandboxes with their states.
    async fn sandboxes(&mut self) -> Result<BTreeMap<String, bool>, Failure> {
        let ready = v1::PodSandboxState::SandboxReady;
        Ok(self.listed().await?.into_iter().map(|s| (s.id.clone(), s.state() == ready)).collect())
    }

    async fn seen(&mut self, id: &str) -> Result<Option<Seen>, Failure> {
        let request = v1::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let call = |mut runtime: RuntimeServiceClient<Channel>| {
            let request = request.clone();
            async move { runtime.container_status(request).await }
        };
        match self.insist("ContainerStatus", None, call).await {
            Ok(Insisted::Done(answer)) => {
                Ok(answer.status.map(|s| Seen { state: s.state(), exit_code: s.exit_code, reason: s.reason }))
            }
            Err(failure) if failure.contains("NotFound") => Ok(None),
            Ok(Insisted::Doomed) => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// Everything that was promised is there, as promised, once; and nothing else is.
    async fn verify(&mut self) -> Result<(), Failure> {
        let begun = Instant::now();
        loop {
            let looked = self.look().await;
            let settling = self.pods.keys().any(|id| self.shared.is_doomed(id));
            match looked {
                // The death of a shim shows a little later.
                Err(_) if settling && begun.elapsed() < SHOWS => tokio::time::sleep(Duration::from_millis(20)).await,
                other => return other,
            }
        }
    }

    async fn look(&mut self) -> Result<(), Failure> {
        let sandboxes = self.sandboxes().await?;
        for (id, pod) in &self.pods {
            let doomed = self.shared.is_doomed(id);
            match (pod.promise, sandboxes.get(id)) {
                (PodPromise::Ready, Some(true)) if !doomed => {}
                (PodPromise::Ready | PodPromise::Stopping, Some(false)) if doomed => {}
                (PodPromise::Stopping, Some(_)) | (PodPromise::Stopped, Some(false)) | (PodPromise::Removing, _) => {}
                (promise, seen) => {
                    return Err(format!("pod {} {id} is {promise:?} and ready: {seen:?} (doomed {doomed})", pod.name));
                }
            }
        }
        if let Some(ghost) = sandboxes.keys().find(|id| !self.pods.contains_key(*id)) {
            return Err(format!("sandbox {ghost} is nobody's"));
        }
        let filter = v1::ContainerFilter { label_selector: self.labels(), ..Default::default() };
        let request = v1::ListContainersRequest { filter: Some(filter) };
        let call = |mut runtime: RuntimeServiceClient<Channel>| {
            let request = request.clone();
            async move { runtime.list_containers(request).await }
        };
        let Insisted::Done(list) = self.insist("ListContainers", None, call).await? else { return Ok(()) };
        let listed: BTreeMap<String, v1::Container> = list.containers.into_iter().map(|c| (c.id.clone(), c)).collect();
        for (id, container) in &listed {
            let name = container.metadata.as_ref().map_or("", |m| m.name.as_str());
            let known = self.pods.values().any(|p| p.containers.contains_key(id) || p.doubtful.iter().any(|n| n == name));
            if !known {
                return Err(format!("container {name} {id} is nobody's"));
            }
        }
        for (pod_id, pod) in self.pods.clone() {
            let doomed = self.shared.is_doomed(&pod_id);
            for (id, container) in &pod.containers {
                let there = listed.contains_key(id);
                if !there && container.promise != Promise::Removing && pod.promise != PodPromise::Removing {
                    return Err(format!("{container:?} {id} is lost"));
                }
                let Some(seen) = self.seen(id).await? else { continue };
                check(container, &pod, &seen, doomed)?;
                self.count(&pod_id, container, &seen)?;
            }
        }
        Ok(())
    }

    /// Processes of a container: one while it runs, none before and after.
    fn count(&self, pod: &str, container: &Container, seen: &Seen) -> Result<(), Failure> {
        let running = eyes::marked(&container.marker);
        let most = match seen.state {
            // Forks of the shell have its words.
            v1::ContainerState::ContainerRunning => 2,
            _ => 0,
        };
        let runs = container.program == Program::Sleeps && seen.state == v1::ContainerState::ContainerRunning;
        // Asked last: whoever kills the shim says so before.
        if running > most || runs && running == 0 && !self.shared.is_doomed(pod) {
            return Err(format!("{container:?} is {seen:?} with {running} processes"));
        }
        Ok(())
    }
}
