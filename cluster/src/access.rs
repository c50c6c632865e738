//! A kubeconfig with everything that it names read: where the server is, how its certificate is checked and what is shown to it.
//! Knows when the files have changed. Opens no connection.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Uri};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256};

use crate::kubeconfig::{Kubeconfig, Material};
use crate::{Error, Result};

/// Where distributions keep the certificate authorities; the first that exists is read.
const SYSTEM_AUTHORITIES: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Where a kubeconfig comes from.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// A file, which may come into being and change.
    File(PathBuf),
    /// What was read already.
    Fixed(Kubeconfig),
}

/// What changes with a file: device, inode, length, time. Links are followed, so a link that points elsewhere is a change.
pub(crate) type Stamp = Vec<Option<(u64, u64, u64, i64, i64)>>;

pub(crate) fn stamp(files: &[PathBuf]) -> Stamp {
    let of = |m: fs::Metadata| (m.dev(), m.ino(), m.size(), m.mtime(), m.mtime_nsec());
    files.iter().map(|path| fs::metadata(path).ok().map(of)).collect()
}

/// Everything that a connection and a request need.
pub(crate) struct Access {
    scheme: Scheme,
    authority: Authority,
    /// The path of the server's URL, without a slash at its end.
    prefix: String,
    pub(crate) proxy: Option<Uri>,
    pub(crate) authorization: Option<HeaderValue>,
    pub(crate) tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    /// Whatever a connection is made of: with another one the old connections may not go on.
    pub(crate) fingerprint: [u8; 32],
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Access({})", self.server())
    }
}

impl Access {
    /// Reads all that the source names; the files are told also when that fails, since a change of one may mend it.
    pub(crate) fn load(source: &Source) -> (Vec<PathBuf>, Result<Access>) {
        let mut files = Vec::new();
        let config = match source {
            Source::Fixed(config) => config.clone(),
            Source::File(path) => {
                files.push(path.clone());
                match Kubeconfig::load(path) {
                    Ok(config) => config,
                    Err(Error::ReadFile { source, path }) if source.kind() == std::io::ErrorKind::NotFound => {
                        return (files, Err(Error::NoCredentials { path }));
                    }
                    Err(error) => return (files, Err(error)),
                }
            }
        };
        let name = match source {
            Source::File(path) => path.display().to_string(),
            Source::Fixed(_) => config.server.clone(),
        };
        let named = [&config.authority, &config.user.certificate, &config.user.key];
        files.extend(named.into_iter().flatten().filter_map(|material| match material {
            Material::File(path) => Some(path.clone()),
            Material::Inline(_) => None,
        }));
        files.extend(config.user.token_file.clone());
        (files, build(&config, &name))
    }

    /// The server's URL.
    pub(crate) fn server(&self) -> String {
        format!("{}://{}{}", self.scheme, self.authority, self.prefix)
    }

    /// The server for a connector.
    pub(crate) fn uri(&self) -> Option<Uri> {
        self.address(&PathAndQuery::from_static("/"))
    }

    /// The whole address of a path on the server.
    pub(crate) fn address(&self, path: &PathAndQuery) -> Option<Uri> {
        let path = format!("{}{path}", self.prefix);
        Uri::builder().scheme(self.scheme.clone()).authority(self.authority.clone()).path_and_query(path).build().ok()
    }

    /// Host and port, for a proxy.
    pub(crate) fn host_and_port(&self) -> String {
        let default = if self.scheme == Scheme::HTTP { 80 } else { 443 };
        format!("{}:{}", self.authority.host(), self.authority.port_u16().unwrap_or(default))
    }
}

fn build(config: &Kubeconfig, name: &str) -> Result<Access> {
    let wrong = |problem: String| Error::Kubeconfig { name: name.to_owned(), problem };
    let server = match config.server.contains("://") {
        true => config.server.clone(),
        false => format!("https://{}", config.server),
    };
    let uri: Uri = server.parse().map_err(|error| wrong(format!("server {server:?}: {error}")))?;
    let (scheme, authority) = (uri.scheme().cloned(), uri.authority().cloned());
    let (Some(scheme), Some(authority)) = (scheme, authority) else { return Err(wrong(format!("server {server:?} is no URL"))) };
    if scheme != Scheme::HTTP && scheme != Scheme::HTTPS {
        return Err(wrong(format!("server {server:?} is neither https nor http")));
    }
    let proxy = config.proxy.as_deref().map(|proxy| read_proxy(proxy).map_err(wrong)).transpose()?;
    let token = match &config.user.token_file {
        Some(path) => Some(
            fs::read_to_string(path)
                .map_err(|source| Error::ReadFile { path: path.clone(), source })
                .map(|text| text.trim().to_owned())?,
        ),
        None => config.user.token.clone(),
    };
    let authorization = token.map(|token| HeaderValue::from_str(&format!("Bearer {token}"))).transpose();
    let mut authorization = authorization.map_err(|_| wrong("the token is not a line of text".to_owned()))?;
    if let Some(value) = &mut authorization {
        value.set_sensitive(true);
    }
    let mut digest = Sha256::new();
    let identity = format!("{server}\0{:?}\0{:?}\0{}", config.proxy, config.tls_server_name, config.skip_verify);
    digest.update(identity);
    let tls = match scheme == Scheme::HTTPS {
        true => Some(tls(config, authority.host(), name, &mut digest)?),
        false => None,
    };
    let prefix = uri.path().trim_end_matches('/').to_owned();
    Ok(Access { scheme, authority, prefix, proxy, authorization, tls, fingerprint: digest.finalize().into() })
}

