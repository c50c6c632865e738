//! Limits in systemd's words. They are written to the cgroup's files too; as properties of the unit they are what systemd itself writes
//! there when it reloads or changes the unit. What systemd has no property for is in the files alone.

use super::wire::{Property, Value};
use crate::devices::{Kind, MKNOD, READ, Rule, WRITE, parse_rules};
use crate::limits::convert::{shares_to_weight, swap_to_v2};
use crate::resources::{Cpu, Memory, Resources};

/// Since when systemd can be told the period of a processor limit.
const HAS_CPU_PERIOD: u32 = 242;
/// Since when it can be told processors and memory nodes.
const HAS_CPUSET: u32 = 244;

/// Files of v2 that may be named in `unified`, by the property that systemd writes them for.
const UNIFIED: [(&str, &str); 7] = [
    ("cpu.weight", "CPUWeight"),
    ("memory.high", "MemoryHigh"),
    ("memory.low", "MemoryLow"),
    ("memory.max", "MemoryMax"),
    ("memory.min", "MemoryMin"),
    ("memory.swap.max", "MemorySwapMax"),
    ("pids.max", "TasksMax"),
];

/// -1 and above everything: unlimited.
fn limit(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

fn wished(value: Option<i64>) -> Option<i64> {
    value.filter(|value| *value != 0)
}

/// The properties of a unit with these limits, for a systemd of this version. `groups` is the text of `/proc/devices`.
pub(super) fn of(resources: &Resources, v2: bool, version: u32, groups: &str) -> Vec<Property> {
    let mut out = Vec::new();
    if let Some(memory) = &resources.memory {
        of_memory(memory, v2, &mut out);
    }
    if let Some(cpu) = &resources.cpu {
        of_cpu(cpu, v2, version, &mut out);
    }
    if let Some(value) = wished(resources.pids.as_ref().and_then(|pids| pids.limit)) {
        out.push(("TasksMax", Value::Count(limit(value))));
    }
    // What is written to these files verbatim, systemd would else write over.
    for (file, name) in UNIFIED {
        if let Some(value) = resources.unified.get(file).filter(|_| v2).and_then(|value| crate::file::number(value)) {
            out.retain(|(other, _)| *other != name);
            out.push((name, Value::Count(value)));
        }
    }
    if let Some(allowed) = device_list(&resources.devices, groups) {
        out.push(("DevicePolicy", Value::Text("strict".into())));
        out.push(("DeviceAllow", Value::Pairs(allowed)));
    }
    out
}

fn of_memory(memory: &Memory, v2: bool, out: &mut Vec<Property>) {
    if let Some(value) = wished(memory.limit) {
        out.push((if v2 { "MemoryMax" } else { "MemoryLimit" }, Value::Count(limit(value))));
    }
    if !v2 {
        return;
    }
    if let Some(value) = wished(memory.reservation) {
        out.push(("MemoryLow", Value::Count(limit(value))));
    }
    if let Some(value) = swap_to_v2(wished(memory.limit), wished(memory.swap)) {
        out.push(("MemorySwapMax", Value::Count(limit(value))));
    }
}

fn of_cpu(cpu: &Cpu, v2: bool, version: u32, out: &mut Vec<Property>) {
    if let Some(shares) = cpu.shares.filter(|shares| *shares != 0) {
        match v2 {
            true if cpu.idle.unwrap_or(0) == 0 => out.push(("CPUWeight", Value::Count(shares_to_weight(shares)))),
            true => {}
            false => out.push(("CPUShares", Value::Count(shares))),
        }
    }
    let period = cpu.period.filter(|period| *period != 0);
    if let Some(period) = period.filter(|_| version >= HAS_CPU_PERIOD) {
        out.push(("CPUQuotaPeriodUSec", Value::Count(period)));
    }
    if let Some(quota) = wished(cpu.quota) {
        // What systemd is told is time per second, in steps of 10 ms: rounded up, or it would write a smaller one than was asked for.
        let per_second = match u64::try_from(quota) {
            Ok(quota) => {
                let exact = quota.saturating_mul(1_000_000) / period.unwrap_or(100_000);
                exact.checked_next_multiple_of(10_000).unwrap_or(u64::MAX)
            }
            Err(_) => u64::MAX,
        };
        out.push(("CPUQuotaPerSecUSec", Value::Count(per_second)));
    }
    if v2 && version >= HAS_CPUSET {
        for (list, name) in [(&cpu.cpus, "AllowedCPUs"), (&cpu.mems, "AllowedMemoryNodes")] {
            if let Some(bits) = list.as_deref().filter(|list| !list.is_empty()).and_then(bits) {
                out.push((name, Value::Bytes(bits)));
            }
        }
    }
}

/// A list like `0-2,5` as a bit set, the lowest number in the lowest bit of the first byte.
fn bits(list: &str) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    for part in list.trim().split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to): (usize, usize) = (from.trim().parse().ok()?, to.trim().parse().ok()?);
        // The kernel knows at most 8192 processors; more is no list of them.
        if to < from || to >= 8192 {
            return None;
        }
        for number in from..=to {
            if out.len() <= number / 8 {
                out.resize(number / 8 + 1, 0);
            }
            out[number / 8] |= 1 << (number % 8);
        }
    }
    Some(out)
}

