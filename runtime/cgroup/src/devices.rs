//! Device rules: checked once, then written as v1's lists or as v2's program.

pub(crate) mod program;

use berth_linux::bpf;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::resources::DeviceRule;
use crate::{Error, Result, file};

/// The kind of device that a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    All,
    Block,
    Char,
}

/// To make a node.
pub(crate) const MKNOD: u32 = 1;
/// To open for reading.
pub(crate) const READ: u32 = 2;
/// To open for writing.
pub(crate) const WRITE: u32 = 4;
/// All of these.
pub(crate) const ALL_ACCESS: u32 = MKNOD | READ | WRITE;

/// A checked rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rule {
    pub allow: bool,
    pub kind: Kind,
    pub major: Option<u32>,
    pub minor: Option<u32>,
    pub access: u32,
}

/// Checks a rule.
pub(crate) fn parse_rule(rule: &DeviceRule) -> Result<Rule> {
    let bad = |reason: &str| Error::Invalid { field: "linux.resources.devices".to_owned(), reason: reason.to_owned() };
    let kind = match rule.kind.as_deref() {
        None | Some("" | "a") => Kind::All,
        Some("b") => Kind::Block,
        Some("c" | "u") => Kind::Char,
        Some(_) => return Err(bad("the type is none of a, b and c")),
    };
    let number = |value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        // 12 and 20 bits are all that a device number has.
        Some(value @ 0..=0xf_ffff) => Ok(Some(value as u32)),
        Some(_) => Err(bad("a device number is out of range")),
    };
    let (major, minor) = (number(rule.major)?, number(rule.minor)?);
    if kind == Kind::All && (major.is_some() || minor.is_some()) {
        // The kernel would take such a rule for all devices whatever the numbers.
        return Err(bad("a rule for all types cannot have device numbers"));
    }
    let mut access = 0;
    match rule.access.as_deref() {
        None | Some("") => access = ALL_ACCESS,
        Some(letters) => {
            for letter in letters.chars() {
                access |= match letter {
                    'r' => READ,
                    'w' => WRITE,
                    'm' => MKNOD,
                    _ => return Err(bad("the access is not of r, w and m")),
                };
            }
        }
    }
    Ok(Rule { allow: rule.allow, kind, major, minor, access })
}

pub(crate) fn parse_rules(rules: &[DeviceRule]) -> Result<Vec<Rule>> {
    rules.iter().map(parse_rule).collect()
}

/// A rule in the words of v1: the file and what to write.
pub(crate) fn v1_line(rule: &Rule) -> (&'static str, String) {
    let file = if rule.allow { "devices.allow" } else { "devices.deny" };
    // The kernel takes a rule for all types as the list's default, whatever its access: only the full one means that.
    let kind = match rule.kind {
        Kind::All => return (file, "a *:* rwm".to_owned()),
        Kind::Block => 'b',
        Kind::Char => 'c',
    };
    let number = |number: Option<u32>| number.map_or_else(|| "*".to_owned(), |number| number.to_string());
    let mut line = format!("{kind} {}:{} ", number(rule.major), number(rule.minor));
    for (bit, letter) in [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')] {
        if rule.access & bit != 0 {
            line.push(letter);
        }
    }
    (file, line)
}

/// The lines to write for rules. A rule for all types with less than full access becomes one for each type.
pub(crate) fn v1_lines(rules: &[Rule]) -> Vec<(&'static str, String)> {
    let mut lines = Vec::with_capacity(rules.len());
    for rule in rules {
        if rule.kind == Kind::All && rule.access != ALL_ACCESS {
            for kind in [Kind::Block, Kind::Char] {
                lines.push(v1_line(&Rule { kind, ..*rule }));
            }
        } else {
            lines.push(v1_line(rule));
        }
    }
    lines
}

/// Gives a cgroup of v1's devices controller these rules.
pub(crate) fn apply_v1(dir: &Path, rules: &[DeviceRule]) -> Result<()> {
    for (name, line) in v1_lines(&parse_rules(rules)?) {
        file::write(&dir.join(name), &line)?;
    }
    Ok(())
}

/// Gives a cgroup of v2 these rules, in place of those it has.
pub(crate) fn apply_v2(dir: &Path, rules: &[DeviceRule]) -> Result<()> {
    let instructions = program::assemble(&parse_rules(rules)?);
    let fail = |source| Error::DeviceProgram { path: dir.to_owned(), source };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(dir, flags, Mode::empty()).map_err(|errno| fail(errno.into()))?;
    let program = bpf::load_device_program(&instructions).map_err(fail)?;
    bpf::replace_device_program(folder.as_fd(), program.as_fd()).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(allow: bool, kind: &str, major: i64, minor: i64, access: &str) -> DeviceRule {
        DeviceRule { allow, kind: Some(kind.to_owned()), major: Some(major), minor: Some(minor), access: Some(access.to_owned()) }
    }

    #[test]
    fn rules_become_the_lines_of_v1() {
        let rules = [
            DeviceRule { allow: false, access: Some("rwm".to_owned()), ..DeviceRule::default() },
            rule(true, "c", 1, 3, "rwm"),
            rule(true, "c", -1, -1, "m"),
            rule(true, "a", -1, -1, "m"),
            rule(false, "b", 8, -1, "w"),
        ];
        let lines = v1_lines(&parse_rules(&rules).unwrap());
        let lines: Vec<String> = lines.into_iter().map(|(file, line)| format!("{file} {line}")).collect();
        assert_eq!(
            lines,
            [
                "devices.deny a *:* rwm",
                "devices.allow c 1:3 rwm",
                "devices.allow c *:* m",
                "devices.allow b *:* m",
                "devices.allow c *:* m",
                "devices.deny b 8:* w"
            ]
        );
    }

    #[test]
    fn rules_that_would_mean_something_else_are_refused() {
        for bad in
            [rule(true, "a", 1, -1, "r"), rule(true, "p", 1, 1, "r"), rule(true, "c", 1, 1, "x"), rule(true, "c", -2, 1, "r")]
        {
            assert!(parse_rule(&bad).is_err(), "{bad:?}");
        }
    }
}
