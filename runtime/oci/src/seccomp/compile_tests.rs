use super::*;
use crate::seccomp::default_profile;
use crate::spec::{SeccompArg, SeccompRule};

/// `struct seccomp_data` as a filter sees it.
struct Call {
    abi: Abi,
    number: u32,
    args: [u64; 6],
}

/// Runs a program as the kernel does, and checks what the kernel's verifier would: every jump inside, no fall off the end.
fn run(filter: &Filter, call: &Call) -> u32 {
    let mut words = vec![call.number, call.abi.audit_arch(), 0, 0];
    for arg in call.args {
        words.extend([arg as u32, (arg >> 32) as u32]);
    }
    let (mut at, mut accumulator) = (0usize, 0u32);
    for _ in 0..MAX_INSTRUCTIONS {
        let (code, jt, jf, k) = filter.instructions[at];
        at += 1;
        let branch = |holds: bool| usize::from(if holds { jt } else { jf });
        match code {
            assemble::LD_ABS => accumulator = words[k as usize / 4],
            assemble::AND => accumulator &= k,
            assemble::JMP_ALWAYS => at += k as usize,
            assemble::JMP_EQ => at += branch(accumulator == k),
            assemble::JMP_GT => at += branch(accumulator > k),
            assemble::JMP_GE => at += branch(accumulator >= k),
            assemble::RET => return k,
            other => panic!("unknown instruction {other:#x}"),
        }
    }
    panic!("the program does not end");
}

fn judge_call(filter: &Filter, abi: Abi, name: &str, args: [u64; 6]) -> u32 {
    let number = abi.number(name).unwrap_or_else(|| panic!("{name}"));
    run(filter, &Call { abi, number, args })
}

fn rule(names: &[&str], action: &str, args: &[(u32, u64, u64, &str)]) -> SeccompRule {
    SeccompRule {
        names: names.iter().map(|name| (*name).to_owned()).collect(),
        action: action.into(),
        errno_ret: None,
        args: args
            .iter()
            .map(|(index, value, value_two, op)| SeccompArg {
                index: *index,
                value: *value,
                value_two: *value_two,
                op: (*op).into(),
            })
            .collect(),
    }
}

fn profile(default: &str, syscalls: Vec<SeccompRule>) -> Seccomp {
    Seccomp {
        default_action: default.into(),
        architectures: ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"].map(str::to_owned).to_vec(),
        syscalls,
        ..Seccomp::default()
    }
}

#[test]
fn every_call_of_a_long_list_gets_its_own_answer_on_every_architecture() {
    // A different error number for every call: no two neighbours can hide behind one range.
    let names: Vec<&str> =
        ["read", "write", "open", "execve", "futex", "clone3", "openat2", "socket", "mount", "getpid", "openat", "ppoll"]
            .to_vec();
    let mut wanted = profile("SCMP_ACT_ALLOW", Vec::new());
    for (errno, name) in names.iter().enumerate() {
        let mut one = rule(&[name], "SCMP_ACT_ERRNO", &[]);
        one.errno_ret = Some(errno as u32 + 10);
        wanted.syscalls.push(one);
    }
    for native in [Abi::X86_64, Abi::Aarch64] {
        wanted.architectures.extend(["SCMP_ARCH_AARCH64".to_owned(), "SCMP_ARCH_ARM".to_owned()]);
        let filter = compile_for(&wanted, native).unwrap();
        for abi in native.family() {
            for number in 0..600 {
                let number = if *abi == Abi::X32 { number | X32_BIT } else { number };
                let expected = names.iter().position(|name| abi.number(name) == Some(number));
                let expected = expected.map_or(ALLOW, |errno| ERRNO | (errno as u32 + 10));
                assert_eq!(run(&filter, &Call { abi: *abi, number, args: [0; 6] }), expected, "{abi:?} {number}");
            }
        }
    }
}

#[test]
fn every_operator_compares_all_64_bits() {
    let big = 0x1_0000_0005u64;
    type Holds = fn(u64, u64) -> bool;
    let cases: [(&str, u64, Holds); 6] = [
        ("SCMP_CMP_NE", big, |a, b| a != b),
        ("SCMP_CMP_LT", big, |a, b| a < b),
        ("SCMP_CMP_LE", big, |a, b| a <= b),
        ("SCMP_CMP_EQ", big, |a, b| a == b),
        ("SCMP_CMP_GE", big, |a, b| a >= b),
        ("SCMP_CMP_GT", big, |a, b| a > b),
    ];
    for (op, value, holds) in cases {
        let filter = compile_for(
            &profile("SCMP_ACT_ALLOW", vec![rule(&["read"], "SCMP_ACT_KILL_PROCESS", &[(3, value, 0, op)])]),
            Abi::X86_64,
        )
        .unwrap();
        for actual in [0, 4, 5, 6, big - 1, big, big + 1, 0x2_0000_0005, u64::MAX] {
            let expected = if holds(actual, value) { KILL_PROCESS } else { ALLOW };
            assert_eq!(
                judge_call(&filter, Abi::X86_64, "read", [0, 0, 0, actual, 0, 0]),
                expected,
                "{actual:#x} {op} {value:#x}"
            );
        }
    }
    let masked = rule(&["read"], "SCMP_ACT_TRAP", &[(1, 0xff00_0000_00f0, 0x1200_0000_0030, "SCMP_CMP_MASKED_EQ")]);
    let filter = compile_for(&profile("SCMP_ACT_ALLOW", vec![masked]), Abi::X86_64).unwrap();
    assert_eq!(judge_call(&filter, Abi::X86_64, "read", [0, 0x12ab_3456_7035, 0, 0, 0, 0]), TRAP);
    assert_eq!(judge_call(&filter, Abi::X86_64, "read", [0, 0x13ab_3456_7035, 0, 0, 0, 0]), ALLOW);
    assert_eq!(judge_call(&filter, Abi::X86_64, "read", [0, 0x12ab_3456_7045, 0, 0, 0, 0]), ALLOW);
}

