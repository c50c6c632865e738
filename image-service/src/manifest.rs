//! Indexes, manifests and image configurations, of OCI and of Docker.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

use crate::config::Platform;
use crate::digest::Digest;
use crate::error::Error;
use crate::image::ImageConfig;

/// What is accepted from a registry.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1";

/// Manifests, indexes and configurations larger than this are refused.
pub(crate) const MAX_DOCUMENT: u64 = 8 << 20;

/// Points to content.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: String,
    pub size: u64,
    #[serde(default, deserialize_with = "nullable")]
    pub annotations: BTreeMap<String, String>,
    pub platform: Option<DescriptorPlatform>,
}

impl Descriptor {
    /// The digest; anything but SHA-256 is refused by name.
    pub(crate) fn digest(&self) -> Result<Digest, Error> {
        self.digest.parse().map_err(|source| Error::Digest { subject: format!("descriptor of {}", self.media_type), source })
    }
}

/// The platform in an index entry.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct DescriptorPlatform {
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub variant: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    schema_version: Option<u32>,
    #[serde(default)]
    media_type: String,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

/// An image manifest.
#[derive(Clone, Debug)]
pub(crate) struct Manifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

/// What a manifest request brings.
#[derive(Clone, Debug)]
pub(crate) enum Parsed {
    Index(Vec<Descriptor>),
    Manifest(Manifest),
}

/// Reads an index or a manifest; the content decides, as media types in headers are often wrong.
pub(crate) fn parse(subject: &str, bytes: &[u8]) -> Result<Parsed, Error> {
    let document: Document =
        serde_json::from_slice(bytes).map_err(|source| Error::Json { subject: subject.to_string(), source })?;
    let unsupported = |reason: String| Error::Unsupported { subject: subject.to_string(), reason };
    if document.schema_version != Some(2) {
        return Err(unsupported("manifest schema 1 is not supported: the image must be pushed again".into()));
    }
    match (document.manifests, document.config, document.layers) {
        (Some(manifests), None, None) => Ok(Parsed::Index(manifests)),
        (None, Some(config), Some(layers)) => {
            check_image(&config, &layers).map_err(unsupported)?;
            Ok(Parsed::Manifest(Manifest { config, layers }))
        }
        _ => Err(unsupported(format!("{:?} is neither an image index nor an image manifest", document.media_type))),
    }
}

fn check_image(config: &Descriptor, layers: &[Descriptor]) -> Result<(), String> {
    match config.media_type.as_str() {
        "application/vnd.oci.image.config.v1+json" | "application/vnd.docker.container.image.v1+json" | "" => {}
        // Some old builders.
        "application/octet-stream" => {}
        other => return Err(format!("not a container image: its configuration is {other:?}")),
    }
    for layer in layers {
        let kind = layer.media_type.as_str();
        let known = kind.starts_with("application/vnd.oci.image.layer.") && !kind.contains("encrypted")
            || matches!(
                kind,
                "application/vnd.docker.image.rootfs.diff.tar"
                    | "application/vnd.docker.image.rootfs.diff.tar.gzip"
                    | "application/vnd.docker.image.rootfs.diff.tar.zstd"
                    | "application/vnd.docker.image.rootfs.foreign.diff.tar"
                    | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
                    | ""
            );
        if !known {
            return Err(format!("layers of the type {kind:?} are not supported"));
        }
    }
    Ok(())
}

/// The best entry of an index for a platform.
pub(crate) fn choose<'a>(subject: &str, manifests: &'a [Descriptor], wanted: &Platform) -> Result<&'a Descriptor, Error> {
    manifests
        .iter()
        .enumerate()
        .filter_map(|(at, descriptor)| Some((rank(descriptor, wanted)?, at, descriptor)))
        .min_by_key(|(rank, at, _)| (*rank, *at))
        .map(|(_, _, descriptor)| descriptor)
        .ok_or_else(|| no_match(subject, wanted))
}

fn no_match(subject: &str, wanted: &Platform) -> Error {
    Error::Unsupported {
        subject: subject.to_string(),
        reason: format!("no match for platform {}/{}", wanted.os, wanted.architecture),
    }
}

