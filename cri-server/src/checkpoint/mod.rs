//! CheckpointContainer: CRIU dumps the processes of a running container, which goes on running, and an archive of that, of the
//! container's description, log and writable layer is put where the client wants it. Restores nothing.

mod archive;
mod criu;
mod describe;
mod message;

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::Server;
use crate::board::{ContainerState, ContainerView, ShownContainer};
use crate::error::{Error, file, invalid};
use crate::id::ContainerId;
use crate::steps::{CHECKPOINT, Step};

/// What a client wants.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// The installed CRIU.
    pub(crate) program: PathBuf,
    /// Where the archive is to be.
    pub(crate) location: PathBuf,
    /// For all of it.
    pub(crate) limit: Duration,
}

impl Wanted {
    /// Checks a request. No `timeout` leaves it to us.
    pub(crate) fn parse(view: &ContainerView, location: &str, timeout: i64) -> Result<Self, Error> {
        let seconds = u64::try_from(timeout).map_err(|_| invalid("timeout", "negative"))?;
        let limit = if seconds == 0 { CHECKPOINT } else { Duration::from_secs(seconds) };
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
        Ok(Self { program, location, limit })
    }
}

/// Checkpoints a running container, for its sandbox's owner. It ends early when it is cut, and with the agent: CRIU is killed then.
pub(crate) async fn run(server: &Arc<Server>, id: &ContainerId, wanted: &Wanted, cut: CancellationToken) -> Result<(), Error> {
    let view = server.board.need_container(id.as_str())?;
    let under = server.progress.begin_within(id.as_str(), Step::Checkpoint, wanted.location.display().to_string(), wanted.limit);
    let all = make(server, &view, &wanted.program, &wanted.location);
    let late = |_| {
        let command = format!("criu dump of container {id}");
        Err(Error::Timeout { command, seconds: wanted.limit.as_secs() })
    };
    let done = tokio::select! {
        done = tokio::time::timeout(wanted.limit, all) => done.unwrap_or_else(late),
        () = cut.cancelled() => {
            Err(Error::Checkpoint { id: id.as_str().into(), reason: "the container was killed, or has ended".into() })
        }
        () = server.closed() => Err(Error::Closing),
    };
    drop(under);
    let folder = folder(&server.paths.kept_container(id));
    let object = folder.display().to_string();
    let clear = crate::blocking(move || crate::sandbox::run::remove_folder(&folder));
    done.and(server.progress.step(id.as_str(), Step::Erase, object, clear).await)
}

/// On disk, in the container's own folder: it goes with the container at the latest.
pub(crate) fn folder(container: &Path) -> PathBuf {
    container.join("checkpoint")
}

async fn make(server: &Arc<Server>, view: &ShownContainer, program: &Path, location: &Path) -> Result<(), Error> {
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
