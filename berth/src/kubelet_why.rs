//! Why a pod is as it is, in the kubelet's words: its status, what keeps it from going on, and manifests that were refused. Pure:
//! what was asked of the kubelet comes in, answers come out.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// What the kubelet answers to `/problems`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Problems {
    /// Manifests that it refuses, in words.
    pub problems: Vec<String>,
    /// What keeps pods from going on, by UID.
    pub pods: BTreeMap<String, Trouble>,
    /// What it is doing for containers, by their pods' UIDs.
    pub doing: BTreeMap<String, Doing>,
}

/// What keeps a pod from going on.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Trouble {
    /// In one word.
    pub reason: String,
    /// In words.
    pub message: String,
}

/// What the kubelet is doing for a pod's containers, and has done to them, that no status has.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Doing {
    /// Images under way, by container.
    pub pulling: BTreeMap<String, Pull>,
    /// By container ID: the probe that had it stopped.
    pub condemned: BTreeMap<String, String>,
}

/// An image that is being pulled.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Pull {
    /// As the pod names it.
    pub image: String,
    /// Since when, RFC 3339.
    pub since: String,
}

/// A container of a pod as the kubelet sees it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Container {
    /// Its name.
    pub name: String,
    /// `waiting`, `running` or `terminated`.
    pub state: String,
    /// The kubelet's reason; may be empty.
    pub reason: String,
    /// The kubelet's message; may be empty.
    pub message: String,
    /// How often it was started anew.
    pub restarts: i64,
    /// In a crash back-off: in how many seconds it is started again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub starts_in_seconds: Option<i64>,
    /// What the kubelet is doing for it, or why it is being stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub doing: Option<String>,
    /// How the run before ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_exit: Option<String>,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodWhy {
    /// "pod", or "manifest" for one that was refused.
    pub kind: &'static str,
    /// `namespace/name`; of a manifest nothing.
    pub name: String,
    /// The pod's UID.
    pub id: String,
    /// Its phase, or `Terminating`; `Refused` for a manifest.
    pub state: String,
    /// What keeps it from going on; may be empty.
    pub reason: String,
    /// The same in words; of a manifest: file, line and what is wrong there.
    pub message: String,
    /// Always "kubelet".
    pub source: &'static str,
    /// Its containers, init containers first.
    pub containers: Vec<Container>,
}

impl std::fmt::Display for PodWhy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.kind == "manifest" {
            return write!(f, "manifest refused by the kubelet: {}", self.message);
        }
        write!(f, "pod {} {}\n  state:      {}", self.name, self.id, self.state)?;
        let why = joined(&self.reason, &self.message);
        if !why.is_empty() {
            write!(f, "\n  kubelet:    {why}")?;
        }
        for c in &self.containers {
            let why = joined(&c.reason, &c.message);
            let why = if why.is_empty() { why } else { format!(", {why}") };
            write!(f, "\n  container:  {} {}{why}", c.name, c.state)?;
            if let Some(doing) = &c.doing {
                write!(f, "; {doing}")?;
            }
            if let Some(seconds) = c.starts_in_seconds {
                write!(f, "; starts again in {seconds} s")?;
            }
            if let Some(last) = &c.last_exit {
                write!(f, "; its last run {last}")?;
            }
            if c.restarts > 0 {
                write!(f, "; restarts: {}", c.restarts)?;
            }
        }
        Ok(())
    }
}

fn joined(reason: &str, message: &str) -> String {
    match (reason.is_empty(), message.is_empty()) {
        (false, false) => format!("{reason}: {message}"),
        _ => format!("{reason}{message}"),
    }
}

fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    value.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

/// A duration as Go prints it: "1m20s", "10s".
fn go_duration(text: &str) -> Option<Duration> {
    let (mut seconds, mut digits) = (0, String::new());
    for c in text.chars() {
        let unit = match c {
            '0'..='9' => {
                digits.push(c);
                continue;
            }
            'h' => 3600,
            'm' => 60,
            's' => 1,
            _ => return None,
        };
        seconds += std::mem::take(&mut digits).parse::<u64>().ok()? * unit;
    }
    digits.is_empty().then_some(Duration::from_secs(seconds))
}

