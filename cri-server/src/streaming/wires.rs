//! The streams of an exec or attach, whatever protocol carries them, and the status at the end.

use std::io;

use bytes::Bytes;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::inbox::Inbox;
use super::spdy::StreamWriter;
use super::websocket::ChannelWriter;

/// One direction to the client.
#[derive(Clone)]
pub(super) enum Out {
    Spdy(StreamWriter),
    WebSocket(ChannelWriter),
}

impl Out {
    pub(super) async fn send(&self, bytes: Bytes) -> io::Result<()> {
        match self {
            Self::Spdy(writer) => writer.send(bytes).await,
            Self::WebSocket(writer) => writer.send(bytes).await,
        }
    }

    pub(super) async fn finish(&self) -> io::Result<()> {
        match self {
            Self::Spdy(writer) => writer.finish().await,
            // WebSocket channels end with the connection.
            Self::WebSocket(_) => Ok(()),
        }
    }
}

/// How the status is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StatusForm {
    /// v1 to v3: the text of a failure, nothing on success.
    Text,
    /// v4 and v5: a Status object.
    Json,
}

impl StatusForm {
    /// That of a protocol.
    pub(super) fn of(protocol: &str) -> Self {
        if protocol.starts_with("v4") || protocol.starts_with("v5") { Self::Json } else { Self::Text }
    }
}

/// All of them.
pub(super) struct Wires {
    pub(super) stdin: Option<Inbox>,
    pub(super) resize: Option<Inbox>,
    pub(super) stdout: Option<Out>,
    pub(super) stderr: Option<Out>,
    pub(super) error: Out,
    pub(super) form: StatusForm,
    /// Cancelled when the client is gone.
    pub(super) gone: CancellationToken,
    /// Cancelled when the agent ends.
    pub(super) closing: CancellationToken,
}

/// How it ended.
pub(super) enum Outcome {
    Exit(i32),
    Failure(String),
}

impl Outcome {
    /// What goes over the error stream.
    pub(super) fn status(&self, form: StatusForm) -> Option<String> {
        match (self, form) {
            (Self::Exit(0), StatusForm::Text) => None,
            (Self::Exit(0), StatusForm::Json) => Some(json!({ "metadata": {}, "status": "Success" }).to_string()),
            (Self::Exit(code), form) => {
                let text = format!("command terminated with non-zero exit code: exit status {code}");
                Some(match form {
                    StatusForm::Text => text,
                    StatusForm::Json => json!({
                        "metadata": {},
                        "status": "Failure",
                        "message": text,
                        "reason": "NonZeroExitCode",
                        "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] },
                    })
                    .to_string(),
                })
            }
            (Self::Failure(text), StatusForm::Text) => Some(text.clone()),
            (Self::Failure(text), StatusForm::Json) => Some(
                json!({ "metadata": {}, "status": "Failure", "message": text, "reason": "InternalError", "code": 500 })
                    .to_string(),
            ),
        }
    }
}

/// Tells the client how it ended. It may be gone: then nobody is told.
pub(super) async fn report(error: &Out, form: StatusForm, outcome: &Outcome) {
    if let Some(text) = outcome.status(form) {
        let _ = error.send(text.into()).await;
    }
    let _ = error.finish().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_travels_as_a_cause() {
        let value: serde_json::Value = serde_json::from_str(&Outcome::Exit(7).status(StatusForm::Json).unwrap()).unwrap();
        assert_eq!(value["reason"], "NonZeroExitCode");
        assert_eq!(value["details"]["causes"][0]["message"], "7");
        assert_eq!(Outcome::Exit(0).status(StatusForm::Text), None);
        assert!(Outcome::Failure("x".into()).status(StatusForm::Json).unwrap().contains("InternalError"));
    }
}
