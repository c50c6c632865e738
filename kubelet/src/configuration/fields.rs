//! The table of KubeletConfiguration v1beta1: every field of Kubernetes 1.36 with its type, default, flag and what becomes of
//! it here. The page `docs/kubelet-configuration.md` is made from it. Knows no values but defaults.

use serde_json::Value;

/// How a value is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A whole number.
    Int,
    /// A number with a fraction.
    Float,
    /// Any text.
    Text,
    /// A Go duration, `1m30s`.
    Duration,
    /// A list of texts.
    Texts,
    /// Texts by name.
    Map,
    /// Booleans by name.
    Gates,
    /// Taints: `key=value:effect` with commas between as a flag.
    Taints,
    /// A structure that has no flag.
    Structure,
}

/// What berth does with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// Acted on. The text is a value, as JSON, that a test sets and expects to arrive.
    Works(&'static str),
    /// Has no effect on a node that reaches its runtime by CRI, in the upstream's kubelet neither: taken silently.
    Inert(&'static str),
    /// Acted on where there is an API server, and named at start where there is none. The text is as of `Works`.
    InCluster(&'static str),
    /// Not there: a value other than the default is named at start, and has no effect.
    Ignored(&'static str),
    /// Not there, and pods would rely on it: a value other than the default ends the start.
    Refused(&'static str),
    /// The same where there is an API server; named at start where there is none.
    RefusedInCluster(&'static str),
}

/// One field.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its path from the document's top, with dots.
    pub path: &'static str,
    /// How it is written.
    pub kind: Kind,
    /// The upstream's default as JSON; empty: none.
    pub default: &'static str,
    /// The flag without its dashes; empty: none.
    pub flag: &'static str,
    /// What becomes of it.
    pub support: Support,
}

const fn f(path: &'static str, kind: Kind, default: &'static str, flag: &'static str, support: Support) -> Field {
    Field { path, kind, default, flag, support }
}

use Kind::{Bool, Duration, Float, Gates, Int, Map, Structure, Taints, Text, Texts};
use Support::{Ignored, InCluster, Inert, Refused, RefusedInCluster, Works};

const NO_METRICS: &str = "berth has no such diagnostics";
const NO_NUMA: &str = "there is no alignment by NUMA node";

/// All fields, in the order of the upstream's type.
pub const FIELDS: &[Field] = &[
    f("enableServer", Bool, "true", "enable-server", Works("false")),
    f("staticPodPath", Text, "", "pod-manifest-path", Works("\"/m\"")),
    f("podLogsDir", Text, "\"/var/log/pods\"", "", Works("\"/l\"")),
    f(
        "syncFrequency",
        Duration,
        "\"1m\"",
        "sync-frequency",
        Ignored("a pod is looked at when something changes, and on the relist"),
    ),
    f("fileCheckFrequency", Duration, "\"20s\"", "file-check-frequency", Works("\"7s\"")),
    f("httpCheckFrequency", Duration, "\"20s\"", "http-check-frequency", Ignored("there is no HTTP source of pods")),
    f("staticPodURL", Text, "", "manifest-url", Refused("there is no HTTP source of pods")),
    f("staticPodURLHeader", Structure, "", "", Ignored("there is no HTTP source of pods")),
    f("address", Text, "\"0.0.0.0\"", "address", Works("\"127.0.0.1\"")),
    f("port", Int, "10250", "port", Works("10999")),
    f("readOnlyPort", Int, "0", "read-only-port", Works("10998")),
    f(
        "volumePluginDir",
        Text,
        "\"/usr/libexec/kubernetes/kubelet-plugins/volume/exec/\"",
        "volume-plugin-dir",
        Ignored("there are no FlexVolumes"),
    ),
    f("providerID", Text, "", "provider-id", InCluster("\"cloud://1\"")),
    f("tlsCertFile", Text, "", "tls-cert-file", Works("\"/c\"")),
    f("tlsPrivateKeyFile", Text, "", "tls-private-key-file", Works("\"/k\"")),
    f("tlsCipherSuites", Texts, "", "tls-cipher-suites", Works("[\"TLS_AES_128_GCM_SHA256\"]")),
    f("tlsMinVersion", Text, "", "tls-min-version", Works("\"VersionTLS13\"")),
    f("tlsCurvePreferences", Texts, "", "", Works("[\"X25519\"]")),
    f("rotateCertificates", Bool, "false", "rotate-certificates", InCluster("true")),
    f("serverTLSBootstrap", Bool, "false", "rotate-server-certificates", InCluster("true")),
    f("authentication.x509.clientCAFile", Text, "", "client-ca-file", Works("\"/ca\"")),
    f("authentication.webhook.enabled", Bool, "true", "authentication-token-webhook", Works("true")),
    f("authentication.webhook.cacheTTL", Duration, "\"2m\"", "authentication-token-webhook-cache-ttl", Works("\"9m\"")),
    f("authentication.anonymous.enabled", Bool, "false", "anonymous-auth", Works("true")),
    f("authorization.mode", Text, "\"Webhook\"", "authorization-mode", Works("\"AlwaysAllow\"")),
    f(
        "authorization.webhook.cacheAuthorizedTTL",
        Duration,
        "\"5m\"",
        "authorization-webhook-cache-authorized-ttl",
        Works("\"9m\""),
    ),
    f(
        "authorization.webhook.cacheUnauthorizedTTL",
        Duration,
        "\"30s\"",
        "authorization-webhook-cache-unauthorized-ttl",
        Works("\"9m\""),
    ),
    f("registryPullQPS", Int, "5", "registry-qps", Ignored("pulls are bounded by their number, not their rate")),
    f("registryBurst", Int, "10", "registry-burst", Ignored("pulls are bounded by their number, not their rate")),
    f(
        "imagePullCredentialsVerificationPolicy",
        Text,
        "\"NeverVerifyPreloadedImages\"",
        "",
        Ignored("who pulled an image is not recorded"),
    ),
    f("preloadedImagesVerificationAllowlist", Texts, "", "", Ignored("who pulled an image is not recorded")),
    f("eventRecordQPS", Int, "50", "event-qps", InCluster("7")),
    f("eventBurst", Int, "100", "event-burst", InCluster("7")),
    f("enableDebuggingHandlers", Bool, "true", "enable-debugging-handlers", Works("false")),
    f("enableContentionProfiling", Bool, "false", "contention-profiling", Ignored(NO_METRICS)),
    f("healthzPort", Int, "10248", "healthz-port", Works("10999")),
    f("healthzBindAddress", Text, "\"127.0.0.1\"", "healthz-bind-address", Works("\"0.0.0.0\"")),
    f("oomScoreAdj", Int, "-999", "oom-score-adj", Works("-5")),
    f("clusterDomain", Text, "", "cluster-domain", Works("\"cluster.local\"")),
    f("clusterDNS", Texts, "", "cluster-dns", Works("[\"10.96.0.10\"]")),
    f(
        "streamingConnectionIdleTimeout",
        Duration,
        "\"4h\"",
        "streaming-connection-idle-timeout",
        Inert("streams are the runtime's"),
    ),
    f("nodeStatusUpdateFrequency", Duration, "\"10s\"", "node-status-update-frequency", InCluster("\"7s\"")),
    f("nodeStatusReportFrequency", Duration, "\"5m\"", "", InCluster("\"7m\"")),
    f("nodeLeaseDurationSeconds", Int, "40", "", InCluster("20")),
    f("imageMinimumGCAge", Duration, "\"2m\"", "minimum-image-ttl-duration", Works("\"3m\"")),
    f("imageMaximumGCAge", Duration, "\"0s\"", "", Works("\"48h\"")),
    f("imageGCHighThresholdPercent", Int, "85", "image-gc-high-threshold", Works("90")),
    f("imageGCLowThresholdPercent", Int, "80", "image-gc-low-threshold", Works("70")),
    f(
        "volumeStatsAggPeriod",
        Duration,
        "\"1m\"",
        "volume-stats-agg-period",
        Ignored("volumes are measured when they are asked for"),
    ),
    f("kubeletCgroups", Text, "", "kubelet-cgroups", Ignored("the service manager places berth")),
    f("systemCgroups", Text, "", "system-cgroups", Ignored("processes of others are not moved")),
    f("cgroupRoot", Text, "", "cgroup-root", Works("\"/edge\"")),
    f("cgroupsPerQOS", Bool, "true", "cgroups-per-qos", Refused("pods always have a cgroup by their class")),
    f("cgroupDriver", Text, "\"cgroupfs\"", "cgroup-driver", Inert("the runtime tells its driver")),
    f("cpuManagerPolicy", Text, "\"none\"", "cpu-manager-policy", Works("\"static\"")),
    f("singleProcessOOMKill", Bool, "", "", Works("true")),
    f("cpuManagerPolicyOptions", Map, "", "cpu-manager-policy-options", Works("{\"full-pcpus-only\":\"true\"}")),
    f("cpuManagerReconcilePeriod", Duration, "\"10s\"", "cpu-manager-reconcile-period", Works("\"4s\"")),
    f("memoryManagerPolicy", Text, "\"None\"", "memory-manager-policy", Refused(NO_NUMA)),
    f("topologyManagerPolicy", Text, "\"none\"", "topology-manager-policy", Refused(NO_NUMA)),
    f("topologyManagerScope", Text, "\"container\"", "topology-manager-scope", Ignored(NO_NUMA)),
    f("topologyManagerPolicyOptions", Map, "", "topology-manager-policy-options", Ignored(NO_NUMA)),
    f("qosReserved", Map, "", "qos-reserved", Refused("memory is not reserved by class")),
    f("runtimeRequestTimeout", Duration, "\"2m\"", "runtime-request-timeout", Works("\"9m\"")),
    f("hairpinMode", Text, "\"promiscuous-bridge\"", "hairpin-mode", Inert("the CNI plugins decide")),
    f("maxPods", Int, "110", "max-pods", Works("3")),
    f("podCIDR", Text, "", "pod-cidr", Ignored("`--pod-cidr` of `berth node`, or podCIDR of NodeConfiguration")),
    f("podPidsLimit", Int, "-1", "pod-max-pids", Works("99")),
    f("resolvConf", Text, "\"/etc/resolv.conf\"", "resolv-conf", Works("\"/r\"")),
    f("runOnce", Bool, "false", "runonce", Refused("the upstream has removed it")),
    f("cpuCFSQuota", Bool, "true", "cpu-cfs-quota", Works("false")),
    f("cpuCFSQuotaPeriod", Duration, "\"100ms\"", "cpu-cfs-quota-period", Works("\"50ms\"")),
    f("nodeStatusMaxImages", Int, "50", "node-status-max-images", InCluster("7")),
    f("maxOpenFiles", Int, "1000000", "max-open-files", Ignored("the service manager limits berth's files")),
    f(
        "contentType",
        Text,
        "\"application/vnd.kubernetes.protobuf\"",
        "kube-api-content-type",
        Ignored("JSON is spoken with the API server"),
    ),
    f("kubeAPIQPS", Int, "50", "kube-api-qps", InCluster("7")),
    f("kubeAPIBurst", Int, "100", "kube-api-burst", InCluster("7")),
    f("serializeImagePulls", Bool, "true", "serialize-image-pulls", Ignored("images are pulled in parallel, and a layer once")),
    f("maxParallelImagePulls", Int, "", "", Ignored("images are pulled in parallel, and a layer once")),
    f("evictionHard", Map, "", "eviction-hard", Works("{\"memory.available\":\"7Mi\"}")),
    f("evictionSoft", Map, "", "eviction-soft", Works("{\"memory.available\":\"9Mi\"}")),
    f("evictionSoftGracePeriod", Map, "", "eviction-soft-grace-period", Works("{\"memory.available\":\"90s\"}")),
    f("evictionPressureTransitionPeriod", Duration, "\"5m\"", "eviction-pressure-transition-period", Works("\"6m\"")),
    f("evictionMaxPodGracePeriod", Int, "0", "eviction-max-pod-grace-period", Works("11")),
    f("evictionMinimumReclaim", Map, "", "eviction-minimum-reclaim", Works("{\"memory.available\":\"1Mi\"}")),
    f("mergeDefaultEvictionSettings", Bool, "false", "", Works("true")),
    f("podsPerCore", Int, "0", "pods-per-core", Works("1")),
    f(
        "enableControllerAttachDetach",
        Bool,
        "true",
        "enable-controller-attach-detach",
        RefusedInCluster("the cluster's controller attaches volumes, the node does not"),
    ),
    f("protectKernelDefaults", Bool, "false", "protect-kernel-defaults", Works("true")),
    f("makeIPTablesUtilChains", Bool, "true", "make-iptables-util-chains", InCluster("false")),
    f("iptablesMasqueradeBit", Int, "14", "iptables-masquerade-bit", Inert("the upstream no longer uses it")),
    f("iptablesDropBit", Int, "15", "iptables-drop-bit", Inert("the upstream no longer uses it")),
    f("featureGates", Gates, "", "feature-gates", Ignored("gates are as Kubernetes 1.36 has them by default")),
    f("failSwapOn", Bool, "true", "fail-swap-on", Works("true")),
    f("memorySwap.swapBehavior", Text, "", "", Works("\"LimitedSwap\"")),
    f("containerLogMaxSize", Text, "\"10Mi\"", "container-log-max-size", Works("\"5Mi\"")),
    f("containerLogMaxFiles", Int, "5", "container-log-max-files", Works("3")),
    f("containerLogMaxWorkers", Int, "1", "", Ignored("our runtime's writers rotate; on others one worker does")),
    f("containerLogMonitorInterval", Duration, "\"10s\"", "", Works("\"4s\"")),
    f("configMapAndSecretChangeDetectionStrategy", Text, "\"Watch\"", "", Ignored("objects are always watched")),
    f("systemReserved", Map, "", "system-reserved", Works("{\"memory\":\"1Gi\"}")),
    f("kubeReserved", Map, "", "kube-reserved", Works("{\"cpu\":\"100m\"}")),
    f("reservedSystemCPUs", Text, "", "reserved-cpus", Works("\"0\"")),
    f("showHiddenMetricsForVersion", Text, "", "show-hidden-metrics-for-version", Ignored(NO_METRICS)),
    f("systemReservedCgroup", Text, "", "system-reserved-cgroup", Ignored("only the pods' share is enforced")),
    f("kubeReservedCgroup", Text, "", "kube-reserved-cgroup", Ignored("only the pods' share is enforced")),
    f("enforceNodeAllocatable", Texts, "[\"pods\"]", "enforce-node-allocatable", Works("[]")),
    f("allowedUnsafeSysctls", Texts, "", "allowed-unsafe-sysctls", Works("[\"net.core.*\"]")),
    f("kernelMemcgNotification", Bool, "false", "kernel-memcg-notification", Ignored("memory is looked at every ten seconds")),
    f("logging.format", Text, "\"text\"", "logging-format", Ignored("`--log-level` sets what is logged")),
    f("logging.flushFrequency", Structure, "", "log-flush-frequency", Inert("nothing is buffered")),
    f("logging.verbosity", Int, "0", "v", Ignored("`--log-level` sets what is logged")),
    f("logging.vmodule", Structure, "", "vmodule", Ignored("`--log-level` sets what is logged")),
    f(
        "logging.options",
        Structure,
        "{\"json\":{\"infoBufferSize\":\"0\"},\"text\":{\"infoBufferSize\":\"0\"}}",
        "",
        Ignored("`--log-level` sets what is logged"),
    ),
    f("enableSystemLogHandler", Bool, "true", "", Works("false")),
    f("enableSystemLogQuery", Bool, "false", "", Works("true")),
    f("shutdownGracePeriod", Duration, "\"0s\"", "", Works("\"30s\"")),
    f("shutdownGracePeriodCriticalPods", Duration, "\"0s\"", "", Works("\"0s\"")),
    f("shutdownGracePeriodByPodPriority", Structure, "", "", Works("[{\"priority\":0,\"shutdownGracePeriodSeconds\":5}]")),
    f("crashLoopBackOff.maxContainerRestartPeriod", Duration, "\"300s\"", "", Works("\"60s\"")),
    f("reservedMemory", Structure, "", "reserved-memory", Ignored(NO_NUMA)),
    f("enableProfilingHandler", Bool, "true", "profiling", Ignored(NO_METRICS)),
    f("enableDebugFlagsHandler", Bool, "true", "", Ignored(NO_METRICS)),
    f("seccompDefault", Bool, "false", "seccomp-default", Works("true")),
    f("memoryThrottlingFactor", Float, "0.9", "", Inert("it is used with the MemoryQoS gate, which is off")),
    f("memoryReservationPolicy", Text, "\"None\"", "", Inert("it is used with the MemoryQoS gate, which is off")),
    f(
        "registerWithTaints",
        Taints,
        "",
        "register-with-taints",
        InCluster("[{\"key\":\"a\",\"value\":\"b\",\"effect\":\"NoSchedule\"}]"),
    ),
    f("registerNode", Bool, "true", "register-node", InCluster("false")),
    f("tracing", Structure, "", "", Ignored("there are no traces")),
    f("localStorageCapacityIsolation", Bool, "true", "local-storage-capacity-isolation", Works("false")),
    f(
        "containerRuntimeEndpoint",
        Text,
        "\"unix:///run/containerd/containerd.sock\"",
        "container-runtime-endpoint",
        Works("\"unix:///x\""),
    ),
    f("imageServiceEndpoint", Text, "", "image-service-endpoint", Refused("images and containers come over one socket")),
    f("failCgroupV1", Bool, "true", "fail-cgroup-v1", Works("true")),
    f("userNamespaces.idsPerPod", Int, "65536", "", Ignored("pods with user namespaces get 65536 ids")),
];

/// The field at a path.
pub fn field(path: &str) -> Option<&'static Field> {
    FIELDS.iter().find(|field| field.path == path)
}

/// Whether the path is a structure around fields of the table.
pub fn is_parent(path: &str) -> bool {
    FIELDS.iter().any(|field| field.path.strip_prefix(path).is_some_and(|rest| rest.starts_with('.')))
}

/// The document with every default that it does not replace: what `/configz` shows.
pub(super) fn in_effect(document: &serde_json::Map<String, Value>) -> Value {
    let mut whole = serde_json::Map::new();
    for field in FIELDS.iter().filter(|field| !field.default.is_empty()) {
        if let Ok(default) = serde_json::from_str(field.default) {
            super::value::set(&mut whole, field.path, default);
        }
    }
    super::merge_patch(&mut whole, document.clone());
    Value::Object(whole)
}

/// The table of the documentation.
pub fn markdown() -> String {
    let mut text = String::from("| field | default | flag | here |\n|---|---|---|---|\n");
    for field in FIELDS {
        let code = |text: &str| if text.is_empty() { String::new() } else { format!("`{text}`") };
        let flag = if field.flag.is_empty() { String::new() } else { format!("`--{}`", field.flag) };
        let here = match field.support {
            Support::Works(_) => "works".to_owned(),
            Support::Inert(why) => format!("no effect, as upstream: {why}"),
            Support::InCluster(_) => "works with an API server; named at start without one".to_owned(),
            Support::Ignored(why) => format!("named at start: {why}"),
            Support::Refused(why) => format!("refused: {why}"),
            Support::RefusedInCluster(why) => format!("refused with an API server: {why}; named at start without one"),
        };
        text.push_str(&format!("| `{}` | {} | {flag} | {here} |\n", field.path, code(field.default.trim_matches('"'))));
    }
    text
}
