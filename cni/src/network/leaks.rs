//! What is of this instance and has no living owner, found by its marks and records. It changes nothing, and needs no running network.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::config::{Leak, NetworkConfig};
use super::inner::{Inner, is_of_boot, owner_of};
use crate::cache::{Cache, CachedResult};
use crate::kernel::Kernel;
use crate::names::Names;
use crate::netlink::link;
use crate::plugins::host_local::{Owner, leases_in};
use crate::plugins::portmap;
use crate::reaper::Pending;
use crate::{Error, Result, records};

/// What is on record.
pub(super) struct Records {
    names: Names,
    lease_folders: Vec<PathBuf>,
    boot_id: String,
    cached: Vec<CachedResult>,
    pending: Vec<Pending>,
}

impl Records {
    /// Those of a running network.
    pub(super) fn of(inner: &Inner) -> Result<Self> {
        Ok(Self {
            names: inner.host.names.clone(),
            lease_folders: lease_folders(&inner.host.lease_dir),
            boot_id: inner.host.boot_id.clone(),
            cached: inner.cached()?,
            pending: inner.reaper.pending()?,
        })
    }

    /// Those that a network which does not run has left. What another boot has left in the state folder is void, as it is for the next start.
    fn left_by(config: &NetworkConfig) -> Result<Self> {
        let boot_id = records::boot_id()?;
        let cache = Cache::new(&config.state_dir, &config.cache_dir);
        let valid = is_of_boot(&config.state_dir, &boot_id);
        Ok(Self {
            names: Names::of_instance(&config.instance)?,
            lease_folders: if valid { lease_folders(&config.state_dir.join("leases")) } else { Vec::new() },
            cached: if valid { cache.list(|_| true)? } else { cache.list_lasting(|_| true)? },
            pending: if valid { records::list(&super::inner::pending_dir(&config.state_dir))? } else { Vec::new() },
            boot_id,
        })
    }

    /// Host-side veths of ours that belong to no live sandbox and wait for no deletion.
    pub(super) fn orphan_links(&self, links: Vec<link::Link>, live: &BTreeSet<String>) -> Vec<String> {
        let mut owned: BTreeSet<String> = live.iter().map(|id| self.names.veth(id, "eth0")).collect();
        let cached = self.cached.iter().filter(|cached| live.contains(&cached.container_id));
        owned.extend(cached.map(|cached| self.names.veth(&cached.container_id, &cached.if_name)));
        owned.extend(self.pending.iter().map(|pending| pending.link.clone()));
        let is_orphan = |link: &link::Link| {
            link.kind == "veth" && link.name.starts_with(&self.names.veth_prefix) && !owned.contains(&link.name)
        };
        links.into_iter().filter(is_orphan).map(|link| link.name).collect()
    }

    /// Those leases that belong to no live sandbox and wait for no deletion.
    pub(super) fn orphan_leases(&self, leases: Vec<(IpAddr, Owner)>, live: &BTreeSet<String>) -> Vec<(IpAddr, Owner)> {
        let pending: BTreeSet<&Owner> = self.pending.iter().map(|pending| &pending.owner).collect();
        let is_orphan = |owner: &Owner| !live.contains(&owner.container_id) && !pending.contains(owner);
        leases.into_iter().filter(|(_, owner)| is_orphan(owner)).collect()
    }

    fn leaks(&self, kernel: &mut Kernel, live: &BTreeSet<String>) -> Result<Vec<Leak>> {
        let links = link::dump_links(&mut kernel.route).map_err(Error::netlink("list", "links"))?;
        let mut leaks: Vec<Leak> = self.orphan_links(links, live).into_iter().map(Leak::Link).collect();
        for folder in &self.lease_folders {
            let orphans = self.orphan_leases(leases_in(folder, &self.boot_id)?, live);
            leaks.extend(orphans.into_iter().map(|(ip, owner)| Leak::Address(ip.to_string(), owner.container_id)));
        }
        let elements = kernel.elements_of(|owner| !is_owned(owner, live))?;
        leaks.extend(elements.into_iter().map(|element| Leak::HostPort(element.describe(), element.owner)));
        let dead = self.cached.iter().filter(|cached| !live.contains(&cached.container_id));
        leaks.extend(dead.map(|cached| Leak::Record(portmap::owner_text(&owner_of(cached)))));
        leaks.sort_unstable();
        Ok(leaks)
    }
}

/// Folders of leases below our own lease folder: one a network.
pub(super) fn lease_folders(lease_dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(lease_dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// Whether the owner of a host port lives.
pub(super) fn is_owned(owner: &str, live: &BTreeSet<String>) -> bool {
    live.contains(owner.split_once('/').map_or(owner, |(id, _)| id))
}

pub(super) async fn leaks(inner: &Arc<Inner>, live: &BTreeSet<String>) -> Result<Vec<Leak>> {
    let (records, live) = (Records::of(inner)?, live.clone());
    inner.host.worker.run(move |kernel| records.leaks(kernel, &live)).await
}

/// Starts no thread and writes nothing. Blocking.
pub(super) fn leaks_on_record(config: &NetworkConfig, live: &BTreeSet<String>) -> Result<Vec<Leak>> {
    let records = Records::left_by(config)?;
    let mut kernel = Kernel::open(&records.names.table, config.state_dir.join("nat.json"))?;
    records.leaks(&mut kernel, live)
}