/// When a container in a crash back-off starts again: its end and the pause that the kubelet names.
fn starts_in(status: &Value, now: OffsetDateTime) -> Option<i64> {
    let waiting = status.pointer("/state/waiting").filter(|w| text(w, "/reason") == "CrashLoopBackOff")?;
    let pause = text(waiting, "/message").strip_prefix("back-off ")?.split(' ').next().and_then(go_duration)?;
    let ended = OffsetDateTime::parse(text(status, "/lastState/terminated/finishedAt"), &Rfc3339).ok()?;
    Some((ended + pause - now).whole_seconds().max(0))
}

/// What had a run stopped, in words.
fn condemned(by: &str) -> String {
    format!("{by} {}", if by == "postStart" { "hook" } else { "probe" })
}

/// The probe, or the hook, that had the run stopped that a state or status names by its container's id.
fn condemned_by<'a>(doing: Option<&'a Doing>, of: &Value) -> Option<&'a str> {
    let id = text(of, "/containerID").rsplit('/').next()?;
    doing?.condemned.get(id).map(String::as_str)
}

/// What the kubelet does for a container, or to it, at this moment.
fn doing_for(status: &Value, doing: Option<&Doing>, now: OffsetDateTime) -> Option<String> {
    if let Some(Pull { image, since }) = doing.and_then(|d| d.pulling.get(text(status, "/name"))) {
        let age = OffsetDateTime::parse(since, &Rfc3339).map_or(0, |at| (now - at).whole_seconds().max(0));
        return Some(format!("pulling {image} since {since} ({age} s)"));
    }
    status.pointer("/state/running")?;
    let what = condemned(condemned_by(doing, status)?);
    Some(format!("it failed its {what} and is being stopped"))
}

fn container(status: &Value, doing: Option<&Doing>, now: OffsetDateTime) -> Container {
    let state = ["waiting", "running", "terminated"].into_iter().find(|s| status.pointer(&format!("/state/{s}")).is_some());
    let state = state.unwrap_or("waiting");
    let of = |field: &str| text(status, &format!("/state/{state}/{field}")).to_owned();
    let exit = |of: &Value| {
        let code = of.get("exitCode").and_then(Value::as_i64).unwrap_or_default();
        let probe =
            condemned_by(doing, of).map(|by| format!(", stopped because its {} failed", condemned(by))).unwrap_or_default();
        format!("ended with {code} ({}) at {}{probe}", text(of, "/reason"), text(of, "/finishedAt"))
    };
    Container {
        name: text(status, "/name").to_owned(),
        state: state.to_owned(),
        reason: of("reason"),
        message: of("message"),
        restarts: status.get("restartCount").and_then(Value::as_i64).unwrap_or_default(),
        starts_in_seconds: starts_in(status, now),
        doing: doing_for(status, doing, now),
        last_exit: status.pointer("/lastState/terminated").map(exit),
    }
}

/// Whether a pod is meant: by its name, `namespace/name`, one of its containers, its UID, or a container's id.
fn is_meant(pod: &Value, wanted: &str) -> bool {
    let (namespace, name, uid) = (text(pod, "/metadata/namespace"), text(pod, "/metadata/name"), text(pod, "/metadata/uid"));
    let full = format!("{namespace}/{name}");
    let of_container = |prefix: &str| wanted.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('/'));
    // The shortest beginning of an id that the runtime takes.
    let by_id = wanted.len() >= 4
        && (uid.starts_with(wanted)
            || statuses(pod).any(|s| text(s, "/containerID").rsplit('/').next().is_some_and(|id| id.starts_with(wanted))));
    wanted == name || wanted == full || of_container(name) || of_container(&full) || by_id
}

fn statuses(pod: &Value) -> impl Iterator<Item = &Value> {
    ["initContainerStatuses", "containerStatuses", "ephemeralContainerStatuses"]
        .into_iter()
        .filter_map(|key| pod.pointer(&format!("/status/{key}")).and_then(Value::as_array))
        .flatten()
}

