//! How plugins become part of the runtime: the socket, the registration, the synchronization. And the runtime's handle on them.

use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use prost::Message;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::api::{
    Container, Empty, Event, LinuxResources, PodSandbox, RegisterPluginRequest, UpdateContainersRequest,
    UpdateContainersResponse, UpdatePodSandboxRequest,
};
use crate::gate::{Gate, Pass};
use crate::launch::{self, Child, Installed};
use crate::plugin::Plugin;
use crate::relay::{Ask, Created, Relay, Updated};
use crate::wire::{self, Answer, Connection, Service, Status};
use crate::{Config, Error, Runtime};

/// How long the operations under way may take to end when a plugin wants to join, before new ones are let in again.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often it is tried. With the pauses between (one second, two, at last five each) that is more than a minute: an operation that
/// hangs for so long does not hold all others up meanwhile.
const TRIES: u32 = 15;
/// The longest pause, as a multiple of [`PATIENCE`].
const LONGEST_PAUSE: u32 = 5;

/// The plugins, as the runtime sees them. Cheap to ask when there are none.
pub struct Nri {
    config: Config,
    mail: mpsc::UnboundedSender<Ask>,
    /// Until it is started.
    inbox: Mutex<Option<mpsc::UnboundedReceiver<Ask>>>,
    active: Arc<AtomicBool>,
    gate: Gate,
    stop: CancellationToken,
}

impl Nri {
    /// Not started yet: nobody can join.
    #[must_use]
    pub fn new(config: Config) -> Self {
        let (mail, inbox) = mpsc::unbounded_channel();
        Self {
            config,
            mail,
            inbox: Mutex::new(Some(inbox)),
            active: Arc::default(),
            gate: Gate::default(),
            stop: CancellationToken::new(),
        }
    }

    /// Starts the installed plugins, waits for them, and lets others connect. Does nothing when it is disabled, or twice.
    ///
    /// # Errors
    /// When the socket can not be served, or a folder not be read. A plugin that fails is only warned of.
    pub async fn start(&self, runtime: Arc<dyn Runtime>) -> Result<(), Error> {
        let inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(inbox) = inbox.filter(|_| !self.config.disable) else { return Ok(()) };
        tokio::spawn(Relay::new(self.active.clone(), runtime.clone()).run(inbox));
        let door = Arc::new(Door {
            config: self.config.clone(),
            mail: self.mail.clone(),
            gate: self.gate.clone(),
            runtime,
            stop: self.stop.clone(),
        });
        for plugin in launch::installed(&self.config.plugin_path, &self.config.plugin_config_path)? {
            if let Err(error) = door.launch(&plugin).await {
                tracing::warn!(path = %plugin.path.display(), error = %text(&error), "NRI plugin");
            }
        }
        let listener = listen(&self.config.socket_path)?;
        tokio::spawn(door.serve(listener));
        Ok(())
    }

