//! What is done to a container that exists: start, signals, limits, log, removal, and the burial after a shim's death.

use std::collections::BTreeMap;
use std::sync::Arc;

use berth_nri::api::Event;
use berth_shim::protocol::{ExitRecord, Reply, Request};

use crate::Server;
use crate::error::{Error, file};
use crate::id::{ContainerId, SandboxId};
use crate::nri;
use crate::records::{self, ContainerRecord};
use crate::sandbox::holdings::Live;
use crate::sandbox::run::process_exit;
use crate::sandbox::state::ProcessExit;
use crate::spec::{Resources, SandboxSpec};
use crate::steps::Step;

/// Asks the plugins, starts it, and tells them. What a plugin refuses does not start, and does not wait for a start for ever.
pub(crate) async fn ask_and_start(server: &Arc<Server>, live: &Live, id: &ContainerId) -> Result<i64, Error> {
    if let Err(refused) = nri::start(server, id).await {
        if let Err(error) = signal(live, id, 9, true).await {
            tracing::warn!(container = %id, error = %crate::error::text(&error), "ending a container that may not start");
        }
        return Err(Error::Start { id: id.as_str().into(), message: crate::error::text(&refused) });
    }
    let at = start(server, live, id).await?;
    nri::started(server, id, at).await;
    Ok(at)
}

/// Asks the plugins what the limits shall be, applies them, and tells. Returns all limits as they are then.
pub(crate) async fn ask_and_update(
    server: &Arc<Server>,
    live: &Live,
    id: &ContainerId,
    mut asked: Resources,
    mut merged: Resources,
    by_plugin: bool,
) -> Result<Resources, Error> {
    if !by_plugin && let Some(wanted) = nri::update(server, id, &asked).await? {
        merged = merged.merged(&wanted);
        asked = wanted;
    }
    update(server, live, id, &asked, &merged).await?;
    if !by_plugin {
        nri::container(server, id, Event::PostUpdateContainer).await;
    }
    Ok(merged)
}

/// Opens the gate. Returns when the program runs, with the time of its start.
async fn start(server: &Arc<Server>, live: &Live, id: &ContainerId) -> Result<i64, Error> {
    let shim = live.shim()?;
    let answer =
        shim.call("start container", Request::Start { id: id.as_str().into() }, Vec::new()).await.map_err(|e| match e {
            Error::Start { message, .. } => Error::Start { id: id.as_str().into(), message },
            other => other,
        })?;
    let Reply::Started { started_at_ns } = answer.reply else { return Err(shim.unexpected("start container")) };
    rewrite(server, &live.id, id, move |record| record.started_at = started_at_ns).await;
    Ok(started_at_ns)
}

/// Changes the per-boot record. A failure is logged: the shim knows the same and is asked first.
pub(crate) async fn rewrite(
    server: &Arc<Server>,
    sandbox: &SandboxId,
    id: &ContainerId,
    change: impl FnOnce(&mut ContainerRecord) + Send + 'static,
) {
    let path = crate::paths::record(&server.paths.live_container(sandbox, id));
    let object = path.display().to_string();
    let work = crate::blocking(move || {
        // What another boot made has none any more, nor has what is half removed.
        if !path.exists() {
            return Ok(());
        }
        let mut record: ContainerRecord = records::load(&path)?;
        change(&mut record);
        records::write(&path, &records::encode(&record))
    });
    let result = server.progress.step(id.as_str(), Step::WriteRecord, object, work).await;
    if let Err(error) = result {
        tracing::warn!(container = %id, error = %crate::error::text(&error), "state record");
    }
}

/// Writes the exits of a sandbox's containers into their per-boot records.
pub(crate) async fn note_exits(server: &Arc<Server>, sandbox: &SandboxId) {
    for view in server.board.containers_of(sandbox) {
        if let Some(exit) = view.exit.clone() {
            let started_at = view.started_at;
            let note = move |record: &mut ContainerRecord| {
                record.started_at = started_at;
                record.exit = Some(exit);
            };
            rewrite(server, sandbox, &view.id, note).await;
        }
    }
}

/// Sends a signal to the first process, or to all.
pub(crate) async fn signal(live: &Live, id: &ContainerId, signal: i32, all: bool) -> Result<(), Error> {
    let request = Request::Kill { id: id.as_str().into(), exec: None, signal, all };
    live.shim()?.call("signal container", request, Vec::new()).await.map(|_| ())
}

/// Opens the log file anew.
pub(crate) async fn reopen_log(live: &Live, id: &ContainerId) -> Result<(), Error> {
    let request = Request::ReopenLog { id: id.as_str().into() };
    live.shim()?.call("reopen the log of container", request, Vec::new()).await.map(|_| ())
}

/// The cgroup of a container: where it was made, whatever the driver is now.
fn cgroup_of(server: &Server, spec: &SandboxSpec, id: &ContainerId) -> String {
    match server.board.container(id.as_str()) {
        Some(view) => view.facts.cgroup.clone(),
        None => server.cgroups.container(&spec.cgroup_parent, id),
    }
}

