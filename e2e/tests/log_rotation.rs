//! A container that logs as fast as it can: its files never exceed their limit together, and a follower sees every line.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use berth_e2e::image;
use berth_e2e::node::{Berth, Half};
use berth_testkit::report_measured;
use berth_testkit::sandbox::Sandbox;

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");
const MIB: u64 = 1 << 20;
/// What a line takes in the file, about: time stamp, stream, tag, number and padding.
const LINE: u64 = 150;

/// The bytes of all files of a folder.
fn bytes(folder: &Path) -> u64 {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    files.filter_map(|entry| entry.metadata().ok()).map(|file| file.len()).sum()
}

#[test]
fn a_follower_sees_every_line_and_the_files_keep_their_limit() {
    Sandbox::new().shared_root().test(|| {
        let rotations: u64 = std::env::var("LOG_ROTATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(20);
        let lines = rotations * 10 * MIB / LINE;
        let mut node = Berth::prepare(Half::Node);
        node.flags.extend(["--container-log-max-size=10Mi", "--container-log-max-files=3"].map(str::to_owned));
        let archive = image::archive(&node.dir, Path::new(WEB));
        node.run(&["image", "import", &archive.to_string_lossy()]);
        node.launch();
        let (gate, pad) = (node.dir.dir("gate"), "x".repeat(90));
        node.write_manifest(
            "lines.yaml",
            &format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: lines}}\nspec:\n  terminationGracePeriodSeconds: 0\n  restartPolicy: Never\n  \
                 volumes: [{{name: gate, hostPath: {{path: {}}}}}]\n  containers:\n  - name: c\n    image: {}\n    \
                 command: [sh, -c, 'while [ ! -e /gate/open ]; do usleep 10000; done; yes {pad} | head -n {lines} | cat -n']\n    \
                 volumeMounts: [{{name: gate, mountPath: /gate}}]\n",
                gate.display(),
                image::BUSYBOX_IMAGE
            ),
        );
        let pod = node.wait_running("lines");
        let uid = pod["metadata"]["uid"].as_str().unwrap();
        let folder = node.dir.path().join(format!("logs/default_lines-e2e_{uid}/c"));
        assert!(folder.is_dir(), "{}", folder.display());
        // Into a file, which is read afterwards: a follower that keeps up is what this is about.
        let followed = node.dir.path().join("followed");
        let mut follower =
            node.verb(&["logs", "-f", "lines-e2e"]).stdout(fs::File::create(&followed).unwrap()).stdin(Stdio::null()).spawn().unwrap();
        let (begun, mut most) = (Instant::now(), 0);
        fs::write(gate.join("open"), "").unwrap();
        while follower.try_wait().unwrap().is_none() {
            most = most.max(bytes(&folder));
            // Often enough to meet any state of a rotation some time; not so often that nothing else runs.
            std::thread::sleep(Duration::from_millis(1));
        }
        let seconds = begun.elapsed().as_secs_f64();
        report_measured(&format!(
            "{lines} lines, about {rotations} rotations, in {seconds:.1} s: {:.0} MB/s; at most {} KiB of log",
            (lines * LINE) as f64 / seconds / 1e6,
            most / 1024
        ));
        assert!(most > 10 * MIB && most <= 31 * MIB, "{most} bytes of log");
        let mut last = 0;
        for line in BufReader::new(fs::File::open(&followed).unwrap()).lines() {
            let line = line.unwrap();
            let number: u64 = line.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0);
            assert_eq!(number, last + 1, "after line {last} the follower saw {line}");
            last = number;
        }
        assert_eq!(last, lines);
        node.finish();
    });
}
