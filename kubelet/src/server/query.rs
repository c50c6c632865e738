//! The part of a URL behind the question mark. Pure.

/// The pairs in order, decoded.
pub(super) fn pairs(query: Option<&str>) -> Vec<(String, String)> {
    let split = |pair: &str| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(name), decode(value))
    };
    query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()).map(split).collect()
}

/// The first value of a name.
pub(super) fn first<'a>(pairs: &'a [(String, String)], name: &str) -> Option<&'a str> {
    pairs.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
}

/// Whether a flag is on, as the upstream's handlers read it.
pub(super) fn flag(pairs: &[(String, String)], name: &str) -> bool {
    matches!(first(pairs, name), Some("1" | "true"))
}

/// `%41+b` → `A b`. What is no escape stays as it is; what is not UTF-8 is replaced.
pub(super) fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let escaped = || {
            let digits = std::str::from_utf8(bytes.get(at + 1..at + 3)?).ok()?;
            digits.bytes().all(|d| d.is_ascii_hexdigit()).then(|| u8::from_str_radix(digits, 16).ok())?
        };
        match byte {
            b'+' => out.push(b' '),
            b'%' => match escaped() {
                Some(byte) => {
                    out.push(byte);
                    at += 2;
                }
                None => out.push(b'%'),
            },
            byte => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_decoded_once() {
        let all = pairs(Some("command=sh&command=-c&command=echo+a%2Bb%25&input=1&tty&&x=%zz%"));
        let commands: Vec<_> = all.iter().filter(|(n, _)| n == "command").map(|(_, v)| v.as_str()).collect();
        assert_eq!(commands, ["sh", "-c", "echo a+b%"]);
        assert!(flag(&all, "input") && !flag(&all, "tty"));
        assert_eq!(first(&all, "x"), Some("%zz%"));
        assert!(pairs(None).is_empty());
    }
}
