//! `WWW-Authenticate` headers and the little encoding that token requests need.

use std::collections::BTreeMap;

/// One scheme that a server offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Challenge {
    /// Lower case.
    pub scheme: String,
    /// Keys in lower case.
    pub parameters: BTreeMap<String, String>,
}

/// Reads one header value, which may offer several schemes.
pub(crate) fn parse(header: &str) -> Vec<Challenge> {
    let mut challenges: Vec<Challenge> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find([' ', '\t', ',', '=']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if word.is_empty() {
            return challenges;
        }
        let spaced = after.trim_start_matches([' ', '\t']);
        match spaced.strip_prefix('=') {
            Some(value) if !challenges.is_empty() => {
                let (value, after) = parameter(value.trim_start_matches([' ', '\t']));
                if let Some(challenge) = challenges.last_mut() {
                    challenge.parameters.insert(word.to_ascii_lowercase(), value);
                }
                rest = after;
            }
            _ => {
                challenges.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: BTreeMap::new() });
                rest = after.strip_prefix('=').unwrap_or(after);
            }
        }
    }
}

/// A quoted or plain value, and what follows it.
fn parameter(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        return (text[..end].to_string(), &text[end..]);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, character)| character)),
            other => value.push(other),
        }
    }
    (value, "")
}

/// `key=value&key=value`, percent-encoded.
pub(crate) fn form(fields: &[(&str, &str)]) -> String {
    let mut out = String::new();
    for (key, value) in fields {
        if !out.is_empty() {
            out.push('&');
        }
        out.push_str(&encode(key));
        out.push('=');
        out.push_str(&encode(value));
    }
    out
}

fn encode(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(header: &str) -> Vec<(String, Vec<(String, String)>)> {
        parse(header).into_iter().map(|challenge| (challenge.scheme, challenge.parameters.into_iter().collect())).collect()
    }

    fn pair(key: &str, value: &str) -> (String, String) {
        (key.into(), value.into())
    }

    #[test]
    fn challenges_are_read() {
        let bearer = r#"Bearer realm="https://auth.example/token",service="reg, istry",scope="repository:a/b:pull,push""#;
        assert_eq!(
            read(bearer),
            [(
                "bearer".to_string(),
                vec![
                    pair("realm", "https://auth.example/token"),
                    pair("scope", "repository:a/b:pull,push"),
                    pair("service", "reg, istry")
                ]
            )]
        );
        assert_eq!(read("Basic realm=plain"), [("basic".to_string(), vec![pair("realm", "plain")])]);
        let two = r#"Basic realm="a\"b", Bearer realm=x , service = "y""#;
        assert_eq!(
            read(two),
            [
                ("basic".to_string(), vec![pair("realm", "a\"b")]),
                ("bearer".to_string(), vec![pair("realm", "x"), pair("service", "y")])
            ]
        );
        assert_eq!(read("Negotiate"), [("negotiate".to_string(), vec![])]);
        for odd in ["", " , ", "=", "Bearer realm=\"unclosed", "\"\"", "a=b", "Bearer ="] {
            read(odd);
        }
    }

    #[test]
    fn forms_are_encoded() {
        assert_eq!(form(&[("a", "b c&d"), ("scope", "repository:x/y:pull")]), "a=b%20c%26d&scope=repository%3Ax%2Fy%3Apull");
    }
}
