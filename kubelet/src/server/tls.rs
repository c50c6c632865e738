//! TLS of the authenticated server: the serving certificate, which is made when none is configured, and the bundle of
//! authorities for client certificates. Files that change are read again with the next connection or request; while they cannot be
//! used, the old ones stay. Knows nothing of HTTP.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::crypto::{CryptoProvider, SupportedKxGroup, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig, SupportedCipherSuite, SupportedProtocolVersion};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::config::TlsConfig;
use crate::auth::{Peer, certificate};
use crate::{Config, Error, Result, atomic_file, volume};

/// Longer than any handshake over a bad link; a client that says nothing is let go.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// The acceptor of TLS connections.
#[derive(Debug)]
pub(crate) struct Tls {
    cert: PathBuf,
    key: PathBuf,
    bundle: Option<PathBuf>,
    provider: Arc<CryptoProvider>,
    versions: Vec<&'static SupportedProtocolVersion>,
    loaded: Mutex<Loaded>,
}

#[derive(Clone, Debug)]
struct Loaded {
    stamp: Stamp,
    server: Arc<ServerConfig>,
    authorities: Option<Arc<dyn ClientCertVerifier>>,
}

/// What changes with a file's content: device, inode, length, times.
type Stamp = Vec<Option<(u64, u64, u64, i64, i64)>>;

impl Tls {
    /// Reads the files, or makes the pair that is missing.
    pub(crate) fn load(config: &Config) -> Result<Tls> {
        let tls = &config.server.tls;
        let (cert, key) = match (&tls.cert_file, &tls.key_file) {
            (Some(cert), Some(key)) => (cert.clone(), key.clone()),
            (None, None) => ensure_own_pair(config)?,
            _ => {
                let problem = "one of tlsCertFile and tlsPrivateKeyFile is set without the other".to_owned();
                return Err(Error::Config { field: "tlsCertFile", problem });
            }
        };
        let bundle = config.server.authentication.client_ca_file.clone();
        let provider = Arc::new(provider(tls)?);
        let versions = versions(tls)?;
        let stamp = stamp(&cert, &key, bundle.as_deref());
        let (server, authorities) = match read(&cert, &key, bundle.as_deref(), &provider, &versions) {
            Err(_) if tls.is_awaited && !cert.exists() => (without_certificate(&cert, &provider, &versions)?, None),
            read => read?,
        };
        let loaded = Mutex::new(Loaded { stamp, server, authorities });
        Ok(Tls { cert, key, bundle, provider, versions, loaded })
    }

    /// The configuration for a new connection or request.
    fn current(&self) -> Loaded {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let now = stamp(&self.cert, &self.key, self.bundle.as_deref());
        if now != loaded.stamp {
            loaded.stamp = now;
            match read(&self.cert, &self.key, self.bundle.as_deref(), &self.provider, &self.versions) {
                Ok((server, authorities)) => {
                    (loaded.server, loaded.authorities) = (server, authorities);
                    tracing::info!(certificate = %self.cert.display(), "the changed certificates are in use");
                }
                Err(error) => {
                    let reason = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                    tracing::warn!(%error, reason, "the changed certificates cannot be used: the old ones stay");
                }
            }
        }
        loaded.clone()
    }

    /// The handshake, and who the client is.
    pub(crate) async fn accept(self: &Arc<Tls>, stream: TcpStream) -> io::Result<(TlsStream<TcpStream>, Shown)> {
        let accepting = TlsAcceptor::from(self.current().server).accept(stream);
        let stream = tokio::time::timeout(HANDSHAKE, accepting).await.map_err(|_| io::ErrorKind::TimedOut)??;
        let chain = stream.get_ref().1.peer_certificates().filter(|_| self.bundle.is_some());
        let shown = chain.map(|chain| (self.clone(), chain.iter().map(|c| c.clone().into_owned()).collect()));
        Ok((stream, Shown(shown)))
    }
}

