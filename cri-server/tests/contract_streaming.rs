//! The contract of exec, attach and port-forward over real connections to real pods: what clients rely on, what a slow or rude
//! client can not do, and how it ends.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::HashMap;
use std::net::TcpListener as StdListener;
use std::os::fd::AsFd;
use std::time::Duration;

use berth_cri_api::v1;
use berth_testkit::{in_namespaces, wait_until};
use support::streams::{Channels, Event, Spdy, soon, upgrade, upgrade_spdy, upgrade_websocket};
use support::{Agent, container};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const SOON: Duration = Duration::from_secs(60);
const V4: &str = "v4.channel.k8s.io";
const FORWARD: &str = "portforward.k8s.io";

fn exec_url(agent: &Agent, id: &str, command: &[&str], tty: bool, stdin: bool) -> String {
    let request = v1::ExecRequest {
        container_id: id.into(),
        cmd: command.iter().map(|c| (*c).to_owned()).collect(),
        tty,
        stdin,
        stdout: true,
        stderr: !tty,
    };
    let mut client = agent.runtime();
    agent.client.block_on(client.exec(request)).unwrap().into_inner().url
}

fn attach_url(agent: &Agent, id: &str, stdin: bool, tty: bool) -> String {
    let request = v1::AttachRequest { container_id: id.into(), stdin, tty, stdout: true, stderr: false };
    let mut client = agent.runtime();
    agent.client.block_on(client.attach(request)).unwrap().into_inner().url
}

fn forward_url(agent: &Agent, pod: &str, port: Vec<i32>) -> String {
    let mut client = agent.runtime();
    let request = v1::PortForwardRequest { pod_sandbox_id: pod.into(), port };
    agent.client.block_on(client.port_forward(request)).unwrap().into_inner().url
}

/// A pod with one container that sleeps.
fn pod(agent: &Agent, name: &str) -> (String, String) {
    let pod = agent.run_sandbox(name);
    let id = agent.run_script(&pod, name, "c", "exec sleep 1000");
    (pod, id)
}

/// A port inside the container's pod, served by us.
fn listen(agent: &Agent, id: &str, address: &str) -> TcpListener {
    let netns = std::fs::File::open(format!("/proc/{}/ns/net", agent.container_pid(id))).unwrap();
    let listener = berth_linux::ns::with_netns(netns.as_fd(), || StdListener::bind(address)).unwrap().unwrap();
    listener.set_nonblocking(true).unwrap();
    let _inside = agent.client.enter();
    TcpListener::from_std(listener).unwrap()
}

/// Sends back what comes, to the end.
async fn echo(listener: TcpListener) {
    loop {
        let (mut tcp, _) = listener.accept().await.unwrap();
        tokio::spawn(async move {
            let (mut read, mut write) = tcp.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = write.shutdown().await;
        });
    }
}

fn processes(pattern: &str) -> usize {
    let lines = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|e| std::fs::read(e.path().join("cmdline")).ok());
    lines.filter(|line| String::from_utf8_lossy(line).replace('\0', " ").contains(pattern)).count()
}

#[test]
fn exit_codes_and_both_outputs_travel_in_every_protocol() {
    in_namespaces(|| {
        let agent = Agent::start();
        let (_, id) = pod(&agent, "p");
        let script = |code: u32| format!("printf out; printf err >&2; exit {code}");
        for (protocol, modern) in
            [(V4, true), ("v3.channel.k8s.io", false), ("v2.channel.k8s.io", false), ("channel.k8s.io", false)]
        {
            for code in [0, 1] {
                let url = exec_url(&agent, &id, &["sh", "-c", &script(code)], false, false);
                agent.client.block_on(async {
                    let mut spdy = Spdy::connect(&url, protocol).await;
                    let [mut error, mut stdout, mut stderr] = spdy.streams(["error", "stdout", "stderr"]).await;
                    assert_eq!((stdout.read_to_end().await, stderr.read_to_end().await), (b"out".to_vec(), b"err".to_vec()));
                    let text = String::from_utf8(error.read_to_end().await).unwrap();
                    match (modern, code) {
                        (true, 0) => assert!(text.contains("\"status\":\"Success\""), "{text}"),
                        (true, _) => assert!(text.contains("{\"reason\":\"ExitCode\",\"message\":\"1\"}"), "{text}"),
                        (false, 0) => assert_eq!(text, ""),
                        (false, _) => assert_eq!(text, "command terminated with non-zero exit code: exit status 1"),
                    }
                    assert!(spdy.said_goodbye().await);
                });
            }
        }
        for protocol in ["v5.channel.k8s.io", V4, "v4.base64.channel.k8s.io", "channel.k8s.io", "base64.channel.k8s.io", ""] {
            let url = exec_url(&agent, &id, &["sh", "-c", &script(3)], false, false);
            let seen = agent.client.block_on(async { Channels::connect(&url, protocol).await.rest().await });
            assert_eq!((&seen[&1][..], &seen[&2][..]), (&b"out"[..], &b"err"[..]), "{protocol}");
            let status = String::from_utf8(seen[&3].clone()).unwrap();
            let modern = protocol.starts_with('v');
            assert_eq!(status.contains("NonZeroExitCode"), modern, "{protocol}: {status}");
            assert!(status.contains("exit status 3"), "{protocol}: {status}");
        }
        agent.finish();
    });
}

