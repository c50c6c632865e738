//! `/containerLogs/{namespace}/{pod}/{container}`: which log is meant, and what of it. Reading it is [`log_reader`]'s.

use std::sync::Arc;

use http::{Response, StatusCode};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use k8s_openapi::jiff::Timestamp;

use super::log_reader::{self, Filter, Log};
use super::query;
use super::{Api, Body, text};
use crate::pod::PodUid;
use crate::{logs, pod};

/// What of a log is wanted.
#[derive(Debug, Default, PartialEq)]
struct Options {
    previous: bool,
    filter: Filter,
}

/// The log as asked for.
pub(super) async fn respond(api: &Api, namespace: &str, pod: &str, container: &str, query: Option<&str>) -> Response<Body> {
    let options = match parse_query(query, api.config.clock.now()) {
        Ok(options) => options,
        Err((status, message)) => return text(status, message),
    };
    let pods = api.table.list();
    let found = pods.iter().rev().find(|p| pod::name(p) == pod && pod::namespace(p) == namespace);
    let Some(found) = found else {
        return text(StatusCode::NOT_FOUND, format!("pod {pod:?} does not exist\n"));
    };
    let attempt = match choose_attempt(found, container, options.previous) {
        Ok(attempt) => attempt,
        Err((status, message)) => return text(status, message),
    };
    let folder = logs::pod_log_dir(&api.config.pod_logs_dir, found);
    let log = Log { path: folder.join(logs::relative_log_path(container, attempt)), attempt };
    let (table, uid, name) = (api.table.clone(), PodUid::of(found), container.to_owned());
    let runs = move || {
        let status = uid.as_ref().and_then(|uid| table.status(uid));
        status.as_ref().and_then(|s| status_of(s, &name)).is_some_and(|s| is_running(s, attempt))
    };
    match log_reader::stream(log, options.filter, Arc::new(runs), api.stop.clone()).await {
        Ok(body) => super::plain(body),
        Err(problem) => text(StatusCode::BAD_REQUEST, problem),
    }
}

type Refusal = (StatusCode, String);

fn parse_query(query: Option<&str>, now: Timestamp) -> Result<Options, Refusal> {
    let mut options = Options::default();
    let filter = &mut options.filter;
    let bad = |name: &str| (StatusCode::BAD_REQUEST, format!("unable to decode query: {name}\n"));
    let invalid = || (StatusCode::UNPROCESSABLE_ENTITY, "{\"message\": \"Invalid request.\"}".to_owned());
    let truth = |value: &str| matches!(value, "true" | "1" | "");
    for (name, value) in query::pairs(query) {
        match name.as_str() {
            "previous" => options.previous = truth(&value),
            "timestamps" => filter.timestamps = truth(&value),
            "follow" => filter.follow = truth(&value),
            "tail" if value == "all" => {}
            "tailLines" | "tail" => {
                let lines: i64 = value.parse().map_err(|_| bad(&name))?;
                filter.tail = Some(usize::try_from(lines).map_err(|_| invalid())?);
            }
            "limitBytes" => {
                let bytes: i64 = value.parse().map_err(|_| bad(&name))?;
                filter.limit_bytes = Some(u64::try_from(bytes).ok().filter(|b| *b > 0).ok_or_else(invalid)?);
            }
            "sinceSeconds" if filter.since.is_none() => {
                let seconds: i64 = value.parse().map_err(|_| bad(&name))?;
                if seconds < 1 {
                    return Err(invalid());
                }
                filter.since = Some(back(now, seconds));
            }
            "sinceTime" if filter.since.is_none() => filter.since = Some(value.parse().map_err(|_| bad(&name))?),
            "stream" => match value.as_str() {
                "" | "All" => filter.only = None,
                "Stdout" => filter.only = Some("stdout"),
                "Stderr" => filter.only = Some("stderr"),
                _ => return Err(invalid()),
            },
            _ => return Err(invalid()),
        }
    }
    Ok(options)
}

/// Some seconds before now; before all time where that is not a time any more.
fn back(now: Timestamp, seconds: i64) -> Timestamp {
    Timestamp::from_second(now.as_second().saturating_sub(seconds)).unwrap_or(Timestamp::MIN)
}

fn status_of<'a>(status: &'a k8s_openapi::api::core::v1::PodStatus, container: &str) -> Option<&'a ContainerStatus> {
    let all = [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses];
    all.into_iter().flatten().flatten().find(|s| s.name == container)
}

fn is_running(status: &ContainerStatus, attempt: u32) -> bool {
    let running = status.state.as_ref().is_some_and(|s| s.running.is_some());
    running && u32::try_from(status.restart_count).is_ok_and(|count| count == attempt)
}

