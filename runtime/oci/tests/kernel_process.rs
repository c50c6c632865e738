//! The process of a container: who it is, what it may do, how its start fails. Seen by foreign eyes where that is possible.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod kit;

use std::os::unix::fs::PermissionsExt;

use berth_oci::seccomp::default_profile;
use berth_oci::spec::{EnvVar, Rlimit, Seccomp, SeccompRule, User};
use berth_testkit::in_namespaces;
use kit::{Bundle, capabilities, field};

#[test]
fn a_container_runs_and_its_exit_code_is_ours() {
    in_namespaces(|| {
        let bundle = Bundle::new("echo hello from $(hostname); exit 7");
        bundle.write();
        let output = bundle.output(&["run", "c"]);
        assert_eq!(output.status.code(), Some(7), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(String::from_utf8_lossy(&output.stdout).starts_with("hello from"));
        assert_eq!(bundle.ok(&["list", "-q"]), "");
    });
}

#[test]
fn user_groups_umask_capabilities_and_filter_are_what_the_spec_says() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("");
        bundle.process().args = vec!["sleep".into(), "1000".into()];
        bundle.process().user = User { uid: 1000, gid: 1001, umask: Some(0o077), additional_gids: vec![5, 6] };
        let mut caps = capabilities(&["CAP_NET_BIND_SERVICE", "CAP_CHOWN"]);
        caps.inheritable = vec!["CAP_NET_BIND_SERVICE".into()];
        caps.ambient = vec!["CAP_NET_BIND_SERVICE".into()];
        bundle.process().capabilities = Some(caps);
        bundle.process().no_new_privileges = true;
        bundle.process().rlimits = vec![Rlimit { kind: "RLIMIT_NOFILE".into(), hard: 512, soft: 256 }];
        bundle.spec.linux.seccomp = Some(default_profile(|_| false));
        bundle.write();
        bundle.detached(&["run", "-d", "c"]);
        let pid = bundle.pid("c");
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert_eq!(field(&status, "Uid").split_whitespace().collect::<Vec<_>>(), ["1000"; 4]);
        assert_eq!(field(&status, "Gid").split_whitespace().collect::<Vec<_>>(), ["1001"; 4]);
        assert_eq!(field(&status, "Groups"), "5 6");
        assert_eq!(field(&status, "Umask"), "0077");
        let number = |name| u64::from_str_radix(field(&status, name), 16).unwrap();
        // For a user that is not root only the ambient capabilities survive the exec.
        assert_eq!([number("CapInh"), number("CapPrm"), number("CapEff"), number("CapAmb")], [1 << 10; 4]);
        assert_eq!(number("CapBnd"), 1 << 10 | 1);
        assert_eq!([field(&status, "Seccomp"), field(&status, "NoNewPrivs")], ["2", "1"]);
        assert_eq!([number("SigBlk"), number("SigIgn")], [0, 0]);
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let files: Vec<_> = limits.lines().find(|line| line.starts_with("Max open files")).unwrap().split_whitespace().collect();
        assert_eq!(files[3..5], ["256", "512"]);
        // Nothing but the standard streams reached the program.
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        assert_eq!(fds, 3);
        bundle.ok(&["delete", "--force", "c"]);
    });
}

#[test]
fn without_no_new_privileges_the_filter_is_loaded_all_the_same() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("grep -E 'Seccomp:|NoNewPrivs:|CapEff:' /proc/self/status; chmod 777 /tmp");
        let rule = SeccompRule {
            names: vec!["chmod".into(), "fchmodat".into(), "fchmodat2".into()],
            action: "SCMP_ACT_ERRNO".into(),
            ..SeccompRule::default()
        };
        bundle.process().user.uid = 33;
        bundle.spec.linux.seccomp =
            Some(Seccomp { default_action: "SCMP_ACT_ALLOW".into(), syscalls: vec![rule], ..Seccomp::default() });
        bundle.write();
        let output = bundle.output(&["run", "c"]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!([field(&text, "Seccomp"), field(&text, "NoNewPrivs"), field(&text, "CapEff")], ["2", "0", "0000000000000000"]);
        assert!(String::from_utf8_lossy(&output.stderr).contains("Operation not permitted"));
    });
}