#[test]
fn a_killed_command_is_137_and_one_that_can_not_start_is_told_as_an_error() {
    in_namespaces(|| {
        let agent = Agent::start();
        let (_, id) = pod(&agent, "p");
        for (command, reason, cause) in
            [(vec!["sh", "-c", "kill -9 $$"], "NonZeroExitCode", Some("137")), (vec!["no-such-program"], "InternalError", None)]
        {
            let url = exec_url(&agent, &id, &command, false, false);
            agent.client.block_on(async {
                let mut spdy = Spdy::connect(&url, &format!("v5.channel.k8s.io,{V4}")).await;
                let [mut error, ..] = spdy.streams(["error", "stdout", "stderr"]).await;
                let status = error.status().await;
                assert_eq!((&status["status"], &status["reason"]), (&"Failure".into(), &reason.into()), "{status}");
                assert_eq!(status["details"]["causes"][0]["message"].as_str(), cause, "{status}");
                assert!(cause.is_some() || status["message"].as_str().unwrap().contains("no-such-program"), "{status}");
            });
        }
        agent.finish();
    });
}

#[test]
fn the_end_of_a_clients_input_is_the_end_of_the_commands_input() {
    in_namespaces(|| {
        let agent = Agent::start();
        let (_, id) = pod(&agent, "p");
        let text = vec![b'x'; 3_000_000];
        let url = exec_url(&agent, &id, &["cat"], false, true);
        agent.client.block_on(async {
            let mut spdy = Spdy::connect(&url, V4).await;
            let [mut error, stdin, mut stdout, _] = spdy.streams(["error", "stdin", "stdout", "stderr"]).await;
            let (text, copy) = (&text, text.clone());
            let feed = async {
                for piece in copy.chunks(50_000) {
                    stdin.send(piece).await;
                }
                stdin.finish().await;
            };
            let (seen, ()) = tokio::join!(stdout.read_to_end(), feed);
            assert!(seen == *text);
            assert_eq!(error.status().await["status"], "Success");
        });
        let url = exec_url(&agent, &id, &["cat"], false, true);
        agent.client.block_on(async {
            let mut channels = Channels::connect(&url, "v5.channel.k8s.io").await;
            channels.send(0, b"in pieces ").await;
            channels.send(0, b"and whole").await;
            channels.send(255, &[0]).await;
            assert_eq!(channels.rest().await[&1], b"in pieces and whole");
        });
        agent.finish();
    });
}

#[test]
fn a_terminal_is_resized_and_hung_up() {
    in_namespaces(|| {
        let agent = Agent::start();
        let (_, id) = pod(&agent, "p");
        let url = exec_url(&agent, &id, &["sh", "-c", "while read x; do busybox stty size; done"], true, true);
        agent.client.block_on(async {
            let mut spdy = Spdy::connect(&url, V4).await;
            let [_error, stdin, mut stdout, resize] = spdy.streams(["error", "stdin", "stdout", "resize"]).await;
            resize.send(b"{\"Width\":11").await;
            resize.send(b"1,\"Height\":22}\n{\"Width\":0,\"Height\":0}").await;
            // The sizes travel beside the input: it is asked until it has arrived.
            let mut seen = Vec::new();
            while !String::from_utf8_lossy(&seen).contains("22 111") {
                stdin.send(b"\n").await;
                seen.extend(stdout.read_until(|text| text.ends_with(b"\n")).await);
            }
            drop((stdin, stdout, resize));
            spdy.hang_up().await;
        });
        assert!(wait_until(SOON, || processes("busybox stty size") == 0), "the shell was not hung up");
        let url = exec_url(&agent, &id, &["sh", "-c", "read x; busybox stty size"], true, true);
        agent.client.block_on(async {
            let mut channels = Channels::connect(&url, "v5.channel.k8s.io").await;
            channels.send(4, b"{\"Width\":99,\"Height\":33}").await;
            channels.send(0, b"\n").await;
            let seen = channels.rest().await;
            assert!(!seen.contains_key(&2) && seen[&1].starts_with(b"\r\n"), "{seen:?}");
        });
        agent.finish();
    });
}

