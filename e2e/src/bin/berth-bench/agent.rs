//! A node agent under measurement: a command line that runs the pods of a manifest folder and shows them at the read-only port.
//! Which processes and how many the command starts is its own affair; it must not know berth.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::machine::Accounting;

/// The read-only port of both sides.
const PORT: u16 = 10255;
/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(10);
/// How long the agent may take for anything that is waited for.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// A running agent. It is killed when dropped.
pub struct Agent {
    child: Child,
    manifests: PathBuf,
}

impl Agent {
    /// Starts the agent in its side's cgroup and waits until it answers.
    pub fn start(command: &[String], manifests: PathBuf, log: &Path, accounting: &Accounting) -> Result<Self> {
        let log_file = File::options().create(true).append(true).open(log)?;
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{}; exec \"$@\"", accounting.enter_side()), "sh"]).args(command);
        shell.stdin(Stdio::null()).stdout(log_file.try_clone()?).stderr(log_file);
        let mut agent = Self { child: shell.spawn().context("start the agent")?, manifests };
        agent.wait("the agent to answer", Duration::from_millis(20), |agent| {
            if let Some(status) = agent.child.try_wait()? {
                bail!("the agent ended: {status}; its log is {}", log.display());
            }
            Ok(pods().is_ok().then_some(()))
        })?;
        Ok(agent)
    }

    /// Puts a manifest into the folder, whole at once; returns when it was there.
    pub fn put(&self, name: &str, manifest: &Value) -> Result<()> {
        let temporary = self.manifests.join(format!(".{name}.new"));
        fs::write(&temporary, serde_json::to_vec(manifest)?)?;
        Ok(fs::rename(temporary, self.manifests.join(format!("{name}.json")))?)
    }

    /// Takes a manifest out of the folder.
    pub fn take(&self, name: &str) -> Result<()> {
        Ok(fs::remove_file(self.manifests.join(format!("{name}.json")))?)
    }

    /// Looks every `poll` until there is what is waited for.
    pub fn wait<T>(&mut self, what: &str, poll: Duration, mut look: impl FnMut(&mut Self) -> Result<Option<T>>) -> Result<T> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Some(found) = look(self)? {
                return Ok(found);
            }
            std::thread::sleep(poll);
        }
        bail!("gave up waiting for {what}")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The pods that the agent shows.
pub fn pods() -> Result<Vec<Value>> {
    let mut list: Value = serde_json::from_slice(&get("/pods")?)?;
    match list["items"].take() {
        Value::Array(items) => Ok(items),
        // A Go list without an item.
        Value::Null => Ok(Vec::new()),
        other => bail!("items is {other}"),
    }
}

/// The name that a static pod has in its manifest: the agent appends the node's.
pub fn name(pod: &Value) -> &str {
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    name.rsplit_once('-').map_or(name, |(name, _)| name)
}

/// The pod of a manifest's name, with a status.
pub fn find(wanted: &str) -> Result<Option<Value>> {
    Ok(pods()?.into_iter().find(|pod| name(pod) == wanted))
}

/// The first container's id without the runtime's name.
pub fn container_id(pod: &Value) -> Option<String> {
    let id = pod["status"]["containerStatuses"][0]["containerID"].as_str()?;
    Some(id.rsplit_once("//").map_or(id, |(_, id)| id).to_owned())
}

/// Whether a condition of the pod is true.
pub fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions.into_iter().flatten().any(|c| c["type"] == "Ready" && c["status"] == "True")
}

fn get(path: &str) -> Result<Vec<u8>> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
    let mut stream = TcpStream::connect_timeout(&address, ANSWER)?;
    stream.set_read_timeout(Some(ANSWER))?;
    // HTTP 1.0: the answer is not chunked and ends with the connection.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").context("an answer without a head")?;
    let head = String::from_utf8_lossy(&answer[..end]);
    ensure!(head.split(' ').nth(1) == Some("200"), "{path}: {}", head.lines().next().unwrap_or_default());
    Ok(answer.split_off(end + 4))
}
