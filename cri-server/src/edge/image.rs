//! ImageService: each call converts, submits to the image store's own operations, awaits.

use std::sync::Arc;

use berth_cri_api::v1::{self, image_service_server::ImageService};
use berth_image::{AuthFields, Credentials, ErrorKind, Image, ImageUser, Reference};
use futures::StreamExt;
use futures::stream::BoxStream;
use tonic::{Code, Request, Response, Status};

use super::verbose;
use crate::Server;
use crate::error::{Error, invalid, text};

/// The edge of the ImageService.
#[derive(Clone)]
pub struct ImageEdge {
    pub(crate) server: Arc<Server>,
}

fn wire(image: &Image) -> v1::Image {
    let (uid, username) = match &image.user {
        ImageUser::Unset => (None, String::new()),
        ImageUser::Uid(value) => (Some(v1::Int64Value { value: *value }), String::new()),
        ImageUser::Name(name) => (None, name.clone()),
    };
    v1::Image {
        id: image.id.to_string(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size.max(1),
        uid,
        username,
        spec: Some(v1::ImageSpec { image: image.id.to_string(), ..Default::default() }),
        pinned: image.pinned,
    }
}

/// The status of a failed image operation. The kubelet reads the beginning of the text.
fn status(error: &berth_image::Error) -> Status {
    let message = text(error);
    match error.kind() {
        ErrorKind::InvalidArgument => Status::invalid_argument(message),
        ErrorKind::NotFound => Status::not_found(message),
        ErrorKind::Canceled => Status::cancelled(message),
        ErrorKind::Unavailable => Status::unknown(format!("RegistryUnavailable: {message}")),
        ErrorKind::Unsupported => Status::unimplemented(message),
        ErrorKind::NoSpace => Status::resource_exhausted(message),
        _ => Status::unknown(message),
    }
}

impl ImageEdge {
    fn images(&self, filter: Option<v1::ImageFilter>) -> Vec<v1::Image> {
        match filter.and_then(|f| f.image).map(|i| i.image).filter(|n| !n.is_empty()) {
            Some(name) => self.server.images.status(&name).iter().map(wire).collect(),
            None => self.server.images.list().iter().map(wire).collect(),
        }
    }
}

fn name(spec: Option<v1::ImageSpec>) -> Result<String, Error> {
    spec.map(|s| s.image).filter(|n| !n.is_empty()).ok_or_else(|| invalid("image.image", "empty"))
}

/// The client's own deadline. tonic would end the call with Cancelled; the contract wants DeadlineExceeded.
fn deadline<T>(request: &Request<T>) -> Option<std::time::Duration> {
    let text = request.metadata().get("grpc-timeout")?.to_str().ok()?;
    let (number, unit) = text.split_at(text.len().checked_sub(1)?);
    let number: u64 = number.parse().ok()?;
    use std::time::Duration;
    Some(match unit {
        "H" => Duration::from_secs(number.saturating_mul(3600)),
        "M" => Duration::from_secs(number.saturating_mul(60)),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[tonic::async_trait]
impl ImageService for ImageEdge {
    async fn list_images(&self, request: Request<v1::ListImagesRequest>) -> Result<Response<v1::ListImagesResponse>, Status> {
        Ok(Response::new(v1::ListImagesResponse { images: self.images(request.into_inner().filter) }))
    }

    type StreamImagesStream = BoxStream<'static, Result<v1::StreamImagesResponse, Status>>;
    async fn stream_images(
        &self,
        request: Request<v1::StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let images = self.images(request.into_inner().filter);
        let messages: Vec<_> = images.chunks(64).map(|c| Ok(v1::StreamImagesResponse { images: c.to_vec() })).collect();
        Ok(Response::new(futures::stream::iter(messages).boxed()))
    }

    async fn image_status(&self, request: Request<v1::ImageStatusRequest>) -> Result<Response<v1::ImageStatusResponse>, Status> {
        let request = request.into_inner();
        let image = self.server.images.status(&name(request.image)?);
        let config = image.as_ref().filter(|_| request.verbose).and_then(|i| self.server.images.config(&i.id).ok());
        Ok(Response::new(v1::ImageStatusResponse {
            image: image.as_ref().map(wire),
            info: config.map(|c| verbose::image(&c)).unwrap_or_default(),
        }))
    }

    async fn pull_image(&self, request: Request<v1::PullImageRequest>) -> Result<Response<v1::PullImageResponse>, Status> {
        let limit = deadline(&request);
        let request = request.into_inner();
        let name = name(request.image)?;
        let reference = Reference::parse(&name).map_err(|e| status(&e))?;
        let auth = request.auth.unwrap_or_default();
        let credentials = Credentials::from_fields(AuthFields {
            username: &auth.username,
            password: &auth.password,
            auth: &auth.auth,
            server_address: &auth.server_address,
            identity_token: &auth.identity_token,
            registry_token: &auth.registry_token,
        })
        .map_err(|e| status(&e))?;
        let begun = std::time::Instant::now();
        let pull = self.server.images.pull(&reference, credentials);
        let pulled = match limit {
            Some(limit) => match tokio::time::timeout(limit, pull).await {
                Ok(pulled) => pulled,
                Err(_) => return Err(Status::new(Code::DeadlineExceeded, format!("pulling {name:?}: the deadline has passed"))),
            },
            None => pull.await,
        };
        let id = pulled.map_err(|e| status(&e))?;
        let took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(image = name, %id, took_ms, "image pulled");
        Ok(Response::new(v1::PullImageResponse { image_ref: id.to_string() }))
    }

    async fn remove_image(&self, request: Request<v1::RemoveImageRequest>) -> Result<Response<v1::RemoveImageResponse>, Status> {
        let name = name(request.into_inner().image)?;
        self.server.images.remove(&name).await.map_err(|e| status(&e))?;
        tracing::info!(image = name, "image removed");
        Ok(Response::new(v1::RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _request: Request<v1::ImageFsInfoRequest>,
    ) -> Result<Response<v1::ImageFsInfoResponse>, Status> {
        let usage = self.server.images.fs_usage();
        let filesystem = v1::FilesystemUsage {
            timestamp: crate::clock::now_ns(),
            fs_id: Some(v1::FilesystemIdentifier { mountpoint: usage.mountpoint.to_string_lossy().into_owned() }),
            used_bytes: Some(v1::UInt64Value { value: usage.bytes }),
            inodes_used: Some(v1::UInt64Value { value: usage.inodes }),
        };
        Ok(Response::new(v1::ImageFsInfoResponse { image_filesystems: vec![filesystem], container_filesystems: Vec::new() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_deadline_is_read_in_all_units() {
        for (text, want) in [("1m", Some(1_000_000)), ("2S", Some(2_000_000_000)), ("5u", Some(5_000)), ("x", None), ("", None)] {
            let mut request = Request::new(());
            if let Ok(value) = text.parse() {
                request.metadata_mut().insert("grpc-timeout", value);
            }
            assert_eq!(deadline(&request).map(|d| d.as_nanos()), want, "{text}");
        }
    }
}
