//! `berth logs`: the CRI log of a container, as `kubectl logs` prints it; follows over rotations and over the agent's death.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use berth_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use berth_cri_api::v1::{ContainerState, ContainerStatusRequest};
use tonic::transport::Channel;

use crate::{cli, client, find};

/// How often a follower looks for more: what `kubectl logs -f` users perceive as at once.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(100);

/// What is read and written at once.
const BUFFER: usize = 128 << 10;

/// Time, stream, whether it ends a line, content.
type Entry<'a> = (&'a [u8], &'a [u8], bool, &'a [u8]);

/// One entry of a CRI log. Lines that are not in CRI form give none.
fn parse(line: &[u8]) -> Option<Entry<'_>> {
    let mut parts = line.splitn(4, |b| *b == b' ');
    let (time, stream, tag) = (parts.next()?, parts.next()?, parts.next()?);
    let full = tag.split(|b| *b == b':').next() == Some(b"F");
    Some((time, stream, full, parts.next().unwrap_or_default()))
}

/// Entries as text on the two standard outputs: partial ones are joined up to the full one that ends them.
struct Printer<O: Write, E> {
    out: BufWriter<O>,
    err: E,
    timestamps: bool,
    at_start: bool,
}

impl<O: Write, E: Write> Printer<O, E> {
    fn new(out: O, err: E, timestamps: bool) -> Self {
        Self { out: BufWriter::with_capacity(BUFFER, out), err, timestamps, at_start: true }
    }

    fn print(&mut self, line: &[u8]) -> std::io::Result<()> {
        let Some((time, stream, full, content)) = parse(line) else {
            self.at_start = true;
            self.out.write_all(line)?;
            return self.out.write_all(b"\n");
        };
        let time: &[u8] = if self.timestamps && self.at_start { time } else { b"" };
        let gap: &[u8] = if time.is_empty() { b"" } else { b" " };
        let end: &[u8] = if full { b"\n" } else { b"" };
        self.at_start = full;
        if stream == b"stderr" {
            // In the order of the log, where both are one terminal.
            self.out.flush()?;
            return self.err.write_all(&[time, gap, content, end].concat());
        }
        [time, gap, content, end].into_iter().try_for_each(|part| self.out.write_all(part))
    }
}

/// Where the last `lines` full entries begin; or, where that may be in an older file, how many of them are not here.
fn tail(bytes: &[u8], lines: usize) -> Result<usize, usize> {
    let mut left = lines;
    let mut end = bytes.len();
    while end > 0 {
        let start = bytes[..end - 1].iter().rposition(|b| *b == b'\n').map_or(0, |p| p + 1);
        // A partial entry belongs to the full one behind it.
        if parse(&bytes[start..end]).is_none_or(|(_, _, full, _)| full) {
            if left == 0 {
                return Ok(end);
            }
            left -= 1;
        }
        end = start;
    }
    Err(left)
}

/// Goes back from the newest file, over rotations, to where the last `lines` begin. Compressed files are not gone back to.
fn back_to_tail(path: &Path, newest: File, lines: usize) -> std::io::Result<File> {
    let (mut file, mut left) = (newest, lines);
    loop {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        match tail(&bytes, left) {
            Ok(offset) => {
                file.seek(SeekFrom::Start(offset as u64))?;
                return Ok(file);
            }
            Err(missing) => left = missing,
        }
        let Some(older) = older_file(path, &file)? else {
            file.rewind()?;
            return Ok(file);
        };
        file = older;
    }
}

/// The file that was rotated away before this one.
fn older_file(path: &Path, file: &File) -> std::io::Result<Option<File>> {
    let held = id_of(&file.metadata()?);
    let mut older = None;
    for other in rotated(path) {
        // Deleted since it was listed: what is older than that is gone too.
        let Ok(opened) = File::open(&other) else { continue };
        if id_of(&opened.metadata()?) == held {
            break;
        }
        older = Some(opened);
    }
    Ok(older)
}

/// Whether the container may still write. An agent that does not answer says nothing of it: the container runs without one.
async fn may_write(client: &mut RuntimeServiceClient<Channel>, id: &str) -> bool {
    let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
    match client.container_status(request).await {
        Ok(reply) => reply
            .into_inner()
            .status
            .is_some_and(|s| matches!(s.state(), ContainerState::ContainerRunning | ContainerState::ContainerCreated)),
        Err(status) => status.code() != tonic::Code::NotFound,
    }
}

