//! The workloads of a node agent: a manifest until its process runs, an exit until the status shows it, idle pods with probes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use berth_e2e::memory::processes;
use serde_json::{Value, json};

use crate::agent::{Agent, container_id, find, is_ready, name, pods};
use crate::machine::Accounting;
use crate::meter::Meter;

/// A status is looked at so often: well below what is measured.
const POLL: Duration = Duration::from_millis(2);
/// Pods that come and go are looked at so often.
const SLOW_POLL: Duration = Duration::from_millis(100);
/// Drops end after this, however few they were: one of the upstream's kubelet takes half a minute.
const DROPS: Duration = Duration::from_secs(150);
/// After the last pod is ready, until what the start allocated is given back as far as it is.
const SETTLE: Duration = Duration::from_secs(20);
/// The same before the disk is watched: an agent looks for the first time after a minute for what nobody owns, and the kernel writes down
/// once that it was read.
const SETTLE_DISK: Duration = Duration::from_secs(90);

/// The programs of which a node has one, whatever runs on it.
const AGENTS: [&str; 3] = ["berth", "kubelet", "containerd"];

/// What the workloads need.
pub struct NodeBench {
    /// The agent.
    pub agent: Agent,
    /// CPU time by cgroup.
    pub accounting: Accounting,
    /// Samples.
    pub meter: Meter,
    /// The image of all pods.
    pub image: &'static str,
    /// A folder of the node that pods write to.
    pub shared: PathBuf,
}

/// The probe of the idle pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// An HTTP GET every ten seconds, which is the API's default.
    Http,
    /// A command every second.
    Exec,
}

impl NodeBench {
    fn pod(&self, name: &str, command: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {
            "terminationGracePeriodSeconds": 0, "restartPolicy": "Never", "automountServiceAccountToken": false,
            "volumes": [{"name": "shared", "hostPath": {"path": self.shared, "type": "Directory"}}],
            "containers": [{"name": "c", "image": self.image, "imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", command],
                "volumeMounts": [{"name": "shared", "mountPath": "/shared"}]}]}})
    }

    fn wait_gone(&mut self, gone: &str) -> Result<()> {
        self.agent.wait("a pod's end", SLOW_POLL, |_| Ok(find(gone)?.is_none().then_some(())))
    }

    /// So many pods, one after the other: from the manifest in the folder to the first instruction of its process, and from the kill
    /// of that process to a status that says so.
    pub fn drops(&mut self, count: usize) -> Result<()> {
        let first = Instant::now();
        // The first pulls the image and makes the network.
        for n in 0..=count {
            if first.elapsed() > DROPS {
                break;
            }
            let name = format!("drop{n}");
            let mark = self.shared.join(&name);
            let pod = self.pod(&name, &format!("touch /shared/{name}; exec sleep 100000"));
            let begun = SystemTime::now();
            self.agent.put(&name, &pod)?;
            let started =
                self.agent.wait("a pod's process", POLL, |_| Ok(fs::metadata(&mark).and_then(|m| m.modified()).ok()))?;
            let running = |pod: &Value| pod["status"]["containerStatuses"][0]["state"]["running"].is_object();
            let shown = self.agent.wait("a running status", POLL, |_| Ok(find(&name)?.filter(running)))?;
            let shown_at = SystemTime::now();
            let id = container_id(&shown).context("a running container without an id")?;
            // On a loaded machine the shell may not have become it yet.
            let pid = self.agent.wait("the pod's main process", POLL, |_| Ok(main_process(&id)))?;
            let killed = Instant::now();
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
            let terminated = |pod: &Value| pod["status"]["containerStatuses"][0]["state"]["terminated"].is_object();
            self.agent.wait("a terminated status", POLL, |_| Ok(find(&name)?.filter(terminated)))?;
            let told = killed.elapsed();
            self.agent.take(&name)?;
            self.wait_gone(&name)?;
            if n > 0 {
                // The clock of a file's time stamp is up to a tick behind.
                self.meter.add("drop.started", started.duration_since(begun).unwrap_or_default().as_secs_f64() * 1e3);
                self.meter.add("drop.running", shown_at.duration_since(begun)?.as_secs_f64() * 1e3);
                self.meter.add("exit.status", told.as_secs_f64() * 1e3);
            }
        }
        Ok(())
    }

    /// So many pods at once until all are ready; what they and the agent use while nothing happens for `window`.
    pub fn idle(&mut self, key: &str, probe: Probe, count: usize, window: Duration) -> Result<()> {
        self.with_idle(key, probe, count, |bench, containers| {
            std::thread::sleep(SETTLE);
            bench.window(key, containers, window)
        })
    }

    /// The same with an HTTP probe; what the side, and everybody, writes to the disk of a folder meanwhile.
    pub fn idle_disk(&mut self, folder: &Path, count: usize, window: Duration) -> Result<()> {
        self.with_idle("idle-disk", Probe::Http, count, |bench, _| {
            std::thread::sleep(SETTLE_DISK);
            let own = bench.accounting.own_pids();
            let before = (written(&own), disk_kib(folder)?);
            std::thread::sleep(window);
            bench.meter.add("idle-disk.written", written(&own).saturating_sub(before.0) as f64 / 1024.0);
            bench.meter.add("idle-disk.disk", disk_kib(folder)? - before.1);
            Ok(())
        })
    }

    fn with_idle(
        &mut self,
        key: &str,
        probe: Probe,
        count: usize,
        measure: impl FnOnce(&mut Self, &[String]) -> Result<()>,
    ) -> Result<()> {
        let names: Vec<String> = (0..count).map(|n| format!("idle{n}")).collect();
        let begun = Instant::now();
        for name in &names {
            let mut pod = self.pod(name, "mkdir /www; touch /www/ok; exec httpd -f -p 8080 -h /www");
            pod["spec"]["containers"][0]["readinessProbe"] = match probe {
                Probe::Http => json!({"httpGet": {"path": "/ok", "port": 8080}}),
                Probe::Exec => json!({"exec": {"command": ["true"]}, "periodSeconds": 1}),
            };
            self.agent.put(name, &pod)?;
        }
        let all = |_: &mut Agent| Ok(Some(pods()?).filter(|pods| pods.iter().filter(|pod| is_ready(pod)).count() == count));
        let ready = self.agent.wait("all pods to be ready", SLOW_POLL, all)?;
        self.meter.add(&format!("{key}.all ready"), begun.elapsed().as_secs_f64());
        let containers: Vec<String> = ready.iter().filter_map(container_id).collect();
        measure(self, &containers)?;
        let after = pods()?;
        let same =
            after.iter().filter(|pod| is_ready(pod) && container_id(pod).is_some_and(|id| containers.contains(&id))).count();
        if same != count {
            self.meter.fail(format!("{key}: {same} of {count} pods are what they were"));
        }
        names.iter().try_for_each(|name| self.agent.take(name))?;
        self.agent.wait("the end of all pods", SLOW_POLL, |_| {
            Ok(pods()?.iter().all(|pod| !names.iter().any(|n| n == name(pod))).then_some(()))
        })
    }

    /// What the side uses while nothing happens for `window`.
    pub fn window(&mut self, key: &str, containers: &[String], window: Duration) -> Result<()> {
        let own = self.accounting.own_pids();
        let (begun, before) = (Instant::now(), self.accounting.side_without_ms(containers)?);
        let wrote = written(&own);
        std::thread::sleep(window);
        let spent = self.accounting.side_without_ms(containers)? - before;
        let elapsed = begun.elapsed().as_secs_f64() * 1e3;
        self.meter.add(&format!("{key}.CPU"), spent / elapsed * 100.0);
        self.meter.add(&format!("{key}.written"), written(&own).saturating_sub(wrote) as f64 / 1024.0);
        let of_container = |pid: u32| {
            let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            containers.iter().any(|id| cgroups.contains(id))
        };
        let mut sum = 0;
        let mut roles = std::collections::BTreeMap::<String, u64>::new();
        for process in processes(|pid, _, _| !own.contains(&pid) && !of_container(pid)) {
            *roles.entry(process.title()).or_default() += process.pss_kib;
            sum += process.pss_kib;
        }
        ensure!(sum > 0, "no process of the side");
        let is_agent = |role: &str| AGENTS.contains(&role);
        let agents: u64 = roles.iter().filter(|(role, _)| is_agent(role)).map(|(_, kib)| kib).sum();
        self.meter.add(&format!("{key}.PSS agents"), agents as f64 / 1024.0);
        for (role, kib) in roles {
            self.meter.add(&format!("{key}.PSS {role}"), kib as f64 / 1024.0);
        }
        self.meter.add(&format!("{key}.PSS"), sum as f64 / 1024.0);
        Ok(())
    }
}

