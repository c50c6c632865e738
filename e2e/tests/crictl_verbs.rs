//! The verbs of crictl, one after another, on `berth cri`.
#![allow(clippy::unwrap_used)]

use berth_e2e::cri::{PidShape, container, file, sandbox};
use berth_e2e::node::{Berth, Half};
use berth_e2e::registry::Registry;
use berth_e2e::{SOON, image, text};
use berth_testkit::{Sandbox, wait_until};

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");

#[test]
fn the_verbs_of_a_pod_and_its_container_work() {
    Sandbox::new().test(|| {
        let berth = Berth::start(Half::Cri, WEB);
        let crictl = berth.crictl();
        assert!(crictl.run(&["version"]).contains("RuntimeName:  berth"), "{}", crictl.run(&["version"]));
        let info = crictl.json(&["info"]);
        let ready = info["status"]["conditions"].as_array().unwrap().iter().filter(|c| c["status"] == true).count();
        assert!(ready >= 2, "{info}");

        let pod_file = file(&berth.dir, "pod.json", &sandbox(&berth.dir, "smoke", PidShape::PerContainer));
        let container_file = file(
            &berth.dir,
            "container.json",
            &container("main", PidShape::PerContainer, "echo to-out; echo to-err >&2; exec sleep 1000"),
        );
        let pod = crictl.run(&["runp", &pod_file]);
        assert_eq!(pod.len(), 64);
        let id = crictl.run(&["create", &pod, &container_file, &pod_file]);
        assert_eq!(crictl.json(&["inspect", &id])["status"]["state"], "CONTAINER_CREATED");
        crictl.run(&["start", &id]);

        assert_eq!(crictl.run(&["ps", "-q"]), id);
        assert_eq!(crictl.run(&["pods", "-q", "--state", "ready"]), pod);
        let seen = crictl.json(&["inspectp", &pod]);
        assert_eq!(seen["status"]["metadata"]["name"], "smoke");
        assert!(seen["status"]["network"]["ip"].as_str().is_some_and(|ip| !ip.is_empty()), "{seen}");
        let seen = crictl.json(&["inspect", &id]);
        assert_eq!(seen["status"]["state"], "CONTAINER_RUNNING");
        assert_eq!(seen["status"]["image"]["image"], image::BUSYBOX_IMAGE);

        assert_eq!(crictl.run(&["exec", "-s", &id, "echo", "hello"]), "hello");
        let failed = crictl.attempt(&["exec", "-s", &id, "sh", "-c", "echo why >&2; exit 5"]);
        assert!(!failed.status.success());
        assert!(text(&failed.stderr).contains("why") || text(&failed.stdout).contains("why"), "{failed:?}");
        assert!(wait_until(SOON, || crictl.run(&["logs", &id]).contains("to-out")));
        assert!(wait_until(SOON, || text(&crictl.attempt(&["logs", &id]).stderr).contains("to-err")));

        crictl.run(&["stop", "--timeout", "0", &id]);
        let seen = crictl.json(&["inspect", &id]);
        assert_eq!(seen["status"]["state"], "CONTAINER_EXITED");
        assert_eq!(seen["status"]["exitCode"], 137);
        crictl.run(&["rm", &id]);
        assert_eq!(crictl.run(&["ps", "-a", "-q"]), "");
        crictl.run(&["stopp", &pod]);
        crictl.run(&["stopp", &pod]);
        assert_eq!(crictl.run(&["pods", "-q", "--state", "notready"]), pod);
        crictl.run(&["rmp", &pod]);
        assert_eq!(crictl.run(&["pods", "-q"]), "");

        let id = crictl.run(&["run", "--no-pull", &container_file, &pod_file]);
        assert_eq!(crictl.run(&["ps", "-q"]), id);
        crictl.run(&["rmp", "-f", "-a"]);
        assert_eq!(crictl.run(&["ps", "-a", "-q"]), "");
        berth.finish();
    });
}

#[test]
fn an_entrypoint_that_cannot_start_is_told_with_its_path() {
    Sandbox::new().test(|| {
        let berth = Berth::start(Half::Cri, WEB);
        let crictl = berth.crictl();
        let pod_file = file(&berth.dir, "pod.json", &sandbox(&berth.dir, "wrong", PidShape::PerContainer));
        let pod = crictl.run(&["runp", &pod_file]);
        for (command, told) in [
            ("not-there", "executable file not found in $PATH"),
            ("/not/there", "no such file or directory"),
            ("/etc/passwd", "permission denied"),
        ] {
            let mut config = container("wrong", PidShape::PerContainer, "");
            config["command"] = serde_json::json!([command]);
            let config = file(&berth.dir, "container.json", &config);
            let id = crictl.run(&["create", &pod, &config, &pod_file]);
            let started = crictl.attempt(&["start", &id]);
            assert!(!started.status.success(), "{command}");
            let error = text(&started.stderr);
            assert!(error.contains(told) && error.contains(command), "{error}");
            crictl.run(&["rm", "-f", &id]);
        }
        crictl.run(&["rmp", "-f", &pod]);
        berth.finish();
    });
}

#[test]
fn images_are_pulled_listed_inspected_and_removed() {
    Sandbox::new().test(|| {
        let berth = Berth::start(Half::Cri, WEB);
        let crictl = berth.crictl();
        let _registry = Registry::start(&berth.dir, &berth.dir.path().join("certs.d"));

        let name = "registry.k8s.io/e2e-test-images/busybox:1.29-2";
        assert!(crictl.run(&["pull", name]).contains("sha256:"));
        crictl.run(&["pull", name]);
        let listed = crictl.json(&["images"]);
        let tags = |tag: &str| {
            listed["images"]
                .as_array()
                .unwrap()
                .iter()
                .any(|i| i["repoTags"].as_array().is_some_and(|t| t.iter().any(|x| x == tag)))
        };
        assert!(tags(name), "{listed}");
        let seen = crictl.json(&["inspecti", name]);
        assert!(seen["status"]["id"].as_str().is_some_and(|id| id.starts_with("sha256:")), "{seen}");
        let used = crictl.json(&["imagefsinfo"]);
        assert!(used.to_string().contains("usedBytes"), "{used}");
        let missing = crictl.attempt(&["pull", "registry.k8s.io/not/there:1"]);
        assert!(!missing.status.success());
        crictl.run(&["rmi", name]);
        assert!(!crictl.run(&["images"]).contains("e2e-test-images/busybox"));
        berth.finish();
    });
}
