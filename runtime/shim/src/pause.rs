//! PID 1 of a PID namespace that the pod shares: reaps orphans and does nothing else. Containers see it and may have
//! strong rights over it, so it holds nothing: no capability, no file, no host folder, no namespace of the host's.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use berth_linux::caps::{self, CapSet};
use berth_linux::child::close_from;
use berth_linux::mount::{self, AttrChange, MountAttrs, Propagation};
use berth_linux::ns;
use berth_linux::pidfd::waitid_any;
use berth_linux::process::{CloneArgs, CloneFlags, Fork, clone3, exit_now, pipe};
use berth_linux::signalfd::SignalFd;
use berth_linux::{Pid, creds, prctl};
use berth_shim::protocol::PodNamespace;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::CWD;

use crate::child;
use crate::error::Error;
use crate::link::Link;
use crate::pod::{Pause, Pod, kind};

/// The user that pause runs as: nobody's.
const NOBODY: u32 = 65_535;

/// Starts pause inside the pod's other namespaces and adds its PID namespace to the pod. `folder` is any folder that exists, to
/// attach an empty filesystem to.
pub fn start(pod: &mut Pod, folder: &Path) -> Result<(), Error> {
    let (mut ours, theirs) = Link::pair().map_err(Error::io("make a socket pair"))?;
    let theirs = theirs.into_socket();
    let (done_reader, done_writer) = pipe().map_err(Error::io("make a pipe"))?;
    let mut keep = pod.descriptors();
    keep.extend([theirs.as_fd(), done_writer.as_fd()]);
    child::run_to_end(&keep, || {
        for namespace in [PodNamespace::User, PodNamespace::Net, PodNamespace::Ipc, PodNamespace::Uts] {
            if let Some(fd) = pod.namespace(namespace) {
                ns::setns(fd, kind(namespace))?;
            }
        }
        let flags = CloneFlags::NEWPID | CloneFlags::NEWNS | CloneFlags::PARENT;
        match clone3(CloneArgs { flags, ..CloneArgs::default() }).map_err(Error::io("fork pause"))? {
            Fork::Child => exit_now(live(folder, done_writer.as_fd())),
            Fork::Parent { pid, pidfd } => {
                let mut link = Link::new(theirs.try_clone().map_err(Error::io("report pause"))?);
                link.send(&pid.as_raw_nonzero().get(), vec![pidfd]).map_err(Error::io("report pause"))
            }
        }
    })?;
    let lost = || Error::Helper("pause's helper did not report".into());
    ours.fill().map_err(Error::io("read the report of pause's helper"))?;
    let (pid, mut fds) = ours.next::<i32>().ok().flatten().ok_or_else(lost)?;
    let pid = Pid::from_raw(pid).ok_or_else(lost)?;
    let pidfd = fds.pop().ok_or_else(lost)?.into();
    pod.namespaces.push((PodNamespace::Pid, ns::open_ns(Some(pid), kind(PodNamespace::Pid))?));
    pod.pause = Some(Pause { pid, pidfd });
    drop(done_writer);
    let mut text = String::new();
    File::from(done_reader).read_to_string(&mut text).map_err(Error::io("read pause's report"))?;
    match text.as_str() {
        "\n" => Ok(()),
        "" => Err(Error::Helper("pause died".into())),
        text => Err(Error::Helper(format!("pause: {text}"))),
    }
}

/// Pause's life; it returns only when it could not be prepared.
fn live(folder: &Path, done: BorrowedFd<'_>) -> i32 {
    let Ok(done) = done.try_clone_to_owned() else {
        return 1;
    };
    let mut done = File::from(done);
    let signals = match prepare(folder, done.as_fd()) {
        Ok(signals) => signals,
        Err(error) => {
            let _ = done.write_all(error.full_text().as_bytes());
            return 1;
        }
    };
    let _ = done.write_all(b"\n");
    drop(done);
    loop {
        let mut fds = [PollFd::new(&signals, PollFlags::IN)];
        let _ = poll(&mut fds, None);
        while let Ok(Some(_)) = signals.read() {}
        while let Ok(Some(_)) = waitid_any(true) {}
    }
}

fn prepare(folder: &Path, done: BorrowedFd<'_>) -> Result<SignalFd, Error> {
    close_from(3, &[done]).map_err(Error::io("close descriptors"))?;
    let _ = prctl::set_name(c"berth-pause");
    let private = AttrChange { propagation: Some(Propagation::Private), ..AttrChange::default() };
    mount::mount_setattr(CWD, Path::new("/"), true, private)?;
    let context = mount::fs_context("tmpfs")?;
    context.set_string("size", "4096")?.set_string("nr_inodes", "1")?;
    context.create()?;
    let empty = context.mount(MountAttrs::RDONLY | MountAttrs::NOSUID | MountAttrs::NODEV | MountAttrs::NOEXEC)?;
    mount::move_mount(empty.as_fd(), CWD, folder, rustix::mount::MoveMountFlags::empty())?;
    mount::pivot_root(empty.as_fd())?;
    drop((empty, context));

    // Ids that the pod's user namespace does not have are left as they are: no capability remains either way.
    let _ = creds::set_ids(NOBODY, NOBODY, &[]);
    let none = CapSet::default();
    caps::capset(none, none, none).map_err(Error::io("drop capabilities"))?;
    prctl::set_no_new_privs().map_err(Error::io("set no_new_privs"))?;
    prctl::set_dumpable(false).map_err(Error::io("set dumpable"))?;
    // The shim's death is the pod's. After the change of ids, which would clear it.
    prctl::set_parent_death_signal(9).map_err(Error::io("set the parent-death signal"))?;

    const SIGCHLD: i32 = 17;
    SignalFd::new(&[SIGCHLD]).map_err(Error::io("make a signalfd"))
}
