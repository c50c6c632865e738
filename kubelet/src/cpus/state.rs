//! Who has which processors, and the file `cpu_manager_state` in the upstream's format. A file that does not fit the machine or the
//! configuration is not guessed at: the start ends, as the upstream's does.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::topology::{CpuSet, format_cpu_list};
use crate::checksum::{fnv32a, map};
use crate::node::parse_cpu_list;

/// The file's name in the kubelet's folder.
pub(crate) const NAME: &str = "cpu_manager_state";

/// What the containers of pods have for themselves, by UID and name.
pub(crate) type Entries = BTreeMap<String, BTreeMap<String, CpuSet>>;

/// The processors, given out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct CpuState {
    /// Those that all others share.
    pub shared: CpuSet,
    /// Those that single containers have.
    pub entries: Entries,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    policy_name: String,
    default_cpu_set: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    entries: BTreeMap<String, BTreeMap<String, String>>,
    #[serde(default)]
    checksum: u64,
}

impl File {
    fn sum(&self) -> u64 {
        let entries = map(self.entries.iter().map(|(pod, containers)| (pod, map(containers))));
        fnv32a(&format!(
            "(*state.CPUManagerCheckpoint){{PolicyName:(string){} DefaultCPUSet:(string){} Entries:(map[string]map[string]string){entries} Checksum:(checksum.Checksum)0}}",
            self.policy_name, self.default_cpu_set
        ))
    }
}

impl CpuState {
    /// The file's text.
    pub fn encode(&self) -> Vec<u8> {
        let texts =
            |sets: &BTreeMap<String, CpuSet>| sets.iter().map(|(name, set)| (name.clone(), format_cpu_list(set))).collect();
        let mut file = File {
            policy_name: "static".to_owned(),
            default_cpu_set: format_cpu_list(&self.shared),
            entries: self.entries.iter().map(|(pod, sets)| (pod.clone(), texts(sets))).collect(),
            checksum: 0,
        };
        file.checksum = file.sum();
        serde_json::to_vec(&file).unwrap_or_default()
    }

    /// Reads the file's text; `None` where it is of another policy and nobody has anything.
    pub fn decode(text: &[u8], policy: &str) -> Result<Option<CpuState>, String> {
        let file: File = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        // Without a sum it is of an old kubelet.
        if file.checksum != 0 && file.checksum != file.sum() {
            return Err("checkpoint is corrupted".to_owned());
        }
        if file.policy_name != policy {
            if file.entries.is_empty() {
                return Ok(None);
            }
            return Err(format!("configured policy {policy:?} differs from state checkpoint policy {:?}", file.policy_name));
        }
        let set = |text: &str| parse_cpu_list(text).ok_or_else(|| format!("{text:?} is no list of processors"));
        let mut state = CpuState { shared: set(&file.default_cpu_set)?, entries: Entries::new() };
        for (pod, containers) in &file.entries {
            for (container, text) in containers {
                state.entries.entry(pod.clone()).or_default().insert(container.clone(), set(text)?);
            }
        }
        Ok(Some(state))
    }

    /// Whether it can be of this machine; the errors are the upstream's.
    pub fn check(&self, all: &CpuSet, reserved: &CpuSet) -> Result<(), String> {
        let shared = format_cpu_list(&self.shared);
        if self.shared.is_empty() {
            return Err("default cpuset cannot be empty".to_owned());
        }
        if !reserved.is_subset(&self.shared) {
            let reserved = format_cpu_list(reserved);
            return Err(format!("not all reserved cpus: {reserved:?} are present in defaultCpuSet: {shared:?}"));
        }
        let mut known = self.shared.clone();
        for (pod, containers) in &self.entries {
            for (container, set) in containers {
                if !set.is_disjoint(&self.shared) {
                    let set = format_cpu_list(set);
                    return Err(format!(
                        "pod: {pod}, container: {container} cpuset: {set:?} overlaps with default cpuset {shared:?}"
                    ));
                }
                known.extend(set);
            }
        }
        if known != *all {
            let (all, known) = (format_cpu_list(all), format_cpu_list(&known));
            return Err(format!("current set of available CPUs {all:?} doesn't match with CPUs in state {known:?}"));
        }
        Ok(())
    }

