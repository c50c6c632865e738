//! The node's place in a cluster: the clients that the kubelet gets, and the certificates that are kept up while it runs.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use berth_cluster::{Certificate, Connection, Identity, Limits, Names, Serving, Store, Tally};
use berth_kubelet::Config;
use berth_kubelet::api::offline::{KeyPlaces, OfflineSettings};
use berth_kubelet::api::{ApiReviewer, ApiServer, ApiSettings};
use berth_kubelet::metrics::certificates::{self, CertificateSource, Certificates};
use tokio_util::sync::CancellationToken;

use crate::{cli, config, wire};

/// What every request says that we are.
pub const USER_AGENT: &str = concat!("berth/", env!("CARGO_PKG_VERSION"), " kubelet");

/// The machine's sealing key where no other is named: outside of what a copy of our folders holds. A join makes it.
pub const SEALING_KEY: &str = "/etc/berth/sealing.key";
/// How often the chain is looked after, as upstream.
const IPTABLES_HINT_PERIOD: Duration = Duration::from_secs(60);

/// Gives the kubelet its clients where a kubeconfig is named, and keeps the node's certificates until `stop`. The clients work as
/// soon as there is a kubeconfig and the server answers; the node's own pods wait for neither.
pub fn enter(
    (global, flags, file): (&cli::Global, &cli::KubeletFlags, &config::File),
    config: &mut Config,
    stop: &CancellationToken,
) -> Result<()> {
    let Some(kubeconfig) = wire::kubeconfig(flags) else { return Ok(()) };
    config.offline = offline(global, flags, file, &config.kubelet_root)?;
    let connection = Connection::of_file(kubeconfig.clone(), USER_AGENT);
    let settings = config.api_settings;
    let clients = connection.clients(limits(settings));
    config.server.reviewer = Some(Arc::new(ApiReviewer::new(clients.ordinary.clone())));
    config.api = Some(ApiServer { client: clients.ordinary, heartbeats: clients.heartbeats, events: clients.events });

    let folder = config.server.tls.cert_dir.clone().unwrap_or_else(|| config.kubelet_root.join("pki"));
    let identity = Identity {
        node: config.node_name.clone(),
        kubeconfig: kubeconfig.clone(),
        bootstrap: flags.bootstrap_kubeconfig.clone(),
        discard_bootstrap: flags.discard_bootstrap,
        folder: folder.clone(),
        rotate: settings.rotate_certificate,
        agent: USER_AGENT.to_owned(),
        tally: Arc::default(),
    };
    let tally = identity.tally.clone();
    tokio::spawn(stop.clone().run_until_cancelled_owned(identity.keep(connection.clone())));
    let serves = settings.request_serving_certificate
        && request_serving_certificate(config, (folder.clone(), tally.clone()), connection, stop);
    // A certificate that somebody else keeps is not ours to tell of.
    if settings.rotate_certificate || flags.bootstrap_kubeconfig.is_some() || serves {
        config.certificates = Some(CertificateSource::from_fn(move || certificates(&folder, &tally, serves)));
    }
    if config.make_iptables_hint {
        tokio::spawn(stop.clone().run_until_cancelled_owned(keep_iptables_hint()));
    }
    Ok(())
}

/// The certificates for `/metrics`: read from where they are kept, with each page.
fn certificates(folder: &Path, tally: &Tally, serves: bool) -> Certificates {
    let ends = |certificate: Certificate| certificate.not_after;
    Certificates {
        client_ends: Store::client(folder).certificate().map(ends),
        client_failures: tally.client_failures(),
        serving: serves.then(|| certificates::Serving {
            ends: Store::serving(folder).certificate().map(ends),
            failures: tally.serving_failures(),
            lives: tally.serving_lives(),
        }),
    }
}

/// Prints a line when the cluster takes this node for Ready.
pub fn tell_when_ready(config: &Config, begun: Instant, stop: &CancellationToken) {
    let Some(api) = &config.api else { return };
    let (client, node) = (api.client.clone(), config.node_name.clone());
    tokio::spawn(stop.clone().run_until_cancelled_owned(async move {
        berth_cluster::until_ready(&client, &node).await;
        // Whoever started the node may have gone: that ends nothing.
        let _ = writeln!(std::io::stdout(), "node {node} is Ready after {:.1} s", begun.elapsed().as_secs_f64());
    }));
}

