//! One container by the library's own interface, as the pod shim makes it: for tests, which have threads and so cannot call
//! `launch` themselves. Takes a JSON request, runs the container, prints its warnings and exits with its code.
#![allow(clippy::print_stderr, reason = "a program for tests")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use berth_linux::mount;
use berth_linux::ns::{self, NamespaceKind};
use berth_linux::pidfd::{PidFd, waitid_any};
use berth_linux::process::{CloneArgs, Fork, clone3, exit_now, pipe};
use berth_oci::spec::Spec;
use berth_oci::{Gate, Launch, Parentage, RootSource, Stdio, launch, read_started};
use rustix::fs::{CWD, Mode, OFlags};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    spec: Spec,
    #[serde(default)]
    overlay: Option<Overlay>,
    /// Source by destination.
    #[serde(default)]
    trees: BTreeMap<String, PathBuf>,
    /// Process whose user, net, ipc and uts namespaces are entered.
    #[serde(default)]
    join: Option<i32>,
    /// Whether the container becomes the child of this program through a fork of it that ends, as in the shim.
    #[serde(default)]
    creator: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Overlay {
    dir: PathBuf,
    lowers: Vec<String>,
    upper: PathBuf,
    work: PathBuf,
}

fn main() {
    let path = std::env::args().nth(1).expect("request");
    let request: Request = serde_json::from_slice(&std::fs::read(path).expect("read")).expect("parse");
    let (gate, open) = pipe().expect("pipe");
    let (report, tell) = pipe().expect("pipe");
    if request.creator {
        match clone3(CloneArgs::default()).expect("fork") {
            Fork::Child => {
                let text = match make(request, gate, Parentage::CallersParent) {
                    Ok(init) => {
                        let pid = init.pid.as_raw_nonzero().get().to_string();
                        std::mem::forget(init);
                        pid
                    }
                    Err(error) => error,
                };
                let _ = File::from(tell).write_all(text.as_bytes());
                exit_now(0)
            }
            Fork::Parent { pidfd, .. } => {
                drop((tell, gate));
                let text = std::io::read_to_string(File::from(report)).expect("read");
                PidFd::from(pidfd).wait(false).expect("wait");
                let Ok(pid) = text.parse::<i32>() else {
                    eprintln!("{text}");
                    exit_now(1)
                };
                File::from(open).write_all(b"s").expect("start");
                // The container is our own child, whoever made it.
                loop {
                    let (ended, status) = waitid_any(false).expect("wait").expect("no child");
                    if ended.as_raw_nonzero().get() == pid {
                        exit_now(status.code)
                    }
                }
            }
        }
    }
    let init = match make(request, gate, Parentage::Caller) {
        Ok(init) => init,
        Err(error) => {
            eprintln!("{error}");
            exit_now(1)
        }
    };
    for warning in &init.warnings {
        eprintln!("warning: {warning}");
    }
    File::from(open).write_all(b"s").expect("start");
    if let Err(error) = read_started(init.started) {
        eprintln!("{error}");
        exit_now(1)
    }
    let status = PidFd::from(init.pidfd).wait(false).expect("wait").expect("status");
    exit_now(status.code)
}

fn make(request: Request, gate: OwnedFd, parent: Parentage) -> Result<berth_oci::Init, String> {
    let copy = |fd: rustix::fd::BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, 3).expect("dup");
    let stdio = [copy(std::io::stdin().as_fd()), copy(std::io::stdout().as_fd()), copy(std::io::stderr().as_fd())];
    let kinds = [NamespaceKind::User, NamespaceKind::Net, NamespaceKind::Ipc, NamespaceKind::Uts];
    let pid = request.join.and_then(rustix::process::Pid::from_raw);
    let join = pid.map(|pid| kinds.map(|kind| (kind, ns::open_ns(Some(pid), kind).expect("namespace"))).into());
    let trees = request
        .trees
        .iter()
        .map(|(destination, source)| (destination.clone(), mount::open_tree(CWD, source, true, true).expect("tree")));
    launch(Launch {
        id: "test".into(),
        bundle: Path::new("/").into(),
        mounts: trees.collect(),
        spec: request.spec,
        root: match request.overlay {
            None => RootSource::Spec,
            Some(overlay) => RootSource::Overlay {
                dir: rustix::fs::open(&overlay.dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                    .expect("dir"),
                lowers: overlay.lowers,
                upper: overlay.upper,
                work: overlay.work,
                volatile: true,
            },
        },
        cgroup: None,
        join: join.unwrap_or_default(),
        stdio: Stdio::Fds(stdio),
        gate: Gate::Pipe(gate),
        parent,
        filter: None,
        preserve_fds: 0,
        new_keyring: true,
    })
    .map_err(|error| berth_oci::chain(&error))
}
