//! Containers through the real protocol: create, start, exit codes, signals, failures, kill, delete, the agent's death.
#![allow(clippy::unwrap_used, clippy::type_complexity, reason = "a test panics")]

mod support;

use std::path::Path;

use berth_oci::spec::{Hook, Hooks};
use berth_shim::protocol::{
    CreateExt, ExecExt, ExitRecord, FailureKind, IdMapping, Phase, PidMode, Reply, Request, Root, UserNamespace,
};
use berth_testkit::{in_namespaces, wait_until};
use support::{PATIENCE, Shim, children_named};

fn cgroup_exists(name: &str) -> bool {
    let layout = berth_cgroup::Layout::detect().unwrap();
    berth_cgroup::Cgroup::open(&layout, &berth_cgroup::CgroupPath::parse(&format!("/pod/{name}")).unwrap()).is_ok()
}

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

#[test]
fn exit_codes_and_signals_are_on_record_before_the_event() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let table = [("ok", "true", 0, 0), ("bad", "exit 42", 42, 0), ("kill", "kill -9 $$; sleep 100", 137, 9)];
        for (id, script, code, signal) in table {
            // As a child of the container's init, because an init is immune to its own signals.
            let script = if signal == 0 { script.to_owned() } else { "sleep 1000".to_owned() };
            let pid = shim.run(&mut client, id, &sh(&script));
            if signal != 0 {
                client.ask(Request::Kill { id: id.into(), exec: None, signal, all: false });
            }
            let exit = client.exited(id);
            let file = std::fs::read(shim.runtime_dir.join(format!("{id}.exit"))).unwrap();
            assert_eq!(serde_json::from_slice::<ExitRecord>(&file).unwrap(), exit);
            assert_eq!((exit.pid, exit.code, exit.signal, exit.oom), (pid, code, signal, false), "{id}");
            assert!(exit.started_at_ns > 0 && exit.finished_at_ns >= exit.started_at_ns);
            client.drained(id);
            client.ask(Request::Delete { id: id.into(), force: false });
            assert!(!cgroup_exists(id));
            assert!(!shim.runtime_dir.join(format!("{id}.exit")).exists());
        }
        assert_eq!(client.state().containers, []);
        client.ask(Request::Shutdown { force: false });
        assert!(shim.pidfd.wait_ended(Some(PATIENCE)).unwrap());
    });
}

#[test]
fn a_container_waits_at_its_gate_and_lives_in_the_pods_namespaces_with_its_shm() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let script =
            "hostname; echo $$; cat /dev/shm/x 2>/dev/null; df -k /dev/shm | tail -1 | awk '{print $2}'; echo one >/dev/shm/x";
        let pid = client.create("a", &shim.spec(&sh(script)), shim.ext("a")).unwrap();
        let state = client.state().containers.remove(0);
        assert_eq!((state.phase, state.pid, state.started_at_ns), (Phase::Created, pid, 0));
        assert_eq!(
            std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().split(' ').nth(3).unwrap(),
            shim.pid.to_string()
        );
        client.start("a").unwrap();
        assert_eq!(client.exited("a").code, 0);
        client.drained("a");
        let lines: Vec<String> = shim.log("a").into_iter().map(|(_, _, text)| text).collect();
        assert_eq!(lines, ["the-pod", "1", "1024"]);
        shim.run(&mut client, "b", &sh(script));
        client.drained("b");
        assert_eq!(shim.log("b")[2].2, "one");
        assert_eq!(client.refused(Request::Start { id: "a".into() }).kind, FailureKind::WrongState);
        let again = client.create("a", &shim.spec(&["true"]), shim.ext("a")).unwrap_err();
        assert_eq!(again.kind, FailureKind::AlreadyExists);
        shim.shut_down(&mut client);
    });
}

#[test]
fn a_program_that_cannot_run_is_the_users_error_at_start() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        std::fs::write(shim.rootfs.join("bin/text"), "not a program").unwrap();
        let mode = |bits| std::os::unix::fs::PermissionsExt::from_mode(bits);
        std::fs::set_permissions(shim.rootfs.join("bin/text"), mode(0o644)).unwrap();
        let mut client = shim.client();
        for (id, program, part, errno) in [
            ("a", "no-such-program", "\"no-such-program\": executable file not found in $PATH", 2),
            ("b", "/bin/no-such-program", "/bin/no-such-program: no such file or directory", 2),
            ("c", "/bin/text", "permission denied", 13),
        ] {
            client.create(id, &shim.spec(&[program]), shim.ext(id)).unwrap();
            let failure = client.start(id).unwrap_err();
            assert_eq!((failure.kind, failure.errno), (FailureKind::Start, Some(errno)), "{failure:?}");
            assert!(failure.message.contains(part), "{}", failure.message);
            let exit = client.exited(id);
            assert_eq!((exit.code, exit.start_error.as_str()), (128, failure.message.as_str()));
            client.ask(Request::Delete { id: id.into(), force: false });
        }
        shim.shut_down(&mut client);
    });
}

