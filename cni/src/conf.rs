//! Network configurations: the folder, its files, lists of plugins.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::result::CniVersion;
use crate::{Error, Result};

/// One plugin of a list.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PluginConf {
    pub plugin: String,
    pub fields: Map<String, Value>,
}

impl PluginConf {
    /// Whether the plugin declares this capability.
    pub(crate) fn has_capability(&self, name: &str) -> bool {
        self.fields.get("capabilities").and_then(|c| c.get(name)).and_then(Value::as_bool).unwrap_or(false)
    }
}

/// A list of plugins: a network.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NetworkConf {
    pub name: String,
    pub version: CniVersion,
    pub disable_check: bool,
    pub disable_gc: bool,
    pub plugins: Vec<PluginConf>,
    /// The list as JSON, with everything that was read beside it: what is cached.
    pub bytes: Vec<u8>,
}

impl NetworkConf {
    /// Whether one of the plugins is told the limits of a pod's bandwidth.
    pub(crate) fn limits_bandwidth(&self) -> bool {
        self.plugins.iter().any(|plugin| plugin.has_capability("bandwidth"))
    }

    /// Reads a list, or a single plugin's configuration, which becomes a list of one. `beside` is the folder where plugins may be
    /// added to a list that allows it (`<folder>/<network>/*.conf`).
    pub(crate) fn parse(bytes: &[u8], what: &str, beside: Option<&Path>) -> Result<Self> {
        let list: Map<String, Value> = serde_json::from_slice(bytes).map_err(Error::decode(what))?;
        let mut list = if list.contains_key("plugins") || beside.is_some() && list.contains_key("loadOnlyInlinedPlugins") {
            list
        } else {
            single(list, what)?
        };
        let name = list.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
        check_network_name(&name, what)?;
        let version = version_of(&list, what)?;
        let flag = |name: &str| match list.get(name) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            // libcni takes the words too.
            Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
            Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
            Some(other) => Err(Error::invalid(what, format!("{name} is {other}, not a boolean"))),
        };
        let (disable_check, disable_gc, only_inlined) =
            (flag("disableCheck")?, flag("disableGC")?, flag("loadOnlyInlinedPlugins")?);
        let mut plugins = match list.get("plugins") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(plugins)) => plugins.clone(),
            Some(_) => return Err(Error::invalid(what, "plugins is not a list")),
        };
        if !only_inlined && let Some(folder) = beside {
            plugins.extend(plugins_beside(&folder.join(&name))?);
        }
        if plugins.is_empty() {
            return Err(Error::invalid(what, "no plugins in list"));
        }
        list.insert("plugins".to_owned(), Value::Array(plugins.clone()));
        list.insert("loadOnlyInlinedPlugins".to_owned(), Value::Bool(true));
        let plugins = plugins.into_iter().map(|plugin| plugin_conf(plugin, what)).collect::<Result<_>>()?;
        let bytes = serde_json::to_vec(&list).map_err(Error::decode(what))?;
        Ok(Self { name, version, disable_check, disable_gc, plugins, bytes })
    }
}

fn single(plugin: Map<String, Value>, what: &str) -> Result<Map<String, Value>> {
    if !plugin.contains_key("type") {
        return Err(Error::invalid(what, "neither a list of plugins nor a plugin (no type)"));
    }
    let mut list = Map::new();
    for key in ["cniVersion", "name"] {
        list.extend(plugin.get(key).map(|value| (key.to_owned(), value.clone())));
    }
    list.insert("plugins".to_owned(), Value::Array(vec![Value::Object(plugin)]));
    Ok(list)
}

fn plugin_conf(plugin: Value, what: &str) -> Result<PluginConf> {
    let Value::Object(fields) = plugin else {
        return Err(Error::invalid(what, "a plugin is not an object"));
    };
    let plugin = fields.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    if plugin.is_empty() || plugin.contains('/') || plugin.starts_with('.') {
        return Err(Error::invalid(what, format!("a plugin has the type {plugin:?}")));
    }
    Ok(PluginConf { plugin, fields })
}

