//! Certificates from the cluster: what is asked for, under which name, and waiting for the answer. Keeps nothing.

use std::net::IpAddr;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use kube::runtime::wait::await_condition;
use rcgen::string::Ia5String;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PublicKeyData, SanType};
use sha2::{Digest, Sha512_256};
use tokio::time::Instant;

use crate::{Certificate, Error, Result};

/// Between two tries to watch a request.
const PAUSE: Duration = Duration::from_secs(2);

/// What a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To be the node towards the API server.
    Client,
    /// To be the node towards those who call it.
    Serving,
}

/// The certificate that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) node: String,
    pub(crate) purpose: Purpose,
    pub(crate) dns_names: Vec<String>,
    pub(crate) addresses: Vec<IpAddr>,
}

/// What the cluster calls all nodes.
const GROUP: &str = "system:nodes";

impl Wanted {
    /// The node's own identity.
    pub(crate) fn client(node: &str) -> Wanted {
        Wanted { node: node.to_owned(), purpose: Purpose::Client, dns_names: Vec::new(), addresses: Vec::new() }
    }

    fn common_name(&self) -> String {
        format!("system:node:{}", self.node)
    }

    fn signer(&self) -> &'static str {
        match self.purpose {
            Purpose::Client => "kubernetes.io/kube-apiserver-client-kubelet",
            Purpose::Serving => "kubernetes.io/kubelet-serving",
        }
    }

    /// With elliptic curves no key is enciphered.
    fn usages(&self) -> [&'static str; 2] {
        match self.purpose {
            Purpose::Client => ["digital signature", "client auth"],
            Purpose::Serving => ["digital signature", "server auth"],
        }
    }

    /// Whether a certificate is of this subject and for all these names.
    pub(crate) fn is_met_by(&self, certificate: &Certificate) -> bool {
        certificate.common_name == self.common_name()
            && certificate.organizations == [GROUP]
            && self.dns_names.iter().all(|name| certificate.dns_names.contains(name))
            && self.addresses.iter().all(|address| certificate.addresses.contains(address))
    }

    /// PKCS#10 in PEM: the subject and, for serving, the names; the approver knows nothing else.
    fn request(&self, key: &KeyPair) -> std::result::Result<String, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, GROUP);
        params.distinguished_name.push(DnType::CommonName, self.common_name());
        let dns = self.dns_names.iter().map(|name| Ia5String::try_from(name.as_str()).map(SanType::DnsName));
        params.subject_alt_names = dns.collect::<std::result::Result<_, _>>()?;
        params.subject_alt_names.extend(self.addresses.iter().map(|address| SanType::IpAddress(*address)));
        params.serialize_request(key)?.pem()
    }

    /// The name that the same key always gives, so that a restart finds its own request.
    pub(crate) fn name(&self, key: &impl PublicKeyData) -> String {
        let mut digest = Sha512_256::new();
        let public = key.subject_public_key_info();
        let common_name = self.common_name();
        let usages = self.usages();
        let parts = [public.as_slice(), common_name.as_bytes(), GROUP.as_bytes()];
        for part in parts.into_iter().chain(usages.iter().map(|usage| usage.as_bytes())) {
            // The upstream's digest: parts that cannot run into each other.
            digest.update(URL_SAFE_NO_PAD.encode(part));
            digest.update(b"|");
        }
        format!("node-csr-{}", URL_SAFE_NO_PAD.encode(digest.finalize()))
    }
}

/// What has become of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Answer {
    Pending,
    Issued(String),
    Refused(String),
}

fn answer(request: &CertificateSigningRequest) -> Answer {
    let Some(status) = &request.status else { return Answer::Pending };
    // A refusal counts whatever else is there.
    for condition in status.conditions.iter().flatten() {
        if condition.type_ == "Denied" || condition.type_ == "Failed" {
            let more = [condition.reason.as_deref(), condition.message.as_deref()];
            let more: Vec<&str> = more.into_iter().flatten().filter(|text| !text.is_empty()).collect();
            return Answer::Refused(format!("{} ({})", condition.type_, more.join(": ")));
        }
    }
    match &status.certificate {
        Some(ByteString(pem)) if !pem.is_empty() => Answer::Issued(String::from_utf8_lossy(pem).into_owned()),
        _ => Answer::Pending,
    }
}

