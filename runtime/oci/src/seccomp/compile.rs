//! From a profile to a program.

use std::collections::BTreeMap;

use berth_linux::arch::{Abi, X32_BIT};

use super::Filter;
use super::assemble::{self, Compare, Condition, Instruction, JMP_EQ, JMP_GE, LD_ABS, OFFSET_ARCH, OFFSET_NUMBER, Outcome, RET};
use crate::Error;
use crate::spec::{Seccomp, SeccompArg, SeccompRule};

const KILL_PROCESS: u32 = 0x8000_0000;
const KILL_THREAD: u32 = 0x0000_0000;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const TRACE: u32 = 0x7ff0_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const FLAG_TSYNC: u32 = 1;
const FLAG_LOG: u32 = 2;
const FLAG_SPEC_ALLOW: u32 = 4;
/// The kernel's limit.
const MAX_INSTRUCTIONS: usize = 4096;

/// Makes the program of a profile for this machine.
///
/// Of several rules for one call, those with conditions are tried in the profile's order, then the one without. A rule that names one argument
/// twice holds when any of its conditions does (as runc has it). Calls newer than any that the profile names fail with ENOSYS where they
/// would be denied, so that programs fall back as they do on an older kernel. Calls of an architecture that is not listed kill.
pub fn compile(profile: &Seccomp) -> Result<Filter, Error> {
    compile_for(profile, Abi::NATIVE)
}

fn refuse(field: &str, reason: impl Into<String>) -> Error {
    Error::Spec { field: format!("linux.seccomp.{field}"), reason: reason.into() }
}

pub(super) fn compile_for(profile: &Seccomp, native: Abi) -> Result<Filter, Error> {
    if !profile.listener_path.is_empty() || !profile.listener_metadata.is_empty() {
        return Err(refuse("listenerPath", "notification to a listener is not supported"));
    }
    let default = action("defaultAction", &profile.default_action, profile.default_errno_ret)?;
    let rules = profile.syscalls.iter().map(Rule::parse).collect::<Result<Vec<_>, _>>()?;
    let abis = accepted(profile, native)?;
    let mut program: Vec<Instruction> = vec![(LD_ABS, 0, 0, OFFSET_ARCH)];
    for abi in native.family().iter().filter(|abi| **abi != Abi::X32 && abis.contains(abi)) {
        let section = section(*abi, &rules, default, abis.contains(&Abi::X32))?;
        // Not this architecture: over the section, by the unconditional jump that reaches everywhere.
        program.push((JMP_EQ, 1, 0, abi.audit_arch()));
        program.push((assemble::JMP_ALWAYS, 0, 0, section.len() as u32));
        program.extend(section);
    }
    program.push((RET, 0, 0, KILL_PROCESS));
    if program.len() > MAX_INSTRUCTIONS {
        return Err(refuse(
            "syscalls",
            format!("{} instructions are more than the kernel takes ({MAX_INSTRUCTIONS})", program.len()),
        ));
    }
    Ok(Filter { instructions: program, flags: flags(&profile.flags)? })
}

/// The interfaces whose calls are judged; all others kill.
fn accepted(profile: &Seccomp, native: Abi) -> Result<Vec<Abi>, Error> {
    let mut abis = vec![native];
    for name in &profile.architectures {
        let abi = match name.as_str() {
            "SCMP_ARCH_X86_64" => Abi::X86_64,
            "SCMP_ARCH_X86" => Abi::X86,
            "SCMP_ARCH_X32" => Abi::X32,
            "SCMP_ARCH_AARCH64" => Abi::Aarch64,
            "SCMP_ARCH_ARM" => Abi::Arm,
            other if is_foreign(other) => continue,
            other => return Err(refuse("architectures", format!("unknown architecture {other}"))),
        };
        if native.family().contains(&abi) && !abis.contains(&abi) {
            abis.push(abi);
        }
    }
    Ok(abis)
}

/// Architectures that profiles name and that this machine's kernel cannot run.
fn is_foreign(name: &str) -> bool {
    const FAMILIES: [&str; 8] = ["MIPS", "PPC", "S390", "RISCV", "PARISC", "LOONGARCH", "M68K", "SH"];
    name.strip_prefix("SCMP_ARCH_").is_some_and(|rest| FAMILIES.iter().any(|family| rest.starts_with(family)))
}

