//! `/containerLogs/{namespace}/{pod}/{container}`: the log of a container as plain text. Following a log is not served
//! yet and is refused by name.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::StreamExt;
use http::{Response, StatusCode, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use k8s_openapi::jiff::Timestamp;
use tokio_stream::wrappers::ReceiverStream;

use super::{Api, Body, text};
use crate::logs;

#[derive(Debug, Default, PartialEq)]
struct Options {
    previous: bool,
    timestamps: bool,
    tail: Option<usize>,
    limit_bytes: Option<u64>,
    since: Option<Timestamp>,
}

/// The log as asked for.
pub(crate) async fn respond(api: &Api, namespace: &str, pod: &str, container: &str, query: Option<&str>) -> Response<Body> {
    let options = match parse_query(query.unwrap_or_default(), api.config.clock.now()) {
        Ok(options) => options,
        Err((status, message)) => return text(status, message),
    };
    let pods = api.table.list();
    let found =
        pods.iter().rev().find(|p| p.metadata.name.as_deref() == Some(pod) && p.metadata.namespace.as_deref() == Some(namespace));
    let Some(found) = found else {
        return text(StatusCode::NOT_FOUND, format!("pod {pod:?} does not exist\n"));
    };
    let attempt = match choose_attempt(found, container, options.previous) {
        Ok(attempt) => attempt,
        Err((status, message)) => return text(status, message),
    };
    let folder = logs::pod_log_dir(&api.config.pod_logs_dir, found);
    let path = folder.join(logs::relative_log_path(container, attempt));
    stream(path, options)
}

type Refusal = (StatusCode, String);

fn parse_query(query: &str, now: Timestamp) -> Result<Options, Refusal> {
    let mut options = Options::default();
    let bad = |name: &str| (StatusCode::BAD_REQUEST, format!("unable to decode query: {name}\n"));
    let truth = |value: &str| matches!(value, "true" | "1" | "");
    for pair in query.split('&').filter(|p| !p.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = value.replace("%3A", ":").replace("%3a", ":");
        match name {
            "previous" => options.previous = truth(&value),
            "timestamps" => options.timestamps = truth(&value),
            "follow" if truth(&value) => {
                return Err((StatusCode::NOT_IMPLEMENTED, "follow is not supported yet\n".to_owned()));
            }
            "follow" => {}
            "tailLines" => options.tail = Some(value.parse().map_err(|_| bad(name))?),
            "tail" if value == "all" => {}
            "tail" => options.tail = Some(value.parse().map_err(|_| bad(name))?),
            "limitBytes" => options.limit_bytes = Some(value.parse().map_err(|_| bad(name))?),
            "sinceSeconds" if options.since.is_none() => {
                let seconds: i64 = value.parse().map_err(|_| bad(name))?;
                options.since = Timestamp::from_second(now.as_second().saturating_sub(seconds)).ok();
            }
            "sinceTime" if options.since.is_none() => options.since = Some(value.parse().map_err(|_| bad(name))?),
            _ => return Err((StatusCode::UNPROCESSABLE_ENTITY, "{\"message\": \"Invalid request.\"}".to_owned())),
        }
    }
    Ok(options)
}

/// Which attempt's log to show: the running one, the ended one, or the last ended one of a waiting container.
fn choose_attempt(pod: &Pod, container: &str, previous: bool) -> Result<u32, Refusal> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let status = pod.status.clone().unwrap_or_default();
    let all = status.container_statuses.iter().chain(&status.init_container_statuses).flatten();
    let Some(found) = all.into_iter().find(|s| s.name == container) else {
        return Err((StatusCode::NOT_FOUND, format!("container {container:?} not found in pod {name:?}\n")));
    };
    let bad = |message: String| Err((StatusCode::BAD_REQUEST, message));
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
                Some("ErrImagePull") => "image can't be pulled",
                Some("ImagePullBackOff") => "trying and failing to pull image",
                Some(reason) => reason,
                None => "no logs yet",
            };
            bad(format!("container {container:?} in pod {name:?} is waiting to start: {why}\n"))
        }
    }
}

