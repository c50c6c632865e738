//! A container's log file as plain text: the wanted lines, and with `follow` what comes, over rotations, until the
//! container has ended. Files are read on threads that may block; between the reads nothing waits but an inotify.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use k8s_openapi::jiff::Timestamp;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::Body;
use super::log_watch::LogWatch;

/// Lines are sent in pieces of about this size.
const PIECE: usize = 16 * 1024;
/// An entry longer than this is no CRI log entry; it is passed on in parts.
const LONGEST: usize = 1 << 20;
/// How often a follower looks whether the container still runs.
const LOOK: Duration = Duration::from_secs(1);

/// Which file.
#[derive(Clone, Debug)]
pub(super) struct Log {
    pub(super) path: PathBuf,
    pub(super) attempt: u32,
}

/// Which of its lines, and how.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Filter {
    pub(super) follow: bool,
    pub(super) timestamps: bool,
    pub(super) tail: Option<usize>,
    pub(super) limit_bytes: Option<u64>,
    pub(super) since: Option<Timestamp>,
    /// `stdout` or `stderr` alone.
    pub(super) only: Option<&'static str>,
}

/// The wanted lines as a body. `runs` tells whether the container can still write.
pub(super) async fn stream(
    log: Log,
    filter: Filter,
    runs: Arc<dyn Fn() -> bool + Send + Sync>,
    stop: CancellationToken,
) -> Result<Body, String> {
    let follow = filter.follow;
    // Before the first read, so that nothing falls between the two.
    let watch = if follow { log.path.parent().map(LogWatch::new) } else { None };
    let opened = tokio::task::spawn_blocking(move || {
        let path = log.path.display().to_string();
        Reader::open(log, filter).map_err(|e| format!("failed to open log file {path:?}: {e}\n"))
    });
    let reader = opened.await.map_err(|e| e.to_string())??;
    let (sender, receiver) = mpsc::channel::<io::Result<Bytes>>(4);
    tokio::spawn(async move {
        tokio::select! {
            () = pump(reader, watch, runs, &sender) => {}
            () = stop.cancelled() => {}
        }
    });
    Ok(BodyExt::boxed_unsync(StreamBody::new(ReceiverStream::new(receiver).map(|chunk| chunk.map(Frame::data)))))
}

