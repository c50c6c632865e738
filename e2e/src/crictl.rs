//! crictl as a user runs it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use berth_testkit::patience;
use serde_json::Value;

use crate::{output, tools, try_output};

/// crictl on one socket.
pub struct Crictl {
    program: PathBuf,
    endpoint: String,
}

impl Crictl {
    /// For this socket.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self { program: tools::program("cri-tools", "crictl"), endpoint: format!("unix://{}", socket.display()) }
    }

    /// A crictl command, not run yet.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["--config", "/dev/null", "--timeout", &format!("{}s", 60 * patience())]);
        command.args(["--runtime-endpoint", &self.endpoint, "--image-endpoint", &self.endpoint]).args(arguments);
        command
    }

    /// Runs it and returns what it printed, trimmed.
    pub fn run(&self, arguments: &[&str]) -> String {
        output(&mut self.command(arguments)).trim().to_owned()
    }

    /// Runs it, whatever comes of it.
    pub fn attempt(&self, arguments: &[&str]) -> Output {
        try_output(&mut self.command(arguments))
    }

    /// Runs it with `-o json`.
    pub fn json(&self, arguments: &[&str]) -> Value {
        // Flags come before what they are about.
        let text = output(self.command(&arguments[..1]).args(["-o", "json"]).args(&arguments[1..]));
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("crictl {arguments:?}: {e}: {text}"))
    }
}
