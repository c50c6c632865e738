//! The merged document against the table, and into [`Config`]. Pure but for telling which cgroup version the machine has.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};

use super::fields::{Field, Kind, Support, field, is_parent};
use super::value::{at, parse_duration};
use crate::config::{Config, CpuManager, CpuPolicy, ImageGc, Reservations, ShutdownStep, SwapBehavior};
use crate::eviction::threshold::{Given, thresholds};
use crate::quantity::Amount;
use crate::server::config::{Authentication, Authorization};
use crate::{Error, Result, sysctl};

pub(super) fn wrong<T>(field: &str, problem: impl Into<String>) -> Result<T> {
    Err(Error::Setting { field: field.to_owned(), problem: problem.into() })
}

/// Compares the document with the table: unknown fields and fields without effect become notices.
pub(super) fn check(object: &Map<String, Value>, prefix: &str, in_cluster: bool, notices: &mut Vec<String>) -> Result<()> {
    for (key, value) in object {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        if value.is_null() {
            continue;
        }
        if let Some(field) = field(&path) {
            check_field(field, value, in_cluster, notices)?;
        } else if is_parent(&path) {
            match value {
                Value::Object(below) => check(below, &path, in_cluster, notices)?,
                _ => return wrong(&path, "is not a structure"),
            }
        } else {
            notices.push(format!("unknown field {path}: it has no effect"));
        }
    }
    Ok(())
}

fn check_field(field: &Field, value: &Value, in_cluster: bool, notices: &mut Vec<String>) -> Result<()> {
    if let Err(problem) = check_kind(field.kind, value) {
        return wrong(field.path, problem);
    }
    let default = is_default(field, value);
    match field.support {
        Support::Works(_) | Support::Inert(_) => {}
        Support::InCluster(_) if in_cluster => {}
        Support::InCluster(_) | Support::RefusedInCluster(_) if default => {}
        Support::RefusedInCluster(why) if in_cluster => return wrong(field.path, format!("{value} is not supported: {why}")),
        Support::InCluster(_) | Support::RefusedInCluster(_) => {
            notices.push(format!("{} has no effect without an API server", field.path))
        }
        Support::Ignored(_) | Support::Refused(_) if default => {}
        Support::Ignored(why) => notices.push(format!("{}: {value} is not supported: {why}", field.path)),
        Support::Refused(why) => return wrong(field.path, format!("{value} is not supported: {why}")),
    }
    Ok(())
}

fn check_kind(kind: Kind, value: &Value) -> std::result::Result<(), String> {
    let text = value.as_str();
    let right = match kind {
        Kind::Bool => value.is_boolean(),
        Kind::Int => value.is_i64() || value.is_u64(),
        Kind::Float => value.is_number(),
        Kind::Text => text.is_some(),
        Kind::Duration => {
            return text
                .ok_or("is not a duration".to_owned())
                .and_then(|t| parse_duration(t.trim_start_matches('-')).map(|_| ()));
        }
        Kind::Texts => value.as_array().is_some_and(|items| items.iter().all(Value::is_string)),
        Kind::Map => value.as_object().is_some_and(|map| map.values().all(|v| v.is_string() || v.is_number())),
        Kind::Gates => value.as_object().is_some_and(|map| map.values().all(Value::is_boolean)),
        Kind::Taints => value.is_array(),
        Kind::Structure => true,
    };
    let wanted = match kind {
        Kind::Bool => "true or false",
        Kind::Int => "a whole number",
        Kind::Float => "a number",
        Kind::Texts => "a list of texts",
        Kind::Map => "texts by name",
        Kind::Gates => "true or false by name",
        Kind::Taints => "a list of taints",
        Kind::Text | Kind::Duration | Kind::Structure => "a text",
    };
    if right { Ok(()) } else { Err(format!("{value} is not {wanted}")) }
}

fn is_default(field: &Field, value: &Value) -> bool {
    let nothing = match value {
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(value) => !value && field.default.is_empty(),
        Value::Number(number) => number.as_i64() == Some(0) && field.default.is_empty(),
        Value::Null => true,
    };
    let Ok(default) = serde_json::from_str::<Value>(field.default) else { return nothing };
    if field.kind == Kind::Duration {
        let parsed = |value: &Value| value.as_str().and_then(|text| parse_duration(text).ok());
        // A zero duration means the default, as in the upstream.
        return parsed(value) == parsed(&default) || parsed(value) == Some(Duration::ZERO);
    }
    *value == default || (nothing && field.kind == Kind::Text)
}

