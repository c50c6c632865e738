//! The services of the cluster, as far as a pod's environment tells of them: one watch for the node, of which the address and the
//! ports of each service are kept.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{Event, watcher};
use kube::{Api, Client};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};

use super::follow::{asking, pauses};
use crate::env::Variable;
use crate::pod;

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Port {
    name: String,
    number: i32,
    protocol: String,
}

/// What is kept of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Reachable {
    address: String,
    ports: Vec<Port>,
}

/// Services by namespace and name.
pub(super) type Known = BTreeMap<(String, String), Reachable>;

/// The services. Clones share them.
#[derive(Clone, Debug)]
pub(super) struct Services {
    known: Arc<RwLock<Known>>,
    /// The first list has come.
    listed: watch::Sender<bool>,
    /// Somebody has been told that it has not.
    missed: Arc<AtomicBool>,
    /// Told after each change.
    changed: Arc<Notify>,
}

impl Default for Services {
    fn default() -> Services {
        Services { known: Arc::default(), listed: watch::Sender::new(false), missed: Arc::default(), changed: Arc::default() }
    }
}

/// What is kept; `None` for a service without an address of its own.
fn reachable(service: &Service) -> Option<Reachable> {
    let spec = service.spec.as_ref()?;
    let address = spec.cluster_ip.clone().filter(|ip| !ip.is_empty() && ip != "None")?;
    let ports = spec.ports.iter().flatten().map(|port| Port {
        name: port.name.clone().unwrap_or_default(),
        number: port.port,
        protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
    });
    Some(Reachable { address, ports: ports.collect() })
}

fn key(service: &Service) -> (String, String) {
    (service.metadata.namespace.clone().unwrap_or_default(), service.metadata.name.clone().unwrap_or_default())
}

/// The namespace and the name of the service that every pod is told of.
const API_SERVICE: (&str, &str) = ("default", "kubernetes");

/// The variables of a pod of this namespace: of the API server's service always, of the namespace's own with links.
fn variables(services: &Known, namespace: &str, links: bool) -> Vec<Variable> {
    let own = services.iter().filter(|((space, _), _)| links && space == namespace);
    let own = own.map(|((_, name), service)| (name.as_str(), service));
    let api = services.get(&(API_SERVICE.0.to_owned(), API_SERVICE.1.to_owned())).map(|service| (API_SERVICE.1, service));
    // Of two services of a name the namespace's own counts.
    let chosen: BTreeMap<&str, &Reachable> = api.into_iter().chain(own).collect();
    chosen.into_iter().flat_map(|(name, service)| of_service(name, service)).collect()
}

fn of_service(name: &str, Reachable { address, ports }: &Reachable) -> Vec<Variable> {
    let variable_name = |text: &str| text.to_uppercase().replace('-', "_");
    let name = variable_name(name);
    let mut found: Vec<(String, String)> = vec![(format!("{name}_SERVICE_HOST"), address.clone())];
    let Some(first) = ports.first() else { return bytes(found) };
    found.push((format!("{name}_SERVICE_PORT"), first.number.to_string()));
    for port in ports.iter().filter(|port| !port.name.is_empty()) {
        found.push((format!("{name}_SERVICE_PORT_{}", variable_name(&port.name)), port.number.to_string()));
    }
    let bracketed = if address.contains(':') { format!("[{address}]") } else { address.clone() };
    for (i, Port { number, protocol, .. }) in ports.iter().enumerate() {
        let mut url = protocol.to_lowercase();
        let _ = write!(url, "://{bracketed}:{number}");
        if i == 0 {
            found.push((format!("{name}_PORT"), url.clone()));
        }
        let prefix = format!("{name}_PORT_{number}_{}", protocol.to_uppercase());
        found.push((prefix.clone(), url));
        found.push((format!("{prefix}_PROTO"), protocol.to_lowercase()));
        found.push((format!("{prefix}_PORT"), number.to_string()));
        found.push((format!("{prefix}_ADDR"), address.clone()));
    }
    bytes(found)
}

