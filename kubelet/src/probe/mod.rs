//! Probes of running containers: one task per container and kind. A task tells its pod's worker what it finds; the
//! worker decides.

mod grpc;
mod http;
mod tls;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, HTTPGetAction, Pod, Probe, TCPSocketAction};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::backoff::format_delay;
use crate::container_config::expand_literal;
use crate::cri::{self as calls, Runtime};
use crate::metrics::families;
use crate::pod;
use crate::record::{Recorder, Weight};
use crate::worker::{Message, WeakOutlet};

pub(crate) use http::is_plain_answer;

/// Which question a probe asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Has it come up?
    Startup,
    /// Is it well?
    Liveness,
    /// Can it take work?
    Readiness,
}

impl Kind {
    /// As messages have it: `liveness`.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Startup => "startup",
            Kind::Liveness => "liveness",
            Kind::Readiness => "readiness",
        }
    }

    fn of(self, container: &Container) -> Option<&Probe> {
        match self {
            Kind::Startup => container.startup_probe.as_ref(),
            Kind::Liveness => container.liveness_probe.as_ref(),
            Kind::Readiness => container.readiness_probe.as_ref(),
        }
    }
}

/// The verdict of one look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Well.
    Success,
    /// Well enough, but somebody should look at it.
    Warning(String),
    /// Not well, and what it said.
    Failure(String),
    /// The probe itself did not work.
    Error(String),
}

/// What a probe does, with everything resolved.
#[derive(Clone, Debug)]
enum Check {
    Exec {
        cmd: Vec<String>,
    },
    Http(http::Target),
    Tcp(SocketAddr),
    Grpc(SocketAddr, String),
    /// It cannot work, and why.
    Broken(String),
}

/// What a prober needs besides the container's spec.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The pod.
    pub pod: &'a Arc<Pod>,
    /// The container's spec.
    pub container: &'a Container,
    /// The running container's ID.
    pub id: &'a str,
    /// How long it has been running.
    pub age: Duration,
    /// It ran before this kubelet did, which has been here for so long: its probes keep the times they had.
    pub adopted: Option<Duration>,
    /// The pod's first address.
    pub ip: Option<IpAddr>,
}

/// What probers work with.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    pub runtime: Runtime,
    pub recorder: Recorder,
    pub inbox: WeakOutlet,
}

/// The running probers of a pod, with the address that each one asks.
#[derive(Debug, Default)]
pub struct Probers(BTreeMap<(String, Kind), (Option<IpAddr>, DropGuard)>);

/// The pod's address, where the probe asks there.
fn asked(probe: &Probe, ip: Option<IpAddr>) -> Option<IpAddr> {
    let host = probe.http_get.as_ref().map(|get| &get.host).or(probe.tcp_socket.as_ref().map(|tcp| &tcp.host));
    let elsewhere = host.is_some_and(|host| host.as_deref().is_some_and(|host| !host.is_empty()));
    ip.filter(|_| probe.exec.is_none() && !elsewhere)
}

impl Probers {
    /// Keeps only the probers of these containers.
    pub fn retain(&mut self, keep: impl Fn(&str, Kind) -> bool) {
        self.0.retain(|(id, kind), _| keep(id, *kind));
    }

    /// Starts the prober of a kind unless it has been started, and anew where the pod has another address; whether the container has
    /// such a probe.
    pub(crate) fn ensure(&mut self, subject: &Subject<'_>, kind: Kind, tools: impl FnOnce() -> Tools) -> bool {
        let Some(probe) = kind.of(subject.container) else { return false };
        let key = (subject.id.to_owned(), kind);
        let asked = asked(probe, subject.ip);
        if self.0.get(&key).is_some_and(|(before, _)| *before != asked) {
            self.0.remove(&key);
        }
        self.0.entry(key).or_insert_with(|| {
            let stop = CancellationToken::new();
            let prober = Prober::new(probe, subject, kind, tools());
            let stopped = stop.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = stopped.cancelled() => {}
                    () = prober.run() => {}
                }
            });
            (asked, stop.drop_guard())
        });
        true
    }
}

struct Prober {
    pod: Arc<Pod>,
    container: String,
    id: String,
    kind: Kind,
    check: Check,
    first: First,
    period: Duration,
    timeout: Duration,
    success_threshold: i32,
    failure_threshold: i32,
    grace: Option<i64>,
    tools: Tools,
}

