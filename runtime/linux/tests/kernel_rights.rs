//! Capabilities, ids, filters, limits, signals, terminals and sockets, with the real kernel.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(unsafe_code, reason = "keyctl, to look at what was made")]

mod common;

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use berth_linux::caps::{self, CapSet};
use berth_linux::epoll::{Epoll, EventFlags};
use berth_linux::eventfd::EventFd;
use berth_linux::netlink::{self, NetlinkSocket};
use berth_linux::prctl::{self, OomScore};
use berth_linux::process::CloneFlags;
use berth_linux::seccomp::{SeccompFlags, SockFilter, action_avail, is_available, load};
use berth_linux::signalfd::{SignalFd, reset_signals};
use berth_linux::{creds, session, tty};
use berth_testkit::in_namespaces;
use common::{in_child, open_fds, single_threaded};

fn status_field(name: &str) -> String {
    let text = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_once(':').unwrap().1.trim().to_owned()
}

#[test]
fn all_five_capability_sets_become_what_is_asked() {
    in_namespaces(|| {
        single_threaded(|| {
            let status = in_child(CloneFlags::empty(), || {
                let wanted = CapSet::from_name("CAP_NET_RAW").unwrap().union(CapSet::from_name("CAP_CHOWN").unwrap());
                caps::set_bounding_drop(wanted).unwrap();
                assert_eq!(caps::bounding(), wanted);
                caps::set_keepcaps(true).unwrap();
                creds::set_ids(1000, 1001, &[7, 8]).unwrap();
                caps::capset(wanted, wanted, wanted).unwrap();
                caps::set_ambient(wanted).unwrap();
                for field in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                    assert_eq!(u64::from_str_radix(&status_field(field), 16).unwrap(), wanted.0, "{field}");
                }
                assert_eq!(status_field("Uid"), "1000\t1000\t1000\t1000");
                assert_eq!(status_field("Gid"), "1001\t1001\t1001\t1001");
                assert_eq!(status_field("Groups").split_whitespace().collect::<Vec<_>>(), ["7", "8"]);
                caps::set_ambient(CapSet::EMPTY).unwrap();
                assert_eq!(u64::from_str_radix(&status_field("CapAmb"), 16).unwrap(), 0);
                0
            });
            assert_eq!(status.code, 0);
        })
    });
}

#[test]
fn a_loaded_filter_answers_for_the_kernel() {
    assert!(is_available());
    assert!(action_avail(libc::SECCOMP_RET_KILL_PROCESS));
    assert!(!action_avail(0x1234_0000));
    assert!(load(&[], SeccompFlags::empty()).is_err());
    in_namespaces(|| {
        single_threaded(|| {
            let status = in_child(CloneFlags::empty(), || {
                prctl::set_no_new_privs().unwrap();
                let statement = |code, k| SockFilter { code, jt: 0, jf: 0, k };
                let filter = [
                    statement(0x20, 0),
                    SockFilter { code: 0x15, jt: 0, jf: 1, k: libc::SYS_sethostname as u32 },
                    statement(0x06, libc::SECCOMP_RET_ERRNO | libc::EDOM as u32),
                    statement(0x06, libc::SECCOMP_RET_ALLOW),
                ];
                load(&filter, SeccompFlags::empty()).unwrap();
                let error = prctl::set_hostname("x").unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EDOM));
                assert_eq!(status_field("Seccomp"), "2");
                0
            });
            assert_eq!(status.code, 0);
        })
    });
}

#[test]
fn signals_come_by_descriptor_and_a_child_starts_clean() {
    in_namespaces(|| {
        single_threaded(|| {
            let signals = SignalFd::new(&[libc::SIGTERM, libc::SIGCHLD]).unwrap();
            assert_eq!(signals.read().unwrap(), None);
            let own = rustix::process::getpid();
            rustix::process::kill_process(own, rustix::process::Signal::TERM).unwrap();
            let info = signals.read().unwrap().unwrap();
            assert_eq!((info.signal, info.pid), (libc::SIGTERM, own.as_raw_nonzero().get()));
            let status = in_child(CloneFlags::empty(), || {
                reset_signals();
                assert_eq!(status_field("SigBlk"), "0000000000000000");
                assert_eq!(status_field("SigIgn"), "0000000000000000");
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM).unwrap();
                0
            });
            assert_eq!(status.signal, Some(libc::SIGTERM));
            assert_eq!(signals.read().unwrap().unwrap().signal, libc::SIGCHLD);
        })
    });
}

#[test]
fn epoll_tells_what_is_ready_by_token() {
    let epoll = Epoll::new().unwrap();
    let (one, two) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    epoll.add(one.as_fd(), 1, EventFlags::IN).unwrap();
    epoll.add(two.as_fd(), 2, EventFlags::IN).unwrap();
    let mut ready = Vec::new();
    epoll.wait(&mut ready, Some(Duration::ZERO)).unwrap();
    assert!(ready.is_empty());
    two.notify().unwrap();
    two.notify().unwrap();
    epoll.wait(&mut ready, Some(Duration::from_secs(5))).unwrap();
    assert_eq!(ready.iter().map(|ready| ready.token).collect::<Vec<_>>(), [2]);
    assert_eq!(two.take().unwrap(), 2);
    assert_eq!(two.take().unwrap(), 0);
    epoll.delete(two.as_fd()).unwrap();
    two.notify().unwrap();
    ready.clear();
    epoll.wait(&mut ready, Some(Duration::ZERO)).unwrap();
    assert!(ready.is_empty());
}