/// How the request is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Naming {
    /// By the key: a request that is there already is taken up.
    ByKey,
    /// By the server.
    Generated,
}

/// Asks for a certificate and waits for it; its PEM.
pub(crate) async fn obtain(client: Client, wanted: &Wanted, key: &KeyPair, naming: Naming, patience: Duration) -> Result<String> {
    let until = Instant::now() + patience;
    let requests: Api<CertificateSigningRequest> = Api::all(client);
    let name = submit(&requests, wanted, key, naming).await?;
    tracing::info!(request = name, signer = wanted.signer(), "waiting for a certificate");
    let failed = |problem: String| Error::Request { name: name.clone(), problem };
    loop {
        let decided =
            |request: Option<&CertificateSigningRequest>| request.is_none_or(|request| answer(request) != Answer::Pending);
        let waiting = tokio::time::timeout_at(until, await_condition(requests.clone(), &name, decided));
        match waiting.await {
            Err(_) => return Err(failed(format!("nobody has signed it within {} s: is it approved?", patience.as_secs()))),
            Ok(Ok(None)) => return Err(failed("it was deleted".to_owned())),
            Ok(Ok(Some(request))) => match answer(&request) {
                Answer::Issued(pem) => return checked(pem, key, &name),
                Answer::Refused(why) => return Err(failed(why)),
                Answer::Pending => {}
            },
            Ok(Err(error)) => tracing::debug!(%error, request = name, "watching a certificate request"),
        }
        tokio::time::sleep_until((Instant::now() + PAUSE).min(until)).await;
    }
}

async fn submit(requests: &Api<CertificateSigningRequest>, wanted: &Wanted, key: &KeyPair, naming: Naming) -> Result<String> {
    let wrong = |problem: String| Error::Request { name: wanted.common_name(), problem };
    let pem = wanted.request(key).map_err(|error| wrong(error.to_string()))?;
    let metadata = match naming {
        Naming::ByKey => ObjectMeta { name: Some(wanted.name(key)), ..ObjectMeta::default() },
        Naming::Generated => ObjectMeta { generate_name: Some("csr-".to_owned()), ..ObjectMeta::default() },
    };
    let spec = CertificateSigningRequestSpec {
        request: ByteString(pem.into_bytes()),
        signer_name: wanted.signer().to_owned(),
        usages: Some(wanted.usages().map(str::to_owned).to_vec()),
        ..CertificateSigningRequestSpec::default()
    };
    let request = CertificateSigningRequest { metadata: metadata.clone(), spec, status: None };
    match requests.create(&PostParams::default(), &request).await {
        Ok(made) => Ok(made.metadata.name.unwrap_or_default()),
        Err(kube::Error::Api(status)) if status.code == 409 && naming == Naming::ByKey => {
            let name = metadata.name.unwrap_or_default();
            let asking = format!("certificate signing request {name}");
            let there = requests.get(&name).await.map_err(|source| Error::Api { asking, source: Box::new(source) })?;
            // The name is made of key, subject and usages; whoever else made it could only have chosen the signer.
            if there.spec.signer_name != wanted.signer() {
                return Err(Error::Request { problem: format!("one for {} is there already", there.spec.signer_name), name });
            }
            Ok(name)
        }
        Err(source) => {
            Err(Error::Api { asking: format!("a certificate for {}", wanted.common_name()), source: Box::new(source) })
        }
    }
}

