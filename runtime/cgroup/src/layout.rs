//! Which hierarchies are mounted, and where. It only looks.

use std::path::{Path, PathBuf};

use berth_linux::mount::MountEntry;

use crate::{Error, Result};

/// A mounted v1 hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Its controllers; `name=x` for a named one.
    pub controllers: Vec<String>,
    /// Where its root is.
    pub mount: PathBuf,
}

/// What a machine has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// v1 alone.
    V1 {
        /// The hierarchies, each once.
        hierarchies: Vec<Hierarchy>,
    },
    /// v1 with controllers, and a v2 hierarchy next to it for what v1 has not.
    Hybrid {
        /// The v1 hierarchies, each once.
        hierarchies: Vec<Hierarchy>,
        /// Where the root of v2 is.
        unified: PathBuf,
    },
    /// v2 alone.
    V2 {
        /// Where its root is.
        mount: PathBuf,
    },
}

/// All resource controllers of v1.
const V1_CONTROLLERS: [&str; 14] = [
    "blkio",
    "cpu",
    "cpuacct",
    "cpuset",
    "debug",
    "devices",
    "freezer",
    "hugetlb",
    "memory",
    "misc",
    "net_cls",
    "net_prio",
    "perf_event",
    "pids",
];

impl Layout {
    /// Looks at the mounts of the calling process.
    pub fn detect() -> Result<Self> {
        let mounts = berth_linux::mount::mounts().map_err(|source| Error::Layout { source })?;
        Self::from_mounts(&mounts)
    }

    /// Finds the hierarchies in a mount table. Of several mounts of one hierarchy, one below `/sys/fs/cgroup` is taken before others, the first
    /// before later ones.
    pub fn from_mounts(mounts: &[MountEntry]) -> Result<Self> {
        let mut hierarchies: Vec<Hierarchy> = Vec::new();
        let mut unified: Option<PathBuf> = None;
        for usual_place in [true, false] {
            for entry in mounts.iter().filter(|entry| entry.mount_point.starts_with("/sys/fs/cgroup") == usual_place) {
                match entry.fstype.as_str() {
                    "cgroup2" if unified.is_none() => unified = Some(entry.mount_point.clone()),
                    "cgroup" => {
                        let controllers = v1_controllers(&entry.super_options);
                        if !controllers.is_empty() && !hierarchies.iter().any(|known| known.controllers == controllers) {
                            hierarchies.push(Hierarchy { controllers, mount: entry.mount_point.clone() });
                        }
                    }
                    _ => {}
                }
            }
        }
        let resources = hierarchies.iter().flat_map(|hierarchy| &hierarchy.controllers).any(|name| !name.starts_with("name="));
        match (unified, resources) {
            (Some(mount), false) => Ok(Self::V2 { mount }),
            (Some(unified), true) => Ok(Self::Hybrid { hierarchies, unified }),
            (None, true) => Ok(Self::V1 { hierarchies }),
            (None, false) => Err(Error::NotMounted),
        }
    }

    /// The v1 hierarchies.
    #[must_use]
    pub fn hierarchies(&self) -> &[Hierarchy] {
        match self {
            Self::V1 { hierarchies } | Self::Hybrid { hierarchies, .. } => hierarchies,
            Self::V2 { .. } => &[],
        }
    }

    /// The root of the v2 hierarchy, in a hybrid layout too.
    #[must_use]
    pub fn unified(&self) -> Option<&Path> {
        match self {
            Self::V1 { .. } => None,
            Self::Hybrid { unified, .. } => Some(unified),
            Self::V2 { mount } => Some(mount),
        }
    }

    /// Whether limits are those of v2.
    #[must_use]
    pub fn is_v2(&self) -> bool {
        matches!(self, Self::V2 { .. })
    }

    /// The root of the v1 hierarchy that has a controller.
    #[must_use]
    pub fn v1_mount(&self, controller: &str) -> Option<&Path> {
        self.hierarchies()
            .iter()
            .find(|hierarchy| hierarchy.controllers.iter().any(|name| name == controller))
            .map(|hierarchy| hierarchy.mount.as_path())
    }

    /// The names of the controllers that can limit something here.
    #[must_use]
    pub fn controllers(&self) -> Vec<String> {
        let of_v1 = self.hierarchies().iter().flat_map(|hierarchy| hierarchy.controllers.iter().cloned());
        let mut names: Vec<String> = of_v1.filter(|name| !name.starts_with("name=")).collect();
        if let Self::V2 { mount } = self {
            let text = std::fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
            names.extend(text.split_whitespace().map(str::to_owned));
        }
        names
    }
}

fn v1_controllers(super_options: &str) -> Vec<String> {
    super_options
        .split(',')
        .filter(|option| V1_CONTROLLERS.contains(option) || option.starts_with("name="))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use berth_linux::mount::parse_mountinfo;

    use super::*;

    fn layout(text: &str) -> Result<Layout> {
        Layout::from_mounts(&parse_mountinfo(text.as_bytes()))
    }

    #[test]
    fn a_lone_v2_mount_is_v2_even_with_a_named_v1_tree() {
        let v2 = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(layout(v2).unwrap(), Layout::V2 { mount: "/sys/fs/cgroup".into() });
        let named = format!("{v2}31 23 0:27 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n");
        assert!(layout(&named).unwrap().is_v2());
    }

    #[test]
    fn v1_controllers_with_a_v2_mount_are_hybrid_and_each_hierarchy_counts_once() {
        let text = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
            33 31 0:29 / /elsewhere/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
            34 31 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
            35 31 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let layout = layout(text).unwrap();
        assert!(matches!(layout, Layout::Hybrid { .. }));
        assert_eq!(layout.hierarchies().len(), 2);
        assert_eq!(layout.v1_mount("cpuacct"), Some(Path::new("/sys/fs/cgroup/cpu,cpuacct")));
        assert_eq!(layout.v1_mount("memory"), None);
        assert_eq!(layout.unified(), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(layout.controllers(), ["cpu", "cpuacct"]);
    }

    #[test]
    fn nothing_mounted_is_an_error() {
        assert!(matches!(layout("1 0 0:1 / / rw - ext4 /dev/vda rw\n"), Err(Error::NotMounted)));
        let v1 = layout("32 31 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n").unwrap();
        assert!(matches!(v1, Layout::V1 { .. }));
    }
}
