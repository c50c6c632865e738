//! An API server of canned answers, for tests: each request gets the next one, and is written down.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use kube::client::Body;
use serde_json::{Value, json};

/// What was asked: the method with the path, and the body.
pub(crate) type Asked = Arc<Mutex<Vec<(String, Value)>>>;

/// A client of a server that gives these answers in turn, and 500 after them.
pub(crate) fn server(answers: Vec<(u16, Value)>) -> (kube::Client, Asked) {
    let (answers, asked) = (Arc::new(Mutex::new(VecDeque::from(answers))), Asked::default());
    let heard = asked.clone();
    let service = tower::service_fn(move |request: Request<Body>| {
        let (answers, heard) = (answers.clone(), heard.clone());
        async move {
            let what = format!("{} {}", request.method(), request.uri().path());
            let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            heard.lock().unwrap().push((what, serde_json::from_slice(&body).unwrap_or_default()));
            let (code, answer) = answers.lock().unwrap().pop_front().unwrap_or((500, refusal(500, "InternalError")));
            let response = Response::builder().status(code).body(Full::new(Bytes::from(answer.to_string())));
            Ok::<_, Infallible>(response.unwrap())
        }
    });
    (kube::Client::new(service, "default"), asked)
}

/// The body of a refusal.
pub(crate) fn refusal(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code, "message": reason})
}

/// The methods and paths that were asked for.
pub(crate) fn calls(asked: &Asked) -> Vec<String> {
    asked.lock().unwrap().iter().map(|(what, _)| what.clone()).collect()
}
