//! The agent's log on standard error, which the service manager keeps. Lines are written by a thread of their own: a reader that
//! stands still stops nobody, it loses lines, and the log says how many. Must not decide what is logged.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

/// What an agent logs where nobody says.
pub const DEFAULT: &str = "info";
/// How many bytes wait for a reader: some thousand lines, and little of a small machine's memory.
const WAITING: usize = 512 << 10;
/// How long the end of the agent waits for the last lines.
const LAST_LINES: Duration = Duration::from_secs(1);
/// The writer's stack: it calls write(2) and formats one line.
const STACK: usize = 64 << 10;

#[derive(Default)]
struct Lines {
    waiting: VecDeque<Vec<u8>>,
    bytes: usize,
    /// How many found no room, or could not be written, and have not been told of.
    lost: u64,
    /// The thread has some in its hands.
    writing: bool,
}

#[derive(Default)]
struct Shared {
    lines: Mutex<Lines>,
    more: Condvar,
    written: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8]) {
        let mut lines = self.lock();
        // One alone is taken whatever its size: a loss is told behind a line that waits.
        if lines.bytes + line.len() > WAITING && !lines.waiting.is_empty() {
            lines.lost += 1;
            return;
        }
        lines.bytes += line.len();
        lines.waiting.push_back(line.to_vec());
        drop(lines);
        self.more.notify_one();
    }

    fn flush(&self) {
        let busy = |lines: &mut Lines| lines.writing || !lines.waiting.is_empty();
        drop(self.written.wait_timeout_while(self.lock(), LAST_LINES, busy));
    }

    /// The thread. Those who log hold the lock for moments only; it is not held while something is written.
    fn write_to(&self, mut out: impl Write) {
        loop {
            let mut lines = self.lock();
            lines.writing = false;
            self.written.notify_all();
            let mut lines = self.more.wait_while(lines, |lines| lines.waiting.is_empty()).unwrap_or_else(PoisonError::into_inner);
            lines.writing = true;
            lines.bytes = 0;
            // What was lost is younger than what waited.
            let (waiting, lost) = (std::mem::take(&mut lines.waiting), std::mem::take(&mut lines.lost));
            drop(lines);
            let unwritten = waiting.iter().filter(|line| out.write_all(line).is_err()).count() as u64;
            let lost = lost + unwritten;
            if lost > 0 && out.write_all(loss(lost).as_bytes()).is_err() {
                self.lock().lost += lost;
            }
        }
    }
}

fn loss(lines: u64) -> String {
    let now = time::OffsetDateTime::now_utc().format(&time::format_description::well_known::Rfc3339).unwrap_or_default();
    format!("{now}  WARN berth::log: {lines} log lines are lost: standard error was not read in time\n")
}

/// The log. Dropped, it waits a moment for its last lines.
#[must_use = "dropped at once, it would wait for its first lines only"]
pub struct Log(Arc<Shared>);

impl Drop for Log {
    fn drop(&mut self) {
        self.0.flush();
    }
}

/// Where events are written to.
struct Lane(Arc<Shared>);

/// One event's line: the formatter hands it over whole.
struct Line<'a>(&'a Shared);

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lane {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(&self.0)
    }
}

fn start(out: impl Write + Send + 'static) -> io::Result<Log> {
    let shared = Arc::new(Shared::default());
    let theirs = shared.clone();
    std::thread::Builder::new().name("log".into()).stack_size(STACK).spawn(move || theirs.write_to(out))?;
    Ok(Log(shared))
}

/// A filter of the log. A word without `=` must be a level: the filter would take any other for the name of a target, log that alone
/// and nothing of berth.
fn parse_filter(level: &str) -> Result<EnvFilter> {
    let words = level.split(',').map(str::trim).filter(|word| !word.is_empty() && !word.contains(['=', '[']));
    for word in words {
        if word.parse::<LevelFilter>().is_err() {
            bail!("--log-level {level:?}: {word:?} is no level: one of error, warn, info, debug, trace, off, or TARGET=LEVEL");
        }
    }
    EnvFilter::try_new(level).with_context(|| format!("--log-level {level:?}"))
}

/// Logs to standard error what the filter `level` lets through, until the end of the process.
pub fn to_stderr(level: &str) -> Result<Log> {
    let filter = parse_filter(level)?;
    // By a descriptor of its own: the standard library's lock would keep others from saying why the agent ends.
    let out: Box<dyn Write + Send> = match io::stderr().as_fd().try_clone_to_owned() {
        Ok(fd) => Box::new(File::from(fd)),
        Err(_) => Box::new(io::stderr()),
    };
    let log = start(out).context("starting the thread of the log")?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(Lane(log.0.clone())).with_ansi(false).init();
    let (shared, hook) = (log.0.clone(), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |panic| {
        shared.flush();
        hook(panic);
    }));
    Ok(log)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;

    #[test]
    fn a_word_that_is_no_level_is_refused_with_the_levels_named() {
        for good in ["info", "WARN", "off", "info,berth_cri_server=debug", "warn,berth_cni=trace", "berth[span]=debug"] {
            assert!(parse_filter(good).is_ok(), "{good}");
        }
        for (bad, word) in [("bogus", "bogus"), ("wran", "wran"), ("info,berth_cni", "berth_cni")] {
            let error = parse_filter(bad).expect_err(bad).to_string();
            assert!(error.contains(&format!("{word:?} is no level: one of error, warn, info, debug, trace, off")), "{error}");
        }
        assert!(parse_filter("berth_cni=wran").is_err());
    }

    #[test]
    fn a_reader_that_stands_still_stops_nobody_and_learns_how_many_lines_it_lost() {
        let (reader, writer) = io::pipe().unwrap();
        let log = start(writer).unwrap();
        let line = [&[b'x'; 1023][..], b"\n"].concat();
        let all = 3 * WAITING / line.len();
        // Nobody reads: without a bound of its own this would not end.
        for _ in 0..all {
            Line(&log.0).write_all(&line).unwrap();
        }
        let (mut whole, mut lost) = (0, 0);
        for text in BufReader::new(reader).lines().map(Result::unwrap) {
            match text.split_once(" log lines are lost") {
                Some((before, _)) => lost += before.rsplit(' ').next().unwrap().parse::<usize>().unwrap(),
                None => whole += usize::from(text.len() == line.len() - 1),
            }
            if whole + lost == all {
                break;
            }
        }
        assert!(lost > 0 && whole >= WAITING / line.len(), "{whole} {lost}");
    }

    #[test]
    fn the_end_waits_for_the_last_lines_in_their_order() {
        let (reader, writer) = io::pipe().unwrap();
        let log = start(writer).unwrap();
        for n in 0..100 {
            Line(&log.0).write_all(format!("{n}\n").as_bytes()).unwrap();
        }
        drop(log);
        let lines: Vec<String> = BufReader::new(reader).lines().take(100).map(Result::unwrap).collect();
        assert_eq!(lines, (0..100).map(|n| n.to_string()).collect::<Vec<_>>());
    }

    #[test]
    fn the_end_does_not_wait_for_ever_for_a_reader_that_stands_still() {
        let (_reader, writer) = io::pipe().unwrap();
        let log = start(writer).unwrap();
        Line(&log.0).write_all(&vec![b'x'; 256 << 10]).unwrap();
        let begun = std::time::Instant::now();
        drop(log);
        assert!(begun.elapsed() < LAST_LINES * 5);
    }
}
