//! `update`: new limits for a container that exists.

use std::io::Read;

use berth_cgroup::{BlockIo, Cpu, Memory, Pids, Resources};

use super::args::Flags;
use super::state::{Folder, open_cgroup};
use super::{Global, Outcome, id};
use crate::chain;

pub(super) fn update(global: &Global, flags: &Flags) -> Outcome {
    let record = Folder::of(global, id(flags)?).record()?;
    let resources = match flags.get("resources") {
        Some(path) => read(path)?,
        None => from_options(flags)?,
    };
    resources.validate().map_err(|error| chain(&error))?;
    let Some(cgroup) = open_cgroup(&record)? else { return Err("container has no control group".into()) };
    cgroup.update(&resources).map(|()| 0).map_err(|error| chain(&error))
}

fn read(path: &str) -> Result<Resources, String> {
    let mut text = Vec::new();
    match path {
        "-" => std::io::stdin().read_to_end(&mut text),
        path => std::fs::File::open(path).and_then(|mut file| file.read_to_end(&mut text)),
    }
    .map_err(|error| format!("read {path}: {error}"))?;
    serde_json::from_slice(&text).map_err(|error| format!("{path}: {error}"))
}

fn from_options(flags: &Flags) -> Result<Resources, String> {
    let text = |name| flags.get(name).map(str::to_owned);
    let memory = Memory {
        limit: flags.number("memory")?,
        reservation: flags.number("memory-reservation")?,
        swap: flags.number("memory-swap")?,
        ..Memory::default()
    };
    let cpu = Cpu {
        shares: flags.number("cpu-share")?,
        quota: flags.number("cpu-quota")?,
        period: flags.number("cpu-period")?,
        burst: flags.number("cpu-burst")?,
        idle: flags.number("cpu-idle")?,
        cpus: text("cpuset-cpus"),
        mems: text("cpuset-mems"),
        ..Cpu::default()
    };
    Ok(Resources {
        memory: Some(memory).filter(|memory| *memory != Memory::default()),
        cpu: Some(cpu).filter(|cpu| *cpu != Cpu::default()),
        pids: flags.number("pids-limit")?.map(|limit| Pids { limit: Some(limit) }),
        block_io: flags.number("blkio-weight")?.map(|weight| BlockIo { weight: Some(weight), ..BlockIo::default() }),
        ..Resources::default()
    })
}
