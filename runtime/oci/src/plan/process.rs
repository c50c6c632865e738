//! The process of a container or of an exec, understood.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use berth_linux::caps::CapSet;
use berth_linux::rlimit::{self, Limit};
use rustix::process::Resource;

use super::{Host, absolute, refuse};
use crate::Error;
use crate::spec;

/// A process, with its fields checked.
#[derive(Debug, Clone, Default)]
pub struct ProcessPlan {
    /// Program and arguments.
    pub args: Vec<CString>,
    /// Environment.
    pub env: Vec<CString>,
    /// Where programs without a slash are looked for.
    pub path: Vec<u8>,
    /// Working directory.
    pub cwd: PathBuf,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// File creation mask.
    pub umask: u32,
    /// The capability sets.
    pub caps: Capabilities,
    /// Limits.
    pub rlimits: Vec<(String, Resource, Limit)>,
    /// Whether execve may never add privileges.
    pub no_new_privs: bool,
    /// AppArmor profile to change to.
    pub apparmor: Option<String>,
    /// SELinux label to change to.
    pub selinux: Option<String>,
    /// Out-of-memory score adjustment.
    pub oom_score_adj: Option<i32>,
    /// Execution domain.
    pub personality: Option<u64>,
    /// Whether there is a terminal.
    pub terminal: bool,
}

impl PartialEq for Capabilities {
    fn eq(&self, other: &Self) -> bool {
        (self.bounding, self.effective, self.inheritable, self.permitted, self.ambient)
            == (other.bounding, other.effective, other.inheritable, other.permitted, other.ambient)
    }
}

/// The five capability sets.
#[derive(Debug, Clone, Copy, Default)]
pub struct Capabilities {
    /// Upper limit.
    pub bounding: CapSet,
    /// In force.
    pub effective: CapSet,
    /// Kept over execve for files that say so.
    pub inheritable: CapSet,
    /// Possible.
    pub permitted: CapSet,
    /// Kept over execve.
    pub ambient: CapSet,
}

/// Plans a process. What cannot be given here is left out with a warning.
pub fn plan_process(process: &spec::Process, host: &Host, warnings: &mut Vec<String>) -> Result<ProcessPlan, Error> {
    if process.args.is_empty() {
        return Err(refuse("process.args", "must not be empty"));
    }
    let cwd = match process.cwd.as_str() {
        "" => return Err(refuse("process.cwd", "must not be empty")),
        cwd => absolute("process.cwd", cwd)?,
    };
    let args = process.args.iter().map(|arg| c_string("process.args", arg.as_bytes())).collect::<Result<_, _>>()?;
    let env = last_of_each_name(&process.env).map(|env| c_string("process.env", &env.0)).collect::<Result<Vec<_>, _>>()?;
    let path = env.iter().rev().find_map(|entry| entry.as_bytes().strip_prefix(b"PATH=").map(<[u8]>::to_vec));
    Ok(ProcessPlan {
        args,
        path: path.unwrap_or_default(),
        env,
        cwd,
        uid: process.user.uid,
        gid: process.user.gid,
        groups: process.user.additional_gids.clone(),
        umask: process.user.umask.unwrap_or(0o022) & 0o777,
        caps: plan_capabilities(process.capabilities.as_ref(), host, warnings)?,
        rlimits: plan_rlimits(&process.rlimits)?,
        no_new_privs: process.no_new_privileges,
        apparmor: plan_apparmor(&process.apparmor_profile, host)?,
        selinux: plan_selinux("process.selinuxLabel", &process.selinux_label, host)?,
        oom_score_adj: plan_oom(process.oom_score_adj)?,
        personality: None,
        terminal: process.terminal,
    })
}

/// Of several entries with one name the last counts, as for whoever adds to a list: the C library would take the first.
fn last_of_each_name(env: &[spec::EnvVar]) -> impl Iterator<Item = &spec::EnvVar> {
    fn name(entry: &spec::EnvVar) -> &[u8] {
        entry.0.split(|byte| *byte == b'=').next().unwrap_or_default()
    }
    let last: HashMap<&[u8], usize> = env.iter().enumerate().map(|(at, entry)| (name(entry), at)).collect();
    env.iter().enumerate().filter(move |(at, entry)| last.get(name(entry)) == Some(at)).map(|(_, entry)| entry)
}

fn c_string(field: &str, bytes: &[u8]) -> Result<CString, Error> {
    CString::new(bytes).map_err(|_| refuse(field, "a NUL byte"))
}

fn plan_oom(adj: Option<i32>) -> Result<Option<i32>, Error> {
    match adj {
        Some(adj) if !(-1000..=1000).contains(&adj) => Err(refuse("process.oomScoreAdj", format!("{adj} is out of range"))),
        adj => Ok(adj),
    }
}