fn read_proxy(text: &str) -> std::result::Result<Uri, String> {
    let uri: Uri = text.parse().map_err(|error| format!("proxy-url {text:?}: {error}"))?;
    match uri.scheme_str() {
        Some("http") if uri.authority().is_some_and(|authority| !authority.as_str().contains('@')) => Ok(uri),
        Some("http") => {
            Err(format!("proxy-url {:?}: a proxy that wants a password is not supported", uri.host().unwrap_or_default()))
        }
        _ => Err(format!("proxy-url {text:?}: only proxies over http are supported")),
    }
}

fn content(material: &Material) -> Result<(String, Vec<u8>)> {
    match material {
        Material::Inline(pem) => Ok(("inline data".to_owned(), pem.clone())),
        Material::File(path) => {
            let pem = fs::read(path).map_err(|source| Error::ReadFile { path: path.clone(), source })?;
            Ok((path.display().to_string(), pem))
        }
    }
}

fn tls(config: &Kubeconfig, host: &str, name: &str, digest: &mut Sha256) -> Result<(Arc<ClientConfig>, ServerName<'static>)> {
    let wrong = |problem: String| Error::Kubeconfig { name: name.to_owned(), problem };
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong(error.to_string()))?;
    let builder = if config.skip_verify {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
    } else {
        builder.with_root_certificates(authorities(config.authority.as_ref(), digest)?)
    };
    let mut tls = match (&config.user.certificate, &config.user.key) {
        (Some(certificate), Some(key)) => {
            let ((from, certificate), (key_from, key)) = (content(certificate)?, content(key)?);
            digest.update(&certificate);
            digest.update(&key);
            let chain = certificates(&certificate, &from)?;
            let bad = |name: &str, problem: String| Error::Certificate { name: name.to_owned(), problem };
            let key = PrivateKeyDer::from_pem_slice(&key).map_err(|error| bad(&key_from, format!("the key: {error}")))?;
            builder.with_client_auth_cert(chain, key).map_err(|error| bad(&from, error.to_string()))?
        }
        (None, None) => builder.with_no_client_auth(),
        _ => return Err(wrong("the user has a client certificate without its key, or a key alone".to_owned())),
    };
    let protocols: &[&[u8]] = match std::env::var_os("DISABLE_HTTP2") {
        Some(_) => &[b"http/1.1"],
        None => &[b"h2", b"http/1.1"],
    };
    tls.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    // Connections are few and long: remembered sessions would be memory for nothing.
    tls.resumption = rustls::client::Resumption::disabled();
    let host = config.tls_server_name.as_deref().unwrap_or(host.trim_start_matches('[').trim_end_matches(']'));
    let server = ServerName::try_from(host.to_owned()).map_err(|_| wrong(format!("{host:?} is no name of a server")))?;
    Ok((Arc::new(tls), server))
}

fn authorities(named: Option<&Material>, digest: &mut Sha256) -> Result<RootCertStore> {
    let mut store = RootCertStore::empty();
    match named {
        Some(material) => {
            let (name, pem) = content(material)?;
            digest.update(&pem);
            for certificate in certificates(&pem, &name)? {
                store.add(certificate).map_err(|error| Error::Certificate { name: name.clone(), problem: error.to_string() })?;
            }
        }
        None => {
            if let Some(path) = SYSTEM_AUTHORITIES.iter().map(Path::new).find(|path| path.exists()) {
                let (name, pem) = content(&Material::File(path.to_owned()))?;
                // A single odd certificate in the system's bundle must not keep us from the server.
                store.add_parsable_certificates(certificates(&pem, &name)?);
            }
        }
    }
    Ok(store)
}

/// All certificates of a PEM text; at least one.
pub(crate) fn certificates(pem: &[u8], name: &str) -> Result<Vec<CertificateDer<'static>>> {
    let wrong = |problem: String| Error::Certificate { name: name.to_owned(), problem };
    let all: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<std::result::Result<_, _>>().map_err(|error| wrong(error.to_string()))?;
    if all.is_empty() {
        return Err(wrong("has no certificate".to_owned()));
    }
    Ok(all)
}

/// For `insecure-skip-tls-verify`, and for discovery, where what is fetched is checked instead. Signatures are still checked, so that
/// the session is with the one who showed the certificate.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::stranger;

    #[test]
    fn paths_are_below_the_servers_url() {
        for (server, whole) in [
            ("https://cp:6443", "https://cp:6443/api/v1/nodes?limit=5"),
            ("cp:6443", "https://cp:6443/api/v1/nodes?limit=5"),
            ("https://rancher/k8s/clusters/c-1/", "https://rancher/k8s/clusters/c-1/api/v1/nodes?limit=5"),
            ("http://[::1]:8080/", "http://[::1]:8080/api/v1/nodes?limit=5"),
        ] {
            let access = build(&stranger(server), "test").unwrap();
            let path = PathAndQuery::from_static("/api/v1/nodes?limit=5");
            assert_eq!(access.address(&path).unwrap().to_string(), whole);
        }
        assert_eq!(build(&stranger("https://[::1]"), "test").unwrap().host_and_port(), "[::1]:443");
    }

    #[test]
    fn what_cannot_be_reached_is_refused_by_name() {
        let with_proxy = |proxy: &str| Kubeconfig { proxy: Some(proxy.to_owned()), ..stranger("https://cp") };
        for (config, problem) in [
            (stranger("ftp://cp"), "neither https nor http"),
            (with_proxy("socks5://p:1080"), "only proxies over http"),
            (with_proxy("http://me:secret@p:3128"), "wants a password"),
        ] {
            let error = build(&config, "test").unwrap_err().to_string();
            assert!(error.contains(problem) && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_file_that_is_not_there_yet_is_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kubelet.conf");
        let (files, access) = Access::load(&Source::File(path.clone()));
        assert_eq!(files, [path]);
        assert!(matches!(access, Err(Error::NoCredentials { .. })));
    }
}
