//! Mounts by descriptor, with the real kernel.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use berth_linux::mount::{
    AttrChange, MountAttrs, MoveMountFlags, Propagation, UnmountFlags, fs_context, mount_legacy, mount_setattr, mounts,
    move_mount, open_tree, pivot_root, umount,
};
use berth_linux::ns::{IdMap, NamespaceKind, open_ns, write_id_maps};
use berth_linux::process::{CloneArgs, CloneFlags, Fork, clone3, exit_now, pipe};
use berth_testkit::{TempState, in_namespaces};
use common::{in_child, single_threaded};
use rustix::fs::{CWD, Mode, OFlags};

fn tmpfs_at(path: &Path) {
    fs::create_dir_all(path).unwrap();
    let context = fs_context("tmpfs").unwrap();
    let mount = context.set_string("size", "1m").unwrap().create().unwrap().mount(MountAttrs::NOSUID).unwrap();
    move_mount(mount.as_fd(), CWD, path, MoveMountFlags::empty()).unwrap();
}

fn options_of(path: &Path) -> Option<berth_linux::mount::MountEntry> {
    mounts().unwrap().into_iter().rfind(|entry| entry.mount_point == path)
}

#[test]
fn a_filesystem_is_configured_made_attached_and_removed() {
    in_namespaces(|| {
        let state = TempState::new();
        let path = state.path().join("m");
        tmpfs_at(&path);
        let entry = options_of(&path).unwrap();
        assert_eq!(entry.fstype, "tmpfs");
        assert!(entry.has_option("nosuid") && entry.super_options.contains("size=1024k"));
        umount(&path, UnmountFlags::empty()).unwrap();
        assert!(options_of(&path).is_none());
        assert_eq!(umount(&path, UnmountFlags::empty()).unwrap_err().raw_errno(), Some(libc::EINVAL));
    });
}

#[test]
fn errors_carry_the_words_of_the_kernel() {
    in_namespaces(|| {
        let context = fs_context("tmpfs").unwrap();
        let error = context.set_string("no_such_option", "1").unwrap_err().to_string();
        assert!(error.starts_with("set filesystem option tmpfs, no_such_option: "), "{error}");
        assert!(error.contains("Unknown parameter"), "{error}");
        let error = fs_context("no_such_fs").unwrap_err();
        assert_eq!(error.raw_errno(), Some(libc::ENODEV));
    });
}

#[test]
fn an_overlay_takes_its_layers_by_descriptor_relative_names() {
    in_namespaces(|| {
        let state = TempState::new();
        for (dir, file) in [("a", "one"), ("b", "two"), ("upper", ""), ("work", ""), ("m", "")] {
            fs::create_dir(state.path().join(dir)).unwrap();
            if !file.is_empty() {
                fs::write(state.path().join(dir).join(file), file).unwrap();
            }
        }
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
        let context = fs_context("overlay").unwrap();
        if (numbers.next(), numbers.next()) >= (Some(6), Some(7)) {
            for dir in ["a", "b"] {
                context.set_string("lowerdir+", state.path().join(dir)).unwrap();
            }
        } else {
            // Older kernels have no option for one layer at a time.
            let dirs = ["a", "b"].map(|dir| state.path().join(dir).display().to_string());
            context.set_string("lowerdir", dirs.join(":").as_str()).unwrap();
        }
        context.set_string("upperdir", state.path().join("upper")).unwrap();
        context.set_string("workdir", state.path().join("work")).unwrap();
        let mount = context.create().unwrap().mount(MountAttrs::empty()).unwrap();
        move_mount(mount.as_fd(), CWD, &state.path().join("m"), MoveMountFlags::empty()).unwrap();
        assert_eq!(fs::read_to_string(state.path().join("m/one")).unwrap(), "one");
        assert_eq!(fs::read_to_string(state.path().join("m/two")).unwrap(), "two");
        fs::remove_file(state.path().join("m/two")).unwrap();
        assert!(state.path().join("b/two").exists());
    });
}

