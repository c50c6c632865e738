//! What would keep this machine from joining a cluster: a line for each thing that was looked at, with what to do about it. Looks
//! only. Names are kubeadm's where it has one.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use berth_cluster::discovery::{self, Cluster, Discovered, Trust};
use berth_cluster::join::{self, Places};
use berth_cluster::{Error, Pin};

use super::join::Request;
use crate::cluster::USER_AGENT;
use crate::{cli, config, table, wire};

/// What only the cluster can tell.
const OF_THE_CLUSTER: [&str; 8] = ["reach", "token", "pin", "clock", "server", "KubeletVersion", "cidr", "name"];
/// Beyond this certificates that were made just now are not valid yet.
const CLOCK: i64 = 60;

/// How a thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Ok,
    Warn,
    Fail,
    /// Something else that failed was in the way.
    Unseen,
}

/// One line.
#[derive(Debug)]
pub struct Line {
    pub verdict: Verdict,
    pub name: String,
    pub seen: String,
    pub remedy: String,
}

fn line(verdict: Verdict, name: &str, seen: impl Into<String>, remedy: &str) -> Line {
    let remedy = if verdict == Verdict::Ok { "" } else { remedy };
    Line { verdict, name: name.to_owned(), seen: seen.into(), remedy: remedy.to_owned() }
}

fn judged(good: bool, name: &str, seen: impl Into<String>, remedy: &str) -> Line {
    line(if good { Verdict::Ok } else { Verdict::Fail }, name, seen, remedy)
}

/// What of the machine counts.
#[derive(Debug)]
pub struct Machine {
    ports: Vec<u16>,
    addresses: Vec<IpAddr>,
    places: Places,
}

impl Machine {
    /// With this command line.
    pub fn of(node: &cli::Node, file: &config::File, places: &Places) -> Machine {
        let healthz = node.kubelet.healthz_port.unwrap_or(10248);
        let given = node.kubelet.upstream.0.iter().find(|(name, _)| name == "port");
        let port = given.and_then(|(_, text)| text.parse().ok()).unwrap_or(10250);
        let ports = [port, healthz].into_iter().filter(|port| *port != 0).collect();
        Machine { ports, addresses: wire::named_or_default_addresses(&node.kubelet, file), places: places.clone() }
    }

    /// Everything that needs no network.
    pub fn look(&self, found: Option<&Discovered>) -> Vec<Line> {
        let root = rustix::process::geteuid().is_root();
        let mut lines = vec![judged(root, "IsPrivilegedUser", if root { "root" } else { "not root" }, "run it as root")];
        for (name, path) in join::in_the_way(&self.places, found) {
            let remedy = "this machine has joined already: `berth reset` takes that back; --ignore-preflight-errors with this name joins over it";
            lines.push(line(Verdict::Fail, &name, format!("{} exists", path.display()), remedy));
        }
        for port in &self.ports {
            // Loopback's is taken too when any address's is.
            let bound = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, *port)));
            let seen = bound.as_ref().map_or_else(ToString::to_string, |_| "free".to_owned());
            lines.push(judged(bound.is_ok(), &format!("Port-{port}"), seen, "end what listens there, perhaps another kubelet"));
        }
        let failures = super::doctor::failures();
        if !failures.iter().any(|(name, ..)| *name == "cgroups") {
            lines.push(line(Verdict::Ok, "cgroups", super::doctor::cgroup_version(), ""));
        }
        lines.extend(failures.into_iter().map(|(name, seen, means)| line(Verdict::Fail, name, seen, means)));
        lines
    }
}

/// Whether an address is in a range, `10.0.0.0/8`; what is no range has nothing in it.
fn is_in(range: &str, address: IpAddr) -> bool {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(v4) => (u128::from(v4.to_bits()), 32),
        IpAddr::V6(v6) => (v6.to_bits(), 128),
    };
    let Some((network, prefix)) = range.trim().split_once('/') else { return false };
    let (Ok(network), Ok(prefix)) = (network.parse::<IpAddr>(), prefix.parse::<u32>()) else { return false };
    if network.is_ipv4() != address.is_ipv4() {
        return false;
    }
    let ((network, width), (address, _)) = (bits(network), bits(address));
    let shift = width - prefix.min(width);
    shift >= 128 || network >> shift == address >> shift
}

