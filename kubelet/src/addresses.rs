//! The node's own addresses while they may change: a machine gets its address late, or another one. Looks now and then and tells the
//! main loop; statuses and probes follow, nothing is restarted. Where addresses come from is the configuration's business.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::watch;

use crate::config::Config;
use crate::control::PodControl;

/// Finds the node's addresses, the primary one first; none: there are none now, and those known before stay.
#[derive(Clone)]
pub struct AddressSource(Arc<dyn Fn() -> Vec<IpAddr> + Send + Sync>);

impl AddressSource {
    /// A source that asks `find` each time; it may block.
    pub fn from_fn(find: impl Fn() -> Vec<IpAddr> + Send + Sync + 'static) -> AddressSource {
        AddressSource(Arc::new(find))
    }

    /// The addresses of this moment.
    pub fn find(&self) -> Vec<IpAddr> {
        (self.0)()
    }
}

impl fmt::Debug for AddressSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AddressSource")
    }
}

/// Looks every [`crate::Timing::addresses`] and tells the main loop and who follows `now`; without a source at nothing.
pub(crate) async fn run(config: Arc<Config>, control: PodControl, now: watch::Sender<Vec<IpAddr>>) {
    let Some(source) = config.node_ip_source.clone() else { return };
    let mut known = config.node_ips.clone();
    loop {
        tokio::time::sleep(config.timing.addresses).await;
        let find = source.0.clone();
        let Ok(found) = tokio::task::spawn_blocking(move || find()).await else { continue };
        if found.is_empty() || found == known {
            continue;
        }
        tracing::info!(before = ?known, now = ?found, "the node's addresses have changed");
        control.set_addresses(found.iter().map(ToString::to_string).collect());
        now.send_replace(found.clone());
        known = found;
    }
}
