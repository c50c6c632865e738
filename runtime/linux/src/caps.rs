//! Capabilities: sets of them by name, and the five sets of the calling thread.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::syscall::check;

/// All capabilities by number, without the prefix `CAP_`.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// A set of capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct CapSet(pub u64);

impl CapSet {
    /// No capability.
    pub const EMPTY: Self = Self(0);
    /// All that this program knows.
    pub const ALL: Self = Self((1 << NAMES.len()) - 1);

    /// The number of a capability: `CAP_NET_ADMIN` or `NET_ADMIN`, in any case.
    #[must_use]
    pub fn number(name: &str) -> Option<u32> {
        let bare = match name.get(..4) {
            Some(prefix) if prefix.eq_ignore_ascii_case("CAP_") => &name[4..],
            _ => name,
        };
        NAMES.iter().position(|known| known.eq_ignore_ascii_case(bare)).map(|number| number as u32)
    }

    /// The set of one capability, by name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::number(name).map(|number| Self(1 << number))
    }

    /// The name of a capability (`CAP_NET_ADMIN`), by number.
    #[must_use]
    pub fn name(number: u32) -> Option<String> {
        NAMES.get(number as usize).map(|name| format!("CAP_{name}"))
    }

    /// The names of all members.
    #[must_use]
    pub fn names(self) -> Vec<String> {
        (0..64).filter(|number| self.contains(*number)).filter_map(Self::name).collect()
    }

    /// Whether the capability with this number is a member.
    #[must_use]
    pub fn contains(self, number: u32) -> bool {
        number < 64 && self.0 & (1 << number) != 0
    }

    /// The members of either.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The members of both.
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The members that the other lacks.
    #[must_use]
    pub fn difference(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether there is no member.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

fn prctl(option: libc::c_int, arg2: libc::c_ulong, arg3: libc::c_ulong) -> io::Result<i32> {
    let zero: libc::c_ulong = 0;
    // SAFETY: only used with options whose arguments are numbers.
    check(unsafe { libc::prctl(option, arg2, arg3, zero, zero) }.into()).map(|result| result as i32)
}

/// The bounding set: what a program started from here can get at most.
#[must_use]
pub fn bounding() -> CapSet {
    let mut set = 0;
    for number in 0..64u32 {
        match prctl(libc::PR_CAPBSET_READ, number.into(), 0) {
            Ok(0) => {}
            Ok(_) => set |= 1 << number,
            // One past the last that the kernel knows.
            Err(_) => break,
        }
    }
    CapSet(set)
}

/// Drops from the bounding set all that is not in `keep`. Needs CAP_SETPCAP; there is no way back.
pub fn set_bounding_drop(keep: CapSet) -> io::Result<()> {
    for number in (0..64u32).filter(|number| !keep.contains(*number)) {
        let Err(error) = prctl(libc::PR_CAPBSET_DROP, number.into(), 0) else { continue };
        match prctl(libc::PR_CAPBSET_READ, number.into(), 0) {
            Ok(0) => {}
            Ok(_) => return Err(error),
            // One past the last that the kernel knows.
            Err(_) => break,
        }
    }
    Ok(())
}

/// Makes the ambient set exactly this. Each member must be permitted and inheritable. A kernel without ambient capabilities
/// (or a filter against them) is an error only when there is something to set.
pub fn set_ambient(set: CapSet) -> io::Result<()> {
    let cleared = prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong, 0);
    if set.is_empty() {
        return Ok(());
    }
    cleared?;
    for number in (0..64u32).filter(|number| set.contains(*number)) {
        prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong, number.into())?;
    }
    Ok(())
}

/// Sets the three classic sets of the calling thread.
pub fn capset(effective: CapSet, permitted: CapSet, inheritable: CapSet) -> io::Result<()> {
    let sets = CapabilitySets {
        effective: CapabilitySet::from_bits_retain(effective.0),
        permitted: CapabilitySet::from_bits_retain(permitted.0),
        inheritable: CapabilitySet::from_bits_retain(inheritable.0),
    };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

/// The (effective, permitted, inheritable) sets of the calling thread.
pub fn capget() -> io::Result<(CapSet, CapSet, CapSet)> {
    let sets = rustix::thread::capabilities(None)?;
    Ok((CapSet(sets.effective.bits()), CapSet(sets.permitted.bits()), CapSet(sets.inheritable.bits())))
}

/// Whether the permitted set survives the change from uid 0 to another (until the next exec).
pub fn set_keepcaps(keep: bool) -> io::Result<()> {
    Ok(rustix::thread::set_keep_capabilities(keep)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_agree() {
        assert_eq!(CapSet::number("CAP_SYS_ADMIN"), Some(21));
        assert_eq!(CapSet::number("net_admin"), Some(12));
        assert_eq!(CapSet::number("CAP_"), None);
        assert_eq!(CapSet::number("CAP_EVERYTHING"), None);
        assert_eq!(CapSet::name(40).as_deref(), Some("CAP_CHECKPOINT_RESTORE"));
        assert_eq!(CapSet::name(41), None);
        assert_eq!(CapSet::ALL.names().len(), 41);
    }
}