fn seconds(value: Option<i32>, default: u64) -> Duration {
    Duration::from_secs(value.and_then(|v| u64::try_from(v).ok()).unwrap_or(default))
}

/// A timeout as messages have it.
fn format_timeout(timeout: Duration) -> String {
    format_delay(timeout)
}

/// When a prober begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct First {
    /// The last turn came while this kubelet was starting: it is made up for at once.
    overdue: bool,
    /// How long it is to the first turn, from which the others count.
    delay: Duration,
}

/// When the first look is. A container that has been probed before goes on in its rhythm: a restart of the kubelet neither asks all
/// at once nor leaves any out. What an earlier kubelet may have asked already is not asked again.
fn first_look(initial: Duration, period: Duration, age: Duration, adopted: Option<Duration>) -> First {
    let up = match adopted {
        Some(up) if age >= initial => up,
        _ => return First { overdue: false, delay: initial.saturating_sub(age) },
    };
    let since = Duration::from_nanos(((age - initial).as_nanos() % period.as_nanos().max(1)).try_into().unwrap_or(0));
    First { overdue: since < up, delay: period - since }
}

impl Prober {
    fn new(probe: &Probe, subject: &Subject<'_>, kind: Kind, tools: Tools) -> Prober {
        let period = seconds(probe.period_seconds, 10).max(Duration::from_secs(1));
        let initial = seconds(probe.initial_delay_seconds, 0);
        Prober {
            pod: subject.pod.clone(),
            container: subject.container.name.clone(),
            id: subject.id.to_owned(),
            kind,
            check: resolve(probe, subject.container, subject.ip),
            first: first_look(initial, period, subject.age, subject.adopted),
            period,
            timeout: seconds(probe.timeout_seconds, 1).max(Duration::from_secs(1)),
            success_threshold: probe.success_threshold.unwrap_or(1).max(1),
            failure_threshold: probe.failure_threshold.unwrap_or(3).max(1),
            grace: probe.termination_grace_period_seconds,
            tools,
        }
    }

    fn event(&self, reason: &str, message: &str) {
        self.tools.recorder.event(&self.pod, Some(&self.container), Weight::Warning, reason, message);
    }

    async fn run(self) {
        let mut ticks = tokio::time::interval_at(Instant::now() + self.first.delay, self.period);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let (mut last, mut count, mut told) = (None, 0, None);
        let mut overdue = self.first.overdue;
        loop {
            if !std::mem::take(&mut overdue) {
                ticks.tick().await;
            }
            let Some(well) = self.is_well().await else { continue };
            count = if last == Some(well) { count + 1 } else { 1 };
            last = Some(well);
            let threshold = if well { self.success_threshold } else { self.failure_threshold };
            // The worker knows what it has been told, and that a container lives unless it hears otherwise.
            let is_news = told != Some(well) && !(self.kind == Kind::Liveness && well);
            if count < threshold || !is_news {
                continue;
            }
            told = Some(well);
            let Some(inbox) = self.tools.inbox.upgrade() else { return };
            let message = Message::Probed { id: self.id.clone(), kind: self.kind, well, grace: self.grace };
            if inbox.send(message).is_err() {
                return;
            }
            // What has started has started, and what is condemned is not asked again.
            if self.kind == Kind::Startup || self.kind == Kind::Liveness {
                return;
            }
        }
    }

    /// The verdict of one look, with its event; `None` when the probe itself did not work, which counts for nothing.
    async fn is_well(&self) -> Option<bool> {
        let title = self.title();
        let begun = Instant::now();
        // A look's future is of KiBs (a whole HTTP or gRPC client): it is there while a probe runs, not for as long as its pod does.
        let verdict = Box::pin(self.look()).await;
        self.record(&verdict, begun.elapsed());
        match verdict {
            Verdict::Success => Some(true),
            Verdict::Warning(output) => {
                self.event("ProbeWarning", &format!("{title} probe warning: {output}"));
                Some(true)
            }
            Verdict::Failure(output) => {
                self.event("Unhealthy", &format!("{title} probe failed: {output}"));
                Some(false)
            }
            Verdict::Error(error) => {
                self.event("Unhealthy", &format!("{title} probe errored and resulted in unknown state: {error}"));
                None
            }
        }
    }

