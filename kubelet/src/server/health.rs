//! Whether the kubelet is well, and what its sources complain about.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{Response, StatusCode};
use tokio::time::Instant;

use super::{Body, text};

#[derive(Debug)]
struct State {
    turned: Instant,
    problems: Vec<String>,
    runtime_answers: bool,
    listed: Option<Instant>,
}

/// Shared facts about the main loop.
#[derive(Clone, Debug)]
pub struct Health {
    stuck: Duration,
    state: Arc<Mutex<State>>,
}

impl Health {
    /// Well until the main loop has not turned for `stuck`.
    pub fn new(stuck: Duration) -> Health {
        let state = State { turned: Instant::now(), problems: Vec::new(), runtime_answers: true, listed: None };
        Health { stuck, state: Arc::new(Mutex::new(state)) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The main loop has turned.
    pub fn turned(&self) {
        self.lock().turned = Instant::now();
    }

    /// What the sources cannot carry out.
    pub fn set_problems(&self, problems: Vec<String>) {
        self.lock().problems = problems;
    }

    /// What the sources cannot carry out.
    pub fn problems(&self) -> Vec<String> {
        self.lock().problems.clone()
    }

    /// The runtime has answered.
    pub fn runtime_answered(&self) {
        let mut state = self.lock();
        state.runtime_answers = true;
        state.listed = Some(Instant::now());
    }

    /// When the runtime was last listed.
    pub(crate) fn listed(&self) -> Option<Instant> {
        self.lock().listed
    }

    /// The runtime has not answered.
    pub fn runtime_failed(&self) {
        self.lock().runtime_answers = false;
    }

    /// The checks and whether each is well.
    pub(crate) fn checks(&self) -> [(&'static str, bool); 3] {
        [("ping", true), ("log", true), ("syncloop", self.lock().turned.elapsed() < self.stuck)]
    }

    /// `/healthz`, `/healthz/<check>`, `?verbose`.
    pub(crate) fn respond(&self, path: &str, query: Option<&str>) -> Response<Body> {
        let checks = self.checks();
        let name = path.trim_matches('/').strip_prefix("healthz").unwrap_or_default().trim_start_matches('/');
        if !name.is_empty() {
            return match checks.iter().find(|(check, _)| *check == name) {
                Some((_, true)) => text(StatusCode::OK, "ok"),
                Some((_, false)) => text(StatusCode::INTERNAL_SERVER_ERROR, "internal server error: check failed\n"),
                None => text(StatusCode::NOT_FOUND, "404 page not found\n"),
            };
        }
        let well = checks.iter().all(|(_, well)| *well);
        let verbose = query.is_some_and(|q| q.split('&').any(|p| p == "verbose" || p.starts_with("verbose=")));
        if well && !verbose {
            return text(StatusCode::OK, "ok");
        }
        let mut lines = String::new();
        for (check, well) in checks {
            lines.push_str(&if well { format!("[+]{check} ok\n") } else { format!("[-]{check} failed: reason withheld\n") });
        }
        lines.push_str(if well { "healthz check passed\n" } else { "healthz check failed\n" });
        text(if well { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR }, lines)
    }
}
