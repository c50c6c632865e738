//! The plugins as programs, called as libcni calls them, with Debian's reference plugins as the oracle.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use berth_cni::{Network, Protocol};
use berth_testkit::in_namespaces;
use serde_json::{Value, json};
use support::*;

const REFERENCE: &str = "/usr/lib/cni";
const OURS: &str = "/run/t/bin";

/// Links to our plugins, named by type.
fn install() {
    std::fs::create_dir_all(OURS).unwrap();
    for plugin in berth_cni::plugin::TYPES {
        symlink(env!("CARGO_BIN_EXE_berth-cni"), Path::new(OURS).join(plugin)).unwrap();
    }
}

struct Call<'a> {
    dir: &'a str,
    plugin: &'a str,
    id: &'a str,
    netns: Option<&'a Path>,
}

impl Call<'_> {
    /// The output as JSON (null if empty); an error's JSON on failure.
    fn run(&self, verb: &str, config: &Value) -> Result<Value, Value> {
        self.run_with(verb, config, &[("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=x")])
    }

    fn run_with(&self, verb: &str, config: &Value, env: &[(&str, &str)]) -> Result<Value, Value> {
        let mut command = Command::new(Path::new(self.dir).join(self.plugin));
        command.env("CNI_COMMAND", verb).env("CNI_PATH", self.dir).env("CNI_CONTAINERID", self.id).env("CNI_IFNAME", "eth0");
        command.env("CNI_NETNS", self.netns.unwrap_or(Path::new("")));
        for (key, value) in env {
            if value.is_empty() {
                command.env_remove(key);
            } else {
                command.env(key, value);
            }
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // One that refuses its environment ends without reading its input.
        let _ = child.stdin.take().unwrap().write_all(config.to_string().as_bytes());
        let output = child.wait_with_output().unwrap();
        let value = if output.stdout.is_empty() { Value::Null } else { serde_json::from_slice(&output.stdout).unwrap() };
        if output.status.success() { Ok(value) } else { Err(value) }
    }
}

fn with(config: &Value, key: &str, value: &Value) -> Value {
    let mut config = config.clone();
    config[key] = value.clone();
    config
}

#[test]
fn host_local_gives_what_the_reference_gives() {
    in_namespaces(|| {
        install();
        let ipams = [
            json!({"type": "host-local", "subnet": "10.1.2.0/29"}),
            json!({"type": "host-local", "subnet": "10.1.2.0/24", "rangeStart": "10.1.2.9", "rangeEnd": "10.1.2.12", "gateway": "10.1.2.254",
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "192.168.0.0/16", "gw": "10.1.2.5"}]}),
            json!({"type": "host-local", "ranges": [[{"subnet": "10.1.2.0/30"}, {"subnet": "10.1.3.0/29"}], [{"subnet": "fd00:1::/125"}]]}),
        ];
        for (at, ipam) in ipams.iter().enumerate() {
            for version in ["0.3.1", "0.4.0", "1.0.0"] {
                let play = |dir: &str| -> Vec<Value> {
                    let ipam = with(ipam, "dataDir", &json!(format!("/run/t/leases/{at}/{version}{dir}")));
                    let config = json!({"cniVersion": version, "name": "net", "type": "x", "ipam": ipam});
                    let call = |id: &str, verb: &str| {
                        let done = Call { dir, plugin: "host-local", id, netns: Some(Path::new("/proc/1/ns/none")) };
                        let done =
                            done.run_with(verb, &config, &[("CNI_NETNS", if verb == "DEL" { "" } else { "/run/netns/x" })]);
                        // The texts of errors are everybody's own.
                        done.unwrap_or_else(|_| json!("error"))
                    };
                    let mut out: Vec<Value> = ["a", "b", "c"].iter().map(|id| call(id, "ADD")).collect();
                    out.push(call("b", "DEL"));
                    out.extend(["d", "e", "f", "g", "h", "i"].iter().map(|id| call(id, "ADD")));
                    out.extend(["a", "a", "zzz"].iter().map(|id| call(id, "DEL")));
                    out.push(call("j", "ADD"));
                    out
                };
                Namespace::new(&format!("x{at}{}", version.replace('.', "")));
                if !Path::new("/run/netns/x").exists() {
                    Namespace::new("x");
                }
                assert_eq!(play(OURS), play(REFERENCE), "{ipam} {version}");
            }
        }
    });
}

