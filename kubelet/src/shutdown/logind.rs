//! The few words of D-Bus that logind needs: a delay inhibitor, the longest delay, and the signal before a shutdown. Decides nothing.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use berth_linux::fdpass;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;

/// The longest answer that is waited for.
const PATIENCE: Duration = Duration::from_secs(25);
/// No message of logind is near this.
const MAX_MESSAGE: usize = 1 << 16;

const LOGIN: (&str, &str, &str) = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager");
const BUS: (&str, &str, &str) = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus");
const MATCH: &str = "type='signal',interface='org.freedesktop.login1.Manager',member='PrepareForShutdown'";

/// Why logind could not be talked to.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The connection failed.
    #[error("{0}: {1}")]
    Io(&'static str, io::Error),
    /// It does not take us for who we are.
    #[error("the authentication was refused")]
    Denied,
    /// What it sent is no D-Bus.
    #[error("it sent {0}")]
    Protocol(&'static str),
    /// It answered with an error.
    #[error("{0} was refused: {1}")]
    Refused(&'static str, String),
    /// It took too long.
    #[error("no answer to {0}")]
    Late(&'static str),
}

/// A message that came.
#[derive(Debug, Default)]
struct Message {
    kind: u8,
    reply_to: u32,
    member: String,
    body: Vec<u8>,
}

/// A connection to the message bus.
#[derive(Debug)]
pub(super) struct Logind {
    stream: UnixStream,
    serial: u32,
    input: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// What the signal said while something else was waited for.
    told: Vec<bool>,
}

impl Logind {
    /// Connects, says who we are and asks for the signal.
    pub(super) async fn connect(path: &Path) -> Result<Logind, Failure> {
        let stream = UnixStream::connect(path).await.map_err(|e| Failure::Io("connect", e))?;
        let mut bus = Logind { stream, serial: 0, input: Vec::new(), fds: Vec::new(), told: Vec::new() };
        let uid: String = rustix::process::geteuid().as_raw().to_string().bytes().map(|b| format!("{b:02x}")).collect();
        bus.say(format!("\0AUTH EXTERNAL {uid}\r\n").as_bytes()).await?;
        if !bus.line().await?.starts_with("OK ") {
            return Err(Failure::Denied);
        }
        bus.say(b"NEGOTIATE_UNIX_FD\r\n").await?;
        if bus.line().await? != "AGREE_UNIX_FD" {
            return Err(Failure::Protocol("no agreement about descriptors"));
        }
        bus.say(b"BEGIN\r\n").await?;
        bus.call(BUS, "Hello", "", &[]).await?;
        bus.call(BUS, "AddMatch", "s", &[MATCH]).await?;
        Ok(bus)
    }

    /// How long logind lets itself be delayed.
    pub(super) async fn longest_delay(&mut self) -> Result<Duration, Failure> {
        let properties = (LOGIN.0, LOGIN.1, "org.freedesktop.DBus.Properties");
        let answer = self.call(properties, "Get", "ss", &[LOGIN.2, "InhibitDelayMaxUSec"]).await?;
        // A variant: the signature `t` (1, 't', 0), then the number at the next multiple of eight.
        let number = answer.body.get(8..16).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
        number.map(Duration::from_micros).ok_or(Failure::Protocol("no delay"))
    }

    /// Delays shutdowns until the descriptor is closed.
    pub(super) async fn inhibit(&mut self) -> Result<OwnedFd, Failure> {
        let words = ["shutdown", "kubelet", "Kubelet needs time to handle node shutdown", "delay"];
        self.call(LOGIN, "Inhibit", "ssss", &words).await?;
        self.fds.pop().ok_or(Failure::Protocol("no inhibitor"))
    }

    /// Waits until the machine is about to go down (true), or does not any more (false).
    pub(super) async fn prepare_for_shutdown(&mut self) -> Result<bool, Failure> {
        loop {
            if !self.told.is_empty() {
                return Ok(self.told.remove(0));
            }
            let message = self.message().await?;
            self.note(&message);
        }
    }

    fn note(&mut self, message: &Message) {
        // 4: a signal; its body is one boolean of four bytes.
        if message.kind == 4 && message.member == "PrepareForShutdown" {
            self.told.push(message.body.first() == Some(&1));
        }
    }

    async fn say(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.stream.write_all(bytes).await.map_err(|e| Failure::Io("write", e))
    }

    async fn line(&mut self) -> Result<String, Failure> {
        loop {
            if let Some(end) = self.input.windows(2).position(|two| two == b"\r\n") {
                let line: Vec<u8> = self.input.drain(..end + 2).collect();
                return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            if self.input.len() > MAX_MESSAGE {
                return Err(Failure::Protocol("a line without end"));
            }
            tokio::time::timeout(PATIENCE, self.receive()).await.map_err(|_| Failure::Late("the authentication"))??;
        }
    }

    /// Reads what is there, descriptors too.
    async fn receive(&mut self) -> Result<(), Failure> {
        let mut buffer = [0u8; 4096];
        let mut fds = Vec::new();
        let read = self.stream.async_io(Interest::READABLE, || {
            let (read, received) = fdpass::recv_with_fds(self.stream.as_fd(), &mut buffer, 4)?;
            fds.extend(received);
            Ok(read)
        });
        let read = read.await.map_err(|e| Failure::Io("read", e))?;
        if read == 0 {
            return Err(Failure::Protocol("the end of the connection"));
        }
        self.fds.extend(fds);
        self.input.extend_from_slice(&buffer[..read]);
        Ok(())
    }

    async fn message(&mut self) -> Result<Message, Failure> {
        loop {
            if let Some((message, length)) = parse(&self.input)? {
                self.input.drain(..length);
                return Ok(message);
            }
            self.receive().await?;
        }
    }

    /// Calls a method and waits for its answer.
    async fn call(
        &mut self,
        to: (&str, &str, &str),
        member: &'static str,
        signature: &str,
        texts: &[&str],
    ) -> Result<Message, Failure> {
        self.serial += 1;
        let serial = self.serial;
        self.say(&method_call(serial, to, member, signature, texts)).await?;
        let answer = async {
            loop {
                let message = self.message().await?;
                match message.kind {
                    2 if message.reply_to == serial => return Ok(message),
                    3 if message.reply_to == serial => {
                        let text =
                            message.body.get(4..).map(|bytes| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned());
                        return Err(Failure::Refused(member, text.unwrap_or_default()));
                    }
                    _ => self.note(&message),
                }
            }
        };
        tokio::time::timeout(PATIENCE, answer).await.map_err(|_| Failure::Late(member))?
    }
}

fn pad(bytes: &mut Vec<u8>, to: usize) {
    bytes.resize(bytes.len().next_multiple_of(to), 0);
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    pad(bytes, 4);
    bytes.extend(u32::try_from(text.len()).unwrap_or(0).to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes.push(0);
}

/// A method call whose arguments are texts.
fn method_call(
    serial: u32,
    (destination, path, interface): (&str, &str, &str),
    member: &str,
    signature: &str,
    texts: &[&str],
) -> Vec<u8> {
    let mut body = Vec::new();
    texts.iter().for_each(|argument| text(&mut body, argument));
    let mut fields = Vec::new();
    for (code, kind, value) in [(1, b'o', path), (2, b's', interface), (3, b's', member), (6, b's', destination)] {
        pad(&mut fields, 8);
        fields.extend([code, 1, kind, 0]);
        text(&mut fields, value);
    }
    if !signature.is_empty() {
        pad(&mut fields, 8);
        fields.extend([8, 1, b'g', 0, u8::try_from(signature.len()).unwrap_or(0)]);
        fields.extend(signature.as_bytes());
        fields.push(0);
    }
    // Little-endian, a method call, no flags, version 1.
    let mut message = vec![b'l', 1, 0, 1];
    message.extend(u32::try_from(body.len()).unwrap_or(0).to_le_bytes());
    message.extend(serial.to_le_bytes());
    message.extend(u32::try_from(fields.len()).unwrap_or(0).to_le_bytes());
    message.extend(fields);
    pad(&mut message, 8);
    message.extend(body);
    message
}

/// The first message of the input with its length, once it is whole.
fn parse(input: &[u8]) -> Result<Option<(Message, usize)>, Failure> {
    let number = |at: usize| {
        let bytes = input.get(at..at + 4).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok());
        bytes.map(|bytes| usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(usize::MAX))
    };
    let (Some(body), Some(fields)) = (number(4), number(12)) else { return Ok(None) };
    if input[0] != b'l' {
        return Err(Failure::Protocol("a message of another byte order"));
    }
    if body > MAX_MESSAGE || fields > MAX_MESSAGE {
        return Err(Failure::Protocol("a message that is too long"));
    }
    let begin = (16 + fields).next_multiple_of(8);
    let Some(content) = input.get(begin..begin + body) else { return Ok(None) };
    let mut message = Message { kind: input[1], body: content.to_vec(), ..Message::default() };
    read_fields(&input[..16 + fields], &mut message).ok_or(Failure::Protocol("a message that is torn"))?;
    Ok(Some((message, begin + body)))
}

fn read_fields(header: &[u8], message: &mut Message) -> Option<()> {
    let mut at = 16;
    while at < header.len() {
        at = at.next_multiple_of(8);
        let (code, length) = (*header.get(at)?, usize::from(*header.get(at + 1)?));
        let kind = *header.get(at + 2)?;
        at += 2 + length + 1;
        match (length, kind) {
            (1, b's' | b'o') => {
                at = at.next_multiple_of(4);
                let size = usize::try_from(u32::from_le_bytes(header.get(at..at + 4)?.try_into().ok()?)).ok()?;
                let value = header.get(at + 4..(at + 4).checked_add(size)?)?;
                if code == 3 {
                    message.member = String::from_utf8_lossy(value).into_owned();
                }
                at += 4 + size + 1;
            }
            (1, b'u') => {
                at = at.next_multiple_of(4);
                let value = u32::from_le_bytes(header.get(at..at + 4)?.try_into().ok()?);
                if code == 5 {
                    message.reply_to = value;
                }
                at += 4;
            }
            (1, b'g') => at += 2 + usize::from(*header.get(at)?),
            // No other type is in a header.
            _ => return None,
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream as Socket};

    use super::*;

    /// A message with this kind, an optional serial that it answers, a member and a body.
    fn message(kind: u8, reply_to: Option<u32>, member: Option<&str>, body: &[u8]) -> Vec<u8> {
        let mut fields = Vec::new();
        if let Some(serial) = reply_to {
            fields.extend([5, 1, b'u', 0]);
            fields.extend(serial.to_le_bytes());
        }
        if let Some(member) = member {
            pad(&mut fields, 8);
            fields.extend([3, 1, b's', 0]);
            text(&mut fields, member);
        }
        let mut bytes = vec![b'l', kind, 0, 1];
        bytes.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
        bytes.extend(9u32.to_le_bytes());
        bytes.extend(u32::try_from(fields.len()).unwrap().to_le_bytes());
        bytes.extend(fields);
        pad(&mut bytes, 8);
        bytes.extend(body);
        bytes
    }

    /// Reads one call: its serial and member.
    fn called(socket: &mut Socket) -> (u32, String) {
        let mut head = [0u8; 16];
        socket.read_exact(&mut head).unwrap();
        let number = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
        let rest = (16 + number(12) as usize).next_multiple_of(8) + number(4) as usize - 16;
        let mut whole = head.to_vec();
        whole.resize(16 + rest, 0);
        socket.read_exact(&mut whole[16..]).unwrap();
        let (message, length) = parse(&whole).unwrap().unwrap();
        assert_eq!(length, whole.len());
        (number(8), message.member)
    }

    /// Plays the bus and logind; ends when the inhibitor has been closed.
    fn play(listener: &UnixListener) -> Vec<String> {
        let (mut socket, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(socket.try_clone().unwrap());
        let mut members = Vec::new();
        for answer in ["OK 0123\r\n", "AGREE_UNIX_FD\r\n", ""] {
            let mut line = String::new();
            // One byte at a time would be exact; the client waits for each answer, so that nothing is read too early.
            lines.read_line(&mut line).unwrap();
            members.push(line.trim_matches(['\0', '\r', '\n']).to_owned());
            socket.write_all(answer.as_bytes()).unwrap();
            if answer.is_empty() {
                break;
            }
        }
        let buffered = lines.buffer().to_vec();
        drop(lines);
        assert!(buffered.is_empty() || buffered[0] == b'l');
        let (mut mine, theirs) = Socket::pair().unwrap();
        let mut pending = buffered;
        loop {
            let (serial, member) = if pending.is_empty() {
                called(&mut socket)
            } else {
                // The first call came with the last line.
                let mut both = Socket::pair().unwrap();
                both.0.write_all(&pending).unwrap();
                pending.clear();
                called(&mut both.1)
            };
            members.push(member.clone());
            let answer = match member.as_str() {
                "Get" => {
                    message(2, Some(serial), None, &[&[1, b't', 0, 0, 0, 0, 0, 0][..], &7_000_000u64.to_le_bytes()].concat())
                }
                _ => message(2, Some(serial), None, &[]),
            };
            if member == "Inhibit" {
                // The signal comes first, while the answer is waited for.
                socket.write_all(&message(4, None, Some("PrepareForShutdown"), &1u32.to_le_bytes())).unwrap();
                fdpass::send_with_fds(socket.as_fd(), &answer, &[theirs.as_fd()]).unwrap();
                drop(theirs);
                // The end of the inhibitor.
                assert_eq!(mine.read(&mut [0]).unwrap(), 0);
                return members;
            }
            socket.write_all(&answer).unwrap();
        }
    }

    #[tokio::test]
    async fn the_inhibitor_is_taken_the_signal_is_heard_and_letting_go_lets_the_machine_go_down() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("bus");
        let listener = UnixListener::bind(&path).unwrap();
        let bus = tokio::task::spawn_blocking(move || play(&listener));
        let mut logind = Logind::connect(&path).await.unwrap();
        assert_eq!(logind.longest_delay().await.unwrap(), Duration::from_secs(7));
        let inhibitor = logind.inhibit().await.unwrap();
        assert!(logind.prepare_for_shutdown().await.unwrap());
        drop(inhibitor);
        let members = bus.await.unwrap();
        assert!(members[0].starts_with("AUTH EXTERNAL 3"), "{members:?}");
        assert_eq!(members[1..], ["NEGOTIATE_UNIX_FD", "BEGIN", "Hello", "AddMatch", "Get", "Inhibit"]);
    }

    #[test]
    fn torn_messages_are_refused_and_short_ones_waited_for() {
        let whole = message(4, None, Some("PrepareForShutdown"), &1u32.to_le_bytes());
        for length in 0..whole.len() {
            assert!(parse(&whole[..length]).unwrap().is_none(), "{length}");
        }
        let mut torn = whole.clone();
        // The member's length points beyond the header.
        torn[20] = 255;
        assert!(parse(&torn).is_err());
        let mut big = whole;
        big[0] = b'B';
        assert!(parse(&big).is_err());
    }
}
