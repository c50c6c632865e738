//! The two lists that every client polls, answered from list items that are encoded once per change instead of once per call.
//! Sits in front of the generated service, which answers everything else; must not filter or convert otherwise than it does.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::task::{Context, Poll};

use berth_cri_api::MAX_MESSAGE_BYTES;
use berth_cri_api::v1::{self, runtime_service_server::RuntimeServiceServer};
use bytes::Bytes;
use futures::future::BoxFuture;
use prost::Message;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use super::runtime::RuntimeEdge;
use crate::Server;
use crate::convert::status;

/// `ListPodSandboxResponse` and `ListContainersResponse` on the wire: both are items in field 1, and an embedded message is
/// encoded as bytes are.
#[derive(Clone, PartialEq, Message)]
struct Items {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    items: Vec<Bytes>,
}

#[derive(Clone)]
struct Sandboxes(Arc<Server>);

impl UnaryService<v1::ListPodSandboxRequest> for Sandboxes {
    type Response = Items;
    type Future = Ready<Result<Response<Items>, Status>>;

    fn call(&mut self, request: Request<v1::ListPodSandboxRequest>) -> Self::Future {
        let filter = status::SandboxFilter::new(request.into_inner().filter);
        let shown = self.0.board.sandboxes();
        let item = |view: &_| Bytes::from(status::sandbox_item(view).encode_to_vec());
        let items = shown.iter().filter(|v| filter.matches(v)).map(|v| v.item(item)).collect();
        ready(Ok(Response::new(Items { items })))
    }
}

#[derive(Clone)]
struct Containers(Arc<Server>);

impl UnaryService<v1::ListContainersRequest> for Containers {
    type Response = Items;
    type Future = Ready<Result<Response<Items>, Status>>;

    fn call(&mut self, request: Request<v1::ListContainersRequest>) -> Self::Future {
        let filter = status::ContainerFilter::new(request.into_inner().filter);
        let shown = self.0.board.containers();
        let item = |view: &_| Bytes::from(status::container_item(view).encode_to_vec());
        let items = shown.iter().filter(|v| filter.matches(v)).map(|v| v.item(item)).collect();
        ready(Ok(Response::new(Items { items })))
    }
}

/// The RuntimeService as it is served.
#[derive(Clone)]
pub struct RuntimeApi {
    server: Arc<Server>,
    rest: RuntimeServiceServer<RuntimeEdge>,
}

impl RuntimeApi {
    pub(crate) fn new(server: Arc<Server>) -> Self {
        let rest = RuntimeServiceServer::new(RuntimeEdge { server: server.clone() })
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Self { server, rest }
    }
}

impl NamedService for RuntimeApi {
    const NAME: &'static str = <RuntimeServiceServer<RuntimeEdge> as NamedService>::NAME;
}

impl Service<http::Request<Body>> for RuntimeApi {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match request.uri().path() {
            "/runtime.v1.RuntimeService/ListPodSandbox" => answer(Sandboxes(self.server.clone()), request),
            "/runtime.v1.RuntimeService/ListContainers" => answer(Containers(self.server.clone()), request),
            _ => self.rest.call(request),
        }
    }
}

fn answer<S, R>(list: S, request: http::Request<Body>) -> BoxFuture<'static, Result<http::Response<Body>, Infallible>>
where
    S: UnaryService<R, Response = Items> + Send + 'static,
    S::Future: Send,
    R: Message + Default + 'static,
{
    let mut grpc = Grpc::new(ProstCodec::<Items, R>::default())
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    Box::pin(async move { Ok(grpc.unary(list, request).await) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoded_items_are_the_wire_form_of_both_lists() {
        let sandboxes = vec![
            v1::PodSandbox { id: "a".into(), created_at: 7, ..Default::default() },
            v1::PodSandbox::default(),
            v1::PodSandbox { labels: [("k".to_owned(), "v".to_owned())].into(), state: 1, ..Default::default() },
        ];
        let items = Items { items: sandboxes.iter().map(|s| s.encode_to_vec().into()).collect() };
        let read = v1::ListPodSandboxResponse::decode(items.encode_to_vec().as_slice()).unwrap();
        assert_eq!(read.items, sandboxes);

        let containers = vec![v1::Container { id: "c".into(), ..Default::default() }, v1::Container::default()];
        let items = Items { items: containers.iter().map(|c| c.encode_to_vec().into()).collect() };
        let read = v1::ListContainersResponse::decode(items.encode_to_vec().as_slice()).unwrap();
        assert_eq!(read.containers, containers);
    }
}