fn flags(names: &[String]) -> Result<u32, Error> {
    if names.is_empty() {
        return Ok(FLAG_SPEC_ALLOW);
    }
    names.iter().try_fold(0, |flags, name| match name.as_str() {
        "SECCOMP_FILTER_FLAG_TSYNC" => Ok(flags | FLAG_TSYNC),
        "SECCOMP_FILTER_FLAG_LOG" => Ok(flags | FLAG_LOG),
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => Ok(flags | FLAG_SPEC_ALLOW),
        other => Err(refuse("flags", format!("{other} is not supported"))),
    })
}

fn action(field: &str, name: &str, errno: Option<u32>) -> Result<u32, Error> {
    let data = errno.unwrap_or(EPERM);
    if data > 0xffff {
        return Err(refuse(field, format!("error number {data} is out of range")));
    }
    match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Ok(KILL_THREAD),
        "SCMP_ACT_KILL_PROCESS" => Ok(KILL_PROCESS),
        "SCMP_ACT_TRAP" => Ok(TRAP),
        "SCMP_ACT_ERRNO" => Ok(ERRNO | data),
        "SCMP_ACT_TRACE" => Ok(TRACE | data),
        "SCMP_ACT_ALLOW" => Ok(ALLOW),
        "SCMP_ACT_LOG" => Ok(LOG),
        "SCMP_ACT_NOTIFY" => Err(refuse(field, "SCMP_ACT_NOTIFY is not supported")),
        other => Err(refuse(field, format!("unknown action {other:?}"))),
    }
}

struct Rule<'a> {
    names: &'a [String],
    action: u32,
    /// Alternatives; each is a list of conditions that must all hold. Empty: no conditions.
    when: Vec<Vec<Condition>>,
}

impl<'a> Rule<'a> {
    fn parse(rule: &'a SeccompRule) -> Result<Self, Error> {
        let action = action("syscalls.action", &rule.action, rule.errno_ret)?;
        let conditions = rule.args.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
        let repeated = conditions.iter().enumerate().any(|(n, one)| conditions[..n].iter().any(|other| other.index == one.index));
        let when = match conditions.is_empty() {
            true => Vec::new(),
            false if repeated => conditions.into_iter().map(|one| vec![one]).collect(),
            false => vec![conditions],
        };
        Ok(Self { names: &rule.names, action, when })
    }
}

fn condition(arg: &SeccompArg) -> Result<Condition, Error> {
    let (compare, value) = match arg.op.as_str() {
        "SCMP_CMP_NE" => (Compare::NotEqual, arg.value),
        "SCMP_CMP_LT" => (Compare::Less, arg.value),
        "SCMP_CMP_LE" => (Compare::LessOrEqual, arg.value),
        "SCMP_CMP_EQ" => (Compare::Equal, arg.value),
        "SCMP_CMP_GE" => (Compare::GreaterOrEqual, arg.value),
        "SCMP_CMP_GT" => (Compare::Greater, arg.value),
        "SCMP_CMP_MASKED_EQ" => (Compare::Masked(arg.value), arg.value_two),
        other => return Err(refuse("syscalls.args.op", format!("unknown operator {other:?}"))),
    };
    if arg.index > 5 {
        return Err(refuse("syscalls.args.index", format!("a call has no argument {}", arg.index)));
    }
    Ok(Condition { index: arg.index, compare, value })
}