    /// Counts a look, under the upstream's labels.
    fn record(&self, verdict: &Verdict, took: Duration) {
        let result = match verdict {
            Verdict::Success | Verdict::Warning(_) => "successful",
            Verdict::Failure(_) => "failed",
            Verdict::Error(_) => "unknown",
        };
        let (name, namespace, uid) = (pod::name(&self.pod), pod::namespace(&self.pod), pod::uid(&self.pod));
        let metrics = self.tools.runtime.metrics();
        metrics.count(&families::PROBES, &[self.title(), result, &self.container, name, namespace, uid]);
        metrics.observe(&families::PROBE_SECONDS, &[self.title(), &self.container, name, namespace], took);
    }

    fn title(&self) -> &'static str {
        match self.kind {
            Kind::Startup => "Startup",
            Kind::Liveness => "Liveness",
            Kind::Readiness => "Readiness",
        }
    }

    /// One look; what goes wrong in the probe itself is tried three times.
    async fn look(&self) -> Verdict {
        let mut verdict = self.check_once().await;
        for _ in 0..2 {
            if !matches!(verdict, Verdict::Error(_)) {
                break;
            }
            verdict = self.check_once().await;
        }
        verdict
    }

    async fn check_once(&self) -> Verdict {
        match &self.check {
            Check::Exec { cmd } => self.exec(cmd).await,
            Check::Http(target) => http::check(target, self.timeout).await,
            Check::Tcp(address) => tcp(*address, self.timeout).await,
            Check::Grpc(address, service) => grpc::check(*address, service, self.timeout).await,
            Check::Broken(why) => Verdict::Failure(why.clone()),
        }
    }

    async fn exec(&self, cmd: &[String]) -> Verdict {
        match self.tools.runtime.exec_sync(&self.id, cmd.to_vec(), self.timeout).await {
            Ok(answer) if answer.exit_code == 0 => Verdict::Success,
            Ok(answer) => {
                let mut output = answer.stdout;
                output.extend(answer.stderr);
                output.truncate(10 * 1024);
                Verdict::Failure(String::from_utf8_lossy(&output).into_owned())
            }
            Err(e) if calls::code(&e) == Some(tonic::Code::DeadlineExceeded) => {
                let limit = format_timeout(self.timeout);
                Verdict::Failure(format!("command timed out: {:?} timed out after {limit}", cmd.join(" ")))
            }
            Err(e) => Verdict::Error(calls::message(&e)),
        }
    }
}

async fn tcp(address: SocketAddr, timeout: Duration) -> Verdict {
    match tokio::time::timeout(timeout, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Verdict::Success,
        Ok(Err(e)) => Verdict::Failure(format!("dial tcp {address}: {e}")),
        Err(_) => Verdict::Failure(format!("dial tcp {address}: i/o timeout")),
    }
}

/// Connects for a `tcpSocket` hook, without a time limit of its own.
pub(crate) async fn connect_hook(tcp: &TCPSocketAction, container: &Container, ip: Option<IpAddr>) -> Result<(), String> {
    let address = address(tcp.host.as_ref(), &tcp.port, container, ip)?;
    TcpStream::connect(address).await.map(drop).map_err(|e| format!("dial tcp {address}: {e}"))
}

/// Where a probe or hook goes: the pod's address unless it names another.
fn address(host: Option<&String>, port: &IntOrString, container: &Container, ip: Option<IpAddr>) -> Result<SocketAddr, String> {
    let ip = match host.filter(|h| !h.is_empty()) {
        Some(host) => host.parse().map_err(|_| format!("host {host:?} is not an IP address"))?,
        None => ip.ok_or("the pod has no address")?,
    };
    Ok(SocketAddr::new(ip, port_number(port, container)?))
}

/// Where an `httpGet` hook asks.
pub(crate) fn hook_target(get: &HTTPGetAction, container: &Container, ip: Option<IpAddr>) -> Result<http::Target, String> {
    Ok(http::Target::new(address(get.host.as_ref(), &get.port, container, ip)?, get).of_hook())
}

/// An `httpGet` as messages name it.
pub(crate) fn describe_get(get: &HTTPGetAction) -> String {
    format!("{}{}", describe_port(get.host.as_deref(), &get.port), get.path.as_deref().unwrap_or("/"))
}

/// A port of a host as messages name it.
pub(crate) fn describe_port(host: Option<&str>, port: &IntOrString) -> String {
    let port = match port {
        IntOrString::Int(number) => number.to_string(),
        IntOrString::String(name) => name.clone(),
    };
    format!("{}:{port}", host.unwrap_or_default())
}

