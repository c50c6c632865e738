//! The table itself: joins the fields of the API with the scenarios that prove them and with the hand-written rows of
//! `conformance/fields.yaml`, and prints it. A field without a row, with two, or a row without a field is an error.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;

use k8s_openapi::api::core::v1::{Container, EphemeralContainer, PodSpec};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::folder;
use super::model::{Model, sample};
use super::scenario::Scenario;

/// What berth makes of a field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Row {
    /// It works; these scenarios fail without it.
    Works(Vec<String>),
    /// A manifest that has it is refused with this message.
    Refused(String),
    /// It has no effect where no control plane is, and this is why.
    Meaningless(String),
    /// It works; a test of Rust shows it, `path::function`.
    Tested(String),
    /// It takes one value, which is the default; any other is refused with this message.
    OnlyValue(String),
    /// It is carried out, but no machine that the tests run on can show it, and this is why.
    Unverified(String),
    /// The field that holds this one is refused or meaningless, and that is its row.
    With(String),
}

/// A row as it is written by hand.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
enum Written {
    Refused(String),
    Meaningless(String),
    Tested(String),
    OnlyValue(String),
    Unverified(String),
}

/// Every field with its row.
#[derive(Debug)]
pub struct Table {
    /// The fields.
    pub model: Model,
    /// The rows by `Type.field`.
    pub rows: BTreeMap<String, Row>,
    /// The scenarios that run in the guest.
    in_guest: BTreeSet<String>,
}

impl Table {
    /// Joins fields, scenarios and written rows.
    ///
    /// # Errors
    /// Every field or row that is wrong, by name.
    pub fn load(scenarios: &[Scenario]) -> Result<Self, Vec<String>> {
        let mut model = Model::default();
        model.add::<PodSpec>();
        model.add::<Container>();
        model.add::<EphemeralContainer>();
        let text = fs::read_to_string(folder().join("fields.yaml")).unwrap();
        let value: Value = serde_yaml_ng::from_str(&text).map_err(|e| vec![format!("fields.yaml: {e}")])?;
        let written: BTreeMap<String, Written> = serde_json::from_value(value).map_err(|e| vec![format!("fields.yaml: {e}")])?;
        join(model, scenarios, written)
    }

    /// The fields whose own row satisfies `wanted`, each with a path to it from the pod, e.g. `spec.volumes[0].rbd`.
    pub fn paths(&self, wanted: impl Fn(&Row) -> bool) -> Vec<(String, String)> {
        let found = reachable(&self.model, &self.rows);
        let own = self.rows.iter().filter(|(_, row)| wanted(row));
        own.filter_map(|(name, _)| Some((name.clone(), found.get(name)?.clone()))).collect()
    }

    /// The table as a document.
    #[must_use]
    pub fn document(&self) -> String {
        let count = |wanted: fn(&Row) -> bool| self.rows.values().filter(|row| wanted(row)).count();
        let works = count(|r| matches!(r, Row::Works(_)));
        let refused = count(|r| matches!(r, Row::Refused(_)));
        let nothing = count(|r| matches!(r, Row::Meaningless(_)));
        let tested = count(|r| matches!(r, Row::Tested(_)));
        let only = count(|r| matches!(r, Row::OnlyValue(_)));
        let unverified = count(|r| matches!(r, Row::Unverified(_)));
        let with = count(|r| matches!(r, Row::With(_)));
        let mut text = INTRODUCTION.to_owned();
        let _ = write!(
            text,
            "\n{} fields: {works} work as scenarios show, {tested} as tests in Rust show, {only} take one value only, {unverified} are unverified; {refused} are refused, {nothing} are meaningless, {with} belong to a field that is refused or meaningless.\n",
            self.rows.len()
        );
        // The pod first, then what it is made of by name.
        let first = ["PodSpec", "Container"];
        let rest = self.model.types.keys().map(String::as_str).filter(|name| !first.contains(name));
        for name in first.into_iter().chain(rest) {
            let _ = write!(text, "\n## {name}\n\n| field | in berth | |\n|---|---|---|\n");
            for field in self.model.types[name].keys() {
                let (what, proof) = match &self.rows[&format!("{name}.{field}")] {
                    Row::Works(by) => ("works", by.iter().map(|s| self.named(s)).collect::<Vec<_>>().join(", ")),
                    Row::Refused(message) => ("refused", message.clone()),
                    Row::Meaningless(why) => ("meaningless", why.clone()),
                    Row::Tested(test) => ("works", format!("`{test}`")),
                    Row::OnlyValue(message) => ("works", format!("one value; another is refused: {message}")),
                    Row::Unverified(why) => ("unverified", why.clone()),
                    Row::With(parent) => match &self.rows[parent] {
                        Row::Refused(_) => ("refused", format!("with `{parent}`")),
                        _ => ("meaningless", format!("with `{parent}`")),
                    },
                };
                let _ = writeln!(text, "| `{field}` | {what} | {proof} |");
            }
        }
        text
    }

