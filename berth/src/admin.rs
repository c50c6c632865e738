//! What the CRI has no call for, asked of a running agent: a root-only socket, one JSON line each way. Both ends of it
//! are this binary; it is no interface for others.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use berth_cri_server::CriServer;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

/// The longest request: a path and some words.
const REQUEST_BYTES: u64 = 64 * 1024;

/// A question to the agent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "verb")]
pub enum Request {
    /// What nobody owns.
    Leaks { settle: bool },
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
                        tracing::warn!(%error, "the admin socket does not accept; it is given up until the next start");
                        return;
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
        Reply::Error(error) => bail!("{error}"),
    }
}
