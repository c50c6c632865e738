//! Our plugins as programs: the standard protocol on environment, standard input and standard output.

mod environment;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::doing::Underway;
use crate::exec::PluginBinaries;
use crate::host::{Deletion, Host};
use crate::invocation::Verb;
use crate::kernel::{Kernel, Worker};
use crate::names::Names;
use crate::plugins::host_local::Owner;
use crate::plugins::{Builtin, Config};
use crate::result::CniVersion;
use crate::{Error, Result, records};
use environment::Environment;

/// The types that [`main`] knows.
pub const TYPES: [&str; 4] = ["bridge", "host-local", "loopback", "portmap"];

/// Where the reference plugins keep their leases.
const LEASES: &str = "/var/lib/cni/networks";
/// What the plugins of this machine remember until the next boot: the subnets of the NAT rules.
const STATE: &str = "/run/berth-cni";
const DELEGATE_TIMEOUT: Duration = Duration::from_secs(120);

/// Runs one command of a plugin and returns the exit code. The result, or the error as the protocol has it, goes to standard output.
pub fn main(plugin: &str) -> i32 {
    let outcome = run(plugin);
    let (text, code) = match outcome {
        Ok(None) => return 0,
        Ok(Some(value)) => (value.to_string(), 0),
        Err((version, error)) => {
            let details = error.chain_text();
            let msg = error.to_string();
            let details = details.strip_prefix(&msg).unwrap_or_default().trim_start_matches(": ").to_owned();
            (json!({"cniVersion": version, "code": error.cni_code(), "msg": msg, "details": details}).to_string(), 1)
        }
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => code,
        Err(_) => 1,
    }
}

type Failed = (String, Error);

fn run(plugin: &str) -> Result<Option<Value>, Failed> {
    let newest = CniVersion::V1_1_0.name().to_owned();
    let builtin = Builtin::of(plugin).ok_or_else(|| Error::invalid(plugin, format!("known types are {}", TYPES.join(", "))));
    let builtin = builtin.map_err(|e| (newest.clone(), e))?;
    let verb = environment::verb().map_err(|e| (newest.clone(), e))?;
    let mut input = Vec::new();
    std::io::stdin()
        .read_to_end(&mut input)
        .map_err(|e| (newest.clone(), Error::file("read", Path::new("standard input"))(e)))?;
    if verb == Verb::Version {
        return Ok(Some(versions(&input)));
    }
    let config: Config =
        serde_json::from_slice(&input).map_err(|e| (newest.clone(), Error::decode("network configuration")(e)))?;
    let version = config.get("cniVersion").and_then(Value::as_str).unwrap_or_default().to_owned();
    let parsed = version.parse::<CniVersion>().ok().filter(|parsed| speaks(*parsed, verb));
    let Some(parsed) = parsed else {
        return Err((newest, Error::Version { what: "network configuration".to_owned(), version }));
    };
    let ran = Environment::read(verb).and_then(|environment| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(Error::file("start", Path::new("the event loop")))?;
        runtime.block_on(command(builtin, verb, &environment, &config, parsed))
    });
    ran.map_err(|error| (version, error))
}

fn speaks(version: CniVersion, verb: Verb) -> bool {
    match verb {
        Verb::Check => version.has_check(),
        Verb::Status | Verb::Gc => version.has_status_and_gc(),
        Verb::Add | Verb::Del | Verb::Version => true,
    }
}

fn versions(input: &[u8]) -> Value {
    let asked = serde_json::from_slice::<Config>(input).ok();
    let asked = asked.and_then(|c| c.get("cniVersion").and_then(Value::as_str).map(str::to_owned));
    json!({
        "cniVersion": asked.unwrap_or_else(|| CniVersion::V1_1_0.name().to_owned()),
        "supportedVersions": CniVersion::ALL.map(CniVersion::name),
    })
}

async fn command(
    builtin: Builtin,
    verb: Verb,
    environment: &Environment,
    config: &Config,
    version: CniVersion,
) -> Result<Option<Value>> {
    let state = PathBuf::from(STATE);
    let _alone = environment::lock(&state)?;
    let boot_id = records::boot_id()?;
    let host = host(environment, &state, boot_id)?;
    match (verb, &environment.invocation) {
        (Verb::Add, Some(invocation)) => match builtin.add(&host, invocation, config).await {
            Ok(result) => Ok(Some(result.to_json(version))),
            Err(error) => {
                // The caller will send DEL too, but may die before it does. The first error counts.
                let _ = builtin.delete(&host, invocation, config).await;
                Err(error)
            }
        },
        (Verb::Del, Some(invocation)) => builtin.delete(&host, invocation, config).await.map(|()| None),
        (Verb::Check, Some(invocation)) => builtin.check(&host, invocation, config).await.map(|()| None),
        (Verb::Gc, _) => builtin.collect(&host, config, &valid_attachments(config)?).await.map(|()| None),
        _ => builtin.check_config(config, &host.lease_dir).map(|()| None),
    }
}

fn host(environment: &Environment, state: &Path, boot_id: String) -> Result<Host> {
    let names = Names::of_plugins();
    let mark = state.join("boot_id");
    if std::fs::read_to_string(&mark).ok().as_deref() != Some(&boot_id) {
        records::remove(&state.join("nat.json"))?;
        std::fs::write(&mark, &boot_id).map_err(Error::file("write", &mark))?;
    }
    let kernel = Kernel::open(&names.table, state.join("nat.json"))?;
    Ok(Host {
        worker: Worker::spawn(kernel)?,
        names,
        binaries: PluginBinaries { dirs: environment.path.clone(), timeout: DELEGATE_TIMEOUT },
        deletion: Deletion::AtOnce,
        lease_dir: PathBuf::from(LEASES),
        boot_id,
        doing: Underway::default(),
    })
}

#[derive(Debug, Deserialize)]
struct ValidAttachment {
    #[serde(rename = "containerID")]
    container_id: String,
    ifname: String,
}

/// Who may keep what it has. A configuration that does not say is refused: it would mean nobody.
fn valid_attachments(config: &Config) -> Result<BTreeSet<Owner>> {
    let listed = config.get("cni.dev/valid-attachments").or_else(|| config.get("cni.dev/attachments"));
    let listed = listed.cloned().ok_or_else(|| Error::invalid("GC", "cni.dev/valid-attachments is missing"))?;
    let listed: Vec<ValidAttachment> = serde_json::from_value(listed).map_err(Error::decode("cni.dev/valid-attachments"))?;
    Ok(listed.into_iter().map(|v| Owner { container_id: v.container_id, ifname: v.ifname }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_known() {
        assert_eq!(TYPES.map(|t| Builtin::of(t).map(Builtin::name)), TYPES.map(Some));
    }

    #[test]
    fn version_repeats_what_was_asked() {
        assert_eq!(versions(br#"{"cniVersion":"0.4.0"}"#)["cniVersion"], "0.4.0");
        assert_eq!(versions(b"")["cniVersion"], "1.1.0");
        assert_eq!(versions(b"")["supportedVersions"][0], "0.3.0");
    }

    #[test]
    fn gc_without_a_list_is_refused() {
        assert!(valid_attachments(&Config::new()).is_err());
        let config = json!({"cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}]});
        assert_eq!(valid_attachments(config.as_object().unwrap()).unwrap().len(), 1);
    }

    #[test]
    fn verbs_need_their_version() {
        assert!(!speaks(CniVersion::V0_3_1, Verb::Check));
        assert!(!speaks(CniVersion::V1_0_0, Verb::Gc));
        assert!(speaks(CniVersion::V0_3_0, Verb::Add));
    }
}
