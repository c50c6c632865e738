//! What the pod's containers share: namespaces, `/dev/shm`, pause. Made once, at the shim's start, by forked helpers, so
//! that the shim itself never enters any of it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use berth_linux::child::close_from;
use berth_linux::creds;
use berth_linux::mount::{self, AttrChange, MountAttrs, Propagation};
use berth_linux::ns::{self, IdMap, NamespaceKind};
use berth_linux::pidfd::PidFd;
use berth_linux::process::{CloneArgs, CloneFlags, pipe};
use berth_linux::{Pid, prctl};
use berth_oci::plan::sysctl;
use berth_shim::protocol::{IdMapping, NetMode, NsMode, PodNamespace, SandboxConfig, UserNamespace};
use rustix::fs::CWD;

use crate::child;
use crate::error::Error;

/// The pod's pause process.
#[derive(Debug)]
pub struct Pause {
    /// Its process id.
    pub pid: Pid,
    /// Its descriptor.
    pub pidfd: PidFd,
}

/// What the pod's containers share.
#[derive(Debug, Default)]
pub struct Pod {
    /// Namespaces of the pod's own.
    pub namespaces: Vec<(PodNamespace, OwnedFd)>,
    /// The pod's `/dev/shm`, attached in the shim's mount namespace.
    pub shm: Option<OwnedFd>,
    /// PID 1 of the pod's PID namespace.
    pub pause: Option<Pause>,
}

/// The kernel's kind of a namespace of the pod.
pub fn kind(namespace: PodNamespace) -> NamespaceKind {
    match namespace {
        PodNamespace::Net => NamespaceKind::Net,
        PodNamespace::Ipc => NamespaceKind::Ipc,
        PodNamespace::Uts => NamespaceKind::Uts,
        PodNamespace::Pid => NamespaceKind::Pid,
        PodNamespace::User => NamespaceKind::User,
    }
}

/// Gives the shim a mount namespace of its own. The host's mounts and unmounts still arrive (an unmounted volume must not stay in use
/// here), the shim's are its own.
pub fn separate_mounts() -> Result<(), Error> {
    ns::unshare(CloneFlags::NEWNS)?;
    let change = AttrChange { propagation: Some(Propagation::Slave), ..AttrChange::default() };
    mount::mount_setattr(CWD, Path::new("/"), true, change)?;
    Ok(())
}

