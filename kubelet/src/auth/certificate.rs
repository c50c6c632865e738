//! The identity in a client certificate: common name and organisations of its subject. Whether the certificate is to be
//! believed is decided before, with the authorities' bundle.

use rustls::pki_types::CertificateDer;

use super::User;

/// What a connection's client has shown of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// Nothing, or nobody looks at certificates.
    Unknown,
    /// A certificate that an authority of the bundle vouches for.
    Certified(User),
    /// A certificate that none does, that has expired, or that is not for clients.
    Doubtful,
}

/// `2.5.4.3` and `2.5.4.10`, as DER has them.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
const ORGANISATION: &[u8] = &[0x55, 0x04, 0x0a];

const OBJECT_ID: u8 = 0x06;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;

/// The user that a certificate names; none when it has no common name.
pub(crate) fn user(certificate: &CertificateDer<'_>) -> Option<User> {
    let parsed = webpki::EndEntityCert::try_from(certificate).ok()?;
    user_of_subject(parsed.subject())
}

/// Relative names, one set each, of attributes, one pair of key and value each.
fn user_of_subject(mut subject: &[u8]) -> Option<User> {
    let mut user = User::default();
    while !subject.is_empty() {
        let mut set = take(&mut subject, SET)?;
        while !set.is_empty() {
            let mut pair = take(&mut set, SEQUENCE)?;
            let key = take(&mut pair, OBJECT_ID)?;
            let (tag, value) = take_any(&mut pair)?;
            if key == COMMON_NAME {
                user.name = text(tag, value)?;
            } else if key == ORGANISATION {
                user.groups.push(text(tag, value)?);
            }
        }
    }
    (!user.name.is_empty()).then_some(user)
}

/// UTF8String, PrintableString, IA5String, and T61String as far as it is ASCII: what authorities issue.
fn text(tag: u8, value: &[u8]) -> Option<String> {
    match tag {
        0x0c => String::from_utf8(value.to_vec()).ok(),
        0x13 | 0x14 | 0x16 if value.is_ascii() => String::from_utf8(value.to_vec()).ok(),
        _ => None,
    }
}

fn take<'a>(from: &mut &'a [u8], tag: u8) -> Option<&'a [u8]> {
    take_any(from).filter(|(found, _)| *found == tag).map(|(_, value)| value)
}

/// One tagged value; lengths of up to two bytes suffice for any name.
fn take_any<'a>(from: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
    let (tag, rest) = from.split_first()?;
    let (length, rest) = match rest {
        [0x81, n, rest @ ..] => (usize::from(*n), rest),
        [0x82, high, low, rest @ ..] => (usize::from(*high) << 8 | usize::from(*low), rest),
        [n, rest @ ..] if *n < 0x80 => (usize::from(*n), rest),
        _ => return None,
    };
    let (value, rest) = rest.split_at_checked(length)?;
    *from = rest;
    Some((*tag, value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

    #[test]
    fn a_certificate_names_a_user_and_groups() {
        let mut name = DistinguishedName::new();
        name.push(DnType::CountryName, "CH");
        name.push(DnType::OrganizationName, "system:masters");
        name.push(DnType::CommonName, "kube-apiserver-kubelet-client");
        let mut params = CertificateParams::default();
        params.distinguished_name = name;
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let found = user(certificate.der()).unwrap();
        assert_eq!((found.name.as_str(), found.groups), ("kube-apiserver-kubelet-client", vec!["system:masters".to_owned()]));

        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        assert_eq!(user(certificate.der()), None, "no name, no user");
    }

    #[test]
    fn names_that_are_cut_or_odd_are_nobody() {
        let subject = [0x31, 0x0b, 0x30, 0x09, 0x06, 0x03, 0x55, 0x04, 0x03, 0x0c, 0x02, b'm', b'e'];
        assert_eq!(user_of_subject(&subject).unwrap().name, "me");
        for end in 1..subject.len() {
            assert_eq!(user_of_subject(&subject[..end]), None, "{end}");
        }
        let mut odd = subject;
        odd[9] = 0x1e;
        assert_eq!(user_of_subject(&odd), None, "two-byte text is not guessed at");
        odd = subject;
        odd[11] = 0xff;
        assert_eq!(user_of_subject(&odd), None);
    }
}
