//! The log writer's loop: reads the output of all containers of the pod, writes it in CRI format and copies it to taps.
//! It never stops reading, whatever becomes of files and taps, and it outlives the shim until all output has ended.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use berth_linux::epoll::{Epoll, EventFlags, Ready};
use berth_shim::protocol::{FrameError, LogSpec};

use super::file::{LogFile, Stream};
use super::format::Splitter;
use super::{FromWriter, LogError, ToWriter};
use crate::clock;
use crate::link::{Filled, Link};

/// What one read takes at most: all that a pipe holds.
const CHUNK: usize = 64 * 1024;
/// After that long without output, memory is given back.
const IDLE: Duration = Duration::from_millis(500);
/// So many events come at once at most; then the link may have been left out.
const BATCH: usize = 32;
/// The link's token; containers count from 0 in steps of 2, stderr being odd.
const LINK: u64 = u64::MAX;

struct Source {
    fd: OwnedFd,
    stream: Stream,
    splitter: Splitter,
    taps: Vec<OwnedFd>,
}

struct Output {
    id: String,
    log: Option<LogFile>,
    sources: [Option<Source>; 2],
}

struct Writer {
    epoll: Epoll,
    link: Option<Link>,
    outputs: BTreeMap<u64, Output>,
    next: u64,
    chunk: Vec<u8>,
}

/// Runs until the shim has let go of the link and all output has ended. Only a missing epoll ends it early.
pub fn run(link: Link) -> io::Result<()> {
    let epoll = Epoll::new()?;
    epoll.add(link.as_fd(), LINK, EventFlags::IN)?;
    let mut writer = Writer { epoll, link: Some(link), outputs: BTreeMap::new(), next: 0, chunk: Vec::new() };
    let mut ready: Vec<Ready> = Vec::new();
    let mut busy = false;
    while writer.link.is_some() || !writer.outputs.is_empty() {
        ready.clear();
        writer.epoll.wait(&mut ready, busy.then_some(IDLE))?;
        if ready.is_empty() {
            writer.shrink();
            ready = Vec::new();
            berth_linux::heap::trim();
            busy = false;
            continue;
        }
        busy = true;
        if ready.len() >= BATCH || ready.iter().any(|event| event.token == LINK) {
            writer.serve_link();
        }
        for event in ready.iter().filter(|event| event.token != LINK) {
            writer.serve_source(event.token);
        }
    }
    Ok(())
}

impl Writer {
    fn serve_link(&mut self) {
        let Some(link) = &mut self.link else {
            return;
        };
        let mut open = link.flush().is_ok();
        // All of it: a tap that was asked for before some output must be there before that output is read.
        while open {
            match link.fill() {
                Ok(Filled::Some) => {}
                Ok(Filled::Nothing) => break,
                _ => open = false,
            }
        }
        loop {
            let Some(link) = &mut self.link else {
                return;
            };
            match link.next::<ToWriter>() {
                Ok(Some((message, fds))) => self.handle(message, fds),
                Ok(None) => break,
                Err(FrameError::Body { .. }) => {}
                Err(_) => {
                    open = false;
                    break;
                }
            }
        }
        if !open {
            self.drop_link();
        }
    }

    fn drop_link(&mut self) {
        if let Some(link) = self.link.take() {
            let _ = self.epoll.delete(link.as_fd());
        }
    }

    /// Tells the shim; when it is gone, there is nobody to tell.
    fn tell(&mut self, message: &FromWriter) {
        let Some(link) = &mut self.link else {
            return;
        };
        let interest = match link.send(message, Vec::new()) {
            Ok(()) if link.wants_write() => EventFlags::IN | EventFlags::OUT,
            Ok(()) => EventFlags::IN,
            Err(_) => return self.drop_link(),
        };
        let _ = self.epoll.modify(link.as_fd(), LINK, interest);
    }

    fn handle(&mut self, message: ToWriter, mut fds: Vec<OwnedFd>) {
        match message {
            ToWriter::Add { id, log } => self.add(id, log, fds),
            ToWriter::Reopen { id, ticket } => {
                let error = self.reopen(&id).err();
                self.tell(&FromWriter::Reopened { ticket, error });
            }
            ToWriter::Tap { id, stderr } => {
                // A container that is not here any more has drained: closing the tap tells its reader so.
                let source = self.find(&id).and_then(|key| self.outputs.get_mut(&key)?.sources[usize::from(stderr)].as_mut());
                if let (Some(source), Some(fd)) = (source, fds.pop()) {
                    source.taps.push(fd);
                }
            }
            ToWriter::Remove { id } => {
                if let Some(key) = self.find(&id) {
                    self.remove(key);
                }
            }
        }
    }

    fn find(&self, id: &str) -> Option<u64> {
        self.outputs.iter().find(|(_, output)| output.id == id).map(|(key, _)| *key)
    }