async fn pump(
    mut reader: Reader,
    mut watch: Option<LogWatch>,
    runs: Arc<dyn Fn() -> bool + Send + Sync>,
    sender: &mpsc::Sender<io::Result<Bytes>>,
) {
    loop {
        // Asked before reading: what was written before the end is then read for certain.
        let more_may_come = watch.is_some() && runs();
        loop {
            // A thread reads one piece and waits for nobody: a client that is slow waits here.
            let Ok(room) = sender.reserve().await else { return };
            let read = tokio::task::spawn_blocking(move || {
                let outcome = reader.next();
                (reader, outcome)
            });
            let Ok((back, outcome)) = read.await else { return };
            reader = back;
            match outcome {
                Ok(Next::Piece(piece)) => room.send(Ok(Bytes::from(piece))),
                Ok(Next::AtEnd) => break,
                Ok(Next::Enough) => return,
                Err(error) => return room.send(Err(error)),
            }
        }
        let Some(watch) = watch.as_mut().filter(|_| more_may_come) else { return };
        tokio::select! {
            () = watch.changed() => {}
            () = tokio::time::sleep(LOOK) => {}
            () = sender.closed() => return,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// There may be more.
    Piece(Vec<u8>),
    /// All that is there has been given.
    AtEnd,
    /// Nobody wants more.
    Enough,
}

/// A place in a log that grows and is rotated.
#[derive(Debug)]
struct Reader {
    log: Log,
    filter: Filter,
    file: BufReader<File>,
    inode: u64,
    /// Whole lines still to be left out.
    skip: usize,
    left: u64,
    /// An entry whose end has not been written yet.
    entry: Vec<u8>,
    /// The last entry was a part: the next one goes on with its line.
    open: bool,
    out: Vec<u8>,
    /// What the writer went on with, while the rest of the file before it is read.
    newer: Option<File>,
}

impl Reader {
    fn open(log: Log, filter: Filter) -> io::Result<Reader> {
        let mut file = File::open(&log.path)?;
        let skip = match filter.tail {
            Some(tail) => count_lines(BufReader::new(&file), filter.only)?.saturating_sub(tail),
            None => 0,
        };
        file.rewind()?;
        let (inode, left) = (file.metadata()?.ino(), filter.limit_bytes.unwrap_or(u64::MAX));
        let file = BufReader::with_capacity(PIECE, file);
        Ok(Reader { log, filter, file, inode, skip, left, entry: Vec::new(), open: false, out: Vec::new(), newer: None })
    }

    /// The next piece, of this file or of those that follow it.
    fn next(&mut self) -> io::Result<Next> {
        loop {
            match self.read_file()? {
                Next::AtEnd => {}
                given => return Ok(given),
            }
            if let Some(file) = self.newer.take() {
                self.inode = file.metadata()?.ino();
                self.file = BufReader::with_capacity(PIECE, file);
                self.entry.clear();
                continue;
            }
            if !self.filter.follow {
                return Ok(Next::AtEnd);
            }
            // Nobody writes to the old file once there is a new one: what it holds now is all, and is read first.
            self.newer = self.successor();
            if self.newer.is_none() {
                return Ok(Next::AtEnd);
            }
        }
    }

    fn read_file(&mut self) -> io::Result<Next> {
        loop {
            if self.left == 0 {
                return Ok(Next::Enough);
            }
            let room = LONGEST.saturating_sub(self.entry.len()) as u64;
            let read = self.file.by_ref().take(room).read_until(b'\n', &mut self.entry)?;
            let whole = self.entry.last() == Some(&b'\n') || self.entry.len() >= LONGEST;
            if whole {
                let entry = std::mem::take(&mut self.entry);
                self.take(&entry);
                self.entry = entry;
                self.entry.clear();
            }
            let full = self.out.len() as u64 >= self.left;
            if (self.out.len() >= PIECE || full || read == 0) && !self.out.is_empty() {
                self.out.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
                self.left -= self.out.len() as u64;
                return Ok(Next::Piece(std::mem::take(&mut self.out)));
            }
            if read == 0 {
                return Ok(Next::AtEnd);
            }
        }
    }

    /// Adds an entry to what is given, if it is wanted.
    fn take(&mut self, entry: &[u8]) {
        let Some(Entry { time, stream, full, content }) = split(entry) else { return };
        if self.filter.only.is_some_and(|only| only != stream) {
            return;
        }
        let begins = !std::mem::replace(&mut self.open, !full);
        if self.skip > 0 {
            self.skip -= usize::from(full);
            return;
        }
        if let Some(since) = self.filter.since
            && !time.parse::<Timestamp>().is_ok_and(|t| t >= since)
        {
            return;
        }
        if self.filter.timestamps && begins {
            push_time(&mut self.out, time);
            self.out.push(b' ');
        }
        self.out.extend_from_slice(content);
        if full {
            self.out.push(b'\n');
        }
    }

    /// The file that the writer went on with; none while this is the newest. One that was rotated away in the meantime is
    /// among the kept ones, and those after it come before the newest.
    fn successor(&self) -> Option<File> {
        let newest = File::open(&self.log.path).ok()?;
        if newest.metadata().ok()?.ino() == self.inode {
            return None;
        }
        let kept = rotated(&self.log);
        let ours = kept.iter().position(|path| fs::metadata(path).is_ok_and(|m| m.ino() == self.inode));
        // A file that is gone was the oldest: all that are kept are newer.
        let after = ours.map_or(0, |at| at + 1);
        kept.get(after).and_then(|path| File::open(path).ok()).or(Some(newest))
    }
}

/// The rotated files of this attempt, the oldest first: their names sort by age.
fn rotated(log: &Log) -> Vec<PathBuf> {
    let prefix = format!("{}.log.", log.attempt);
    let is_rotated = |name: &OsString| {
        let name = name.to_string_lossy();
        name.starts_with(&prefix) && !name.ends_with(".gz") && !name.ends_with(".tmp")
    };
    let folder = log.path.parent().unwrap_or(Path::new("/"));
    let names = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let mut names: Vec<OsString> = names.filter(is_rotated).collect();
    names.sort();
    names.into_iter().map(|name| folder.join(name)).collect()
}

/// A line that is not finished counts.
fn count_lines(mut reader: impl BufRead, only: Option<&str>) -> io::Result<usize> {
    let (mut count, mut entry, mut open) = (0, Vec::new(), false);
    while reader.by_ref().take(LONGEST as u64).read_until(b'\n', &mut entry)? > 0 {
        if let Some(Entry { full, stream, .. }) = split(&entry)
            && only.is_none_or(|only| only == stream)
        {
            count += usize::from(full);
            open = !full;
        }
        entry.clear();
    }
    Ok(count + usize::from(open))
}

struct Entry<'a> {
    time: &'a str,
    stream: &'a str,
    full: bool,
    content: &'a [u8],
}

/// `2026-01-01T00:00:00.000000000Z stdout F content`.
fn split(line: &[u8]) -> Option<Entry<'_>> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut parts = line.splitn(4, |b| *b == b' ');
    let time = str::from_utf8(parts.next()?).ok()?;
    let stream = str::from_utf8(parts.next()?).ok()?;
    let full = parts.next()?.first() == Some(&b'F');
    Some(Entry { time, stream, full, content: parts.next()? })
}

