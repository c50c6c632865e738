//! Images for tests: made byte by byte, served by the fake registry or written as layouts.
#![allow(dead_code, clippy::unwrap_used)]

#[path = "../../src/unpack/testtar.rs"]
pub mod testtar;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_image::{ImageStore, Reference, StoreConfig};
use berth_testkit::image::digest;
use berth_testkit::registry::Registry;
use serde_json::{Value, json};
pub use testtar::TestTar;

pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// How a layer is sent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Pack {
    Plain,
    Gzip,
    Zstd,
}

/// A layer as stored in a registry.
#[derive(Clone)]
pub struct TestLayer {
    pub blob: Vec<u8>,
    pub diff_id: String,
    pub media_type: &'static str,
}

impl TestLayer {
    pub fn new(tar: TestTar, pack: Pack) -> Self {
        Self::of(tar.build(), pack)
    }

    pub fn of(bytes: Vec<u8>, pack: Pack) -> Self {
        let diff_id = digest(&bytes);
        let (blob, media_type) = match pack {
            Pack::Plain => (bytes, "application/vnd.oci.image.layer.v1.tar"),
            Pack::Gzip => (gzip(&bytes), "application/vnd.oci.image.layer.v1.tar+gzip"),
            Pack::Zstd => (zstd::stream::encode_all(&bytes[..], 1).unwrap(), "application/vnd.oci.image.layer.v1.tar+zstd"),
        };
        TestLayer { blob, diff_id, media_type }
    }

    pub fn digest(&self) -> String {
        digest(&self.blob)
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Bytes that do not compress.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// An image: layers and configuration.
#[derive(Clone)]
pub struct TestImage {
    pub layers: Vec<TestLayer>,
    pub config: Value,
}

impl TestImage {
    pub fn new(layers: Vec<TestLayer>) -> Self {
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let architecture = berth_image::Platform::host().architecture;
        let config = json!({
            "architecture": architecture, "os": "linux",
            "config": {"User": "1000:1", "Env": ["A=b"], "Cmd": ["sh"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        TestImage { layers, config }
    }

    /// One with a file that says `text`.
    pub fn small(text: &str) -> Self {
        TestImage::new(vec![TestLayer::new(TestTar::new().file("text", text), Pack::Gzip)])
    }

    pub fn id(&self) -> String {
        digest(&self.config_bytes())
    }

    pub fn config_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(&self.config).unwrap()
    }

    pub fn manifest_bytes(&self) -> Vec<u8> {
        let config = self.config_bytes();
        let layers: Vec<Value> = self
            .layers
            .iter()
            .map(|layer| json!({"mediaType": layer.media_type, "digest": layer.digest(), "size": layer.blob.len()}))
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(&config), "size": config.len()},
            "layers": layers,
        });
        serde_json::to_vec(&manifest).unwrap()
    }

    pub fn digest(&self) -> String {
        digest(&self.manifest_bytes())
    }

    /// Pushes to `<registry>/some/thing:<tag>` and returns that name.
    pub fn push(&self, registry: &Registry, tag: &str) -> String {
        for layer in &self.layers {
            registry.put_blob(&layer.blob);
        }
        registry.put_blob(&self.config_bytes());
        registry.put_manifest("some/thing", tag, MANIFEST, &self.manifest_bytes());
        format!("{}/some/thing:{tag}", registry.host())
    }

    /// Writes an OCI layout; `annotations` go to the index entry.
    pub fn layout(&self, dir: &Path, annotations: Value) {
        let blobs = dir.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        let put = |bytes: &[u8]| std::fs::write(blobs.join(&digest(bytes)[7..]), bytes).unwrap();
        self.layers.iter().for_each(|layer| put(&layer.blob));
        put(&self.config_bytes());
        put(&self.manifest_bytes());
        let index = json!({"schemaVersion": 2, "manifests": [{
            "mediaType": MANIFEST, "digest": self.digest(), "size": self.manifest_bytes().len(), "annotations": annotations,
        }]});
        std::fs::write(dir.join("index.json"), index.to_string()).unwrap();
        std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    }
}

/// A store in a folder of its own.
pub struct TestStore {
    pub dir: tempfile::TempDir,
    pub store: Arc<ImageStore>,
}

impl TestStore {
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut StoreConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = StoreConfig::new(dir.path().join("images"));
        config.registry.config_dirs = vec![dir.path().join("certs.d")];
        config.registry.connect_timeout = Duration::from_secs(5);
        change(&mut config);
        let store = ImageStore::open(config).await.unwrap();
        store.start_reaper();
        TestStore { dir, store }
    }

    /// A `hosts.toml`.
    pub fn hosts(&self, host: &str, text: &str) {
        let dir = self.dir.path().join("certs.d").join(host);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("hosts.toml"), text).unwrap();
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("images")
    }

    pub async fn pull(&self, name: &str) -> Result<berth_image::ImageId, berth_image::Error> {
        self.store.pull(&Reference::parse(name).unwrap(), None).await
    }

    /// The store as the next process finds it. Waits for the lock of the one before.
    pub async fn reopen(self) -> Self {
        let TestStore { dir, store } = self;
        assert_eq!(Arc::strong_count(&store), 1);
        drop(store);
        let config = StoreConfig::new(dir.path().join("images"));
        // The reaper's thread of the store before ends after what it is doing.
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        let mut store = ImageStore::open(config.clone()).await;
        while store.is_err() && std::time::Instant::now() < deadline {
            tokio::task::yield_now().await;
            store = ImageStore::open(config.clone()).await;
        }
        TestStore { dir, store: store.unwrap() }
    }

    /// Nothing is left over.
    pub async fn assert_clean(&self) {
        self.store.settled().await;
        assert_eq!(self.store.leaks(), Vec::<PathBuf>::new());
    }

    /// The file of a layer by its place from the top.
    pub fn read(&self, id: &berth_image::ImageId, layer: usize, name: &str) -> String {
        let rootfs = self.store.rootfs(id).unwrap();
        let path = rootfs.links_dir.join(&rootfs.lowers[layer]).join(name);
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }
}