/// What a follower found.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct News {
    /// There was something.
    any: bool,
    /// A file was rotated away for good before it could be read.
    gap: bool,
}

/// A log file and those that came after it. Files are told apart by device and inode: the held one is open, so that its number
/// cannot be another file's.
struct Follower {
    path: PathBuf,
    file: File,
    rest: Vec<u8>,
    /// Rotated files that are not to be read, or have been: names follow the wall clock, which may go back.
    seen: BTreeSet<Seen>,
}

type FileId = (u64, u64);

/// With its birth, where the filesystem knows it: a file that is deleted leaves its number to the next.
type Seen = (FileId, Option<SystemTime>);

fn seen_as(metadata: &std::fs::Metadata) -> Seen {
    (id_of(metadata), metadata.created().ok())
}

fn id_of(metadata: &std::fs::Metadata) -> FileId {
    (metadata.dev(), metadata.ino())
}

impl Follower {
    /// From this file on: what was rotated away before it is of no interest.
    fn new(path: PathBuf, file: File) -> std::io::Result<Follower> {
        let held = id_of(&file.metadata()?);
        let older = rotated(&path).into_iter().filter_map(|path| Some(seen_as(&std::fs::metadata(path).ok()?)));
        let seen = older.take_while(|(id, _)| *id != held).collect();
        Ok(Follower { path, file, rest: Vec::new(), seen })
    }

    /// Reads everything that there is now, over any number of rotations; `take` gets each entry without its line end.
    fn read(&mut self, mut take: impl FnMut(&[u8]) -> std::io::Result<()>) -> std::io::Result<News> {
        let mut news = News::default();
        loop {
            // Asked before reading: what was written before the rename is in the held file by then.
            let next = self.next_file(&mut news.gap)?;
            while self.fill()? > 0 {
                news.any = true;
                let end = self.rest.iter().rposition(|b| *b == b'\n').map_or(0, |p| p + 1);
                let whole = self.rest.get(..end).unwrap_or_default();
                whole.split_inclusive(|b| *b == b'\n').try_for_each(|line| take(line.strip_suffix(b"\n").unwrap_or(line)))?;
                self.rest.drain(..end);
            }
            let Some(next) = next else { return Ok(news) };
            // A line that its writer did not end is ended by the file.
            if !self.rest.is_empty() {
                take(&std::mem::take(&mut self.rest))?;
            }
            self.seen.insert(seen_as(&self.file.metadata()?));
            self.file = next;
        }
    }

    /// Reads on in the held file, a piece; how many bytes it was.
    fn fill(&mut self) -> std::io::Result<u64> {
        Read::by_ref(&mut self.file).take(BUFFER as u64).read_to_end(&mut self.rest).map(|n| n as u64)
    }

    /// The file after the held one, opened; `None` while the held one is the newest.
    fn next_file(&mut self, gap: &mut bool) -> std::io::Result<Option<File>> {
        let held = id_of(&self.file.metadata()?);
        if !std::fs::metadata(&self.path).is_ok_and(|newest| id_of(&newest) != held) {
            // Between the rename and the new file there is none.
            return Ok(None);
        }
        let looked_at = |path: PathBuf| Some((seen_as(&std::fs::metadata(&path).ok()?), path));
        let kept: Vec<(Seen, PathBuf)> = rotated(&self.path).into_iter().filter_map(looked_at).collect();
        self.seen.retain(|seen| kept.iter().any(|(id, _)| id == seen));
        let after = kept.iter().position(|((id, _), _)| *id == held).map(|at| at + 1);
        *gap |= after.is_none();
        // By their names those after it come next; where the clock has gone back, what is new has a name before it.
        let (before, after) = kept.split_at(after.unwrap_or(0));
        let is_next = |(seen, _): &&(Seen, PathBuf)| seen.0 != held && !self.seen.contains(seen);
        let path = after.iter().chain(before).find(is_next).map_or(&self.path, |(_, path)| path);
        match File::open(path) {
            Ok(file) => Ok(Some(file)),
            // Rotated away since it was listed: the next look finds what came of it.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The rotated files of a log, oldest first: their names end in the time. Compressed ones cannot be read on.
fn rotated(path: &Path) -> Vec<PathBuf> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str())) else { return Vec::new() };
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|other| {
            let suffix = other.strip_prefix(name).and_then(|s| s.strip_prefix('.'));
            suffix.is_some_and(|s| s.starts_with(|c: char| c.is_ascii_digit()) && !s.ends_with(".gz") && !s.ends_with(".tmp"))
        })
        .collect();
    names.sort_unstable();
    names.into_iter().map(|name| folder.join(name)).collect()
}