#[test]
fn a_failed_create_says_why_and_leaves_nothing() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let mut spec = shim.spec(&["true"]);
        spec.root.as_mut().unwrap().path = "/no/such/folder".into();
        let failure = client.create("a", &spec, shim.ext("a")).unwrap_err();
        assert_eq!((failure.kind, failure.errno), (FailureKind::Create, Some(2)), "{failure:?}");
        assert!(failure.message.contains("/no/such/folder"), "{}", failure.message);

        let ext = CreateExt { filter: Some(7), ..shim.ext("a") };
        let failure = client.create("a", &shim.spec(&["true"]), ext).unwrap_err();
        assert!(failure.message.contains("descriptor 7"), "{}", failure.message);
        let ext = CreateExt { pid: PidMode::Pod, ..shim.ext("a") };
        let failure = client.create("a", &shim.spec(&["true"]), ext).unwrap_err();
        assert!(failure.message.contains("does not share a PID namespace"), "{}", failure.message);

        let unknown = support::json_memfd(&serde_json::json!({"ociVersion": "1.2.0", "teleport": {}}));
        let (reply, _) = client.call(Request::Create { id: "a".into(), ext: shim.ext("a") }, &[unknown]);
        assert!(matches!(&reply, Reply::Error(failure) if failure.message.contains("teleport")), "{reply:?}");

        assert_eq!(client.state().containers, []);
        assert!(!cgroup_exists("a"));
        assert!(wait_until(PATIENCE, || children_named(shim.pid, "berth-create").is_empty()));
        // The id is free.
        shim.run(&mut client, "a", &["true"]);
        assert_eq!(client.exited("a").code, 0);
        shim.shut_down(&mut client);
    });
}

#[test]
fn a_memory_limit_that_no_process_can_start_in_is_named() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let mut spec = shim.spec(&["true"]);
        for limit in [1000, 8192] {
            spec.linux.resources = serde_json::from_value(serde_json::json!({"memory": {"limit": limit}})).unwrap();
            let failure = client.create("a", &spec, shim.ext("a")).unwrap_err();
            assert_eq!(failure.kind, FailureKind::Create);
            let want = format!("a memory limit of {limit} bytes is too small to start a process");
            assert!(failure.message.contains(&want), "{}", failure.message);
        }
        assert!(!cgroup_exists("a"));
        shim.shut_down(&mut client);
    });
}

#[test]
fn a_container_over_its_memory_limit_is_marked() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let mut spec = shim.spec(&sh("x=x; while true; do x=$x$x; done"));
        spec.linux.resources =
            serde_json::from_value(serde_json::json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}})).unwrap();
        client.create("a", &spec, shim.ext("a")).unwrap();
        client.start("a").unwrap();
        let exit = client.exited("a");
        assert_eq!((exit.code, exit.signal, exit.oom), (137, 9, true));
        shim.shut_down(&mut client);
    });
}

#[test]
fn the_end_of_the_first_process_is_the_end_of_the_cgroup_in_a_shared_pid_namespace() {
    in_namespaces(|| {
        let shim = Shim::start_with(|config| config.share_pid = true).unwrap();
        shim.make_rootfs();
        let mut client = shim.client();
        let ext = CreateExt { pid: PidMode::Pod, ..shim.ext("a") };
        let script = "setsid sh -c 'sleep 4321 & sleep 4321' & sleep 0.2; echo $$";
        client.create("a", &shim.spec(&sh(script)), ext).unwrap();
        client.start("a").unwrap();
        assert_eq!(client.exited("a").code, 0);
        // Told only when all are gone.
        assert!(support::processes_with("4321").is_empty());
        client.drained("a");
        assert_ne!(shim.log("a")[0].2, "1");

        // Another container of the pod sees pause, and the first one's processes.
        let ext = CreateExt { pid: PidMode::Pod, ..shim.ext("b") };
        client.create("b", &shim.spec(&sh("cat /proc/1/comm")), ext).unwrap();
        client.start("b").unwrap();
        client.drained("b");
        assert_eq!(shim.log("b")[0].2, "berth-pause");
        shim.shut_down(&mut client);
    });
}

