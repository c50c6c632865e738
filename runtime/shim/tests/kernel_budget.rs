//! What an idle shim costs. The figure means something only for the binary that ships (profile `shim`, static):
//! `BERTH_SHIM=<that binary> cargo test -p berth-shim --test kernel_budget`. With the binary of the test's own profile it is measured, not judged.
#![allow(clippy::unwrap_used, clippy::type_complexity, reason = "a test panics")]

mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use berth_testkit::{in_namespaces, report_measured, wait_until};
use support::{PATIENCE, Shim, children_named};

const SHIMS: usize = 20;
const BUDGET_KIB: u64 = 512;

/// Fields of smaps_rollup in KiB.
fn memory(pid: i32) -> BTreeMap<String, u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let field = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        Some((name.to_owned(), rest.trim().strip_suffix(" kB")?.trim().parse().ok()?))
    };
    text.lines().filter_map(field).collect()
}

fn get(memory: &BTreeMap<String, u64>, name: &str) -> u64 {
    memory.get(name).copied().unwrap_or(0)
}

#[test]
fn an_idle_shim_with_its_log_writer_is_small_among_twenty() {
    in_namespaces(|| {
        let mut pods = Vec::new();
        for n in 0..SHIMS {
            let shim = Shim::start_with(|config| config.cgroup = format!("/pod/s{n}")).unwrap();
            if n == 0 {
                shim.make_rootfs();
            }
            let mut client = shim.client();
            let mut spec = shim.spec(&["sh", "-c", "seq 1 50000; exec sleep 1000"]);
            let rootfs = pods.first().map_or(&shim, |(first, _): &(Shim, _)| first).rootfs.clone();
            spec.root.as_mut().unwrap().path = rootfs.to_str().unwrap().to_owned();
            let begun = Instant::now();
            client.create("a", &spec, shim.ext(&format!("c{n}"))).unwrap();
            let created = begun.elapsed();
            client.start("a").unwrap();
            let started = begun.elapsed() - created;
            if n == SHIMS - 1 {
                report_measured(&format!("shim: create {created:?}, start {started:?}"));
            }
            let log = shim.log_path(&format!("c{n}"));
            assert!(wait_until(PATIENCE, || std::fs::metadata(&log).is_ok_and(|log| log.len() > 2_000_000)));
            pods.push((shim, client));
        }
        let writers: Vec<i32> = pods.iter().map(|(shim, _)| children_named(shim.pid, "berth-log")[0]).collect();
        // Memory is given back half a second after the last thing that happened.
        let total = |kind: &str| -> (u64, u64) {
            let shims = pods.iter().map(|(shim, _)| get(&memory(shim.pid), kind)).sum();
            (shims, writers.iter().map(|pid| get(&memory(*pid), kind)).sum())
        };
        let mut last = (u64::MAX, 0);
        let settled = Instant::now() + Duration::from_millis(1500);
        assert!(wait_until(PATIENCE, || {
            let now = total("Pss");
            let same = now == last && Instant::now() > settled;
            last = now;
            same
        }));
        let count = SHIMS as u64;
        for kind in ["Pss", "Private_Dirty", "Private_Clean", "Shared_Clean", "Shared_Dirty"] {
            let (shims, writers) = total(kind);
            report_measured(&format!("idle shim, {kind}: shim {} KiB, log writer {} KiB", shims / count, writers / count));
        }
        let each = (last.0 + last.1) / count;
        if std::env::var_os("BERTH_SHIM").is_some() {
            assert!(each <= BUDGET_KIB, "{each} KiB each");
        }
    });
}