fn bytes(found: Vec<(String, String)>) -> Vec<Variable> {
    found.into_iter().map(|(name, value)| (name, value.into_bytes())).collect()
}

impl Services {
    /// The variables of a pod. The error is the kubelet's message as long as nobody knows them.
    pub(super) fn variables(&self, pod: &Pod) -> Result<Vec<Variable>, String> {
        if !*self.listed.borrow() {
            self.missed.store(true, Ordering::Relaxed);
            return Err("services have not yet been read at least once, cannot construct envvars".to_owned());
        }
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let links = pod::spec(pod).enable_service_links != Some(false);
        Ok(variables(&known, pod::namespace(pod), links))
    }

    /// Those that pods of these namespaces can see; `None` before they have been listed.
    pub(super) fn seen_from(&self, namespaces: &BTreeSet<&str>) -> Option<Known> {
        if !*self.listed.borrow() {
            return None;
        }
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        let api = |(namespace, name): &(String, String)| (namespace.as_str(), name.as_str()) == API_SERVICE;
        let seen = known.iter().filter(|(key, _)| namespaces.contains(key.0.as_str()) || api(key));
        Some(seen.map(|(key, service)| (key.clone(), service.clone())).collect())
    }

    /// Those of before, until the API server tells them.
    pub(super) fn remember(&self, known: Known) {
        if !*self.listed.borrow() {
            *self.known.write().unwrap_or_else(PoisonError::into_inner) = known;
            self.listed.send_replace(true);
        }
    }

    /// Comes back after a change.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Comes back when they have been listed once.
    pub(super) async fn listed(&self) {
        // The sender lives as long as this does.
        let _ = self.listed.subscribe().wait_for(|listed| *listed).await;
    }

    /// Follows all services; `first` is called when they are known and somebody has asked for them in vain.
    pub(super) async fn run(self, client: Client, first: impl FnOnce()) {
        let mut first = Some(first);
        let mut events = pin!(watcher(Api::<Service>::all(client), asking("services")).backoff(pauses()));
        let (mut fresh, mut failing) = (Known::new(), false);
        while let Some(event) = events.next().await {
            match event {
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(error = super::message_of_watch(&error), "services cannot be followed now");
                    }
                    continue;
                }
                Ok(Event::Init) => {
                    fresh.clear();
                    continue;
                }
                Ok(Event::InitApply(service)) => {
                    if let Some(service_of) = reachable(&service) {
                        fresh.insert(key(&service), service_of);
                    }
                }
                Ok(Event::InitDone) => {
                    *self.known.write().unwrap_or_else(PoisonError::into_inner) = std::mem::take(&mut fresh);
                    self.listed.send_replace(true);
                    if let Some(first) = first.take().filter(|_| self.missed.load(Ordering::Relaxed)) {
                        first();
                    }
                }
                Ok(Event::Apply(service)) => {
                    let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
                    match reachable(&service) {
                        Some(service_of) => known.insert(key(&service), service_of),
                        None => known.remove(&key(&service)),
                    };
                }
                Ok(Event::Delete(service)) => {
                    self.known.write().unwrap_or_else(PoisonError::into_inner).remove(&key(&service));
                }
            }
            self.changed.notify_one();
            failing = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(namespace: &str, name: &str, spec: serde_json::Value) -> ((String, String), Option<Reachable>) {
        let service = serde_json::json!({"metadata": {"namespace": namespace, "name": name}, "spec": spec});
        let service: Service = serde_json::from_value(service).unwrap();
        (key(&service), reachable(&service))
    }

    fn texts(found: Vec<Variable>) -> Vec<String> {
        found.into_iter().map(|(name, value)| format!("{name}={}", String::from_utf8(value).unwrap())).collect()
    }

