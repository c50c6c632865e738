//! Logs, attach, terminals and execs through the real protocol.
#![allow(clippy::unwrap_used, clippy::type_complexity, reason = "a test panics")]

mod support;

use std::os::fd::AsFd;

use berth_shim::protocol::{CreateExt, ExecExt, ExecSpec, FailureKind, LogSpec, Reply, Request};
use berth_testkit::{Sandbox, in_namespaces, wait_until};
use rustix::io::write;
use support::{Client, PATIENCE, Shim, children_named, parse_log, process, processes_with, read_all, read_until};

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

/// stdin, stdout, stderr of an attach.
fn attach(client: &mut Client, id: &str, wanted: [bool; 3]) -> [Option<std::os::fd::OwnedFd>; 3] {
    let request = Request::Attach { id: id.into(), stdin: wanted[0], stdout: wanted[1], stderr: wanted[2] };
    match client.call(request, &[]) {
        (Reply::Attached { stdin, stdout, stderr }, fds) => {
            let mut fds: Vec<_> = fds.into_iter().map(Some).collect();
            [stdin, stdout, stderr].map(|index| index.and_then(|index| fds[index as usize].take()))
        }
        (other, _) => panic!("{other:?}"),
    }
}

#[test]
fn both_streams_are_logged_with_long_and_unfinished_lines() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let script = "echo out; echo err >&2; head -c 20000 /dev/zero | tr '\\0' x; echo; printf 'crlf\\r\\n'; printf rest";
        shim.run(&mut client, "a", &sh(script));
        client.drained("a");
        let log = shim.log("a");
        let of = |wanted: &str| -> Vec<(&str, String)> {
            let lines = log.iter().filter(|line| line.0 == wanted);
            lines.map(|line| (line.1.as_str(), line.2.replace('x', ""))).collect()
        };
        let lengths: Vec<usize> = log.iter().filter(|line| line.2.starts_with('x')).map(|line| line.2.len()).collect();
        assert_eq!(of("stderr"), [("F", "err".to_owned())]);
        let text = |tag, text: &str| (tag, text.to_owned());
        assert_eq!(of("stdout"), [text("F", "out"), text("P", ""), text("F", ""), text("F", "crlf"), text("P", "rest")]);
        assert_eq!(lengths, [16_384, 3616]);
        let mode = std::fs::metadata(shim.log_path("a")).unwrap();
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777, 0o640);
        shim.shut_down(&mut client);
    });
}

#[test]
fn a_log_is_rotated_at_its_limit_without_losing_a_line() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let log = LogSpec { path: shim.log_path("a"), max_bytes: 20_000, max_files: 100 };
        let ext = CreateExt { log: Some(log), ..shim.ext("a") };
        client.create("a", &shim.spec(&sh("seq 1 5000")), ext).unwrap();
        client.start("a").unwrap();
        client.drained("a");
        let folder = shim.log_path("a").parent().unwrap().to_owned();
        let mut names: Vec<String> =
            std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names.rotate_left(1);
        assert!(names.len() > 5, "{names:?}");
        let mut lines = Vec::new();
        for name in &names {
            let text = std::fs::read_to_string(folder.join(name)).unwrap();
            assert!(text.len() <= 20_000);
            lines.extend(parse_log(&text));
        }
        assert_eq!(lines.len(), 5000);
        assert!(lines.iter().enumerate().all(|(n, line)| line.2 == (n + 1).to_string()));
        shim.shut_down(&mut client);
    });
}

#[test]
fn a_reopened_log_goes_on_in_a_new_file() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let script = "echo one; while [ ! -e /go ]; do sleep 0.01; done; echo two; sleep 1000";
        shim.run(&mut client, "a", &sh(script));
        let path = shim.log_path("a");
        let text = |path: &std::path::Path| std::fs::read_to_string(path).unwrap_or_default();
        assert!(wait_until(PATIENCE, || text(&path).contains("one")));
        let old = path.with_extension("log.20240101-000000");
        std::fs::rename(&path, &old).unwrap();
        client.ask(Request::ReopenLog { id: "a".into() });
        assert!(path.exists());
        std::fs::write(shim.rootfs.join("go"), "").unwrap();
        assert!(wait_until(PATIENCE, || text(&path).contains("two")));
        assert!(!text(&old).contains("two"));

        // Where no file can be made there is an error, and the old file stays in use.
        let folder = path.parent().unwrap();
        std::fs::rename(folder, folder.with_extension("away")).unwrap();
        std::fs::write(folder, "in the way").unwrap();
        let failure = client.refused(Request::ReopenLog { id: "a".into() });
        assert_eq!(failure.kind, FailureKind::Log);
        client.ask(Request::Kill { id: "a".into(), exec: None, signal: 9, all: false });
        client.exited("a");
        assert_eq!(client.refused(Request::ReopenLog { id: "a".into() }).kind, FailureKind::WrongState);
        shim.shut_down(&mut client);
    });
}