#[test]
fn a_client_that_hangs_up_breaks_the_pipes_and_kills_nobody() {
    in_namespaces(|| {
        let agent = Agent::start();
        let (_, id) = pod(&agent, "p");
        for (script, dies) in [("while echo 4711; do sleep 0.1; done", true), ("echo up; exec sleep 4712", false)] {
            let url = exec_url(&agent, &id, &["sh", "-c", script], false, false);
            agent.client.block_on(async {
                let mut spdy = Spdy::connect(&url, V4).await;
                let [_error, mut stdout, _] = spdy.streams(["error", "stdout", "stderr"]).await;
                stdout.read_until(|text| !text.is_empty()).await;
                drop(stdout);
                spdy.hang_up().await;
            });
            if dies {
                assert!(wait_until(SOON, || processes("echo 4711") == 0), "it writes on into nothing");
            } else {
                assert_eq!(processes("sleep 4712"), 1);
            }
        }
        agent.finish();
    });
}

#[test]
fn a_token_is_for_one_use_and_what_is_no_upgrade_is_refused() {
    in_namespaces(|| {
        let agent = Agent::start();
        let (pod, id) = pod(&agent, "p");
        let url = || exec_url(&agent, &id, &["true"], false, false);
        let forward = || forward_url(&agent, &pod, vec![]);
        agent.client.block_on(async {
            let first = tokio::task::block_in_place(url);
            Spdy::connect(&first, V4).await;
            for again in [upgrade_spdy(&first, V4).await.0, upgrade_websocket(&first, V4).await.0] {
                assert!(again.starts_with("HTTP/1.1 404 "), "{again}");
            }
        });
        let key = ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==");
        let spdy = ("Upgrade", "SPDY/3.1");
        let version = ("X-Stream-Protocol-Version", V4);
        for (headers, method, want) in [
            (vec![], "GET", "400"),
            (vec![spdy, version], "PUT", "405"),
            (vec![spdy, version, ("Content-Length", "5")], "POST", "400"),
            (vec![spdy], "POST", "400"),
            (vec![spdy, ("X-Stream-Protocol-Version", "v9.channel.k8s.io")], "POST", "403"),
            (vec![spdy, ("X-Stream-Protocol-Version", "v9.channel.k8s.io, v5.channel.k8s.io")], "POST", "101"),
            (vec![("Upgrade", "websocket"), key], "GET", "426"),
            (vec![("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")], "GET", "400"),
            (
                vec![("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"), key, ("Sec-WebSocket-Protocol", "v9")],
                "GET",
                "403",
            ),
        ] {
            let url = url();
            let (head, _) = agent.client.block_on(upgrade(&url, method, &headers));
            assert!(head.starts_with(&format!("HTTP/1.1 {want} ")), "{headers:?}: {head}");
            assert!(
                want != "403"
                    || head.contains("websocket")
                    || head.contains("X-Accepted-Stream-Protocol-Versions")
                    || headers.len() > 2
            );
        }
        let (head, _) = agent.client.block_on(upgrade_websocket(&forward(), V4));
        assert!(head.starts_with("HTTP/1.1 400 "), "no port was named: {head}");
        let (head, _) =
            agent.client.block_on(upgrade_websocket(&forward_url(&agent, &pod, (1..=6).collect()), "v4.base64.channel.k8s.io"));
        assert!(head.starts_with("HTTP/1.1 400 "), "base64 has digits only: {head}");
        agent.finish();
    });
}

