//! Collects what the plugins, one after the other, ask for: the adjustment of the container that is being made, and updates of
//! others. Each plugin sees the container as those before it have left it.

use std::collections::BTreeMap;

use crate::Error;
use crate::api::{
    Container, ContainerAdjustment, ContainerEviction, ContainerUpdate, CreateContainerResponse, Field, Hooks, KeyValue,
    LinuxContainer, LinuxContainerAdjustment, LinuxResources,
};
use crate::owners::Owners;
use crate::resources::{claim, overlay};

/// A key marked for removal, without its mark: plugins write `-name` for "take it away".
#[must_use]
pub fn removal(key: &str) -> Option<&str> {
    key.strip_prefix('-')
}

/// What plugins ask for other containers than the one at hand.
#[derive(Debug, Default)]
pub(crate) struct Others {
    pub(crate) updates: Vec<ContainerUpdate>,
    pub(crate) evictions: Vec<ContainerEviction>,
}

impl Others {
    /// Adds one plugin's wishes.
    pub(crate) fn add(&mut self, owners: &mut Owners, update: ContainerUpdate, plugin: &str) -> Result<(), Error> {
        let wanted = update.linux.unwrap_or_default().resources.unwrap_or_default();
        let claimed = claim(owners, &update.container_id, &wanted, plugin);
        if claimed.is_err() && update.ignore_failure {
            return Ok(());
        }
        claimed?;
        let id = &update.container_id;
        let at = self.updates.iter().position(|u| u.container_id == *id).unwrap_or_else(|| {
            self.updates.push(ContainerUpdate { container_id: id.clone(), linux: None, ignore_failure: true });
            self.updates.len() - 1
        });
        let entry = &mut self.updates[at];
        entry.ignore_failure &= update.ignore_failure;
        overlay(entry.linux.get_or_insert_default().resources.get_or_insert_default(), &wanted);
        Ok(())
    }
}

/// The making of one container.
#[derive(Debug)]
pub(crate) struct Creation {
    /// As the next plugin sees it.
    pub(crate) container: Container,
    pub(crate) adjust: ContainerAdjustment,
    pub(crate) others: Others,
    pub(crate) owners: Owners,
}

impl Creation {
    pub(crate) fn new(container: Container) -> Self {
        Self { container, adjust: ContainerAdjustment::default(), others: Others::default(), owners: Owners::default() }
    }

    /// Takes one plugin's answer.
    pub(crate) fn apply(&mut self, answer: CreateContainerResponse, plugin: &str) -> Result<(), Error> {
        if let Some(adjust) = answer.adjust {
            self.adjust(adjust, plugin)?;
        }
        for update in answer.update {
            if update.container_id == self.container.id {
                let what = format!("an update of {} while it is being created", update.container_id);
                return Err(Error::Answer { plugin: plugin.to_owned(), what });
            }
            self.others.add(&mut self.owners, update, plugin)?;
        }
        self.others.evictions.extend(answer.evict);
        Ok(())
    }

    fn claim(&mut self, field: Field, key: Option<&str>, plugin: &str) -> Result<(), Error> {
        self.owners.claim(&self.container.id, field, key, plugin)
    }