    /// Ends the plugins that we started and closes the connections of the others.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Whether there are plugins.
    #[must_use]
    pub fn active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    /// Begins an operation on a pod or container. The pass is kept until what came of it can be seen by others.
    pub async fn enter(&self) -> Option<Pass> {
        if self.config.disable { None } else { Some(self.gate.enter().await) }
    }

    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Ask) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.mail.send(ask(reply)).map_err(|_| Error::Closing)?;
        answer.await.map_err(|_| Error::Closing)?
    }

    /// Tells of a pod.
    ///
    /// # Errors
    /// What a plugin answered.
    pub async fn pod(&self, event: Event, pod: PodSandbox) -> Result<(), Error> {
        self.ask(|reply| Ask::Pod { event, pod: Box::new(pod), reply }).await
    }

    /// Tells of a pod whose limits are about to change.
    ///
    /// # Errors
    /// What a plugin answered.
    pub async fn update_pod(
        &self,
        pod: PodSandbox,
        overhead: Option<LinuxResources>,
        resources: Option<LinuxResources>,
    ) -> Result<(), Error> {
        let request = UpdatePodSandboxRequest { pod: Some(pod), overhead_linux_resources: overhead, linux_resources: resources };
        self.ask(|reply| Ask::UpdatePod { request: Box::new(request), reply }).await
    }

    /// Tells of a container.
    ///
    /// # Errors
    /// What a plugin answered.
    pub async fn container(&self, event: Event, pod: PodSandbox, container: Container) -> Result<(), Error> {
        self.ask(|reply| Ask::Container { event, pod: Box::new(pod), container: Box::new(container), reply }).await
    }

    /// Asks what is to be changed in a container that is about to be made.
    ///
    /// # Errors
    /// A plugin's error, a conflict of two, or a validator's no.
    pub async fn create(&self, pod: PodSandbox, container: Container) -> Result<Created, Error> {
        self.ask(|reply| Ask::Create { pod: Box::new(pod), container: Box::new(container), reply }).await
    }

    /// Asks what is to be changed in limits that are about to be applied.
    ///
    /// # Errors
    /// A plugin's error, or a conflict of two.
    pub async fn update(&self, pod: PodSandbox, container: Container, resources: LinuxResources) -> Result<Updated, Error> {
        let (pod, container, resources) = (Box::new(pod), Box::new(container), Box::new(resources));
        self.ask(|reply| Ask::Update { pod, container, resources, reply }).await
    }

    /// Tells of a container that has ended. Later events are told after it.
    pub fn stopped(&self, pod: PodSandbox, container: Container) {
        let _ = self.mail.send(Ask::Stopped { pod: Box::new(pod), container: Box::new(container) });
    }
}

impl Drop for Nri {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn text(error: &dyn std::error::Error) -> String {
    let mut out = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        out.push_str(&format!(": {cause}"));
        next = cause.source();
    }
    out
}

/// The socket, in a folder for root only. A socket that somebody serves is left alone.
fn listen(path: &Path) -> Result<UnixListener, Error> {
    let failed = |action| move |source| Error::File { action, path: path.to_owned(), source };
    if let Some(folder) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed("create the folder of"))?;
    }
    if std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            let source = std::io::Error::new(std::io::ErrorKind::AddrInUse, "another runtime serves it");
            return Err(failed("serve")(source));
        }
        std::fs::remove_file(path).map_err(failed("remove the stale"))?;
    }
    UnixListener::bind(path).map_err(failed("serve"))
}

/// What the tasks that let plugins in need.
struct Door {
    config: Config,
    mail: mpsc::UnboundedSender<Ask>,
    gate: Gate,
    runtime: Arc<dyn Runtime>,
    stop: CancellationToken,
}

