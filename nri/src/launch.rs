//! Plugins that are installed on the machine: found by their names, started with the socket as descriptor 3, ended with us.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use berth_linux::pidfd::PidFd;
use berth_linux::process::{Executable, Spawn, spawn_exec};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

use crate::Error;

/// An installed plugin.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Installed {
    pub(crate) index: String,
    pub(crate) base: String,
    pub(crate) path: PathBuf,
    /// The text that it is configured with.
    pub(crate) config: String,
}

/// The process of a started plugin. It is killed when this is dropped.
pub(crate) struct Child(PidFd);

impl Drop for Child {
    fn drop(&mut self) {
        // Already gone is good.
        let _ = self.0.signal(9);
    }
}

/// Two digits.
pub(crate) fn is_index(text: &str) -> bool {
    text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit())
}

/// A plugin's own name.
pub(crate) fn is_base(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// The programs of a folder in the order of their names. Blocking.
pub(crate) fn installed(folder: &Path, configs: &Path) -> Result<Vec<Installed>, Error> {
    let failed = |source| Error::File { action: "read the NRI plugin folder", path: folder.to_owned(), source };
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
    };
    let mut out = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let is_program = std::fs::metadata(&path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
        if !is_program {
            continue;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some((index, base)) = name.split_once('-').filter(|(index, base)| is_index(index) && is_base(base)) else {
            tracing::warn!(path = %path.display(), "not an NRI plugin: its name must be two digits, a dash and a name");
            continue;
        };
        let config = config(configs, &name, base)?;
        out.push(Installed { index: index.into(), base: base.into(), path, config });
    }
    out.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(out)
}

fn config(folder: &Path, name: &str, base: &str) -> Result<String, Error> {
    for file in [format!("{name}.conf"), format!("{base}.conf")] {
        let path = folder.join(file);
        match std::fs::read_to_string(&path) {
            Ok(text) => return Ok(text),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::File { action: "read", path, source }),
        }
    }
    Ok(String::new())
}

/// Starts a plugin; what it writes to standard error goes where our own log goes.
pub(crate) fn start(plugin: &Installed) -> Result<(UnixStream, Child), Error> {
    let io = |source| Error::File { action: "connect", path: plugin.path.clone(), source };
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(io)?;
    ours.set_nonblocking(true).map_err(io)?;
    let path = CString::new(plugin.path.as_os_str().as_bytes()).map_err(|e| io(e.into()))?;
    let variables = [("NAME", plugin.base.as_str()), ("IDX", &plugin.index), ("SOCKET", "3")];
    let envp = variables
        .into_iter()
        .map(|(name, value)| CString::new(format!("NRI_PLUGIN_{name}={value}")))
        .collect::<Result<_, _>>()
        .map_err(|e| io(e.into()))?;
    let mut fds: Vec<(OwnedFd, i32)> = vec![(theirs.into(), 3)];
    if let Ok(log) = std::io::stderr().as_fd().try_clone_to_owned() {
        fds.push((log, 2));
    }
    let spawn = Spawn { exe: Executable::Path(path.clone()), argv: vec![path], envp, fds, cwd: None };
    let (_, pidfd) = spawn_exec(spawn).map_err(|source| Error::Launch { path: plugin.path.clone(), source })?;
    let child = Child(PidFd::from(pidfd.try_clone().map_err(io)?));
    reap(pidfd).map_err(io)?;
    Ok((UnixStream::from_std(ours).map_err(io)?, child))
}

#[allow(deprecated, reason = "its successor is unsafe for the sake of types that can change their descriptor; OwnedFd can not")]
fn reap(pidfd: OwnedFd) -> std::io::Result<()> {
    let watched = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
    tokio::spawn(async move {
        if watched.readable().await.is_ok() {
            let _ = PidFd::from(watched.into_inner()).wait(true);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_by_their_names_with_their_configurations() {
        let (plugins, configs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (name, mode) in [("20-b", 0o755), ("10-a.x", 0o755), ("30-c", 0o644), ("logger", 0o755), ("1-x", 0o755)] {
            let path = plugins.path().join(name);
            std::fs::write(&path, "").unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        }
        for (name, text) in [("20-b.conf", "own"), ("b.conf", "general"), ("a.x.conf", "by base")] {
            std::fs::write(configs.path().join(name), text).unwrap();
        }
        let found = installed(plugins.path(), configs.path()).unwrap();
        let got: Vec<_> = found.iter().map(|p| (p.index.as_str(), p.base.as_str(), p.config.as_str())).collect();
        assert_eq!(got, [("10", "a.x", "by base"), ("20", "b", "own")]);
        assert!(installed(Path::new("/nowhere"), Path::new("/nowhere")).unwrap().is_empty());
    }
}
