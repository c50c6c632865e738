//! What a certificate says: whose it is, from when until when, for which names, with which key. Whether to believe it is not
//! decided here.

use std::net::IpAddr;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// The parts of an X.509 certificate (RFC 5280, 4.1) that a node looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The subject's common name.
    pub common_name: String,
    /// The subject's organisations.
    pub organizations: Vec<String>,
    /// The first second in which it counts, since 1970.
    pub not_before: i64,
    /// The last one.
    pub not_after: i64,
    /// DNS names that it is for.
    pub dns_names: Vec<String>,
    /// Addresses that it is for.
    pub addresses: Vec<IpAddr>,
    /// SubjectPublicKeyInfo in DER.
    pub public_key: Vec<u8>,
}

const INTEGER: u8 = 0x02;
const OCTETS: u8 = 0x04;
const OBJECT_ID: u8 = 0x06;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const VERSION: u8 = 0xa0;
const EXTENSIONS: u8 = 0xa3;
/// Of a GeneralName, implicit: dNSName and iPAddress.
const DNS_NAME: u8 = 0x82;
const IP_ADDRESS: u8 = 0x87;

/// `2.5.4.3`, `2.5.4.10` and `2.5.29.17`.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
const ORGANIZATION: &[u8] = &[0x55, 0x04, 0x0a];
const ALTERNATIVE_NAMES: &[u8] = &[0x55, 0x1d, 0x11];

impl Certificate {
    /// Reads a certificate.
    pub fn from_der(der: &[u8]) -> Option<Certificate> {
        let mut outer = Der(der).take(SEQUENCE)?;
        let mut body = outer.take(SEQUENCE)?;
        if body.next_is(VERSION) {
            body.take(VERSION)?;
        }
        body.take(INTEGER)?;
        body.take(SEQUENCE)?; // the signature's algorithm
        body.take(SEQUENCE)?; // the issuer
        let mut validity = body.take(SEQUENCE)?;
        let (not_before, not_after) = (validity.time()?, validity.time()?);
        let mut names = body.take(SEQUENCE)?;
        let public_key = body.whole(SEQUENCE)?.to_vec();
        let mut read = Certificate {
            common_name: String::new(),
            organizations: Vec::new(),
            not_before,
            not_after,
            dns_names: Vec::new(),
            addresses: Vec::new(),
            public_key,
        };
        while !names.0.is_empty() {
            let mut set = names.take(SET)?;
            let mut pair = set.take(SEQUENCE)?;
            let key = pair.take(OBJECT_ID)?.0;
            let value = String::from_utf8_lossy(pair.any()?.1).into_owned();
            match key {
                COMMON_NAME => read.common_name = value,
                ORGANIZATION => read.organizations.push(value),
                _ => {}
            }
        }
        // Unique ids, which nobody uses, could stand before the extensions.
        while let Some((tag, content)) = body.any() {
            if tag == EXTENSIONS {
                read.extensions(content)?;
            }
        }
        Some(read)
    }

    fn extensions(&mut self, content: &[u8]) -> Option<()> {
        let mut all = Der(content).take(SEQUENCE)?;
        while !all.0.is_empty() {
            let mut one = all.take(SEQUENCE)?;
            if one.take(OBJECT_ID)?.0 != ALTERNATIVE_NAMES {
                continue;
            }
            // `critical` may stand in between.
            let mut value = one.any()?;
            if value.0 != OCTETS {
                value = one.any()?;
            }
            let mut names = Der(value.1).take(SEQUENCE)?;
            while let Some((tag, content)) = names.any() {
                match (tag, content.len()) {
                    (DNS_NAME, _) => self.dns_names.push(String::from_utf8_lossy(content).into_owned()),
                    (IP_ADDRESS, 4) => self.addresses.push(IpAddr::from(<[u8; 4]>::try_from(content).ok()?)),
                    (IP_ADDRESS, 16) => self.addresses.push(IpAddr::from(<[u8; 16]>::try_from(content).ok()?)),
                    _ => {}
                }
            }
        }
        Some(())
    }