impl Pod {
    /// Descriptor of a namespace of the pod.
    pub fn namespace(&self, wanted: PodNamespace) -> Option<BorrowedFd<'_>> {
        self.namespaces.iter().find(|(kind, _)| *kind == wanted).map(|(_, fd)| fd.as_fd())
    }

    /// All descriptors, for children that need them.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.namespaces.iter().map(|(_, fd)| fd.as_fd()).chain(self.shm.as_ref().map(AsFd::as_fd)).collect()
    }

    /// Makes the namespaces that the configuration wants new, with hostname and sysctls.
    pub fn make_namespaces(&mut self, config: &SandboxConfig, given_net: Option<OwnedFd>) -> Result<(), Error> {
        check(config)?;
        let mut wanted = Vec::new();
        if config.user.is_some() {
            wanted.push(PodNamespace::User);
        }
        for (namespace, new) in [
            (PodNamespace::Net, config.net == NetMode::New),
            (PodNamespace::Ipc, config.ipc == NsMode::New),
            (PodNamespace::Uts, config.uts == NsMode::New),
        ] {
            if new {
                wanted.push(namespace);
            }
        }
        if !wanted.is_empty() {
            self.namespaces = unshare_in_child(config, &wanted)?;
        }
        if let Some(net) = given_net {
            self.namespaces.push((PodNamespace::Net, net));
        }
        if config.sysctls.is_empty() {
            return Ok(());
        }
        child::run_to_end(&self.descriptors(), || self.write_sysctls(config))
    }

    /// Child: enters the namespaces from the host's user namespace, whose root may set any of their sysctls.
    fn write_sysctls(&self, config: &SandboxConfig) -> Result<(), Error> {
        for namespace in [PodNamespace::Net, PodNamespace::Ipc] {
            if let Some(fd) = self.namespace(namespace) {
                ns::setns(fd, kind(namespace))?;
            }
        }
        for (name, value) in &config.sysctls {
            let Some(path) = sysctl::path(name).map(|path| format!("/proc/sys/{path}")) else {
                return Err(Error::SysctlNotNamespaced { name: name.clone() });
            };
            let written = File::options().write(true).open(path).and_then(|mut file| file.write_all(value.as_bytes()));
            written.map_err(|source| Error::Sysctl { name: name.clone(), source })?;
        }
        Ok(())
    }

    /// Makes the pod's `/dev/shm` and attaches it to `mount_point`, so that it can be cloned for containers.
    pub fn make_shm(&mut self, config: &SandboxConfig, mount_point: &Path) -> Result<(), Error> {
        if config.shm_size == 0 {
            return Ok(());
        }
        let context = mount::fs_context("tmpfs")?;
        context.set_string("source", "shm")?.set_string("mode", "1777")?;
        context.set_string("size", config.shm_size.to_string())?;
        if let Some(user) = &config.user {
            for (key, maps) in [("uid", &user.uid_mappings), ("gid", &user.gid_mappings)] {
                if let Some(root) = maps.iter().find(|map| map.container_id == 0) {
                    context.set_string(key, root.host_id.to_string())?;
                }
            }
        }
        if !config.mount_label.is_empty() {
            context.set_string("context", config.mount_label.as_str())?;
        }
        context.create()?;
        let shm = context.mount(MountAttrs::NOSUID | MountAttrs::NODEV | MountAttrs::NOEXEC)?;
        match std::fs::create_dir(mount_point) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::io("make the mount point of /dev/shm")(error));
            }
            _ => {}
        }
        mount::move_mount(shm.as_fd(), CWD, mount_point, rustix::mount::MoveMountFlags::empty())?;
        self.shm = Some(shm);
        Ok(())
    }
}

fn check(config: &SandboxConfig) -> Result<(), Error> {
    if config.shm_size > 0 && config.ipc == NsMode::Host {
        return Err(Error::ConfigValue("a /dev/shm of the pod's own needs an IPC namespace of its own".into()));
    }
    if let Some(user) = &config.user
        && (user.uid_mappings.is_empty() || user.gid_mappings.is_empty())
    {
        return Err(Error::ConfigValue("a user namespace needs uid and gid mappings".into()));
    }
    for name in config.sysctls.keys() {
        let own = match sysctl::path(name).and_then(|path| sysctl::namespace(&path)) {
            Some(NamespaceKind::Net) => config.net != NetMode::Host,
            Some(NamespaceKind::Ipc) => config.ipc == NsMode::New,
            // The hostname has a field of its own, and the rest is not the pod's.
            _ => false,
        };
        if !own {
            return Err(Error::SysctlNotNamespaced { name: name.clone() });
        }
    }
    Ok(())
}

fn id_maps(maps: &[IdMapping]) -> Vec<IdMap> {
    maps.iter().map(|map| IdMap { inside: map.container_id, outside: map.host_id, size: map.size }).collect()
}

