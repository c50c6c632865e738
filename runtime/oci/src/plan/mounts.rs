//! Mount options, understood.

use std::path::Path;

use berth_linux::mount::{MountAttrs, Propagation};

use super::{Change, Extension, Mount, Source, absolute, id_maps, refuse};
use crate::Error;
use crate::spec;

/// A propagation by name; true: recursively.
pub(super) fn propagation(name: &str) -> Option<(Propagation, bool)> {
    Some(match name {
        "private" => (Propagation::Private, false),
        "rprivate" => (Propagation::Private, true),
        "slave" => (Propagation::Slave, false),
        "rslave" => (Propagation::Slave, true),
        "shared" => (Propagation::Shared, false),
        "rshared" => (Propagation::Shared, true),
        "unbindable" => (Propagation::Unbindable, false),
        "runbindable" => (Propagation::Unbindable, true),
        _ => return None,
    })
}

/// An attribute by the name of the option that sets or clears it: (attributes that it decides, what they become).
fn attribute(name: &str) -> Option<(MountAttrs, MountAttrs)> {
    let on = |attr| (attr, attr);
    let off = |attr| (attr, MountAttrs::empty());
    Some(match name {
        "ro" => on(MountAttrs::RDONLY),
        "rw" => off(MountAttrs::RDONLY),
        "nosuid" => on(MountAttrs::NOSUID),
        "suid" => off(MountAttrs::NOSUID),
        "nodev" => on(MountAttrs::NODEV),
        "dev" => off(MountAttrs::NODEV),
        "noexec" => on(MountAttrs::NOEXEC),
        "exec" => off(MountAttrs::NOEXEC),
        "nodiratime" => on(MountAttrs::NODIRATIME),
        "diratime" => off(MountAttrs::NODIRATIME),
        "nosymfollow" => on(MountAttrs::NOSYMFOLLOW),
        "symfollow" => off(MountAttrs::NOSYMFOLLOW),
        "noatime" => (MountAttrs::ATIME, MountAttrs::NOATIME),
        "strictatime" => (MountAttrs::ATIME, MountAttrs::STRICTATIME),
        "relatime" | "atime" | "norelatime" | "nostrictatime" => off(MountAttrs::ATIME),
        _ => return None,
    })
}

impl Change {
    fn apply(&mut self, (decides, becomes): (MountAttrs, MountAttrs)) {
        self.set = (self.set - decides) | becomes;
        self.clear |= decides;
    }

    /// Clearing what is set anyway says nothing, but for the access time, whose bits the kernel wants cleared together.
    fn finish(&mut self) {
        self.clear -= self.set - MountAttrs::ATIME;
    }
}

pub(super) fn plan_mount(mount: &spec::Mount, bundle: &Path, extension: &Extension) -> Result<Mount, Error> {
    let field = || format!("mounts[{}]", mount.destination);
    // The old habit of relative destinations: they are relative to the root.
    let destination = absolute("mounts", &format!("/{}", mount.destination.trim_start_matches('/')))?;
    if destination == Path::new("/") {
        return Err(refuse(field(), "the root itself cannot be a destination"));
    }
    check_proc(&destination, mount)?;
    let mut planned = Mount {
        destination,
        source: Source::Given,
        change: Change::default(),
        recursive: Change::default(),
        propagation: Vec::new(),
        idmap: None,
    };
    let (mut bind, mut idmap, mut rest) = (None, None, Vec::new());
    for option in &mount.options {
        match option.as_str() {
            "bind" => bind = Some(bind.unwrap_or(false)),
            "rbind" => bind = Some(true),
            "idmap" => idmap = Some(false),
            "ridmap" => idmap = Some(true),
            // Words without an effect on a mount that is new.
            "defaults" | "async" | "loud" | "norelatime" | "nomand" | "nolazytime" | "noiversion" | "" => {}
            "remount" | "tmpcopyup" => return Err(refuse(field(), format!("option {option} is not supported"))),
            name => {
                let recursive = name.strip_prefix('r').and_then(attribute).filter(|_| attribute(name).is_none());
                match (propagation(name), attribute(name), recursive) {
                    (Some(propagation), ..) => planned.propagation.push(propagation),
                    (_, Some(attribute), _) => planned.change.apply(attribute),
                    (_, _, Some(attribute)) => planned.recursive.apply(attribute),
                    _ => rest.push(name),
                }
            }
        }
    }
    planned.change.finish();
    planned.recursive.finish();
    planned.source = source(mount, bundle, extension, bind, &rest)?;
    let mapped = !(mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty());
    if mapped || idmap.is_some() {
        if mapped && (mount.uid_mappings.is_empty() || mount.gid_mappings.is_empty()) {
            return Err(refuse(field(), "uidMappings and gidMappings belong together"));
        }
        if !matches!(planned.source, Source::Bind { .. } | Source::Given) {
            return Err(refuse(field(), "only a bind mount can be idmapped"));
        }
        planned.idmap = Some((id_maps(&mount.uid_mappings), id_maps(&mount.gid_mappings), idmap.unwrap_or(false)));
    }
    Ok(planned)
}