#[test]
fn a_container_can_look_at_another_ones_processes() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        shim.run(&mut client, "a", &["sleep", "1234"]);
        let ext = CreateExt { pid: PidMode::Target("a".into()), ..shim.ext("b") };
        client.create("b", &shim.spec(&sh("tr '\\0' ' ' </proc/1/cmdline; echo")), ext).unwrap();
        client.start("b").unwrap();
        client.drained("b");
        assert_eq!(shim.log("b")[0].2, "sleep 1234 ");
        let ext = CreateExt { pid: PidMode::Target("no".into()), ..shim.ext("c") };
        let failure = client.create("c", &shim.spec(&["true"]), ext).unwrap_err();
        assert_eq!(failure.kind, FailureKind::WrongState);
        shim.shut_down(&mut client);
    });
}

#[test]
fn a_signal_for_all_reaches_each_process_once() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let script = "t() { trap \"echo $1 hit\" USR1; trap \"echo $1 end; exit\" USR2; echo $1 up; \
            while :; do read -t 1 x < /fifo; done; }; mkfifo /fifo; exec 9<>/fifo; (t child) & t init";
        shim.run(&mut client, "a", &sh(script));
        let count = |text: &str| shim.log("a").iter().filter(|line| line.2 == text).count();
        assert!(wait_until(PATIENCE, || count("init up") == 1 && count("child up") == 1));
        client.ask(Request::Kill { id: "a".into(), exec: None, signal: 10, all: true });
        assert!(wait_until(PATIENCE, || count("init hit") > 0 && count("child hit") > 0));
        client.ask(Request::Kill { id: "a".into(), exec: None, signal: 12, all: true });
        client.drained("a");
        assert_eq!((count("init hit"), count("child hit")), (1, 1));
        shim.shut_down(&mut client);
    });
}

#[test]
fn a_description_of_absurd_length_is_refused_before_it_is_read() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let file = rustix::fs::memfd_create("huge", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 1 << 45).unwrap();
        let request = Request::Create { id: "a".into(), ext: shim.ext("a") };
        match client.call(request, &[file]).0 {
            Reply::Error(failure) => assert!(failure.message.contains("the OCI spec"), "{failure:?}"),
            reply => panic!("{reply:?}"),
        }
        shim.run(&mut client, "a", &["true"]);
        shim.shut_down(&mut client);
    });
}

#[test]
fn by_its_other_name_the_program_is_the_oci_command_line() {
    use std::os::unix::process::CommandExt;
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_berth-shim"));
        command.arg0(berth_oci::cli::INIT_PROGRAM).args(["--root", "/nowhere"]).args(args).output().unwrap()
    };
    let output = run(&["list"]);
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).starts_with("ID"), "{output:?}");
    assert_eq!(run(&["state"]).status.code(), Some(1));
    assert_eq!(run(&["exec", "c", "true"]).status.code(), Some(255));
}

#[test]
fn kill_and_delete_do_what_they_say_in_every_state() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        // Unstarted: not without force.
        client.create("a", &shim.spec(&["true"]), shim.ext("a")).unwrap();
        assert_eq!(client.refused(Request::Delete { id: "a".into(), force: false }).kind, FailureKind::WrongState);
        client.ask(Request::Delete { id: "a".into(), force: true });
        let exit = client.exited("a");
        assert_eq!((exit.code, exit.started_at_ns), (137, 0));
        assert!(!cgroup_exists("a"));

        // A signal that the program handles, and real-time ones.
        let script = "trap 'echo term' TERM; trap 'echo rt; exit 7' 37; echo up; while true; do sleep 0.01; done";
        shim.run(&mut client, "b", &sh(script));
        let said = |text: &str| shim.log("b").iter().any(|line| line.2 == text);
        assert!(wait_until(PATIENCE, || said("up")));
        client.ask(Request::Kill { id: "b".into(), exec: None, signal: 15, all: false });
        assert!(wait_until(PATIENCE, || said("term")));
        let bad = client.refused(Request::Kill { id: "b".into(), exec: None, signal: 65, all: false });
        assert_eq!(bad.kind, FailureKind::Invalid);
        client.ask(Request::Kill { id: "b".into(), exec: None, signal: 37, all: false });
        assert_eq!(client.exited("b").code, 7);
        // Nothing left to signal is success.
        client.ask(Request::Kill { id: "b".into(), exec: None, signal: 15, all: false });
        client.ask(Request::Kill { id: "b".into(), exec: None, signal: 9, all: true });
        client.ask(Request::Delete { id: "b".into(), force: false });
        client.ask(Request::Delete { id: "b".into(), force: false });

        // Running: by force.
        shim.run(&mut client, "c", &sh("sleep 1000 & sleep 1000"));
        client.ask(Request::Delete { id: "c".into(), force: true });
        assert_eq!(client.exited("c").signal, 9);
        assert!(!cgroup_exists("c"));
        shim.run(&mut client, "d", &sh("sleep 1000 & sleep 1000"));
        client.ask(Request::Kill { id: "d".into(), exec: None, signal: 9, all: true });
        assert_eq!(client.exited("d").signal, 9);

        // A shim with containers goes by force only.
        shim.run(&mut client, "e", &["sleep", "1000"]);
        assert_eq!(client.refused(Request::Shutdown { force: false }).kind, FailureKind::WrongState);
        shim.shut_down(&mut client);
        assert!(!cgroup_exists("d") && !cgroup_exists("e"));
    });
}

