//! Throw-away namespaces around a test or a program: mount, network, PID, UTS and IPC, and a cgroup of its own.
//!
//! Tests run in threads, so a test cannot simply unshare. [`in_namespaces`] runs the test binary again for this one test:
//! a fresh thread unshares and prepares the namespaces, its child is PID 1 there (an init that reaps), and the init's child
//! runs the test. When the outermost process dies, the kernel ends everything inside.
//!
//! Inside: mount propagation is private, /run is a tmpfs, /run/t another for the tests' files, `lo` is up, the interface `uplink0` holds 10.77.0.1/24 and the default
//! route, and every cgroup hierarchy starts at a cgroup of the sandbox's own, which is removed afterwards.

mod cgroups;
mod folder;
mod init;
mod network;

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use cgroups::CgroupTree;
use folder::Folder;

/// The address of the interface `uplink0` inside a sandbox.
pub const NODE_IP: &str = "10.77.0.1";

/// A folder on disk for the files of tests, in a sandbox only.
pub const TESTS_DIR: &str = "/run/t";

/// Says which stage of a sandbox a re-executed process is: `init:NAME` or `run:NAME`.
const STAGE: &str = "BERTH_TESTKIT_STAGE";
const CGROUP: &str = "BERTH_TESTKIT_CGROUP";
const TIMEOUT: &str = "BERTH_TESTKIT_TIMEOUT";

/// Runs the calling test in a sandbox. Call it first thing in a `#[test]` function and with the whole test as the closure:
/// the closure runs in another process.
///
/// # Panics
/// When the test fails inside or takes longer than two minutes.
pub fn in_namespaces<F: FnOnce()>(test: F) {
    Sandbox::new().test(test);
}

/// How a sandbox is made.
#[derive(Debug, Clone)]
pub struct Sandbox {
    shared_root: bool,
    own_cgroups: bool,
    timeout: Option<Duration>,
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Sandbox {
    /// A sandbox with private propagation, own cgroups and five minutes of time for a test.
    #[must_use]
    pub fn new() -> Self {
        Self { shared_root: false, own_cgroups: true, timeout: Some(Duration::from_secs(300)) }
    }

    /// Makes the mounts inside shared among themselves, as systemd makes them on a host; nothing reaches the host.
    #[must_use]
    pub fn shared_root(mut self) -> Self {
        self.shared_root = true;
        self
    }

    /// Leaves the cgroup hierarchies as the host has them.
    #[must_use]
    pub fn host_cgroups(mut self) -> Self {
        self.own_cgroups = false;
        self
    }

    /// Kills everything inside after this time, or more where the processor is emulated.
    #[must_use]
    pub fn timeout(mut self, timeout: Option<Duration>) -> Self {
        self.timeout = timeout;
        self
    }

    /// Runs the calling test inside; see [`in_namespaces`].
    ///
    /// # Panics
    /// When the test fails inside or takes too long.
    pub fn test<F: FnOnce()>(&self, test: F) {
        let name = test_name_of::<F>();
        match std::env::var(STAGE).ok().as_deref().and_then(|stage| stage.split_once(':')) {
            Some(("init", inner)) if inner == name => init::main(&mut test_command(&name, "run")),
            Some(("run", _)) => {
                test();
                let _ = io::stdout().write_all(done_line(&name).as_bytes());
                // What the test function does after this call, it does outside.
                std::process::exit(0)
            }
            _ => self.test_outside(&name),
        }
    }

    fn test_outside(&self, name: &str) {
        let mut command = test_command(name, "init");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let made = self.outside().and_then(|outside| {
            let inside = || self.prepare(&outside, &mut command).and_then(|()| command.output());
            std::thread::scope(|scope| scope.spawn(inside).join().expect("the sandbox's thread"))
        });
        let output = made.unwrap_or_else(|error| panic!("sandbox: {error} (root is needed)"));
        let out = String::from_utf8_lossy(&output.stdout);
        let err = String::from_utf8_lossy(&output.stderr);
        for line in err.lines().filter(|line| crate::skip::is_for_runner(line)) {
            crate::skip::write_line(line);
        }
        for line in out.lines().chain(err.lines()).filter(|line| !is_harness_line(line)) {
            println!("{line}");
        }
        assert!(output.status.success(), "failed inside its sandbox: {}", output.status);
        assert!(
            out.contains(done_line(name).trim()),
            "the sandbox ran no test called {name}: the closure must stand in the test function itself"
        );
    }

    /// Runs a program inside with the caller's stdio and returns its status. SIGTERM and SIGHUP to the calling process are passed on.
    /// `own` is the calling program with the arguments that bring it back to [`init_main`].
    ///
    /// # Errors
    /// When the namespaces cannot be made.
    pub fn run(&self, own: &mut Command) -> io::Result<ExitStatus> {
        own.env(STAGE, "init:");
        // Removed by this thread: the other one's view of the machine becomes the sandbox's.
        let outside = self.outside()?;
        init::pass_on_signals(|| self.prepare(&outside, own).and_then(|()| own.spawn()))
    }

    fn outside(&self) -> io::Result<Outside> {
        let cgroups = if self.own_cgroups { Some(CgroupTree::create()?) } else { None };
        Ok(Outside { cgroups, folder: Folder::create()? })
    }

    /// Moves the calling thread into fresh namespaces and prepares them; the thread's next child is PID 1 there.
    fn prepare(&self, outside: &Outside, command: &mut Command) -> io::Result<()> {
        let context = |what: &'static str| move |e: nix::Error| io::Error::other(format!("{what}: {e}"));
        let flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC;
        unshare(flags).map_err(context("unshare"))?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(context("make mounts private"))?;
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=0755"))
            .map_err(context("mount /run"))?;
        outside.folder.mount()?;
        if self.shared_root {
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none).map_err(context("make mounts shared"))?;
        }
        network::configure()?;
        // Last: the next child of this thread will be PID 1.
        unshare(CloneFlags::CLONE_NEWPID).map_err(context("unshare the PID namespace"))?;
        if let Some(tree) = &outside.cgroups {
            command.env(CGROUP, tree.name());
        }
        if let Some(timeout) = self.timeout {
            command.env(TIMEOUT, (timeout * crate::wait::patience()).as_secs().to_string());
        }
        Ok(())
    }
}

