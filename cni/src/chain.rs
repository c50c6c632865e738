//! Runs the plugins of a network in order, each with the result of the one before; undoes them in reverse.

use std::collections::BTreeSet;
use std::time::Instant;

use serde_json::{Map, Value, json};

use crate::conf::{NetworkConf, PluginConf};
use crate::doing::{Call, Doing};
use crate::host::Host;
use crate::invocation::{Invocation, Verb};
use crate::plugins::host_local::Owner;
use crate::plugins::{Builtin, Config};
use crate::result::{CniResult, CniVersion};
use crate::{Error, Result};

/// Who runs a plugin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Runner {
    Builtin(Builtin),
    External(String),
}

impl Runner {
    /// A plugin of ours runs in this process, unless binaries are preferred and one is there.
    pub(crate) fn of(plugin: &PluginConf, host: &Host, prefer_external: bool) -> Self {
        match Builtin::of(&plugin.plugin) {
            Some(builtin) if !prefer_external || host.binaries.find(&plugin.plugin).is_none() => Self::Builtin(builtin),
            _ => Self::External(plugin.plugin.clone()),
        }
    }
}

/// A network's plugins with their surroundings.
#[derive(Debug)]
pub(crate) struct Chain<'a> {
    pub host: &'a Host,
    pub conf: &'a NetworkConf,
    pub prefer_external: bool,
}

