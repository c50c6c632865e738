//! Host devices given to a container. Only looks at the host's nodes; nothing is made here.

use std::path::Path;

use berth_oci::spec::Device;
use rustix::fs::FileType;

use crate::error::{Error, file, invalid};
use crate::spec::DeviceSpec;

/// A device node and what may be done with it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Granted {
    pub(crate) device: Device,
    pub(crate) access: String,
}

/// Folders of `/dev` that are not the host's devices but somebody's mounts.
const NOT_DEVICES: [&str; 8] = ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev", "hugepages"];

/// The devices asked for; a folder means all devices in it. Blocking.
pub(crate) fn requested(specs: &[DeviceSpec]) -> Result<Vec<Granted>, Error> {
    let mut out = Vec::new();
    for spec in specs {
        let access = if spec.permissions.is_empty() { "rwm" } else { &spec.permissions };
        let host = Path::new(&spec.host_path);
        let meta = std::fs::metadata(host).map_err(file("open device", host))?;
        if meta.is_dir() {
            let before = out.len();
            walk(host, Path::new(&spec.container_path), access, 0, &mut out);
            if out.len() == before {
                return Err(invalid("devices.host_path", format!("{:?} holds no device", spec.host_path)));
            }
        } else {
            let real = std::fs::canonicalize(host).map_err(file("resolve device", host))?;
            match node(&real, &spec.container_path, access) {
                Some(granted) => out.push(granted),
                None => return Err(invalid("devices.host_path", format!("{:?} is not a device", spec.host_path))),
            }
        }
    }
    Ok(out)
}

/// All devices of the host, for privileged containers. Blocking.
pub(crate) fn all() -> Vec<Granted> {
    let mut out = Vec::new();
    walk(Path::new("/dev"), Path::new("/dev"), "rwm", 0, &mut out);
    out
}

fn walk(host: &Path, container: &Path, access: &str, depth: usize, out: &mut Vec<Granted>) {
    let Ok(entries) = std::fs::read_dir(host) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Ok(kind) = entry.file_type() else { continue };
        let to = container.join(&name);
        if kind.is_dir() {
            if depth < 8 && !NOT_DEVICES.iter().any(|n| name == *n) {
                walk(&entry.path(), &to, access, depth + 1, out);
            }
        } else if name != "console" && !kind.is_symlink() {
            out.extend(node(&entry.path(), &to.to_string_lossy(), access));
        }
    }
}

fn node(host: &Path, container: &str, access: &str) -> Option<Granted> {
    let stat = rustix::fs::stat(host).ok()?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::CharacterDevice => "c",
        FileType::BlockDevice => "b",
        _ => return None,
    };
    let device = Device {
        kind: kind.into(),
        path: container.into(),
        major: rustix::fs::major(stat.st_rdev),
        minor: rustix::fs::minor(stat.st_rdev),
        file_mode: Some(stat.st_mode & 0o7777),
        uid: Some(stat.st_uid),
        gid: Some(stat.st_gid),
    };
    Some(Granted { device, access: access.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_found_with_its_numbers() {
        let spec = DeviceSpec { container_path: "/dev/x".into(), host_path: "/dev/null".into(), permissions: "r".into() };
        let got = requested(&[spec]).unwrap();
        let device = &got[0].device;
        assert_eq!((device.kind.as_str(), device.path.as_str(), device.major, device.minor), ("c", "/dev/x", 1, 3));
        assert_eq!(got[0].access, "r");
    }

    #[test]
    fn what_is_no_device_is_refused() {
        let spec = |path: &str| DeviceSpec { container_path: path.into(), host_path: path.into(), permissions: String::new() };
        assert!(requested(&[spec("/etc/hostname")]).is_err());
        assert!(requested(&[spec("/dev/none-such")]).is_err());
    }
}
