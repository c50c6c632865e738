//! Sealing of what is secret in the records of API pods: AES-256-GCM under a key of this machine, with what the record is about as
//! associated data. Knows no file.

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};

/// Bytes of a key: AES-256's.
pub(super) const KEY_BYTES: usize = 32;

/// The machine's key. Clones share it.
#[derive(Clone)]
pub struct SealingKey(Arc<LessSafeKey>);

/// Nobody's log line.
impl fmt::Debug for SealingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealingKey")
    }
}

impl SealingKey {
    /// From what a file holds: 32 bytes, or their base64 with or without the line's end.
    pub fn parse(content: &[u8]) -> Option<SealingKey> {
        let bytes = match content.len() {
            KEY_BYTES => content.to_vec(),
            _ => STANDARD.decode(content.trim_ascii()).ok()?,
        };
        let key = UnboundKey::new(&AES_256_GCM, &bytes).ok()?;
        Some(SealingKey(Arc::new(LessSafeKey::new(key))))
    }

    /// Nonce, cipher text and tag; `None` when there is no random number. `about` is what [`SealingKey::open`] has to be told too.
    pub(super) fn seal(&self, about: &str, clear: &[u8]) -> Option<String> {
        let mut nonce = [0u8; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).ok()?;
        let mut body = clear.to_vec();
        self.0.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(about), &mut body).ok()?;
        Some(STANDARD.encode([&nonce[..], &body].concat()))
    }

    /// What was sealed; `None`: by another key, about something else, or it was changed since.
    pub(super) fn open(&self, about: &str, sealed: &str) -> Option<Vec<u8>> {
        let bytes = STANDARD.decode(sealed).ok()?;
        let (nonce, body) = bytes.split_at_checked(NONCE_LEN)?;
        let mut body = body.to_vec();
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let clear = self.0.open_in_place(nonce, Aad::from(about), &mut body).ok()?;
        Some(clear.to_vec())
    }
}

/// A new key as its file holds it.
pub fn new_key() -> Option<String> {
    let mut bytes = [0u8; KEY_BYTES];
    SystemRandom::new().fill(&mut bytes).ok()?;
    Some(format!("{}\n", STANDARD.encode(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_with_its_key_and_its_subject_alone() {
        let (key, other) = (SealingKey::parse(&[7; 32]).unwrap(), SealingKey::parse(&[8; 32]).unwrap());
        let sealed = key.seal("Secret a/b", b"hunter2").unwrap();
        assert_ne!(sealed, key.seal("Secret a/b", b"hunter2").unwrap(), "each time another nonce");
        assert_eq!(key.open("Secret a/b", &sealed).unwrap(), b"hunter2");
        assert_eq!(key.open("Secret a/c", &sealed), None);
        assert_eq!(other.open("Secret a/b", &sealed), None);
        let mut bytes = STANDARD.decode(&sealed).unwrap();
        for at in [0, NONCE_LEN, bytes.len() - 1] {
            bytes[at] ^= 1;
            assert_eq!(key.open("Secret a/b", &STANDARD.encode(&bytes)), None, "byte {at} was changed");
            bytes[at] ^= 1;
        }
        for broken in ["", "AAAA", "not base64!"] {
            assert_eq!(key.open("Secret a/b", broken), None);
        }
    }

    #[test]
    fn a_key_is_32_bytes_or_their_base64() {
        let text = new_key().unwrap();
        assert_ne!(text, new_key().unwrap());
        assert!(SealingKey::parse(text.as_bytes()).is_some() && SealingKey::parse(text.trim().as_bytes()).is_some());
        assert!(SealingKey::parse(&[0xff; 32]).is_some());
        for wrong in [&b""[..], b"short", &[1; 31], &[1; 33], STANDARD.encode([1; 16]).as_bytes()] {
            assert!(SealingKey::parse(wrong).is_none(), "{wrong:?}");
        }
    }
}
