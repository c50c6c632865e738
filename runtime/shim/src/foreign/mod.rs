//! Containers that another OCI runtime makes: runc's command line, driven by a creator, a sweeper or a starter (forked children
//! of the shim, which may wait). The shim stays the parent of what the runtime makes and keeps streams, log, cgroup and exit
//! record, so everything else is as with containers of its own. Nothing here runs in the shim's loop.

mod bundle;
mod call;
mod create;

use std::path::PathBuf;
use std::time::Duration;

use berth_linux::pidfd::PidFd;
use berth_shim::protocol::ExternalRuntime;

pub use create::{Order, create, exec};

use call::Stdio;

/// How long one call of a runtime may take when nothing else is configured: below the two minutes that kubelets wait for an
/// answer (`runtimeRequestTimeout`), so that the reason is told before they give up.
const DEADLINE: Duration = Duration::from_secs(100);

/// A failed operation of a foreign runtime, or around it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be asked for that.
    #[error("OCI runtime {runtime}: {what}")]
    Refused {
        /// The handler's name.
        runtime: String,
        /// What it would need.
        what: String,
    },
    /// A file or folder of the bundle.
    #[error("{action} {path:?}")]
    File {
        /// What was being done, as a verb.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The bundle's mounts.
    #[error("prepare the bundle's mounts")]
    Mount(#[from] berth_linux::Error),
    /// The root filesystem.
    #[error(transparent)]
    Root(#[from] berth_oci::Error),
    /// The program cannot be run.
    #[error("run OCI runtime {runtime}")]
    Run {
        /// The handler's name.
        runtime: String,
        /// The cause.
        #[source]
        source: berth_linux::Error,
    },
    /// It said no.
    #[error("OCI runtime {verb} failed ({runtime}): {message}")]
    Failed {
        /// The handler's name.
        runtime: String,
        /// What it was asked for.
        verb: &'static str,
        /// What it says.
        message: String,
    },
    /// It did not end in time and was killed.
    #[error("OCI runtime {verb} of container {id} did not end within {seconds} s and was killed ({runtime}, {program:?})")]
    Stuck {
        /// The handler's name.
        runtime: String,
        /// The program.
        program: PathBuf,
        /// What it was asked for.
        verb: &'static str,
        /// The container.
        id: String,
        /// The deadline.
        seconds: u64,
    },
    /// A call of the system around it.
    #[error("{action}")]
    System {
        /// What was being done.
        action: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    /// For `map_err`: names the operation.
    fn system(action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::System { action, source }
    }

    fn is_missing_program(&self) -> bool {
        matches!(self, Self::Run { source, .. } if source.raw_errno() == Some(rustix::io::Errno::NOENT.raw_os_error()))
    }
}

/// A container of a foreign runtime.
#[derive(Debug, Clone)]
pub struct Instance {
    /// Who made it, or is to make it.
    pub runtime: ExternalRuntime,
    /// Its id.
    pub id: String,
    /// The folder for `config.json`, the root and the volumes; made by [`create`].
    pub bundle: PathBuf,
}

impl Instance {
    /// The bundle is a folder in the container's own, whose `config.json` is the agent's.
    pub fn new(runtime: ExternalRuntime, id: &str, folder: &std::path::Path) -> Self {
        Self { runtime, id: id.to_owned(), bundle: folder.join("bundle") }
    }

    fn deadline(&self) -> Duration {
        match self.runtime.deadline_ms {
            0 => DEADLINE,
            ms => Duration::from_millis(ms),
        }
    }

    /// Sends a signal to the first process. One that has ended is success.
    pub fn signal(&self, signal: i32, init: &PidFd) -> Result<(), Error> {
        let sent = self.call("kill", [self.id.clone().into(), signal.to_string().into()], Stdio::none());
        match sent {
            Err(_) if !init.is_alive().unwrap_or(true) => Ok(()),
            sent => sent,
        }
    }

    /// Makes the runtime forget the container, whose processes have been killed, and undoes the bundle's mounts. A program that is
    /// not there any more has nothing to say: its state is in the sandbox's folder and goes with that.
    pub fn delete(&self) -> Result<(), Error> {
        let forgotten = match self.call("delete", ["--force".into(), self.id.clone().into()], Stdio::none()) {
            Err(error) if error.is_missing_program() => Ok(()),
            Err(Error::Failed { message, .. }) if says_unknown(&message) => Ok(()),
            other => other,
        };
        bundle::unmount(&self.bundle)?;
        forgotten
    }
}

/// How runtimes say that they have no such container: runc and crun, youki.
fn says_unknown(message: &str) -> bool {
    ["does not exist", "No such file or directory", "could not be found"].iter().any(|text| message.contains(text))
}
