//! Runs scenarios on a node, many pods at once: each as it is, and once more for each field that it proves, with the field taken
//! out; then its expectation must not hold. Waits for what the status says, with bounds.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use berth_testkit::sandbox::NODE_IP;
use berth_testkit::{patience, wait_until};
use serde_json::Value;

use super::scenario::{Expect, Names, Scenario, at};
use crate::crictl::Crictl;
use crate::node::{Berth, is_running};
use crate::{output, text, try_output};

/// Pods at a time: more only wait for each other.
const WINDOW: usize = 12;
/// Below the ports that the kernel gives out by itself.
const FIRST_PORT: u16 = 20_000;
/// How many looks in a row a verdict takes.
const LOOKS: u32 = 3;
/// How long a scenario may take; more where the processor is emulated.
const PATIENCE: Duration = Duration::from_secs(90);
/// How long a pod without the field may run on: what ends a pod with it does so much sooner.
const VARIANT: Duration = Duration::from_secs(7);

/// One pod to run.
struct Job<'s> {
    names: Names,
    scenario: &'s Scenario,
    without: Option<&'s str>,
    text: String,
}

struct Active<'s> {
    job: Job<'s>,
    since: Instant,
    started: Option<Instant>,
    attached: bool,
    edited: bool,
    /// How often the same was seen: what a log or a status says may come one after the other.
    looks: u32,
}

/// What one look at a pod says.
enum Verdict {
    Wait,
    Done,
    Failed(String),
}

/// Runs scenarios on a berth with a kubelet.
pub struct Runner<'b> {
    berth: &'b Berth,
    crictl: Crictl,
    registry: String,
    probed: PathBuf,
}

impl<'b> Runner<'b> {
    /// `crictl` speaks to the runtime of the pods; `registry` is the address of one that wants a password; `probed` is the program
    /// demo-probed.
    #[must_use]
    pub fn new(berth: &'b Berth, crictl: Crictl, registry: String, probed: &Path) -> Self {
        Self { berth, crictl, registry, probed: probed.to_owned() }
    }

    /// Runs all scenarios, with `removals` also without each field, and returns what was wrong.
    pub fn run(&self, scenarios: &[&Scenario], removals: bool) -> Vec<String> {
        let (jobs, mut failures) = self.jobs(scenarios, removals);
        let mut queue = VecDeque::from(jobs);
        let mut active: Vec<Active<'_>> = Vec::new();
        let bound = Duration::from_secs(900);
        let ended = wait_until(bound, || {
            while active.len() < WINDOW
                && let Some(job) = queue.pop_front()
            {
                self.berth.write_manifest(&format!("{}.yaml", job.names.name), &job.text);
                active.push(Active { job, since: Instant::now(), started: None, attached: false, edited: false, looks: 0 });
            }
            let pods = self.pods();
            active.retain_mut(|one| {
                let verdict = self.look(one, pods.get(&one.job.names.name));
                if let Verdict::Failed(why) = &verdict {
                    failures.push(why.clone());
                }
                if !matches!(verdict, Verdict::Wait) {
                    self.berth.remove_manifest(&format!("{}.yaml", one.job.names.name));
                }
                matches!(verdict, Verdict::Wait)
            });
            active.is_empty() && queue.is_empty()
        });
        if !ended {
            failures.push(format!("{} pods were not looked at in {bound:?}", active.len() + queue.len()));
        }
        failures
    }

