//! `kubelet_internal_checkpoint`: who has which devices, in the upstream's format, so that a new kubelet, ours or the upstream's,
//! knows it before any plugin is back. A file that is broken or does not fit its checksum is not believed.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use prost::Message;
use serde::{Deserialize, Serialize};

use super::state::{Allocation, Allocations};
use super::wire::v1beta1::ContainerAllocateResponse;
use crate::atomic_file;
use crate::checksum::{fnv32a, map, slice};

/// Its name in the folder of plugins.
pub(crate) const NAME: &str = "kubelet_internal_checkpoint";

/// Devices by NUMA node; -1 has those of none.
type ByNode = BTreeMap<i64, Vec<String>>;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    #[serde(rename = "PodUID")]
    pod_uid: String,
    container_name: String,
    resource_name: String,
    #[serde(rename = "DeviceIDs")]
    device_ids: ByNode,
    /// The plugin's answer as protobuf, in base64.
    alloc_resp: Option<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Data {
    pod_device_entries: Option<Vec<Entry>>,
    registered_devices: Option<BTreeMap<String, Vec<String>>>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct File {
    data: Data,
    checksum: u64,
    /// Ours, outside of what the checksum covers: after a reboot the answers of plugins are worth nothing.
    #[serde(rename = "BootID", default, skip_serializing_if = "String::is_empty")]
    boot_id: String,
}

/// What is kept.
#[derive(Debug, Default)]
pub(crate) struct Checkpoint {
    /// Who has what.
    pub allocations: Allocations,
    /// The healthy devices of each resource that has a plugin.
    pub registered: BTreeMap<String, Vec<String>>,
}

/// The text of a checkpoint.
pub(crate) fn encode(checkpoint: &Checkpoint, boot_id: &str) -> Vec<u8> {
    let mut entries = Vec::new();
    for (pod, containers) in &checkpoint.allocations {
        for (container, resources) in containers {
            for (resource, allocation) in resources {
                entries.push(Entry {
                    pod_uid: pod.clone(),
                    container_name: container.clone(),
                    resource_name: resource.clone(),
                    device_ids: allocation.by_node.clone(),
                    alloc_resp: Some(STANDARD.encode(allocation.response.encode_to_vec())),
                });
            }
        }
    }
    let data = Data {
        pod_device_entries: Some(entries).filter(|entries| !entries.is_empty()),
        registered_devices: Some(checkpoint.registered.clone()),
    };
    let file = File { checksum: checksum(&data), data, boot_id: boot_id.to_owned() };
    serde_json::to_vec(&file).unwrap_or_default()
}

/// Reads the text of a checkpoint; `None` where it is not to be believed.
pub(crate) fn decode(text: &[u8], boot_id: &str) -> Option<Checkpoint> {
    let file: File = serde_json::from_slice(text).ok()?;
    if checksum(&file.data) != file.checksum {
        return None;
    }
    let mut checkpoint = Checkpoint { registered: file.data.registered_devices.unwrap_or_default(), ..Checkpoint::default() };
    for entry in file.data.pod_device_entries.into_iter().flatten() {
        let response = STANDARD.decode(entry.alloc_resp.unwrap_or_default()).ok()?;
        let response = ContainerAllocateResponse::decode(response.as_slice()).ok()?;
        // A file of the upstream's has no boot: its answers hold, as they do there.
        let stale = !file.boot_id.is_empty() && file.boot_id != boot_id;
        let allocation = Allocation { by_node: entry.device_ids, response, stale };
        let containers = checkpoint.allocations.entry(entry.pod_uid).or_default();
        containers.entry(entry.container_name).or_default().insert(entry.resource_name, allocation);
    }
    Some(checkpoint)
}

/// Loads the file of a folder. Without one that can be believed nobody has anything.
pub(crate) fn load(folder: &Path, boot_id: &str) -> Checkpoint {
    let path = folder.join(NAME);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Checkpoint::default(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "who has which devices cannot be read");
            return Checkpoint::default();
        }
    };
    decode(&text, boot_id).unwrap_or_else(|| {
        tracing::warn!(path = %path.display(), "the file is broken: who has which devices is not known any more");
        Checkpoint::default()
    })
}

