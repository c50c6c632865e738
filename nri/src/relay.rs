//! The relay: one task that owns the plugins and tells them, one event after the other and in the order of their indexes. A
//! plugin that does not answer in time is closed, and what was asked goes on without it.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use prost::Message;
use tokio::sync::{mpsc, oneshot};

use crate::adjust::{Change, Creation};
use crate::api::{
    Container, ContainerAdjustment, ContainerEviction, ContainerUpdate, CreateContainerRequest, CreateContainerResponse, Empty,
    Event, LinuxResources, PluginInstance, PodSandbox, PostStartContainerRequest, RunPodSandboxRequest, StopContainerRequest,
    StopContainerResponse, UpdateContainerRequest, UpdateContainerResponse, UpdatePodSandboxRequest,
    ValidateContainerAdjustmentRequest, ValidateContainerAdjustmentResponse,
};
use crate::plugin::Plugin;
use crate::{Error, Runtime};

/// What plugins want of a container that is being made.
#[derive(Debug, Default)]
pub struct Created {
    /// Changes of the container itself, merged.
    pub adjust: ContainerAdjustment,
    /// Changes of others.
    pub updates: Vec<ContainerUpdate>,
    /// Containers to be ended.
    pub evictions: Vec<ContainerEviction>,
}

/// What plugins want instead of the limits that were asked for.
#[derive(Debug, Default)]
pub struct Updated {
    /// The limits, merged.
    pub resources: LinuxResources,
    /// Changes of others.
    pub updates: Vec<ContainerUpdate>,
    /// Containers to be ended.
    pub evictions: Vec<ContainerEviction>,
}

type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What the relay is asked.
pub(crate) enum Ask {
    /// Something happens to a pod.
    Pod { event: Event, pod: Box<PodSandbox>, reply: Reply<()> },
    /// A pod's limits are about to change.
    UpdatePod { request: Box<UpdatePodSandboxRequest>, reply: Reply<()> },
    /// Something happens to a container.
    Container { event: Event, pod: Box<PodSandbox>, container: Box<Container>, reply: Reply<()> },
    /// A container is about to be made.
    Create { pod: Box<PodSandbox>, container: Box<Container>, reply: Reply<Created> },
    /// A container's limits are about to change.
    Update { pod: Box<PodSandbox>, container: Box<Container>, resources: Box<LinuxResources>, reply: Reply<Updated> },
    /// A container has ended: told once, whoever notices.
    Stopped { pod: Box<PodSandbox>, container: Box<Container> },
    /// A plugin wants to be one of them.
    Join { plugin: Box<Plugin>, reply: Reply<Vec<ContainerUpdate>> },
    /// A plugin may be gone.
    Prune,
}

/// The relay's state.
pub(crate) struct Relay {
    plugins: Vec<Plugin>,
    active: Arc<AtomicBool>,
    runtime: Arc<dyn Runtime>,
    /// Containers and pods whose end was told already.
    ended: HashSet<String>,
}

/// The call of an event that only tells.
fn call_of(event: Event) -> &'static str {
    match event {
        Event::RunPodSandbox => "RunPodSandbox",
        Event::StopPodSandbox => "StopPodSandbox",
        Event::RemovePodSandbox => "RemovePodSandbox",
        Event::PostUpdatePodSandbox => "PostUpdatePodSandbox",
        Event::PostCreateContainer => "PostCreateContainer",
        Event::StartContainer => "StartContainer",
        Event::PostStartContainer => "PostStartContainer",
        Event::PostUpdateContainer => "PostUpdateContainer",
        Event::RemoveContainer => "RemoveContainer",
        _ => "StateChange",
    }
}

/// Whether a plugin's error ends the matter at once: what is refused need not be told to the others.
fn can_be_refused(event: Event) -> bool {
    matches!(event, Event::RunPodSandbox | Event::StartContainer | Event::UpdatePodSandbox)
}

impl Relay {
    pub(crate) fn new(active: Arc<AtomicBool>, runtime: Arc<dyn Runtime>) -> Self {
        Self { plugins: Vec::new(), active, runtime, ended: HashSet::new() }
    }

