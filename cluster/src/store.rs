//! Where a certificate and its key are kept, with the upstream's names: a file for each, and a link to the current one. A reader sees
//! one whole pair at any moment.

use std::fs;
use std::path::{Path, PathBuf};

use time::OffsetDateTime;

use crate::{Certificate, Result, atomic};

/// The certificates of one purpose in one folder.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
    purpose: &'static str,
}

impl Store {
    /// The client certificates of a node.
    pub fn client(folder: &Path) -> Store {
        Store::of(folder, "kubelet-client")
    }

    /// Its serving certificates.
    pub fn serving(folder: &Path) -> Store {
        Store::of(folder, "kubelet-server")
    }

    /// The link and the kubeconfig name files in it, and are read from other folders.
    fn of(folder: &Path, purpose: &'static str) -> Store {
        Store { folder: std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned()), purpose }
    }

    /// The link to the current pair.
    pub fn current(&self) -> PathBuf {
        self.folder.join(format!("{}-current.pem", self.purpose))
    }

    /// The key of a request that is not answered yet.
    pub(crate) fn pending_key(&self) -> PathBuf {
        self.folder.join(format!("{}.key.tmp", self.purpose))
    }

    /// Everything that was kept.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let ours = entries.filter(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            name.starts_with(&format!("{}-", self.purpose)) || name == format!("{}.key.tmp", self.purpose)
        });
        ours.map(|entry| entry.path()).collect()
    }

    /// The current certificate, where there is one that can be read.
    pub fn certificate(&self) -> Option<Certificate> {
        let path = self.current();
        let pem = fs::read(&path).ok()?;
        Certificate::from_pem(&pem, &path.display().to_string()).ok()
    }

    /// Keeps a certificate with its key, both in PEM, and makes it the current one.
    pub(crate) fn put(&self, certificate: &str, key: &str, now: OffsetDateTime) -> Result<()> {
        let time = format!(
            "{:04}-{:02}-{:02}-{:02}-{:02}-{:02}",
            now.year(),
            u8::from(now.month()),
            now.day(),
            now.hour(),
            now.minute(),
            now.second()
        );
        let path = self.folder.join(format!("{}-{time}.pem", self.purpose));
        let pair = format!("{}\n{}\n", certificate.trim_end(), key.trim_end());
        atomic::write(&path, pair.as_bytes(), 0o600)?;
        atomic::link(&self.current(), &path)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_pair_is_in_one_private_file_that_the_link_names() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::client(&folder.path().join("pki"));
        assert_eq!(store.certificate(), None);
        let at = |second: i64| OffsetDateTime::from_unix_timestamp(1_795_305_600 + second).unwrap();
        for second in [0, 1] {
            let made = rcgen::generate_simple_self_signed(vec![format!("n{second}")]).unwrap();
            store.put(&made.cert.pem(), &made.signing_key.serialize_pem(), at(second)).unwrap();
            assert_eq!(store.certificate().unwrap().dns_names, [format!("n{second}")]);
        }
        let target = fs::read_link(store.current()).unwrap();
        assert_eq!(target.file_name().unwrap(), "kubelet-client-2026-11-22-00-00-01.pem");
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(
            Store::client(Path::new("pki")).current().is_absolute(),
            "a relative folder would be another one for the link's readers"
        );
        // Nothing half written lies about.
        assert_eq!(fs::read_dir(folder.path().join("pki")).unwrap().count(), 3);
    }
}
