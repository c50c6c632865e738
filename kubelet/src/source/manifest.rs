//! One manifest file: its text becomes complete static pods and objects, or says by line what is wrong with it. Reads no file
//! itself.

use std::path::Path;

use super::parse::{Problem, parse_manifest};
use super::references::{Reference, references};
use super::static_pod::{Origin, StaticPod, complete};
use crate::objects::Object;

/// `*.yaml`, `*.yml`, `*.json`, no dot files.
pub fn is_manifest_name(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
    !hidden && path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json")
}

/// A file's content, read.
#[derive(Clone, Debug, Default)]
pub struct Manifest {
    /// Its pods; none where there are errors.
    pub pods: Vec<StaticPod>,
    /// Its objects; none where there are errors.
    pub objects: Vec<Object>,
    /// What its pods refer to, each with its place, `file:line`.
    pub references: Vec<(String, Reference)>,
    /// What cannot be carried out, as `file:line: message`.
    pub errors: Vec<String>,
    /// What has no effect, as `file:line: message`.
    pub warnings: Vec<String>,
}

/// Reads a file's content. `accepted` are the pods that the file stood for before.
pub fn read_manifest(bytes: &[u8], origin: &Origin<'_>, accepted: &[StaticPod]) -> Manifest {
    let path = origin.path.display();
    let locate = |p: Problem| match p.line {
        0 => format!("{path}: {}", p.message),
        line => format!("{path}:{line}: {}", p.message),
    };
    let failed = |errors| Manifest { errors, ..Manifest::default() };
    let parsed = match str::from_utf8(bytes) {
        Ok(text) => parse_manifest(text),
        Err(e) => return failed(vec![format!("{path}: not UTF-8: {e}")]),
    };
    let parsed = match parsed {
        Ok(parsed) => parsed,
        Err(problems) => return failed(problems.into_iter().map(locate).collect()),
    };
    let mut manifest = Manifest { warnings: parsed.warnings.into_iter().map(locate).collect(), ..Manifest::default() };
    for object in parsed.objects {
        let name = object.name();
        if manifest.objects.iter().any(|other| other.name() == name) {
            manifest.errors.push(format!("{path}: {name} is defined twice in this file"));
        }
        manifest.objects.push(object);
    }
    for pod in parsed.pods {
        let lines = pod.lines.clone();
        let line = lines.start();
        match complete(pod, origin, accepted) {
            Ok(pod) if manifest.pods.iter().any(|other| other.full_name() == pod.full_name()) => {
                let message = format!("pod {} is defined twice in this file", pod.full_name());
                manifest.errors.push(locate(Problem { line, message }));
            }
            Ok(pod) => {
                let place = |r: &Reference| match lines.of(&r.path) {
                    0 => path.to_string(),
                    line => format!("{path}:{line}"),
                };
                manifest.references.extend(references(&pod.pod).into_iter().map(|r| (place(&r), r)));
                manifest.pods.push(pod);
            }
            Err(found) => manifest.errors.extend(found.into_iter().map(locate)),
        }
    }
    if !manifest.errors.is_empty() {
        manifest.pods.clear();
        manifest.objects.clear();
        manifest.references.clear();
    }
    manifest
}