/// Reads values of the merged document, which [`check`] has seen.
pub(super) struct Reader<'a>(pub(super) &'a Map<String, Value>);

impl Reader<'_> {
    pub(super) fn bool(&self, path: &str) -> Option<bool> {
        at(self.0, path)?.as_bool()
    }

    pub(super) fn text(&self, path: &str) -> Option<&str> {
        at(self.0, path)?.as_str()
    }

    pub(super) fn path(&self, path: &str) -> Option<PathBuf> {
        self.text(path).filter(|text| !text.is_empty()).map(PathBuf::from)
    }

    pub(super) fn int(&self, path: &str, least: i64, most: i64) -> Result<Option<i64>> {
        let Some(value) = at(self.0, path).and_then(Value::as_i64) else { return Ok(None) };
        if (least..=most).contains(&value) {
            return Ok(Some(value));
        }
        wrong(path, format!("{value} is not from {least} to {most}"))
    }

    pub(super) fn duration(&self, path: &str) -> Result<Option<Duration>> {
        let Some(text) = self.text(path) else { return Ok(None) };
        parse_duration(text).map(Some).or_else(|problem| wrong(path, problem))
    }

    /// A duration whose zero means that the default counts.
    pub(super) fn period(&self, path: &str) -> Result<Option<Duration>> {
        Ok(self.duration(path)?.filter(|period| !period.is_zero()))
    }

    pub(super) fn texts(&self, path: &str) -> Option<Vec<String>> {
        let items = at(self.0, path)?.as_array()?;
        Some(items.iter().filter_map(Value::as_str).map(str::to_owned).collect())
    }

    pub(super) fn map(&self, path: &str) -> Option<BTreeMap<String, String>> {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        Some(at(self.0, path)?.as_object()?.iter().map(|(key, value)| (key.clone(), text(value))).collect())
    }
}

/// Changes `config` as the document says.
pub(super) fn apply(document: &Map<String, Value>, config: &mut Config) -> Result<()> {
    let reader = Reader(document);
    apply_paths(&reader, config)?;
    apply_times(&reader, config)?;
    apply_limits(&reader, config)?;
    apply_logs(&reader, config)?;
    apply_dns(&reader, config)?;
    apply_reservations(&reader, config)?;
    apply_cpus(&reader, config)?;
    apply_eviction(&reader, config)?;
    apply_images(&reader, config)?;
    config.shutdown_steps = shutdown_steps(&reader)?;
    apply_server(&reader, config)?;
    apply_cluster(&reader, config)?;
    config.server.configz = Arc::new(super::fields::in_effect(document));
    Ok(())
}

/// How the API server is asked, where there is one.
fn apply_cluster(reader: &Reader<'_>, config: &mut Config) -> Result<()> {
    let settings = &mut config.api_settings;
    settings.rotate_certificate = reader.bool("rotateCertificates").unwrap_or(false);
    settings.request_serving_certificate = reader.bool("serverTLSBootstrap").unwrap_or(false);
    let most = i64::from(i32::MAX);
    for (path, least, field) in [
        ("kubeAPIQPS", -1, &mut settings.requests_per_second),
        ("kubeAPIBurst", 0, &mut settings.requests_burst),
        ("eventRecordQPS", 0, &mut settings.events_per_second),
        ("eventBurst", 0, &mut settings.events_burst),
    ] {
        if let Some(number) = reader.int(path, least, most)? {
            *field = u32::try_from(number).unwrap_or(0);
        }
    }
    Ok(())
}

/// What is not given has the upstream's defaults where there is an API server: it reaches the node, and is asked who may.
pub(super) fn apply_in_cluster(document: &Map<String, Value>, config: &mut Config) {
    let reader = Reader(document);
    if at(document, "port").is_none() {
        config.server.port = Some(10250);
    }
    if at(document, "healthzPort").is_none() {
        config.healthz_port = Some(10248);
    }
    if reader.bool("authentication.webhook.enabled").is_none() {
        let ttl = reader.period("authentication.webhook.cacheTTL").ok().flatten();
        config.server.authentication.webhook = Some(ttl.unwrap_or(Authentication::WEBHOOK_TTL));
    }
}

