//! What twenty idle pods cost, in both shapes: printed, and held to the budget of half a mebibyte a shim.
#![allow(clippy::unwrap_used)]

use berth_e2e::cri::{PidShape, run_pod};
use berth_e2e::memory::{Process, available_kib, processes};
use berth_e2e::node::{Berth, Half};
use berth_testkit::{Sandbox, report_measured};

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");
const PODS: u64 = 20;
/// For a shim with its log writer and, where the pod shares its PID namespace, its pause.
const SHIM_BUDGET_KIB: u64 = 512;

fn ours() -> Vec<Process> {
    processes(|_, _, _| true).into_iter().filter(|p| p.program.starts_with("berth")).collect()
}

fn measure(shape: PidShape) {
    let berth = Berth::start(Half::Cri, WEB);
    let crictl = berth.crictl();
    // One pod first: what the first pod makes for all is not counted for the others.
    run_pod(&crictl, &berth.dir, "first", shape, "exec sleep 1000");
    let available = available_kib();
    for n in 0..PODS - 1 {
        run_pod(&crictl, &berth.dir, &format!("idle-{n}"), shape, "exec sleep 1000");
    }
    let used = available.saturating_sub(available_kib());
    let agent = berth.pid();
    let all = ours();
    let (agents, shims): (Vec<_>, Vec<_>) = all.iter().partition(|p| p.pid == agent);
    let sum = |of: &[&Process]| of.iter().map(|p| p.pss_kib).sum::<u64>();
    report_measured(&format!("{PODS} idle pods, {shape:?}:"));
    report_measured(&format!("  agent: PSS {} KiB", sum(&agents)));
    let mut names: Vec<_> = shims.iter().map(|p| p.title()).collect();
    names.sort();
    names.dedup();
    for name in names {
        let these: Vec<_> = shims.iter().copied().filter(|p| p.title() == name).collect();
        let private: u64 = these.iter().map(|p| p.private_kib).sum();
        let n = these.len() as u64;
        report_measured(&format!("  {n} {name}: PSS {} KiB ({} each), private {} KiB", sum(&these), sum(&these) / n, private));
    }
    let each = sum(&shims) / PODS;
    report_measured(&format!("  a pod: {each} KiB of PSS; MemAvailable fell by {} KiB a pod", used / (PODS - 1)));
    assert!(shims.len() as u64 >= PODS, "{shims:?}");
    assert!(each <= SHIM_BUDGET_KIB, "{each} KiB a pod");
    berth.finish();
}

#[test]
fn idle_pods_with_a_pid_namespace_per_container_keep_the_budget() {
    Sandbox::new().test(|| measure(PidShape::PerContainer));
}

#[test]
fn idle_pods_with_a_shared_pid_namespace_keep_the_budget() {
    Sandbox::new().test(|| measure(PidShape::Shared));
}
