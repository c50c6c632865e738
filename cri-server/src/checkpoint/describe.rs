//! The description of a container in a checkpoint's archive, in the files and fields that other tools look for (checkpointctl's
//! names): config.dump, spec.dump, status.dump, status, container.log. Decides nothing.

use std::path::Path;

use berth_oci::spec::Spec;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::Server;
use crate::board::ContainerView;
use crate::convert::status;
use crate::error::{Error, file, invalid};
use crate::spec::IdMap;

/// The OCI spec that the container was made from. Blocking.
pub(super) fn spec(server: &Server, view: &ContainerView) -> Result<Spec, Error> {
    let path = server.paths.oci_spec(&view.sandbox, &view.id);
    let bytes = std::fs::read(&path).map_err(file("read", &path))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::Record { path, reason: e.to_string() })
}

/// The maps of the container's user namespace: (users, groups); empty without one.
pub(super) fn users(server: &Server, view: &ContainerView) -> Result<(Vec<IdMap>, Vec<IdMap>), Error> {
    let sandbox = server.board.need_sandbox(view.sandbox.as_str())?;
    Ok(sandbox.spec.namespaces.own_users().map(|users| (users.uids.clone(), users.gids.clone())).unwrap_or_default())
}

/// Writes all files. Blocking.
pub(super) fn write(server: &Server, view: &ContainerView, folder: &Path) -> Result<(), Error> {
    let sandbox = server.board.need_sandbox(view.sandbox.as_str())?;
    let m = &sandbox.spec.metadata;
    let name = format!("{}_{}_{}_{}_{}", view.facts.spec.name, m.name, m.namespace, m.uid, view.facts.spec.attempt);
    let runtime = match sandbox.spec.runtime_handler.as_str() {
        "" => crate::handlers::BUILTIN,
        other => other,
    };
    let put = |name: &str, value: &Value| {
        let path = folder.join(name);
        let bytes = serde_json::to_vec(value).map_err(|e| invalid("container", e.to_string()))?;
        std::fs::write(&path, bytes).map_err(file("write", &path))
    };
    put("config.dump", &config(view, &name, runtime, crate::clock::now_ns()))?;
    put("status.dump", &wire_status(view))?;
    put("status", &short_status(view))?;
    let spec_path = server.paths.oci_spec(&view.sandbox, &view.id);
    std::fs::copy(&spec_path, folder.join("spec.dump")).map_err(file("copy", &spec_path))?;
    let log = Path::new(&view.facts.log_path);
    if log.is_absolute() && log.exists() {
        std::fs::copy(log, folder.join("container.log")).map_err(file("copy", log))?;
    }
    Ok(())
}

fn rfc3339(ns: i64) -> String {
    let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(ns)).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    at.format(&Rfc3339).unwrap_or_default()
}

/// Go's zero time: never.
const NEVER: &str = "0001-01-01T00:00:00Z";

fn config(view: &ContainerView, name: &str, runtime: &str, now: i64) -> Value {
    json!({
        "id": view.id.as_str(),
        "name": name,
        "rootfsImage": view.facts.image_name,
        "rootfsImageRef": view.facts.image_ref,
        "rootfsImageName": view.facts.image_name,
        "runtime": runtime,
        "createdTime": rfc3339(view.created_at),
        "checkpointedTime": rfc3339(now),
        "restoredTime": NEVER,
        "restored": false,
    })
}

/// What containerd keeps of a container's state; readers tell by it that an archive is a CRI's.
fn short_status(view: &ContainerView) -> Value {
    json!({
        "CreatedAt": view.created_at,
        "StartedAt": view.started_at,
        "FinishedAt": 0,
        "ExitCode": 0,
        "Pid": view.pid.unwrap_or(0),
        "Reason": "",
        "Message": "",
    })
}

/// The CRI's ContainerStatus in the JSON of Go's protobuf types.
fn wire_status(view: &ContainerView) -> Value {
    let wire = status::container_status(view);
    let image = wire.image.unwrap_or_default();
    let metadata = wire.metadata.unwrap_or_default();
    let mounts: Vec<Value> = wire
        .mounts
        .iter()
        .map(|m| {
            json!({
                "container_path": m.container_path,
                "host_path": m.host_path,
                "readonly": m.readonly,
                "propagation": m.propagation,
            })
        })
        .collect();
    json!({
        "id": wire.id,
        "metadata": {"name": metadata.name, "attempt": metadata.attempt},
        "state": wire.state,
        "created_at": wire.created_at,
        "started_at": wire.started_at,
        "image": {"image": image.image, "user_specified_image": image.user_specified_image},
        "image_ref": wire.image_ref,
        "image_id": wire.image_id,
        "labels": wire.labels.into_iter().collect::<std::collections::BTreeMap<_, _>>(),
        "annotations": wire.annotations.into_iter().collect::<std::collections::BTreeMap<_, _>>(),
        "mounts": mounts,
        "log_path": wire.log_path,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_what_other_tools_parse() {
        assert_eq!(rfc3339(1_700_000_000_000_000_000), "2023-11-14T22:13:20Z");
        assert!(OffsetDateTime::parse(NEVER, &Rfc3339).is_ok());
    }
}
