//! The files a sandbox adds to its containers: hostname, hosts, resolv.conf.

use std::path::Path;

use crate::config::Config;
use crate::error::{Error, file};
use crate::spec::{Dns, IdMap, SandboxSpec};

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

/// Writes all of them into the sandbox's folder. They are the pod's root's.
pub(crate) fn write(folder: &Path, spec: &SandboxSpec, config: &Config) -> Result<(), Error> {
    let owner = spec.namespaces.own_users().map(|users| (host_root(&users.uids), host_root(&users.gids)));
    let put = |name: &str, text: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, text).map_err(file("write", &path))?;
        match owner {
            Some((uid, gid)) => std::os::unix::fs::chown(&path, uid, gid).map_err(file("set the owner of", &path)),
            None => Ok(()),
        }
    };
    put("hostname", format!("{}\n", hostname(spec)).as_bytes())?;
    put("hosts", &host_file(&config.hosts)?)?;
    let dns = spec.dns.as_ref().filter(|d| !d.is_empty());
    match dns {
        Some(dns) => put("resolv.conf", resolv_conf(dns).as_bytes()),
        None => put("resolv.conf", &host_file(&config.resolv_conf)?),
    }
}

/// What id 0 of a map is on the host.
fn host_root(maps: &[IdMap]) -> Option<u32> {
    maps.iter().find(|map| map.container == 0).map(|map| map.host)
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
    fn the_files_of_a_pod_with_a_user_namespace_belong_to_its_root() {
        use std::os::unix::fs::MetadataExt;

        use crate::spec::{Namespaces, UserNamespace};

        berth_testkit::in_namespaces(|| {
            let dir = tempfile::tempdir().unwrap();
            let map = |host| vec![IdMap { container: 0, host, length: 65_536 }];
            let users = UserNamespace { uids: map(100_000), gids: map(200_000), ..Default::default() };
            let config = Config::new(dir.path(), dir.path(), b"");
            let owners = |users: Option<UserNamespace>| {
                let namespaces = Namespaces { users, ..Default::default() };
                write(dir.path(), &SandboxSpec { namespaces, ..Default::default() }, &config).unwrap();
                NAMES.map(|name| std::fs::metadata(dir.path().join(name)).map(|m| (m.uid(), m.gid())).unwrap())
            };
            assert_eq!(owners(None), [(0, 0); 3]);
            assert_eq!(owners(Some(users)), [(100_000, 200_000); 3]);
        });
    }

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
