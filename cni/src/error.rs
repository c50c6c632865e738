//! The crate's error: one variant for one failed operation, with its subject, and the one place that maps errors to CNI codes.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::{Cidr, Protocol};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a netlink request failed: the kernel's error number and, where it gave one, its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelError {
    /// The error number; none when the exchange itself went wrong.
    pub errno: Option<i32>,
    /// The kernel's explanation, or what went wrong.
    pub text: String,
}

impl std::fmt::Display for KernelError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.errno {
            Some(errno) if self.text.is_empty() => write!(f, "{}", io::Error::from_raw_os_error(errno)),
            Some(errno) => write!(f, "{}: {}", io::Error::from_raw_os_error(errno), self.text),
            None => f.write_str(&self.text),
        }
    }
}

impl std::error::Error for KernelError {}

impl From<io::Error> for KernelError {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(errno) => Self { errno: Some(errno), text: String::new() },
            None => Self { errno: None, text: error.to_string() },
        }
    }
}

/// What can fail while a network is configured, attached or detached. Cheap to clone: callers that join one operation all
/// get its error.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No usable network configuration.
    #[error("network is not ready: {reason}")]
    NotReady {
        /// Why, by file name.
        reason: String,
    },
    /// A value that is part of file names or kernel names is not acceptable.
    #[error("invalid {what} {value:?}")]
    InvalidName {
        /// What it names.
        what: &'static str,
        /// The value.
        value: String,
    },
    /// JSON that cannot be read.
    #[error("failed to decode {what}")]
    Decode {
        /// What was read.
        what: String,
        /// Why not.
        #[source]
        source: Arc<serde_json::Error>,
    },
    /// A CNI version that is not spoken here.
    #[error("incompatible CNI version {version:?} in {what}")]
    Version {
        /// Where it was found.
        what: String,
        /// The version.
        version: String,
    },
    /// A field of the network configuration that is refused.
    #[error("{plugin}: unsupported field {field:?} with value {value}")]
    UnsupportedField {
        /// Plugin type.
        plugin: String,
        /// Path of the field.
        field: String,
        /// Its value as JSON.
        value: String,
    },
    /// A network configuration that makes no sense.
    #[error("{plugin}: invalid network configuration: {reason}")]
    InvalidConfig {
        /// Plugin type or file.
        plugin: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An environment variable of the plugin protocol is missing or malformed.
    #[error("invalid environment variable {variable}: {reason}")]
    Environment {
        /// Its name.
        variable: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A file operation.
    #[error("failed to {operation} {path}", path = path.display())]
    File {
        /// Verb.
        operation: &'static str,
        /// Subject.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Arc<io::Error>,
    },
    /// A netlink request that the kernel refused.
    #[error("failed to {operation} {subject}")]
    Netlink {
        /// Verb.
        operation: &'static str,
        /// Subject.
        subject: String,
        /// Why not.
        #[source]
        source: KernelError,
    },
    /// Entering a network namespace.
    #[error("failed to enter network namespace of {subject}")]
    Netns {
        /// Whose.
        subject: String,
        /// Why not.
        #[source]
        source: Arc<io::Error>,
    },
    /// The netlink thread is gone.
    #[error("netlink worker has ended")]
    WorkerEnded,
    /// An attachment or detachment ended without a result.
    #[error("network operation of sandbox {sandbox_id} was aborted")]
    Aborted {
        /// The sandbox.
        sandbox_id: String,
    },
    /// An external plugin that is in no plugin folder.
    #[error("failed to find plugin {plugin:?} in path {path:?}")]
    PluginNotFound {
        /// Its type.
        plugin: String,
        /// The folders.
        path: Vec<PathBuf>,
    },
    /// An external plugin that did not start, or whose pipes failed.
    #[error("failed to run plugin {plugin:?} ({verb})")]
    PluginRun {
        /// Its type.
        plugin: String,
        /// The CNI command.
        verb: &'static str,
        /// Why not.
        #[source]
        source: Arc<io::Error>,
    },
    /// An external plugin that was killed at its deadline.
    #[error("plugin {plugin:?} of network {network:?} ({verb}) did not end within {limit:?} and was killed")]
    PluginTimeout {
        /// Its type.
        plugin: String,
        /// The network's name.
        network: String,
        /// The CNI command.
        verb: &'static str,
        /// The deadline.
        limit: Duration,
    },
    /// An external plugin that reported an error.
    #[error("plugin type={plugin:?} failed ({verb}): {message}")]
    PluginFailed {
        /// Its type.
        plugin: String,
        /// The CNI command.
        verb: &'static str,
        /// The CNI error code that it gave, 0 if none.
        code: u32,
        /// Its message and details.
        message: String,
    },
    /// An attachment that failed, and whose undoing failed too: DEL is tried again.
    #[error("{}; undoing that failed too: {}", cause.chain_text(), undo.chain_text())]
    NotUndone {
        /// Why it was not attached: what counts, so it comes first and is no source.
        cause: Box<Error>,
        /// How the undoing failed.
        undo: Box<Error>,
    },
    /// A chain needs the namespace's path.
    #[error("plugin {plugin:?} needs a network namespace path")]
    NetnsPathMissing {
        /// Plugin type.
        plugin: String,
    },
    /// Nothing left to allocate.
    #[error("no IP addresses available in range set: {ranges}")]
    Exhausted {
        /// The ranges.
        ranges: String,
    },
    /// Two pods want one host port.
    #[error("host port {port}/{protocol} on {host} is in use by another pod", protocol = protocol.name())]
    HostPortInUse {
        /// Address that is listened on, or "any address".
        host: String,
        /// Protocol.
        protocol: Protocol,
        /// Port.
        port: u16,
    },
    /// The bridge's name belongs to another kind of link.
    #[error("{link} exists and is not a bridge")]
    NotABridge {
        /// The link.
        link: String,
    },
    /// The bridge has an address of the same family.
    #[error("bridge {bridge} has address {found}, not {wanted}, and forceAddress is not set")]
    BridgeAddress {
        /// The bridge.
        bridge: String,
        /// Address found.
        found: Cidr,
        /// Address wanted.
        wanted: Cidr,
    },
    /// CHECK found a difference.
    #[error("check of {subject} failed: {reason}")]
    Check {
        /// What was looked at.
        subject: String,
        /// The difference.
        reason: String,
    },
    /// No address range for the built-in network is free on this host.
    #[error("no free subnet for the built-in network: all candidates overlap with routes of this host, such as {example}")]
    NoFreeSubnet {
        /// A route in the way.
        example: String,
    },
    /// A subnet that was asked for has addresses of the node in it.
    #[error(
        "pod CIDR {cidr} overlaps with {address} of interface {link}: pods would get addresses of the node and its network; choose another pod CIDR"
    )]
    SubnetTaken {
        /// The subnet.
        cidr: Cidr,
        /// The address of the node.
        address: Cidr,
        /// Its interface.
        link: String,
    },
    /// All plugins succeeded and none gave the pod an address.
    #[error("the plugins of network {network} gave the pod no address")]
    NoAddress {
        /// Its name.
        network: String,
    },
    /// The pod has no address of the family that a host port needs.
    #[error("no address of the pod for host address {host}")]
    NoPodAddress {
        /// Host address of the mapping.
        host: IpAddr,
    },
}

