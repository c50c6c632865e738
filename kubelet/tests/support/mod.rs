//! A kubelet over a fake runtime, in throw-away folders.
#![allow(dead_code, reason = "each suite uses a part")]

pub mod fake_cri;

use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_kubelet::record::Recorder;
use berth_kubelet::{Config, Kubelet, PodControl};
use fake_cri::FakeCri;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Folders that outlive a kubelet's restarts.
pub struct Node {
    pub root: tempfile::TempDir,
    pub cri: FakeCri,
    /// The running kubelet's.
    pub control: Option<PodControl>,
    recorder: Option<Recorder>,
    running: Option<(CancellationToken, JoinHandle<berth_kubelet::Result<()>>)>,
}

impl Node {
    /// A node with an empty manifests folder; nothing runs yet.
    pub fn new() -> Node {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("manifests")).unwrap();
        std::fs::write(root.path().join("resolv.conf"), "nameserver 192.0.2.53\n").unwrap();
        std::fs::write(root.path().join("hosts"), "127.0.0.1 localhost\n").unwrap();
        Node { root, cri: FakeCri::new(), control: None, recorder: None, running: None }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Writes a manifest as most tools do: beside it, then renamed.
    pub fn apply(&self, file: &str, text: &str) {
        let temporary = self.path("manifests").join(format!(".{file}"));
        std::fs::write(&temporary, text).unwrap();
        std::fs::rename(temporary, self.path("manifests").join(file)).unwrap();
    }

    pub fn delete(&self, file: &str) {
        std::fs::remove_file(self.path("manifests").join(file)).unwrap();
    }

    pub async fn config(&self) -> Config {
        let mut config = Config::new("n1", self.cri.connect().await);
        config.node_ips = vec!["192.0.2.1".parse().unwrap()];
        config.manifests = Some(self.path("manifests"));
        config.kubelet_root = self.path("kubelet");
        config.pod_logs_dir = self.path("logs");
        config.container_logs_dir = Some(self.path("links"));
        config.socket = Some(self.path("kubelet.sock"));
        config.resolv_conf = self.path("resolv.conf");
        config.resolv_conf_uplink = Some(self.path("uplink.conf"));
        config.hosts_file = self.path("hosts");
        config.kernel_log = self.path("kmsg");
        config.cgroup_root = None;
        config
    }

    pub async fn start(&mut self) {
        let config = self.config().await;
        self.start_with(config);
    }

    pub fn start_with(&mut self, config: Config) {
        let stop = CancellationToken::new();
        let kubelet = Kubelet::new(config).unwrap();
        self.control = Some(kubelet.control());
        self.recorder = Some(kubelet.recorder());
        let task = tokio::spawn(kubelet.run(stop.clone()));
        self.running = Some((stop, task));
    }

    /// Reason and message of each event so far.
    pub fn events(&self) -> Vec<String> {
        let events = self.recorder.as_ref().unwrap().list();
        events.into_iter().map(|e| format!("{}: {}", e.reason.unwrap(), e.message.unwrap())).collect()
    }

    /// Ends the kubelet; the runtime stays as it is.
    pub async fn stop(&mut self) {
        let (stop, task) = self.running.take().unwrap();
        stop.cancel();
        tokio::time::timeout(Duration::from_secs(3600), task).await.unwrap().unwrap().unwrap();
        let reasons = self.recorder.as_ref().unwrap().list().into_iter().filter_map(|event| event.reason);
        let unknown: Vec<String> = reasons.filter(|reason| !berth_kubelet::reasons::is_known(reason)).collect();
        assert!(unknown.is_empty(), "reasons that are in no table: {unknown:?}");
    }

    /// Answer of the API: status line's code and body.
    pub async fn get(&self, path: &str) -> (u16, String) {
        get(&self.path("kubelet.sock"), path).await
    }

    /// Waits until the API answers.
    pub async fn wait_socket(&self) {
        let limit = std::time::Instant::now() + Duration::from_secs(30);
        while UnixStream::connect(self.path("kubelet.sock")).await.is_err() {
            assert!(std::time::Instant::now() < limit, "the socket does not open");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The pod of a name as the API has it.
    pub async fn pod(&self, name: &str) -> Option<serde_json::Value> {
        let (code, body) = self.get("/pods").await;
        assert_eq!(code, 200);
        let list: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!((list["kind"].as_str(), list["apiVersion"].as_str()), (Some("PodList"), Some("v1")));
        list["items"].as_array().unwrap().iter().find(|p| p["metadata"]["name"] == name).cloned()
    }

    /// Waits until the API has no pod of that name.
    pub async fn wait_gone(&self, name: &str) {
        let limit = std::time::Instant::now() + Duration::from_secs(30);
        while self.pod(name).await.is_some() {
            assert!(std::time::Instant::now() < limit, "{name} does not go: {:#?}", self.cri.call_names());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until the pod's JSON satisfies `condition`.
    pub async fn wait_pod(
        &self,
        name: &str,
        what: &str,
        mut condition: impl FnMut(&serde_json::Value) -> bool,
    ) -> serde_json::Value {
        let limit = std::time::Instant::now() + Duration::from_secs(30);
        let mut last = None;
        while std::time::Instant::now() < limit {
            if UnixStream::connect(self.path("kubelet.sock")).await.is_ok() {
                last = self.pod(name).await;
                if let Some(pod) = last.as_ref().filter(|pod| condition(pod)) {
                    return pod.clone();
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("waited in vain for: {what}\n{last:#?}\n{:#?}", self.cri.call_names());
    }
}

/// Waits until `condition` holds; bounded.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let limit = std::time::Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(std::time::Instant::now() < limit, "waited in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub async fn get(socket: &Path, path: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    parse_answer(&answer)
}

/// Status code and body, joined from its chunks where it came in some.
pub fn parse_answer(answer: &[u8]) -> (u16, String) {
    let answer = String::from_utf8_lossy(answer);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    if !head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        return (code, body.to_owned());
    }
    let (mut rest, mut whole) = (body, String::new());
    while let Some((length, after)) = rest.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).unwrap();
        if length == 0 {
            break;
        }
        whole.push_str(&after[..length]);
        rest = &after[length + 2..];
    }
    (code, whole)
}

/// Believes any server: the tests look at certificates themselves.
#[derive(Debug)]
pub struct AnyCertificate(pub std::sync::Arc<rustls::crypto::CryptoProvider>);

mod any_certificate {
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};

    impl ServerCertVerifier for super::AnyCertificate {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }
}

/// A pod with one container `c`.
pub fn pod(name: &str, extra: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  terminationGracePeriodSeconds: 3\n  containers:\n  - {{name: c, image: 'img:1'}}\n{extra}"
    )
}
