//! What of this instance is on the machine without an owner on record. Finds by the instance's marks; changes nothing.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use berth_cni::{Leak, Network, NetworkConfig};

use crate::Server;
use crate::cgroups::Cgroups;
use crate::config::Config;
use crate::error::Error;
use crate::id::{ContainerId, SandboxId, is_id};
use crate::paths::Paths;
use crate::records::{self, ContainerRecord, SandboxRecord};

/// Who owns what.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Owned {
    /// Sandboxes that may hold something of the system: being made, ready, or being torn down.
    holding: BTreeSet<String>,
    /// All that are known.
    sandboxes: BTreeSet<String>,
    containers: BTreeSet<String>,
    /// The cgroups that theirs are in.
    parents: BTreeSet<String>,
}

impl Owned {
    /// What the running server owns at this moment, also what is half made or half gone.
    fn now(server: &Server) -> Self {
        let mut out = Self::default();
        for (id, held) in server.owners.held() {
            if held.system {
                out.holding.insert(id.as_str().to_owned());
            }
            out.sandboxes.insert(id.as_str().to_owned());
            out.containers.extend(held.containers.iter().map(|c| c.as_str().to_owned()));
            out.parents.insert(server.cgroups.pod(&held.cgroup_parent));
        }
        out
    }

    fn add(&mut self, other: Self) {
        self.holding.extend(other.holding);
        self.sandboxes.extend(other.sandboxes);
        self.containers.extend(other.containers);
        self.parents.extend(other.parents);
    }

    /// What the records own; nothing is changed. Blocking.
    fn on_record(paths: &Paths, cgroups: &Cgroups, boot: &str) -> Self {
        let mut out = Self::default();
        let sandboxes = names(&paths.kept_sandboxes()).into_iter().chain(names(&paths.live_sandboxes()));
        for id in sandboxes.map(SandboxId::from) {
            let files = [paths.live_sandbox(&id), paths.kept_sandbox(&id)].map(|folder| crate::paths::record(&folder));
            let Some(record) = files.iter().find_map(|path| records::load::<SandboxRecord>(path).ok()) else { continue };
            if record.boot == boot && !record.stopped {
                out.holding.insert(id.as_str().to_owned());
            }
            out.parents.insert(cgroups.pod(&record.spec.cgroup_parent));
            out.containers.extend(names(&paths.live_sandbox(&id).join("containers")));
            out.sandboxes.insert(id.as_str().to_owned());
        }
        for id in names(&paths.kept_containers()).into_iter().map(ContainerId::from) {
            let record = records::load::<ContainerRecord>(&crate::paths::record(&paths.kept_container(&id)));
            if record.is_ok_and(|r| out.sandboxes.contains(r.sandbox.as_str())) {
                out.containers.insert(id.as_str().to_owned());
            }
        }
        out
    }
}

/// The names in a folder that have the form of an id.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(|name| is_id(name)).collect()
}

/// Where kubelets keep their pods' cgroups, by either driver.
const KUBEPODS: [&str; 2] = ["/kubepods", "/kubepods.slice"];

/// Who knows the network.
enum Links<'a> {
    Running(&'a Network),
    /// Nobody: its records tell.
    OnRecord(&'a NetworkConfig),
}

impl Links<'_> {
    async fn leaks(&self, live: &BTreeSet<String>) -> berth_cni::Result<Vec<Leak>> {
        match self {
            Self::Running(network) => network.leaks(live).await,
            Self::OnRecord(config) => Network::leaks_on_record(config, live),
        }
    }
}

/// Where to look.
#[derive(Clone)]
struct Ground {
    instance: String,
    paths: Paths,
    cgroups: Cgroups,
    /// Nobody is at work on the trash: what lies there stays.
    idle: bool,
}

impl Ground {
    /// The sandboxes' and containers' cgroups in one: (id, name).
    fn leaves(&self, parent: &str) -> Vec<(String, String)> {
        let names = self.cgroups.children(parent).into_iter();
        names.filter_map(|name| Cgroups::id_of(&name).map(str::to_owned).map(|id| (id, name))).collect()
    }
}

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
    let (instance, paths, cgroups) = (server.instance.clone(), server.paths.clone(), server.cgroups.clone());
    let ground = Ground { instance, paths, cgroups, idle: settle };
    let links = Links::Running(&server.network);
    let first = look(&ground, &links, || Owned::now(server)).await;
    if first.is_empty() {
        return first;
    }
    // Pods come and go meanwhile: only what is there a second time is a leak.
    let second: BTreeSet<String> = look(&ground, &links, || Owned::now(server)).await.into_iter().collect();
    first.into_iter().filter(|line| second.contains(line)).collect()
}

