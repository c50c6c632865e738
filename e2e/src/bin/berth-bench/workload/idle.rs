//! Memory of idle pods by role, and of the server alone.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::Result;
use berth_e2e::memory::{available_kib, processes};

use crate::cri::Shape;
use crate::machine::Accounting;
use crate::pods::{Bench, Pod};

/// Until what a start allocated is given back, as far as it is.
const SETTLE: Duration = Duration::from_secs(3);

/// The server without a pod.
pub async fn server(bench: &Bench, daemon: u32) {
    tokio::time::sleep(SETTLE).await;
    let pss: u64 = processes(|pid, _, _| pid == daemon).iter().map(|p| p.pss_kib).sum();
    bench.meter.add("idle.PSS", pss as f64 / 1024.0);
}

/// So many pods: made, measured, ended.
pub async fn few(bench: &Bench, key: &str, shape: Shape, count: usize, daemon: u32) -> Result<()> {
    let before = available_kib();
    let pods = bench.up_all(count, 4, shape, "").await?;
    measure(bench, key, &pods, daemon, before).await;
    bench.down_all(&pods, 4).await
}

/// What the pods cost in memory now, in MiB a pod; `before` is what was available without them.
pub async fn measure(bench: &Bench, key: &str, pods: &[Pod], daemon: u32, before: u64) {
    tokio::time::sleep(SETTLE).await;
    let taken = before.saturating_sub(available_kib());
    let each = |kib: u64| kib as f64 / 1024.0 / pods.len() as f64;
    let mut sum = 0;
    for (role, kib) in by_role(&bench.accounting, pods, daemon) {
        bench.meter.add(&format!("{key}.PSS {role}"), if role == "daemon" { kib as f64 / 1024.0 } else { each(kib) });
        sum += if role == "daemon" { 0 } else { kib };
    }
    bench.meter.add(&format!("{key}.PSS/pod"), each(sum));
    bench.meter.add(&format!("{key}.MemAvailable/pod"), each(taken));
}

/// PSS in KiB of the side's processes by what they are. The containers' own processes are nobody's.
fn by_role(accounting: &Accounting, pods: &[Pod], daemon: u32) -> BTreeMap<String, u64> {
    let own = accounting.own_pids();
    let of_container = |pid: u32| {
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        pods.iter().any(|pod| cgroups.contains(&pod.container))
    };
    let mut roles = BTreeMap::new();
    for process in processes(|pid, _, _| !own.contains(&pid) && !of_container(pid)) {
        let role = if process.pid == daemon { "daemon".to_owned() } else { process.title() };
        *roles.entry(role).or_insert(0) += process.pss_kib;
    }
    roles
}
