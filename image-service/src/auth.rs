//! Credentials as callers give them. They are never logged: `Debug` shows only their kind.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};

use crate::error::Error;

/// The fields of a CRI `AuthConfig`, each possibly empty.
#[derive(Clone, Copy, Default)]
pub struct AuthFields<'a> {
    /// User name.
    pub username: &'a str,
    /// Password.
    pub password: &'a str,
    /// base64 of `user:password`.
    pub auth: &'a str,
    /// The only registry host these are for.
    pub server_address: &'a str,
    /// An OAuth refresh token.
    pub identity_token: &'a str,
    /// A bearer token that is sent as it is.
    pub registry_token: &'a str,
}

/// What is shown to a registry that asks.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Credentials {
    pub(crate) secret: Secret,
    pub(crate) server: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) enum Secret {
    Basic { username: String, password: String },
    IdentityToken(String),
    RegistryToken(String),
}

impl Credentials {
    /// A user and a password for any host.
    pub fn basic(username: impl Into<String>, password: impl Into<String>) -> Self {
        Credentials { secret: Secret::Basic { username: username.into(), password: password.into() }, server: None }
    }

    /// From the fields of a CRI `AuthConfig`; `None` when they are all empty.
    pub fn from_fields(fields: AuthFields<'_>) -> Result<Option<Self>, Error> {
        let secret = if !fields.username.is_empty() {
            Secret::Basic { username: fields.username.into(), password: fields.password.into() }
        } else if !fields.identity_token.is_empty() {
            Secret::IdentityToken(fields.identity_token.into())
        } else if !fields.auth.is_empty() {
            let (username, password) = decode_auth(fields.auth)?;
            Secret::Basic { username, password }
        } else if !fields.registry_token.is_empty() {
            Secret::RegistryToken(fields.registry_token.into())
        } else if !fields.password.is_empty() {
            return Err(Error::Credentials { reason: "a password without a user name" });
        } else {
            return Ok(None);
        };
        let server = match fields.server_address {
            "" => None,
            address => Some(server_host(address)),
        };
        Ok(Some(Credentials { secret, server }))
    }

    /// Whether they may be shown to `host`, the host of the reference or of one of its mirrors.
    pub(crate) fn are_for(&self, host: &str) -> bool {
        self.server.as_deref().is_none_or(|server| server == canonical(host))
    }
}

fn decode_auth(auth: &str) -> Result<(String, String), Error> {
    let bytes = STANDARD
        .decode(auth)
        .or_else(|_| STANDARD_NO_PAD.decode(auth))
        .map_err(|_| Error::Credentials { reason: "auth is not base64" })?;
    let text = String::from_utf8(bytes).map_err(|_| Error::Credentials { reason: "auth is not UTF-8" })?;
    let (username, password) =
        text.split_once(':').ok_or(Error::Credentials { reason: "auth has no colon between user and password" })?;
    Ok((username.to_string(), password.trim_end_matches('\0').to_string()))
}

/// `https://index.docker.io/v1/` and the like to a plain host.
fn server_host(address: &str) -> String {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    canonical(rest.split('/').next().unwrap_or_default())
}

fn canonical(host: &str) -> String {
    match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_string(),
        other => other.to_ascii_lowercase(),
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.secret {
            Secret::Basic { .. } => "basic",
            Secret::IdentityToken(_) => "identity token",
            Secret::RegistryToken(_) => "registry token",
        };
        write!(f, "Credentials({kind})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_of_auth_config_is_read() {
        let none = Credentials::from_fields(AuthFields::default()).unwrap();
        assert!(none.is_none());
        let basic = Credentials::basic("u", "p:q");
        let of = |fields| Credentials::from_fields(fields).unwrap().unwrap();
        assert_eq!(of(AuthFields { username: "u", password: "p:q", ..Default::default() }), basic);
        assert_eq!(of(AuthFields { auth: "dTpwOnE=", ..Default::default() }), basic);
        assert_eq!(of(AuthFields { auth: "dTpwOnE", ..Default::default() }), basic);
        let token = of(AuthFields { identity_token: "t", ..Default::default() });
        assert!(token.secret == Secret::IdentityToken("t".into()));
        let token = of(AuthFields { registry_token: "t", ..Default::default() });
        assert!(token.secret == Secret::RegistryToken("t".into()));
        for auth in ["%%%", "bm9jb2xvbg=="] {
            assert!(Credentials::from_fields(AuthFields { auth, ..Default::default() }).is_err());
        }
    }

    #[test]
    fn a_server_address_limits_the_host() {
        let cases = [
            ("https://index.docker.io/v1/", "docker.io", true),
            ("https://index.docker.io/v1/", "registry-1.docker.io", true),
            ("reg.example:5000", "reg.example:5000", true),
            ("reg.example:5000", "reg.example", false),
            ("https://reg.example/v2/", "other.example", false),
            ("", "any.example", true),
        ];
        for (server_address, host, expected) in cases {
            let fields = AuthFields { username: "u", password: "p", server_address, ..Default::default() };
            let credentials = Credentials::from_fields(fields).unwrap().unwrap();
            assert_eq!(credentials.are_for(host), expected, "{server_address} {host}");
        }
    }

    #[test]
    fn secrets_do_not_show_in_debug_output() {
        assert_eq!(format!("{:?}", Credentials::basic("user", "secret")), "Credentials(basic)");
    }
}
