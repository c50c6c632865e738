use std::path::Path;

use super::fields::{FIELDS, Support, markdown};
use super::*;

fn config() -> Config {
    Config::new("n", tonic::transport::Endpoint::from_static("http://unused").connect_lazy())
}

fn document(text: &str) -> Value {
    documents(text).unwrap().remove(0)
}

fn of(text: &str) -> Configuration {
    let mut configuration = Configuration::default();
    configuration.add_document(document(text), Path::new("/etc/x"));
    configuration
}

fn applied(configuration: &Configuration) -> Config {
    configuration.check().unwrap();
    let mut config = config();
    configuration.apply(&mut config).unwrap();
    // It holds the document itself: every field would seem to have an effect.
    config.server.configz = Default::default();
    config
}

#[tokio::test]
async fn configz_shows_defaults_and_what_was_set() {
    let mut config = config();
    of("maxPods: 7\nlogging: {verbosity: 3}\n").apply(&mut config).unwrap();
    let shown = &config.server.configz;
    assert_eq!((&shown["maxPods"], &shown["logging"]["verbosity"], &shown["podPidsLimit"]), (&7.into(), &3.into(), &(-1).into()));
}

/// A document with one field.
fn with(path: &str, json: &str) -> Configuration {
    let mut configuration = Configuration::default();
    value::set(&mut configuration.value, path, serde_json::from_str(json).unwrap());
    configuration
}

#[tokio::test]
async fn every_field_that_works_changes_the_configuration() {
    let unchanged = format!("{:?}", applied(&Configuration::default()));
    for field in FIELDS {
        let (Support::Works(sample) | Support::InCluster(sample)) = field.support else { continue };
        let mut configuration = with(field.path, sample);
        // Some fields mean something only beside another one.
        let beside = match field.path {
            "evictionSoft" => Some(("evictionSoftGracePeriod", "{\"memory.available\":\"90s\"}")),
            "evictionSoftGracePeriod" => Some(("evictionSoft", "{\"memory.available\":\"9Mi\"}")),
            "mergeDefaultEvictionSettings" => Some(("evictionHard", "{\"pid.available\":\"5%\"}")),
            "cpuManagerPolicyOptions" => Some(("cpuManagerPolicy", "\"static\"")),
            "enableServer" => Some(("port", "10250")),
            "authentication.webhook.cacheTTL" => Some(("authentication.webhook.enabled", "true")),
            "shutdownGracePeriodCriticalPods" => Some(("shutdownGracePeriod", "\"30s\"")),
            _ => None,
        };
        let mut without = unchanged.clone();
        if let Some((path, json)) = beside {
            value::set(&mut configuration.value, path, serde_json::from_str(json).unwrap());
            if !field.path.starts_with("evictionSoft") {
                without = format!("{:?}", applied(&with(path, json)));
            }
            if field.path == "shutdownGracePeriodCriticalPods" {
                value::set(&mut configuration.value, field.path, Value::String("10s".into()));
            }
        }
        let changed = format!("{:?}", applied(&configuration));
        assert_ne!(changed, without, "{} has no effect", field.path);
    }
}

#[tokio::test]
async fn defaults_are_silent_and_everything_else_without_effect_is_named_or_refused() {
    for field in FIELDS.iter().filter(|field| !field.default.is_empty()) {
        let notices = with(field.path, field.default).check();
        assert_eq!(notices.unwrap_or_else(|e| panic!("{}: {e}", field.path)), Vec::<String>::new(), "{}", field.path);
    }
    for field in FIELDS {
        let other = match field.kind {
            fields::Kind::Bool => {
                if field.default == "true" {
                    "false"
                } else {
                    "true"
                }
            }
            fields::Kind::Int => "77",
            fields::Kind::Float => "0.5",
            fields::Kind::Text | fields::Kind::Structure => "\"other\"",
            fields::Kind::Duration => "\"77s\"",
            fields::Kind::Texts => "[\"other\"]",
            fields::Kind::Map => "{\"other\":\"1\"}",
            fields::Kind::Taints => "[{\"key\":\"other\",\"effect\":\"NoExecute\"}]",
            fields::Kind::Gates => "{\"Other\":true}",
        };
        let checked = with(field.path, other).check();
        let mut in_cluster = with(field.path, other);
        in_cluster.join_cluster();
        match field.support {
            Support::RefusedInCluster(_) => {
                let notices = checked.unwrap();
                assert!(notices.len() == 1 && notices[0].starts_with(field.path), "{}: {notices:?}", field.path);
                assert!(in_cluster.check().unwrap_err().to_string().starts_with(field.path), "{}", field.path);
            }
            Support::Works(_) | Support::Inert(_) => assert_eq!(checked.unwrap(), Vec::<String>::new(), "{}", field.path),
            Support::InCluster(_) | Support::Ignored(_) => {
                let notices = checked.unwrap();
                assert!(notices.len() == 1 && notices[0].starts_with(field.path), "{}: {notices:?}", field.path);
            }
            Support::Refused(_) => assert!(checked.unwrap_err().to_string().starts_with(field.path), "{}", field.path),
        }
    }
}

