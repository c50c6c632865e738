//! RuntimeClass handlers: pods whose containers another OCI runtime makes. With runc, and with `berth oci` by its other name.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use berth_e2e::cri::{PidShape, container, file, sandbox};
use berth_e2e::crictl::Crictl;
use berth_e2e::node::{Berth, Half};
use berth_e2e::{SOON, image, text, tools};
use berth_testkit::{Sandbox, wait_until};
use serde_json::{Value, json};

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");

fn runc() -> PathBuf {
    tools::program("runc", "runc")
}

/// A berth with the handlers `runc`, `berth-oci`, and `broken`, which is no program.
fn berth_with_handlers() -> Berth {
    let mut berth = Berth::prepare(Half::Cri);
    let link = berth.dir.path().join("berth-oci");
    std::os::unix::fs::symlink(tools::berth(), &link).unwrap();
    let handlers = [("runc", runc()), ("berth-oci", link), ("broken", "/not/there/runtime".into())];
    for (name, path) in handlers {
        berth.flags.extend(["--runtime-handler".to_owned(), format!("{name}={}", path.display())]);
    }
    let archive = image::archive(&berth.dir, WEB.as_ref());
    berth.run(&["image", "import", &archive.to_string_lossy()]);
    berth.launch();
    berth
}

/// A pod of a handler with the configuration's path.
fn run_pod(berth: &Berth, crictl: &Crictl, handler: &str, config: &Value) -> (String, String) {
    let name = config["metadata"]["name"].as_str().unwrap();
    let path = file(&berth.dir, &format!("{name}-pod.json"), config);
    (crictl.run(&["runp", "--runtime", handler, &path]), path)
}

fn create(berth: &Berth, crictl: &Crictl, pod: &(String, String), config: &Value) -> String {
    let path = file(&berth.dir, &format!("{}-container.json", config["metadata"]["name"].as_str().unwrap()), config);
    crictl.run(&["create", &pod.0, &path, &pod.1])
}

fn start(berth: &Berth, crictl: &Crictl, pod: &(String, String), config: &Value) -> String {
    let id = create(berth, crictl, pod, config);
    crictl.run(&["start", &id]);
    id
}

fn status(crictl: &Crictl, id: &str) -> Value {
    crictl.json(&["inspect", id])["status"].clone()
}

fn has_ended(crictl: &Crictl, id: &str) -> bool {
    wait_until(SOON, || status(crictl, id)["state"] == "CONTAINER_EXITED")
}

/// The containers that the runtime itself knows in a pod.
fn known_to(runtime: &std::path::Path, berth: &Berth, pod: &str) -> Vec<String> {
    let root = berth.dir.path().join(format!("state/sandboxes/{pod}/runtime"));
    let mut command = Command::new(runtime);
    command.arg("--root").arg(root).args(["list", "-q"]);
    berth_e2e::output(&mut command).lines().map(str::to_owned).collect()
}

