//! Folders that vanish with the test.

use std::path::{Path, PathBuf};

/// A throw-away folder for one test: short (unix sockets fit in it), unique, removed on drop, with what is mounted below it
/// unmounted first.
#[derive(Debug)]
pub struct TempState {
    path: PathBuf,
}

impl TempState {
    /// Makes a fresh folder on disk: in a sandbox in the sandbox's folder, elsewhere under `$BERTH_TEST_DIR` or `/tmp`.
    #[must_use]
    pub fn new() -> Self {
        let named = || std::env::var_os("BERTH_TEST_DIR").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
        let sandboxed = Path::new(crate::sandbox::TESTS_DIR);
        let parent = if sandboxed.is_dir() { sandboxed.to_path_buf() } else { named() };
        let dir = tempfile::Builder::new().prefix("bt-").tempdir_in(&parent).expect("make a folder for the test");
        Self { path: dir.keep() }
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A folder inside, made when it is missing.
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.path.join(name);
        std::fs::create_dir_all(&path).expect("make a folder inside the test's folder");
        path
    }

    /// A file inside with these contents.
    pub fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path.join(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).expect("make the file's folder");
        }
        std::fs::write(&path, contents).expect("write a file inside the test's folder");
        path
    }
}

/// Writes a script that tests run. Another process does it: a child that a parallel test starts just then would inherit a descriptor
/// that is open for writing, and the script could not be executed (ETXTBSY).
///
/// # Panics
/// When it cannot be written.
pub fn write_program(path: &Path, text: &str) {
    let script = "printf %s \"$1\" > \"$0\" && chmod 755 \"$0\"";
    let status = std::process::Command::new("/bin/sh").args(["-c", script]).arg(path).arg(text).status();
    assert!(status.expect("run a shell").success(), "write {}", path.display());
}

impl Default for TempState {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for TempState {
    fn drop(&mut self) {
        let text = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
        let below = text.lines().filter_map(|line| line.split(' ').nth(4)).filter(|m| Path::new(m).starts_with(&self.path));
        for mounted in below.collect::<Vec<_>>().into_iter().rev() {
            let _ = nix::mount::umount2(mounted, nix::mount::MntFlags::MNT_DETACH);
        }
        // Best effort: the folder may hold what a killed test left immutable.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vanishes_with_its_contents() {
        let state = TempState::new();
        let path = state.path().to_path_buf();
        assert!(state.file("a/b", "x").exists());
        drop(state);
        assert!(!path.exists());
    }
}
