//! The manager against a peer that plays systemd on a socket of its own, which is all that a machine without systemd can show. The words
//! of the real one are tried in a virtual machine (e2e/vm-systemd.sh).

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::thread::JoinHandle;

use super::wire::{FIXED, Kind};
use super::*;
use crate::{Cpu, Memory};

/// A message of the peer's, with one field of text or a number each: (code, type, value).
fn message(kind: u8, fields: &[(u8, char, &str)], signature: &str, body: &[u8]) -> Vec<u8> {
    let text = |out: &mut Vec<u8>, text: &str| {
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend((text.len() as u32).to_le_bytes());
        out.extend(text.as_bytes());
        out.push(0);
    };
    let mut header = Vec::new();
    for (code, kind, value) in fields.iter().copied().chain([(8, 'g', signature)]) {
        header.resize(header.len().next_multiple_of(8), 0);
        header.extend([code, 1, kind as u8, 0]);
        match kind {
            'u' => header.extend(value.parse::<u32>().unwrap().to_le_bytes()),
            'g' => {
                header.push(value.len() as u8);
                header.extend(value.as_bytes());
                header.push(0);
            }
            _ => text(&mut header, value),
        }
    }
    let mut out = vec![b'l', kind, 1, 1];
    out.extend((body.len() as u32).to_le_bytes());
    out.extend(1u32.to_le_bytes());
    out.extend((header.len() as u32).to_le_bytes());
    out.extend(header);
    out.resize(out.len().next_multiple_of(8), 0);
    out.extend(body);
    out
}

fn texts(texts: &[&str]) -> Vec<u8> {
    let mut out = Vec::new();
    for text in texts {
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend((text.len() as u32).to_le_bytes());
        out.extend(text.as_bytes());
        out.push(0);
    }
    out
}

fn job_removed(job: &str, result: &str) -> Vec<u8> {
    let mut body = 5u32.to_le_bytes().to_vec();
    body.extend(texts(&[job, "u.scope", result]));
    message(4, &[(1, 'o', "/org/freedesktop/systemd1"), (2, 's', "i.i"), (3, 's', "JobRemoved")], "uoss", &body)
}

/// What the peer does with a call.
#[derive(Clone)]
enum Play {
    /// A job of this path, whose end is told before the call is answered.
    Job(&'static str, &'static str),
    /// An error of systemd's.
    Error(&'static str),
    Empty,
    Silence,
}

/// One connection: what it was asked, as `member(arguments…)`.
struct Peer {
    address: Address,
    heard: mpsc::Receiver<String>,
    _folder: tempfile::TempDir,
    _thread: JoinHandle<()>,
}

impl Peer {
    fn start(plays: Vec<Play>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("private");
        let listener = UnixListener::bind(&path).unwrap();
        let (told, heard) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            // The client ends the connection when it is done or has had enough.
            let _ = serve(stream, plays, &told);
        });
        Self { address: Address::Private(path), heard, _folder: folder, _thread: thread }
    }

    fn manager(&self) -> Manager {
        Manager { addresses: vec![Address::Private("/nonexistent/socket".into()), self.address.clone()], patience: PATIENCE }
    }

    fn heard(&self) -> Vec<String> {
        self.heard.try_iter().collect()
    }
}

fn serve(mut stream: UnixStream, plays: Vec<Play>, told: &mpsc::Sender<String>) -> std::io::Result<()> {
    // As systemd does: what comes with the end of the authentication, in one read of at most this length, lies there unread until more comes.
    let mut hello = [0; 256];
    let length = stream.read(&mut hello)?;
    let hello = String::from_utf8_lossy(&hello[..length]);
    let uid: String = rustix::process::geteuid().as_raw().to_string().bytes().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hello, format!("\0AUTH EXTERNAL {uid}\r\nBEGIN\r\n"), "a message could be read with a BEGIN that comes later");
    stream.write_all(b"OK 0123456789abcdef0123456789abcdef\r\n")?;
    let mut plays = plays.into_iter();
    loop {
        let mut bytes = vec![0; FIXED];
        stream.read_exact(&mut bytes)?;
        let serial = u32::from_le_bytes(bytes[8..12].try_into().unwrap()).to_string();
        bytes.resize(wire::length(bytes[..FIXED].try_into().unwrap()).unwrap(), 0);
        stream.read_exact(&mut bytes[FIXED..])?;
        let call = wire::parse(&bytes).unwrap();
        assert_eq!(call.kind, Kind::Other);
        let to = (5, 'u', serial.as_str());
        if call.member == "Get" {
            let mut body = b"\x01s\0\0".to_vec();
            body.extend(texts(&["252.38-1"]));
            stream.write_all(&message(2, &[to], "v", &body))?;
            continue;
        }
        told.send(format!("{} {}", call.member, call.values().unwrap().join(" "))).unwrap();
        match plays.next().unwrap_or(Play::Empty) {
            Play::Job(job, result) => {
                stream.write_all(&job_removed("/other", "failed"))?;
                stream.write_all(&job_removed(job, result))?;
                stream.write_all(&message(2, &[to], "o", &texts(&[job])))?;
            }
            Play::Error(name) => {
                let name = format!("org.freedesktop.systemd1.{name}");
                stream.write_all(&message(3, &[to, (4, 's', &name)], "s", &texts(&["because"])))?;
            }
            Play::Empty => stream.write_all(&message(2, &[to], "", b""))?,
            Play::Silence => {}
        }
    }
}

