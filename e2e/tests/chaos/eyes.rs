//! What is on the machine, seen without berth: /proc, ip, findmnt, the cgroup tree.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

/// A pod's shim.
#[derive(Debug, Clone)]
pub struct Shim {
    pub pid: i32,
    pub sandbox: String,
}

impl Shim {
    pub fn kill(&self) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid), nix::sys::signal::Signal::SIGKILL);
    }
}

fn words(pid: i32) -> Vec<String> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|b| *b == 0).filter(|w| !w.is_empty()).map(|w| String::from_utf8_lossy(w).into_owned()).collect()
}

fn pids() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

/// None when the process has ended.
fn parent(pid: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// All living shims, without what they have forked: of a fork that ends while it is looked at nobody can say whose it was, and a
/// shim must not be thought dead for it.
pub fn shims() -> Vec<Shim> {
    let is_shim = |pid: i32| words(pid).first().is_some_and(|w| w == "berth-shim");
    let all = pids().into_iter().filter(|pid| is_shim(*pid) && parent(*pid).is_some_and(|parent| !is_shim(parent)));
    all.filter_map(|pid| Some(Shim { pid, sandbox: words(pid).get(1)?.clone() })).collect()
}

/// Who is connected to a unix socket, in the words of ss(8).
pub fn connections(socket: &Path) -> String {
    let all = lines("ss", &["-xanp"]);
    let socket = socket.to_string_lossy();
    // The clients' ends have no path: they are told by the number of their peer's.
    let ends: Vec<&String> = all.iter().filter(|line| line.contains(&*socket)).collect();
    let numbers: Vec<&str> = ends.iter().filter_map(|line| line.split_whitespace().nth(8)).filter(|n| *n != "0").collect();
    let is_peer = |line: &&String| numbers.iter().any(|n| line.split_whitespace().nth(6) == Some(*n));
    let peers = all.iter().filter(is_peer);
    ends.iter().copied().chain(peers).map(String::as_str).collect::<Vec<_>>().join("\n")
}

/// How many processes have this word as the last of their command line.
pub fn marked(marker: &str) -> usize {
    pids().into_iter().filter(|pid| words(*pid).last().is_some_and(|w| w == marker)).count()
}

/// How many entries a folder has; none when it is not there.
pub fn entries(folder: &Path) -> usize {
    std::fs::read_dir(folder).into_iter().flatten().count()
}

/// Everything that a pod could leave.
#[derive(Debug)]
pub struct Machine(BTreeSet<String>);

fn lines(program: &str, arguments: &[&str]) -> Vec<String> {
    let out = Command::new(program).args(arguments).output().unwrap();
    assert!(out.status.success(), "{program}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).lines().map(|l| format!("{program}: {}", l.trim())).collect()
}

fn cgroups(folder: &Path, depth: u32, out: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        // Pods are in 64 hex digits below the instance's own cgroup.
        if entry.file_type().is_ok_and(|t| t.is_dir()) && depth > 0 {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.len() == 64 {
                out.insert(format!("cgroup {}", entry.path().display()));
            }
            cgroups(&entry.path(), depth - 1, out);
        }
    }
}

/// The cgroups of an id with their processes.
pub fn cgroups_of(id: &str) -> Vec<String> {
    let mut all = BTreeSet::new();
    cgroups(Path::new("/sys/fs/cgroup"), 6, &mut all);
    let mine = all.into_iter().filter(|line| line.contains(id));
    mine.map(|line| {
        let path = line.trim_start_matches("cgroup ").to_owned();
        let procs = std::fs::read_to_string(format!("{path}/cgroup.procs")).unwrap_or_default();
        let procs: Vec<String> = procs.lines().filter_map(|p| p.parse().ok()).map(|p| format!("{p} {:?}", words(p))).collect();
        format!("{path}: {procs:?}")
    })
    .collect()
}

impl Machine {
    pub fn now() -> Self {
        let mut all = BTreeSet::new();
        let links: serde_json::Value =
            serde_json::from_slice(&Command::new("ip").args(["-j", "link"]).output().unwrap().stdout).unwrap();
        all.extend(
            links.as_array().unwrap().iter().filter(|l| l["link_netnsid"].is_number()).map(|l| format!("veth {}", l["ifname"])),
        );
        all.extend(lines("findmnt", &["-rno", "TARGET,FSTYPE"]));
        all.extend(pids().into_iter().map(|pid| (pid, words(pid))).filter_map(|(pid, words)| {
            let ours = words.first()?.starts_with("berth-") || words.last()?.starts_with("chaos-");
            (ours && words.first()? != "berth-sandbox").then(|| format!("process {pid} {words:?}"))
        }));
        for name in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
            all.insert(format!("netns {}", name.file_name().to_string_lossy()));
        }
        cgroups(Path::new("/sys/fs/cgroup"), 6, &mut all);
        Self(all)
    }

    /// What there is beyond another time.
    pub fn beyond(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}
