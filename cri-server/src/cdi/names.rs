//! Names of CDI devices: `vendor.com/class=name`. Checks text only.

use std::collections::BTreeMap;

/// Annotations with this prefix name devices, with commas between.
const ANNOTATION: &str = "cdi.k8s.io/";

/// A name in its parts: vendor, class, device.
pub(crate) fn parse(name: &str) -> Option<(&str, &str, &str)> {
    let (kind, device) = name.split_once('=')?;
    let (vendor, class) = kind.split_once('/')?;
    (is_vendor_or_class(vendor) && is_vendor_or_class(class) && is_device(device)).then_some((vendor, class, device))
}

/// Whether a text can be a vendor or a class: a letter, then letters, digits and `_-.`, a letter or digit at its end.
pub(super) fn is_vendor_or_class(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic()) && is_made_of(text, "_-.")
}

/// Whether a text can be a device: letters, digits and `_-.:`, a letter or digit at both ends.
pub(super) fn is_device(text: &str) -> bool {
    is_made_of(text, "_-.:")
}

fn is_made_of(text: &str, marks: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric();
    text.starts_with(plain) && text.ends_with(plain) && text.chars().all(|c| plain(c) || marks.contains(c))
}

/// The devices that a container asks for: those of the request, then those of its annotations, each once. The error is the
/// first annotation value that is no name.
pub(crate) fn requested<'a>(
    listed: impl Iterator<Item = &'a str>,
    annotations: &'a BTreeMap<String, String>,
) -> Result<Vec<String>, String> {
    let mut out: Vec<String> = Vec::new();
    for name in listed {
        if !out.iter().any(|n| n == name) {
            out.push(name.to_owned());
        }
    }
    for (_, value) in annotations.range(ANNOTATION.to_owned()..).take_while(|(key, _)| key.starts_with(ANNOTATION)) {
        for name in value.split(',') {
            if parse(name).is_none() {
                return Err(name.to_owned());
            }
            if !out.iter().any(|n| n == name) {
                out.push(name.to_owned());
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_a_vendor_a_class_and_a_device() {
        for (name, good) in [
            ("vendor.com/class=dev0", true),
            ("v/c=0", true),
            ("v/c.d=a:1", true),
            ("v/c", false),
            ("v=c", false),
            ("/c=d", false),
            ("v/c=", false),
            ("1v/c=d", false),
            ("v/c=d-", false),
            ("v/c_=d", false),
            ("v/c=d=e", false),
            ("v/c/e=d", false),
            ("vé/c=d", false),
            ("", false),
            ("=", false),
            ("/=", false),
        ] {
            assert_eq!(parse(name).is_some(), good, "{name}");
        }
    }

    #[test]
    fn devices_come_from_the_request_and_from_annotations_each_once() {
        let annotations = BTreeMap::from([
            ("cdi.k8s.io/a".to_owned(), "v/c=2,v/c=1".to_owned()),
            ("cdi.k8s.io/b".to_owned(), "v/c=3".to_owned()),
            ("other".to_owned(), "not one".to_owned()),
        ]);
        let got = requested(["v/c=1", "v/c=1"].into_iter(), &annotations).unwrap();
        assert_eq!(got, ["v/c=1", "v/c=2", "v/c=3"]);
        let wrong = BTreeMap::from([("cdi.k8s.io/a".to_owned(), "v/c=1,oops".to_owned())]);
        assert_eq!(requested(std::iter::empty(), &wrong).unwrap_err(), "oops");
    }
}