/// The condition of a pod that has not got the resources it is to have.
pub fn resize(pod: &Value) -> Option<&Value> {
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array)?;
    let is_pending = |c: &&Value| text(c, "/type") == "PodResizePending";
    let has_failed = |c: &&Value| text(c, "/type") == "PodResizeInProgress" && text(c, "/reason") == "Error";
    conditions.iter().filter(|c| text(c, "/status") == "True").find(|c| is_pending(c) || has_failed(c))
}

/// Why it has not.
pub fn resize_message(pod: &Value) -> String {
    resize(pod).map_or(String::new(), |condition| joined(text(condition, "/reason"), text(condition, "/message")))
}

fn pod_why(pod: &Value, problems: &Problems, now: OffsetDateTime) -> PodWhy {
    let uid = text(pod, "/metadata/uid");
    let trouble = problems.pods.get(uid).cloned().unwrap_or_default();
    let doing = problems.doing.get(uid);
    let either = |first: &str, second: &str| if first.is_empty() { second.to_owned() } else { first.to_owned() };
    let of_resize = |field: &str| resize(pod).map_or("", |condition| text(condition, field));
    let otherwise = |told: String, of: &str| either(&told, of);
    PodWhy {
        kind: "pod",
        name: format!("{}/{}", text(pod, "/metadata/namespace"), text(pod, "/metadata/name")),
        id: uid.to_owned(),
        state: match text(pod, "/metadata/deletionTimestamp") {
            "" => either(text(pod, "/status/phase"), "Pending"),
            _ => "Terminating".to_owned(),
        },
        reason: otherwise(either(text(pod, "/status/reason"), &trouble.reason), of_resize("/type")),
        message: otherwise(either(text(pod, "/status/message"), &trouble.message), &resize_message(pod)),
        source: "kubelet",
        containers: statuses(pod).map(|status| container(status, doing, now)).collect(),
    }
}

fn refused(problem: &str) -> PodWhy {
    PodWhy {
        kind: "manifest",
        name: String::new(),
        id: String::new(),
        state: "Refused".to_owned(),
        reason: String::new(),
        message: problem.to_owned(),
        source: "kubelet",
        containers: Vec::new(),
    }
}

