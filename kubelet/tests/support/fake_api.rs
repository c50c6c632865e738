//! An API server in memory: list, watch, get, create, patch, replace and delete of any kind, as far as a kubelet goes by it. It judges
//! nothing and defaults nothing.
#![allow(dead_code, reason = "each suite uses a part")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use berth_kubelet::api::ApiServer;
use bytes::Bytes;
use futures::StreamExt;
use http::{Method, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use kube::client::Body;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

type Answer = Response<UnsyncBoxBody<Bytes, std::io::Error>>;
/// Collection (`/api/v1/pods`), namespace, name.
type Key = (String, String, String);
type Watcher = (String, Option<(String, String)>, mpsc::UnboundedSender<Bytes>);

#[derive(Default)]
pub struct State {
    pub objects: BTreeMap<Key, Value>,
    /// `PATCH d/a/status`, in their order.
    pub calls: Vec<String>,
    /// Pods and the phases that their objects have had.
    pub phases: Vec<(String, String)>,
    pub down: bool,
    /// So many requests for a token are refused, as by an authorizer that has not heard of the pod yet.
    pub refused_tokens: usize,
    version: u64,
    uids: u64,
    watchers: Vec<Watcher>,
}

#[derive(Clone, Default)]
pub struct FakeApi(Arc<Mutex<State>>);

/// What a request is about.
struct Asked {
    collection: String,
    namespace: String,
    name: String,
    sub: String,
}

impl Asked {
    fn of(path: &str) -> Asked {
        let mut parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let rest = parts.split_off(if parts[0] == "api" { 2 } else { 3 });
        let prefix = format!("/{}", parts.join("/"));
        let (namespace, rest) = match rest.as_slice() {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => ((*namespace).to_owned(), rest.to_vec()),
            rest => (String::new(), rest.to_vec()),
        };
        let at = |i: usize| rest.get(i).copied().unwrap_or_default().to_owned();
        Asked { collection: format!("{prefix}/{}", at(0)), namespace, name: at(1), sub: at(2) }
    }

    fn key(&self) -> Key {
        (self.collection.clone(), self.namespace.clone(), self.name.clone())
    }
}

fn answer(code: u16, value: &Value) -> Answer {
    let body = Full::new(Bytes::from(value.to_string())).map_err(|never| match never {}).boxed_unsync();
    Response::builder().status(code).body(body).unwrap()
}

fn refused(code: u16, reason: &str) -> Answer {
    answer(
        code,
        &json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": reason, "reason": reason, "code": code}),
    )
}

fn selects(selector: Option<&(String, String)>, object: &Value) -> bool {
    selector.is_none_or(|(path, wanted)| object.pointer(&format!("/{}", path.replace('.', "/"))) == Some(&json!(wanted)))
}

impl State {
    fn put(&mut self, key: Key, mut object: Value, event: &str) -> Value {
        self.version += 1;
        if let Some(phase) = object["status"]["phase"].as_str() {
            self.phases.push((key.2.clone(), phase.to_owned()));
        }
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let line = Bytes::from(format!("{}\n", json!({"type": event, "object": object})));
        self.watchers.retain(|(collection, selector, sender)| {
            *collection != key.0 || !selects(selector.as_ref(), &object) || sender.send(line.clone()).is_ok()
        });
        match event {
            "DELETED" => _ = self.objects.remove(&key),
            _ => _ = self.objects.insert(key, object.clone()),
        }
        object
    }

    // What a test's server refuses is an answer like any other.
    #[expect(clippy::result_large_err)]
    pub fn create(&mut self, mut key: Key, mut object: Value) -> Result<Value, Answer> {
        key.2 = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        if self.objects.contains_key(&key) {
            return Err(refused(409, "AlreadyExists"));
        }
        self.uids += 1;
        object["metadata"]["uid"] = json!(format!("uid-{}", self.uids));
        object["metadata"]["namespace"] = json!(key.1);
        Ok(self.put(key, object, "ADDED"))
    }

    fn delete(&mut self, key: Key, options: &Value) -> Answer {
        let Some(mut object) = self.objects.get(&key).cloned() else { return refused(404, "NotFound") };
        let wanted = &options["preconditions"]["uid"];
        if !wanted.is_null() && *wanted != object["metadata"]["uid"] {
            return refused(409, "Conflict");
        }
        let grace = options["gracePeriodSeconds"].as_i64().unwrap_or(0);
        let held = object["metadata"]["finalizers"].as_array().is_some_and(|list| !list.is_empty());
        if grace > 0 || held {
            object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            object["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
            return answer(200, &self.put(key, object, "MODIFIED"));
        }
        answer(200, &self.put(key, object, "DELETED"))
    }

    fn list(&self, asked: &Asked, selector: Option<&(String, String)>) -> Value {
        let of = |(key, object): &(&Key, &Value)| {
            key.0 == asked.collection && (asked.namespace.is_empty() || key.1 == asked.namespace) && selects(selector, object)
        };
        let items: Vec<&Value> = self.objects.iter().filter(of).map(|(_, object)| object).collect();
        json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": self.version.to_string()}, "items": items})
    }

    fn watch(&mut self, asked: &Asked, selector: Option<(String, String)>) -> Answer {
        let (sender, lines) = mpsc::unbounded_channel();
        self.watchers.push((asked.collection.clone(), selector, sender));
        let frames = tokio_stream::wrappers::UnboundedReceiverStream::new(lines).map(|line| Ok(Frame::data(line)));
        Response::new(StreamBody::new(frames).boxed_unsync())
    }

    fn token(&mut self, mut request: Value) -> Answer {
        if self.refused_tokens > 0 {
            self.refused_tokens -= 1;
            return refused(403, "Forbidden");
        }
        request["status"] = json!({"token": "a-token", "expirationTimestamp": "2099-01-01T00:00:00Z"});
        answer(201, &request)
    }

    fn handle(&mut self, method: &Method, path: &str, query: &str, body: Value) -> Answer {
        let asked = Asked::of(path);
        let pairs: BTreeMap<String, String> =
            query.split('&').filter_map(|pair| pair.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        let selector = pairs.get("fieldSelector").map(|text| text.replace("%3D", "="));
        let selector = selector.and_then(|text| text.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())));
        let key = asked.key();
        let known = self.objects.get(&key).cloned();
        match (method.as_str(), known) {
            ("GET", _) if pairs.contains_key("watch") => self.watch(&asked, selector),
            ("GET", _) if asked.name.is_empty() => answer(200, &self.list(&asked, selector.as_ref())),
            ("POST", _) if asked.sub == "token" => self.token(body),
            ("POST", _) => self.create(key, body).map_or_else(|refused| refused, |made| answer(201, &made)),
            ("DELETE", _) => self.delete(key, &body),
            (_, None) => refused(404, "NotFound"),
            ("GET", Some(object)) => answer(200, &object),
            ("PUT", Some(_)) => answer(200, &self.put(key, body, "MODIFIED")),
            ("PATCH", Some(mut object)) => {
                let uid = &body["metadata"]["uid"];
                if !uid.is_null() && *uid != object["metadata"]["uid"] {
                    return refused(409, "Conflict");
                }
                merge(&mut object, body);
                answer(200, &self.put(key, object, "MODIFIED"))
            }
            _ => refused(405, "MethodNotAllowed"),
        }
    }
}

/// A strategic merge, as far as pods need it: lists of conditions by their type, all others as a whole.
fn merge(into: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else { return *into = patch };
    if !into.is_object() {
        *into = Value::Object(Map::new());
    }
    for (key, value) in patch.into_iter().filter(|(key, _)| !key.starts_with('$')) {
        match (key.as_str(), value) {
            (_, Value::Null) => _ = into.as_object_mut().unwrap().remove(&key),
            ("conditions", Value::Array(changes)) => {
                let mut all = into[&key].as_array().cloned().unwrap_or_default();
                for change in changes {
                    all.retain(|known| known["type"] != change["type"]);
                    if change.get("$patch").is_none() {
                        all.push(change);
                    }
                }
                into[&key] = Value::Array(all);
            }
            (_, Value::Array(list)) => into[&key] = list.into_iter().filter(|item| item.get("$patch").is_none()).collect(),
            (_, value) => merge(&mut into[&key], value),
        }
    }
}

impl FakeApi {
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Clients of this server.
    pub fn server(&self) -> ApiServer {
        let this = self.clone();
        let service = tower::service_fn(move |request| this.clone().serve(request));
        let client = kube::Client::new(service, "default");
        ApiServer { heartbeats: client.clone(), events: client.clone(), client }
    }

    async fn serve(self, request: Request<Body>) -> Result<Answer, std::io::Error> {
        let (parts, body) = request.into_parts();
        let body = body.collect_bytes().await.map_err(std::io::Error::other)?;
        let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let mut state = self.lock();
        if state.down {
            return Err(std::io::ErrorKind::ConnectionRefused.into());
        }
        let asked = Asked::of(parts.uri.path());
        state.calls.push(format!("{} {}/{}/{}", parts.method, asked.namespace, asked.name, asked.sub));
        Ok(state.handle(&parts.method, parts.uri.path(), parts.uri.query().unwrap_or_default(), body))
    }

    /// Cuts all connections, and answers nobody until it is up again.
    pub fn set_down(&self, down: bool) {
        let mut state = self.lock();
        state.down = down;
        state.watchers.clear();
    }

    pub fn create_pod(&self, name: &str, spec: &Value) -> Value {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "generation": 1}, "spec": spec});
        self.lock().create(("/api/v1/pods".into(), "d".into(), String::new()), pod).ok().unwrap()
    }

    pub fn node(&self, name: &str) -> Option<Value> {
        self.lock().objects.get(&("/api/v1/nodes".into(), String::new(), name.into())).cloned()
    }

    /// The node gets a label that no watch tells of.
    pub fn label_node_silently(&self, name: &str, label: &str) {
        let mut state = self.lock();
        state.version += 1;
        let version = state.version.to_string();
        let node = state.objects.get_mut(&("/api/v1/nodes".into(), String::new(), name.into())).unwrap();
        node["metadata"]["labels"][label] = json!("");
        node["metadata"]["resourceVersion"] = json!(version);
    }

    pub fn pod(&self, name: &str) -> Option<Value> {
        self.lock().objects.get(&("/api/v1/pods".into(), "d".into(), name.into())).cloned()
    }

    pub fn change_pod(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let key: Key = ("/api/v1/pods".into(), "d".into(), name.into());
        let mut state = self.lock();
        let mut pod = state.objects[&key].clone();
        change(&mut pod);
        state.put(key, pod, "MODIFIED");
    }

    /// As somebody deletes it who waits so long; 0: by force.
    pub fn delete_pod(&self, name: &str, grace: i64) {
        self.lock().delete(("/api/v1/pods".into(), "d".into(), name.into()), &json!({"gracePeriodSeconds": grace}));
    }
}
