//! What a cgroup is to limit: the OCI specification's `linux.resources`, with its names. The only such type of the workspace.
//! Fields that the specification does not have are refused while reading; fields that berth cannot fulfil are refused by
//! [`Resources::validate`], by name.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Limits of a cgroup. What is absent (and, for numbers, 0) is left as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Resources {
    /// Device rules, in order: the last that matches decides. An empty list leaves the rules as they are.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceRule>,
    /// Memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// Processors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Cpu>,
    /// The number of processes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids: Option<Pids>,
    /// Block devices.
    #[serde(rename = "blockIO", skip_serializing_if = "Option::is_none")]
    pub block_io: Option<BlockIo>,
    /// Huge pages, by size.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hugepage_limits: Vec<HugepageLimit>,
    /// Refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
    /// Refused.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rdma: BTreeMap<String, Rdma>,
    /// Files of cgroup v2 and their values, written after all others.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub unified: BTreeMap<String, String>,
}

/// A device rule.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeviceRule {
    /// Whether it allows or forbids.
    pub allow: bool,
    /// `c`, `b`, or `a` for all (also when absent).
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// The major number; all when absent or -1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major: Option<i64>,
    /// The minor number; all when absent or -1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor: Option<i64>,
    /// Of `r`, `w` and `m`; all when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access: Option<String>,
}

/// Memory limits in bytes; -1 is unlimited.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Memory {
    /// The limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<i64>,
    /// What is kept for the cgroup when memory is short.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reservation: Option<i64>,
    /// The limit of memory and swap together. The same as the limit means no swap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap: Option<i64>,
    /// Refused: the kernel no longer has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<i64>,
    /// Refused: the kernel no longer has it.
    #[serde(rename = "kernelTCP", skip_serializing_if = "Option::is_none")]
    pub kernel_tcp: Option<i64>,
    /// How eagerly to swap, 0 to 100. v1 alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swappiness: Option<u64>,
    /// Whether processes wait instead of being killed. v1 alone.
    #[serde(rename = "disableOOMKiller", skip_serializing_if = "Option::is_none")]
    pub disable_oom_killer: Option<bool>,
    /// Always so; here because the specification has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub use_hierarchy: Option<bool>,
    /// Whether a limit below the present use is an error. An update always checks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check_before_update: Option<bool>,
}

/// Processor limits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Cpu {
    /// The weight, 2 to 262144.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shares: Option<u64>,
    /// Microseconds per period; -1 is unlimited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quota: Option<i64>,
    /// Microseconds that may be saved up beyond the quota.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst: Option<u64>,
    /// The period in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub period: Option<u64>,
    /// Real-time microseconds per period. v1 alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub realtime_runtime: Option<i64>,
    /// The real-time period in microseconds. v1 alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub realtime_period: Option<u64>,
    /// Which processors (`0-3,7`); empty leaves them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<String>,
    /// Which memory nodes; empty leaves them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mems: Option<String>,
    /// 1 for what runs only when nothing else does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle: Option<i64>,
}

/// Process limits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pids {
    /// How many; -1 is unlimited, 0 leaves it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<i64>,
}

/// Block device limits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct BlockIo {
    /// The weight, 10 to 1000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<u16>,
    /// Refused: the kernel no longer has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leaf_weight: Option<u16>,
    /// Weights of single devices.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub weight_device: Vec<WeightDevice>,
    /// Bytes read per second.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub throttle_read_bps_device: Vec<ThrottleDevice>,
    /// Bytes written per second.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub throttle_write_bps_device: Vec<ThrottleDevice>,
    /// Reads per second.
    #[serde(rename = "throttleReadIOPSDevice", skip_serializing_if = "Vec::is_empty")]
    pub throttle_read_iops_device: Vec<ThrottleDevice>,
    /// Writes per second.
    #[serde(rename = "throttleWriteIOPSDevice", skip_serializing_if = "Vec::is_empty")]
    pub throttle_write_iops_device: Vec<ThrottleDevice>,
}

/// The weight of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WeightDevice {
    /// Its major number.
    pub major: i64,
    /// Its minor number.
    pub minor: i64,
    /// The weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u16>,
    /// Refused: the kernel no longer has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leaf_weight: Option<u16>,
}

/// A rate of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThrottleDevice {
    /// Its major number.
    pub major: i64,
    /// Its minor number.
    pub minor: i64,
    /// Per second; 0 takes the limit away.
    pub rate: u64,
}

/// A limit of huge pages.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HugepageLimit {
    /// The size as the kernel names it: `2MB`, `1GB`.
    pub page_size: String,
    /// Bytes.
    pub limit: u64,
}

/// Network classes: refused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Network {
    /// The class of packets.
    #[serde(rename = "classID", skip_serializing_if = "Option::is_none")]
    pub class_id: Option<u32>,
    /// Priorities by interface.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub priorities: Vec<InterfacePriority>,
}

