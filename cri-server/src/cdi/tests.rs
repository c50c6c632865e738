//! The registry on folders of files, and what it does to a spec.

use std::fs;

use berth_oci::spec::{Mount, Process, User};
use tempfile::TempDir;

use super::*;

fn text(devices: &str) -> String {
    format!("cdiVersion: 0.7.0\nkind: v.com/c\ndevices:\n{devices}")
}

fn device(name: &str, edits: &str) -> String {
    format!("- name: {name}\n  containerEdits: {edits}\n")
}

struct Folders {
    low: TempDir,
    high: TempDir,
    registry: Registry,
}

impl Folders {
    fn new() -> Self {
        let (low, high) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let registry = Registry::new(vec![low.path().into(), high.path().into(), "/nowhere/cdi".into()]);
        Self { low, high, registry }
    }

    fn inject(&self, names: &[&str]) -> Result<Spec, Error> {
        let mut spec = Spec {
            process: Some(Process { user: User { uid: 7, ..Default::default() }, ..Default::default() }),
            ..Default::default()
        };
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        self.registry.inject(&mut spec, &names).map(|()| spec)
    }

    fn env(&self, name: &str) -> String {
        let spec = self.inject(&[name]).unwrap();
        String::from_utf8(spec.process.unwrap().env[0].0.clone()).unwrap()
    }
}

#[test]
fn a_device_of_the_later_folder_wins_and_a_changed_file_is_read_again() {
    let folders = Folders::new();
    fs::write(folders.low.path().join("a.yaml"), text(&device("d", "{env: [FROM=low]}"))).unwrap();
    assert_eq!(folders.env("v.com/c=d"), "FROM=low");
    let high = folders.high.path().join("b.yaml");
    fs::write(&high, text(&device("d", "{env: [FROM=high]}"))).unwrap();
    assert_eq!(folders.env("v.com/c=d"), "FROM=high");
    fs::write(&high, text(&device("d", "{env: [FROM=changed]}"))).unwrap();
    assert_eq!(folders.env("v.com/c=d"), "FROM=changed");
    fs::remove_file(&high).unwrap();
    assert_eq!(folders.env("v.com/c=d"), "FROM=low");
}

#[test]
fn a_device_in_two_files_of_one_folder_is_refused_with_the_files_unless_a_later_folder_settles_it() {
    let folders = Folders::new();
    for (name, value) in [("a", 1), ("b", 2), ("c", 3)] {
        let body = text(&device("d", &format!("{{env: [FROM={value}]}}")));
        fs::write(folders.low.path().join(format!("{name}.yaml")), body).unwrap();
    }
    let error = folders.inject(&["v.com/c=d"]).unwrap_err().to_string();
    assert!(error.contains("unresolvable CDI devices v.com/c=d"), "{error}");
    for name in ["a.yaml", "b.yaml", "c.yaml"] {
        assert!(error.contains(name), "{error}");
    }
    fs::write(folders.high.path().join("x.yaml"), text(&device("d", "{env: [FROM=high]}"))).unwrap();
    assert_eq!(folders.env("v.com/c=d"), "FROM=high");
}

#[test]
fn an_unknown_device_is_refused_and_broken_files_are_named() {
    let folders = Folders::new();
    fs::write(folders.low.path().join("good.yaml"), text(&device("d", "{env: [A=b]}"))).unwrap();
    let error = folders.inject(&["v.com/c=d", "v.com/c=x", "w/c=y"]).unwrap_err().to_string();
    assert_eq!(error, "CDI device injection failed: unresolvable CDI devices v.com/c=x, w/c=y");
    fs::write(folders.low.path().join("broken.json"), "{").unwrap();
    let error = folders.inject(&["v.com/c=x"]).unwrap_err().to_string();
    assert!(error.contains("broken.json"), "{error}");
    assert!(folders.inject(&["v.com/c=d"]).is_ok(), "a broken file of somebody else hurts nobody");
}