#[test]
fn a_shim_that_is_being_shut_down_tells_no_state_and_leaves_how_its_containers_ended() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        shim.run(&mut client, "a", &["sleep", "1000"]);
        // An agent that died after it had asked for the end, and the next one. Whatever is left by then is no pod without containers.
        let end = client.send(Request::Shutdown { force: true }, &[]);
        let state = client.send(Request::State, &[]);
        let (answer, _) = client.reply(state);
        assert!(matches!(&answer, Reply::Error(failure) if failure.kind == FailureKind::WrongState), "{answer:?}");
        assert!(matches!(client.reply(end).0, Reply::Done));
        assert!(shim.pidfd.wait_ended(Some(PATIENCE)).unwrap());
        let file = std::fs::read(shim.runtime_dir.join("a.exit")).unwrap();
        assert_eq!(serde_json::from_slice::<ExitRecord>(&file).unwrap().signal, 9);
    });
}

#[test]
fn an_overlay_root_is_mounted_for_the_container_alone() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let links = shim.state.dir("l");
        std::os::unix::fs::symlink("../rootfs", links.join("A")).unwrap();
        let (upper, work) = (shim.state.dir("upper"), shim.state.dir("work"));
        let root = Root::Overlay { dir: 1, lowers: vec!["A".into()], upper: upper.clone(), work, volatile: true };
        let ext = CreateExt { root, ..shim.ext("a") };
        let fds = vec![std::fs::File::open(&links).unwrap().into()];
        client.create_with("a", &shim.spec(&sh("echo new >/file; cat /file")), ext, fds).unwrap();
        client.start("a").unwrap();
        assert_eq!(client.exited("a").code, 0);
        client.drained("a");
        assert_eq!(shim.log("a")[0].2, "new");
        assert_eq!(std::fs::read_to_string(upper.join("file")).unwrap(), "new\n");
        assert!(!shim.rootfs.join("file").exists());
        assert!(!std::fs::read_to_string("/proc/self/mounts").unwrap().contains("overlay"));
        shim.shut_down(&mut client);
    });
}

#[test]
fn the_agents_death_loses_neither_containers_nor_lines_nor_exit_codes() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        shim.run(&mut client, "a", &sh("i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); sleep 0.001; done; exit 3"));
        client.create("b", &shim.spec(&sh("exit 4")), shim.ext("b")).unwrap();
        drop(client);
        let record = shim.runtime_dir.join("a.exit");
        assert!(wait_until(PATIENCE, || record.exists()));
        let mut client = shim.client();
        let state = client.state();
        let (a, b) = (&state.containers[0], &state.containers[1]);
        assert_eq!((a.phase, a.exit.as_ref().unwrap().code), (Phase::Exited, 3));
        assert_eq!((b.phase, b.exit.is_none()), (Phase::Created, true));
        assert!(wait_until(PATIENCE, || client.state().containers[0].logs_drained));
        let lines = shim.log("a");
        assert_eq!(lines.len(), 300);
        assert!(lines.iter().enumerate().all(|(n, line)| line.2 == format!("line {n}")));
        client.start("b").unwrap();
        assert_eq!(client.exited("b").code, 4);
        shim.shut_down(&mut client);
    });
}

#[test]
fn an_agent_that_dies_in_the_middle_of_a_create_leaves_a_container_to_be_found() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let spec = support::json_memfd(&shim.spec(&["true"]));
        client.send(Request::Create { id: "a".into(), ext: shim.ext("a") }, &[spec]);
        drop(client);
        let mut client = shim.client();
        let created = |client: &mut support::Client| {
            client.state().containers.first().is_some_and(|container| container.phase == Phase::Created)
        };
        assert!(wait_until(PATIENCE, || created(&mut client)));
        client.start("a").unwrap();
        assert_eq!(client.exited("a").code, 0);
        shim.shut_down(&mut client);
    });
}