/// What the client of a connection has shown of itself. A connection may be kept for days: a certificate that has expired, or
/// whose authority is no longer in the bundle, counts for nothing from then on.
#[derive(Debug, Default)]
pub(crate) struct Shown(Option<(Arc<Tls>, Vec<CertificateDer<'static>>)>);

impl Shown {
    /// Who that is now.
    pub(crate) fn peer(&self) -> Peer {
        let Some((tls, chain)) = &self.0 else { return Peer::Unknown };
        peer(tls.current().authorities.as_deref(), chain)
    }
}

fn peer(authorities: Option<&dyn ClientCertVerifier>, shown: &[CertificateDer<'_>]) -> Peer {
    let (Some(authorities), Some((first, others))) = (authorities, shown.split_first()) else { return Peer::Unknown };
    match authorities.verify_client_cert(first, others, UnixTime::now()) {
        Ok(_) => certificate::user(first).map_or(Peer::Doubtful, Peer::Certified),
        Err(error) => {
            tracing::debug!(%error, "client certificate");
            Peer::Doubtful
        }
    }
}

fn stamp(cert: &Path, key: &Path, bundle: Option<&Path>) -> Stamp {
    let of = |m: Metadata| (m.dev(), m.ino(), m.size(), m.mtime(), m.mtime_nsec());
    [Some(cert), Some(key), bundle].into_iter().flatten().map(|path| fs::metadata(path).ok().map(of)).collect()
}

fn certificate_error(path: &Path, source: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Certificate { path: path.to_owned(), source: Box::new(source) }
}

type Configured = (Arc<ServerConfig>, Option<Arc<dyn ClientCertVerifier>>);

fn read(
    cert: &Path,
    key: &Path,
    bundle: Option<&Path>,
    provider: &Arc<CryptoProvider>,
    versions: &[&'static SupportedProtocolVersion],
) -> Result<Configured> {
    let chain = read_certificates(cert)?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|e| certificate_error(key, e))?;
    let authorities = bundle.map(|bundle| read_authorities(bundle, provider)).transpose()?;
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .map_err(|e| certificate_error(cert, e))?;
    let builder = match &authorities {
        Some(inner) => builder.with_client_cert_verifier(Arc::new(Requested(inner.clone()))),
        None => builder.with_no_client_auth(),
    };
    let mut server = builder.with_single_cert(chain, private).map_err(|e| certificate_error(cert, e))?;
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    // Scrapers keep their connections: remembered sessions would be memory for nothing.
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    Ok((Arc::new(server), authorities))
}

/// A configuration with which every handshake fails.
fn without_certificate(
    cert: &Path,
    provider: &Arc<CryptoProvider>,
    versions: &[&'static SupportedProtocolVersion],
) -> Result<Arc<ServerConfig>> {
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(versions);
    let builder = builder.map_err(|e| certificate_error(cert, e))?.with_no_client_auth();
    Ok(Arc::new(builder.with_cert_resolver(Arc::new(NoneYet))))
}

/// There is no certificate to show.
#[derive(Debug)]
struct NoneYet;

impl rustls::server::ResolvesServerCert for NoneYet {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let all = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let all = all.map_err(|e| certificate_error(path, e))?;
    if all.is_empty() {
        return Err(certificate_error(path, io::Error::new(io::ErrorKind::InvalidData, "no certificate in it")));
    }
    Ok(all)
}

fn read_authorities(path: &Path, provider: &Arc<CryptoProvider>) -> Result<Arc<dyn ClientCertVerifier>> {
    let mut roots = RootCertStore::empty();
    for root in read_certificates(path)? {
        roots.add(root).map_err(|e| certificate_error(path, e))?;
    }
    let built = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
    built.map_err(|e| certificate_error(path, e))
}

/// Asks for a certificate and takes any that the client has the key of: as upstream, it is judged with each request and not
/// in the handshake, so that a stranger's certificate beside a good token does no harm.
#[derive(Debug)]
struct Requested(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for Requested {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[rustls::DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// The pair of our own, made once and kept under the upstream's names.
fn ensure_own_pair(config: &Config) -> Result<(PathBuf, PathBuf)> {
    let folder = config.server.tls.cert_dir.clone().unwrap_or_else(|| config.kubelet_root.join("pki"));
    let (cert, key) = (folder.join("kubelet.crt"), folder.join("kubelet.key"));
    let usable = read_certificates(&cert).is_ok() && PrivateKeyDer::from_pem_file(&key).is_ok();
    if usable {
        return Ok((cert, key));
    }
    let (cert_pem, key_pem) = self_signed(config).map_err(|e| certificate_error(&cert, e))?;
    volume::create_private_dir(&folder).map_err(|source| Error::CreateDir { path: folder, source })?;
    for (path, text, mode) in [(&key, key_pem, 0o600), (&cert, cert_pem, 0o644)] {
        atomic_file::replace(path, text.as_bytes(), mode).map_err(|source| Error::WriteFile { path: path.clone(), source })?;
    }
    tracing::info!(certificate = %cert.display(), "made a self-signed serving certificate");
    Ok((cert, key))
}

/// Without an end (RFC 5280, 4.1.2.5): nobody checks it but by comparing, and a machine whose clock begins in 1970 or has
/// jumped must be reachable.
fn self_signed(config: &Config) -> Result<(String, String), rcgen::Error> {
    let names = [config.node_name.clone(), "localhost".to_owned(), "127.0.0.1".to_owned()];
    let addresses = config.node_ips.iter().map(ToString::to_string);
    let mut names: Vec<String> = names.into_iter().chain(addresses).collect();
    names.sort();
    names.dedup();
    let mut params = rcgen::CertificateParams::new(names)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, config.node_name.clone());
    params.not_before = rcgen::date_time_ymd(1970, 1, 1);
    params.not_after = rcgen::date_time_ymd(9999, 12, 31);
    params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let key = rcgen::KeyPair::generate()?;
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
}

fn versions(tls: &TlsConfig) -> Result<Vec<&'static SupportedProtocolVersion>> {
    match tls.min_version.as_deref().unwrap_or_default() {
        "" | "VersionTLS12" => Ok(vec![&rustls::version::TLS13, &rustls::version::TLS12]),
        "VersionTLS13" => Ok(vec![&rustls::version::TLS13]),
        other => {
            let problem = format!("{other:?} is not spoken here: VersionTLS12 or VersionTLS13");
            Err(Error::Config { field: "tlsMinVersion", problem })
        }
    }
}

fn provider(tls: &TlsConfig) -> Result<CryptoProvider> {
    let mut provider = ring::default_provider();
    if !tls.cipher_suites.is_empty() {
        let wanted = tls.cipher_suites.iter().map(|name| cipher_suite(name)).collect::<Result<Vec<_>>>()?;
        provider.cipher_suites.retain(|suite| suite.tls13().is_some() || wanted.contains(suite));
    }
    if !tls.curves.is_empty() {
        provider.kx_groups = tls.curves.iter().map(|name| curve(name)).collect::<Result<Vec<_>>>()?;
    }
    Ok(provider)
}

/// Suites of TLS 1.2 by Go's names; those of 1.3 are always on, and naming one is no mistake.
fn cipher_suite(name: &str) -> Result<SupportedCipherSuite> {
    use ring::cipher_suite as suites;
    Ok(match name {
        "TLS_AES_128_GCM_SHA256" => suites::TLS13_AES_128_GCM_SHA256,
        "TLS_AES_256_GCM_SHA384" => suites::TLS13_AES_256_GCM_SHA384,
        "TLS_CHACHA20_POLY1305_SHA256" => suites::TLS13_CHACHA20_POLY1305_SHA256,
        "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256" => suites::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384" => suites::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305" | "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256" => {
            suites::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
        }
        "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256" => suites::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
        "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384" => suites::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
        "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305" | "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256" => {
            suites::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256
        }
        other => {
            let problem = format!("{other:?} is not spoken here: only suites with forward secrecy and an AEAD cipher are");
            return Err(Error::Config { field: "tlsCipherSuites", problem });
        }
    })
}

fn curve(name: &str) -> Result<&'static dyn SupportedKxGroup> {
    Ok(match name {
        "X25519" => ring::kx_group::X25519,
        "CurveP256" => ring::kx_group::SECP256R1,
        "CurveP384" => ring::kx_group::SECP384R1,
        other => {
            let problem = format!("{other:?} is not spoken here: X25519, CurveP256 or CurveP384");
            return Err(Error::Config { field: "tlsCurvePreferences", problem });
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_awaited_certificate_is_served_when_it_comes() {
        let folder = tempfile::tempdir().unwrap();
        let pair = folder.path().join("kubelet-server-current.pem");
        let mut config = Config::new("n", tonic::transport::Endpoint::from_static("http://unused").connect_lazy());
        config.server.tls.cert_file = Some(pair.clone());
        config.server.tls.key_file = Some(pair.clone());
        assert!(Tls::load(&config).is_err(), "a named file has to be there");
        config.server.tls.is_awaited = true;
        let tls = Tls::load(&config).unwrap();
        assert!(tls.current().server.alpn_protocols.is_empty());
        let made = rcgen::generate_simple_self_signed(vec!["n".to_owned()]).unwrap();
        std::fs::write(&pair, made.cert.pem() + &made.signing_key.serialize_pem()).unwrap();
        assert_eq!(tls.current().server.alpn_protocols.len(), 2, "read when it came");
    }

    #[test]
    fn names_of_go_are_known_and_others_refused_by_name() {
        let with = |suites: &[&str], min: &str, curves: &[&str]| TlsConfig {
            cipher_suites: suites.iter().map(|s| (*s).to_owned()).collect(),
            min_version: Some(min.to_owned()),
            curves: curves.iter().map(|s| (*s).to_owned()).collect(),
            ..TlsConfig::default()
        };
        let some = with(&["TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"], "VersionTLS13", &["CurveP384", "X25519"]);
        let made = provider(&some).unwrap();
        assert_eq!(made.cipher_suites.iter().filter(|s| s.tls13().is_none()).count(), 1);
        assert!(made.cipher_suites.len() > 1 && made.kx_groups.len() == 2);
        assert_eq!(versions(&some).unwrap().len(), 1);
        for (config, field) in [
            (with(&["TLS_RSA_WITH_AES_128_CBC_SHA"], "", &[]), "tlsCipherSuites"),
            (with(&[], "VersionTLS10", &[]), "tlsMinVersion"),
            (with(&[], "", &["X25519MLKEM768"]), "tlsCurvePreferences"),
        ] {
            let error = provider(&config).map(|_| ()).and_then(|()| versions(&config).map(|_| ())).unwrap_err();
            assert!(matches!(error, Error::Config { field: found, .. } if found == field), "{error}");
        }
    }
}
