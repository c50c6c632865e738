//! The built-in network against a real kernel: addresses, reachability, host ports, deletion in batches, recovery.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;
use std::path::Path;

use berth_cni::{Leak, Network, Protocol};
use berth_testkit::{in_namespaces, wait_until};
use support::*;

const DIR: &str = "/run/t/net";

fn network() -> Network {
    Network::load(config(Path::new(DIR))).unwrap_or_else(|e| panic!("{}", e.chain_text()))
}

#[test]
fn pods_reach_each_other_and_the_host_by_both_families() {
    in_namespaces(|| {
        block_on(async {
            let network = network();
            assert!(network.status().await.ready, "{:?}", network.status().await);
            assert!(!network.needs_netns_path());
            let (a, at_a) = attach(&network, &pod("a")).await;
            let (b, at_b) = attach(&network, &pod("b")).await;
            assert_eq!(at_a.pod_ips()[0].to_string(), "10.88.0.2");
            assert_eq!(at_b.pod_ips()[1].to_string(), "fd88::3");
            assert_eq!(at_b.mac.as_deref(), Some("0a:58:0a:58:00:03"));
            a.serve(80);
            for to in ["10.88.0.2:80", "[fd88::2]:80"] {
                assert_eq!(who(ask(to)), "a", "from the host to {to}");
                assert_eq!(who(b.ask(to)), "a", "from a pod to {to}");
            }
            run("ip", &["netns", "exec", "b", "ping", "-c1", "-W2", "10.88.0.1"]);
            let addresses = json("ip", &["-n", "a", "-j", "addr", "show", "eth0"]);
            let info = addresses[0]["addr_info"].as_array().unwrap();
            assert!(info.iter().any(|i| i["local"] == "10.88.0.2" && i["prefixlen"] == 16 && i["broadcast"] == "10.88.255.255"));
            assert!(info.iter().any(|i| i["local"] == "fd88::2" && i["nodad"] == true), "{info:?}");
            let lo = json("ip", &["-n", "a", "-j", "link", "show", "lo"]);
            assert!(lo[0]["flags"].to_string().contains("UP"));
            let routes = json("ip", &["-n", "a", "-j", "route"]);
            assert!(routes.as_array().unwrap().iter().any(|r| r["dst"] == "default" && r["gateway"] == "10.88.0.1"));
            let port = json("ip", &["-d", "-j", "link", "show", "master", BRIDGE]);
            assert_eq!(port[0]["linkinfo"]["info_slave_data"]["hairpin"], true, "{port}");
            network.check(&pod("a"), a.netns()).await.unwrap();
        });
    });
}

#[test]
fn without_the_built_in_network_nothing_is_ready_until_a_configuration_is_there() {
    in_namespaces(|| {
        block_on(async {
            let dir = Path::new(DIR);
            let network = Network::load(berth_cni::NetworkConfig { built_in: false, ..config(dir) }).unwrap();
            let status = network.status().await;
            assert!(!status.ready && status.message.contains("no network configuration in"), "{status:?}");
            // A sandbox that could not be made goes all the same.
            network.detach(&pod("a"), None).await.unwrap();
            let list = r#"{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "bridge", "bridge": "b0", "isGateway": true,
                "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.66.0.0/24"}]]}}]}"#;
            std::fs::create_dir_all(config(dir).conf_dir).unwrap();
            std::fs::write(config(dir).conf_dir.join("10-n.conflist"), list).unwrap();
            let status = network.status().await;
            assert!(status.ready && status.network == "n", "{status:?}");
        });
    });
}

#[test]
fn containers_find_by_a_chain_that_the_host_uses_nf_tables() {
    in_namespaces(|| {
        assert!(berth_cni::ensure_iptables_hint().unwrap());
        // The same again changes nothing, and brings back what somebody has removed.
        assert!(berth_cni::ensure_iptables_hint().unwrap());
        for tool in ["iptables-nft-save", "ip6tables-nft-save"] {
            assert!(run(tool, &["-t", "mangle"]).contains(":KUBE-IPTABLES-HINT - "), "{tool}");
        }
        run("iptables-nft", &["-t", "mangle", "-X", "KUBE-IPTABLES-HINT"]);
        assert!(!run("iptables-nft-save", &["-t", "mangle"]).contains("HINT"));
        assert!(berth_cni::ensure_iptables_hint().unwrap());
        assert!(run("iptables-nft-save", &["-t", "mangle"]).contains("HINT"));
        // The table stays one that iptables can work with.
        run("iptables-nft", &["-t", "mangle", "-A", "PREROUTING", "-j", "ACCEPT"]);
    });
}