#[test]
fn leases_of_either_are_freed_by_the_other() {
    in_namespaces(|| {
        install();
        Namespace::new("x");
        let netns = PathBuf::from("/run/netns/x");
        let config = json!({"cniVersion": "1.0.0", "name": "net", "ipam": {"type": "host-local", "subnet": "10.1.2.0/30", "dataDir": "/run/t/l"}});
        for (adds, deletes) in [(OURS, REFERENCE), (REFERENCE, OURS), (OURS, REFERENCE)] {
            let call = |dir| Call { dir, plugin: "host-local", id: "a", netns: Some(&netns) };
            let other = |dir| Call { dir, plugin: "host-local", id: "b", netns: Some(&netns) };
            assert_eq!(call(adds).run("ADD", &config).unwrap()["ips"][0]["address"], "10.1.2.2/30");
            other(deletes).run("ADD", &config).unwrap_err();
            call(deletes).run("CHECK", &with(&config, "prevResult", &json!({"cniVersion": "1.0.0"}))).unwrap();
            call(deletes).run("DEL", &config).unwrap();
        }
    });
}

/// What a pod and the host look like, with the parts that are random taken out.
fn observe(bridge: &str) -> Value {
    let addresses = |args: &[&str]| -> Vec<Value> {
        let all = json("ip", args);
        let infos = all.as_array().unwrap().iter().flat_map(|link| link["addr_info"].as_array().cloned().unwrap_or_default());
        let mut list: Vec<Value> = infos
            .filter(|i| i["scope"] != "link")
            .map(|i| json!({"local": i["local"], "prefix": i["prefixlen"], "broadcast": i["broadcast"], "tentative": i["tentative"]}))
            .collect();
        list.sort_by_key(ToString::to_string);
        list
    };
    let routes = |args: &[&str]| -> Vec<Value> {
        let all = json("ip", args);
        let mut list: Vec<Value> = all
            .as_array()
            .unwrap()
            .iter()
            .filter(|r| !r["dst"].as_str().unwrap_or_default().starts_with("fe80") && r["dst"] != "ff00::/8")
            .map(|r| json!({"dst": r["dst"], "via": r["gateway"], "dev": r["dev"], "scope": r["scope"], "src": r["prefsrc"], "type": r["type"]}))
            .collect();
        list.sort_by_key(ToString::to_string);
        list
    };
    let port = json("ip", &["-d", "-j", "link", "show", "master", bridge]);
    let eth0 = json("ip", &["-n", "pod", "-d", "-j", "link", "show", "eth0"]);
    let up = |link: &Value| link["flags"].to_string().contains("\"UP\"");
    let bridge_link = json("ip", &["-d", "-j", "link", "show", bridge]);
    let sysctl = |name: &str| std::fs::read_to_string(format!("/proc/sys/net/{name}")).unwrap();
    // The reference lets the kernel look for duplicates of the bridge's own IPv6 address; for that time it cannot be used.
    let bridge_addresses: Vec<Value> =
        addresses(&["-j", "addr", "show", bridge]).into_iter().map(|a| with(&a, "tentative", &Value::Null)).collect();
    json!({
        "pod addresses": addresses(&["-n", "pod", "-j", "addr", "show", "eth0"]),
        "pod routes": routes(&["-n", "pod", "-j", "route"]),
        "pod routes 6": routes(&["-n", "pod", "-6", "-j", "route"]),
        "bridge addresses": bridge_addresses,
        "eth0": [eth0[0]["mtu"], eth0[0]["operstate"], up(&eth0[0])],
        "port": [port[0]["mtu"], up(&port[0]), port[0]["linkinfo"]["info_slave_data"]["hairpin"], port[0]["linkinfo"]["info_slave_data"]["isolated"]],
        "bridge": [bridge_link[0]["mtu"], up(&bridge_link[0]), bridge_link[0]["promiscuity"]],
        "forward": [sysctl("ipv4/ip_forward"), sysctl("ipv6/conf/all/forwarding")],
    })
}

