//! What a shim makes before there is a container: namespaces, hostname, sysctls, `/dev/shm`, pause; and how it ends.
#![allow(clippy::unwrap_used, clippy::type_complexity, reason = "a test panics")]

mod support;

use std::os::fd::{AsFd, OwnedFd};

use berth_linux::ns::{NamespaceKind, ns_id, open_ns};
use berth_shim::protocol::{FailureKind, IdMapping, NetMode, NsMode, PodNamespace, Reply, Request, UserNamespace};
use berth_testkit::{in_namespaces, wait_until};
use support::{Client, PATIENCE, Shim, children_named};

fn namespaces(client: &mut Client) -> (Vec<(PodNamespace, OwnedFd)>, Option<(i32, OwnedFd)>) {
    match client.call(Request::Namespaces, &[]) {
        (Reply::Namespaces { kinds, pause }, mut fds) => {
            let pause = pause.map(|pid| (pid, fds.pop().unwrap()));
            assert_eq!(kinds.len(), fds.len());
            (kinds.into_iter().zip(fds).collect(), pause)
        }
        (other, _) => panic!("{other:?}"),
    }
}

fn host(kind: NamespaceKind) -> (u64, u64) {
    ns_id(open_ns(None, kind).unwrap().as_fd()).unwrap()
}

fn in_child<T: Send>(fds: &[(PodNamespace, OwnedFd)], run: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            for (kind, fd) in fds {
                let kind = match kind {
                    PodNamespace::Net => NamespaceKind::Net,
                    PodNamespace::Ipc => NamespaceKind::Ipc,
                    PodNamespace::Uts => NamespaceKind::Uts,
                    _ => continue,
                };
                berth_linux::ns::setns(fd.as_fd(), kind).unwrap();
            }
            run()
        });
        work.join().unwrap()
    })
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn a_pod_gets_namespaces_of_its_own_with_hostname_and_sysctls() {
    in_namespaces(|| {
        let shim = Shim::start_with(|config| {
            config.sysctls.insert("net.ipv4.ip_local_port_range".into(), "2000 3000".into());
            config.sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
        })
        .unwrap();
        let mut client = shim.client();
        let (fds, pause) = namespaces(&mut client);
        assert!(pause.is_none());
        let kinds: Vec<PodNamespace> = fds.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [PodNamespace::Net, PodNamespace::Ipc, PodNamespace::Uts]);
        for (fd, kind) in fds.iter().zip([NamespaceKind::Net, NamespaceKind::Ipc, NamespaceKind::Uts]) {
            assert_ne!(ns_id(fd.1.as_fd()).unwrap(), host(kind));
        }
        let (name, ports, forced) = in_child(&fds, || {
            let thread = "/proc/thread-self";
            assert!(std::path::Path::new(thread).exists());
            (
                rustix::system::uname().nodename().to_string_lossy().into_owned(),
                read("/proc/sys/net/ipv4/ip_local_port_range"),
                read("/proc/sys/kernel/shm_rmid_forced"),
            )
        });
        assert_eq!((name.as_str(), ports.as_str(), forced.as_str()), ("the-pod", "2000 3000", "1"));
        assert_ne!(read("/proc/sys/net/ipv4/ip_local_port_range"), "2000 3000");
        // The shim itself stays outside, but for its mounts.
        let own = |kind| ns_id(open_ns(rustix::process::Pid::from_raw(shim.pid), kind).unwrap().as_fd()).unwrap();
        for kind in [NamespaceKind::Net, NamespaceKind::Ipc, NamespaceKind::Uts, NamespaceKind::User] {
            assert_eq!(own(kind), host(kind));
        }
        assert_ne!(own(NamespaceKind::Mount), host(NamespaceKind::Mount));
        shim.shut_down(&mut client);
    });
}

#[test]
fn a_pod_on_the_hosts_namespaces_has_none() {
    in_namespaces(|| {
        let shim = Shim::start_with(|config| {
            config.net = NetMode::Host;
            config.ipc = NsMode::Host;
            config.uts = NsMode::Host;
            config.shm_size = 0;
        })
        .unwrap();
        let mut client = shim.client();
        assert!(namespaces(&mut client).0.is_empty());
        shim.shut_down(&mut client);
    });
}

#[test]
fn namespaces_of_a_pod_with_a_user_namespace_belong_to_it() {
    in_namespaces(|| {
        let map = vec![IdMapping { container_id: 0, host_id: 100_000, size: 65_536 }];
        let user = UserNamespace { uid_mappings: map.clone(), gid_mappings: map };
        let shim = Shim::start_with(|config| {
            config.user = Some(user);
            config.share_pid = true;
            config.sysctls.insert("net.ipv4.ping_group_range".into(), "0 0".into());
        })
        .unwrap();
        let mut client = shim.client();
        let (fds, pause) = namespaces(&mut client);
        let kinds: Vec<PodNamespace> = fds.iter().map(|(kind, _)| *kind).collect();
        let all = [PodNamespace::User, PodNamespace::Net, PodNamespace::Ipc, PodNamespace::Uts, PodNamespace::Pid];
        assert_eq!(kinds, all);
        let user = ns_id(fds[0].1.as_fd()).unwrap();
        for (kind, fd) in &fds[1..] {
            let owner = berth_linux::ns::owner(fd.as_fd()).unwrap();
            assert_eq!(ns_id(owner.as_fd()).unwrap(), user, "{kind:?}");
        }
        let (pause, _) = pause.unwrap();
        let status = std::fs::read_to_string(format!("/proc/{pause}/status")).unwrap();
        assert!(status.contains("CapPrm:\t0000000000000000"), "{status}");
        shim.shut_down(&mut client);
        assert!(wait_until(PATIENCE, || !std::path::Path::new(&format!("/proc/{pause}")).exists()));
    });
}

