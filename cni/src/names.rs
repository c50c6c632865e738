//! Names in the kernel by which an instance knows what is its own.

use crate::{Error, Result};

/// Longest name of a link.
const IFNAME_MAX: usize = 15;

/// The names of one instance, or of the plugin binaries of one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Names {
    /// The built-in network's bridge.
    pub bridge: String,
    /// What the names of all host-side veths begin with.
    pub veth_prefix: String,
    /// The nf_tables table.
    pub table: String,
}

impl Names {
    pub(crate) fn of_instance(instance: &str) -> Result<Self> {
        if instance.is_empty() || instance.len() > 6 || !instance.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(Error::InvalidName { what: "instance id", value: instance.to_owned() });
        }
        Ok(Self { bridge: format!("berth-{instance}"), veth_prefix: format!("v{instance}"), table: format!("berth-{instance}") })
    }

    /// Plugin binaries run outside any instance.
    pub(crate) fn of_plugins() -> Self {
        Self { bridge: "cni0".to_owned(), veth_prefix: "veth".to_owned(), table: "berth-cni".to_owned() }
    }

    /// The host's end of a container's veth: the same for the same container, so that it can be found without a record.
    pub(crate) fn veth(&self, container_id: &str, ifname: &str) -> String {
        let hash = fnv(container_id.bytes().chain([b'/']).chain(ifname.bytes()));
        format!("{}{:08x}", self.veth_prefix, (hash ^ (hash >> 32)) & 0xffff_ffff).chars().take(IFNAME_MAX).collect()
    }
}

/// FNV-1a, for names only.
pub(crate) fn fnv(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Whether a text may be a link's name.
pub(crate) fn check_ifname(name: &str) -> Result<()> {
    let bad = name.is_empty()
        || name.len() > IFNAME_MAX
        || matches!(name, "." | "..")
        || name.bytes().any(|b| b == b'/' || b == b':' || b.is_ascii_whitespace() || b == 0);
    if bad { Err(Error::InvalidName { what: "interface name", value: name.to_owned() }) } else { Ok(()) }
}

/// Whether a text may be a container's id: it becomes part of file names.
pub(crate) fn check_container_id(id: &str) -> Result<()> {
    let ok = id.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    if ok { Ok(()) } else { Err(Error::InvalidName { what: "container id", value: id.to_owned() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel() {
        let names = Names::of_instance("a1b2c3").unwrap();
        let veth = names.veth(&"f".repeat(64), "eth0");
        assert_eq!((veth.len(), &veth[..7]), (15, "va1b2c3"));
        assert_eq!(veth, names.veth(&"f".repeat(64), "eth0"));
        assert_ne!(veth, names.veth(&"f".repeat(64), "eth1"));
        assert_eq!(names.bridge, "berth-a1b2c3");
        assert_eq!(Names::of_plugins().veth("x", "eth0").len(), 12);
        assert!(Names::of_instance("a/b").is_err());
        assert!(Names::of_instance("1234567").is_err());
    }

    #[test]
    fn ids_and_interface_names_are_checked() {
        for (id, ok) in [("abc-1_2.3", true), ("", false), ("../x", false), (".x", false), ("a/b", false)] {
            assert_eq!(check_container_id(id).is_ok(), ok, "{id}");
        }
        for (name, ok) in
            [("eth0", true), ("", false), ("..", false), ("a/b", false), ("a b", false), ("sixteen-chars-xx", false)]
        {
            assert_eq!(check_ifname(name).is_ok(), ok, "{name}");
        }
    }
}
