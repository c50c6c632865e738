//! The name of a cgroup, in the words of either driver. It says nothing about where hierarchies are mounted.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// Names a cgroup: a path of the cgroupfs driver, or a unit of the systemd driver.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CgroupPath {
    /// `/a/b/c`, below the root of every hierarchy. Starts with a slash and has no empty part, no `.` and no `..`.
    Fs(String),
    /// A scope of systemd's, written `slice:prefix:name`.
    Systemd {
        /// The slice's unit (`kubepods-burstable.slice`); empty is `system.slice`.
        slice: String,
        /// What stands before the name in the scope's unit.
        prefix: String,
        /// The name; one that ends in `.slice` is a slice itself.
        name: String,
    },
}

impl CgroupPath {
    /// Reads a path: with a slash at the beginning it is of the cgroupfs driver, with two colons of the systemd driver. Relative paths
    /// are taken from the root.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = |reason| Error::BadPath { path: text.to_owned(), reason };
        if text.bytes().any(|byte| byte == 0 || byte == b'\n') {
            return Err(bad("it has a control character"));
        }
        if !text.starts_with('/') {
            let parts: Vec<&str> = text.split(':').collect();
            if let [slice, prefix, name] = parts[..] {
                return Self::systemd(slice, prefix, name).ok_or_else(|| bad("it is no unit of systemd's"));
            }
        }
        let mut path = String::with_capacity(text.len() + 1);
        for part in text.split('/').filter(|part| !part.is_empty() && *part != ".") {
            if part == ".." {
                return Err(bad("it has a part '..'"));
            }
            if part.len() > 255 {
                return Err(bad("a part is longer than 255 bytes"));
            }
            path.push('/');
            path.push_str(part);
        }
        if path.is_empty() {
            return Err(bad("it is the root"));
        }
        Ok(Self::Fs(path))
    }

    fn systemd(slice: &str, prefix: &str, name: &str) -> Option<Self> {
        let plain = |part: &str| !part.contains('/') && part != "." && part != "..";
        let slice_ok = slice.is_empty() || (slice.ends_with(".slice") && slice_parents(slice).is_some());
        let ok = !name.is_empty() && slice_ok && plain(slice) && plain(prefix) && plain(name);
        ok.then(|| Self::Systemd { slice: slice.to_owned(), prefix: prefix.to_owned(), name: name.to_owned() })
    }

    /// A cgroup below this one. A systemd scope has no children of its own name.
    pub fn child(&self, name: &str) -> Result<Self> {
        let bad = |reason| Error::BadPath { path: format!("{self}/{name}"), reason };
        match self {
            Self::Fs(path) => {
                if name.is_empty() || name.contains('/') || name == "." || name == ".." {
                    return Err(bad("the child's name is no single part"));
                }
                Self::parse(&format!("{path}/{name}"))
            }
            Self::Systemd { .. } => Err(bad("a unit of systemd's has no children by name")),
        }
    }

    /// The cgroup above, if there is one below the root.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        let Self::Fs(path) = self else { return None };
        let (parent, _) = path.rsplit_once('/')?;
        (!parent.is_empty()).then(|| Self::Fs(parent.to_owned()))
    }

    /// The name of systemd's unit, for a path of its form.
    #[must_use]
    pub fn unit(&self) -> Option<String> {
        let Self::Systemd { .. } = self else { return None };
        self.fs_path().rsplit('/').next().map(str::to_owned)
    }

    /// The slice of systemd's that the unit is in, for a path of its form.
    #[must_use]
    pub fn slice(&self) -> Option<&str> {
        match self {
            Self::Fs(_) => None,
            Self::Systemd { slice, .. } if slice.is_empty() => Some("system.slice"),
            Self::Systemd { slice, .. } => Some(slice),
        }
    }

    /// Whether it is a slice of systemd's: one that is there without a process.
    #[must_use]
    pub fn is_slice(&self) -> bool {
        matches!(self, Self::Systemd { name, .. } if name.ends_with(".slice"))
    }

    /// The slice of systemd's that a path of folders ends in, as the kubelet writes it: `/a.slice/a-b.slice`.
    #[must_use]
    pub fn of_slice(path: &str) -> Option<Self> {
        let name = path.trim_end_matches('/').rsplit('/').next().filter(|name| name.ends_with(".slice"))?;
        slice_parents(name)?;
        let slice =
            name.trim_end_matches(".slice").rsplit_once('-').map_or("-.slice".to_owned(), |(above, _)| format!("{above}.slice"));
        Self::systemd(&slice, "", name)
    }

    /// The path below a hierarchy's root, with a slash at the beginning: where systemd puts the unit, for its form.
    #[must_use]
    pub fn fs_path(&self) -> String {
        match self {
            Self::Fs(path) => path.clone(),
            Self::Systemd { slice, prefix, name } => {
                let slice = if slice.is_empty() { "system.slice" } else { slice };
                let mut path = slice_parents(slice).unwrap_or_default();
                path.push('/');
                if !name.ends_with(".slice") && !prefix.is_empty() {
                    path.push_str(prefix);
                    path.push('-');
                }
                path.push_str(name);
                if !name.ends_with(".slice") {
                    path.push_str(".scope");
                }
                path
            }
        }
    }
}