fn checked(pem: String, key: &KeyPair, name: &str) -> Result<String> {
    let certificate = Certificate::from_pem(pem.as_bytes(), name)?;
    if certificate.public_key != key.subject_public_key_info() {
        return Err(Error::Request { name: name.to_owned(), problem: "the certificate is of another key".to_owned() });
    }
    let now = time::OffsetDateTime::now_utc().unix_timestamp();
    if certificate.not_after <= now {
        return Err(Error::Expired { name: name.to_owned() });
    }
    Ok(pem)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::certificates::v1::{CertificateSigningRequestCondition, CertificateSigningRequestStatus};

    use super::*;

    struct Public;

    impl PublicKeyData for Public {
        fn der_bytes(&self) -> &[u8] {
            &[4; 65]
        }

        fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
            &rcgen::PKCS_ECDSA_P256_SHA256
        }
    }

    #[test]
    fn the_same_key_gives_the_same_name_and_another_node_another_one() {
        let name = Wanted::client("n1").name(&Public);
        assert_eq!(name, Wanted::client("n1").name(&Public));
        assert_ne!(name, Wanted::client("n2").name(&Public));
        // 32 bytes are 43 characters.
        assert_eq!(name.len(), "node-csr-".len() + 43);
    }

    #[test]
    fn the_first_request_has_a_subject_and_nothing_else() {
        let key = KeyPair::generate().unwrap();
        let pem = Wanted::client("n1").request(&key).unwrap();
        assert!(pem.starts_with("-----BEGIN CERTIFICATE REQUEST-----"), "{pem}");
        let serving = Wanted {
            purpose: Purpose::Serving,
            dns_names: vec!["n1".into()],
            addresses: vec!["10.0.0.1".parse().unwrap()],
            ..Wanted::client("n1")
        };
        assert!(serving.request(&key).unwrap().len() > pem.len(), "names make it longer");
        assert_eq!(Wanted::client("n1").usages(), ["digital signature", "client auth"]);
        assert_eq!(serving.signer(), "kubernetes.io/kubelet-serving");
    }

    #[test]
    fn a_certificate_without_a_name_that_is_wanted_does_not_do() {
        let certificate = Certificate {
            common_name: "system:node:n1".into(),
            organizations: vec!["system:nodes".into()],
            not_before: 0,
            not_after: 1,
            dns_names: vec!["n1".into()],
            addresses: vec!["10.0.0.1".parse().unwrap()],
            public_key: Vec::new(),
        };
        let serving = |name: &str, address: &str| Wanted {
            dns_names: vec![name.into()],
            addresses: vec![address.parse().unwrap()],
            ..Wanted::client("n1")
        };
        assert!(serving("n1", "10.0.0.1").is_met_by(&certificate));
        assert!(!serving("n1", "10.0.0.2").is_met_by(&certificate));
        assert!(!serving("n2", "10.0.0.1").is_met_by(&certificate));
        assert!(!Wanted::client("n2").is_met_by(&certificate));
    }

    #[test]
    fn a_refusal_counts_whatever_else_is_there() {
        let with = |kinds: &[&str], certificate: Option<&str>| CertificateSigningRequest {
            status: Some(CertificateSigningRequestStatus {
                certificate: certificate.map(|text| ByteString(text.into())),
                conditions: Some(
                    kinds
                        .iter()
                        .map(|kind| CertificateSigningRequestCondition {
                            type_: (*kind).to_owned(),
                            reason: Some("Because".into()),
                            ..CertificateSigningRequestCondition::default()
                        })
                        .collect(),
                ),
            }),
            ..CertificateSigningRequest::default()
        };
        assert_eq!(answer(&CertificateSigningRequest::default()), Answer::Pending);
        assert_eq!(answer(&with(&["Approved"], None)), Answer::Pending);
        assert_eq!(answer(&with(&["Approved"], Some("pem"))), Answer::Issued("pem".into()));
        assert_eq!(answer(&with(&["Denied"], None)), Answer::Refused("Denied (Because)".into()));
        assert_eq!(answer(&with(&["Approved", "Failed"], Some("pem"))), Answer::Refused("Failed (Because)".into()));
    }
}
