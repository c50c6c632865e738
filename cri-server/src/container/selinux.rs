//! SELinux: the labels of a pod and of its containers, and the relabelling of volumes. Must not know how labels are put on processes
//! and mounts: that is the OCI core's.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use berth_linux::beneath::Root;
use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use super::mounts::Opened;
use crate::error::{Error, file, invalid};
use crate::id::random_bytes;
use crate::spec::{ContainerSpec, Labels, MountSpec, SeLinux};

/// Categories 0 to 1023, as policies have them.
const CATEGORIES: u16 = 1024;
/// Folders of the machine itself: what else has to read them could no more.
const NEVER_RELABELLED: [&str; 20] = [
    "/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib64", "/media", "/mnt", "/opt", "/proc", "/root", "/run", "/sbin",
    "/srv", "/sys", "/tmp", "/usr", "/var",
];

/// A label in its parts: `user:role:type[:level]`.
fn parse_label(text: &str) -> Option<SeLinux> {
    let mut parts = text.splitn(4, ':').map(str::to_owned);
    let (user, role, kind) = (parts.next()?, parts.next()?, parts.next()?);
    Some(SeLinux { user, role, kind, level: parts.next().unwrap_or_default() })
}

fn join_label(label: &SeLinux) -> String {
    let SeLinux { user, role, kind, level } = label;
    if level.is_empty() { format!("{user}:{role}:{kind}") } else { format!("{user}:{role}:{kind}:{level}") }
}

/// The policy's labels of containers (`lxc_contexts`: `process = "system_u:system_r:container_t:s0"`).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Contexts {
    process: SeLinux,
    file: SeLinux,
}

fn parse_contexts(text: &str) -> Option<Contexts> {
    let values: BTreeMap<&str, &str> = text
        .lines()
        .filter(|line| !line.trim_start().starts_with(['#', ';']))
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.trim(), value.trim().trim_matches('"')))
        .collect();
    Some(Contexts { process: parse_label(values.get("process")?)?, file: parse_label(values.get("file")?)? })
}

/// What SELinux is on this machine.
#[derive(Debug)]
pub(crate) struct SeLinuxHost {
    contexts: Option<Contexts>,
    text: &'static str,
}

impl SeLinuxHost {
    /// Looks at the kernel and at the policy's files, once.
    pub(crate) fn detect() -> Self {
        if !Path::new("/sys/fs/selinux/enforce").exists() {
            return Self { contexts: None, text: "not active on this machine: selinux_options have no effect" };
        }
        let config = std::fs::read_to_string("/etc/selinux/config").unwrap_or_default();
        let policy = config.lines().find_map(|line| line.strip_prefix("SELINUXTYPE=")).unwrap_or("targeted").trim();
        let lists =
            ["/etc/containers/selinux/contexts/lxc_contexts".to_owned(), format!("/etc/selinux/{policy}/contexts/lxc_contexts")];
        let contexts = lists.iter().find_map(|path| parse_contexts(&std::fs::read_to_string(path).ok()?));
        let text = match contexts {
            Some(_) => "active",
            None => {
                "active, but its policy has no labels for containers: selinux_options have no effect (install container-selinux)"
            }
        };
        if contexts.is_none() {
            tracing::warn!("SELinux is {text}");
        }
        Self { contexts, text }
    }

    /// Of the status: how it stands.
    pub(crate) fn text(&self) -> &'static str {
        self.text
    }

    /// The labels of a new pod. `taken`: the levels of the other pods.
    pub(crate) fn of_pod(&self, wish: Option<&SeLinux>, taken: &BTreeSet<String>) -> Result<Labels, Error> {
        let Some(contexts) = &self.contexts else { return Ok(Labels::default()) };
        Ok(labels(contexts, wish, &free_level(taken)?))
    }

    /// The labels of a container: those of its pod, with the parts that it asks for itself. A privileged container's process has the
    /// label that the policy gives to what the agent starts.
    pub(crate) fn of_container(&self, spec: &ContainerSpec, pod: &Labels) -> Labels {
        let Some(contexts) = &self.contexts else { return Labels::default() };
        let wish = spec.security.selinux.as_ref().filter(|wish| **wish != SeLinux::default());
        let mut own = match (wish, parse_label(&pod.process)) {
            (None, Some(_)) => pod.clone(),
            (wish, pod) => labels(contexts, wish, &pod.map(|label| label.level).unwrap_or_default()),
        };
        if spec.security.privileged {
            own.process.clear();
        }
        own
    }
}

