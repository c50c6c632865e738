//! What a pod may ask for beyond containers and networks, on the real runtime: objects beside the manifests, sub-paths, sidecars
//! and hooks.
#![allow(clippy::unwrap_used)]

use berth_e2e::SOON;
use berth_e2e::node::{Berth, Half};
use berth_testkit::{Sandbox, wait_until};

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");
const SETTINGS: &str = include_str!("../../manifests/settings.yaml");

#[test]
fn objects_beside_the_manifest_reach_the_containers_and_follow_an_edit() {
    Sandbox::new().shared_root().test(|| {
        let berth = Berth::start(Half::Node, WEB);
        berth.write_manifest("settings.yaml", SETTINGS);
        let pod = berth.wait_running("settings");
        let data = std::path::Path::new("/run/settings-data/settings-e2e/hooks");
        let run = |command: &str| berth.run(&["exec", "settings-e2e", "-c", "app", "--", "sh", "-c", command]);
        assert!(wait_until(SOON, || !berth.logs("settings-e2e -c app").is_empty()));
        assert_eq!(berth.logs("settings-e2e -c app"), ["level is info"]);
        assert_eq!(
            run("cat /etc/all/token /etc/all/conf/motd /etc/all/labels /etc/motd"),
            "s3cretwelcome\napp=\"settings\"welcome\n"
        );
        assert_eq!(
            run("stat -L -c '%a' /etc/all/token; mount | grep -c ' on /etc/all type tmpfs '; cat /data/hooks"),
            "440\n1\nstarted\n"
        );
        // What the kubelet writes no container may: it would be followed there.
        assert!(run("touch /etc/all/x 2>&1; true").contains("Read-only file system"));
        berth.write_manifest("settings.yaml", &SETTINGS.replace("welcome", "changed"));
        assert!(wait_until(SOON, || run("cat /etc/all/conf/motd") == "changed\n"));
        assert!(wait_until(SOON, || berth.logs("settings-e2e -c watcher").last().is_some_and(|line| line == "changed")));
        assert_eq!(run("cat /etc/motd"), "welcome\n", "a sub-path is what it was when the container started");
        let after = berth.wait_running("settings");
        assert_eq!(after["status"]["containerStatuses"][0]["containerID"], pod["status"]["containerStatuses"][0]["containerID"]);
        berth.remove_manifest("settings.yaml");
        assert!(wait_until(SOON, || berth.pods().is_empty()), "{:?}", berth.pods());
        assert_eq!(std::fs::read_to_string(data).unwrap(), "started\nstopping\n");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains("volume-subpaths") && !mounts.contains("kubernetes.io~"), "{mounts}");
        berth.finish();
    });
}