#[test]
fn conditions_of_a_rule_are_anded_and_a_repeated_argument_is_ored() {
    let both = rule(&["read"], "SCMP_ACT_ALLOW", &[(0, 1, 0, "SCMP_CMP_EQ"), (1, 2, 0, "SCMP_CMP_EQ")]);
    let either = rule(&["write"], "SCMP_ACT_ALLOW", &[(0, 1, 0, "SCMP_CMP_EQ"), (0, 2, 0, "SCMP_CMP_EQ")]);
    let filter = compile_for(&profile("SCMP_ACT_ERRNO", vec![both, either]), Abi::X86_64).unwrap();
    let judge = |name, a, b| judge_call(&filter, Abi::X86_64, name, [a, b, 0, 0, 0, 0]);
    assert_eq!([judge("read", 1, 2), judge("read", 1, 3), judge("read", 0, 2)], [ALLOW, ERRNO | EPERM, ERRNO | EPERM]);
    assert_eq!([judge("write", 1, 9), judge("write", 2, 9), judge("write", 3, 9)], [ALLOW, ALLOW, ERRNO | EPERM]);
}

#[test]
fn rules_with_conditions_come_before_the_one_without() {
    let rules = vec![
        rule(&["ioctl"], "SCMP_ACT_ALLOW", &[]),
        rule(&["ioctl"], "SCMP_ACT_KILL_PROCESS", &[(1, 0x5412, 0, "SCMP_CMP_EQ")]),
    ];
    let filter = compile_for(&profile("SCMP_ACT_ERRNO", rules), Abi::X86_64).unwrap();
    assert_eq!(judge_call(&filter, Abi::X86_64, "ioctl", [0, 0x5412, 0, 0, 0, 0]), KILL_PROCESS);
    assert_eq!(judge_call(&filter, Abi::X86_64, "ioctl", [0, 0x5413, 0, 0, 0, 0]), ALLOW);
}

#[test]
fn calls_newer_than_the_profile_do_not_exist_where_they_would_be_denied() {
    let rules = vec![rule(&["read", "openat2"], "SCMP_ACT_ALLOW", &[])];
    let denying = compile_for(&profile("SCMP_ACT_ERRNO", rules.clone()), Abi::X86_64).unwrap();
    assert_eq!(judge_call(&denying, Abi::X86_64, "cachestat", [0; 6]), ERRNO | ENOSYS);
    assert_eq!(judge_call(&denying, Abi::X86_64, "write", [0; 6]), ERRNO | EPERM);
    let allowing = compile_for(&profile("SCMP_ACT_LOG", rules), Abi::X86_64).unwrap();
    assert_eq!(judge_call(&allowing, Abi::X86_64, "cachestat", [0; 6]), LOG);
}

#[test]
fn architectures_that_are_not_listed_are_closed() {
    let mut only_native = profile("SCMP_ACT_ALLOW", Vec::new());
    only_native.architectures = vec!["SCMP_ARCH_S390X".into()];
    let filter = compile_for(&only_native, Abi::X86_64).unwrap();
    assert_eq!(judge_call(&filter, Abi::X86_64, "read", [0; 6]), ALLOW);
    assert_eq!(judge_call(&filter, Abi::X86, "read", [0; 6]), KILL_PROCESS);
    assert_eq!(judge_call(&filter, Abi::X32, "read", [0; 6]), ERRNO | ENOSYS);
    assert_eq!(judge_call(&filter, Abi::Aarch64, "read", [0; 6]), KILL_PROCESS);
}

