//! CDI devices: spec files in two folders, asked for by the CRI's field and by annotations, as the container sees them.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use berth_e2e::cri::{self, PidShape};
use berth_e2e::node::{Berth, Half};
use berth_e2e::{SOON, text};
use berth_testkit::{Sandbox, wait_until};
use serde_json::{Value, json};

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");

/// A spec file with everything in it that this runtime does. Hooks leave a line in `traces`.
fn vendor(traces: &Path) -> Value {
    let hook = |name: &str| {
        json!({"hookName": name, "path": "/bin/sh", "args": ["sh", "-c", format!("cat > {}/{name}", traces.display())],
            "env": ["PATH=/usr/bin:/bin"], "timeout": 20})
    };
    json!({
        "cdiVersion": "0.7.0",
        "kind": "vendor.test/thing",
        "containerEdits": {"env": ["THING_ALL=yes"]},
        "devices": [
            {"name": "node", "containerEdits": {
                "deviceNodes": [{"path": "/dev/thing0", "hostPath": "/dev/zero", "permissions": "rw", "gid": 4242}],
                "additionalGids": [4242]}},
            {"name": "files", "containerEdits": {
                "env": ["THING_FILES=one"],
                "mounts": [{"hostPath": traces, "containerPath": "/usr/share/thing", "options": ["rbind", "ro"]}],
                "hooks": [hook("createRuntime"), hook("createContainer")]}},
        ],
    })
}

fn config(node: &Berth, low: &Path, high: &Path) -> String {
    let file = node.dir.path().join("config.yaml");
    let text =
        format!("apiVersion: berth/v1alpha1\nkind: NodeConfiguration\ncdiSpecDirs: [{}, {}]\n", low.display(), high.display());
    fs::write(&file, text).unwrap();
    file.to_string_lossy().into_owned()
}

#[test]
fn devices_of_spec_files_are_in_the_container_and_unknown_ones_are_refused() {
    Sandbox::new().shared_root().test(|| {
        let mut node = Berth::prepare(Half::Cri);
        let (low, high, traces) = (node.dir.dir("cdi-low"), node.dir.dir("cdi-high"), node.dir.dir("traces"));
        fs::write(low.join("vendor.json"), vendor(&traces).to_string()).unwrap();
        // The same device in the later folder wins.
        fs::write(
            high.join("vendor.yaml"),
            "cdiVersion: 1.0.0\nkind: vendor.test/other\ndevices:\n- name: x\n  containerEdits: {env: [OTHER=high]}\n",
        )
        .unwrap();
        fs::write(
            low.join("other.yaml"),
            "cdiVersion: 1.0.0\nkind: vendor.test/other\ndevices:\n- name: x\n  containerEdits: {env: [OTHER=low]}\n",
        )
        .unwrap();
        node.flags = vec!["--config".into(), config(&node, &low, &high)];
        let archive = berth_e2e::image::archive(&node.dir, Path::new(WEB));
        node.run(&["image", "import", &archive.to_string_lossy()]);
        node.launch();
        let crictl = node.crictl();
        let pod_config = cri::file(&node.dir, "pod.json", &cri::sandbox(&node.dir, "cdi", PidShape::PerContainer));
        let pod = crictl.run(&["runp", &pod_config]);

        let script = "id -G; ls -ln /dev/thing0; head -c 3 /dev/thing0 | od -An -tx1; echo $THING_ALL $THING_FILES $OTHER; \
                      ls /usr/share/thing; touch /usr/share/thing/x 2>&1; echo end";
        let mut asks = cri::container("asks", PidShape::PerContainer, script);
        asks["CDI_devices"] = json!([{"name": "vendor.test/thing=node"}]);
        asks["annotations"] = json!({"cdi.k8s.io/demo": "vendor.test/thing=files,vendor.test/other=x"});
        let file = cri::file(&node.dir, "asks.json", &asks);
        let id = crictl.run(&["create", &pod, &file, &pod_config]);
        crictl.run(&["start", &id]);
        assert!(wait_until(SOON, || crictl.run(&["logs", &id]).contains("end")), "{}", node.agent_log());
        let log = crictl.run(&["logs", &id]);
        assert!(log.lines().next().unwrap().split(' ').any(|g| g == "4242"), "{log}");
        assert!(log.contains("4242") && log.contains("1,   5"), "{log}");
        assert!(log.contains("00 00 00") && log.contains("yes one high"), "{log}");
        assert!(log.contains("createRuntime") && log.contains("createContainer"), "{log}");
        assert!(log.contains("Read-only file system"), "{log}");
        let state = fs::read_to_string(traces.join("createRuntime")).unwrap();
        assert!(state.contains(&id), "a hook reads the container's state: {state}");

        let mut unknown = cri::container("unknown", PidShape::PerContainer, "true");
        unknown["CDI_devices"] = json!([{"name": "vendor.test/thing=gone"}]);
        let file = cri::file(&node.dir, "unknown.json", &unknown);
        let refused = crictl.attempt(&["create", &pod, &file, &pod_config]);
        let said = text(&refused.stderr);
        assert!(!refused.status.success() && said.contains("unresolvable CDI devices vendor.test/thing=gone"), "{said}");
        // A vendor writes its file later: the next try finds it.
        fs::write(
            high.join("late.yaml"),
            "cdiVersion: 1.0.0\nkind: vendor.test/thing\ndevices:\n- name: gone\n  containerEdits: {env: [LATE=1]}\n",
        )
        .unwrap();
        crictl.run(&["create", &pod, &file, &pod_config]);
        node.finish();
    });
}
