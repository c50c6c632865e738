//! What the kernel tests share: a cgroup that is removed whatever happens, and programs in it.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::io::{BufRead, BufReader, Write};
use std::ops::Deref;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use berth_cgroup::{Cgroup, CgroupPath, Layout};
use berth_linux::Pid;

pub const PATIENCE: Duration = Duration::from_secs(20);

/// A cgroup of the test's own, killed and removed at the end.
pub struct Owned(Cgroup);

impl Deref for Owned {
    type Target = Cgroup;

    fn deref(&self) -> &Cgroup {
        &self.0
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.0.kill_and_wait(PATIENCE);
        let _ = self.0.delete();
    }
}

pub fn create(layout: &Layout) -> Owned {
    let path = format!("/berth-test-{}/inner", std::process::id());
    Owned(Cgroup::create(layout, &CgroupPath::parse(&path).unwrap()).unwrap())
}

/// The same machine seen in the ways in which machines come. v2 has no controllers here, but everything else.
pub fn layouts() -> Vec<(&'static str, Layout)> {
    let detected = Layout::detect().unwrap();
    let hierarchies = detected.hierarchies().to_vec();
    let mut layouts = vec![("detected", detected.clone())];
    if let (Layout::Hybrid { .. }, Some(mount)) = (&detected, detected.unified()) {
        let no_freezer = hierarchies.iter().filter(|one| !one.controllers.iter().any(|name| name == "freezer"));
        layouts.push(("v1 without a freezer", Layout::V1 { hierarchies: no_freezer.cloned().collect() }));
        layouts.push(("v1", Layout::V1 { hierarchies }));
        layouts.push(("v2", Layout::V2 { mount: mount.to_owned() }));
    }
    layouts
}

/// A shell that waits for lines of script.
pub struct Shell {
    pub child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Shell {
    pub fn start() -> Self {
        let mut child =
            Command::new("/bin/sh").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, input, output }
    }

    /// Starts a shell inside a cgroup.
    pub fn start_in(cgroup: &Cgroup) -> Self {
        let shell = Self::start();
        cgroup.attach(shell.pid()).unwrap();
        shell
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32).unwrap()
    }

    pub fn send(&mut self, line: &str) {
        self.input.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Runs a line that writes one line.
    pub fn ask(&mut self, line: &str) -> String {
        self.send(line);
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    }

    pub fn end(mut self) -> std::process::ExitStatus {
        drop(self.input);
        self.child.wait().unwrap()
    }
}
