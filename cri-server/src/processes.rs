//! What /proc says of processes that somebody waits for: state, age, where they sleep (proc_pid_stat(5)). Reads, changes nothing.

use std::time::Duration;

/// One process.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Process {
    pub(crate) pid: i32,
    /// Its command line's first words, or the kernel's name for it.
    pub(crate) command: String,
    /// The letter of proc_pid_stat(5): R, S, D, T, t, Z.
    pub(crate) state: char,
    /// Clock ticks after the boot.
    pub(crate) started: u64,
    /// How long it has run.
    pub(crate) seconds: u64,
    /// The kernel function it sleeps in, where that may be read.
    pub(crate) sleeps_in: String,
}

/// (name, state, start in clock ticks) from a line of /proc/pid/stat. The name may hold anything, so it ends at the last ')'.
fn parse_stat(text: &str) -> Option<(&str, char, u64)> {
    let (head, tail) = text.rsplit_once(')')?;
    let name = head.split_once('(')?.1;
    let mut fields = tail.split_whitespace();
    let state = fields.next()?.chars().next()?;
    // Field 22; the state is field 3.
    Some((name, state, fields.nth(18)?.parse().ok()?))
}

fn uptime() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/uptime").ok()?;
    Duration::try_from_secs_f64(text.split_whitespace().next()?.parse().ok()?).ok()
}

impl Process {
    /// A living process, or a zombie.
    pub(crate) fn of(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (name, state, started) = parse_stat(&stat)?;
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|b| *b == 0).filter(|w| !w.is_empty()).take(3).map(String::from_utf8_lossy).collect();
        let command = if words.is_empty() { format!("[{name}]") } else { words.join(" ") };
        let begun = Duration::from_secs_f64(started as f64 / rustix::param::clock_ticks_per_second() as f64);
        let wchan = std::fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
        Some(Self {
            pid,
            command,
            state,
            started,
            seconds: uptime().map_or(0, |up| up.saturating_sub(begun).as_secs()),
            sleeps_in: if wchan == "0" { String::new() } else { wchan },
        })
    }

    /// What its state means for those who wait for it, when it is not its own doing.
    pub(crate) fn trouble(&self) -> Option<String> {
        let at = if self.sleeps_in.is_empty() { String::new() } else { format!(" in {}", self.sleeps_in) };
        match self.state {
            'T' => Some(format!("is stopped by a signal; `kill -CONT {}` lets it go on", self.pid)),
            't' => Some("is stopped by a debugger".to_owned()),
            'D' => Some(format!("sleeps uninterruptibly{at}: a disk, a network file system or the kernel has not answered it")),
            'Z' => Some("has ended and is not reaped yet".to_owned()),
            _ => None,
        }
    }
}

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (pid {}, state {}, {} s old)", self.command, self.pid, self.state, self.seconds)?;
        if let Some(trouble) = self.trouble() {
            write!(f, " {trouble}")?;
        }
        Ok(())
    }
}

/// A CNI plugin that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PluginProcess {
    pub(crate) process: Process,
    /// The CNI command.
    pub(crate) verb: String,
}

/// The CNI plugins that run for a sandbox: the specification gives them its id and the command in their environment.
pub(crate) fn plugins_of(sandbox: &str) -> Vec<PluginProcess> {
    let wanted = format!("CNI_CONTAINERID={sandbox}");
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let plugin = |pid: i32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let mut variables = environment.split(|b| *b == 0);
        if !variables.clone().any(|variable| variable == wanted.as_bytes()) {
            return None;
        }
        let verb = variables.find_map(|variable| variable.strip_prefix(b"CNI_COMMAND=")).unwrap_or_default();
        Some(PluginProcess { process: Process::of(pid)?, verb: String::from_utf8_lossy(verb).into_owned() })
    };
    pids.filter_map(plugin).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_confuse_the_fields() {
        let tail = "S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 9 9";
        assert_eq!(parse_stat(&format!("7 (a) b) {tail}")), Some(("a) b", 'S', 12345)));
        assert_eq!(parse_stat("7 a"), None);
    }

    #[test]
    fn a_stopped_process_says_how_it_goes_on() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id().cast_signed();
        let handle = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(handle, rustix::process::Signal::STOP).unwrap();
        let stopped = berth_testkit::wait_for(Duration::from_secs(10), || Process::of(pid).filter(|p| p.state == 'T'));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(stopped.unwrap().to_string().contains(&format!("kill -CONT {pid}")));
        assert_eq!(Process::of(pid), None);
    }
}
