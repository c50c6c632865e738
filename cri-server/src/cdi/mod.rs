//! CDI: devices that vendors describe in spec files. Owns the folders and a cache of what was read from them; an OCI spec is
//! all that it changes. Nothing is read until a container asks for a device.

mod document;
mod edits;
mod names;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use berth_oci::spec::Spec;
use document::Document;

use crate::error::{Error, file};

pub(crate) use names::requested;

/// What tells that a file is another than the one that was read.
type Stamp = (u64, u64, Option<SystemTime>);

/// A file as it was read: its devices, or what is wrong with it.
type Read = Arc<Result<Document, String>>;

/// The folders with spec files, the last one's devices win.
pub(crate) struct Registry {
    dirs: Vec<PathBuf>,
    files: Mutex<HashMap<PathBuf, (Stamp, Read)>>,
}

/// All devices at one moment.
#[derive(Default)]
struct Devices {
    /// Qualified name → priority, file, place in the file.
    found: BTreeMap<String, (usize, PathBuf, Read, usize)>,
    /// Qualified name → where, and which files name it.
    conflicts: BTreeMap<String, (usize, String)>,
    /// Files that could not be read.
    broken: Vec<String>,
}

impl Registry {
    /// For these folders; they need not exist.
    pub(crate) fn new(dirs: Vec<PathBuf>) -> Self {
        Self { dirs, files: Mutex::default() }
    }

    /// Changes the spec as the named devices want it. Either all of them are found or nothing is changed. Blocking.
    pub(crate) fn inject(&self, spec: &mut Spec, wanted: &[String]) -> Result<(), Error> {
        if wanted.is_empty() {
            return Ok(());
        }
        let devices = self.look()?;
        let unknown: Vec<&str> = wanted.iter().map(String::as_str).filter(|name| !devices.found.contains_key(*name)).collect();
        if !unknown.is_empty() {
            let conflicts = unknown.iter().filter_map(|name| devices.conflicts.get(*name));
            let reasons: Vec<String> = conflicts.map(|(_, text)| text.clone()).chain(devices.broken).collect();
            let reasons = if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join("; ")) };
            return Err(Error::CdiUnresolvable { devices: unknown.join(", "), reasons });
        }
        let mut seen: Vec<&Path> = Vec::new();
        let mut edited = spec.clone();
        for name in wanted {
            let Some((_, path, read, index)) = devices.found.get(name) else { continue };
            let Ok(document) = read.as_ref() else { continue };
            if !seen.contains(&path.as_path()) {
                seen.push(path);
                edits::apply(name, &document.container_edits, &mut edited)?;
            }
            edits::apply(name, &document.devices[*index].container_edits, &mut edited)?;
        }
        *spec = edited;
        Ok(())
    }

    fn look(&self) -> Result<Devices, Error> {
        let mut out = Devices::default();
        let mut present = Vec::new();
        for (priority, dir) in self.dirs.iter().enumerate() {
            for path in spec_files(dir)? {
                let Some(read) = self.read(&path) else { continue };
                present.push(path.clone());
                match read.as_ref() {
                    Ok(document) => out.add(priority, &path, document, &read),
                    Err(reason) => out.broken.push(format!("{}: {reason}", path.display())),
                }
            }
        }
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.retain(|path, _| present.contains(path));
        Ok(out)
    }

    /// The file, read anew only when it has changed. None: it has just gone.
    fn read(&self, path: &Path) -> Option<Read> {
        use std::os::unix::fs::MetadataExt;
        let meta = std::fs::metadata(path).ok()?;
        let stamp = (meta.ino(), meta.len(), meta.modified().ok());
        let lock = || self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, read)) = lock().get(path).filter(|(known, _)| *known == stamp) {
            return Some(read.clone());
        }
        let read = Arc::new(match std::fs::read_to_string(path) {
            Ok(text) => Document::parse(path, &text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => Err(error.to_string()),
        });
        lock().insert(path.to_owned(), (stamp, read.clone()));
        Some(read)
    }
}

impl Devices {
    fn add(&mut self, priority: usize, path: &Path, document: &Document, read: &Read) {
        for (index, device) in document.devices.iter().enumerate() {
            let name = format!("{}={}", document.kind, device.name);
            if let Some((at, text)) = self.conflicts.get_mut(&name)
                && *at == priority
            {
                text.push_str(&format!(", {}", path.display()));
                continue;
            }
            match self.found.get(&name) {
                Some((other, first, ..)) if *other == priority => {
                    let text = format!("conflicting device {name}, specs {}, {}", first.display(), path.display());
                    self.conflicts.insert(name.clone(), (priority, text));
                    self.found.remove(&name);
                }
                // A folder of higher priority settles what was in doubt below it.
                _ => {
                    self.conflicts.remove(&name);
                    self.found.insert(name, (priority, path.to_owned(), read.clone(), index));
                }
            }
        }
    }
}

/// The spec files of a folder, in the order of their names.
fn spec_files(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(file("read the CDI folder", dir)(e)),
    };
    let is_spec = |path: &PathBuf| path.extension().is_some_and(|e| e == "json" || e == "yaml");
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(is_spec).collect();
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests;
