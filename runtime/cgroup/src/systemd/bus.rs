//! A connection to systemd: its own socket, where nobody is in between, or the system bus. Blocking, with a deadline for everything, and usable
//! from a process with one thread, which no D-Bus library that spawns its own would be.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::Failure;
use super::wire::{self, Arguments, FIXED, Kind, Message, Target};

/// Where systemd's manager is.
pub(super) const MANAGER: Target = Target {
    destination: Some("org.freedesktop.systemd1"),
    path: "/org/freedesktop/systemd1",
    interface: "org.freedesktop.systemd1.Manager",
};

/// The message bus itself.
const BUS: Target =
    Target { destination: Some("org.freedesktop.DBus"), path: "/org/freedesktop/DBus", interface: "org.freedesktop.DBus" };

/// The signals that are waited for.
const MATCH: &str = "type='signal',interface='org.freedesktop.systemd1.Manager',member='JobRemoved'";

/// The longest line of the authentication.
const MAX_LINE: usize = 4096;

/// A socket on which systemd can be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    /// systemd itself, for root alone.
    Private(PathBuf),
    /// A message bus on which it has its name.
    Bus(PathBuf),
}

impl Address {
    /// Where they are on every machine with systemd: its own socket first, because it is there before the bus is and when that is gone.
    pub(crate) fn usual() -> [Self; 2] {
        [Self::Private("/run/systemd/private".into()), Self::Bus("/run/dbus/system_bus_socket".into())]
    }

    fn path(&self) -> &Path {
        match self {
            Self::Private(path) | Self::Bus(path) => path,
        }
    }
}

/// An open connection.
#[derive(Debug)]
pub(super) struct Bus {
    stream: UnixStream,
    serial: u32,
    on_bus: bool,
    /// Jobs whose end was told while something else was waited for: (path, result).
    ended: Vec<(String, String)>,
    /// What is being waited for, should it not come.
    stage: String,
}

impl Bus {
    /// Connects to the first address that answers.
    pub(super) fn open(addresses: &[Address], deadline: Instant) -> Result<Self, Failure> {
        let mut tried = Vec::new();
        for address in addresses {
            match Self::open_one(address, deadline) {
                Ok(bus) => return Ok(bus),
                Err(failure) => tried.push(format!("{}: {}", address.path().display(), chain(&failure))),
            }
        }
        Err(Failure::Unreachable { tried: tried.join("; ") })
    }

    fn open_one(address: &Address, deadline: Instant) -> Result<Self, Failure> {
        let io = |errno: rustix::io::Errno| Failure::Io { action: "connect to it", source: errno.into() };
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(io)?;
        // Bounds the connecting too, should nobody accept.
        let patience = left(deadline).ok_or_else(|| late("the connection"))?;
        set_socket_timeout(&socket, Timeout::Send, Some(patience)).map_err(io)?;
        let address_of_it = SocketAddrUnix::new(address.path()).map_err(io)?;
        connect(&socket, &address_of_it).map_err(|errno| match errno {
            rustix::io::Errno::AGAIN => late("the connection"),
            errno => io(errno),
        })?;
        let on_bus = matches!(address, Address::Bus(_));
        let mut bus = Self { stream: socket.into(), serial: 0, on_bus, ended: Vec::new(), stage: String::new() };
        bus.authenticate(deadline)?;
        if on_bus {
            bus.call(&BUS, "Hello", &Arguments::default(), deadline)?;
            bus.call(&BUS, "AddMatch", &Arguments::default().text(MATCH), deadline)?;
            // Without a subscriber systemd tells a bus nothing. On its own socket it always does.
            bus.manage("Subscribe", &Arguments::default(), deadline)?;
        }
        Ok(bus)
    }

