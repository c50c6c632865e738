//! `process_*`: what the kernel says of this process. What cannot be read is left out.

use std::fs;

use super::text::Text;

/// The kernel counts processor time for /proc in hundredths of a second on every architecture.
const TICKS: f64 = 100.0;

/// Writes the families that Prometheus' clients have for processes.
pub(crate) fn write(out: &mut Text) {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Behind the name, which may hold anything but its own end.
    let fields: Vec<f64> =
        stat.rsplit(") ").next().unwrap_or_default().split(' ').map(|field| field.trim().parse().unwrap_or(0.0)).collect();
    let mut gauge = |name: &str, kind: &str, help: &str, value: f64| {
        out.family(name, kind, help);
        out.sample(name, &[], value);
    };
    if fields.len() > 21 {
        let (utime, stime, start, virtual_bytes, pages) = (fields[11], fields[12], fields[19], fields[20], fields[21]);
        gauge(
            "process_cpu_seconds_total",
            "counter",
            "Total user and system CPU time spent in seconds.",
            (utime + stime) / TICKS,
        );
        let page = rustix::param::page_size() as f64;
        gauge("process_resident_memory_bytes", "gauge", "Resident memory size in bytes.", pages * page);
        gauge("process_virtual_memory_bytes", "gauge", "Virtual memory size in bytes.", virtual_bytes);
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let boot = stat.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse::<f64>().ok());
        if let Some(boot) = boot {
            let help = "Start time of the process since unix epoch in seconds.";
            gauge("process_start_time_seconds", "gauge", help, boot + start / TICKS);
        }
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        gauge("process_open_fds", "gauge", "Number of open file descriptors.", open.count() as f64);
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    if let Some(limit) = limit.current {
        gauge("process_max_fds", "gauge", "Maximum number of open file descriptors.", limit as f64);
    }
}
