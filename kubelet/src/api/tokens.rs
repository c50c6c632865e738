//! Tokens of service accounts, bound to the pod that shows them: asked for, held in memory alone, and asked for again in time. Which
//! file a token is in, and whose, is the volume's business.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::Notify;

use crate::clock::Clock;
use crate::objects::Token;
use crate::pod::{self, PodUid};

/// Which token: whose, for whom (empty: for the API server), and for how many seconds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    uid: PodUid,
    audience: String,
    seconds: i64,
}

/// What is held of one.
#[derive(Debug)]
struct Entry {
    /// The last that was given.
    token: Option<Arc<Token>>,
    /// Until when it is good, as far as this machine can tell.
    until: u64,
    /// Why none was given since.
    error: Option<String>,
    /// When the next is asked for.
    renew: u64,
    /// Its worker has been told to.
    told: bool,
    /// The API server was not there when it was last asked for: the last one is shown, however old it is.
    away: bool,
}

/// Why no token was given.
#[derive(Debug)]
struct NotGiven {
    why: String,
    /// Nobody has refused it: the API server is not there.
    away: bool,
    /// The server's authorizer may not know yet that the pod is this node's.
    early: bool,
}

impl NotGiven {
    fn of(error: &kube::Error) -> NotGiven {
        // From 500 on it is the server's own trouble; 401 is a certificate of ours that has ended, and 403 is what a server says of every pod
        // that has just come up itself.
        let refused = matches!(error, kube::Error::Api(status) if status.code < 500 && !matches!(status.code, 401 | 403 | 429));
        let early = matches!(error, kube::Error::Api(status) if status.code == 403);
        NotGiven { why: super::message(error), away: !refused, early }
    }
}

/// The tokens of this node's pods. Clones share them. Times are milliseconds since the boot: a wall clock that is wrong, or set, must neither
/// ask again and again nor let a token expire.
#[derive(Clone, Debug)]
pub(super) struct Tokens {
    held: Arc<Mutex<BTreeMap<Key, Entry>>>,
    changed: Arc<Notify>,
    clock: Clock,
}

/// A token is renewed when a fifth of its life is left, as the upstream does,
const LEFT: u64 = 5;
/// and after a day at the latest,
const OLDEST: u64 = 24 * 3_600_000;
/// a few seconds earlier, so that pods that came together do not ask together.
const MOST_JITTER: u64 = 10_000;
/// A request that failed is made again after so long, as long as the last token is good; none is made sooner after another.
const AGAIN: u64 = 30_000;
/// The limit of a request: a step of a pass waits for it.
const REQUEST: Duration = Duration::from_secs(10);

/// When a token is renewed that is given `now` for so many milliseconds.
fn renewal(now: u64, life: u64, jitter: u64) -> u64 {
    now.saturating_add((life - life / LEFT).min(OLDEST).saturating_sub(jitter).max(AGAIN))
}

fn jitter() -> u64 {
    let mut random = [0u8; 4];
    // Without a random number they ask together.
    let _ = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty());
    u64::from(u32::from_le_bytes(random)) % MOST_JITTER
}

fn millis(seconds: i64) -> u64 {
    u64::try_from(seconds).unwrap_or(0).saturating_mul(1000)
}

/// The name of the pod's service account.
fn account(pod: &Pod) -> &str {
    pod::spec(pod).service_account_name.as_deref().filter(|name| !name.is_empty()).unwrap_or("default")
}

/// What is asked for.
fn request(pod: &Pod, audience: &str, seconds: i64) -> TokenRequest {
    let reference = BoundObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        name: Some(pod::name(pod).to_owned()),
        uid: Some(pod::uid(pod).to_owned()),
    };
    let audiences = (!audience.is_empty()).then(|| vec![audience.to_owned()]);
    TokenRequest {
        spec: Some(TokenRequestSpec { audiences, bound_object_ref: Some(reference), expiration_seconds: Some(seconds) }),
        ..TokenRequest::default()
    }
}