#[test]
fn start_errors_are_the_users_errors() {
    in_namespaces(|| {
        let bundle = |args: &[&str]| {
            let mut bundle = Bundle::new("");
            bundle.process().args = args.iter().map(|arg| (*arg).to_owned()).collect();
            bundle
        };
        for (args, words) in [
            (&["nosuch"][..], "exec: \"nosuch\": executable file not found in $PATH"),
            (&["/no/such"], "exec: \"/no/such\": stat /no/such: no such file or directory"),
            (&["/tmp"], "exec: \"/tmp\": is a directory"),
            (&["./etc/passwd"], "exec: \"./etc/passwd\": permission denied"),
        ] {
            let error = bundle(args).run_fails();
            assert!(error.contains(words), "{error}");
            assert!(error.contains("unable to start container process"), "{error}");
        }
        let script = bundle(&["/script"]);
        let place = |text: &str| {
            std::fs::write(script.rootfs().join("script"), text).unwrap();
            std::fs::set_permissions(script.rootfs().join("script"), PermissionsExt::from_mode(0o755)).unwrap();
        };
        place("\x7fnot a program");
        assert!(script.run_fails().contains("exec /script: exec format error"));
        place("#!/no/interpreter\n");
        assert!(script.run_fails().contains("exec /script: no such file or directory"));
        // The error comes with the start and not with the creation.
        script.write();
        script.detached(&["create", "c2"]);
        assert_eq!(script.status("c2"), "created");
        assert!(script.fails(&["start", "c2"]).contains("exec /script"));
        assert_eq!(script.status("c2"), "stopped");
        script.ok(&["delete", "c2"]);
    });
}

#[test]
fn limits_and_scores_that_may_not_be_raised_are_left_with_a_warning() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("ulimit -n; cat /proc/self/oom_score_adj");
        bundle.process().rlimits = vec![Rlimit { kind: "RLIMIT_NOFILE".into(), hard: 1 << 40, soft: 1 << 40 }];
        bundle.process().oom_score_adj = Some(-999);
        bundle.write();
        let output = bundle.output(&["run", "c"]);
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{err}");
        assert!(err.contains("RLIMIT_NOFILE") && err.contains("in force"), "{err}");
        // Only without CAP_SYS_RESOURCE is there anything to warn of.
        let may = String::from_utf8_lossy(&output.stdout).contains("-999");
        assert!(may || err.contains("oom_score_adj -999 may not be set"), "{err}");
    });
}

#[test]
fn environment_folder_and_names_are_the_containers_own() {
    in_namespaces(|| {
        let mut bundle = Bundle::new(
            "env; pwd; hostname; printf \"$ODD\" | od -An -tx1; cat /proc/sys/kernel/msgmax; cat /proc/sys/kernel/domainname",
        );
        bundle.process().env.push("A=b c".into());
        bundle.process().env.push(EnvVar(b"ODD=\xff\xfe".to_vec()));
        bundle.process().cwd = "/made/for/this".into();
        bundle.spec.hostname = "inside".into();
        bundle.spec.domainname = "dom".into();
        bundle.spec.linux.sysctl.insert("kernel.msgmax".into(), "12345".into());
        let out = bundle.run();
        for words in ["A=b c", "/made/for/this", "inside\n", " ff fe", "12345", "dom"] {
            assert!(out.contains(words), "{words}: {out}");
        }
        assert!(!out.contains("CARGO"), "{out}");
    });
}

#[test]
fn a_terminal_is_the_containers_own_and_its_console() {
    in_namespaces(|| {
        let mut bundle =
            Bundle::new("tty; stty size; ls -l /dev/console; echo to console > /dev/console; read line; echo got $line");
        bundle.process().terminal = true;
        bundle.process().console_size = Some(berth_oci::spec::ConsoleSize { height: 33, width: 111 });
        bundle.write();
        assert!(bundle.fails(&["create", "c"]).contains("console socket"));
        // `run` connects it to us: our input is fed to it.
        let mut command = bundle.oci(&["run", "c"]);
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        std::io::Write::write_all(child.stdin.as_mut().unwrap(), b"typed\n").unwrap();
        let out = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        for words in ["/dev/pts/0", "33 111", "to console", "got typed"] {
            assert!(text.contains(words), "{words}: {text}");
        }
    });
}

