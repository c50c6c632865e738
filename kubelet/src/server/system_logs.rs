//! `/logs/`: the files of the machine's log folder, and `?query=` for the log of a service or file there. Never leaves the
//! folder, whatever a path or a link says. The journal is not read: services that log only there are refused by name.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use bytes::Bytes;
use futures::StreamExt;
use http::{Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, ResolveFlags};
use tokio_stream::wrappers::ReceiverStream;

use super::query::{self, first};
use super::{Api, Body, plain, respond as respond_with, text};

/// Of one file: a piece that is read and sent at once.
const PIECE: usize = 32 * 1024;
/// The upstream's limits of a query.
const SERVICES: usize = 4;
const LINES: usize = 100_000;
/// What a query keeps in memory: more than a person reads, little of a small machine's.
const BYTES: usize = 4 << 20;

/// A file, a folder's list, or what a query finds.
pub(super) async fn respond(api: &Api, parts: &[&str], query: Option<&str>) -> Response<Body> {
    let settings = &api.config.server;
    if !settings.system_log_handler {
        return text(StatusCode::METHOD_NOT_ALLOWED, "logs endpoint is disabled.\n");
    }
    if parts.is_empty() {
        return text(StatusCode::NOT_FOUND, "404 page not found\n");
    }
    let pairs = query::pairs(query);
    let root = settings.system_logs.clone();
    if first(&pairs, "query").is_some() {
        if !settings.system_log_query {
            return text(StatusCode::BAD_REQUEST, "query: enableSystemLogQuery is off\n");
        }
        return match Query::of(&pairs) {
            Ok(query) => run(move || query.run(&root)).await,
            Err(problem) => text(StatusCode::BAD_REQUEST, problem),
        };
    }
    let path: Vec<String> = parts.iter().map(|part| query::decode(&part.replace('+', "%2B"))).collect();
    run(move || show(&root, &path.join("/"))).await
}

/// Something to answer with.
enum Found {
    File(File),
    Folder(String),
    Lines(Vec<u8>),
}

async fn run(find: impl FnOnce() -> Result<Found, (StatusCode, String)> + Send + 'static) -> Response<Body> {
    match tokio::task::spawn_blocking(find).await {
        Ok(Ok(Found::File(file))) => send(file),
        Ok(Ok(Found::Folder(html))) => respond_with(StatusCode::OK, "text/html; charset=utf-8", html),
        Ok(Ok(Found::Lines(lines))) => plain(Full::new(Bytes::from(lines)).map_err(|e| match e {}).boxed_unsync()),
        Ok(Err((status, problem))) => text(status, problem),
        Err(_) => text(StatusCode::INTERNAL_SERVER_ERROR, "the look-up was abandoned\n"),
    }
}

fn send(mut file: File) -> Response<Body> {
    let (sender, receiver) = tokio::sync::mpsc::channel::<io::Result<Bytes>>(2);
    tokio::spawn(async move {
        // A thread reads one piece and waits for nobody: a client that is slow waits here.
        while let Ok(room) = sender.reserve().await {
            let read = tokio::task::spawn_blocking(move || {
                let mut piece = vec![0; PIECE];
                let read = file.read(&mut piece);
                let piece = read.map(|length| {
                    piece.truncate(length);
                    Bytes::from(piece)
                });
                (file, piece)
            });
            let Ok((back, read)) = read.await else { return };
            file = back;
            match read {
                Ok(piece) if piece.is_empty() => return,
                Ok(piece) => room.send(Ok(piece)),
                Err(error) => return room.send(Err(error)),
            }
        }
    });
    plain(BodyExt::boxed_unsync(StreamBody::new(ReceiverStream::new(receiver).map(|piece| piece.map(Frame::data)))))
}

/// Opens what is below the folder and nothing else: links may lead anywhere inside it.
fn open_below(root: &Path, path: &str) -> io::Result<(OwnedFd, FileType)> {
    let folder = rustix::fs::openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let path = if path.is_empty() { "." } else { path };
    // Without blocking: a named pipe in the folder must not hold anybody.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::openat2(&folder, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
    Ok((fd, kind))
}

