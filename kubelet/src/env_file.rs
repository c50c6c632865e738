//! Files of environment variables in a pod's emptyDir volumes, as one container writes them for others: `KEY='value'` lines. Reads
//! hostile input: the walk cannot leave the volume and what is read is bounded.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use k8s_openapi::api::core::v1::FileKeySelector;
use rustix::fs::{Mode, OFlags, ResolveFlags};

/// Most that a file may hold: as much as a ConfigMap.
const MAX_BYTES: u64 = 1024 * 1024;

/// The value of a key; `None` where it is optional and not there.
pub fn value(volume: &Path, from: &FileKeySelector) -> Result<Option<Vec<u8>>, String> {
    let optional = from.optional == Some(true);
    let missing = || format!("environment variable key {:?} not found in file {:?}", from.key, from.path);
    let text = match read(volume, &from.path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && optional => return Ok(None),
        Err(error) => return Err(format!("couldn't parse env file: {:?}: {error}", from.path)),
        Ok(text) => text,
    };
    let found = parse(&text).map_err(|why| format!("couldn't parse env file: {:?}: {why}", from.path))?;
    // The last one counts, and an empty one counts for none.
    match found.into_iter().rev().find(|(key, _)| *key == from.key).filter(|(_, value)| !value.is_empty()) {
        Some((_, value)) => Ok(Some(value.into_bytes())),
        None if optional => Ok(None),
        None => Err(missing()),
    }
}

fn read(volume: &Path, path: &str) -> io::Result<String> {
    let root = rustix::fs::open(volume, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    // A pipe that somebody puts there must not be waited for.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve)?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("is not a file"));
    }
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if u64::try_from(text.len()).unwrap_or(u64::MAX) > MAX_BYTES {
        return Err(io::Error::other(format!("holds more than {MAX_BYTES} bytes")));
    }
    Ok(text)
}

/// Keys and values in order.
fn parse(text: &str) -> Result<Vec<(String, String)>, String> {
    let mut found = Vec::new();
    let mut rest = text;
    let mut line = 0;
    while !rest.is_empty() {
        line += 1;
        let (current, after) = rest.split_once('\n').unwrap_or((rest, ""));
        let trimmed = current.trim_start_matches([' ', '\t']);
        if trimmed.trim_end().is_empty() || trimmed.starts_with('#') {
            rest = after;
            continue;
        }
        let fail = |why: &str| Err(format!("line {line}: {why}"));
        let Some((key, value)) = trimmed.split_once('=') else { return fail("expected KEY='value'") };
        if key.is_empty() || key.contains(char::is_whitespace) {
            return fail("no blank may be in a key or before '='");
        }
        if value.starts_with([' ', '\t']) || value.trim_end_matches('\r').is_empty() {
            found.push((key.to_owned(), String::new()));
            rest = after;
            continue;
        }
        if !value.starts_with('\'') {
            return fail("the value is not in single quotes");
        }
        // From the opening quote on, over as many lines as it takes.
        let start = rest.len() - after.len() - usize::from(rest.contains('\n')) - value.len();
        let quoted = &rest[start + 1..];
        let Some(end) = quoted.find('\'') else { return fail("the closing quote is missing") };
        let (tail, next) = quoted[end + 1..].split_once('\n').unwrap_or((&quoted[end + 1..], ""));
        let tail = tail.trim_matches([' ', '\t', '\r']);
        if !tail.is_empty() && !tail.starts_with('#') {
            return fail("only a comment may follow the closing quote");
        }
        line += quoted[..end].matches('\n').count();
        found.push((key.to_owned(), quoted[..end].to_owned()));
        rest = next;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &str) -> Result<Vec<(String, String)>, String> {
        parse(text)
    }

    #[test]
    fn lines_are_read_as_the_contract_says() {
        let text = "# a comment\n\n  A='one'\nB='two\nlines' # why\nC=\nD= 'lost'\nE='$(A) \\n'";
        let wanted = [("A", "one"), ("B", "two\nlines"), ("C", ""), ("D", ""), ("E", "$(A) \\n")];
        let wanted: Vec<_> = wanted.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        assert_eq!(pairs(text), Ok(wanted));
        for (bad, why) in [
            ("A=one", "line 1: the value is not in single quotes"),
            ("\nA ='x'", "line 2: no blank may be in a key or before '='"),
            ("A='x", "line 1: the closing quote is missing"),
            ("A='x' y", "line 1: only a comment may follow the closing quote"),
            ("B='1\n2'\nnothing", "line 3: expected KEY='value'"),
        ] {
            assert_eq!(pairs(bad), Err(why.to_owned()), "{bad:?}");
        }
    }

    #[test]
    fn the_walk_stays_in_the_volume_and_what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("v");
        std::fs::create_dir(&volume).unwrap();
        std::fs::write(dir.path().join("outside"), "A='secret'").unwrap();
        std::fs::write(volume.join("env"), "A='one'\nA='two'\nE=''\n").unwrap();
        std::os::unix::fs::symlink("../outside", volume.join("link")).unwrap();
        let from = |path: &str, key: &str, optional| FileKeySelector {
            key: key.into(),
            path: path.into(),
            volume_name: "v".into(),
            optional: Some(optional),
        };
        assert_eq!(value(&volume, &from("env", "A", false)), Ok(Some(b"two".to_vec())));
        assert_eq!(
            value(&volume, &from("env", "E", false)).unwrap_err(),
            "environment variable key \"E\" not found in file \"env\""
        );
        assert_eq!(value(&volume, &from("env", "E", true)), Ok(None));
        assert_eq!(value(&volume, &from("none", "A", true)), Ok(None));
        assert!(value(&volume, &from("link", "A", true)).unwrap_err().starts_with("couldn't parse env file: \"link\""));
        assert!(value(&volume, &from("none", "A", false)).unwrap_err().starts_with("couldn't parse env file"));
    }
}
