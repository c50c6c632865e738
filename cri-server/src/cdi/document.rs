//! A CDI spec file (versions 0.1 to 1.1): its fields, and the checks that need nothing but the text. Unknown fields are
//! refused by name, as is a field that is younger than the version the file claims.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::names;

/// A spec file.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Document {
    pub(super) cdi_version: String,
    /// `vendor/class`.
    pub(super) kind: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    pub(super) devices: Vec<Device>,
    /// For every container that has one of the devices.
    #[serde(default)]
    pub(super) container_edits: Edits,
}

/// A device of the file.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Device {
    pub(super) name: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) container_edits: Edits,
}

/// What is changed in a container's OCI spec.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Edits {
    pub(super) env: Vec<String>,
    pub(super) device_nodes: Vec<DeviceNode>,
    pub(super) net_devices: Vec<NetDevice>,
    pub(super) hooks: Vec<Hook>,
    pub(super) mounts: Vec<Mount>,
    pub(super) intel_rdt: Option<IntelRdt>,
    pub(super) additional_gids: Vec<u32>,
}

/// A device node. What is missing is looked up at its place on the host.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct DeviceNode {
    pub(super) path: String,
    pub(super) host_path: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) major: i64,
    pub(super) minor: i64,
    pub(super) file_mode: Option<u32>,
    pub(super) permissions: String,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
}

/// An interface to move: not supported.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct NetDevice {
    pub(super) host_interface_name: String,
    pub(super) name: String,
}

/// A program to run.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Hook {
    pub(super) hook_name: String,
    pub(super) path: String,
    #[serde(default)]
    pub(super) args: Vec<String>,
    #[serde(default)]
    pub(super) env: Vec<String>,
    pub(super) timeout: Option<u32>,
}

/// A mount.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Mount {
    pub(super) host_path: String,
    pub(super) container_path: String,
    #[serde(default, rename = "type")]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) options: Vec<String>,
}

/// Cache allocation: not supported.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct IntelRdt {
    #[serde(rename = "closID")]
    clos_id: String,
    #[serde(rename = "l3CacheSchema")]
    l3_cache_schema: String,
    #[serde(rename = "memBwSchema")]
    mem_bw_schema: String,
    schemata: Vec<String>,
    #[serde(rename = "enableMonitoring")]
    enable_monitoring: bool,
    #[serde(rename = "enableCMT")]
    enable_cmt: bool,
    #[serde(rename = "enableMBM")]
    enable_mbm: bool,
}

/// The hook points of the OCI specification.
pub(super) const HOOKS: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// The youngest version we know.
const NEWEST: (u64, u64) = (1, 1);

impl Document {
    /// Reads a file's text; its name says the format. The error is a reason for people.
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, String> {
        let document: Self = if path.extension().is_some_and(|e| e == "json") {
            serde_json::from_str(text).map_err(|e| e.to_string())?
        } else {
            serde_yaml_ng::from_str(text).map_err(|e| e.to_string())?
        };
        document.check()?;
        Ok(document)
    }

    fn check(&self) -> Result<(), String> {
        let version = version(&self.cdi_version)?;
        let (needed, because) = self.needs();
        if version < needed {
            return Err(format!("{because} needs cdiVersion {}.{}.0, the file says {:?}", needed.0, needed.1, self.cdi_version));
        }
        let kind = self.kind.split_once('/').filter(|(v, c)| names::is_vendor_or_class(v) && names::is_vendor_or_class(c));
        if kind.is_none() {
            return Err(format!("kind {:?} is not vendor/class", self.kind));
        }
        if self.devices.is_empty() {
            return Err("no devices".into());
        }
        self.container_edits.check().map_err(|e| format!("containerEdits: {e}"))?;
        for (i, device) in self.devices.iter().enumerate() {
            if !names::is_device(&device.name) {
                return Err(format!("device name {:?} is not valid", device.name));
            }
            if self.devices[..i].iter().any(|d| d.name == device.name) {
                return Err(format!("device {:?} is there twice", device.name));
            }
            if device.container_edits == Edits::default() {
                return Err(format!("device {:?} has no containerEdits", device.name));
            }
            device.container_edits.check().map_err(|e| format!("device {:?}: {e}", device.name))?;
        }
        Ok(())
    }

    /// The version that the fields in use came with, and which of them it was.
    fn needs(&self) -> ((u64, u64), &'static str) {
        let edits = || self.devices.iter().map(|d| &d.container_edits).chain([&self.container_edits]);
        let rules: [(bool, (u64, u64), &str); 8] = [
            (edits().any(|e| !e.net_devices.is_empty()), (1, 1), "netDevices"),
            (
                edits().any(|e| e.intel_rdt.as_ref().is_some_and(|r| !r.schemata.is_empty() || r.enable_monitoring)),
                (1, 1),
                "intelRdt.schemata",
            ),
            (edits().any(|e| e.intel_rdt.is_some()), (0, 7), "intelRdt"),
            (edits().any(|e| !e.additional_gids.is_empty()), (0, 7), "additionalGids"),
            (!self.annotations.is_empty() || self.devices.iter().any(|d| !d.annotations.is_empty()), (0, 6), "annotations"),
            (self.kind.split_once('/').is_some_and(|(_, class)| class.contains('.')), (0, 6), "a class with a dot"),
            (
                edits().flat_map(|e| &e.device_nodes).any(|n| !n.host_path.is_empty())
                    || self.devices.iter().any(|d| d.name.starts_with(|c: char| c.is_ascii_digit())),
                (0, 5),
                "deviceNodes.hostPath or a device name with a digit first",
            ),
            (edits().flat_map(|e| &e.mounts).any(|m| !m.kind.is_empty()), (0, 4), "mounts.type"),
        ];
        rules.into_iter().find(|(used, ..)| *used).map_or(((0, 0), ""), |(_, version, what)| (version, what))
    }
}

