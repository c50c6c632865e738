//! `/etc/berth/config.yaml`: several documents, KubeletConfiguration (v1beta1, as it is) and our NodeConfiguration
//! (berth/v1alpha1). Owns parsing; a field that is not read is refused by its name. Flags win over the file.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// What of KubeletConfiguration (kubelet.config.k8s.io/v1beta1) this version acts on. Others are refused by name.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct KubeletConfiguration {
    #[serde(rename = "apiVersion")]
    _api_version: Option<String>,
    #[serde(rename = "kind")]
    _kind: Option<String>,
    /// The folder of static pod manifests.
    pub static_pod_path: Option<PathBuf>,
    /// Where container logs are written.
    pub pod_logs_dir: Option<PathBuf>,
    /// `/healthz` over TCP; 0 is off.
    pub healthz_port: Option<u16>,
    /// Bytes of one log file: a quantity such as `10Mi`.
    pub container_log_max_size: Option<String>,
    /// Log files of one container.
    pub container_log_max_files: Option<u32>,
    /// Servers for pods with `dnsPolicy: ClusterFirst`.
    #[serde(rename = "clusterDNS")]
    pub cluster_dns: Option<Vec<String>>,
    /// The search domain of the cluster.
    pub cluster_domain: Option<String>,
    /// The host's resolver configuration.
    pub resolv_conf: Option<PathBuf>,
    /// Whether a cgroup v1 host is refused.
    #[serde(rename = "failCgroupV1")]
    pub fail_cgroup_v1: Option<bool>,
    /// The crash-loop back-off's bounds.
    pub crash_loop_back_off: Option<CrashLoopBackOff>,
}

/// `crashLoopBackOff` of KubeletConfiguration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct CrashLoopBackOff {
    /// The longest wait between restarts, a Go duration such as `60s`.
    pub max_container_restart_period: Option<String>,
}

/// Our own document (berth/v1alpha1): the flags of `berth node`, in a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct NodeConfiguration {
    #[serde(rename = "apiVersion")]
    _api_version: Option<String>,
    #[serde(rename = "kind")]
    _kind: Option<String>,
    /// `--listen`
    pub listen: Option<String>,
    /// `--registry-config-dir`
    pub registry_config_dirs: Option<Vec<PathBuf>>,
    /// `--cni-conf-dir`
    pub cni_conf_dir: Option<PathBuf>,
    /// `--cni-bin-dir`
    pub cni_bin_dirs: Option<Vec<PathBuf>>,
    /// Folders of CDI spec files; the last one's devices win.
    pub cdi_spec_dirs: Option<Vec<PathBuf>>,
    /// `--cgroup-driver`
    pub cgroup_driver: Option<crate::cli::CgroupDriver>,
    /// NRI plugins.
    pub nri: Option<Nri>,
    /// `--pod-cidr`
    #[serde(rename = "podCIDR")]
    pub pod_cidr: Option<String>,
    /// `--runtime-handler`
    pub runtime_handlers: Option<Vec<RuntimeHandler>>,
    /// `--manifests`
    pub manifests: Option<PathBuf>,
    /// `--kubelet-root`
    pub kubelet_root: Option<PathBuf>,
    /// `--node-name`
    pub node_name: Option<String>,
    /// `--node-ip`
    #[serde(rename = "nodeIP")]
    pub node_ip: Option<IpAddr>,
    /// How long steps may take; no flag.
    pub deadlines: Deadlines,
}

/// `deadlines` of NodeConfiguration: Go durations such as `90s`. What each is for, and the limits that cannot be changed, are in
/// the CRI server's table of steps.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Deadlines {
    /// One run of one CNI plugin.
    #[serde(deserialize_with = "a_duration")]
    pub cni_plugin: Option<Duration>,
    /// A container's volumes and process, hooks included.
    #[serde(deserialize_with = "a_duration")]
    pub create_container: Option<Duration>,
    /// From the open gate to the running program.
    #[serde(deserialize_with = "a_duration")]
    pub start_container: Option<Duration>,
    /// Folders and records of ours.
    #[serde(deserialize_with = "a_duration")]
    pub storage: Option<Duration>,
}

fn a_duration<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(from)?;
    let value = duration(&text).map_err(serde::de::Error::custom)?;
    if value.is_zero() {
        return Err(serde::de::Error::custom(format!("{text:?}: a deadline of nothing ends everything")));
    }
    Ok(Some(value))
}

/// A RuntimeClass handler of NodeConfiguration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RuntimeHandler {
    /// What RuntimeClasses name.
    pub name: String,
    /// The OCI runtime's program.
    pub path: PathBuf,
    /// Arguments before all others.
    #[serde(default)]
    pub args: Vec<String>,
    /// How long one call of it may take, a Go duration such as `90s`.
    pub timeout: Option<String>,
}

/// `nri` of NodeConfiguration, with containerd's names. Durations as `5s`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Nri {
    /// No plugins at all.
    pub disable: bool,
    /// The socket that plugins connect to.
    pub socket_path: Option<PathBuf>,
    /// Plugins that are started with the runtime.
    pub plugin_path: Option<PathBuf>,
    /// Their configurations.
    pub plugin_config_path: Option<PathBuf>,
    /// From the connection of a plugin to its registration.
    pub registration_timeout: Option<String>,
    /// For each request to a plugin.
    pub request_timeout: Option<String>,
}

/// The documents of one file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct File {
    /// `kind: KubeletConfiguration`
    pub kubelet: KubeletConfiguration,
    /// `kind: NodeConfiguration`
    pub node: NodeConfiguration,
}

