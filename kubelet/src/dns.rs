//! The resolver configuration of a pod: policy, the host's resolv.conf, the pod's own additions, and the limits of
//! resolvers. Pure; the runtime writes the file.

use std::net::IpAddr;

use berth_cri_api::v1 as cri;
use k8s_openapi::api::core::v1::Pod;

use crate::pod;

const MAX_SERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
const MAX_SEARCH_CHARS: usize = 2048;

/// What the node contributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeDns {
    /// Content of the host's resolv.conf; `None`: the node has none to give.
    pub host: Option<String>,
    /// The cluster's DNS servers.
    pub cluster_servers: Vec<IpAddr>,
    /// The cluster's domain.
    pub cluster_domain: String,
}

/// A parsed resolv.conf.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Resolver {
    servers: Vec<String>,
    searches: Vec<String>,
    options: Vec<String>,
}

/// The pod's resolver configuration and what had to be left out of it.
pub fn dns_config(pod: &Pod, node: &NodeDns) -> (cri::DnsConfig, Vec<String>) {
    let spec = pod::spec(pod);
    let cluster = asks_cluster(pod);
    let mut warnings = Vec::new();
    let mut resolver = match spec.dns_policy.as_deref() {
        Some("None") => Resolver::default(),
        _ if cluster && !node.cluster_servers.is_empty() => cluster_resolver(pod, node),
        _ => host_resolver(node),
    };
    if let Some(own) = &spec.dns_config {
        append(&mut resolver.servers, own.nameservers.iter().flatten());
        append(&mut resolver.searches, own.searches.iter().flatten());
        for option in own.options.iter().flatten() {
            let name = option.name.clone().unwrap_or_default();
            let text = match option.value.as_deref() {
                Some(value) => format!("{name}:{value}"),
                None => name.clone(),
            };
            resolver.options.retain(|o| o.split(':').next() != Some(name.as_str()));
            resolver.options.push(text);
        }
    }
    limit(&mut resolver, &mut warnings);
    let Resolver { servers, searches, options } = resolver;
    (cri::DnsConfig { servers, searches, options }, warnings)
}

/// Whether the pod's names are to be looked up in the cluster first.
fn asks_cluster(pod: &Pod) -> bool {
    match pod::spec(pod).dns_policy.as_deref() {
        Some("ClusterFirstWithHostNet") => true,
        Some("None" | "Default") => false,
        _ => !pod::is_host_network(pod),
    }
}

/// Whether the pod is to ask the cluster's servers and the node knows none.
pub fn lacks_cluster_servers(pod: &Pod, node: &NodeDns) -> bool {
    asks_cluster(pod) && node.cluster_servers.is_empty()
}

fn cluster_resolver(pod: &Pod, node: &NodeDns) -> Resolver {
    let mut searches = Vec::new();
    if !node.cluster_domain.is_empty() {
        let domain = &node.cluster_domain;
        searches.extend([format!("{}.svc.{domain}", pod::namespace(pod)), format!("svc.{domain}"), domain.clone()]);
    }
    append(&mut searches, host_resolver(node).searches.iter());
    Resolver {
        servers: node.cluster_servers.iter().map(IpAddr::to_string).collect(),
        searches,
        options: vec!["ndots:5".to_owned()],
    }
}

fn host_resolver(node: &NodeDns) -> Resolver {
    match &node.host {
        Some(text) => parse(text),
        None => Resolver { servers: vec!["127.0.0.1".to_owned()], searches: vec![".".to_owned()], options: Vec::new() },
    }
}

fn parse(text: &str) -> Resolver {
    let mut resolver = Resolver::default();
    for line in text.lines() {
        let line = line.split(['#', ';']).next().unwrap_or_default();
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => resolver.servers.extend(words.next().map(str::to_owned)),
            Some("search") => {
                let domains = words.filter(|w| *w != ".").map(|w| w.trim_end_matches('.').to_owned());
                resolver.searches = domains.collect();
            }
            Some("options") => append(&mut resolver.options, words.map(str::to_owned).collect::<Vec<_>>().iter()),
            _ => {}
        }
    }
    resolver
}

/// Whether a resolv.conf names servers, and all of them on loopback, where only the host itself finds them.
pub fn is_stub(text: &str) -> bool {
    let servers = parse(text).servers;
    !servers.is_empty() && servers.iter().all(|server| server.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()))
}

fn append<'a>(list: &mut Vec<String>, items: impl Iterator<Item = &'a String>) {
    for item in items {
        if !list.contains(item) {
            list.push(item.clone());
        }
    }
}

