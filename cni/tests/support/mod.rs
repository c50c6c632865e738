//! What the kernel tests share: namespaces with servers in them, foreign tools, and a network on throw-away folders.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use berth_cni::{Attachment, Netns, Network, NetworkConfig, PodNetwork, PortMapping, Protocol};
use serde_json::Value;

pub const INSTANCE: &str = "abc123";
pub const BRIDGE: &str = "berth-abc123";
pub const TABLE: &str = "berth-abc123";
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A network namespace with a name, as `ip netns` makes them.
pub struct Namespace {
    pub name: String,
    pub path: PathBuf,
}

impl Namespace {
    pub fn new(name: &str) -> Self {
        run("ip", &["netns", "add", name]);
        Self { name: name.to_owned(), path: Path::new("/run/netns").join(name) }
    }

    pub fn fd(&self) -> OwnedFd {
        std::fs::File::open(&self.path).unwrap().into()
    }

    pub fn netns(&self) -> Netns {
        Netns { fd: self.fd(), path: Some(self.path.clone()) }
    }

    pub fn delete(&self) {
        run("ip", &["netns", "del", &self.name]);
    }

    pub fn inside<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        berth_linux::ns::with_netns(self.fd().as_fd(), f).unwrap()
    }

    /// Serves its name over TCP, one line a connection, for as long as the test runs.
    pub fn serve(&self, port: u16) {
        let listener = self.inside(|| TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port))).unwrap());
        serve(listener, self.name.clone());
    }

    /// Answers UDP datagrams with its name.
    pub fn serve_udp(&self, port: u16) {
        let socket = self.inside(|| UdpSocket::bind(("0.0.0.0", port)).unwrap());
        let name = self.name.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(name.as_bytes(), from);
            }
        });
    }

    /// What the server at the address says, asked from inside.
    pub fn ask(&self, to: &str) -> Result<String, String> {
        self.inside(|| ask(to))
    }
}

pub fn serve(listener: TcpListener, name: String) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let peer = stream.peer_addr().map(|a| a.ip().to_canonical().to_string()).unwrap_or_default();
            let _ = stream.write_all(format!("{name} {peer}").as_bytes());
        }
    });
}

/// What the server at the address says: its name and how it sees the client.
pub fn ask(to: &str) -> Result<String, String> {
    let to: SocketAddr = to.parse().unwrap();
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2)).map_err(|e| format!("connect {to}: {e}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(|e| e.to_string())?;
    Ok(text)
}

/// The first word of [`ask`]'s answer.
pub fn who(answer: Result<String, String>) -> String {
    answer.map(|text| text.split(' ').next().unwrap_or_default().to_owned()).unwrap_or_else(|error| format!("ERROR {error}"))
}

/// Runs a foreign tool; its output.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub fn json(program: &str, args: &[&str]) -> Value {
    let text = run(program, args);
    if text.trim().is_empty() { Value::Array(Vec::new()) } else { serde_json::from_str(&text).unwrap() }
}

/// Names of the links here that begin so.
pub fn links(prefix: &str) -> Vec<String> {
    let all = json("ip", &["-j", "link"]);
    let names = all.as_array().unwrap().iter().filter_map(|link| link["ifname"].as_str());
    names.filter(|name| name.starts_with(prefix)).map(str::to_owned).collect()
}

/// The elements of a map of the instance's table, as nft prints them.
pub fn elements(map: &str) -> Vec<Value> {
    let listed = json("nft", &["-j", "list", "map", "inet", TABLE, map]);
    let map = listed["nftables"].as_array().unwrap().iter().find_map(|object| object.get("map")).cloned().unwrap();
    map["elem"].as_array().cloned().unwrap_or_default()
}

pub fn config(dir: &Path) -> NetworkConfig {
    NetworkConfig {
        conf_dir: dir.join("net.d"),
        bin_dirs: vec![PathBuf::from("/usr/lib/cni")],
        instance: INSTANCE.to_owned(),
        state_dir: dir.join("state"),
        cache_dir: dir.join("cache"),
        pod_cidrs: vec!["10.88.0.0/16".parse().unwrap(), "fd88::/64".parse().unwrap()],
        built_in: true,
        prefer_external: false,
        plugin_timeout: Duration::from_secs(20),
    }
}

pub fn pod(id: &str) -> PodNetwork {
    PodNetwork {
        sandbox_id: id.to_owned(),
        namespace: "default".to_owned(),
        name: format!("pod-{id}"),
        uid: format!("uid-{id}"),
        ..PodNetwork::default()
    }
}

pub fn with_port(
    mut pod: PodNetwork,
    host_ip: Option<&str>,
    host_port: u16,
    container_port: u16,
    protocol: Protocol,
) -> PodNetwork {
    let host_ip: Option<IpAddr> = host_ip.map(|ip| ip.parse().unwrap());
    pod.port_mappings.push(PortMapping { host_port, container_port, protocol, host_ip });
    pod
}

/// A pod with its namespace on the network.
pub async fn attach(network: &Network, pod: &PodNetwork) -> (Namespace, Attachment) {
    let namespace = Namespace::new(&pod.sandbox_id);
    let attachment = network.attach(pod, namespace.netns()).await.unwrap_or_else(|e| panic!("{}", e.chain_text()));
    (namespace, attachment)
}

pub fn live(ids: &[&str]) -> BTreeSet<String> {
    ids.iter().map(|id| (*id).to_owned()).collect()
}

/// Runs asynchronous work inside the test's own process.
pub fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(future)
}
