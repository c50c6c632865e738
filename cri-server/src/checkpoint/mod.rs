//! CheckpointContainer: CRIU dumps the processes of a running container, which goes on running, and an archive of that, of the
//! container's description, log and writable layer is put where the client wants it. Restores nothing.

mod archive;
mod criu;
mod describe;
mod message;

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::Server;
use crate::board::{ContainerState, ContainerView};
use crate::error::{Error, file, invalid};
use crate::id::ContainerId;

/// The containers that are being checkpointed.
#[derive(Debug, Default)]
pub(crate) struct Checkpoints(Mutex<BTreeSet<ContainerId>>);

/// One at a time; dropping it lets the next one begin.
struct Turn<'a>(&'a Checkpoints, &'a ContainerId);

impl Checkpoints {
    fn begin<'a>(&'a self, id: &'a ContainerId) -> Result<Turn<'a>, Error> {
        let fresh = self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone());
        let busy = || Error::State {
            kind: "container",
            id: id.as_str().into(),
            state: "being checkpointed",
            wanted: "one checkpoint at a time",
        };
        fresh.then_some(Turn(self, id)).ok_or_else(busy)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).remove(self.1);
    }
}

/// How long a checkpoint may take when the client does not say: enough for much memory on a slow disk, and not for ever.
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// Checkpoints a running container. `limit` is for all of it. It goes on when the client has given up.
pub(crate) async fn run(server: &Arc<Server>, id: &str, location: &str, limit: Option<Duration>) -> Result<(), Error> {
    let limit = limit.unwrap_or(LIMIT);
    let view = server.board.need_container(id)?;
    let location = PathBuf::from(location);
    if !location.is_absolute() || location.file_name().is_none() {
        return Err(invalid("location", "an absolute path of a file is needed"));
    }
    if view.state != ContainerState::Running {
        let wanted = "only running containers can be checkpointed";
        return Err(Error::State { kind: "container", id: view.id.as_str().into(), state: view.state.text(), wanted });
    }
    let program = criu::find(std::env::var_os("PATH").as_deref()).ok_or_else(|| Error::Unsupported {
        what: "CheckpointContainer",
        reason: "criu is not installed on this node (no program criu in the agent's PATH)".into(),
    })?;
    let server = server.clone();
    let work = async move {
        let _turn = server.checkpoints.begin(&view.id)?;
        let all = make(&server, &view, &program, &location);
        let late = |_| {
            let command = format!("criu dump of container {}", view.id);
            Err(Error::Timeout { command, seconds: limit.as_secs() })
        };
        let limited = async { tokio::time::timeout(limit, all).await.unwrap_or_else(late) };
        let done = tokio::select! {
            done = limited => done,
            () = server.closed() => Err(Error::Closing),
        };
        let folder = folder(&server.paths.kept_container(&view.id));
        let cleared = crate::blocking(move || crate::sandbox::run::remove_folder(&folder)).await;
        done.and(cleared)
    };
    match tokio::spawn(work).await {
        Ok(done) => done,
        Err(_) => Err(Error::Closing),
    }
}

/// On disk, in the container's own folder: it goes with the container at the latest.
pub(crate) fn folder(container: &Path) -> PathBuf {
    container.join("checkpoint")
}

async fn make(server: &Arc<Server>, view: &Arc<ContainerView>, program: &Path, location: &Path) -> Result<(), Error> {
    let work = folder(&server.paths.kept_container(&view.id));
    let prepared = {
        let (server, view, work) = (server.clone(), view.clone(), work.clone());
        crate::blocking(move || prepare(&server, &view, &work)).await?
    };
    criu::dump(program, &prepared, &work).await.map_err(|reason| Error::Checkpoint { id: view.id.as_str().into(), reason })?;
    let (server, view, location) = (server.clone(), view.clone(), location.to_owned());
    crate::blocking(move || finish(&server, &view, &work, &location)).await
}

/// The folders, and what CRIU has to know. Blocking.
fn prepare(server: &Server, view: &ContainerView, work: &Path) -> Result<criu::Target, Error> {
    // Of an agent that was killed at this.
    crate::sandbox::run::remove_folder(work)?;
    let images = work.join("checkpoint");
    // Not its parents: the folder of a container that has been removed meanwhile does not come back.
    for folder in [work, &images] {
        DirBuilder::new().mode(0o700).create(folder).map_err(file("create", folder))?;
    }
    let spec = describe::spec(server, view)?;
    let pid = view.pid.ok_or_else(|| Error::Checkpoint { id: view.id.as_str().into(), reason: "it has no process".into() })?;
    let target = criu::Target::look(pid, &spec, &view.facts.spec.security.namespaces)
        .map_err(|e| Error::Checkpoint { id: view.id.as_str().into(), reason: format!("look at process {pid}: {e}") })?;
    let streams = images.join("descriptors.json");
    let json = serde_json::to_vec(&target.streams).map_err(|e| invalid("container", e.to_string()))?;
    std::fs::write(&streams, json).map_err(file("write", &streams))?;
    Ok(target)
}

/// Description, log and writable layer, and the archive of all. Blocking.
fn finish(server: &Server, view: &ContainerView, work: &Path, location: &Path) -> Result<(), Error> {
    describe::write(server, view, work)?;
    let diff = work.join("rootfs-diff.tar");
    let upper = server.paths.kept_container(&view.id).join("upper");
    let users = describe::users(server, view)?;
    let made = File::create_new(&diff).and_then(|out| archive::layer(&upper, &users, out));
    made.map_err(file("archive the writable layer to", &diff))?;
    archive::place(work, location).map_err(file("write the checkpoint to", location))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_has_one_checkpoint_at_a_time() {
        let checkpoints = Checkpoints::default();
        let id = ContainerId::from("ab");
        let turn = checkpoints.begin(&id).unwrap();
        assert!(checkpoints.begin(&id).is_err_and(|e| e.to_string().contains("being checkpointed")));
        drop(turn);
        assert!(checkpoints.begin(&id).is_ok());
    }
}
