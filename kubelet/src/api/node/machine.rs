//! What the machine says of itself for the node's status: its IDs, its kernel and system, its huge pages. Reads files only.

use std::fs;
use std::path::Path;

/// What does not change while the agent runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// `/etc/machine-id`.
    pub machine_id: String,
    /// The firmware's ID, else the machine's.
    pub system_uuid: String,
    /// The kernel's ID of this boot.
    pub boot_id: String,
    /// `uname -r`.
    pub kernel: String,
    /// `PRETTY_NAME` of os-release.
    pub os_image: String,
    /// Go's name of the processor.
    pub architecture: String,
}

/// The first of the files that says something.
fn first(paths: &[&str]) -> String {
    let read = |path: &&str| fs::read_to_string(path).ok().map(|text| text.trim_matches(['\0', '\n', ' ']).to_owned());
    paths.iter().filter_map(read).find(|text| !text.is_empty()).unwrap_or_default()
}

/// Go's name of a processor that Rust calls so.
pub fn go_architecture(arch: &str) -> &str {
    match arch {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

fn pretty_name(os_release: &str) -> Option<String> {
    let line = os_release.lines().find_map(|line| line.trim().strip_prefix("PRETTY_NAME="))?;
    Some(line.trim().trim_matches(['"', '\'']).to_owned())
}

impl Machine {
    /// This one.
    pub fn read() -> Machine {
        let machine_id = first(&["/etc/machine-id", "/var/lib/dbus/machine-id"]);
        let firmware = first(&["/sys/class/dmi/id/product_uuid", "/proc/device-tree/system-id", "/proc/device-tree/vm,uuid"]);
        let release = fs::read_to_string("/etc/os-release").or_else(|_| fs::read_to_string("/usr/lib/os-release"));
        Machine {
            system_uuid: if firmware.is_empty() { machine_id.clone() } else { firmware },
            machine_id,
            boot_id: first(&["/proc/sys/kernel/random/boot_id"]),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            os_image: release.ok().and_then(|text| pretty_name(&text)).unwrap_or_else(|| "Linux".to_owned()),
            architecture: go_architecture(std::env::consts::ARCH).to_owned(),
        }
    }
}

/// How many bytes of each size of huge pages there are, by size.
pub fn huge_pages(sizes: &[u64], folder: &Path) -> Vec<(u64, i64)> {
    let pages = |size: u64| {
        let path = folder.join(format!("hugepages-{}kB/nr_hugepages", size / 1024));
        fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<i64>().ok()).unwrap_or(0)
    };
    let bytes = |size: u64| pages(size).saturating_mul(i64::try_from(size).unwrap_or(i64::MAX));
    sizes.iter().map(|size| (*size, bytes(*size))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_name_is_read_with_and_without_quotes() {
        assert_eq!(pretty_name("ID=x\nPRETTY_NAME=\"Debian GNU/Linux 12\"\n").as_deref(), Some("Debian GNU/Linux 12"));
        assert_eq!(pretty_name("PRETTY_NAME=Tiny"), Some("Tiny".to_owned()));
        assert_eq!(pretty_name("NAME=x"), None);
    }

    #[test]
    fn huge_pages_are_counted_in_bytes() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("hugepages-2048kB")).unwrap();
        fs::write(folder.path().join("hugepages-2048kB/nr_hugepages"), "3\n").unwrap();
        assert_eq!(huge_pages(&[2 << 20, 1 << 30], folder.path()), [(2 << 20, 6 << 20), (1 << 30, 0)]);
    }

    #[test]
    fn this_machine_has_a_kernel_and_a_boot() {
        let machine = Machine::read();
        assert!(!machine.kernel.is_empty() && machine.boot_id.len() == 36, "{machine:?}");
    }
}