#[test]
fn a_terminal_has_a_size_and_becomes_the_controlling_one() {
    in_namespaces(|| {
        single_threaded(|| {
            let before = open_fds();
            let pty = tty::open_pty().unwrap();
            tty::set_window_size(pty.master.as_fd(), 132, 43).unwrap();
            assert_eq!(tty::window_size(pty.slave.as_fd()).unwrap(), (132, 43));
            let status = in_child(CloneFlags::empty(), || {
                session::new_session().unwrap();
                tty::set_controlling_terminal(pty.slave.as_fd()).unwrap();
                let mut tty = std::fs::File::options().write(true).open("/dev/tty").unwrap();
                tty.write_all(b"hello").unwrap();
                0
            });
            assert_eq!(status.code, 0);
            let mut master = std::fs::File::from(pty.master);
            let mut buffer = [0u8; 16];
            let read = master.read(&mut buffer).unwrap();
            assert_eq!(&buffer[..read], b"hello");
            drop((master, pty.slave));
            assert_eq!(open_fds(), before);
        })
    });
}

#[test]
fn a_netlink_dump_arrives_whole() {
    in_namespaces(|| {
        let socket = NetlinkSocket::open(netlink::ROUTE).unwrap();
        socket.set_strict().unwrap();
        socket.set_buffers(1 << 20, 1 << 20).unwrap();
        socket.set_receive_timeout(Some(Duration::from_secs(5))).unwrap();
        assert_ne!(socket.port().unwrap(), 0);
        // RTM_GETLINK, REQUEST | DUMP, an empty ifinfomsg.
        let mut request = Vec::new();
        request.extend(32u32.to_ne_bytes());
        request.extend(18u16.to_ne_bytes());
        request.extend(0x301u16.to_ne_bytes());
        request.extend(1u32.to_ne_bytes());
        request.extend([0u8; 20]);
        socket.send(&request).unwrap();
        let (mut buffer, mut names, mut done) = (Vec::new(), Vec::new(), false);
        while !done {
            socket.recv(&mut buffer).unwrap();
            let mut rest = &buffer[..];
            while rest.len() >= 16 {
                let length = u32::from_ne_bytes(rest[..4].try_into().unwrap()) as usize;
                done |= u16::from_ne_bytes(rest[4..6].try_into().unwrap()) == 3;
                names.extend(["lo", "uplink0"].iter().filter(|name| {
                    rest[..length].windows(name.len() + 1).any(|window| window == [name.as_bytes(), b"\0"].concat())
                }));
                rest = &rest[length.next_multiple_of(4).min(rest.len())..];
            }
        }
        assert!(names.contains(&"lo") && names.contains(&"uplink0"), "{names:?}");
        socket.set_receive_timeout(Some(Duration::from_millis(1))).unwrap();
        assert_eq!(socket.recv(&mut buffer).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    });
}

#[test]
fn settings_of_a_child_are_set_or_kept_and_said_so() {
    in_namespaces(|| {
        single_threaded(|| {
            let status = in_child(CloneFlags::NEWUTS, || {
                prctl::set_hostname("pod-1").unwrap();
                prctl::set_domainname("example").unwrap();
                assert_eq!(rustix::system::uname().nodename(), c"pod-1");
                prctl::set_umask(0o027);
                assert_eq!(prctl::set_umask(0o022), 0o027);
                prctl::set_parent_death_signal(libc::SIGKILL).unwrap();
                prctl::set_dumpable(false).unwrap();
                prctl::set_dumpable(true).unwrap();
                prctl::set_child_subreaper(true).unwrap();
                prctl::set_name(c"short").unwrap();
                assert_eq!(status_field("Name"), "short");
                assert_eq!(prctl::set_oom_score_adj(None, 500).unwrap(), OomScore::Set);
                // Lowering is allowed with CAP_SYS_RESOURCE alone.
                match prctl::set_oom_score_adj(None, -999).unwrap() {
                    OomScore::Set => {}
                    OomScore::Kept(value) => assert_eq!(value, 500),
                }
                session::new_session_keyring().unwrap();
                0
            });
            assert_eq!(status.code, 0);
        })
    });
}

#[test]
fn a_session_keyring_is_new_whatever_others_have_opened_theirs_to() {
    const KEYCTL_GET_KEYRING_ID: libc::c_long = 0;
    const KEYCTL_SETPERM: libc::c_long = 5;
    const SESSION: libc::c_long = -3;
    // SAFETY: numbers only.
    let id = || unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_GET_KEYRING_ID, SESSION, 0) };
    in_namespaces(|| {
        single_threaded(|| {
            if !session::new_session_keyring().unwrap() {
                return;
            }
            let first = id();
            // SAFETY: numbers only.
            assert_eq!(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_SETPERM, first, 0x3f3f_3f3fu32) }, 0);
            let status = in_child(CloneFlags::empty(), || {
                assert_eq!(id(), first);
                assert!(session::new_session_keyring().unwrap());
                assert!(id() > 0 && id() != first);
                0
            });
            assert_eq!(status.code, 0);
        })
    });
}

#[test]
fn a_boot_has_an_id_and_descriptors_are_close_on_exec() {
    let id = berth_linux::boot::boot_id().unwrap();
    assert_eq!(id.len(), 36);
    assert_eq!(id, berth_linux::boot::boot_id().unwrap());
    for fd in [
        EventFd::new().unwrap().into(),
        berth_linux::inotify::Inotify::new().unwrap().as_fd().try_clone_to_owned().unwrap(),
        NetlinkSocket::open(netlink::ROUTE).unwrap().into(),
        berth_linux::process::pipe().unwrap().0,
    ] {
        let flags = rustix::io::fcntl_getfd(&fd).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC), "{}", fd.as_raw_fd());
    }
}
