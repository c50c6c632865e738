//! Lets a request in or says why not: certificate, token, nobody; then the permission. Remembers what the API server
//! said for as long as it was told to.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Method, header};
use sha2::{Digest, Sha256};

use super::attributes::{subresources, verb};
use super::cache::Cache;
use super::{Attributes, Peer, ReviewError, Reviewer, User};
use crate::server::config::{Authentication, Authorization, ServerConfig};
use crate::{Error, Result};

/// The upstream's back-off of reviews: five tries in all, the pause grows by half each time.
const TRIES: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// Why a request is turned away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Nobody knows who that is.
    Unauthorized,
    /// Known, and may not.
    Forbidden(String),
    /// Known, and the API server does not say whether.
    Failed(String),
}

/// The check at the door of the authenticated server.
#[derive(Debug)]
pub(crate) struct Guard {
    authentication: Authentication,
    authorization: Authorization,
    reviewer: Option<Arc<dyn Reviewer>>,
    node: String,
    /// By the token's digest: tokens themselves are not kept.
    tokens: Cache<[u8; 32], Option<User>>,
    permissions: Cache<(User, Attributes), bool>,
}

impl Guard {
    /// Refuses what cannot work: reviews without an API server.
    pub(crate) fn new(config: &ServerConfig, node: &str) -> Result<Guard> {
        let missing = |field, problem: &str| Err(Error::Config { field, problem: problem.to_owned() });
        if config.reviewer.is_none() {
            if config.authentication.webhook.is_some() {
                return missing(
                    "authentication.webhook.enabled",
                    "tokens need an API server to ask and there is none: set it to false",
                );
            }
            if config.authorization != Authorization::AlwaysAllow {
                return missing("authorization.mode", "Webhook needs an API server to ask and there is none: set AlwaysAllow");
            }
        }
        if let Authentication { client_ca_file: None, webhook: None, anonymous: false } = &config.authentication {
            return missing("authentication", "nobody could ever call: name an x509.clientCAFile, or allow webhook or anonymous");
        }
        Ok(Guard {
            authentication: config.authentication.clone(),
            authorization: config.authorization,
            reviewer: config.reviewer.clone(),
            node: node.to_owned(),
            tokens: Cache::default(),
            permissions: Cache::default(),
        })
    }

    /// Who is let in with this request.
    pub(crate) async fn admit(
        &self,
        peer: &Peer,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
    ) -> std::result::Result<User, Refusal> {
        let user = self.authenticate(peer, headers).await.ok_or(Refusal::Unauthorized)?;
        self.authorize(&user, verb(method), subresources(path)).await?;
        Ok(user)
    }

    async fn authenticate(&self, peer: &Peer, headers: &HeaderMap) -> Option<User> {
        if let Peer::Certified(user) = peer {
            return Some(authenticated(user.clone()));
        }
        let mut doubt = *peer == Peer::Doubtful;
        if let (Some(ttl), Some(token)) = (self.authentication.webhook, bearer(headers)) {
            match self.token(token, ttl).await {
                Some(user) => return Some(authenticated(user)),
                None => doubt = true,
            }
        }
        // Who shows a wrong paper is not nobody.
        (self.authentication.anonymous && !doubt).then(|| User {
            name: "system:anonymous".to_owned(),
            groups: vec!["system:unauthenticated".to_owned()],
            ..User::default()
        })
    }

    async fn token(&self, token: &str, ttl: Duration) -> Option<User> {
        let key: [u8; 32] = Sha256::digest(token).into();
        if let Some(known) = self.tokens.get(&key) {
            return known;
        }
        let reviewer = self.reviewer.as_ref()?;
        let reviewed = tried(|| reviewer.token(token)).await;
        match reviewed {
            Ok(user) => {
                self.tokens.put(key, user.clone(), ttl);
                user
            }
            Err(error) => {
                tracing::warn!(%error, "a bearer token could not be reviewed: the caller is turned away");
                None
            }
        }
    }

