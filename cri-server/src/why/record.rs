//! The same answers where no agent runs, or none answers: from the records and /proc. Changes nothing.

use std::collections::BTreeSet;

use super::{Candidate, NOT_READY, READY, RECORDS, Wait, Why, choose, ended, not_found, trouble};
use crate::cgroups::Cgroups;
use crate::config::Config;
use crate::error::Error;
use crate::id::{SandboxId, is_id};
use crate::paths::Paths;
use crate::processes::plugins_of;
use crate::records::{self, ContainerRecord, SandboxRecord};

fn read_all<T: serde::de::DeserializeOwned>(folders: &[std::path::PathBuf]) -> Vec<T> {
    let mut seen = BTreeSet::new();
    let mut out = Vec::new();
    for folder in folders {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if is_id(&name)
                && let Ok(record) = records::load(&crate::paths::record(&entry.path()))
                && seen.insert(name)
            {
                out.push(record);
            }
        }
    }
    out
}

/// What the records and /proc say.
pub(crate) fn on_record(config: &Config, wanted: &str) -> Result<Vec<Why>, Error> {
    let resolved = |p: &std::path::Path| std::fs::canonicalize(p).unwrap_or_else(|_| p.to_owned());
    let (root, state) = (resolved(&config.root), resolved(&config.state));
    let paths = Paths::new(&root, &state);
    let cgroups = Cgroups::new(&berth_linux::instance::InstanceId::of_state_dir(&state).to_string(), config.cgroup_driver)?;
    let boot = berth_linux::boot::boot_id().unwrap_or_default();
    // The state folder's win: they are of this boot and written first.
    let sandboxes: Vec<SandboxRecord> = read_all(&[paths.live_sandboxes(), paths.kept_sandboxes()]);
    let folders: Vec<_> =
        sandboxes.iter().map(|s| paths.live_sandbox(&s.id).join("containers")).chain([paths.kept_containers()]).collect();
    let containers: Vec<ContainerRecord> = read_all(&folders);
    let pod = |id: &SandboxId| {
        let found = sandboxes.iter().find(|s| s.id == *id);
        found.map_or_else(String::new, |s| format!("{}/{}", s.spec.metadata.namespace, s.spec.metadata.name))
    };
    let mut all: BTreeSet<Candidate> =
        sandboxes.iter().map(|s| Candidate { id: s.id.as_str().into(), name: pod(&s.id), sandbox: None }).collect();
    all.extend(containers.iter().map(|c| Candidate {
        id: c.id.as_str().into(),
        name: format!("{}/{}", pod(&c.sandbox), c.facts.spec.name),
        sandbox: Some(c.sandbox.as_str().into()),
    }));
    let mut answers = Vec::new();
    for chosen in choose(&all, wanted) {
        let mut why = Why { id: chosen.id.clone(), name: chosen.name, source: RECORDS.into(), ..Default::default() };
        let sandbox = chosen.sandbox.as_deref().unwrap_or(&chosen.id);
        let Some(record) = sandboxes.iter().find(|s| s.id.as_str() == sandbox) else { continue };
        let shim = crate::recover::shim_of(sandbox);
        if let Some(shim) = &shim {
            why.waits_for.extend(shim.trouble().map(|_| Wait::for_process("the pod's shim", shim)));
        }
        let gone = record.boot != boot || shim.is_none();
        let mut cgroup = record.cgroup.clone();
        if let Some(container) = containers.iter().find(|c| c.id.as_str() == chosen.id) {
            why.kind = "container".into();
            (why.state, why.reason) = container_state(container, exit_code(&paths, container), gone);
            cgroup = container.facts.cgroup.clone();
        } else {
            why.kind = "pod sandbox".into();
            let (state, reason) = match (record.ready, record.stopped, gone) {
                (false, ..) => (NOT_READY, "half made when the agent ended: the next start undoes it"),
                (_, true, _) => (NOT_READY, "it was stopped"),
                (_, _, true) => (NOT_READY, "its shim is dead"),
                _ => (READY, "kept by its shim"),
            };
            (why.state, why.reason) = (state.into(), reason.into());
        }
        why.waits_for
            .extend(plugins_of(sandbox).iter().map(|p| Wait::for_process(format!("CNI plugin ({})", p.verb), &p.process)));
        trouble(&mut why, &cgroups, &cgroup, None);
        answers.push(why);
    }
    if answers.is_empty() { Err(not_found(wanted)) } else { Ok(answers) }
}

fn exit_code(paths: &Paths, container: &ContainerRecord) -> Option<i32> {
    let bytes = std::fs::read(paths.exit_record(&container.sandbox, &container.id)).ok()?;
    serde_json::from_slice::<berth_shim::protocol::ExitRecord>(&bytes).ok().map(|r| r.code)
}

/// State and reason.
fn container_state(container: &ContainerRecord, on_file: Option<i32>, shim_gone: bool) -> (String, String) {
    let (state, reason) = match (&container.exit, on_file) {
        (Some(exit), _) => ("exited", ended(exit)),
        (None, Some(code)) => ("exited", format!("with {code}")),
        (None, None) if shim_gone => ("exited", "ended with its shim: shown with 255 from the next start on".to_owned()),
        _ if container.started_at != 0 => ("running", String::new()),
        _ => ("created", String::new()),
    };
    (state.to_owned(), reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_on_record_has_the_state_that_its_next_agent_will_show() {
        let mut record = ContainerRecord {
            version: 1,
            id: "c".into(),
            sandbox: "s".into(),
            boot: String::new(),
            created_at: 1,
            started_at: 2,
            resources: Default::default(),
            exit: None,
            forlorn: false,
            facts: crate::board::ContainerFacts::of(Default::default()),
        };
        let state = |record: &ContainerRecord, on_file, gone| {
            let (state, reason) = container_state(record, on_file, gone);
            format!("{state} {reason}").trim_end().to_owned()
        };
        assert_eq!(state(&record, None, false), "running");
        assert_eq!(state(&record, Some(3), false), "exited with 3");
        assert!(state(&record, None, true).contains("255"));
        record.started_at = 0;
        assert_eq!(state(&record, None, false), "created");
    }
}
