//! Saves a file as editors and other tools do, with the litter they leave on the way: what a folder that is watched has to bear.
//! Choices come from a seed, so that a failure can be repeated.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How a file comes to have new contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Save {
    /// Truncated and written in one go: `cp`, `tee`, a shell's `>`.
    InPlace,
    /// Truncated and written bit by bit, with pauses: a slow editor, a copy over the network.
    Slowly,
    /// A backup beside it, then in place: nano, and vim with `backupcopy=yes`.
    BackupThenInPlace,
    /// vim: a probe file, the old file renamed to a backup, a new one written, the backup removed.
    Vim,
    /// A temporary file beside it that is renamed over it: `sed -i`, gedit.
    TemporaryThenRename,
    /// Renamed over it from another folder: `mv`, `install`.
    MovedIn,
    /// Removed, and made anew within 100 ms.
    RemovedAndMade,
}

/// Every way to save.
pub const SAVES: [Save; 7] = [
    Save::InPlace,
    Save::Slowly,
    Save::BackupThenInPlace,
    Save::Vim,
    Save::TemporaryThenRename,
    Save::MovedIn,
    Save::RemovedAndMade,
];

/// A source of choices (xorshift).
#[derive(Clone, Copy, Debug)]
pub struct Choices(u64);

impl Choices {
    /// The same seed gives the same choices.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap_or(0) % bound
    }

    /// One of these.
    pub fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

fn named(path: &Path, change: impl FnOnce(&str) -> String) -> PathBuf {
    path.with_file_name(change(&path.file_name().expect("a file has a name").to_string_lossy()))
}

/// Gives `path` these contents. `elsewhere` is a folder of the same file system that nobody watches.
///
/// # Panics
/// When a file cannot be written.
pub fn save(path: &Path, contents: &str, how: Save, elsewhere: &Path) {
    let write = |path: &Path| fs::write(path, contents).expect("write a file");
    match how {
        Save::InPlace => write(path),
        Save::Slowly => {
            let mut file = File::create(path).expect("make a file");
            for part in contents.as_bytes().chunks(contents.len() / 3 + 1) {
                file.write_all(part).expect("write a part");
                std::thread::sleep(Duration::from_millis(15));
            }
        }
        Save::BackupThenInPlace => {
            let _ = fs::copy(path, named(path, |name| format!("{name}~")));
            write(path);
        }
        Save::Vim => {
            let swap = named(path, |name| format!(".{name}.swp"));
            fs::write(&swap, "b0VIM").expect("write a swap file");
            let probe = path.with_file_name("4913");
            fs::write(&probe, "").and_then(|()| fs::remove_file(&probe)).expect("probe the folder");
            let backup = named(path, |name| format!("{name}~"));
            let _ = fs::rename(path, &backup);
            write(path);
            let _ = fs::remove_file(backup);
            fs::remove_file(swap).expect("remove the swap file");
        }
        Save::TemporaryThenRename => {
            let temporary = path.with_file_name("sedJq3x1");
            write(&temporary);
            fs::rename(temporary, path).expect("rename over the file");
        }
        Save::MovedIn => {
            let new = elsewhere.join("new");
            write(&new);
            fs::rename(new, path).expect("move a file in");
        }
        Save::RemovedAndMade => {
            let _ = fs::remove_file(path);
            std::thread::sleep(Duration::from_millis(30));
            write(path);
        }
    }
}

/// Leaves something beside `path` that is no manifest, or none yet: backups, half of the file under another name, a folder.
///
/// # Panics
/// When a file cannot be written.
pub fn litter(path: &Path, contents: &str, choices: &mut Choices) {
    let half = &contents[..contents.len() / 2];
    match choices.below(5) {
        0 => _ = fs::copy(path, named(path, |name| format!("{name}.bak"))),
        1 => fs::write(named(path, |name| format!("#{name}#")), half).expect("write an auto-save"),
        2 => fs::write(named(path, |name| format!("{name}.orig")), contents).expect("write an original"),
        3 => fs::write(named(path, |name| format!(".{name}")), half).expect("write a hidden file"),
        _ => fs::create_dir_all(named(path, |name| format!("{name}.d.yaml"))).expect("make a folder"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TempState;

    #[test]
    fn every_way_to_save_ends_with_the_contents_and_without_litter() {
        let state = TempState::new();
        let (folder, elsewhere) = (state.dir("m"), state.dir("x"));
        let path = folder.join("a.yaml");
        for (i, how) in SAVES.into_iter().enumerate() {
            save(&path, &format!("contents {i}"), how, &elsewhere);
            assert_eq!(fs::read_to_string(&path).unwrap(), format!("contents {i}"), "{how:?}");
        }
        let names: Vec<_> = fs::read_dir(folder).unwrap().flatten().map(|e| e.file_name().into_string().unwrap()).collect();
        assert!(names.iter().all(|name| name == "a.yaml" || name == "a.yaml~"), "{names:?}");
    }
}
