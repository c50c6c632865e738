//! External plugins: a process with the protocol's environment, the configuration on its standard input, and a deadline.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

use crate::invocation::{Invocation, Verb};
use crate::{Error, Result};

/// Where plugin binaries are looked for, and how long one may run.
#[derive(Debug, Clone)]
pub(crate) struct PluginBinaries {
    pub dirs: Vec<PathBuf>,
    pub timeout: Duration,
}

#[derive(Debug, Default, Deserialize)]
struct ErrorOutput {
    #[serde(default)]
    code: u32,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

impl PluginBinaries {
    /// The first executable file of that name; none if there is none.
    pub(crate) fn find(&self, plugin: &str) -> Option<PathBuf> {
        if plugin.is_empty() || plugin.contains('/') || plugin.starts_with('.') {
            return None;
        }
        let is_executable =
            |path: &PathBuf| std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
        self.dirs.iter().map(|dir| dir.join(plugin)).find(is_executable)
    }

    fn path_text(&self) -> OsString {
        let mut text = OsString::new();
        for (at, dir) in self.dirs.iter().enumerate() {
            if at > 0 {
                text.push(":");
            }
            text.push(dir);
        }
        text
    }

    /// Runs a plugin; its standard output, which is empty for verbs without a result.
    pub(crate) async fn call(
        &self,
        plugin: &str,
        verb: Verb,
        invocation: Option<&Invocation>,
        config: &Value,
    ) -> Result<Vec<u8>> {
        let path =
            self.find(plugin).ok_or_else(|| Error::PluginNotFound { plugin: plugin.to_owned(), path: self.dirs.clone() })?;
        let input = serde_json::to_vec(config).map_err(Error::decode(format!("configuration of {plugin}")))?;
        let failed = |source| Error::PluginRun { plugin: plugin.to_owned(), verb: verb.name(), source: Arc::new(source) };
        let child = self.spawn(&path, plugin, verb, invocation)?.map_err(failed)?;
        let group = child.id();
        let output = match tokio::time::timeout(self.timeout, exchange(child, &input)).await {
            Ok(output) => output.map_err(failed)?,
            Err(_) => {
                kill_group(group);
                let network = config.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
                return Err(Error::PluginTimeout { plugin: plugin.to_owned(), network, verb: verb.name(), limit: self.timeout });
            }
        };
        if output.status.success() { Ok(output.stdout) } else { Err(failure(plugin, verb, &output)) }
    }

    fn spawn(&self, path: &Path, plugin: &str, verb: Verb, invocation: Option<&Invocation>) -> Result<std::io::Result<Child>> {
        let mut command = Command::new(path);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A group of its own, so that the IPAM plugins that it runs die with it.
            .process_group(0)
            .kill_on_drop(true)
            .env("CNI_COMMAND", verb.name())
            .env("CNI_PATH", self.path_text());
        for variable in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_NETNS_OVERRIDE"] {
            command.env_remove(variable);
        }
        if let Some(invocation) = invocation {
            let needs_netns = matches!(verb, Verb::Add | Verb::Check);
            if needs_netns && invocation.netns_path.is_none() {
                return Err(Error::NetnsPathMissing { plugin: plugin.to_owned() });
            }
            command
                .env("CNI_CONTAINERID", &invocation.container_id)
                .env("CNI_IFNAME", &invocation.ifname)
                .env("CNI_NETNS", invocation.netns_path.clone().unwrap_or_default())
                .env("CNI_ARGS", invocation.args_text());
        }
        Ok(command.spawn())
    }
}

async fn exchange(mut child: Child, input: &[u8]) -> std::io::Result<Output> {
    let stdin = child.stdin.take();
    let write = async {
        match stdin {
            // A plugin that ends without reading its input says why on its output.
            Some(mut stdin) => match stdin.write_all(input).await {
                Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error),
                _ => Ok(()),
            },
            None => Ok(()),
        }
    };
    let (written, output) = tokio::join!(write, child.wait_with_output());
    written.and(output)
}

/// The child was made the leader of its group and has not been waited for, so the number is still its own.
fn kill_group(leader: Option<u32>) {
    let leader = leader.and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw);
    if let Some(leader) = leader {
        // Gone already is as good.
        let _ = rustix::process::kill_process_group(leader, rustix::process::Signal::KILL);
    }
}

fn failure(plugin: &str, verb: Verb, output: &Output) -> Error {
    let error = serde_json::from_slice::<ErrorOutput>(&output.stdout).unwrap_or_default();
    let message = match (error.msg.is_empty(), error.details.is_empty()) {
        (false, true) => error.msg,
        (false, false) => format!("{}; {}", error.msg, error.details),
        (true, _) => {
            let stderr = String::from_utf8_lossy(&output.stderr);
            let stdout = String::from_utf8_lossy(&output.stdout);
            let text = [stdout.trim(), stderr.trim()].into_iter().filter(|t| !t.is_empty()).collect::<Vec<_>>().join("; ");
            if text.is_empty() { format!("no error message ({})", output.status) } else { text }
        }
    };
    Error::PluginFailed { plugin: plugin.to_owned(), verb: verb.name(), code: error.code, message }
}
