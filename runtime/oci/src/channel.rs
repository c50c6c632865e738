//! The socket between the launcher and the process it makes, until that one waits at its gate.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use berth_linux::fdpass;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

/// The longest message: an error's text or a list of warnings.
const MAX: usize = 32 * 1024;

/// What the new process says.
#[derive(Debug)]
pub(crate) enum Report {
    /// The process goes on as another one: its pid, and its pidfd as descriptor.
    Moved(i32),
    /// Time for the hooks that run in the launcher's namespaces.
    Hooks,
    /// It waits at its gate; the terminal's master is the descriptor.
    Ready(Vec<String>),
    /// It ends.
    Failed(String),
}

/// One end.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: OwnedFd,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<OwnedFd> for Channel {
    /// A datagram socket that has been made elsewhere.
    fn from(socket: OwnedFd) -> Self {
        Self { socket }
    }
}

impl Channel {
    /// Both ends.
    pub(crate) fn pair() -> io::Result<(Self, Self)> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self { socket: ours }, Self { socket: theirs }))
    }

    /// The new process's side: say something.
    pub(crate) fn report(&self, report: &Report, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let (tag, text) = match report {
            Report::Moved(pid) => (b'm', pid.to_string()),
            Report::Hooks => (b'h', String::new()),
            Report::Ready(warnings) => (b'r', warnings.join("\n")),
            Report::Failed(text) => (b'f', text.clone()),
        };
        let mut bytes = vec![tag];
        bytes.extend_from_slice(text.as_bytes());
        bytes.truncate(MAX);
        fdpass::send_with_fds(self.socket.as_fd(), &bytes, fds)?;
        Ok(())
    }

    /// The launcher's side: hear the next report. The end of the process is an error.
    pub(crate) fn hear(&self) -> io::Result<(Report, Option<OwnedFd>)> {
        let mut buffer = vec![0; MAX];
        let (length, mut fds) = fdpass::recv_with_fds(self.socket.as_fd(), &mut buffer, 1)?;
        let Some((tag, text)) = buffer[..length].split_first() else {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the process ended without a word"));
        };
        let text = String::from_utf8_lossy(text).into_owned();
        let report = match tag {
            b'm' => Report::Moved(text.parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?),
            b'h' => Report::Hooks,
            b'r' => Report::Ready(text.lines().map(str::to_owned).collect()),
            _ => Report::Failed(text),
        };
        Ok((report, fds.pop()))
    }

    /// The launcher's side: go on.
    pub(crate) fn go(&self) -> io::Result<()> {
        fdpass::send_with_fds(self.socket.as_fd(), b"g", &[])?;
        Ok(())
    }

    /// The new process's side: wait for the word to go on. False: the launcher is gone.
    pub(crate) fn wait_go(&self) -> io::Result<bool> {
        let mut buffer = [0; 1];
        let (length, _) = fdpass::recv_with_fds(self.socket.as_fd(), &mut buffer, 0)?;
        Ok(length == 1)
    }
}
