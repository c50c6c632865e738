//! What a machine must be like before the kubelet starts on it. The check is pure; the machine is read once. Writes nothing but
//! the kubelet's own OOM score: kernel parameters are the machine's owner's.

use std::fs;

use crate::config::Config;
use crate::node::Capacity;
use crate::{Error, Result};

/// Kernel parameters and what they should be, as the upstream wants them.
const WANTED: [(&str, &str); 6] = [
    ("vm.overcommit_memory", "1"),
    ("vm.panic_on_oom", "0"),
    ("kernel.panic", "10"),
    ("kernel.panic_on_oops", "1"),
    ("kernel.keys.root_maxkeys", "1000000"),
    ("kernel.keys.root_maxbytes", "25000000"),
];

/// Checks the machine against the configuration and takes the configured OOM score.
///
/// # Errors
/// When the configuration says not to start on a machine like this.
pub fn run(config: &Config, capacity: &Capacity) -> Result<()> {
    let read = |name: &str| fs::read_to_string(format!("/proc/sys/{}", name.replace('.', "/"))).ok();
    check(config, capacity, read)?;
    if let Some(score) = config.oom_score_adj
        && let Err(error) = fs::write("/proc/self/oom_score_adj", score.to_string())
    {
        // Without CAP_SYS_RESOURCE a score cannot be lowered; containers keep theirs relative to ours.
        tracing::warn!(score, %error, "oomScoreAdj stays as it is");
    }
    Ok(())
}

/// The least of `maxPods` and `podsPerCore`.
pub fn most_pods(config: &Config, capacity: &Capacity) -> usize {
    let cores = usize::try_from(capacity.cpu_millis / 1000).unwrap_or(0);
    match usize::try_from(config.pods_per_core).unwrap_or(0).saturating_mul(cores) {
        0 => config.max_pods,
        by_core => config.max_pods.min(by_core),
    }
}

fn check(config: &Config, capacity: &Capacity, read: impl Fn(&str) -> Option<String>) -> Result<()> {
    let wrong = |field: &str, problem: String| Err(Error::Setting { field: field.to_owned(), problem });
    if config.fail_swap_on && capacity.swap_bytes > 0 {
        return wrong("failSwapOn", "is true and this machine has swap".to_owned());
    }
    if config.fail_cgroup_v1 && !capacity.cgroup_v2 {
        return wrong("failCgroupV1", "is true and this machine has cgroup v1".to_owned());
    }
    if !config.protect_kernel_defaults {
        return Ok(());
    }
    for (name, wanted) in WANTED {
        let found = read(name).unwrap_or_default();
        if found.trim() != wanted {
            return wrong(
                "protectKernelDefaults",
                format!("invalid kernel flag: {name}, expected value: {wanted}, actual value: {}", found.trim()),
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_lesser_of_two_numbers_of_pods_counts() {
        let channel = tonic::transport::Endpoint::from_static("http://unused").connect_lazy();
        let config = Config { max_pods: 10, ..Config::new("n", channel) };
        let capacity = Capacity { cpu_millis: 2000, ..Capacity::default() };
        let with = |pods_per_core| most_pods(&Config { pods_per_core, ..config.clone() }, &capacity);
        assert_eq!((with(0), with(3), with(9)), (10, 6, 10));
    }

    #[tokio::test]
    async fn a_machine_that_the_configuration_rules_out_is_named() {
        let channel = tonic::transport::Endpoint::from_static("http://unused").connect_lazy();
        let config = Config::new("n", channel);
        let capacity = Capacity { swap_bytes: 1, ..Capacity::default() };
        let wanted = |name: &str| WANTED.iter().find(|(n, _)| *n == name).map(|(_, value)| format!("{value}\n"));
        assert!(check(&config, &capacity, |_| None).is_ok(), "nothing is asked for");
        let strict = [
            (Config { fail_swap_on: true, ..config.clone() }, "failSwapOn"),
            (Config { fail_cgroup_v1: true, ..config.clone() }, "failCgroupV1"),
        ];
        for (config, field) in strict {
            assert!(check(&config, &capacity, |_| None).unwrap_err().to_string().starts_with(field));
        }
        let config = Config { protect_kernel_defaults: true, ..config };
        assert!(check(&config, &capacity, wanted).is_ok());
        let other = |name: &str| if name == "kernel.panic" { Some("0".to_owned()) } else { wanted(name) };
        let error = check(&config, &capacity, other).unwrap_err().to_string();
        assert!(error.ends_with("kernel.panic, expected value: 10, actual value: 0"), "{error}");
    }
}