#[test]
fn a_recursive_bind_can_be_made_read_only_with_all_below_it() {
    in_namespaces(|| {
        let state = TempState::new();
        let source = state.path().join("source");
        tmpfs_at(&source);
        tmpfs_at(&source.join("inner"));
        let target = state.path().join("target");
        fs::create_dir(&target).unwrap();
        let clone = open_tree(CWD, &source, true, true).unwrap();
        let change = AttrChange {
            set: MountAttrs::RDONLY | MountAttrs::NOEXEC,
            propagation: Some(Propagation::Private),
            ..AttrChange::default()
        };
        mount_setattr(clone.as_fd(), Path::new(""), true, change).unwrap();
        let location = rustix::fs::open(&target, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        move_mount(clone.as_fd(), location.as_fd(), Path::new(""), MoveMountFlags::empty()).unwrap();
        for path in ["target/x", "target/inner/x"] {
            let error = fs::write(state.path().join(path), "x").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{path}");
        }
        fs::write(source.join("inner/x"), "x").unwrap();
        // The plain form takes only the top along.
        let top = open_tree(CWD, &source, true, false).unwrap();
        assert!(rustix::fs::statat(&top, "inner/x", rustix::fs::AtFlags::empty()).is_err());
    });
}

#[test]
fn a_classic_bind_and_remount_still_work() {
    in_namespaces(|| {
        let state = TempState::new();
        let (source, target) = (state.dir("source"), state.dir("target"));
        mount_legacy(Some(source.as_os_str()), &target, None, libc::MS_BIND, None).unwrap();
        let flags = libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY;
        mount_legacy(None, &target, None, flags, None).unwrap();
        assert!(options_of(&target).unwrap().has_option("ro"));
        let error = mount_legacy(None, Path::new("/no/such"), None, libc::MS_BIND, None).unwrap_err();
        assert_eq!(error.to_string(), "mount /no/such");
    });
}

#[test]
fn ids_of_a_mount_go_through_a_user_namespace() {
    in_namespaces(|| {
        single_threaded(|| {
            let state = TempState::new();
            // A folder on disk: tmpfs takes part since kernel 6.3 only.
            let source = state.path().join("source");
            fs::create_dir(&source).unwrap();
            fs::write(source.join("file"), "x").unwrap();
            let (reader, writer) = pipe().unwrap();
            let userns = match clone3(CloneArgs { flags: CloneFlags::NEWUSER, ..CloneArgs::default() }).unwrap() {
                Fork::Child => {
                    drop(writer);
                    let mut byte = [0u8; 1];
                    let _ = rustix::io::read(&reader, &mut byte);
                    exit_now(0)
                }
                Fork::Parent { pid, .. } => {
                    let map = [IdMap { inside: 0, outside: 70_000, size: 1000 }];
                    write_id_maps(pid, &map, &map).unwrap();
                    open_ns(Some(pid), NamespaceKind::User).unwrap()
                }
            };
            drop(writer);
            let clone = open_tree(CWD, &source, true, false).unwrap();
            let change = AttrChange { userns: Some(userns.as_fd()), ..AttrChange::default() };
            mount_setattr(clone.as_fd(), Path::new(""), false, change).unwrap();
            let stat = rustix::fs::statat(&clone, "file", rustix::fs::AtFlags::empty()).unwrap();
            assert_eq!((stat.st_uid, stat.st_gid), (70_000, 70_000));
        })
    });
}

#[test]
fn nothing_of_the_old_root_stays_after_pivot_root() {
    in_namespaces(|| {
        single_threaded(|| {
            let state = TempState::new();
            let root = state.path().join("root");
            tmpfs_at(&root);
            fs::create_dir(root.join("proc")).unwrap();
            fs::write(root.join("marker"), "new").unwrap();
            let host_mounts = mounts().unwrap().len();
            let status = in_child(CloneFlags::NEWNS | CloneFlags::NEWPID, || {
                let private = AttrChange { propagation: Some(Propagation::Private), ..AttrChange::default() };
                mount_setattr(CWD, Path::new("/"), true, private).unwrap();
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let new_root = rustix::fs::open(&root, flags, Mode::empty()).unwrap();
                pivot_root(new_root.as_fd()).unwrap();
                assert_eq!(fs::read_to_string("/marker").unwrap(), "new");
                assert_eq!(std::env::current_dir().unwrap(), Path::new("/"));
                let proc = fs_context("proc").unwrap().create().unwrap().mount(MountAttrs::empty()).unwrap();
                move_mount(proc.as_fd(), CWD, Path::new("/proc"), MoveMountFlags::empty()).unwrap();
                assert_eq!(mounts().unwrap().len(), 2);
                0
            });
            assert_eq!(status.code, 0);
            assert_eq!(mounts().unwrap().len(), host_mounts);
        })
    });
}