/// The priority of an interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterfacePriority {
    /// The interface.
    pub name: String,
    /// Its priority.
    pub priority: u32,
}

/// RDMA limits: refused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Rdma {
    /// Handles.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hca_handles: Option<u32>,
    /// Objects.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hca_objects: Option<u32>,
}

impl Resources {
    /// Refuses, by name, what is wished for and cannot be done whatever the layout, and values out of range.
    pub fn validate(&self) -> Result<()> {
        let gone = "the kernel no longer has it";
        if let Some(memory) = &self.memory {
            refuse(memory.kernel.is_some_and(|value| value > 0), "linux.resources.memory.kernel", gone)?;
            refuse(memory.kernel_tcp.is_some_and(|value| value > 0), "linux.resources.memory.kernelTCP", gone)?;
            validate_memory(memory)?;
        }
        if let Some(block_io) = &self.block_io {
            let leaf = block_io.leaf_weight.is_some_and(|value| value > 0)
                || block_io.weight_device.iter().any(|device| device.leaf_weight.is_some_and(|value| value > 0));
            refuse(leaf, "linux.resources.blockIO.leafWeight", gone)?;
        }
        if let Some(network) = &self.network {
            let wished = network.class_id.is_some_and(|id| id > 0) || !network.priorities.is_empty();
            refuse(wished, "linux.resources.network", "berth does not mark packets by cgroup")?;
        }
        refuse(!self.rdma.is_empty(), "linux.resources.rdma", "berth does not limit RDMA")?;
        for name in self.unified.keys() {
            let plain = !name.is_empty() && !name.contains('/') && name.contains('.') && !name.starts_with("cgroup.");
            if !plain {
                let reason = "it is no file of a controller".to_owned();
                return Err(Error::Invalid { field: format!("linux.resources.unified[{name}]"), reason });
            }
        }
        for rule in &self.devices {
            crate::devices::parse_rule(rule)?;
        }
        Ok(())
    }

    /// Whether nothing is wished for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

fn refuse(wished: bool, field: &str, reason: &'static str) -> Result<()> {
    if wished { Err(Error::Unsupported { field: field.to_owned(), reason }) } else { Ok(()) }
}

fn validate_memory(memory: &Memory) -> Result<()> {
    let limit = memory.limit.unwrap_or(0);
    let swap = memory.swap.unwrap_or(0);
    if swap > 0 && limit > 0 && swap < limit {
        return Err(Error::Invalid {
            field: "linux.resources.memory.swap".to_owned(),
            reason: format!("{swap} is below the memory limit {limit}, which it includes"),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_those_of_the_specification_and_others_are_refused() {
        let text = r#"{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":1,"minor":3,"access":"rwm"}],
            "memory":{"limit":1048576,"swap":-1,"disableOOMKiller":false,"kernelTCP":0},"cpu":{"shares":1024,"quota":-1,"realtimeRuntime":0},
            "pids":{"limit":100},"blockIO":{"weight":100,"throttleReadIOPSDevice":[{"major":8,"minor":0,"rate":5}]},
            "hugepageLimits":[{"pageSize":"2MB","limit":0}],"unified":{"memory.high":"1000"}}"#;
        let resources: Resources = serde_json::from_str(text).unwrap();
        resources.validate().unwrap();
        assert_eq!(resources.memory.as_ref().unwrap().swap, Some(-1));
        let again: Resources = serde_json::from_str(&serde_json::to_string(&resources).unwrap()).unwrap();
        assert_eq!(again, resources);
        let error = serde_json::from_str::<Resources>(r#"{"memory":{"limits":1}}"#).unwrap_err();
        assert!(error.to_string().contains("limits"), "{error}");
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        for (text, field) in [
            (r#"{"memory":{"kernel":5}}"#, "linux.resources.memory.kernel"),
            (r#"{"rdma":{"mlx4_0":{"hcaHandles":1}}}"#, "linux.resources.rdma"),
            (r#"{"network":{"classID":1}}"#, "linux.resources.network"),
            (r#"{"blockIO":{"leafWeight":10}}"#, "linux.resources.blockIO.leafWeight"),
            (r#"{"unified":{"../x.y":"1"}}"#, "linux.resources.unified[../x.y]"),
            (r#"{"unified":{"cgroup.procs":"1"}}"#, "linux.resources.unified[cgroup.procs]"),
            (r#"{"memory":{"limit":10,"swap":5}}"#, "linux.resources.memory.swap"),
            (r#"{"devices":[{"allow":true,"type":"p"}]}"#, "linux.resources.devices"),
        ] {
            let resources: Resources = serde_json::from_str(text).unwrap();
            let error = resources.validate().unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
        let harmless: Resources = serde_json::from_str(r#"{"memory":{"kernel":0},"network":{"classID":0}}"#).unwrap();
        harmless.validate().unwrap();
    }
}