    /// Answers until nobody can ask any more.
    pub(crate) async fn run(mut self, mut mail: mpsc::UnboundedReceiver<Ask>) {
        while let Some(ask) = mail.recv().await {
            self.prune();
            self.answer(ask).await;
            self.prune();
        }
        self.active.store(false, Ordering::Release);
    }

    fn prune(&mut self) {
        self.plugins.retain(|plugin| !plugin.closed().is_cancelled());
        if self.plugins.is_empty() {
            self.ended.clear();
        }
        self.active.store(!self.plugins.is_empty(), Ordering::Release);
    }

    async fn answer(&mut self, ask: Ask) {
        match ask {
            Ask::Pod { event, pod, reply } => {
                let _ = reply.send(self.pod(event, &pod).await);
            }
            Ask::UpdatePod { request, reply } => {
                let pod = request.pod.clone().unwrap_or_default();
                let _ = reply.send(self.tell(Event::UpdatePodSandbox, "UpdatePodSandbox", &*request, &pod, None).await);
            }
            Ask::Container { event, pod, container, reply } => {
                let _ = reply.send(self.container(event, &pod, &container).await);
            }
            Ask::Create { pod, container, reply } => {
                let _ = reply.send(self.create(*pod, *container).await);
            }
            Ask::Update { pod, container, resources, reply } => {
                let _ = reply.send(self.update(*pod, *container, *resources).await);
            }
            Ask::Stopped { pod, container } => self.stopped(&pod, &container).await,
            Ask::Join { plugin, reply } => {
                let _ = reply.send(self.join(*plugin).await);
            }
            Ask::Prune => {}
        }
    }

    async fn pod(&mut self, event: Event, pod: &PodSandbox) -> Result<(), Error> {
        match event {
            Event::StopPodSandbox if !self.ended.insert(pod.id.clone()) => return Ok(()),
            Event::RemovePodSandbox => {
                self.ended.remove(&pod.id);
            }
            _ => {}
        }
        // All the calls about a pod have requests of this one form.
        let request = RunPodSandboxRequest { pod: Some(pod.clone()) };
        self.tell(event, call_of(event), &request, pod, None).await
    }

    async fn container(&mut self, event: Event, pod: &PodSandbox, container: &Container) -> Result<(), Error> {
        if event == Event::RemoveContainer {
            self.stopped(pod, container).await;
            self.ended.remove(&container.id);
        }
        // All the calls about a container that only tell have requests of this one form.
        let request = PostStartContainerRequest { pod: Some(pod.clone()), container: Some(container.clone()) };
        self.tell(event, call_of(event), &request, pod, Some(container)).await
    }

    /// Tells all plugins that want to know.
    async fn tell(
        &self,
        event: Event,
        call: &'static str,
        request: &impl Message,
        pod: &PodSandbox,
        container: Option<&Container>,
    ) -> Result<(), Error> {
        let mut first = Ok(());
        for plugin in self.plugins.iter().filter(|plugin| plugin.wants(event)) {
            let told = survivors(plugin, plugin.tell::<_, Empty>(event, call, request, pod, container).await);
            if let Err(error) = told {
                first = first.and(Err(error));
                if can_be_refused(event) {
                    break;
                }
            }
        }
        first
    }

    async fn create(&mut self, pod: PodSandbox, container: Container) -> Result<Created, Error> {
        let original = container.clone();
        let mut creation = Creation::new(container);
        for plugin in self.plugins.iter().filter(|plugin| plugin.wants(Event::CreateContainer)) {
            let request = CreateContainerRequest { pod: Some(pod.clone()), container: Some(creation.container.clone()) };
            let answer: Option<CreateContainerResponse> = survivors(plugin, plugin.call("CreateContainer", &request).await)?;
            creation.apply(answer.unwrap_or_default(), &plugin.name)?;
        }
        self.validate(pod, original, &creation).await?;
        let Creation { adjust, others, .. } = creation;
        Ok(Created { adjust, updates: others.updates, evictions: others.evictions })
    }