/// The highest version that both sides speak.
fn version_of(list: &Map<String, Value>, what: &str) -> Result<CniVersion> {
    let one = list.get("cniVersion").and_then(Value::as_str).unwrap_or_default();
    let several = list.get("cniVersions").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let best = several.chain([one]).filter_map(|text| text.parse::<CniVersion>().ok()).max();
    best.ok_or_else(|| Error::Version { what: what.to_owned(), version: one.to_owned() })
}

fn check_network_name(name: &str, what: &str) -> Result<()> {
    let ok = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    if ok { Ok(()) } else { Err(Error::invalid(what, format!("invalid network name {name:?}"))) }
}

/// Files of a folder with one of the extensions, sorted by name.
fn files(folder: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::file("list", folder)(error)),
    };
    let wanted = |path: &PathBuf| path.extension().and_then(|e| e.to_str()).is_some_and(|e| extensions.contains(&e));
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(wanted).filter(|p| p.is_file()).collect();
    files.sort();
    Ok(files)
}

fn plugins_beside(folder: &Path) -> Result<Vec<Value>> {
    let read = |path: PathBuf| {
        let bytes = fs::read(&path).map_err(Error::file("read", &path))?;
        serde_json::from_slice(&bytes).map_err(Error::decode(path.display().to_string()))
    };
    files(folder, &["conf"])?.into_iter().map(read).collect()
}

const EXTENSIONS: [&str; 3] = ["conflist", "conf", "json"];

/// The folder as it was last looked at: path → (inode, size, mtime, ctime).
pub(crate) type Signature = BTreeMap<PathBuf, (u64, u64, i64, i64)>;

/// What has to change for the folder to be read again.
pub(crate) fn signature(folder: &Path) -> Signature {
    let mut signature = Signature::new();
    let mut add = |path: PathBuf| {
        if let Ok(metadata) = fs::metadata(&path) {
            let time = |seconds: i64, nanoseconds: i64| seconds.wrapping_mul(1_000_000_000).wrapping_add(nanoseconds);
            let times = (time(metadata.mtime(), metadata.mtime_nsec()), time(metadata.ctime(), metadata.ctime_nsec()));
            signature.insert(path, (metadata.ino(), metadata.size(), times.0, times.1));
        }
    };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()) {
        if entry.is_dir() {
            files(&entry, &["conf"]).unwrap_or_default().into_iter().for_each(&mut add);
        }
        add(entry);
    }
    signature
}

/// The configurations of a folder.
#[derive(Debug, Clone, Default)]
pub(crate) struct Loaded {
    /// The first file that is usable.
    pub network: Option<(PathBuf, NetworkConf)>,
    /// Files that are not.
    pub invalid: Vec<(PathBuf, String)>,
    /// Whether there was any file at all.
    pub any: bool,
}

