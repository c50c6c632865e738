//! docs/cri.md against our declaration of the CRI: a row for every call and every field, and every test that it names exists.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a folder above").to_owned()
}

/// Calls, and messages with their fields.
fn declared() -> (BTreeSet<String>, BTreeMap<String, Vec<String>>) {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let set = protox::compile([proto.join("api.proto")], [&proto]).expect("the declaration compiles");
    let file = set.file.into_iter().find(|f| f.package() == "runtime.v1").expect("the CRI");
    let calls = file.service.iter().flat_map(|s| &s.method).map(|m| m.name().to_owned()).collect();
    let fields = |m: &prost_types::DescriptorProto| m.field.iter().map(|f| f.name().to_owned()).collect();
    (calls, file.message_type.iter().map(|m| (m.name().to_owned(), fields(m))).collect())
}

/// The rows of the page: what is in backticks in the first cell, and the rest.
fn rows(text: &str) -> Vec<(String, String, String)> {
    let cells = |line: &str| line.trim_matches('|').split('|').map(|c| c.trim().to_owned()).collect::<Vec<_>>();
    let lines = text.lines().filter(|l| l.starts_with("| `")).map(cells);
    lines.map(|c| (c[0].trim_matches('`').to_owned(), c[1].clone(), c[2..].join("|"))).collect()
}

/// The names of all test functions of the repository.
fn functions(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if path.is_dir() {
            if !name.starts_with('.') && name != "target" {
                functions(&path, names);
            }
        } else if name.ends_with(".rs") {
            let text = std::fs::read_to_string(&path).expect("a source file");
            let found = text.lines().filter_map(|l| l.trim_start().trim_start_matches("async ").strip_prefix("fn "));
            names.extend(found.filter_map(|l| l.split_once('(')).map(|(name, _)| name.to_owned()));
        }
    }
}

#[test]
fn docs_name_every_call_and_field() {
    let (calls, messages) = declared();
    let text = std::fs::read_to_string(repository().join("docs/cri.md")).expect("docs/cri.md");
    let rows = rows(&text);
    let named: BTreeSet<&str> = rows.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(named.len(), rows.len(), "a row is there twice");
    let mut missing: Vec<String> = calls.iter().filter(|c| !named.contains(c.as_str())).cloned().collect();
    let mut known: BTreeSet<String> = calls;
    for (message, fields) in &messages {
        known.insert(format!("{message}.*"));
        for field in fields {
            let name = format!("{message}.{field}");
            if !named.contains(name.as_str()) && !named.contains(format!("{message}.*").as_str()) {
                missing.push(name.clone());
            }
            known.insert(name);
        }
    }
    assert!(missing.is_empty(), "no row in docs/cri.md: {missing:?}");
    let unknown: Vec<_> = named.iter().filter(|n| !known.contains(**n)).collect();
    assert!(unknown.is_empty(), "rows of nothing: {unknown:?}");
    let states = ["works", "refused", "means nothing here"];
    let odd: Vec<_> = rows.iter().filter(|(_, state, how)| !states.contains(&state.as_str()) || how.is_empty()).collect();
    assert!(odd.is_empty(), "neither works, nor refused, nor without meaning: {odd:?}");
}

#[test]
fn docs_name_tests_that_exist() {
    let text = std::fs::read_to_string(repository().join("docs/cri.md")).expect("docs/cri.md");
    let mut names = BTreeSet::new();
    functions(&repository(), &mut names);
    // A test's name is a sentence: the only thing in backticks with so many underscores.
    let named = text.split('`').skip(1).step_by(2).filter(|n| n.matches('_').count() >= 4 && !n.contains('.'));
    let gone: BTreeSet<_> = named.filter(|n| !names.contains(*n)).collect();
    assert!(gone.is_empty(), "docs/cri.md names tests that are not there: {gone:?}");
}