fn life_cycle(handler: &str, runtime: &std::path::Path) {
    let mut berth = berth_with_handlers();
    let crictl = berth.crictl();
    let pod = run_pod(&berth, &crictl, handler, &sandbox(&berth.dir, "foreign", PidShape::PerContainer));
    assert_eq!(crictl.json(&["inspectp", &pod.0])["status"]["runtimeHandler"], handler);

    let volume = berth.dir.dir("volume");
    fs::write(volume.join("told"), "by a volume\n").unwrap();
    let mut config = container(
        "main",
        PidShape::PerContainer,
        "hostname; cat /v/told; echo to-err >&2; trap 'echo asked; exit 3' TERM; while :; do sleep 0.1; done",
    );
    config["mounts"] = json!([{"container_path": "/v", "host_path": volume, "readonly": true}]);
    config["linux"]["resources"] = json!({"memory_limit_in_bytes": 64 << 20, "cpu_shares": 512});
    let id = create(&berth, &crictl, &pod, &config);
    assert_eq!(status(&crictl, &id)["state"], "CONTAINER_CREATED");
    assert_eq!(known_to(runtime, &berth, &pod.0), [id.as_str()], "made by the runtime, not by us");
    crictl.run(&["start", &id]);
    assert_eq!(status(&crictl, &id)["state"], "CONTAINER_RUNNING");
    assert!(wait_until(SOON, || crictl.run(&["logs", &id]).contains("foreign\nby a volume")), "{}", crictl.run(&["logs", &id]));
    assert!(wait_until(SOON, || text(&crictl.attempt(&["logs", &id]).stderr).contains("to-err")));

    // The machine sees neither root nor volumes of the bundle.
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains("bundle/"));

    assert_eq!(crictl.run(&["exec", "-s", &id, "cat", "/v/told"]), "by a volume");
    assert_ne!(crictl.attempt(&["exec", "-s", &id, "touch", "/v/x"]).status.code(), Some(0));
    let failed = crictl.attempt(&["exec", "-s", &id, "not-there"]);
    assert!(text(&failed.stderr).contains("executable file not found"), "{failed:?}");
    let mut with_terminal = in_terminal(&crictl, &["exec", "-i", "-t", &id, "tty"]);
    let tty = berth_e2e::output(with_terminal.stdin(Stdio::null()));
    assert!(tty.contains("/dev/pts/"), "{tty}");
    let late = crictl.attempt(&["exec", "-s", "--timeout", "1", &id, "sleep", "1000"]);
    assert!(text(&late.stderr).contains("timed out"), "{late:?}");
    let sleepers = || crictl.run(&["exec", "-s", &id, "sh", "-c", "ps | grep -c '[s]leep 1000' || true"]);
    assert!(wait_until(SOON, || sleepers() == "0"), "{}", sleepers());

    crictl.run(&["update", "--memory", &(96 << 20).to_string(), &id]);
    assert_eq!(status(&crictl, &id)["resources"]["linux"]["memoryLimitInBytes"], (96 << 20).to_string());
    let stats = crictl.json(&["stats", &id]);
    assert!(stats["stats"][0]["memory"]["workingSetBytes"]["value"].as_str().is_some_and(|v| v != "0"), "{stats}");

    // Nothing of it depends on the agent.
    berth.kill_agent();
    berth.launch();
    assert_eq!(status(&crictl, &id)["state"], "CONTAINER_RUNNING");
    assert_eq!(crictl.run(&["exec", "-s", &id, "echo", "still"]), "still");
    crictl.run(&["stop", "--timeout", "20", &id]);
    let ended = status(&crictl, &id);
    assert_eq!((ended["exitCode"].clone(), ended["reason"].clone()), (json!(3), json!("Error")), "{ended}");
    assert!(wait_until(SOON, || crictl.run(&["logs", &id]).contains("asked")));

    // A second container of the pod, killed and removed while it runs.
    let second = start(&berth, &crictl, &pod, &container("second", PidShape::PerContainer, "sleep 1000"));
    crictl.run(&["rm", &id]);
    assert_eq!(known_to(runtime, &berth, &pod.0), [second.as_str()]);
    crictl.run(&["stop", "--timeout", "0", &second]);
    assert_eq!(status(&crictl, &second)["exitCode"], 137);
    crictl.run(&["rm", &second]);
    crictl.run(&["rmp", "-f", &pod.0]);
    berth.finish();
}

#[test]
fn a_pod_of_runc_lives_as_one_of_ours_does() {
    Sandbox::new().test(|| life_cycle("runc", &runc()));
}

#[test]
fn berth_oci_by_its_own_name_is_a_handler_too() {
    Sandbox::new().test(|| {
        let folder = berth_testkit::TempState::new();
        let link = folder.path().join("berth-oci");
        std::os::unix::fs::symlink(tools::berth(), &link).unwrap();
        life_cycle("berth-oci", &link);
    });
}

#[test]
fn attach_terminals_memory_limits_and_shared_namespaces_work_with_runc() {
    Sandbox::new().test(|| {
        let berth = berth_with_handlers();
        let crictl = berth.crictl();
        let pod = run_pod(&berth, &crictl, "runc", &sandbox(&berth.dir, "shapes", PidShape::Shared));

        let mut echo = container("echo", PidShape::Shared, "read line; echo got $line; ps > /tmp/ps; sleep 1000");
        echo["stdin"] = json!(true);
        echo["stdin_once"] = json!(true);
        let echo = start(&berth, &crictl, &pod, &echo);
        attach(&crictl, &echo, "something\n", false);
        assert!(wait_until(SOON, || crictl.run(&["logs", &echo]).contains("got something")));
        // PID 1 of the pod is the pause process, not this container's shell.
        assert!(crictl.run(&["exec", "-s", &echo, "cat", "/proc/1/comm"]).contains("pause"));

        let mut terminal = container("terminal", PidShape::Shared, "test -t 0 && echo a terminal; read line; exit 7");
        terminal["tty"] = json!(true);
        terminal["stdin"] = json!(true);
        let terminal = start(&berth, &crictl, &pod, &terminal);
        assert!(wait_until(SOON, || crictl.run(&["logs", &terminal]).contains("a terminal")));
        attach(&crictl, &terminal, "x\n", true);
        assert!(has_ended(&crictl, &terminal));
        assert_eq!(status(&crictl, &terminal)["exitCode"], 7);

        let mut hungry = container("hungry", PidShape::Shared, "exec tail -c 100000000 /dev/zero");
        hungry["linux"]["resources"] = json!({"memory_limit_in_bytes": 16 << 20});
        let hungry = start(&berth, &crictl, &pod, &hungry);
        assert!(has_ended(&crictl, &hungry));
        assert_eq!(status(&crictl, &hungry)["reason"], "OOMKilled", "{}", status(&crictl, &hungry));

        crictl.run(&["rmp", "-f", &pod.0]);
        berth.finish();
    });
}

