//! What `make install` puts where, and whether that is what a machine with systemd and a shell takes.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use berth_e2e::{output, tools};

/// `make TARGET` with the built binary, and without building it again.
fn make(target: &str, prefix: &Path, destination: &Path) {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut make = Command::new("make");
    make.current_dir(checkout).args(["--no-print-directory", "-o", "build", target]).env("BERTH_BIN", tools::berth());
    make.arg(format!("PREFIX={}", prefix.display())).arg(format!("DESTDIR={}", destination.display()));
    output(&mut make);
}

fn files(folder: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let entry = entry.unwrap();
            match entry.file_type().unwrap().is_dir() {
                true => folders.push(entry.path()),
                false => drop(found.insert(entry.path().strip_prefix(folder).unwrap().display().to_string())),
            }
        }
    }
    found
}

#[test]
fn install_puts_everything_below_its_destination_and_uninstall_takes_it_back() {
    let destination = tempfile::tempdir().unwrap();
    make("install", Path::new("/usr"), destination.path());
    let installed = files(destination.path());
    for file in [
        "usr/bin/berth",
        "usr/lib/systemd/system/berth.service",
        "usr/lib/systemd/system/berth-cri.service",
        "usr/share/berth/berth-joined.conf",
        "usr/share/berth/kubelet.service",
        "usr/share/berth/kubelet-kubeadm.conf",
        "usr/share/bash-completion/completions/berth",
        "usr/share/zsh/site-functions/_berth",
        "usr/share/fish/vendor_completions.d/berth.fish",
        "usr/share/doc/berth/README.md",
        "usr/share/doc/berth/docs/guide/join.md",
    ] {
        assert!(installed.contains(file), "{file} is not in {installed:?}");
    }
    for unit in ["lib/systemd/system/berth.service", "lib/systemd/system/berth-cri.service", "share/berth/berth-joined.conf"] {
        let text = fs::read_to_string(destination.path().join("usr").join(unit)).unwrap();
        assert!(text.contains("ExecStart=/usr/bin/berth") && !text.contains("/usr/local"), "{text}");
    }
    make("uninstall", Path::new("/usr"), destination.path());
    assert_eq!(files(destination.path()), BTreeSet::new());
}

/// Puts the unit and its drop-in where systemd would find them, with a kubelet that is there.
fn unit(folder: &Path, prefix: &Path, name: &str, from: &str, drop_in: Option<&str>) -> PathBuf {
    let text = |path: &str| {
        let text = fs::read_to_string(prefix.join(path)).unwrap();
        text.replace("/usr/bin/kubelet", &prefix.join("bin/berth").display().to_string())
    };
    let file = folder.join(name);
    fs::write(&file, text(from)).unwrap();
    if let Some(drop_in) = drop_in {
        let folder = folder.join(format!("{name}.d"));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("10-test.conf"), text(drop_in)).unwrap();
    }
    file
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        println!("SKIPPED systemd_finds_nothing_wrong_with_the_units: Debian's package systemd is not installed");
        return;
    }
    let prefix = tempfile::tempdir().unwrap();
    make("install", prefix.path(), Path::new(""));
    let system = "lib/systemd/system";
    for (name, from, drop_in) in [
        ("berth.service", format!("{system}/berth.service"), None),
        ("berth.service", format!("{system}/berth.service"), Some("share/berth/berth-joined.conf")),
        ("berth-cri.service", format!("{system}/berth-cri.service"), None),
        ("kubelet.service", "share/berth/kubelet.service".to_owned(), None),
        ("kubelet.service", "share/berth/kubelet.service".to_owned(), Some("share/berth/kubelet-kubeadm.conf")),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let file = unit(folder.path(), prefix.path(), name, &from, drop_in);
        let verified = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&file).output().unwrap();
        let told = String::from_utf8_lossy(&verified.stderr);
        // Of other units of this machine it may say what it likes.
        let ours: Vec<&str> = told.lines().filter(|line| line.contains(name) || line.contains("10-test.conf")).collect();
        assert!(verified.status.success() && ours.is_empty(), "{name} {drop_in:?}: {told}");
    }
    // The check sees what is wrong.
    let broken = prefix.path().join("broken.service");
    fs::write(&broken, "[Service]\nType=notify\nExecStart=/no/such/program\nNoSuchKey=1\n").unwrap();
    let verified = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&broken).output().unwrap();
    assert!(String::from_utf8_lossy(&verified.stderr).contains("broken.service"), "{verified:?}");
}

#[test]
fn the_installed_completion_is_one_that_bash_takes() {
    let prefix = tempfile::tempdir().unwrap();
    make("install", prefix.path(), Path::new(""));
    let script = r#"
        source "$0/share/bash-completion/completions/berth" && complete -p berth
        COMP_WORDS=(berth jo) COMP_CWORD=1
        _berth berth jo berth
        echo "offered ${COMPREPLY[*]}"
    "#;
    let told = output(Command::new("bash").args(["--norc", "-c", script]).arg(prefix.path()));
    assert!(told.contains("-F _berth berth") && told.contains("offered join"), "{told}");
}