impl Door {
    async fn serve(self: Arc<Self>, listener: UnixListener) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.stop.cancelled() => return,
            };
            match accepted {
                Ok((stream, _)) => {
                    let door = self.clone();
                    tokio::spawn(async move {
                        if let Err(error) = door.admit(stream, None, None).await {
                            tracing::warn!(error = %text(&error), "NRI plugin");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting an NRI plugin");
                    tokio::time::sleep(PATIENCE).await; // Out of descriptors, most likely.
                }
            }
        }
    }

    async fn launch(&self, plugin: &Installed) -> Result<(), Error> {
        let (stream, child) = launch::start(plugin)?;
        self.admit(stream, Some(plugin), Some(child)).await
    }

    /// Registration, configuration, synchronization.
    async fn admit(&self, stream: UnixStream, installed: Option<&Installed>, child: Option<Child>) -> Result<(), Error> {
        let (named, name) = oneshot::channel();
        let service = Front {
            external: installed.is_none(),
            named: Mutex::new(Some(named)),
            is_named: AtomicBool::new(false),
            runtime: self.runtime.clone(),
        };
        let connection = Connection::new(stream, Arc::new(service));
        let nameless = |reason: &str| Error::Join {
            plugin: installed.map_or_else(|| "(not registered)".into(), |p| format!("{}-{}", p.index, p.base)),
            reason: reason.into(),
        };
        let closed = connection.closed().clone();
        let registered = tokio::select! {
            name = name => name.map_err(|_| nameless("it closed the connection"))?,
            () = closed.cancelled() => return Err(nameless("it closed the connection")),
            () = tokio::time::sleep(self.config.registration_timeout) => return Err(nameless("it did not register in time")),
        };
        // A started plugin has the name of its file, whatever it says.
        let name = installed.map_or(registered, |p| (p.index.clone(), p.base.clone()));
        let config = installed.map(|p| p.config.clone()).unwrap_or_default();
        let plugin = Plugin::configure(name, connection, child, config, &self.config).await?;
        let (mail, stop) = (self.mail.clone(), self.stop.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = closed.cancelled() => {}
                () = stop.cancelled() => closed.cancel(),
            }
            let _ = mail.send(Ask::Prune);
        });
        let name = plugin.name.clone();
        let updates = self.synchronize(plugin).await?;
        if !updates.is_empty() {
            let failed = self.runtime.change(updates, Vec::new()).await;
            if !failed.is_empty() {
                tracing::warn!(plugin = name, failed = failed.len(), "NRI: updates after the synchronization");
            }
        }
        Ok(())
    }

    async fn synchronize(&self, plugin: Plugin) -> Result<Vec<crate::api::ContainerUpdate>, Error> {
        let mut tries = 0;
        let _nobody = loop {
            // Operations that want to begin wait meanwhile: so not for long at once.
            if let Ok(closed) = tokio::time::timeout(PATIENCE, self.gate.close()).await {
                break closed;
            }
            tries += 1;
            if tries == TRIES {
                let reason = "an operation on a pod or container has not ended for a minute".into();
                return Err(Error::Join { plugin: plugin.name.clone(), reason });
            }
            tokio::time::sleep(PATIENCE * tries.min(LONGEST_PAUSE)).await;
        };
        let (reply, answer) = oneshot::channel();
        self.mail.send(Ask::Join { plugin: Box::new(plugin), reply }).map_err(|_| Error::Closing)?;
        answer.await.map_err(|_| Error::Closing)?
    }
}

/// What a plugin may call.
struct Front {
    /// Not started by us: it names itself.
    external: bool,
    named: Mutex<Option<oneshot::Sender<(String, String)>>>,
    is_named: AtomicBool,
    runtime: Arc<dyn Runtime>,
}

fn status(code: i32, message: impl Into<String>) -> Status {
    Status { code, message: message.into() }
}

impl Front {
    fn register(&self, payload: &[u8]) -> Answer {
        let bad = |message: String| status(wire::INVALID_ARGUMENT, message);
        let request = RegisterPluginRequest::decode(payload).map_err(|e| bad(e.to_string()))?;
        let named = self.named.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(named) = named else { return Err(status(wire::FAILED_PRECONDITION, "it has registered already")) };
        if self.external && !launch::is_index(&request.plugin_idx) {
            return Err(bad(format!("plugin index {:?} is not two digits", request.plugin_idx)));
        }
        if self.external && !launch::is_base(&request.plugin_name) {
            return Err(bad(format!("plugin name {:?} is not valid", request.plugin_name)));
        }
        self.is_named.store(true, Ordering::Release);
        let _ = named.send((request.plugin_idx, request.plugin_name));
        Ok(Empty {}.encode_to_vec())
    }
}

impl Service for Front {
    fn call(&self, service: String, method: String, payload: Vec<u8>) -> BoxFuture<'static, Answer> {
        let answer = match (service.as_str(), method.as_str()) {
            ("nri.pkg.api.v1alpha1.Runtime", "RegisterPlugin") => self.register(&payload),
            ("nri.pkg.api.v1alpha1.Runtime", "UpdateContainers") => {
                if !self.is_named.load(Ordering::Acquire) {
                    return Box::pin(async { Err(status(wire::FAILED_PRECONDITION, "it has not registered")) });
                }
                match UpdateContainersRequest::decode(payload.as_slice()) {
                    Ok(request) => {
                        let change = self.runtime.change(request.update, request.evict);
                        return Box::pin(async { Ok(UpdateContainersResponse { failed: change.await }.encode_to_vec()) });
                    }
                    Err(error) => Err(status(wire::INVALID_ARGUMENT, error.to_string())),
                }
            }
            _ => Err(status(wire::UNIMPLEMENTED, format!("{service}/{method} is not a call of this runtime"))),
        };
        Box::pin(std::future::ready(answer))
    }
}
