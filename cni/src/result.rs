//! CNI results in one internal form, and their JSON in every version that is spoken here.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{Cidr, Error, Result};

/// A version of the CNI specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum CniVersion {
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl CniVersion {
    pub(crate) const ALL: [Self; 5] = [Self::V0_3_0, Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// CHECK exists since 0.4.0.
    pub(crate) fn has_check(self) -> bool {
        self >= Self::V0_4_0
    }

    /// STATUS and GC exist since 1.1.0.
    pub(crate) fn has_status_and_gc(self) -> bool {
        self >= Self::V1_1_0
    }
}

impl fmt::Display for CniVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for CniVersion {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|v| v.name() == text).ok_or(())
    }
}

/// An interface in a result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Interface {
    pub name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mac: String,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub mtu: u32,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub socket_path: String,
    #[serde(rename = "pciID", default, skip_serializing_if = "String::is_empty")]
    pub pci_id: String,
}

/// An address in a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IpConfig {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
    pub address: Cidr,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "optional_ip")]
    pub gateway: Option<IpAddr>,
}

/// A route, in IPAM configurations and in results.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Route {
    pub dst: Cidr,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "optional_ip")]
    pub gw: Option<IpAddr>,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub mtu: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub advmss: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub priority: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<u8>,
}

impl Route {
    pub(crate) fn new(dst: Cidr, gw: Option<IpAddr>) -> Self {
        Self { dst, gw, mtu: 0, advmss: 0, priority: 0, table: None, scope: None }
    }
}

/// DNS settings in a result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ResultDns {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub domain: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

fn is_zero(value: &u32) -> bool {
    *value == 0
}

/// An address that Go writes as a string and may write as "".
pub(crate) mod optional_ip {
    use std::net::IpAddr;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(ip: &Option<IpAddr>, serializer: S) -> Result<S::Ok, S::Error> {
        match ip {
            Some(ip) => serializer.collect_str(ip),
            None => serializer.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<IpAddr>, D::Error> {
        match Option::<String>::deserialize(deserializer)?.as_deref() {
            None | Some("") => Ok(None),
            Some(text) => text.parse().map(Some).map_err(serde::de::Error::custom),
        }
    }
}

/// The result of ADD.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct CniResult {
    #[serde(default)]
    pub interfaces: Vec<Interface>,
    #[serde(default)]
    pub ips: Vec<IpConfig>,
    #[serde(default)]
    pub routes: Vec<Route>,
    #[serde(default)]
    pub dns: ResultDns,
}

impl CniResult {
    /// Reads a result of any version that is spoken here; `fallback` is the version of one that does not say its own.
    pub(crate) fn parse(value: &Value, fallback: CniVersion, what: &str) -> Result<Self> {
        if let Some(version) = value.get("cniVersion").and_then(Value::as_str).filter(|v| !v.is_empty()) {
            version.parse::<CniVersion>().map_err(|()| Error::Version { what: what.to_owned(), version: version.to_owned() })?;
        }
        // The fields that older versions lack are optional, and `version` in an address says what the address says itself.
        let _ = fallback;
        let mut value = value.clone();
        relax_routes(&mut value);
        serde_json::from_value(value).map_err(Error::decode(what))
    }

    /// The JSON of this result in `version`.
    pub(crate) fn to_json(&self, version: CniVersion) -> Value {
        let mut out = Map::new();
        out.insert("cniVersion".into(), json!(version.name()));
        if !self.interfaces.is_empty() {
            let interfaces: Vec<Value> = self.interfaces.iter().map(|i| interface_json(i, version)).collect();
            out.insert("interfaces".into(), interfaces.into());
        }
        if !self.ips.is_empty() {
            let ips: Vec<Value> = self.ips.iter().map(|ip| ip_json(ip, version)).collect();
            out.insert("ips".into(), ips.into());
        }
        if !self.routes.is_empty() {
            let routes: Vec<Value> = self.routes.iter().map(|route| route_json(route, version)).collect();
            out.insert("routes".into(), routes.into());
        }
        out.insert("dns".into(), json!(self.dns));
        Value::Object(out)
    }

