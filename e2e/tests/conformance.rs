//! Every field of a pod works, is refused by name or has no meaning without a control plane: the table of docs/conformance.md and
//! the scenarios that prove it, on a real node. Each scenario runs once more for each field that it proves, with the field taken
//! out, and must fail then.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use berth_e2e::conformance::folder;
use berth_e2e::conformance::run::Runner;
use berth_e2e::conformance::scenario::Scenario;
use berth_e2e::conformance::table::{Row, Table, pod_with};
use berth_e2e::containerd::Containerd;
use berth_e2e::node::{Berth, Half};
use berth_e2e::registry::Registry as PublicRegistry;
use berth_e2e::{SOON, image, output, text, tools, try_output};
use berth_testkit::registry::{Auth, Registry};
use berth_testkit::{Sandbox, TempState, skip, wait_until};
use serde_json::Value;

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");
const PROBED: &str = env!("CARGO_BIN_EXE_demo-probed");

/// How long a suite may take on a machine that is busy with others.
const BOUND: Duration = Duration::from_secs(900);
/// The cluster's domain, for the names of pods in it.
const CONFIG: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nclusterDomain: cluster.local\n";
/// A profile that refuses to make folders.
const SECCOMP: &str = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}]}"#;

/// A profile of the administrator's, which refuses to read one file.
const APPARMOR: &str =
    "profile conformance flags=(attach_disconnected) { file, capability, network, signal, deny /etc/group r, }";

/// A registry on loopback with the image of `layout` as `private/busybox:1`, for who knows the password.
fn private_registry(layout: &Path) -> Registry {
    let registry = Registry::start();
    let read = |path: &str| fs::read(layout.join(path)).unwrap();
    let blob = |digest: &Value| read(&format!("blobs/sha256/{}", digest.as_str().unwrap().trim_start_matches("sha256:")));
    let index: Value = serde_json::from_slice(&read("index.json")).unwrap();
    let named = |m: &&Value| m["annotations"].to_string().contains(image::BUSYBOX_IMAGE);
    let found = index["manifests"].as_array().unwrap().iter().find(named).unwrap();
    let bytes = blob(&found["digest"]);
    let manifest: Value = serde_json::from_slice(&bytes).unwrap();
    for part in manifest["layers"].as_array().unwrap().iter().chain([&manifest["config"]]) {
        registry.put_blob(&blob(&part["digest"]));
    }
    registry.put_manifest("private/busybox", "1", found["mediaType"].as_str().unwrap(), &bytes);
    registry.demand(Auth::Basic { user: "user".into(), password: "secret".into() });
    registry
}

/// The scenarios of this machine, or those of the guest.
fn scenarios(guest: bool) -> Vec<Scenario> {
    let mut all = Scenario::load(&folder().join("scenarios"));
    all.retain(|s| s.guest.is_some() == guest);
    // For work on one of them.
    match std::env::var("BERTH_SCENARIO") {
        Ok(only) => all.into_iter().filter(|s| s.scenario.contains(&only)).collect(),
        Err(_) => all,
    }
}

fn table() -> Table {
    Table::load(&Scenario::load(&folder().join("scenarios"))).unwrap_or_else(|errors| panic!("{}", errors.join("\n")))
}

#[test]
fn the_committed_table_has_one_row_for_each_field_and_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/conformance.md");
    let text = table().document();
    if std::env::var_os("BERTH_WRITE_DOCS").is_some() {
        fs::write(&path, &text).unwrap();
    }
    assert!(fs::read_to_string(&path).unwrap_or_default() == text, "docs/conformance.md is not current: BERTH_WRITE_DOCS=1");
}

fn shown_by_plan(row: &Row) -> bool {
    matches!(row, Row::Refused(_) | Row::OnlyValue(_) | Row::Meaningless(_))
}

#[test]
fn refused_and_meaningless_fields_are_named_with_the_words_of_the_table() {
    let table = table();
    let folder = TempState::new();
    let mut wanted = Vec::new();
    for (i, (field, path)) in table.paths(shown_by_plan).into_iter().enumerate() {
        let name = format!("f{i}");
        folder.file(&format!("m/{name}.yaml"), pod_with(&name, &path).to_string());
        let (prefix, message) = match &table.rows[&field] {
            Row::Refused(message) | Row::OnlyValue(message) => ("error", message.clone()),
            Row::Meaningless(_) => ("warning", "has no effect without a control plane".to_owned()),
            other => panic!("{other:?}"),
        };
        wanted.push((field, format!("{prefix}: {}/m/{name}.yaml:", folder.path().display()), path, message));
    }
    let berth = Berth::prepare(Half::Node);
    let out = try_output(&mut berth.verb(&["plan", &folder.path().join("m").to_string_lossy()]));
    let told = text(&out.stderr);
    let is_told = |line: &str, prefix: &str, path: &str, message: &str| {
        line.starts_with(prefix) && line.contains(&format!(" {path}")) && line.contains(message)
    };
    let missing: Vec<String> = wanted
        .iter()
        .filter(|(_, prefix, path, message)| !told.lines().any(|line| is_told(line, prefix, path, message)))
        .map(|(field, prefix, path, message)| {
            let instead: Vec<&str> = told.lines().filter(|l| l.contains(prefix.split_once(' ').unwrap().1)).collect();
            format!("{field}: wanted {prefix} … {path} … {message}\n  told {instead:?}")
        })
        .collect();
    assert!(missing.is_empty(), "{} of {}:\n{}", missing.len(), wanted.len(), missing.join("\n"));
}