/// Addresses, ports by name and variables, once and for all.
fn resolve(probe: &Probe, container: &Container, ip: Option<IpAddr>) -> Check {
    if let Some(exec) = &probe.exec {
        let cmd = exec.command.iter().flatten().map(|part| expand_literal(container, part));
        return Check::Exec { cmd: cmd.collect() };
    }
    if let Some(get) = &probe.http_get {
        return match address(get.host.as_ref(), &get.port, container, ip) {
            Ok(address) => Check::Http(http::Target::new(address, get)),
            Err(why) => Check::Broken(why),
        };
    }
    if let Some(grpc) = &probe.grpc {
        let service = grpc.service.clone().unwrap_or_default();
        return match address(None, &IntOrString::Int(grpc.port), container, ip) {
            Ok(address) => Check::Grpc(address, service),
            Err(why) => Check::Broken(why),
        };
    }
    match probe.tcp_socket.as_ref().map(|tcp| address(tcp.host.as_ref(), &tcp.port, container, ip)) {
        Some(Ok(address)) => Check::Tcp(address),
        Some(Err(why)) => Check::Broken(why),
        None => Check::Broken("the probe has no handler".to_owned()),
    }
}

fn port_number(port: &IntOrString, container: &Container) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => {
            let named = container.ports.iter().flatten().find(|p| p.name.as_deref() == Some(name));
            named.map(|p| p.container_port).or_else(|| name.parse().ok())
        }
    };
    let number = number.and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0);
    number.ok_or_else(|| match port {
        IntOrString::Int(number) => format!("invalid port {number}"),
        IntOrString::String(name) => format!("couldn't find port {name:?}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ContainerPort;

    #[test]
    fn ports_are_found_by_name_and_number() {
        let port = ContainerPort { name: Some("web".into()), container_port: 8080, ..Default::default() };
        let container = Container { ports: Some(vec![port]), ..Container::default() };
        let text = |t: &str| IntOrString::String(t.into());
        assert_eq!(port_number(&text("web"), &container), Ok(8080));
        assert_eq!(port_number(&text("81"), &container), Ok(81));
        assert_eq!(port_number(&IntOrString::Int(82), &container), Ok(82));
        assert_eq!(port_number(&text("x"), &container), Err("couldn't find port \"x\"".into()));
        assert_eq!(port_number(&IntOrString::Int(70000), &container), Err("invalid port 70000".into()));
    }

    #[test]
    fn a_container_that_ran_before_is_asked_in_its_old_rhythm() {
        let secs = Duration::from_secs;
        for (initial, period, age, adopted, overdue, delay) in [
            (0, 10, 0, None, false, 0),
            (5, 10, 2, None, false, 3),
            (5, 10, 60, None, false, 0),
            (5, 10, 2, Some(1), false, 3),
            (5, 10, 27, Some(1), false, 8),
            (0, 10, 20, Some(0), false, 10),
            // The turn at 25 s came when the old kubelet was gone and the new one, here for 3 s, had not taken the container up.
            (5, 10, 27, Some(3), true, 8),
        ] {
            let first = first_look(secs(initial), secs(period), secs(age), adopted.map(secs));
            assert_eq!(first, First { overdue, delay: secs(delay) }, "{initial} {period} {age}");
        }
    }

    #[tokio::test]
    async fn tcp_probes_connect_or_say_why() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        assert_eq!(tcp(address, Duration::from_secs(5)).await, Verdict::Success);
        drop(listener);
        let Verdict::Failure(why) = tcp(address, Duration::from_secs(5)).await else { panic!() };
        assert!(why.starts_with(&format!("dial tcp {address}: ")), "{why}");
    }

    #[test]
    fn a_pod_without_an_address_fails_its_probes() {
        let probe = Probe { tcp_socket: Some(TCPSocketAction { host: None, port: IntOrString::Int(1) }), ..Probe::default() };
        assert!(matches!(resolve(&probe, &Container::default(), None), Check::Broken(why) if why == "the pod has no address"));
    }

    #[test]
    fn a_prober_that_waits_is_small_whatever_it_may_ask() {
        fn size<F: Future>(_: fn(Prober) -> F) -> usize {
            size_of::<F>()
        }
        let size = size(Prober::run);
        assert!(size < 3072, "{size} bytes for each probe of each container");
    }
}
