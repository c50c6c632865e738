//! Leases on disk, in the reference plugin's format: one file an address with the container's id and interface, a lock, and the
//! last address given out. Beside them stands the boot's id: leases of another boot are void, because no pod outlives it.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::ranges::{Range, RangeSet};
use crate::{Error, Result};

const LOCK: &str = "lock";
const BOOT: &str = ".boot_id";
const LAST: &str = "last_reserved_ip.";

/// Who holds an address.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Owner {
    pub container_id: String,
    pub ifname: String,
}

impl Owner {
    fn text(&self) -> String {
        format!("{}\r\n{}", self.container_id, self.ifname)
    }

    fn parse(text: &str) -> Self {
        let text = text.trim();
        let (id, ifname) = text.split_once("\r\n").unwrap_or((text, ""));
        Self { container_id: id.to_owned(), ifname: ifname.to_owned() }
    }
}

/// The leases of one network, locked against all other processes for as long as this lives.
#[derive(Debug)]
pub(crate) struct Store {
    dir: PathBuf,
    _lock: File,
}

/// The leases of a folder that are of this boot, read without a lock: nothing is changed.
pub(crate) fn leases_in(dir: &Path, boot_id: &str) -> Result<Vec<(IpAddr, Owner)>> {
    match fs::read_to_string(dir.join(BOOT)) {
        Ok(mark) if mark != boot_id => Ok(Vec::new()),
        _ => read_leases(dir),
    }
}

fn read_leases(dir: &Path) -> Result<Vec<(IpAddr, Owner)>> {
    let entries = fs::read_dir(dir).map_err(Error::file("list", dir))?;
    let mut leases = Vec::new();
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let Ok(ip) = name.parse::<IpAddr>() else { continue };
        match fs::read_to_string(dir.join(&name)) {
            Ok(text) => leases.push((ip, Owner::parse(&text))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::file("read", &dir.join(&name))(error)),
        }
    }
    leases.sort_unstable();
    Ok(leases)
}

impl Store {
    /// Opens and locks the folder; leases of another boot are deleted.
    pub(crate) fn open(dir: &Path, boot_id: &str) -> Result<Self> {
        fs::create_dir_all(dir).map_err(Error::file("create folder", dir))?;
        let path = dir.join(LOCK);
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(Error::file("open", &path))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|e| Error::file("lock", &path)(e.into()))?;
        let store = Self { dir: dir.to_owned(), _lock: lock };
        let boot = dir.join(BOOT);
        if fs::read_to_string(&boot).ok().as_deref() != Some(boot_id) {
            // A folder without the mark was made by the reference plugin: there is no telling how old its leases are, and
            // taking an address away from a living pod is worse than keeping a dead one's until GC.
            if boot.exists() {
                for (ip, _) in store.leases()? {
                    store.remove(ip)?;
                }
            }
            fs::write(&boot, boot_id).map_err(Error::file("write", &boot))?;
        }
        Ok(store)
    }

    /// All leases.
    pub(crate) fn leases(&self) -> Result<Vec<(IpAddr, Owner)>> {
        read_leases(&self.dir)
    }

    /// Leases the next free address of the set number `index`.
    pub(crate) fn allocate<'r>(&self, set: &'r RangeSet, index: usize, owner: &Owner) -> Result<(IpAddr, &'r Range)> {
        let last_path = self.dir.join(format!("{LAST}{index}"));
        let last = fs::read_to_string(&last_path).ok().and_then(|text| text.trim().parse().ok());
        for (ip, range) in set.walk(last) {
            let path = self.dir.join(ip.to_string());
            match OpenOptions::new().create_new(true).write(true).open(&path) {
                Ok(mut file) => {
                    file.write_all(owner.text().as_bytes()).map_err(Error::file("write", &path))?;
                    fs::write(&last_path, ip.to_string()).map_err(Error::file("write", &last_path))?;
                    return Ok((ip, range));
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::file("create", &path)(error)),
            }
        }
        Err(Error::Exhausted { ranges: set.to_string() })
    }

    /// Frees every address of these owners.
    pub(crate) fn release(&self, owners: &BTreeSet<Owner>) -> Result<()> {
        for (ip, holder) in self.leases()? {
            // Very old versions of the reference wrote no interface name.
            let nameless = holder.ifname.is_empty() && owners.iter().any(|o| o.container_id == holder.container_id);
            if nameless || owners.contains(&holder) {
                self.remove(ip)?;
            }
        }
        Ok(())
    }

    /// Frees one address.
    pub(crate) fn remove(&self, ip: IpAddr) -> Result<()> {
        let path = self.dir.join(ip.to_string());
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::file("delete", &path)(error)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn set(subnet: &str) -> RangeSet {
        RangeSet(vec![Range::of_object(json!({"subnet": subnet}).as_object().cloned().unwrap()).unwrap()])
    }

    fn owner(id: &str) -> Owner {
        Owner { container_id: id.to_owned(), ifname: "eth0".to_owned() }
    }

    fn allocate(store: &Store, set: &RangeSet, id: &str) -> Result<String> {
        store.allocate(set, 0, &owner(id)).map(|(ip, _)| ip.to_string())
    }

    #[test]
    fn addresses_go_round_and_a_freed_one_rests() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), "boot").unwrap();
        let set = set("10.0.0.0/29");
        assert_eq!(allocate(&store, &set, "a").unwrap(), "10.0.0.2");
        assert_eq!(allocate(&store, &set, "b").unwrap(), "10.0.0.3");
        store.release(&BTreeSet::from([owner("a")])).unwrap();
        assert_eq!(allocate(&store, &set, "c").unwrap(), "10.0.0.4");
        assert_eq!(allocate(&store, &set, "d").unwrap(), "10.0.0.5");
        assert_eq!(allocate(&store, &set, "e").unwrap(), "10.0.0.6");
        assert_eq!(allocate(&store, &set, "f").unwrap(), "10.0.0.2", "only now");
        let error = allocate(&store, &set, "g").unwrap_err();
        assert_eq!(error.to_string(), "no IP addresses available in range set: 10.0.0.1-10.0.0.6");
    }

    #[test]
    fn a_lease_is_in_the_reference_s_format() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), "boot").unwrap();
        allocate(&store, &set("fd00::/64"), "a").unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("fd00::2")).unwrap(), "a\r\neth0");
        assert_eq!(fs::read_to_string(dir.path().join("last_reserved_ip.0")).unwrap(), "fd00::2");
    }

    #[test]
    fn a_reboot_frees_every_address() {
        let dir = tempfile::tempdir().unwrap();
        let set = set("10.0.0.0/28");
        for boot in 0..50 {
            let store = Store::open(dir.path(), &format!("boot {boot}")).unwrap();
            for pod in 0..10 {
                allocate(&store, &set, &format!("{boot}-{pod}")).unwrap();
            }
            assert_eq!(store.leases().unwrap().len(), 10);
        }
    }

    #[test]
    fn leases_of_the_reference_plugin_are_kept_when_the_folder_is_first_seen() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("10.0.0.2"), "old\r\neth0").unwrap();
        let store = Store::open(dir.path(), "boot").unwrap();
        assert_eq!(store.leases().unwrap(), [("10.0.0.2".parse().unwrap(), owner("old"))]);
        drop(store);
        assert_eq!(Store::open(dir.path(), "boot 2").unwrap().leases().unwrap(), []);
    }
}
