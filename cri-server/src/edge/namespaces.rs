//! Where the namespaces of a running pod can be entered, as paths that `nsenter` and its like take. It reads `/proc` for people; nothing
//! is decided by it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// The kinds that a pod's containers share, by the names of the kernel and of the OCI specification.
const KINDS: [(&str, &str); 5] = [("user", "user"), ("pid", "pid"), ("net", "network"), ("ipc", "ipc"), ("uts", "uts")];

fn kernel_name(oci: &str) -> Option<&'static str> {
    KINDS.iter().find(|(_, name)| *name == oci).map(|(kind, _)| *kind)
}

/// A namespace as the kernel names it: `net:[4026531840]`.
fn name(path: impl AsRef<Path>) -> Option<String> {
    Some(std::fs::read_link(path).ok()?.to_str()?.to_owned())
}

fn of_process(pid: i32, kind: &str) -> PathBuf {
    format!("/proc/{pid}/ns/{kind}").into()
}

/// The namespaces that a pod has of its own. Its shim is in none of them and holds them by descriptors.
#[derive(Debug, Default)]
pub(super) struct PodNamespaces {
    /// By the kernel's name of the kind: where it is, and which one it is.
    found: BTreeMap<&'static str, (PathBuf, String)>,
}

impl PodNamespaces {
    /// Those that a shim holds; none when it has ended. Blocking.
    pub(super) fn of_shim(pid: i32) -> Self {
        let mut found = BTreeMap::new();
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            let Some(name) = name(entry.path()) else { continue };
            if let Some((kind, _)) = KINDS.iter().find(|(kind, _)| name.starts_with(&format!("{kind}:["))) {
                found.entry(*kind).or_insert_with(|| (entry.path(), name));
            }
        }
        Self { found }
    }

    /// Where the network namespace is.
    pub(super) fn network(&self) -> Option<&Path> {
        self.found.get("net").map(|(path, _)| path.as_path())
    }

    fn has(&self, pid: i32, kind: &str) -> bool {
        self.found.get(kind).is_some_and(|(_, pods)| name(of_process(pid, kind)).as_ref() == Some(pods))
    }

    /// Whether a process is in the pod's namespaces: those of processes and of users aside, which can be its container's. Blocking.
    pub(super) fn hold(&self, pid: i32) -> bool {
        let alive = name(of_process(pid, "net")).is_some();
        alive && ["net", "ipc", "uts"].iter().all(|kind| !self.found.contains_key(kind) || self.has(pid, kind))
    }

    /// As the entries of an OCI spec.
    pub(super) fn entries(&self) -> Vec<Value> {
        let entry = |(kind, oci): &(&str, &str)| {
            let (path, _) = self.found.get(kind)?;
            Some(json!({ "type": oci, "path": path }))
        };
        KINDS.iter().filter_map(entry).collect()
    }

    /// Gives the entries of a container's OCI spec that mean the pod's namespaces their paths: the spec on record leaves them to
    /// the shim. `pid` is the container's first process, `target` that of the container whose processes it sees. Blocking.
    pub(super) fn show_in(&self, spec: &mut Value, pid: i32, target: Option<i32>) {
        let Some(entries) = spec.pointer_mut("/linux/namespaces").and_then(Value::as_array_mut) else { return };
        for entry in entries.iter_mut().filter(|entry| entry.get("path").is_none()) {
            let Some(kind) = entry["type"].as_str().and_then(kernel_name) else { continue };
            let path = match target {
                Some(target) if kind == "pid" => Some(of_process(target, kind)),
                _ => self.found.get(kind).filter(|_| self.has(pid, kind)).map(|(path, _)| path.clone()),
            };
            if let Some(path) = path {
                entry["path"] = json!(path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(kind: &str) -> (PathBuf, String) {
        let path = of_process(std::process::id() as i32, kind);
        (path.clone(), name(path).unwrap())
    }

    #[test]
    fn namespaces_of_the_pod_are_shown_by_their_paths_and_a_containers_own_are_not() {
        let me = std::process::id() as i32;
        let (net, other) = (own("net"), ("/proc/1/ns/pid".into(), "pid:[1]".to_owned()));
        let pod = PodNamespaces { found: [("net", net.clone()), ("pid", other)].into() };
        let spec = || json!({ "linux": { "namespaces": [{ "type": "mount" }, { "type": "pid" }, { "type": "network" }] } });
        let mut shown = spec();
        pod.show_in(&mut shown, me, None);
        let want = json!([{ "type": "mount" }, { "type": "pid" }, { "type": "network", "path": net.0 }]);
        assert_eq!(shown["linux"]["namespaces"], want, "this process is in that network, and in another PID namespace");
        let mut shown = spec();
        pod.show_in(&mut shown, me, Some(7));
        assert_eq!(shown["linux"]["namespaces"][1]["path"], "/proc/7/ns/pid");
        let mut given = json!({ "linux": { "namespaces": [{ "type": "network", "path": "/given" }] } });
        pod.show_in(&mut given, me, None);
        assert_eq!(given["linux"]["namespaces"][0]["path"], "/given");
    }

    #[test]
    fn a_process_of_another_network_is_not_in_the_pod() {
        let me = std::process::id() as i32;
        let other = ("/proc/1/fd/9".into(), "net:[1]".to_owned());
        assert!(PodNamespaces { found: [("net", own("net"))].into() }.hold(me));
        assert!(!PodNamespaces { found: [("net", other)].into() }.hold(me));
        assert!(PodNamespaces::default().hold(me) && !PodNamespaces::default().hold(i32::MAX));
    }
}
