//! `/etc/berth/config.yaml`: several documents, KubeletConfiguration (v1beta1, as it is) and our NodeConfiguration
//! (berth/v1alpha1). Owns parsing; a field that is not read is refused by its name. Flags win over the file.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use berth_kubelet::configuration::{self, Configuration};
use serde::Deserialize;

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
    /// `--no-built-in-network` is false.
    pub built_in_network: Option<bool>,
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
    /// Pods of files are evicted too when the node runs short; else only what is not used is removed, as upstream.
    pub evict_static_pods: bool,
    /// `--sealing-key-file`
    pub sealing_key_file: Option<PathBuf>,
    /// `--offline-max-age`
    #[serde(deserialize_with = "any_duration")]
    pub offline_max_age: Option<Duration>,
    /// `--offline-after`
    #[serde(deserialize_with = "any_duration")]
    pub offline_after: Option<Duration>,
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

fn any_duration<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(from)?;
    duration(&text).map(Some).map_err(serde::de::Error::custom)
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
    /// `kind: KubeletConfiguration`, with its folder's drop-ins later
    pub kubelet: Configuration,
    /// `kind: NodeConfiguration`
    pub node: NodeConfiguration,
    /// Whether there is such a document.
    has_node: bool,
}

/// Reads the documents of a configuration file's text; relative paths in it are meant from `folder`.
pub fn parse(text: &str, folder: &Path) -> Result<File> {
    let mut file = File::default();
    let (mut kubelets, mut nodes) = (0, 0);
    for (index, document) in configuration::documents(text).map_err(anyhow::Error::msg)?.into_iter().enumerate() {
        let field = |name: &str| document.get(name).and_then(|value| value.as_str()).map(str::to_owned);
        match (field("apiVersion"), field("kind")) {
            _ if configuration::is_configuration(&document) => {
                file.kubelet.add_document(document, folder);
                kubelets += 1;
            }
            (Some(version), Some(kind)) if version == "berth/v1alpha1" && kind == "NodeConfiguration" => {
                file.node = serde_json::from_value(document).context("NodeConfiguration")?;
                nodes += 1;
            }
            (version, kind) => bail!(
                "document {}: {} {} is neither kubelet.config.k8s.io/v1beta1 KubeletConfiguration nor berth/v1alpha1 NodeConfiguration",
                index + 1,
                version.as_deref().unwrap_or("(no apiVersion)"),
                kind.as_deref().unwrap_or("(no kind)")
            ),
        }
    }
    if kubelets > 1 || nodes > 1 {
        bail!("one document of each kind, not {kubelets} KubeletConfiguration and {nodes} NodeConfiguration");
    }
    file.has_node = nodes == 1;
    Ok(file)
}

/// Where the file is, if not named.
pub const DEFAULT: &str = "/etc/berth/config.yaml";

/// Loads the file that was named, or the default one where it exists. A file that is the kubelet's alone, as `kubeadm` and `join` write it,
/// leaves berth's own settings where they are by default.
pub fn load(named: Option<&Path>) -> Result<File> {
    load_with_default(named, Path::new(DEFAULT))
}

fn load_with_default(named: Option<&Path>, default: &Path) -> Result<File> {
    let mut file = match named {
        Some(path) => read(path)?.with_context(|| format!("reading {}: it is not there", path.display()))?,
        None => return Ok(read(default)?.unwrap_or_default()),
    };
    if !file.has_node
        && let Some(own) = read(default)?
    {
        file.node = own.node;
    }
    Ok(file)
}

