//! NRI bound to our life cycles: what plugins are told and when, what they may change. Called from the operations of a sandbox's
//! owner, never from a gRPC handler; does nothing while there is no plugin. Must not know the wire.

mod adjust;
mod limits;
mod messages;
mod runtime;

use std::sync::Arc;
use std::time::Duration;

use berth_nri::api::{self, Event};
use berth_nri::{Created, Runtime as _};

pub(crate) use adjust::{Adjusted, PidNamespace, adjust};
pub(crate) use runtime::Node;

use crate::Server;
use crate::board::{SandboxView, ShownContainer};
use crate::error::{Error, text};
use crate::id::{ContainerId, SandboxId};
use crate::progress::Under;
use crate::sandbox::holdings::Live;
use crate::spec::{Resources, SandboxSpec};
use crate::steps::Step;

/// How long what plugins ask for other containers may take before the operation that asked goes on without.
const OTHERS: Duration = Duration::from_secs(10);

fn failed(source: berth_nri::Error) -> Error {
    Error::Nri { source: Box::new(source) }
}

/// The step in which plugins are asked; it ends when this is dropped.
fn asking(server: &Server, subject: &str, event: Event) -> Under {
    server.progress.begin(subject, Step::AskPlugins, event.as_str_name())
}

/// Plugins are only told: an error is noted and the operation goes on.
async fn tell(server: &Server, id: &str, event: Event, telling: impl Future<Output = Result<(), berth_nri::Error>>) {
    let _asking = asking(server, id, event);
    if let Err(error) = telling.await {
        tracing::warn!(id, event = event.as_str_name(), error = %text(&error), "NRI");
    }
}

/// A pod that is being made: plugins may refuse it.
pub(crate) async fn run_pod(server: &Server, live: &Live) -> Result<(), Error> {
    if !server.nri.active() {
        return Ok(());
    }
    let _asking = asking(server, live.id.as_str(), Event::RunPodSandbox);
    let result = server.nri.pod(Event::RunPodSandbox, messages::live_pod(live)).await;
    if result.is_err() {
        // Those who had agreed hear that nothing comes of it.
        undo_run_pod(server, live).await;
    }
    result.map_err(failed)
}

/// A pod that plugins have heard of will not be.
pub(crate) async fn undo_run_pod(server: &Server, live: &Live) {
    if server.nri.active() {
        for event in [Event::StopPodSandbox, Event::RemovePodSandbox] {
            tell(server, live.id.as_str(), event, server.nri.pod(event, messages::live_pod(live))).await;
        }
    }
}

/// Something happens to a pod that is on the board.
pub(crate) async fn pod(server: &Server, id: &SandboxId, event: Event) {
    if server.nri.active()
        && let Some(view) = server.board.sandbox(id.as_str())
    {
        tell(server, id.as_str(), event, server.nri.pod(event, messages::pod(&view))).await;
    }
}

/// A pod's limits are about to change: plugins may refuse it.
pub(crate) async fn update_pod(server: &Server, id: &SandboxId, spec: &SandboxSpec) -> Result<(), Error> {
    if server.nri.active()
        && let Some(view) = server.board.sandbox(id.as_str())
    {
        let (overhead, resources) = (spec.overhead.as_ref().map(limits::wire), spec.resources.as_ref().map(limits::wire));
        let _asking = asking(server, id.as_str(), Event::UpdatePodSandbox);
        server.nri.update_pod(messages::pod(&view), overhead, resources).await.map_err(failed)?;
    }
    Ok(())
}

/// A pod's limits have changed; the board does not know it yet.
pub(crate) async fn updated_pod(server: &Server, id: &SandboxId, spec: &Arc<SandboxSpec>) {
    let event = Event::PostUpdatePodSandbox;
    if server.nri.active()
        && let Some(view) = server.board.sandbox(id.as_str())
    {
        let now = SandboxView { spec: spec.clone(), ..(*view).clone() };
        tell(server, id.as_str(), event, server.nri.pod(event, messages::pod(&now))).await;
    }
}

/// What plugins want of a container that is about to be made.
pub(crate) async fn create(
    server: &Arc<Server>,
    live: &Live,
    container: api::Container,
) -> Result<api::ContainerAdjustment, Error> {
    let _asking = asking(server, &container.id, Event::CreateContainer);
    let Created { adjust, updates, evictions } = server.nri.create(messages::live_pod(live), container).await.map_err(failed)?;
    change_others(server, updates, evictions).await;
    Ok(adjust)
}

/// A container's description for plugins, from the spec that it will have.
pub(crate) fn new_container(
    live: &Live,
    id: &ContainerId,
    spec: &crate::spec::ContainerSpec,
    oci: &berth_oci::spec::Spec,
) -> api::Container {
    messages::new_container(live, id, spec, oci)
}