/// Prints the log, and goes on with it when asked to.
#[allow(clippy::print_stderr)]
pub async fn run(socket: &Path, kubelet: &Path, args: &cli::Logs) -> Result<()> {
    let mut client = client::runtime(client::connect(socket).await?);
    let wanted = find::Wanted { name: &args.name, container: args.container.as_deref(), previous: args.previous };
    let found = find::container(&mut client, kubelet, wanted).await?;
    if let Some(note) = found.note {
        eprintln!("{note}");
    }
    let container = found.container;
    let request = ContainerStatusRequest { container_id: container.id.clone(), verbose: false };
    let status = client.container_status(request).await?.into_inner().status.context("the agent sent no status")?;
    if status.log_path.is_empty() {
        bail!("container {} was made without a log", container.id);
    }
    let path = PathBuf::from(status.log_path);
    let mut file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    // -1: all of the newest file, as with kubectl.
    if let Ok(lines) = usize::try_from(args.tail) {
        file = back_to_tail(&path, file, lines).with_context(|| format!("reading {}", path.display()))?;
    }
    let mut follower = Follower::new(path, file)?;
    let mut printer = Printer::new(std::io::stdout(), std::io::stderr(), args.timestamps);
    loop {
        // Asked before reading: whatever a container wrote before it ended is in the file by then.
        let alive = args.follow && may_write(&mut client, &container.id).await;
        let news = follower.read(|line| printer.print(line))?;
        printer.out.flush()?;
        if news.gap {
            eprintln!("berth: the log was rotated faster than it could be read: lines are missing here");
        }
        if !alive {
            return Ok(());
        }
        // A container that logs all the time is read all the time: its files are soon rotated away.
        if !news.any {
            tokio::time::sleep(FOLLOW_INTERVAL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &[u8] = b"2026-01-01T00:00:00.000000000Z stdout F one\n2026-01-01T00:00:00.000000000Z stdout P tw\n\
        2026-01-01T00:00:00.000000000Z stdout F o\n2026-01-01T00:00:00.000000000Z stderr F three\n";

    #[test]
    fn entries_are_parsed_and_foreign_lines_are_not() {
        let (time, stream, full, content) = parse(b"2026-01-01T00:00:00Z stdout F a b  c").expect("CRI form");
        assert_eq!((time, stream, full, content), (&b"2026-01-01T00:00:00Z"[..], &b"stdout"[..], true, &b"a b  c"[..]));
        assert!(!parse(b"t stdout P half").expect("CRI form").2);
        assert!(parse(b"plain").is_none());
    }

    #[test]
    fn parts_are_joined_and_each_stream_goes_to_its_own() {
        let printed = |timestamps| {
            let (mut out, mut err) = (Vec::new(), Vec::new());
            let mut printer = Printer::new(&mut out, &mut err, timestamps);
            LOG.split(|b| *b == b'\n').filter(|line| !line.is_empty()).try_for_each(|line| printer.print(line)).expect("printed");
            drop(printer);
            (String::from_utf8(out).expect("text"), String::from_utf8(err).expect("text"))
        };
        assert_eq!(printed(false), ("one\ntwo\n".to_owned(), "three\n".to_owned()));
        let time = "2026-01-01T00:00:00.000000000Z";
        assert_eq!(printed(true), (format!("{time} one\n{time} two\n"), format!("{time} three\n")));
    }

    #[test]
    fn tail_counts_joined_lines() {
        let of = |lines| tail(LOG, lines).map(|at| &LOG[at..]);
        assert_eq!(of(1), Ok(&b"2026-01-01T00:00:00.000000000Z stderr F three\n"[..]));
        assert!(of(2).is_ok_and(|text| text.starts_with(b"2026-01-01T00:00:00.000000000Z stdout P tw")));
        assert_eq!(of(0), Ok(&b""[..]));
        assert_eq!(of(3), Err(0), "its first part may be in an older file");
        assert_eq!(of(9), Err(6));
    }

    /// A log below a folder of its own, with its follower.
    fn log() -> (tempfile::TempDir, PathBuf, Follower) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("0.log");
        let file = File::create(&path).and_then(|_| File::open(&path)).expect("a log");
        let follower = Follower::new(path.clone(), file).expect("a follower");
        (folder, path, follower)
    }

    fn write(path: &Path, text: &str) {
        File::options().append(true).create(true).open(path).and_then(|mut f| f.write_all(text.as_bytes())).expect("written");
    }

    fn rotate(path: &Path, second: u32) {
        std::fs::rename(path, format!("{}.20260101-0000{second:02}", path.display())).expect("rotated");
    }

    fn news(follower: &mut Follower) -> (Vec<String>, bool) {
        let mut found = Vec::new();
        let news = follower.read(|line| {
            found.push(String::from_utf8_lossy(line).into_owned());
            Ok(())
        });
        (found, news.expect("read").gap)
    }

    fn lines(follower: &mut Follower) -> Vec<String> {
        let (found, gap) = news(follower);
        assert!(!gap);
        found
    }

    #[test]
    fn a_tail_goes_back_over_rotated_files() {
        let (_folder, path, _) = log();
        let entry = |tag: &str, text: &str| format!("2026-01-01T00:00:00Z stdout {tag} {text}\n");
        write(&path, &(entry("F", "a") + &entry("F", "b") + &entry("P", "c1")));
        rotate(&path, 1);
        write(&path, &(entry("F", "c2") + &entry("F", "d")));
        rotate(&path, 2);
        write(&path, &entry("F", "e"));
        let last = |count| {
            let file = File::open(&path).and_then(|file| back_to_tail(&path, file, count)).expect("a tail");
            let found = lines(&mut Follower::new(path.clone(), file).expect("a follower"));
            found.iter().map(|line| line.rsplit(' ').next().unwrap_or_default().to_owned()).collect::<Vec<_>>().join(" ")
        };
        for (count, want) in [(0, ""), (1, "e"), (2, "d e"), (3, "c1 c2 d e"), (4, "b c1 c2 d e"), (9, "a b c1 c2 d e")] {
            assert_eq!(last(count), want, "{count} lines");
        }
    }

    #[test]
    fn a_follower_reads_every_file_between_two_looks() {
        let (_folder, path, mut follower) = log();
        write(&path, "a\nb\n");
        assert_eq!(lines(&mut follower), ["a", "b"]);
        write(&path, "c\n");
        for second in 1..4 {
            rotate(&path, second);
            write(&path, &format!("file {second}\n"));
        }
        assert_eq!(lines(&mut follower), ["c", "file 1", "file 2", "file 3"]);
        rotate(&path, 5);
        assert_eq!(lines(&mut follower), [""; 0], "between the rename and the new file");
        write(&path, "d\n");
        assert_eq!(lines(&mut follower), ["d"]);
    }

    #[test]
    fn a_clock_that_goes_back_repeats_nothing_and_loses_nothing() {
        let (_folder, path, mut follower) = log();
        write(&path, "a\n");
        rotate(&path, 50);
        write(&path, "b\n");
        assert_eq!(lines(&mut follower), ["a", "b"]);
        rotate(&path, 10);
        write(&path, "c\n");
        assert_eq!(lines(&mut follower), ["c"]);
        rotate(&path, 9);
        write(&path, "d\n");
        rotate(&path, 8);
        write(&path, "e\n");
        assert_eq!(lines(&mut follower), ["d", "e"]);
    }

    #[test]
    fn a_line_that_was_not_ended_is_not_joined_with_the_next_file() {
        let (_folder, path, mut follower) = log();
        write(&path, "torn");
        assert_eq!(lines(&mut follower), [""; 0]);
        rotate(&path, 1);
        write(&path, "next\n");
        assert_eq!(lines(&mut follower), ["torn", "next"]);
    }

    #[test]
    fn a_file_that_was_deleted_unread_is_told_of() {
        let (_folder, path, mut follower) = log();
        write(&path, "a\n");
        std::fs::remove_file(&path).expect("removed");
        write(&path, "z\n");
        assert_eq!(news(&mut follower), (vec!["a".to_owned(), "z".to_owned()], true));
    }
}
