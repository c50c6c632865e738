//! CheckpointContainer: CRIU dumps the processes of a running container, which goes on running, and an archive of that, of the
//! container's description, log and writable layer is put where the client wants it. Restores nothing.

mod archive;
mod criu;
mod describe;
mod message;

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
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
    let disk = Disk::default();
    let all = make(server, &view, wanted, &disk);
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
    let clear = async {
        disk.leave().await;
        crate::blocking(move || crate::sandbox::run::remove_folder(&folder)).await
    };
    done.and(server.progress.step(id.as_str(), Step::Erase, object, clear).await)
}

/// The work in the folder, by a thread or by CRIU: either may go on for a while when nobody waits for it any more, and the folder is
/// removed then, or is the next checkpoint's.
struct Disk {
    /// One at a time.
    busy: Arc<Semaphore>,
    given_up: CancellationToken,
}

impl Default for Disk {
    fn default() -> Self {
        Self { busy: Arc::new(Semaphore::new(1)), given_up: CancellationToken::new() }
    }
}

impl Disk {
    async fn take(&self) -> Result<OwnedSemaphorePermit, Error> {
        self.busy.clone().acquire_owned().await.map_err(|_| Error::Closing)
    }

    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&CancellationToken) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let busy = self.take().await?;
        let given_up = self.given_up.clone();
        crate::blocking(move || {
            let _busy = busy;
            work(&given_up)
        })
        .await
    }

    /// Gives up what is under way, and waits until nothing is at work.
    async fn leave(self) {
        self.given_up.cancel();
        let _ = self.busy.acquire().await;
    }
}

/// On disk, in the container's own folder: it goes with the container at the latest.
pub(crate) fn folder(container: &Path) -> PathBuf {
    container.join("checkpoint")
}

async fn make(server: &Arc<Server>, view: &ShownContainer, wanted: &Wanted, disk: &Disk) -> Result<(), Error> {
    let work = folder(&server.paths.kept_container(&view.id));
    let prepared = {
        let (server, view, work) = (server.clone(), view.clone(), work.clone());
        disk.work(move |_| prepare(&server, &view, &work)).await?
    };
    let dumped = criu::dump(&wanted.program, &prepared, &work, disk.take().await?).await;
    dumped.map_err(|reason| Error::Checkpoint { id: view.id.as_str().into(), reason })?;
    let (server, view, location) = (server.clone(), view.clone(), wanted.location.clone());
    disk.work(move |given_up| finish(&server, &view, &work, &location, given_up)).await
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
fn finish(
    server: &Server,
    view: &ContainerView,
    work: &Path,
    location: &Path,
    given_up: &CancellationToken,
) -> Result<(), Error> {
    describe::write(server, view, work)?;
    let diff = work.join("rootfs-diff.tar");
    let upper = server.paths.kept_container(&view.id).join("upper");
    let users = describe::users(server, view)?;
    let made = archive::Output::create(&diff, given_up).and_then(|out| archive::layer(&upper, &users, out));
    made.map_err(file("archive the writable layer to", &diff))?;
    archive::place(work, location, given_up).map_err(file("write the checkpoint to", location))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn work_on_disk_that_nobody_waits_for_is_given_up_and_over_before_the_next_begins() {
        let (begun, begins) = mpsc::channel();
        let over = Arc::new(AtomicBool::new(false));
        let disk = Disk::default();
        let done = over.clone();
        let work = disk.work(move |given_up| {
            begun.send(()).unwrap();
            let told = berth_testkit::wait_until(Duration::from_secs(10), || given_up.is_cancelled());
            done.store(told, Ordering::SeqCst);
            Ok(())
        });
        let begins = tokio::task::spawn_blocking(move || begins.recv());
        tokio::select! {
            _ = work => panic!("it waits"),
            _ = begins => {}
        }
        disk.leave().await;
        assert!(over.load(Ordering::SeqCst));
    }
}
