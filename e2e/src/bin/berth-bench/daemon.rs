//! The CRI server under measurement: its process, in a cgroup of its own side.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use berth_cri_api::v1::StatusRequest;

use crate::cri::Cri;
use crate::machine::Accounting;

/// How long a server may take to become ready.
const READY: Duration = Duration::from_secs(60);
/// How often a server that starts is asked: well below what a start takes.
const POLL: Duration = Duration::from_millis(1);

/// A running server. It is killed when dropped.
pub struct Daemon {
    command: Vec<String>,
    socket: PathBuf,
    log: PathBuf,
    /// A shell's line that moves the process to its side's cgroup before the server runs.
    enter: String,
    child: Option<Child>,
}

impl Daemon {
    /// Starts a server and waits until it is ready.
    pub async fn start(command: Vec<String>, socket: PathBuf, log: PathBuf, accounting: &Accounting) -> Result<(Self, Cri)> {
        let mut daemon = Self { command, socket, log, enter: accounting.enter_side(), child: None };
        daemon.spawn()?;
        let cri = daemon.wait_ready().await?;
        Ok((daemon, cri))
    }

    /// Starts the process and waits for nothing.
    pub fn spawn(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{}; exec \"$@\"", self.enter), "sh"]).args(&self.command);
        shell.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.child = Some(shell.spawn().context("start the server")?);
        Ok(())
    }

    /// The server's process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// `kill -9`, and the process is reaped.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Waits until `asked` is content with what the server answers; every attempt has a connection of its own.
    pub async fn wait_for<F: Future<Output = Result<bool>>>(&mut self, what: &str, asked: impl Fn(Cri) -> F) -> Result<Cri> {
        let begun = Instant::now();
        let mut last = None;
        while begun.elapsed() < READY {
            if let Ok(cri) = Cri::connect(&self.socket).await {
                match asked(cri.clone()).await {
                    Ok(true) => return Ok(cri),
                    Ok(false) => {}
                    Err(error) => last = Some(error),
                }
            }
            if let Some(status) = self.child.as_mut().and_then(|c| c.try_wait().ok().flatten()) {
                bail!("the server ended: {status}; its log is {}", self.log.display());
            }
            tokio::time::sleep(POLL).await;
        }
        bail!("gave up waiting for {what}: {last:?}; the server's log is {}", self.log.display())
    }

    async fn wait_ready(&mut self) -> Result<Cri> {
        self.wait_for("the server to be ready", |mut cri| async move {
            let status = cri.runtime.status(StatusRequest::default()).await?.into_inner().status.unwrap_or_default();
            Ok(status.conditions.iter().filter(|c| c.status && c.r#type.ends_with("Ready")).count() >= 2)
        })
        .await
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}
