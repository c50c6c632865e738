//! What callers see of an image: its ID, names, size and configuration.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::digest::{Digest, ParseDigestError};

/// An image's ID: the digest of its configuration, displayed as `sha256:<hex>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ImageId(Digest);

impl ImageId {
    /// The ID of the image whose configuration has this digest.
    pub fn new(config: Digest) -> Self {
        ImageId(config)
    }

    /// The configuration's digest.
    pub fn digest(&self) -> Digest {
        self.0
    }

    /// The 64 hexadecimal digits.
    pub fn hex(&self) -> String {
        self.0.hex()
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for ImageId {
    type Err = ParseDigestError;

    /// With or without `sha256:`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match Digest::from_hex(text) {
            Some(digest) => Ok(ImageId(digest)),
            None => text.parse().map(ImageId),
        }
    }
}

/// One image of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// `sha256:<digest of the configuration>`.
    pub id: ImageId,
    /// Full names with tag, sorted.
    pub repo_tags: Vec<String>,
    /// Full names with the digest of what was pulled, sorted.
    pub repo_digests: Vec<String>,
    /// Bytes of the layers as downloaded and of the configuration.
    pub size: u64,
    /// The image's `User`, without its group.
    pub user: ImageUser,
    /// Whether garbage collectors must leave it.
    pub pinned: bool,
}

/// The user part of an image's `User`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum ImageUser {
    /// The image names none: root.
    #[default]
    Unset,
    /// A number.
    Uid(i64),
    /// A name that is looked up in the image's own passwd file.
    Name(String),
}

impl ImageUser {
    /// Splits an image's `User` text: what follows a `:` is the group and is cut off.
    pub fn parse(user: &str) -> Self {
        let name = user.split(':').next().unwrap_or_default();
        if name.is_empty() {
            return ImageUser::Unset;
        }
        match name.parse() {
            Ok(uid) => ImageUser::Uid(uid),
            Err(_) => ImageUser::Name(name.to_string()),
        }
    }
}

/// What an image says about its containers.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ImageConfig {
    /// The whole `User` text, such as `1000:1000` or `www-data`.
    pub user: String,
    /// `NAME=value` texts.
    pub env: Vec<String>,
    /// The program and its fixed arguments.
    pub entrypoint: Vec<String>,
    /// Default arguments (or program, when there is no entrypoint).
    pub cmd: Vec<String>,
    /// The working folder; may be empty.
    pub working_dir: String,
    /// Such as `SIGQUIT` or `3`; may be empty.
    pub stop_signal: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Such as `80/tcp`, sorted.
    pub exposed_ports: Vec<String>,
    /// Paths that the image declares as volumes, sorted.
    pub volumes: Vec<String>,
    /// `amd64` and the like.
    pub architecture: String,
    /// `linux`.
    pub os: String,
    /// When it was built, RFC 3339, as the image says.
    pub created: Option<String>,
}

/// Where an image's file system is: the arguments of an overlay mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rootfs {
    /// The folder that the names in `lowers` are relative to.
    pub links_dir: PathBuf,
    /// Link names of at most 8 bytes, the top layer first. Never empty.
    pub lowers: Vec<String>,
    /// Permission bits of the image's `/`: the upper folder must get them, because overlayfs takes `/` from it.
    pub root_mode: u32,
    /// Owner of the image's `/`.
    pub root_uid: u32,
    /// Group of the image's `/`.
    pub root_gid: u32,
}

/// What the store takes on its file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsUsage {
    /// An existing folder on that file system: the store's root.
    pub mountpoint: PathBuf,
    /// Bytes of all layers and blobs.
    pub bytes: u64,
    /// Files and folders of all layers and blobs.
    pub inodes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_text_is_split_into_a_number_or_a_name() {
        let cases = [
            ("", ImageUser::Unset),
            (":1000", ImageUser::Unset),
            ("1002", ImageUser::Uid(1002)),
            ("1003:1004", ImageUser::Uid(1003)),
            ("0", ImageUser::Uid(0)),
            ("www-data", ImageUser::Name("www-data".into())),
            ("www-data:1004", ImageUser::Name("www-data".into())),
        ];
        for (text, expected) in cases {
            assert_eq!(ImageUser::parse(text), expected, "{text}");
        }
    }
}