impl Error {
    /// For `map_err` on file operations.
    pub(crate) fn file<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::File { operation, path: path.to_owned(), source: Arc::new(source) }
    }

    /// For `map_err` on netlink requests.
    pub(crate) fn netlink(operation: &'static str, subject: impl Into<String>) -> impl FnOnce(KernelError) -> Self {
        move |source| Self::Netlink { operation, subject: subject.into(), source }
    }

    /// For `map_err` on JSON.
    pub(crate) fn decode(what: impl Into<String>) -> impl FnOnce(serde_json::Error) -> Self {
        move |source| Self::Decode { what: what.into(), source: Arc::new(source) }
    }

    pub(crate) fn invalid(plugin: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::InvalidConfig { plugin: plugin.into(), reason: reason.into() }
    }

    /// The kernel's error number, if a netlink request failed.
    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Self::Netlink { source, .. } => source.errno,
            _ => None,
        }
    }

    /// The error code of the CNI specification.
    pub fn cni_code(&self) -> u32 {
        match self {
            Self::Version { .. } => 1,
            Self::UnsupportedField { .. } => 2,
            Self::Environment { .. } | Self::InvalidName { .. } | Self::NetnsPathMissing { .. } => 4,
            Self::File { .. } | Self::Netns { .. } => 5,
            Self::Decode { .. } => 6,
            Self::InvalidConfig { .. }
            | Self::NotABridge { .. }
            | Self::BridgeAddress { .. }
            | Self::NoFreeSubnet { .. }
            | Self::SubnetTaken { .. } => 7,
            Self::NotReady { .. } => 50,
            Self::PluginFailed { code, .. } if *code != 0 => *code,
            Self::Exhausted { .. } => 101,
            Self::HostPortInUse { .. } => 102,
            Self::Check { .. } => 103,
            Self::Netlink { .. } => 104,
            Self::PluginNotFound { .. } | Self::PluginRun { .. } | Self::PluginTimeout { .. } | Self::PluginFailed { .. } => 105,
            Self::NotUndone { cause, .. } => cause.cni_code(),
            Self::WorkerEnded | Self::Aborted { .. } | Self::NoAddress { .. } | Self::NoPodAddress { .. } => 999,
        }
    }

    /// The error with all its causes on one line.
    pub fn chain_text(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_the_specification_s_codes() {
        let json = serde_json::from_str::<u8>("x").unwrap_err();
        let io = || io::Error::from_raw_os_error(2);
        let table = [
            (Error::Version { what: "x".into(), version: "9".into() }, 1),
            (Error::UnsupportedField { plugin: "bridge".into(), field: "vlan".into(), value: "3".into() }, 2),
            (Error::Environment { variable: "CNI_COMMAND", reason: "missing".into() }, 4),
            (Error::file("read", Path::new("/x"))(io()), 5),
            (Error::decode("x")(json), 6),
            (Error::invalid("bridge", "x"), 7),
            (Error::NotReady { reason: "x".into() }, 50),
            (Error::Exhausted { ranges: "x".into() }, 101),
            (Error::PluginFailed { plugin: "p".into(), verb: "ADD", code: 11, message: "later".into() }, 11),
            (Error::PluginFailed { plugin: "p".into(), verb: "ADD", code: 0, message: "?".into() }, 105),
        ];
        for (error, code) in table {
            assert_eq!(error.cni_code(), code, "{error}");
        }
    }

    #[test]
    fn the_text_does_not_repeat_the_source() {
        let error = Error::netlink("create veth", "eth0")(KernelError::from(io::Error::from_raw_os_error(17)));
        assert_eq!(error.to_string(), "failed to create veth eth0");
        assert_eq!(error.chain_text(), "failed to create veth eth0: File exists (os error 17)");
    }
}
