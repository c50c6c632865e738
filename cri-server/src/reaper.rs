//! Deletes folders that nobody waits for: what was moved to the trash, one at a time, off every reply path.

use std::path::PathBuf;
use std::sync::mpsc;

use crate::error::{Error, file};

/// The reaper of one trash folder.
pub(crate) struct Reaper {
    wake: mpsc::Sender<Option<mpsc::Sender<()>>>,
}

impl Reaper {
    /// Starts it on a folder, which is made if missing; what lies there from before goes first.
    pub(crate) fn start(trash: PathBuf) -> Result<Self, Error> {
        std::fs::create_dir_all(&trash).map_err(file("create", &trash))?;
        let (wake, rx) = mpsc::channel::<Option<mpsc::Sender<()>>>();
        std::thread::Builder::new()
            .name("reaper".into())
            .stack_size(1 << 20)
            .spawn(move || {
                while let Ok(message) = rx.recv() {
                    let mut waiting: Vec<_> = message.into_iter().collect();
                    waiting.extend(rx.try_iter().flatten());
                    empty(&trash);
                    for done in waiting {
                        let _ = done.send(());
                    }
                }
            })
            .map_err(file("start the thread of", "reaper"))?;
        let reaper = Self { wake };
        reaper.wake();
        Ok(reaper)
    }

    /// There is something in the trash.
    pub(crate) fn wake(&self) {
        let _ = self.wake.send(None);
    }

    /// Waits until the trash of this moment is gone. Blocking.
    pub(crate) fn settle(&self) {
        let (tx, rx) = mpsc::channel();
        if self.wake.send(Some(tx)).is_ok() {
            let _ = rx.recv();
        }
    }
}

fn empty(trash: &std::path::Path) {
    for entry in std::fs::read_dir(trash).into_iter().flatten().flatten() {
        let path = entry.path();
        // A container may have nested its folders as deep as it liked.
        if let Err(error) = berth_linux::tree::remove_all(&path) {
            tracing::warn!(path = %path.display(), %error, "trash not deleted");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_the_trash_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let trash = dir.path().join("trash");
        std::fs::create_dir_all(trash.join("old/upper/x")).unwrap();
        let reaper = Reaper::start(trash.clone()).unwrap();
        std::fs::create_dir_all(trash.join("new")).unwrap();
        reaper.settle();
        assert_eq!(std::fs::read_dir(&trash).unwrap().count(), 0);
    }
}