    #[test]
    fn a_service_is_told_of_by_address_ports_and_links() {
        let ports = serde_json::json!([{"name": "http", "port": 80}, {"name": "dns-udp", "port": 53, "protocol": "UDP"}]);
        let (_, found) = service("ns", "my-shop", serde_json::json!({"clusterIP": "10.96.0.7", "ports": ports}));
        assert_eq!(
            texts(of_service("my-shop", &found.unwrap())),
            [
                "MY_SHOP_SERVICE_HOST=10.96.0.7",
                "MY_SHOP_SERVICE_PORT=80",
                "MY_SHOP_SERVICE_PORT_HTTP=80",
                "MY_SHOP_SERVICE_PORT_DNS_UDP=53",
                "MY_SHOP_PORT=tcp://10.96.0.7:80",
                "MY_SHOP_PORT_80_TCP=tcp://10.96.0.7:80",
                "MY_SHOP_PORT_80_TCP_PROTO=tcp",
                "MY_SHOP_PORT_80_TCP_PORT=80",
                "MY_SHOP_PORT_80_TCP_ADDR=10.96.0.7",
                "MY_SHOP_PORT_53_UDP=udp://10.96.0.7:53",
                "MY_SHOP_PORT_53_UDP_PROTO=udp",
                "MY_SHOP_PORT_53_UDP_PORT=53",
                "MY_SHOP_PORT_53_UDP_ADDR=10.96.0.7",
            ]
        );
        let (_, six) = service("ns", "six", serde_json::json!({"clusterIP": "fd00::7", "ports": [{"port": 443}]}));
        let six = texts(of_service("six", &six.unwrap()));
        assert!(six.contains(&"SIX_PORT=tcp://[fd00::7]:443".to_owned()) && six.contains(&"SIX_SERVICE_HOST=fd00::7".to_owned()));
    }

    #[test]
    fn a_pod_sees_the_api_server_and_with_links_its_namespace() {
        let at = |ip: &str| serde_json::json!({"clusterIP": ip, "ports": [{"port": 443}]});
        let all = [
            service("default", "kubernetes", at("10.96.0.1")),
            service("default", "other", at("10.96.0.2")),
            service("ns", "shop", at("10.96.0.3")),
            service("ns", "headless", at("None")),
            service("ns", "elsewhere", serde_json::json!({"type": "ExternalName", "externalName": "a.example"})),
            service("own", "kubernetes", at("10.96.0.9")),
        ];
        let known: Known = all.into_iter().filter_map(|(key, kept)| Some((key, kept?))).collect();
        for (namespace, links, hosts) in [
            ("ns", true, vec!["KUBERNETES_SERVICE_HOST=10.96.0.1", "SHOP_SERVICE_HOST=10.96.0.3"]),
            ("ns", false, vec!["KUBERNETES_SERVICE_HOST=10.96.0.1"]),
            ("default", true, vec!["KUBERNETES_SERVICE_HOST=10.96.0.1", "OTHER_SERVICE_HOST=10.96.0.2"]),
            ("own", true, vec!["KUBERNETES_SERVICE_HOST=10.96.0.9"]),
            ("own", false, vec!["KUBERNETES_SERVICE_HOST=10.96.0.1"]),
        ] {
            let found = texts(variables(&known, namespace, links));
            let found: Vec<&str> = found.iter().map(String::as_str).filter(|v| v.contains("_SERVICE_HOST=")).collect();
            assert_eq!(found, hosts, "{namespace} {links}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_refuses_every_list_is_asked_ever_more_seldom() {
        let api = crate::api::fake::FakeApi::default();
        api.set_away(true);
        let following = Services::default().run(api.client(), || {});
        let _ = tokio::time::timeout(std::time::Duration::from_secs(30), following).await;
        let asked = api.asked("services");
        assert!((5..15).contains(&asked), "asked {asked} times in 30 seconds");
    }

    #[test]
    fn before_the_first_list_no_pod_has_an_environment() {
        let services = Services::default();
        assert!(services.variables(&Pod::default()).unwrap_err().starts_with("services have not yet been read"));
        services.listed.send_replace(true);
        assert_eq!(services.variables(&Pod::default()), Ok(Vec::new()));
    }
}
