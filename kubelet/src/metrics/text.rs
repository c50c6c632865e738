//! Prometheus' text format, piece by piece: a scrape of a full node is never in memory as a whole.

use std::fmt::{Display, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::{Instant, timeout_at};

use super::Family;

/// Pieces of about this size are sent.
const PIECE: usize = 16 * 1024;

/// Text on its way.
#[derive(Debug)]
pub(crate) struct Text {
    out: String,
    /// None: it is kept.
    way: Option<Way>,
    gone: bool,
}

type Sender = mpsc::Sender<std::io::Result<Bytes>>;

/// Whether a text was given up before its end: what has been sent of it then is no page.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cut(Arc<AtomicBool>);

impl Cut {
    pub(crate) fn is_cut(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Where pieces go, and until when: who reads slowly has a thread of ours for no longer.
#[derive(Debug)]
struct Way {
    sender: Sender,
    until: Instant,
    cut: Cut,
}

impl Way {
    /// Whether the piece is on its way. For threads of a runtime that may block.
    fn send(&self, piece: Bytes) -> bool {
        let piece = match self.sender.try_send(Ok(piece)) {
            Ok(()) => return true,
            Err(TrySendError::Closed(_)) => return false,
            Err(TrySendError::Full(piece)) => piece,
        };
        let sending = timeout_at(self.until, self.sender.send(piece));
        match tokio::runtime::Handle::current().block_on(sending) {
            Ok(sent) => sent.is_ok(),
            Err(_) => {
                self.cut.0.store(true, Ordering::Release);
                false
            }
        }
    }
}

impl Text {
    /// Text that is sent until then, and whether it was given up. For threads of a runtime that may block.
    pub(crate) fn sent(sender: Sender, until: Instant) -> (Text, Cut) {
        let cut = Cut::default();
        let way = Way { sender, until, cut: cut.clone() };
        (Text { out: String::with_capacity(PIECE + 1024), way: Some(way), gone: false }, cut)
    }

    /// Text that is kept, for tests.
    #[cfg(test)]
    pub(crate) fn whole() -> Text {
        Text { out: String::new(), way: None, gone: false }
    }

    #[cfg(test)]
    pub(crate) fn into_string(mut self) -> String {
        std::mem::take(&mut self.out)
    }

    /// Text as it is.
    pub(crate) fn push(&mut self, text: &str) {
        self.out.push_str(text);
        self.send(PIECE);
    }

    fn send(&mut self, at_least: usize) {
        if self.out.len() < at_least.max(1) {
            return;
        }
        let Some(way) = &self.way else { return };
        let piece = Bytes::copy_from_slice(self.out.as_bytes());
        self.out.clear();
        // A client that has gone needs no more.
        self.gone = self.gone || !way.send(piece);
    }

    /// Nobody reads any more.
    pub(crate) fn is_unread(&self) -> bool {
        self.gone
    }

    /// The head of a family.
    pub(crate) fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.out, "# HELP {name} ");
        for c in help.chars() {
            match c {
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                c => self.out.push(c),
            }
        }
        let _ = writeln!(self.out, "\n# TYPE {name} {kind}");
    }

    /// A series' value now.
    pub(crate) fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.sample_at(name, labels, value, 0);
    }

    /// A series' value at a time (nanoseconds since the epoch; 0: now).
    pub(crate) fn sample_at(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display, ns: i64) {
        let mut rendered = String::new();
        push_labels(&mut rendered, labels);
        self.line(name, &rendered, value, ns);
    }

    /// A series' value, its labels already written.
    pub(crate) fn line(&mut self, name: &str, labels: &str, value: impl Display, ns: i64) {
        self.out.push_str(name);
        if !labels.is_empty() {
            let _ = write!(self.out, "{{{labels}}}");
        }
        let _ = write!(self.out, " {value}");
        if ns > 0 {
            let _ = write!(self.out, " {}", ns / 1_000_000);
        }
        self.out.push('\n');
        self.send(PIECE);
    }

    /// A histogram.
    pub(crate) fn spread(&mut self, family: &Family, labels: &[(&str, &str)], buckets: &[u64], count: u64, sum: f64) {
        let mut rendered = String::new();
        push_labels(&mut rendered, labels);
        let comma = if rendered.is_empty() { "" } else { "," };
        let name = format!("{}_bucket", family.name);
        for (bound, value) in family.buckets.iter().zip(buckets) {
            self.line(&name, &format!("{rendered}{comma}le=\"{bound}\""), value, 0);
        }
        self.line(&name, &format!("{rendered}{comma}le=\"+Inf\""), count, 0);
        self.line(&format!("{}_sum", family.name), &rendered, sum, 0);
        self.line(&format!("{}_count", family.name), &rendered, count, 0);
    }
}

impl Drop for Text {
    fn drop(&mut self) {
        self.send(1);
    }
}

/// `a="b",c="d"` with the format's escapes.
pub(crate) fn push_labels(out: &mut String, labels: &[(&str, &str)]) {
    for (name, value) in labels {
        if !out.is_empty() {
            out.push(',');
        }
        let _ = write!(out, "{name}=\"");
        for c in value.chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                '"' => out.push_str("\\\""),
                '\n' => out.push_str("\\n"),
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn odd_values_are_escaped_and_times_are_milliseconds() {
        let mut out = Text::whole();
        out.family("a", "gauge", "x\\y\nz");
        out.sample_at("a", &[("l", "q\"\\\n")], 1.5, 7_000_000_999);
        out.sample("a", &[], 2);
        assert_eq!(out.into_string(), "# HELP a x\\\\y\\nz\n# TYPE a gauge\na{l=\"q\\\"\\\\\\n\"} 1.5 7000\na 2\n");
    }

    #[tokio::test]
    async fn long_text_goes_in_pieces_and_ends_when_nobody_reads() {
        let (sender, mut receiver) = mpsc::channel(1);
        let writer = tokio::task::spawn_blocking(move || {
            let mut out = Text::sent(sender, Instant::now() + Duration::from_secs(60)).0;
            let mut lines = 0;
            while !out.is_unread() && lines < 1_000_000 {
                out.sample("abcdefgh", &[], lines);
                lines += 1;
            }
            lines
        });
        let first = receiver.recv().await.unwrap().unwrap();
        assert!(first.len() < PIECE + 1024 && first.starts_with(b"abcdefgh 0\n"));
        drop(receiver);
        assert!(writer.await.unwrap() < 1_000_000);
    }

    #[tokio::test]
    async fn a_text_that_nobody_reads_is_given_up_in_time_and_says_so() {
        let (sender, receiver) = mpsc::channel(1);
        let (mut out, cut) = Text::sent(sender, Instant::now() + Duration::from_millis(50));
        let writing = tokio::task::spawn_blocking(move || {
            while !out.is_unread() {
                out.sample("abcdefgh", &[], 1);
            }
        });
        let ended = tokio::time::timeout(Duration::from_secs(20), writing).await;
        drop(receiver);
        assert!(ended.is_ok() && cut.is_cut());
    }
}