/// The policy's labels with a level of the pod's own and what is asked for. Files follow only in user and level.
fn labels(contexts: &Contexts, wish: Option<&SeLinux>, level: &str) -> Labels {
    let (mut process, mut mount) = (contexts.process.clone(), contexts.file.clone());
    if !process.level.is_empty() && !level.is_empty() {
        level.clone_into(&mut process.level);
        level.clone_into(&mut mount.level);
    }
    if let Some(wish) = wish {
        for (from, to) in [
            (&wish.user, vec![&mut process.user, &mut mount.user]),
            (&wish.role, vec![&mut process.role]),
            (&wish.kind, vec![&mut process.kind]),
            (&wish.level, vec![&mut process.level, &mut mount.level]),
        ] {
            for part in to {
                if !from.is_empty() {
                    from.clone_into(part);
                }
            }
        }
    }
    Labels { process: join_label(&process), mount: join_label(&mount) }
}

/// A pair of categories that no other pod has: there are half a million.
fn free_level(taken: &BTreeSet<String>) -> Result<String, Error> {
    for _ in 0..1000 {
        let bytes: [u8; 4] = random_bytes();
        let [one, other] = [[bytes[0], bytes[1]], [bytes[2], bytes[3]]].map(|pair| u16::from_ne_bytes(pair) % CATEGORIES);
        let level = format!("s0:c{},c{}", one.min(other), one.max(other));
        if one != other && !taken.contains(&level) {
            return Ok(level);
        }
    }
    Err(Error::Exhausted { what: "SELinux categories in use" })
}

/// The level of a label, for [`SeLinuxHost::of_pod`].
pub(crate) fn level_of(label: &str) -> Option<String> {
    parse_label(label).map(|label| label.level).filter(|level| !level.is_empty())
}

/// Labels the volumes that ask for it. Blocking: walks them.
pub(crate) fn relabel_volumes(specs: &[MountSpec], volumes: &[Opened], label: &str) -> Result<(), Error> {
    if label.is_empty() {
        return Ok(());
    }
    for (spec, volume) in specs.iter().zip(volumes).filter(|(spec, _)| spec.selinux_relabel && spec.image.is_none()) {
        let host = Path::new(&spec.host_path);
        let real = std::fs::canonicalize(host).map_err(file("resolve", host))?;
        if NEVER_RELABELLED.iter().any(|path| real == Path::new(path)) {
            return Err(invalid("mounts.selinux_relabel", format!("SELinux relabelling of {} is not allowed", real.display())));
        }
        relabel(volume.tree.as_fd(), label).map_err(file("label", host))?;
    }
    Ok(())
}

/// Labels what a descriptor is of and all below it; no link is followed. A file system without labels is left. A list instead of
/// recursion: a container nests folders as deep as it likes, and the agent's stack and descriptors are few.
pub(crate) fn relabel(at: BorrowedFd<'_>, label: &str) -> io::Result<()> {
    let own = format!("/proc/self/fd/{}", at.as_raw_fd());
    if FileType::from_raw_mode(rustix::fs::fstat(at)?.st_mode) == FileType::Directory {
        let root = Root::strict(rustix::fs::openat(at, ".", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?);
        let mut folders = vec![PathBuf::new()];
        while let Some(folder) = folders.pop() {
            relabel_entries(&root, &folder, label, &mut folders)?;
        }
    }
    unsupported_is_fine(rustix::fs::setxattr(&own, "security.selinux", label.as_bytes(), XattrFlags::empty()))
}

/// Labels what is in a folder; its folders are added to those that are to be entered.
fn relabel_entries(root: &Root, folder: &Path, label: &str, folders: &mut Vec<PathBuf>) -> io::Result<()> {
    let opened = match root.open_folder(folder) {
        // Removed meanwhile, or changed into something else.
        Err(error)
            if [Errno::NOENT, Errno::NOTDIR, Errno::LOOP].iter().any(|e| error.raw_os_error() == Some(e.raw_os_error())) =>
        {
            return Ok(());
        }
        opened => opened?,
    };
    let base = format!("/proc/self/fd/{}", opened.as_raw_fd());
    for entry in Dir::read_from(&opened)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if matches!(name, b"." | b"..") {
            continue;
        }
        // Where the kind is not told, entering finds out.
        if matches!(entry.file_type(), FileType::Directory | FileType::Unknown) {
            folders.push(folder.join(OsStr::from_bytes(name)));
        }
        let path = [base.as_bytes(), b"/", name].concat();
        match rustix::fs::lsetxattr(&path[..], "security.selinux", label.as_bytes(), XattrFlags::empty()) {
            Err(Errno::NOENT) => {} // Removed meanwhile.
            result => unsupported_is_fine(result)?,
        }
    }
    Ok(())
}

fn unsupported_is_fine(result: Result<(), Errno>) -> io::Result<()> {
    match result {
        Err(Errno::OPNOTSUPP | Errno::ROFS) => Ok(()),
        result => Ok(result?),
    }
}

