//! Who the process is: label, folder, user, groups, capabilities, limits.

use std::os::fd::BorrowedFd;
use std::path::Path;

use berth_linux::caps::{self, CapSet};
use berth_linux::{creds, prctl, rlimit};
use rustix::fs::{Gid, Uid};
use rustix::io::Errno;

use super::{Done, During, Failure, HostProc};
use crate::plan::ProcessPlan;

/// Asks for the AppArmor profile or the SELinux label at the next exec.
pub(super) fn set_label(process: &ProcessPlan, host_proc: &HostProc) -> Done {
    if let Some(label) = &process.selinux {
        let what = |failure: Failure| Failure(format!("apply SELinux label {label}: {}", failure.0));
        // The session keyring, made next, is the container's too.
        host_proc.write("self/attr/keycreate", label.as_bytes()).map_err(what)?;
        host_proc.write("self/attr/exec", label.as_bytes()).map_err(what)?;
    }
    let Some(profile) = &process.apparmor else { return Ok(()) };
    let value = format!("exec {profile}");
    // Kernels since 5.8 have a file of AppArmor's own, which works next to other security modules.
    host_proc
        .write("self/attr/apparmor/exec", value.as_bytes())
        .or_else(|_| host_proc.write("self/attr/exec", value.as_bytes()))
        .map_err(|failure| Failure(format!("apply AppArmor profile {profile}: {}", failure.0)))
}

/// Enters the working directory. False: it may only be entered by the user itself (try again as that user).
pub(super) fn enter_cwd(cwd: &Path, last_try: bool) -> Done<bool> {
    match rustix::process::chdir(cwd) {
        Err(Errno::ACCESS | Errno::PERM) if !last_try => return Ok(false),
        result => result.during(format_args!("chdir to cwd (\"{}\") set in config.json failed", cwd.display()))?,
    }
    // A folder of the machine that is reached through a leaked descriptor is outside of our root: the kernel then says so
    // instead of giving a path.
    match rustix::process::getcwd(Vec::new()) {
        Ok(path) if path.as_bytes().starts_with(b"/") => Ok(true),
        Ok(_) | Err(Errno::NOENT) => {
            Err(Failure(format!("the working directory {} is not inside the container's root", cwd.display())))
        }
        Err(errno) => Err(errno).during("read the working directory"),
    }
}

/// Makes a standard stream its user's own, so that it can be opened again through /dev/stdout. Devices and what cannot be
/// changed are left.
pub(super) fn give_stream(fd: BorrowedFd<'_>, uid: u32) -> Done {
    let stat = rustix::fs::fstat(fd).during("stat standard stream")?;
    let null = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::CharacterDevice
        && stat.st_rdev == rustix::fs::makedev(1, 3);
    if stat.st_uid == uid || null {
        return Ok(());
    }
    match rustix::fs::fchown(fd, Some(Uid::from_raw(uid)), None::<Gid>) {
        Ok(()) | Err(Errno::INVAL | Errno::PERM | Errno::ROFS | Errno::OPNOTSUPP) => Ok(()),
        Err(errno) => Err(errno).during("give standard stream to the user"),
    }
}

/// Limits, bounding set, groups, user. All capabilities that are permitted stay in force until [`give_up`].
pub(super) fn take_on(process: &ProcessPlan, warnings: &mut Vec<String>) -> Done {
    if let Some(personality) = process.personality {
        prctl::set_personality(personality).during("set personality")?;
    }
    for (name, resource, limit) in &process.rlimits {
        let set = rlimit::set_clamped(None, *resource, *limit).during(format_args!("set {name}"))?;
        if set != *limit {
            let number = |value: u64| if value == u64::MAX { "unlimited".to_owned() } else { value.to_string() };
            warnings.push(format!(
                "{name} {}:{} is above what may be set here, {}:{} is in force",
                number(limit.soft),
                number(limit.hard),
                number(set.soft),
                number(set.hard)
            ));
        }
    }
    caps::set_bounding_drop(process.caps.bounding).during("set the bounding capabilities")?;
    caps::set_keepcaps(true).during("keep capabilities over the change of user")?;
    set_ids(process)?;
    caps::set_keepcaps(false).during("keep capabilities over the change of user")?;
    // The change of user took the effective set, which the filter needs.
    let (_, permitted, inheritable) = caps::capget().during("read capabilities")?;
    caps::capset(permitted, permitted, inheritable).during("set capabilities")?;
    prctl::set_umask(process.umask);
    if process.no_new_privs {
        prctl::set_no_new_privs().during("set no_new_privs")?;
    }
    Ok(())
}

fn set_ids(process: &ProcessPlan) -> Done {
    match creds::set_groups(&process.groups) {
        // Denied for the whole user namespace: nobody in it has groups to drop but those it was made with.
        Err(error) if error.raw_os_error() == Some(1) && process.groups.is_empty() => {}
        Err(error) if error.raw_os_error() == Some(1) => {
            return Err(Failure::new("set supplementary groups: setgroups is denied in this user namespace"));
        }
        result => result.during("set supplementary groups")?,
    }
    creds::set_gid(process.gid).during(format_args!("set group {}", process.gid))?;
    creds::set_uid(process.uid).during(format_args!("set user {}", process.uid))
}

/// The last change: from here on there are only the container's own capabilities.
pub(super) fn give_up(process: &ProcessPlan) -> Done {
    let wanted = &process.caps;
    let (_, have, _) = caps::capget().during("read capabilities")?;
    let lost = wanted.permitted.difference(have);
    if lost != CapSet::EMPTY {
        return Err(Failure(format!("capabilities are not ours to give: {}", lost.names().join(" "))));
    }
    caps::capset(wanted.effective, wanted.permitted, wanted.inheritable).during("set capabilities")?;
    caps::set_ambient(wanted.ambient).during("set ambient capabilities")
}