#[derive(Deserialize)]
struct Kind {
    #[serde(rename = "apiVersion")]
    api_version: Option<String>,
    kind: Option<String>,
}

/// Reads the documents of a configuration file's text.
pub fn parse(text: &str) -> Result<File> {
    let mut file = File::default();
    let (mut kubelets, mut nodes) = (0, 0);
    for (index, document) in serde_yaml_ng::Deserializer::from_str(text).enumerate() {
        let value = serde_yaml_ng::Value::deserialize(document).with_context(|| format!("document {}", index + 1))?;
        if value.is_null() {
            continue;
        }
        let head: Kind = serde_yaml_ng::from_value(value.clone()).with_context(|| format!("document {}", index + 1))?;
        match (head.api_version.as_deref(), head.kind.as_deref()) {
            (Some("kubelet.config.k8s.io/v1beta1"), Some("KubeletConfiguration")) => {
                file.kubelet = serde_yaml_ng::from_value(value).context("KubeletConfiguration")?;
                kubelets += 1;
            }
            (Some("berth/v1alpha1"), Some("NodeConfiguration")) => {
                file.node = serde_yaml_ng::from_value(value).context("NodeConfiguration")?;
                nodes += 1;
            }
            (version, kind) => bail!(
                "document {}: {} {} is neither kubelet.config.k8s.io/v1beta1 KubeletConfiguration nor berth/v1alpha1 NodeConfiguration",
                index + 1,
                version.unwrap_or("(no apiVersion)"),
                kind.unwrap_or("(no kind)")
            ),
        }
    }
    if kubelets > 1 || nodes > 1 {
        bail!("one document of each kind, not {kubelets} KubeletConfiguration and {nodes} NodeConfiguration");
    }
    Ok(file)
}

/// Loads the file that was named, or the default one where it exists.
pub fn load(named: Option<&Path>) -> Result<File> {
    let path = named.unwrap_or(Path::new("/etc/berth/config.yaml"));
    match std::fs::read_to_string(path) {
        Ok(text) => parse(&text).with_context(|| format!("reading {}", path.display())),
        Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => Ok(File::default()),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// Bytes of a Kubernetes quantity with a binary or decimal suffix: `10Mi`, `5M`, `1048576`.
pub fn quantity(text: &str) -> Result<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let factor: u64 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => bail!("{text:?} is not a quantity of bytes such as 10Mi"),
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(factor))
        .with_context(|| format!("{text:?} is not a quantity of bytes such as 10Mi"))
}

/// A Go duration of hours, minutes, seconds and milliseconds: `1h30m`, `10s`, `500ms`.
pub fn duration(text: &str) -> Result<std::time::Duration> {
    let wrong = || format!("{text:?} is not a duration such as 30s or 5m");
    let mut total = std::time::Duration::ZERO;
    let mut rest = text;
    if rest.is_empty() {
        bail!("{}", wrong());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).with_context(wrong)?;
        let number: u64 = rest[..digits].parse().with_context(wrong)?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let millis = match &rest[..unit] {
            "h" => 3_600_000,
            "m" => 60_000,
            "s" => 1000,
            "ms" => 1,
            _ => bail!("{}", wrong()),
        };
        total += std::time::Duration::from_millis(number.checked_mul(millis).with_context(wrong)?);
        rest = &rest[unit..];
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_are_read_from_one_file() {
        let file = parse(
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nstaticPodPath: /m\nclusterDNS: [10.96.0.10]\n\
             ---\napiVersion: berth/v1alpha1\nkind: NodeConfiguration\npodCIDR: 10.9.0.0/16\ndeadlines: {cniPlugin: 2m}\n---\n",
        )
        .expect("valid");
        assert_eq!(file.kubelet.static_pod_path, Some("/m".into()));
        assert_eq!(file.kubelet.cluster_dns, Some(vec!["10.96.0.10".to_owned()]));
        assert_eq!(file.node.pod_cidr.as_deref(), Some("10.9.0.0/16"));
        assert_eq!((file.node.deadlines.cni_plugin, file.node.deadlines.storage), (Some(Duration::from_secs(120)), None));
    }

    #[test]
    fn what_is_not_read_is_refused_by_name() {
        for (text, name) in [
            ("apiVersion: berth/v1alpha1\nkind: NodeConfiguration\npodcidr: x\n", "podcidr"),
            ("apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nmaxPods: 3\n", "maxPods"),
            ("apiVersion: v1\nkind: Pod\n", "v1 Pod"),
            ("apiVersion: berth/v1alpha1\nkind: NodeConfiguration\ndeadlines: {cni: 3s}\n", "cni"),
            ("apiVersion: berth/v1alpha1\nkind: NodeConfiguration\ndeadlines: {cniPlugin: 0s}\n", "a deadline of nothing"),
        ] {
            let error = format!("{:#}", parse(text).expect_err("refused"));
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn quantities_and_durations() {
        assert_eq!(quantity("10Mi").expect("valid"), 10 << 20);
        assert_eq!(quantity("7").expect("valid"), 7);
        assert!(quantity("ten").is_err() && quantity("99999999999Gi").is_err());
        assert_eq!(duration("1h30m").expect("valid").as_secs(), 5400);
        assert_eq!(duration("500ms").expect("valid").as_millis(), 500);
        assert!(duration("").is_err() && duration("5").is_err() && duration("s").is_err());
    }
}
