//! What an administrator hands over to join with: the bootstrap token and the pins of the cluster's authority. Pure.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

/// A bootstrap token, `id.secret`: 6 and 16 characters of `[a-z0-9]`.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    id: String,
    secret: String,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", self.id)
    }
}

impl FromStr for Token {
    type Err = String;

    fn from_str(text: &str) -> Result<Token, String> {
        let text = text.trim();
        if text.starts_with("K10") {
            return Err("this is a token of k3s, whose agents join in another way: only kubeadm's clusters are joined".to_owned());
        }
        let is_part =
            |part: &str, length| part.len() == length && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        match text.split_once('.') {
            Some((id, secret)) if is_part(id, 6) && is_part(secret, 16) => {
                Ok(Token { id: id.to_owned(), secret: secret.to_owned() })
            }
            _ => {
                Err("a token is 6 characters, a dot and 16 characters of a-z and 0-9, as `kubeadm token create` prints it"
                    .to_owned())
            }
        }
    }
}

impl Token {
    /// The part that is no secret.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The whole, as it is shown to the API server.
    pub fn text(&self) -> String {
        format!("{}.{}", self.id, self.secret)
    }

    /// The signature of a text by this token: a detached JWS (RFC 7515, appendix F) with HS256.
    pub fn signature(&self, text: &[u8]) -> String {
        let header = URL_SAFE_NO_PAD.encode(format!(r#"{{"alg":"HS256","kid":"{}"}}"#, self.id));
        let signed = format!("{header}.{}", URL_SAFE_NO_PAD.encode(text));
        format!("{header}..{}", URL_SAFE_NO_PAD.encode(hmac(self.secret.as_bytes(), signed.as_bytes())))
    }
}

/// HMAC-SHA256 (RFC 2104) with a key no longer than a block.
fn hmac(key: &[u8], message: &[u8]) -> [u8; 32] {
    let pad = |byte: u8| {
        let mut block = [byte; 64];
        for (to, from) in block.iter_mut().zip(key) {
            *to ^= from;
        }
        block
    };
    let inner = Sha256::new().chain_update(pad(0x36)).chain_update(message).finalize();
    Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize().into()
}

/// `sha256:` and the hash of an authority's public key in hex.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pin(pub [u8; 32]);

impl FromStr for Pin {
    type Err = String;

    fn from_str(text: &str) -> Result<Pin, String> {
        let wrong = || "a pin is sha256: and 64 hex digits, as `kubeadm token create --print-join-command` prints it".to_owned();
        let (format, hex) = text.trim().split_once(':').ok_or_else(wrong)?;
        if !format.eq_ignore_ascii_case("sha256") || hex.len() != 64 || !hex.is_ascii() {
            return Err(wrong());
        }
        let mut pin = [0; 32];
        for (byte, at) in pin.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&hex[at..at + 2], 16).map_err(|_| wrong())?;
        }
        Ok(Pin(pin))
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_the_one_that_clusters_make() {
        let token: Token = "abcdef.0123456789abcdef".parse().unwrap();
        let wanted = "eyJhbGciOiJIUzI1NiIsImtpZCI6ImFiY2RlZiJ9..jGfh3cAKffhbjQqP1x03VRxdhcDip6Xp1PFxbB0P9vg";
        assert_eq!(token.signature(b"hello\n"), wanted);
        assert_eq!(format!("{token:?}"), "Token(abcdef)", "the secret is not printed");
    }

    #[test]
    fn what_is_no_token_is_refused() {
        for text in ["", "abcdef", "abcdef.0123", "ABCDEF.0123456789abcdef", "abcdef.0123456789abcdeF", "abcdef:0123456789abcdef"]
        {
            assert!(text.parse::<Token>().is_err(), "{text}");
        }
        let error = "K10aaaa::server:xyz".parse::<Token>().unwrap_err();
        assert!(error.contains("k3s"), "{error}");
    }

    #[test]
    fn pins_are_read_in_any_case_and_written_as_kubeadm_does() {
        let text = format!("sha256:{}", "0a".repeat(32));
        let pin: Pin = format!("SHA256:{}", "0A".repeat(32)).parse().unwrap();
        assert_eq!((pin.0, pin.to_string()), ([10; 32], text));
        for text in ["sha512:00", "00", &format!("sha256:{}", "0".repeat(63)), &format!("sha256:{}", "g".repeat(64))] {
            assert!(text.parse::<Pin>().is_err(), "{text}");
        }
    }
}