fn normalise(result: &Value) -> Value {
    let mut result = result.clone();
    for interface in result["interfaces"].as_array_mut().unwrap() {
        interface["mac"] = json!("mac");
        if interface["name"].as_str().unwrap().starts_with("veth") {
            interface["name"] = json!("veth");
        }
    }
    result
}

#[test]
fn bridge_builds_what_the_reference_builds() {
    in_namespaces(|| {
        install();
        let both = json!([[{"subnet": "10.9.0.0/24"}], [{"subnet": "fd09::/64"}]]);
        let configs = [
            json!({"bridge": "br9", "isGateway": true, "ipMasq": true, "hairpinMode": true,
                "ipam": {"type": "host-local", "subnet": "10.9.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]}}),
            json!({"bridge": "br9", "isDefaultGateway": true, "mtu": 1400, "ipam": {"type": "host-local", "ranges": both}}),
            json!({"bridge": "br9", "isGateway": true, "promiscMode": true,
                "ipam": {"type": "host-local", "ranges": both, "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}, {"dst": "10.50.0.0/16", "gw": "10.9.0.77"}]}}),
            json!({"bridge": "br9", "ipam": {"type": "host-local", "subnet": "10.9.0.0/24", "rangeStart": "10.9.0.40"}}),
            json!({"bridge": "br9"}),
        ];
        for config in configs {
            for version in ["0.3.1", "0.4.0", "1.0.0"] {
                let build = |dir: &str| {
                    let mut config = with(&with(&config, "cniVersion", &json!(version)), "name", &json!("net"));
                    config["type"] = json!("bridge");
                    if !config["ipam"].is_null() {
                        config["ipam"]["dataDir"] = json!(format!("/run/t/leases{dir}"));
                    }
                    let pod = Namespace::new("pod");
                    let call = Call { dir, plugin: "bridge", id: "pod", netns: Some(&pod.path) };
                    let result = call.run("ADD", &config).unwrap();
                    let seen = observe("br9");
                    if version != "0.3.1" {
                        let checked = call.run("CHECK", &with(&config, "prevResult", &result));
                        assert!(checked.is_ok() || config["ipam"].is_null(), "{checked:?}");
                    }
                    let previous = with(&config, "prevResult", &result);
                    call.run("DEL", &previous).unwrap();
                    assert_eq!(json("ip", &["-j", "link", "show", "master", "br9"]), json!([]));
                    call.run("DEL", &previous).unwrap();
                    pod.delete();
                    Call { netns: None, ..call }.run("DEL", &previous).unwrap();
                    run("ip", &["link", "del", "br9"]);
                    for sysctl in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                        std::fs::write(format!("/proc/sys/net/{sysctl}"), "0").unwrap();
                    }
                    let _ = std::fs::remove_dir_all(format!("/run/t/leases{dir}"));
                    (normalise(&result), seen)
                };
                let (ours, reference) = (build(OURS), build(REFERENCE));
                assert_eq!(ours.0, reference.0, "result of {config} {version}");
                assert_eq!(ours.1, reference.1, "kernel after {config} {version}");
            }
        }
    });
}

#[test]
fn a_chain_of_our_programs_opens_and_closes_host_ports() {
    in_namespaces(|| {
        install();
        let pod = Namespace::new("pod");
        pod.serve(80);
        let call = |plugin| Call { dir: OURS, plugin, id: "pod", netns: Some(&pod.path) };
        let common = |plugin: &str| json!({"cniVersion": "1.1.0", "name": "net", "type": plugin});
        let mut bridge = common("bridge");
        bridge["isGateway"] = json!(true);
        bridge["ipMasq"] = json!(true);
        bridge["ipam"] = json!({"type": "host-local", "subnet": "10.9.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]});
        let result = call("bridge").run("ADD", &bridge).unwrap();
        let mut portmap = common("portmap");
        portmap["runtimeConfig"] =
            json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""}]});
        portmap["prevResult"] = result.clone();
        assert_eq!(call("portmap").run("ADD", &portmap).unwrap(), result);
        assert_eq!(who(ask("127.0.0.1:8080")), "pod");
        call("portmap").run("CHECK", &portmap).unwrap();
        call("portmap").run("STATUS", &common("portmap")).unwrap();
        let mut loopback = common("loopback");
        assert_eq!(
            call("loopback").run_with("ADD", &loopback, &[("CNI_IFNAME", "lo")]).unwrap()["ips"][0]["address"],
            "127.0.0.1/8"
        );
        loopback["prevResult"] = result.clone();
        assert_eq!(call("loopback").run_with("ADD", &loopback, &[("CNI_IFNAME", "lo")]).unwrap(), result);
        // GC keeps those who are named.
        let gc = |id: &str| json!([{"containerID": id, "ifname": "eth0"}]);
        call("portmap").run("GC", &with(&portmap, "cni.dev/valid-attachments", &gc("pod"))).unwrap();
        assert_eq!(who(ask("127.0.0.1:8080")), "pod");
        call("portmap").run("GC", &with(&portmap, "cni.dev/valid-attachments", &gc("other"))).unwrap();
        assert!(ask("127.0.0.1:8080").is_err());
        assert!(call("portmap").run("CHECK", &portmap).is_err());
        call("portmap").run("ADD", &portmap).unwrap();
        portmap.as_object_mut().unwrap().remove("prevResult");
        call("portmap").run("DEL", &portmap).unwrap();
        assert!(ask("127.0.0.1:8080").is_err());
        call("bridge").run("DEL", &bridge).unwrap();
    });
}

#[test]
fn errors_are_the_protocol_s() {
    in_namespaces(|| {
        install();
        let pod = Namespace::new("pod");
        let call = |plugin| Call { dir: OURS, plugin, id: "pod", netns: Some(&pod.path) };
        let config = json!({"cniVersion": "1.0.0", "name": "net", "type": "bridge"});
        let code = |done: Result<Value, Value>| done.unwrap_err()["code"].as_u64().unwrap();
        assert_eq!(code(call("bridge").run_with("ADD", &config, &[("CNI_CONTAINERID", "")])), 4);
        assert_eq!(code(call("bridge").run_with("ADD", &config, &[("CNI_NETNS", "")])), 4);
        assert_eq!(code(call("bridge").run_with("ADD", &config, &[("CNI_IFNAME", "a/b")])), 4);
        assert_eq!(code(call("bridge").run_with("ADD", &config, &[("CNI_PATH", "")])), 4);
        assert_eq!(code(call("bridge").run_with("ADD", &config, &[("CNI_ARGS", "IP=10.0.0.1")])), 4);
        assert_eq!(code(call("bridge").run_with("ADD", &config, &[("CNI_NETNS", "/proc/self/ns/net")])), 4);
        assert_eq!(code(call("bridge").run_with("ADD", &config, &[("CNI_NETNS", "/none")])), 5);
        assert_eq!(code(call("bridge").run("FLY", &config)), 4);
        assert_eq!(code(call("bridge").run("ADD", &json!("x"))), 6);
        assert_eq!(code(call("bridge").run("ADD", &with(&config, "cniVersion", &json!("0.2.0")))), 1);
        assert_eq!(code(call("bridge").run("ADD", &with(&config, "vlan", &json!(7)))), 2);
        assert_eq!(code(call("bridge").run("ADD", &with(&config, "isGateway", &json!(true)))), 7);
        assert_eq!(code(call("portmap").run("ADD", &config)), 7, "portmap needs a previous result");
        assert_eq!(code(call("bridge").run("GC", &config)), 1);
        let text = call("bridge").run("ADD", &with(&config, "vlan", &json!(7))).unwrap_err();
        assert_eq!(text["msg"], r#"bridge: unsupported field "vlan" with value 7"#);
        for plugin in berth_cni::plugin::TYPES {
            let versions = call(plugin).run_with("VERSION", &json!({"cniVersion": "1.0.0"}), &[("CNI_PATH", "")]).unwrap();
            assert!(versions["supportedVersions"].as_array().unwrap().contains(&json!("1.1.0")));
        }
        // Nothing was made on the way.
        assert!(links("veth").is_empty() && links("cni0").is_empty());
    });
}

fn chain_conf(dir: &Path, version: &str) {
    std::fs::create_dir_all(dir.join("net.d")).unwrap();
    let conf = json!({"cniVersion": version, "name": "net", "plugins": [
        {"type": "bridge", "bridge": "br9", "isGateway": true, "ipMasq": true,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.9.0.0/28"}]], "routes": [{"dst": "0.0.0.0/0"}], "dataDir": "/run/t/leases"}},
        {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true},
    ]});
    std::fs::write(dir.join("net.d/10-net.conflist"), conf.to_string()).unwrap();
}

/// One configuration, three ways to run it: in-process, our programs, the reference's programs.
#[test]
fn a_configured_chain_works_with_anybody_s_plugins() {
    in_namespaces(|| {
        install();
        block_on(async {
            for (at, (bin_dir, external)) in [(REFERENCE, false), (OURS, true), (REFERENCE, true)].into_iter().enumerate() {
                let dir = PathBuf::from(format!("/run/t/{at}"));
                chain_conf(&dir, if bin_dir == REFERENCE { "1.0.0" } else { "1.1.0" });
                let mut config = config(&dir);
                config.bin_dirs = vec![bin_dir.into()];
                config.prefer_external = external;
                let network = Network::load(config.clone()).unwrap();
                let status = network.status().await;
                assert!(status.ready && status.network == "net" && status.source.is_some(), "{status:?}");
                assert_eq!(network.needs_netns_path(), external);
                let id = format!("pod{at}");
                let web = with_port(pod(&id), None, 8080, 80, Protocol::Tcp);
                let (namespace, attachment) = attach(&network, &web).await;
                namespace.serve(80);
                let ip = attachment.pod_ips()[0];
                assert!(ip.to_string().starts_with("10.9.0."), "{attachment:?}");
                assert!(attachment.mac.is_some());
                assert_eq!(who(ask(&format!("{ip}:80"))), id);
                assert_eq!(who(ask("127.0.0.1:8080")), id);
                // The reference's portmap looks for IPv6 rules that a pod with IPv4 alone does not have.
                if !(external && bin_dir == REFERENCE) {
                    network.check(&web, namespace.netns()).await.unwrap();
                }
                // A new agent knows what the old one did.
                drop(network);
                let network = Network::load(config).unwrap();
                assert_eq!(network.attachment(&id), Some(attachment));
                network.reconcile(&live(&[&id])).await.unwrap();
                assert_eq!(who(ask("127.0.0.1:8080")), id);
                std::fs::remove_file(dir.join("net.d/10-net.conflist")).unwrap();
                network.detach(&pod(&id), Some(namespace.netns())).await.unwrap();
                assert!(network.settle(PATIENCE).await);
                assert!(ask("127.0.0.1:8080").is_err());
                let leases =
                    std::fs::read_dir("/run/t/leases/net").unwrap().flatten().map(|e| e.file_name().into_string().unwrap());
                assert_eq!(leases.filter(|name| name.starts_with("10.")).count(), 0);
                assert_eq!(network.leaks(&live(&[])).await.unwrap(), []);
                run("ip", &["link", "del", "br9"]);
            }
        });
    });
}

/// A plugin that writes down how it was called, and does what a file says.
fn script(dir: &Path, name: &str) {
    std::fs::create_dir_all(dir).unwrap();
    let text = format!(
        r#"#!/bin/sh
input=$(cat)
printf '%s %s\n' "$CNI_COMMAND" {name} >> /run/t/calls
printf '%s' "$input" > "/run/t/{name}.$CNI_COMMAND.json"
env | grep ^CNI_ | sort > "/run/t/{name}.$CNI_COMMAND.env"
if [ -e /run/t/{name}.fail.$CNI_COMMAND ]; then cat /run/t/{name}.fail.$CNI_COMMAND; exit 1; fi
if [ -e /run/t/{name}.hang.$CNI_COMMAND ]; then sleep 1000 & echo $! > /run/t/{name}.child; wait; fi
if [ -e /run/t/{name}.says.$CNI_COMMAND ]; then cat /run/t/{name}.says.$CNI_COMMAND; exit 0; fi
if [ "$CNI_COMMAND" = ADD ]; then echo '{{"cniVersion":"1.1.0","interfaces":[{{"name":"eth0","sandbox":"x"}}],"ips":[{{"interface":0,"address":"10.5.0.2/24"}}],"dns":{{}}}}'; fi
"#
    );
    berth_testkit::write_program(&dir.join(name), &text);
}

fn calls() -> Vec<String> {
    let text = std::fs::read_to_string("/run/t/calls").unwrap_or_default();
    let _ = std::fs::remove_file("/run/t/calls");
    text.lines().map(str::to_owned).collect()
}

fn scripted(extra: &Value) -> Network {
    let dir = Path::new("/run/t");
    for name in ["first", "second"] {
        script(&dir.join("scripts"), name);
    }
    std::fs::create_dir_all(dir.join("net.d")).unwrap();
    let mut conf = json!({"cniVersion": "1.1.0", "name": "net", "plugins": [
        {"type": "first", "capabilities": {"portMappings": true, "dns": true}},
        {"type": "second", "capabilities": {"bandwidth": true, "cgroupPath": true, "io.kubernetes.cri.pod-annotations": true}, "custom": {"a": [1]}},
    ]});
    for (key, value) in extra.as_object().unwrap() {
        conf[key] = value.clone();
    }
    std::fs::write(dir.join("net.d/10-net.conflist"), conf.to_string()).unwrap();
    let mut config = config(dir);
    config.bin_dirs = vec!["/run/t/none".into(), dir.join("scripts")];
    config.plugin_timeout = std::time::Duration::from_secs(5);
    Network::load(config).unwrap()
}

fn read(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(Path::new("/run/t").join(name)).unwrap()).unwrap()
}

#[test]
fn external_plugins_get_what_the_protocol_says() {
    in_namespaces(|| {
        block_on(async {
            let network = scripted(&json!({}));
            assert!(network.status().await.ready);
            assert_eq!(calls(), ["STATUS first", "STATUS second"]);
            let mut pod = with_port(with_port(pod("abc"), None, 8080, 80, Protocol::Tcp), None, 0, 81, Protocol::Tcp);
            pod.dns = Some(berth_cni::Dns { servers: vec!["10.0.0.1".into()], ..Default::default() });
            pod.bandwidth = Some(berth_cni::Bandwidth { ingress_rate: 1000, ..Default::default() });
            pod.cgroup_path = Some("/kubepods/x".into());
            pod.annotations.insert("k".into(), "v".into());
            let (namespace, attachment) = attach(&network, &pod).await;
            assert_eq!(attachment.pod_ips()[0].to_string(), "10.5.0.2");
            assert_eq!(calls(), ["ADD first", "ADD second"]);
            let first = read("first.ADD.json");
            assert_eq!(
                (&first["name"], &first["cniVersion"], &first["prevResult"]),
                (&json!("net"), &json!("1.1.0"), &Value::Null)
            );
            assert_eq!(
                first["runtimeConfig"],
                json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
                "dns": {"servers": ["10.0.0.1"], "searches": [], "options": []}})
            );
            let second = read("second.ADD.json");
            assert_eq!(second["runtimeConfig"]["bandwidth"]["ingressRate"], 1000);
            assert_eq!(second["runtimeConfig"]["cgroupPath"], "/kubepods/x");
            assert_eq!(second["runtimeConfig"]["io.kubernetes.cri.pod-annotations"], json!({"k": "v"}));
            assert_eq!(
                (&second["custom"]["a"][0], &second["prevResult"]["ips"][0]["address"]),
                (&json!(1), &json!("10.5.0.2/24"))
            );
            let env = std::fs::read_to_string("/run/t/first.ADD.env").unwrap();
            for line in [
                "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=pod-abc;K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=uid-abc",
                "CNI_CONTAINERID=abc",
                "CNI_IFNAME=eth0",
                "CNI_NETNS=/run/netns/abc",
                "CNI_PATH=/run/t/none:/run/t/scripts",
            ] {
                assert!(env.lines().any(|l| l == line), "{line} in {env}");
            }
            network.check(&pod, namespace.netns()).await.unwrap();
            assert_eq!(calls(), ["CHECK first", "CHECK second"]);
            network.reconcile(&live(&["abc"])).await.unwrap();
            assert_eq!(calls(), ["GC first", "GC second"]);
            assert_eq!(read("first.GC.json")["cni.dev/valid-attachments"], json!([{"containerID": "abc", "ifname": "eth0"}]));
            network.detach(&support::pod("abc"), None).await.unwrap();
            assert_eq!(calls(), ["DEL second", "DEL first"]);
            assert_eq!(read("first.DEL.json")["prevResult"]["ips"][0]["address"], "10.5.0.2/24");
            assert_eq!(read("first.DEL.json")["runtimeConfig"], first["runtimeConfig"], "from the cache");
            assert!(std::fs::read_to_string("/run/t/first.DEL.env").unwrap().contains("CNI_NETNS=\n"));
            assert_eq!(network.leaks(&live(&[])).await.unwrap(), []);
        });
    });
}

#[test]
fn a_failed_add_is_undone_in_reverse_and_a_failed_del_is_tried_again() {
    in_namespaces(|| {
        block_on(async {
            let network = scripted(&json!({"disableCheck": true, "disableGC": true}));
            let namespace = Namespace::new("abc");
            std::fs::write("/run/t/second.fail.ADD", r#"{"cniVersion":"1.1.0","code":11,"msg":"later","details":"maybe"}"#)
                .unwrap();
            let error = network.attach(&pod("abc"), namespace.netns()).await.unwrap_err();
            assert_eq!(error.to_string(), r#"plugin type="second" failed (ADD): later; maybe"#);
            assert_eq!(error.cni_code(), 11);
            assert_eq!(calls(), ["ADD first", "ADD second", "DEL second", "DEL first"]);
            assert_eq!(network.attachment("abc"), None);
            std::fs::remove_file("/run/t/second.fail.ADD").unwrap();
            network.attach(&pod("abc"), namespace.netns()).await.unwrap();
            network.check(&pod("abc"), namespace.netns()).await.unwrap();
            network.reconcile(&live(&["abc"])).await.unwrap();
            assert_eq!(calls(), ["ADD first", "ADD second"], "neither CHECK nor GC");
            std::fs::write("/run/t/second.fail.DEL", "not json").unwrap();
            let error = network.detach(&pod("abc"), None).await.unwrap_err();
            assert_eq!(error.to_string(), r#"plugin type="second" failed (DEL): not json"#);
            assert_eq!(calls(), ["DEL second", "DEL first"], "the others are called all the same");
            std::fs::remove_file("/run/t/second.fail.DEL").unwrap();
            // The sandbox died with the agent: the next one finds the record.
            drop(network);
            let network = scripted(&json!({}));
            calls();
            network.reconcile(&live(&[])).await.unwrap();
            assert_eq!(calls(), ["DEL second", "DEL first", "GC first", "GC second"]);
            assert_eq!(network.leaks(&live(&[])).await.unwrap(), []);
        });
    });
}

#[test]
fn a_result_without_an_address_is_a_failure_and_undone() {
    in_namespaces(|| {
        block_on(async {
            let network = scripted(&json!({"disableCheck": true, "disableGC": true}));
            let namespace = Namespace::new("abc");
            std::fs::write("/run/t/second.says.ADD", r#"{"cniVersion":"1.1.0"}"#).unwrap();
            let error = network.attach(&pod("abc"), namespace.netns()).await.unwrap_err();
            assert_eq!(error.to_string(), "the plugins of network net gave the pod no address");
            assert_eq!(calls(), ["ADD first", "ADD second", "DEL second", "DEL first"]);
            assert_eq!(network.attachment("abc"), None);
        });
    });
}

#[test]
fn a_plugin_that_hangs_is_killed_with_its_children() {
    in_namespaces(|| {
        block_on(async {
            let network = scripted(&json!({}));
            let namespace = Namespace::new("abc");
            std::fs::write("/run/t/first.hang.ADD", "").unwrap();
            let error = network.attach(&pod("abc"), namespace.netns()).await.unwrap_err();
            assert_eq!(error.to_string(), r#"plugin "first" of network "net" (ADD) did not end within 5s and was killed"#);
            let child = std::fs::read_to_string("/run/t/first.child").unwrap();
            let gone = || !Path::new("/proc").join(child.trim()).exists();
            assert!(berth_testkit::wait_until(PATIENCE, gone), "the plugin's child lives");
            assert_eq!(calls(), ["ADD first", "DEL second", "DEL first"]);
        });
    });
}

#[test]
fn what_cannot_run_is_reported_by_name() {
    in_namespaces(|| {
        block_on(async {
            let dir = Path::new("/run/t/conf");
            std::fs::create_dir_all(dir.join("net.d")).unwrap();
            let network = Network::load(config(dir)).unwrap();
            assert_eq!((network.status().await.ready, network.status().await.source), (true, None));
            let write = |name: &str, text: &str| std::fs::write(dir.join("net.d").join(name), text).unwrap();
            write("10-a.conflist", r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge","vlan":5}]}"#);
            let status = network.status().await;
            assert!(!status.ready && status.reason == "NetworkPluginNotReady");
            assert!(
                status.message.contains("10-a.conflist") && status.message.contains(r#"unsupported field "vlan" with value 5"#),
                "{}",
                status.message
            );
            write("20-b.conflist", r#"{"cniVersion":"1.0.0","name":"b","plugins":[{"type":"nobody-has-this"}]}"#);
            let status = network.status().await;
            assert!(!status.ready && status.message.contains("nobody-has-this"), "{}", status.message);
            assert_eq!(status.invalid.len(), 1);
            write("15-c.conf", r#"{"cniVersion":"1.0.0","name":"c","type":"loopback"}"#);
            assert_eq!(network.status().await.network, "c");
            // A pod must not be given the host's own namespace.
            let own = berth_cni::Netns { fd: std::fs::File::open("/proc/self/ns/net").unwrap().into(), path: None };
            assert_eq!(
                network.attach(&pod("x"), own).await.unwrap_err().to_string(),
                r#"invalid network namespace "the host's own""#
            );
        });
    });
}

#[test]
fn our_bridge_takes_addresses_from_anybody_s_ipam() {
    in_namespaces(|| {
        block_on(async {
            let dir = Path::new("/run/t/static");
            std::fs::create_dir_all(dir.join("net.d")).unwrap();
            let conf = json!({"cniVersion": "1.0.0", "name": "net", "plugins": [
                {"type": "bridge", "bridge": "br9", "isGateway": true,
                    "ipam": {"type": "static", "addresses": [{"address": "10.9.0.7/24", "gateway": "10.9.0.1"}], "routes": [{"dst": "0.0.0.0/0"}]}},
            ]});
            std::fs::write(dir.join("net.d/10-net.conflist"), conf.to_string()).unwrap();
            let network = Network::load(config(dir)).unwrap();
            assert!(network.needs_netns_path());
            let (namespace, attachment) = attach(&network, &pod("a")).await;
            assert_eq!(attachment.pod_ips()[0].to_string(), "10.9.0.7");
            namespace.serve(80);
            assert_eq!(who(ask("10.9.0.7:80")), "a");
            network.check(&pod("a"), namespace.netns()).await.unwrap();
            network.detach(&pod("a"), Some(namespace.netns())).await.unwrap();
            // Another's address may be given out again at once, so the link is gone already.
            assert!(links("vabc123").is_empty());
        });
    });
}