/// Labels a file that the runtime adds. Blocking.
pub(crate) fn relabel_file(path: &Path, label: &str) -> Result<(), Error> {
    if label.is_empty() {
        return Ok(());
    }
    let fd = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| file("open", path)(errno.into()))?;
    relabel(fd.as_fd(), label).map_err(file("label", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Security;

    const LISTS: &str = "# of the policy\nprocess = \"system_u:system_r:container_t:s0\"\nfile = \"system_u:object_r:container_file_t:s0\"\n\
        ro_file=\"system_u:object_r:container_ro_file_t:s0\"\n";

    fn host() -> SeLinuxHost {
        SeLinuxHost { contexts: parse_contexts(LISTS), text: "active" }
    }

    fn wish(user: &str, role: &str, kind: &str, level: &str) -> Option<SeLinux> {
        Some(SeLinux { user: user.into(), role: role.into(), kind: kind.into(), level: level.into() })
    }

    fn container(selinux: Option<SeLinux>, privileged: bool) -> ContainerSpec {
        ContainerSpec { security: Security { selinux, privileged, ..Default::default() }, ..Default::default() }
    }

    #[test]
    fn parts_that_are_not_asked_for_are_the_policys_and_files_follow_in_user_and_level() {
        let contexts = parse_contexts(LISTS).unwrap();
        for (wish, process, mount) in [
            (None, "system_u:system_r:container_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"),
            (
                wish("", "", "", "s0:c4,c5"),
                "system_u:system_r:container_t:s0:c4,c5",
                "system_u:object_r:container_file_t:s0:c4,c5",
            ),
            (wish("", "", "spc_t", ""), "system_u:system_r:spc_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"),
            (wish("u", "r", "t", "s0"), "u:r:t:s0", "u:object_r:container_file_t:s0"),
        ] {
            let got = labels(&contexts, wish.as_ref(), "s0:c1,c2");
            assert_eq!((got.process.as_str(), got.mount.as_str()), (process, mount), "{wish:?}");
        }
    }

    #[test]
    fn containers_have_their_pods_categories_unless_they_ask_for_others() {
        let host = host();
        let pod = host.of_pod(None, &BTreeSet::new()).unwrap();
        let level = level_of(&pod.process).unwrap();
        assert!(level.starts_with("s0:c"), "{level}");
        assert_eq!(host.of_container(&container(None, false), &pod), pod);
        assert_eq!(host.of_container(&container(Some(SeLinux::default()), false), &pod), pod);
        let other = host.of_container(&container(wish("", "", "my_t", ""), false), &pod);
        assert_eq!(other.process, format!("system_u:system_r:my_t:{level}"));
        let privileged = host.of_container(&container(None, true), &pod);
        assert_eq!((privileged.process.as_str(), &privileged.mount), ("", &pod.mount));
    }

    #[test]
    fn two_pods_have_different_categories_and_without_selinux_there_are_no_labels() {
        let mut taken = BTreeSet::new();
        for _ in 0..200 {
            let pod = host().of_pod(None, &taken).unwrap();
            assert!(taken.insert(level_of(&pod.process).unwrap()));
        }
        let off = SeLinuxHost { contexts: None, text: "" };
        let asked = wish("", "", "", "s0:c1,c2");
        assert_eq!(off.of_pod(asked.as_ref(), &BTreeSet::new()).unwrap(), Labels::default());
        assert_eq!(off.of_container(&container(asked, false), &Labels::default()), Labels::default());
    }

    #[test]
    fn all_below_a_folder_is_labelled_and_links_are_not_followed() {
        berth_testkit::in_namespaces(|| {
            let dir = berth_testkit::TempState::new();
            std::fs::create_dir_all(dir.path().join("v/a/b")).unwrap();
            std::fs::write(dir.path().join("v/a/b/f"), "").unwrap();
            let deep = format!("v/deep{}", "/d".repeat(1500));
            std::fs::create_dir_all(dir.path().join(&deep)).unwrap();
            std::fs::write(dir.path().join("outside"), "").unwrap();
            std::os::unix::fs::symlink("../outside", dir.path().join("v/link")).unwrap();
            let folder = rustix::fs::open(dir.path().join("v"), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
            // Deeper than a recursion's stack or its descriptors would last.
            let small = std::thread::Builder::new().stack_size(64 << 10);
            let labelled = std::thread::scope(|scope| {
                small.spawn_scoped(scope, || relabel(folder.as_fd(), "u:object_r:t:s0")).unwrap().join().unwrap()
            });
            labelled.unwrap();
            let label = |name: &str| {
                let mut value = [0u8; 64];
                let read = rustix::fs::lgetxattr(dir.path().join(name), "security.selinux", &mut value[..]);
                read.map(|length| String::from_utf8_lossy(&value[..length]).trim_end_matches('\0').to_owned())
            };
            for name in ["v", "v/a", "v/a/b", "v/a/b/f", "v/link", &deep] {
                assert_eq!(label(name).unwrap(), "u:object_r:t:s0", "{name}");
            }
            assert!(label("outside").is_err());
        });
    }
}
