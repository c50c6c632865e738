//! Asks a container's first process to end. The kernel drops a signal that process 1 of a PID namespace has no handler for, so
//! a request that comes right after the start would be lost and the whole grace period waited in vain: it is repeated, once, as
//! soon as the handler is there. Owns no state; kills nothing.

use std::time::{Duration, Instant};

use crate::container::control;
use crate::error::Error;
use crate::id::ContainerId;
use crate::sandbox::holdings::Live;

/// A program that has set up no handler this long after it was asked has none.
const HANDLER_COMES: Duration = Duration::from_secs(5);
/// The first look; each further one waits twice as long, up to the longest.
const FIRST_LOOK: Duration = Duration::from_millis(2);
const LONGEST_LOOK: Duration = Duration::from_millis(250);

/// What a process does with a signal, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reception {
    /// It has a handler, or it is not protected by being process 1 of a PID namespace of its own.
    Taken,
    /// The kernel drops it.
    Dropped,
}

/// Reads `/proc/<pid>/status` (proc_pid_status(5)): `NSpid` lists the pid in each PID namespace, `SigCgt` is a mask of caught signals.
fn reception(status: &str, signal: i32) -> Option<Reception> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    // The first is the pid that we see; with no other, the process shares our namespace.
    if field("NSpid")?.split_whitespace().skip(1).last() != Some("1") {
        return Some(Reception::Taken);
    }
    let caught = u64::from_str_radix(field("SigCgt")?.trim(), 16).ok()?;
    let bit = u32::try_from(signal).ok()?.checked_sub(1)?;
    Some(if caught & 1u64.checked_shl(bit)? != 0 { Reception::Taken } else { Reception::Dropped })
}

fn look(pid: i32, signal: i32) -> Option<Reception> {
    reception(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?, signal)
}

/// Sends the signal, and once more when the process could not have received it and now can. A pid that belongs to somebody else
/// by now does no harm: the shim signals by the container's id, and only while its process lives.
pub(crate) async fn ask(live: &Live, id: &ContainerId, pid: Option<i32>, signal: i32) -> Result<(), Error> {
    let before = pid.and_then(|pid| look(pid, signal));
    control::signal(live, id, signal, false).await?;
    let (Some(pid), Some(Reception::Dropped)) = (pid, before) else { return Ok(()) };
    let (until, mut wait) = (Instant::now() + HANDLER_COMES, FIRST_LOOK);
    while Instant::now() < until {
        tokio::time::sleep(wait).await;
        match look(pid, signal) {
            Some(Reception::Dropped) => wait = (wait * 2).min(LONGEST_LOOK),
            Some(Reception::Taken) => return control::signal(live, id, signal, false).await,
            None => break,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(nspid: &str, caught: &str) -> String {
        format!("Name:\ttop\nNSpid:\t{nspid}\nSigIgn:\t0000000000000000\nSigCgt:\t{caught}\n")
    }

    #[test]
    fn only_process_one_without_a_handler_drops_a_signal() {
        for (nspid, caught, want) in [
            ("78\t1", "0000000003807a27", Reception::Taken),
            ("78\t1", "0000000000000000", Reception::Dropped),
            ("78\t1", "0000000000000002", Reception::Dropped),
            ("78\t40\t1", "0000000000000000", Reception::Dropped),
            ("78\t7", "0000000000000000", Reception::Taken),
            ("1", "0000000000000000", Reception::Taken),
        ] {
            assert_eq!(reception(&status(nspid, caught), 15), Some(want), "{nspid} {caught}");
        }
        assert_eq!(reception("", 15), None);
        assert_eq!(reception(&status("78\t1", "x"), 15), None);
    }
}