/// With nine digits behind the second, as the upstream prints it: some runtimes leave zeros out.
fn push_time(out: &mut Vec<u8>, time: &str) {
    let end = time.rfind(['Z', '+', '-']).filter(|at| *at > 10).unwrap_or(time.len());
    let (clock, zone) = time.split_at(end);
    let (seconds, fraction) = clock.split_once('.').unwrap_or((clock, ""));
    out.extend_from_slice(format!("{seconds}.{fraction:0<9}{zone}").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "1970-01-01T00:00:10.000000000Z stdout F one\n1970-01-01T00:01:30.5Z stdout P tw\n1970-01-01T00:01:30.000000000Z stdout F o\n1970-01-01T00:01:31.000000000Z stderr F three  x\n";

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Folder {
            Folder(tempfile::tempdir().unwrap())
        }
        fn log(&self) -> Log {
            Log { path: self.0.path().join("0.log"), attempt: 0 }
        }
        fn write(&self, text: &str) {
            use std::io::Write;
            let mut options = fs::OpenOptions::new();
            options.append(true).create(true).open(self.log().path).unwrap().write_all(text.as_bytes()).unwrap();
        }
        fn rotate(&self, suffix: &str) {
            fs::rename(self.log().path, self.0.path().join(format!("0.log.{suffix}"))).unwrap();
        }
    }

    fn read_on(reader: &mut Reader) -> String {
        let mut out = Vec::new();
        while let Next::Piece(piece) = reader.next().unwrap() {
            out.extend(piece);
        }
        String::from_utf8(out).unwrap()
    }

    fn read(filter: Filter) -> String {
        let folder = Folder::new();
        folder.write(LOG);
        read_on(&mut Reader::open(folder.log(), filter).unwrap())
    }

    #[test]
    fn lines_are_joined_cut_and_stamped() {
        let tail = |n| Filter { tail: Some(n), ..Filter::default() };
        assert_eq!(read(Filter::default()), "one\ntwo\nthree  x\n");
        assert_eq!(read(tail(2)), "two\nthree  x\n");
        assert_eq!(read(tail(0)), "");
        assert_eq!(read(Filter { since: Timestamp::from_second(80).ok(), ..Filter::default() }), "two\nthree  x\n");
        assert_eq!(
            read(Filter { timestamps: true, ..tail(2) }),
            "1970-01-01T00:01:30.500000000Z two\n1970-01-01T00:01:31.000000000Z three  x\n"
        );
        assert_eq!(read(Filter { limit_bytes: Some(6), ..Filter::default() }), "one\ntw");
        assert_eq!(read(Filter { only: Some("stderr"), ..Filter::default() }), "three  x\n");
        assert_eq!(read(Filter { only: Some("stdout"), ..tail(1) }), "two\n");
    }

    #[test]
    fn a_follower_loses_nothing_over_rotations_that_it_did_not_see() {
        let folder = Folder::new();
        let line = |n: u32| format!("1970-01-01T00:00:10.000000000Z stdout F {n}\n");
        folder.write(&line(0));
        let mut reader = Reader::open(folder.log(), Filter { follow: true, ..Filter::default() }).unwrap();
        assert_eq!(read_on(&mut reader), "0\n");
        folder.write(&line(1)[..20]);
        assert_eq!(read_on(&mut reader), "");
        folder.write(&line(1)[20..]);
        for n in 2..6 {
            folder.rotate(&format!("19700101-00000{n}"));
            assert!(reader.successor().is_none(), "between rename and open nothing is known to be new");
            folder.write(&line(n));
        }
        folder.write(&line(6));
        assert_eq!(read_on(&mut reader), "1\n2\n3\n4\n5\n6\n");
        folder.rotate("19700101-000009");
        folder.write(&line(7));
        assert_eq!(read_on(&mut reader), "7\n");
    }

    #[test]
    fn a_follower_whose_file_is_gone_goes_on_with_the_oldest_that_is_kept() {
        let folder = Folder::new();
        folder.write(LOG);
        let mut reader = Reader::open(folder.log(), Filter { follow: true, tail: Some(0), ..Filter::default() }).unwrap();
        assert_eq!(read_on(&mut reader), "");
        fs::remove_file(folder.log().path).unwrap();
        folder.write("1970-01-01T00:00:10.000000000Z stdout F a\n");
        folder.rotate("19700101-000001");
        folder.write("1970-01-01T00:00:10.000000000Z stdout F b\n");
        assert_eq!(read_on(&mut reader), "a\nb\n");
    }

    #[test]
    fn a_client_that_does_not_read_holds_no_thread() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
        let folder = Folder::new();
        folder.write(&LOG.repeat(20_000));
        let left = runtime.block_on(async {
            let body = stream(folder.log(), Filter::default(), Arc::new(|| false), CancellationToken::new()).await.unwrap();
            let mut body = std::pin::pin!(body);
            body.frame().await.unwrap().unwrap();
            // As many more as the way holds.
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            tokio::time::timeout(Duration::from_secs(20), tokio::task::spawn_blocking(|| ())).await
        });
        assert!(left.is_ok(), "the only thread waits for the client");
    }

    #[tokio::test]
    async fn a_follow_ends_when_the_container_has_and_all_is_read() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let folder = Folder::new();
        folder.write("1970-01-01T00:00:10.000000000Z stdout F a\n");
        let running = Arc::new(AtomicBool::new(true));
        let runs = running.clone();
        let filter = Filter { follow: true, ..Filter::default() };
        let body = stream(folder.log(), filter, Arc::new(move || runs.load(Ordering::SeqCst)), CancellationToken::new());
        let mut body = body.await.unwrap();
        let mut next = async || {
            let frame = tokio::time::timeout(Duration::from_secs(60), body.frame()).await.unwrap();
            frame.map(|f| String::from_utf8(f.unwrap().into_data().unwrap().to_vec()).unwrap())
        };
        assert_eq!(next().await.as_deref(), Some("a\n"));
        folder.write("1970-01-01T00:00:10.000000000Z stdout F b\n");
        assert_eq!(next().await.as_deref(), Some("b\n"));
        folder.write("1970-01-01T00:00:10.000000000Z stdout F c\n");
        running.store(false, Ordering::SeqCst);
        assert_eq!(next().await.as_deref(), Some("c\n"));
        assert_eq!(next().await, None);
    }
}
