//! Everything that one container's metrics are made of, read at once. Blocking.

use std::collections::HashMap;
use std::path::Path;

use berth_cgroup::Stats;

use super::process::{self, Processes};
use crate::Server;
use crate::board::ContainerView;
use crate::spec::Resources;
use crate::stats::layers::Usage;

/// The file system of the writable layers.
#[derive(Debug, Clone, Default)]
pub(super) struct Disk {
    pub(super) device: String,
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) bytes: u64,
    pub(super) inodes: u64,
    pub(super) inodes_free: u64,
}

/// One container at one time.
#[derive(Debug, Clone, Default)]
pub(super) struct Sample {
    pub(super) stats: Stats,
    /// Limits of swap are of swap alone; else of memory and swap.
    pub(super) is_v2: bool,
    /// Reads and writes of devices are counted.
    pub(super) counts_io: bool,
    pub(super) processes: Processes,
    pub(super) disk: Disk,
    /// Names of the devices in the statistics.
    pub(super) devices: HashMap<(u32, u32), String>,
    /// None while a large one is being counted.
    pub(super) layer: Option<Usage>,
    pub(super) resources: Resources,
    pub(super) started_at: i64,
    pub(super) now: i64,
}

/// Reads the samples of one scrape; what is the same for all is read once.
pub(super) struct Reader<'a> {
    pub(super) server: &'a Server,
    counts_io: bool,
    disk: Disk,
    devices: HashMap<(u32, u32), String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(server: &'a Server) -> Self {
        let controller = if server.cgroups.is_v2() { "io" } else { "blkio" };
        let disk = disk(&server.paths.kept_containers());
        Self { server, counts_io: server.cgroups.has_controller(controller), disk, devices: HashMap::new() }
    }

    /// None when the container is gone.
    pub(super) fn read(&mut self, view: &ContainerView) -> Option<Sample> {
        let stats = self.server.cgroups.stats(&view.facts.cgroup)?;
        for entry in &stats.io.devices {
            let number = (entry.major, entry.minor);
            self.devices.entry(number).or_insert_with(|| device_name(number));
        }
        let pids = self.server.cgroups.processes(&view.facts.cgroup);
        Some(Sample {
            stats,
            is_v2: self.server.cgroups.is_v2(),
            counts_io: self.counts_io,
            processes: process::read(&pids, view.pid),
            disk: self.disk.clone(),
            devices: self.devices.clone(),
            layer: self.server.layers.usage(&self.server.paths.kept_container(&view.id).join("upper"), false),
            resources: view.resources.clone(),
            started_at: view.started_at,
            now: crate::clock::now_ns(),
        })
    }
}

fn disk(folder: &Path) -> Disk {
    use std::os::unix::fs::MetadataExt;
    let Ok(meta) = std::fs::metadata(folder) else { return Disk::default() };
    let (major, minor) = (rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()));
    let mut out = Disk { device: device_name((major, minor)), major, minor, ..Default::default() };
    if let Ok(fs) = rustix::fs::statvfs(folder) {
        out.bytes = fs.f_blocks * fs.f_frsize;
        out.inodes = fs.f_files;
        out.inodes_free = fs.f_ffree;
    }
    out
}

/// `/dev/<name>`; a file system without a device has its number for a name.
fn device_name((major, minor): (u32, u32)) -> String {
    let link = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok();
    let name = link.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().replace('!', "/"));
    name.map_or_else(|| format!("{major}:{minor}"), |name| format!("/dev/{name}"))
}