#[test]
fn a_reader_that_is_slow_holds_up_nobody_else_and_loses_nothing() {
    in_namespaces(|| {
        let agent = Agent::start();
        let (_, id) = pod(&agent, "p");
        let url = exec_url(&agent, &id, &["sh", "-c", "head -c 30000000 /dev/zero; exit 5"], false, true);
        let (head, mut slow) = agent.client.block_on(upgrade_websocket(&url, V4));
        assert!(head.starts_with("HTTP/1.1 101 "));
        // Its command is stuck once all buffers are full: much less than its output.
        assert!(wait_until(SOON, || processes("head -c 30000000") > 0));
        let others = [1, 2, 3].map(|n| exec_url(&agent, &id, &["sh", "-c", &format!("echo {n}")], false, false));
        for (n, url) in (1..).zip(&others) {
            let seen = agent.client.block_on(async { Channels::connect(url, V4).await.rest().await });
            assert_eq!(seen[&1], format!("{n}\n").as_bytes());
        }
        assert_eq!(agent.exec(&id, &["echo", "sync"], 30).unwrap().stdout, b"sync\n");
        assert!(processes("head -c 30000000") > 0, "it can not have ended");
        // A ping in between is answered.
        agent.client.block_on(async {
            slow.write_all(&support::streams::masked(0x89, b"there?")).await.unwrap();
            let mut seen: HashMap<u8, usize> = HashMap::new();
            let (mut pong, mut status) = (false, Vec::new());
            loop {
                let mut head = [0u8; 2];
                soon(slow.read_exact(&mut head)).await.unwrap();
                let length = match head[1] {
                    126 => usize::from(slow.read_u16().await.unwrap()),
                    127 => slow.read_u64().await.unwrap() as usize,
                    n => usize::from(n),
                };
                let mut payload = vec![0; length];
                soon(slow.read_exact(&mut payload)).await.unwrap();
                match head[0] & 15 {
                    8 => break,
                    10 => pong = payload == b"there?",
                    _ => {
                        *seen.entry(payload[0]).or_default() += length - 1;
                        if payload[0] == 3 {
                            status.extend_from_slice(&payload[1..]);
                        }
                    }
                }
            }
            assert_eq!(seen[&1], 30_000_000);
            assert!(pong && String::from_utf8(status).unwrap().contains("exit status 5"));
        });
        agent.finish();
    });
}

#[test]
fn input_that_nobody_reads_holds_up_nothing_else() {
    in_namespaces(|| {
        let agent = Agent::start();
        let (_, id) = pod(&agent, "p");
        let url = exec_url(&agent, &id, &["sh", "-c", "echo up; sleep 1; echo done"], false, true);
        agent.client.block_on(async {
            let mut spdy = Spdy::connect(&url, V4).await;
            let [mut error, stdin, mut stdout, _] = spdy.streams(["error", "stdin", "stdout", "stderr"]).await;
            let pushing = async { while stdin.try_send(&[0; 32 * 1024], false).await {} };
            let reading = async {
                assert_eq!(stdout.read_to_end().await, b"up\ndone\n");
                assert_eq!(error.status().await["status"], "Success");
            };
            tokio::select! {
                () = pushing => panic!("the connection ended first"),
                () = reading => {}
            }
        });
        agent.finish();
    });
}

/// Opens a thousand connections at once through one port-forward; each says something of its own and gets it back.
async fn thousand(mut spdy: Spdy, port: u16) {
    let mut pairs = Vec::new();
    for n in 0..1000u32 {
        pairs.push((n, spdy.pair(port, n).await));
    }
    let text = |n: u32| format!("connection {n} ").repeat(200 + n as usize % 50).into_bytes();
    for (n, (_, data)) in &pairs {
        data.send(&text(*n)).await;
    }
    for (n, (_, data)) in &mut pairs {
        let want = text(*n);
        assert!(data.read_until(|seen| seen.len() >= want.len()).await == want, "{n}");
    }
    // All are open still; each ends by itself.
    for (_, (error, data)) in &mut pairs {
        data.send(b"bye").await;
        data.finish().await;
        assert_eq!(data.read_to_end().await, b"bye");
        assert_eq!(error.read_to_end().await, b"");
    }
    spdy.ping(1).await;
    assert_eq!(soon(spdy.control.recv()).await.unwrap().0, 6);
}

#[test]
fn a_thousand_connections_go_through_one_port_forward() {
    in_namespaces(|| {
        let agent = Agent::start();
        let (pod, id) = pod(&agent, "p");
        let (listener, url) = (listen(&agent, &id, "127.0.0.1:80"), forward_url(&agent, &pod, vec![]));
        agent.client.block_on(async {
            tokio::spawn(echo(listener));
            thousand(Spdy::connect(&url, FORWARD).await, 80).await;
        });
        agent.finish();
    });
}