    /// Addresses of the pod itself: those of an interface inside the sandbox, or of no named interface.
    pub(crate) fn pod_ips(&self) -> impl Iterator<Item = &IpConfig> {
        self.ips.iter().filter(|ip| {
            let interface = ip.interface.and_then(|index| self.interfaces.get(index));
            interface.is_none_or(|interface| !interface.sandbox.is_empty())
        })
    }
}

/// Routes may carry fields of later versions: only what is known is read.
fn relax_routes(value: &mut Value) {
    const KNOWN: [&str; 7] = ["dst", "gw", "mtu", "advmss", "priority", "table", "scope"];
    let routes = value.get_mut("routes").and_then(Value::as_array_mut);
    for route in routes.into_iter().flatten().filter_map(Value::as_object_mut) {
        route.retain(|key, _| KNOWN.contains(&key.as_str()));
    }
}

fn interface_json(interface: &Interface, version: CniVersion) -> Value {
    let mut value = json!(interface);
    if version < CniVersion::V1_1_0
        && let Some(object) = value.as_object_mut()
    {
        object.retain(|key, _| matches!(key.as_str(), "name" | "mac" | "sandbox"));
    }
    value
}

fn ip_json(ip: &IpConfig, version: CniVersion) -> Value {
    let mut out = Map::new();
    if version < CniVersion::V1_0_0 {
        out.insert("version".into(), json!(if ip.address.is_ipv4() { "4" } else { "6" }));
    }
    if let Value::Object(fields) = json!(ip) {
        out.extend(fields);
    }
    Value::Object(out)
}

fn route_json(route: &Route, version: CniVersion) -> Value {
    let mut value = json!(route);
    if version < CniVersion::V1_1_0
        && let Some(object) = value.as_object_mut()
    {
        object.retain(|key, _| matches!(key.as_str(), "dst" | "gw"));
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Value {
        json!({
            "cniVersion": "1.1.0",
            "interfaces": [{"name": "cni0", "mac": "aa:bb:cc:dd:ee:ff"}, {"name": "eth0", "mac": "0a:58:0a:00:00:02", "mtu": 1450, "sandbox": "/run/netns/x"}],
            "ips": [{"interface": 1, "address": "10.0.0.2/24", "gateway": "10.0.0.1"}, {"interface": 1, "address": "fd00::2/64"}],
            "routes": [{"dst": "0.0.0.0/0", "priority": 5, "table": 7}, {"dst": "::/0", "gw": "fd00::1"}],
            "dns": {"nameservers": ["10.0.0.1"]}
        })
    }

    #[test]
    fn a_result_survives_a_round_trip_in_its_own_version() {
        let result = CniResult::parse(&sample(), CniVersion::V1_1_0, "test").unwrap();
        assert_eq!(result.to_json(CniVersion::V1_1_0), sample());
    }

    #[test]
    fn older_versions_get_only_what_they_know() {
        let result = CniResult::parse(&sample(), CniVersion::V1_1_0, "test").unwrap();
        let old = result.to_json(CniVersion::V0_4_0);
        assert_eq!(old["cniVersion"], "0.4.0");
        assert_eq!(old["ips"][0], json!({"version": "4", "interface": 1, "address": "10.0.0.2/24", "gateway": "10.0.0.1"}));
        assert_eq!(old["ips"][1]["version"], "6");
        assert_eq!(old["interfaces"][1], json!({"name": "eth0", "mac": "0a:58:0a:00:00:02", "sandbox": "/run/netns/x"}));
        assert_eq!(old["routes"][0], json!({"dst": "0.0.0.0/0"}));
        assert!(result.to_json(CniVersion::V1_0_0)["ips"][0].get("version").is_none());
    }

    #[test]
    fn an_older_result_is_read() {
        let old = json!({"cniVersion": "0.3.1", "ips": [{"version": "4", "address": "10.0.0.2/24", "gateway": ""}], "dns": {}});
        let result = CniResult::parse(&old, CniVersion::V0_3_1, "test").unwrap();
        assert_eq!(result.ips.len(), 1);
        assert_eq!(result.ips[0].gateway, None);
        assert_eq!(result.pod_ips().count(), 1);
    }

    #[test]
    fn an_unknown_version_is_refused() {
        let error = CniResult::parse(&json!({"cniVersion": "0.2.0"}), CniVersion::V1_0_0, "test").unwrap_err();
        assert_eq!(error.cni_code(), 1);
    }

    #[test]
    fn addresses_of_host_interfaces_are_not_the_pod_s() {
        let result = json!({"cniVersion": "1.0.0", "interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": "x"}],
            "ips": [{"interface": 0, "address": "10.0.0.1/24"}, {"interface": 1, "address": "10.0.0.2/24"}]});
        let result = CniResult::parse(&result, CniVersion::V1_0_0, "test").unwrap();
        assert_eq!(result.pod_ips().map(|ip| ip.address.to_string()).collect::<Vec<_>>(), ["10.0.0.2/24"]);
    }
}