/// Judges the calls of one architecture; starts with the architecture loaded, which it does not need any more.
fn section(abi: Abi, rules: &[Rule<'_>], default: u32, with_x32: bool) -> Result<Vec<Instruction>, Error> {
    let mut program = vec![(LD_ABS, 0, 0, OFFSET_NUMBER)];
    if abi == Abi::X86_64 {
        let x32 = match with_x32 {
            true => judge(Abi::X32, rules, default)?,
            false => vec![(RET, 0, 0, if is_denied(default) { default } else { ERRNO | ENOSYS })],
        };
        program.extend([(JMP_GE, 0, 1, X32_BIT), (assemble::JMP_ALWAYS, 0, 0, 0)]);
        let native = judge(abi, rules, default)?;
        let distance = native.len() as u32;
        program[2].3 = distance;
        program.extend(native);
        program.extend(x32);
    } else {
        program.extend(judge(abi, rules, default)?);
    }
    Ok(program)
}

fn judge(abi: Abi, rules: &[Rule<'_>], default: u32) -> Result<Vec<Instruction>, Error> {
    let plain = Outcome { when: Vec::new(), otherwise: default };
    let calls = outcomes(abi, rules, default)?;
    let mut ranges: Vec<(u32, &Outcome)> = vec![(0, &plain)];
    let mut push = |first: u32, outcome| match ranges.last_mut() {
        Some((start, last)) if *start == first => *last = outcome,
        Some((_, last)) if **last == *outcome => {}
        _ => ranges.push((first, outcome)),
    };
    for (number, outcome) in &calls {
        push(*number, outcome);
        push(number + 1, &plain);
    }
    let newer = Outcome { when: Vec::new(), otherwise: ERRNO | ENOSYS };
    if let (Some((newest, _)), true) = (named(abi, rules).max().zip(Some(())), is_denied(default)) {
        push(newest + 1, &newer);
    }
    // Overwriting a range's start can make it equal to the one before.
    ranges.dedup_by(|later, earlier| *later.1 == *earlier.1);
    Ok(assemble::search(&ranges))
}

fn is_denied(action: u32) -> bool {
    !matches!(action & 0xffff_0000, ALLOW | LOG | TRACE)
}

/// Numbers that the profile names at all, whatever it says about them.
fn named(abi: Abi, rules: &[Rule<'_>]) -> impl Iterator<Item = u32> {
    rules.iter().flat_map(|rule| rule.names).filter_map(move |name| abi.number(name))
}

fn outcomes(abi: Abi, rules: &[Rule<'_>], default: u32) -> Result<BTreeMap<u32, Outcome>, Error> {
    let mut calls: BTreeMap<u32, (Outcome, Option<u32>)> = BTreeMap::new();
    for rule in rules {
        for name in rule.names {
            for (number, extra) in targets(abi, name, rule.when.is_empty()) {
                let (outcome, fixed) = calls.entry(number).or_default();
                let when = match extra {
                    Some(condition) => vec![vec![condition]],
                    None => rule.when.clone(),
                };
                if when.is_empty() && rule.action != default {
                    match fixed {
                        Some(other) if *other != rule.action => {
                            return Err(refuse("syscalls", format!("two rules without conditions disagree on {name}")));
                        }
                        _ => *fixed = Some(rule.action),
                    }
                }
                outcome.when.extend(when.into_iter().map(|conditions| (conditions, rule.action)));
            }
        }
    }
    Ok(calls
        .into_iter()
        .map(|(number, (mut outcome, fixed))| {
            outcome.otherwise = fixed.unwrap_or(default);
            // Conditions in front of the same answer decide nothing.
            while outcome.when.last().is_some_and(|(_, action)| *action == outcome.otherwise) {
                outcome.when.pop();
            }
            (number, outcome)
        })
        .collect())
}

/// Where a rule for `name` applies: the call itself, and on 32-bit x86 also the multiplexer that reaches it.
fn targets(abi: Abi, name: &str, unconditional: bool) -> Vec<(u32, Option<Condition>)> {
    let mut targets: Vec<_> = abi.number(name).map(|number| (number, None)).into_iter().collect();
    if abi == Abi::X86 && unconditional {
        for (multiplexer, first, names) in MULTIPLEXED {
            if let (Some(position), Some(number)) = (names.iter().position(|other| *other == name), abi.number(multiplexer)) {
                let value = first + position as u64;
                targets.push((number, Some(Condition { index: 0, compare: Compare::Equal, value })));
            }
        }
    }
    targets
}

/// Calls that 32-bit x86 also has as a number given to another call: (call, first number, names in order).
const MULTIPLEXED: [(&str, u64, &[&str]); 4] = [
    (
        "socketcall",
        1,
        &[
            "socket",
            "bind",
            "connect",
            "listen",
            "accept",
            "getsockname",
            "getpeername",
            "socketpair",
            "send",
            "recv",
            "sendto",
            "recvfrom",
            "shutdown",
            "setsockopt",
            "getsockopt",
            "sendmsg",
            "recvmsg",
            "accept4",
            "recvmmsg",
            "sendmmsg",
        ],
    ),
    ("ipc", 1, &["semop", "semget", "semctl", "semtimedop"]),
    ("ipc", 11, &["msgsnd", "msgrcv", "msgget", "msgctl"]),
    ("ipc", 21, &["shmat", "shmdt", "shmget", "shmctl"]),
];

#[cfg(test)]
#[path = "compile_tests.rs"]
mod tests;
