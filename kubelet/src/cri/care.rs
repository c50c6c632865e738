//! The calls by which the node takes care of itself: images, statistics, logs.

use berth_cri_api::v1 as cri;

use super::{Runtime, image_spec, limited, unless_absent};
use crate::Result;

impl Runtime {
    /// All images.
    pub async fn list_images(&self) -> Result<Vec<cri::Image>> {
        let mut client = self.images.clone();
        let call = client.list_images(cri::ListImagesRequest::default());
        Ok(limited("ListImages", self.timing.cri_call, call).await?.images)
    }

    /// Removes an image by its ID; an absent one is removed.
    pub async fn remove_image(&self, id: &str) -> Result<()> {
        let request = cri::RemoveImageRequest { image: Some(image_spec(id)) };
        let mut client = self.images.clone();
        unless_absent(limited("RemoveImage", self.timing.cri_call, client.remove_image(request)).await)?;
        Ok(())
    }

    /// Has a container's log file opened anew, after it was renamed.
    pub async fn reopen_container_log(&self, id: &str) -> Result<()> {
        let request = cri::ReopenContainerLogRequest { container_id: id.to_owned() };
        let mut client = self.runtime.clone();
        limited("ReopenContainerLog", self.timing.cri_call, client.reopen_container_log(request)).await?;
        Ok(())
    }

    /// Tells the runtime the address ranges of this node's pods, with commas between.
    pub async fn update_pod_cidr(&self, pod_cidr: &str) -> Result<()> {
        let network_config = Some(cri::NetworkConfig { pod_cidr: pod_cidr.to_owned() });
        let request = cri::UpdateRuntimeConfigRequest { runtime_config: Some(cri::RuntimeConfig { network_config }) };
        let mut client = self.runtime.clone();
        limited("UpdateRuntimeConfig", self.timing.cri_call, client.update_runtime_config(request)).await?;
        Ok(())
    }
}