fn plan_apparmor(profile: &str, host: &Host) -> Result<Option<String>, Error> {
    match profile {
        "" => Ok(None),
        "unconfined" if !host.apparmor => Ok(None),
        _ if !host.apparmor => Err(refuse("process.apparmorProfile", "AppArmor is not active on this machine")),
        profile if profile.contains(['\0', '\n']) => Err(refuse("process.apparmorProfile", "not a profile's name")),
        profile => Ok(Some(profile.to_owned())),
    }
}

/// A label, where labels mean something.
pub(super) fn plan_selinux(field: &str, label: &str, host: &Host) -> Result<Option<String>, Error> {
    match label {
        "" => Ok(None),
        _ if !host.selinux => Err(refuse(field, "SELinux is not active on this machine")),
        label if label.contains(['\0', '\n', '"']) || label.len() > 255 => Err(refuse(field, "not a label")),
        label => Ok(Some(label.to_owned())),
    }
}

fn plan_capabilities(
    wanted: Option<&spec::Capabilities>,
    host: &Host,
    warnings: &mut Vec<String>,
) -> Result<Capabilities, Error> {
    let Some(wanted) = wanted else { return Ok(Capabilities::default()) };
    let (mut missing, mut unknown) = (CapSet::EMPTY, Vec::new());
    let mut set = |names: &[String]| {
        let mut set = CapSet::EMPTY;
        for name in names {
            match CapSet::from_name(name) {
                Some(one) => set = set.union(one),
                None if unknown.contains(name) => {}
                None => unknown.push(name.clone()),
            }
        }
        missing = missing.union(set.difference(host.bounding));
        set.intersection(host.bounding)
    };
    let caps = Capabilities {
        bounding: set(&wanted.bounding),
        effective: set(&wanted.effective),
        inheritable: set(&wanted.inheritable),
        permitted: set(&wanted.permitted),
        ambient: set(&wanted.ambient),
    };
    if let Some(name) = unknown.first() {
        return Err(refuse("process.capabilities", format!("unknown capability {name}")));
    }
    if !missing.is_empty() {
        warnings.push(format!("capabilities outside our own bounding set are left out: {}", missing.names().join(" ")));
    }
    let (effective, permitted) = (caps.effective.difference(caps.permitted), caps.permitted);
    if !effective.is_empty() {
        return Err(refuse("process.capabilities.effective", format!("{} is not permitted", effective.names().join(" "))));
    }
    // The kernel takes an ambient capability only where it is permitted and inheritable too.
    let ambient = caps.ambient.intersection(permitted).intersection(caps.inheritable);
    if ambient != caps.ambient {
        let lost = caps.ambient.difference(ambient);
        warnings.push(format!(
            "ambient capabilities that are not permitted and inheritable are left out: {}",
            lost.names().join(" ")
        ));
    }
    Ok(Capabilities { ambient, ..caps })
}

fn plan_rlimits(limits: &[spec::Rlimit]) -> Result<Vec<(String, Resource, Limit)>, Error> {
    let mut planned: Vec<(String, Resource, Limit)> = Vec::new();
    for limit in limits {
        let field = || format!("process.rlimits[{}]", limit.kind);
        let Some(resource) = rlimit::resource(&limit.kind) else { return Err(refuse(field(), "unknown limit")) };
        if planned.iter().any(|(kind, ..)| *kind == limit.kind) {
            return Err(refuse(field(), "given twice"));
        }
        if limit.soft > limit.hard {
            return Err(refuse(field(), "the soft limit is above the hard one"));
        }
        planned.push((limit.kind.clone(), resource, Limit { soft: limit.soft, hard: limit.hard }));
    }
    Ok(planned)
}

/// `PER_LINUX` or `PER_LINUX32`.
pub(super) fn personality(personality: &spec::Personality) -> Result<u64, Error> {
    if let Some(flag) = personality.flags.first() {
        return Err(refuse("linux.personality.flags", format!("unknown flag {flag}")));
    }
    match personality.domain.as_str() {
        "LINUX" => Ok(0),
        "LINUX32" => Ok(8),
        other => Err(refuse("linux.personality.domain", format!("unknown domain {other}"))),
    }
}

impl ProcessPlan {
    /// The folders of PATH, in order; an empty entry is the working directory.
    pub fn search_path(&self) -> impl Iterator<Item = &Path> {
        self.path.split(|byte| *byte == b':').map(|dir| match dir {
            [] => Path::new("."),
            dir => Path::new(std::ffi::OsStr::from_bytes(dir)),
        })
    }
}