#[test]
fn a_log_that_cannot_be_opened_is_an_error_of_the_start() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        std::fs::write(shim.state.path().join("logs"), "in the way").unwrap();
        client.create("a", &shim.spec(&["true"]), shim.ext("a")).unwrap();
        let failure = client.start("a").unwrap_err();
        assert_eq!(failure.kind, FailureKind::Log);
        assert!(failure.message.contains("logs/a/0.log"), "{}", failure.message);
        // It can be tried again.
        std::fs::remove_file(shim.state.path().join("logs")).unwrap();
        client.ask(Request::ReopenLog { id: "a".into() });
        client.start("a").unwrap();
        assert_eq!(client.exited("a").code, 0);
        shim.shut_down(&mut client);
    });
}

#[test]
fn a_container_never_waits_for_a_full_disk() {
    Sandbox::new().shared_root().test(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let disk = shim.state.dir("logs");
        let flags = nix_mount_tmpfs(&disk, "size=64k");
        assert!(flags.is_ok());
        // The shim sees it: mounts of the host still arrive in its mount namespace.
        shim.run(
            &mut client,
            "a",
            &sh("i=0; while [ $i -lt 20000 ]; do echo 0123456789012345678901234567890123456789; i=$((i+1)); done"),
        );
        assert_eq!(client.exited("a").code, 0);
        client.drained("a");
        let dropped = client.state().log_bytes_dropped;
        assert!(dropped > 100_000, "{dropped}");
        let lines = shim.log("a");
        assert!(lines.len() > 100 && lines.iter().all(|line| line.2.len() == 40));
        shim.shut_down(&mut client);
        rustix::mount::unmount(&disk, rustix::mount::UnmountFlags::DETACH).unwrap();
    });
}

/// Mounts a tmpfs in the test's mount namespace; it reaches the shim's because that is a slave of it.
fn nix_mount_tmpfs(at: &std::path::Path, options: &str) -> Result<(), berth_linux::Error> {
    berth_linux::mount::mount_legacy(Some("tmpfs".as_ref()), at, Some("tmpfs"), 0, Some(options.as_ref()))
}

#[test]
fn lines_go_on_when_the_log_writer_dies() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let script = "i=0; while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); sleep 0.002; done";
        shim.run(&mut client, "a", &sh(script));
        assert!(wait_until(PATIENCE, || shim.log("a").len() > 20));
        let writer = children_named(shim.pid, "berth-log");
        assert_eq!(writer.len(), 1);
        let pidfd = berth_linux::pidfd::PidFd::open(rustix::process::Pid::from_raw(writer[0]).unwrap()).unwrap();
        pidfd.signal(9).unwrap();
        assert_eq!(client.exited("a").code, 0);
        client.drained("a");
        let lines = shim.log("a");
        // A chunk that was being written at that moment may be lost; what the pipe held is not.
        assert!(lines.len() >= 395, "{}", lines.len());
        assert_eq!(lines.last().unwrap().2, "line 399");
        shim.shut_down(&mut client);
    });
}

#[test]
fn output_is_written_to_its_end_when_the_shim_has_died() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let script = "echo one; while [ ! -e /go ]; do sleep 0.01; done; seq 1 100";
        let pid = shim.run(&mut client, "a", &sh(script));
        assert!(wait_until(PATIENCE, || shim.log("a").len() == 1));
        let writer = children_named(shim.pid, "berth-log")[0];
        shim.pidfd.signal(9).unwrap();
        std::fs::write(shim.rootfs.join("go"), "").unwrap();
        assert!(wait_until(PATIENCE, || shim.log("a").len() == 101));
        for pid in [pid, writer] {
            assert!(wait_until(PATIENCE, || {
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
                stat.map_or(true, |stat| stat.contains(") Z "))
            }));
        }
    });
}

