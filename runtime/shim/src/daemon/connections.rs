//! Connections of agents: accepting, reading requests, answering. An agent that goes away loses its execs and nothing else.

use std::os::fd::{AsFd, OwnedFd};

use berth_linux::epoll::EventFlags;
use berth_shim::protocol::{
    Event, FailureKind, FrameError, FromShim, PodNamespace, Reply, Request, ShimState, ToShim, VERSION, seq_of,
};
use rustix::io::Errno;
use rustix::net::SocketFlags;

use super::{Daemon, ReplyTo, Shutdown, failure};
use crate::clock::monotonic_ms;
use crate::link::Link;

/// A listener that could not be served is left alone for so long.
const ACCEPT_AGAIN_MS: u64 = 200;

/// One agent's connection.
pub struct Connection {
    link: Link,
    /// Its room for output is waited for.
    awaited: bool,
    /// Wants events.
    pub subscribed: bool,
}

impl Daemon {
    pub(super) fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = match rustix::net::accept_with(&self.parts.listener, flags) {
            Ok(socket) => socket,
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return,
            Err(_) => {
                // No descriptor or no memory for it now. It would wake us for ever.
                let _ = self.epoll.delete(self.parts.listener.as_fd());
                self.accept_at = Some(monotonic_ms() + ACCEPT_AGAIN_MS);
                return;
            }
        };
        // The socket's folder is root's alone; this holds if it ever is not.
        let ours = rustix::process::getuid();
        if !rustix::net::sockopt::socket_peercred(&socket).is_ok_and(|peer| peer.uid == ours) {
            return;
        }
        let token = self.next_token;
        self.next_token += 1;
        if self.epoll.add(socket.as_fd(), token, EventFlags::IN).is_ok() {
            self.connections.insert(token, Connection { link: Link::new(socket), awaited: false, subscribed: false });
        }
    }

    /// Listens again after connections could not be accepted.
    pub(super) fn listen_again(&mut self) {
        self.accept_at = None;
        if self.shutdown.is_none() && self.epoll.add(self.parts.listener.as_fd(), super::LISTENER, EventFlags::IN).is_err() {
            self.accept_at = Some(monotonic_ms() + ACCEPT_AGAIN_MS);
        }
    }

    pub(super) fn serve_connection(&mut self, token: u64, flags: EventFlags) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if flags.contains(EventFlags::OUT) {
            if connection.link.flush().is_err() {
                return self.close_connection(token);
            }
            self.set_interest(token);
        }
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if !connection.link.take_in() {
            return self.close_connection(token);
        }
        while let Some(connection) = self.connections.get_mut(&token) {
            match connection.link.next::<ToShim>() {
                Ok(Some((message, fds))) => {
                    self.handle(ReplyTo { connection: token, seq: message.seq }, message.request, fds);
                }
                Ok(None) => break,
                Err(FrameError::Body { body, source }) => match seq_of(&body) {
                    Some(seq) => {
                        let text = format!("shim protocol {VERSION} has no such request: {source}");
                        let reply = Reply::Error(failure(FailureKind::Unsupported, text));
                        self.answer(ReplyTo { connection: token, seq }, reply);
                    }
                    None => return self.close_connection(token),
                },
                Err(_) => return self.close_connection(token),
            }
        }
    }

    fn close_connection(&mut self, token: u64) {
        let Some(connection) = self.connections.remove(&token) else {
            return;
        };
        let _ = self.epoll.delete(connection.link.as_fd());
        self.kill_execs_of(token);
    }

    fn set_interest(&mut self, token: u64) {
        if let Some(connection) = self.connections.get_mut(&token)
            && connection.awaited != connection.link.wants_write()
        {
            connection.awaited = !connection.awaited;
            let interest = if connection.awaited { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
            let _ = self.epoll.modify(connection.link.as_fd(), token, interest);
        }
    }

    fn send(&mut self, token: u64, message: &FromShim, fds: Vec<OwnedFd>) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        match connection.link.send(message, fds) {
            Ok(()) => self.set_interest(token),
            Err(_) => self.close_connection(token),
        }
    }

    pub(super) fn answer_with(&mut self, to: ReplyTo, reply: Reply, fds: Vec<OwnedFd>) {
        self.send(to.connection, &FromShim::Reply { seq: to.seq, reply }, fds);
    }

    pub(super) fn tell(&mut self, token: u64, event: Event) {
        self.send(token, &FromShim::Event(event), Vec::new());
    }

    fn handle(&mut self, to: ReplyTo, request: Request, fds: Vec<OwnedFd>) {
        match request {
            Request::Hello { .. } => {
                let reply = Reply::Hello { version: VERSION, pid: own_pid(), sandbox_id: self.parts.sandbox_id.clone() };
                self.answer(to, reply);
            }
            Request::Namespaces => self.namespaces(to),
            // What is left then is no state: an agent would take what has been swept away for removed.
            Request::State | Request::Create { .. } | Request::Exec { .. } if self.shutdown.is_some() => {
                self.answer(to, Reply::Error(failure(FailureKind::WrongState, "the shim is being shut down")));
            }
            Request::State => {
                let state = self.state();
                self.answer(to, Reply::State(state));
            }
            Request::Subscribe => {
                if let Some(connection) = self.connections.get_mut(&to.connection) {
                    connection.subscribed = true;
                }
                self.answer(to, Reply::Done);
            }
            Request::Create { id, ext } => self.create(to, id, ext, fds),
            Request::Start { id } => self.start(to, &id),
            Request::Kill { id, exec: None, signal, all } => self.kill(to, &id, signal, all),
            Request::Kill { id, exec: Some(exec), signal, all } => self.kill_exec(to, &id, &exec, signal, all),
            Request::Exec { container, id, ext } => self.exec(to, container, id, ext, fds),
            Request::Attach { id, stdin, stdout, stderr } => self.attach(to, &id, stdin, stdout, stderr),
            Request::Resize { id, exec, width, height } => {
                let result = self.resize(&id, exec.as_deref(), width, height);
                self.answer_result(to, result);
            }
            Request::CloseStdin { id } => {
                let result = self.close_stdin(&id);
                self.answer_result(to, result);
            }
            Request::ReopenLog { id } => self.reopen_log(to, &id),
            Request::Delete { id, force } => self.delete(Some(to), &id, force),
            Request::Shutdown { force } => self.shut_down(to, force),
        }
    }

    fn namespaces(&mut self, to: ReplyTo) {
        let mut kinds: Vec<PodNamespace> = Vec::new();
        let mut fds = Vec::new();
        for (kind, fd) in &self.parts.pod.namespaces {
            match fd.try_clone() {
                Ok(fd) => fds.push(fd),
                Err(error) => {
                    let failure = super::system_failure("duplicate a namespace", &error);
                    return self.answer(to, Reply::Error(failure));
                }
            }
            kinds.push(*kind);
        }
        let pause = self.parts.pod.pause.as_ref().and_then(|pause| {
            fds.push(pause.pidfd.as_fd().try_clone_to_owned().ok()?);
            Some(pause.pid.as_raw_nonzero().get())
        });
        self.answer_with(to, Reply::Namespaces { kinds, pause }, fds);
    }

    fn state(&self) -> ShimState {
        ShimState {
            sandbox_id: self.parts.sandbox_id.clone(),
            pid: own_pid(),
            pause: self.parts.pod.pause.as_ref().map(|pause| pause.pid.as_raw_nonzero().get()),
            containers: self.containers.values().map(|container| container.state(&self.execs)).collect(),
            log_bytes_dropped: self.logs.dropped,
        }
    }

    fn shut_down(&mut self, to: ReplyTo, force: bool) {
        if !self.containers.is_empty() && !force {
            let text = format!("{} containers have not been deleted", self.containers.len());
            return self.answer(to, Reply::Error(failure(FailureKind::WrongState, text)));
        }
        if self.shutdown.is_some() {
            return self.answer(to, Reply::Error(failure(FailureKind::WrongState, "the shim is being shut down")));
        }
        self.shutdown = Some(Shutdown { reply: Some(to), deadline: None });
        let _ = self.epoll.delete(self.parts.listener.as_fd());
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            self.delete(None, &id, true);
        }
        self.go_on_shutting_down();
    }

    /// The next step of a shutdown, after each thing that ended.
    pub(super) fn go_on_shutting_down(&mut self) {
        if self.shutdown.is_none() || !self.containers.is_empty() {
            return;
        }
        if let Some(pause) = &self.parts.pod.pause {
            let _ = pause.pidfd.signal(9);
            return;
        }
        if self.logs.is_running() {
            let deadline = monotonic_ms() + super::WRITER_END_MS;
            if let Some(shutdown) = &mut self.shutdown
                && shutdown.deadline.is_none()
            {
                shutdown.deadline = Some(deadline);
                // It ends when it has written what it has.
                self.release_writer();
            }
            return;
        }
        if let Some(to) = self.shutdown.as_mut().and_then(|shutdown| shutdown.reply.take()) {
            self.answer(to, Reply::Done);
        }
        self.done = true;
    }
}

/// The shim's process id.
fn own_pid() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}