/// What scenarios expect of a node besides its kubelet.
fn furnish(berth: &mut Berth) {
    let config = berth.dir.file("config.yaml", CONFIG);
    berth.flags.extend(["--config".into(), config.display().to_string()]);
    berth.dir.file("kubelet/seccomp/conformance.json", SECCOMP);
}

#[test]
fn every_working_field_is_proven_on_a_node_and_missed_when_it_is_taken_out() {
    Sandbox::new().shared_root().timeout(Some(BOUND)).test(|| {
        let mut berth = Berth::prepare(Half::Node);
        let archive = image::archive(&berth.dir, WEB.as_ref());
        berth.run(&["image", "import", &archive.to_string_lossy()]);
        berth.flags = vec!["--runtime-handler".into(), format!("runc={}", tools::program("runc", "runc").display())];
        furnish(&mut berth);
        berth.launch();
        let registry = private_registry(&berth.dir.path().join("layout"));
        let scenarios = scenarios(false);
        let all: Vec<&Scenario> = scenarios.iter().collect();
        let begun = Instant::now();
        let failures = Runner::new(&berth, berth.crictl(), registry.host(), PROBED.as_ref()).run(&all, true);
        println!("MEASURED conformance: {} scenarios in {:?}", all.len(), begun.elapsed());
        assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
        berth.finish();
    });
}

#[test]
fn the_same_pods_run_over_a_stock_containerd() {
    Sandbox::new().shared_root().timeout(Some(BOUND)).test(|| {
        let containerd = Containerd::start(&tools::program("runc", "runc").display().to_string());
        let _pause = PublicRegistry::start(&containerd.dir, &containerd.dir.path().join("certs.d"));
        let archive = image::archive(&containerd.dir, WEB.as_ref());
        containerd.run(&["-n", "k8s.io", "images", "import", "--all-platforms", &archive.to_string_lossy()]);
        let registry = private_registry(&containerd.dir.path().join("layout"));
        // containerd asks with TLS unless told not to.
        let host = registry.host();
        containerd.dir.file(&format!("certs.d/{host}/hosts.toml"), format!("server = \"http://{host}\"\n"));
        let mut berth = Berth::prepare(Half::Kubelet);
        berth.flags = vec!["--container-runtime-endpoint".into(), format!("unix://{}", containerd.socket().display())];
        furnish(&mut berth);
        berth.launch();
        let scenarios = scenarios(false);
        let (cannot, can): (Vec<&Scenario>, Vec<&Scenario>) = scenarios.iter().partition(|s| s.containerd.is_some());
        for scenario in cannot {
            println!("not over containerd: {}: {}", scenario.scenario, scenario.containerd.as_deref().unwrap());
        }
        let begun = Instant::now();
        let failures = Runner::new(&berth, containerd.crictl(), registry.host(), PROBED.as_ref()).run(&can, false);
        println!("MEASURED conformance over containerd: {} scenarios in {:?}", can.len(), begun.elapsed());
        assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
        assert!(wait_until(SOON, || berth.pods().is_empty()), "{:?}", berth.pods());
        berth.kill_agent();
    });
}

/// What the guest's kernel has and the machine may lack.
fn missing() -> Option<&'static str> {
    let on = |path: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == "Y");
    let knows = |name: &str| fs::read_to_string("/proc/filesystems").is_ok_and(|text| text.lines().any(|l| l.ends_with(name)));
    match () {
        () if !on("/sys/module/apparmor/parameters/enabled") => Some("AppArmor"),
        () if !knows("\tnfs4") || !knows("\tnfsd") => Some("an NFS client and server"),
        () => None,
    }
}

#[test]
fn what_only_the_guest_has_is_proven_there() {
    if let Some(what) = missing() {
        skip!("needs {what}: e2e/vm.sh runs this in its guest");
    }
    Sandbox::new().shared_root().timeout(Some(BOUND)).test(|| {
        let mut berth = Berth::prepare(Half::Node);
        let archive = image::archive(&berth.dir, WEB.as_ref());
        berth.run(&["image", "import", &archive.to_string_lossy()]);
        let export = berth.dir.dir("export/shared");
        fs::write(export.join("words"), "from the server\n").unwrap();
        let server = folder().join("nfs-server");
        output(Command::new("sh").arg(&server).arg("start").arg(export.parent().unwrap()));
        output(Command::new("sh").args(["-ec", &format!("echo '{APPARMOR}' | apparmor_parser -Kr")]));
        furnish(&mut berth);
        berth.launch();
        let scenarios = scenarios(true);
        let all: Vec<&Scenario> = scenarios.iter().collect();
        let failures = Runner::new(&berth, berth.crictl(), String::new(), PROBED.as_ref()).run(&all, true);
        assert!(failures.is_empty(), "{} failed:\n{}\n{}", failures.len(), failures.join("\n"), berth.agent_log());
        assert!(wait_until(SOON, || berth.pods().is_empty()), "{:?}", berth.pods());
        berth.finish();
        // Its threads would keep this network alive.
        output(Command::new("sh").arg(&server).arg("stop"));
    });
}
