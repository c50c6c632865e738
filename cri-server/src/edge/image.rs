//! stub
use std::sync::Arc;
use berth_cri_api::v1::{self, image_service_server::ImageService};
use futures::stream::BoxStream;
use tonic::{Request, Response, Status};

/// The image edge.
#[derive(Clone)]
pub struct ImageEdge {
    #[allow(dead_code)]
    pub(crate) server: Arc<crate::Server>,
}

#[tonic::async_trait]
impl ImageService for ImageEdge {
    async fn list_images(&self, _request: Request<v1::ListImagesRequest>) -> Result<Response<v1::ListImagesResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    type StreamImagesStream = BoxStream<'static, Result<v1::StreamImagesResponse, Status>>;
    async fn stream_images(&self, _request: Request<v1::StreamImagesRequest>) -> Result<Response<Self::StreamImagesStream>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn image_status(&self, _request: Request<v1::ImageStatusRequest>) -> Result<Response<v1::ImageStatusResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn pull_image(&self, _request: Request<v1::PullImageRequest>) -> Result<Response<v1::PullImageResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn remove_image(&self, _request: Request<v1::RemoveImageRequest>) -> Result<Response<v1::RemoveImageResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn image_fs_info(&self, _request: Request<v1::ImageFsInfoRequest>) -> Result<Response<v1::ImageFsInfoResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
}