#[test]
fn a_thousand_connections_go_through_one_tunnelled_port_forward() {
    in_namespaces(|| {
        let agent = Agent::start();
        let (pod, id) = pod(&agent, "p");
        let (listener, url) = (listen(&agent, &id, "127.0.0.1:80"), forward_url(&agent, &pod, vec![]));
        agent.client.block_on(async {
            tokio::spawn(echo(listener));
            thousand(Spdy::tunnel(&url).await, 80).await;
        });
        agent.finish();
    });
}

#[test]
fn a_forwarded_connection_is_half_closed_reset_and_refused_on_its_own() {
    in_namespaces(|| {
        let agent = Agent::start();
        let (pod, id) = pod(&agent, "p");
        let talker = listen(&agent, &id, "[::1]:90");
        let deaf = listen(&agent, &id, "127.0.0.1:91");
        let url = forward_url(&agent, &pod, vec![]);
        agent.client.block_on(async {
            let mut spdy = Spdy::connect(&url, FORWARD).await;
            // The pod's last word comes first; what the client says after that arrives all the same. And it is IPv6 only.
            let (mut error, mut data) = spdy.pair(90, 1).await;
            let (mut tcp, _) = soon(talker.accept()).await.unwrap();
            tcp.write_all(b"hello").await.unwrap();
            tcp.shutdown().await.unwrap();
            assert_eq!((data.read_to_end().await, error.read_to_end().await), (b"hello".to_vec(), vec![]));
            data.send(b"late").await;
            data.finish().await;
            let mut seen = Vec::new();
            soon(tcp.read_to_end(&mut seen)).await.unwrap();
            assert_eq!(seen, b"late");
            // A reset ends the pod's side, though the pod would go on.
            let (_error, data) = spdy.pair(90, 2).await;
            let (mut tcp, _) = soon(talker.accept()).await.unwrap();
            data.reset().await;
            assert!(matches!(soon(tcp.read(&mut [0; 8])).await, Ok(0) | Err(_)));
            // Nobody listens there: an error on that pair.
            let (mut error, mut data) = spdy.pair(99, 3).await;
            let text = String::from_utf8(error.read_to_end().await).unwrap();
            assert!(text.contains("error forwarding port 99") && text.contains("refused"), "{text}");
            assert_eq!(data.read_to_end().await, b"");
            // What is no pair is refused.
            for headers in [
                &[("streamtype", "data")][..],
                &[("streamtype", "other"), ("port", "1")],
                &[("streamtype", "data"), ("port", "0")],
            ] {
                assert_eq!(soon(spdy.open(headers).await.events.recv()).await, Some(Event::Reset(1)), "{headers:?}");
            }
            // A pod that does not read is cut; another connection goes on meanwhile and after.
            let (_error, mut stuck) = spdy.pair(91, 4).await;
            let (held, _) = soon(deaf.accept()).await.unwrap();
            let (_other_error, mut other) = spdy.pair(91, 5).await;
            let (mut good, _) = soon(deaf.accept()).await.unwrap();
            let pushing = async {
                while !matches!(stuck.events.try_recv(), Ok(Event::Reset(7))) {
                    assert!(stuck.try_send(&[0; 64 * 1024], false).await);
                }
            };
            soon(pushing).await;
            other.send(b"on").await;
            let mut seen = [0; 2];
            soon(good.read_exact(&mut seen)).await.unwrap();
            good.write_all(&seen).await.unwrap();
            drop(good);
            assert_eq!(other.read_to_end().await, b"on");
            drop(held);
        });
        agent.finish();
    });
}

#[test]
fn ports_named_in_the_request_are_forwarded_over_channels() {
    in_namespaces(|| {
        let agent = Agent::start();
        let (pod, id) = pod(&agent, "p");
        let listener = listen(&agent, &id, "127.0.0.1:80");
        for protocol in [V4, "v4.base64.channel.k8s.io", ""] {
            let url = forward_url(&agent, &pod, vec![80, 99]);
            agent.client.block_on(async {
                let mut channels = Channels::connect(&url, protocol).await;
                channels.send(0, b"hi").await;
                let (mut tcp, _) = soon(listener.accept()).await.unwrap();
                let mut seen = [0; 2];
                soon(tcp.read_exact(&mut seen)).await.unwrap();
                tcp.write_all(b"yo").await.unwrap();
                drop(tcp);
                let seen = channels.rest().await;
                assert_eq!(seen[&0], [&80u16.to_le_bytes()[..], b"yo"].concat(), "{protocol}");
                assert_eq!((&seen[&1][..], &seen[&2][..]), (&80u16.to_le_bytes()[..], &99u16.to_le_bytes()[..]), "{protocol}");
                assert!(String::from_utf8_lossy(&seen[&3]).contains("error forwarding port 99"), "{protocol}");
            });
        }
        agent.finish();
    });
}

