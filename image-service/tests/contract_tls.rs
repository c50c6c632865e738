//! Registries over TLS with certificates that the test made.
#![allow(clippy::unwrap_used)]

mod support;

use std::net::TcpStream;
use std::sync::Arc;

use berth_image::ErrorKind;
use berth_testkit::registry::{Auth, Registry, Stream, Wrap};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use support::{TestImage, TestStore};

struct Tls(Arc<ServerConfig>);

impl Wrap for Tls {
    fn wrap(&self, stream: TcpStream) -> Option<Box<dyn Stream>> {
        let connection = ServerConnection::new(self.0.clone()).ok()?;
        Some(Box::new(StreamOwned::new(connection, stream)))
    }
}

/// A registry with a certificate of its own, and that certificate as PEM.
fn registry() -> (Registry, String) {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_string(), "localhost".to_string()]).unwrap();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    (Registry::start_wrapped("https", Arc::new(Tls(Arc::new(config)))), made.cert.pem())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_authority_is_refused_and_a_configured_one_accepted() {
    let (registry, pem) = registry();
    let name = TestImage::small("x").push(&registry, "1");
    let (host, server) = (registry.host(), format!("server = 'https://{}'", registry.host()));
    let test = TestStore::new().await;
    test.hosts(&host, &server);
    let error = test.pull(&name).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    test.hosts(&host, &format!("{server}\nca = 'own.pem'"));
    std::fs::write(test.dir.path().join("certs.d").join(&host).join("own.pem"), pem).unwrap();
    test.pull(&name).await.unwrap();
    test.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn skip_verify_accepts_any_certificate_and_tokens_come_over_tls_too() {
    let (registry, _) = registry();
    registry.demand(Auth::Bearer { user: String::new(), password: String::new(), refresh_token: String::new() });
    let name = TestImage::small("x").push(&registry, "1");
    let test = TestStore::new().await;
    test.hosts(&registry.host(), &format!("server = 'https://{}'\nskip_verify = true", registry.host()));
    test.pull(&name).await.unwrap();
    assert_eq!(registry.count("/token"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_authority_file_is_reported_by_name() {
    let (registry, _) = registry();
    let test = TestStore::new().await;
    test.hosts(&registry.host(), &format!("server = 'https://{}'\nca = 'none.pem'", registry.host()));
    let error = test.pull(&TestImage::small("x").push(&registry, "1")).await.unwrap_err();
    assert!(error.to_string().contains("none.pem"), "{error}");
}