    /// The pods to run. What is refused without a field is not run: that is its proof, where the scenario says so.
    fn jobs<'s>(&self, scenarios: &[&'s Scenario], removals: bool) -> (Vec<Job<'s>>, Vec<String>) {
        let mut jobs = Vec::new();
        let plans = self.berth.dir.dir("plans");
        let mut job = |scenario: &'s Scenario, name: String, without: Option<&'s str>| {
            let names = self.names(name, jobs.len());
            if let Some(command) = &scenario.prepare {
                output(Command::new("sh").args(["-ec", &names.fill_in(command)]));
            }
            let text = scenario.manifest(&names, without, false);
            fs::write(plans.join(format!("{}.yaml", names.name)), &text).unwrap();
            jobs.push(Job { names, scenario, without, text });
        };
        for scenario in scenarios {
            job(scenario, scenario.scenario.clone(), None);
            if removals {
                for (i, path) in scenario.proves.iter().chain(&scenario.required).enumerate() {
                    job(scenario, format!("{}-{i}", scenario.scenario), Some(path));
                }
            }
        }
        let refused = self.refused(&plans);
        let mut failures = Vec::new();
        jobs.retain(|job| {
            let required = job.without.is_some_and(|path| job.scenario.required.iter().any(|r| r == path));
            match refused.get(&job.names.name) {
                Some(_) if required => false,
                Some(why) => {
                    failures.push(format!("{}{}: refused: {why}", job.scenario.scenario, without(job.without)));
                    false
                }
                None if required => {
                    failures.push(format!("{}{}: not refused", job.scenario.scenario, without(job.without)));
                    false
                }
                None => true,
            }
        });
        (jobs, failures)
    }

    fn names(&self, name: String, number: usize) -> Names {
        let dir = self.berth.dir.dir(&format!("pods/{name}"));
        let namespace = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().display().to_string();
        Names {
            name,
            dir,
            port: FIRST_PORT + u16::try_from(number).unwrap(),
            node_ip: NODE_IP.to_owned(),
            registry: self.registry.clone(),
            namespaces: ["pid", "ipc", "net"].map(namespace).join("\n"),
            probed: self.probed.clone(),
        }
    }

    /// The first error of each manifest that `berth plan` refuses, by name.
    fn refused(&self, folder: &Path) -> BTreeMap<String, String> {
        let out = try_output(&mut self.berth.verb(&["plan", "--node-name", "e2e", &folder.to_string_lossy()]));
        let prefix = format!("error: {}/", folder.display());
        let mut refused = BTreeMap::new();
        // A pod that lacks an object is no refused one: it waits.
        let told = text(&out.stderr);
        for line in told.lines().filter(|l| !l.ends_with("the pod waits for it")).filter_map(|l| l.strip_prefix(&prefix)) {
            let name = line.split(".yaml").next().unwrap_or_default();
            refused.entry(name.to_owned()).or_insert_with(|| line.to_owned());
        }
        refused
    }

    fn pods(&self) -> BTreeMap<String, Value> {
        let name = |pod: &Value| pod["metadata"]["name"].as_str().and_then(|n| n.strip_suffix("-e2e")).map(str::to_owned);
        self.berth.pods().into_iter().filter_map(|pod| Some((name(&pod)?, pod))).collect()
    }

    fn look(&self, one: &mut Active<'_>, pod: Option<&Value>) -> Verdict {
        let scenario = one.job.scenario;
        let waited = one.since.elapsed();
        let nothing = Value::Null;
        let pod = pod.unwrap_or(&nothing);
        let begun = pod["status"]["phase"].as_str().is_some_and(|phase| phase != "Pending");
        if begun || waited > VARIANT * 3 {
            one.started.get_or_insert_with(Instant::now);
        }
        self.attach(one, pod);
        if !scenario.edit.is_empty() && !one.edited {
            if !is_running(pod) && waited < PATIENCE * patience() {
                return Verdict::Wait;
            }
            one.edited = true;
            // What a field brings about counts from here on.
            one.started = Some(Instant::now());
            let text = scenario.manifest(&one.job.names, one.job.without, true);
            self.berth.write_manifest(&format!("{}.yaml", one.job.names.name), &text);
            return Verdict::Wait;
        }
        if !is_settled(scenario, pod) && waited < PATIENCE * patience() && one.started.is_none_or(|t| t.elapsed() < VARIANT) {
            return Verdict::Wait;
        }
        let wrong = self.wrong(&one.job, pod);
        // What a field brings about must come in time; what must not hold without it must not hold for good.
        if one.job.without.is_none() && wrong.is_some() && waited < PATIENCE * patience() {
            return Verdict::Wait;
        }
        one.looks += 1;
        match (one.job.without, wrong) {
            _ if one.looks < LOOKS => Verdict::Wait,
            (None, None) | (Some(_), Some(_)) => Verdict::Done,
            (None, Some(why)) => Verdict::Failed(format!("{}: {why}\nstatus: {}", scenario.scenario, pod["status"])),
            (Some(path), None) => Verdict::Failed(format!("{}: holds without {path}", scenario.scenario)),
        }
    }

    /// Types what the scenario says, once, when the container runs.
    fn attach(&self, one: &mut Active<'_>, pod: &Value) {
        let Some(attach) = one.job.scenario.attach.as_ref().filter(|_| !one.attached) else { return };
        let Some(id) = container(pod, &attach.container).filter(|c| !c["state"]["running"].is_null()).and_then(id_of) else {
            return;
        };
        one.attached = true;
        let mut command = self.crictl.command(&["attach", "-i", &id]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let _ = child.stdin.take().unwrap().write_all(attach.input.as_bytes());
        // It ends with its input, or with the container; the sandbox ends what is left.
        std::thread::spawn(move || child.wait());
    }

    /// The first part of the expectation that does not hold.
    fn wrong(&self, job: &Job<'_>, pod: &Value) -> Option<String> {
        let expect = &job.scenario.expect;
        let fill = |text: &str| job.names.fill_in(text);
        if pod.is_null() {
            return Some("there is no such pod".to_owned());
        }
        for (path, wanted) in &expect.status {
            let found = at(&pod["status"], path).unwrap_or(&Value::Null);
            if !is_like(found, wanted, &fill) {
                return Some(format!("status.{path} is {found}, not {wanted}"));
            }
        }
        for (container, wanted) in &expect.log {
            let found = self.log(pod, container);
            if found.trim_end() != fill(wanted).trim_end() {
                return Some(format!("the log of {container} is {found:?}, not {:?}", fill(wanted)));
            }
        }
        for (file, wanted) in &expect.host {
            let found = fs::read_to_string(fill(file)).unwrap_or_else(|e| e.to_string());
            if found.trim_end() != fill(wanted).trim_end() {
                return Some(format!("{file} holds {found:?}, not {wanted:?}"));
            }
        }
        self.cri_wrong(expect, pod, &fill)
    }

    fn cri_wrong(&self, expect: &Expect, pod: &Value, fill: &dyn Fn(&str) -> String) -> Option<String> {
        for (container, values) in &expect.cri {
            let told = if container.is_empty() {
                let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
                let id = self.crictl.run(&["pods", "-q", "--label", &format!("io.kubernetes.pod.uid={uid}")]);
                self.crictl.attempt(&["inspectp", "-o", "json", id.lines().next().unwrap_or("none")])
            } else {
                let id = self::container(pod, container).and_then(id_of).unwrap_or_default();
                self.crictl.attempt(&["inspect", "-o", "json", &id])
            };
            let told: Value = serde_json::from_slice(&told.stdout).unwrap_or_default();
            for (path, wanted) in values {
                let found = at(&told, path).unwrap_or(&Value::Null);
                if !is_like(found, wanted, fill) {
                    return Some(format!("the runtime's {path} is {found}, not {wanted}"));
                }
            }
        }
        None
    }

    /// The log of a container's last run, from its file.
    fn log(&self, pod: &Value, container: &str) -> String {
        let metadata = &pod["metadata"];
        let part = |key: &str| metadata[key].as_str().unwrap_or_default();
        let folder = format!("logs/{}_{}_{}/{container}", part("namespace"), part("name"), part("uid"));
        let files = fs::read_dir(self.berth.dir.path().join(folder)).into_iter().flatten().flatten().map(|e| e.path());
        let logs: BTreeSet<PathBuf> = files.filter(|p| p.extension().is_some_and(|e| e == "log")).collect();
        let bytes = logs.last().and_then(|path| fs::read(path).ok()).unwrap_or_default();
        let mut log = String::new();
        for line in text(&bytes).lines() {
            // TIME STREAM F|P TEXT
            let mut parts = line.splitn(4, ' ').skip(2);
            let (tag, content) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            log.push_str(content);
            if tag == "F" {
                log.push('\n');
            }
        }
        log
    }
}

