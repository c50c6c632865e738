//! What a join leaves on the machine, in kubeadm's places, so that kubeadm and its readers find what they know; and taking it away
//! again. What is written is decided first and written then.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::discovery::{Cluster, Discovered};
use crate::token::Token;
use crate::{Error, Result, Store, atomic};

/// The folders of a kubeadm node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// Usually `/etc/kubernetes`.
    pub kubernetes: PathBuf,
    /// The kubelet's folder, usually `/var/lib/kubelet`.
    pub kubelet_root: PathBuf,
}

impl Places {
    /// The node's kubeconfig, which the first certificate brings.
    pub fn kubeconfig(&self) -> PathBuf {
        self.kubernetes.join("kubelet.conf")
    }

    /// The kubeconfig with the token; removed when it has served.
    pub fn bootstrap_kubeconfig(&self) -> PathBuf {
        self.kubernetes.join("bootstrap-kubelet.conf")
    }

    /// The cluster's authority.
    pub fn authority(&self) -> PathBuf {
        self.kubernetes.join("pki/ca.crt")
    }

    /// KubeletConfiguration.
    pub fn configuration(&self) -> PathBuf {
        self.kubelet_root.join("config.yaml")
    }

    /// Where certificates are kept.
    pub fn certificates(&self) -> PathBuf {
        self.kubelet_root.join("pki")
    }

    fn flags(&self) -> PathBuf {
        self.kubelet_root.join("kubeadm-flags.env")
    }

    fn instance(&self) -> PathBuf {
        self.kubelet_root.join("instance-config.yaml")
    }
}

/// A file that a join writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Where.
    pub path: PathBuf,
    /// What.
    pub content: String,
    /// For whom.
    pub mode: u32,
}

/// What is this node's own in a join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// The kubelet's flags that a start by kubeadm's unit needs: `--hostname-override=…` and the like.
    pub flags: Vec<String>,
    /// The CRI socket, `unix://…`.
    pub endpoint: String,
}

/// The files of a join.
///
/// # Errors
/// When the cluster's KubeletConfiguration is not YAML.
pub fn plan(places: &Places, found: &Discovered, token: &Token, cluster: &Cluster, own: &Own) -> Result<Vec<File>> {
    let name = if cluster.name.is_empty() { "kubernetes" } else { &cluster.name };
    let user = "tls-bootstrap-token-user";
    let bootstrap = found.with_token(token).render(name, user, &format!("{user}@{name}"));
    let wrong = |error: serde_yaml_ng::Error| Error::Discovery {
        server: found.server.clone(),
        problem: format!("KubeletConfiguration: {error}"),
    };
    let mut configuration: serde_yaml_ng::Mapping = serde_yaml_ng::from_str(&cluster.kubelet).map_err(wrong)?;
    configuration.insert("containerRuntimeEndpoint".into(), own.endpoint.as_str().into());
    let configuration = serde_yaml_ng::to_string(&configuration).map_err(wrong)?;
    let file = |path, content, mode| File { path, content, mode };
    Ok(vec![
        file(places.authority(), String::from_utf8_lossy(&found.authority).into_owned(), 0o644),
        file(places.configuration(), configuration, 0o644),
        file(places.instance(), format!("containerRuntimeEndpoint: {}\n", own.endpoint), 0o644),
        file(places.flags(), format!("KUBELET_KUBEADM_ARGS=\"{}\"\n", own.flags.join(" ")), 0o644),
        // Last: with this one a node can start.
        file(places.bootstrap_kubeconfig(), bootstrap, 0o600),
    ])
}

/// Files that a join would write over, with what an administrator calls them: `FileAvailable--etc-kubernetes-kubelet.conf`. The same
/// authority is none.
pub fn in_the_way(places: &Places, found: Option<&Discovered>) -> Vec<(String, PathBuf)> {
    let is_same = |path: &Path| found.is_some_and(|found| fs::read(path).is_ok_and(|there| there == found.authority));
    let paths = [places.kubeconfig(), places.bootstrap_kubeconfig(), places.authority()];
    let there = paths.into_iter().filter(|path| path.exists() && !is_same(path));
    there.map(|path| (format!("FileAvailable-{}", path.display().to_string().replace('/', "-")), path)).collect()
}

/// Writes the files, and for [`reset`] which ones they are and where certificates will be. What was there with the same content was somebody's
/// already and stays his, unless an earlier join wrote it.
///
/// # Errors
/// When one cannot be written; those before it stay, and are on record.
pub fn write(files: &[File], certificates: &Path, record: &Path) -> Result<()> {
    let earlier = Record::read(record)?.unwrap_or_default();
    let is_ours = |file: &&File| {
        earlier.files.contains(&file.path) || fs::read(&file.path).ok().as_deref() != Some(file.content.as_bytes())
    };
    let files_of_join = files.iter().filter(is_ours).map(|file| file.path.clone()).collect();
    let written = Record { version: VERSION, files: files_of_join, certificates: Some(certificates.to_owned()) };
    let text = serde_json::json!(written).to_string();
    atomic::write(record, text.as_bytes(), 0o600)?;
    files.iter().try_for_each(|file| atomic::write(&file.path, file.content.as_bytes(), file.mode))
}

/// The form of the record.
const VERSION: u32 = 1;

/// What a join wrote, for its reset.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Record {
    version: u32,
    files: Vec<PathBuf>,
    certificates: Option<PathBuf>,
}

impl Record {
    fn read(path: &Path) -> Result<Option<Record>> {
        match fs::read_to_string(path) {
            Ok(text) => {
                let record: Record = serde_json::from_str(&text).map_err(|_| Error::JoinRecord { path: path.to_owned() })?;
                if record.version != VERSION {
                    return Err(Error::JoinRecord { path: path.to_owned() });
                }
                Ok(Some(record))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::ReadFile { path: path.to_owned(), source }),
        }
    }
}