    fn named(&self, scenario: &str) -> String {
        let place = if self.in_guest.contains(scenario) { " (in the guest)" } else { "" };
        format!("`{scenario}`{place}")
    }
}

const INTRODUCTION: &str = "# Every field of a static pod\n\n\
Pods of an API server have the same fields, and the same of them work; what differs for them is in [their own page](api-pods.md#fields).\n\n\
Made from the API types of Kubernetes 1.36 by a test that fails when a field has no row; do not edit\n\
(`BERTH_WRITE_DOCS=1 cargo test -p berth-e2e --test conformance table`).\n\n\
- **works**: the scenarios named (in `e2e/conformance/scenarios`) run on a real `berth node`, and once more with the field taken\n  \
out, and must fail then. Those marked so do it in the guest of `make test-vm` ([what that is](guest.md)), whose kernel has what the\n  \
machine may lack. Where a test in Rust is named, that shows it. A field that takes one value works as that: `berth plan` refuses\n  \
another with the words shown.\n\
- **refused**: a static pod that has the field is refused with this message, which `berth plan` shows with file and line.\n\
- **unverified**: carried out, but no machine that the tests run on can show it, for the reason given.\n\
- **meaningless**: nobody is there to act on it without a control plane; `berth plan` and the log name it.\n\n\
A type that occurs in several places (probes, security contexts) is listed once.\n";

fn join(model: Model, scenarios: &[Scenario], written: BTreeMap<String, Written>) -> Result<Table, Vec<String>> {
    let mut errors = Vec::new();
    let mut rows: BTreeMap<String, Row> = BTreeMap::new();
    for (name, row) in written {
        let row = match row {
            Written::Refused(message) => Row::Refused(message),
            Written::Meaningless(why) => Row::Meaningless(why),
            Written::OnlyValue(message) => Row::OnlyValue(message),
            Written::Unverified(why) => {
                for test in why.split('`').filter(|part| part.contains("::") && !is_test(part)) {
                    errors.push(format!("{name}: there is no test {test}"));
                }
                Row::Unverified(why)
            }
            Written::Tested(test) => {
                if !is_test(&test) {
                    errors.push(format!("{name}: there is no test {test}"));
                }
                Row::Tested(test)
            }
        };
        rows.insert(name, row);
    }
    for scenario in scenarios {
        for (field, _) in scenario.fields(&model) {
            match rows.entry(field.clone()).or_insert_with(|| Row::Works(Vec::new())) {
                Row::Works(by) if by.contains(&scenario.scenario) => {}
                Row::Works(by) => by.push(scenario.scenario.clone()),
                _ => errors.push(format!("{field}: scenario {} proves what fields.yaml says does not work", scenario.scenario)),
            }
        }
    }
    inherit(&model, &mut rows);
    let names: BTreeSet<String> = model.names().collect();
    errors.extend(names.iter().filter(|name| !rows.contains_key(*name)).map(|name| format!("{name}: the field has no row")));
    errors.extend(rows.keys().filter(|name| !names.contains(*name)).map(|name| format!("{name}: the row has no field")));
    let in_guest: BTreeSet<String> = scenarios.iter().filter(|s| s.guest.is_some()).map(|s| s.scenario.clone()).collect();
    if !in_guest.is_empty() && !runs_in_guest() {
        errors.push("e2e/vm-tests does not run the scenarios of the guest".to_owned());
    }
    if errors.is_empty() { Ok(Table { model, rows, in_guest }) } else { Err(errors) }
}

/// Whether the guest's tests are those of the scenarios too.
fn runs_in_guest() -> bool {
    let text = fs::read_to_string(folder().join("../vm-tests")).unwrap_or_default();
    text.lines().any(|line| line.starts_with("e2e conformance"))
}

/// Whether `path::function` names a test of the workspace.
fn is_test(name: &str) -> bool {
    let Some((path, function)) = name.rsplit_once("::") else { return false };
    let text = fs::read_to_string(folder().join("../..").join(path)).unwrap_or_default();
    text.contains(&format!("fn {function}("))
}