/// crictl in a terminal of its own.
fn in_terminal(crictl: &Crictl, arguments: &[&str]) -> Command {
    let inner = crictl.command(arguments);
    let words = [inner.get_program()].into_iter().chain(inner.get_args()).map(|word| word.to_string_lossy().into_owned());
    let mut command = Command::new("script");
    command.args(["-qec", &words.collect::<Vec<_>>().join(" "), "/dev/null"]);
    command
}

/// `crictl attach` with this input; with a terminal of its own when the container has one.
fn attach(crictl: &Crictl, id: &str, input: &str, tty: bool) {
    use std::io::Write;
    let mut command = crictl.command(&["attach", "-i", id]);
    if tty {
        command = in_terminal(crictl, &["attach", "-i", "-t", id]);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    if !tty {
        drop(stdin);
    }
    if !wait_until(SOON, || child.try_wait().unwrap().is_some()) {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn a_pod_of_runc_can_have_a_user_namespace() {
    Sandbox::new().test(|| {
        let berth = berth_with_handlers();
        let crictl = berth.crictl();
        let maps = json!([{"host_id": 200_000, "container_id": 0, "length": 65536}]);
        let users = json!({"mode": 0, "uids": maps, "gids": maps});
        let with_users = |mut config: Value| {
            config["linux"]["security_context"]["namespace_options"]["userns_options"] = users.clone();
            config
        };
        let pod = run_pod(&berth, &crictl, "runc", &with_users(sandbox(&berth.dir, "users", PidShape::PerContainer)));
        let volume = berth.dir.dir("volume");
        let mut config = with_users(container("main", PidShape::PerContainer, "id -u; touch /v/made /made; sleep 1000"));
        config["mounts"] = json!([{"container_path": "/v", "host_path": volume, "uidMappings": maps, "gidMappings": maps}]);
        let id = start(&berth, &crictl, &pod, &config);
        assert!(wait_until(SOON, || volume.join("made").exists()), "{}", crictl.run(&["logs", &id]));
        use std::os::unix::fs::MetadataExt;
        assert_eq!(fs::metadata(volume.join("made")).unwrap().uid(), 0, "the volume is mapped");
        let pid = crictl.json(&["inspect", &id])["info"]["pid"].as_i64().unwrap();
        let map = fs::read_to_string(format!("/proc/{pid}/uid_map")).unwrap();
        assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "200000", "65536"]);
        assert!(crictl.run(&["exec", "-s", &id, "ls", "-ln", "/made"]).contains(" 0 "));
        crictl.run(&["rmp", "-f", &pod.0]);
        berth.finish();
    });
}

#[test]
fn a_handler_that_is_missing_broken_or_stuck_is_told_by_name_and_leaves_nothing() {
    Sandbox::new().test(|| {
        let mut berth = berth_with_handlers();
        let crictl = berth.crictl();
        let config = file(&berth.dir, "pod.json", &sandbox(&berth.dir, "wrong", PidShape::PerContainer));
        for (handler, told) in [("kata", "is configured"), ("broken", "/not/there/runtime")] {
            let refused = crictl.attempt(&["runp", "--runtime", handler, &config]);
            assert!(!refused.status.success() && text(&refused.stderr).contains(told), "{refused:?}");
        }
        assert_eq!(crictl.run(&["pods", "-q"]), "");

        // What the runtime says reaches the user.
        let pod = run_pod(&berth, &crictl, "runc", &sandbox(&berth.dir, "says", PidShape::PerContainer));
        let mut missing = container("missing", PidShape::PerContainer, "");
        missing["command"] = json!(["not-there"]);
        let path = file(&berth.dir, "missing.json", &missing);
        let refused = crictl.attempt(&["create", &pod.0, &path, &pod.1]);
        let error = text(&refused.stderr);
        assert!(error.contains("OCI runtime create failed (runc)"), "{error}");
        assert!(error.contains("not-there") && error.contains("executable file not found in $PATH"), "{error}");
        assert_eq!(known_to(&runc(), &berth, &pod.0), Vec::<String>::new());

        // A runtime that never ends.
        let stuck = berth.dir.file(
            "stuck",
            format!("#!/bin/sh\ncase \"$*\" in *features*) exec {} features;; esac\nsleep 1000\n", runc().display()),
        );
        fs::set_permissions(&stuck, fs::Permissions::from_mode(0o755)).unwrap();
        let text_of = format!(
            "apiVersion: berth/v1alpha1\nkind: NodeConfiguration\nruntimeHandlers:\n- name: stuck\n  path: {}\n  timeout: 1s\n",
            stuck.display()
        );
        let file_of = berth.dir.file("config.yaml", text_of);
        berth.flags.extend(["--config".to_owned(), file_of.to_string_lossy().into_owned()]);
        berth.kill_agent();
        berth.launch();
        let pod = run_pod(&berth, &crictl, "stuck", &sandbox(&berth.dir, "stuck", PidShape::PerContainer));
        let path = file(&berth.dir, "stuck-container.json", &container("c", PidShape::PerContainer, "sleep 1000"));
        let refused = crictl.attempt(&["create", &pod.0, &path, &pod.1]);
        let error = text(&refused.stderr);
        assert!(error.contains("OCI runtime create of container") && error.contains("did not end within 1 s"), "{error}");
        assert!(error.contains(&stuck.to_string_lossy().into_owned()), "{error}");
        assert_eq!(crictl.run(&["ps", "-a", "-q"]), "");
        let left = berth_e2e::memory::processes(|_, _, command| command.contains("/stuck"));
        assert!(left.is_empty(), "{left:?}");
        crictl.run(&["rmp", "-f", "-a"]);
        berth.finish();
    });
}

/// runc has let go of the process by then: its parent is the shim's creator, which waits for the runtime alone.
#[test]
fn an_exec_whose_runtime_hangs_when_the_process_runs_leaves_no_process() {
    Sandbox::new().test(|| {
        let mut berth = berth_with_handlers();
        let crictl = berth.crictl();
        let script = format!(
            "#!/bin/sh\n{} \"$@\"\nstatus=$?\ncase \" $* \" in *\" exec \"*) sleep 1000;; esac\nexit $status\n",
            runc().display()
        );
        let hangs = berth.dir.file("hangs", script);
        fs::set_permissions(&hangs, fs::Permissions::from_mode(0o755)).unwrap();
        let config = format!(
            "apiVersion: berth/v1alpha1\nkind: NodeConfiguration\nruntimeHandlers:\n- name: hangs\n  path: {}\n  timeout: 5s\n",
            hangs.display()
        );
        let config = berth.dir.file("config.yaml", config);
        berth.flags.extend(["--config".to_owned(), config.to_string_lossy().into_owned()]);
        berth.kill_agent();
        berth.launch();
        let pod = run_pod(&berth, &crictl, "hangs", &sandbox(&berth.dir, "hangs", PidShape::PerContainer));
        let id = start(&berth, &crictl, &pod, &container("main", PidShape::PerContainer, "sleep 1000"));
        let ours = || berth_e2e::memory::processes(|_, _, command| command == "sleep 4321");
        let exec = crictl.command(&["exec", &id, "sleep", "4321"]).stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        assert!(wait_until(SOON, || !ours().is_empty()), "it runs");
        let out = exec.wait_with_output().unwrap();
        let error = text(&out.stderr);
        assert!(error.contains("OCI runtime exec of container") && error.contains("did not end within 5 s"), "{error}");
        assert!(wait_until(SOON, || ours().is_empty()), "{:?}", ours());
        let bundle = berth.dir.path().join(format!("state/sandboxes/{}", pod.0));
        let find =
            berth_e2e::output(Command::new("find").arg(bundle).args(["-name", "exec-*.pid", "-o", "-name", "console-*.sock"]));
        assert_eq!(find, "", "files of the exec");
        crictl.run(&["rmp", "-f", &pod.0]);
        berth.finish();
    });
}

#[test]
fn status_lists_the_handlers_with_what_each_can_do() {
    Sandbox::new().test(|| {
        let berth = berth_with_handlers();
        let handlers = berth.crictl().json(&["info"])["runtimeHandlers"].clone();
        let of = |name: &str| {
            let entry = handlers.as_array().unwrap().iter().find(|h| h["name"].as_str().unwrap_or("") == name);
            entry.unwrap_or_else(|| panic!("{name}: {handlers}"))["features"].clone()
        };
        for name in ["", "berth", "runc", "berth-oci"] {
            assert_eq!(of(name), json!({"recursive_read_only_mounts": true, "user_namespaces": true}), "{name:?}");
        }
        let broken = of("broken");
        assert!(broken.as_object().is_none_or(|f| f.values().all(|v| v == false)), "{broken}");
        berth.finish();
    });
}
