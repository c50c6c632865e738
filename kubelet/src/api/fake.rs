//! Tests only: an API server in memory, as far as objects are read, followed and tokens asked for.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnboundedReceiverStream;

struct Watch {
    collection: String,
    name: Option<String>,
    events: UnboundedSender<Bytes>,
}

#[derive(Default)]
struct State {
    version: u64,
    /// By collection and name.
    objects: BTreeMap<(String, String), Value>,
    watches: Vec<Watch>,
    requests: Vec<String>,
    away: bool,
    tokens: u64,
}

/// Clones are the same server.
#[derive(Clone, Default)]
pub struct FakeApi(Arc<Mutex<State>>);

type Answer = Response<BoxBody<Bytes, Infallible>>;

fn full(code: u16, value: &Value) -> Answer {
    let body = Full::new(Bytes::from(value.to_string())).boxed();
    Response::builder().status(code).header("content-type", "application/json").body(body).unwrap()
}

fn refusal(code: u16, reason: &str, message: &str) -> Answer {
    full(
        code,
        &json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": code}),
    )
}

impl FakeApi {
    pub fn client(&self) -> kube::Client {
        let api = self.clone();
        let serve = tower::service_fn(move |request: Request<Body>| {
            let api = api.clone();
            async move {
                let (parts, body) = request.into_parts();
                let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
                Ok::<_, Infallible>(api.answer(parts.method.as_str(), &parts.uri, &body))
            }
        });
        kube::Client::new(serve, "default")
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Requests so far that contain the text.
    pub fn asked(&self, text: &str) -> usize {
        self.lock().requests.iter().filter(|request| request.contains(text)).count()
    }

    /// How many watches are open.
    pub fn watches(&self) -> usize {
        let mut state = self.lock();
        state.watches.retain(|watch| !watch.events.is_closed());
        state.watches.len()
    }

    /// From now on nothing is answered, and watches end; or all is as it was.
    pub fn set_away(&self, away: bool) {
        let mut state = self.lock();
        state.away = away;
        state.watches.clear();
    }

    /// Makes or changes an object of a collection, `/api/v1/namespaces/ns/configmaps`.
    pub fn put(&self, collection: &str, mut object: Value) {
        let mut state = self.lock();
        state.version += 1;
        object["metadata"]["resourceVersion"] = json!(state.version.to_string());
        object["metadata"]["managedFields"] = json!([{"manager": "test"}]);
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let before = state.objects.insert((collection.to_owned(), name.clone()), object.clone());
        state.tell(collection, &name, if before.is_some() { "MODIFIED" } else { "ADDED" }, &object);
    }

    pub fn delete(&self, collection: &str, name: &str) {
        let mut state = self.lock();
        state.version += 1;
        let object = state.objects.remove(&(collection.to_owned(), name.to_owned())).unwrap();
        state.tell(collection, name, "DELETED", &object);
    }

    fn answer(&self, method: &str, uri: &http::Uri, body: &[u8]) -> Answer {
        let mut state = self.lock();
        let (path, query) = (uri.path(), uri.query().unwrap_or_default());
        state.requests.push(format!("{method} {path}?{query}"));
        if state.away {
            return refusal(503, "ServiceUnavailable", "the server is away");
        }
        if let Some(account) = path.strip_suffix("/token").filter(|_| method == "POST") {
            return state.token(account, body);
        }
        let selected = query.split('&').find_map(|pair| pair.strip_prefix("fieldSelector=metadata.name%3D")).map(str::to_owned);
        if query.contains("watch=true") {
            let since = query.split('&').find_map(|pair| pair.strip_prefix("resourceVersion=")?.parse().ok()).unwrap_or(0);
            return state.watch(path, selected, since);
        }
        let (above, last) = path.rsplit_once('/').unwrap();
        if let Some(object) = state.objects.get(&(above.to_owned(), last.to_owned())) {
            return full(200, object);
        }
        let is_collection = query.contains("limit=") || selected.is_some();
        if !is_collection {
            let kind = above.rsplit('/').next().unwrap();
            return refusal(404, "NotFound", &format!("{kind} {last:?} not found"));
        }
        let fits = |(key, _): &(&(String, String), &Value)| key.0 == path && selected.as_ref().is_none_or(|name| *name == key.1);
        let items: Vec<&Value> = state.objects.iter().filter(fits).map(|(_, object)| object).collect();
        full(
            200,
            &json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": state.version.to_string()}, "items": items}),
        )
    }
}

impl State {
    fn tell(&mut self, collection: &str, name: &str, kind: &str, object: &Value) {
        let line = Bytes::from(format!("{}\n", json!({"type": kind, "object": object})));
        self.watches.retain(|watch| {
            let meant = watch.collection == collection && watch.name.as_ref().is_none_or(|wanted| wanted == name);
            !meant || watch.events.send(line.clone()).is_ok()
        });
    }

    fn watch(&mut self, collection: &str, name: Option<String>, since: u64) -> Answer {
        let (events, lines) = unbounded_channel();
        let version =
            |object: &Value| object["metadata"]["resourceVersion"].as_str().and_then(|v| v.parse::<u64>().ok()).unwrap_or(0);
        let meant = |key: &(String, String)| key.0 == collection && name.as_ref().is_none_or(|name| *name == key.1);
        // What came between the list and this.
        for (_, object) in self.objects.iter().filter(|(key, object)| meant(key) && version(object) > since) {
            let _ = events.send(Bytes::from(format!("{}\n", json!({"type": "MODIFIED", "object": object}))));
        }
        self.watches.push(Watch { collection: collection.to_owned(), name, events });
        let frames = UnboundedReceiverStream::new(lines).map(|line| Ok::<_, Infallible>(Frame::data(line)));
        Response::new(BoxBody::new(StreamBody::new(frames)))
    }

    fn token(&mut self, account: &str, body: &[u8]) -> Answer {
        let (above, name) = account.rsplit_once('/').unwrap();
        if !self.objects.contains_key(&(above.to_owned(), name.to_owned())) {
            return refusal(404, "NotFound", &format!("serviceaccounts {name:?} not found"));
        }
        self.tokens += 1;
        let mut request: Value = serde_json::from_slice(body).unwrap();
        let seconds = request["spec"]["expirationSeconds"].as_i64().unwrap();
        let expires = Timestamp::now() + SignedDuration::from_secs(seconds);
        request["status"] = json!({"token": format!("token-{}", self.tokens), "expirationTimestamp": expires.to_string()});
        full(201, &request)
    }
}
