//! Who the node is towards its cluster, kept up while it runs: the first client certificate, its renewal, and the serving certificate.
//! `plan` decides; the loops here ask, wait and keep. Nothing ends for want of a certificate: the node's own pods run on.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rcgen::KeyPair;
use sha2::{Digest, Sha256};
use time::OffsetDateTime;

use crate::csr::{self, Naming, Purpose, Wanted};
use crate::kubeconfig::{Credentials, Kubeconfig, Material};
use crate::limit::Limit;
use crate::store::Store;
use crate::{Certificate, Connection, Error, Result, atomic, error};

/// How long the first certificate is waited for, and a renewed one: the upstream's.
const FIRST: Duration = Duration::from_secs(3600);
const RENEWED: Duration = Duration::from_secs(900);
/// Files are looked at this often at least: somebody may put a better one there, and clocks are set.
const LOOK: Duration = Duration::from_secs(60);
/// How often the node's addresses are compared with the certificate's.
const ADDRESSES: Duration = Duration::from_secs(10);
/// Back-off of failures: doubled four times, then as it is.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LAST_PAUSE: Duration = Duration::from_secs(32);
/// How often, and for how long, a server that is coming up is asked whether it is well.
const HEALTH: Duration = Duration::from_secs(2);
const HEALTH_PATIENCE: Duration = Duration::from_secs(60);

/// From when until when a certificate counts, and at which part of that it is renewed.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Lifetime {
    not_before: i64,
    not_after: i64,
    /// From 0.7 to 0.9: of its own for each certificate, so that nodes made together do not renew together.
    part: f64,
}

impl Lifetime {
    fn of(certificate: &Certificate) -> Lifetime {
        let digest: [u8; 32] = Sha256::digest(&certificate.public_key).into();
        let part = 0.7 + 0.2 * f64::from(u16::from_be_bytes([digest[0], digest[1]])) / f64::from(u16::MAX);
        Lifetime { not_before: certificate.not_before, not_after: certificate.not_after, part }
    }

    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
    fn due(&self) -> i64 {
        self.not_before + ((self.not_after - self.not_before) as f64 * self.part) as i64
    }
}

/// What is known of the client certificate.
#[derive(Clone, Copy, Debug)]
struct Given {
    /// There is one, of this node.
    certificate: Option<Lifetime>,
    /// There are other credentials in the kubeconfig.
    other: bool,
    /// It is in our own place, not a file of somebody else's.
    ours: bool,
    rotate: bool,
    bootstrap: bool,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Ask for a first certificate.
    Bootstrap,
    /// Ask for the next one with the one that is there.
    Renew,
    /// All is well for so long at least.
    Wait(Duration),
    /// There is no way to a certificate but somebody's hand.
    Stuck(&'static str),
}

fn plan(given: Given, now: i64) -> Step {
    let until = |at: i64| Duration::from_secs(u64::try_from(at - now).unwrap_or(0)).clamp(Duration::from_secs(1), LOOK);
    match given.certificate {
        Some(lifetime) if lifetime.not_after > now => {
            if !given.rotate || !given.ours {
                return Step::Wait(until(lifetime.not_after));
            }
            let due = lifetime.due();
            if now >= due { Step::Renew } else { Step::Wait(until(due)) }
        }
        // Whoever gives a bootstrap kubeconfig wants a certificate, as in the upstream.
        _ if given.bootstrap => Step::Bootstrap,
        _ if given.other => Step::Wait(LOOK),
        Some(_) => Step::Stuck("the client certificate has expired and there is no bootstrap kubeconfig: join again"),
        None => Step::Stuck("there is no client certificate and no bootstrap kubeconfig"),
    }
}

/// What has become of the requests for certificates, for whoever counts them.
#[derive(Debug, Default)]
pub struct Tally {
    client_failures: AtomicU64,
    serving_failures: AtomicU64,
    lives: Mutex<Vec<f64>>,
}

impl Tally {
    /// Requests for a client certificate that have failed.
    pub fn client_failures(&self) -> u64 {
        self.client_failures.load(Ordering::Relaxed)
    }

    /// Requests for a serving certificate that have failed.
    pub fn serving_failures(&self) -> u64 {
        self.serving_failures.load(Ordering::Relaxed)
    }

