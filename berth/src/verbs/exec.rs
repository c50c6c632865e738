//! `berth exec`: a command in a container, with its streams, its terminal and its exit code, as `kubectl exec` has them.

use std::io::{IsTerminal, Read, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use berth_cri_api::v1::{ExecRequest, ExecSyncRequest};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use serde_json::Value;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::websocket::{self, Message, Sender};
use crate::{cli, client, find};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
/// How much of standard input is read at once.
const CHUNK: usize = 16 * 1024;

/// The terminal in raw mode, for as long as this lives.
struct Raw(Termios);

impl Raw {
    fn enter() -> Result<Raw> {
        let before = tcgetattr(std::io::stdin()).context("asking the terminal for its mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Drain, &raw).context("setting the terminal to raw mode")?;
        Ok(Raw(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.0);
    }
}

/// Runs the command, passes its streams on and ends with its exit code.
#[allow(clippy::print_stderr)]
pub async fn run(socket: &Path, kubelet: &Path, args: &cli::Exec) -> Result<ExitCode> {
    let mut client = client::runtime(client::connect(socket).await?);
    let wanted = find::Wanted { name: &args.name, container: args.container.as_deref(), previous: false };
    let found = find::container(&mut client, kubelet, wanted).await?;
    if let Some(note) = found.note {
        eprintln!("{note}");
    }
    let id = found.container.id;
    let failed = |status: tonic::Status| anyhow::anyhow!("exec in container {}: {}", &id[..id.len().min(13)], status.message());
    if args.timeout > 0 {
        let request = ExecSyncRequest { container_id: id.clone(), cmd: args.command.clone(), timeout: args.timeout };
        let reply = client.exec_sync(request).await.map_err(failed)?.into_inner();
        std::io::stdout().write_all(&reply.stdout)?;
        std::io::stderr().write_all(&reply.stderr)?;
        return Ok(exit_code(reply.exit_code.into()));
    }
    let tty = args.tty && (!args.stdin || std::io::stdin().is_terminal());
    if args.tty && !tty {
        eprintln!("Unable to use a TTY - input is not a terminal or the right kind of file");
    }
    let request =
        ExecRequest { container_id: id.clone(), cmd: args.command.clone(), tty, stdin: args.stdin, stdout: true, stderr: !tty };
    let url = client.exec(request).await.map_err(failed)?.into_inner().url;
    let (sender, receiver) = websocket::connect(&url).await?;
    let _raw = if tty && args.stdin { Some(Raw::enter()?) } else { None };
    converse(sender, receiver, args.stdin, tty).await
}

fn exit_code(code: i64) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(255))
}

/// Standard input in chunks. A thread of its own reads it: nothing can end a read of a terminal but the end of the process.
fn stdin_chunks(wanted: bool) -> mpsc::Receiver<Vec<u8>> {
    let (chunks, receiver) = mpsc::channel(4);
    if wanted {
        std::thread::spawn(move || {
            let mut input = std::io::stdin().lock();
            let mut buffer = vec![0; CHUNK];
            while let Ok(n @ 1..) = input.read(&mut buffer) {
                if chunks.blocking_send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
    }
    receiver
}

async fn send_size(sender: &mut Sender) -> Result<()> {
    let Ok(size) = tcgetwinsize(std::io::stdin()).or_else(|_| tcgetwinsize(std::io::stdout())) else { return Ok(()) };
    let text = serde_json::json!({"Width": size.ws_col, "Height": size.ws_row}).to_string();
    sender.send(RESIZE, text.as_bytes()).await
}

/// The signals that end the command's client: the terminal is given back first.
struct Ends(Signal, Signal);

impl Ends {
    fn new() -> Result<Ends> {
        Ok(Ends(signal(SignalKind::terminate())?, signal(SignalKind::hangup())?))
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
        }
    }
}

/// Passes the streams on until the command has ended.
async fn converse(mut sender: Sender, mut receiver: websocket::Receiver, stdin: bool, tty: bool) -> Result<ExitCode> {
    let (messages, mut incoming) = mpsc::channel(16);
    let reader = tokio::spawn(async move {
        // A message must not be dropped half-way: it is read here, and chosen among below.
        while let Some(message) = receiver.next().await? {
            if messages.send(message).await.is_err() {
                break;
            }
        }
        anyhow::Ok(())
    });
    let mut chunks = stdin_chunks(stdin);
    let mut resized = signal(SignalKind::window_change()).context("listening for the terminal's size")?;
    let mut ends = Ends::new()?;
    if tty {
        send_size(&mut sender).await?;
    }
    let mut input_open = stdin;
    let mut status = None;
    loop {
        tokio::select! {
            biased;
            () = ends.next() => return Ok(ExitCode::from(143)),
            message = incoming.recv() => match message {
                Some(Message::Data(STDOUT, bytes)) => put(&mut std::io::stdout(), &bytes)?,
                Some(Message::Data(STDERR, bytes)) => put(&mut std::io::stderr(), &bytes)?,
                Some(Message::Data(STATUS, bytes)) if !bytes.is_empty() => status = Some(bytes),
                Some(Message::Data(..)) => {}
                Some(Message::Ping(bytes)) => sender.pong(&bytes).await?,
                None => break,
            },
            chunk = chunks.recv(), if input_open => {
                let sent = match chunk {
                    Some(bytes) => sender.send(STDIN, &bytes).await,
                    None => {
                        input_open = false;
                        sender.end(STDIN).await.map(drop)
                    }
                };
                // The command may have ended with input left over: what it says still counts.
                input_open &= sent.is_ok();
            }
            _ = resized.recv(), if tty => send_size(&mut sender).await?,
        }
    }
    reader.await??;
    outcome(status.as_deref())
}

fn put(to: &mut impl Write, bytes: &[u8]) -> Result<()> {
    to.write_all(bytes)?;
    Ok(to.flush()?)
}

/// The exit code in the status that ends a command; another failure is an error.
fn outcome(status: Option<&[u8]>) -> Result<ExitCode> {
    let Some(bytes) = status else { bail!("the connection broke before the command had ended") };
    let status: Value = serde_json::from_slice(bytes).context("reading the command's status")?;
    if status["status"] == "Success" {
        return Ok(ExitCode::SUCCESS);
    }
    let causes = status.pointer("/details/causes").and_then(Value::as_array).into_iter().flatten();
    let code = causes.filter(|c| c["reason"] == "ExitCode").find_map(|c| c["message"].as_str()?.parse().ok());
    match code {
        Some(code) => Ok(exit_code(code)),
        None => bail!("{}", status["message"].as_str().unwrap_or("the command failed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_tells_the_exit_code_or_the_failure() {
        let of = |text: &str| outcome(Some(text.as_bytes()));
        assert_eq!(of(r#"{"status": "Success"}"#).expect("a code"), ExitCode::SUCCESS);
        let failed = r#"{"status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": [{"reason": "ExitCode", "message": "3"}]}}"#;
        assert_eq!(of(failed).expect("a code"), ExitCode::from(3));
        let error = of(r#"{"status": "Failure", "message": "no such program"}"#).expect_err("no code").to_string();
        assert_eq!(error, "no such program");
        assert!(outcome(None).is_err());
    }
}