    /// Says who we are and begins, in one piece, before the answer is there. systemd reads what follows `BEGIN` together with it, and then looks
    /// at it only when still more comes: a first message that catches up with a `BEGIN` sent on its own is never answered.
    fn authenticate(&mut self, deadline: Instant) -> Result<(), Failure> {
        "the authentication".clone_into(&mut self.stage);
        let uid = rustix::process::geteuid().as_raw().to_string();
        let uid: String = uid.bytes().map(|byte| format!("{byte:02x}")).collect();
        self.send(format!("\0AUTH EXTERNAL {uid}\r\nBEGIN\r\n").as_bytes(), deadline)?;
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            let mut byte = [0];
            self.receive(&mut byte, deadline)?;
            line.push(byte[0]);
            if line.len() > MAX_LINE {
                return Err(Failure::Protocol("an endless answer to the authentication"));
            }
        }
        if line.starts_with(b"OK ") { Ok(()) } else { Err(Failure::Denied) }
    }

    /// Calls a method of systemd's manager.
    pub(super) fn manage(&mut self, member: &str, arguments: &Arguments, deadline: Instant) -> Result<Message, Failure> {
        self.call(&MANAGER, member, arguments, deadline)
    }

    fn call(&mut self, target: &Target, member: &str, arguments: &Arguments, deadline: Instant) -> Result<Message, Failure> {
        self.serial += 1;
        self.stage = format!("the answer to {member}");
        let destination = target.destination.filter(|_| self.on_bus);
        let target = Target { destination, ..*target };
        self.send(&wire::call(self.serial, &target, member, arguments), deadline)?;
        loop {
            let message = self.next(deadline)?;
            match message.kind {
                Kind::Return if message.reply_to == self.serial => return Ok(message),
                Kind::Error if message.reply_to == self.serial => {
                    let text = message.values().ok().and_then(|values| values.into_iter().next()).unwrap_or_default();
                    return Err(Failure::Refused { name: message.error, message: text });
                }
                _ => self.note(&message)?,
            }
        }
    }

    /// The number of systemd's version.
    pub(super) fn version(&mut self, deadline: Instant) -> Result<u32, Failure> {
        let arguments = Arguments::default().text(MANAGER.interface).text("Version");
        let target = Target { interface: "org.freedesktop.DBus.Properties", ..MANAGER };
        let answer = self.call(&target, "Get", &arguments, deadline)?;
        let text = answer.variant_text()?;
        // `252.38-1~deb12u1`, `v255-3-gabc`.
        let digits = text.trim_start_matches(|c: char| !c.is_ascii_digit());
        let digits = digits.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
        digits.parse().map_err(|_| Failure::Protocol("a version without a number"))
    }

    /// Waits for the end of a job: `done` when it went well.
    pub(super) fn wait_for(&mut self, job: &str, deadline: Instant) -> Result<String, Failure> {
        self.stage = format!("the end of {job}");
        loop {
            if let Some(at) = self.ended.iter().position(|(path, _)| path == job) {
                return Ok(self.ended.swap_remove(at).1);
            }
            let message = self.next(deadline)?;
            self.note(&message)?;
        }
    }

    fn note(&mut self, message: &Message) -> Result<(), Failure> {
        if message.kind == Kind::Signal && message.member == "JobRemoved" {
            // (number, job, unit, result)
            let mut values = message.values()?.into_iter().skip(1);
            if let (Some(job), Some(_), Some(result)) = (values.next(), values.next(), values.next()) {
                self.ended.push((job, result));
            }
        }
        Ok(())
    }

    fn next(&mut self, deadline: Instant) -> Result<Message, Failure> {
        let mut bytes = vec![0; FIXED];
        self.receive(&mut bytes, deadline)?;
        let mut fixed = [0; FIXED];
        fixed.copy_from_slice(&bytes);
        bytes.resize(wire::length(&fixed)?, 0);
        self.receive(&mut bytes[FIXED..], deadline)?;
        wire::parse(&bytes)
    }

    fn send(&mut self, bytes: &[u8], deadline: Instant) -> Result<(), Failure> {
        let io = |source| Failure::Io { action: "write to it", source };
        let patience = left(deadline).ok_or_else(|| late(&self.stage))?;
        self.stream.set_write_timeout(Some(patience)).map_err(io)?;
        self.stream.write_all(bytes).map_err(|error| self.failed(error, "write to it"))
    }

    fn receive(&mut self, bytes: &mut [u8], deadline: Instant) -> Result<(), Failure> {
        let io = |source| Failure::Io { action: "read from it", source };
        let mut filled = 0;
        while filled < bytes.len() {
            let patience = left(deadline).ok_or_else(|| late(&self.stage))?;
            self.stream.set_read_timeout(Some(patience)).map_err(io)?;
            match self.stream.read(&mut bytes[filled..]) {
                Ok(0) => return Err(io(std::io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error, "read from it")),
            }
        }
        Ok(())
    }

    fn failed(&self, source: std::io::Error, action: &'static str) -> Failure {
        match source.kind() {
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => late(&self.stage),
            _ => Failure::Io { action, source },
        }
    }
}

