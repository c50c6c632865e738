//! The hosts file that the kubelet keeps for each pod. The content is pure; one function writes it.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::pod;

/// Name and domain of a pod on the network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hostname {
    /// The host part.
    pub host: String,
    /// The domain, empty where there is none.
    pub domain: String,
}

impl Hostname {
    /// Host and domain of a pod.
    pub fn of(pod: &Pod, cluster_domain: &str) -> Hostname {
        let spec = pod::spec(pod);
        if let Some(name) = &spec.hostname_override {
            return Hostname { host: name.clone(), domain: String::new() };
        }
        let wanted = spec.hostname.as_deref().filter(|h| !h.is_empty()).unwrap_or(pod::name(pod));
        let cut: String = wanted.chars().take(63).collect();
        let host = cut.trim_end_matches(['-', '.']).to_owned();
        let subdomain = spec.subdomain.as_deref().filter(|s| !s.is_empty());
        let domain = match subdomain {
            Some(subdomain) if !cluster_domain.is_empty() => {
                format!("{subdomain}.{}.svc.{cluster_domain}", pod::namespace(pod))
            }
            _ => String::new(),
        };
        Hostname { host, domain }
    }

    /// `<host>.<domain>` where there is a domain.
    pub fn fqdn(&self) -> Option<String> {
        (!self.domain.is_empty()).then(|| format!("{}.{}", self.host, self.domain))
    }

    /// The kernel's host name of the pod.
    pub fn kernel(&self, pod: &Pod) -> Result<String, String> {
        let fqdn = self.fqdn().filter(|_| pod::spec(pod).set_hostname_as_fqdn == Some(true));
        match fqdn {
            Some(fqdn) if fqdn.len() > 64 => Err(format!(
                "failed to construct FQDN from pod hostname and cluster domain, FQDN {fqdn} is too long (64 is the max, {} characters requested)",
                fqdn.len()
            )),
            Some(fqdn) => Ok(fqdn),
            None => Ok(self.host.clone()),
        }
    }
}

/// The content of a pod's hosts file; `None` while a pod with a network of its own has no address.
pub fn content(pod: &Pod, pod_ips: &[String], hostname: &Hostname, host_file: &str) -> Option<String> {
    let mut text = String::new();
    if pod::is_host_network(pod) {
        text.push_str("# Kubernetes-managed hosts file (host network).\n");
        text.push_str(host_file);
    } else {
        if pod_ips.is_empty() {
            return None;
        }
        text.push_str(concat!(
            "# Kubernetes-managed hosts file.\n",
            "127.0.0.1\tlocalhost\n",
            "::1\tlocalhost ip6-localhost ip6-loopback\n",
            "fe00::0\tip6-localnet\n",
            "fe00::0\tip6-mcastprefix\n",
            "fe00::1\tip6-allnodes\n",
            "fe00::2\tip6-allrouters\n",
        ));
        for ip in pod_ips {
            match hostname.fqdn() {
                Some(fqdn) => text.push_str(&format!("{ip}\t{fqdn}\t{}\n", hostname.host)),
                None => text.push_str(&format!("{ip}\t{}\n", hostname.host)),
            }
        }
    }
    let aliases = pod::spec(pod).host_aliases.as_deref().unwrap_or_default();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for alias in aliases {
            let names = alias.hostnames.as_deref().unwrap_or_default().join("\t");
            text.push_str(&format!("{}\t{names}\n", alias.ip));
        }
    }
    Some(text)
}

/// Writes the file in place (containers have it bind-mounted), readable for all. Where there is no room for the new content
/// the old one stays.
pub fn write(pod_dir: &Path, content: &str) -> io::Result<PathBuf> {
    let path = pod_dir.join("etc-hosts");
    if fs::read_to_string(&path).is_ok_and(|old| old == content) {
        return Ok(path);
    }
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
    let length = content.len() as u64;
    // Not every file system reserves room.
    if let Err(error @ (Errno::NOSPC | Errno::DQUOT)) = rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, length) {
        return Err(error.into());
    }
    file.write_all(content.as_bytes())?;
    file.set_len(length)?;
    file.set_permissions(fs::Permissions::from_mode(0o644))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{defaults::apply_defaults, parse::parse_manifest};

    fn pod(spec: &str) -> Pod {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: web-n1, namespace: shop}}, spec: {{containers: [{{name: c, image: i}}], {spec}}}}}"
        );
        let mut pod = parse_manifest(&text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        pod
    }

    #[test]
    fn host_names_are_cut_and_joined() {
        let long = format!("hostname: {}-x", "a".repeat(62));
        let cases = [
            ("hostIPC: false".to_owned(), "web-n1", None),
            ("hostname: h".to_owned(), "h", None),
            ("hostname: h, subdomain: s".to_owned(), "h", Some("h.s.shop.svc.cluster.local")),
            (long, &"a".repeat(62), None),
        ];
        for (spec, host, fqdn) in cases {
            let name = Hostname::of(&pod(&spec), "cluster.local");
            assert_eq!((name.host.as_str(), name.fqdn().as_deref()), (host, fqdn), "{spec}");
        }
    }

    #[test]
    fn a_long_fqdn_is_an_error_only_where_it_is_wanted() {
        let spec = format!("hostname: h, subdomain: {}", "s".repeat(60));
        let name = Hostname::of(&pod(&spec), "cluster.local");
        assert_eq!(name.kernel(&pod(&spec)).as_deref(), Ok("h"));
        let spec = format!("{spec}, setHostnameAsFQDN: true");
        assert!(name.kernel(&pod(&spec)).unwrap_err().contains("is too long (64 is the max"));
    }

    #[test]
    fn the_file_lists_addresses_and_aliases() {
        let spec = "hostname: h, subdomain: s, hostAliases: [{ip: 1.2.3.4, hostnames: [a, b]}]";
        let pod = pod(spec);
        let name = Hostname::of(&pod, "cluster.local");
        assert_eq!(content(&pod, &[], &name, ""), None);
        let text = content(&pod, &["10.0.0.5".into(), "fd00::5".into()], &name, "").unwrap();
        assert!(text.starts_with("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n"));
        assert!(text.contains("10.0.0.5\th.s.shop.svc.cluster.local\th\nfd00::5\t"));
        assert!(text.ends_with("\n\n# Entries added by HostAliases.\n1.2.3.4\ta\tb\n"));
    }

    #[test]
    fn a_shorter_file_leaves_nothing_of_the_longer_one() {
        let root = tempfile::tempdir().unwrap();
        for text in ["a longer text\n", "short\n", "another one\n"] {
            let path = write(root.path(), text).unwrap();
            assert_eq!(fs::read_to_string(path).unwrap(), text);
        }
    }

    #[test]
    fn host_network_pods_get_the_hosts_file() {
        let pod = pod("hostNetwork: true");
        let text = content(&pod, &[], &Hostname::default(), "127.0.0.1 me\n").unwrap();
        assert_eq!(text, "# Kubernetes-managed hosts file (host network).\n127.0.0.1 me\n");
    }
}