#[test]
fn traffic_to_outside_is_masqueraded_and_pod_to_pod_is_not() {
    in_namespaces(|| {
        block_on(async {
            let network = network();
            let outside = outside();
            outside.serve(81);
            let (a, _) = attach(&network, &pod("a")).await;
            let (b, _) = attach(&network, &pod("b")).await;
            b.serve(80);
            assert_eq!(a.ask("10.99.0.2:81").unwrap(), "outside 10.99.0.1");
            assert_eq!(a.ask("10.88.0.3:80").unwrap(), "b 10.88.0.2");
        });
    });
}

/// A neighbour of the host: 10.99.0.2, which knows no route to the pods.
fn outside() -> Namespace {
    let outside = Namespace::new("outside");
    run("ip", &["link", "add", "far", "type", "veth", "peer", "name", "eth0", "netns", "outside"]);
    run("ip", &["addr", "add", "10.99.0.1/24", "dev", "far"]);
    run("ip", &["link", "set", "far", "up"]);
    run("ip", &["-n", "outside", "addr", "add", "10.99.0.2/24", "dev", "eth0"]);
    run("ip", &["-n", "outside", "link", "set", "eth0", "up"]);
    outside
}

#[test]
fn a_host_port_is_reached_from_everywhere() {
    in_namespaces(|| {
        block_on(async {
            let network = network();
            let outside = outside();
            let web = with_port(pod("a"), None, 8080, 80, Protocol::Tcp);
            let (a, _) = attach(&network, &web).await;
            let (b, _) = attach(&network, &with_port(pod("b"), Some("127.0.0.1"), 9090, 80, Protocol::Tcp)).await;
            a.serve(80);
            b.serve(80);
            assert_eq!(who(ask("127.0.0.1:8080")), "a");
            assert_eq!(who(ask("10.77.0.1:8080")), "a");
            assert_eq!(outside.ask("10.99.0.1:8080").unwrap(), "a 10.99.0.2", "the client's address is kept");
            assert_eq!(who(b.ask("10.77.0.1:8080")), "a", "from another pod");
            assert_eq!(who(a.ask("10.77.0.1:8080")), "a", "from the pod itself");
            assert_eq!(who(ask("127.0.0.1:9090")), "b");
            assert!(ask("10.77.0.1:9090").is_err(), "a host address that was not asked for");
            assert!(outside.ask("10.99.0.1:9090").is_err());
            run("ip", &["addr", "add", "fd77::1/64", "dev", "uplink0", "nodad"]);
            assert!(wait_until(PATIENCE, || run("ip", &["-6", "route", "get", "fd77::1"]).starts_with("local")));
            assert_eq!(who(ask("[fd77::1]:8080")), "a");
            assert_eq!(who(b.ask("[fd77::1]:8080")), "a");
            assert_eq!(who(a.ask("[fd77::1]:8080")), "a");
            let elements = elements("hostports4");
            assert!(elements[0].to_string().contains(r#""concat":["tcp",8080]"#), "{elements:?}");
            assert!(elements[0].to_string().contains(r#""comment":"a""#), "{elements:?}");
            network.detach(&web, Some(a.netns())).await.unwrap();
            assert!(ask("127.0.0.1:8080").is_err());
            assert!(support::elements("hostports4").is_empty());
            assert_eq!(who(ask("127.0.0.1:9090")), "b");
        });
    });
}

#[test]
fn a_pod_cannot_reach_the_host_s_loopback() {
    in_namespaces(|| {
        block_on(async {
            let network = network();
            let (a, _) = attach(&network, &with_port(pod("a"), None, 8080, 80, Protocol::Tcp)).await;
            assert_eq!(std::fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{BRIDGE}/route_localnet")).unwrap().trim(), "1");
            serve(std::net::TcpListener::bind("127.0.0.1:7777").unwrap(), "host".to_owned());
            assert_eq!(who(ask("127.0.0.1:7777")), "host");
            run("ip", &["-n", "a", "addr", "del", "127.0.0.1/8", "dev", "lo"]);
            run("ip", &["-n", "a", "route", "flush", "table", "local", "127.0.0.0/8"]);
            run("ip", &["-n", "a", "route", "add", "127.0.0.0/8", "via", "10.88.0.1", "dev", "eth0", "src", "10.88.0.2"]);
            a.inside(|| std::fs::write("/proc/sys/net/ipv4/conf/eth0/route_localnet", "1").unwrap());
            let answer = a.ask("127.0.0.1:7777");
            assert!(answer.is_err(), "{answer:?}");
        });
    });
}

#[test]
fn two_pods_cannot_have_one_host_port_and_the_loser_is_undone() {
    in_namespaces(|| {
        block_on(async {
            let network = network();
            let (_a, _) = attach(&network, &with_port(pod("a"), None, 8080, 80, Protocol::Tcp)).await;
            let b = Namespace::new("b");
            let wanted = with_port(with_port(pod("b"), None, 8081, 80, Protocol::Tcp), None, 8080, 80, Protocol::Tcp);
            let error = network.attach(&wanted, b.netns()).await.unwrap_err();
            assert_eq!(error.to_string(), "host port 8080/tcp on any address is in use by another pod");
            assert!(network.settle(PATIENCE).await);
            assert_eq!(network.leaks(&live(&["a"])).await.unwrap(), []);
            assert_eq!(elements("hostports4").len(), 1);
            assert_eq!(network.attachment("b"), None);
            // The same sandbox tries again once the port is free.
            network.detach(&pod("a"), None).await.unwrap();
            network.attach(&wanted, b.netns()).await.unwrap();
        });
    });
}

#[test]
fn the_next_datagram_of_a_udp_flow_reaches_the_new_pod() {
    in_namespaces(|| {
        block_on(async {
            let network = network();
            let outside = outside();
            let client = outside.inside(|| std::net::UdpSocket::bind("10.99.0.2:5555").unwrap());
            client.set_read_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
            let ask = || {
                let mut buffer = [0; 16];
                // What came late to an earlier question is no answer to this one.
                client.set_nonblocking(true).unwrap();
                while client.recv_from(&mut buffer).is_ok() {}
                client.set_nonblocking(false).unwrap();
                for _ in 0..20 {
                    client.send_to(b"?", "10.99.0.1:5300").unwrap();
                    if let Ok((length, _)) = client.recv_from(&mut buffer) {
                        return String::from_utf8_lossy(&buffer[..length]).into_owned();
                    }
                }
                "nobody".to_owned()
            };
            let flows = || std::fs::read_to_string("/proc/net/nf_conntrack").unwrap();
            // The kernel tracks connections from the first rule on.
            attach(&network, &with_port(pod("other"), None, 5301, 53, Protocol::Udp)).await;
            // The flow exists before the pod does.
            client.send_to(b"?", "10.99.0.1:5300").unwrap();
            assert!(wait_until(PATIENCE, || flows().contains("dport=5300")));
            for id in ["a", "b"] {
                let dns = with_port(pod(id), None, 5300, 53, Protocol::Udp);
                let (namespace, _) = attach(&network, &dns).await;
                namespace.serve_udp(53);
                assert_eq!(ask(), id);
                network.detach(&dns, Some(namespace.netns())).await.unwrap();
                assert!(!flows().contains("5300"), "{}", flows());
            }
        });
    });
}

#[test]
fn detach_silences_the_pod_at_once_and_deletes_its_link_later() {
    in_namespaces(|| {
        block_on(async {
            let network = network();
            let (a, _) = attach(&network, &pod("a")).await;
            let veth = links("vabc123")[0].clone();
            network.detach(&pod("a"), Some(a.netns())).await.unwrap();
            if let Some(link) = json("ip", &["-j", "link"]).as_array().unwrap().iter().find(|l| l["ifname"] == veth.as_str()) {
                assert!(link["master"].is_null() && !link["flags"].to_string().contains("\"UP\""), "{link}");
                let lease = Path::new(DIR).join("state/leases/berth/10.88.0.2");
                assert!(lease.exists() || links("vabc123").is_empty(), "the address is leased as long as its link is there");
            }
            assert!(network.settle(PATIENCE).await);
            assert!(links("vabc123").is_empty());
            assert!(!Path::new(DIR).join("state/leases/berth/10.88.0.2").exists());
            assert_eq!(network.leaks(&live(&[])).await.unwrap(), []);
            network.detach(&pod("a"), None).await.unwrap();
            network.detach(&pod("unknown"), None).await.unwrap();
        });
    });
}

#[test]
fn fifty_pods_come_and_go_at_once() {
    in_namespaces(|| {
        block_on(async {
            let network = network();
            let ids: Vec<String> = (0..50).map(|n| format!("pod{n}")).collect();
            let namespaces: Vec<Namespace> = ids.iter().map(|id| Namespace::new(id)).collect();
            let begun = std::time::Instant::now();
            let tasks: Vec<_> = ids
                .iter()
                .zip(&namespaces)
                .zip(10_000..)
                .map(|((id, namespace), port)| {
                    let (network, netns) = (network.clone(), namespace.netns());
                    let pod = with_port(pod(id), None, port, 80, Protocol::Tcp);
                    tokio::spawn(async move { network.attach(&pod, netns).await.unwrap().pod_ips()[0] })
                })
                .collect();
            let mut ips = std::collections::BTreeSet::new();
            for task in tasks {
                assert!(ips.insert(task.await.unwrap()));
            }
            let attached = begun.elapsed();
            assert_eq!((links("vabc123").len(), elements("hostports4").len()), (50, 50));
            for namespace in &namespaces {
                namespace.serve(80);
            }
            assert_eq!(who(ask("127.0.0.1:10049")), "pod49");
            let begun = std::time::Instant::now();
            let tasks: Vec<_> = ids
                .iter()
                .map(|id| {
                    let (network, pod) = (network.clone(), pod(id));
                    tokio::spawn(async move { network.detach(&pod, None).await.unwrap() })
                })
                .collect();
            for task in tasks {
                task.await.unwrap();
            }
            let detached = begun.elapsed();
            assert!(elements("hostports4").is_empty());
            assert!(network.settle(PATIENCE).await);
            let settled = begun.elapsed();
            assert!(links("vabc123").is_empty());
            assert_eq!(network.leaks(&live(&[])).await.unwrap(), []);
            berth_testkit::report_measured(&format!(
                "cni: 50 attached in {attached:?}, detached in {detached:?}, gone in {settled:?}"
            ));
        });
    });
}

#[test]
fn one_sandbox_attached_twice_at_once_is_attached_once() {
    in_namespaces(|| {
        block_on(async {
            let network = network();
            let namespace = Namespace::new("a");
            let attach = || {
                let (network, netns) = (network.clone(), namespace.netns());
                tokio::spawn(async move { network.attach(&pod("a"), netns).await.unwrap() })
            };
            let (first, second) = (attach(), attach());
            let first = first.await.unwrap();
            assert_eq!(first, second.await.unwrap());
            assert_eq!(attach().await.unwrap(), first, "a later call yields the record");
            assert_eq!(network.attachment("a"), Some(first));
            assert_eq!(links("vabc123").len(), 1);
        });
    });
}

#[test]
fn subnets_that_the_node_is_in_are_refused_at_start_and_those_of_our_own_bridge_are_not() {
    in_namespaces(|| {
        block_on(async {
            run("ip", &["link", "add", "wan0", "type", "veth", "peer", "name", "wan1"]);
            run("ip", &["addr", "add", "10.61.7.1/24", "dev", "wan0"]);
            let mut config = config(Path::new(DIR));
            for cidr in ["10.61.0.0/16", "10.61.7.128/25"] {
                config.pod_cidrs = vec![cidr.parse().unwrap()];
                let error = Network::load(config.clone()).unwrap_err().to_string();
                assert!(error.contains(&format!("pod CIDR {cidr} overlaps with 10.61.7.1/24 of interface wan0")), "{error}");
            }
            // Where CNI is configured they are not used.
            std::fs::create_dir_all(&config.conf_dir).unwrap();
            let conf = config.conf_dir.join("10-net.conflist");
            std::fs::write(&conf, r#"{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"loopback"}]}"#).unwrap();
            Network::load(config.clone()).unwrap();
            std::fs::remove_file(&conf).unwrap();
            config.pod_cidrs = vec!["10.62.0.0/16".parse().unwrap()];
            let network = Network::load(config.clone()).unwrap();
            attach(&network, &pod("a")).await;
            drop(network);
            Network::load(config.clone()).unwrap();
            // Where pods are already, an agent must come back to them, whatever the node has got since.
            run("ip", &["addr", "add", "10.62.9.1/24", "dev", "wan0"]);
            Network::load(config).unwrap();
        });
    });
}

#[test]
fn a_small_range_is_exhausted_and_used_again() {
    in_namespaces(|| {
        block_on(async {
            let mut config = config(Path::new(DIR));
            config.pod_cidrs = vec!["10.88.0.0/28".parse().unwrap()];
            let network = Network::load(config).unwrap();
            for n in 0..13 {
                attach(&network, &pod(&format!("p{n}"))).await;
            }
            let one_more = Namespace::new("more");
            let error = network.attach(&pod("more"), one_more.netns()).await.unwrap_err();
            assert_eq!(error.to_string(), "no IP addresses available in range set: 10.88.0.1-10.88.0.14");
            for round in 0..3 {
                network.detach(&pod("p4"), None).await.unwrap();
                assert!(network.settle(PATIENCE).await);
                let attachment = network.attach(&pod("more"), one_more.netns()).await.unwrap();
                assert_eq!(attachment.pod_ips()[0].to_string(), "10.88.0.6", "round {round}");
                network.detach(&pod("more"), None).await.unwrap();
                assert!(network.settle(PATIENCE).await);
                let again = Namespace::new(&format!("p4-{round}"));
                network.attach(&pod("p4"), again.netns()).await.unwrap();
            }
        });
    });
}

#[test]
fn a_new_network_ends_the_deletions_of_a_killed_one() {
    in_namespaces(|| {
        block_on(async {
            let network = network();
            let (_a, _) = attach(&network, &pod("a")).await;
            let (_b, _) = attach(&network, &with_port(pod("b"), None, 8080, 80, Protocol::Tcp)).await;
            let veth = links("vabc123").into_iter().find(|name| json("ip", &["-j", "neigh"]).is_array() && !name.is_empty());
            // As if killed after the record was written and before anything else: the record alone says what is to do.
            let record = serde_json::json!({"owner": {"container_id": "a", "ifname": "eth0"}, "link": veth_of(&network, "a").await,
                "leases": format!("{DIR}/state/leases/berth")});
            assert!(veth.is_some());
            std::fs::create_dir_all(format!("{DIR}/state/pending")).unwrap();
            std::fs::write(format!("{DIR}/state/pending/a-eth0.json"), record.to_string()).unwrap();
            drop(network);
            let second = self::network();
            assert!(second.settle(PATIENCE).await);
            assert_eq!(links("vabc123").len(), 1, "only the other pod's is left");
            assert!(!Path::new(DIR).join("state/leases/berth/10.88.0.2").exists());
            assert!(Path::new(DIR).join("state/leases/berth/10.88.0.3").exists());
            second.reconcile(&live(&["b"])).await.unwrap();
            assert!(second.settle(PATIENCE).await);
            assert_eq!(second.leaks(&live(&["b"])).await.unwrap(), []);
            assert_eq!(elements("hostports4").len(), 1);
            // Now nobody lives.
            let leaks = second.leaks(&live(&[])).await.unwrap();
            assert!(leaks.iter().any(|l| matches!(l, Leak::Link(_))) && leaks.iter().any(|l| matches!(l, Leak::HostPort(..))));
            assert!(leaks.contains(&Leak::Address("10.88.0.3".into(), "b".into())) && leaks.contains(&Leak::Record("b".into())));
            second.reconcile(&live(&[])).await.unwrap();
            assert!(second.settle(PATIENCE).await);
            assert_eq!(second.leaks(&live(&[])).await.unwrap(), []);
            second.remove_all().await.unwrap();
            assert!(links(BRIDGE).is_empty());
            assert!(!run("nft", &["list", "tables"]).contains(TABLE));
        });
    });
}

/// Every file of the network's folders with what is in it.
fn files(folder: &Path, out: &mut Vec<(std::path::PathBuf, Vec<u8>, std::time::SystemTime)>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        match entry.file_type().unwrap().is_dir() {
            true => files(&entry.path(), out),
            false => {
                out.push((entry.path(), std::fs::read(entry.path()).unwrap(), entry.metadata().unwrap().modified().unwrap()))
            }
        }
    }
    out.sort();
}

#[test]
fn the_leaks_of_a_network_that_does_not_run_are_found_and_left_as_they_are() {
    in_namespaces(|| {
        let config = config(Path::new(DIR));
        let of_running = block_on(async {
            let network = network();
            attach(&network, &with_port(pod("b"), None, 8080, 80, Protocol::Tcp)).await;
            network.leaks(&live(&[])).await.unwrap()
        });
        assert_eq!(of_running.len(), 1 + 2 + 2 + 1, "a link, two addresses, a port in either family, a record: {of_running:?}");
        let look = |live: &BTreeSet<String>| {
            let (mut before, mut after) = (Vec::new(), Vec::new());
            files(Path::new(DIR), &mut before);
            let leaks = Network::leaks_on_record(&config, live).unwrap();
            files(Path::new(DIR), &mut after);
            assert!(before == after, "it has written");
            leaks
        };
        assert_eq!(look(&live(&[])), of_running);
        assert_eq!(look(&live(&["b"])), []);
        // A deletion on record is nobody's leak, and is left to the next network.
        let Some(Leak::Link(veth)) = of_running.iter().find(|leak| matches!(leak, Leak::Link(_))) else {
            panic!("{of_running:?}")
        };
        let record = serde_json::json!({"owner": {"container_id": "b", "ifname": "eth0"}, "link": veth, "leases": null});
        let pending = Path::new(DIR).join("state/pending");
        std::fs::create_dir_all(&pending).unwrap();
        std::fs::write(pending.join("b-eth0.json"), record.to_string()).unwrap();
        let left = look(&live(&[]));
        assert!(left.iter().all(|leak| !matches!(leak, Leak::Link(_) | Leak::Address(..))), "{left:?}");
        assert_eq!(&links("vabc123"), std::slice::from_ref(veth));
        // What another boot has left in the state folder is void, and still there.
        std::fs::write(Path::new(DIR).join("state/boot_id"), "another").unwrap();
        let kinds = look(&live(&[]));
        assert!(kinds.iter().all(|leak| matches!(leak, Leak::Link(_) | Leak::HostPort(..))) && kinds.len() == 3, "{kinds:?}");
    });
}

/// The host's end of a pod's veth, from its result.
async fn veth_of(network: &Network, id: &str) -> String {
    let result: serde_json::Value = serde_json::from_str(&network.attachment(id).unwrap().result_json).unwrap();
    result["interfaces"][1]["name"].as_str().unwrap().to_owned()
}

#[test]
fn a_flushed_ruleset_comes_back() {
    in_namespaces(|| {
        block_on(async {
            let network = network();
            let (a, _) = attach(&network, &with_port(pod("a"), None, 8080, 80, Protocol::Tcp)).await;
            a.serve(80);
            for _ in 0..3 {
                run("nft", &["flush", "ruleset"]);
                assert!(wait_until(std::time::Duration::from_secs(2), || who(ask("127.0.0.1:8080")) == "a"));
            }
            run("nft", &["flush", "chain", "inet", TABLE, "hostports"]);
            assert!(wait_until(std::time::Duration::from_secs(2), || who(ask("127.0.0.1:8080")) == "a"));
            network.detach(&pod("a"), None).await.unwrap();
            run("nft", &["flush", "ruleset"]);
            network.detach(&pod("a"), None).await.unwrap();
        });
    });
}

#[test]
fn a_deleted_bridge_is_made_again_for_the_next_pod() {
    in_namespaces(|| {
        block_on(async {
            let network = network();
            attach(&network, &pod("a")).await;
            run("ip", &["link", "del", BRIDGE]);
            let (b, _) = attach(&network, &pod("b")).await;
            b.serve(80);
            assert_eq!(who(ask("10.88.0.3:80")), "b");
        });
    });
}

#[test]
fn pods_pass_a_host_that_forwards_nothing_by_default() {
    in_namespaces(|| {
        block_on(async {
            let network = network();
            let outside = outside();
            outside.serve(81);
            run("ip", &["-n", "outside", "route", "add", "10.88.0.0/16", "via", "10.99.0.1"]);
            run("iptables-nft", &["-P", "FORWARD", "DROP"]);
            run("ip6tables-nft", &["-P", "FORWARD", "DROP"]);
            let (a, _) = attach(&network, &with_port(pod("a"), None, 8080, 80, Protocol::Tcp)).await;
            let (b, _) = attach(&network, &pod("b")).await;
            a.serve(80);
            let all_pass = || {
                who(b.ask("10.88.0.2:80")) == "a"
                    && who(b.ask("[fd88::2]:80")) == "a"
                    && who(b.ask("10.99.0.2:81")) == "outside"
                    && who(outside.ask("10.99.0.1:8080")) == "a"
                    && who(ask("127.0.0.1:8080")) == "a"
            };
            assert!(all_pass());
            assert!(outside.ask("10.88.0.2:80").is_err(), "the policy still holds for what nobody published");
            let listed = run("iptables-nft", &["-S", "FORWARD"]);
            assert!(
                listed.contains(&format!("-A FORWARD -i {BRIDGE} -m comment --comment \"{TABLE} from {BRIDGE}\" -j ACCEPT")),
                "{listed}"
            );
            assert!(
                listed.contains(&format!("-A FORWARD -o {BRIDGE} -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -m comment")),
                "{listed}"
            );
            // Somebody resets the firewall while pods run.
            let patience = std::time::Duration::from_secs(2);
            run("iptables-nft", &["-F", "FORWARD"]);
            assert!(wait_until(patience, all_pass));
            run("nft", &["flush", "ruleset"]);
            run("iptables-nft", &["-P", "FORWARD", "DROP"]);
            assert!(
                wait_until(patience, || run("iptables-nft", &["-S", "FORWARD"]).matches("-A FORWARD").count() == 2 && all_pass())
            );
            network.remove_all().await.unwrap();
            assert!(!run("iptables-nft", &["-S", "FORWARD"]).contains(BRIDGE));
        });
    });
}

/// The other half of the test below: attaches pods, detaches them and prints a line each, until it is killed.
#[test]
fn agent_that_is_killed() {
    if std::env::var_os("BERTH_TEST_AGENT").is_none() {
        return;
    }
    block_on(async {
        let network = network();
        for round in 0.. {
            let ids: Vec<String> = (0..8).map(|n| format!("p{}x{round}x{n}", std::process::id())).collect();
            for (port, id) in (9000..).zip(&ids) {
                attach(&network, &with_port(pod(id), None, port, 80, Protocol::Tcp)).await;
            }
            for id in &ids {
                network.detach(&pod(id), None).await.unwrap();
            }
        }
    });
}

#[test]
fn whenever_the_agent_is_killed_the_next_one_leaves_nothing_behind() {
    in_namespaces(|| {
        let own = std::env::current_exe().unwrap();
        for round in 0..12 {
            let mut agent = std::process::Command::new(&own)
                .args(["agent_that_is_killed", "--exact", "--nocapture"])
                .env("BERTH_TEST_AGENT", "1")
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap();
            // Killed while it attaches, or while it detaches and deletes; each time a little later.
            let count = |folder: &str| std::fs::read_dir(format!("{DIR}/state/{folder}")).map_or(0, Iterator::count);
            let mut seen = 0;
            let mut last = 0;
            assert!(wait_until(PATIENCE, || {
                let now = if round % 2 == 0 { count("results") } else { count("pending") };
                seen += usize::from(now > last);
                last = now;
                seen > round / 2
            }));
            agent.kill().unwrap();
            agent.wait().unwrap();
            block_on(async {
                let network = network();
                network.reconcile(&live(&[])).await.unwrap();
                assert!(network.settle(PATIENCE).await);
                assert_eq!(network.leaks(&live(&[])).await.unwrap(), []);
                assert!(links("vabc123").is_empty(), "round {round}");
                let leases = std::fs::read_dir(format!("{DIR}/state/leases/berth")).unwrap().flatten();
                let leases: Vec<_> =
                    leases.map(|e| e.file_name()).filter(|n| n.to_string_lossy().parse::<std::net::IpAddr>().is_ok()).collect();
                assert!(leases.is_empty(), "round {round}: {leases:?}");
                assert!(std::fs::read_dir(format!("{DIR}/state/pending")).map_or(0, Iterator::count) == 0);
            });
        }
    });
}

/// What is left after a power cut: files, but no link, no namespace, no rule.
fn reboot(ids: &[String]) {
    for link in links("vabc123").iter().chain(&links("veth")).chain(&links(BRIDGE)).chain(&links("br9")) {
        // A veth goes with its other end.
        let _ = std::process::Command::new("ip").args(["link", "del", link]).output();
    }
    for id in ids {
        run("ip", &["netns", "del", id]);
    }
    run("nft", &["flush", "ruleset"]);
    for mark in ["state/boot_id", "state/leases/berth/.boot_id"] {
        let path = Path::new(DIR).join(mark);
        if path.exists() {
            std::fs::write(path, "another boot").unwrap();
        }
    }
}

#[test]
fn power_cuts_leak_no_address_whoever_manages_them() {
    in_namespaces(|| {
        block_on(async {
            let ids: Vec<String> = (0..10).map(|n| format!("p{n}")).collect();
            for external in [false, true] {
                let mut config = config(Path::new(DIR));
                config.pod_cidrs = vec!["10.88.0.0/28".parse().unwrap()];
                if external {
                    config.prefer_external = true;
                    std::fs::create_dir_all(&config.conf_dir).unwrap();
                    let conf = r#"{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge","bridge":"br9","isGateway":true,
                        "ipam":{"type":"host-local","subnet":"10.9.0.0/28","dataDir":"/run/t/leases"}}]}"#;
                    std::fs::write(config.conf_dir.join("10-net.conflist"), conf).unwrap();
                }
                for round in 0..if external { 4 } else { 20 } {
                    let network = Network::load(config.clone()).unwrap();
                    network.reconcile(&live(&[])).await.unwrap();
                    let mut ips = std::collections::BTreeSet::new();
                    for id in &ids {
                        // Sandboxes of another boot have other ids.
                        let namespace = Namespace::new(id);
                        let pod = pod(&format!("{id}-{external}-{round}"));
                        ips.insert(network.attach(&pod, namespace.netns()).await.unwrap().pod_ips()[0]);
                    }
                    assert_eq!(ips.len(), 10);
                    drop(network);
                    reboot(&ids);
                }
            }
        });
    });
}

#[test]
fn without_any_configuration_a_free_subnet_is_chosen_and_kept() {
    in_namespaces(|| {
        block_on(async {
            let mut config = config(Path::new(DIR));
            config.pod_cidrs.clear();
            let network = Network::load(config.clone()).unwrap();
            let (a, at_a) = attach(&network, &pod("a")).await;
            let (b, _) = attach(&network, &pod("b")).await;
            a.serve(80);
            assert_eq!(at_a.ips.len(), 2, "both families: {:?}", at_a.ips);
            assert_eq!(who(b.ask(&format!("{}:80", at_a.pod_ips()[0]))), "a");
            assert_eq!(who(b.ask(&format!("[{}]:80", at_a.pod_ips()[1]))), "a");
            drop(network);
            // Another instance on this host chooses another one, and this one keeps its own.
            let mut other = config.clone();
            other.instance = "abc124".to_owned();
            other.state_dir = "/run/t/other".into();
            let other = Network::load(other).unwrap();
            let (c, at_c) = attach(&other, &pod("c")).await;
            let network = Network::load(config).unwrap();
            let (_, at_d) = attach(&network, &pod("d")).await;
            assert!(!at_c.ips[0].overlaps(&at_a.ips[0]) && at_d.ips[0].network() == at_a.ips[0].network());
            assert_eq!(who(c.ask(&format!("{}:80", at_a.pod_ips()[0]))), "a", "instances reach each other through the host");
            // The cluster names a range: new pods are in it, old ones stay where they are.
            network.set_pod_cidrs(vec!["10.200.3.0/24".parse().unwrap()]).unwrap();
            assert!(network.set_pod_cidrs(vec!["10.200.3.0/31".parse().unwrap()]).is_err());
            let (e, at_e) = attach(&network, &pod("e")).await;
            assert_eq!(at_e.pod_ips()[0].to_string(), "10.200.3.2");
            e.serve(80);
            assert_eq!(who(ask("10.200.3.2:80")), "e");
        });
    });
}

/// A plugin that fails as long as a file says so, and writes down what it was asked.
fn install_failing_plugin(bin: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(bin).unwrap();
    let script = format!(
        "#!/bin/sh\ncat > /dev/null\necho \"$CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS\" >> {dir}/calls\n\
         if [ -e {dir}/fail-$CNI_COMMAND ]; then echo '{{\"cniVersion\":\"1.0.0\",\"code\":99,\"msg\":\"told to fail\"}}'; exit 1; fi\n\
         [ $CNI_COMMAND = ADD ] && echo '{{\"cniVersion\":\"1.0.0\",\"ips\":[{{\"address\":\"10.1.2.3/24\"}}]}}'\nexit 0\n",
        dir = DIR
    );
    std::fs::write(bin.join("moody"), script).unwrap();
    std::fs::set_permissions(bin.join("moody"), std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn an_attachment_that_can_not_be_undone_is_on_record_until_del_succeeds() {
    in_namespaces(|| {
        block_on(async {
            let dir = Path::new(DIR);
            install_failing_plugin(&dir.join("bin"));
            std::fs::create_dir_all(dir.join("net.d")).unwrap();
            let conf = r#"{"cniVersion":"1.0.0","name":"moody-net","plugins":[{"type":"moody"}]}"#;
            std::fs::write(dir.join("net.d/10.conflist"), conf).unwrap();
            let load = || Network::load(berth_cni::NetworkConfig { bin_dirs: vec![dir.join("bin")], ..config(dir) }).unwrap();
            let calls = || std::fs::read_to_string(dir.join("calls")).unwrap_or_default();
            let fail = |verb: &str| std::fs::write(dir.join(format!("fail-{verb}")), "").unwrap();
            let heal = |verb: &str| std::fs::remove_file(dir.join(format!("fail-{verb}"))).unwrap();
            let network = load();
            let (a, b) = (Namespace::new("a"), Namespace::new("b"));
            fail("ADD");
            fail("DEL");
            for (id, netns) in [("a", &a), ("b", &b)] {
                let error = network.attach(&pod(id), netns.netns()).await.unwrap_err();
                assert!(matches!(error, berth_cni::Error::NotUndone { .. }), "{error:?}");
                let text = error.to_string();
                assert!(text.contains("(ADD): told to fail") && text.contains("(DEL): told to fail"), "{text}");
            }
            assert!(network.attachment("a").is_none(), "what failed is no attachment");
            assert!(network.detach(&pod("a"), Some(a.netns())).await.is_err(), "DEL fails again and stays owed");
            drop(network);

            // The next process owes it too, with the configuration that it was made by, whatever is configured then.
            std::fs::remove_file(dir.join("net.d/10.conflist")).unwrap();
            let network = load();
            assert_eq!(network.leaks(&live(&[])).await.unwrap().len(), 2);
            heal("DEL");
            let before = calls().lines().count();
            network.detach(&pod("a"), Some(a.netns())).await.unwrap();
            assert_eq!(calls().lines().skip(before).collect::<Vec<_>>(), ["DEL a /run/netns/a"]);
            network.reconcile(&live(&[])).await.unwrap();
            assert_eq!(calls().lines().last(), Some("DEL b "));
            assert!(network.leaks(&live(&[])).await.unwrap().is_empty());
        });
    });
}

#[test]
fn an_attachment_begins_with_the_del_that_an_earlier_one_owes() {
    in_namespaces(|| {
        block_on(async {
            let dir = Path::new(DIR);
            install_failing_plugin(&dir.join("bin"));
            std::fs::create_dir_all(dir.join("net.d")).unwrap();
            let conf = r#"{"cniVersion":"1.0.0","name":"moody-net","plugins":[{"type":"moody"}]}"#;
            std::fs::write(dir.join("net.d/10.conflist"), conf).unwrap();
            let network = Network::load(berth_cni::NetworkConfig { bin_dirs: vec![dir.join("bin")], ..config(dir) }).unwrap();
            let a = Namespace::new("a");
            for verb in ["ADD", "DEL"] {
                std::fs::write(dir.join(format!("fail-{verb}")), "").unwrap();
            }
            network.attach(&pod("a"), a.netns()).await.unwrap_err();
            for verb in ["ADD", "DEL"] {
                std::fs::remove_file(dir.join(format!("fail-{verb}"))).unwrap();
            }
            network.attach(&pod("a"), a.netns()).await.unwrap();
            let calls = std::fs::read_to_string(dir.join("calls")).unwrap();
            let verbs: Vec<&str> = calls.lines().filter_map(|line| line.split(' ').next()).collect();
            assert_eq!(verbs, ["ADD", "DEL", "DEL", "ADD"]);
        });
    });
}