    /// What a container has for itself.
    pub fn own(&self, uid: &str, container: &str) -> Option<&CpuSet> {
        self.entries.get(uid)?.get(container)
    }

    /// Gives back what pods have that are not to be kept; whether there was any.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) -> bool {
        let before = self.entries.len();
        let shared = &mut self.shared;
        self.entries.retain(|uid, containers| {
            let kept = keep(uid);
            if !kept {
                shared.extend(containers.values().flatten());
            }
            kept
        });
        before != self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(text: &str) -> CpuSet {
        parse_cpu_list(text).unwrap()
    }

    fn state(shared: &str, entries: &[(&str, &str, &str)]) -> CpuState {
        let mut state = CpuState { shared: set(shared), entries: Entries::new() };
        for (pod, container, cpus) in entries {
            state.entries.entry((*pod).to_owned()).or_default().insert((*container).to_owned(), set(cpus));
        }
        state
    }

    /// The sums were made by Go, with the upstream's types.
    #[test]
    fn the_file_is_the_upstreams() {
        let some = state("0,2-3", &[("u2", "c", "1"), ("u1", "z", "4"), ("u1", "a", "5")]);
        let text = String::from_utf8(some.encode()).unwrap();
        let expected = r#"{"policyName":"static","defaultCpuSet":"0,2-3","entries":{"u1":{"a":"5","z":"4"},"u2":{"c":"1"}},"checksum":3377301507}"#;
        assert_eq!(text, expected);
        assert_eq!(CpuState::decode(text.as_bytes(), "static"), Ok(Some(some)));
        let none = r#"{"policyName":"static","defaultCpuSet":"0-3","checksum":611748604}"#;
        assert_eq!(String::from_utf8(state("0-3", &[]).encode()).unwrap(), none);
    }

    #[test]
    fn a_file_that_cannot_be_meant_is_refused() {
        let decode = |text: &str, policy: &str| CpuState::decode(text.as_bytes(), policy);
        let text = String::from_utf8(state("0-2", &[("u", "c", "3")]).encode()).unwrap();
        assert_eq!(decode(&text.replace("\"3\"", "\"2\""), "static"), Err("checkpoint is corrupted".to_owned()));
        assert!(decode(&text, "none").unwrap_err().contains("differs from state checkpoint policy \"static\""));
        assert_eq!(decode(r#"{"policyName":"none","defaultCpuSet":""}"#, "static"), Ok(None));
        let all = set("0-3");
        for (state, reserved, problem) in [
            (state("0-2", &[("u", "c", "3")]), "0", ""),
            (state("1-2", &[("u", "c", "0,3")]), "0", "not all reserved cpus"),
            (state("0-2", &[("u", "c", "2-3")]), "0", "overlaps with default cpuset"),
            (state("0-2", &[]), "0", "current set of available CPUs \"0-3\" doesn't match with CPUs in state \"0-2\""),
            (state("", &[]), "0", "default cpuset cannot be empty"),
        ] {
            let checked = state.check(&all, &set(reserved)).err().unwrap_or_default();
            assert!(checked.contains(problem) && checked.is_empty() == problem.is_empty(), "{checked}");
        }
    }

    #[test]
    fn what_pods_had_is_shared_again_when_they_are_over() {
        let mut some = state("0", &[("u1", "a", "1"), ("u1", "b", "1-2"), ("u2", "c", "3")]);
        assert!(some.retain(|uid| uid == "u2"));
        assert_eq!(some, state("0-2", &[("u2", "c", "3")]));
        assert!(!some.retain(|uid| uid == "u2"));
    }
}