    /// Lets the validating plugins look at what all have asked for. One that can not be asked has not agreed.
    async fn validate(&self, pod: PodSandbox, container: Container, creation: &Creation) -> Result<(), Error> {
        let event = Event::ValidateContainerAdjustment;
        let validators: Vec<&Plugin> = self.plugins.iter().filter(|plugin| plugin.wants(event)).collect();
        if validators.is_empty() {
            return Ok(());
        }
        let asked = self.plugins.iter().filter(|plugin| plugin.wants(Event::CreateContainer));
        let request = ValidateContainerAdjustmentRequest {
            pod: Some(pod),
            container: Some(container),
            adjust: Some(creation.adjust.clone()),
            update: creation.others.updates.clone(),
            owners: Some(creation.owners.message()),
            plugins: asked.map(|p| PluginInstance { name: p.base.clone(), index: p.index.clone() }).collect(),
        };
        let ask = async |plugin: &Plugin| {
            let answer: Result<ValidateContainerAdjustmentResponse, Error> =
                plugin.call("ValidateContainerAdjustment", &request).await;
            match answer {
                Ok(answer) if answer.reject => Err(Error::Rejected { plugin: plugin.name.clone(), reason: answer.reason }),
                // It asked for all events there are, and was made before this one was.
                Err(error) if error.is_unimplemented() => Ok(()),
                Err(error) => {
                    if error.is_fatal() {
                        plugin.closed().cancel();
                    }
                    Err(error)
                }
                Ok(_) => Ok(()),
            }
        };
        futures::future::try_join_all(validators.into_iter().map(ask)).await.map(|_| ())
    }

    async fn update(&mut self, pod: PodSandbox, container: Container, resources: LinuxResources) -> Result<Updated, Error> {
        let mut change = Change::new(container.id.clone(), resources);
        for plugin in self.plugins.iter().filter(|plugin| plugin.wants(Event::UpdateContainer)) {
            let request = UpdateContainerRequest {
                pod: Some(pod.clone()),
                container: Some(container.clone()),
                linux_resources: Some(change.resources.clone()),
            };
            let answer: Option<UpdateContainerResponse> = survivors(plugin, plugin.call("UpdateContainer", &request).await)?;
            let answer = answer.unwrap_or_default();
            change.apply(answer.update, answer.evict, &plugin.name)?;
        }
        let Change { resources, others, .. } = change;
        Ok(Updated { resources, updates: others.updates, evictions: others.evictions })
    }

    async fn stopped(&mut self, pod: &PodSandbox, container: &Container) {
        if self.plugins.is_empty() || !self.ended.insert(container.id.clone()) {
            return;
        }
        let mut change = Change::new(String::new(), LinuxResources::default());
        for plugin in self.plugins.iter().filter(|plugin| plugin.wants(Event::StopContainer)) {
            let request = StopContainerRequest { pod: Some(pod.clone()), container: Some(container.clone()) };
            let answer = survivors(plugin, plugin.call::<_, StopContainerResponse>("StopContainer", &request).await);
            let applied = answer.and_then(|a| change.apply(a.unwrap_or_default().update, Vec::new(), &plugin.name));
            if let Err(error) = applied {
                tracing::warn!(container = container.id, %error, "NRI: after the end of a container");
            }
        }
        if !change.others.updates.is_empty() {
            // Not waited for: what they need may be waiting for us.
            tokio::spawn(self.runtime.change(change.others.updates, Vec::new()));
        }
    }

    async fn join(&mut self, plugin: Plugin) -> Result<Vec<ContainerUpdate>, Error> {
        let (pods, containers) = self.runtime.snapshot().await;
        let updates = plugin.synchronize(pods, containers).await?;
        tracing::info!(plugin = plugin.name, "NRI plugin joined");
        self.plugins.push(plugin);
        self.plugins.sort_by(|a, b| a.index.cmp(&b.index)); // Stable: equals in the order they came.
        Ok(updates)
    }
}

/// A plugin that is of no use any more is closed and counts as not there; what it merely refuses stays an error.
fn survivors<T>(plugin: &Plugin, answer: Result<T, Error>) -> Result<Option<T>, Error> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.is_fatal() => {
            tracing::warn!(plugin = plugin.name, %error, "closing an NRI plugin");
            plugin.closed().cancel();
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
