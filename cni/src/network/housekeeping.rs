//! What nobody owns any more is removed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::attach::delete;
use super::inner::{Inner, owner_of};
use super::leaks::{Records, is_owned, lease_folders};
use crate::cache::CachedResult;
use crate::conf::NetworkConf;
use crate::netlink::link;
use crate::plugins::host_local::{Owner, Store};
use crate::reaper::Pending;
use crate::result::{CniResult, CniVersion};
use crate::{Error, PodNetwork, Result};

/// Runs to its end whatever the caller does: a dropped call must not leave half of it.
pub(super) async fn reconcile(inner: &Arc<Inner>, live: &BTreeSet<String>) -> Result<()> {
    let (inner, live) = (Arc::clone(inner), live.clone());
    let task = tokio::spawn(async move { reconcile_now(&inner, &live).await });
    task.await.map_err(|_| Error::WorkerEnded)?
}

async fn reconcile_now(inner: &Inner, live: &BTreeSet<String>) -> Result<()> {
    let cached = inner.cached()?;
    let (kept, dead): (Vec<CachedResult>, Vec<CachedResult>) =
        cached.into_iter().partition(|cached| live.contains(&cached.container_id));
    let mut outcome = Ok(());
    for cached in dead {
        let pod = PodNetwork { sandbox_id: cached.container_id.clone(), ifname: cached.if_name.clone(), ..PodNetwork::default() };
        outcome = outcome.and(delete(inner, &pod, None).await);
    }
    let valid: BTreeSet<Owner> = kept.iter().map(owner_of).collect();
    let valid = valid.into_iter().chain(live.iter().map(|id| Owner { container_id: id.clone(), ifname: "eth0".to_owned() }));
    let valid: BTreeSet<Owner> = valid.collect();
    outcome = outcome.and(drop_links(inner, live).await);
    outcome = outcome.and(drop_host_ports(inner, live).await);
    outcome = outcome.and(drop_leases(inner, live).await);
    for conf in networks(inner, &kept) {
        outcome = outcome.and(inner.chain(&conf).collect(&keep_pending(inner, &valid)?).await);
    }
    outcome.and(settle_nat(inner, &kept).await)
}

/// The network in use, and those that living pods were attached to before the configuration changed: each name once.
fn networks(inner: &Inner, kept: &[CachedResult]) -> Vec<NetworkConf> {
    let mut networks = BTreeMap::new();
    if let Ok(current) = inner.current() {
        networks.insert(current.conf.name.clone(), (*current.conf).clone());
    }
    for cached in kept {
        let conf = cached.config_bytes().and_then(|bytes| NetworkConf::parse(&bytes, "cached result", None));
        if let Ok(conf) = conf {
            networks.entry(conf.name.clone()).or_insert(conf);
        }
    }
    networks.into_values().collect()
}

/// An address whose link waits for its deletion is not free yet: the reaper frees it.
fn keep_pending(inner: &Inner, valid: &BTreeSet<Owner>) -> Result<BTreeSet<Owner>> {
    Ok(valid.iter().cloned().chain(inner.reaper.pending()?.into_iter().map(|pending| pending.owner)).collect())
}

async fn drop_links(inner: &Inner, live: &BTreeSet<String>) -> Result<()> {
    let links =
        inner.host.worker.run(|kernel| link::dump_links(&mut kernel.route).map_err(Error::netlink("list", "links"))).await?;
    for name in Records::of(inner)?.orphan_links(links, live) {
        // The link's own name stands for the owner that nobody knows any more.
        let pending = Pending {
            owner: Owner { container_id: name.clone(), ifname: "orphan".to_owned() },
            link: name.clone(),
            leases: None,
        };
        inner.reaper.record(&pending)?;
        inner.host.worker.run(move |kernel| kernel.route.one(link::set_detached(&name)).or(Ok(()))).await?;
        inner.reaper.push(pending)?;
    }
    Ok(())
}

async fn drop_host_ports(inner: &Inner, live: &BTreeSet<String>) -> Result<()> {
    let live = live.clone();
    inner.host.worker.run(move |kernel| kernel.retain_host_ports(|owner| is_owned(owner, &live))).await
}

async fn drop_leases(inner: &Inner, live: &BTreeSet<String>) -> Result<()> {
    for folder in lease_folders(&inner.host.lease_dir) {
        let store = Store::open(&folder, &inner.host.boot_id)?;
        // Read under the store's lock.
        for (ip, _) in Records::of(inner)?.orphan_leases(store.leases()?, live) {
            store.remove(ip)?;
        }
    }
    Ok(())
}

/// NAT rules for the subnets of living pods and of the network in use alone, and the host ports of living pods back in place.
async fn settle_nat(inner: &Inner, kept: &[CachedResult]) -> Result<()> {
    let mut used = BTreeSet::new();
    for cached in kept {
        if let Ok(result) = CniResult::parse(&cached.result, CniVersion::V1_1_0, "cached result") {
            used.extend(result.ips.iter().map(|ip| ip.address.network()));
        }
    }
    inner
        .host
        .worker
        .run(move |kernel| {
            if !kernel.uses_nat() {
                return Ok(());
            }
            let mut nat = kernel.nat().clone();
            nat.subnets = kernel.nat().subnets.iter().filter(|subnet| used.contains(&subnet.network)).copied().collect();
            kernel.replace_nat(nat)?;
            kernel.repair()
        })
        .await
}

pub(super) async fn remove_all(inner: &Inner) -> Result<()> {
    let bridge = inner.host.names.bridge.clone();
    inner
        .host
        .worker
        .run(move |kernel| {
            kernel.bridges.remove(&bridge);
            let deleted = link::delete(&mut kernel.route, &bridge).map_err(Error::netlink("delete", bridge));
            deleted.and(kernel.delete_table())
        })
        .await
}
