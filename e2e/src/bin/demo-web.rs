//! The program of the demo's image: a tiny web server. `demo-web [PORT [GREETING]]` serves one page, writes a line per request,
//! dies of /crash and ends on SIGTERM. `demo-web whoami` prints what an exec in its container sees.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::exit;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args().skip(1).peekable();
    if arguments.peek().is_some_and(|a| a == "whoami") {
        return whoami();
    }
    let port = arguments.next().and_then(|p| p.parse().ok()).unwrap_or(8080_u16);
    let greeting = arguments.next().or_else(|| std::env::var("GREETING").ok()).unwrap_or_else(|| "hello from berth".to_owned());

    // As PID 1 of a container the default action of a signal is nothing: it must be taken.
    let mut ends = SigSet::empty();
    ends.add(Signal::SIGTERM);
    ends.add(Signal::SIGINT);
    ends.thread_block()?;
    std::thread::spawn(move || {
        if let Ok(signal) = ends.wait() {
            println!("demo-web: {signal}, goodbye");
            exit(0)
        }
    });

    let listener = TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))?;
    println!("demo-web: serving on port {port}");
    for (number, stream) in (1_u64..).zip(listener.incoming()) {
        // A client that went away is its own problem.
        let _ = stream.and_then(|stream| serve(stream, number, &greeting));
    }
    Ok(())
}

fn whoami() -> std::io::Result<()> {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
    let pids = std::fs::read_dir("/proc")?.flatten().filter(|e| e.file_name().to_string_lossy().parse::<u32>().is_ok()).count();
    println!("uid {} on {}, {pids} processes in sight", nix::unistd::getuid(), host.trim());
    Ok(())
}

fn serve(stream: TcpStream, number: u64, greeting: &str) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    // The whole head: what is left unread at the end would turn the close into a reset.
    let mut head = BufReader::new((&stream).take(8192)).lines();
    let line = head.next().transpose()?.unwrap_or_default();
    while head.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let path = line.split(' ').nth(1).unwrap_or("/");
    println!("request {number}: {path}");
    let crash = path == "/crash";
    let page = if crash { "crashing\n".to_owned() } else { format!("{greeting} (request {number})\n") };
    let head =
        format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", page.len());
    (&stream).write_all((head + &page).as_bytes())?;
    if crash {
        eprintln!("demo-web: told to crash");
        exit(42)
    }
    Ok(())
}
