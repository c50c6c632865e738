//! What the edge reads off the board: filtered lists, lookups by id, statistics.

use berth_cri_api::v1;
use futures::StreamExt;
use tonic::{Response, Status};

use super::runtime::{RuntimeEdge, Stream};
use crate::board::{ShownContainer, ShownSandbox};
use crate::convert::status;
use crate::stats;

/// How many items one message of a streaming list carries.
const CHUNK: usize = 64;

/// The items as a stream of messages; none for an empty list.
pub(super) fn chunks<T: Send + 'static, R: Send + 'static>(
    items: Vec<T>,
    wrap: impl Fn(Vec<T>) -> R + Send + 'static,
) -> Response<Stream<R>> {
    let mut items = items.into_iter();
    let chunks = std::iter::from_fn(move || {
        let chunk: Vec<T> = items.by_ref().take(CHUNK).collect();
        (!chunk.is_empty()).then(|| Ok(wrap(chunk)))
    });
    Response::new(futures::stream::iter(chunks).boxed())
}

impl RuntimeEdge {
    pub(super) fn sandboxes(&self, filter: Option<v1::PodSandboxFilter>) -> Vec<v1::PodSandbox> {
        let filter = status::SandboxFilter::new(filter);
        self.server.board.sandboxes().iter().filter(|v| filter.matches(v)).map(|v| status::sandbox_item(v)).collect()
    }

    pub(super) fn containers(&self, filter: Option<v1::ContainerFilter>) -> Vec<v1::Container> {
        let filter = status::ContainerFilter::new(filter);
        self.server.board.containers().iter().filter(|v| filter.matches(v)).map(|v| status::container_item(v)).collect()
    }

    pub(super) fn container(&self, id: &str) -> Result<ShownContainer, Status> {
        Ok(self.server.board.need_container(id)?)
    }

    pub(super) fn sandbox(&self, id: &str) -> Result<ShownSandbox, Status> {
        Ok(self.server.board.need_sandbox(id)?)
    }

    pub(super) async fn container_stats(&self, filter: status::ContainerFilter) -> Vec<v1::ContainerStats> {
        stats::containers(&self.server, move |view| filter.matches(view)).await
    }

    pub(super) async fn sandbox_stats(&self, filter: Option<v1::PodSandboxStatsFilter>) -> Vec<v1::PodSandboxStats> {
        let filter = filter.unwrap_or_default();
        let filter = status::SandboxFilter::new(Some(v1::PodSandboxFilter {
            id: filter.id,
            state: None,
            label_selector: filter.label_selector,
        }));
        stats::sandboxes(&self.server, move |view| filter.matches(view)).await
    }
}
