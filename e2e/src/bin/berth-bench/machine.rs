//! What a side costs: the CPU time of all its processes, exited ones included, by cgroup; and that of the whole machine, which holds
//! the kernel's deferred work too.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// The hierarchy that counts CPU time, and the two cgroups in it: the benchmark's own and the server's.
#[derive(Debug, Clone)]
pub struct Accounting {
    top: PathBuf,
    v2: bool,
}

const OWN: &str = "bench-own";
const SIDE: &str = "bench-side";

impl Accounting {
    /// Finds the hierarchy and moves every process of this sandbox to the benchmark's own cgroup, so that the rest is the side's.
    pub fn start() -> Result<Self> {
        let v1 = ["/sys/fs/cgroup/cpuacct", "/sys/fs/cgroup/cpu,cpuacct"].map(Path::new);
        let found = v1.into_iter().find(|p| p.join("cpuacct.usage").exists());
        let accounting = match found {
            Some(top) => Self { top: top.to_owned(), v2: false },
            None => Self { top: "/sys/fs/cgroup".into(), v2: true },
        };
        for name in [OWN, SIDE] {
            let dir = accounting.top.join(name);
            fs::create_dir_all(&dir).with_context(|| format!("make cgroup {}", dir.display()))?;
        }
        let from = if accounting.v2 { accounting.top.join("testkit") } else { accounting.top.clone() };
        for pid in fs::read_to_string(from.join("cgroup.procs")).unwrap_or_default().lines() {
            // It may have just ended.
            let _ = fs::write(accounting.top.join(OWN).join("cgroup.procs"), pid);
        }
        Ok(accounting)
    }

    /// A shell's line that moves the shell to the side's cgroup.
    pub fn enter_side(&self) -> String {
        format!("echo $$ > '{}'", self.top.join(SIDE).join("cgroup.procs").display())
    }

    /// The processes that are not the side's.
    pub fn own_pids(&self) -> Vec<u32> {
        let text = fs::read_to_string(self.top.join(OWN).join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|l| l.parse().ok()).collect()
    }

    fn usage(&self, dir: &Path) -> Result<f64> {
        if self.v2 {
            let text = fs::read_to_string(dir.join("cpu.stat"))?;
            let usec = text.lines().find_map(|l| l.strip_prefix("usage_usec ")?.parse::<f64>().ok());
            return Ok(usec.context("cpu.stat has no usage_usec")? / 1e3);
        }
        Ok(fs::read_to_string(dir.join("cpuacct.usage"))?.trim().parse::<f64>()? / 1e6)
    }

    /// CPU time of everything in the sandbox that is not the benchmark's own, in ms.
    fn side_ms(&self) -> Result<f64> {
        // Own first: what runs between the two reads must not be missing from the sum.
        let own = self.usage(&self.top.join(OWN))?;
        Ok(self.usage(&self.top)? - own)
    }

    /// CPU time of the side without that of the cgroups of these containers, in ms.
    pub fn side_without_ms(&self, containers: &[String]) -> Result<f64> {
        let mut theirs = 0.0;
        let mut folders = vec![self.top.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten().filter(|e| e.path().is_dir()) {
                let name = entry.file_name();
                if containers.iter().any(|id| name.to_string_lossy().contains(id.as_str())) {
                    theirs += self.usage(&entry.path())?;
                } else {
                    folders.push(entry.path());
                }
            }
        }
        Ok(self.side_ms()? - theirs)
    }

    /// Begins to count.
    pub fn begin(&self) -> Result<Counting> {
        Ok(Counting { accounting: self.clone(), side_ms: self.side_ms()?, machine_ms: machine_ms()?, begun: Instant::now() })
    }
}

/// A stretch that is being counted.
pub struct Counting {
    accounting: Accounting,
    side_ms: f64,
    machine_ms: f64,
    begun: Instant,
}

/// What a stretch cost.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// CPU time of the side's processes.
    pub side_ms: f64,
    /// CPU time of the whole machine.
    pub machine_ms: f64,
    /// Time by the clock.
    pub wall_ms: f64,
}

impl Counting {
    /// What it cost until now.
    pub fn end(&self) -> Result<Cost> {
        let wall_ms = self.begun.elapsed().as_secs_f64() * 1e3;
        let machine_ms = machine_ms()? - self.machine_ms;
        Ok(Cost { side_ms: self.accounting.side_ms()? - self.side_ms, machine_ms, wall_ms })
    }
}

/// Busy time of all CPUs since boot.
fn machine_ms() -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let fields: Vec<f64> =
        stat.lines().next().unwrap_or_default().split_whitespace().skip(1).filter_map(|f| f.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guest time is in user. USER_HZ is 100 on every architecture we run on.
    let busy = fields.iter().take(8).enumerate().filter(|(n, _)| !matches!(n, 3 | 4)).map(|(_, v)| v).sum::<f64>();
    Ok(busy * 10.0)
}

/// The share of the machine that is busy with other things, in percent, over half a second.
pub async fn busy_percent() -> Result<f64> {
    let (begun, before) = (Instant::now(), machine_ms()?);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let cpus = std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64);
    Ok((machine_ms()? - before) / (begun.elapsed().as_secs_f64() * 1e3 * cpus) * 100.0)
}
