//! The device program of v2: rules become eBPF that answers like them. A pure function.

use berth_linux::bpf::BpfInsn;

use super::{ALL_ACCESS, Kind, Rule};

// Classes, sizes and operations of eBPF (linux/bpf_common.h, linux/bpf.h).
const LDX_MEM_W: u8 = 0x61;
const ALU64_MOV_K: u8 = 0xb7;
const ALU64_MOV_X: u8 = 0xbf;
const ALU32_AND_K: u8 = 0x54;
const ALU64_RSH_K: u8 = 0x77;
const JMP_JNE_K: u8 = 0x55;
const JMP_JEQ_K: u8 = 0x15;
const EXIT: u8 = 0x95;

const DEV_BLOCK: i32 = 1;
const DEV_CHAR: i32 = 2;

// Registers. r1 holds the context at entry.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// Makes the program. For each kind of access that is asked for, the last rule that is about it and the device decides; without any it is
/// forbidden. `ACCESS` holds what no rule has decided yet: going from the last rule to the first, an allowing rule takes its part away, and a
/// forbidding rule that finds a part left forbids all.
pub(crate) fn assemble(rules: &[Rule]) -> Vec<BpfInsn> {
    let mut code = vec![
        // struct bpf_cgroup_dev_ctx { u32 access_type (access << 16 | kind); u32 major; u32 minor }
        BpfInsn::new(LDX_MEM_W, KIND, CONTEXT, 0, 0),
        BpfInsn::new(ALU64_MOV_X, ACCESS, KIND, 0, 0),
        BpfInsn::new(ALU32_AND_K, KIND, 0, 0, 0xffff),
        BpfInsn::new(ALU64_RSH_K, ACCESS, 0, 0, 16),
        BpfInsn::new(LDX_MEM_W, MAJOR, CONTEXT, 4, 0),
        BpfInsn::new(LDX_MEM_W, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        if push_rule(&mut code, rule) {
            // This rule decides all that reaches it. What came after could not be reached, which the verifier refuses.
            return code;
        }
    }
    push_return(&mut code, 0);
    code
}

fn push_return(code: &mut Vec<BpfInsn>, allowed: i32) {
    code.push(BpfInsn::new(ALU64_MOV_K, RESULT, 0, 0, allowed));
    code.push(BpfInsn::new(EXIT, 0, 0, 0, 0));
}

/// Appends the check of one rule. True when nothing passes it.
fn push_rule(code: &mut Vec<BpfInsn>, rule: &Rule) -> bool {
    let mut conditions = Vec::with_capacity(3);
    match rule.kind {
        Kind::All => {}
        Kind::Block => conditions.push((KIND, DEV_BLOCK)),
        Kind::Char => conditions.push((KIND, DEV_CHAR)),
    }
    conditions.extend(rule.major.map(|major| (MAJOR, major as i32)));
    conditions.extend(rule.minor.map(|minor| (MINOR, minor as i32)));

    let mut body = Vec::with_capacity(5);
    if rule.access == ALL_ACCESS {
        push_return(&mut body, i32::from(rule.allow));
    } else if rule.allow {
        let rest = (ALL_ACCESS & !rule.access) as i32;
        body.push(BpfInsn::new(ALU32_AND_K, ACCESS, 0, 0, rest));
        body.push(BpfInsn::new(JMP_JNE_K, ACCESS, 0, 2, 0));
        push_return(&mut body, 1);
    } else {
        body.push(BpfInsn::new(ALU64_MOV_X, RESULT, ACCESS, 0, 0));
        body.push(BpfInsn::new(ALU32_AND_K, RESULT, 0, 0, rule.access as i32));
        body.push(BpfInsn::new(JMP_JEQ_K, RESULT, 0, 2, 0));
        push_return(&mut body, 0);
    }
    let terminal = conditions.is_empty() && rule.access == ALL_ACCESS;
    let count = conditions.len();
    for (index, (register, value)) in conditions.into_iter().enumerate() {
        // Over the conditions that follow and the body: at most 2 + 5.
        let skip = (count - index - 1 + body.len()) as i16;
        code.push(BpfInsn::new(JMP_JNE_K, register, 0, skip, value));
    }
    code.append(&mut body);
    terminal
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::{MKNOD, READ, WRITE};

    /// Runs a program on a context, for the instructions that the assembler makes and no others.
    fn interpret(code: &[BpfInsn], kind: u32, access: u32, major: u32, minor: u32) -> u64 {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0u64; 11];
        let mut pc = 0usize;
        for _ in 0..code.len() {
            let insn = &code[pc];
            let (dst, src) = (insn.dst() as usize, insn.src() as usize);
            pc += 1;
            match insn.code {
                LDX_MEM_W => registers[dst] = context[insn.offset as usize / 4].into(),
                ALU64_MOV_K => registers[dst] = insn.imm as i64 as u64,
                ALU64_MOV_X => registers[dst] = registers[src],
                ALU32_AND_K => registers[dst] = u64::from(registers[dst] as u32 & insn.imm as u32),
                ALU64_RSH_K => registers[dst] >>= insn.imm,
                JMP_JNE_K if registers[dst] != insn.imm as i64 as u64 => pc += insn.offset as usize,
                JMP_JEQ_K if registers[dst] == insn.imm as i64 as u64 => pc += insn.offset as usize,
                JMP_JNE_K | JMP_JEQ_K => {}
                EXIT => return registers[0],
                other => panic!("instruction {other:#x}"),
            }
        }
        panic!("the program does not end");
    }

    /// What the rules mean, said plainly: each part of the access by its last rule.
    fn meaning(rules: &[Rule], kind: Kind, access: u32, major: u32, minor: u32) -> bool {
        [MKNOD, READ, WRITE].iter().filter(|bit| access & **bit != 0).all(|bit| {
            let about = |rule: &&Rule| {
                (rule.kind == Kind::All || rule.kind == kind)
                    && rule.major.is_none_or(|value| value == major)
                    && rule.minor.is_none_or(|value| value == minor)
                    && rule.access & bit != 0
            };
            rules.iter().rev().find(about).is_some_and(|rule| rule.allow)
        })
    }

    fn rule(allow: bool, kind: Kind, major: Option<u32>, minor: Option<u32>, access: u32) -> Rule {
        Rule { allow, kind, major, minor, access }
    }

    #[test]
    fn the_program_answers_as_the_rules_say() {
        let deny_all = rule(false, Kind::All, None, None, ALL_ACCESS);
        let null = rule(true, Kind::Char, Some(1), Some(3), ALL_ACCESS);
        let mknod = rule(true, Kind::Char, None, None, MKNOD);
        let sets: Vec<Vec<Rule>> = vec![
            vec![],
            vec![rule(true, Kind::All, None, None, ALL_ACCESS)],
            vec![deny_all],
            vec![deny_all, null, mknod, rule(true, Kind::Block, Some(8), None, READ)],
            vec![null, deny_all],
            vec![rule(true, Kind::All, None, None, ALL_ACCESS), rule(false, Kind::Char, Some(1), Some(3), WRITE)],
            vec![rule(true, Kind::Char, Some(1), Some(3), READ), rule(true, Kind::Char, Some(1), None, WRITE)],
            vec![rule(true, Kind::Char, Some(1), Some(3), READ | WRITE), rule(false, Kind::Char, None, Some(3), READ)],
            vec![deny_all, rule(true, Kind::All, None, None, MKNOD)],
        ];
        for rules in &sets {
            let code = assemble(rules);
            for (kind, number) in [(Kind::Block, DEV_BLOCK), (Kind::Char, DEV_CHAR)] {
                for access in 1..=ALL_ACCESS {
                    for major in [0, 1, 8, 4095] {
                        for minor in [0, 3, 1_048_575] {
                            let answer = interpret(&code, number as u32, access, major, minor);
                            let meant = meaning(rules, kind, access, major, minor);
                            assert_eq!(answer == 1, meant, "{rules:?} {kind:?} {access} {major}:{minor}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_follows_a_rule_that_decides_everything() {
        let deny_all = rule(false, Kind::All, None, None, ALL_ACCESS);
        let null = rule(true, Kind::Char, Some(1), Some(3), ALL_ACCESS);
        assert_eq!(assemble(&[null, deny_all]), assemble(&[deny_all]));
        assert_eq!(assemble(&[deny_all]).last().map(|insn| insn.code), Some(EXIT));
    }
}
