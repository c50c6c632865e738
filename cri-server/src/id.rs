//! Identifiers of sandboxes and containers: 64 lower-case hex digits, cheap to clone. Must not know where they live.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($name:ident, $doc:literal) => {
        #[doc = $doc]
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// A fresh random id.
            pub fn random() -> Self {
                Self(random_hex().into())
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text.into())
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.into())
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0.as_ref().to_owned()
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(SandboxId, "The id of a pod sandbox.");
id!(ContainerId, "The id of a container.");

/// Fills a buffer from the kernel's random source.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0u8; N];
    let mut filled = 0;
    while filled < N {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            // Without a random source, time and the address of the buffer still keep ids apart.
            Err(_) => {
                let now = crate::clock::now_ns() as u64;
                for (i, b) in bytes[filled..].iter_mut().enumerate() {
                    *b = (now.rotate_left((i as u32 * 7) % 64) & 0xff) as u8;
                }
                filled = N;
            }
        }
    }
    bytes
}

fn random_hex() -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let bytes: [u8; 32] = random_bytes();
    bytes.iter().flat_map(|b| [DIGITS[usize::from(b >> 4)] as char, DIGITS[usize::from(b & 15)] as char]).collect()
}

/// Whether a text has the form of an id of ours, so that it may become part of a path.
pub(crate) fn is_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_ids_have_the_form_and_differ() {
        let (a, b) = (SandboxId::random(), SandboxId::random());
        assert!(is_id(a.as_str()) && is_id(b.as_str()));
        assert_ne!(a, b);
    }

    #[test]
    fn paths_and_uuids_are_not_ids() {
        for text in ["", "../../etc", "0123", "5a1c7c6e-1f2b-4c3d-8e9f-000000000000"] {
            assert!(!is_id(text), "{text}");
        }
    }
}
