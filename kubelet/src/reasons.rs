//! The reasons of events: those of the upstream that are told here, those of berth's own, and those of the upstream that are not told,
//! with why. A table; whoever tells an event decides its words.

/// The upstream's reasons that are told here.
pub const UPSTREAM: &[&str] = &[
    "AppArmor",
    "BackOff",
    "CgroupV1",
    "Created",
    "DNSConfigForming",
    "ErrImageNeverPull",
    "Evicted",
    "EvictionThresholdMet",
    "ExceededGracePeriod",
    "Failed",
    "FailedCreatePodContainer",
    "FailedCreatePodSandBox",
    "FailedKillPod",
    "FailedMount",
    "FailedNodeDeclaredFeaturesCheck",
    "FailedPostStartHook",
    "FailedPreStopHook",
    "FailedToRetrieveImagePullSecret",
    "FailedValidation",
    "FreeDiskSpaceFailed",
    "ImageGCFailed",
    "InspectFailed",
    "InvalidEnvironmentVariableNames",
    "Killing",
    "LifecycleHTTPFallback",
    "MissingClusterDNS",
    "NetworkNotReady",
    "NodeAffinity",
    "NodeName",
    "NodeNotReady",
    "NodeNotSchedulable",
    "NodePorts",
    "NodeReady",
    "NodeSchedulable",
    "NodeShutdown",
    "PodFeatureUnsupported",
    "PodOSNotSupported",
    "PodOSSelectorNodeLabelDoesNotMatch",
    "Preempting",
    "ProbeWarning",
    "Pulled",
    "Pulling",
    "Rebooted",
    "ResizeCompleted",
    "ResizeError",
    "ResizeStarted",
    "SMTAlignmentError",
    "SandboxChanged",
    "Shutdown",
    "Started",
    "Starting",
    "SysctlForbidden",
    "SystemOOM",
    "TaintToleration",
    "UnexpectedAdmissionError",
    "Unhealthy",
];

/// What is made of parts: the resource that lacks, what a resize waits for, a pressure; and what a pod of the API may not do without it.
pub const BEGINNINGS: &[&str] = &["OutOf", "Resize", "NodeHas", "Offline"];

/// Berth's own.
pub const OWN: &[&str] = &[
    // Thresholds are met and no pod may be evicted: who uses most is named.
    "EvictionImpossible",
    // Pods cannot reach the machine's resolver.
    "HostResolver",
    // A container has lost a process to its memory limit.
    "OOMKilling",
    // Nothing but its log tells that processors could not be given.
    "PinError",
];

/// The upstream's that are not told here, and why.
pub const ABSENT: &[(&str, &str)] = &[
    ("CheckLimitsForResolvConf", "each pod is told of what its resolver leaves out, when it starts"),
    ("ContainerGCFailed", "a record that cannot be removed is the log's: it concerns no pod that is wanted"),
    ("FailedAttachVolume", "the controller attaches, and tells it"),
    ("FailedMapVolume", "block volumes are refused with the pod"),
    ("FailedNodeAllocatableEnforcement", "the limit of all pods is set with each pod, whose failure it is"),
    ("FailedPodSandBoxStatus", "a look that fails is repeated"),
    ("FailedPrepareDynamicResources", "pods with resource claims are refused"),
    ("FailedSync", "a look that fails is repeated"),
    ("FileSystemResizeFailed", "volumes are not expanded on the node"),
    ("FileSystemResizeSuccessful", "volumes are not expanded on the node"),
    ("HostIPsIPFamilyMismatch", "a pod's addresses are the node's own of that moment"),
    ("InvalidDiskCapacity", "a file system without a size is left out of the collection of images"),
    ("KubeletSetupFailed", "what cannot be set up ends the start"),
    ("NodeAllocatableEnforced", "the limit of all pods is set with each pod"),
    ("PossibleMemoryBackedVolumesOnDisk", "told in the log"),
    ("SuccessfulAttachVolume", "the controller attaches, and tells it"),
    ("VolumeResizeFailed", "volumes are not expanded on the node"),
    ("VolumeResizeSuccessful", "volumes are not expanded on the node"),
];

/// Whether events may have this reason.
pub fn is_known(reason: &str) -> bool {
    UPSTREAM.contains(&reason) || OWN.contains(&reason) || BEGINNINGS.iter().any(|beginning| reason.starts_with(beginning))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// The text of all sources but this one, without their tests.
    fn sources(folder: &Path, text: &mut String) {
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() {
                sources(&path, text);
            } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("reasons.rs") && !path.ends_with("tests.rs")
            {
                let source = fs::read_to_string(path).unwrap();
                text.push_str(source.split("#[cfg(test)]\nmod tests").next().unwrap_or_default());
            }
        }
    }

    #[test]
    fn every_reason_that_is_promised_is_told_somewhere_and_no_absent_one_is() {
        let mut text = String::new();
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut text);
        let is_there = |reason: &str| text.contains(&format!("\"{reason}\""));
        for reason in UPSTREAM.iter().chain(OWN) {
            assert!(is_there(reason), "{reason} is told nowhere");
        }
        for (reason, why) in ABSENT {
            assert!(!is_known(reason) && !why.is_empty(), "{reason}");
        }
        // The one that stands in the sources is the reason of an error that is no event.
        let told: Vec<_> = ABSENT.iter().map(|(reason, _)| *reason).filter(|reason| is_there(reason)).collect();
        assert_eq!(told, ["ContainerGCFailed"]);
    }

    #[test]
    fn the_lists_are_in_order_and_have_nothing_twice() {
        let absent: Vec<&str> = ABSENT.iter().map(|(reason, _)| *reason).collect();
        for list in [UPSTREAM, OWN, &absent] {
            assert!(list.windows(2).all(|pair| pair[0] < pair[1]), "{list:?}");
        }
    }
}