/// Smaller is better; `None` is unusable.
fn rank(descriptor: &Descriptor, wanted: &Platform) -> Option<u32> {
    let Some(platform) = &descriptor.platform else {
        // An index entry without a platform: only when nothing says more.
        return Some(1000);
    };
    if platform.os != wanted.os || architecture(&platform.architecture) != wanted.architecture {
        return None;
    }
    let level = |text: &str| text.trim_start_matches('v').parse::<u32>().ok();
    let (has, wants) = (platform.variant.as_str(), wanted.variant.as_str());
    match (has, wants) {
        (has, wants) if has == wants => Some(0),
        ("", _) => Some(1),
        // The plain architecture is amd64 v1 and arm64 v8; what is above may not run here.
        ("v1", "") if wanted.architecture == "amd64" => Some(1),
        ("v8", "") if wanted.architecture == "arm64" => Some(1),
        (has, wants) => match (level(has), level(wants)) {
            (Some(has), Some(wants)) if has < wants => Some(1 + wants - has),
            _ => None,
        },
    }
}

fn architecture(text: &str) -> &str {
    match text {
        "x86_64" | "x86-64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[derive(Deserialize)]
struct ConfigDocument {
    #[serde(default, deserialize_with = "nullable")]
    architecture: String,
    #[serde(default, deserialize_with = "nullable")]
    os: String,
    created: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    config: RunConfig,
    rootfs: RootfsDocument,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RunConfig {
    #[serde(deserialize_with = "nullable")]
    user: String,
    #[serde(deserialize_with = "nullable")]
    env: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    entrypoint: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    cmd: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    working_dir: String,
    #[serde(deserialize_with = "nullable")]
    stop_signal: String,
    #[serde(deserialize_with = "nullable")]
    labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "nullable")]
    exposed_ports: BTreeMap<String, serde::de::IgnoredAny>,
    #[serde(deserialize_with = "nullable")]
    volumes: BTreeMap<String, serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct RootfsDocument {
    #[serde(default, deserialize_with = "nullable")]
    diff_ids: Vec<Digest>,
}

/// Go writes `null` for empty lists and maps.
fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Reads an image configuration: what containers need of it, and the layers' diff-ids, the bottom one first.
pub(crate) fn parse_config(subject: &str, bytes: &[u8]) -> Result<(ImageConfig, Vec<Digest>), Error> {
    let document: ConfigDocument =
        serde_json::from_slice(bytes).map_err(|source| Error::Json { subject: subject.to_string(), source })?;
    let run = document.config;
    let config = ImageConfig {
        user: run.user,
        env: run.env,
        entrypoint: run.entrypoint,
        cmd: run.cmd,
        working_dir: run.working_dir,
        stop_signal: run.stop_signal,
        labels: run.labels,
        exposed_ports: run.exposed_ports.into_keys().collect(),
        volumes: run.volumes.into_keys().collect(),
        architecture: document.architecture,
        os: document.os,
        created: document.created,
    };
    Ok((config, document.rootfs.diff_ids))
}

/// Refuses an image that says it is for another platform or has other layers than its manifest.
pub(crate) fn check_config(
    subject: &str,
    config: &ImageConfig,
    diff_ids: &[Digest],
    layers: usize,
    wanted: &Platform,
) -> Result<(), Error> {
    if layers == 0 {
        return Err(Error::Unsupported {
            subject: subject.to_string(),
            reason: "the image has no layers, so its containers would have no root file system".to_string(),
        });
    }
    if diff_ids.len() != layers {
        return Err(Error::Unsupported {
            subject: subject.to_string(),
            reason: format!("the configuration names {} layers, the manifest {layers}", diff_ids.len()),
        });
    }
    let same_os = config.os.is_empty() || config.os == wanted.os;
    let same = config.architecture.is_empty() || architecture(&config.architecture) == wanted.architecture;
    if !same_os || !same {
        return Err(no_match(subject, wanted));
    }
    Ok(())
}

/// Chain-ids from diff-ids, the bottom layer first.
pub(crate) fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chain: Vec<Digest> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        chain.push(match chain.last() {
            None => *diff_id,
            Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()),
        });
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(entries: &[(&str, &str, &str)]) -> Vec<Descriptor> {
        entries
            .iter()
            .enumerate()
            .map(|(at, (os, architecture, variant))| Descriptor {
                media_type: String::new(),
                digest: at.to_string(),
                size: 1,
                annotations: BTreeMap::new(),
                platform: Some(DescriptorPlatform {
                    architecture: architecture.to_string(),
                    os: os.to_string(),
                    variant: variant.to_string(),
                }),
            })
            .collect()
    }

    fn platform(architecture: &str, variant: &str) -> Platform {
        Platform { os: "linux".into(), architecture: architecture.into(), variant: variant.into() }
    }

    #[test]
    fn an_image_without_layers_is_refused_by_name() {
        let check = |layers: &[Digest]| {
            check_config("r/i:1", &ImageConfig::default(), layers, layers.len(), &platform("amd64", ""))
                .map_err(|e| e.to_string())
        };
        let error = check(&[]).unwrap_err();
        assert!(error.contains("r/i:1") && error.contains("no layers"), "{error}");
        assert_eq!(check(&[Digest::of(b"layer")]), Ok(()));
    }

    #[test]
    fn the_nearest_platform_is_chosen() {
        let all = index(&[
            ("windows", "amd64", ""),
            ("linux", "arm", "v7"),
            ("linux", "amd64", "v3"),
            ("linux", "amd64", ""),
            ("linux", "arm", "v6"),
            ("linux", "arm64", "v8"),
            ("unknown", "unknown", ""),
        ]);
        let cases = [
            (platform("amd64", ""), Some("3")),
            (platform("arm64", "v8"), Some("5")),
            (platform("arm", "v7"), Some("1")),
            (platform("arm", "v6"), Some("4")),
            (platform("arm", "v5"), None),
            (platform("riscv64", ""), None),
        ];
        for (wanted, expected) in cases {
            let found = choose("x", &all, &wanted).ok().map(|descriptor| descriptor.digest.as_str());
            assert_eq!(found, expected, "{wanted:?}");
        }
        let newer = index(&[("linux", "amd64", "v2"), ("linux", "arm64", "")]);
        assert!(choose("x", &newer, &platform("amd64", "")).is_err());
        assert_eq!(choose("x", &newer, &platform("arm64", "v8")).unwrap().digest, "1");
    }

    #[test]
    fn what_is_no_image_is_refused_by_name() {
        let layer = r#"{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"sha256:x","size":1}"#;
        let config = r#"{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:x","size":1}"#;
        let manifest = |config: &str, layer: &str| format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{layer}]}}"#);
        assert!(matches!(parse("x", manifest(config, layer).as_bytes()), Ok(Parsed::Manifest(_))));
        assert!(matches!(parse("x", br#"{"schemaVersion":2,"manifests":[]}"#), Ok(Parsed::Index(_))));
        let helm = config.replace("vnd.oci.image.config.v1", "vnd.cncf.helm.config.v1");
        let encrypted = layer.replace("tar+gzip", "tar+gzip+encrypted");
        for (text, word) in [
            (manifest(&helm, layer), "helm"),
            (manifest(config, &encrypted), "encrypted"),
            (r#"{"schemaVersion":1,"fsLayers":[]}"#.to_string(), "schema 1"),
            (r#"{"schemaVersion":2}"#.to_string(), "neither"),
        ] {
            let error = parse("x", text.as_bytes()).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn configurations_are_read_with_nulls_and_without() {
        let full =
            br#"{"architecture":"amd64","os":"linux","created":"2024-01-01T00:00:00Z","config":{"User":"1000:1","Env":["A=b"],
            "Entrypoint":["/e"],"Cmd":["c"],"WorkingDir":"/w","StopSignal":"SIGQUIT","Labels":{"k":"v"},
            "ExposedPorts":{"80/tcp":{},"443/tcp":{}},"Volumes":{"/data":{}}},"rootfs":{"type":"layers","diff_ids":[]}}"#;
        let (config, _) = parse_config("x", full).unwrap();
        assert_eq!(
            (config.user.as_str(), config.exposed_ports.len(), config.volumes.as_slice()),
            ("1000:1", 2, &["/data".to_string()][..])
        );
        let nulls =
            br#"{"config":{"User":null,"Env":null,"Entrypoint":null,"Cmd":null,"Labels":null},"rootfs":{"diff_ids":null}}"#;
        assert_eq!(parse_config("x", nulls).unwrap().0, ImageConfig::default());
        let none = br#"{"config":null,"rootfs":{"type":"layers"}}"#;
        assert_eq!(parse_config("x", none).unwrap().0, ImageConfig::default());
        assert!(parse_config("x", b"{}").is_err());
    }

    #[test]
    fn chain_ids_are_those_of_the_specification() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let chain = chain_ids(&[a, b]);
        assert_eq!(chain[0], a);
        assert_eq!(chain[1], Digest::of(format!("{a} {b}").as_bytes()));
    }
}
