//! Where the machine's sealing key comes from: a given file, a credential of the service, or the file that a join has made. Whatever
//! is copied with the kubelet's folders must not hold it, so a key there is refused. Reads, never writes.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::seal::SealingKey;
use crate::{Error, Result};

/// The credential's name in a systemd unit.
const CREDENTIAL: &str = "berth.sealing-key";
/// A key's file is no longer than this: 44 characters of base64 and a line's end, with some room.
const MOST_BYTES: u64 = 256;
/// Group and others may do nothing with the file.
const NOT_PRIVATE: u32 = 0o077;

/// The places of a key, the first that is there counts.
#[derive(Clone, Debug, Default)]
pub struct KeyPlaces {
    /// A file that was named: it has to be there.
    pub file: Option<PathBuf>,
    /// The folder of the service's credentials (`$CREDENTIALS_DIRECTORY`).
    pub credentials: Option<PathBuf>,
    /// The file that a join makes.
    pub usual: Option<PathBuf>,
}

impl KeyPlaces {
    /// The credential, if the service has it.
    pub fn credential(&self) -> Option<PathBuf> {
        self.credentials.as_ref().map(|folder| folder.join(CREDENTIAL)).filter(|path| path.exists())
    }

    /// The key; `None` where nobody has given one.
    ///
    /// # Errors
    /// When the file is no key, others may read it, or it lies below one of `roots`.
    pub fn find(&self, roots: &[&Path]) -> Result<Option<SealingKey>> {
        let credential = self.credential();
        if let Some(path) = &self.file {
            return load(path, roots, true).map(Some);
        }
        // Who may read a credential is the service manager's business: by ACL, which shows as the group's bits.
        for (path, is_private) in credential.iter().map(|path| (path, false)).chain(self.usual.iter().map(|path| (path, true))) {
            if path.exists() {
                return load(path, roots, is_private).map(Some);
            }
        }
        Ok(None)
    }
}

fn load(path: &Path, roots: &[&Path], is_private: bool) -> Result<SealingKey> {
    let refuse = |problem: String| Error::SealingKey { path: path.to_owned(), problem };
    let failed = |source: io::Error| Error::ReadFile { path: path.to_owned(), source };
    let real = path.canonicalize().map_err(failed)?;
    for root in roots {
        let root = root.canonicalize().unwrap_or_else(|_| (*root).to_owned());
        if real.starts_with(&root) {
            return Err(refuse(format!("it lies below {}: whoever has a copy of that would have the key too", root.display())));
        }
    }
    let mut file = fs::File::open(&real).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(refuse("it is no file".to_owned()));
    }
    let ours = rustix::process::geteuid().as_raw();
    if is_private && metadata.uid() != 0 && metadata.uid() != ours {
        return Err(refuse(format!("it belongs to user {}, who may read it", metadata.uid())));
    }
    if is_private && metadata.mode() & NOT_PRIVATE != 0 {
        return Err(refuse(format!("its mode {:o} lets others read it: chmod 0400", metadata.mode() & 0o777)));
    }
    let mut content = Vec::new();
    file.by_ref().take(MOST_BYTES).read_to_end(&mut content).map_err(failed)?;
    SealingKey::parse(&content).ok_or_else(|| refuse("it holds neither 32 bytes nor their base64".to_owned()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;
    use crate::api::offline::seal::new_key;

    fn put(path: &Path, mode: u32) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, new_key().unwrap()).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_key_below_a_root_or_open_to_others_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (root, etc) = (folder.path().join("root"), folder.path().join("etc"));
        for (path, mode) in [("root/key", 0o400), ("etc/key", 0o400), ("etc/open", 0o440)] {
            put(&folder.path().join(path), mode);
        }
        symlink(root.join("key"), etc.join("link")).unwrap();
        fs::write(etc.join("text"), "no key").unwrap();
        fs::set_permissions(etc.join("text"), fs::Permissions::from_mode(0o400)).unwrap();
        let found = |name: &str| {
            let places = KeyPlaces { file: Some(folder.path().join(name)), ..KeyPlaces::default() };
            places.find(&[&root]).map_err(|error| error.to_string())
        };
        assert!(found("etc/key").unwrap().is_some());
        for (name, problem) in [
            ("root/key", "lies below"),
            ("etc/link", "lies below"),
            ("etc/open", "mode 440"),
            ("etc/text", "neither 32 bytes"),
            ("etc/missing", "read "),
            ("etc", "no file"),
        ] {
            let error = found(name).unwrap_err();
            assert!(error.contains(problem), "{name}: {error}");
        }
    }

    #[test]
    fn the_first_place_counts_and_none_is_no_key() {
        let folder = tempfile::tempdir().unwrap();
        let credentials = folder.path().join("credentials");
        put(&credentials.join(CREDENTIAL), 0o440);
        let missing = folder.path().join("missing");
        let places = KeyPlaces { file: None, credentials: Some(credentials), usual: Some(missing.clone()) };
        assert!(places.find(&[]).unwrap().is_some());
        assert!(KeyPlaces { credentials: None, ..places.clone() }.find(&[]).unwrap().is_none());
        assert!(KeyPlaces { file: Some(missing), ..places }.find(&[]).is_err(), "what was named has to be there");
    }
}