    async fn authorize(
        &self,
        user: &User,
        verb: &'static str,
        wanted: &'static [&'static str],
    ) -> std::result::Result<(), Refusal> {
        let Authorization::Webhook { allowed_ttl, denied_ttl } = self.authorization else { return Ok(()) };
        let about = |list: &str| format!("(user={}, verb={verb}, resource=nodes, subresource{list})", user.name);
        for &subresource in wanted {
            let attributes = Attributes { verb, node: self.node.clone(), subresource };
            let key = (user.clone(), attributes);
            let allowed = match self.permissions.get(&key) {
                Some(known) => known,
                None => {
                    let Some(reviewer) = &self.reviewer else { return Err(Refusal::Forbidden(String::new())) };
                    let allowed = tried(|| reviewer.access(&key.0, &key.1)).await.map_err(|error| {
                        tracing::warn!(%error, user = user.name, "a permission could not be reviewed");
                        Refusal::Failed(format!("Authorization error {}", about(&format!("={subresource}"))))
                    })?;
                    self.permissions.put(key, allowed, if allowed { allowed_ttl } else { denied_ttl });
                    allowed
                }
            };
            if allowed {
                return Ok(());
            }
        }
        Err(Refusal::Forbidden(format!("Forbidden {}", about(&format!("(s)=[{}]", wanted.join(" "))))))
    }
}