#[test]
fn attach_gets_what_is_said_from_then_on_and_a_slow_reader_is_cut() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let script = "while [ ! -e /go ]; do sleep 0.01; done; echo out; echo err >&2; seq 1 400000; echo end";
        shim.run(&mut client, "a", &sh(script));
        let [_, slow, _] = attach(&mut client, "a", [false, true, false]);
        let [_, stdout, stderr] = attach(&mut client, "a", [false, true, true]);
        std::fs::write(shim.rootfs.join("go"), "").unwrap();
        // One reads, the other does not.
        let text = read_all(stdout.unwrap());
        assert!(text.starts_with("out\n1\n2\n") && text.ends_with("400000\nend\n"), "{}", text.len());
        assert_eq!(read_all(stderr.unwrap()), "err\n");
        client.exited("a");
        let cut = read_all(slow.unwrap());
        assert!(cut.len() < text.len() && text.starts_with(&cut), "{} of {}", cut.len(), text.len());
        client.drained("a");
        assert_eq!(shim.log("a").len(), 400_003);
        let request = Request::Attach { id: "a".into(), stdin: false, stdout: true, stderr: false };
        assert_eq!(client.refused(request).kind, FailureKind::WrongState);
        shim.shut_down(&mut client);
    });
}

#[test]
fn stdin_stays_open_between_clients_unless_it_is_for_one() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        for (id, once) in [("many", false), ("once", true)] {
            let ext = CreateExt { stdin: true, stdin_once: once, ..shim.ext(id) };
            client.create(id, &shim.spec(&["cat"]), ext).unwrap();
            client.start(id).unwrap();
        }
        let [stdin, ..] = attach(&mut client, "once", [true, false, false]);
        write(stdin.as_ref().unwrap(), b"hello\n").unwrap();
        // It is the first client's; a second one gets what there is.
        assert!(attach(&mut client, "once", [true, true, false])[0].is_none());
        drop(stdin);
        assert_eq!(client.exited("once").code, 0);
        client.drained("once");
        assert_eq!(shim.log("once")[0].2, "hello");

        for text in ["one\n", "two\n"] {
            let [stdin, ..] = attach(&mut client, "many", [true, false, false]);
            write(stdin.unwrap(), text.as_bytes()).unwrap();
        }
        assert!(wait_until(PATIENCE, || shim.log("many").len() == 2));
        assert!(client.state().containers.iter().any(|container| container.id == "many" && container.stdin_open));
        // Another container that waits at its gate holds no copy of it.
        client.create("gate", &shim.spec(&["true"]), shim.ext("gate")).unwrap();
        client.ask(Request::CloseStdin { id: "many".into() });
        assert_eq!(client.exited("many").code, 0);
        shim.shut_down(&mut client);
    });
}

#[test]
fn a_terminal_is_one_stream_that_can_be_resized() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let mut spec =
            shim.spec(&sh("stty size; tty; while read line; do [ $line = size ] && stty size; [ $line = end ] && exit 5; done"));
        spec.process.as_mut().unwrap().terminal = true;
        let ext = CreateExt { tty: true, stdin: true, console_size: (100, 30), ..shim.ext("a") };
        client.create("a", &spec, ext).unwrap();
        let [stdin, stdout, _] = attach(&mut client, "a", [true, true, false]);
        client.start("a").unwrap();
        let (stdin, stdout) = (stdin.unwrap(), stdout.unwrap());
        let mut text = Vec::new();
        let shows = |wanted: &'static str| move |text: &[u8]| String::from_utf8_lossy(text).contains(wanted);
        read_until(&stdout, &mut text, shows("/dev/pts/0"));
        assert!(shows("30 100")(&text), "{:?}", String::from_utf8_lossy(&text));
        client.ask(Request::Resize { id: "a".into(), exec: None, width: 77, height: 22 });
        write(&stdin, b"size\n").unwrap();
        read_until(&stdout, &mut text, shows("22 77"));
        let both = Request::Attach { id: "a".into(), stdin: false, stdout: true, stderr: true };
        assert_eq!(client.refused(both).kind, FailureKind::Invalid);
        write(&stdin, b"end\n").unwrap();
        assert_eq!(client.exited("a").code, 5);
        read_until(&stdout, &mut text, |_| false);
        drop(stdin);
        client.drained("a");
        let log = shim.log("a");
        assert!(log.iter().all(|line| line.0 == "stdout"));
        assert_eq!(log[0].2, "30 100");
        shim.shut_down(&mut client);
    });
}