/// Reads the folder. `check` refuses configurations that can be read but not be used.
pub(crate) fn load(folder: &Path, check: impl Fn(&NetworkConf) -> Result<()>) -> Loaded {
    let mut loaded = Loaded::default();
    let paths = match files(folder, &EXTENSIONS) {
        Ok(paths) => paths,
        Err(error) => {
            loaded.invalid.push((folder.to_owned(), error.chain_text()));
            loaded.any = true;
            return loaded;
        }
    };
    loaded.any = !paths.is_empty();
    for path in paths {
        let read = fs::read(&path).map_err(Error::file("read", &path));
        let parsed = read.and_then(|bytes| NetworkConf::parse(&bytes, &path.display().to_string(), Some(folder)));
        match parsed.and_then(|conf| check(&conf).map(|()| conf)) {
            Ok(conf) if loaded.network.is_none() => loaded.network = Some((path, conf)),
            Ok(_) => {}
            Err(error) => loaded.invalid.push((path, error.chain_text())),
        }
    }
    loaded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NetworkConf> {
        NetworkConf::parse(text.as_bytes(), "test", None)
    }

    #[test]
    fn a_list_and_a_single_plugin_are_read() {
        let list = parse(r#"{"cniVersion": "1.0.0", "name": "n", "disableCheck": "true", "plugins": [{"type": "a"}, {"type": "b", "capabilities": {"portMappings": true}}]}"#).unwrap();
        assert_eq!((list.plugins.len(), list.disable_check, list.disable_gc), (2, true, false));
        assert!(list.plugins[1].has_capability("portMappings"));
        assert!(!list.plugins[0].has_capability("portMappings"));
        let single = parse(r#"{"cniVersion": "0.3.1", "name": "n", "type": "a", "x": 1}"#).unwrap();
        assert_eq!((single.plugins[0].plugin.as_str(), single.version), ("a", CniVersion::V0_3_1));
        assert_eq!(parse(std::str::from_utf8(&single.bytes).unwrap()).unwrap(), single, "what is cached reads the same");
    }

    #[test]
    fn bandwidth_is_limited_by_a_plugin_that_declares_it() {
        let list = |capability: &str| {
            let text =
                r#"{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "a"}, {"type": "b", "capabilities": {"@": true}}]}"#;
            parse(&text.replace('@', capability)).unwrap().limits_bandwidth()
        };
        assert!(list("bandwidth"));
        assert!(!list("portMappings"));
    }

    #[test]
    fn what_cannot_be_used_is_refused() {
        for (text, code) in [
            ("{", 6),
            ("[]", 6),
            (r#"{"cniVersion": "0.2.0", "name": "n", "plugins": [{"type": "a"}]}"#, 1),
            (r#"{"name": "n", "plugins": [{"type": "a"}]}"#, 1),
            (r#"{"cniVersion": "1.0.0", "plugins": [{"type": "a"}]}"#, 7),
            (r#"{"cniVersion": "1.0.0", "name": "../n", "plugins": [{"type": "a"}]}"#, 7),
            (r#"{"cniVersion": "1.0.0", "name": "n", "plugins": []}"#, 7),
            (r#"{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "../a"}]}"#, 7),
            (r#"{"cniVersion": "1.0.0", "name": "n", "plugins": [{}]}"#, 7),
            (r#"{"cniVersion": "1.0.0", "name": "n"}"#, 7),
        ] {
            assert_eq!(parse(text).unwrap_err().cni_code(), code, "{text}");
        }
    }

    #[test]
    fn the_highest_common_version_is_chosen() {
        let conf = parse(
            r#"{"cniVersion": "0.4.0", "cniVersions": ["0.4.0", "1.1.0", "9.0.0"], "name": "n", "plugins": [{"type": "a"}]}"#,
        );
        assert_eq!(conf.unwrap().version, CniVersion::V1_1_0);
    }

    #[test]
    fn the_first_usable_file_wins_and_the_others_are_reported() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        assert!(!load(dir.path(), |_| Ok(())).any);
        write("05-broken.conflist", "{");
        write("10-b.conf", r#"{"cniVersion": "1.0.0", "name": "b", "type": "x"}"#);
        write("20-a.conflist", r#"{"cniVersion": "1.0.0", "name": "a", "plugins": [{"type": "x"}]}"#);
        write("00-readme.txt", "no");
        let before = signature(dir.path());
        let loaded = load(dir.path(), |_| Ok(()));
        assert_eq!(loaded.network.unwrap().1.name, "b");
        assert_eq!(loaded.invalid.len(), 1);
        let loaded = load(dir.path(), |conf| if conf.name == "b" { Err(Error::invalid("x", "y")) } else { Ok(()) });
        assert_eq!(loaded.network.unwrap().1.name, "a");
        assert_eq!(loaded.invalid.len(), 2);
        assert_eq!(signature(dir.path()), before);
        write("05-broken.conflist", "{}");
        assert_ne!(signature(dir.path()), before);
    }

    #[test]
    fn plugins_are_added_from_the_folder_named_like_the_network() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("n")).unwrap();
        fs::write(dir.path().join("n/10-x.conf"), r#"{"type": "extra"}"#).unwrap();
        let list = |only: &str| {
            format!(r#"{{"cniVersion": "1.1.0", "name": "n", "loadOnlyInlinedPlugins": {only}, "plugins": [{{"type": "a"}}]}}"#)
        };
        let parse = |text: String| NetworkConf::parse(text.as_bytes(), "test", Some(dir.path())).unwrap();
        assert_eq!(parse(list("false")).plugins.len(), 2);
        assert_eq!(parse(list("true")).plugins.len(), 1);
    }
}