#[tokio::test]
async fn what_kubeadm_writes_is_taken() {
    let configuration = of(
        "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nauthentication:\n  anonymous: {enabled: false}\n  \
         webhook: {cacheTTL: 0s, enabled: true}\n  x509: {clientCAFile: /etc/kubernetes/pki/ca.crt}\nauthorization:\n  mode: Webhook\n  \
         webhook: {cacheAuthorizedTTL: 0s, cacheUnauthorizedTTL: 0s}\ncgroupDriver: systemd\nclusterDNS: [10.96.0.10]\n\
         clusterDomain: cluster.local\ncontainerRuntimeEndpoint: \"\"\ncpuManagerReconcilePeriod: 0s\ncrashLoopBackOff: {}\n\
         evictionPressureTransitionPeriod: 0s\nfileCheckFrequency: 0s\nhealthzBindAddress: 127.0.0.1\nhealthzPort: 10248\n\
         httpCheckFrequency: 0s\nimageMaximumGCAge: 0s\nimageMinimumGCAge: 0s\nlogging:\n  flushFrequency: 0\n  options:\n    \
         json: {infoBufferSize: \"0\"}\n    text: {infoBufferSize: \"0\"}\n  verbosity: 0\nmemorySwap: {}\n\
         nodeStatusReportFrequency: 0s\nnodeStatusUpdateFrequency: 0s\nresolvConf: /run/systemd/resolve/resolv.conf\n\
         rotateCertificates: true\nruntimeRequestTimeout: 0s\nshutdownGracePeriod: 0s\nshutdownGracePeriodCriticalPods: 0s\n\
         staticPodPath: manifests\nstreamingConnectionIdleTimeout: 0s\nsyncFrequency: 0s\nvolumeStatsAggPeriod: 0s\n",
    );
    let config = applied(&configuration);
    assert_eq!(config.manifests.as_deref(), Some(Path::new("/etc/x/manifests")), "meant from the file's folder");
    assert_eq!(config.resolv_conf, Path::new("/run/systemd/resolve/resolv.conf"));
    assert_eq!(config.resolv_conf_uplink, None, "who names one means that one");
    assert_eq!(config.timing.cri_call, std::time::Duration::from_secs(120));
    assert_eq!(config.image_gc.min_age, std::time::Duration::from_secs(120), "a zero duration means the default");
    assert!(config.shutdown_steps.is_empty());
}

