//! A registry's refusal as an error, in its own words where it has any.

use http::{Response, StatusCode};
use hyper::body::Incoming;

use super::{MAX_ERROR_BODY, Remote, Session};
use crate::error::Error;

impl Session {
    pub(super) async fn failure(&self, remote: &Remote, path: &str, response: Response<Incoming>) -> Error {
        let status = response.status();
        let detail = self.error_text(remote, response).await;
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => self.denied(&format!("{status}{detail}")),
            StatusCode::NOT_FOUND => Error::NotFound { reference: format!("{}/{path}", self.host) },
            status => Error::Status {
                host: remote.endpoint.authority.clone(),
                method: "GET",
                path: format!("{}/{path}", remote.endpoint.prefix),
                status: status.as_u16(),
                detail,
            },
        }
    }

    /// The registry's words, with a leading `: `, or nothing.
    pub(super) async fn error_text(&self, remote: &Remote, response: Response<Incoming>) -> String {
        #[derive(serde::Deserialize)]
        struct Errors {
            #[serde(default)]
            errors: Vec<One>,
            #[serde(default)]
            details: String,
        }
        #[derive(serde::Deserialize)]
        struct One {
            #[serde(default)]
            code: String,
            #[serde(default)]
            message: String,
        }
        let Ok(body) = self.collect(remote, response, MAX_ERROR_BODY).await else {
            return String::new();
        };
        let Ok(parsed) = serde_json::from_slice::<Errors>(&body) else {
            return String::new();
        };
        let words: Vec<String> = parsed
            .errors
            .iter()
            .map(|error| match error.message.as_str() {
                "" => error.code.to_lowercase(),
                message => message.to_string(),
            })
            .chain((!parsed.details.is_empty()).then_some(parsed.details))
            .collect();
        if words.is_empty() { String::new() } else { format!(": {}", words.join("; ")) }
    }

    pub(super) fn denied(&self, detail: &str) -> Error {
        Error::Unauthorized { repository: format!("{}/{}", self.host, self.repository), detail: detail.to_string() }
    }

    pub(super) fn protocol(&self, remote: &Remote, reason: impl Into<String>) -> Error {
        Error::Protocol { host: remote.endpoint.authority.clone(), reason: reason.into() }
    }

    pub(super) fn nobody(&self) -> Error {
        Error::Protocol { host: self.host.clone(), reason: "no configured host may be asked for this".into() }
    }
}
