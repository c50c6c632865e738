//! From the names in a path to the pod and the container that they mean.

use std::sync::Arc;

use berth_cri_api::v1 as cri;
use http::{Response, StatusCode};
use k8s_openapi::api::core::v1::Pod;

use super::{Api, Body, text};
use crate::cri::keys;
use crate::pod;

/// What a path names.
pub(super) struct Asked<'a> {
    pub(super) namespace: &'a str,
    pub(super) pod: &'a str,
    pub(super) uid: Option<&'a str>,
    pub(super) container: &'a str,
}

type Found<T> = Result<T, Box<Response<Body>>>;

impl Asked<'_> {
    /// The pod of these names; the newest where several are on record.
    pub(super) fn pod(&self, api: &Api) -> Found<Arc<Pod>> {
        let pods = api.table.list();
        let is_it = |p: &&Arc<Pod>| {
            pod::name(p) == self.pod && pod::namespace(p) == self.namespace && self.uid.is_none_or(|uid| pod::uid(p) == uid)
        };
        let found = pods.iter().rev().find(is_it).cloned();
        found.ok_or_else(|| Box::new(text(StatusCode::NOT_FOUND, "pod does not exist")))
    }

    /// The pod, and its container of that name which runs now.
    pub(super) async fn running(&self, api: &Api) -> Found<(Arc<Pod>, cri::Container)> {
        let pod = self.pod(api)?;
        let failed = |problem: String| Box::new(text(StatusCode::INTERNAL_SERVER_ERROR, problem));
        let listed = api.runtime.list_containers(pod.metadata.uid.as_deref()).await.map_err(|e| failed(e.to_string()))?;
        let is_it = |c: &cri::Container| {
            c.state() == cri::ContainerState::ContainerRunning
                && c.labels.get(keys::CONTAINER_NAME).is_some_and(|name| name == self.container)
        };
        let found = listed.into_iter().filter(is_it).max_by_key(|c| c.created_at);
        let container = found.ok_or_else(|| failed(format!("container not found ({:?})", self.container)))?;
        Ok((pod, container))
    }
}
