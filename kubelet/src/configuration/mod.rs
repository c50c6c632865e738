//! KubeletConfiguration (kubelet.config.k8s.io/v1beta1): the main file, the drop-ins and the flags become one document,
//! which is checked against the table of fields and applied to [`Config`]. What is not supported is named or refused.

pub mod fields;
mod flags;
mod node;
mod settings;
mod value;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::config::Config;
use crate::source::yaml::parse_documents;
use crate::{Error, Result};

pub use self::flags::{FlagDescription, flag_descriptions};
pub use self::value::parse_duration;

/// The API version of the document.
pub const API_VERSION: &str = "kubelet.config.k8s.io/v1beta1";
/// Its kind.
pub const KIND: &str = "KubeletConfiguration";

/// Fields that are paths: relative ones are meant from the file's folder.
const PATHS: [&str; 5] = ["staticPodPath", "resolvConf", "tlsCertFile", "tlsPrivateKeyFile", "authentication.x509.clientCAFile"];

/// The whole of a configuration before it is applied.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Configuration {
    value: Map<String, Value>,
    /// What is to be said at start.
    notices: Vec<String>,
    /// What flags say of the node's object beside the fields.
    node: BTreeMap<&'static str, String>,
    /// There was a file: the upstream's defaults for access then differ.
    from_file: bool,
    /// There is an API server.
    in_cluster: bool,
}

/// The documents of a text (YAML or JSON); empty ones are left out.
///
/// # Errors
/// With the line of what is wrong.
pub fn documents(text: &str) -> std::result::Result<Vec<Value>, String> {
    let documents = parse_documents(text).map_err(|error| error.to_string())?;
    Ok(documents.into_iter().map(|document| document.value).collect())
}

/// Whether a document is a KubeletConfiguration.
pub fn is_configuration(document: &Value) -> bool {
    let is = |key: &str, wanted: &str| document.get(key).and_then(Value::as_str) == Some(wanted);
    is("apiVersion", API_VERSION) && is("kind", KIND)
}

impl Configuration {
    /// Takes the main file's document; `folder` is where the file is.
    pub fn add_document(&mut self, document: Value, folder: &Path) {
        self.from_file = true;
        self.merge(document, folder);
    }

    fn merge(&mut self, document: Value, folder: &Path) {
        let Value::Object(mut patch) = document else { return };
        patch.remove("apiVersion");
        patch.remove("kind");
        let mut patch = Value::Object(patch);
        for path in PATHS {
            if let Some(Value::String(text)) = value::at_mut(&mut patch, path)
                && !text.is_empty()
            {
                *text = folder.join(&*text).to_string_lossy().into_owned();
            }
        }
        if let Value::Object(patch) = patch {
            merge_patch(&mut self.value, patch);
        }
    }

    /// Merges the `*.conf` files below a folder in lexical order, each as a JSON merge patch (RFC 7386).
    ///
    /// # Errors
    /// When one cannot be read or is not of the right kind.
    pub fn add_drop_ins(&mut self, folder: &Path) -> Result<()> {
        let wrong = |path: &Path, problem: String| Error::ConfigurationFile { path: path.to_owned(), problem };
        let mut files = Vec::new();
        collect_drop_ins(folder, &mut files)?;
        for path in files {
            let text = fs::read_to_string(&path).map_err(|source| Error::ReadFile { path: path.clone(), source })?;
            let mut documents = documents(&text).map_err(|problem| wrong(&path, problem))?;
            match (documents.pop(), documents.is_empty()) {
                (Some(document), true) if is_configuration(&document) => {
                    let folder = path.parent().unwrap_or(folder);
                    self.from_file = true;
                    self.merge(document, folder);
                }
                _ => return Err(wrong(&path, format!("is not one document of {API_VERSION} {KIND}"))),
            }
        }
        Ok(())
    }

    /// Sets a field by its flag; flags come last and win.
    ///
    /// # Errors
    /// When there is no such flag, or the text is not of its kind.
    pub fn set_flag(&mut self, flag: &str, text: &str) -> Result<()> {
        let wrong = |problem| Error::Setting { field: format!("--{flag}"), problem };
        let Some(setting) = flags::read(flag, text).map_err(wrong)? else { return Ok(()) };
        match setting {
            flags::Setting::Field(field, value) => value::set(&mut self.value, field.path, value),
            flags::Setting::Node(flag, text) => _ = self.node.insert(flag, text),
            flags::Setting::Notice(text) => self.notices.push(text),
        }
        Ok(())
    }

    /// Says that there is an API server: fields that need one count, and the upstream's defaults that one relies on.
    pub fn join_cluster(&mut self) {
        self.in_cluster = true;
    }

    /// A text of the document, where it is given.
    pub fn text(&self, path: &str) -> Option<&str> {
        value::at(&self.value, path)?.as_str()
    }

    /// What is to be said at start: unknown fields, fields without effect.
    ///
    /// # Errors
    /// A value of the wrong type, or one that berth refuses.
    pub fn check(&self) -> Result<Vec<String>> {
        let mut notices = self.notices.clone();
        let idle = self.node.keys().filter(|_| !self.in_cluster);
        notices.extend(idle.map(|flag| format!("flag --{flag} has no effect: there is no API server")));
        settings::check(&self.value, "", self.in_cluster, &mut notices)?;
        Ok(notices)
    }

    /// The whole configuration in effect, defaults filled in, for `/configz`.
    pub fn effective(&self) -> Value {
        fields::in_effect(&self.value)
    }

    /// Changes the configuration as the document says.
    ///
    /// # Errors
    /// A value that cannot be meant.
    pub fn apply(&self, config: &mut Config) -> Result<()> {
        settings::apply(&self.value, config)?;
        if self.in_cluster {
            settings::apply_in_cluster(&self.value, config);
        }
        node::apply(&self.value, &self.node, config)
    }
}

fn collect_drop_ins(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let failed = |source| Error::ReadFile { path: folder.to_owned(), source };
    let mut entries: Vec<PathBuf> =
        fs::read_dir(folder).map_err(failed)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>().map_err(failed)?;
    entries.sort();
    for path in entries {
        if fs::metadata(&path).map_err(|source| Error::ReadFile { path: path.clone(), source })?.is_dir() {
            collect_drop_ins(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "conf") {
            files.push(path);
        }
    }
    Ok(())
}

/// RFC 7386: objects merge key by key, null removes, everything else replaces.
fn merge_patch(target: &mut Map<String, Value>, patch: Map<String, Value>) {
    for (key, value) in patch {
        match value {
            Value::Null => _ = target.remove(&key),
            Value::Object(patch) => {
                let below = target.entry(key).or_insert_with(|| Value::Object(Map::new()));
                if !below.is_object() {
                    *below = Value::Object(Map::new());
                }
                if let Value::Object(below) = below {
                    merge_patch(below, patch);
                }
            }
            other => _ = target.insert(key, other),
        }
    }
}

#[cfg(test)]
mod tests;