#[test]
fn streams_end_with_their_sandbox() {
    in_namespaces(|| {
        let agent = Agent::start();
        let pod = agent.run_sandbox("p");
        let id = agent.run_script(&pod, "p", "c", "while :; do echo tick; sleep 0.05; done");
        let listener = listen(&agent, &id, "127.0.0.1:80");
        let forward = forward_url(&agent, &pod, vec![]);
        let (exec, attach) = (exec_url(&agent, &id, &["sleep", "1000"], false, false), attach_url(&agent, &id, false, false));
        agent.client.block_on(async {
            let mut spdy = Spdy::connect(&forward, FORWARD).await;
            let (_error, mut data) = spdy.pair(80, 1).await;
            let _tcp = soon(listener.accept()).await.unwrap();
            let mut running = Spdy::connect(&exec, V4).await;
            let [mut error, ..] = running.streams(["error", "stdout", "stderr"]).await;
            let mut watching = Spdy::connect(&attach, V4).await;
            let [mut attached, mut seen] = watching.streams(["error", "stdout"]).await;
            // An attach is whole when the first output has come to it.
            seen.read_until(|text: &[u8]| text.ends_with(b"tick\n")).await;
            let mut client = agent.runtime();
            client.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: pod }).await.unwrap();
            assert_eq!(data.read_to_end().await, b"");
            assert_eq!(error.status().await["status"], "Failure");
            assert_eq!(attached.status().await["status"], "Success");
            assert!(spdy.said_goodbye().await && running.said_goodbye().await && watching.said_goodbye().await);
        });
        agent.finish();
    });
}

#[test]
fn an_ending_agent_says_goodbye() {
    in_namespaces(|| {
        let mut agent = Agent::start();
        let (pod, id) = pod(&agent, "p");
        let (exec, forward) = (exec_url(&agent, &id, &["sleep", "1000"], false, false), forward_url(&agent, &pod, vec![]));
        let channels = exec_url(&agent, &id, &["sleep", "1000"], false, false);
        let (mut running, mut error, mut forwarding, mut channels) = agent.client.block_on(async {
            let mut running = Spdy::connect(&exec, V4).await;
            let [error, ..] = running.streams(["error", "stdout", "stderr"]).await;
            (running, error, Spdy::connect(&forward, FORWARD).await, Channels::connect(&channels, V4).await)
        });
        agent.shut_down();
        agent.client.block_on(async {
            let status = error.status().await;
            assert_eq!((&status["status"], &status["reason"]), (&"Failure".into(), &"InternalError".into()), "{status}");
            assert!(running.said_goodbye().await && forwarding.said_goodbye().await);
            assert!(String::from_utf8_lossy(&channels.rest().await[&3]).contains("Failure"));
        });
        assert!(wait_until(SOON, || processes("sleep 1000") == 1), "the commands end, the container stays");
        agent.run();
        agent.finish();
    });
}

#[test]
fn silent_connections_and_unfinished_ones_are_closed() {
    in_namespaces(|| {
        let agent = Agent::tuned(|config| {
            config.streaming_idle = Duration::from_secs(2);
            config.streaming_patience = Duration::from_secs(1);
        });
        let (pod, id) = pod(&agent, "p");
        let url = exec_url(&agent, &id, &["cat"], false, true);
        let forward = forward_url(&agent, &pod, vec![]);
        let incomplete = exec_url(&agent, &id, &["true"], false, false);
        agent.client.block_on(async {
            let mut spdy = Spdy::connect(&url, V4).await;
            let [mut error, ..] = spdy.streams(["error", "stdin", "stdout", "stderr"]).await;
            assert!(error.status().await["message"].as_str().unwrap().contains("silent for too long"));
            let mut half = Spdy::connect(&incomplete, V4).await;
            let [_error, _stdout] = half.streams(["error", "stdout"]).await;
            assert!(half.said_goodbye().await, "one stream did not come");
            let mut spdy = Spdy::connect(&forward, FORWARD).await;
            let mut lonely = spdy.open(&[("streamtype", "error"), ("port", "80"), ("requestid", "1")]).await;
            let text = lonely.read_to_end().await;
            assert!(String::from_utf8_lossy(&text).contains("did not come"));
            let address = url.strip_prefix("http://").unwrap().split('/').next().unwrap();
            let mut silent = TcpStream::connect(address).await.unwrap();
            assert_eq!(soon(silent.read(&mut [0; 8])).await.unwrap(), 0);
        });
        agent.finish();
    });
}