fn apply_paths(reader: &Reader<'_>, config: &mut Config) -> Result<()> {
    if let Some(path) = reader.path("staticPodPath") {
        config.manifests = Some(path);
    }
    if let Some(path) = reader.path("podLogsDir") {
        let text = path.to_string_lossy();
        let clean = path.is_absolute() && text.is_ascii() && !text.contains("//") && !text.split('/').any(|part| part == "..");
        if !clean {
            return wrong("podLogsDir", format!("{text:?} is not an absolute clean ASCII path"));
        }
        config.pod_logs_dir = path;
    }
    if let Some(endpoint) = reader.text("containerRuntimeEndpoint").filter(|text| !text.is_empty()) {
        config.runtime_endpoint = Some(endpoint.to_owned());
    }
    if let Some(port) = reader.int("healthzPort", 0, 65535)? {
        config.healthz_port = u16::try_from(port).ok().filter(|port| *port != 0);
    }
    if let Some(root) = reader.text("cgroupRoot").filter(|text| !text.is_empty()) {
        config.cgroup_root = Some(root.to_owned());
    }
    if reader.bool("failCgroupV1") == Some(true) {
        config.fail_cgroup_v1 = true;
    }
    if let Some(fail) = reader.bool("failSwapOn") {
        config.fail_swap_on = fail;
    }
    config.make_iptables_hint = reader.bool("makeIPTablesUtilChains").unwrap_or(true);
    config.protect_kernel_defaults = reader.bool("protectKernelDefaults").unwrap_or(false);
    if let Some(score) = reader.int("oomScoreAdj", -1000, 1000)? {
        config.oom_score_adj = i16::try_from(score).ok();
    }
    Ok(())
}

fn apply_times(reader: &Reader<'_>, config: &mut Config) -> Result<()> {
    if let Some(period) = reader.period("fileCheckFrequency")? {
        config.timing.rescan = period;
    }
    if let Some(limit) = reader.period("runtimeRequestTimeout")? {
        config.timing.cri_call = limit;
        // Sandboxes take twice an ordinary call, as in the upstream.
        config.timing.cri_sandbox = limit * 2;
    }
    if let Some(longest) = reader.duration("crashLoopBackOff.maxContainerRestartPeriod")? {
        if longest < Duration::from_secs(1) || longest > Duration::from_secs(300) {
            return wrong("crashLoopBackOff.maxContainerRestartPeriod", "is not from 1s to 300s");
        }
        config.crash_backoff.max = longest;
        config.crash_backoff.base = config.crash_backoff.base.min(longest);
    }
    Ok(())
}

fn apply_limits(reader: &Reader<'_>, config: &mut Config) -> Result<()> {
    let u32_of = |value: i64| u32::try_from(value).unwrap_or(u32::MAX);
    if let Some(most) = reader.int("maxPods", 0, i64::from(i32::MAX))? {
        config.max_pods = usize::try_from(most).unwrap_or(usize::MAX);
    }
    if let Some(most) = reader.int("podsPerCore", 0, i64::from(i32::MAX))? {
        config.pods_per_core = u32_of(most);
    }
    let policy = &mut config.policy;
    if let Some(pids) = reader.int("podPidsLimit", -1, i64::MAX)? {
        policy.pod_pids = Some(pids).filter(|pids| *pids > 0);
    }
    if let Some(quota) = reader.bool("cpuCFSQuota") {
        policy.cfs_quota = quota;
    }
    if let Some(period) = reader.period("cpuCFSQuotaPeriod")? {
        if period < Duration::from_millis(1) || period > Duration::from_secs(1) {
            return wrong("cpuCFSQuotaPeriod", "is not from 1ms to 1s");
        }
        policy.cfs_period = period;
    }
    policy.single_process_oom_kill = reader.bool("singleProcessOOMKill");
    policy.swap = match reader.text("memorySwap.swapBehavior").unwrap_or_default() {
        "" | "NoSwap" => SwapBehavior::NoSwap,
        "LimitedSwap" => SwapBehavior::LimitedSwap,
        other => return wrong("memorySwap.swapBehavior", format!("{other:?} is neither NoSwap nor LimitedSwap")),
    };
    if let Some(sysctls) = reader.texts("allowedUnsafeSysctls") {
        if let Some(bad) = sysctls.iter().find(|pattern| !sysctl::is_pattern(pattern)) {
            return wrong(
                "allowedUnsafeSysctls",
                format!("{bad:?} is neither a parameter nor a prefix of namespaced ones with * at its end"),
            );
        }
        config.allowed_unsafe_sysctls = sysctls;
    }
    if let Some(default) = reader.bool("seccompDefault") {
        config.seccomp_default = default;
    }
    Ok(())
}

