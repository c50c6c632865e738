//! Tokens: what a URL stands for. Random, for one use, for one minute.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::error::Error;
use crate::id::{ContainerId, SandboxId, random_bytes};

/// How long a token waits for its use.
const LIFE: Duration = Duration::from_secs(60);
/// How many may wait.
const WAITING: usize = 1000;

/// What was asked for and checked.
#[derive(Debug, Clone)]
pub(crate) enum Request {
    Exec { container: ContainerId, command: Vec<String>, tty: bool, stdin: bool, stdout: bool, stderr: bool },
    Attach { container: ContainerId, tty: bool, stdin: bool, stdout: bool, stderr: bool },
    PortForward { sandbox: SandboxId, ports: Vec<u16> },
}

impl Request {
    fn path(&self) -> &'static str {
        match self {
            Self::Exec { .. } => "exec",
            Self::Attach { .. } => "attach",
            Self::PortForward { .. } => "portforward",
        }
    }
}

/// The tokens that wait for their use.
#[derive(Default)]
pub(crate) struct Tokens {
    address: OnceLock<SocketAddr>,
    waiting: Mutex<HashMap<String, (Instant, Request)>>,
}

impl Tokens {
    /// Where the server listens, known once it does.
    pub(crate) fn listens_at(&self, address: SocketAddr) {
        let _ = self.address.set(address);
    }

    /// A URL for a request.
    pub(crate) fn url(&self, request: Request) -> Result<String, Error> {
        let address = self.address.get().ok_or(Error::Closing)?;
        let token = token();
        let url = format!("http://{address}/{}/{token}", request.path());
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if waiting.len() >= WAITING {
            waiting.retain(|_, (since, _)| now.duration_since(*since) < LIFE);
        }
        if waiting.len() >= WAITING {
            return Err(Error::Exhausted { what: "streaming requests wait for their client" });
        }
        waiting.insert(token, (now, request));
        Ok(url)
    }

    /// Takes the request of a path like `/exec/<token>`.
    pub(crate) fn take(&self, path: &str) -> Option<Request> {
        let (kind, token) = path.trim_start_matches('/').split_once('/')?;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, request) = waiting.remove(token)?;
        (since.elapsed() < LIFE && request.path() == kind).then_some(request)
    }
}

fn token() -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let bytes: [u8; 22] = random_bytes();
    bytes.iter().map(|b| DIGITS[usize::from(b & 63)] as char).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        Request::PortForward { sandbox: "ab".into(), ports: vec![] }
    }

    #[test]
    fn a_token_is_for_one_use_and_one_path() {
        let tokens = Tokens::default();
        tokens.listens_at(([127, 0, 0, 1], 1234).into());
        let url = tokens.url(request()).unwrap();
        let path = url.strip_prefix("http://127.0.0.1:1234").unwrap();
        assert!(tokens.take("/portforward/nonsense").is_none());
        assert!(tokens.take(path).is_some());
        assert!(tokens.take(path).is_none());
        let url = tokens.url(request()).unwrap();
        assert!(tokens.take(&url.replace("portforward", "exec")["http://127.0.0.1:1234".len()..]).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_waits_a_minute_and_no_longer() {
        let tokens = Tokens::default();
        tokens.listens_at(([127, 0, 0, 1], 1).into());
        let path = |url: String| url["http://127.0.0.1:1".len()..].to_owned();
        let (early, late) = (path(tokens.url(request()).unwrap()), path(tokens.url(request()).unwrap()));
        tokio::time::sleep(LIFE - Duration::from_secs(1)).await;
        assert!(tokens.take(&early).is_some());
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(tokens.take(&late).is_none());
        // The places of those that have expired are free again.
        for _ in 0..WAITING {
            tokens.url(request()).unwrap();
        }
        tokio::time::sleep(LIFE).await;
        tokens.url(request()).unwrap();
    }

    #[test]
    fn too_many_waiting_tokens_are_refused() {
        let tokens = Tokens::default();
        tokens.listens_at(([127, 0, 0, 1], 1).into());
        for _ in 0..WAITING {
            tokens.url(request()).unwrap();
        }
        assert!(matches!(tokens.url(request()), Err(Error::Exhausted { .. })));
    }
}