fn container<'p>(pod: &'p Value, name: &str) -> Option<&'p Value> {
    pod["status"]["containerStatuses"].as_array()?.iter().find(|status| status["name"] == name)
}

/// `berth://ID` as the runtime knows it.
fn id_of(status: &Value) -> Option<String> {
    Some(status["containerID"].as_str()?.split_once("://")?.1.to_owned())
}

fn without(path: Option<&str>) -> String {
    path.map(|path| format!(" without {path}")).unwrap_or_default()
}

fn is_settled(scenario: &Scenario, pod: &Value) -> bool {
    let ended = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    let told = |(path, wanted): (&String, &Value)| {
        is_like(at(&pod["status"], path).unwrap_or(&Value::Null), wanted, &|text| text.to_owned())
    };
    ended || !scenario.settled.is_empty() && scenario.settled.iter().all(told)
}

/// `~part`, `*` for anything, or the value itself.
fn is_like(found: &Value, wanted: &Value, fill: &dyn Fn(&str) -> String) -> bool {
    match wanted {
        Value::String(wanted) if wanted == "*" => !found.is_null(),
        Value::String(wanted) => match (wanted.strip_prefix('~'), found) {
            (Some(part), Value::String(found)) => found.contains(&fill(part)),
            (Some(part), found) => found.to_string().contains(&fill(part)),
            (None, found) => *found == Value::String(fill(wanted)),
        },
        wanted => found == wanted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_compared_as_said() {
        let same = |found: Value, wanted: Value| is_like(&found, &wanted, &|t| t.replace("${NAME}", "n"));
        assert!(same(json!("a-n-b"), json!("~${NAME}")) && same(json!(3), json!(3)) && same(json!("x"), json!("*")));
        assert!(!same(json!(null), json!("*")) && !same(json!("an"), json!("n")) && same(json!(null), json!(null)));
    }
}
