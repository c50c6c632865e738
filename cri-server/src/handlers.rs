//! RuntimeClass handlers: the names that pods may ask for, who stands behind each, and what it can do. Starts a runtime's program
//! only to ask for its features; containers are made by the shim.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use berth_cgroup::CgroupPath;
use berth_linux::pidfd::PidFd;
use berth_linux::process::{Executable, Spawn, pipe, spawn_exec};
use berth_shim::protocol::{ExternalRuntime, Runner};
use serde::Deserialize;

use crate::config::RuntimeHandler;
use crate::error::{Error, invalid};
use crate::server::Features;

/// The name under which the built-in handler may also be asked for.
pub(crate) const BUILTIN: &str = "berth";

/// How long a runtime may take to tell its features: `runc features` takes some 20 ms.
const FEATURES_DEADLINE: Duration = Duration::from_secs(10);
/// The longest answer that is read; runc's has 5 KiB.
const FEATURES_BYTES: u64 = 1 << 20;
/// Names are what a RuntimeClass' `handler` may be: a DNS label.
const NAME_BYTES: usize = 63;

/// The configured handlers.
#[derive(Debug, Default)]
pub(crate) struct Handlers {
    table: BTreeMap<String, RuntimeHandler>,
    features: Mutex<BTreeMap<String, Features>>,
}

impl Handlers {
    /// Checks what was configured. The programs are looked for when a pod needs them.
    pub(crate) fn new(configured: &[RuntimeHandler]) -> Result<Self, Error> {
        let mut table = BTreeMap::new();
        for handler in configured {
            let bad = |reason: &str| invalid("runtime handler", format!("{:?}: {reason}", handler.name));
            let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
            let name = handler.name.as_bytes();
            let edges = name.first().zip(name.last()).is_some_and(|(first, last)| *first != b'-' && *last != b'-');
            if !edges || name.len() > NAME_BYTES || !name.iter().all(|c| plain(*c)) {
                return Err(bad("a name is a DNS label: lower-case letters, digits and '-'"));
            }
            if handler.name == BUILTIN {
                return Err(bad("this is the name of the built-in handler"));
            }
            if !handler.path.is_absolute() {
                return Err(bad("the path of its program must be absolute"));
            }
            if table.insert(handler.name.clone(), handler.clone()).is_some() {
                return Err(bad("configured twice"));
            }
        }
        Ok(Self { table, features: Mutex::default() })
    }

    /// The names of all but the built-in one.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.table.keys().map(String::as_str)
    }

    fn external(&self, name: &str) -> Result<Option<&RuntimeHandler>, Error> {
        if name.is_empty() || name == BUILTIN {
            return Ok(None);
        }
        let unknown = || invalid("runtime_handler", format!("no runtime for {name:?} is configured"));
        self.table.get(name).map(Some).ok_or_else(unknown)
    }

    /// Whether a pod may ask for this handler: it is configured and its program is there.
    pub(crate) fn check(&self, name: &str) -> Result<(), Error> {
        self.external(name)?.map_or(Ok(()), runs)
    }

    /// What is wrong with the programs. One that is installed later is used then.
    pub(crate) fn missing(&self) -> impl Iterator<Item = Error> {
        self.table.values().filter_map(|handler| runs(handler).err())
    }

    /// Who makes the containers of a pod. `folder` is the pod's own, for the runtime's state.
    pub(crate) fn runner(&self, name: &str, folder: &Path, cgroup: &str) -> Result<Runner, Error> {
        let Some(handler) = self.external(name)? else { return Ok(Runner::Builtin) };
        Ok(Runner::External(ExternalRuntime {
            name: handler.name.clone(),
            path: handler.path.clone(),
            args: handler.args.clone(),
            root: folder.join("runtime"),
            systemd_cgroup: matches!(CgroupPath::parse(cgroup), Ok(CgroupPath::Systemd { .. })),
            deadline_ms: handler.deadline.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
        }))
    }

    /// What a handler can do on a kernel that can do `kernel`. Asked once; a runtime that does not tell can do neither, and is
    /// asked again.
    pub(crate) async fn features(self: &Arc<Self>, name: &str, kernel: Features) -> Result<Features, Error> {
        let Some(handler) = self.external(name)? else { return Ok(kernel) };
        if let Some(known) = self.known(name) {
            return Ok(known);
        }
        let asked = handler.clone();
        let text = crate::blocking(move || ask(&asked)).await?;
        let told = parse(&text).map_err(|e| Error::Runtime { name: name.to_owned(), reason: format!("its features: {e}") })?;
        let both = Features {
            recursive_readonly: told.recursive_readonly && kernel.recursive_readonly,
            user_namespaces: told.user_namespaces && kernel.user_namespaces,
        };
        self.features.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), both);
        Ok(both)
    }

    fn known(&self, name: &str) -> Option<Features> {
        self.features.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied()
    }
}