    /// The first certificate of a PEM text that is called `name` in errors.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    pub fn from_pem(pem: &[u8], name: &str) -> Result<Certificate> {
        let wrong = |problem: String| Error::Certificate { name: name.to_owned(), problem };
        let der = CertificateDer::from_pem_slice(pem).map_err(|error| wrong(error.to_string()))?;
        Certificate::from_der(&der).ok_or_else(|| wrong("is not a certificate".to_owned()))
    }

    /// The pin of its key: SHA-256 of SubjectPublicKeyInfo, as kubeadm has it.
    pub fn pin(&self) -> [u8; 32] {
        Sha256::digest(&self.public_key).into()
    }
}

/// A reader of DER values; `None` is the end, or what is not DER.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    fn next_is(&self, tag: u8) -> bool {
        self.0.first() == Some(&tag)
    }

    fn any(&mut self) -> Option<(u8, &'a [u8])> {
        let (tag, rest) = self.0.split_first()?;
        let (first, mut rest) = rest.split_first()?;
        let mut length = usize::from(*first);
        if length >= 0x80 {
            let (bytes, after) = rest.split_at_checked(length & 0x7f).filter(|(bytes, _)| bytes.len() <= 4)?;
            length = bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
            rest = after;
        }
        let (content, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some((*tag, content))
    }

    fn take(&mut self, tag: u8) -> Option<Der<'a>> {
        self.any().filter(|(found, _)| *found == tag).map(|(_, content)| Der(content))
    }

    /// The value with its tag and length.
    fn whole(&mut self, tag: u8) -> Option<&'a [u8]> {
        let before = self.0;
        self.take(tag)?;
        before.get(..before.len() - self.0.len())
    }

    /// `YYMMDDHHMMSSZ` or `YYYYMMDDHHMMSSZ`, as seconds since 1970.
    fn time(&mut self) -> Option<i64> {
        let (tag, text) = self.any()?;
        let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
        let (year, rest) = match tag {
            UTC_TIME => {
                let (year, rest) = text.split_at_checked(2)?;
                let year: i32 = year.parse().ok()?;
                (if year < 50 { 2000 + year } else { 1900 + year }, rest)
            }
            GENERALIZED_TIME => {
                let (year, rest) = text.split_at_checked(4)?;
                (year.parse().ok()?, rest)
            }
            _ => return None,
        };
        let two = |at: usize| rest.get(at..at + 2)?.parse::<u8>().ok();
        let month = time::Month::try_from(two(0)?).ok()?;
        let date = time::Date::from_calendar_date(year, month, two(2)?).ok()?;
        Some(date.with_hms(two(4)?, two(6)?, two(8)?).ok()?.assume_utc().unix_timestamp())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(days: (i32, i32), names: Vec<String>) -> (rcgen::Certificate, rcgen::KeyPair) {
        let mut params = rcgen::CertificateParams::new(names).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "system:nodes");
        params.distinguished_name.push(rcgen::DnType::CommonName, "system:node:n1");
        params.not_before = rcgen::date_time_ymd(days.0, 1, 2);
        params.not_after = rcgen::date_time_ymd(days.1, 3, 4);
        let key = rcgen::KeyPair::generate().unwrap();
        (params.self_signed(&key).unwrap(), key)
    }

    #[test]
    fn subject_validity_and_names_are_read() {
        let (made, key) = made((2026, 2060), vec!["n1".into(), "10.0.0.1".into(), "fd00::1".into()]);
        let read = Certificate::from_pem(made.pem().as_bytes(), "test").unwrap();
        assert_eq!(
            (read.common_name.as_str(), read.organizations.as_slice()),
            ("system:node:n1", &["system:nodes".to_owned()][..])
        );
        assert_eq!(read.dns_names, ["n1"]);
        assert_eq!(read.addresses, ["10.0.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
        // 2026-01-02 and, past the years of two digits, 2060-03-04.
        assert_eq!((read.not_before, read.not_after), (1_767_312_000, 2_845_584_000));
        use rcgen::PublicKeyData;
        assert_eq!(read.public_key, key.subject_public_key_info());
    }

    #[test]
    fn what_is_cut_off_is_no_certificate() {
        let (made, _) = made((2026, 2027), Vec::new());
        let der = made.der();
        for length in 0..der.len() {
            assert_eq!(Certificate::from_der(&der[..length]), None, "{length} bytes");
        }
        let error = Certificate::from_pem(b"hello", "ca.crt").unwrap_err().to_string();
        assert!(error.starts_with("ca.crt: "), "{error}");
    }
}
