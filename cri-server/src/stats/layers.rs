//! What writable layers take: counted seldom, a folder at a time, never again once the container has ended. A call that finds a
//! count too old continues it for a bounded number of entries and tells the last whole one.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, openat2, statat};

/// How many entries one call looks at.
const BUDGET: usize = 4096;
/// A count holds at least this long.
const HOLDS: Duration = Duration::from_secs(10);
/// What nobody asked about for so long is forgotten.
const KEPT: Duration = Duration::from_secs(3600);

/// What a layer takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    /// Unix nanoseconds of the count.
    pub(crate) at: i64,
}

/// A count under way: the folders still to look at, relative to the layer.
struct Count {
    todo: Vec<PathBuf>,
    linked: HashSet<u64>,
    usage: Usage,
}

impl Count {
    fn new() -> Self {
        Self { todo: vec![PathBuf::from(".")], linked: HashSet::new(), usage: Usage::default() }
    }

    /// Looks at more folders until about `budget` entries were seen. True when all is counted.
    fn advance(&mut self, top: &Path, budget: usize) -> bool {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(top) = rustix::fs::openat(CWD, top, flags, Mode::empty()) else {
            self.todo.clear();
            return true;
        };
        let mut seen = 0;
        while seen < budget {
            let Some(folder) = self.todo.pop() else { return true };
            // The container may put a link in a folder's place at any time: nothing outside of the layer is looked at.
            let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
            let Ok(open) = openat2(&top, &folder, flags, Mode::empty(), beneath) else { continue };
            self.usage.inodes += 1;
            let Ok(entries) = Dir::read_from(&open) else { continue };
            for entry in entries.flatten() {
                let name = entry.file_name();
                if matches!(name.to_bytes(), b"." | b"..") {
                    continue;
                }
                seen += 1;
                let Ok(stat) = statat(&open, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
                if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                    self.usage.bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
                    self.todo.push(folder.join(std::ffi::OsStr::new(&*name.to_string_lossy())));
                } else if stat.st_nlink == 1 || self.linked.insert(stat.st_ino) {
                    self.usage.bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
                    self.usage.inodes += 1;
                }
            }
        }
        self.todo.is_empty()
    }
}

struct Layer {
    known: Option<Usage>,
    counted: Instant,
    asked: Instant,
    running: Option<Count>,
    /// Counted after its container had ended.
    last: bool,
}

/// The layers by folder.
#[derive(Default)]
pub(crate) struct Layers {
    layers: Mutex<HashMap<PathBuf, Layer>>,
}

impl Layers {
    /// The last whole count; none while the first one of a large layer is under way. `ended`: nothing changes any more. Blocking,
    /// for a bounded number of entries.
    pub(crate) fn usage(&self, folder: &Path, ended: bool) -> Option<Usage> {
        let now = Instant::now();
        let mut count = {
            let mut all = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
            if !all.contains_key(folder) {
                all.retain(|_, layer| now.saturating_duration_since(layer.asked) < KEPT);
            }
            let new = || Layer { known: None, counted: now, asked: now, running: Some(Count::new()), last: false };
            let layer = all.entry(folder.to_owned()).or_insert_with(new);
            layer.asked = now;
            let due = if ended { !layer.last } else { now.saturating_duration_since(layer.counted) >= HOLDS };
            // Taken by one call at a time; the others tell what is known.
            match layer.running.take() {
                Some(count) => count,
                None if due => {
                    layer.counted = now;
                    layer.last = ended;
                    Count::new()
                }
                None => return layer.known,
            }
        };
        let whole = count.advance(folder, BUDGET);
        let mut all = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let layer = all.get_mut(folder)?;
        if whole {
            layer.known = Some(Usage { at: crate::clock::now_ns(), ..count.usage });
            layer.counted = Instant::now();
        } else {
            layer.running = Some(count);
        }
        layer.known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layers_usage_counts_its_entries_once_and_follows_no_link() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), vec![1u8; 10_000]).unwrap();
        std::fs::hard_link(dir.path().join("a"), dir.path().join("again")).unwrap();
        std::fs::create_dir(dir.path().join("b")).unwrap();
        std::os::unix::fs::symlink("/usr", dir.path().join("link")).unwrap();
        let layers = Layers::default();
        let got = layers.usage(dir.path(), false).unwrap();
        assert!((10_000..100_000).contains(&got.bytes) && got.inodes == 4, "{got:?}");
        std::fs::write(dir.path().join("c"), "").unwrap();
        assert_eq!(layers.usage(dir.path(), false), Some(got), "a count holds for a while");
        assert_eq!(layers.usage(dir.path(), true).unwrap().inodes, 5, "the end is counted");
        std::fs::write(dir.path().join("d"), "").unwrap();
        assert_eq!(layers.usage(dir.path(), true).unwrap().inodes, 5, "and never again");
    }

    #[test]
    fn a_large_layer_is_counted_over_several_calls() {
        let dir = tempfile::tempdir().unwrap();
        for folder in 0..3 {
            let folder = dir.path().join(folder.to_string());
            std::fs::create_dir(&folder).unwrap();
            (0..4).for_each(|i| std::fs::write(folder.join(i.to_string()), "").unwrap());
        }
        let mut count = Count::new();
        let calls = (1..20).find(|_| count.advance(dir.path(), 3)).unwrap();
        assert_eq!((count.usage.inodes, calls), (16, 4));
    }
}
