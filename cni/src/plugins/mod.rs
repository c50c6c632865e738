//! Our own plugins. Each is called with the protocol's parameters and its complete configuration, in this process or by
//! [`crate::plugin::main`].

pub(crate) mod bridge;
pub(crate) mod fields;
pub(crate) mod host_local;
pub(crate) mod loopback;
pub(crate) mod portmap;

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::host::Host;
use crate::invocation::Invocation;
use crate::result::{CniResult, CniVersion};
use crate::{Error, Result};

use host_local::{HostLocal, Owner};

/// A plugin's complete configuration.
pub(crate) type Config = Map<String, Value>;

/// A plugin that is part of this program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Builtin {
    Bridge,
    HostLocal,
    Loopback,
    Portmap,
}

impl Builtin {
    pub(crate) const ALL: [Self; 4] = [Self::Bridge, Self::HostLocal, Self::Loopback, Self::Portmap];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::HostLocal => "host-local",
            Self::Loopback => "loopback",
            Self::Portmap => "portmap",
        }
    }

    /// The plugin of this type.
    pub(crate) fn of(plugin: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|builtin| builtin.name() == plugin)
    }

    /// Refuses a configuration by its first field that is not supported.
    pub(crate) fn check_config(self, config: &Config, lease_dir: &std::path::Path) -> Result<()> {
        match self {
            Self::Bridge => bridge::Bridge::parse(config, lease_dir).map(drop),
            Self::HostLocal => HostLocal::parse(config, lease_dir).map(drop),
            Self::Loopback => loopback::check_config(config),
            Self::Portmap => portmap::Portmap::parse(config).map(drop),
        }
    }

    pub(crate) async fn add(self, host: &Host, invocation: &Invocation, config: &Config) -> Result<CniResult> {
        match self {
            Self::Bridge => bridge::add(host, invocation, config).await,
            Self::HostLocal => {
                // The protocol allows a repeated ADD to fail, and a caller in this process never repeats.
                let repeated = !host.is_agent();
                HostLocal::parse(config, &host.lease_dir)?.add(&invocation.owner(), &host.boot_id, repeated)
            }
            Self::Loopback => loopback::add(host, invocation, config).await,
            Self::Portmap => portmap::add(host, invocation, config).await,
        }
    }

    pub(crate) async fn delete(self, host: &Host, invocation: &Invocation, config: &Config) -> Result<()> {
        match self {
            Self::Bridge => bridge::delete(host, invocation, config).await,
            Self::HostLocal => HostLocal::parse(config, &host.lease_dir)?.delete(&invocation.owner(), &host.boot_id),
            Self::Loopback => Ok(()),
            Self::Portmap => portmap::delete(host, invocation, config).await,
        }
    }

    pub(crate) async fn check(self, host: &Host, invocation: &Invocation, config: &Config) -> Result<()> {
        match self {
            Self::Bridge => bridge::check(host, invocation, config).await,
            Self::HostLocal => HostLocal::parse(config, &host.lease_dir)?.check(&invocation.owner(), &host.boot_id),
            Self::Loopback => loopback::check(host, invocation).await,
            Self::Portmap => portmap::check(host, invocation, config).await,
        }
    }

    /// Removes what belongs to no valid attachment.
    pub(crate) async fn collect(self, host: &Host, config: &Config, valid: &BTreeSet<Owner>) -> Result<()> {
        match self {
            Self::Bridge => bridge::collect(host, config, valid).await,
            Self::HostLocal => HostLocal::parse(config, &host.lease_dir)?.collect(valid, &host.boot_id),
            Self::Loopback => Ok(()),
            Self::Portmap => portmap::collect(host, valid).await,
        }
    }
}

/// The result of the plugin before, which the chain puts into the configuration.
pub(crate) fn previous_result(config: &Config) -> Result<Option<CniResult>> {
    match config.get("prevResult") {
        None | Some(Value::Null) => Ok(None),
        Some(value) => CniResult::parse(value, CniVersion::V1_1_0, "prevResult").map(Some),
    }
}

/// As [`previous_result`], for plugins that cannot be the first.
pub(crate) fn required_previous_result(plugin: &str, config: &Config) -> Result<CniResult> {
    previous_result(config)?.ok_or_else(|| Error::invalid(plugin, "must be called as a chained plugin (no prevResult)"))
}