#[test]
fn home_comes_from_the_containers_own_users_and_nothing_there_can_hold_the_start_up() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("echo home $HOME");
        let passwd = bundle.rootfs().join("etc/passwd");
        std::fs::create_dir_all(passwd.parent().unwrap()).unwrap();
        std::fs::write(&passwd, "x:x:0:0::/root:\nweb:x:33:33::/var/www:\n").unwrap();
        assert_eq!(bundle.run().trim(), "home /root");
        bundle.process().user.uid = 33;
        assert_eq!(bundle.run().trim(), "home /var/www");
        bundle.process().env.push("HOME=/given".into());
        assert_eq!(bundle.run().trim(), "home /given");
        bundle.process().env.pop();
        std::fs::remove_file(&passwd).unwrap();
        assert_eq!(bundle.run().trim(), "home /");
        rustix::fs::mknodat(rustix::fs::CWD, &passwd, rustix::fs::FileType::Fifo, 0o666.into(), 0).unwrap();
        assert_eq!(bundle.run().trim(), "home /");
    });
}

#[test]
fn kernel_parameters_are_set_after_the_hooks_that_make_what_they_belong_to() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("cat /proc/sys/kernel/msgmax");
        let script = "echo 5000 > /proc/sys/kernel/msgmax";
        let hook = berth_oci::spec::Hook {
            path: "/bin/sh".into(),
            args: vec!["sh".into(), "-c".into(), script.into()],
            ..berth_oci::spec::Hook::default()
        };
        bundle.spec.hooks = Some(berth_oci::spec::Hooks { create_container: vec![hook], ..berth_oci::spec::Hooks::default() });
        bundle.spec.linux.sysctl.insert("kernel.msgmax".into(), "6000".into());
        assert_eq!(bundle.run().trim(), "6000");
    });
}

#[test]
fn hooks_run_at_their_points_and_a_failing_one_ends_the_creation() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("echo process >> /log");
        let log = bundle.temp.path().join("log");
        std::fs::write(&log, "").unwrap();
        bundle.spec.mounts.push(kit::mount("/log", "bind", &log.to_string_lossy(), &["bind"]));
        let hook = |text: String| berth_oci::spec::Hook {
            path: "/bin/sh".into(),
            args: vec!["sh".into(), "-c".into(), text],
            env: vec![kit::PATH.into()],
            timeout: Some(60),
        };
        let outside =
            |name: &str| hook(format!("read -r state; case $state in *'\"id\":\"c\"'*) echo {name} >> {};; esac", log.display()));
        bundle.spec.hooks = Some(berth_oci::spec::Hooks {
            prestart: vec![outside("prestart")],
            create_runtime: vec![outside("createRuntime")],
            create_container: vec![outside("createContainer")],
            start_container: vec![hook("echo startContainer >> /log".into())],
            poststart: vec![outside("poststart")],
            poststop: vec![outside("poststop")],
        });
        bundle.run();
        let lines = std::fs::read_to_string(&log).unwrap();
        let mut lines: Vec<_> = lines.lines().collect();
        // The process and the hook after its start run side by side.
        lines[4..6].sort_unstable();
        assert_eq!(lines, ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "process", "poststop"]);
        if let Some(hooks) = bundle.spec.hooks.as_mut() {
            hooks.create_runtime = vec![hook("echo broken >&2; exit 3".into())];
        }
        let error = bundle.run_fails();
        assert!(
            error.contains("createRuntime hook #0") && error.contains("exit status 3") && error.contains("broken"),
            "{error}"
        );
        assert_eq!(bundle.ok(&["list", "-q"]), "");
    });
}
