//! The result of a pod's network in the shape in which containerd shows it (`CNIResult` of its go-cni): tools look there for
//! addresses by the interface's name. Pure.

use std::path::Path;

use serde_json::{Map, Value, json};

/// Of a CNI result of any version since 0.3.0. `netns` is where the pod's network namespace is; `ipv6` says whether its loopback
/// has an address of that family.
pub(super) fn shown(result: &Value, netns: Option<&Path>, ipv6: bool) -> Value {
    let empty = Vec::new();
    let list = |key: &str| result.get(key).and_then(Value::as_array).unwrap_or(&empty);
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let mut interfaces = Map::new();
    interfaces.insert("lo".into(), loopback(netns, ipv6));
    // Where a result names no interface, its addresses are the pod's.
    interfaces.insert("eth0".into(), interface("", netns.map(|p| p.display().to_string()).unwrap_or_default()));
    for given in list("interfaces") {
        let sandbox = match text(given, "sandbox") {
            // What stands there when no plugin of another program needs a path is a mark, not a path.
            mark if !mark.is_empty() && !mark.starts_with('/') => netns.map(|p| p.display().to_string()).unwrap_or(mark),
            path => path,
        };
        interfaces.insert(text(given, "name"), interface(&text(given, "mac"), sandbox));
    }
    for ip in list("ips") {
        let index = ip.get("interface").and_then(Value::as_u64);
        let named = index.and_then(|i| list("interfaces").get(usize::try_from(i).ok()?));
        let name = named.map_or_else(|| "eth0".to_owned(), |i| text(i, "name"));
        let address = text(ip, "address");
        let config = json!({ "IP": address.split('/').next().unwrap_or_default(), "Gateway": text(ip, "gateway") });
        if let Some(configs) = interfaces.get_mut(&name).and_then(|i| i.get_mut("IPConfigs")) {
            match configs.as_array_mut() {
                Some(configs) => configs.push(config),
                None => *configs = json!([config]),
            }
        }
    }
    json!({
        "Interfaces": interfaces,
        "DNS": [result.get("dns").cloned().unwrap_or_else(|| json!({})), {}],
        "Routes": list("routes"),
    })
}

/// An interface without addresses has no list of them, as in containerd.
fn interface(mac: &str, sandbox: String) -> Value {
    json!({ "IPConfigs": null, "Mac": mac, "Sandbox": sandbox })
}

fn loopback(netns: Option<&Path>, ipv6: bool) -> Value {
    let mut lo = interface("00:00:00:00:00:00", netns.map(|p| p.display().to_string()).unwrap_or_default());
    let mut ips = vec!["127.0.0.1"];
    if ipv6 {
        ips.push("::1");
    }
    lo["IPConfigs"] = ips.iter().map(|ip| json!({ "IP": ip, "Gateway": "" })).collect();
    lo
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_shown_by_interfaces_in_containerds_shape() {
        let result = json!({
            "cniVersion": "1.0.0",
            "interfaces": [
                { "name": "cni0", "mac": "aa:aa:aa:aa:aa:aa" },
                { "name": "eth0", "mac": "bb:bb:bb:bb:bb:bb", "sandbox": "0123" },
            ],
            "ips": [{ "interface": 1, "address": "10.88.0.2/16", "gateway": "10.88.0.1" }],
            "routes": [{ "dst": "0.0.0.0/0", "gw": "10.88.0.1" }],
            "dns": {},
        });
        let shown = shown(&result, Some(Path::new("/proc/7/fd/9")), true);
        let want = json!({
            "Interfaces": {
                "cni0": { "IPConfigs": null, "Mac": "aa:aa:aa:aa:aa:aa", "Sandbox": "" },
                "eth0": {
                    "IPConfigs": [{ "IP": "10.88.0.2", "Gateway": "10.88.0.1" }],
                    "Mac": "bb:bb:bb:bb:bb:bb",
                    "Sandbox": "/proc/7/fd/9",
                },
                "lo": {
                    "IPConfigs": [{ "IP": "127.0.0.1", "Gateway": "" }, { "IP": "::1", "Gateway": "" }],
                    "Mac": "00:00:00:00:00:00",
                    "Sandbox": "/proc/7/fd/9",
                },
            },
            "DNS": [{}, {}],
            "Routes": [{ "dst": "0.0.0.0/0", "gw": "10.88.0.1" }],
        });
        assert_eq!(shown, want);
    }

    #[test]
    fn addresses_without_an_interface_are_the_pods_and_a_path_stays() {
        let bare = shown(&json!({ "ips": [{ "address": "fd00::2/64" }] }), None, false);
        assert_eq!(bare["Interfaces"]["eth0"]["IPConfigs"], json!([{ "IP": "fd00::2", "Gateway": "" }]));
        assert_eq!(bare["Interfaces"]["lo"]["IPConfigs"], json!([{ "IP": "127.0.0.1", "Gateway": "" }]));
        let given = json!({ "interfaces": [{ "name": "eth0", "sandbox": "/run/netns/x" }] });
        assert_eq!(shown(&given, Some(Path::new("/y")), false)["Interfaces"]["eth0"]["Sandbox"], "/run/netns/x");
    }
}