/// A child makes the namespaces and lives until the shim has opened them. Those of a pod with a user namespace belong to it, because the
/// child is in it (and has its maps) before it makes them.
fn unshare_in_child(config: &SandboxConfig, wanted: &[PodNamespace]) -> Result<Vec<(PodNamespace, OwnedFd)>, Error> {
    let failed = Error::io("talk to the namespaces' helper");
    let (go_reader, go_writer) = pipe().map_err(Error::io("make a pipe"))?;
    let (done_reader, done_writer) = pipe().map_err(Error::io("make a pipe"))?;
    let flags = if config.user.is_some() { CloneFlags::NEWUSER } else { CloneFlags::empty() };
    let (pid, pidfd) = child::fork(CloneArgs { flags, ..CloneArgs::default() }, || {
        if close_from(3, &[go_reader.as_fd(), done_writer.as_fd()]).is_err() {
            return 1;
        }
        let mut go = File::from(go_reader);
        let mut done = File::from(done_writer);
        let text = match unshare_here(config, wanted, &mut go) {
            Ok(()) => String::from("\n"),
            Err(error) => error.full_text(),
        };
        let _ = done.write_all(text.as_bytes());
        // Lives until the shim has opened the namespaces, or has died.
        let _ = go.read(&mut [0]);
        0
    })
    .map_err(Error::io("fork the namespaces' helper"))?;
    // The child's ends were moved into its closure, which is gone here.
    let result = (|| {
        if let Some(UserNamespace { uid_mappings, gid_mappings }) = &config.user {
            ns::write_id_maps(pid, &id_maps(uid_mappings), &id_maps(gid_mappings))?;
        }
        let mut go = File::from(go_writer);
        go.write_all(b"m").map_err(failed)?;
        let mut report = vec![0; 4096];
        let count = File::from(done_reader).read(&mut report).map_err(Error::io("read the helper's report"))?;
        match &report[..count] {
            b"\n" => {}
            b"" => return Err(Error::Helper("the namespaces' helper died".into())),
            text => return Err(Error::Helper(String::from_utf8_lossy(text).into_owned())),
        }
        let open = |namespace: &PodNamespace| Ok((*namespace, ns::open_ns(Some(pid), kind(*namespace))?));
        wanted.iter().map(open).collect()
    })();
    pidfd.wait(false).map_err(Error::io("wait for the namespaces' helper"))?;
    result
}

/// Child.
fn unshare_here(config: &SandboxConfig, wanted: &[PodNamespace], go: &mut File) -> Result<(), Error> {
    go.read_exact(&mut [0]).map_err(Error::io("wait for the id maps"))?;
    if config.user.is_some() {
        // What the namespaces hold (message queues' folder and the like) belongs to the pod's root, if it has one.
        let _ = creds::set_gid(0);
        let _ = creds::set_uid(0);
    }
    let flags = wanted.iter().filter(|namespace| **namespace != PodNamespace::User);
    ns::unshare(flags.map(|namespace| kind(*namespace).clone_flag()).collect())?;
    if wanted.contains(&PodNamespace::Uts) && !config.hostname.is_empty() {
        prctl::set_hostname(&config.hostname).map_err(Error::io("set the hostname"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_are_taken_only_when_they_stay_in_the_pod() {
        let table = [
            ("net.ipv4.ip_local_port_range", NetMode::New, NsMode::New, true),
            ("net/ipv4/conf/eth0.1/forwarding", NetMode::New, NsMode::New, true),
            ("net.ipv4.ip_local_port_range", NetMode::Host, NsMode::New, false),
            ("net.ipv4.ip_local_port_range", NetMode::Given, NsMode::Host, true),
            ("kernel.shm_rmid_forced", NetMode::New, NsMode::New, true),
            ("kernel.shm_rmid_forced", NetMode::New, NsMode::Host, false),
            ("kernel.msgmax", NetMode::New, NsMode::New, true),
            ("fs.mqueue.msg_max", NetMode::New, NsMode::New, true),
            ("kernel.core_pattern", NetMode::New, NsMode::New, false),
            ("vm.swappiness", NetMode::New, NsMode::New, false),
            ("net...kernel.core_pattern", NetMode::New, NsMode::New, false),
            ("net/../kernel/core_pattern", NetMode::New, NsMode::New, false),
            ("", NetMode::New, NsMode::New, false),
        ];
        for (name, net, ipc, good) in table {
            let sysctls = [(name.to_owned(), "1".to_owned())].into();
            let config = SandboxConfig { sysctls, net, ipc, ..SandboxConfig::default() };
            assert_eq!(check(&config).is_ok(), good, "{name} {net:?} {ipc:?}");
        }
    }
}
