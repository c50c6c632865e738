//! What a process that nobody leads to its program says on its way there.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use berth_linux::fdpass::recv_with_fds;

use crate::Error;

/// What has been heard of a process made by [`super::become_exec`]. When its socket has ended, the process has ended or executes its program.
#[derive(Debug, Default)]
pub struct Heard {
    /// The master of its terminal.
    pub console: Option<OwnedFd>,
    /// Everything but executing the program was done.
    ready: bool,
    /// Why not.
    failure: Option<String>,
    /// Why the program could not be executed: JSON of a [`super::StartError`], or nothing.
    pub start_error: Vec<u8>,
}

impl Heard {
    /// Takes in what the socket, which never waits, holds now. True: nothing more will come.
    pub fn listen(&mut self, socket: BorrowedFd<'_>) -> bool {
        let mut buffer = [0; 8192];
        loop {
            let (length, mut fds) = match recv_with_fds(socket, &mut buffer, 1) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(_) | Ok((0, _)) => return true,
                Ok(heard) => heard,
            };
            match &buffer[..length] {
                [b'r', ..] => {
                    self.ready = true;
                    self.console = fds.pop();
                }
                [b'f', text @ ..] => self.failure = Some(String::from_utf8_lossy(text).into_owned()),
                text => self.start_error = text.to_vec(),
            }
        }
    }

    /// Why there is no process that could be started, after the end of the socket.
    pub fn check(&mut self) -> Result<(), Error> {
        match self.failure.take() {
            Some(message) => Err(Error::Init { message }),
            None if self.ready => Ok(()),
            None => Err(Error::Channel(io::Error::new(io::ErrorKind::UnexpectedEof, "the process ended without a word"))),
        }
    }
}
