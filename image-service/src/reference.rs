//! Image references: `[host[:port]/]path[:tag][@sha256:digest]`, with Docker's defaults.

use std::fmt;
use std::str::FromStr;

use crate::digest::Digest;
use crate::error::Error;

const DEFAULT_HOST: &str = "docker.io";
const DEFAULT_TAG: &str = "latest";

/// A full image reference: what a pod's text means once the defaults are filled in.
///
/// A name without tag and digest means `:latest`. When a digest is given it decides, and the tag is only kept
/// for display.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    host: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Reads a reference as a pod gives it.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let refuse = |reason| Error::Reference { text: text.chars().take(300).collect(), reason };
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => {
                (name, Some(digest.parse().map_err(|_| refuse("the digest is not sha256: and 64 hexadecimal digits"))?))
            }
            None => (text, None),
        };
        let (name, tag) = match name.rsplit_once(':') {
            Some((rest, tag)) if !tag.contains('/') => (rest, Some(tag)),
            _ => (name, None),
        };
        if name.is_empty() {
            return Err(refuse("the name is empty"));
        }
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(refuse("the tag is not letters, digits, '_', '.' and '-', at most 128"));
        }
        let (host, path) = split_host(name);
        if !is_host(host) {
            return Err(refuse("the registry host is not valid"));
        }
        let path = if host == DEFAULT_HOST && !path.contains('/') { format!("library/{path}") } else { path.to_string() };
        if host.len() + 1 + path.len() > 255 {
            return Err(refuse("the name is longer than 255 bytes"));
        }
        if !path.split('/').all(is_component) {
            return Err(refuse("the path is not lower-case letters and digits, separated by '/', '.', '_', '__' or '-'"));
        }
        let tag = match (tag, digest) {
            (None, None) => Some(DEFAULT_TAG),
            (tag, _) => tag,
        };
        Ok(Reference { host: host.to_string(), path, tag: tag.map(str::to_string), digest })
    }

    /// The registry host, with its port when one was given: `docker.io`, `localhost:5000`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository's path in its registry: `library/busybox`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Host and path: `docker.io/library/busybox`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.host, self.path)
    }

    /// The tag, unless only a digest was given.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, when one was given.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// What a registry is asked for: the digest if there is one, else the tag.
    pub(crate) fn target(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => DEFAULT_TAG.to_string(),
        }
    }

    /// The name that the store lists: `repo:tag`, or `None` for a reference by digest.
    pub fn repo_tag(&self) -> Option<String> {
        match (&self.digest, &self.tag) {
            (None, Some(tag)) => Some(format!("{}:{tag}", self.repository())),
            _ => None,
        }
    }

    /// The name by digest: `repo@sha256:...`.
    pub fn repo_digest(&self, digest: Digest) -> String {
        format!("{}@{digest}", self.repository())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.path)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Reference::parse(text)
    }
}

/// The first component is a host when it has a dot, a colon or an upper-case letter, or is `localhost`.
fn split_host(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((first, rest))
            if first == "localhost" || first.contains(['.', ':']) || first.bytes().any(|byte| byte.is_ascii_uppercase()) =>
        {
            match first {
                "index.docker.io" | "registry-1.docker.io" => (DEFAULT_HOST, rest),
                _ => (first, rest),
            }
        }
        _ => (DEFAULT_HOST, name),
    }
}

fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let bytes = tag.as_bytes();
    matches!(bytes.first(), Some(&first) if word(first))
        && bytes.len() <= 128
        && bytes.iter().all(|&byte| word(byte) || byte == b'.' || byte == b'-')
}

fn is_host(host: &str) -> bool {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, "")) => (address, None),
            Some((address, port)) => match port.strip_prefix(':') {
                Some(port) => (address, Some(port)),
                None => return false,
            },
            None => return false,
        },
        None => match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        },
    };
    if port.is_some_and(|port| port.parse::<u16>().is_err() || !port.bytes().all(|byte| byte.is_ascii_digit())) {
        return false;
    }
    if host.starts_with('[') {
        return name.parse::<std::net::Ipv6Addr>().is_ok();
    }
    name.split('.').all(|label| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    })
}

/// Runs of lower-case letters and digits, with `.`, `_`, `__` or any number of `-` between two runs.
fn is_component(component: &str) -> bool {
    let run = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = component.as_bytes();
    if !bytes.first().is_some_and(run) || !bytes.last().is_some_and(run) {
        return false;
    }
    bytes
        .split(run)
        .filter(|separator| !separator.is_empty())
        .all(|separator| matches!(separator, b"." | b"_" | b"__") || separator.iter().all(|&byte| byte == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn references_get_their_defaults() {
        let cases = [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("user/app", "docker.io/user/app:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/library/busybox:1", "docker.io/library/busybox:1"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c"),
            ("registry.k8s.io/pause:3.10.1", "registry.k8s.io/pause:3.10.1"),
            ("127.0.0.1:5000/x", "127.0.0.1:5000/x:latest"),
            ("[::1]:5000/x:y", "[::1]:5000/x:y"),
            ("REG/x", "REG/x:latest"),
            ("a/b__c/d--e.f_g", "docker.io/a/b__c/d--e.f_g:latest"),
        ];
        for (text, expected) in cases {
            assert_eq!(Reference::parse(text).unwrap().to_string(), expected, "{text}");
        }
    }

    #[test]
    fn a_digest_decides_over_a_tag() {
        let by_digest = Reference::parse(&format!("busybox@{HEX}")).unwrap();
        assert_eq!(by_digest.tag(), None);
        assert_eq!(by_digest.repo_tag(), None);
        assert_eq!(by_digest.target(), HEX);
        let both = Reference::parse(&format!("busybox:1@{HEX}")).unwrap();
        assert_eq!(both.target(), HEX);
        assert_eq!(both.repo_tag(), None);
        assert_eq!(both.to_string(), format!("docker.io/library/busybox:1@{HEX}"));
        assert_eq!(both.repo_digest(Digest::of(b"")), format!("docker.io/library/busybox@{HEX}"));
    }

    #[test]
    fn bad_references_are_refused_with_a_reason() {
        let long = "a".repeat(300);
        let cases = [
            "",
            ":tag",
            "@",
            "UPPER",
            "a//b",
            "/a",
            "a/",
            "a:",
            "a: b",
            "a:-x",
            "-a",
            "a_",
            "a___b",
            "a._b",
            "a..b",
            "host:port/x",
            "host:99999/x",
            "exa_mple.com/x",
            "[::1/x",
            "[zz]:1/x",
            "a@sha256:abc",
            "a@",
            "é",
            "a b",
            "a\nb",
            "../etc",
            "a/../b",
            "a:b:c",
            "h.o/a?x=1",
            "h.o/a#b",
            "h.o/a%2e",
            &long,
        ];
        for text in cases {
            assert!(Reference::parse(text).is_err(), "{text:?}");
        }
        assert!(Reference::parse(&format!("a:{}", "t".repeat(129))).is_err());
    }
}