/// Removes what a join and the certificates after it have left; which files that were. Nothing on record: nothing is removed.
///
/// # Errors
/// When the record cannot be read, or a file cannot be removed.
pub fn reset(places: &Places, record: &Path) -> Result<Vec<PathBuf>> {
    let Some(Record { mut files, certificates, .. }) = Record::read(record)? else { return Ok(Vec::new()) };
    files.push(places.kubeconfig());
    let certificates = certificates.unwrap_or_else(|| places.certificates());
    for store in [Store::client(&certificates), Store::serving(&certificates)] {
        files.extend(store.files());
    }
    files.push(record.to_owned());
    let mut removed = Vec::new();
    for path in files {
        match fs::remove_file(&path) {
            Ok(()) => removed.push(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::WriteFile { path, source }),
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn joined() -> (Discovered, Cluster, Own) {
        let found =
            Discovered { server: "https://cp:6443".into(), authority: b"pem".to_vec(), tls_server_name: None, proxy: None };
        let cluster = Cluster {
            kubelet: "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nclusterDNS: [10.96.0.10]\n".into(),
            name: "prod".into(),
            version: "v1.36.3".into(),
            pod_subnet: String::new(),
            service_subnet: String::new(),
        };
        let own = Own { flags: vec!["--hostname-override=n1".into()], endpoint: "unix:///run/berth/berth.sock".into() };
        (found, cluster, own)
    }

    #[test]
    fn a_record_that_cannot_be_read_is_no_empty_one() {
        let root = tempfile::tempdir().unwrap();
        let places = Places { kubernetes: root.path().join("kubernetes"), kubelet_root: root.path().join("kubelet") };
        let record = root.path().join("join.json");
        for text in ["{half", r#"{"version":2,"files":[]}"#, r#"{"files":[]}"#] {
            fs::write(&record, text).unwrap();
            assert!(matches!(reset(&places, &record), Err(Error::JoinRecord { .. })), "{text}");
            assert!(record.exists());
        }
    }

    #[test]
    fn a_join_leaves_kubeadms_files_and_a_reset_takes_them_away() {
        let root = tempfile::tempdir().unwrap();
        let places = Places { kubernetes: root.path().join("kubernetes"), kubelet_root: root.path().join("kubelet") };
        let record = root.path().join("berth/join.json");
        let (found, cluster, own) = joined();
        let token: Token = "abcdef.0123456789abcdef".parse().unwrap();
        let files = plan(&places, &found, &token, &cluster, &own).unwrap();
        assert_eq!(reset(&places, &record).unwrap(), Vec::<PathBuf>::new(), "nothing was written yet");
        write(&files, &places.certificates(), &record).unwrap();
        let read = |path: PathBuf| fs::read_to_string(path).unwrap();
        let bootstrap = places.bootstrap_kubeconfig();
        assert_eq!(fs::metadata(&bootstrap).unwrap().permissions().mode() & 0o777, 0o600);
        let config = crate::Kubeconfig::load(&bootstrap).unwrap();
        assert_eq!((config.server.as_str(), config.user.token.as_deref()), ("https://cp:6443", Some("abcdef.0123456789abcdef")));
        let text = read(places.configuration());
        assert!(text.contains("clusterDNS:\n- 10.96.0.10") && text.contains("containerRuntimeEndpoint: unix:///run/"), "{text}");
        assert_eq!(read(places.kubelet_root.join("kubeadm-flags.env")), "KUBELET_KUBEADM_ARGS=\"--hostname-override=n1\"\n");

        let in_the_way: Vec<_> = super::in_the_way(&places, Some(&found)).into_iter().map(|(_, path)| path).collect();
        assert_eq!(in_the_way, [bootstrap], "the same authority is not in the way");
        assert_eq!(super::in_the_way(&places, None).len(), 2);

        let mine = places.kubernetes.join("manifests/web.yaml");
        atomic::write(&mine, b"mine", 0o644).unwrap();
        atomic::write(&places.certificates().join("kubelet-client-2026-01-01-00-00-00.pem"), b"x", 0o600).unwrap();
        atomic::link(&places.certificates().join("kubelet-client-current.pem"), Path::new("elsewhere")).unwrap();
        assert_eq!(reset(&places, &record).unwrap().len(), files.len() + 3);
        assert!(mine.exists() && !places.authority().exists());
        assert_eq!(fs::read_dir(places.certificates()).unwrap().count(), 0);
    }

    #[test]
    fn a_reset_leaves_an_authority_that_was_there_before_and_finds_certificates_in_another_folder() {
        let root = tempfile::tempdir().unwrap();
        let places = Places { kubernetes: root.path().join("kubernetes"), kubelet_root: root.path().join("kubelet") };
        let (record, certificates) = (root.path().join("join.json"), root.path().join("certificates"));
        let (found, cluster, own) = joined();
        let files = plan(&places, &found, &"abcdef.0123456789abcdef".parse().unwrap(), &cluster, &own).unwrap();
        atomic::write(&places.authority(), b"pem", 0o644).unwrap();
        // A second join finds what the first one wrote.
        write(&files, &certificates, &record).unwrap();
        write(&files, &certificates, &record).unwrap();
        let key = certificates.join("kubelet-client-2026-01-01-00-00-00.pem");
        atomic::write(&key, b"x", 0o600).unwrap();
        reset(&places, &record).unwrap();
        assert!(places.authority().exists() && !places.configuration().exists() && !key.exists());
    }
}