#[tokio::test]
async fn drop_ins_are_merged_in_order_and_flags_win() {
    let root = tempfile::tempdir().unwrap();
    let head = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n";
    let write = |name: &str, text: &str| {
        let path = root.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write(
        "10-a.conf",
        &format!("{head}maxPods: 20\npodPidsLimit: 5\nclusterDNS: [10.0.0.1]\nsystemReserved: {{memory: 2Gi, cpu: null}}\n"),
    );
    write("20-b/x.conf", &format!("{head}maxPods: 30\nclusterDNS: [10.0.0.2]\nstaticPodPath: m\n"));
    write("30-c.yaml", "this is not looked at: [");
    let mut configuration = of(
        "maxPods: 10\npodPidsLimit: 4\nclusterDomain: a\nsystemReserved: {memory: 1Gi, cpu: 1, pid: 100}\nfeatureGates: {A: true}\n",
    );
    configuration.add_drop_ins(root.path()).unwrap();
    for (flag, text) in
        [("cluster-domain", "b"), ("feature-gates", "B=true"), ("eviction-hard", "memory.available<1Gi,nodefs.available<1%")]
    {
        configuration.set_flag(flag, text).unwrap();
    }
    let gates = configuration.value["featureGates"].as_object().unwrap();
    assert_eq!(gates.len(), 2, "gates of flag and file add up");
    let config = applied(&configuration);
    assert_eq!((config.max_pods, config.policy.pod_pids), (30, Some(5)));
    assert_eq!(config.cluster_dns, ["10.0.0.2".parse::<std::net::IpAddr>().unwrap()], "lists are replaced");
    assert_eq!(config.cluster_domain, "b");
    assert_eq!(config.manifests.as_deref(), Some(root.path().join("20-b/m").as_path()));
    let reserved: Vec<_> = config.reservations.system.keys().map(String::as_str).collect();
    assert_eq!(reserved, ["memory", "pid"], "null removes, maps merge");
    assert_eq!(config.eviction.thresholds.len(), 3, "two, and the pods' share");

    write("40.conf", "kind: Other\n");
    let error = configuration.add_drop_ins(root.path()).unwrap_err().to_string();
    assert!(error.contains("40.conf"), "{error}");
}

#[test]
fn unknown_fields_are_named_and_values_of_the_wrong_kind_refused() {
    assert_eq!(of("maxPodz: 1\nauthentication: {x509: {ca: y}}\n").check().unwrap().len(), 2);
    for (text, field) in [
        ("maxPods: many\n", "maxPods"),
        ("failSwapOn: 1\n", "failSwapOn"),
        ("syncFrequency: soon\n", "syncFrequency"),
        ("authentication: yes\n", "authentication"),
        ("evictionHard: [a]\n", "evictionHard"),
        ("clusterDNS: 10.0.0.1\n", "clusterDNS"),
    ] {
        let error = of(text).check().unwrap_err().to_string();
        assert!(error.starts_with(field), "{error}");
    }
}

#[tokio::test]
async fn values_that_cannot_be_meant_are_refused_by_field() {
    for (text, field) in [
        ("containerLogMaxFiles: 1\n", "containerLogMaxFiles"),
        ("containerLogMaxSize: ten\n", "containerLogMaxSize"),
        ("imageGCHighThresholdPercent: 80\n", "imageGCLowThresholdPercent"),
        ("crashLoopBackOff: {maxContainerRestartPeriod: 10m}\n", "crashLoopBackOff"),
        ("systemReserved: {gpu: 1}\n", "systemReserved"),
        ("enforceNodeAllocatable: [pods, kube-reserved]\n", "enforceNodeAllocatable"),
        ("shutdownGracePeriod: 5s\nshutdownGracePeriodCriticalPods: 6s\n", "shutdownGracePeriodCriticalPods"),
        ("evictionSoft: {memory.available: 1Gi}\n", "evictionSoftGracePeriod"),
        ("memorySwap: {swapBehavior: UnlimitedSwap}\n", "memorySwap.swapBehavior"),
        ("podLogsDir: logs\n", "podLogsDir"),
        ("reservedSystemCPUs: 3-1\n", "reservedSystemCPUs"),
    ] {
        let error = of(text).apply(&mut config()).unwrap_err().to_string();
        assert!(error.starts_with(field), "{error}");
    }
}

#[test]
fn flags_are_read_by_their_kind() {
    let mut configuration = Configuration::default();
    for (flag, text) in [
        ("max-pods", "x"),
        ("fail-swap-on", "x"),
        ("eviction-hard", "x"),
        ("sync-frequency", "x"),
        ("nonsense", "1"),
        ("image-credential-provider-config", "/k"),
    ] {
        let error = configuration.set_flag(flag, text).unwrap_err().to_string();
        assert!(error.starts_with(&format!("--{flag}: ")), "{error}");
    }
    configuration.set_flag("node-labels", "a=b").unwrap();
    assert_eq!(configuration.check().unwrap(), ["flag --node-labels has no effect: there is no API server"]);
    let names: std::collections::BTreeSet<_> = flag_descriptions().iter().map(|flag| flag.name).collect();
    assert_eq!(names.len(), flag_descriptions().len(), "no flag twice");
}

#[tokio::test]
async fn with_an_api_server_its_fields_count_and_it_reaches_the_node() {
    let mut configuration = of("kubeAPIQPS: 7\nrotateCertificates: true\n");
    assert_eq!(configuration.check().unwrap().len(), 2);
    configuration.join_cluster();
    assert_eq!(configuration.check().unwrap(), Vec::<String>::new());
    let config = applied(&configuration);
    assert_eq!((config.api_settings.requests_per_second, config.api_settings.rotate_certificate), (7, true));
    assert_eq!((config.server.port, config.healthz_port), (Some(10250), Some(10248)));
    assert_eq!(config.server.authentication.webhook, Some(std::time::Duration::from_secs(120)));

    let mut given = of("port: 0\nhealthzPort: 10999\nauthentication: {webhook: {enabled: false}}\n");
    given.join_cluster();
    let config = applied(&given);
    assert_eq!((config.server.port, config.healthz_port, config.server.authentication.webhook), (None, Some(10999), None));
}

#[test]
fn durations_are_read_as_go_reads_them() {
    let millis = |text| parse_duration(text).map(|d| d.as_millis());
    assert_eq!((millis("1h30m"), millis("1.5s"), millis("500ms"), millis("0")), (Ok(5_400_000), Ok(1500), Ok(500), Ok(0)));
    assert!(
        parse_duration("").is_err()
            && parse_duration("5").is_err()
            && parse_duration("s").is_err()
            && parse_duration("1d").is_err()
    );
}

#[test]
fn the_page_has_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/kubelet-configuration.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let (head, rest) = page.split_once("<!-- table -->\n").unwrap();
    let (_, tail) = rest.split_once("<!-- end of table -->").unwrap();
    let wanted = format!("{head}<!-- table -->\n{}<!-- end of table -->{tail}", markdown());
    if std::env::var_os("BERTH_WRITE_DOCS").is_some() {
        std::fs::write(&path, &wanted).unwrap();
    } else {
        assert!(page == wanted, "run this test with BERTH_WRITE_DOCS=1: the table is not of this code");
    }
}
