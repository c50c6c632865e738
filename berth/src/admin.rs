//! What the CRI has no call for, asked of a running agent: a root-only socket, one JSON line each way. Both ends of it
//! are this binary; it is no interface for others.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use berth_cri_server::CriServer;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

/// The longest request: a path and some words.
const REQUEST_BYTES: u64 = 64 * 1024;

/// The pause after an accept that failed (EMFILE, ENFILE, ENOBUFS, ENOMEM: accept(2)): these do not go away by asking at once.
const ACCEPT_AGAIN: std::time::Duration = std::time::Duration::from_millis(200);

/// A question to the agent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "verb")]
pub enum Request {
    /// What nobody owns.
    Leaks { settle: bool },
    /// What somebody is doing and waits for.
    Why { wanted: String },
    /// Load an archive; the path is absolute.
    Import { path: PathBuf },
    /// Take one name from an image that has others.
    Untag { name: String },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Reply {
    Lines(Vec<String>),
    Error(String),
}

/// Where the agent of a state folder listens for this.
pub fn socket(state: &Path) -> PathBuf {
    state.join("admin.sock")
}

/// What one image is printed as.
pub fn image_line(id: &str, tags: &[String]) -> String {
    if tags.is_empty() { format!("<none> {id}") } else { format!("{} {id}", tags.join(" ")) }
}

async fn answer(server: &CriServer, request: Request) -> Result<Vec<String>> {
    match request {
        Request::Leaks { settle } => Ok(server.leaks(settle).await),
        Request::Untag { name } => Ok(vec![server.untag(&name).await?]),
        Request::Why { wanted } => {
            let answers = server.why(&wanted).await?;
            Ok(answers.iter().map(serde_json::to_string).collect::<Result<_, _>>()?)
        }
        Request::Import { path } => {
            let images = server.import(&path).await?;
            Ok(images.iter().map(|(id, tags)| image_line(id, tags)).collect())
        }
    }
}

async fn converse(server: &CriServer, stream: UnixStream) -> Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    BufReader::new(reader.take(REQUEST_BYTES)).read_line(&mut line).await?;
    let reply = match serde_json::from_str(&line) {
        Ok(request) => match answer(server, request).await {
            Ok(lines) => Reply::Lines(lines),
            Err(error) => Reply::Error(format!("{error:#}")),
        },
        Err(error) => Reply::Error(format!("not a request: {error}")),
    };
    let mut text = serde_json::to_string(&reply)?;
    text.push('\n');
    writer.write_all(text.as_bytes()).await?;
    Ok(())
}

/// Answers until `stop`. Whoever holds the state folder owns the socket's path.
pub fn spawn(server: &Arc<CriServer>, state: &Path, stop: CancellationToken) -> Result<()> {
    let path = socket(state);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing the old {}", path.display()));
        }
        _ => {}
    }
    let listener = UnixListener::bind(&path).with_context(|| format!("listening on {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("setting the mode of {}", path.display()))?;
    let server = server.clone();
    tokio::spawn(async move {
        loop {
            let stream = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        // Most often no descriptor is free; one that is given back ends it.
                        tracing::warn!(%error, "the admin socket does not accept at the moment");
                        tokio::time::sleep(ACCEPT_AGAIN).await;
                        continue;
                    }
                },
            };
            let server = server.clone();
            tokio::spawn(async move {
                if let Err(error) = converse(&server, stream).await {
                    tracing::debug!(error = format!("{error:#}"), "an admin client went away");
                }
            });
        }
    });
    Ok(())
}

/// Asks the agent.
///
/// # Errors
/// When the agent does not answer, or its answer is an error.
pub async fn ask(state: &Path, request: &Request) -> Result<Vec<String>> {
    let path = socket(state);
    let mut stream = UnixStream::connect(&path).await.with_context(|| format!("asking the agent on {}", path.display()))?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes()).await?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await?;
    match serde_json::from_str(&reply).context("the agent went away before it answered")? {
        Reply::Lines(lines) => Ok(lines),
        Reply::Error(error) => Err(Refusal(error).into()),
    }
}

/// The agent's own word that it can not, or will not.
#[derive(Debug)]
struct Refusal(String);

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

/// Whether the agent answered, and said no.
pub fn is_refusal(error: &anyhow::Error) -> bool {
    error.is::<Refusal>()
}