fn apply_logs(reader: &Reader<'_>, config: &mut Config) -> Result<()> {
    if let Some(text) = reader.text("containerLogMaxSize") {
        let amount = Amount::parse(text).or_else(|error| wrong("containerLogMaxSize", error.to_string()))?;
        if amount.is_zero() {
            return wrong("containerLogMaxSize", "a log file of nothing holds no line");
        }
        // A negative size switches rotation off.
        config.log_limits.max_bytes = u64::try_from(amount.units()).unwrap_or(u64::MAX);
    }
    if let Some(files) = reader.int("containerLogMaxFiles", 2, i64::from(i32::MAX))? {
        config.log_limits.max_files = u32::try_from(files).unwrap_or(u32::MAX);
    }
    if let Some(period) = reader.duration("containerLogMonitorInterval")? {
        if period < Duration::from_secs(3) {
            return wrong("containerLogMonitorInterval", "is less than 3s");
        }
        config.timing.log_monitor = period;
    }
    Ok(())
}

fn apply_dns(reader: &Reader<'_>, config: &mut Config) -> Result<()> {
    if let Some(servers) = reader.texts("clusterDNS") {
        let parse = |s: &String| s.parse::<IpAddr>().or_else(|_| wrong("clusterDNS", format!("{s:?} is no address")));
        config.cluster_dns = servers.iter().map(parse).collect::<Result<_>>()?;
    }
    if let Some(domain) = reader.text("clusterDomain") {
        domain.clone_into(&mut config.cluster_domain);
    }
    if let Some(path) = reader.text("resolvConf") {
        // An empty path means that pods inherit nothing.
        config.resolv_conf = PathBuf::from(path);
        // Who names one means that one.
        config.resolv_conf_uplink = None;
    }
    Ok(())
}

fn apply_reservations(reader: &Reader<'_>, config: &mut Config) -> Result<()> {
    let mut reservations = Reservations::default();
    for (path, list) in [("systemReserved", &mut reservations.system), ("kubeReserved", &mut reservations.kube)] {
        for (name, text) in reader.map(path).unwrap_or_default() {
            if !["cpu", "memory", "ephemeral-storage", "pid"].contains(&name.as_str()) {
                return wrong(path, format!("cannot reserve {name:?} resource"));
            }
            let amount = Amount::parse(&text).or_else(|error| wrong(path, format!("{name}: {error}")))?;
            if amount.is_negative() {
                return wrong(path, format!("resource quantity for {name:?} cannot be negative: {text}"));
            }
            list.insert(name, amount);
        }
    }
    if let Some(list) = reader.text("reservedSystemCPUs").filter(|list| !list.is_empty()) {
        match crate::node::parse_cpu_list(list) {
            Some(cpus) if !cpus.is_empty() => reservations.cpus = Some(cpus),
            _ => return wrong("reservedSystemCPUs", format!("{list:?} is no list of processors such as 0-1,4")),
        }
    }
    if let Some(names) = reader.texts("enforceNodeAllocatable") {
        for name in &names {
            match name.as_str() {
                "pods" | "none" => {}
                "system-reserved" | "kube-reserved" | "system-reserved-compressible" | "kube-reserved-compressible" => {
                    return wrong("enforceNodeAllocatable", format!("{name} is not supported: only the pods' share is enforced"));
                }
                other => return wrong("enforceNodeAllocatable", format!("{other:?} is unknown")),
            }
        }
        if names.len() > 1 && names.iter().any(|name| name == "none") {
            return wrong("enforceNodeAllocatable", "none stands alone");
        }
        reservations.enforce_pods = names.iter().any(|name| name == "pods");
    }
    config.reservations = reservations;
    Ok(())
}

/// The options that the upstream's static policy has besides `full-pcpus-only`.
const OTHER_OPTIONS: [&str; 5] = [
    "distribute-cpus-across-numa",
    "align-by-socket",
    "distribute-cpus-across-cores",
    "strict-cpu-reservation",
    "prefer-align-cpus-by-uncorecache",
];