/// The same from the records alone, where no agent runs.
pub(crate) async fn on_record(mut config: Config) -> Result<Vec<String>, Error> {
    for folder in [&mut config.root, &mut config.state] {
        *folder = std::fs::canonicalize(&*folder).unwrap_or_else(|_| folder.clone());
    }
    let paths = Paths::new(&config.root, &config.state);
    let instance = berth_linux::instance::InstanceId::of_state_dir(&config.state).to_string();
    let boot =
        berth_linux::boot::boot_id().map_err(|e| Error::Linux { action: "read the boot id".into(), source: Box::new(e) })?;
    let cgroups = Cgroups::new(&instance, config.cgroup_driver)?;
    let network = crate::server::network_config(&config, &paths, &instance)?;
    let ground = Ground { instance, paths, cgroups, idle: true };
    let owned = || Owned::on_record(&ground.paths, &ground.cgroups, &boot);
    Ok(look(&ground, &Links::OnRecord(&network), owned).await)
}

/// Looks once. Who owns what is asked before and after: what was made meanwhile has an owner too.
async fn look(ground: &Ground, links: &Links<'_>, owned: impl Fn() -> Owned) -> Vec<String> {
    let mut before = owned();
    let mut out: Vec<String> = match links.leaks(&before.holding).await {
        Ok(leaks) => leaks.iter().map(|leak| format!("network {leak:?}")).collect(),
        Err(error) => vec![format!("network: {error}")],
    };
    let (this, parents) = (ground.clone(), before.parents.clone());
    let found = crate::blocking(move || Ok(Seen::take(&this, parents))).await.unwrap_or_default();
    before.add(owned());
    found.without(&before, &mut out);
    out
}

/// What is on the machine: the owner's id and the line for it.
#[derive(Debug, Default)]
struct Seen {
    holding: Vec<(String, String)>,
    known: Vec<(String, String)>,
    ownerless: Vec<String>,
}

impl Seen {
    fn take(ground: &Ground, mut parents: BTreeSet<String>) -> Self {
        let mut seen = Self::default();
        seen.processes(ground);
        parents.extend(ground.cgroups.tops().iter().cloned());
        for parent in &parents {
            for (id, name) in ground.leaves(parent) {
                seen.known.push((id, format!("cgroup {parent}/{name}")));
            }
        }
        seen.forgotten(ground, &parents);
        seen.mounts(ground);
        seen.folders(ground);
        seen
    }

    fn without(self, owned: &Owned, out: &mut Vec<String>) {
        out.extend(self.holding.into_iter().filter(|(id, _)| !owned.holding.contains(id)).map(|(_, line)| line));
        // A netns has only the beginning of its owner's id in its name.
        let known = |id: &str| {
            owned.containers.contains(id) || owned.sandboxes.range(id.to_owned()..).next().is_some_and(|s| s.starts_with(id))
        };
        out.extend(self.known.into_iter().filter(|(id, _)| !known(id)).map(|(_, line)| line));
        out.extend(self.ownerless);
    }

    /// Cgroups below the kubelet's, of pods that are not on record any more. Other runtimes have theirs there too, under the same
    /// names, and so have other instances: only those without a process count, in a pod none of whose cgroups has one. The
    /// cgroup of an ended container stays until it is removed, beside that of its pod's shim.
    fn forgotten(&mut self, ground: &Ground, searched: &BTreeSet<String>) {
        let mut pending: Vec<(String, usize)> = KUBEPODS.map(|top| (top.to_owned(), 0)).into();
        while let Some((parent, depth)) = pending.pop() {
            let leaves = ground.leaves(&parent);
            let path = |name: &str| format!("{parent}/{name}");
            if !searched.contains(&parent) && leaves.iter().all(|(_, name)| ground.cgroups.is_idle(&path(name))) {
                self.known.extend(leaves.into_iter().map(|(id, name)| (id, format!("cgroup {}", path(&name)))));
            }
            // The class, the pod, its containers.
            if depth < 2 {
                let inner = ground.cgroups.children(&parent).into_iter().filter(|name| Cgroups::id_of(name).is_none());
                pending.extend(inner.map(|name| (path(&name), depth + 1)));
            }
        }
    }

