//! What `/metrics` tells of the node's certificates, with the upstream's names. Whoever keeps them is asked with each page.

use std::fmt;
use std::sync::Arc;

use super::Family;
use super::text::Text;

/// The certificates at this moment.
#[derive(Clone, Debug, Default)]
pub struct Certificates {
    /// The client certificate's last second, since 1970; `None`: there is none.
    pub client_ends: Option<i64>,
    /// Requests for a client certificate that have failed.
    pub client_failures: u64,
    /// The serving certificate, where it comes from the cluster.
    pub serving: Option<Serving>,
}

/// The serving certificate at this moment.
#[derive(Clone, Debug, Default)]
pub struct Serving {
    /// Its last second; `None`: there is none.
    pub ends: Option<i64>,
    /// Requests for one that have failed.
    pub failures: u64,
    /// How many seconds those that were replaced had been in use.
    pub lives: Vec<f64>,
}

/// Who knows them. Clones ask the same.
#[derive(Clone)]
pub struct CertificateSource(Arc<dyn Fn() -> Certificates + Send + Sync>);

impl fmt::Debug for CertificateSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CertificateSource")
    }
}

impl CertificateSource {
    /// A function that looks.
    pub fn from_fn(look: impl Fn() -> Certificates + Send + Sync + 'static) -> CertificateSource {
        CertificateSource(Arc::new(look))
    }

    pub(crate) fn look(&self) -> Certificates {
        (self.0)()
    }
}

/// From a minute to four years: the upstream's bounds.
static ROTATIONS: Family = Family {
    name: "kubelet_certificate_manager_server_rotation_seconds",
    help: "Histogram of the number of seconds the previous certificate lived before being rotated.",
    labels: &[],
    buckets: &[60.0, 3600.0, 14400.0, 604_800.0, 2_592_000.0, 7_776_000.0, 15_552_000.0, 31_104_000.0, 124_416_000.0],
    gauge: false,
};

pub(super) fn write(certificates: &Certificates, now: i64, out: &mut Text) {
    let mut one = |name: &str, kind: &str, help: &str, value: String| {
        out.family(name, kind, help);
        out.sample(name, &[], value);
    };
    // Below zero: it has ended.
    let left = |ends: Option<i64>| ends.map_or("+Inf".to_owned(), |ends| ends.saturating_sub(now).to_string());
    let help = "Gauge of the TTL (time-to-live) of the Kubelet's client certificate, in seconds until its expiry.";
    one("kubelet_certificate_manager_client_ttl_seconds", "gauge", help, left(certificates.client_ends));
    let help = "Counter of certificate renewal errors.";
    let failures = certificates.client_failures.to_string();
    one("kubelet_certificate_manager_client_expiration_renew_errors", "counter", help, failures);
    let Some(serving) = &certificates.serving else { return };
    let help = "Gauge of the shortest TTL (time-to-live) of the Kubelet's serving certificate, in seconds until its expiry.";
    one("kubelet_certificate_manager_server_ttl_seconds", "gauge", help, left(serving.ends));
    let help = "Counter of certificate renewal errors.";
    one("kubelet_server_expiration_renew_errors", "counter", help, serving.failures.to_string());
    let within = |bound: f64| serving.lives.iter().filter(|life| **life <= bound).map(|_| 1u64).sum();
    let buckets: Vec<u64> = ROTATIONS.buckets.iter().copied().map(within).collect();
    out.family(ROTATIONS.name, ROTATIONS.kind(), ROTATIONS.help);
    out.spread(&ROTATIONS, &[], &buckets, within(f64::INFINITY), serving.lives.iter().sum());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_told_with_the_upstreams_names() {
        let told = |certificates: &Certificates| {
            let mut out = Text::whole();
            write(certificates, 1000, &mut out);
            let text = out.into_string();
            let samples: Vec<String> = text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect();
            samples
        };
        assert_eq!(
            told(&Certificates::default()),
            [
                "kubelet_certificate_manager_client_ttl_seconds +Inf",
                "kubelet_certificate_manager_client_expiration_renew_errors 0"
            ],
            "a serving certificate of its own is not told of"
        );
        let serving = Serving { ends: Some(990), failures: 2, lives: vec![30.0, 100.0] };
        let all = told(&Certificates { client_ends: Some(1600), client_failures: 1, serving: Some(serving) });
        for line in [
            "kubelet_certificate_manager_client_ttl_seconds 600",
            "kubelet_certificate_manager_client_expiration_renew_errors 1",
            "kubelet_certificate_manager_server_ttl_seconds -10",
            "kubelet_server_expiration_renew_errors 2",
            "kubelet_certificate_manager_server_rotation_seconds_bucket{le=\"60\"} 1",
            "kubelet_certificate_manager_server_rotation_seconds_bucket{le=\"3600\"} 2",
            "kubelet_certificate_manager_server_rotation_seconds_count 2",
        ] {
            assert!(all.iter().any(|told| told == line), "{line}: {all:#?}");
        }
    }
}
