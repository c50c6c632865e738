//! PID 1 of a sandbox, and the process that waits for it outside.

use std::io;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use super::cgroups::CgroupTree;
use super::{CGROUP, TIMEOUT, cgroups};

/// Finishes the namespaces from the inside, starts `program`, reaps every orphan and exits as the program does.
pub fn main(program: &mut Command) -> ! {
    let code = match init(program) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sandbox init: {error}");
            125
        }
    };
    // What is frozen cannot be killed, and the kernel waits for everybody when an init exits.
    cgroups::thaw_all();
    std::process::exit(code)
}

fn init(program: &mut Command) -> io::Result<i32> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, None::<&str>)?;
    if let Ok(name) = std::env::var(CGROUP) {
        CgroupTree::enter(&name)?;
    }
    let forwarded = passed_on_signals();
    // A program inherits the mask: blocked signals would never end it.
    forwarded.thread_unblock()?;
    let child = program.spawn()?;
    forwarded.thread_block()?;
    let pid = Pid::from_raw(child.id() as i32);
    if let Some(seconds) = std::env::var(TIMEOUT).ok().and_then(|s| s.parse().ok()) {
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(seconds));
            eprintln!("sandbox: killed after {seconds} s");
            cgroups::thaw_all();
            std::process::exit(124)
        });
    }
    std::thread::spawn(move || pass_on(&forwarded, pid));
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(who, code)) if who == pid => return Ok(code),
            Ok(WaitStatus::Signaled(who, signal, _)) if who == pid => {
                return Ok(128 + signal as i32);
            }
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn passed_on_signals() -> SigSet {
    let mut set = SigSet::empty();
    // A terminal sends SIGINT to everybody itself: the program inside decides what it means.
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT] {
        set.add(signal);
    }
    set
}

fn pass_on(set: &SigSet, to: Pid) {
    while let Ok(signal) = set.wait() {
        if signal != Signal::SIGINT {
            // It may have just ended.
            let _ = kill(to, signal);
        }
    }
}

/// Runs `start` on a thread of its own, waits there for the child it gives, and passes signals on to it meanwhile.
pub fn pass_on_signals<F>(start: F) -> io::Result<ExitStatus>
where
    F: FnOnce() -> io::Result<Child> + Send,
{
    let set = passed_on_signals();
    set.thread_block()?;
    let (tell, told) = mpsc::channel();
    // Not made by the worker: a thread that has unshared its PID namespace can make no threads.
    std::thread::spawn(move || {
        if let Ok(pid) = told.recv() {
            pass_on(&set, pid);
        }
    });
    let worker = move || {
        let mut child = start()?;
        // Without the other side signals are not passed on, and that is all.
        let _ = tell.send(Pid::from_raw(child.id() as i32));
        child.wait()
    };
    let panicked = |_| Err(io::Error::other("the sandbox's thread panicked"));
    std::thread::scope(|scope| scope.spawn(worker).join().unwrap_or_else(panicked))
}