/// Applies new limits: what was not named stays.
async fn update(server: &Arc<Server>, live: &Live, id: &ContainerId, asked: &Resources, merged: &Resources) -> Result<(), Error> {
    let cgroup = cgroup_of(server, &live.spec, id);
    let limits = crate::cgroups::limits(asked);
    let (this, subject) = (server.clone(), id.as_str().to_owned());
    let (log, score) = (server.clone(), asked.oom_score_adj);
    let object = cgroup.clone();
    let work = crate::blocking(move || {
        this.cgroups.update(&cgroup, &subject, &limits)?;
        if score != 0 {
            for warning in this.cgroups.set_oom_score(&cgroup, &subject, score)? {
                if log.is_news(&warning) {
                    tracing::info!(container = subject, warning, "limits not all as asked (said once)");
                }
            }
        }
        Ok(())
    });
    server.progress.step(id.as_str(), Step::UpdateLimits, object, work).await?;
    let merged = merged.clone();
    rewrite(server, &live.id, id, move |record| record.resources = merged).await;
    Ok(())
}

/// Removes a container: its process if there is one, cgroup, writable layer, records. Gone is success.
pub(crate) async fn delete(
    server: &Arc<Server>,
    sandbox: &SandboxId,
    live: Option<&Live>,
    spec: &SandboxSpec,
    id: &ContainerId,
) -> Result<(), Error> {
    if let Some(shim) = live.and_then(|l| l.shim.as_ref()) {
        let request = Request::Delete { id: id.as_str().into(), force: true };
        shim.call("delete container", request, Vec::new()).await?;
    }
    remove_cgroup(server, spec, id).await?;
    erase(server, sandbox, id).await
}

/// Removes the cgroup of a container that has no process any more. A shim has done it as a rule; not when processes that were on
/// their way out kept it busy too long.
pub(crate) async fn remove_cgroup(server: &Arc<Server>, spec: &SandboxSpec, id: &ContainerId) -> Result<(), Error> {
    let cgroup = cgroup_of(server, spec, id);
    let remove = server.cgroups.remove(&cgroup, id.as_str());
    server.progress.step(id.as_str(), Step::RemoveCgroup, cgroup.clone(), remove).await
}

/// Removes the folders and records of a container. The writable layer is only renamed here; a reaper deletes it.
pub(crate) async fn erase(server: &Arc<Server>, sandbox: &SandboxId, id: &ContainerId) -> Result<(), Error> {
    let kept = server.paths.kept_container(id);
    server.durable.forget(crate::paths::record(&kept));
    let (live, trash) = (server.paths.live_container(sandbox, id), server.paths.trash());
    let exit = server.paths.exit_record(sandbox, id);
    let name = id.as_str().to_owned();
    let object = kept.display().to_string();
    let work = crate::blocking(move || {
        discard(&kept, &trash, &name)?;
        match std::fs::remove_file(&exit) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(file("remove", exit)(e)),
            _ => {}
        }
        crate::sandbox::run::remove_folder(&live)
    });
    server.progress.step(id.as_str(), Step::Erase, object, work).await?;
    server.reaper.wake();
    Ok(())
}

/// Moves a folder to the trash; gone is success. Blocking.
pub(crate) fn discard(folder: &std::path::Path, trash: &std::path::Path, name: &str) -> Result<(), Error> {
    let to = trash.join(name);
    match std::fs::rename(folder, &to) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        // There is one of that name already: this one goes at once.
        Err(_) => crate::sandbox::run::remove_folder(folder),
    }
}

/// After the death of a shim: ends what it left, and collects the exits that it had still recorded.
pub(crate) async fn bury(server: &Arc<Server>, live: &Live, containers: Vec<ContainerId>) -> BTreeMap<ContainerId, ProcessExit> {
    tracing::warn!(sandbox = %live.id, "the shim of a pod has died: the pod ends with it");
    let (this, id, spec, cgroup) = (server.clone(), live.id.clone(), live.spec.clone(), live.cgroup.clone());
    let work = crate::blocking(move || {
        let mut exits = BTreeMap::new();
        // The shim's own first: a creator that still works there could make a container's cgroup anew.
        if let Err(error) = this.cgroups.remove_now(&cgroup, id.as_str()) {
            tracing::warn!(sandbox = %id, error = %crate::error::text(&error), "ending the processes of a dead shim");
        }
        for container in containers {
            if let Some(exit) = exit_on_file(&this, &id, &container) {
                exits.insert(container.clone(), exit);
            }
            let group = cgroup_of(&this, &spec, &container);
            if let Err(error) = this.cgroups.remove_now(&group, container.as_str()) {
                tracing::warn!(container = %container, error = %crate::error::text(&error), "ending the container of a dead shim");
            }
        }
        Ok(exits)
    });
    server.progress.step(live.id.as_str(), Step::Bury, live.cgroup.clone(), work).await.unwrap_or_default()
}

/// The exit record that a shim wrote. Blocking.
pub(crate) fn exit_on_file(server: &Server, sandbox: &SandboxId, id: &ContainerId) -> Option<ProcessExit> {
    let bytes = std::fs::read(server.paths.exit_record(sandbox, id)).ok()?;
    serde_json::from_slice::<ExitRecord>(&bytes).ok().map(|r| process_exit(&r))
}
