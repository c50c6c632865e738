//! Applies what CDI spec files ask for to an OCI spec. Looks at the host's device nodes; changes nothing but the spec.

use std::path::Path;

use berth_oci::spec::{Device, Hook as OciHook, Hooks, Mount, Spec};
use rustix::fs::FileType;

use super::document::{DeviceNode, Edits, Hook};
use crate::container::oci;
use crate::error::{Error, file};

/// A device that asks for something this runtime does not do, by its field.
fn unsupported(what: &'static str, device: &str, reason: &str) -> Error {
    Error::Unsupported { what, reason: format!("CDI device {device}: {reason}") }
}

/// Applies one set of edits. `device` is the device they came with. Blocking.
pub(super) fn apply(device: &str, edits: &Edits, spec: &mut Spec) -> Result<(), Error> {
    if edits.intel_rdt.is_some() {
        return Err(unsupported("containerEdits.intelRdt", device, "berth does not set up cache allocation (resctrl)"));
    }
    if let Some(net) = edits.net_devices.first() {
        let reason = format!("berth does not move interfaces ({:?}) into pods", net.host_interface_name);
        return Err(unsupported("containerEdits.netDevices", device, &reason));
    }
    if let Some(process) = &mut spec.process {
        for entry in &edits.env {
            oci::set_env(&mut process.env, entry.as_bytes());
        }
        for gid in edits.additional_gids.iter().filter(|gid| **gid != 0) {
            if !process.user.additional_gids.contains(gid) {
                process.user.additional_gids.push(*gid);
            }
        }
    }
    for node in &edits.device_nodes {
        let user = spec.process.as_ref().map_or((0, 0), |p| (p.user.uid, p.user.gid));
        let found = device_node(device, node, user)?;
        let access = if node.permissions.is_empty() { "rwm" } else { &node.permissions };
        oci::set_device(spec, found, access);
    }
    for mount in &edits.mounts {
        oci::set_mount(
            spec,
            Mount {
                destination: mount.container_path.clone(),
                kind: mount.kind.clone(),
                source: mount.host_path.clone(),
                options: mount.options.clone(),
                ..Default::default()
            },
        );
    }
    for hook in &edits.hooks {
        add_hook(spec.hooks.get_or_insert_with(Hooks::default), hook);
    }
    Ok(())
}

fn add_hook(hooks: &mut Hooks, hook: &Hook) {
    let point = match hook.hook_name.as_str() {
        "prestart" => &mut hooks.prestart,
        "createRuntime" => &mut hooks.create_runtime,
        "createContainer" => &mut hooks.create_container,
        "startContainer" => &mut hooks.start_container,
        "poststart" => &mut hooks.poststart,
        // The last of the names that a document may hold.
        _ => &mut hooks.poststop,
    };
    let (args, env) = (hook.args.clone(), hook.env.clone());
    point.push(OciHook { path: hook.path.clone(), args, env, timeout: hook.timeout });
}

/// The node as the OCI spec has it. A file that gives type and number needs no node on the host.
fn device_node(device: &str, node: &DeviceNode, (uid, gid): (u32, u32)) -> Result<Device, Error> {
    let host = Path::new(if node.host_path.is_empty() { &node.path } else { &node.host_path });
    let given = !node.kind.is_empty() && (node.major != 0 || node.kind == "p");
    let wrong = |reason: String| Error::Cdi { device: device.to_owned(), reason };
    let mut out = Device {
        kind: node.kind.clone(),
        path: node.path.clone(),
        major: u32::try_from(node.major).map_err(|_| wrong(format!("{:?}: major {} is not a number", node.path, node.major)))?,
        minor: u32::try_from(node.minor).map_err(|_| wrong(format!("{:?}: minor {} is not a number", node.path, node.minor)))?,
        file_mode: node.file_mode,
        uid: node.uid.or(Some(uid).filter(|id| *id > 0)),
        gid: node.gid.or(Some(gid).filter(|id| *id > 0)),
    };
    let stat = match rustix::fs::lstat(host) {
        Ok(stat) => stat,
        Err(_) if given => return Ok(out),
        Err(errno) => return Err(file("look at the CDI device node", host)(errno.into())),
    };
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::CharacterDevice => "c",
        FileType::BlockDevice => "b",
        FileType::Fifo => "p",
        _ if given => return Ok(out),
        _ => return Err(wrong(format!("{} is not a device node", host.display()))),
    };
    out.file_mode = out.file_mode.or(Some(stat.st_mode & 0o7777));
    if given {
        return Ok(out);
    }
    if !out.kind.is_empty() && out.kind != kind {
        return Err(wrong(format!("{} has the type {kind:?}, the spec file says {:?}", host.display(), out.kind)));
    }
    out.kind = kind.into();
    if kind != "p" && out.major == 0 {
        (out.major, out.minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    }
    Ok(out)
}
