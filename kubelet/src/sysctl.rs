//! Which kernel parameters a pod may set. Pure; the runtime writes them.

/// Parameters whose effect stays inside the pod.
const SAFE: &[&str] = &[
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
];

/// The name with dots as separators; a slash form keeps its dots as slashes.
pub fn normalize(name: &str) -> String {
    match (name.find('.'), name.find('/')) {
        (Some(dot), Some(slash)) if slash < dot => swap(name),
        (None, Some(_)) => name.replace('/', "."),
        _ => name.to_owned(),
    }
}

fn swap(name: &str) -> String {
    let swapped = |c| match c {
        '/' => '.',
        '.' => '/',
        other => other,
    };
    name.chars().map(swapped).collect()
}

/// Whether a text can stand in the list of what pods may set: a name, or a prefix and `*`; only what is the pod's own can be allowed.
pub fn is_pattern(text: &str) -> bool {
    let name = match text.strip_suffix('*') {
        // `net.*`: what ends in a dot names a whole part.
        Some(prefix) => prefix.strip_suffix(['.', '/']).unwrap_or(prefix),
        None => text,
    };
    let plain = name.split(['.', '/']).all(|part| !part.is_empty() && part.chars().all(is_name_char));
    let whole = normalize(text);
    plain && (is_network(&whole) || is_ipc(&whole))
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_'
}

fn is_network(name: &str) -> bool {
    name.starts_with("net.")
}

fn is_ipc(name: &str) -> bool {
    name.starts_with("kernel.shm") || name.starts_with("kernel.msg") || name == "kernel.sem" || name.starts_with("fs.mqueue.")
}

/// Whether a pod may set `name`; the error is the kubelet's message.
pub fn check(name: &str, host_network: bool, host_ipc: bool, allowed_unsafe: &[String]) -> Result<(), String> {
    let name = normalize(name);
    let (network, ipc) = (is_network(&name), is_ipc(&name));
    if network && host_network {
        return Err(format!("sysctl {name:?} is not allowed with hostNetwork"));
    }
    if ipc && host_ipc {
        return Err(format!("sysctl {name:?} is not allowed with hostIPC"));
    }
    let listed = |pattern: &String| match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => *pattern == name,
    };
    if SAFE.contains(&name.as_str()) || (network || ipc) && allowed_unsafe.iter().any(listed) {
        return Ok(());
    }
    Err(format!("forbidden sysctl: {name:?} not allowlisted"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_namespaced_and_allowed_parameters_pass() {
        let unsafe_ones = ["net.core.*".to_owned(), "kernel.msgmax".to_owned(), "vm.*".to_owned()];
        let cases = [
            ("net.ipv4.tcp_syncookies", false, false, true),
            ("net/ipv4/tcp_syncookies", false, false, true),
            ("net.ipv4.tcp_syncookies", true, false, false),
            ("kernel.shm_rmid_forced", false, true, false),
            ("kernel.msgmax", false, false, true),
            ("net.core.somaxconn", false, false, true),
            ("vm.swappiness", false, false, false),
            ("kernel.panic", false, false, false),
        ];
        for (name, host_network, host_ipc, ok) in cases {
            assert_eq!(check(name, host_network, host_ipc, &unsafe_ones).is_ok(), ok, "{name}");
        }
    }

    #[test]
    fn slashes_and_dots_are_the_same() {
        assert_eq!(normalize("net/ipv4/conf/eth0.1/forwarding"), "net.ipv4.conf.eth0/1.forwarding");
        assert_eq!(normalize("kernel.sem"), "kernel.sem");
    }

    #[test]
    fn a_pattern_is_a_name_of_the_pods_own_or_the_beginning_of_one() {
        let good = ["net.core.somaxconn", "net.*", "net.core.*", "net/core/so*", "kernel.shm*", "kernel.sem", "fs.mqueue.*"];
        let bad = ["net.*foo", "net..x", "net.core.", "vm.*", "*", "", "kernel.sem*x", "NET.core"];
        assert!(good.iter().all(|text| is_pattern(text)), "{good:?}");
        assert!(!bad.iter().any(|text| is_pattern(text)), "{bad:?}");
    }
}
