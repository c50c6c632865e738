//! Small settings of the calling process: no_new_privs, dumpable, parent-death signal, subreaper, names, umask, OOM score, personality.

use std::ffi::CStr;
use std::io;

use rustix::fs::{Mode, OFlags};
use rustix::process::{DumpableBehavior, Pid};

use crate::syscall::check;

/// No program started from here on gains rights by set-user-ID bits or file capabilities. There is no way back.
pub fn set_no_new_privs() -> io::Result<()> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}

/// Whether other processes of the same user may look into this one (ptrace, /proc/self/*).
pub fn set_dumpable(dumpable: bool) -> io::Result<()> {
    let behaviour = if dumpable { DumpableBehavior::Dumpable } else { DumpableBehavior::NotDumpable };
    Ok(rustix::process::set_dumpable_behavior(behaviour)?)
}

/// Whether other processes of the same user may look into this one.
pub fn is_dumpable() -> io::Result<bool> {
    Ok(rustix::process::dumpable_behavior()? == DumpableBehavior::Dumpable)
}

/// The signal that this process gets when the thread that made it ends; 0 for none.
pub fn set_parent_death_signal(signal: i32) -> io::Result<()> {
    let zero: libc::c_ulong = 0;
    // SAFETY: the argument is a number.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_ulong, zero, zero, zero) }.into())?;
    Ok(())
}

/// Whether orphans below this process become its children.
pub fn set_child_subreaper(on: bool) -> io::Result<()> {
    let zero: libc::c_ulong = 0;
    // SAFETY: the argument is a number.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, libc::c_ulong::from(on), zero, zero, zero) }.into())?;
    Ok(())
}

/// Names the calling thread (`comm`; at most 15 bytes are kept).
pub fn set_name(name: &CStr) -> io::Result<()> {
    Ok(rustix::thread::set_name(name)?)
}

/// Sets the file mode creation mask; returns the one before.
pub fn set_umask(mask: u32) -> u32 {
    rustix::process::umask(Mode::from_raw_mode(mask)).as_raw_mode()
}

/// Sets the host name of the calling process's UTS namespace.
pub fn set_hostname(name: &str) -> io::Result<()> {
    Ok(rustix::system::sethostname(name.as_bytes())?)
}

/// Sets the NIS domain name of the calling process's UTS namespace.
pub fn set_domainname(name: &str) -> io::Result<()> {
    Ok(rustix::system::setdomainname(name.as_bytes())?)
}

/// Sets the execution domain (`PER_*` with its flags); returns the one before.
pub fn set_personality(persona: u64) -> io::Result<u64> {
    // SAFETY: the argument is a number.
    check(unsafe { libc::personality(persona as libc::c_ulong) }.into()).map(|old| old as u64)
}

/// What became of a wish for an OOM score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OomScore {
    /// It is set.
    Set,
    /// It may not be lowered that far here (no CAP_SYS_RESOURCE); this value was kept.
    Kept(i32),
}

/// Sets `oom_score_adj` of the calling process or of another. Where lowering is not allowed, the present value is kept, because
/// failing would forbid every container on such a machine.
pub fn set_oom_score_adj(pid: Option<Pid>, adj: i32) -> io::Result<OomScore> {
    let path = match pid {
        Some(pid) => format!("/proc/{}/oom_score_adj", pid.as_raw_nonzero()),
        None => "/proc/self/oom_score_adj".to_owned(),
    };
    let fd = rustix::fs::open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    match rustix::io::write(&fd, adj.to_string().as_bytes()) {
        Ok(_) => Ok(OomScore::Set),
        Err(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => {
            let mut buffer = [0u8; 16];
            let read = rustix::io::pread(&fd, &mut buffer, 0)?;
            let text = std::str::from_utf8(&buffer[..read]).unwrap_or_default();
            Ok(OomScore::Kept(text.trim().parse().unwrap_or(0)))
        }
        Err(errno) => Err(errno.into()),
    }
}