/// A token, and for how many seconds it was given: the API server may give it for longer or shorter than asked.
async fn ask(client: Client, pod: &Pod, audience: &str, seconds: i64) -> Result<(Token, i64), NotGiven> {
    let api: Api<ServiceAccount> = Api::namespaced(client, pod::namespace(pod));
    let (account, wanted, params) = (account(pod), request(pod, audience, seconds), PostParams::default());
    let asked = api.create_token_request(account, &params, &wanted);
    let given = match tokio::time::timeout(REQUEST, asked).await {
        Ok(Ok(given)) => given,
        Ok(Err(error)) => return Err(NotGiven::of(&error)),
        Err(_) => return Err(NotGiven { why: "the API server does not answer".to_owned(), away: true, early: false }),
    };
    let status = given.status.unwrap_or_default();
    let (Some(text), Some(expires)) = (status.token, status.expiration_timestamp) else {
        return Err(NotGiven { why: "the API server's answer has no token".to_owned(), away: false, early: false });
    };
    Ok((Token { text, expires: expires.0 }, given.spec.and_then(|spec| spec.expiration_seconds).unwrap_or(seconds)))
}

/// The API server's authorizer learns of a pod a moment after the node does, and refuses until then; a pass that fails for it is repeated
/// only seconds later. So a first token is asked for again after these milliseconds.
const EARLY: [u64; 4] = [100, 200, 400, 800];

async fn patiently<T, F: Future<Output = Result<T, NotGiven>>>(mut ask: impl FnMut() -> F) -> Result<T, NotGiven> {
    for pause in EARLY {
        match ask().await {
            Err(not_given) if not_given.early => tokio::time::sleep(Duration::from_millis(pause)).await,
            given => return given,
        }
    }
    ask().await
}

impl Tokens {
    pub(super) fn new(clock: Clock) -> Tokens {
        Tokens { held: Arc::default(), changed: Arc::default(), clock }
    }