fn ranges(addresses: &[IpAddr], cluster: &Cluster) -> Line {
    for (what, list) in [("pods", &cluster.pod_subnet), ("services", &cluster.service_subnet)] {
        for range in list.split(',') {
            if let Some(address) = addresses.iter().find(|address| is_in(range, **address)) {
                let seen = format!("this node's address {address} is in the cluster's range for {what}, {range}");
                return line(Verdict::Fail, "cidr", seen, "give the node another address (--node-ip)");
            }
        }
    }
    let seen = format!("pods {}, services {}", cluster.pod_subnet, cluster.service_subnet);
    line(Verdict::Ok, "cidr", seen, "")
}

/// `v1.36.3` → (1, 36).
fn minor(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.trim_start_matches('v').split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// A node may be up to three minors older than its API server, and not newer.
fn skew(cluster: &str) -> Line {
    let ours = berth_kubelet::api::KUBERNETES_VERSION;
    let seen = format!("node {ours}, cluster {cluster}");
    match (minor(ours), minor(cluster)) {
        (Some(node), Some(server)) if node > server => {
            line(Verdict::Warn, "KubeletVersion", seen, "the node is newer than the cluster: upgrade the control plane first")
        }
        (Some(node), Some(server)) if node.0 != server.0 || node.1 + 3 < server.1 => {
            line(Verdict::Warn, "KubeletVersion", seen, "more than three minor versions apart: use a newer berth")
        }
        _ => line(Verdict::Ok, "KubeletVersion", seen, ""),
    }
}

fn clock(theirs: i64, ours: i64) -> Line {
    let apart = ours - theirs;
    let seen = match apart {
        0 => "same as the cluster's".to_owned(),
        1.. => format!("{apart} s ahead of the cluster's"),
        _ => format!("{} s behind the cluster's", -apart),
    };
    judged(apart.abs() <= CLOCK, "clock", seen, "set the clock (NTP): certificates are not valid at another time")
}

fn problem(error: &Error) -> String {
    format!("{:#}", anyhow::Error::msg(berth_cluster::explain(error)))
}

async fn cluster(request: &Request, machine: &Machine, lines: &mut Vec<Line>) {
    let server = request.server.clone().unwrap_or_else(|| "the discovery file".to_owned());
    let found = match request.discover(&Trust::default(), Duration::ZERO).await {
        Ok(found) => {
            lines.push(line(Verdict::Ok, "reach", server, ""));
            lines.push(line(Verdict::Ok, "token", format!("{} is good", request.token.id()), ""));
            found
        }
        Err(Error::Discovery { problem, .. }) => {
            lines.push(line(Verdict::Ok, "reach", server, ""));
            let remedy = "make a new one: kubeadm token create --print-join-command";
            return lines.push(line(Verdict::Fail, "token", problem, remedy));
        }
        Err(error) => {
            let remedy = "is this the API server's address, does a firewall stand in between, may anybody read cluster-info?";
            return lines.push(line(Verdict::Fail, "reach", problem(&error), remedy));
        }
    };
    if !request.trust.pins.is_empty() && request.server.is_some() {
        let pins: Vec<String> = request.trust.pins.iter().map(Pin::to_string).collect();
        if let Err(error) = request.discover(&request.trust, Duration::ZERO).await {
            // Whoever that is does not get the token.
            let remedy = "compare with: kubeadm token create --print-join-command";
            return lines.push(line(Verdict::Fail, "pin", problem(&error), remedy));
        }
        lines.push(line(Verdict::Ok, "pin", pins.join(", "), ""));
    }
    if let Ok(theirs) = discovery::clock(&found.server, USER_AGENT).await {
        let ours = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        lines.push(clock(theirs, i64::try_from(ours.as_secs()).unwrap_or(i64::MAX)));
    }
    match discovery::configuration(&found, &request.token, USER_AGENT).await {
        Ok(cluster) => {
            lines.push(line(Verdict::Ok, "server", found.server.clone(), ""));
            lines.push(skew(&cluster.version));
            lines.push(ranges(&machine.addresses, &cluster));
        }
        Err(error) => {
            let remedy = "nodes use the address that the cluster names, not the one you gave: it has to resolve and answer here";
            lines.push(line(Verdict::Fail, "server", problem(&error), remedy));
            return;
        }
    }
    lines.push(match discovery::is_ready(&found, &request.token, &request.node, USER_AGENT).await {
        Ok(false) => line(Verdict::Ok, "name", request.node.clone(), ""),
        Ok(true) => {
            let remedy = "choose another name (--node-name), or end that node first";
            line(Verdict::Fail, "name", format!("there is a Ready node {} already", request.node), remedy)
        }
        Err(error) => line(Verdict::Fail, "name", problem(&error), "may the token's group read nodes?"),
    });
}

/// Prints the lines; fails when one of them does. `fits`: whether a node could start with the flags.
pub async fn run(request: &Request, machine: &Machine, fits: Result<()>) -> Result<ExitCode> {
    let mut lines = machine.look(None);
    if let Err(error) = fits {
        lines.push(line(Verdict::Fail, "flags", format!("{error:#}"), "the node could not start with these"));
    }
    cluster(request, machine, &mut lines).await;
    for name in OF_THE_CLUSTER {
        let pin_given = !request.trust.pins.is_empty() && request.server.is_some();
        if !lines.iter().any(|line| line.name == name) && (name != "pin" || pin_given) {
            lines.push(line(Verdict::Unseen, name, "not looked at", ""));
        }
    }
    let word = |verdict| match verdict {
        Verdict::Ok => "ok",
        Verdict::Warn => "warn",
        Verdict::Fail => "fail",
        Verdict::Unseen => "-",
    };
    let rows: Vec<Vec<String>> =
        lines.iter().map(|l| vec![word(l.verdict).to_owned(), l.name.clone(), l.seen.clone(), l.remedy.clone()]).collect();
    crate::out(table::render(&["", "WHAT", "SEEN", "WHAT TO DO"], &rows).trim_end());
    let failed = lines.iter().any(|line| line.verdict == Verdict::Fail);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_the_clusters_own_ranges_does_not_do() {
        let cluster = |pods: &str| Cluster {
            kubelet: String::new(),
            name: String::new(),
            version: String::new(),
            pod_subnet: pods.to_owned(),
            service_subnet: "10.96.0.0/12".to_owned(),
        };
        let verdict = |address: &str, pods: &str| ranges(&[address.parse().expect("an address")], &cluster(pods)).verdict;
        assert_eq!(verdict("192.168.1.5", "10.244.0.0/16"), Verdict::Ok);
        assert_eq!(verdict("10.244.3.5", "10.244.0.0/16,fd00::/48"), Verdict::Fail);
        assert_eq!(verdict("fd00::5", "10.244.0.0/16,fd00::/48"), Verdict::Fail);
        assert_eq!(verdict("10.97.0.1", "10.244.0.0/16"), Verdict::Fail);
        assert_eq!(verdict("1.2.3.4", "0.0.0.0/0"), Verdict::Fail);
        assert_eq!(verdict("1.2.3.4", ""), Verdict::Ok);
    }

    #[test]
    fn a_node_is_no_newer_than_its_cluster_and_not_much_older() {
        let (_, ours) = minor(berth_kubelet::api::KUBERNETES_VERSION).expect("a version");
        let verdict = |minor: u32| skew(&format!("v1.{minor}.0")).verdict;
        assert_eq!(verdict(ours), Verdict::Ok);
        assert_eq!(verdict(ours + 3), Verdict::Ok);
        assert_eq!(verdict(ours + 4), Verdict::Warn);
        assert_eq!(verdict(ours - 1), Verdict::Warn);
        assert_eq!(skew("").verdict, Verdict::Ok, "what is not known is no reason");
    }

    #[test]
    fn a_clock_a_minute_off_is_told_with_its_direction() {
        assert_eq!(clock(1000, 1030).verdict, Verdict::Ok);
        let late = clock(5000, 1000);
        assert_eq!((late.verdict, late.seen.as_str()), (Verdict::Fail, "4000 s behind the cluster's"));
    }
}