fn limit(resolver: &mut Resolver, warnings: &mut Vec<String>) {
    if resolver.servers.len() > MAX_SERVERS {
        resolver.servers.truncate(MAX_SERVERS);
        warnings.push(format!(
            "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: {}",
            resolver.servers.join(" ")
        ));
    }
    let before = resolver.searches.len();
    resolver.searches.truncate(MAX_SEARCHES);
    while resolver.searches.join(" ").len() > MAX_SEARCH_CHARS {
        resolver.searches.pop();
    }
    if resolver.searches.len() < before {
        warnings.push(format!(
            "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: {}",
            resolver.searches.join(" ")
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{defaults::apply_defaults, parse::parse_manifest};

    fn pod(spec: &str) -> Pod {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: a, namespace: shop}}, spec: {{containers: [{{name: c, image: i}}], {spec}}}}}"
        );
        let mut pod = parse_manifest(&text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        pod
    }

    fn line(spec: &str, node: &NodeDns) -> String {
        let (config, _) = dns_config(&pod(spec), node);
        format!("{}|{}|{}", config.servers.join(" "), config.searches.join(" "), config.options.join(" "))
    }

    #[test]
    fn each_policy_gives_its_servers() {
        let host = Some("# x\nnameserver 9.9.9.9 # y\nsearch old\nsearch corp. .\noptions timeout:1\n".to_owned());
        let lone = NodeDns { host: host.clone(), ..NodeDns::default() };
        let cluster =
            NodeDns { host, cluster_servers: vec!["10.96.0.10".parse().unwrap()], cluster_domain: "cluster.local".into() };
        let in_cluster = "10.96.0.10|shop.svc.cluster.local svc.cluster.local cluster.local corp|ndots:5";
        let of_host = "9.9.9.9|corp|timeout:1";
        let own = "dnsPolicy: None, dnsConfig: {nameservers: [1.1.1.1], searches: [x], options: [{name: ndots, value: '2'}, {name: debug}]}";
        let added = "dnsConfig: {nameservers: [1.1.1.1, 9.9.9.9], options: [{name: timeout, value: '5'}]}, dnsPolicy: Default";
        let cases = [
            ("hostIPC: false", &cluster, in_cluster),
            ("hostIPC: false", &lone, of_host),
            ("hostNetwork: true", &cluster, of_host),
            ("hostNetwork: true, dnsPolicy: ClusterFirstWithHostNet", &cluster, in_cluster),
            ("dnsPolicy: Default", &cluster, of_host),
            (own, &cluster, "1.1.1.1|x|ndots:2 debug"),
            (added, &cluster, "9.9.9.9 1.1.1.1|corp|timeout:5"),
            ("dnsPolicy: Default", &NodeDns::default(), "127.0.0.1|.|"),
        ];
        for spec in ["hostIPC: false", "hostNetwork: true, dnsPolicy: ClusterFirstWithHostNet"] {
            assert!(lacks_cluster_servers(&pod(spec), &lone) && !lacks_cluster_servers(&pod(spec), &cluster), "{spec}");
        }
        assert!(
            !lacks_cluster_servers(&pod("dnsPolicy: Default"), &lone) && !lacks_cluster_servers(&pod("hostNetwork: true"), &lone)
        );
        for (spec, node, expected) in cases {
            assert_eq!(line(spec, node), expected, "{spec}");
        }
    }

    #[test]
    fn a_resolver_on_loopback_is_a_stub() {
        let cases = [
            ("nameserver 127.0.0.53\noptions edns0\n", true),
            ("nameserver ::1\nnameserver 127.0.0.1\n", true),
            ("nameserver 127.0.0.53\nnameserver 192.0.2.1\n", false),
            ("# nameserver 127.0.0.53\nsearch example.org\n", false),
            ("", false),
        ];
        for (text, stub) in cases {
            assert_eq!(is_stub(text), stub, "{text}");
        }
    }

    #[test]
    fn too_much_is_cut_and_said() {
        let host = (0..5).map(|i| format!("nameserver 1.1.1.{i}\n")).collect::<String>()
            + "search "
            + &(0..40).map(|i| format!("d{i}")).collect::<Vec<_>>().join(" ");
        let node = NodeDns { host: Some(host), ..NodeDns::default() };
        let (config, warnings) = dns_config(&pod("dnsPolicy: Default"), &node);
        assert_eq!((config.servers.len(), config.searches.len(), warnings.len()), (3, 32, 2));
    }
}
