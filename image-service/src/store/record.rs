//! What is written about images and layers. Each format has a version; a golden file for each is in the tests.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::image::ImageId;
use crate::unpack::RootMeta;

/// The version that is written.
pub(crate) const VERSION: u32 = 1;

/// `records/<image id>.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ImageRecord {
    pub version: u32,
    pub id: ImageId,
    pub tags: Vec<String>,
    pub digests: Vec<String>,
    pub size: u64,
    /// The image manifest that was pulled last; imports of `docker save` archives have none.
    pub manifest: Option<Digest>,
    /// Index, manifest and configuration.
    pub blobs: Vec<Digest>,
    /// Keys, the bottom layer first.
    pub layers: Vec<String>,
    pub pinned: bool,
    /// Removed while a container used it: kept for its layers, never listed.
    pub removed: bool,
    /// Grows with every change: of two records with one name the younger has it.
    pub sequence: u64,
}

/// `layers/<key>/layer.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LayerRecord {
    pub version: u32,
    pub key: String,
    pub diff_id: Digest,
    /// The name in `l/`, at most 8 bytes.
    pub link: String,
    pub bytes: u64,
    pub inodes: u64,
    /// The layer hides everything below it.
    pub root_opaque: bool,
    /// Owner and mode of `/` when the layer gives them.
    pub root: Option<RootMeta>,
}

/// Why a record is not used.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unreadable {
    /// Of a later version than this program's: to be left alone.
    Later(String),
    /// Damaged.
    Damaged(String),
}

impl Unreadable {
    pub(crate) fn reason(&self) -> &str {
        match self {
            Unreadable::Later(reason) | Unreadable::Damaged(reason) => reason,
        }
    }
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// Reads a record file.
pub(crate) fn load<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, Unreadable> {
    let bytes = std::fs::read(path).map_err(|error| Unreadable::Damaged(error.to_string()))?;
    parse(&bytes)
}

fn parse<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<T, Unreadable> {
    let damaged = |error: serde_json::Error| Unreadable::Damaged(error.to_string());
    let versioned: Versioned = serde_json::from_slice(bytes).map_err(damaged)?;
    match versioned.version {
        VERSION => serde_json::from_slice(bytes).map_err(damaged),
        version if version > VERSION => Err(Unreadable::Later(format!("record version {version} is not known"))),
        version => Err(Unreadable::Damaged(format!("record version {version} never was"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_records_are_read_and_written_as_ever() {
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let digest: Digest = format!("sha256:{hex}").parse().unwrap();
        let image = include_str!("../../tests/golden/image-v1.json");
        let expected = ImageRecord {
            version: 1,
            id: ImageId::new(digest),
            tags: vec!["docker.io/library/busybox:latest".into()],
            digests: vec![format!("docker.io/library/busybox@sha256:{hex}")],
            size: 1234,
            manifest: Some(digest),
            blobs: vec![digest],
            layers: vec![hex.into(), format!("chain-{hex}")],
            pinned: false,
            removed: false,
            sequence: 7,
        };
        assert_eq!(parse::<ImageRecord>(image.as_bytes()).unwrap(), expected);
        assert_eq!(serde_json::to_string_pretty(&expected).unwrap(), image.trim_end());
        let layer = include_str!("../../tests/golden/layer-v1.json");
        let expected = LayerRecord {
            version: 1,
            key: hex.into(),
            diff_id: digest,
            link: "abcdefg".into(),
            bytes: 8192,
            inodes: 2,
            root_opaque: false,
            root: Some(RootMeta { mode: 0o755, uid: 0, gid: 0 }),
        };
        assert_eq!(parse::<LayerRecord>(layer.as_bytes()).unwrap(), expected);
        assert_eq!(serde_json::to_string_pretty(&expected).unwrap(), layer.trim_end());
    }

    #[test]
    fn later_versions_are_told_from_damage() {
        assert!(matches!(parse::<LayerRecord>(br#"{"version":2,"new":1}"#), Err(Unreadable::Later(_))));
        for text in ["", "{}", "{\"version\":1}", "{\"version\":0}", "\0\0\0"] {
            assert!(matches!(parse::<LayerRecord>(text.as_bytes()), Err(Unreadable::Damaged(_))), "{text}");
        }
    }
}
