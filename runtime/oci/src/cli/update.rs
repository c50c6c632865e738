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

/// A size in bytes, which may end in a unit: `512m`, `1GiB`; -1 is unlimited.
fn bytes(flags: &Flags, name: &str) -> Result<Option<i64>, String> {
    flags.get(name).map(|text| parse_bytes(text).ok_or_else(|| format!("--{name}: {text:?} is not a size in bytes"))).transpose()
}

fn parse_bytes(text: &str) -> Option<i64> {
    let digits = text.bytes().position(|byte| !(byte.is_ascii_digit() || byte == b'-')).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return None,
    };
    number.parse::<i64>().ok()?.checked_mul(1 << shift)
}

fn from_options(flags: &Flags) -> Result<Resources, String> {
    let text = |name| flags.get(name).map(str::to_owned);
    let memory = Memory {
        limit: bytes(flags, "memory")?,
        reservation: bytes(flags, "memory-reservation")?,
        swap: bytes(flags, "memory-swap")?,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_may_have_units() {
        for (text, size) in [
            ("1024", Some(1024)),
            ("-1", Some(-1)),
            ("512m", Some(512 << 20)),
            ("1GiB", Some(1 << 30)),
            ("2kb", Some(2048)),
            ("9223372036854775807k", None),
            ("m", None),
            ("1x", None),
            ("", None),
        ] {
            assert_eq!(parse_bytes(text), size, "{text}");
        }
    }
}