fn scope() -> CgroupPath {
    CgroupPath::parse("a-b.slice:berth:c").unwrap()
}

fn some_limits() -> Resources {
    Resources {
        cpu: Some(Cpu { shares: Some(512), ..Default::default() }),
        memory: Some(Memory { limit: Some(1 << 20), ..Default::default() }),
        ..Default::default()
    }
}

fn start(peer: &Peer) -> Result<()> {
    peer.manager().start(&scope(), Some(rustix::process::getpid()), &some_limits(), true)
}

#[test]
fn a_scope_is_started_when_its_job_is_done() {
    let peer = Peer::start(vec![Play::Job("/job/1", "done")]);
    start(&peer).unwrap();
    assert_eq!(peer.heard(), ["StartTransientUnit berth-c.scope replace"]);
}

#[test]
fn a_failed_unit_of_the_same_name_is_cleared_away_once() {
    let peer = Peer::start(vec![Play::Error("UnitExists"), Play::Empty, Play::Job("/job/1", "done")]);
    start(&peer).unwrap();
    let again = "StartTransientUnit berth-c.scope replace";
    assert_eq!(peer.heard(), [again, "ResetFailedUnit berth-c.scope", again]);
    let peer = Peer::start(vec![Play::Error("UnitExists"), Play::Empty, Play::Error("UnitExists")]);
    let error = start(&peer).unwrap_err();
    let Error::Systemd { unit, source, .. } = &error else { panic!("{error:?}") };
    assert_eq!((unit.as_str(), source.to_string().as_str()), ("berth-c.scope", "org.freedesktop.systemd1.UnitExists: because"));
}

#[test]
fn a_slice_that_runs_already_is_given_its_limits() {
    let peer = Peer::start(vec![Play::Error("UnitExists"), Play::Empty]);
    let slice = CgroupPath::of_slice("/a.slice/a-b.slice").unwrap();
    peer.manager().start(&slice, None, &some_limits(), true).unwrap();
    assert_eq!(peer.heard(), ["StartTransientUnit a-b.slice replace", "SetUnitProperties a-b.slice"]);
}

#[test]
fn a_job_that_fails_and_one_that_never_ends_are_errors() {
    let peer = Peer::start(vec![Play::Job("/job/1", "timeout")]);
    let error = start(&peer).unwrap_err();
    assert!(matches!(&error, Error::Systemd { source: Failure::Job { result }, .. } if result == "timeout"), "{error:?}");
    let peer = Peer::start(vec![Play::Silence]);
    let manager = Manager { patience: Duration::from_millis(300), ..peer.manager() };
    let error = manager.start(&scope(), None, &Resources::default(), true).unwrap_err();
    let Error::Systemd { source: Failure::Late { stage }, .. } = &error else { panic!("{error:?}") };
    assert_eq!(stage, "the answer to StartTransientUnit");
}

#[test]
fn stopping_what_is_gone_is_done_and_the_failure_of_another_is_forgotten() {
    let peer = Peer::start(vec![Play::Error("NoSuchUnit")]);
    peer.manager().stop(&scope()).unwrap();
    assert_eq!(peer.heard(), ["StopUnit berth-c.scope replace"]);
    let peer = Peer::start(vec![Play::Job("/job/2", "done"), Play::Error("NoSuchUnit")]);
    peer.manager().stop(&scope()).unwrap();
    assert_eq!(peer.heard(), ["StopUnit berth-c.scope replace", "ResetFailedUnit berth-c.scope"]);
}

#[test]
fn where_no_systemd_is_each_socket_that_was_tried_is_named() {
    let manager = Manager { addresses: vec![Address::Bus("/nonexistent/bus".into())], patience: PATIENCE };
    let error = manager.stop(&scope()).unwrap_err();
    let Error::Systemd { source, .. } = error else { panic!("{error:?}") };
    assert!(source.to_string().contains("/nonexistent/bus"), "{source}");
}