/// Everybody who is known is in this group.
fn authenticated(mut user: User) -> User {
    let group = "system:authenticated";
    if !user.groups.iter().any(|g| g == group) {
        user.groups.push(group.to_owned());
    }
    user
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.trim().split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

/// Asks until there is an answer, or one that no other will follow, as upstream; a few times.
async fn tried<T, F>(ask: impl Fn() -> F) -> std::result::Result<T, ReviewError>
where
    F: Future<Output = std::result::Result<T, ReviewError>>,
{
    let mut pause = FIRST_PAUSE;
    for _ in 1..TRIES {
        match ask().await {
            Err(error @ ReviewError::NoAnswer(_)) => tracing::debug!(%error, "review"),
            last => return last,
        }
        tokio::time::sleep(pause).await;
        pause = pause * 3 / 2;
    }
    ask().await
}

#[cfg(test)]
mod tests {
    use super::super::Review;
    use super::*;
    use std::sync::Mutex;

    #[derive(Debug, Default)]
    struct Fake {
        asked: Mutex<Vec<String>>,
        fails: Option<ReviewError>,
    }

    impl Reviewer for Fake {
        fn token<'a>(&'a self, token: &'a str) -> Review<'a, Option<User>> {
            self.asked.lock().unwrap().push(format!("token {token}"));
            let user = User { name: "prometheus".into(), ..User::default() };
            let answer = self.fails.clone().map_or(Ok((token == "good").then_some(user)), Err);
            Box::pin(std::future::ready(answer))
        }
        fn access<'a>(&'a self, user: &'a User, wanted: &'a Attributes) -> Review<'a, bool> {
            self.asked.lock().unwrap().push(format!("{} {} {}/{}", user.name, wanted.verb, wanted.node, wanted.subresource));
            let may = wanted.subresource != "stats" && user.name != "pods" || wanted.subresource == "proxy";
            let answer = self.fails.clone().map_or(Ok(may), Err);
            Box::pin(std::future::ready(answer))
        }
    }

    fn guard(fake: &Arc<Fake>, anonymous: bool) -> Guard {
        let config = ServerConfig {
            authentication: Authentication { webhook: Some(Authentication::WEBHOOK_TTL), anonymous, client_ca_file: None },
            reviewer: Some(fake.clone()),
            ..ServerConfig::default()
        };
        Guard::new(&config, "n1").unwrap()
    }

    fn with_token(token: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, format!("Bearer {token}").parse().unwrap())])
    }

    fn certified(name: &str) -> Peer {
        Peer::Certified(User { name: name.into(), ..User::default() })
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_paper_that_is_good_counts_and_a_bad_one_is_worse_than_none() {
        let fake = Arc::new(Fake::default());
        for (peer, headers, anonymous, expected) in [
            (certified("admin"), with_token("bad"), false, Some("admin")),
            (Peer::Unknown, with_token("good"), false, Some("prometheus")),
            (Peer::Doubtful, with_token("good"), false, Some("prometheus")),
            (Peer::Unknown, with_token("bad"), true, None),
            (Peer::Doubtful, HeaderMap::new(), true, None),
            (Peer::Unknown, HeaderMap::new(), true, Some("system:anonymous")),
            (Peer::Unknown, HeaderMap::new(), false, None),
        ] {
            let found = guard(&fake, anonymous).authenticate(&peer, &headers).await;
            assert_eq!(found.as_ref().map(|u| u.name.as_str()), expected, "{peer:?} {headers:?} {anonymous}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn answers_are_remembered_for_their_time() {
        let fake = Arc::new(Fake::default());
        let guard = guard(&fake, false);
        let ask = async |path: &str, token: &str| guard.admit(&Peer::Unknown, &Method::GET, path, &with_token(token)).await;
        assert!(ask("/metrics", "good").await.is_ok() && ask("/metrics/cadvisor", "good").await.is_ok());
        assert_eq!(*fake.asked.lock().unwrap(), ["token good", "prometheus get n1/metrics"]);
        let refused = ask("/stats/summary", "good").await.unwrap_err();
        let text = "Forbidden (user=prometheus, verb=get, resource=nodes, subresource(s)=[stats])";
        assert_eq!(refused, Refusal::Forbidden(text.into()));
        assert_eq!(ask("/stats/summary", "good").await.unwrap_err(), refused);
        assert_eq!(fake.asked.lock().unwrap().len(), 3, "the no is remembered too");
        tokio::time::advance(Duration::from_secs(31)).await;
        assert_eq!(ask("/stats/summary", "good").await.unwrap_err(), refused);
        assert_eq!(fake.asked.lock().unwrap().len(), 4, "but not so long");
        assert_eq!(ask("/metrics", "bad").await.unwrap_err(), Refusal::Unauthorized);
    }

    #[tokio::test(start_paused = true)]
    async fn any_of_several_sub_resources_suffices() {
        let fake = Arc::new(Fake::default());
        let guard = guard(&fake, false);
        assert!(guard.admit(&certified("pods"), &Method::GET, "/pods", &HeaderMap::new()).await.is_ok());
        assert_eq!(*fake.asked.lock().unwrap(), ["pods get n1/pods", "pods get n1/proxy"]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_api_server_that_fails_is_asked_again_and_then_nobody_gets_in() {
        let fake = Arc::new(Fake { fails: Some(ReviewError::NoAnswer("no answer".into())), ..Fake::default() });
        let guard = guard(&fake, true);
        assert_eq!(guard.admit(&Peer::Unknown, &Method::GET, "/metrics", &with_token("good")).await, Err(Refusal::Unauthorized));
        assert_eq!(fake.asked.lock().unwrap().len(), 5);
        let failed = guard.admit(&certified("admin"), &Method::POST, "/exec/a/b/c", &HeaderMap::new()).await;
        let text = "Authorization error (user=admin, verb=create, resource=nodes, subresource=proxy)";
        assert_eq!(failed, Err(Refusal::Failed(text.into())));
    }

    #[tokio::test(start_paused = true)]
    async fn an_api_server_that_refuses_to_review_is_not_asked_again() {
        let fake = Arc::new(Fake { fails: Some(ReviewError::Refused("401".into())), ..Fake::default() });
        let guard = guard(&fake, true);
        assert_eq!(guard.admit(&Peer::Unknown, &Method::GET, "/metrics", &with_token("good")).await, Err(Refusal::Unauthorized));
        assert_eq!(fake.asked.lock().unwrap().len(), 1);
    }

    #[test]
    fn what_needs_an_api_server_is_refused_without_one() {
        let config = |authentication, authorization| ServerConfig { authentication, authorization, ..ServerConfig::default() };
        let anonymous = Authentication { anonymous: true, ..Authentication::default() };
        let webhook = Authentication { webhook: Some(Authentication::WEBHOOK_TTL), ..Authentication::default() };
        for (config, field) in [
            (config(webhook, Authorization::AlwaysAllow), Some("authentication.webhook.enabled")),
            (config(anonymous.clone(), Authorization::WEBHOOK), Some("authorization.mode")),
            (config(Authentication::default(), Authorization::AlwaysAllow), Some("authentication")),
            (config(anonymous, Authorization::AlwaysAllow), None),
        ] {
            let found = Guard::new(&config, "n1").err().map(|error| match error {
                Error::Config { field, .. } => field,
                other => panic!("{other}"),
            });
            assert_eq!(found, field);
        }
    }
}