/// Which attempt's log to show: the running one, the ended one, or the last ended one of a waiting container.
fn choose_attempt(pod: &Pod, container: &str, previous: bool) -> Result<u32, Refusal> {
    let name = pod::name(pod);
    let status = pod.status.clone().unwrap_or_default();
    let bad = |message: String| Err((StatusCode::BAD_REQUEST, message));
    let Some(found) = status_of(&status, container) else {
        if pod::container(pod, container).is_some() {
            return bad(format!("container {container:?} in pod {name:?} is not available\n"));
        }
        return Err((StatusCode::NOT_FOUND, format!("container {container:?} not found in pod {name:?}\n")));
    };
    let count = u32::try_from(found.restart_count).unwrap_or(0);
    let ended_before = |s: &ContainerStatus| s.last_state.as_ref().is_some_and(|l| l.terminated.is_some());
    let waiting = found.state.as_ref().and_then(|s| s.waiting.as_ref());
    if previous {
        return match (waiting, ended_before(found)) {
            (Some(_), true) => Ok(count),
            (None, true) => Ok(count.saturating_sub(1)),
            _ => bad(format!("previous terminated container {container:?} in pod {name:?} not found\n")),
        };
    }
    match waiting {
        None => Ok(count),
        Some(_) if ended_before(found) => Ok(count),
        Some(waiting) => {
            let why = match waiting.reason.as_deref() {
                Some("ErrImagePull") => ": image can't be pulled",
                Some("ImagePullBackOff") => ": trying and failing to pull image",
                Some(reason) if !reason.is_empty() => &format!(": {reason}"),
                _ => " - no logs yet",
            };
            bad(format!("container {container:?} in pod {name:?} is waiting to start{why}\n"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_options_are_read_and_wrong_ones_refused() {
        let now = Timestamp::from_second(100).unwrap();
        let all = "follow=true&previous=1&timestamps=true&tailLines=3&limitBytes=9&sinceTime=1970-01-01T00%3A00%3A10%2B00%3A00&stream=Stderr";
        let filter = Filter {
            follow: true,
            timestamps: true,
            tail: Some(3),
            limit_bytes: Some(9),
            since: Some(Timestamp::from_second(10).unwrap()),
            only: Some("stderr"),
        };
        assert_eq!(parse_query(Some(all), now), Ok(Options { previous: true, filter }));
        assert_eq!(parse_query(Some("tail=all&stream=All"), now), Ok(Options::default()));
        for (query, status) in [
            ("tailLines=x", StatusCode::BAD_REQUEST),
            ("sinceTime=yesterday", StatusCode::BAD_REQUEST),
            ("tailLines=-1", StatusCode::UNPROCESSABLE_ENTITY),
            ("limitBytes=0", StatusCode::UNPROCESSABLE_ENTITY),
            ("sinceSeconds=0", StatusCode::UNPROCESSABLE_ENTITY),
            ("sinceSeconds=1&sinceTime=1970-01-01T00:00:00Z", StatusCode::UNPROCESSABLE_ENTITY),
            ("stream=Both", StatusCode::UNPROCESSABLE_ENTITY),
        ] {
            assert_eq!(parse_query(Some(query), now).unwrap_err().0, status, "{query}");
        }
    }

    #[test]
    fn a_container_without_a_log_says_why() {
        let pod = |state: &str, count: u32| -> Pod {
            serde_json::from_value(serde_json::json!({
                "metadata": {"name": "web"},
                "spec": {"containers": [{"name": "c"}, {"name": "late"}]},
                "status": {"containerStatuses": [{
                    "name": "c", "image": "", "imageID": "", "ready": false, "restartCount": count,
                    "state": serde_json::from_str::<serde_json::Value>(state).unwrap(),
                }]},
            }))
            .unwrap()
        };
        let waiting = |reason: &str| format!("{{\"waiting\": {{\"reason\": \"{reason}\"}}}}");
        let choose = |state: &str, name: &str, previous| {
            choose_attempt(&pod(state, 2), name, previous).map_err(|(status, text)| (status.as_u16(), text.trim_end().to_owned()))
        };
        let running = "{\"running\": {}}";
        assert_eq!(choose(running, "c", false), Ok(2));
        for (state, name, previous, status, text) in [
            (
                waiting("ContainerCreating").as_str(),
                "c",
                false,
                400,
                "container \"c\" in pod \"web\" is waiting to start: ContainerCreating",
            ),
            (
                &waiting("ErrImagePull"),
                "c",
                false,
                400,
                "container \"c\" in pod \"web\" is waiting to start: image can't be pulled",
            ),
            (
                &waiting("ImagePullBackOff"),
                "c",
                false,
                400,
                "container \"c\" in pod \"web\" is waiting to start: trying and failing to pull image",
            ),
            (&waiting(""), "c", false, 400, "container \"c\" in pod \"web\" is waiting to start - no logs yet"),
            (running, "c", true, 400, "previous terminated container \"c\" in pod \"web\" not found"),
            (running, "late", false, 400, "container \"late\" in pod \"web\" is not available"),
            (running, "x", false, 404, "container \"x\" not found in pod \"web\""),
        ] {
            assert_eq!(choose(state, name, previous), Err((status, text.to_owned())));
        }
    }
}