    /// Shims. Ours are those whose sandbox folder is below our state.
    fn processes(&mut self, ground: &Ground) {
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
            let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
            let mut args = line.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned());
            if args.next().as_deref() != Some("berth-shim") {
                continue;
            }
            let Some(id) = args.next().filter(|id| is_id(id)) else { continue };
            if is_ours(ground, pid, &id) {
                self.holding.push((id.clone(), format!("process {pid}: shim of pod sandbox {id}")));
            }
        }
    }

    fn mounts(&mut self, ground: &Ground) {
        let prefix = format!("berth-{}-", ground.instance);
        // Bound or not: the file alone is a leftover too.
        for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(id) = name.strip_prefix(&prefix) {
                self.known.push((id.to_owned(), format!("netns /run/netns/{name}")));
            }
        }
        let (state, kept) = (ground.paths.live_sandboxes(), ground.paths.kept_containers());
        for mount in berth_linux::mount::mounts().unwrap_or_default() {
            // Shims mount in namespaces of their own: nothing of ours is ever mounted there in this one.
            if mount.mount_point.starts_with(&state) || mount.mount_point.starts_with(&kept) {
                self.ownerless.push(format!("mount {}", mount.mount_point.display()));
            }
        }
    }

    fn folders(&mut self, ground: &Ground) {
        let paths = &ground.paths;
        let folders = [
            (paths.live_sandboxes(), "sandbox folder"),
            (paths.kept_sandboxes(), "sandbox record"),
            (paths.kept_containers(), "snapshot"),
        ];
        for (folder, what) in folders {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let line = format!("{what} {}", entry.path().display());
                self.known.push((entry.file_name().to_string_lossy().into_owned(), line));
            }
        }
        if ground.idle {
            let trash = std::fs::read_dir(paths.trash()).into_iter().flatten().flatten();
            self.ownerless.extend(trash.map(|entry| format!("snapshot {}", entry.path().display())));
        }
    }
}

/// Whether a shim listens in our state folder, or is in our cgroup.
fn is_ours(ground: &Ground, pid: i32, id: &str) -> bool {
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    ground.paths.live_sandbox(&id.into()).exists() || ground.cgroups.tops().iter().any(|top| cgroup.contains(top.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgotten_cgroups_below_the_kubelets_are_found_and_those_with_processes_left_to_their_owners() {
        let (tree, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let id = |letter: &str| letter.repeat(64);
        let class = "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podx.slice";
        let scope = format!("{class}/berth-{}.scope", id("c"));
        for folder in [
            &format!("kubepods/burstable/podu/{}", id("a")),
            &format!("kubepods/podv/{}", id("b")),
            &scope,
            &format!("kubepods/podv/{}", id("d")),
            "kubepods/podv/other",
        ] {
            std::fs::create_dir_all(tree.path().join(folder)).unwrap();
        }
        std::fs::write(tree.path().join(format!("kubepods/podv/{}/cgroup.procs", id("b"))), "1\n").unwrap();
        let ground = Ground {
            instance: "x".into(),
            paths: Paths::new(state.path(), state.path()),
            cgroups: Cgroups::in_tree(tree.path()),
            idle: true,
        };
        let mut seen = Seen::default();
        seen.forgotten(&ground, &BTreeSet::new());
        seen.known.sort();
        let line = |path: String, letter: &str| (id(letter), format!("cgroup /{path}"));
        assert_eq!(seen.known, [line(format!("kubepods/burstable/podu/{}", id("a")), "a"), line(scope, "c")]);
    }

    #[test]
    fn what_is_being_made_or_torn_down_has_an_owner_and_the_rest_is_a_leak() {
        let (a, b, c) = ("a".repeat(64), "b".repeat(64), "c".repeat(64));
        let set = |ids: &[&String]| ids.iter().map(|id| (*id).clone()).collect::<BTreeSet<_>>();
        let owned = Owned { holding: set(&[&a]), sandboxes: set(&[&a, &b]), containers: set(&[&c]), parents: BTreeSet::new() };
        let line = |id: &str, text: &str| (id.to_owned(), text.to_owned());
        let seen = Seen {
            holding: vec![line(&a, "shim a"), line(&b, "shim b")],
            known: vec![line(&b[..13], "netns b"), line(&c, "cgroup c"), line("d", "cgroup d")],
            ownerless: vec!["mount".into()],
        };
        let mut out = Vec::new();
        seen.without(&owned, &mut out);
        assert_eq!(out, ["shim b", "cgroup d", "mount"]);
    }
}