/// A container that plugins have heard of will not be.
pub(crate) async fn undo_create(server: &Server, live: &Live, container: api::Container) {
    if server.nri.active() {
        let (pod, id) = (messages::live_pod(live), container.id.clone());
        // The end is told with the removal.
        let event = Event::RemoveContainer;
        tell(server, &id, event, server.nri.container(event, pod, container)).await;
    }
}

async fn view_message(server: &Arc<Server>, view: ShownContainer) -> Option<(api::PodSandbox, api::Container)> {
    let pod = messages::pod(&*server.board.sandbox(view.sandbox.as_str())?);
    let container = messages::on_file(server, view).await;
    Some((pod, container))
}

/// A container is started: plugins may refuse it.
pub(crate) async fn start(server: &Arc<Server>, id: &ContainerId) -> Result<(), Error> {
    if server.nri.active()
        && let Some(view) = server.board.container(id.as_str())
        && let Some((pod, container)) = view_message(server, view).await
    {
        let _asking = asking(server, id.as_str(), Event::StartContainer);
        server.nri.container(Event::StartContainer, pod, container).await.map_err(failed)?;
    }
    Ok(())
}

/// Something has happened to a container that is on the board, or, for the removal, is about to.
pub(crate) async fn container(server: &Arc<Server>, id: &ContainerId, event: Event) {
    if server.nri.active()
        && let Some(view) = server.board.container(id.as_str())
        && let Some((pod, container)) = view_message(server, view).await
    {
        tell(server, id.as_str(), event, server.nri.container(event, pod, container)).await;
    }
}

/// A container has just been made and is not on the board yet.
pub(crate) async fn created(server: &Server, live: &Live, mut container: api::Container, created_at: i64, pid: i32) {
    if server.nri.active() {
        container.state = api::ContainerState::ContainerCreated.into();
        (container.created_at, container.pid) = (created_at, pid.unsigned_abs());
        let (pod, id) = (messages::live_pod(live), container.id.clone());
        let event = Event::PostCreateContainer;
        tell(server, &id, event, server.nri.container(event, pod, container)).await;
    }
}

/// A container runs now; the board does not know it yet.
pub(crate) async fn started(server: &Arc<Server>, id: &ContainerId, at: i64) {
    if server.nri.active()
        && let Some(view) = server.board.container(id.as_str())
        && let Some((pod, mut container)) = view_message(server, view).await
    {
        container.state = api::ContainerState::ContainerRunning.into();
        container.started_at = at;
        let event = Event::PostStartContainer;
        tell(server, id.as_str(), event, server.nri.container(event, pod, container)).await;
    }
}

/// A container on the board has ended. Does not wait.
pub(crate) fn stopped(server: &Server, id: &str) {
    if server.nri.active()
        && let Some(view) = server.board.container(id)
        && let Some(pod) = server.board.sandbox(view.sandbox.as_str())
    {
        server.nri.stopped(messages::pod(&pod), messages::container(&view));
    }
}

/// A container's limits are about to change: what plugins want instead, if there are any.
pub(crate) async fn update(server: &Arc<Server>, id: &ContainerId, asked: &Resources) -> Result<Option<Resources>, Error> {
    if !server.nri.active() {
        return Ok(None);
    }
    let Some(view) = server.board.container(id.as_str()) else { return Ok(None) };
    let Some((pod, container)) = view_message(server, view).await else { return Ok(None) };
    let _asking = asking(server, id.as_str(), Event::UpdateContainer);
    let updated = server.nri.update(pod, container, limits::wire(asked)).await.map_err(failed)?;
    change_others(server, updated.updates, updated.evictions).await;
    let mut resources = limits::domain(&updated.resources)?;
    resources.oom_score_adj = asked.oom_score_adj;
    Ok(Some(resources))
}

/// Changes of other containers, as containerd takes them: what fails is told and fails nothing else.
async fn change_others(server: &Arc<Server>, updates: Vec<api::ContainerUpdate>, evictions: Vec<api::ContainerEviction>) {
    if updates.is_empty() && evictions.is_empty() {
        return;
    }
    // Bounded: what it waits for may be an operation that waits for this one.
    let change = Node::of(server).change(updates, evictions);
    match tokio::time::timeout(OTHERS, change).await {
        Ok(failed) if failed.is_empty() => {}
        Ok(failed) => tracing::warn!(failed = failed.len(), "NRI: changes of other containers failed"),
        Err(_) => tracing::warn!("NRI: changes of other containers are not done yet"),
    }
}
