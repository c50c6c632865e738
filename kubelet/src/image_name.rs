//! Image references as far as the kubelet looks at them: default tags, default pull policies, obvious nonsense. The
//! image service parses them for real.

/// The reference with `:latest` where it has neither tag nor digest, or why it cannot be one.
pub fn normalize(image: &str) -> Result<String, String> {
    let fail = |why: &str| Err(format!("couldn't parse image name {image:?}: {why}"));
    if image.is_empty() || image.trim() != image {
        return fail("invalid reference format");
    }
    let (name, digest) = match image.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (image, None),
    };
    if let Some(digest) = digest {
        let valid = digest.split_once(':').is_some_and(|(algorithm, hex)| {
            !algorithm.is_empty() && hex.len() >= 32 && hex.bytes().all(|b| b.is_ascii_hexdigit())
        });
        if !valid {
            return fail("invalid digest");
        }
    }
    let (repository, tag) = split_tag(name);
    let is_id = digest.is_none() && tag.is_none() && name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit());
    if is_id {
        return Ok(image.to_owned());
    }
    let registry_end = repository.find('/').map_or(0, |i| i + 1);
    let first = &repository[..registry_end];
    let has_registry = first.contains('.') || first.contains(':') || first == "localhost/";
    let path = if has_registry { &repository[registry_end..] } else { repository };
    if path.is_empty() || path.split('/').any(str::is_empty) {
        return fail("invalid reference format");
    }
    if path.chars().any(|c| c.is_ascii_uppercase()) {
        return fail("repository name must be lowercase");
    }
    if !path.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/".contains(c)) {
        return fail("invalid reference format");
    }
    if let Some(tag) = tag {
        let valid = (1..=128).contains(&tag.len())
            && tag.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
            && !tag.starts_with(['.', '-']);
        if !valid {
            return fail("invalid tag");
        }
    }
    match (tag, digest) {
        (None, None) => Ok(format!("{image}:latest")),
        _ => Ok(image.to_owned()),
    }
}

/// `Always` for the tag `latest` or none, else `IfNotPresent`.
pub fn default_pull_policy(image: &str) -> &'static str {
    if image.contains('@') {
        return "IfNotPresent";
    }
    match split_tag(image).1 {
        None | Some("latest") => "Always",
        Some(_) => "IfNotPresent",
    }
}

fn split_tag(name: &str) -> (&str, Option<&str>) {
    match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, Some(tag)),
        _ => (name, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tag_means_latest() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let cases = [
            ("busybox", "busybox:latest"),
            ("busybox:1.36", "busybox:1.36"),
            ("localhost:5000/web", "localhost:5000/web:latest"),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
            (&format!("web@{digest}"), &format!("web@{digest}")),
            (&format!("web:1@{digest}"), &format!("web:1@{digest}")),
            (&"a".repeat(64), &"a".repeat(64)),
        ];
        for (image, expected) in cases {
            assert_eq!(normalize(image).as_deref(), Ok(expected));
        }
    }

    #[test]
    fn nonsense_is_refused_with_the_name() {
        for image in ["", " web", "Web", "web:", "web:a b", "a//b", "web@sha256:short", "host.x/", "we b"] {
            let error = normalize(image).unwrap_err();
            assert!(error.contains("couldn't parse image name"), "{image}: {error}");
        }
    }

    #[test]
    fn the_pull_policy_follows_the_tag() {
        let digest = format!("web@sha256:{}", "a".repeat(64));
        for (image, policy) in [
            ("web", "Always"),
            ("web:latest", "Always"),
            ("web:1", "IfNotPresent"),
            ("localhost:5000/web", "Always"),
            (digest.as_str(), "IfNotPresent"),
        ] {
            assert_eq!(default_pull_policy(image), policy, "{image}");
        }
    }
}
