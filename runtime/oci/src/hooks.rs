//! Hooks: programs that a spec wants run at points of a container's life.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use berth_linux::pidfd::PidFd;
use berth_linux::process::{Executable, Spawn, spawn_exec};
use rustix::fs::MemfdFlags;
use serde_json::json;

use crate::Error;
use crate::spec::{Hook, Spec};

/// A container's state as hooks read it.
#[derive(Debug, Clone)]
pub struct HookState<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its folder.
    pub bundle: &'a Path,
    /// `creating`, `created`, `running` or `stopped`.
    pub status: &'a str,
    /// Its first process; 0 when there is none.
    pub pid: i32,
    /// Its spec: for annotations and version.
    pub spec: &'a Spec,
}

impl HookState<'_> {
    fn json(&self) -> Vec<u8> {
        let mut state = json!({
            "ociVersion": self.spec.oci_version,
            "id": self.id,
            "status": self.status,
            "bundle": self.bundle.to_string_lossy(),
            "annotations": self.spec.annotations,
        });
        if self.pid > 0 {
            state["pid"] = self.pid.into();
        }
        state.to_string().into_bytes()
    }
}

/// Runs the hooks of one point in order, each to its end. The first that fails stops the rest.
pub fn run_hooks(point: &'static str, hooks: &[Hook], state: &HookState<'_>) -> Result<(), Error> {
    for (index, hook) in hooks.iter().enumerate() {
        run_hook(hook, &state.json()).map_err(|reason| Error::Hook { point, index, reason })?;
    }
    Ok(())
}

fn run_hook(hook: &Hook, state: &[u8]) -> Result<(), String> {
    let text = |error: std::io::Error| error.to_string();
    let c_string = |value: &String| CString::new(value.as_bytes()).map_err(|_| format!("{value:?} holds a NUL byte"));
    let path = c_string(&hook.path)?;
    let argv = match hook.args.is_empty() {
        true => vec![path.clone()],
        false => hook.args.iter().map(c_string).collect::<Result<_, _>>()?,
    };
    let envp = hook.env.iter().map(c_string).collect::<Result<_, _>>()?;
    // A file and not a pipe: a hook that does not read it can neither block nor kill us.
    let stdin = berth_linux::memfd::sealed_memfd("state", state, false).map_err(text)?;
    let output = rustix::fs::memfd_create("hook", MemfdFlags::CLOEXEC).map_err(|errno| errno.to_string())?;
    let copy = |fd: &OwnedFd| fd.try_clone().map_err(text);
    let fds = vec![(stdin, 0), (copy(&output)?, 1), (copy(&output)?, 2)];
    let spawn = Spawn { exe: Executable::Path(path), argv, envp, fds, cwd: None };
    let (_, pidfd) = spawn_exec(spawn).map_err(|error| crate::error::chain(&error))?;
    let process = PidFd::from(pidfd);
    let timeout = hook.timeout.map(|seconds| Duration::from_secs(seconds.into()));
    if !process.wait_ended(timeout).map_err(text)? {
        let _ = process.signal(9);
        let _ = process.wait(false);
        return Err(format!("timed out after {} s", hook.timeout.unwrap_or_default()));
    }
    match process.wait(false).map_err(text)? {
        Some(status) if !status.success() => Err(format!("exit status {}, output: {:?}", status.code, tail(&output))),
        _ => Ok(()),
    }
}

fn tail(output: &OwnedFd) -> String {
    let mut buffer = [0; 1024];
    let end = rustix::fs::fstat(output).map_or(0, |stat| stat.st_size as u64);
    let read = rustix::io::pread(output, &mut buffer, end.saturating_sub(1024)).unwrap_or(0);
    String::from_utf8_lossy(&buffer[..read]).trim().to_owned()
}