/// Whether a handler's program is there and may be run.
fn runs(handler: &RuntimeHandler) -> Result<(), Error> {
    rustix::fs::access(&handler.path, rustix::fs::Access::EXEC_OK).map_err(|errno| Error::Runtime {
        name: handler.name.clone(),
        reason: format!("its program {} can not be run: {}", handler.path.display(), std::io::Error::from(errno)),
    })
}

/// Runs `PATH [ARGS] features` and returns what it prints. Blocking.
fn ask(handler: &RuntimeHandler) -> Result<Vec<u8>, Error> {
    let failed = |reason: String| Error::Runtime { name: handler.name.clone(), reason };
    let io = |what: &str, error: std::io::Error| failed(format!("{what}: {error}"));
    let word = |bytes: &[u8]| CString::new(bytes).map_err(|_| failed("an argument holds a zero byte".into()));
    let path = word(handler.path.as_os_str().as_bytes())?;
    let mut argv = vec![path.clone()];
    for arg in handler.args.iter().map(String::as_str).chain(["features"]) {
        argv.push(word(arg.as_bytes())?);
    }
    let (reader, writer) = pipe().map_err(|e| io("make a pipe", e))?;
    let envp = vec![c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()];
    let spawn = Spawn { exe: Executable::Path(path), argv, envp, fds: vec![(writer, 1)], cwd: Some(c"/".to_owned()) };
    let (_, pidfd) = spawn_exec(spawn).map_err(|e| failed(crate::error::text(&e)))?;
    let process = PidFd::from(pidfd);
    let answer = read_in_time(reader, &process);
    // It has closed its output, or is of no use any more.
    if answer.is_err() {
        let _ = process.signal(9);
    }
    let ended = process.wait_ended(Some(FEATURES_DEADLINE)).and_then(|ended| {
        if !ended {
            process.signal(9)?;
        }
        process.wait(false)
    });
    let answer = answer.map_err(|e| io("read its features", e))?;
    match ended.map_err(|e| io("wait for it", e))? {
        Some(status) if status.success() => Ok(answer),
        status => Err(failed(format!("`features` ended with code {}", status.map_or(-1, |s| s.code)))),
    }
}

fn read_in_time(reader: OwnedFd, process: &PidFd) -> std::io::Result<Vec<u8>> {
    // The answer fits the pipe, so a runtime that has more to say than that is stopped by the deadline.
    if !process.wait_ended(Some(FEATURES_DEADLINE))? {
        return Err(std::io::ErrorKind::TimedOut.into());
    }
    rustix::io::ioctl_fionbio(&reader, true)?;
    let mut answer = Vec::new();
    match File::from(reader).take(FEATURES_BYTES).read_to_end(&mut answer) {
        // Somebody holds the pipe open still; what is in it is all.
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(answer),
        other => other.map(|_| answer),
    }
}