fn source(mount: &spec::Mount, bundle: &Path, extension: &Extension, bind: Option<bool>, rest: &[&str]) -> Result<Source, Error> {
    let field = || format!("mounts[{}]", mount.destination);
    let is_bind = bind.is_some() || matches!(mount.kind.as_str(), "bind" | "rbind");
    let given = extension.trees.contains(&mount.destination);
    if is_bind || given {
        if let Some(option) = rest.first() {
            return Err(refuse(field(), format!("option {option} is not supported by a bind mount")));
        }
        if given {
            return Ok(Source::Given);
        }
        if mount.source.is_empty() {
            return Err(refuse(field(), "a bind mount needs a source"));
        }
        let recursive = bind.unwrap_or(false) || mount.kind == "rbind";
        return Ok(Source::Bind { path: bundle.join(&mount.source), recursive });
    }
    match mount.kind.as_str() {
        "" => Err(refuse(field(), "neither a type nor the option bind")),
        "cgroup" | "cgroup2" => match rest.first() {
            Some(option) => Err(refuse(field(), format!("option {option} is not supported by a cgroup mount"))),
            None => Ok(Source::Cgroup),
        },
        kind => Ok(Source::Filesystem {
            kind: kind.to_owned(),
            source: mount.source.clone(),
            options: rest
                .iter()
                .map(|option| match option.split_once('=') {
                    Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                    None => ((*option).to_owned(), None),
                })
                .collect(),
        }),
    }
}

/// Labels all files of a file system by a mount option. The kernel's own files have labels of their own.
pub(super) fn add_label(kind: &str, options: &mut Vec<(String, Option<String>)>, label: &str) {
    let labelled = options.iter().any(|(key, _)| matches!(key.as_str(), "context" | "fscontext" | "rootcontext" | "defcontext"));
    if !labelled && !matches!(kind, "proc" | "sysfs" | "mqueue" | "cgroup" | "cgroup2" | "bpf" | "debugfs" | "tracefs") {
        options.push(("context".to_owned(), Some(label.to_owned())));
    }
}

/// Files inside /proc that may be covered: what LXCFS and the like provide.
const COVERABLE: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

/// Whether a mount may be attached over this path although it lies inside /proc.
pub(crate) fn is_coverable(destination: &Path) -> bool {
    COVERABLE.iter().any(|path| destination == Path::new(path))
}

fn check_proc(destination: &Path, mount: &spec::Mount) -> Result<(), Error> {
    if destination.starts_with("/proc") && destination != Path::new("/proc") && !is_coverable(destination) {
        return Err(refuse(format!("mounts[{}]", mount.destination), "cannot be mounted because it is inside /proc"));
    }
    if destination == Path::new("/proc") && mount.kind != "proc" && !mount.options.iter().any(|o| o == "bind" || o == "rbind") {
        return Err(refuse(format!("mounts[{}]", mount.destination), "only proc can be mounted there"));
    }
    Ok(())
}
