//! What can go wrong in the CRI server: one variant per failed operation, and the one place where errors become gRPC
//! codes. Must not log.

use std::path::PathBuf;
use std::sync::Arc;

/// A result whose error can be handed to every caller that joined one operation.
pub type Shared<T> = Result<T, Arc<Error>>;

/// A failed operation of the CRI server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A request that can not be meant.
    #[error("invalid {field}: {reason}")]
    Invalid {
        /// The field of the request.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A request for something this runtime does not do.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// The field or call.
        what: &'static str,
        /// Why, or what to do instead.
        reason: String,
    },
    /// Nothing has this id.
    #[error("{kind} {id:?} not found")]
    NotFound {
        /// "pod sandbox", "container" or "image".
        kind: &'static str,
        /// As the caller named it.
        id: String,
    },
    /// The name is taken by something that lives.
    #[error("{kind} {name:?} already exists with id {id}")]
    Exists {
        /// "pod sandbox" or "container".
        kind: &'static str,
        /// The name asked for.
        name: String,
        /// Who has it.
        id: String,
    },
    /// The operation does not fit the present state.
    #[error("{kind} {id} is {state}: {wanted}")]
    State {
        /// "pod sandbox" or "container".
        kind: &'static str,
        /// Its id.
        id: String,
        /// The state it is in.
        state: &'static str,
        /// What the operation needs.
        wanted: &'static str,
    },
    /// A call to a file or folder failed.
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
    /// A kernel operation failed.
    #[error("{action}")]
    Linux {
        /// What was being done.
        action: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A record can not be read back.
    #[error("record {path:?}: {reason}")]
    Record {
        /// The record's path.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A record of another version of the format.
    #[error(
        "record {path:?} has version {version}, of another berth; this one reads version {readable}: start the berth that wrote it"
    )]
    RecordVersion {
        /// The record's path.
        path: PathBuf,
        /// The version it has.
        version: u32,
        /// The version that this program reads.
        readable: u32,
    },
    /// A container could not be checkpointed.
    #[error("checkpoint container {id}: {reason}")]
    Checkpoint {
        /// The container.
        id: String,
        /// Why, as CRIU words it.
        reason: String,
    },
    /// A foreign OCI runtime does not work.
    #[error("OCI runtime {name}: {reason}")]
    Runtime {
        /// The handler's name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The pod's shim refused or failed a request.
    #[error("{message}")]
    Shim {
        /// The request, as a verb.
        action: &'static str,
        /// The shim's text.
        message: String,
    },
    /// The pod's shim is gone or does not answer.
    #[error("the shim of pod sandbox {id} can not be reached: {reason}")]
    ShimGone {
        /// The sandbox.
        id: String,
        /// What was noticed.
        reason: String,
    },
    /// The process of a container could not be started.
    #[error("failed to start container {id}: {message}")]
    Start {
        /// The container.
        id: String,
        /// The start error, as the OCI core words it.
        message: String,
    },
    /// The pod's network could not be set up or undone.
    #[error("{action} network of pod sandbox {id}")]
    Network {
        /// "set up" or "tear down".
        action: &'static str,
        /// The sandbox.
        id: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The image service failed.
    #[error("{action} image {image:?}")]
    Image {
        /// What was being done.
        action: &'static str,
        /// The image.
        image: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An image can not be a volume. Kubelets know the first word.
    #[error("ImageVolumeMountFailed: mount image {image:?}{}", within(.sub_path))]
    ImageVolume {
        /// The image.
        image: String,
        /// The part of it that was asked for; empty is all of it.
        sub_path: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Nothing describes these CDI devices. In containerd's words: people search for them.
    #[error("CDI device injection failed: unresolvable CDI devices {devices}{reasons}")]
    CdiUnresolvable {
        /// Their names.
        devices: String,
        /// What is wrong in the folders, in brackets; empty when nothing is.
        reasons: String,
    },
    /// What describes a CDI device does not fit the machine.
    #[error("CDI device injection failed: {device}: {reason}")]
    Cdi {
        /// Its name.
        device: String,
        /// What does not fit.
        reason: String,
    },
    /// An AppArmor profile could not be loaded.
    #[error("load AppArmor profile {profile:?}: {reason}")]
    AppArmor {
        /// The profile.
        profile: &'static str,
        /// What the parser said.
        reason: String,
    },
    /// An NRI plugin refused, or two want different things.
    #[error("NRI")]
    Nri {
        /// The cause, which names them.
        #[source]
        source: Box<berth_nri::Error>,
    },
    /// A cgroup operation failed.
    #[error("{action} cgroup of {subject}")]
    Cgroup {
        /// What was being done.
        action: &'static str,
        /// The sandbox or container.
        subject: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A command ran past its time and was killed.
    #[error("command {command:?} timed out after {seconds} s")]
    Timeout {
        /// The command line.
        command: String,
        /// The time it had.
        seconds: u64,
    },
    /// A step did not end in its time.
    #[error("{step} of {subject}{}: not ended since {since}, the limit is {} s (`berth why {subject}` says more)", about(.object), .limit.as_secs())]
    Overdue {
        /// What it does, as a verb.
        step: &'static str,
        /// The sandbox or container.
        subject: String,
        /// What it works on or waits for; may be empty.
        object: String,
        /// When it began.
        since: String,
        /// How long it may take.
        limit: std::time::Duration,
    },
    /// A pod that was to end has not.
    #[error("pod {pod} ({id}) has not ended: {doing}")]
    Unended {
        /// `namespace/name`.
        pod: String,
        /// Its sandbox.
        id: String,
        /// The step it is stuck at or failed at.
        doing: String,
    },
    /// The caller's deadline has passed, or it went away.
    #[error("{what} was cancelled")]
    Cancelled {
        /// The operation.
        what: &'static str,
    },
    /// Too many of something are waiting.
    #[error("too many {what}")]
    Exhausted {
        /// What there are too many of.
        what: &'static str,
    },
    /// Several steps of a teardown failed; the rest is done and a later call resumes.
    #[error("{}", join(.0))]
    Many(Vec<Arc<Error>>),
    /// The client of an exec or attach.
    #[error("the client has hung up, or was silent for too long")]
    ClientGone,
    /// The container of an attach runs on, but its output has ended.
    #[error("no more output: the container has closed it, or the client was too slow and was cut off")]
    OutputEnded,
    /// The server is stopping.
    #[error("the runtime is shutting down")]
    Closing,
}

fn within(sub_path: &str) -> String {
    if sub_path.is_empty() { String::new() } else { format!(" path {sub_path:?}") }
}

fn about(object: &str) -> String {
    if object.is_empty() { String::new() } else { format!(" ({object})") }
}

fn join(errors: &[Arc<Error>]) -> String {
    errors.iter().map(|e| text(e)).collect::<Vec<_>>().join("; ")
}

/// The whole text of an error, sources included, as users are shown it.
pub fn text(error: &(dyn std::error::Error + 'static)) -> String {
    let mut out = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let part = cause.to_string();
        if !out.ends_with(&part) {
            out.push_str(": ");
            out.push_str(&part);
        }
        next = cause.source();
    }
    out
}

/// The gRPC code of an error.
pub fn code(error: &Error) -> tonic::Code {
    use tonic::Code;
    match error {
        Error::Invalid { .. } => Code::InvalidArgument,
        Error::Unsupported { .. } => Code::Unimplemented,
        Error::NotFound { .. } => Code::NotFound,
        Error::Exists { .. } => Code::AlreadyExists,
        Error::State { .. } => Code::FailedPrecondition,
        Error::Timeout { .. } | Error::Overdue { .. } | Error::Unended { .. } => Code::DeadlineExceeded,
        Error::Cancelled { .. } | Error::ClientGone => Code::Cancelled,
        Error::Exhausted { .. } => Code::ResourceExhausted,
        Error::ShimGone { .. } | Error::Closing => Code::Unavailable,
        _ => Code::Unknown,
    }
}

/// The gRPC status of an error.
pub fn status(error: &Error) -> tonic::Status {
    tonic::Status::new(code(error), text(error))
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        status(&error)
    }
}

/// Shorthand for a bad field.
pub(crate) fn invalid(field: &'static str, reason: impl Into<String>) -> Error {
    Error::Invalid { field, reason: reason.into() }
}

/// Shorthand for a failed file operation, for `map_err`.
pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.into();
    move |source| Error::File { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_error_has_the_code_the_contract_names() {
        let cases = [
            (invalid("x", "y"), tonic::Code::InvalidArgument),
            (Error::Unsupported { what: "x", reason: String::new() }, tonic::Code::Unimplemented),
            (Error::NotFound { kind: "container", id: "a".into() }, tonic::Code::NotFound),
            (Error::Exists { kind: "container", name: "a".into(), id: "b".into() }, tonic::Code::AlreadyExists),
            (
                Error::State { kind: "container", id: "a".into(), state: "exited", wanted: "must run" },
                tonic::Code::FailedPrecondition,
            ),
            (Error::Timeout { command: "a".into(), seconds: 1 }, tonic::Code::DeadlineExceeded),
            (Error::Exhausted { what: "tokens" }, tonic::Code::ResourceExhausted),
            (Error::ClientGone, tonic::Code::Cancelled),
            (Error::Closing, tonic::Code::Unavailable),
            (Error::Start { id: "a".into(), message: "b".into() }, tonic::Code::Unknown),
        ];
        for (error, want) in cases {
            assert_eq!(code(&error), want, "{error}");
        }
    }

    #[test]
    fn the_text_holds_the_cause_once() {
        let error = file("open", "/a")(std::io::Error::from_raw_os_error(2));
        assert_eq!(text(&error), "open \"/a\": No such file or directory (os error 2)");
        let error = Error::ImageVolume { image: "a".into(), sub_path: "b".into(), source: "gone".into() };
        assert_eq!(text(&error), "ImageVolumeMountFailed: mount image \"a\" path \"b\": gone");
    }
}