/// What a sandbox has outside its namespaces; removed on drop.
struct Outside {
    cgroups: Option<CgroupTree>,
    folder: Folder,
}

/// True in the process that must call [`init_main`]: the one [`Sandbox::run`] started.
#[must_use]
pub fn is_init() -> bool {
    std::env::var_os(STAGE).is_some_and(|stage| stage == "init:")
}

/// The init of a sandbox made by [`Sandbox::run`]: starts `program`, reaps everything, exits with the program's code.
pub fn init_main(program: &mut Command) -> ! {
    program.env_remove(STAGE).env_remove(CGROUP).env_remove(TIMEOUT);
    init::main(program)
}

/// The exit code a shell would show for this status.
#[must_use]
pub fn shell_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// What the harness inside writes besides the test: the harness outside says it again.
fn is_harness_line(line: &str) -> bool {
    let starts = ["running 1 test", "failures:", "test result:", "error: test failed", "berth-testkit: "];
    line.is_empty()
        || crate::skip::is_for_runner(line)
        || starts.iter().any(|s| line.starts_with(s))
        || (line.starts_with("test ") && line.contains(" ... "))
}

fn done_line(name: &str) -> String {
    format!("berth-testkit: {name} ended inside its sandbox\n")
}

fn test_command(name: &str, stage: &str) -> Command {
    let exe = std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into());
    let mut command = Command::new(&exe);
    command.arg0(OsString::from(exe.file_name().unwrap_or(exe.as_os_str())));
    command.args(["--exact", name, "--nocapture", "--include-ignored", "--test-threads=1"]).env(STAGE, format!("{stage}:{name}"));
    command
}

/// The name libtest knows the function by in which `F` was written: its path without the crate and the closure.
fn test_name_of<F>() -> String {
    let path = std::any::type_name::<F>();
    let path = path.split_once("::").map_or(path, |(_, rest)| rest);
    let mut path = path;
    while let Some(outer) = path.strip_suffix("::{{closure}}") {
        path = outer;
    }
    path.to_owned()
}

/// The name of the test in which the function `_f` was written; for [`skip!`](crate::skip).
#[must_use]
pub fn test_name<F>(_f: F) -> String {
    let name = test_name_of::<F>();
    name.strip_suffix("::here").unwrap_or(&name).trim_end_matches("::{{closure}}").to_owned()
}
