//! The container's view of the control groups: what a mount of type cgroup means on each layout.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use berth_cgroup::Layout;
use berth_linux::beneath::Root;
use berth_linux::mount::{self, MountAttrs};
use rustix::fs::{CWD, Mode};

use super::rootfs::{attach, filesystem, set_attributes, set_propagation};
use super::{Container, Done, During, Failure};
use crate::plan::{Change, Mount};

/// Mounts the view at the mount's destination.
pub(super) fn mount_view(root: &Root, mount: &Mount, container: &Container, warnings: &mut Vec<String>) -> Done {
    let what = || format!("mount {}", mount.destination.display());
    let Some(layout) = &container.layout else {
        return Err(Failure(format!("{}: this machine has no control groups mounted", what())));
    };
    let own = own_paths().during("read /proc/self/cgroup")?;
    let target = root.mkdir_all(&mount.destination, Mode::from(0o755)).during(what())?;
    if let Layout::V2 { mount: host } = layout {
        let tree = hierarchy_view(container, host, "cgroup2", &[], &own)?;
        set_attributes(tree.as_fd(), true, mount.change)
            .and_then(|later| {
                attach(tree.as_fd(), target.as_fd())?;
                later.finish(tree.as_fd())
            })
            .during(what())?;
        return propagate(mount, tree.as_fd());
    }
    // v1: a small folder with one mount per hierarchy, named as on the machine.
    let options = [("mode".to_owned(), Some("755".to_owned())), ("size".to_owned(), Some("64k".to_owned()))];
    let writable = Change { set: mount.change.set - MountAttrs::RDONLY, clear: mount.change.clear };
    let folder = filesystem("tmpfs", "tmpfs", &options, writable).during(what())?;
    attach(folder.as_fd(), target.as_fd()).during(what())?;
    for hierarchy in layout.hierarchies() {
        let Some(name) = hierarchy.mount.file_name() else { continue };
        let tree = hierarchy_view(container, &hierarchy.mount, "cgroup", &hierarchy.controllers, &own)?;
        let path = mount.destination.join(name);
        let place = root.mkdir_all(&path, Mode::from(0o755)).during(what())?;
        set_attributes(tree.as_fd(), true, mount.change)
            .and_then(|later| {
                attach(tree.as_fd(), place.as_fd())?;
                later.finish(tree.as_fd())
            })
            .during(format_args!("mount {}", path.display()))?;
        if hierarchy.controllers.len() > 1 {
            for controller in &hierarchy.controllers {
                // A name that the machine also has as a link; one that exists is the hierarchy itself.
                let _ = root.symlink(Path::new(name), &mount.destination.join(controller));
            }
        }
    }
    if let Some(unified) = layout.unified()
        && let (Some(name), true) = (unified.file_name(), unified.starts_with("/sys/fs/cgroup/"))
    {
        match hierarchy_view(container, unified, "cgroup2", &[], &own) {
            Ok(tree) => {
                let place = root.mkdir_all(&mount.destination.join(name), Mode::from(0o755)).during(what())?;
                set_attributes(tree.as_fd(), true, mount.change)
                    .and_then(|later| {
                        attach(tree.as_fd(), place.as_fd())?;
                        later.finish(tree.as_fd())
                    })
                    .during(what())?;
            }
            Err(failure) => warnings.push(format!("no unified control group view: {}", failure.0)),
        }
    }
    set_attributes(folder.as_fd(), false, mount.change).and_then(|later| later.finish(folder.as_fd())).during(what())?;
    propagate(mount, folder.as_fd())
}

fn propagate(mount: &Mount, tree: std::os::fd::BorrowedFd<'_>) -> Done {
    for (propagation, recursive) in &mount.propagation {
        set_propagation(tree, *recursive, *propagation).during(format_args!("mount {}", mount.destination.display()))?;
    }
    Ok(())
}

/// One hierarchy as the container sees it: with a cgroup namespace of its own a new mount, whose root is the namespace's; otherwise
/// the machine's, from the container's own group on.
fn hierarchy_view(
    container: &Container,
    host: &Path,
    kind: &str,
    controllers: &[String],
    own: &[(Vec<String>, PathBuf)],
) -> Done<std::os::fd::OwnedFd> {
    let what = || format!("view of {}", host.display());
    let change = Change { set: MountAttrs::NOSUID | MountAttrs::NODEV | MountAttrs::NOEXEC, clear: MountAttrs::empty() };
    if container.plan.in_cgroupns {
        let options: Vec<(String, Option<String>)> = controllers
            .iter()
            .map(|name| match name.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (name.clone(), None),
            })
            .chain(controllers.iter().any(|name| name.starts_with("name=")).then(|| ("none".to_owned(), None)))
            .collect();
        return filesystem(kind, kind, &options, change).during(what());
    }
    let path = own.iter().find(|(names, _)| names == controllers).map(|(_, path)| path.as_path());
    let path = path.unwrap_or(Path::new("/"));
    let source = host.join(path.strip_prefix("/").unwrap_or(path));
    let tree = mount::open_tree(CWD, &source, true, true).during(what())?;
    set_attributes(tree.as_fd(), true, change).map(drop).during(what())?;
    Ok(tree)
}

/// The process's own groups: controllers (none for v2) and path below the hierarchy's root.
fn own_paths() -> std::io::Result<Vec<(Vec<String>, PathBuf)>> {
    Ok(parse_own(&std::fs::read_to_string("/proc/self/cgroup")?))
}

fn parse_own(text: &str) -> Vec<(Vec<String>, PathBuf)> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let controllers = controllers.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
            Some((controllers, PathBuf::from(path)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_groups_are_read_with_their_controllers() {
        let own = parse_own("12:cpu,cpuacct:/a/b\n1:name=systemd:/\n0::/c:d\n");
        assert_eq!(own[0], (vec!["cpu".into(), "cpuacct".into()], "/a/b".into()));
        assert_eq!(own[1].0, ["name=systemd"]);
        assert_eq!(own[2], (Vec::new(), "/c:d".into()));
    }
}