#[test]
fn pause_holds_nothing_and_its_death_is_told() {
    in_namespaces(|| {
        let shim = Shim::start_with(|config| config.share_pid = true).unwrap();
        let mut client = shim.client();
        let (_, pause) = namespaces(&mut client);
        let (pause, pidfd) = pause.unwrap();
        let status = std::fs::read_to_string(format!("/proc/{pause}/status")).unwrap();
        for line in
            ["CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Uid:\t65535\t65535\t65535\t65535"]
        {
            assert!(status.contains(line), "{line} is not in {status}");
        }
        assert!(status.lines().any(|line| line.starts_with("NSpid:") && line.ends_with("\t1")), "{status}");
        // Standard streams and its signalfd.
        assert!(std::fs::read_dir(format!("/proc/{pause}/fd")).unwrap().count() <= 4);
        let mounts = std::fs::read_to_string(format!("/proc/{pause}/mounts")).unwrap();
        assert_eq!(mounts.lines().count(), 1, "{mounts}");
        assert_eq!(std::fs::read_dir(format!("/proc/{pause}/root")).unwrap().count(), 0);
        for kind in [NamespaceKind::Net, NamespaceKind::Ipc, NamespaceKind::Uts, NamespaceKind::Mount, NamespaceKind::Pid] {
            let pid = rustix::process::Pid::from_raw(pause);
            assert_ne!(ns_id(open_ns(pid, kind).unwrap().as_fd()).unwrap(), host(kind), "{kind:?}");
        }
        berth_linux::pidfd::PidFd::from(pidfd).signal(9).unwrap();
        let pid = client.event(|event| match event {
            berth_shim::protocol::Event::PauseExited { pid } => Some(*pid),
            _ => None,
        });
        assert_eq!(pid, pause);
        assert_eq!(client.state().pause, None);
        shim.shut_down(&mut client);
    });
}

#[test]
fn the_shim_lives_in_its_own_cgroup_and_session_and_only_a_request_ends_it() {
    in_namespaces(|| {
        let shim = Shim::start();
        let mut client = shim.client();
        let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", shim.pid)).unwrap();
        // v1 has a line for each controller, v2 only the one without a name.
        let limited = |line: &str| line.contains("memory") || cgroups.lines().count() == 1;
        assert!(cgroups.lines().any(|line| limited(line) && line.ends_with("/pod/s1")), "{cgroups}");
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", shim.pid)).unwrap();
        let session = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(3).unwrap().to_owned();
        assert_eq!(session, shim.pid.to_string());
        for signal in [15, 1, 2, 10, 13] {
            shim.pidfd.signal(signal).unwrap();
        }
        assert_eq!(client.state().containers, []);
        assert!(children_named(shim.pid, "berth-log").is_empty());
        shim.shut_down(&mut client);
        // The sandbox's cgroup can be removed at once.
        let layout = berth_cgroup::Layout::detect().unwrap();
        let path = berth_cgroup::CgroupPath::parse("/pod/s1").unwrap();
        berth_cgroup::Cgroup::open(&layout, &path).unwrap().delete().unwrap();
    });
}

#[test]
fn a_shim_outlives_its_agents_and_serves_several() {
    in_namespaces(|| {
        let shim = Shim::start();
        let mut first = shim.client();
        let mut second = shim.client();
        assert_eq!(first.state(), second.state());
        drop(first);
        assert_eq!(second.state().sandbox_id, "s1");
        drop(second);
        let mut third = shim.client();
        assert_eq!(third.state().pid, shim.pid);
        shim.shut_down(&mut third);
    });
}

#[test]
fn a_bad_configuration_is_refused_with_its_reason_and_leaves_no_process() {
    in_namespaces(|| {
        for (sysctl, reason) in [
            ("kernel.core_pattern", "sysctl kernel.core_pattern is not of a namespace"),
            ("net.ipv4.no_such_thing", "set sysctl net.ipv4.no_such_thing: No such file"),
        ] {
            let error = Shim::start_with(|config| {
                config.sysctls.insert(sysctl.into(), "1".into());
            })
            .err()
            .unwrap();
            assert!(error.contains(reason), "{error}");
        }
        let error = Shim::start_with(|config| config.runtime_dir = "/nowhere".into()).err().unwrap();
        assert!(error.contains("open the runtime folder"), "{error}");
    });
}

#[test]
fn requests_that_cannot_be_read_or_done_are_answered() {
    in_namespaces(|| {
        let shim = Shim::start();
        let mut client = shim.client();
        let kinds = [
            client.refused(Request::Start { id: "no".into() }).kind,
            client.refused(Request::Kill { id: "no".into(), exec: None, signal: 15, all: false }).kind,
            client.refused(Request::ReopenLog { id: "no".into() }).kind,
            client.refused(Request::Attach { id: "no".into(), stdin: false, stdout: true, stderr: false }).kind,
            client.refused(Request::Resize { id: "no".into(), exec: None, width: 1, height: 1 }).kind,
        ];
        assert_eq!(kinds, [FailureKind::NotFound; 5]);
        client.ask(Request::Delete { id: "no".into(), force: false });
        for bad in ["", "../x", "a/b", ".hidden"] {
            assert_eq!(client.create(bad, &shim.spec(&["true"]), shim.ext("x")).unwrap_err().kind, FailureKind::Invalid);
        }
        let reply = client.unknown_request();
        assert!(matches!(reply, Reply::Error(failure) if failure.kind == FailureKind::Unsupported));
        shim.shut_down(&mut client);
    });
}
