//! What the kubelet's servers are told: addresses, certificates, who may ask and what. Values only; a loader of
//! KubeletConfiguration fills it, and a field that it does not set means what the comment says.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::auth::Reviewer;

/// The servers besides the root-only socket. By default none of them listens.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// `enableServer`: off closes both ports, whatever they say.
    pub enabled: bool,
    /// Where the authenticated TLS server binds (`address`).
    pub address: IpAddr,
    /// Its port (`port`, upstream 10250). `None`: it does not listen.
    pub port: Option<u16>,
    /// Port of plain HTTP without authentication (`readOnlyPort`), on `address` too. `None`: it does not listen.
    pub read_only_port: Option<u16>,
    /// Where `/healthz` binds (`healthzBindAddress`); its port is [`crate::Config::healthz_port`].
    pub healthz_address: IpAddr,
    /// The serving certificate and what is accepted of TLS.
    pub tls: TlsConfig,
    /// Who is believed to be whom.
    pub authentication: Authentication,
    /// Who may do what.
    pub authorization: Authorization,
    /// Asks an API server about tokens and permissions. `None`: there is none, and what needs one is refused at start.
    pub reviewer: Option<Arc<dyn Reviewer>>,
    /// `enableDebuggingHandlers`: exec, attach, logs, run, port-forward, running pods, configz, checkpoint.
    pub debugging_handlers: bool,
    /// `enableSystemLogHandler`: files below [`ServerConfig::system_logs`].
    pub system_log_handler: bool,
    /// `enableSystemLogQuery`: `?query=` on `/logs/`.
    pub system_log_query: bool,
    /// The folder of `/logs/`, usually `/var/log`.
    pub system_logs: PathBuf,
    /// The whole KubeletConfiguration as it is in effect, for `/configz`.
    pub configz: Arc<serde_json::Value>,
}

/// The serving certificate and the handshake.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsConfig {
    /// Certificate chain in PEM (`tlsCertFile`). `None` (both or neither): a self-signed one is made and kept.
    pub cert_file: Option<PathBuf>,
    /// Its key in PEM (`tlsPrivateKeyFile`).
    pub key_file: Option<PathBuf>,
    /// The two files are still to come (`serverTLSBootstrap`): until they do, handshakes fail and nothing else.
    pub is_awaited: bool,
    /// Where the self-signed pair is kept (`--cert-dir`). `None`: `pki` in the kubelet's folder.
    pub cert_dir: Option<PathBuf>,
    /// The oldest version spoken (`tlsMinVersion`: `VersionTLS12` or `VersionTLS13`). `None`: 1.2.
    pub min_version: Option<String>,
    /// Names as in Go (`tlsCipherSuites`). Empty: all that are safe. TLS 1.3 has its own, always on.
    pub cipher_suites: Vec<String>,
    /// Names as in Go (`tlsCurvePreferences`), in order. Empty: all.
    pub curves: Vec<String>,
}

/// `authentication` of KubeletConfiguration; the first that knows the caller wins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Authentication {
    /// Bundle of authorities whose client certificates are believed (`x509.clientCAFile`).
    pub client_ca_file: Option<PathBuf>,
    /// Bearer tokens by TokenReview, remembered this long (`webhook.enabled`, `webhook.cacheTTL`). `None`: no tokens.
    pub webhook: Option<Duration>,
    /// Callers who show nothing are `system:anonymous` (`anonymous.enabled`); else they are turned away.
    pub anonymous: bool,
}

/// `authorization` of KubeletConfiguration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Authorization {
    /// Whoever is authenticated may do everything.
    AlwaysAllow,
    /// SubjectAccessReview.
    Webhook {
        /// How long a yes is remembered (`webhook.cacheAuthorizedTTL`).
        allowed_ttl: Duration,
        /// How long a no is remembered (`webhook.cacheUnauthorizedTTL`).
        denied_ttl: Duration,
    },
}

impl Authorization {
    /// `Webhook` with the upstream's times.
    pub const WEBHOOK: Authorization =
        Authorization::Webhook { allowed_ttl: Duration::from_secs(300), denied_ttl: Duration::from_secs(30) };
}

impl Authentication {
    /// How long the upstream remembers a token.
    pub const WEBHOOK_TTL: Duration = Duration::from_secs(120);
}

impl Default for ServerConfig {
    fn default() -> Self {
        ServerConfig {
            enabled: true,
            address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            port: None,
            read_only_port: None,
            healthz_address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            tls: TlsConfig::default(),
            authentication: Authentication::default(),
            authorization: Authorization::WEBHOOK,
            reviewer: None,
            debugging_handlers: true,
            system_log_handler: true,
            system_log_query: false,
            system_logs: PathBuf::from("/var/log"),
            configz: Arc::new(serde_json::Value::Null),
        }
    }
}
