//! Counts and times the calls of the runtime, whoever makes them, where they leave for the socket.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::time::Instant;
use tonic::body::Body;
use tonic::transport::Channel;
use tower::Service;

use super::{Metrics, families};

/// A channel whose calls are counted.
#[derive(Clone, Debug)]
pub(crate) struct Counted {
    channel: Channel,
    metrics: Metrics,
}

impl Counted {
    pub(crate) fn new(channel: Channel, metrics: Metrics) -> Counted {
        Counted { channel, metrics }
    }
}

impl Service<http::Request<Body>> for Counted {
    type Response = http::Response<Body>;
    type Error = tonic::transport::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.channel.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let operation = operation(request.uri().path());
        let call = Call { operation, metrics: self.metrics.clone(), begun: Instant::now(), well: false };
        let answer = self.channel.call(request);
        Box::pin(async move {
            // As a whole: captured in parts it would end here.
            let mut call = call;
            let answer = answer.await?;
            // A failure has no message: its status comes with the headers.
            call.well = answer.headers().get("grpc-status").is_none_or(|status| status == "0");
            Ok(answer)
        })
    }
}

/// A call under way. One that is given up has failed.
struct Call {
    operation: String,
    metrics: Metrics,
    begun: Instant,
    well: bool,
}

impl Drop for Call {
    fn drop(&mut self) {
        let labels = [self.operation.as_str()];
        self.metrics.count(&families::OPERATIONS, &labels);
        self.metrics.observe(&families::OPERATION_SECONDS, &labels, self.begun.elapsed());
        if !self.well {
            self.metrics.count(&families::OPERATION_ERRORS, &labels);
        }
    }
}

/// `/runtime.v1.RuntimeService/RunPodSandbox` → `run_podsandbox`, as upstream writes it.
fn operation(path: &str) -> String {
    let call = path.rsplit('/').next().unwrap_or_default().replace("PodSandbox", "Podsandbox");
    if call == "UpdateContainerResources" {
        return "update_container".to_owned();
    }
    let mut out = String::with_capacity(call.len() + 4);
    for c in call.chars() {
        if c.is_ascii_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_have_the_upstreams_names() {
        let of = |call: &str| operation(&format!("/runtime.v1.RuntimeService/{call}"));
        for (call, name) in [
            ("Version", "version"),
            ("RunPodSandbox", "run_podsandbox"),
            ("PodSandboxStatus", "podsandbox_status"),
            ("ListPodSandbox", "list_podsandbox"),
            ("UpdateContainerResources", "update_container"),
            ("ExecSync", "exec_sync"),
            ("PortForward", "port_forward"),
            ("ImageFsInfo", "image_fs_info"),
        ] {
            assert_eq!(of(call), name);
        }
    }
}