fn apply_cpus(reader: &Reader<'_>, config: &mut Config) -> Result<()> {
    const OPTIONS: &str = "cpuManagerPolicyOptions";
    let mut cpus = CpuManager::default();
    if let Some(period) = reader.period("cpuManagerReconcilePeriod")? {
        cpus.reconcile = period;
    }
    cpus.policy = match reader.text("cpuManagerPolicy").unwrap_or_default() {
        "" | "none" => CpuPolicy::None,
        "static" => CpuPolicy::Static,
        other => return wrong("cpuManagerPolicy", format!("unknown policy: {other:?}")),
    };
    for (name, text) in reader.map(OPTIONS).unwrap_or_default() {
        let on = match text.as_str() {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => true,
            "0" | "f" | "F" | "false" | "FALSE" | "False" => false,
            other => return wrong(OPTIONS, format!("bad value for option {name:?}: {other:?}")),
        };
        match name.as_str() {
            "full-pcpus-only" => cpus.full_cores = on,
            known if OTHER_OPTIONS.contains(&known) && !on => {}
            known if OTHER_OPTIONS.contains(&known) => return wrong(OPTIONS, format!("{name} is not supported")),
            _ => return wrong(OPTIONS, format!("unknown CPU Manager Policy option: {name:?}")),
        }
    }
    if cpus.policy == CpuPolicy::None && cpus.full_cores {
        return wrong(OPTIONS, "the none policy has no options");
    }
    config.policy.exclusive_cpus = cpus.policy == CpuPolicy::Static;
    config.cpu_manager = cpus;
    Ok(())
}

fn apply_eviction(reader: &Reader<'_>, config: &mut Config) -> Result<()> {
    let mut grace = BTreeMap::new();
    for (signal, text) in reader.map("evictionSoftGracePeriod").unwrap_or_default() {
        let parsed = parse_duration(&text).or_else(|problem| wrong("evictionSoftGracePeriod", format!("{signal}: {problem}")))?;
        grace.insert(signal, parsed);
    }
    let given = Given {
        hard: reader.map("evictionHard"),
        soft: reader.map("evictionSoft").unwrap_or_default(),
        grace: grace.clone(),
        reclaim: reader.map("evictionMinimumReclaim").unwrap_or_default(),
        merge: reader.bool("mergeDefaultEvictionSettings").unwrap_or(false),
        allocatable: config.reservations.enforce_pods,
    };
    let eviction = &mut config.eviction;
    eviction.thresholds = thresholds(&given).or_else(|(field, problem)| wrong(field, problem))?;
    if let Some(signal) = grace.keys().find(|signal| !given.soft.contains_key(*signal)) {
        return wrong("evictionSoftGracePeriod", format!("{signal} has no soft threshold"));
    }
    if let Some(period) = reader.period("evictionPressureTransitionPeriod")? {
        eviction.pressure_transition = period;
    }
    if let Some(seconds) = reader.int("evictionMaxPodGracePeriod", -1, i64::from(i32::MAX))? {
        eviction.max_pod_grace = seconds;
    }
    if let Some(isolation) = reader.bool("localStorageCapacityIsolation") {
        eviction.local_storage = isolation;
    }
    Ok(())
}

fn apply_images(reader: &Reader<'_>, config: &mut Config) -> Result<()> {
    let percent = |path: &str| reader.int(path, 0, 100);
    let mut gc = ImageGc::default();
    if let Some(high) = percent("imageGCHighThresholdPercent")? {
        gc.high_percent = u8::try_from(high).unwrap_or(100);
    }
    if let Some(low) = percent("imageGCLowThresholdPercent")? {
        gc.low_percent = u8::try_from(low).unwrap_or(100);
    }
    if gc.low_percent >= gc.high_percent {
        return wrong(
            "imageGCLowThresholdPercent",
            format!("{} is not below imageGCHighThresholdPercent, {}", gc.low_percent, gc.high_percent),
        );
    }
    if let Some(age) = reader.period("imageMinimumGCAge")? {
        gc.min_age = age;
    }
    gc.max_age = reader.period("imageMaximumGCAge")?;
    if gc.max_age.is_some_and(|most| most < gc.min_age) {
        return wrong("imageMaximumGCAge", "is less than imageMinimumGCAge");
    }
    config.image_gc = gc;
    Ok(())
}