impl Chain<'_> {
    fn runners(&self) -> impl DoubleEndedIterator<Item = (&PluginConf, Runner)> {
        self.conf.plugins.iter().map(|plugin| (plugin, Runner::of(plugin, self.host, self.prefer_external)))
    }

    /// Whether a plugin binary takes part, be it for addresses alone.
    pub(crate) fn has_external(&self) -> bool {
        let external_ipam = |plugin: &PluginConf| {
            let ipam = plugin.fields.get("ipam").and_then(|i| i.get("type")).and_then(Value::as_str).unwrap_or_default();
            !ipam.is_empty() && ipam != "host-local"
        };
        self.runners().any(|(plugin, runner)| matches!(runner, Runner::External(_)) || external_ipam(plugin))
    }

    /// Whether this plugin of ours takes part, run by this process.
    pub(crate) fn runs(&self, builtin: Builtin) -> bool {
        self.runners().any(|(_, runner)| runner == Runner::Builtin(builtin))
    }

    /// Refuses what cannot work: fields that our plugins do not support.
    pub(crate) fn check_config(&self) -> Result<()> {
        for (plugin, runner) in self.runners() {
            if let Runner::Builtin(builtin) = runner {
                builtin.check_config(&self.config(plugin, &Map::new(), None), &self.host.lease_dir)?;
            }
        }
        Ok(())
    }

    /// The first plugin binary that is missing.
    pub(crate) fn missing_binary(&self) -> Option<Error> {
        self.runners().find_map(|(_, runner)| match runner {
            Runner::External(plugin) if self.host.binaries.find(&plugin).is_none() => {
                Some(Error::PluginNotFound { plugin, path: self.host.binaries.dirs.clone() })
            }
            _ => None,
        })
    }

    /// A plugin's complete configuration: with the list's name and version, the capabilities that it declares, the previous result.
    fn config(&self, plugin: &PluginConf, capabilities: &Config, previous: Option<&Value>) -> Config {
        let mut config = plugin.fields.clone();
        config.insert("name".to_owned(), json!(self.conf.name));
        config.insert("cniVersion".to_owned(), json!(self.conf.version.name()));
        let wanted: Config =
            capabilities.iter().filter(|(name, _)| plugin.has_capability(name)).map(|(n, v)| (n.clone(), v.clone())).collect();
        if !wanted.is_empty() {
            config.insert("runtimeConfig".to_owned(), Value::Object(wanted));
        }
        if let Some(previous) = previous {
            config.insert("prevResult".to_owned(), previous.clone());
        }
        config
    }

    /// Puts a call on record for those who ask.
    fn begin(&self, runner: &Runner, plugin: &PluginConf, verb: Verb, invocation: &Invocation) -> Call {
        let in_process = matches!(runner, Runner::Builtin(_));
        let doing = Doing {
            plugin: plugin.plugin.clone(),
            network: self.conf.name.clone(),
            verb: verb.name(),
            in_process,
            since: Instant::now(),
            limit: (!in_process).then_some(self.host.binaries.timeout),
        };
        self.host.doing.begin(&invocation.container_id, doing)
    }

    async fn call(&self, plugin: &str, verb: Verb, invocation: Option<&Invocation>, config: Config) -> Result<Vec<u8>> {
        self.host.binaries.call(plugin, verb, invocation, &Value::Object(config)).await
    }

    /// ADD of every plugin. What was done when it fails is for [`Chain::delete`].
    pub(crate) async fn add(&self, invocation: &Invocation, capabilities: &Config) -> Result<CniResult> {
        let mut result: Option<CniResult> = None;
        for (plugin, runner) in self.runners() {
            let previous = result.as_ref().map(|result| result.to_json(self.conf.version));
            let config = self.config(plugin, capabilities, previous.as_ref());
            let _call = self.begin(&runner, plugin, Verb::Add, invocation);
            result = match runner {
                Runner::Builtin(builtin) => Some(builtin.add(self.host, invocation, &config).await?),
                Runner::External(name) => {
                    let output = self.call(&name, Verb::Add, Some(invocation), config).await?;
                    let what = format!("result of {name}");
                    let value = serde_json::from_slice(&output).map_err(Error::decode(what.clone()))?;
                    Some(CniResult::parse(&value, self.conf.version, &what)?)
                }
            };
        }
        Ok(result.unwrap_or_default())
    }

    /// DEL of every plugin in reverse, also after one has failed; the first error counts.
    pub(crate) async fn delete(&self, invocation: &Invocation, capabilities: &Config, previous: Option<&Value>) -> Result<()> {
        let previous = previous.filter(|value| !value.is_null() && self.conf.version >= CniVersion::V0_4_0);
        let mut outcome = Ok(());
        for (plugin, runner) in self.runners().rev() {
            let config = self.config(plugin, capabilities, previous);
            let _call = self.begin(&runner, plugin, Verb::Del, invocation);
            let deleted = match runner {
                Runner::Builtin(builtin) => builtin.delete(self.host, invocation, &config).await,
                Runner::External(name) => self.call(&name, Verb::Del, Some(invocation), config).await.map(drop),
            };
            outcome = outcome.and(deleted);
        }
        outcome
    }

    /// CHECK of every plugin.
    pub(crate) async fn check(&self, invocation: &Invocation, capabilities: &Config, previous: &Value) -> Result<()> {
        if self.conf.disable_check || !self.conf.version.has_check() {
            return Ok(());
        }
        for (plugin, runner) in self.runners() {
            let config = self.config(plugin, capabilities, Some(previous));
            match runner {
                Runner::Builtin(builtin) => builtin.check(self.host, invocation, &config).await?,
                Runner::External(name) => drop(self.call(&name, Verb::Check, Some(invocation), config).await?),
            }
        }
        Ok(())
    }

    /// STATUS of the plugin binaries. Our own plugins are always ready.
    pub(crate) async fn status(&self) -> Result<()> {
        if let Some(error) = self.missing_binary() {
            return Err(error);
        }
        if !self.conf.version.has_status_and_gc() {
            return Ok(());
        }
        for (plugin, runner) in self.runners() {
            if let Runner::External(name) = runner {
                self.call(&name, Verb::Status, None, self.config(plugin, &Map::new(), None)).await?;
            }
        }
        Ok(())
    }

    /// GC of every plugin: what belongs to no valid attachment goes. All are called; the first error counts.
    pub(crate) async fn collect(&self, valid: &BTreeSet<Owner>) -> Result<()> {
        let attachments: Vec<Value> = valid.iter().map(|o| json!({"containerID": o.container_id, "ifname": o.ifname})).collect();
        let speaks_gc = self.conf.version.has_status_and_gc() && !self.conf.disable_gc;
        let mut outcome = Ok(());
        for (plugin, runner) in self.runners() {
            let mut config = self.config(plugin, &Map::new(), None);
            let collected = match runner {
                Runner::Builtin(builtin) => builtin.collect(self.host, &config, valid).await,
                Runner::External(name) if speaks_gc => {
                    // Both spellings: the specification's, and the one of libcni's first release.
                    config.insert("cni.dev/valid-attachments".to_owned(), json!(attachments));
                    config.insert("cni.dev/attachments".to_owned(), json!(attachments));
                    self.call(&name, Verb::Gc, None, config).await.map(drop)
                }
                Runner::External(_) => Ok(()),
            };
            outcome = outcome.and(collected);
        }
        outcome
    }
}
