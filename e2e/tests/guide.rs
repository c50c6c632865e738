//! The guides' commands do what the guides say, run as they stand on a machine that has nothing of berth.
#![allow(clippy::unwrap_used)]

use std::process::Command;
use std::time::Duration;

use berth_e2e::{image, output, tools};
use berth_testkit::{Sandbox, TempState};

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");

/// The shell blocks of a document, one after the other.
fn commands(document: &str) -> String {
    let blocks = document.split("```sh\n").skip(1);
    blocks.map(|block| block.split("```").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// Gives the sandbox folders of its own where the guide writes: empty ones, and an /etc that takes changes.
fn cover(state: &TempState) {
    for folder in ["/usr/local/bin", "/var/log", "/var/lib", "/opt"] {
        let own = state.dir(&format!("own{folder}"));
        output(Command::new("mount").arg("--bind").arg(own).arg(folder));
    }
    let (upper, work) = (state.dir("etc/upper"), state.dir("etc/work"));
    let options = format!("lowerdir=/etc,upperdir={},workdir={}", upper.display(), work.display());
    output(Command::new("mount").args(["-t", "overlay", "x", "-o", &options, "/etc"]));
}

#[test]
fn the_edge_guide_goes_from_an_empty_machine_to_a_pod_and_back() {
    Sandbox::new().shared_root().timeout(Some(Duration::from_secs(300))).test(|| {
        let state = TempState::new();
        let images = image::archive(&state, WEB.as_ref());
        cover(&state);
        let script = format!("set -eux\n{}", commands(include_str!("../../docs/guide/edge.md")));
        let mut shell = Command::new("bash");
        shell.args(["-c", &script]).env("BERTH_BIN", tools::berth()).env("IMAGES", images);
        shell.env("PATH", format!("/usr/local/bin:{}", std::env::var("PATH").unwrap_or_default()));
        let told = output(&mut shell);
        assert!(told.contains("hello again") || told.contains("greeter-"), "{told}");
        assert!(told.contains("default/greeter-") || told.contains("name: greeter-"), "{told}");
        assert!(!script.contains("default/greeter-") && commands("```sh\na\n```\nb\n```sh\nc\n```\n") == "a\n\nc\n");
    });
}