/// The process of a container that is the first of its PID namespace or the shell's successor: the oldest in its cgroup.
fn main_process(container: &str) -> Option<i32> {
    let pids = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let inside = |pid: &i32| {
        let text = |file: &str| fs::read_to_string(Path::new("/proc").join(pid.to_string()).join(file)).unwrap_or_default();
        text("cgroup").contains(container) && text("comm").trim() == "sleep"
    };
    pids.filter(inside).min()
}

/// KiB that have been written to the disk that holds a folder, by the block device's own counter.
pub fn disk_kib(folder: &Path) -> Result<f64> {
    let device = device_of(folder)?;
    let text = fs::read_to_string("/proc/diskstats")?;
    let fields = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let line = text.lines().map(fields).find(|line| line.len() > 9 && format!("{}:{}", line[0], line[1]) == device);
    // The tenth field: sectors of 512 bytes (Documentation/admin-guide/iostats.rst).
    let sectors: u64 = line.with_context(|| format!("the disk {device} has no counters"))?[9].parse()?;
    Ok(sectors as f64 / 2.0)
}

/// `major:minor` of the device that a folder is on.
fn device_of(folder: &Path) -> Result<String> {
    use std::os::unix::fs::MetadataExt;
    let device = fs::metadata(folder)?.dev();
    Ok(format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device)))
}

/// Bytes that the side's living processes caused to be written to disks.
fn written(own: &[u32]) -> u64 {
    let of = |pid: u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
        text.lines().find_map(|line| line.strip_prefix("write_bytes: "))?.parse::<u64>().ok()
    };
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| !own.contains(pid)).filter_map(of).sum()
}
