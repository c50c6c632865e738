//! Which kernel parameters a container or a pod may set: those that belong to a namespace of its own.

use std::collections::BTreeMap;
use std::path::PathBuf;

use berth_linux::ns::NamespaceKind;

use super::refuse;
use crate::Error;

/// Parameters of the IPC namespace below `kernel/`.
const IPC: [&str; 12] = [
    "auto_msgmni",
    "msg_next_id",
    "msgmax",
    "msgmnb",
    "msgmni",
    "sem",
    "sem_next_id",
    "shm_next_id",
    "shm_rmid_forced",
    "shmall",
    "shmmax",
    "shmmni",
];

pub(super) fn plan_sysctls(
    sysctls: &BTreeMap<String, String>,
    is_own: impl Fn(NamespaceKind) -> bool,
) -> Result<Vec<(PathBuf, String)>, Error> {
    sysctls
        .iter()
        .map(|(name, value)| {
            let field = format!("linux.sysctl.{name}");
            let Some(path) = path(name) else {
                return Err(refuse(field, "not the name of a kernel parameter"));
            };
            match namespace(&path) {
                None => Err(refuse(field, "not in a separate kernel namespace")),
                Some(kind) if !is_own(kind) => {
                    Err(refuse(field, format!("not allowed in the host's {} namespace", kind.proc_name())))
                }
                Some(_) => Ok((PathBuf::from(path), value.clone())),
            }
        })
        .collect()
}

/// The path below /proc/sys; none where the name can not be one. Names are separated by dots or by slashes; which one comes
/// first decides, and the other is then part of a name (`net/ipv4/conf/eth0.1/forwarding` = `net.ipv4.conf.eth0/1.forwarding`).
pub fn path(name: &str) -> Option<String> {
    let path = match name.find(['.', '/']) {
        Some(at) if name[at..].starts_with('.') => name
            .chars()
            .map(|c| {
                if c == '.' {
                    '/'
                } else if c == '/' {
                    '.'
                } else {
                    c
                }
            })
            .collect(),
        _ => name.to_owned(),
    };
    let odd = path.split('/').any(|part| part.is_empty() || part == "." || part == "..");
    (!odd).then_some(path)
}

/// The kind of namespace that a parameter belongs to, by its path below /proc/sys; none = it is the whole machine's.
pub fn namespace(path: &str) -> Option<NamespaceKind> {
    let (top, rest) = path.split_once('/')?;
    match top {
        "net" => Some(NamespaceKind::Net),
        "fs" if rest.starts_with("mqueue/") => Some(NamespaceKind::Ipc),
        "kernel" if IPC.contains(&rest) => Some(NamespaceKind::Ipc),
        "kernel" if rest == "domainname" || rest == "hostname" => Some(NamespaceKind::Uts),
        "user" => Some(NamespaceKind::User),
        _ => None,
    }
}
