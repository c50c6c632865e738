//! The families that the kubelet counts itself, with the upstream's names, labels and bounds. A table; behaviour is elsewhere.

/// A family of series: a gauge where it says so, else without buckets a counter, with buckets a histogram of seconds.
#[derive(Debug)]
pub struct Family {
    /// Its name.
    pub name: &'static str,
    /// What it is, in one line.
    pub help: &'static str,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    /// Upper bounds in seconds.
    pub buckets: &'static [f64],
    /// It goes up and down.
    pub gauge: bool,
}

impl Family {
    /// As Prometheus calls it.
    pub(crate) fn kind(&self) -> &'static str {
        match (self.gauge, self.buckets) {
            (true, _) => "gauge",
            (false, []) => "counter",
            _ => "histogram",
        }
    }
}

/// The bounds that Prometheus' clients have by default, which upstream uses for most.
const USUAL: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// From 5 ms, each 2.5 times the one before: the upstream's for calls of the runtime.
const CALLS: &[f64] = &[
    0.005,
    0.0125,
    0.03125,
    0.078125,
    0.1953125,
    0.48828125,
    1.220703125,
    3.0517578125,
    7.62939453125,
    19.073486328125,
    47.6837158203125,
    119.20928955078125,
    298.0232238769531,
    745.0580596923828,
];
/// The upstream's for pods that start.
const STARTS: &[f64] =
    &[0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 20.0, 30.0, 45.0, 60.0, 120.0, 180.0, 240.0, 300.0, 360.0, 480.0, 600.0];

macro_rules! families {
    ($($(#[$doc:meta])* $constant:ident = $name:literal ($help:literal) $labels:expr, $buckets:expr $(, $gauge:literal)?;)*) => {
        $($(#[$doc])* pub static $constant: Family =
            Family { name: $name, help: $help, labels: &$labels, buckets: $buckets, gauge: [$($gauge,)? false][0] };)*
        /// All of them, for `/metrics`; the probes' are on a page of their own.
        pub(crate) static ALL: &[&Family] = &[$(&$constant),*];
    };
}

families! {
    /// Calls of the runtime.
    OPERATIONS = "kubelet_runtime_operations_total" ("Cumulative number of runtime operations by operation type.") ["operation_type"], &[];
    /// Their times.
    OPERATION_SECONDS = "kubelet_runtime_operations_duration_seconds" ("Duration in seconds of runtime operations. Broken down by operation type.") ["operation_type"], CALLS;
    /// Those that failed.
    OPERATION_ERRORS = "kubelet_runtime_operations_errors_total" ("Cumulative number of runtime operation errors by operation type.") ["operation_type"], &[];
    /// Sandboxes made.
    SANDBOX_SECONDS = "kubelet_run_podsandbox_duration_seconds" ("Duration in seconds of the run_podsandbox operations. Broken down by RuntimeClass.Handler.") ["runtime_handler"], USUAL;
    /// Sandboxes that could not be made.
    SANDBOX_ERRORS = "kubelet_run_podsandbox_errors_total" ("Cumulative number of the run_podsandbox operation errors by RuntimeClass.Handler.") ["runtime_handler"], &[];
    /// Pods whose sandbox came up.
    STARTED_PODS = "kubelet_started_pods_total" ("Cumulative number of pods started") [], &[];
    /// Pods whose sandbox did not.
    STARTED_PODS_ERRORS = "kubelet_started_pods_errors_total" ("Cumulative number of errors when starting pods") [], &[];
    /// Containers started.
    STARTED_CONTAINERS = "kubelet_started_containers_total" ("Cumulative number of containers started") ["container_type"], &[];
    /// Containers that did not start.
    STARTED_CONTAINERS_ERRORS = "kubelet_started_containers_errors_total" ("Cumulative number of errors when starting containers") ["container_type", "code"], &[];
    /// From the first sight of a pod to its running.
    POD_START_SECONDS = "kubelet_pod_start_duration_seconds" ("Duration in seconds from kubelet seeing a pod for the first time to the pod starting to run") [], STARTS;
    /// Listings of the runtime.
    RELIST_SECONDS = "kubelet_pleg_relist_duration_seconds" ("Duration in seconds for relisting pods in PLEG.") [], USUAL;
    /// Between two of them.
    RELIST_INTERVAL = "kubelet_pleg_relist_interval_seconds" ("Interval in seconds between relisting in PLEG.") [], USUAL;
    /// Requests to the kubelet's servers.
    HTTP_REQUESTS = "kubelet_http_requests_total" ("Number of the http requests received since the server started") ["method", "path", "server_type", "long_running"], &[];
    /// Their times.
    HTTP_SECONDS = "kubelet_http_requests_duration_seconds" ("Duration in seconds to serve http requests") ["method", "path", "server_type", "long_running"], USUAL;
    /// Pods evicted.
    EVICTIONS = "kubelet_evictions" ("Cumulative number of pod evictions by eviction signal") ["eviction_signal"], &[];
    /// Pods that were not admitted.
    ADMISSION_REJECTIONS = "kubelet_admission_rejections_total" ("Cumulative number pod admission rejections by the Kubelet.") ["reason"], &[];
    /// Images removed to make room.
    IMAGE_GARBAGE = "kubelet_image_garbage_collected_total" ("Total number of images garbage collected by the kubelet, whether through disk usage or image age.") ["reason"], &[];
    /// Device plugins that have asked to be taken.
    DEVICE_REGISTRATIONS = "kubelet_device_plugin_registration_total" ("Cumulative number of device plugin registrations. Broken down by resource name.") ["resource_name"], &[];
    /// How long they took to give devices.
    DEVICE_ALLOCATION_SECONDS = "kubelet_device_plugin_alloc_duration_seconds" ("Duration in seconds to serve a device plugin Allocation request. Broken down by resource name.") ["resource_name"], USUAL;
    /// Containers that were to get processors for themselves.
    PINNING_REQUESTS = "kubelet_cpu_manager_pinning_requests_total" ("The number of cpu core allocations which required pinning.") [], &[];
    /// Those that did not get them.
    PINNING_ERRORS = "kubelet_cpu_manager_pinning_errors_total" ("The number of cpu core allocations which required pinning failed.") [], &[];
    /// What containers could have for themselves still.
    SHARED_POOL = "kubelet_cpu_manager_shared_pool_size_millicores" ("The size of the shared CPU pool for non-guaranteed QoS pods, in millicores.") [], &[], true;
    /// What containers have for themselves.
    EXCLUSIVE_CPUS = "kubelet_cpu_manager_exclusive_cpu_allocation_count" ("The total number of CPUs exclusively allocated to containers running on this node") [], &[], true;
    /// Pods of the runtime that nobody wanted.
    ORPHANED_PODS = "kubelet_orphaned_runtime_pods_total" ("Number of pods that have been detected in the container runtime without being already known to the pod worker.") [], &[];
}

/// What probes said; on `/metrics/probes`.
pub static PROBES: Family = Family {
    name: "prober_probe_total",
    help: "Cumulative number of a liveness, readiness or startup probe for a container by result.",
    labels: &["probe_type", "result", "container", "pod", "namespace", "pod_uid"],
    buckets: &[],
    gauge: false,
};

/// How long they took; on `/metrics/probes`.
pub static PROBE_SECONDS: Family = Family {
    name: "prober_probe_duration_seconds",
    help: "Duration in seconds for a probe response.",
    labels: &["probe_type", "container", "pod", "namespace"],
    buckets: USUAL,
    gauge: false,
};
