//! Resource limits by name, clamped to what the caller may set.

use std::io;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

/// A limit. `u64::MAX` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// What counts.
    pub soft: u64,
    /// How far the process itself may raise it.
    pub hard: u64,
}

impl Limit {
    fn raw(self) -> Rlimit {
        let raw = |value| (value != u64::MAX).then_some(value);
        Rlimit { current: raw(self.soft), maximum: raw(self.hard) }
    }

    fn of(raw: Rlimit) -> Self {
        Self { soft: raw.current.unwrap_or(u64::MAX), hard: raw.maximum.unwrap_or(u64::MAX) }
    }
}

/// The resource of a name like `RLIMIT_NOFILE`.
#[must_use]
pub fn resource(name: &str) -> Option<Resource> {
    Some(match name {
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_STACK" => Resource::Stack,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        _ => return None,
    })
}

/// The calling process's limit.
#[must_use]
pub fn get(resource: Resource) -> Limit {
    Limit::of(getrlimit(resource))
}

/// Sets a limit of the calling process (or of `pid`). Where it may not be raised that far, it is set as far as it may; returns what is in
/// force.
pub fn set_clamped(pid: Option<Pid>, resource: Resource, wanted: Limit) -> io::Result<Limit> {
    match prlimit(pid, resource, wanted.raw()) {
        Ok(_) => Ok(wanted),
        Err(rustix::io::Errno::PERM) => {
            let hard = match pid {
                None => get(resource).hard,
                Some(pid) => limit_of(pid, resource)?.hard,
            };
            let clamped = Limit { soft: wanted.soft.min(hard), hard: wanted.hard.min(hard) };
            prlimit(pid, resource, clamped.raw())?;
            Ok(clamped)
        }
        Err(errno) => Err(errno.into()),
    }
}

fn limit_of(pid: Pid, resource: Resource) -> io::Result<Limit> {
    let mut old = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a null new limit only reads; the old one is stored in our structure, which outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            pid.as_raw_nonzero().get(),
            resource as libc::c_int,
            std::ptr::null::<libc::rlimit64>(),
            std::ptr::from_mut(&mut old),
        )
    };
    crate::syscall::check(result)?;
    Ok(Limit { soft: old.rlim_cur, hard: old.rlim_max })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_may_not_be_raised_is_clamped() {
        let before = get(Resource::Nofile);
        let pid = rustix::process::getpid();
        assert_eq!(limit_of(pid, Resource::Nofile).unwrap(), before);
        let wanted = Limit { soft: before.soft, hard: before.hard };
        assert_eq!(set_clamped(None, Resource::Nofile, wanted).unwrap(), before);
        assert_eq!(resource("RLIMIT_NOFILE"), Some(Resource::Nofile));
        assert_eq!(resource("NOFILE"), None);
    }
}