/// Replaces the file of a folder.
pub(crate) fn store(folder: &Path, content: &[u8]) -> io::Result<()> {
    atomic_file::replace(&folder.join(NAME), content, 0o600)
}

fn checksum(data: &Data) -> u64 {
    let entry = |entry: &Entry| {
        let answer = match &entry.alloc_resp {
            None => "<nil>".to_owned(),
            Some(text) => slice(STANDARD.decode(text).unwrap_or_default()),
        };
        format!(
            "{{PodUID:(string){} ContainerName:(string){} ResourceName:(string){} DeviceIDs:(checkpoint.DevicesPerNUMA){} AllocResp:([]uint8){answer}}}",
            entry.pod_uid,
            entry.container_name,
            entry.resource_name,
            map(entry.device_ids.iter().map(|(node, ids)| (node, slice(ids)))),
        )
    };
    let entries = data.pod_device_entries.as_ref().map_or("<nil>".to_owned(), |entries| slice(entries.iter().map(entry)));
    let registered = data
        .registered_devices
        .as_ref()
        .map_or("<nil>".to_owned(), |list| map(list.iter().map(|(resource, ids)| (resource, slice(ids)))));
    fnv32a(&format!(
        "(checkpoint.checkpointData){{PodDeviceEntries:([]checkpoint.PodDevicesEntry){entries} RegisteredDevices:(map[string][]string){registered}}}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written and summed up by Go, with the upstream's types.
    #[test]
    fn the_checksum_is_the_upstreams() {
        let data = |text: &str| checksum(&serde_json::from_str(text).unwrap());
        let full = r#"{"PodDeviceEntries":[{"PodUID":"u1","ContainerName":"c","ResourceName":"v.io/d","DeviceIDs":{"-1":["a","b"],"0":["c"],"10":["x"],"2":["y"]},"AllocResp":"AQL/"},{"PodUID":"u2","ContainerName":"c","ResourceName":"v.io/d","DeviceIDs":{"-1":["q"]},"AllocResp":""}],"RegisteredDevices":{"a/b":[],"v.io/d":["a","b"]}}"#;
        assert_eq!(data(full), 3_922_686_055);
        assert_eq!(data(r#"{"PodDeviceEntries":null,"RegisteredDevices":{}}"#), 3_467_439_661);
    }

    fn example() -> Checkpoint {
        let response =
            ContainerAllocateResponse { envs: [("A".to_owned(), "1".to_owned())].into(), ..ContainerAllocateResponse::default() };
        let allocation = Allocation { by_node: [(-1, vec!["a".to_owned()])].into(), response, stale: false };
        let mut checkpoint = Checkpoint::default();
        let containers = checkpoint.allocations.entry("u1".to_owned()).or_default();
        containers.entry("c".to_owned()).or_default().insert("v.io/d".to_owned(), allocation);
        checkpoint.registered.insert("v.io/d".to_owned(), vec!["a".to_owned()]);
        checkpoint
    }

    #[test]
    fn what_was_kept_is_found_again_and_a_reboot_is_noticed() {
        let checkpoint = example();
        let text = encode(&checkpoint, "boot1");
        let again = decode(&text, "boot1").unwrap();
        assert_eq!((&again.allocations, &again.registered), (&checkpoint.allocations, &checkpoint.registered));
        assert!(decode(&text, "boot2").unwrap().allocations["u1"]["c"]["v.io/d"].stale);
    }

    #[test]
    fn a_file_that_was_changed_is_not_believed() {
        let text = String::from_utf8(encode(&example(), "b")).unwrap();
        assert!(decode(text.replace("\"u1\"", "\"u2\"").as_bytes(), "b").is_none());
        assert!(decode(&text.as_bytes()[..text.len() / 2], "b").is_none());
    }
}
