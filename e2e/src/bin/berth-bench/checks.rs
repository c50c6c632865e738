//! Whether a pod is one: a fast runtime that skips a protection or answers early makes its round void. Looked at from outside with the
//! kernel's files and with foreign programs.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::cri::{CPU_SHARES, GREETING, MASKED_PATHS, MEMORY_LIMIT, READONLY_PATHS};
use crate::traces::Hierarchies;

/// What is known of a pod that is looked at.
#[derive(Debug, Clone)]
pub struct Suspect {
    /// The container's first process.
    pub pid: i64,
    /// The pod's address by its status.
    pub ip: String,
    /// The container's log.
    pub log: PathBuf,
}

/// Looks at a running pod.
pub fn check(suspect: &Suspect, hierarchies: &Hierarchies) -> Result<()> {
    let pid = suspect.pid;
    ensure!(pid > 1, "no pid in the container's status");
    address(pid, &suspect.ip)?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("the container's process")?;
    for line in ["Seccomp:\t2", "NoNewPrivs:\t1"] {
        ensure!(status.lines().any(|l| l == line), "its process has no {line:?}");
    }
    protected(pid)?;
    limits(pid, hierarchies)?;
    greeting(&suspect.log)
}

/// The address is on eth0 in the pod's namespace, and answers.
fn address(pid: i64, ip: &str) -> Result<()> {
    let parsed: IpAddr = ip.parse().with_context(|| format!("the pod's address {ip:?}"))?;
    let out = Command::new("nsenter").args(["-t", &pid.to_string(), "-n", "ip", "-o", "addr", "show", "dev", "eth0"]).output()?;
    let shown = String::from_utf8_lossy(&out.stdout).into_owned();
    ensure!(shown.contains(&format!(" {parsed}/")), "eth0 has not the address {parsed}: {shown}");
    let mut ping = Command::new("busybox");
    ping.args(["ping", "-c", "1", "-W", "2", ip]).stdout(Stdio::null()).stderr(Stdio::null());
    ensure!(ping.status()?.success(), "{parsed} does not answer a ping");
    Ok(())
}

/// Every path that was to be masked or read-only, and exists, is a mount of its own.
fn protected(pid: i64) -> Result<()> {
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let points: Vec<(&str, bool)> = mounts
        .lines()
        .filter_map(|l| {
            let mut fields = l.split(' ').skip(4);
            Some((fields.next()?, fields.next()?.split(',').any(|o| o == "ro")))
        })
        .collect();
    for path in MASKED_PATHS.iter().filter(|p| Path::new(p).exists()) {
        ensure!(points.iter().any(|(at, _)| at == path), "{path} is not masked");
    }
    for path in READONLY_PATHS.iter().filter(|p| Path::new(p).exists()) {
        ensure!(points.iter().any(|(at, readonly)| at == path && *readonly), "{path} is not read-only");
    }
    Ok(())
}

fn limits(pid: i64, hierarchies: &Hierarchies) -> Result<()> {
    let read = |controller, file| hierarchies.read_of_process(pid, controller, file);
    let memory = read("memory", "memory.limit_in_bytes").or_else(|| read("memory", "memory.max"));
    ensure!(memory.as_deref() == Some(&MEMORY_LIMIT.to_string()), "its memory limit is {memory:?}");
    // On v2 the shares are a weight: it is enough that it is not the default.
    match read("cpu", "cpu.shares") {
        Some(shares) => ensure!(shares == CPU_SHARES.to_string(), "its CPU shares are {shares}"),
        None => ensure!(read("cpu", "cpu.weight").is_some_and(|w| w != "100"), "its CPU weight is the default"),
    }
    Ok(())
}

fn greeting(log: &Path) -> Result<()> {
    let line = format!(" stdout F {GREETING}");
    // It is written by another process than the one that started the container.
    for _ in 0..200 {
        if fs::read_to_string(log).is_ok_and(|text| text.lines().any(|l| l.ends_with(&line))) {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    bail!("its log has no line {line:?}")
}
