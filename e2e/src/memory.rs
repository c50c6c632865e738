//! What processes and the machine use.

use std::fs;

/// A process: its command line and its memory.
#[derive(Debug, Clone)]
pub struct Process {
    /// The process id.
    pub pid: u32,
    /// The name the kernel knows it by.
    pub name: String,
    /// The file name of its program; of a memfd its name.
    pub program: String,
    /// Its arguments, with blanks between.
    pub command: String,
    /// Proportional set size in KiB.
    pub pss_kib: u64,
    /// Private memory in KiB.
    pub private_kib: u64,
}

impl Process {
    /// What it calls itself: its program and, where it is another, its name.
    #[must_use]
    pub fn title(&self) -> String {
        if self.name.starts_with(&self.program) || self.program.starts_with(&self.name) {
            self.program.clone()
        } else {
            format!("{} ({})", self.program, self.name)
        }
    }
}

/// All processes in view that satisfy `wanted` (given pid, name and command line).
pub fn processes(wanted: impl Fn(u32, &str, &str) -> bool) -> Vec<Process> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let look = |pid: u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_owned();
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let command = String::from_utf8_lossy(&command).trim_end_matches('\0').replace('\0', " ");
        if !wanted(pid, &name, &command) {
            return None;
        }
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        let private_kib = field(&rollup, "Private_Clean:")? + field(&rollup, "Private_Dirty:")?;
        let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        let program =
            program.file_name()?.to_string_lossy().trim_start_matches("memfd:").trim_end_matches(" (deleted)").to_owned();
        Some(Process { pid, name, program, command, pss_kib: field(&rollup, "Pss:")?, private_kib })
    };
    pids.filter_map(look).collect()
}

/// MemAvailable of the machine in KiB.
#[must_use]
pub fn available_kib() -> u64 {
    field(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemAvailable:").unwrap_or(0)
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}
