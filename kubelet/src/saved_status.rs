//! The last status of a pod on disk, so that a new kubelet goes on from it: readiness does not flicker, times stay. Written
//! when something changed and not synced; a pod without the file begins anew. Only that a pod has ended whose records are to go
//! is waited for and synced: nothing else says so then.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::core::v1::PodStatus;
use serde::{Deserialize, Serialize};

use crate::ages::Ages;
use crate::atomic_file;
use crate::status::is_terminal_phase;
use crate::{typed, volume};

/// The file's name in a pod's folder, and its name while it is written.
pub(crate) const STATUS: &str = "status.json";
pub(crate) const STATUS_NEW: &str = "status.json.new";

/// Of the file's content.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    status: PodStatus,
    /// Of files that do not have it nothing has been measured.
    #[serde(default)]
    ages: Ages,
    #[serde(default)]
    cleared: bool,
}

/// What is known of a pod from before.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Saved {
    /// Its last status.
    pub status: PodStatus,
    /// What had been measured.
    pub ages: Ages,
    /// The pod had ended, and its records are removed from the runtime to make room: that there are none does not mean that it has
    /// not run.
    pub cleared: bool,
}

impl Saved {
    /// Whether the pod had ended and has not been lost since; `present`: the runtime has records of it.
    pub(crate) fn is_over(&self, present: bool) -> bool {
        (present || self.cleared) && is_terminal_phase(self.status.phase.as_deref())
    }
}

/// One pod's file. Clones stand for the same one.
#[derive(Clone, Debug)]
pub(crate) struct SavedStatus {
    path: PathBuf,
    /// What is to be written; the lock is held while it is, so that the newest is written last.
    next: Arc<Mutex<Option<Vec<u8>>>>,
    /// How the pod has ended, until it is on disk.
    end: Arc<Mutex<Option<Vec<u8>>>>,
}

impl SavedStatus {
    /// In a pod's folder.
    pub(crate) fn new(pod_dir: &Path) -> SavedStatus {
        SavedStatus { path: pod_dir.join(STATUS), next: Arc::default(), end: Arc::default() }
    }

    /// What an earlier kubelet has left; `None` where there is nothing that can be read.
    pub(crate) fn load(&self) -> Option<Saved> {
        let text = fs::read(&self.path).ok()?;
        let file: File = typed::from_bytes(&text).ok()?;
        let File { version, status, ages, cleared } = file;
        (version == VERSION).then_some(Saved { status, ages, cleared })
    }

    /// Forgets what was kept.
    pub(crate) fn remove(&self) {
        let _ = fs::remove_file(&self.path);
    }

    /// Writes a status in the background. Before the pod has its folder, and after, nothing is kept.
    pub(crate) fn save(&self, saved: Saved) {
        let Some(content) = content(saved) else { return };
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = Some(content);
        let (path, next) = (self.path.clone(), self.next.clone());
        tokio::task::spawn_blocking(move || {
            let mut next = next.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(content) = next.take() else { return };
            match replace(&path, &content) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "a pod's status is not kept");
                }
                _ => {}
            }
        });
    }
}

/// As the file has it.
fn content(Saved { status, ages, cleared }: Saved) -> Option<Vec<u8>> {
    typed::to_bytes(&File { version: VERSION, status, ages, cleared }).ok()
}

impl SavedStatus {
    /// Takes down how the pod has ended, for [`SavedStatus::keep_end`].
    pub(crate) fn ended(&self, saved: Saved) {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = content(saved);
        // What was to be written before does not say it.
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Puts on disk how the pod has ended, synced, in a folder that is made where the pod has none any more. Blocking.
    pub(crate) fn keep_end(&self) -> io::Result<()> {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        // What is newer says it too.
        let Some(content) = next.as_ref().or(end.as_ref()) else { return Err(io::ErrorKind::InvalidInput.into()) };
        let folder = self.path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        volume::create_private_dir(folder)?;
        volume::mark_ours(folder)?;
        atomic_file::replace(&self.path, content, 0o600)?;
        (*next, *end) = (None, None);
        Ok(())
    }
}

/// Without a sync: what a power cut takes is worth nothing after it, and an idle disk stays idle.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_file_name(STATUS_NEW);
    fs::write(&temporary, content)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn how_a_pod_ended_is_on_disk_when_it_is_said_to_be() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("pods/u1");
        let saved = SavedStatus::new(&folder);
        let status = |message: &str| PodStatus { message: Some(message.to_owned()), ..PodStatus::default() };
        assert!(saved.keep_end().is_err(), "nothing was taken down");
        saved.ended(Saved { status: status("ended"), cleared: true, ..Saved::default() });
        // In the way, as a full disk is.
        fs::create_dir_all(folder.join("status.json/x")).unwrap();
        assert!(saved.keep_end().is_err());
        fs::remove_dir_all(folder).unwrap();
        saved.keep_end().unwrap();
        let kept = saved.load().unwrap();
        assert_eq!((kept.status, kept.cleared), (status("ended"), true));
    }

    #[tokio::test]
    async fn the_newest_status_is_found_again_and_a_missing_folder_is_not_made() {
        let root = tempfile::tempdir().unwrap();
        let saved = SavedStatus::new(root.path());
        assert_eq!(saved.load(), None);
        let status =
            |n: usize| Saved { status: PodStatus { message: Some(n.to_string()), ..PodStatus::default() }, ..Saved::default() };
        (0..20).for_each(|n| saved.save(status(n)));
        assert!(berth_testkit::wait_until(std::time::Duration::from_secs(20), || saved.load() == Some(status(19))));
        let gone = SavedStatus::new(&root.path().join("gone"));
        gone.save(status(0));
        fs::write(root.path().join("status.json"), r#"{"version":1,"status":{"message":"old"}}"#).unwrap();
        assert_eq!(saved.load().unwrap().status.message.as_deref(), Some("old"), "of a kubelet that measured nothing");
        fs::write(root.path().join("status.json"), "{half").unwrap();
        assert_eq!(saved.load(), None);
        assert!(!root.path().join("gone").exists());
    }
}