/// Where this machine's sealing key may be.
pub fn key_places(flags: &cli::KubeletFlags, file: &config::File) -> KeyPlaces {
    KeyPlaces {
        file: flags.sealing_key_file.clone().or_else(|| file.node.sealing_key_file.clone()),
        credentials: std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from),
        usual: Some(SEALING_KEY.into()),
    }
}

/// How the node lives while the API server is away.
fn offline(global: &cli::Global, flags: &cli::KubeletFlags, file: &config::File, kubelet_root: &Path) -> Result<OfflineSettings> {
    let key = key_places(flags, file).find(&[&global.root, kubelet_root]).context("the sealing key")?;
    if key.is_none() {
        tracing::warn!("there is no sealing key: pods of the API with Secrets or tokens do not start while its server is away");
    }
    let default = OfflineSettings::default();
    Ok(OfflineSettings {
        key,
        max_age: flags.offline_max_age.or(file.node.offline_max_age),
        patience: flags.offline_after.or(file.node.offline_after).unwrap_or(default.patience),
    })
}

/// Add-ons whose images carry both kinds of iptables go by a chain that the node's agent makes. Never returns.
async fn keep_iptables_hint() {
    let mut told = None;
    loop {
        let made = tokio::task::spawn_blocking(berth_cni::ensure_iptables_hint).await;
        let outcome = match made {
            Ok(Ok(true)) => "made".to_owned(),
            Ok(Ok(false)) => "not made: this host has rules of the legacy iptables".to_owned(),
            Ok(Err(error)) => format!("not made: {}", error.chain_text()),
            Err(error) => format!("not made: {error}"),
        };
        if told.as_ref() != Some(&outcome) {
            tracing::info!(%outcome, "the hint for containers with iptables");
            told = Some(outcome);
        }
        tokio::time::sleep(IPTABLES_HINT_PERIOD).await;
    }
}

/// Files that are named win, as in the upstream. Whether it comes from the cluster.
fn request_serving_certificate(
    config: &mut Config,
    (folder, tally): (PathBuf, Arc<Tally>),
    connection: Connection,
    stop: &CancellationToken,
) -> bool {
    let tls = &mut config.server.tls;
    if tls.cert_file.is_some() || tls.key_file.is_some() {
        tracing::warn!("serverTLSBootstrap: no certificate is asked for, because tlsCertFile or tlsPrivateKeyFile is set");
        return false;
    }
    let current = Store::serving(&folder).current();
    (tls.cert_file, tls.key_file, tls.is_awaited) = (Some(current.clone()), Some(current), true);
    let serving = Serving { node: config.node_name.clone(), folder, names: names(config), tally };
    tokio::spawn(stop.clone().run_until_cancelled_owned(serving.keep(connection)));
    true
}

/// What the node is called, by name and by address; addresses that are found are found anew each time. Where a cloud's controller says what they
/// are, that counts.
fn names(config: &Config) -> Names {
    let (name, fixed, source) = (config.node_name.clone(), config.node_ips.clone(), config.node_ip_source.clone());
    let (own, of_cloud) = (config.own_node.clone(), config.node.external_cloud);
    Arc::new(move || {
        if of_cloud {
            return own.names();
        }
        let found = source.as_ref().map(|source| source.find()).filter(|found| !found.is_empty());
        let mut addresses = found.unwrap_or_else(|| fixed.clone());
        // Where there is no route yet there is no address that anybody could call.
        addresses.retain(|address| !address.is_loopback() && !address.is_unspecified());
        let mut dns_names = Vec::new();
        match name.parse() {
            Ok(address) => addresses.push(address),
            Err(_) => dns_names.push(name.clone()),
        }
        addresses.dedup();
        (dns_names, addresses)
    })
}

fn limits(settings: ApiSettings) -> Limits {
    Limits {
        per_second: settings.requests_per_second.into(),
        burst: settings.requests_burst,
        events_per_second: settings.events_per_second.into(),
        events_burst: settings.events_burst,
        ..Limits::default()
    }
}
