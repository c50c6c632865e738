//! Namespaces: entering, identifying and mapping, with the real kernel.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;

use berth_linux::ns::{
    IdMap, NamespaceKind, deny_setgroups, in_each_netns, ns_id, open_ns, open_ns_for_children, open_ns_path, setns, unshare,
    with_netns, write_id_maps,
};
use berth_linux::process::{CloneArgs, CloneFlags, Fork, clone3, exit_now, pipe};
use berth_testkit::in_namespaces;
use common::{in_child, single_threaded};

#[test]
fn a_function_runs_in_another_network_namespace_and_the_caller_stays() {
    in_namespaces(|| {
        let before = ns_id(open_ns(None, NamespaceKind::Net).unwrap().as_fd()).unwrap();
        let other = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    unshare(CloneFlags::NEWNET).unwrap();
                    open_ns(None, NamespaceKind::Net).unwrap()
                })
                .join()
                .unwrap()
        });
        let inside = with_netns(other.as_fd(), || {
            let own = ns_id(open_ns(None, NamespaceKind::Net).unwrap().as_fd()).unwrap();
            (own, std::fs::read_to_string("/proc/thread-self/net/dev").unwrap())
        });
        let (inside, devices) = inside.unwrap();
        assert_eq!(inside, ns_id(other.as_fd()).unwrap());
        assert_ne!(inside, before);
        assert!(!devices.contains("uplink0"));
        let own = open_ns(None, NamespaceKind::Net).unwrap();
        let not_one = std::fs::File::open("/dev/null").unwrap();
        let each = in_each_netns([own.as_fd(), not_one.as_fd(), other.as_fd()].into_iter(), || {
            ns_id(open_ns(None, NamespaceKind::Net).unwrap().as_fd()).unwrap()
        });
        assert_eq!(each.unwrap(), [Some(before), None, Some(inside)]);
        assert_eq!(ns_id(open_ns(None, NamespaceKind::Net).unwrap().as_fd()).unwrap(), before);
    });
}

#[test]
fn only_a_namespace_of_the_right_kind_is_opened() {
    assert!(open_ns_path(Path::new("/proc/self/ns/uts"), NamespaceKind::Uts).is_ok());
    for path in ["/proc/self/ns/uts", "/proc/self/status", "/proc", "/no/such"] {
        assert!(open_ns_path(Path::new(path), NamespaceKind::Net).is_err(), "{path}");
    }
    let uts = open_ns(None, NamespaceKind::Uts).unwrap();
    assert!(setns(uts.as_fd(), NamespaceKind::Net).is_err());
}

#[test]
fn every_kind_can_be_made_and_opened() {
    in_namespaces(|| {
        single_threaded(|| {
            let flags = NamespaceKind::ALL.iter().map(|kind| kind.clone_flag()).collect::<CloneFlags>() - CloneFlags::NEWTIME;
            let before: Vec<_> =
                NamespaceKind::ALL.iter().map(|kind| ns_id(open_ns(None, *kind).unwrap().as_fd()).unwrap()).collect();
            let status = in_child(flags, || {
                for (kind, before) in NamespaceKind::ALL.iter().zip(before) {
                    let now = ns_id(open_ns(None, *kind).unwrap().as_fd()).unwrap();
                    assert_eq!(now == before, *kind == NamespaceKind::Time, "{kind:?}");
                }
                0
            });
            assert_eq!(status.code, 0);
            let status = in_child(CloneFlags::empty(), || {
                unshare(CloneFlags::NEWPID | CloneFlags::NEWTIME).unwrap();
                for kind in [NamespaceKind::Pid, NamespaceKind::Time] {
                    let children = open_ns_for_children(kind);
                    // The PID namespace of the children has an identity only when the first one lives.
                    let Ok(children) = children else { continue };
                    assert_ne!(ns_id(children.as_fd()).unwrap(), ns_id(open_ns(None, kind).unwrap().as_fd()).unwrap());
                }
                0
            });
            assert_eq!(status.code, 0);
        })
    });
}

#[test]
fn a_user_namespace_gets_its_maps_from_outside_and_its_setgroups_denied() {
    in_namespaces(|| {
        single_threaded(|| {
            let (go_reader, go_writer) = pipe().unwrap();
            let (ready_reader, ready_writer) = pipe().unwrap();
            let child = match clone3(CloneArgs { flags: CloneFlags::NEWUSER, ..CloneArgs::default() }).unwrap() {
                Fork::Child => {
                    drop((go_writer, ready_reader));
                    let mut byte = [0u8; 1];
                    let _ = rustix::io::read(&go_reader, &mut byte);
                    let uid = rustix::process::getuid().as_raw();
                    let setgroups = berth_linux::creds::set_groups(&[5]);
                    let unshared = unshare(CloneFlags::NEWNET | CloneFlags::NEWIPC | CloneFlags::NEWUTS);
                    let ok = uid == 7 && setgroups.is_err() && unshared.is_ok();
                    let _ = rustix::io::write(&ready_writer, &[u8::from(ok)]);
                    exit_now(0)
                }
                Fork::Parent { pid, pidfd } => {
                    drop((go_reader, ready_writer));
                    deny_setgroups(pid).unwrap();
                    let uids = [IdMap { inside: 0, outside: 100_000, size: 7 }, IdMap { inside: 7, outside: 0, size: 1 }];
                    let gids = [IdMap { inside: 0, outside: 0, size: 10 }];
                    write_id_maps(pid, &uids, &gids).unwrap();
                    let map = std::fs::read_to_string(format!("/proc/{}/uid_map", pid.as_raw_nonzero())).unwrap();
                    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "100000", "7", "7", "0", "1"]);
                    let again = write_id_maps(pid, &uids, &gids).unwrap_err();
                    assert_eq!(again.raw_errno(), Some(libc::EPERM));
                    berth_linux::pidfd::PidFd::from(pidfd)
                }
            };
            rustix::io::write(&go_writer, &[1]).unwrap();
            let mut byte = [0u8; 1];
            std::fs::File::from(ready_reader).read_exact(&mut byte).unwrap();
            assert_eq!(byte, [1]);
            assert_eq!(child.wait(false).unwrap().unwrap().code, 0);
        })
    });
}
