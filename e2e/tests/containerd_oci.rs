//! containerd with `berth oci` as its OCI runtime; with E2E_OCI_RUNTIME=/path/to/runc the peer, which proves the test.
#![allow(clippy::unwrap_used)]

use berth_e2e::containerd::Containerd;
use berth_e2e::{SOON, image, text, tools, try_output};
use berth_testkit::{Sandbox, wait_until};

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");

#[test]
fn ctr_runs_execs_kills_and_deletes_a_container_by_berth_oci() {
    Sandbox::new().test(|| {
        let berth_oci = || format!("{} oci", tools::berth().display());
        let containerd = Containerd::start(&std::env::var("E2E_OCI_RUNTIME").unwrap_or_else(|_| berth_oci()));
        let archive = image::archive(&containerd.dir, WEB.as_ref());
        containerd.run(&["images", "import", "--all-platforms", &archive.to_string_lossy()]);
        let runtime = containerd.runtime();
        let run = |id: &str, flags: &[&str], command: &[&str]| {
            let mut all = vec!["run", "--runc-binary", runtime.as_str()];
            all.extend(flags);
            all.extend([image::BUSYBOX_IMAGE, id]);
            all.extend(command);
            try_output(&mut containerd.ctr(&all))
        };

        let once = run("once", &["--rm"], &["sh", "-c", "echo hello from $(hostname); exit 4"]);
        assert_eq!(text(&once.stdout).trim().split(' ').take(2).collect::<Vec<_>>(), ["hello", "from"], "{once:?}");
        assert_eq!(once.status.code(), Some(4), "{once:?}");

        let long = run("long", &["-d"], &["sleep", "1000"]);
        assert!(long.status.success(), "{long:?}");
        assert!(containerd.run(&["tasks", "ls"]).contains("RUNNING"));
        let uid = containerd.run(&["tasks", "exec", "--exec-id", "x1", "long", "id", "-u"]);
        assert_eq!(uid.trim(), "0");
        let failed = try_output(&mut containerd.ctr(&["tasks", "exec", "--exec-id", "x2", "long", "sh", "-c", "exit 6"]));
        assert_eq!(failed.status.code(), Some(6), "{failed:?}");
        assert!(containerd.run(&["tasks", "ps", "long"]).lines().count() >= 2);
        containerd.run(&["tasks", "kill", "-s", "SIGKILL", "long"]);
        assert!(wait_until(SOON, || containerd.run(&["tasks", "ls"]).contains("STOPPED")));
        let deleted = try_output(&mut containerd.ctr(&["tasks", "delete", "long"]));
        assert!(text(&deleted.stderr).contains("exit code 137"), "{deleted:?}");
        containerd.run(&["containers", "delete", "long"]);
        assert_eq!(containerd.run(&["containers", "ls", "-q"]).trim(), "");

        let wrong = run("wrong", &["--rm"], &["not-there"]);
        assert!(!wrong.status.success());
        assert!(text(&wrong.stderr).contains("executable file not found in $PATH"), "{wrong:?}");
    });
}