fn show(root: &Path, path: &str) -> Result<Found, (StatusCode, String)> {
    let missing = || (StatusCode::NOT_FOUND, "404 page not found\n".to_owned());
    let (fd, kind) = open_below(root, path.trim_end_matches('/')).map_err(|_| missing())?;
    match kind {
        FileType::RegularFile => Ok(Found::File(File::from(fd))),
        FileType::Directory => list(fd).map(Found::Folder).map_err(|_| missing()),
        _ => Err(missing()),
    }
}

fn list(fd: OwnedFd) -> io::Result<String> {
    let mut names = Vec::new();
    for entry in Dir::new(fd)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(if entry.file_type() == FileType::Directory { format!("{name}/") } else { name });
        }
    }
    names.sort();
    let line = |name: &String| format!("<a href=\"{}\">{}</a>\n", href(name), escape(name));
    Ok(format!("<!doctype html>\n<pre>\n{}</pre>\n", names.iter().map(line).collect::<String>()))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&#34;")
}

fn href(name: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.~/".contains(&b);
    name.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// A node log query.
#[derive(Debug, PartialEq, Eq)]
struct Query {
    names: Vec<String>,
    lines: Option<usize>,
    pattern: Option<String>,
}

impl Query {
    fn of(pairs: &[(String, String)]) -> Result<Query, String> {
        let mut query = Query { names: Vec::new(), lines: None, pattern: None };
        for (name, value) in pairs {
            match name.as_str() {
                "query" if value.is_empty() => return Err("query: empty\n".to_owned()),
                "query" => query.names.push(value.clone()),
                "tailLines" => {
                    let lines = value.parse().ok().filter(|n| *n <= LINES);
                    query.lines =
                        Some(lines.ok_or_else(|| format!("tailLines: {value:?} is not a number of at most {LINES}\n"))?);
                }
                "pattern" if value.chars().any(|c| r".^$*+?()[]{}|\".contains(c)) => {
                    return Err(format!("pattern: {value:?}: only plain text is searched for, no regular expression\n"));
                }
                "pattern" => query.pattern = Some(value.clone()),
                "sinceTime" | "untilTime" | "boot" => {
                    return Err(format!("{name}: only the journal has it, which this kubelet does not read\n"));
                }
                other => return Err(format!("{other}: unknown parameter\n")),
            }
        }
        let files = query.names.iter().filter(|name| is_file(name)).count();
        match (files, query.names.len()) {
            (0, services) if services > SERVICES => Err(format!("query: at most {SERVICES} services\n")),
            (0, _) | (1, 1) => Ok(query),
            _ => Err("query: one file, or services\n".to_owned()),
        }
    }

    fn run(&self, root: &Path) -> Result<Found, (StatusCode, String)> {
        let mut out = Vec::new();
        for name in &self.names {
            let candidates = if is_file(name) {
                vec![name.trim_start_matches('/').to_owned()]
            } else {
                // Where services log that do not use the journal.
                vec![name.clone(), format!("{name}.log"), format!("{name}/{name}.log")]
            };
            let opened = candidates.iter().filter_map(|path| open_below(root, path).ok());
            let Some((fd, _)) = opened.into_iter().find(|(_, kind)| *kind == FileType::RegularFile) else {
                let problem = format!("{name}: no such file in the log folder, and the journal is not read\n");
                return Err((StatusCode::NOT_FOUND, problem));
            };
            let read = self.read(File::from(fd), &mut out);
            let is_whole = read.map_err(|e| (StatusCode::INTERNAL_SERVER_ERROR, format!("{name}: {e}\n")))?;
            if !is_whole {
                let most = BYTES >> 20;
                let problem =
                    format!("{name}: the lines are more than {most} MiB: ask for fewer with tailLines, or for the file\n");
                return Err((StatusCode::BAD_REQUEST, problem));
            }
        }
        Ok(Found::Lines(out))
    }

    /// The last matching lines; without a number, as many as the largest allowed. Whether they are all there: not when they
    /// are more than is kept in memory.
    fn read(&self, file: File, out: &mut Vec<u8>) -> io::Result<bool> {
        let wanted = self.lines.unwrap_or(LINES);
        let room = BYTES.saturating_sub(out.len());
        let mut kept = std::collections::VecDeque::new();
        let (mut bytes, mut found) = (0, 0);
        let mut reader = BufReader::new(file);
        loop {
            let mut line = Vec::new();
            if reader.by_ref().take(1 << 20).read_until(b'\n', &mut line)? == 0 {
                break;
            }
            let matches = |pattern: &String| line.windows(pattern.len().max(1)).any(|w| w == pattern.as_bytes());
            if !self.pattern.as_ref().is_none_or(matches) {
                continue;
            }
            found += 1;
            // What a line takes of memory is more than its text.
            bytes += line.len() + size_of::<Vec<u8>>();
            line.shrink_to_fit();
            kept.push_back(line);
            while kept.len() > wanted || bytes > room {
                let Some(line) = kept.pop_front() else { break };
                bytes -= line.len() + size_of::<Vec<u8>>();
            }
        }
        let is_whole = kept.len() == found.min(wanted);
        kept.into_iter().for_each(|line| out.extend(line));
        Ok(is_whole)
    }
}

/// A name with a slash is a file's, as upstream.
fn is_file(name: &str) -> bool {
    name.contains(['/', '\\'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("log")).unwrap();
        std::fs::create_dir(root.path().join("log/sub")).unwrap();
        std::fs::write(root.path().join("secret"), "no").unwrap();
        std::fs::write(root.path().join("log/a.log"), "one\ntwo\nthree\n").unwrap();
        std::fs::write(root.path().join("log/sub/<b>"), "x").unwrap();
        std::os::unix::fs::symlink("../secret", root.path().join("log/out")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.path().join("log/far")).unwrap();
        root
    }

    #[test]
    fn files_and_folders_are_shown_and_nothing_outside() {
        let root = folder();
        let log = root.path().join("log");
        let see = |path: &str| match show(&log, path) {
            Ok(Found::File(mut file)) => {
                let mut text = String::new();
                file.read_to_string(&mut text).unwrap();
                text
            }
            Ok(Found::Folder(html)) => html,
            Ok(Found::Lines(_)) => unreachable!(),
            Err((status, _)) => status.as_str().to_owned(),
        };
        assert_eq!(see("a.log"), "one\ntwo\nthree\n");
        assert!(see("").contains("<a href=\"sub/\">sub/</a>"));
        assert!(see("sub/").contains("<a href=\"%3Cb%3E\">&lt;b&gt;</a>"));
        for path in ["../secret", "out", "far", "none", "sub/../../secret"] {
            assert_eq!(see(path), "404", "{path}");
        }
    }

    #[test]
    fn a_client_that_does_not_read_a_file_holds_no_thread() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
        let root = folder();
        std::fs::write(root.path().join("large"), vec![b'x'; 100 * PIECE]).unwrap();
        let file = File::open(root.path().join("large")).unwrap();
        let left = runtime.block_on(async {
            let mut response = send(file);
            response.body_mut().frame().await.unwrap().unwrap();
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            tokio::time::timeout(std::time::Duration::from_secs(20), tokio::task::spawn_blocking(|| ())).await
        });
        assert!(left.is_ok(), "the only thread waits for the client");
    }

    #[test]
    fn queries_find_files_and_say_what_they_cannot() {
        let root = folder();
        let log = root.path().join("log");
        let ask = |query: &str| {
            let query = Query::of(&query::pairs(Some(query)))?;
            match query.run(&log) {
                Ok(Found::Lines(lines)) => Ok(String::from_utf8(lines).unwrap()),
                Ok(_) => unreachable!(),
                Err((_, problem)) => Err(problem),
            }
        };
        assert_eq!(ask("query=a&tailLines=2").unwrap(), "two\nthree\n");
        assert_eq!(ask("query=%2Fa.log&pattern=o").unwrap(), "one\ntwo\n");
        let line = format!("{}\n", "x".repeat(1023));
        std::fs::write(log.join("long"), line.repeat(5000)).unwrap();
        assert_eq!(ask("query=long&tailLines=3000").unwrap().len(), 3000 * 1024);
        for (query, word) in [
            ("query=kubelet", "journal"),
            ("query=a&sinceTime=x", "sinceTime"),
            ("query=a&pattern=a.*", "pattern"),
            ("query=a&tailLines=100001", "tailLines"),
            ("query=a&x=1", "x:"),
            ("query=/a&query=b", "one file"),
            ("query=a&query=b&query=c&query=d&query=e", "at most 4"),
            ("query=../secret", "no such file"),
            ("query=long", "more than 4 MiB"),
            ("query=long&query=long&tailLines=3000", "more than 4 MiB"),
        ] {
            let problem = ask(query).unwrap_err();
            assert!(problem.contains(word), "{query}: {problem}");
        }
    }
}
