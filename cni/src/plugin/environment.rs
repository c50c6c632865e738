//! The protocol's environment variables.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_linux::ns::{NamespaceKind, open_ns_path};
use rustix::fs::{FlockOperation, flock};

use crate::invocation::{Invocation, Verb};
use crate::kernel::refuse_own_netns;
use crate::names::{check_container_id, check_ifname};
use crate::{Error, Result};

/// What the caller passed.
#[derive(Debug)]
pub(super) struct Environment {
    /// None for verbs that concern no container.
    pub invocation: Option<Invocation>,
    pub path: Vec<PathBuf>,
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn required(name: &'static str) -> Result<String> {
    variable(name).ok_or_else(|| Error::Environment { variable: name, reason: "it is missing".to_owned() })
}

/// `CNI_COMMAND`
pub(super) fn verb() -> Result<Verb> {
    let name = required("CNI_COMMAND")?;
    let unknown = || Error::Environment { variable: "CNI_COMMAND", reason: format!("unknown command {name:?}") };
    Verb::ALL.into_iter().find(|verb| verb.name() == name).ok_or_else(unknown)
}

impl Environment {
    pub(super) fn read(verb: Verb) -> Result<Self> {
        let path = required("CNI_PATH")?.split(':').filter(|dir| !dir.is_empty()).map(PathBuf::from).collect();
        if matches!(verb, Verb::Status | Verb::Gc | Verb::Version) {
            return Ok(Self { invocation: None, path });
        }
        let (container_id, ifname) = (required("CNI_CONTAINERID")?, required("CNI_IFNAME")?);
        check_container_id(&container_id)?;
        check_ifname(&ifname)?;
        let netns_path = variable("CNI_NETNS").map(PathBuf::from);
        let netns = match &netns_path {
            // After the namespace's end there is nothing left in it to undo.
            Some(path) if verb == Verb::Del => open_netns(path).ok(),
            Some(path) => Some(open_netns(path)?),
            None if verb == Verb::Del => None,
            None => return required("CNI_NETNS").map(|_| Self { invocation: None, path }),
        };
        if let Some(netns) = &netns {
            refuse_own_netns(netns.as_fd())?;
        }
        let args = parse_args(&variable("CNI_ARGS").unwrap_or_default())?;
        let invocation = Invocation { container_id, ifname, netns: netns.map(Arc::new), netns_path, args };
        Ok(Self { invocation: Some(invocation), path })
    }
}

fn open_netns(path: &Path) -> Result<OwnedFd> {
    open_ns_path(path, NamespaceKind::Net)
        .map_err(|error| Error::Netns { subject: path.display().to_string(), source: Arc::new(std::io::Error::other(error)) })
}

/// `K=V;K=V`. A key that asks for something is refused, also under `IgnoreUnknown`: we would not do it.
fn parse_args(text: &str) -> Result<Vec<(String, String)>> {
    let invalid = |reason: String| Error::Environment { variable: "CNI_ARGS", reason };
    let mut args = Vec::new();
    for pair in text.split(';').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(|| invalid(format!("{pair:?} is not KEY=VALUE")))?;
        args.push((key.to_owned(), value.to_owned()));
    }
    let ignore =
        args.iter().any(|(key, value)| key == "IgnoreUnknown" && matches!(value.as_str(), "1" | "true" | "True" | "TRUE"));
    for (key, _) in &args {
        let asks = matches!(key.as_str(), "IP" | "GATEWAY" | "MAC");
        if asks || !ignore && key != "IgnoreUnknown" {
            return Err(invalid(format!("{key} is not supported")));
        }
    }
    Ok(args)
}

/// One plugin process at a time: two would write the NAT rules over each other.
pub(super) fn lock(state: &Path) -> Result<File> {
    std::fs::create_dir_all(state).map_err(Error::file("create folder", state))?;
    let path = state.join("lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(Error::file("open", &path))?;
    flock(&file, FlockOperation::LockExclusive).map_err(|e| Error::file("lock", &path)(e.into()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn args_are_refused_unless_they_may_be_ignored() {
        assert!(parse_args("IgnoreUnknown=1;K8S_POD_NAME=a").is_ok());
        assert!(parse_args("").is_ok());
        for bad in ["K8S_POD_NAME=a", "IgnoreUnknown=1;IP=10.0.0.1", "x", "IgnoreUnknown=0;A=b"] {
            assert!(parse_args(bad).is_err(), "{bad}");
        }
    }
}