#[test]
fn an_exec_goes_on_over_a_log_rotation() {
    in_namespaces(|| {
        let agent = Agent::start();
        let sandbox = agent.run_sandbox("p");
        let id = agent.run_script(&sandbox, "p", "c", "while sleep 0.05; do echo tick; done");
        let url = exec_url(&agent, &id, &["cat"], false, true);
        let log = agent.container_status(&id).log_path;
        agent.client.block_on(async {
            let mut spdy = Spdy::connect(&url, V4).await;
            let [mut error, stdin, mut stdout, _] = spdy.streams(["error", "stdin", "stdout", "stderr"]).await;
            let mut client = agent.runtime();
            for round in 0..3u8 {
                stdin.send(&[b'a' + round]).await;
                assert_eq!(stdout.read_until(|text| !text.is_empty()).await, [b'a' + round]);
                std::fs::rename(&log, format!("{log}.{round}")).unwrap();
                client.reopen_container_log(v1::ReopenContainerLogRequest { container_id: id.clone() }).await.unwrap();
            }
            stdin.finish().await;
            assert_eq!(error.status().await["status"], "Success");
        });
        assert!(wait_until(SOON, || std::fs::read_to_string(&log).is_ok_and(|text| text.contains("tick"))));
        agent.finish();
    });
}

#[test]
fn every_attached_client_sees_the_output_and_a_slow_one_is_cut() {
    in_namespaces(|| {
        let agent = Agent::start();
        let sandbox = agent.run_sandbox("p");
        let script = "while read more; do head -c 400000 /dev/zero; echo end $more; done";
        let mut config = container("c", &["sh", "-c", script]);
        config.stdin = true;
        let id = agent.create(&sandbox, "p", config).unwrap();
        agent.start_container(&id).unwrap();
        let slow = attach_url(&agent, &id, false, false);
        let (first, second) = (attach_url(&agent, &id, false, false), attach_url(&agent, &id, true, false));
        agent.client.block_on(async {
            let mut slow = Channels::connect(&slow, V4).await;
            let mut first = Spdy::connect(&first, V4).await;
            let [mut error, mut stdout] = first.streams(["error", "stdout"]).await;
            let mut second = Spdy::connect(&second, V4).await;
            let [_, stdin, mut other] = second.streams(["error", "stdin", "stdout"]).await;
            let until = |word: String| move |text: &[u8]| text.ends_with(format!("end {word}\n").as_bytes());
            // An attach is whole when the first output has come to it.
            let mut tries = 0;
            while !matches!(stdout.events.try_recv(), Ok(Event::Data(_))) {
                tries += 1;
                stdin.send(format!("try{tries}\n").as_bytes()).await;
                other.read_until(until(format!("try{tries}"))).await;
            }
            for round in 0..60 {
                stdin.send(format!("round{round}\n").as_bytes()).await;
                let whole = until(format!("round{round}"));
                let (a, b) = tokio::join!(stdout.read_until(&whole), other.read_until(&whole));
                assert!(whole(&a) && whole(&b), "{round}: {} {}", a.len(), b.len());
            }
            // 24 MB that one client did not read: it was cut off, and is told so.
            let seen = slow.rest().await;
            assert!(seen[&1].len() < 20_000_000, "{}", seen[&1].len());
            assert!(String::from_utf8_lossy(&seen[&3]).contains("too slow"), "{:?}", seen.get(&3));
            stdin.finish().await;
            let mut client = agent.runtime();
            client.stop_container(v1::StopContainerRequest { container_id: id.clone(), timeout: 0 }).await.unwrap();
            assert_eq!(error.status().await["status"], "Success");
        });
        assert!(wait_until(SOON, || agent.container_status(&id).state == i32::from(v1::ContainerState::ContainerExited)));
        agent.finish();
    });
}