/// The servers on TCP: none listens unless its port is given, since without a cluster nobody has to reach them.
fn apply_server(reader: &Reader<'_>, config: &mut Config) -> Result<()> {
    let server = &mut config.server;
    let port = |path| Ok(reader.int(path, 0, 65535)?.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0));
    let address = |path| match reader.text(path).filter(|text| !text.is_empty()) {
        None => Ok(None),
        Some(text) => text.parse::<IpAddr>().map(Some).or_else(|_| wrong(path, format!("{text:?} is no address"))),
    };
    if let Some(address) = address("address")? {
        server.address = address;
    }
    if let Some(address) = address("healthzBindAddress")? {
        server.healthz_address = address;
    }
    server.enabled = reader.bool("enableServer").unwrap_or(true);
    server.port = port("port")?;
    server.read_only_port = port("readOnlyPort")?;
    server.tls.cert_file = reader.path("tlsCertFile");
    server.tls.key_file = reader.path("tlsPrivateKeyFile");
    server.tls.min_version = reader.text("tlsMinVersion").filter(|text| !text.is_empty()).map(str::to_owned);
    server.tls.cipher_suites = reader.texts("tlsCipherSuites").unwrap_or_default();
    server.tls.curves = reader.texts("tlsCurvePreferences").unwrap_or_default();
    server.authentication.client_ca_file = reader.path("authentication.x509.clientCAFile");
    server.authentication.anonymous = reader.bool("authentication.anonymous.enabled").unwrap_or(false);
    let ttl = reader.period("authentication.webhook.cacheTTL")?.unwrap_or(Authentication::WEBHOOK_TTL);
    // Without an API server there is nobody to ask: on only where it is asked for by name, and then refused.
    server.authentication.webhook = reader.bool("authentication.webhook.enabled").filter(|on| *on).map(|_| ttl);
    server.authorization = match reader.text("authorization.mode").unwrap_or_default() {
        "" | "Webhook" => {
            let ttl = |path, default: u64| Ok::<_, Error>(reader.period(path)?.unwrap_or(Duration::from_secs(default)));
            Authorization::Webhook {
                allowed_ttl: ttl("authorization.webhook.cacheAuthorizedTTL", 300)?,
                denied_ttl: ttl("authorization.webhook.cacheUnauthorizedTTL", 30)?,
            }
        }
        "AlwaysAllow" => Authorization::AlwaysAllow,
        other => return wrong("authorization.mode", format!("{other:?} is neither AlwaysAllow nor Webhook")),
    };
    server.debugging_handlers = reader.bool("enableDebuggingHandlers").unwrap_or(true);
    server.system_log_handler = reader.bool("enableSystemLogHandler").unwrap_or(true);
    server.system_log_query = reader.bool("enableSystemLogQuery").unwrap_or(false);
    Ok(())
}

/// Priority from which a pod is critical: `system-cluster-critical`.
const CRITICAL: i32 = 2_000_000_000;

fn shutdown_steps(reader: &Reader<'_>) -> Result<Vec<ShutdownStep>> {
    let whole = reader.duration("shutdownGracePeriod")?.unwrap_or_default();
    let critical = reader.duration("shutdownGracePeriodCriticalPods")?.unwrap_or_default();
    let list = at(reader.0, "shutdownGracePeriodByPodPriority");
    if let Some(list) = list.filter(|list| list.as_array().is_none_or(|items| !items.is_empty())) {
        const FIELD: &str = "shutdownGracePeriodByPodPriority";
        if !whole.is_zero() || !critical.is_zero() {
            return wrong(FIELD, "cannot be given beside shutdownGracePeriod");
        }
        let number = |item: &Value, key: &str| item.get(key).and_then(Value::as_i64);
        let mut steps = Vec::new();
        for item in list.as_array().into_iter().flatten() {
            match (number(item, "priority").and_then(|p| i32::try_from(p).ok()), number(item, "shutdownGracePeriodSeconds")) {
                (Some(priority), Some(seconds @ 0..)) => {
                    steps.push(ShutdownStep { priority, grace: Duration::from_secs(seconds.unsigned_abs()) });
                }
                _ => return wrong(FIELD, format!("{item} is not a priority with shutdownGracePeriodSeconds")),
            }
        }
        steps.sort_by_key(|step| step.priority);
        return Ok(steps);
    }
    if critical > whole {
        return wrong("shutdownGracePeriodCriticalPods", "is more than shutdownGracePeriod");
    }
    if whole.is_zero() {
        return Ok(Vec::new());
    }
    if whole < Duration::from_secs(1) {
        return wrong("shutdownGracePeriod", "is less than 1s");
    }
    Ok(vec![ShutdownStep { priority: 0, grace: whole - critical }, ShutdownStep { priority: CRITICAL, grace: critical }])
}