    fn adjust(&mut self, wanted: ContainerAdjustment, plugin: &str) -> Result<(), Error> {
        let id = self.container.id.clone();
        merge_map(
            &mut self.owners,
            (&id, Field::Annotations, plugin),
            wanted.annotations,
            &mut self.container.annotations,
            &mut self.adjust.annotations,
        )?;
        merge_list(
            &mut self.owners,
            (&id, Field::Mounts, plugin),
            wanted.mounts,
            &mut self.container.mounts,
            &mut self.adjust.mounts,
            |m| &m.destination,
        )?;
        self.env(wanted.env, plugin)?;
        self.args(wanted.args, plugin)?;
        if let Some(hooks) = wanted.hooks
            && hooks != Hooks::default()
        {
            add_hooks(self.adjust.hooks.get_or_insert_default(), &hooks);
            add_hooks(self.container.hooks.get_or_insert_default(), &hooks);
            self.owners.share(&id, Field::OciHooks, plugin);
        }
        for limit in wanted.rlimits {
            self.claim(Field::Rlimits, Some(&limit.r#type), plugin)?;
            self.container.rlimits.retain(|l| l.r#type != limit.r#type);
            self.container.rlimits.push(limit.clone());
            self.adjust.rlimits.push(limit);
        }
        for device in wanted.cdi_devices {
            self.claim(Field::CdiDevices, Some(&device.name), plugin)?;
            self.adjust.cdi_devices.push(device);
        }
        match wanted.linux {
            Some(linux) => self.linux(linux, plugin),
            None => Ok(()),
        }
    }

    fn env(&mut self, wanted: Vec<KeyValue>, plugin: &str) -> Result<(), Error> {
        let id = self.container.id.clone();
        let split = |entry: &String| {
            let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
            KeyValue { key: key.to_owned(), value: value.to_owned() }
        };
        let mut seen: Vec<KeyValue> = self.container.env.iter().map(split).collect();
        merge_list(&mut self.owners, (&id, Field::Env, plugin), wanted, &mut seen, &mut self.adjust.env, |e| &e.key)?;
        self.container.env = seen.into_iter().map(|e| format!("{}={}", e.key, e.value)).collect();
        Ok(())
    }

    /// Arguments as a whole; an empty first one says that another plugin's may be replaced.
    fn args(&mut self, mut wanted: Vec<String>, plugin: &str) -> Result<(), Error> {
        if wanted.first().is_some_and(String::is_empty) {
            wanted.remove(0);
            self.owners.clear(&self.container.id, Field::Args, None);
        }
        if wanted.is_empty() {
            return Ok(());
        }
        self.claim(Field::Args, None, plugin)?;
        self.container.args.clone_from(&wanted);
        self.adjust.args = wanted;
        Ok(())
    }

    fn linux(&mut self, wanted: LinuxContainerAdjustment, plugin: &str) -> Result<(), Error> {
        let id = self.container.id.clone();
        for (is_set, field) in [
            (!wanted.cgroups_path.is_empty(), Field::CgroupsPath),
            (wanted.oom_score_adj.is_some(), Field::OomScoreAdj),
            (wanted.io_priority.is_some(), Field::IoPriority),
            (wanted.seccomp_policy.is_some(), Field::SeccompPolicy),
            (wanted.scheduler.is_some(), Field::LinuxSched),
            (wanted.memory_policy.is_some(), Field::MemoryPolicy),
        ] {
            if is_set {
                self.claim(field, None, plugin)?;
            }
        }
        let seen: &mut LinuxContainer = self.container.linux.get_or_insert_default();
        let out: &mut LinuxContainerAdjustment = self.adjust.linux.get_or_insert_default();
        let owners = &mut self.owners;
        merge_list(owners, (&id, Field::Devices, plugin), wanted.devices, &mut seen.devices, &mut out.devices, |d| &d.path)?;
        if let Some(resources) = &wanted.resources {
            claim(owners, &id, resources, plugin)?;
            overlay(seen.resources.get_or_insert_default(), resources);
            overlay(out.resources.get_or_insert_default(), resources);
        }
        for namespace in wanted.namespaces {
            let kind = removal(&namespace.r#type).unwrap_or(&namespace.r#type).to_owned();
            owners.claim(&id, Field::Namespace, Some(&kind), plugin)?;
            seen.namespaces.retain(|n| n.r#type != kind);
            if kind == namespace.r#type {
                seen.namespaces.push(namespace.clone());
            }
            out.namespaces.push(namespace);
        }
        merge_map(owners, (&id, Field::Sysctl, plugin), wanted.sysctl, &mut seen.sysctl, &mut out.sysctl)?;
        merge_map(
            owners,
            (&id, Field::LinuxNetDevices, plugin),
            wanted.net_devices,
            &mut seen.net_devices,
            &mut out.net_devices,
        )?;
        if let Some(rdt) = wanted.rdt {
            for (is_set, field) in [
                (rdt.clos_id.is_some(), Field::RdtClosId),
                (rdt.schemata.is_some(), Field::RdtSchemata),
                (rdt.enable_monitoring.is_some(), Field::RdtEnableMonitoring),
            ] {
                if rdt.remove {
                    owners.clear(&id, field, None);
                }
                if is_set {
                    owners.claim(&id, field, None, plugin)?;
                }
            }
            let to = out.rdt.get_or_insert_default();
            if rdt.remove {
                *to = Default::default();
            }
            to.remove |= rdt.remove;
            to.clos_id = rdt.clos_id.or(to.clos_id.take());
            to.schemata = rdt.schemata.or(to.schemata.take());
            to.enable_monitoring = rdt.enable_monitoring.or(to.enable_monitoring.take());
        }
        if !wanted.cgroups_path.is_empty() {
            seen.cgroups_path.clone_from(&wanted.cgroups_path);
            out.cgroups_path = wanted.cgroups_path;
        }
        seen.oom_score_adj = wanted.oom_score_adj.or(seen.oom_score_adj.take());
        out.oom_score_adj = wanted.oom_score_adj.or(out.oom_score_adj.take());
        seen.io_priority = wanted.io_priority.or(seen.io_priority.take());
        out.io_priority = wanted.io_priority.or(out.io_priority.take());
        if wanted.seccomp_policy.is_some() {
            seen.seccomp_policy.clone_from(&wanted.seccomp_policy);
            out.seccomp_policy = wanted.seccomp_policy;
        }
        if wanted.scheduler.is_some() {
            seen.scheduler.clone_from(&wanted.scheduler);
            out.scheduler = wanted.scheduler;
        }
        out.memory_policy = wanted.memory_policy.or(out.memory_policy.take());
        Ok(())
    }
}

type Claim<'a> = (&'a str, Field, &'a str);

/// Keys with values; `-key` takes a key away, also from the plugin that set it.
fn merge_map<V: Clone + Default>(
    owners: &mut Owners,
    (id, field, plugin): Claim<'_>,
    wanted: BTreeMap<String, V>,
    seen: &mut BTreeMap<String, V>,
    out: &mut BTreeMap<String, V>,
) -> Result<(), Error> {
    // Removals first: '-' also sorts before letters, but digits and capitals are keys too.
    let (removed, set): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|(key, _)| removal(key).is_some());
    for (marked, _) in removed {
        let Some(key) = removal(&marked) else { continue };
        owners.clear(id, field, Some(key));
        seen.remove(key);
        out.remove(key);
        out.insert(marked.clone(), V::default());
    }
    for (key, value) in set {
        owners.claim(id, field, Some(&key), plugin)?;
        seen.insert(key.clone(), value.clone());
        out.insert(key, value);
    }
    Ok(())
}

/// The same for entries that have their key inside.
fn merge_list<T: Clone>(
    owners: &mut Owners,
    (id, field, plugin): Claim<'_>,
    wanted: Vec<T>,
    seen: &mut Vec<T>,
    out: &mut Vec<T>,
    key: impl Fn(&T) -> &String,
) -> Result<(), Error> {
    let (removed, set): (Vec<T>, Vec<T>) = wanted.into_iter().partition(|entry| removal(key(entry)).is_some());
    for marked in removed {
        let Some(plain) = removal(key(&marked)) else { continue };
        owners.clear(id, field, Some(plain));
        seen.retain(|entry| key(entry) != plain);
        out.retain(|entry| key(entry) != plain);
        out.push(marked);
    }
    for entry in set {
        owners.claim(id, field, Some(key(&entry)), plugin)?;
        seen.retain(|other| key(other) != key(&entry));
        seen.push(entry.clone());
        out.push(entry);
    }
    Ok(())
}

fn add_hooks(to: &mut Hooks, from: &Hooks) {
    to.prestart.extend(from.prestart.iter().cloned());
    to.create_runtime.extend(from.create_runtime.iter().cloned());
    to.create_container.extend(from.create_container.iter().cloned());
    to.start_container.extend(from.start_container.iter().cloned());
    to.poststart.extend(from.poststart.iter().cloned());
    to.poststop.extend(from.poststop.iter().cloned());
}

/// A change of one container's limits.
#[derive(Debug)]
pub(crate) struct Change {
    id: String,
    /// As the next plugin sees them; what comes of it in the end.
    pub(crate) resources: LinuxResources,
    pub(crate) others: Others,
    owners: Owners,
}

impl Change {
    pub(crate) fn new(id: String, resources: LinuxResources) -> Self {
        Self { id, resources, others: Others::default(), owners: Owners::default() }
    }

    /// Takes one plugin's answer.
    pub(crate) fn apply(
        &mut self,
        updates: Vec<ContainerUpdate>,
        evictions: Vec<ContainerEviction>,
        plugin: &str,
    ) -> Result<(), Error> {
        for update in updates {
            if update.container_id != self.id {
                self.others.add(&mut self.owners, update, plugin)?;
                continue;
            }
            let wanted = update.linux.unwrap_or_default().resources.unwrap_or_default();
            match claim(&mut self.owners, &self.id, &wanted, plugin) {
                Ok(()) => overlay(&mut self.resources, &wanted),
                Err(_) if update.ignore_failure => {}
                Err(error) => return Err(error),
            }
        }
        self.others.evictions.extend(evictions);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{LinuxContainerUpdate, LinuxMemory, Mount, OptionalInt, OptionalInt64, PosixRlimit};

    fn env(pairs: &[(&str, &str)]) -> CreateContainerResponse {
        let env = pairs.iter().map(|(k, v)| KeyValue { key: (*k).into(), value: (*v).into() }).collect();
        CreateContainerResponse { adjust: Some(ContainerAdjustment { env, ..Default::default() }), ..Default::default() }
    }

    fn creation() -> Creation {
        Creation::new(Container { id: "c".into(), env: vec!["A=old".into(), "Z=z".into()], ..Default::default() })
    }

    #[test]
    fn later_plugins_see_what_earlier_ones_changed() {
        let mut creation = creation();
        creation.apply(env(&[("A", "1"), ("B", "2"), ("-Z", "")]), "10-a").unwrap();
        assert_eq!(creation.container.env, ["A=1", "B=2"]);
        let keys: Vec<&str> = creation.adjust.env.iter().map(|e| e.key.as_str()).collect();
        assert_eq!(keys, ["-Z", "A", "B"]);
    }

    #[test]
    fn two_plugins_that_set_one_variable_conflict_and_a_removal_before_it_settles_that() {
        let mut first = creation();
        first.apply(env(&[("A", "1")]), "10-a").unwrap();
        let error = first.apply(env(&[("A", "2")]), "20-b").unwrap_err().to_string();
        assert!(error.contains("10-a") && error.contains("20-b") && error.contains("\"A\""), "{error}");
        let mut second = creation();
        second.apply(env(&[("A", "1")]), "10-a").unwrap();
        second.apply(env(&[("A", "2"), ("-A", "")]), "20-b").unwrap();
        assert_eq!(second.container.env, ["Z=z", "A=2"]);
    }

    #[test]
    fn single_fields_mounts_and_rlimits_conflict_too() {
        let full = || CreateContainerResponse {
            adjust: Some(ContainerAdjustment {
                args: vec!["x".into()],
                mounts: vec![Mount { destination: "/m".into(), ..Default::default() }],
                rlimits: vec![PosixRlimit { r#type: "RLIMIT_NOFILE".into(), hard: 1, soft: 1 }],
                linux: Some(LinuxContainerAdjustment { oom_score_adj: Some(OptionalInt { value: 5 }), ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let mut none = full();
        none.adjust = None;
        type Strip = fn(&mut ContainerAdjustment);
        let only: [(&str, Strip); 4] = [
            ("args", |a| (a.mounts, a.rlimits, a.linux) = (vec![], vec![], None)),
            ("mounts", |a| (a.args, a.rlimits, a.linux) = (vec![], vec![], None)),
            ("rlimits", |a| (a.args, a.mounts, a.linux) = (vec![], vec![], None)),
            ("oom score adj", |a| (a.args, a.mounts, a.rlimits) = (vec![], vec![], vec![])),
        ];
        for (field, strip) in only {
            let mut creation = creation();
            creation.apply(none.clone(), "05-n").unwrap();
            creation.apply(full(), "10-a").unwrap();
            let mut second = full();
            strip(second.adjust.as_mut().unwrap());
            let error = creation.apply(second, "20-b").unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn arguments_with_an_empty_first_one_replace_another_plugins() {
        let args = |a: &[&str]| CreateContainerResponse {
            adjust: Some(ContainerAdjustment { args: a.iter().map(|s| (*s).into()).collect(), ..Default::default() }),
            ..Default::default()
        };
        let mut creation = creation();
        creation.apply(args(&["a"]), "10-a").unwrap();
        creation.apply(args(&["", "b"]), "20-b").unwrap();
        assert_eq!(creation.adjust.args, ["b"]);
    }

    fn limit(id: &str, bytes: i64, ignore_failure: bool) -> ContainerUpdate {
        let memory = LinuxMemory { limit: Some(OptionalInt64 { value: bytes }), ..Default::default() };
        let resources = LinuxResources { memory: Some(memory), ..Default::default() };
        let linux = Some(LinuxContainerUpdate { resources: Some(resources) });
        ContainerUpdate { container_id: id.into(), linux, ignore_failure }
    }

    #[test]
    fn a_plugin_can_not_update_the_container_that_is_being_made() {
        let answer = CreateContainerResponse { update: vec![limit("c", 1, false)], ..Default::default() };
        assert!(creation().apply(answer, "10-a").unwrap_err().to_string().contains("being created"));
    }

    #[test]
    fn updates_of_one_container_by_two_plugins_conflict_unless_the_failure_is_ignored() {
        let mut change = Change::new("c".into(), LinuxResources::default());
        change.apply(vec![limit("o", 1, false), limit("c", 7, false)], vec![], "10-a").unwrap();
        change.apply(vec![limit("o", 2, true)], vec![], "20-b").unwrap();
        assert!(change.apply(vec![limit("o", 2, false)], vec![], "30-c").is_err());
        assert_eq!(change.others.updates, [limit("o", 1, false)]);
        assert_eq!(change.resources.memory.unwrap().limit.unwrap().value, 7);
    }
}