#[test]
fn the_shims_death_ends_what_waits_at_a_gate_and_pause() {
    in_namespaces(|| {
        let shim = Shim::start_with(|config| config.share_pid = true).unwrap();
        shim.make_rootfs();
        let mut client = shim.client();
        let pid = client.create("a", &shim.spec(&["true"]), shim.ext("a")).unwrap();
        let pause = client.state().pause.unwrap();
        shim.pidfd.signal(9).unwrap();
        for pid in [pid, pause] {
            assert!(wait_until(PATIENCE, || {
                let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
                stat.map_or(true, |stat| stat.contains(") Z "))
            }));
        }
    });
}

#[test]
fn a_create_that_hangs_can_be_given_up() {
    in_namespaces(|| {
        let shim = Shim::start();
        shim.make_rootfs();
        let mut client = shim.client();
        let hook = |args: &[&str]| Hook {
            path: "/bin/busybox".into(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            ..Hook::default()
        };
        let mut spec = shim.spec(&["true"]);
        let hangs = Hooks { create_runtime: vec![hook(&["sleep", "5432"])], ..Hooks::default() };
        spec.hooks = Some(hangs);
        let spec = support::json_memfd(&spec);
        let create = client.send(Request::Create { id: "a".into(), ext: shim.ext("a") }, &[spec]);
        assert!(wait_until(PATIENCE, || !support::processes_with("sleep\x005432").is_empty()));
        // The shim serves others meanwhile.
        shim.run(&mut client, "b", &["true"]);
        assert_eq!(client.exited("b").code, 0);
        client.ask(Request::Delete { id: "a".into(), force: true });
        let (reply, _) = client.reply(create);
        assert!(matches!(&reply, Reply::Error(failure) if failure.kind == FailureKind::Create), "{reply:?}");
        let gone = || support::processes_with("sleep\x005432").is_empty() && !cgroup_exists("a");
        assert!(wait_until(PATIENCE, gone));
        assert_eq!(client.state().containers.len(), 1);

        let mut spec = shim.spec(&["true"]);
        spec.hooks = Some(Hooks { poststop: vec![hook(&["true"])], ..Hooks::default() });
        let failure = client.create("a", &spec, shim.ext("a")).unwrap_err();
        assert!(failure.message.contains("hooks.poststop"), "{}", failure.message);
        shim.shut_down(&mut client);
    });
}

#[test]
fn containers_of_a_pod_with_a_user_namespace_are_in_it() {
    in_namespaces(|| {
        let map = vec![IdMapping { container_id: 0, host_id: 100_000, size: 65_536 }];
        let user = UserNamespace { uid_mappings: map.clone(), gid_mappings: map };
        let shim = Shim::start_with(|config| config.user = Some(user)).unwrap();
        shim.make_rootfs();
        let mut client = shim.client();
        let links = shim.state.dir("l");
        std::os::unix::fs::symlink("../rootfs", links.join("A")).unwrap();
        let (upper, work) = (shim.state.dir("upper"), shim.state.dir("work"));
        let root = Root::Overlay { dir: 1, lowers: vec!["A".into()], upper: upper.clone(), work, volatile: true };
        let ext = CreateExt { root, ..shim.ext("a") };
        let mut spec = shim.spec(&sh(
            "cat /proc/self/uid_map; id -u; echo x >/dev/shm/x && stat -c %u /dev/shm /dev/shm/x; echo y >/y; hostname",
        ));
        let ids = vec![berth_oci::spec::IdMapping { container_id: 0, host_id: 100_000, size: 65_536 }];
        spec.linux.uid_mappings = ids.clone();
        spec.linux.gid_mappings = ids;
        let fds = vec![std::fs::File::open(&links).unwrap().into()];
        client.create_with("a", &spec, ext, fds).unwrap();
        client.start("a").unwrap();
        client.drained("a");
        let log: Vec<String> =
            shim.log("a").into_iter().map(|line| line.2.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(log, ["0 100000 65536", "0", "0", "0", "the-pod"]);
        let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(upper.join("y")).unwrap());
        assert!(owner == 0 || owner == 100_000, "{owner}");
        let exec = client.exec("a", "x", &sh("id -u; cat /proc/self/uid_map"), ExecExt::default()).err();
        assert!(exec.is_some(), "the container has ended");
        shim.shut_down(&mut client);
    });
}