#[test]
fn execs_have_streams_exit_codes_and_the_users_errors() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        shim.run(&mut client, "a", &["sleep", "1000"]);
        let plain = ExecExt::default;
        let exec = client.exec("a", "x1", &sh("hostname; echo err >&2; cat /proc/1/comm; exit 9"), plain()).unwrap();
        assert!(exec.stdin.is_none() && exec.console.is_none());
        assert_eq!(read_all(exec.stdout.unwrap()), "the-pod\nsleep\n");
        assert_eq!(read_all(exec.stderr.unwrap()), "err\n");
        assert_eq!(client.exec_exited("x1"), (9, 0));

        let exec = client.exec("a", "x2", &["cat"], ExecExt { stdin: true, ..plain() }).unwrap();
        write(exec.stdin.as_ref().unwrap(), b"through").unwrap();
        drop(exec.stdin);
        assert_eq!(read_all(exec.stdout.unwrap()), "through");
        assert_eq!(client.exec_exited("x2"), (0, 0));

        let failure = client.exec("a", "x3", &["no-such"], plain()).err().unwrap();
        assert_eq!(failure.kind, FailureKind::Start, "{failure:?}");
        assert!(failure.message.contains("executable file not found in $PATH"), "{}", failure.message);

        let cgroup = client.exec("a", "x4", &sh("grep memory /proc/self/cgroup || cat /proc/self/cgroup"), plain()).unwrap();
        assert!(read_all(cgroup.stdout.unwrap()).trim().ends_with("/pod/a"));
        assert_eq!(client.exec("no", "x5", &["true"], plain()).err().unwrap().kind, FailureKind::NotFound);
        let exec = client.exec("a", "x6", &["sleep", "1000"], plain()).unwrap();
        assert_eq!(client.exec("a", "x6", &["true"], plain()).err().unwrap().kind, FailureKind::AlreadyExists);
        assert_eq!(client.state().containers[0].execs, ["x6"]);
        client.ask(Request::Kill { id: "a".into(), exec: Some("x6".into()), signal: 15, all: false });
        assert_eq!(client.exec_exited("x6"), (143, 15));
        assert_eq!(read_all(exec.stdout.unwrap()), "");
        client.ask(Request::Kill { id: "a".into(), exec: Some("x6".into()), signal: 9, all: true });

        client.create("b", &shim.spec(&["true"]), shim.ext("b")).unwrap();
        assert_eq!(client.exec("b", "x7", &["true"], plain()).err().unwrap().kind, FailureKind::WrongState);
        shim.shut_down(&mut client);
    });
}

#[test]
fn an_exec_on_a_terminal_can_be_typed_at_resized_and_hung_up() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        shim.run(&mut client, "a", &["sleep", "1000"]);
        let ext = ExecExt { tty: true, stdin: true, console_size: (90, 25) };
        let exec = client.exec("a", "x", &sh("stty size; read line; stty size; exit 3"), ext).unwrap();
        assert!(exec.stdin.is_none() && exec.stdout.is_none());
        let console = exec.console.unwrap();
        let mut text = Vec::new();
        read_until(&console, &mut text, |text| String::from_utf8_lossy(text).contains("25 90"));
        let resize = Request::Resize { id: "a".into(), exec: Some("x".into()), width: 81, height: 24 };
        assert_eq!(client.refused(resize).kind, FailureKind::WrongState);
        berth_linux::tty::set_window_size(console.as_fd(), 81, 24).unwrap();
        write(&console, b"\n").unwrap();
        read_until(&console, &mut text, |_| false);
        assert!(String::from_utf8_lossy(&text).contains("24 81"));
        assert_eq!(client.exec_exited("x"), (3, 0));
        // The one who asked holds the terminal alone: letting go of it is a hangup.
        let ext = ExecExt { tty: true, stdin: true, console_size: (0, 0) };
        let exec = client.exec("a", "y", &sh("echo up; exec sleep 1000"), ext).unwrap();
        let console = exec.console.unwrap();
        read_until(&console, &mut Vec::new(), |text| String::from_utf8_lossy(text).contains("up"));
        drop(console);
        assert_eq!(client.exec_exited("y"), (129, 1));
        shim.shut_down(&mut client);
    });
}

