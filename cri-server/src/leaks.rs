//! What of this instance is on the machine without an owner on record. Finds by the instance's marks; changes nothing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use crate::Server;
use crate::id::is_id;

/// One line for each thing without an owner.
pub(crate) async fn leaks(server: &Arc<Server>, settle: bool) -> Vec<String> {
    if settle {
        server.network.settle(Duration::from_secs(5)).await;
        let reaper = server.clone();
        let _ = crate::blocking(move || {
            reaper.reaper.settle();
            Ok(())
        })
        .await;
    }
    let live = server.board_ready();
    let mut out = match server.network.leaks(&live).await {
        Ok(leaks) => leaks.iter().map(|leak| format!("network {leak:?}")).collect(),
        Err(error) => vec![format!("network: {error}")],
    };
    let this = server.clone();
    let rest = crate::blocking(move || {
        let mut found = Vec::new();
        processes(&this, &mut found);
        cgroups(&this, &mut found);
        mounts(&this, &mut found);
        folders(&this, &mut found);
        Ok(found)
    });
    out.extend(rest.await.unwrap_or_default());
    out
}

fn sandboxes(server: &Server) -> BTreeSet<String> {
    server.owners.ids().iter().map(|id| id.as_str().to_owned()).collect()
}

fn containers(server: &Server) -> BTreeSet<String> {
    server.board.containers().iter().map(|view| view.id.as_str().to_owned()).collect()
}

/// Shims of sandboxes that nobody knows, or of ones that are stopped. Ours are those whose sandbox folder is below our state.
fn processes(server: &Server, out: &mut Vec<String>) {
    let ready = server.board_ready();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let mut args = line.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned());
        if args.next().as_deref() != Some("berth-shim") {
            continue;
        }
        let Some(id) = args.next().filter(|id| is_id(id)) else { continue };
        if ready.contains(&id) || !is_ours(server, pid, &id) {
            continue;
        }
        out.push(format!("process {pid}: shim of pod sandbox {id}"));
    }
}

/// Whether a shim listens in our state folder, or is in our cgroup.
fn is_ours(server: &Server, pid: i32, id: &str) -> bool {
    let folder = server.paths.live_sandbox(&id.into());
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    folder.exists() || cgroup.lines().any(|line| line.contains(server.cgroups.top()))
}

fn cgroups(server: &Server, out: &mut Vec<String>) {
    let mut owned = sandboxes(server);
    owned.extend(containers(server));
    let mut parents: BTreeSet<String> =
        server.board.sandboxes().iter().map(|v| server.cgroups.pod(&v.spec.cgroup_parent)).collect();
    parents.insert(server.cgroups.top().to_owned());
    for parent in parents {
        for name in server.cgroups.children(&parent).iter().filter(|n| is_id(n) && !owned.contains(*n)) {
            out.push(format!("cgroup {parent}/{name}"));
        }
    }
}

fn mounts(server: &Server, out: &mut Vec<String>) {
    let known = sandboxes(server);
    let prefix = format!("/run/netns/berth-{}-", server.instance);
    let state = server.paths.live_sandboxes();
    let kept = server.paths.kept_containers();
    for mount in berth_linux::mount::mounts().unwrap_or_default() {
        let path = mount.mount_point.to_string_lossy();
        if let Some(short) = path.strip_prefix(&prefix) {
            if !known.iter().any(|id| id.starts_with(short)) {
                out.push(format!("netns {path}"));
            }
        } else if mount.mount_point.starts_with(&state) || mount.mount_point.starts_with(&kept) {
            // Shims mount in namespaces of their own: nothing of ours is ever mounted there in this one.
            out.push(format!("mount {path}"));
        }
    }
}

fn folders(server: &Server, out: &mut Vec<String>) {
    let (sandboxes, containers) = (sandboxes(server), containers(server));
    let mut look = |folder: std::path::PathBuf, owned: &BTreeSet<String>, what: &str| {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !owned.contains(&name) {
                out.push(format!("{what} {}", entry.path().display()));
            }
        }
    };
    look(server.paths.live_sandboxes(), &sandboxes, "sandbox folder");
    look(server.paths.kept_sandboxes(), &sandboxes, "sandbox record");
    look(server.paths.kept_containers(), &containers, "snapshot");
    look(server.paths.trash(), &BTreeSet::new(), "snapshot");
}