#[test]
fn a_denied_call_is_denied_through_its_multiplexer_too() {
    let filter =
        compile_for(&profile("SCMP_ACT_ALLOW", vec![rule(&["bind", "shmat"], "SCMP_ACT_ERRNO", &[])]), Abi::X86_64).unwrap();
    let judge = |name, first| judge_call(&filter, Abi::X86, name, [first, 0, 0, 0, 0, 0]);
    assert_eq!([judge("socketcall", 2), judge("socketcall", 3), judge("bind", 0)], [ERRNO | EPERM, ALLOW, ERRNO | EPERM]);
    assert_eq!([judge("ipc", 21), judge("ipc", 22)], [ERRNO | EPERM, ALLOW]);
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    for (change, name) in [
        (rule(&["read"], "SCMP_ACT_NOTIFY", &[]), "SCMP_ACT_NOTIFY"),
        (rule(&["read"], "SCMP_ACT_FROB", &[]), "SCMP_ACT_FROB"),
        (rule(&["read"], "SCMP_ACT_ALLOW", &[(6, 0, 0, "SCMP_CMP_EQ")]), "argument 6"),
        (rule(&["read"], "SCMP_ACT_ALLOW", &[(0, 0, 0, "SCMP_CMP_XX")]), "SCMP_CMP_XX"),
    ] {
        let error = compile_for(&profile("SCMP_ACT_ERRNO", vec![change]), Abi::X86_64).unwrap_err().to_string();
        assert!(error.contains(name) && error.starts_with("linux.seccomp."), "{error}");
    }
    let mut with_flag = profile("SCMP_ACT_ERRNO", Vec::new());
    with_flag.flags = vec!["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV".into()];
    assert!(compile(&with_flag).unwrap_err().to_string().contains("WAIT_KILLABLE_RECV"));
    with_flag.flags = vec!["SECCOMP_FILTER_FLAG_LOG".into()];
    assert_eq!(compile(&with_flag).unwrap().flags, FLAG_LOG);
}

#[test]
fn disagreeing_rules_without_conditions_are_refused_unless_one_says_the_default() {
    let rules = |second: &str| vec![rule(&["read"], "SCMP_ACT_ALLOW", &[]), rule(&["read"], second, &[])];
    assert!(compile(&profile("SCMP_ACT_KILL", rules("SCMP_ACT_ERRNO"))).is_err());
    let filter = compile_for(&profile("SCMP_ACT_ALLOW", rules("SCMP_ACT_ERRNO")), Abi::X86_64).unwrap();
    assert_eq!(judge_call(&filter, Abi::X86_64, "read", [0; 6]), ERRNO | EPERM);
}

#[test]
fn the_default_profile_lets_programs_work_and_closes_the_machine() {
    let plain = compile_for(&default_profile(|_| false), Abi::X86_64).unwrap();
    let admin = compile_for(&default_profile(|name| name == "CAP_SYS_ADMIN"), Abi::X86_64).unwrap();
    for name in ["read", "execve", "openat2", "futex", "epoll_pwait2", "statx", "rseq", "ptrace", "landlock_restrict_self"] {
        assert_eq!(judge_call(&plain, Abi::X86_64, name, [0; 6]), ALLOW, "{name}");
    }
    for name in [
        "mount",
        "unshare",
        "setns",
        "bpf",
        "keyctl",
        "init_module",
        "reboot",
        "io_uring_setup",
        "userfaultfd",
        "kexec_load",
        "swapon",
    ] {
        assert_eq!(judge_call(&plain, Abi::X86_64, name, [0; 6]), ERRNO | EPERM, "{name}");
    }
    for name in ["mount", "unshare", "setns", "bpf", "clone3", "sethostname"] {
        assert_eq!(judge_call(&admin, Abi::X86_64, name, [0; 6]), ALLOW, "{name}");
    }
    let first = |filter: &Filter, name, value| judge_call(filter, Abi::X86_64, name, [value, 0, 0, 0, 0, 0]);
    assert_eq!(first(&plain, "clone", 0x11), ALLOW);
    assert_eq!(first(&plain, "clone", 0x1000_0011), ERRNO | EPERM);
    assert_eq!(first(&admin, "clone", 0x1000_0011), ALLOW);
    assert_eq!(first(&plain, "clone3", 0), ERRNO | ENOSYS);
    assert_eq!(
        [first(&plain, "socket", 2), first(&plain, "socket", 38), first(&plain, "socket", 39), first(&plain, "socket", 40)],
        [ALLOW, ERRNO | EPERM, ALLOW, ERRNO | EPERM]
    );
    assert_eq!([first(&plain, "personality", 8), first(&plain, "personality", 0x40000)], [ALLOW, ERRNO | EPERM]);
    assert_eq!(run(&plain, &Call { abi: Abi::X86_64, number: 1000, args: [0; 6] }), ERRNO | ENOSYS);
    assert!(plain.instructions.len() < 1200, "{}", plain.instructions.len());
    // Every name in it is a call of some architecture.
    let profile = default_profile(|_| true);
    let all = [Abi::X86_64, Abi::X86, Abi::X32, Abi::Aarch64, Abi::Arm];
    for name in profile.syscalls.iter().flat_map(|rule| &rule.names) {
        assert!(all.iter().any(|abi| abi.number(name).is_some()), "{name}");
    }
}