    fn now(&self) -> u64 {
        self.clock.uptime().millis
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Entry>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for those of the pod's tokens that are not there or are old; one that is still good stays when that fails.
    pub(super) async fn ensure(&self, client: &Client, pod: &Pod, wanted: BTreeSet<(String, i64)>) {
        let Some(uid) = PodUid::of(pod) else { return };
        let now = self.now();
        let old = |key: &Key| self.lock().get(key).is_none_or(|entry| entry.renew <= now || entry.token.is_none());
        let keys = wanted.into_iter().map(|(audience, seconds)| Key { uid: uid.clone(), audience, seconds });
        let requests = keys.filter(old).map(|key| async {
            // Who was refused for all that time is asked for once a pass: the refusal may stay.
            let is_first = self.lock().get(&key).is_none();
            let once = || ask(client.clone(), pod, &key.audience, key.seconds);
            let given = if is_first { patiently(once).await } else { once().await };
            self.take(key, given, pod);
        });
        join_all(requests).await;
        self.changed.notify_one();
    }

    fn take(&self, key: Key, given: Result<(Token, i64), NotGiven>, pod: &Pod) {
        let now = self.now();
        let mut held = self.lock();
        match given {
            Ok((token, seconds)) => {
                let life = millis(seconds);
                let renew = renewal(now, life, jitter());
                tracing::debug!(pod = %pod::format_pod(pod), audience = key.audience, expires = %token.expires, in_seconds = (renew - now) / 1000, "token is new");
                let until = now.saturating_add(life);
                held.insert(key, Entry { token: Some(Arc::new(token)), until, error: None, renew, told: false, away: false });
            }
            Err(NotGiven { why: error, away, .. }) => {
                // A server that is away is told of once: it may be for days.
                if !held.get(&key).is_some_and(|entry| entry.away && away) {
                    tracing::warn!(pod = %pod::format_pod(pod), audience = key.audience, error, "no new token");
                }
                let renew = now.saturating_add(AGAIN);
                let (token, until) = held.remove(&key).map_or((None, 0), |entry| (entry.token, entry.until));
                held.insert(key, Entry { token, until, error: Some(error), renew, told: false, away });
            }
        }
    }

    /// The token as it is held; the error is the kubelet's message.
    pub(super) fn get(&self, pod: &Pod, audience: &str, seconds: i64) -> Result<Arc<Token>, String> {
        let missing = || "failed to fetch token: it has not been asked for".to_owned();
        let uid = PodUid::of(pod).ok_or_else(missing)?;
        let held = self.lock();
        let entry = held.get(&Key { uid, audience: audience.to_owned(), seconds }).ok_or_else(missing)?;
        match (&entry.token, &entry.error) {
            (Some(token), _) if entry.until > self.now() || entry.away => Ok(token.clone()),
            (_, Some(error)) => Err(format!("failed to fetch token: {error}")),
            (_, None) => Err("failed to fetch token: the last one has expired".to_owned()),
        }
    }

    /// Tokens of before: they are shown until the API server gives others, which it is asked for when it is back.
    pub(super) fn remember(&self, uid: &PodUid, tokens: &BTreeMap<(String, i64), Arc<Token>>) {
        let renew = self.now().saturating_add(AGAIN);
        let mut held = self.lock();
        for ((audience, seconds), token) in tokens {
            let key = Key { uid: uid.clone(), audience: audience.clone(), seconds: *seconds };
            let entry = Entry { token: Some(token.clone()), until: 0, error: None, renew, told: false, away: true };
            held.entry(key).or_insert(entry);
        }
        drop(held);
        self.changed.notify_one();
    }

    /// The API server is back: what it was not there for is asked for at once, of these pods.
    pub(super) fn renew(&self, is_wanted: impl Fn(&PodUid) -> bool) {
        let now = self.now();
        let mut held = self.lock();
        held.retain(|key, entry| !entry.away || is_wanted(&key.uid));
        for entry in held.values_mut().filter(|entry| entry.away) {
            (entry.renew, entry.told) = (now, false);
        }
        drop(held);
        self.changed.notify_one();
    }

    /// Those that were given for a pod.
    pub(super) fn of(&self, uid: &PodUid) -> BTreeMap<(String, i64), Arc<Token>> {
        let held = self.lock();
        let given = held.iter().filter(|(key, _)| key.uid == *uid);
        given.filter_map(|(key, entry)| Some(((key.audience.clone(), key.seconds), entry.token.clone()?))).collect()
    }

    /// The pod is gone.
    pub(super) fn release(&self, uid: &PodUid) {
        self.lock().retain(|key, _| key.uid != *uid);
    }

    /// The pods with tokens that are due, each told of once; and how long until the next.
    fn due(&self) -> (BTreeSet<PodUid>, Option<Duration>) {
        let now = self.now();
        let mut held = self.lock();
        let mut pods = BTreeSet::new();
        for (key, entry) in held.iter_mut().filter(|(_, entry)| !entry.told && entry.renew <= now) {
            entry.told = true;
            pods.insert(key.uid.clone());
        }
        let next = held.values().filter(|entry| !entry.told).map(|entry| entry.renew).min();
        let left = next.map(|at| Duration::from_millis(at.saturating_sub(now)));
        (pods, left)
    }

    /// Tells of pods whose tokens are due, for as long as the kubelet runs. Nothing happens while none is.
    pub(super) async fn run(self, tell: impl Fn(BTreeSet<PodUid>)) {
        loop {
            let (pods, left) = self.due();
            if !pods.is_empty() {
                tell(pods);
            }
            match left {
                Some(left) => tokio::select! {
                    () = self.changed.notified() => {}
                    () = tokio::time::sleep(left.max(Duration::from_millis(10))) => {}
                },
                None => self.changed.notified().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use k8s_openapi::jiff::Timestamp;

    use super::*;
    use crate::clock::Uptime;

    fn pod() -> Pod {
        let pod = serde_json::json!({"metadata": {"name": "a", "namespace": "ns", "uid": "u1"}, "spec": {"containers": []}});
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn a_token_is_renewed_with_a_fifth_of_its_life_left_or_after_a_day_and_never_at_once() {
        for (seconds, renewed) in [(600, 480), (3600, 2880), (1_000_000, 86_400), (3607, 2885), (0, 30), (20, 30)] {
            assert_eq!(renewal(5000, millis(seconds), 0) / 1000, 5 + renewed, "{seconds}");
        }
        assert_eq!(renewal(0, 600_000, 7000), 473_000);
        let jitters: Vec<_> = (0..50).map(|_| jitter()).collect();
        assert!(jitters.iter().all(|j| *j < 10_000) && jitters.iter().any(|j| *j != jitters[0]));
    }

    #[test]
    fn a_request_binds_the_token_to_the_pod() {
        let asked = serde_json::to_value(request(&pod(), "", 3607)).unwrap();
        let bound = serde_json::json!({"apiVersion": "v1", "kind": "Pod", "name": "a", "uid": "u1"});
        assert_eq!(asked["spec"]["boundObjectRef"], bound);
        assert_eq!(asked["spec"]["expirationSeconds"], 3607);
        assert!(asked["spec"].get("audiences").is_none_or(|a| a.is_null() || a == &serde_json::json!([])), "{asked}");
        let asked = serde_json::to_value(request(&pod(), "vault", 600)).unwrap();
        assert_eq!(asked["spec"]["audiences"], serde_json::json!(["vault"]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_first_token_is_asked_for_until_the_server_knows_the_pod() {
        let begun = tokio::time::Instant::now();
        let refused = |early| NotGiven { why: "no relationship found".to_owned(), away: true, early };
        let mut asked = 0;
        let given = patiently(|| {
            asked += 1;
            std::future::ready(if asked < 3 { Err(refused(true)) } else { Ok(asked) })
        });
        assert_eq!(given.await.unwrap(), 3);
        assert_eq!(begun.elapsed(), Duration::from_millis(300));
        let never = patiently(|| std::future::ready(Err::<(), _>(refused(true))));
        assert!(never.await.unwrap_err().early);
        assert_eq!(begun.elapsed(), Duration::from_millis(1800), "bounded: a step of a pass waits for it");
        let at_once = patiently(|| std::future::ready(Err::<(), _>(refused(false))));
        assert!(at_once.await.is_err());
        assert_eq!(begun.elapsed(), Duration::from_millis(1800));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_refused_for_good_is_asked_for_once_a_pass() {
        let asked = Arc::new(AtomicU64::new(0));
        let hears = asked.clone();
        let service = tower::service_fn(move |_: http::Request<kube::client::Body>| {
            hears.fetch_add(1, Ordering::Relaxed);
            let refused = serde_json::json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "no", "reason": "Forbidden", "code": 403});
            let answer =
                http::Response::builder().status(403).body(http_body_util::Full::new(bytes::Bytes::from(refused.to_string())));
            std::future::ready(Ok::<_, std::convert::Infallible>(answer.unwrap()))
        });
        let (client, tokens) = (Client::new(service, "default"), Tokens::new(Clock::default()));
        for (pass, all) in [5, 6, 7].into_iter().enumerate() {
            tokens.ensure(&client, &pod(), [(String::new(), 600)].into()).await;
            assert_eq!(asked.load(Ordering::Relaxed), all, "pass {pass}");
        }
    }

    #[test]
    fn a_server_that_knows_nobody_yet_or_any_more_refuses_nothing() {
        for (code, away) in
            [(400, false), (401, true), (403, true), (404, false), (422, false), (429, true), (500, true), (503, true)]
        {
            let status = kube::core::Status { code, ..kube::core::Status::default() };
            assert_eq!(NotGiven::of(&kube::Error::Api(Box::new(status))).away, away, "{code}");
        }
    }

    #[test]
    fn a_pod_is_told_once_that_its_token_is_due_and_keeps_the_old_one_until_it_expires() {
        let second = Arc::new(AtomicU64::new(1000));
        let uptime = second.clone();
        // A wall clock that is years ahead changes nothing.
        let wall = || Timestamp::from_second(2_000_000_000).unwrap();
        let clock = Clock::from_fn(wall)
            .with_uptime(move || Uptime { boot: String::new(), millis: uptime.load(Ordering::Relaxed) * 1000 });
        let tokens = Tokens::new(clock);
        let key = Key { uid: PodUid::new("u1").unwrap(), audience: String::new(), seconds: 600 };
        let token = Token { text: "t".to_owned(), expires: Timestamp::from_second(1600).unwrap() };
        tokens.take(key.clone(), Ok((token, 600)), &pod());
        assert_eq!(tokens.due().0.len(), 0);
        assert!(tokens.due().1.unwrap() >= Duration::from_secs(470));
        second.store(1490, Ordering::Relaxed);
        assert_eq!(tokens.due().0, [key.uid.clone()].into());
        assert_eq!(tokens.due(), (BTreeSet::new(), None), "it is told once");
        let not_given = |why: &str, away| Err(NotGiven { why: why.to_owned(), away, early: false });
        tokens.take(key.clone(), not_given("refused", false), &pod());
        assert_eq!(tokens.get(&pod(), "", 600).unwrap().text, "t");
        assert_eq!(tokens.due().1, Some(Duration::from_secs(30)));
        second.store(1600, Ordering::Relaxed);
        assert_eq!(tokens.get(&pod(), "", 600).unwrap_err(), "failed to fetch token: refused");
        // Nobody is there to take another one either.
        tokens.take(key.clone(), not_given("away", true), &pod());
        assert_eq!(tokens.get(&pod(), "", 600).unwrap().text, "t");
        assert_eq!(tokens.due().1, Some(Duration::from_secs(30)));
        tokens.renew(|_| true);
        assert_eq!(tokens.due().0, [key.uid.clone()].into(), "at once when the API server is back");
        tokens.release(&key.uid);
        assert!(tokens.get(&pod(), "", 600).is_err() && tokens.due().0.is_empty());
    }
}