/// `None`: there is no such file.
fn read(path: &Path) -> Result<Option<File>> {
    match std::fs::read_to_string(path) {
        Ok(text) => {
            let file = parse(&text, path.parent().unwrap_or(Path::new("/")));
            file.map(Some).with_context(|| format!("reading {}", path.display()))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// Loads the files of a command line: where NodeConfiguration has one of its own, KubeletConfiguration comes from `--config` alone.
pub fn load_all(global: &crate::cli::Global) -> Result<File> {
    let mut file = load(global.config.as_deref())?;
    if let Some(path) = &global.node_config {
        file.node = load(Some(path))?.node;
    }
    Ok(file)
}

/// A Go duration: `1h30m`, `10s`, `500ms`.
pub fn duration(text: &str) -> Result<Duration> {
    configuration::parse_duration(text).map_err(anyhow::Error::msg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_are_read_from_one_file() {
        let file = parse(
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nstaticPodPath: m\nclusterDNS: [10.96.0.10]\n\
             ---\napiVersion: berth/v1alpha1\nkind: NodeConfiguration\npodCIDR: 10.9.0.0/16\ndeadlines: {cniPlugin: 2m}\n---\n",
            Path::new("/etc/berth"),
        )
        .expect("valid");
        assert_eq!(file.kubelet.text("staticPodPath"), Some("/etc/berth/m"));
        assert_eq!(file.node.pod_cidr.as_deref(), Some("10.9.0.0/16"));
        assert_eq!((file.node.deadlines.cni_plugin, file.node.deadlines.storage), (Some(Duration::from_secs(120)), None));
    }

    #[test]
    fn what_is_not_read_is_refused_by_name() {
        for (text, name) in [
            ("apiVersion: berth/v1alpha1\nkind: NodeConfiguration\npodcidr: x\n", "podcidr"),
            ("apiVersion: v1\nkind: Pod\n", "v1 Pod"),
            ("apiVersion: berth/v1alpha1\nkind: NodeConfiguration\ndeadlines: {cni: 3s}\n", "cni"),
            ("apiVersion: berth/v1alpha1\nkind: NodeConfiguration\ndeadlines: {cniPlugin: 0s}\n", "a deadline of nothing"),
        ] {
            let error = format!("{:#}", parse(text, Path::new("/")).expect_err("refused"));
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn a_file_of_the_kubelets_alone_leaves_berths_own_settings_where_they_are() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| {
            std::fs::write(folder.path().join(name), text).expect("written");
            folder.path().join(name)
        };
        let node = |cidr: &str| format!("apiVersion: berth/v1alpha1\nkind: NodeConfiguration\npodCIDR: {cidr}\n");
        let default = write(
            "default.yaml",
            &format!(
                "{}---\napiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nclusterDomain: d\n",
                node("10.1.0.0/16")
            ),
        );
        let kubelets =
            write("kubelet.yaml", "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nclusterDomain: c\n");
        let both = write("both.yaml", &node("10.2.0.0/16"));
        let seen = |named: Option<&Path>, default: &Path| {
            let file = load_with_default(named, default).expect("loaded");
            (file.node.pod_cidr, file.kubelet.text("clusterDomain").map(str::to_owned))
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(seen(None, &default), (some("10.1.0.0/16"), some("d")));
        assert_eq!(seen(Some(&kubelets), &default), (some("10.1.0.0/16"), some("c")));
        assert_eq!(seen(Some(&both), &default), (some("10.2.0.0/16"), None));
        let none = folder.path().join("none.yaml");
        assert_eq!(seen(Some(&kubelets), &none), (None, some("c")));
        assert_eq!(seen(None, &none), (None, None));
        assert!(load_with_default(Some(&none), &default).is_err());
    }

    /// What serde would read: it says so to whoever asks for a field that there is not.
    fn fields<T: serde::de::DeserializeOwned>(prefix: &str) -> Vec<String> {
        let error = serde_json::from_str::<T>(r#"{"?": 0}"#).map(|_| ()).expect_err("no such field").to_string();
        let names: Vec<String> = error.split('`').skip(3).step_by(2).map(|name| format!("{prefix}{name}")).collect();
        assert!(!names.is_empty(), "{error}");
        names
    }

    #[test]
    fn the_page_has_a_row_for_each_field_and_no_other() {
        let page = include_str!("../../docs/node-configuration.md");
        let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
        let mut rows: Vec<String> = rows.map(|(name, _)| name.to_owned()).collect();
        let mut wanted = [
            fields::<NodeConfiguration>(""),
            fields::<Nri>("nri."),
            fields::<RuntimeHandler>("runtimeHandlers."),
            fields::<Deadlines>("deadlines."),
        ]
        .concat();
        rows.sort();
        wanted.sort();
        assert_eq!(rows, wanted);
    }

    #[test]
    fn durations_are_gos() {
        assert_eq!(duration("1h30m").expect("valid").as_secs(), 5400);
        assert_eq!(duration("500ms").expect("valid").as_millis(), 500);
        assert!(duration("").is_err() && duration("5").is_err() && duration("s").is_err());
    }
}