fn late(stage: &str) -> Failure {
    Failure::Late { stage: stage.to_owned() }
}

/// The time until the deadline; none when it has passed.
fn left(deadline: Instant) -> Option<Duration> {
    Some(deadline.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero())
}

/// An error with its causes in one line: each address that was tried is one.
fn chain(failure: &Failure) -> String {
    use std::error::Error;
    match failure.source() {
        Some(source) => format!("{failure}: {source}"),
        None => failure.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::Value;
    use super::*;

    const CONFIG: &str = "<busconfig><type>session</type><auth>EXTERNAL</auth><listen>unix:path=PATH</listen>\
        <policy context=\"default\"><allow send_destination=\"*\"/><allow receive_type=\"method_return\"/>\
        <allow receive_type=\"error\"/><allow receive_type=\"signal\"/><allow own=\"*\"/></policy></busconfig>";

    /// libdbus checks each byte of a message against its signature, and ends the connection of who sends a wrong one.
    #[test]
    fn a_real_bus_finds_nothing_wrong_with_our_messages() {
        let folder = tempfile::tempdir().unwrap();
        let (path, config) = (folder.path().join("bus"), folder.path().join("config"));
        std::fs::write(&config, CONFIG.replace("PATH", &path.display().to_string())).unwrap();
        let config = format!("--config-file={}", config.display());
        let daemon = std::process::Command::new("dbus-daemon").args([&config, "--nofork", "--nopidfile"]).spawn();
        let Ok(mut daemon) = daemon else {
            #[allow(clippy::print_stderr, reason = "how a test says that it was skipped")]
            return eprintln!("SKIPPED a_real_bus_finds_nothing_wrong_with_our_messages: no dbus-daemon");
        };
        let up = berth_testkit::wait_until(Duration::from_secs(20), || UnixStream::connect(&path).is_ok());
        let result = std::panic::catch_unwind(|| talk(&path));
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        assert!(up);
        result.unwrap();
    }

    fn talk(path: &Path) {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut bus =
            Bus { stream: UnixStream::connect(path).unwrap(), serial: 0, on_bus: true, ended: Vec::new(), stage: String::new() };
        bus.authenticate(deadline).unwrap();
        let name = bus.call(&BUS, "Hello", &Arguments::default(), deadline).unwrap().values().unwrap();
        assert!(name[0].starts_with(":1."), "{name:?}");
        bus.call(&BUS, "AddMatch", &Arguments::default().text(MATCH), deadline).unwrap();
        let every_kind = [
            ("Slice", Value::Text("a-b.slice".into())),
            ("Delegate", Value::Bool(true)),
            ("MemoryMax", Value::Count(1 << 30)),
            ("PIDs", Value::Pids(vec![1, 2])),
            ("AllowedCPUs", Value::Bytes(vec![5])),
            ("DeviceAllow", Value::Pairs(vec![("/dev/char/1:3".into(), "rwm".into()), ("char-pts".into(), "rw".into())])),
            ("DeviceAllow", Value::Pairs(Vec::new())),
        ];
        let start = Arguments::default().text("berth-c.scope").text("replace").properties(&every_kind).no_units();
        let set = Arguments::default().text("berth-c.scope").bool(true).properties(&every_kind);
        for (member, arguments) in [("StartTransientUnit", &start), ("SetUnitProperties", &set)] {
            // The answer of the bus in place of the systemd that it has not.
            let failure = bus.manage(member, arguments, deadline).unwrap_err();
            let Failure::Refused { name, .. } = &failure else { panic!("{member}: {failure:?}") };
            assert_eq!(name, "org.freedesktop.DBus.Error.ServiceUnknown", "{member}");
        }
    }
}
