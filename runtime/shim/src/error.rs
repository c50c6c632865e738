//! What can go wrong in the shim, one variant per operation.

use std::io;

/// A failed operation of the shim.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The agent did not pass a descriptor.
    #[error("take descriptor {number} from the agent")]
    Inherited {
        /// Its number.
        number: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The configuration is not ours.
    #[error("read the sandbox configuration")]
    Config(#[source] serde_json::Error),
    /// The configuration contradicts itself.
    #[error("sandbox configuration: {0}")]
    ConfigValue(String),
    /// A call of the system.
    #[error("{operation}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A sysctl could not be set.
    #[error("set sysctl {name}")]
    Sysctl {
        /// Its name as given.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A sysctl would reach beyond the pod.
    #[error("sysctl {name} is not of a namespace that the pod has of its own")]
    SysctlNotNamespaced {
        /// Its name as given.
        name: String,
    },
    /// A namespace, mount or process call.
    #[error(transparent)]
    Linux(#[from] berth_linux::Error),
    /// A control group.
    #[error(transparent)]
    Cgroup(#[from] berth_cgroup::Error),
    /// A foreign runtime.
    #[error(transparent)]
    Foreign(#[from] crate::foreign::Error),
    /// A forked helper failed; its text has all causes.
    #[error("{0}")]
    Helper(String),
}

impl Error {
    /// For `map_err`: names the operation.
    pub fn io(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation, source }
    }

    /// The text with all causes.
    pub fn full_text(&self) -> String {
        full_text(self)
    }
}

/// An error's text with all causes behind it.
pub fn full_text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn the_full_text_names_operation_and_cause() {
        let error = Error::Inherited { number: 3, source: io::Error::from_raw_os_error(9) };
        assert!(error.source().is_some());
        assert_eq!(error.full_text(), "take descriptor 3 from the agent: Bad file descriptor (os error 9)");
    }
}
