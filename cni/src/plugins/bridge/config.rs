//! The bridge plugin's configuration.

use std::path::Path;

use serde_json::{Value, json};

use crate::names::check_ifname;
use crate::plugins::Config;
use crate::plugins::fields::Fields;
use crate::plugins::host_local::HostLocal;
use crate::{Error, Result};

const PLUGIN: &str = "bridge";

/// Who hands out addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ipam {
    /// Nobody: the pod gets a link without addresses.
    None,
    HostLocal(HostLocal),
    /// A plugin binary of this type.
    External(String),
}

/// The configuration, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bridge {
    pub name: String,
    pub is_gateway: bool,
    pub is_default_gateway: bool,
    pub force_address: bool,
    pub masquerade: bool,
    pub mtu: Option<u32>,
    pub hairpin: bool,
    pub promiscuous: bool,
    pub isolated: bool,
    pub detect_duplicates: bool,
    pub mac: Option<String>,
    pub ipam: Ipam,
}

impl Bridge {
    pub(crate) fn parse(config: &Config, lease_dir: &Path) -> Result<Self> {
        let ipam = Self::parse_ipam(config, lease_dir)?;
        let mut fields = Fields::of_plugin(PLUGIN, config);
        fields.take::<Value>("ipam")?;
        for (name, harmless) in [
            ("vlan", json!(0)),
            ("vlanTrunk", json!([])),
            ("macspoofchk", json!(false)),
            ("disableContainerInterface", json!(false)),
            ("ipMasqBackend", json!("nftables")),
        ] {
            fields.only(name, &[harmless, json!("")])?;
        }
        // Means something together with vlan alone.
        fields.take::<bool>("preserveDefaultVlan")?;
        let is_default_gateway = fields.flag("isDefaultGateway")?;
        let bridge = Self {
            name: fields.take::<String>("bridge")?.filter(|n| !n.is_empty()).unwrap_or_else(|| "cni0".to_owned()),
            is_gateway: fields.flag("isGateway")? || is_default_gateway,
            is_default_gateway,
            force_address: fields.flag("forceAddress")?,
            masquerade: fields.flag("ipMasq")?,
            mtu: fields.take::<u32>("mtu")?.filter(|mtu| *mtu > 0),
            hairpin: fields.flag("hairpinMode")?,
            promiscuous: fields.flag("promiscMode")?,
            isolated: fields.flag("portIsolation")?,
            detect_duplicates: fields.flag("enabledad")?,
            mac: requested_mac(config),
            ipam,
        };
        fields.finish()?;
        check_ifname(&bridge.name)?;
        if bridge.hairpin && bridge.promiscuous {
            return Err(Error::invalid(PLUGIN, "hairpinMode and promiscMode exclude each other"));
        }
        if bridge.mtu.is_some_and(|mtu| !(68..=65535).contains(&mtu)) {
            return Err(Error::invalid(PLUGIN, "mtu is not between 68 and 65535"));
        }
        if bridge.is_gateway && bridge.ipam == Ipam::None {
            return Err(Error::invalid(PLUGIN, "isGateway needs an ipam plugin"));
        }
        Ok(bridge)
    }

    /// Only who hands out addresses: DEL needs no more, and must work whatever else has become of the configuration.
    pub(super) fn parse_ipam(config: &Config, lease_dir: &Path) -> Result<Ipam> {
        let ipam = config.get("ipam").and_then(Value::as_object);
        match ipam.and_then(|ipam| ipam.get("type")).and_then(Value::as_str).unwrap_or_default() {
            "" if ipam.is_some_and(|ipam| !ipam.is_empty()) => Err(Error::invalid(PLUGIN, "ipam has no type")),
            "" => Ok(Ipam::None),
            "host-local" => HostLocal::parse(config, lease_dir).map(Ipam::HostLocal),
            other => Ok(Ipam::External(other.to_owned())),
        }
    }
}

/// A MAC address that the caller asks for.
fn requested_mac(config: &Config) -> Option<String> {
    let runtime = config.get("runtimeConfig").and_then(|r| r.get("mac"));
    let args = config.get("args").and_then(|a| a.get("cni")).and_then(|c| c.get("mac"));
    runtime.or(args).and_then(Value::as_str).filter(|mac| !mac.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: Value) -> Result<Bridge> {
        let mut config = value.as_object().cloned().unwrap();
        config.insert("name".into(), json!("n"));
        config.insert("type".into(), json!("bridge"));
        Bridge::parse(&config, Path::new("/data"))
    }

    #[test]
    fn the_usual_fields_are_read() {
        let ipam = json!({"type": "host-local", "subnet": "10.0.0.0/24"});
        let bridge = parse(json!({"bridge": "b0", "isDefaultGateway": true, "ipMasq": true, "mtu": 1400, "hairpinMode": true,
            "vlan": 0, "preserveDefaultVlan": true, "ipam": ipam}));
        let bridge = bridge.unwrap();
        assert!(bridge.is_gateway && bridge.masquerade && bridge.hairpin && !bridge.promiscuous);
        assert_eq!((bridge.mtu, bridge.name.as_str()), (Some(1400), "b0"));
        assert_eq!(parse(json!({})).unwrap().name, "cni0");
        assert_eq!(
            parse(json!({"ipam": {"type": "dhcp", "daemonSocketPath": "/x"}})).unwrap().ipam,
            Ipam::External("dhcp".into())
        );
    }

    #[test]
    fn fields_that_are_not_supported_are_refused_by_name() {
        for field in ["vlan", "vlanTrunk", "macspoofchk", "disableContainerInterface", "ipMasqBackend", "novel"] {
            let value = if field == "vlan" { json!(5) } else { json!(true) };
            match parse(json!({field: value})).unwrap_err() {
                Error::UnsupportedField { field: found, .. } => assert_eq!(found, field),
                other => panic!("{other}"),
            }
        }
        for config in [
            json!({"hairpinMode": true, "promiscMode": true}),
            json!({"bridge": "a/b"}),
            json!({"isGateway": true}),
            json!({"mtu": 10}),
            json!({"mtu": "x"}),
            json!({"ipam": {"subnet": "10.0.0.0/24"}}),
        ] {
            assert!(parse(config.clone()).is_err(), "{config}");
        }
    }
}
