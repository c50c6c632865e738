//! Folders, files and links of container logs. The runtime writes the lines; nothing here reads them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;

use crate::{pod, volume};

/// `<root>/<namespace>_<name>_<uid>`.
pub fn pod_log_dir(root: &Path, pod: &Pod) -> PathBuf {
    root.join(format!("{}_{}_{}", pod::namespace(pod), pod::name(pod), pod::uid(pod)))
}

/// `<container>/<attempt>.log`, as the runtime is told.
pub fn relative_log_path(container: &str, attempt: u32) -> String {
    format!("{container}/{attempt}.log")
}

/// Makes a folder with mode 0755 whatever the umask says.
pub fn ensure_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o755).create(path)?;
    let metadata = fs::metadata(path)?;
    if metadata.permissions().mode() & 0o777 != 0o755 {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// The highest attempt of each container that has left a log.
pub fn highest_attempts(pod_log_dir: &Path) -> BTreeMap<String, u32> {
    let mut highest = BTreeMap::new();
    for folder in fs::read_dir(pod_log_dir).into_iter().flatten().flatten() {
        let Ok(name) = folder.file_name().into_string() else { continue };
        let files = fs::read_dir(folder.path()).into_iter().flatten().flatten();
        let attempts = files.filter_map(|file| attempt_of(file.file_name().to_str()?));
        if let Some(attempt) = attempts.max() {
            highest.insert(name, attempt);
        }
    }
    highest
}

/// `3.log`, `3.log.20260101-000000` → 3.
fn attempt_of(file: &str) -> Option<u32> {
    let (number, _) = file.split_once(".log")?;
    number.parse().ok()
}

/// The name that log shippers look for: `<pod>_<namespace>_<container>-<id>.log`, at most 255 bytes.
pub fn link_name(pod: &Pod, container: &str, id: &str) -> String {
    let suffix = format!("_{}_{container}-{id}.log", pod::namespace(pod));
    let room = 255usize.saturating_sub(suffix.len());
    let name: String = pod::name(pod).chars().take(room).collect();
    let full = format!("{name}{suffix}");
    full.chars().skip(full.chars().count().saturating_sub(255)).collect()
}

/// Links a container's log where log shippers look; replaces an older link of the name.
pub fn link(links: &Path, name: &str, target: &Path) -> io::Result<()> {
    ensure_dir(links)?;
    let link = links.join(name);
    match std::os::unix::fs::symlink(target, &link) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            fs::remove_file(&link)?;
            std::os::unix::fs::symlink(target, &link)
        }
        other => other,
    }
}

/// Removes the log files of one attempt, rotated ones included.
pub fn remove_attempt(pod_log_dir: &Path, container: &str, attempt: u32) {
    for file in fs::read_dir(pod_log_dir.join(container)).into_iter().flatten().flatten() {
        if file.file_name().to_str().and_then(attempt_of) == Some(attempt)
            && let Err(error) = fs::remove_file(file.path())
        {
            tracing::warn!(path = %file.path().display(), %error, "log file stays");
        }
    }
}

/// Removes everything that a pod has logged.
pub fn remove_pod(root: &Path, pod: &Pod) {
    let folder = pod_log_dir(root, pod);
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %folder.display(), %error, "log folder of an earlier pod stays");
        }
        _ => {}
    }
}

/// Removes links whose target is gone.
pub fn remove_dead_links(links: &Path) {
    for entry in fs::read_dir(links).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_link = entry.file_type().is_ok_and(|t| t.is_symlink());
        if is_link && fs::metadata(&path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
            let _ = fs::remove_file(&path);
        }
    }
}

/// Removes log folders of ours whose UID nobody knows, once that has been so for long enough.
pub fn remove_orphans(root: &Path, is_known: impl Fn(&str) -> bool, mut is_old: impl FnMut(&Path) -> bool) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let parts: Vec<&str> = name.split('_').collect();
        let [_, _, uid] = parts.as_slice() else { continue };
        if is_known(uid) || !volume::is_ours(&entry.path()) || !is_old(&entry.path()) {
            continue;
        }
        if let Err(error) = fs::remove_dir_all(entry.path()) {
            tracing::warn!(path = %entry.path().display(), %error, "log folder of a removed pod stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Pod {
        let mut pod = Pod::default();
        pod.metadata.name = Some("web-n1".into());
        pod.metadata.namespace = Some("default".into());
        pod.metadata.uid = Some("u1".into());
        pod
    }

    #[test]
    fn paths_are_the_ones_log_shippers_parse() {
        assert_eq!(pod_log_dir(Path::new("/l"), &pod()), Path::new("/l/default_web-n1_u1"));
        assert_eq!(link_name(&pod(), "c", &"a".repeat(64)), format!("web-n1_default_c-{}.log", "a".repeat(64)));
        let mut long = pod();
        long.metadata.name = Some("n".repeat(253));
        let name = link_name(&long, "c", &"a".repeat(64));
        assert_eq!(name.len(), 255);
        assert!(name.ends_with(&format!("_default_c-{}.log", "a".repeat(64))));
    }

    #[test]
    fn attempts_are_found_in_rotated_logs_too() {
        let root = tempfile::tempdir().unwrap();
        for file in ["c/0.log", "c/2.log.20260101-000000", "c/1.log", "d/4.log", "e/junk"] {
            let path = root.path().join(file);
            ensure_dir(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let found = highest_attempts(root.path());
        assert_eq!(found, BTreeMap::from([("c".into(), 2), ("d".into(), 4)]));
        remove_attempt(root.path(), "c", 2);
        assert_eq!(highest_attempts(root.path())["c"], 1);
    }

    #[test]
    fn dead_links_and_orphan_folders_go() {
        let root = tempfile::tempdir().unwrap();
        let links = root.path().join("links");
        let target = root.path().join("0.log");
        fs::write(&target, "").unwrap();
        link(&links, "live.log", &target).unwrap();
        link(&links, "live.log", &target).unwrap();
        link(&links, "dead.log", Path::new("/nonexistent/0.log")).unwrap();
        remove_dead_links(&links);
        assert!(links.join("live.log").exists() && fs::symlink_metadata(links.join("dead.log")).is_err());
        let logs = root.path().join("logs");
        for name in ["a_b_known", "a_b_gone", "a_b_foreign", "other"] {
            ensure_dir(&logs.join(name)).unwrap();
        }
        volume::mark_ours(&logs.join("a_b_known")).unwrap();
        volume::mark_ours(&logs.join("a_b_gone")).unwrap();
        remove_orphans(&logs, |uid| uid == "known", |_| false);
        assert!(logs.join("a_b_gone").exists());
        remove_orphans(&logs, |uid| uid == "known", |_| true);
        let mut left: Vec<_> = fs::read_dir(&logs).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, ["a_b_foreign", "a_b_known", "other"], "another kubelet's stay");
    }
}