    fn add(&mut self, id: String, log: Option<LogSpec>, fds: Vec<OwnedFd>) {
        let (log, error) = match log.map(|spec| (LogFile::open(spec.clone()), spec)) {
            None => (None, None),
            Some((Ok(file), _)) => (Some(file), None),
            Some((Err(error), spec)) => {
                let error = log_error(&spec, &error);
                (Some(LogFile::closed(spec)), Some(error))
            }
        };
        let key = self.next;
        self.next += 2;
        let mut sources = [None, None];
        for (at, (fd, stream)) in fds.into_iter().zip([Stream::Stdout, Stream::Stderr]).enumerate() {
            if self.epoll.add(fd.as_fd(), key + at as u64, EventFlags::IN).is_ok() {
                sources[at] = Some(Source { fd, stream, splitter: Splitter::default(), taps: Vec::new() });
            }
        }
        self.outputs.insert(key, Output { id: id.clone(), log, sources });
        self.tell(&FromWriter::Opened { id, error });
        self.finish_if_ended(key);
    }

    fn reopen(&mut self, id: &str) -> Result<(), LogError> {
        let output = self.find(id).and_then(|key| self.outputs.get_mut(&key));
        match output.and_then(|output| output.log.as_mut()) {
            Some(log) => log.reopen().map_err(|error| log_error(log.spec(), &error)),
            None => Err(LogError { message: format!("container {id} has no open log"), errno: None }),
        }
    }

    /// Reads one chunk of a stream.
    fn serve_source(&mut self, token: u64) {
        let key = token & !1;
        let at = (token & 1) as usize;
        if self.read_chunk(key, at) == Chunk::End {
            self.end_source(key, at);
            self.finish_if_ended(key);
        }
    }

    fn read_chunk(&mut self, key: u64, at: usize) -> Chunk {
        let Some(output) = self.outputs.get_mut(&key) else {
            return Chunk::Nothing;
        };
        let Some(source) = &mut output.sources[at] else {
            return Chunk::Nothing;
        };
        self.chunk.resize(CHUNK, 0);
        let count = match rustix::io::retry_on_intr(|| rustix::io::read(&source.fd, &mut self.chunk[..])) {
            Ok(0) => return Chunk::End,
            Ok(count) => count,
            Err(rustix::io::Errno::AGAIN) => return Chunk::Nothing,
            // EIO: nobody has the terminal open any more. Anything else: this stream cannot be read again either.
            Err(_) => return Chunk::End,
        };
        let data = &self.chunk[..count];
        // A tap that does not take all at once belongs to a client that is too slow: it is cut.
        source
            .taps
            .retain(|tap| rustix::io::retry_on_intr(|| rustix::io::write(tap, data)).is_ok_and(|written| written == count));
        if let Some(log) = &mut output.log {
            let stream = source.stream;
            source.splitter.feed(data, &mut |tag, content| log.push(clock::now_ns(), stream, tag, content));
            log.flush();
        }
        Chunk::Data
    }

    fn end_source(&mut self, key: u64, at: usize) {
        let Some(output) = self.outputs.get_mut(&key) else {
            return;
        };
        let Some(mut source) = output.sources[at].take() else {
            return;
        };
        let _ = self.epoll.delete(source.fd.as_fd());
        if let Some(log) = &mut output.log {
            source.splitter.finish(&mut |tag, content| log.push(clock::now_ns(), source.stream, tag, content));
            log.flush();
        }
    }

    fn finish_if_ended(&mut self, key: u64) {
        let ended = self.outputs.get(&key).is_some_and(|output| output.sources.iter().all(Option::is_none));
        if !ended {
            return;
        }
        if let Some(mut output) = self.outputs.remove(&key) {
            self.report_dropped(output.log.as_mut().map_or(0, LogFile::take_dropped));
            self.tell(&FromWriter::Drained { id: output.id });
        }
    }

    fn report_dropped(&mut self, bytes: u64) {
        if bytes > 0 {
            self.tell(&FromWriter::Dropped { bytes });
        }
    }

    /// Takes what the pipes hold now and ends the container's output, though somebody may still hold their other ends.
    fn remove(&mut self, key: u64) {
        for at in 0..2 {
            // Bounded: whoever still writes must not keep us here.
            for _ in 0..64 {
                if self.read_chunk(key, at) != Chunk::Data {
                    break;
                }
            }
            self.end_source(key, at);
        }
        self.finish_if_ended(key);
    }

    fn shrink(&mut self) {
        self.chunk = Vec::new();
        let mut dropped = 0;
        for output in self.outputs.values_mut() {
            for source in output.sources.iter_mut().flatten() {
                source.splitter.shrink();
            }
            if let Some(log) = &mut output.log {
                log.shrink();
                dropped += log.take_dropped();
            }
        }
        self.report_dropped(dropped);
    }
}

#[derive(PartialEq, Eq)]
enum Chunk {
    Data,
    Nothing,
    End,
}

fn log_error(spec: &LogSpec, error: &io::Error) -> LogError {
    LogError { message: format!("open log {}: {error}", spec.path.display()), errno: error.raw_os_error() }
}
