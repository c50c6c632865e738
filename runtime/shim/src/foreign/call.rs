//! One call of a foreign runtime's program: its streams, its log, its deadline. Knows no container.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::Duration;

use berth_linux::Pid;
use berth_linux::pidfd::PidFd;
use berth_linux::process::{Executable, Spawn, spawn_exec};
use rustix::fs::MemfdFlags;
use serde::Deserialize;

use super::{Error, Instance};
use crate::tree;

/// Killed processes get this long to be gone before the caller goes on without them.
const DEATH: Duration = Duration::from_secs(5);
/// The longest part of a log or of error output that is looked at.
const MAX_TEXT: u64 = 64 << 10;
/// What a program finds others by.
const PATH: &std::ffi::CStr = c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Standard streams of a call.
pub(super) struct Stdio(Option<[OwnedFd; 3]>);

impl Stdio {
    /// Nothing to read, and what is written is only looked at when the call fails.
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// A container's.
    pub(super) fn of(streams: [OwnedFd; 3]) -> Self {
        Self(Some(streams))
    }
}

fn memfd(name: &str) -> Result<File, Error> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).map_err(std::io::Error::from);
    fd.map(File::from).map_err(Error::system("make a file in memory"))
}

/// By which another process reaches a file that this process has open.
pub(super) fn shared_path(file: &impl AsRawFd) -> OsString {
    format!("/proc/{}/fd/{}", rustix::process::getpid().as_raw_nonzero(), file.as_raw_fd()).into()
}

impl Instance {
    /// Runs the program to its end: `PATH [ARGS] --root R --log L --log-format json VERB ARGUMENTS`.
    pub(super) fn call(
        &self,
        verb: &'static str,
        arguments: impl IntoIterator<Item = OsString>,
        stdio: Stdio,
    ) -> Result<(), Error> {
        let (log, output) = (memfd("runtime-log")?, memfd("runtime-output")?);
        let (pid, pidfd) = self.spawn(verb, arguments.into_iter().collect(), stdio, &log, &output)?;
        let limit = self.deadline();
        if !pidfd.wait_ended(Some(limit)).map_err(Error::system("wait for the OCI runtime"))? {
            let _ = tree::kill(None, pid);
            let _ = pidfd.wait_ended(Some(DEATH));
            let _ = pidfd.wait(true);
            return Err(Error::Stuck {
                runtime: self.runtime.name.clone(),
                program: self.runtime.path.clone(),
                verb,
                id: self.id.clone(),
                seconds: limit.as_secs(),
            });
        }
        match pidfd.wait(false).map_err(Error::system("wait for the OCI runtime"))? {
            Some(status) if !status.success() => {
                let message = reason(log, output).unwrap_or_else(|| format!("it ended with code {}", status.code));
                Err(Error::Failed { runtime: self.runtime.name.clone(), verb, message })
            }
            _ => Ok(()),
        }
    }

    fn spawn(
        &self,
        verb: &'static str,
        arguments: Vec<OsString>,
        stdio: Stdio,
        log: &File,
        output: &File,
    ) -> Result<(Pid, PidFd), Error> {
        let mut words: Vec<OsString> = vec![self.runtime.path.clone().into()];
        words.extend(self.runtime.args.iter().map(OsString::from));
        words.extend(["--root".into(), self.runtime.root.clone().into(), "--log".into(), shared_path(log)]);
        words.extend(["--log-format".into(), "json".into()]);
        if self.runtime.systemd_cgroup {
            words.push("--systemd-cgroup".into());
        }
        words.push(verb.into());
        words.extend(arguments);
        let argv: Option<Vec<CString>> = words.into_iter().map(|word| CString::new(word.into_vec()).ok()).collect();
        let refused = || Error::Refused { runtime: self.runtime.name.clone(), what: "an argument holds a zero byte".into() };
        let path = CString::new(self.runtime.path.as_os_str().as_bytes()).map_err(|_| refused())?;
        let copy = || output.try_clone().map(OwnedFd::from).map_err(Error::system("duplicate a descriptor"));
        let fds = match stdio.0 {
            Some([stdin, stdout, stderr]) => vec![(stdin, 0), (stdout, 1), (stderr, 2)],
            None => vec![(copy()?, 1), (copy()?, 2)],
        };
        let spawn = Spawn {
            exe: Executable::Path(path),
            argv: argv.ok_or_else(refused)?,
            envp: vec![PATH.to_owned()],
            fds,
            cwd: Some(c"/".to_owned()),
        };
        let (pid, pidfd) = spawn_exec(spawn).map_err(|source| Error::Run { runtime: self.runtime.name.clone(), source })?;
        Ok((pid, pidfd.into()))
    }
}

/// One line of a runtime's log.
#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
}

fn reason(log: File, output: File) -> Option<String> {
    reason_in_log(&text(log))
        .or_else(|| text(output).lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned))
}

/// The last error of a log; of lines that are not JSON, the last one.
fn reason_in_log(log: &str) -> Option<String> {
    let mut plain = None;
    for line in log.lines().rev().map(str::trim).filter(|line| !line.is_empty()) {
        match serde_json::from_str::<Line>(line) {
            Ok(Line { level, msg }) if matches!(level.as_str(), "error" | "fatal" | "panic") => return Some(msg),
            Ok(_) => {}
            Err(_) => plain = plain.or(Some(line.to_owned())),
        }
    }
    plain
}

/// The end of what was written, as text.
fn text(mut file: File) -> String {
    let length = file.metadata().map_or(0, |metadata| metadata.len());
    let mut bytes = Vec::new();
    let _ = file.seek(std::io::SeekFrom::Start(length.saturating_sub(MAX_TEXT)));
    let _ = file.take(MAX_TEXT).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_last_error_of_the_log() {
        let warning = r#"{"level":"warning","msg":"w","time":"t"}"#;
        let error = |text: &str| format!(r#"{{"level":"error","msg":"{text}","time":"t"}}"#);
        for (log, want) in [
            (format!("{warning}\n{}\n{}\n{warning}\n", error("one"), error("two")), Some("two")),
            (warning.to_owned(), None),
            (String::new(), None),
            ("not json\n".to_owned(), Some("not json")),
            (format!("odd\n{}", error("one")), Some("one")),
        ] {
            assert_eq!(reason_in_log(&log).as_deref(), want, "{log}");
        }
    }
}
