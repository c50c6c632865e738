//! The files a sandbox adds to its containers: hostname, hosts, resolv.conf.

use std::path::Path;

use crate::config::Config;
use crate::error::{Error, file};
use crate::spec::{Dns, SandboxSpec};

/// The names under which they lie in the sandbox's folder and in `/etc` of its containers.
pub(crate) const NAMES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// The name of the pod's machine: its own, or the host's.
pub(crate) fn hostname(spec: &SandboxSpec) -> String {
    if spec.hostname.is_empty() || spec.host_network() {
        rustix::system::uname().nodename().to_string_lossy().into_owned()
    } else {
        spec.hostname.clone()
    }
}

/// The text of resolv.conf for a DNS configuration.
pub(crate) fn resolv_conf(dns: &Dns) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

/// Writes all of them into the sandbox's folder.
pub(crate) fn write(folder: &Path, spec: &SandboxSpec, config: &Config) -> Result<(), Error> {
    let put = |name: &str, text: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, text).map_err(file("write", &path))
    };
    put("hostname", format!("{}\n", hostname(spec)).as_bytes())?;
    put("hosts", &host_file(&config.hosts)?)?;
    let dns = spec.dns.as_ref().filter(|d| !d.is_empty());
    match dns {
        Some(dns) => put("resolv.conf", resolv_conf(dns).as_bytes()),
        None => put("resolv.conf", &host_file(&config.resolv_conf)?),
    }
}

fn host_file(path: &Path) -> Result<Vec<u8>, Error> {
    match std::fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(file("read", path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_has_one_line_for_each_server() {
        let dns = Dns {
            servers: vec!["10.10.10.10".into(), "fd00::1".into()],
            searches: vec!["a.b".into(), "c".into()],
            options: vec!["ndots:8".into()],
        };
        assert_eq!(resolv_conf(&dns), "search a.b c\nnameserver 10.10.10.10\nnameserver fd00::1\noptions ndots:8\n");
    }
}