#[test]
fn edits_of_the_file_and_of_its_devices_become_part_of_the_spec() {
    let folders = Folders::new();
    let body = "cdiVersion: 0.7.0\nkind: v.com/c\ncontainerEdits: {env: [ALL=1]}\ndevices:\n".to_owned()
        + &device("d", "{deviceNodes: [{path: /dev/mine, hostPath: /dev/null, permissions: r}], additionalGids: [0, 44]}")
        + &device(
            "e",
            "{mounts: [{hostPath: /opt/v, containerPath: /usr/v, options: [ro, rbind]}], hooks: [{hookName: createContainer, path: /h, args: [h, x]}, {hookName: poststop, path: /p}]}",
        )
        + &device("f", "{deviceNodes: [{path: /dev/fixed, type: c, major: 240, minor: 3, gid: 5}]}");
    fs::write(folders.low.path().join("a.yaml"), body).unwrap();
    let spec = folders.inject(&["v.com/c=d", "v.com/c=e", "v.com/c=f"]).unwrap();
    let process = spec.process.unwrap();
    assert_eq!(process.env.len(), 1, "the file's own edits are applied once");
    assert_eq!(process.user.additional_gids, [44]);
    let mine = &spec.linux.devices[0];
    assert_eq!((mine.kind.as_str(), mine.path.as_str(), mine.major, mine.minor), ("c", "/dev/mine", 1, 3));
    assert_eq!((mine.uid, mine.gid), (Some(7), None), "the owner is the container's user");
    let fixed = &spec.linux.devices[1];
    assert_eq!((fixed.major, fixed.minor, fixed.gid, fixed.file_mode), (240, 3, Some(5), None));
    let rules = spec.linux.resources.unwrap().devices;
    assert_eq!((rules[0].access.as_deref(), rules[1].access.as_deref()), (Some("r"), Some("rwm")));
    assert_eq!((spec.mounts[0].destination.as_str(), spec.mounts[0].options.len()), ("/usr/v", 2));
    let hooks = spec.hooks.unwrap();
    assert_eq!((hooks.create_container[0].args.len(), hooks.poststop.len()), (2, 1));
}

#[test]
fn what_this_runtime_does_not_do_is_refused_by_its_name() {
    let folders = Folders::new();
    let body = "cdiVersion: 1.1.0\nkind: v.com/c\ndevices:\n".to_owned()
        + &device("rdt", "{intelRdt: {closID: a}}")
        + &device("net", "{netDevices: [{hostInterfaceName: eth9, name: x}]}")
        + &device("gone", "{deviceNodes: [{path: /dev/none-such}]}")
        + &device("kind", "{deviceNodes: [{path: /dev/null, type: b}]}");
    fs::write(folders.low.path().join("a.yaml"), body).unwrap();
    for (name, want) in [("rdt", "intelRdt"), ("net", "eth9"), ("gone", "/dev/none-such"), ("kind", "has the type \"c\"")] {
        let error = folders.inject(&[&format!("v.com/c={name}")]).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
}

#[test]
fn mounts_stay_sorted_and_replace_what_was_there() {
    let mount = |d: &str, source: &str| Mount { destination: d.into(), source: source.into(), ..Default::default() };
    let mut spec = Spec { mounts: vec![mount("/proc", "p"), mount("/dev", "t"), mount("/dev/shm", "s")], ..Default::default() };
    for (destination, source) in [("/a/b", "1"), ("/a", "2"), ("/dev/shm", "3"), ("/x/y/z", "4"), ("/a/b/../b", "5")] {
        crate::container::oci::set_mount(&mut spec, mount(destination, source));
    }
    let at = |d: &str| spec.mounts.iter().position(|m| m.destination == d).unwrap();
    assert!(at("/a") < at("/a/b") && at("/dev") < at("/dev/shm"));
    assert_eq!((spec.mounts[at("/dev/shm")].source.as_str(), spec.mounts[at("/a/b")].source.as_str()), ("3", "5"));
    assert_eq!(spec.mounts.len(), 6);
}