fn version(text: &str) -> Result<(u64, u64), String> {
    let wrong = || format!("cdiVersion {text:?} is not one of 0.1.0 to {}.{}.0", NEWEST.0, NEWEST.1);
    let mut parts = text.strip_prefix('v').unwrap_or(text).splitn(3, '.').map(str::parse::<u64>);
    match (parts.next(), parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor)), Some(Ok(_))) => {
            let known = matches!((major, minor), (0, 1..=8) | (1, 0..=1));
            if known { Ok((major, minor)) } else { Err(wrong()) }
        }
        _ => Err(wrong()),
    }
}

impl Edits {
    fn check(&self) -> Result<(), String> {
        let env = |env: &[String]| match env.iter().find(|e| e.find('=').is_none_or(|at| at == 0) || e.contains('\0')) {
            Some(entry) => Err(format!("env {entry:?} is not NAME=value")),
            None => Ok(()),
        };
        env(&self.env)?;
        for node in &self.device_nodes {
            if !node.path.starts_with('/') {
                return Err(format!("deviceNodes.path {:?} is not absolute", node.path));
            }
            if !matches!(node.kind.as_str(), "" | "b" | "c" | "u" | "p") {
                return Err(format!("device {:?} has the unknown type {:?}", node.path, node.kind));
            }
            if !node.permissions.bytes().all(|b| b"rwm".contains(&b)) {
                return Err(format!("device {:?} has permissions {:?}, not a subset of \"rwm\"", node.path, node.permissions));
            }
        }
        for hook in &self.hooks {
            if !HOOKS.contains(&hook.hook_name.as_str()) {
                return Err(format!("hook name {:?} is not one of {}", hook.hook_name, HOOKS.join(", ")));
            }
            if !hook.path.starts_with('/') {
                return Err(format!("hook {} has the path {:?}, which is not absolute", hook.hook_name, hook.path));
            }
            env(&hook.env).map_err(|e| format!("hook {}: {e}", hook.hook_name))?;
        }
        for mount in &self.mounts {
            if mount.host_path.is_empty() || !mount.container_path.starts_with('/') {
                return Err(format!("mount {:?} on {:?} needs both paths", mount.host_path, mount.container_path));
            }
        }
        match self.net_devices.iter().find(|n| n.host_interface_name.is_empty() || n.name.is_empty()) {
            Some(_) => Err("netDevices need hostInterfaceName and name".into()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yaml(text: &str) -> Result<Document, String> {
        Document::parse(Path::new("a.yaml"), text)
    }

    #[test]
    fn both_formats_are_read() {
        let json = r#"{"cdiVersion":"0.3.0","kind":"v.com/c","devices":[{"name":"d","containerEdits":{"env":["A=b"]}}]}"#;
        let from_json = Document::parse(Path::new("a.json"), json).unwrap();
        let from_yaml =
            yaml("cdiVersion: 0.3.0\nkind: v.com/c\ndevices:\n- name: d\n  containerEdits:\n    env: [A=b]\n").unwrap();
        assert_eq!(from_json, from_yaml);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let with = |version: &str, kind: &str, edits: &str| {
            format!("cdiVersion: {version}\nkind: {kind}\ndevices:\n- name: d\n  containerEdits: {edits}\n")
        };
        for (text, reason) in [
            (with("9.0.0", "v/c", "{env: [A=b]}"), "9.0.0"),
            (with("0.3", "v/c", "{env: [A=b]}"), "0.3"),
            (with("1.0.0", "vc", "{env: [A=b]}"), "vendor/class"),
            (with("1.0.0", "v/c", "{}"), "no containerEdits"),
            (with("1.0.0", "v/c", "{env: [A]}"), "NAME=value"),
            (with("1.0.0", "v/c", "{frob: 1}"), "frob"),
            (with("1.0.0", "v/c", "{deviceNodes: [{path: dev/x}]}"), "not absolute"),
            (with("1.0.0", "v/c", "{deviceNodes: [{path: /dev/x, type: z}]}"), "unknown type"),
            (with("1.0.0", "v/c", "{deviceNodes: [{path: /dev/x, permissions: x}]}"), "subset"),
            (with("1.0.0", "v/c", "{hooks: [{hookName: later, path: /x}]}"), "later"),
            (with("1.0.0", "v/c", "{mounts: [{hostPath: '', containerPath: /x}]}"), "both paths"),
            (with("0.4.0", "v/c", "{deviceNodes: [{path: /dev/x, hostPath: /dev/y}]}"), "0.5.0"),
            (with("0.6.0", "v/c", "{additionalGids: [1]}"), "0.7.0"),
            (with("0.3.0", "v/c", "{mounts: [{hostPath: /a, containerPath: /x, type: none}]}"), "0.4.0"),
            (with("1.0.0", "v/c", "{netDevices: [{hostInterfaceName: a, name: b}]}"), "1.1.0"),
            ("cdiVersion: 1.0.0\nkind: v/c\ndevices: []\n".into(), "no devices"),
        ] {
            let error = yaml(&text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn every_version_there_was_is_read() {
        for v in ["0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0", "v1.0.0"] {
            let text = format!("cdiVersion: {v}\nkind: v/c\ndevices:\n- name: d\n  containerEdits: {{env: [A=b]}}\n");
            assert!(yaml(&text).is_ok(), "{v}");
        }
    }
}
