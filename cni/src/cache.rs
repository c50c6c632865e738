//! Cached results in libcni's format and folder layout: what DEL and CHECK are given, also after the configuration has changed.

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Error, Result, records};

const KIND: &str = "cniCacheV1";

/// What is kept of one attachment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CachedResult {
    kind: String,
    pub container_id: String,
    /// The configuration list's bytes, base64.
    config: String,
    pub if_name: String,
    pub network_name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<PathBuf>,
    #[serde(default)]
    pub cni_args: Vec<(String, String)>,
    #[serde(default)]
    pub capability_args: Map<String, Value>,
    #[serde(default)]
    pub result: Value,
}

impl CachedResult {
    pub(crate) fn new(container_id: &str, if_name: &str, network_name: &str, config: &[u8]) -> Self {
        Self {
            kind: KIND.to_owned(),
            container_id: container_id.to_owned(),
            config: STANDARD.encode(config),
            if_name: if_name.to_owned(),
            network_name: network_name.to_owned(),
            netns: None,
            cni_args: Vec::new(),
            capability_args: Map::new(),
            result: Value::Null,
        }
    }

    /// The configuration list's bytes.
    pub(crate) fn config_bytes(&self) -> Result<Vec<u8>> {
        let invalid = || Error::invalid("cached result", format!("config of {} is not base64", self.container_id));
        STANDARD.decode(&self.config).map_err(|_| invalid())
    }

    /// Whether it stands for what a failed attachment could not undo, and not for an attachment.
    pub(crate) fn is_undo(&self) -> bool {
        self.result.is_null()
    }

    fn file_name(&self) -> String {
        format!("{}-{}-{}", self.network_name, self.container_id, self.if_name)
    }
}

/// Two folders: one for chains that this process alone runs, which die with the boot, and one for chains with external plugins,
/// whose state on disk may have to be undone after it.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    volatile: PathBuf,
    lasting: PathBuf,
}

impl Cache {
    pub(crate) fn new(state_dir: &Path, cache_dir: &Path) -> Self {
        Self { volatile: state_dir.join("results"), lasting: cache_dir.join("results") }
    }

    pub(crate) fn write(&self, cached: &CachedResult, lasting: bool) -> Result<()> {
        let folder = if lasting { &self.lasting } else { &self.volatile };
        records::write(&folder.join(cached.file_name()), cached)
    }

    /// The cached result of a container's interface, in whatever network.
    pub(crate) fn find(&self, container_id: &str, if_name: &str) -> Result<Option<CachedResult>> {
        let suffix = format!("-{container_id}-{if_name}");
        for folder in [&self.volatile, &self.lasting] {
            let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
            for path in entries.map(|e| e.path()).filter(|p| p.to_string_lossy().ends_with(&suffix)) {
                let cached: Option<CachedResult> = records::read(&path)?;
                if let Some(cached) = cached.filter(|c| c.container_id == container_id && c.if_name == if_name) {
                    return Ok(Some(cached));
                }
            }
        }
        Ok(None)
    }

    pub(crate) fn remove(&self, cached: &CachedResult) -> Result<()> {
        records::remove(&self.volatile.join(cached.file_name()))?;
        records::remove(&self.lasting.join(cached.file_name()))
    }

    /// All of ours. The lasting folder may be shared with other users of libcni: only what `is_ours` says is listed from there.
    pub(crate) fn list(&self, is_ours: impl Fn(&CachedResult) -> bool) -> Result<Vec<CachedResult>> {
        let mut all: Vec<CachedResult> = records::list(&self.volatile)?;
        all.extend(self.list_lasting(is_ours)?);
        Ok(all)
    }

    /// Those of ours that outlive the boot.
    pub(crate) fn list_lasting(&self, is_ours: impl Fn(&CachedResult) -> bool) -> Result<Vec<CachedResult>> {
        Ok(records::list::<CachedResult>(&self.lasting)?.into_iter().filter(is_ours).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_found_by_container_in_either_folder() {
        let (state, lasting) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let cache = Cache::new(state.path(), lasting.path());
        let mut cached = CachedResult::new("abc", "eth0", "net-a", b"{}");
        cached.cni_args.push(("K8S_POD_NAME".into(), "web".into()));
        assert_eq!(cache.find("abc", "eth0").unwrap(), None);
        for is_lasting in [true, false] {
            cache.write(&cached, is_lasting).unwrap();
            assert_eq!(cache.find("abc", "eth0").unwrap().as_ref(), Some(&cached));
            assert_eq!(cache.find("bc", "eth0").unwrap(), None);
            assert_eq!(cache.list(|_| true).unwrap().len(), 1);
            cache.remove(&cached).unwrap();
            cache.remove(&cached).unwrap();
            assert_eq!(cache.find("abc", "eth0").unwrap(), None);
        }
        assert_eq!(cached.config_bytes().unwrap(), b"{}");
        let text = serde_json::to_value(&cached).unwrap();
        assert_eq!(text["cniArgs"][0][0], "K8S_POD_NAME");
        assert_eq!(text["kind"], "cniCacheV1");
    }
}