/// The part of the OCI features document that counts here.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Document {
    mount_options: Vec<String>,
    linux: LinuxDocument,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct LinuxDocument {
    namespaces: Vec<String>,
    mount_extensions: MountExtensions,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct MountExtensions {
    idmap: IdMap,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct IdMap {
    enabled: Option<bool>,
}

/// Volumes of pods with a user namespace are mapped by the runtime, so it must know namespaces and idmapped mounts.
fn parse(text: &[u8]) -> Result<Features, serde_json::Error> {
    let document: Document = serde_json::from_slice(text)?;
    Ok(Features {
        recursive_readonly: document.mount_options.iter().any(|o| o == "rro"),
        user_namespaces: document.linux.namespaces.iter().any(|n| n == "user")
            && document.linux.mount_extensions.idmap.enabled == Some(true),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handler(name: &str, path: &str) -> RuntimeHandler {
        RuntimeHandler { name: name.into(), path: path.into(), args: vec![], deadline: None }
    }

    #[test]
    fn handlers_that_cannot_be_meant_are_refused_by_name() {
        for (configured, text) in [
            (vec![handler("", "/x")], "DNS label"),
            (vec![handler("A", "/x")], "DNS label"),
            (vec![handler("a-", "/x")], "DNS label"),
            (vec![handler("berth", "/x")], "built-in"),
            (vec![handler("a", "x")], "absolute"),
            (vec![handler("a", "/x"), handler("a", "/y")], "twice"),
        ] {
            let error = Handlers::new(&configured).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        let handlers = Handlers::new(&[handler("runc", "/nowhere/runc")]).unwrap();
        assert!(handlers.check("").is_ok() && handlers.check("berth").is_ok());
        assert!(handlers.check("kata").unwrap_err().to_string().contains("no runtime for \"kata\" is configured"));
        let refused = crate::error::text(&handlers.check("runc").unwrap_err());
        assert!(refused.contains("OCI runtime runc: its program /nowhere/runc"), "{refused}");
        assert_eq!(handlers.missing().map(|e| e.to_string()).collect::<Vec<_>>(), [refused]);
        assert_eq!(Handlers::new(&[handler("sh", "/bin/sh")]).unwrap().missing().count(), 0);
    }

    #[test]
    fn a_pod_is_run_by_who_its_handler_names() {
        let handlers = Handlers::new(&[RuntimeHandler {
            deadline: Some(Duration::from_secs(7)),
            args: vec!["oci".into()],
            ..handler("r", "/r")
        }])
        .unwrap();
        assert_eq!(handlers.runner("", Path::new("/s"), "/c").unwrap(), Runner::Builtin);
        let Runner::External(runtime) = handlers.runner("r", Path::new("/s"), "a.slice:b:c").unwrap() else { panic!("built in") };
        assert_eq!((runtime.path.as_path(), runtime.root.as_path()), (Path::new("/r"), Path::new("/s/runtime")));
        assert!(runtime.systemd_cgroup && runtime.deadline_ms == 7000 && runtime.args == ["oci"]);
    }

    #[test]
    fn features_are_what_the_runtime_says_and_nothing_when_it_says_nothing() {
        let document = |rro: &str, user: &str, idmap: &str| {
            format!(
                r#"{{"ociVersionMin":"1.0.0","mountOptions":["ro"{rro}],"linux":{{"namespaces":["pid"{user}],"mountExtensions":{{"idmap":{{{idmap}}}}},"x":1}}}}"#
            )
        };
        let enabled = r#""enabled":true"#;
        for (text, rro, userns) in [
            (document(r#","rro""#, r#","user""#, enabled), true, true),
            (document("", r#","user""#, ""), false, false),
            (document("", "", enabled), false, false),
            ("{}".to_owned(), false, false),
        ] {
            let features = parse(text.as_bytes()).unwrap();
            assert_eq!((features.recursive_readonly, features.user_namespaces), (rro, userns), "{text}");
        }
        assert!(parse(b"usage: x").is_err());
    }

    #[tokio::test]
    async fn a_program_is_asked_for_its_features_and_its_failure_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let script = |name: &str, text: &str| {
            let path = dir.path().join(name);
            berth_testkit::write_program(&path, text);
            handler(name, &path.to_string_lossy())
        };
        let good = script("good", "#!/bin/sh\n[ \"$1\" = features ] && echo '{\"mountOptions\":[\"rro\"]}'\n");
        let bad = script("bad", "#!/bin/sh\nexit 3\n");
        let handlers = Arc::new(Handlers::new(&[good, bad]).unwrap());
        let kernel = Features { recursive_readonly: true, user_namespaces: true };
        let features = handlers.features("good", kernel).await.unwrap();
        assert!(features.recursive_readonly && !features.user_namespaces);
        let error = handlers.features("bad", kernel).await.unwrap_err().to_string();
        assert!(error.contains("bad") && error.contains("code 3"), "{error}");
    }
}