/// The list of what is allowed, where the rules are such a list: first nothing, then only more. Other rules are systemd's language not able
/// to say; then the unit allows everything, and the cgroup's own rules, which stay, decide alone.
fn device_list(rules: &[crate::DeviceRule], groups: &str) -> Option<Vec<(String, String)>> {
    let rules = parse_rules(rules).ok()?;
    let everything = |rule: &&Rule| rule.kind == Kind::All && rule.access == MKNOD | READ | WRITE;
    let begin = rules.iter().rposition(|rule| everything(&rule))?;
    let (first, rest) = rules[begin..].split_first()?;
    if first.allow || rest.iter().any(|rule| !rule.allow) {
        return None;
    }
    let mut out = Vec::new();
    for rule in rest {
        let kinds: &[(&str, &str)] = match rule.kind {
            Kind::All => &[("char", "Character"), ("block", "Block")],
            Kind::Char => &[("char", "Character")],
            Kind::Block => &[("block", "Block")],
        };
        let access: String =
            [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')].iter().filter(|(bit, _)| rule.access & bit != 0).map(|(_, c)| *c).collect();
        for (kind, section) in kinds {
            let name = match (rule.major, rule.minor) {
                (Some(major), Some(minor)) => format!("/dev/{kind}/{major}:{minor}"),
                (Some(major), None) => format!("{kind}-{}", group(groups, section, major)?),
                (None, None) => format!("{kind}-*"),
                (None, Some(_)) => return None,
            };
            out.push((name, access.clone()));
        }
    }
    Some(out)
}

/// The name that `/proc/devices` has for a major number.
fn group<'a>(text: &'a str, section: &str, major: u32) -> Option<&'a str> {
    let lines = text.lines().skip_while(|line| !line.starts_with(section)).skip(1);
    lines.take_while(|line| !line.is_empty()).find_map(|line| {
        let (number, name) = line.trim().split_once(' ')?;
        (number.parse() == Ok(major)).then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DeviceRule;

    const GROUPS: &str = "Character devices:\n  1 mem\n  5 /dev/tty\n136 pts\n\nBlock devices:\n  8 sd\n";

    fn count(properties: &[Property], name: &str) -> Option<u64> {
        properties.iter().find_map(|(other, value)| match value {
            Value::Count(value) if *other == name => Some(*value),
            _ => None,
        })
    }

    #[test]
    fn limits_have_systemds_names_on_each_layout() {
        let resources = Resources {
            memory: Some(Memory { limit: Some(100), swap: Some(150), reservation: Some(50), ..Default::default() }),
            cpu: Some(Cpu {
                shares: Some(1024),
                quota: Some(12_345),
                period: Some(100_000),
                cpus: Some("0,2-3,9".into()),
                ..Default::default()
            }),
            pids: Some(crate::Pids { limit: Some(-1) }),
            ..Default::default()
        };
        let v2 = of(&resources, true, 252, GROUPS);
        for (name, value) in [
            ("MemoryMax", 100),
            ("MemorySwapMax", 50),
            ("MemoryLow", 50),
            ("CPUWeight", 39),
            ("CPUQuotaPerSecUSec", 130_000),
            ("CPUQuotaPeriodUSec", 100_000),
            ("TasksMax", u64::MAX),
        ] {
            assert_eq!(count(&v2, name), Some(value), "{name}");
        }
        assert!(v2.contains(&("AllowedCPUs", Value::Bytes(vec![0b1101, 0b10]))));
        let old = of(&resources, true, 241, GROUPS);
        assert!(old.iter().all(|(name, _)| !["CPUQuotaPeriodUSec", "AllowedCPUs"].contains(name)));
        let v1 = of(&resources, false, 252, GROUPS);
        assert_eq!((count(&v1, "MemoryLimit"), count(&v1, "CPUShares"), count(&v1, "MemoryMax")), (Some(100), Some(1024), None));
        assert_eq!(of(&Resources::default(), true, 252, GROUPS), []);
        let absurd = Cpu { quota: Some(i64::MAX), period: Some(1), ..Default::default() };
        let absurd = of(&Resources { cpu: Some(absurd), ..Default::default() }, true, 252, GROUPS);
        assert_eq!(count(&absurd, "CPUQuotaPerSecUSec"), Some(u64::MAX));
        let unified = [("memory.high", "7"), ("memory.max", "max"), ("memory.oom.group", "1")];
        let unified = unified.map(|(file, value)| (file.to_owned(), value.to_owned())).into();
        let v2 = of(&Resources { unified, ..resources }, true, 252, GROUPS);
        assert_eq!((count(&v2, "MemoryHigh"), count(&v2, "MemoryMax")), (Some(7), Some(u64::MAX)));
    }

    #[test]
    fn device_rules_are_a_list_only_where_they_mean_one() {
        let rule = |allow, kind: &str, major, minor, access: &str| DeviceRule {
            allow,
            kind: Some(kind.into()),
            major: Some(major),
            minor: Some(minor),
            access: Some(access.into()),
        };
        let none = rule(false, "a", -1, -1, "rwm");
        let list = device_list(
            &[none.clone(), rule(true, "c", 1, 3, "rwm"), rule(true, "c", 136, -1, "rw"), rule(true, "a", -1, -1, "m")],
            GROUPS,
        );
        let list = list.unwrap();
        let list: Vec<(&str, &str)> = list.iter().map(|(name, access)| (name.as_str(), access.as_str())).collect();
        assert_eq!(list, [("/dev/char/1:3", "rwm"), ("char-pts", "rw"), ("char-*", "m"), ("block-*", "m")]);
        assert_eq!(device_list(std::slice::from_ref(&none), GROUPS), Some(Vec::new()));
        // Everything is allowed; a denial behind an allowance; a group that the machine does not have; no rules.
        assert_eq!(device_list(&[none.clone(), rule(true, "a", -1, -1, "rwm")], GROUPS), None);
        assert_eq!(device_list(&[none.clone(), rule(true, "c", 1, -1, "r"), rule(false, "c", 1, 3, "r")], GROUPS), None);
        assert_eq!(device_list(&[none, rule(true, "c", 77, -1, "r")], GROUPS), None);
        assert_eq!(device_list(&[], GROUPS), None);
    }
}