fn stream(path: PathBuf, options: Options) -> Response<Body> {
    let (sender, receiver) = tokio::sync::mpsc::channel::<std::io::Result<Bytes>>(8);
    tokio::task::spawn_blocking(move || {
        let mut left = options.limit_bytes.unwrap_or(u64::MAX);
        let outcome = read_lines(&path, &options, |mut chunk| {
            let room = usize::try_from(left).unwrap_or(usize::MAX);
            chunk.truncate(room);
            left -= chunk.len() as u64;
            sender.blocking_send(Ok(Bytes::from(chunk))).is_ok() && left > 0
        });
        if let Err(e) = outcome {
            let _ = sender.blocking_send(Err(e));
        }
    });
    let body = StreamBody::new(ReceiverStream::new(receiver).map(|chunk| chunk.map(Frame::data)));
    let mut response = Response::new(BodyExt::boxed_unsync(body));
    let plain = header::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}

/// Gives the wanted lines to `emit` until it says stop.
fn read_lines(path: &Path, options: &Options, mut emit: impl FnMut(Vec<u8>) -> bool) -> std::io::Result<()> {
    let file = File::open(path)?;
    let skip = match options.tail {
        Some(tail) => count_lines(BufReader::new(file.try_clone()?))?.saturating_sub(tail),
        None => 0,
    };
    let mut file = file;
    std::io::Seek::rewind(&mut file)?;
    let mut whole = 0;
    let mut line = Vec::new();
    let mut reader = BufReader::new(file);
    let mut line_start = true;
    loop {
        line.clear();
        if reader.by_ref().take(1 << 20).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let Some((time, full, content)) = split_line(&line) else { continue };
        let wanted = whole >= skip && options.since.is_none_or(|since| time.parse::<Timestamp>().is_ok_and(|t| t >= since));
        whole += usize::from(full);
        let begins = std::mem::replace(&mut line_start, full);
        if !wanted {
            continue;
        }
        let mut chunk = Vec::with_capacity(line.len());
        if options.timestamps && begins {
            chunk.extend_from_slice(time.as_bytes());
            chunk.push(b' ');
        }
        chunk.extend_from_slice(content);
        if full {
            chunk.push(b'\n');
        }
        if !emit(chunk) {
            return Ok(());
        }
    }
}

fn count_lines(mut reader: impl BufRead) -> std::io::Result<usize> {
    let (mut count, mut line, mut open) = (0, Vec::new(), false);
    while reader.read_until(b'\n', &mut line)? > 0 {
        if let Some((_, full, _)) = split_line(&line) {
            count += usize::from(full);
            open = !full;
        }
        line.clear();
    }
    Ok(count + usize::from(open))
}

/// Time, whether the line is complete, content.
fn split_line(line: &[u8]) -> Option<(&str, bool, &[u8])> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut parts = line.splitn(4, |b| *b == b' ');
    let time = str::from_utf8(parts.next()?).ok()?;
    parts.next()?;
    let full = parts.next()?.first() == Some(&b'F');
    Some((time, full, parts.next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(log: &str, query: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        std::fs::write(&path, log).unwrap();
        let options = parse_query(query, Timestamp::from_second(100).unwrap()).unwrap();
        let mut out = Vec::new();
        read_lines(&path, &options, |chunk| {
            out.extend(chunk);
            true
        })
        .unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn lines_are_joined_cut_and_stamped() {
        let log = "1970-01-01T00:00:10.000000000Z stdout F one\n1970-01-01T00:01:30.000000000Z stdout P tw\n1970-01-01T00:01:30.000000000Z stdout F o\n1970-01-01T00:01:31.000000000Z stderr F three  x\n";
        assert_eq!(read(log, ""), "one\ntwo\nthree  x\n");
        assert_eq!(read(log, "tailLines=2"), "two\nthree  x\n");
        assert_eq!(read(log, "tailLines=0"), "");
        assert_eq!(read(log, "sinceSeconds=20"), "two\nthree  x\n");
        assert_eq!(
            read(log, "timestamps=true&tailLines=2"),
            "1970-01-01T00:01:30.000000000Z two\n1970-01-01T00:01:31.000000000Z three  x\n"
        );
    }

    #[test]
    fn wrong_queries_are_refused() {
        let now = Timestamp::UNIX_EPOCH;
        for (query, status) in [
            ("tailLines=x", StatusCode::BAD_REQUEST),
            ("follow=true", StatusCode::NOT_IMPLEMENTED),
            ("sinceSeconds=1&sinceTime=1970-01-01T00:00:00Z", StatusCode::UNPROCESSABLE_ENTITY),
            ("stream=Stderr", StatusCode::UNPROCESSABLE_ENTITY),
        ] {
            assert_eq!(parse_query(query, now).unwrap_err().0, status, "{query}");
        }
    }
}
