//! Limits of pods and containers, as asked for and as merged with an update.

use serde::{Deserialize, Serialize};

use super::Map;

/// Limits. Zero and empty mean "not asked for".
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// Microseconds.
    pub cpu_period: i64,
    /// Microseconds, -1 = no limit.
    pub cpu_quota: i64,
    /// 2..262144.
    pub cpu_shares: i64,
    /// Bytes.
    pub memory_limit: i64,
    /// Memory and swap, bytes.
    pub memory_swap_limit: i64,
    /// -1000..1000.
    pub oom_score_adj: i64,
    /// CPUs.
    pub cpuset_cpus: String,
    /// Memory nodes.
    pub cpuset_mems: String,
    /// Page size → bytes.
    pub hugepages: Vec<(String, u64)>,
    /// cgroup v2 file → value.
    pub unified: Map,
}

impl Resources {
    /// These limits with every non-zero, non-empty field of `update` in place of their own.
    pub fn merged(&self, update: &Self) -> Self {
        fn num(old: i64, new: i64) -> i64 {
            if new == 0 { old } else { new }
        }
        fn text(old: &str, new: &str) -> String {
            if new.is_empty() { old.to_owned() } else { new.to_owned() }
        }
        let mut hugepages = self.hugepages.clone();
        for (size, limit) in &update.hugepages {
            match hugepages.iter_mut().find(|(s, _)| s == size) {
                Some(entry) => entry.1 = *limit,
                None => hugepages.push((size.clone(), *limit)),
            }
        }
        let mut unified = self.unified.clone();
        unified.extend(update.unified.clone());
        Self {
            cpu_period: num(self.cpu_period, update.cpu_period),
            cpu_quota: num(self.cpu_quota, update.cpu_quota),
            cpu_shares: num(self.cpu_shares, update.cpu_shares),
            memory_limit: num(self.memory_limit, update.memory_limit),
            memory_swap_limit: num(self.memory_swap_limit, update.memory_swap_limit),
            oom_score_adj: num(self.oom_score_adj, update.oom_score_adj),
            cpuset_cpus: text(&self.cpuset_cpus, &update.cpuset_cpus),
            cpuset_mems: text(&self.cpuset_mems, &update.cpuset_mems),
            hugepages,
            unified,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_and_empty_fields_of_an_update_leave_what_is() {
        let old = Resources {
            cpu_shares: 512,
            memory_limit: 1 << 20,
            cpuset_cpus: "0".into(),
            hugepages: vec![("2MB".into(), 7)],
            ..Default::default()
        };
        let new = old.merged(&Resources { cpuset_cpus: "0-1".into(), cpu_quota: 5000, ..Default::default() });
        assert_eq!(new, Resources { cpuset_cpus: "0-1".into(), cpu_quota: 5000, ..old });
    }
}
