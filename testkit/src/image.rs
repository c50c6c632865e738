//! Container images made of files: layers, configurations and OCI layouts, the same bytes for the same input.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const MEDIA: &str = "application/vnd.oci.image.";
const EPOCH: u64 = 1_700_000_000;

/// The PATH that images of ours carry.
pub const PATH_ENV: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// One layer: a tar in the making. Entries appear in the order of the calls; the paths are relative to the root.
pub struct Layer {
    tar: tar::Builder<Vec<u8>>,
}

impl Default for Layer {
    fn default() -> Self {
        Self::new()
    }
}

impl Layer {
    /// An empty layer.
    #[must_use]
    pub fn new() -> Self {
        Self { tar: tar::Builder::new(Vec::new()) }
    }

    /// A folder owned by root.
    #[must_use]
    pub fn dir(self, path: &str, mode: u32) -> Self {
        self.entry(path, tar::EntryType::Directory, mode, &[], None)
    }

    /// A file owned by root.
    #[must_use]
    pub fn file(self, path: &str, mode: u32, data: impl AsRef<[u8]>) -> Self {
        self.entry(path, tar::EntryType::Regular, mode, data.as_ref(), None)
    }

    /// A file with the contents of one of this machine's.
    ///
    /// # Panics
    /// When the file cannot be read.
    #[must_use]
    pub fn copy(self, path: &str, mode: u32, from: &Path) -> Self {
        let data = fs::read(from).unwrap_or_else(|e| panic!("read {}: {e}", from.display()));
        self.file(path, mode, data)
    }

    /// A symbolic link.
    #[must_use]
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(path, tar::EntryType::Symlink, 0o777, &[], Some(target))
    }

    /// A hard link to an entry, here or in a layer below.
    #[must_use]
    pub fn hardlink(self, path: &str, target: &str) -> Self {
        self.entry(path, tar::EntryType::Link, 0o755, &[], Some(target))
    }

    /// Any other entry, or one with an owner: the caller fills the header, the checksum is set here.
    ///
    /// # Panics
    /// When the entry does not fit in a tar.
    #[must_use]
    pub fn raw(mut self, mut header: tar::Header, path: &str, data: &[u8]) -> Self {
        header.set_size(data.len() as u64);
        self.tar.append_data(&mut header, path, data).unwrap_or_else(|e| panic!("{path}: {e}"));
        self
    }

    fn entry(mut self, path: &str, kind: tar::EntryType, mode: u32, data: &[u8], link: Option<&str>) -> Self {
        let path = path.trim_start_matches('/');
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(EPOCH);
        header.set_size(data.len() as u64);
        let done = match link {
            Some(target) => self.tar.append_link(&mut header, path, target),
            None => self.tar.append_data(&mut header, path, data),
        };
        done.unwrap_or_else(|e| panic!("{path}: {e}"));
        self
    }

    /// The finished tar.
    ///
    /// # Panics
    /// Never: memory takes every write.
    #[must_use]
    pub fn into_tar(self) -> Vec<u8> {
        self.tar.into_inner().expect("finish a tar in memory")
    }
}

/// `sha256:<hex>` of these bytes.
#[must_use]
pub fn digest(data: &[u8]) -> String {
    use std::fmt::Write as _;
    Sha256::digest(data).iter().fold("sha256:".to_owned(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// An OCI layout folder in the making: images by reference name.
pub struct Layout {
    dir: PathBuf,
    manifests: Vec<Value>,
}

impl Layout {
    /// Starts a layout in this folder.
    ///
    /// # Panics
    /// When the folder cannot be written.
    #[must_use]
    pub fn create(dir: &Path) -> Self {
        fs::create_dir_all(dir.join("blobs/sha256")).expect("make the layout's folder");
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("write oci-layout");
        Self { dir: dir.to_path_buf(), manifests: Vec::new() }
    }

    /// Adds an image of these uncompressed layers (stored as gzip) under a name; `config` is the part of the image configuration
    /// that says what to run. Returns the manifest's digest.
    ///
    /// # Panics
    /// When the folder cannot be written.
    pub fn image(&mut self, name: &str, layers: &[Vec<u8>], config: &Value) -> String {
        let diff_ids: Vec<_> = layers.iter().map(|tar| digest(tar)).collect();
        let stored: Vec<_> = layers.iter().map(|tar| self.blob(&format!("{MEDIA}layer.v1.tar+gzip"), &gzip(tar))).collect();
        let arch = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let image_config = json!({
            "architecture": arch, "os": "linux", "created": "2024-01-01T00:00:00Z", "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": diff_ids.iter().map(|_| json!({"created": "2024-01-01T00:00:00Z"})).collect::<Vec<_>>(),
        });
        let config = self.blob(&format!("{MEDIA}config.v1+json"), image_config.to_string().as_bytes());
        let media = format!("{MEDIA}manifest.v1+json");
        let manifest = json!({"schemaVersion": 2, "mediaType": media, "config": config, "layers": stored});
        let mut entry = self.blob(&media, manifest.to_string().as_bytes());
        let digest = entry["digest"].as_str().unwrap_or_default().to_owned();
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": name, "io.containerd.image.name": name});
        entry["platform"] = json!({"architecture": arch, "os": "linux"});
        self.manifests.push(entry);
        self.write_index();
        digest
    }

    /// The whole layout as one tar, as `skopeo copy … oci-archive:` writes it.
    ///
    /// # Panics
    /// When a file cannot be read or written.
    pub fn archive(&self, to: &Path) {
        let mut tar = tar::Builder::new(fs::File::create(to).expect("make the archive"));
        tar.append_dir_all(".", &self.dir).expect("put the layout into the archive");
        tar.into_inner().and_then(|mut file| file.flush()).expect("finish the archive");
    }

    fn blob(&self, media: &str, data: &[u8]) -> Value {
        let digest = digest(data);
        let hex = digest.trim_start_matches("sha256:");
        fs::write(self.dir.join("blobs/sha256").join(hex), data).expect("write a blob");
        json!({"mediaType": media, "digest": digest, "size": data.len()})
    }

    fn write_index(&self) {
        let index = json!({"schemaVersion": 2, "mediaType": format!("{MEDIA}index.v1+json"), "manifests": self.manifests});
        fs::write(self.dir.join("index.json"), index.to_string()).expect("write index.json");
    }
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut writer = GzBuilder::new().mtime(0).write(Vec::new(), Compression::new(6));
    writer.write_all(data).and_then(|()| writer.finish()).expect("compress in memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_files_make_the_same_image() {
        let make = || {
            let state = crate::TempState::new();
            let layer = Layer::new().dir("etc", 0o755).file("etc/motd", 0o644, "hello").symlink("m", "etc/motd").into_tar();
            Layout::create(state.path()).image("example.test/a:1", &[layer], &json!({"Cmd": ["sh"]}))
        };
        assert_eq!(make(), make());
    }

    #[test]
    fn a_digest_is_sha256_of_the_bytes() {
        assert_eq!(digest(b""), "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }
}