    /// How many seconds each serving certificate had been good when the next one came.
    pub fn serving_lives(&self) -> Vec<f64> {
        self.lives.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    #[allow(clippy::cast_precision_loss)]
    fn replaced(&self, certificate: &Certificate, now: i64) {
        let life = now.saturating_sub(certificate.not_before).max(0) as f64;
        self.lives.lock().unwrap_or_else(PoisonError::into_inner).push(life);
    }
}

/// Counts a failure.
fn counted(done: Result<()>, failures: &AtomicU64) -> Result<()> {
    done.inspect_err(|_| _ = failures.fetch_add(1, Ordering::Relaxed))
}

/// What keeps the node's identity.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The node's name.
    pub node: String,
    /// Where the kubeconfig is, or will be.
    pub kubeconfig: PathBuf,
    /// Credentials for the first certificate.
    pub bootstrap: Option<PathBuf>,
    /// The bootstrap kubeconfig is removed when it has served.
    pub discard_bootstrap: bool,
    /// Where certificates are kept.
    pub folder: PathBuf,
    /// The certificate is renewed.
    pub rotate: bool,
    /// The User-Agent.
    pub agent: String,
    /// Where it is counted how requests end.
    pub tally: Arc<Tally>,
}

impl Identity {
    /// Gets what is missing and renews what ends; `connection` is the one by the kubeconfig. Ends with its task.
    pub async fn keep(self, connection: Connection) {
        let (mut failures, mut said) = (0, None);
        let given = self.given();
        if given.rotate && !given.ours && given.certificate.is_some() {
            let kubeconfig = self.kubeconfig.display();
            tracing::warn!(%kubeconfig, "rotateCertificates: its client certificate is kept by somebody else and is not renewed here");
        }
        loop {
            let pause = match plan(self.given(), now()) {
                Step::Wait(pause) => {
                    said = None;
                    pause
                }
                Step::Stuck(why) => {
                    if said != Some(why) {
                        tracing::error!(kubeconfig = %self.kubeconfig.display(), "{why}");
                        said = Some(why);
                    }
                    LOOK
                }
                step => {
                    let done = match step {
                        Step::Bootstrap => self.bootstrap().await,
                        _ => self.renew(&connection).await,
                    };
                    connection.refresh();
                    let done = done.and_then(|()| of_use(&plan(self.given(), now()), &self.node));
                    after(counted(done, &self.tally.client_failures), "client", &mut failures)
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    fn store(&self) -> Store {
        Store::client(&self.folder)
    }

    fn given(&self) -> Given {
        let config = Kubeconfig::load(&self.kubeconfig).ok();
        let user = config.map(|config| config.user).unwrap_or_default();
        let ours = user.certificate == Some(Material::File(self.store().current()));
        let pem = match &user.certificate {
            Some(Material::File(path)) => fs::read(path).ok(),
            Some(Material::Inline(pem)) => Some(pem.clone()),
            None => None,
        };
        let certificate = pem.and_then(|pem| Certificate::from_pem(&pem, "").ok());
        // Of another node it is of no use to this one, unless somebody gave it on purpose.
        let certificate = certificate.filter(|certificate| !ours || Wanted::client(&self.node).is_met_by(certificate));
        Given {
            certificate: certificate.as_ref().map(Lifetime::of),
            other: user.token.is_some() || user.token_file.is_some(),
            ours,
            rotate: self.rotate,
            bootstrap: self.bootstrap.as_ref().is_some_and(|path| path.exists()),
        }
    }

    async fn bootstrap(&self) -> Result<()> {
        let Some(path) = &self.bootstrap else { return Ok(()) };
        let store = self.store();
        let config = Kubeconfig::load(path)?;
        let key = pending_key(&store)?;
        let client = Connection::of(config.clone(), &self.agent).client(Limit::NONE);
        until_healthy(&client).await;
        let obtained = csr::obtain(client, &Wanted::client(&self.node), &key, Naming::ByKey, FIRST).await;
        if matches!(obtained, Err(Error::Expired { .. })) {
            // Of a request from long ago: another key is another request.
            let _ = fs::remove_file(store.pending_key());
        }
        store.put(&obtained?, &key.serialize_pem(), OffsetDateTime::now_utc())?;
        let current = Some(Material::File(store.current()));
        let user = Credentials { certificate: current.clone(), key: current, token: None, token_file: None };
        let text = Kubeconfig { user, ..config }.render("default-cluster", "default-auth", "default-context");
        atomic::write(&self.kubeconfig, text.as_bytes(), 0o600)?;
        let _ = fs::remove_file(store.pending_key());
        if self.discard_bootstrap {
            fs::remove_file(path).map_err(|source| Error::WriteFile { path: path.clone(), source })?;
        }
        Ok(())
    }

    async fn renew(&self, connection: &Connection) -> Result<()> {
        obtain_new(connection, &Wanted::client(&self.node), &self.store()).await
    }
}

/// Waits until the server says that it is well, as the upstream before its first request: every two seconds, a minute at most. A request to one
/// that is coming up fails, and the pause after a failure is longer. Who is refused has been heard.
async fn until_healthy(client: &kube::Client) {
    let asked = async {
        loop {
            let request = http::Request::get("/healthz").body(Vec::new());
            let Ok(request) = request else { return };
            match client.request_text(request).await {
                Ok(_) => return,
                Err(kube::Error::Api(status)) if status.code < 500 => return,
                Err(_) => tokio::time::sleep(HEALTH).await,
            }
        }
    };
    let _ = tokio::time::timeout(HEALTH_PATIENCE, asked).await;
}

/// The names that the node serves under: DNS names and addresses.
pub type Names = Arc<dyn Fn() -> (Vec<String>, Vec<IpAddr>) + Send + Sync>;

/// What keeps the serving certificate.
#[derive(Clone)]
pub struct Serving {
    /// The node's name.
    pub node: String,
    /// Where certificates are kept.
    pub folder: PathBuf,
    /// Asked again and again: a changed address needs a new certificate.
    pub names: Names,
    /// Where it is counted how requests end.
    pub tally: Arc<Tally>,
}

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Serving({})", self.node)
    }
}

fn plan_serving(wanted: &Wanted, certificate: Option<&Certificate>, now: i64) -> Step {
    if wanted.addresses.is_empty() {
        return Step::Wait(ADDRESSES);
    }
    match certificate {
        Some(certificate) if wanted.is_met_by(certificate) && Lifetime::of(certificate).due() > now => Step::Wait(ADDRESSES),
        _ => Step::Renew,
    }
}

impl Serving {
    /// Gets a certificate for the names and renews it. Ends with its task.
    pub async fn keep(self, connection: Connection) {
        let store = Store::serving(&self.folder);
        let (mut failures, mut known) = (0, None);
        loop {
            let (mut dns_names, mut addresses) = (self.names)();
            dns_names.sort();
            addresses.sort();
            let wanted = Wanted { node: self.node.clone(), purpose: Purpose::Serving, dns_names, addresses };
            known = known.or_else(|| store.certificate());
            let pause = match plan_serving(&wanted, known.as_ref(), now()) {
                Step::Wait(pause) => pause,
                _ => {
                    let (done, before) = (obtain_new(&connection, &wanted, &store).await, known.take());
                    known = store.certificate();
                    if let (Ok(()), Some(before)) = (&done, before) {
                        self.tally.replaced(&before, now());
                    }
                    let done = done.and_then(|()| of_use(&plan_serving(&wanted, known.as_ref(), now()), &self.node));
                    after(counted(done, &self.tally.serving_failures), "serving", &mut failures)
                }
            };
            tokio::time::sleep(pause).await;
        }
    }
}

async fn obtain_new(connection: &Connection, wanted: &Wanted, store: &Store) -> Result<()> {
    let key = KeyPair::generate().map_err(|error| Error::Request { name: wanted.node.clone(), problem: error.to_string() })?;
    let pem = csr::obtain(connection.client(Limit::NONE), wanted, &key, Naming::Generated, RENEWED).await?;
    store.put(&pem, &key.serialize_pem(), OffsetDateTime::now_utc())
}

/// The key of a request that may have been made already, or a new one.
fn pending_key(store: &Store) -> Result<KeyPair> {
    let path = store.pending_key();
    let kept = fs::read_to_string(&path).ok().and_then(|pem| KeyPair::from_pem(&pem).ok());
    if let Some(key) = kept {
        return Ok(key);
    }
    let wrong = |error: rcgen::Error| Error::Certificate { name: path.display().to_string(), problem: error.to_string() };
    let key = KeyPair::generate().map_err(wrong)?;
    atomic::write(&path, key.serialize_pem().as_bytes(), 0o600)?;
    Ok(key)
}

/// Whether what was given lets us rest: where the next step is to ask again, each answer would be followed by another request.
fn of_use(next: &Step, node: &str) -> Result<()> {
    match next {
        Step::Wait(_) => Ok(()),
        _ => Err(Error::Request {
            name: node.to_owned(),
            problem: "the certificate that was given is not what was asked for, or ends too soon for this machine's clock"
                .to_owned(),
        }),
    }
}

/// Says how a try ended, and how long to wait after it.
fn after(done: Result<()>, what: &str, failures: &mut u32) -> Duration {
    match done {
        Ok(()) => {
            *failures = 0;
            tracing::info!("a new {what} certificate is in use");
            Duration::ZERO
        }
        Err(error) => {
            let pause = pause_after(*failures);
            *failures = failures.saturating_add(1);
            tracing::warn!(problem = error::chain(&error), again_in = pause.as_secs(), "no {what} certificate");
            pause
        }
    }
}

fn pause_after(failures: u32) -> Duration {
    (FIRST_PAUSE * 2u32.saturating_pow(failures.min(10))).min(LAST_PAUSE)
}

fn now() -> i64 {
    OffsetDateTime::now_utc().unix_timestamp()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 86_400;

    fn given(days: Option<(i64, i64)>) -> Given {
        let certificate = days.map(|(from, to)| Lifetime { not_before: from * DAY, not_after: to * DAY, part: 0.8 });
        Given { certificate, other: false, ours: true, rotate: true, bootstrap: true }
    }

    #[test]
    fn a_certificate_is_renewed_late_in_its_life_and_asked_for_when_it_is_over() {
        let year = Some((0, 100));
        for (given, day, step) in [
            (given(None), 0, Step::Bootstrap),
            (given(year), 0, Step::Wait(LOOK)),
            (given(year), 79, Step::Wait(LOOK)),
            (given(year), 80, Step::Renew),
            (given(year), 99, Step::Renew),
            (given(year), 100, Step::Bootstrap),
            (Given { rotate: false, ..given(year) }, 99, Step::Wait(LOOK)),
            (Given { ours: false, ..given(year) }, 99, Step::Wait(LOOK)),
            (Given { other: true, bootstrap: false, ..given(None) }, 0, Step::Wait(LOOK)),
            // Before its time: the clock is wrong, or will be set.
            (given(Some((10, 20))), 0, Step::Wait(LOOK)),
        ] {
            assert_eq!(plan(given, day * DAY), step, "{given:?} on day {day}");
        }
        for stuck in [given(None), given(year)] {
            assert!(matches!(plan(Given { bootstrap: false, ..stuck }, 101 * DAY), Step::Stuck(_)));
        }
        let soon = given(year);
        assert_eq!(plan(soon, 80 * DAY - 5), Step::Wait(Duration::from_secs(5)));
    }

    #[test]
    fn nodes_made_together_do_not_renew_together() {
        let part = |byte: u8| {
            let certificate = Certificate {
                common_name: String::new(),
                organizations: Vec::new(),
                not_before: 0,
                not_after: 1,
                dns_names: Vec::new(),
                addresses: Vec::new(),
                public_key: vec![byte],
            };
            Lifetime::of(&certificate).part
        };
        let parts: Vec<f64> = (0..200).map(part).collect();
        assert!(parts.iter().all(|part| (0.7..=0.9).contains(part)));
        let early = parts.iter().filter(|part| **part < 0.8).count();
        assert!((60..140).contains(&early), "{early} of 200 in the first half");
    }

    #[test]
    fn failures_are_tried_again_ever_later() {
        let pauses: Vec<u64> = (0..7).map(|failures| pause_after(failures).as_secs()).collect();
        assert_eq!(pauses, [2, 4, 8, 16, 32, 32, 32]);
    }

    #[test]
    fn without_an_address_no_serving_certificate_is_asked_for() {
        let wanted = |addresses: &[&str]| Wanted {
            purpose: Purpose::Serving,
            dns_names: vec!["n1".into()],
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            ..Wanted::client("n1")
        };
        let certificate = Certificate {
            common_name: "system:node:n1".into(),
            organizations: vec!["system:nodes".into()],
            not_before: 0,
            not_after: 100,
            dns_names: vec!["n1".into()],
            addresses: vec!["10.0.0.1".parse().unwrap()],
            public_key: Vec::new(),
        };
        assert_eq!(plan_serving(&wanted(&[]), None, 0), Step::Wait(ADDRESSES));
        assert_eq!(plan_serving(&wanted(&["10.0.0.1"]), None, 0), Step::Renew);
        assert_eq!(plan_serving(&wanted(&["10.0.0.1"]), Some(&certificate), 0), Step::Wait(ADDRESSES));
        assert_eq!(plan_serving(&wanted(&["10.0.0.2"]), Some(&certificate), 0), Step::Renew);
        assert_eq!(plan_serving(&wanted(&["10.0.0.1"]), Some(&certificate), 95), Step::Renew);
    }
}
