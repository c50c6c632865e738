//! One device plugin: the calls it answers, with their time limits. Keeps nothing of devices.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use super::wire::v1beta1 as wire;
use super::wire::v1beta1::device_plugin_client::DevicePluginClient;
use crate::volume::csi::drivers::connect;

/// The upstream's limit of PreStartContainer.
const PRE_START: Duration = Duration::from_secs(30);
/// Ours for the other calls, for which the upstream has none: a plugin that hangs must not keep all pods with devices waiting.
const CALL: Duration = Duration::from_secs(60);

/// A plugin that is connected.
#[derive(Clone, Debug)]
pub(crate) struct Plugin {
    client: DevicePluginClient<Channel>,
    /// It wants to be asked before each start.
    pub pre_starts: bool,
    /// It may prefer some devices to others.
    pub prefers: bool,
    /// Another plugin has taken its place.
    pub replaced: CancellationToken,
    /// It is not in the registry of plugins any more.
    pub gone: CancellationToken,
}

/// A status as Go prints it, which the upstream's messages have.
fn go_text(status: &Status) -> String {
    format!("rpc error: code = {:?} desc = {}", status.code(), status.message())
}

async fn limited<T>(limit: Duration, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, String> {
    match timeout(limit, call).await {
        Ok(answer) => answer.map(Response::into_inner).map_err(|status| go_text(&status)),
        Err(_) => Err("rpc error: code = DeadlineExceeded desc = context deadline exceeded".to_owned()),
    }
}

impl Plugin {
    /// One that answers nothing.
    #[cfg(test)]
    pub fn unconnected() -> Plugin {
        let channel = tonic::transport::Endpoint::from_static("http://unused").connect_lazy();
        let client = DevicePluginClient::new(channel);
        Plugin { client, pre_starts: false, prefers: false, replaced: CancellationToken::new(), gone: CancellationToken::new() }
    }

    /// Connects to a plugin's socket and asks what it wants.
    pub async fn connect(socket: &Path) -> Result<Plugin, String> {
        let channel = connect(socket).await.map_err(|why| format!("failed to dial device plugin: {why}"))?;
        let mut client = DevicePluginClient::new(channel);
        let options = limited(CALL, client.get_device_plugin_options(wire::Empty {})).await;
        let options = options.map_err(|why| format!("failed to get device plugin options: {why}"))?;
        Ok(Plugin {
            client,
            pre_starts: options.pre_start_required,
            prefers: options.get_preferred_allocation_available,
            replaced: CancellationToken::new(),
            gone: CancellationToken::new(),
        })
    }

    /// Its lists of devices, for as long as it is there.
    pub async fn watch(&self) -> Result<Streaming<wire::ListAndWatchResponse>, String> {
        limited(CALL, self.client.clone().list_and_watch(wire::Empty {})).await
    }

    /// Which of these it prefers, where it does.
    pub async fn preferred(
        &self,
        available: &BTreeSet<String>,
        certain: &BTreeSet<String>,
        count: usize,
    ) -> Result<BTreeSet<String>, String> {
        if !self.prefers {
            return Ok(BTreeSet::new());
        }
        let request = wire::ContainerPreferredAllocationRequest {
            available_device_i_ds: available.iter().cloned().collect(),
            must_include_device_i_ds: certain.iter().cloned().collect(),
            allocation_size: i32::try_from(count).unwrap_or(i32::MAX),
        };
        let request = wire::PreferredAllocationRequest { container_requests: vec![request] };
        let answer = limited(CALL, self.client.clone().get_preferred_allocation(request)).await;
        let answer = answer.map_err(|why| format!("device plugin GetPreferredAllocation rpc failed with err: {why}"))?;
        Ok(answer.container_responses.into_iter().next().map(|first| first.device_i_ds).unwrap_or_default().into_iter().collect())
    }

    /// Has devices made ready for a container.
    pub async fn allocate(&self, ids: &BTreeSet<String>) -> Result<wire::ContainerAllocateResponse, String> {
        let request = wire::ContainerAllocateRequest { devices_ids: ids.iter().cloned().collect() };
        let request = wire::AllocateRequest { container_requests: vec![request] };
        let answer = limited(CALL, self.client.clone().allocate(request)).await?;
        let none = || "no containers return in allocation response".to_owned();
        answer.container_responses.into_iter().next().ok_or_else(none)
    }

    /// Tells that a container with these devices is about to start, where it wants to know.
    pub async fn pre_start(&self, ids: &BTreeSet<String>) -> Result<(), String> {
        if !self.pre_starts {
            return Ok(());
        }
        let request = wire::PreStartContainerRequest { devices_ids: ids.iter().cloned().collect() };
        let answer = limited(PRE_START, self.client.clone().pre_start_container(request)).await;
        answer.map(|_| ()).map_err(|why| format!("device plugin PreStartContainer rpc failed with err: {why}"))
    }
}
