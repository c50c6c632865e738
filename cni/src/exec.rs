//! External plugins: a process with the protocol's environment, the configuration on its standard input, and a deadline.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::invocation::{Invocation, Verb};
use crate::{Error, Result};

/// How much a plugin may say on its standard output: a result of thousands of addresses and routes is far below it.
const MAX_OUTPUT: u64 = 1 << 20;
/// How much of its standard error is kept; the rest is read and dropped.
const MAX_STDERR: u64 = 64 << 10;
/// How much of a plugin's words an error repeats: it travels in a header, of which clients take 8 KiB or more.
const MAX_WORDS: usize = 4 << 10;

/// The last pause for a program that is still being written, of 20 ms doubled each time: about 5 s in all.
const LONGEST_PAUSE: Duration = Duration::from_millis(2560);

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
        let child = self.spawn_when_written(&path, plugin, verb, invocation).await?.map_err(failed)?;
        let output = match tokio::time::timeout(self.timeout, exchange(child, &input)).await {
            Ok(output) => output.map_err(failed)?,
            Err(_) => {
                let network = config.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
                return Err(Error::PluginTimeout { plugin: plugin.to_owned(), network, verb: verb.name(), limit: self.timeout });
            }
        };
        if output.status.success() { Ok(output.stdout) } else { Err(failure(plugin, verb, &output)) }
    }

    /// A program that somebody still writes, as a network's DaemonSet copies its plugins into place, cannot be executed (ETXTBSY):
    /// it is tried again for some seconds, as libcni does.
    async fn spawn_when_written(
        &self,
        path: &Path,
        plugin: &str,
        verb: Verb,
        invocation: Option<&Invocation>,
    ) -> Result<std::io::Result<Child>> {
        let mut pause = Duration::from_millis(20);
        loop {
            match self.spawn(path, plugin, verb, invocation)? {
                Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy && pause <= LONGEST_PAUSE => {
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                result => return Ok(result),
            }
        }
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

/// The process group of a plugin that has not ended; dropped, it is killed, with the IPAM plugins in it.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // Gone already is as good.
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

/// Gives a plugin its input and hears it to its end. Given up, or failed, it leaves no process of the plugin's.
async fn exchange(mut child: Child, input: &[u8]) -> std::io::Result<Output> {
    // Dropped before the child, which was made the leader of its group and has not been waited for: the number is still its own.
    let mut group = Group(child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw));
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
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
    let (_, stdout, stderr) = tokio::try_join!(write, whole(stdout), beginning(stderr))?;
    let status = child.wait().await?;
    group.0 = None;
    Ok(Output { status, stdout, stderr })
}

/// What a plugin says, which must not be endless.
async fn whole(from: Option<impl AsyncRead + Unpin>) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let Some(from) = from else { return Ok(text) };
    from.take(MAX_OUTPUT + 1).read_to_end(&mut text).await?;
    if text.len() as u64 > MAX_OUTPUT {
        let reason = format!("it wrote more than {MAX_OUTPUT} bytes on its standard output and was killed");
        return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, reason));
    }
    Ok(text)
}

/// The beginning of what a plugin says; the rest is heard too, so that it does not wait for a reader.
async fn beginning(from: Option<impl AsyncRead + Unpin>) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let Some(mut from) = from else { return Ok(text) };
    (&mut from).take(MAX_STDERR).read_to_end(&mut text).await?;
    tokio::io::copy(&mut from, &mut tokio::io::sink()).await?;
    Ok(text)
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
    Error::PluginFailed { plugin: plugin.to_owned(), verb: verb.name(), code: error.code, message: shortened(message) }
}

fn shortened(mut text: String) -> String {
    if text.len() > MAX_WORDS {
        text.truncate(text.floor_char_boundary(MAX_WORDS));
        text.push_str(" ...");
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Runs a script as the plugin `p`.
    async fn run(script: &str) -> Result<Vec<u8>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p");
        berth_testkit::write_program(&path, &format!("#!/bin/sh\n{script}\n"));
        let binaries = PluginBinaries { dirs: vec![dir.path().to_owned()], timeout: Duration::from_secs(30) };
        binaries.call("p", Verb::Version, None, &json!({"name": "net"})).await
    }

    #[tokio::test]
    async fn a_plugin_that_writes_without_end_is_killed_with_what_it_started_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {}\ncat /dev/zero", file.display());
        let error = run(&script).await.unwrap_err();
        let text = error.chain_text();
        assert!(text.contains("\"p\"") && text.contains("more than 1048576 bytes"), "{text}");
        let pid = std::fs::read_to_string(file).unwrap();
        // A zombie has no command line.
        let gone = || std::fs::read(format!("/proc/{}/cmdline", pid.trim())).unwrap_or_default().is_empty();
        assert!(berth_testkit::wait_until(Duration::from_secs(10), gone));
    }

    #[tokio::test]
    async fn a_plugin_that_is_still_being_written_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p");
        berth_testkit::write_program(&path, "#!/bin/sh\necho said\n");
        let writer = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        let binaries = PluginBinaries { dirs: vec![dir.path().to_owned()], timeout: Duration::from_secs(30) };
        let config = json!({"name": "net"});
        let mut writer = Some(writer);
        // The call comes first, finds it busy and waits; only then is the writer done.
        let (said, ()) = tokio::join!(binaries.call("p", Verb::Version, None, &config), async {
            let busy = Command::new(&path).spawn().unwrap_err();
            assert_eq!(busy.kind(), std::io::ErrorKind::ExecutableFileBusy);
            drop(writer.take());
        });
        assert_eq!(said.unwrap(), b"said\n");
    }

    #[tokio::test]
    async fn what_a_plugin_says_is_heard_whole_and_its_complaints_do_not_make_it_wait() {
        let said = run("head -c 1000000 /dev/zero >&2; head -c 1000000 /dev/zero").await.unwrap();
        assert_eq!(said.len(), 1_000_000);
    }

    #[tokio::test]
    async fn an_error_repeats_only_the_beginning_of_a_plugins_words() {
        let error = run("head -c 100000 /dev/zero | tr '\\0' x >&2; exit 1").await.unwrap_err();
        let Error::PluginFailed { message, .. } = error else { panic!("{error}") };
        assert_eq!(message, format!("{} ...", "x".repeat(MAX_WORDS)));
    }
}