/// What the kubelet says of `wanted`. `pods` are the list that it serves, `problems` what it says keeps it from doing as told. A
/// refused manifest is meant by its file's name or by what the refusal names.
pub fn explain(pods: &Value, problems: &Problems, wanted: &str, now: OffsetDateTime) -> Vec<PodWhy> {
    let items = pods.get("items").and_then(Value::as_array).into_iter().flatten();
    let mut answers: Vec<PodWhy> = items.filter(|pod| is_meant(pod, wanted)).map(|pod| pod_why(pod, problems, now)).collect();
    // A pod runs on as it was when its manifest is refused: then both are told.
    let name = wanted.rsplit('/').next().unwrap_or(wanted);
    // A warning refuses nothing.
    let refusals = problems.problems.iter().filter(|problem| !problem.starts_with(berth_kubelet::WARNING));
    let told = refusals.filter(|problem| !name.is_empty() && problem.contains(name));
    answers.extend(told.map(|problem| refused(problem)));
    answers
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn now() -> OffsetDateTime {
        OffsetDateTime::parse("2026-01-01T00:01:00Z", &Rfc3339).expect("a time")
    }

    fn problems(answer: Value) -> Problems {
        serde_json::from_value(answer).expect("an answer to /problems")
    }

    fn pod(status: Value) -> Value {
        json!({"items": [{"metadata": {"name": "web-e2e", "namespace": "default", "uid": "0f8fad5b"}, "status": status}]})
    }

    #[test]
    fn a_crash_back_off_says_how_long_it_still_lasts() {
        let status = json!({"phase": "Running", "containerStatuses": [{"name": "app", "restartCount": 4,
            "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 1m20s restarting failed container=app pod=web"}},
            "lastState": {"terminated": {"exitCode": 3, "reason": "Error", "finishedAt": "2026-01-01T00:00:30Z"}}}]});
        let answers = explain(&pod(status), &Problems::default(), "web-e2e", now());
        assert_eq!(answers[0].containers[0].starts_in_seconds, Some(50));
        let text = answers[0].to_string();
        for part in ["CrashLoopBackOff: back-off 1m20s", "starts again in 50 s", "ended with 3 (Error)", "restarts: 4"] {
            assert!(text.contains(part), "{text}");
        }
        for (text, want) in [("10s", Some(10)), ("5m0s", Some(300)), ("1h1s", Some(3601)), ("x", None), ("10", None)] {
            assert_eq!(go_duration(text).map(|d| d.as_secs()), want, "{text}");
        }
    }

    #[test]
    fn a_pull_under_way_and_the_probe_that_ended_a_run_are_named() {
        let told = |status: Value, doing: Value| {
            let status = json!({"phase": "Pending", "containerStatuses": [status]});
            explain(&pod(status), &problems(json!({"doing": {"0f8fad5b": doing}})), "web-e2e", now())[0].to_string()
        };
        let waits = json!({"name": "app", "state": {"waiting": {"reason": "ContainerCreating"}}});
        let text = told(waits, json!({"pulling": {"app": {"image": "r.example/big:1", "since": "2026-01-01T00:00:30Z"}}}));
        assert!(
            text.contains("app waiting, ContainerCreating; pulling r.example/big:1 since 2026-01-01T00:00:30Z (30 s)"),
            "{text}"
        );
        let condemned = json!({"condemned": {"cafe1": "liveness"}});
        let runs = json!({"name": "app", "containerID": "berth://cafe1", "state": {"running": {}}});
        let text = told(runs, condemned.clone());
        assert!(text.contains("app running; it failed its liveness probe and is being stopped"), "{text}");
        let again = json!({"name": "app", "containerID": "berth://cafe2", "restartCount": 1, "state": {"running": {}},
            "lastState": {"terminated": {"exitCode": 137, "reason": "Error", "finishedAt": "t", "containerID": "berth://cafe1"}}});
        let text = told(again, condemned);
        assert!(
            text.contains("app running; its last run ended with 137 (Error) at t, stopped because its liveness probe failed"),
            "{text}"
        );
        let hooked = json!({"name": "app", "containerID": "berth://cafe2", "state": {"waiting": {}},
            "lastState": {"terminated": {"exitCode": 137, "reason": "Error", "finishedAt": "t", "containerID": "berth://cafe1"}}});
        let text = told(hooked, json!({"condemned": {"cafe1": "postStart"}}));
        assert!(text.contains("stopped because its postStart hook failed"), "{text}");
    }

    #[test]
    fn a_resize_that_has_no_room_is_told() {
        let status = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"},
            {"type": "PodResizePending", "status": "True", "reason": "Infeasible", "message": "Node didn't have enough capacity"}]});
        let text = explain(&pod(status), &problems(json!({})), "web-e2e", now())[0].to_string();
        assert!(text.contains("PodResizePending: Infeasible: Node didn't have enough capacity"), "{text}");
    }

    #[test]
    fn what_keeps_a_whole_pod_from_going_on_is_told_with_it() {
        let trouble = json!({"reason": "FailedMount", "message": "configmap \"c\" not found"});
        let problems = problems(json!({"problems": [], "pods": {"0f8fad5b": trouble}, "doing": {}}));
        let answers = explain(&pod(json!({"phase": "Pending"})), &problems, "default/web-e2e", now());
        assert!(answers[0].to_string().contains("kubelet:    FailedMount: configmap \"c\" not found"), "{}", answers[0]);
    }

    #[test]
    fn a_pod_is_meant_by_name_container_or_id_and_a_refused_manifest_by_its_file() {
        let pods = pod(json!({"phase": "Running", "containerStatuses": [{"name": "app", "containerID": "berth://cafe1234"}]}));
        let told =
            json!({"problems": ["/m/bad.yaml:3: spec.foo: unknown", "warning: /m/bad.yaml:3: unknown field: it has no effect"]});
        let problems = problems(told);
        for (wanted, want) in [
            ("web-e2e", 1),
            ("default/web-e2e", 1),
            ("web-e2e/app", 1),
            ("default/web-e2e/app", 1),
            ("cafe", 1),
            ("0f8f", 1),
            ("web", 0),
            ("other/web-e2e", 0),
            ("bad.yaml", 1),
            ("bad", 1),
        ] {
            assert_eq!(explain(&pods, &problems, wanted, now()).len(), want, "{wanted}");
        }
    }
}
