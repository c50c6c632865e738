//! What differs between processor architectures: audit numbers and system call numbers, for this machine and for the
//! 32-bit personalities that its kernel may run. No other file of berth holds an architecture's number.

mod syscalls;

/// A system call interface of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Abi {
    /// 64-bit x86.
    X86_64,
    /// 32-bit x86.
    X86,
    /// 32-bit pointers on 64-bit x86: told from [`Abi::X86_64`] by a bit of the call's number alone.
    X32,
    /// 64-bit ARM.
    Aarch64,
    /// 32-bit ARM (EABI).
    Arm,
}

/// The bit that marks an x32 call.
pub const X32_BIT: u32 = 0x4000_0000;

/// Private calls of 32-bit ARM that lie outside the common table.
const ARM_PRIVATE: [(&str, u32); 5] =
    [("breakpoint", 0xf0001), ("cacheflush", 0xf0002), ("usr26", 0xf0003), ("usr32", 0xf0004), ("set_tls", 0xf0005)];

impl Abi {
    /// The interface of programs like this one.
    pub const NATIVE: Abi = if cfg!(target_arch = "aarch64") { Abi::Aarch64 } else { Abi::X86_64 };

    /// The interfaces that a kernel for [`Self::NATIVE`] programs may offer, the native one first.
    #[must_use]
    pub fn family(self) -> &'static [Abi] {
        match self {
            Abi::X86_64 => &[Abi::X86_64, Abi::X86, Abi::X32],
            Abi::Aarch64 => &[Abi::Aarch64, Abi::Arm],
            Abi::X86 => &[Abi::X86],
            Abi::X32 => &[Abi::X32],
            Abi::Arm => &[Abi::Arm],
        }
    }

    /// `AUDIT_ARCH_*`: what `seccomp_data.arch` holds.
    #[must_use]
    pub fn audit_arch(self) -> u32 {
        match self {
            Abi::X86_64 | Abi::X32 => 0xc000_003e,
            Abi::X86 => 0x4000_0003,
            Abi::Aarch64 => 0xc000_00b7,
            Abi::Arm => 0x4000_0028,
        }
    }

    /// The number of a call, with [`X32_BIT`] for x32. `None` when the interface has no such call.
    #[must_use]
    pub fn number(self, name: &str) -> Option<u32> {
        let row = match syscalls::TABLE.binary_search_by(|(other, _)| (*other).cmp(name)) {
            Ok(index) => &syscalls::TABLE[index].1,
            Err(_) if self == Abi::Arm => return ARM_PRIVATE.iter().find(|(other, _)| *other == name).map(|(_, nr)| *nr),
            Err(_) => return None,
        };
        let (number, bit) = match self {
            Abi::X86_64 => (row[0], 0),
            Abi::X86 => (row[1], 0),
            Abi::X32 => (row[2], X32_BIT),
            Abi::Aarch64 => (row[3], 0),
            Abi::Arm => (row[4], 0),
        };
        (number != syscalls::NONE).then_some(u32::from(number) | bit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_agrees_with_the_c_library() {
        assert!(syscalls::TABLE.is_sorted_by(|a, b| a.0 < b.0));
        for (name, number) in [
            ("read", libc::SYS_read),
            ("execve", libc::SYS_execve),
            ("clone3", libc::SYS_clone3),
            ("openat2", libc::SYS_openat2),
            ("mount_setattr", libc::SYS_mount_setattr),
            ("ppoll", libc::SYS_ppoll),
        ] {
            assert_eq!(Abi::NATIVE.number(name).map(i64::from), Some(number), "{name}");
        }
    }

    #[test]
    fn each_interface_has_its_own_numbers() {
        assert_eq!(Abi::X86.number("socketcall"), Some(102));
        assert_eq!(Abi::X86_64.number("socketcall"), None);
        assert_eq!(Abi::X32.number("execve"), Some(X32_BIT | 520));
        assert_eq!(Abi::Aarch64.number("open"), None);
        assert_eq!(Abi::Aarch64.number("openat"), Some(56));
        assert_eq!(Abi::Arm.number("set_tls"), Some(0xf0005));
        assert_eq!(Abi::X86_64.number("no_such_call"), None);
    }
}
