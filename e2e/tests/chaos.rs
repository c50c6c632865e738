//! Clients that run, create, start, exec, stop, remove, list and ask for statistics while the agent and the shims are killed at
//! random moments. Each client checks what it sees against a model of what it was promised. Seeded: `CHAOS_SEED` runs the same
//! choices again (not the same timing); `CHAOS_OPS`, `CHAOS_KILLS` and `CHAOS_MINUTES` make it longer.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "chaos/client.rs"]
mod client;
#[path = "chaos/eyes.rs"]
mod eyes;
#[path = "chaos/model.rs"]
mod model;
#[path = "chaos/random.rs"]
mod random;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use berth_e2e::node::{Berth, Half};
use berth_testkit::{Sandbox, report_measured, wait_until};

use client::{Client, Shared};
use eyes::Machine;
use random::Random;

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");
const CLIENTS: u64 = 8;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    setting("CHAOS_SEED", now.as_nanos() as u64 % 1_000_000)
}

/// The lines of a log about the ids that a text names.
fn about(text: &str, log: &str) -> String {
    let ids: Vec<&str> = text.split(['/', ' ', '\n']).filter(|word| word.len() == 64).collect();
    let lines = log.lines().filter(|line| ids.iter().any(|id| line.contains(id))).map(str::to_owned);
    lines.chain(ids.iter().flat_map(|id| eyes::cgroups_of(id))).collect::<Vec<_>>().join("\n")
}

/// Kills until all kills are done: about two of three times the agent, else a shim. Spread over the operations.
fn kill_at_random(node: &mut Berth, shared: &Shared, random: &mut Random, kills: u64, until: Instant) -> (u64, u64) {
    let (mut agents, mut shims) = (0, 0);
    let spacing = (shared.goal / kills).max(1);
    for n in 0..kills {
        let due = n * spacing + random.below(spacing);
        let reached = || shared.done.load(Ordering::Acquire) >= due || shared.stuck() || Instant::now() > until;
        assert!(wait_until(Duration::from_secs(120), reached), "{} operations, no progress\n{}", shared.done(), node.agent_log());
        if shared.stuck() {
            break;
        }
        // Anywhere within an operation, not only where one has just ended.
        std::thread::sleep(Duration::from_micros(random.below(8000)));
        let shim = if random.below(3) < 2 { None } else { random.pick(&eyes::shims()).cloned() };
        if let Some(shim) = shim {
            shared.killed(&shim.sandbox);
            shim.kill();
            shims += 1;
        } else {
            node.kill_agent();
            // Some programs end while nobody looks.
            std::thread::sleep(Duration::from_millis(random.below(30)));
            node.launch();
            shared.restarts.fetch_add(1, Ordering::AcqRel);
            agents += 1;
        }
    }
    (agents, shims)
}

#[test]
fn nothing_is_lost_doubled_or_leaked_by_kills_at_random_moments() {
    let minutes = setting("CHAOS_MINUTES", 8);
    Sandbox::new().timeout(Some(Duration::from_secs(minutes * 60))).test(|| {
        let (seed, ops, kills) = (seed(), setting("CHAOS_OPS", 500), setting("CHAOS_KILLS", 100));
        println!("CHAOS_SEED={seed} CHAOS_OPS={ops} CHAOS_KILLS={kills}");
        let mut node = Berth::start(Half::Cri, WEB);
        let before = Machine::now();
        let begun = Instant::now();
        let until = begun + Duration::from_secs(minutes * 60 - 60);
        let shared = Arc::new(Shared::new(node.socket(), ops, until));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let clients: Vec<_> = (0..CLIENTS)
            .map(|n| {
                let logs = node.dir.dir(&format!("chaos-{n}"));
                runtime.spawn(Client::new(n, seed, shared.clone(), logs).work())
            })
            .collect();
        let (agents, shims) = kill_at_random(&mut node, &shared, &mut Random::new(seed, CLIENTS), kills, until);
        let mut failures = Vec::new();
        runtime.block_on(async {
            for client in clients {
                failures.extend(client.await.unwrap().err());
            }
        });
        let took = begun.elapsed();
        assert!(failures.is_empty(), "CHAOS_SEED={seed}\n{}\n{}", failures.join("\n"), node.agent_log());
        let (done, cut) = (shared.done(), shared.cut.load(Ordering::Acquire));
        report_measured(&format!(
            "chaos: {done} operations of {CLIENTS} clients in {:.1} s, {agents} kills of the agent, {shims} of a shim, {cut} calls given up and retried",
            took.as_secs_f64()
        ));
        assert!(done >= ops && agents + shims >= kills.min(done / 2), "{done} operations, {agents} + {shims} kills");
        let left = berth_e2e::text(&berth_e2e::try_output(&mut node.verb(&["leaks", "--settle"])).stdout);
        assert!(left.trim().is_empty(), "CHAOS_SEED={seed}: leaks with the agent:\n{left}\n{}", about(&left, &node.agent_log()));
        let state = node.dir.path().to_owned();
        let settled = wait_until(Duration::from_secs(20), || Machine::now().beyond(&before).is_empty());
        assert!(settled, "CHAOS_SEED={seed}: left on the machine: {:#?}", Machine::now().beyond(&before));
        assert_eq!(eyes::entries(&state.join("root/containers")), 0, "writable layers");
        assert_eq!(eyes::entries(&state.join("state/sandboxes")), 0, "sandbox folders");
        node.finish();
    });
}