/// The fields of a type that is only found in fields that are refused or meaningless go with those.
fn inherit(model: &Model, rows: &mut BTreeMap<String, Row>) {
    loop {
        let mut added = false;
        for name in model.types.keys() {
            let holders: Vec<String> = model.names().filter(|field| model.child(field) == Some(name)).collect();
            let stops = |field: &String| matches!(rows.get(field), Some(Row::Refused(_) | Row::Meaningless(_) | Row::With(_)));
            if holders.is_empty() || !holders.iter().all(stops) {
                continue;
            }
            let parent = match &rows[&holders[0]] {
                Row::With(parent) => parent.clone(),
                _ => holders[0].clone(),
            };
            for field in model.types[name].keys().map(|field| format!("{name}.{field}")) {
                if let std::collections::btree_map::Entry::Vacant(free) = rows.entry(field) {
                    free.insert(Row::With(parent.clone()));
                    added = true;
                }
            }
        }
        if !added {
            return;
        }
    }
}

/// A path to each field that does not lead through one that is refused or meaningless.
fn reachable(model: &Model, rows: &BTreeMap<String, Row>) -> BTreeMap<String, String> {
    let example = sample::<PodSpec>();
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    let mut queue = std::collections::VecDeque::from([("PodSpec".to_owned(), "spec".to_owned(), &example)]);
    while let Some((parent, path, value)) = queue.pop_front() {
        for field in model.types[&parent].keys() {
            let name = format!("{parent}.{field}");
            let Some(value) = value.get(field).filter(|_| !found.contains_key(&name)) else { continue };
            let below = format!("{path}.{field}");
            found.insert(name.clone(), below.clone());
            let open = matches!(rows.get(&name), Some(Row::Works(_)));
            if let Some(child) = model.child(&name).filter(|_| open) {
                let (value, below) = match value {
                    Value::Array(list) => (&list[0], format!("{below}[0]")),
                    value => (value, below),
                };
                queue.push_back((child.to_owned(), below, value));
            }
        }
    }
    found
}

/// A small pod that has the field at `path`, with a value of its type.
#[must_use]
pub fn pod_with(name: &str, path: &str) -> Value {
    let example = json!({"spec": sample::<PodSpec>()});
    let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {"containers": [{"name": "c", "image": "berth.test/busybox:1"}]}});
    let (mut from, mut to) = (&example, &mut pod);
    let segments: Vec<&str> = path.split('.').collect();
    for (i, segment) in segments.iter().enumerate() {
        let (field, listed) = segment.strip_suffix("[0]").map_or((*segment, false), |field| (field, true));
        from = &from[field];
        let map = to.as_object_mut().expect("a path leads through maps");
        if i + 1 == segments.len() {
            map.insert(field.to_owned(), from.clone());
            break;
        }
        to = map.entry(field.to_owned()).or_insert_with(|| if listed { json!([{}]) } else { Value::Object(Map::new()) });
        if listed {
            (from, to) = (&from[0], &mut to[0]);
            let element = to.as_object_mut().expect("lists on a path hold maps");
            if from.get("name").is_some_and(Value::is_string) {
                element.entry("name").or_insert_with(|| "x".into());
            }
        }
    }
    pod
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> Model {
        let mut model = Model::default();
        model.add::<PodSpec>();
        model
    }

    #[test]
    fn a_field_without_a_row_and_a_row_without_a_field_are_named() {
        let written = BTreeMap::from([
            ("PodSpec.volumes".to_owned(), Written::Refused("no".to_owned())),
            ("PodSpec.noSuchField".to_owned(), Written::Meaningless("no".to_owned())),
        ]);
        let errors = join(model(), &[], written).unwrap_err();
        assert!(errors.contains(&"PodSpec.noSuchField: the row has no field".to_owned()));
        assert!(errors.contains(&"PodSpec.hostname: the field has no row".to_owned()));
        // Volumes are refused, so what they hold is too.
        assert!(!errors.iter().any(|e| e.starts_with("RBDVolumeSource.")), "{errors:?}");
    }

    #[test]
    fn a_field_that_nothing_shows_is_no_row() {
        let row = serde_json::from_value::<Written>(json!({"unproven": "no scenario yet"}));
        assert!(row.unwrap_err().to_string().starts_with("unknown variant"));
    }

    #[test]
    fn a_pod_is_made_for_any_path() {
        let pod = pod_with("a", "spec.volumes[0].rbd");
        assert_eq!(pod["spec"]["volumes"][0]["name"], "x");
        assert!(pod["spec"]["volumes"][0]["rbd"]["image"].is_string());
        let pod = pod_with("a", "spec.containers[0].securityContext.windowsOptions");
        assert!(pod["spec"]["containers"][0]["securityContext"]["windowsOptions"].is_object());
        assert_eq!(pod["spec"]["containers"][0]["name"], "c");
    }
}