#[test]
fn a_killed_exec_takes_its_children_along_and_nothing_else() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        shim.run(&mut client, "a", &sh("sleep 1111 & exec sleep 2222"));
        let script = "sleep 3331 & (sleep 3332 &) ; setsid sleep 3333 & echo up; wait";
        for all in [true, false] {
            let exec = client.exec("a", "x", &sh(script), ExecExt::default()).unwrap();
            let mut text = Vec::new();
            read_until(exec.stdout.as_ref().unwrap(), &mut text, |text| text == b"up\n");
            assert!(wait_until(PATIENCE, || (3331..=3333).all(|n| !processes_with(&format!("sleep\x00{n}")).is_empty())));
            if all {
                client.ask(Request::Kill { id: "a".into(), exec: Some("x".into()), signal: 9, all: true });
                assert_eq!(client.exec_exited("x"), (137, 9));
            } else {
                // The agent that owns it goes away.
                let mut other = shim.client();
                std::mem::swap(&mut client, &mut other);
                drop(other);
                let gone = || (3331..=3333).all(|n| processes_with(&format!("sleep\x00{n}")).is_empty());
                assert!(wait_until(PATIENCE, gone));
                assert!(wait_until(PATIENCE, || client.state().containers[0].execs.is_empty()));
            }
            assert!((3331..=3333).all(|n| processes_with(&format!("sleep\x00{n}")).is_empty()));
            // The container's own shell may still be on its way to its second program.
            let both = || processes_with("sleep\x001111").len() + processes_with("sleep\x002222").len() == 2;
            assert!(wait_until(PATIENCE, both));
        }
        shim.shut_down(&mut client);
    });
}

#[test]
fn an_exec_that_is_still_on_its_way_is_killed_too_and_the_shims_next_children_are_where_it_is() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        shim.run(&mut client, "a", &["sleep", "1000"]);
        let memfd = [support::json_memfd(&ExecSpec { process: process(&["sleep", "4441"], false), filter: None })];
        for round in 0..20 {
            let id = format!("x{round}");
            let exec = Request::Exec { container: "a".into(), id: id.clone(), ext: ExecExt::default() };
            if round % 2 == 0 {
                let seq = client.send(exec, &memfd);
                client.ask(Request::Kill { id: "a".into(), exec: Some(id.clone()), signal: 9, all: true });
                match client.reply(seq).0 {
                    Reply::Execed { .. } => assert_eq!(client.exec_exited(&id), (137, 9)),
                    reply => assert!(matches!(&reply, Reply::Error(failure) if failure.kind == FailureKind::Create), "{reply:?}"),
                }
            } else {
                let mut owner = shim.client();
                owner.send(exec, &memfd);
                drop(owner);
            }
        }
        assert!(wait_until(PATIENCE, || client.state().containers[0].execs.is_empty()));
        assert!(wait_until(PATIENCE, || processes_with("sleep\x004441").is_empty()));
        let namespace = |name: &str| std::fs::read_link(format!("/proc/{}/ns/{name}", shim.pid)).unwrap();
        assert_eq!(namespace("pid_for_children"), namespace("pid"));
        assert_ne!(namespace("pid"), std::fs::read_link(format!("/proc/{}/ns/pid", client.state().containers[0].pid)).unwrap());
        shim.run(&mut client, "b", &["true"]);
        assert_eq!(client.exited("b").code, 0);
        shim.shut_down(&mut client);
    });
}

#[test]
fn an_exec_process_is_described_in_a_sealed_memfd() {
    // Content that is no process is the creator's error, and the shim goes on.
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        shim.run(&mut client, "a", &["sleep", "1000"]);
        let request = |ext| Request::Exec { container: "a".into(), id: "x".into(), ext };
        let (reply, _) = client.call(request(ExecExt::default()), &[support::json_memfd(&"nothing")]);
        assert!(matches!(&reply, Reply::Error(failure) if failure.kind == FailureKind::Create), "{reply:?}");
        let (reply, _) = client.call(request(ExecExt::default()), &[]);
        assert!(matches!(&reply, Reply::Error(failure) if failure.kind == FailureKind::Invalid), "{reply:?}");
        assert!(client.state().containers[0].execs.is_empty());
        assert_eq!(process(&["true"], false).args, ["true"]);
        assert!(shim.pidfd.is_alive().unwrap() && shim.pidfd.as_fd().try_clone_to_owned().is_ok());
        shim.shut_down(&mut client);
    });
}
