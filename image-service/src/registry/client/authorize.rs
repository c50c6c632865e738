//! What a registry's 401 asks for: the credentials themselves, or a token that they are exchanged for.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};

use super::{Remote, Session};
use crate::auth::Secret;
use crate::error::Error;
use crate::registry::challenge::{self, Challenge};

impl Session {
    /// Answers a 401: finds out what the host wants and keeps it for the requests that follow.
    pub(super) async fn authorize(&self, remote: &Remote, headers: &HeaderMap, used: Option<HeaderValue>) -> Result<(), Error> {
        let mut kept = remote.authorization.lock().await;
        if *kept != used {
            // Another request of this pull has done it meanwhile.
            return Ok(());
        }
        let offers: Vec<Challenge> =
            headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok()).flat_map(challenge::parse).collect();
        let secret = self.secret_for(remote);
        let offer = |scheme: &str| offers.iter().find(|challenge| challenge.scheme == scheme);
        let value = if let Some(bearer) = offer("bearer") {
            match secret {
                Some(Secret::RegistryToken(token)) => format!("Bearer {token}"),
                secret => format!("Bearer {}", self.token(remote, bearer, secret).await?),
            }
        } else if offer("basic").is_some() {
            match secret {
                Some(Secret::Basic { username, password }) => basic(username, password),
                _ => return Err(self.denied("no basic auth credentials")),
            }
        } else {
            return Err(self.denied("the registry offers no known way to authenticate"));
        };
        let mut value = HeaderValue::try_from(value).map_err(|_| self.denied("the credentials cannot be sent in a header"))?;
        value.set_sensitive(true);
        *kept = Some(value);
        Ok(())
    }

    fn secret_for(&self, remote: &Remote) -> Option<&Secret> {
        let credentials = self.credentials.as_ref()?;
        let allowed =
            credentials.are_for(&remote.endpoint.authority) || (remote.endpoint.server && credentials.are_for(&self.host));
        allowed.then_some(&credentials.secret)
    }

    async fn token(&self, remote: &Remote, challenge: &Challenge, secret: Option<&Secret>) -> Result<String, Error> {
        let parameter = |name: &str| challenge.parameters.get(name).map(String::as_str);
        let realm: Uri = parameter("realm")
            .and_then(|realm| realm.parse().ok())
            .filter(|realm: &Uri| realm.authority().is_some() && matches!(realm.scheme_str(), Some("http" | "https")))
            .ok_or_else(|| self.protocol(remote, "the token realm is not a URL"))?;
        if secret.is_some() && realm.scheme_str() == Some("http") && remote.endpoint.scheme == "https" {
            return Err(self.protocol(remote, format!("credentials are not sent in the clear to {realm}")));
        }
        let scope = format!("repository:{}:pull", self.repository);
        let mut fields = vec![("scope", parameter("scope").unwrap_or(&scope))];
        fields.extend(parameter("service").map(|service| ("service", service)));
        let mut headers = HeaderMap::new();
        let response = if let Some(Secret::IdentityToken(token)) = secret {
            fields.extend([("grant_type", "refresh_token"), ("client_id", "berth"), ("refresh_token", token)]);
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
            self.send(remote, Method::POST, realm, headers, challenge::form(&fields).into()).await?
        } else {
            if let Some(Secret::Basic { username, password }) = secret
                && let Ok(value) = HeaderValue::try_from(basic(username, password))
            {
                headers.insert(AUTHORIZATION, value);
            }
            let joiner = if realm.query().is_some() { '&' } else { '?' };
            let url = format!("{realm}{joiner}{}", challenge::form(&fields));
            let url = url.parse().map_err(|_| self.protocol(remote, "the token realm is not a URL"))?;
            self.send(remote, Method::GET, url, headers, Bytes::new()).await?
        };
        match response.status() {
            status if status.is_success() => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST => {
                let detail = self.error_text(remote, response).await;
                return Err(self.denied(&format!("the token server refuses{detail}")));
            }
            _ => return Err(self.failure(remote, "token", response).await),
        }
        let body = self.collect(remote, response, 1 << 20).await?;
        #[derive(serde::Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let token: Token = serde_json::from_slice(&body).map_err(|source| Error::Json { subject: "token".into(), source })?;
        let given = token.token.filter(|token| !token.is_empty()).or(token.access_token);
        given.ok_or_else(|| self.protocol(remote, "the token server sent no token"))
    }
}

fn basic(username: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{username}:{password}")))
}