/// The folders of a slice: `a-b.slice` is `/a.slice/a-b.slice`, and `-.slice` is the root.
fn slice_parents(slice: &str) -> Option<String> {
    let stem = slice.strip_suffix(".slice")?;
    if stem == "-" {
        return Some(String::new());
    }
    let mut path = String::new();
    let mut prefix = String::new();
    for part in stem.split('-') {
        if part.is_empty() {
            return None;
        }
        prefix.push_str(part);
        path.push('/');
        path.push_str(&prefix);
        path.push_str(".slice");
        prefix.push('-');
    }
    Some(path)
}

impl FromStr for CgroupPath {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

impl fmt::Display for CgroupPath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fs(path) => formatter.write_str(path),
            Self::Systemd { slice, prefix, name } => write!(formatter, "{slice}:{prefix}:{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_normalised_and_escapes_refused() {
        for (text, path) in [
            ("/a/b", Some("/a/b")),
            ("a//b/./c/", Some("/a/b/c")),
            ("/kubepods/burstable/pod1", Some("/kubepods/burstable/pod1")),
            ("/a:b:c", Some("/a:b:c")),
            ("/", None),
            ("", None),
            ("/a/../b", None),
            ("/a\nb", None),
            ("a.slice:x/y:z", None),
            ("a:b:c", None),
        ] {
            assert_eq!(CgroupPath::parse(text).ok().map(|path| path.to_string()).as_deref(), path, "{text:?}");
        }
    }

    #[test]
    fn a_systemd_unit_has_the_folder_that_systemd_gives_it() {
        for (text, path) in [
            (
                "kubepods-burstable-pod1.slice:cri-containerd:abc",
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope",
            ),
            (":runc:x", "/system.slice/runc-x.scope"),
            ("-.slice::x", "/x.scope"),
            ("a.slice::b.slice", "/a.slice/b.slice"),
        ] {
            let parsed = CgroupPath::parse(text).unwrap();
            assert!(matches!(parsed, CgroupPath::Systemd { .. }));
            assert_eq!(parsed.fs_path(), path);
            assert_eq!(parsed.to_string(), text);
        }
    }

    #[test]
    fn the_last_part_of_a_slices_path_is_the_unit() {
        let slice = CgroupPath::of_slice("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice").unwrap();
        assert_eq!(slice.to_string(), "kubepods-burstable.slice::kubepods-burstable-pod1_2.slice");
        assert_eq!(slice.unit().as_deref(), Some("kubepods-burstable-pod1_2.slice"));
        assert!(slice.is_slice());
        assert_eq!(slice.fs_path(), "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice");
        assert_eq!(CgroupPath::of_slice("/test.slice").unwrap().fs_path(), "/test.slice");
        for other in ["/kubepods/pod1", "/a--b.slice", "", "/.slice"] {
            assert_eq!(CgroupPath::of_slice(other), None, "{other}");
        }
        let scope = CgroupPath::parse("a-b.slice:berth:x").unwrap();
        assert_eq!((scope.unit().as_deref(), scope.slice(), scope.is_slice()), (Some("berth-x.scope"), Some("a-b.slice"), false));
        assert_eq!(CgroupPath::parse("/a.slice").unwrap().unit(), None);
    }

    #[test]
    fn children_and_parents_stay_below_the_root() {
        let path = CgroupPath::parse("/a").unwrap();
        let child = path.child("b").unwrap();
        assert_eq!(child.to_string(), "/a/b");
        assert_eq!(child.parent(), Some(path.clone()));
        assert_eq!(path.parent(), None);
        for name in ["", "..", ".", "x/y"] {
            assert!(path.child(name).is_err(), "{name:?}");
        }
    }
}
