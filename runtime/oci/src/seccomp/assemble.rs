//! The few BPF instructions that a filter needs, and a binary search over call numbers made of them.

/// One instruction: (code, jump if true, jump if false, constant).
pub(super) type Instruction = (u16, u8, u8, u32);

pub(super) const LD_ABS: u16 = 0x20;
pub(super) const JMP_ALWAYS: u16 = 0x05;
pub(super) const JMP_EQ: u16 = 0x15;
pub(super) const JMP_GT: u16 = 0x25;
pub(super) const JMP_GE: u16 = 0x35;
pub(super) const AND: u16 = 0x54;
pub(super) const RET: u16 = 0x06;

/// Offset of the call's number in `struct seccomp_data`.
pub(super) const OFFSET_NUMBER: u32 = 0;
/// Offset of the architecture.
pub(super) const OFFSET_ARCH: u32 = 4;

/// Offset of the low half of an argument. Both machines are little-endian.
fn low(index: u32) -> u32 {
    16 + 8 * index
}

/// A comparison of one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compare {
    NotEqual,
    Less,
    LessOrEqual,
    Equal,
    GreaterOrEqual,
    Greater,
    /// The argument under this mask equals the value.
    Masked(u64),
}

/// A condition on one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) index: u32,
    pub(super) compare: Compare,
    pub(super) value: u64,
}

/// What becomes of a call: the first conditions that hold decide, else the fallback.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Outcome {
    pub(super) when: Vec<(Vec<Condition>, u32)>,
    pub(super) otherwise: u32,
}

/// Instructions of an outcome. The loaded word is lost.
pub(super) fn outcome(out: &mut Vec<Instruction>, outcome: &Outcome) {
    for (conditions, action) in &outcome.when {
        let mut failing = Vec::new();
        for condition in conditions {
            self::condition(out, condition, &mut failing);
        }
        out.push((RET, 0, 0, *action));
        let end = out.len();
        for (at, if_true) in failing {
            // At most 6 conditions of 5 instructions: never further than a byte reaches.
            let distance = u8::try_from(end - at - 1).unwrap_or(u8::MAX);
            let instruction = &mut out[at];
            if if_true { instruction.1 = distance } else { instruction.2 = distance }
        }
    }
    out.push((RET, 0, 0, outcome.otherwise));
}

/// Falls through when the condition holds; `failing` collects (instruction, side) that must jump to the rule's end.
fn condition(out: &mut Vec<Instruction>, condition: &Condition, failing: &mut Vec<(usize, bool)>) {
    const FAIL: u8 = 0;
    let (high_value, low_value) = ((condition.value >> 32) as u32, condition.value as u32);
    let (high, low) = (low(condition.index) + 4, low(condition.index));
    let start = out.len();
    match condition.compare {
        Compare::Equal => {
            out.extend([(LD_ABS, 0, 0, high), (JMP_EQ, 0, FAIL, high_value), (LD_ABS, 0, 0, low), (JMP_EQ, 0, FAIL, low_value)]);
            failing.extend([(start + 1, false), (start + 3, false)]);
        }
        Compare::NotEqual => {
            out.extend([(LD_ABS, 0, 0, high), (JMP_EQ, 0, 2, high_value), (LD_ABS, 0, 0, low), (JMP_EQ, FAIL, 0, low_value)]);
            failing.push((start + 3, true));
        }
        Compare::Greater | Compare::GreaterOrEqual => {
            let last = if condition.compare == Compare::Greater { JMP_GT } else { JMP_GE };
            out.extend([
                (LD_ABS, 0, 0, high),
                (JMP_GT, 3, 0, high_value),
                (JMP_EQ, 0, FAIL, high_value),
                (LD_ABS, 0, 0, low),
                (last, 0, FAIL, low_value),
            ]);
            failing.extend([(start + 2, false), (start + 4, false)]);
        }
        Compare::Less | Compare::LessOrEqual => {
            let last = if condition.compare == Compare::Less { JMP_GE } else { JMP_GT };
            out.extend([
                (LD_ABS, 0, 0, high),
                (JMP_GT, FAIL, 0, high_value),
                (JMP_EQ, 0, 2, high_value),
                (LD_ABS, 0, 0, low),
                (last, FAIL, 0, low_value),
            ]);
            failing.extend([(start + 1, true), (start + 4, true)]);
        }
        Compare::Masked(mask) => {
            out.extend([
                (LD_ABS, 0, 0, high),
                (AND, 0, 0, (mask >> 32) as u32),
                (JMP_EQ, 0, FAIL, high_value & (mask >> 32) as u32),
                (LD_ABS, 0, 0, low),
                (AND, 0, 0, mask as u32),
                (JMP_EQ, 0, FAIL, low_value & mask as u32),
            ]);
            failing.extend([(start + 2, false), (start + 5, false)]);
        }
    }
}

/// A binary search over `ranges` (first number, outcome; the first starts at 0, rising) for the number that is loaded.
pub(super) fn search(ranges: &[(u32, &Outcome)]) -> Vec<Instruction> {
    let mut out = Vec::new();
    let [.., _] = ranges else { return out };
    if let [(_, only)] = ranges {
        outcome(&mut out, only);
        return out;
    }
    let (left, right) = ranges.split_at(ranges.len() / 2);
    let (pivot, left, right) = (right[0].0, search(left), search(right));
    match u8::try_from(left.len()) {
        Ok(distance) => out.push((JMP_GE, distance, 0, pivot)),
        // Too far for a conditional jump: an unconditional one has 32 bits.
        Err(_) => out.extend([(JMP_GE, 0, 1, pivot), (JMP_ALWAYS, 0, 0, left.len() as u32)]),
    }
    out.extend(left);
    out.extend(right);
    out
}
