//! A container that writes lines as fast as it can: how fast they are in its log, and that none is lost.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use berth_cri_api::v1::{ContainerState, ContainerStatusRequest};

use crate::cri::Shape;
use crate::pods::{Bench, Pod};

/// Bytes of a line with its newline: ten digits and filling.
const LINE: usize = 100;
const PATIENCE: Duration = Duration::from_secs(120);

/// Writes so many MiB.
pub async fn run(bench: &Bench, mib: usize) -> Result<()> {
    let lines = (mib << 20) / LINE;
    let file = bench.dir.join("lines");
    write_lines(&file, lines)?;
    let plan = bench.plan_script(Shape::PerContainer, "exec cat /lines")?.mount(&file, "/lines");
    let sandbox = bench.run_sandbox(&plan, "").await?;
    let pod = bench.create(&plan, sandbox, "").await?;
    let counting = bench.accounting.begin()?;
    let begun = SystemTime::now();
    bench.start(&pod, "").await?;
    wait_exited(bench, &pod).await?;
    let ended = wait_quiet(&pod.log).await?;
    bench.meter.spent("logs", mib, counting.end()?);
    let seconds = ended.duration_since(begun).context("the log was written before the start")?.as_secs_f64();
    bench.meter.add("logs.MBps", (lines * LINE) as f64 / 1e6 / seconds);
    match verify(&pod.log, lines) {
        Ok(()) => bench.meter.add("logs.lost", 0.0),
        Err(error) => bench.meter.fail(format!("logs: {error:#}")),
    }
    bench.down_all(&[pod], 1).await?;
    Ok(fs::remove_file(file)?)
}

fn write_lines(path: &Path, lines: usize) -> Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    let filling = "x".repeat(LINE - 12);
    for n in 0..lines {
        writeln!(file, "{n:010} {filling}")?;
    }
    Ok(file.flush()?)
}

async fn wait_exited(bench: &Bench, pod: &Pod) -> Result<()> {
    let (mut runtime, begun) = (bench.cri.runtime.clone(), Instant::now());
    while begun.elapsed() < PATIENCE {
        let request = ContainerStatusRequest { container_id: pod.container.clone(), verbose: false };
        let status = runtime.container_status(request).await?.into_inner().status.unwrap_or_default();
        if status.state() == ContainerState::ContainerExited {
            ensure!(status.exit_code == 0, "the writer exited {}", status.exit_code);
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bail!("the writer did not end")
}

/// When the log was written last; nothing was for a while.
async fn wait_quiet(log: &Path) -> Result<SystemTime> {
    let mut before = 0;
    for _ in 0..600 {
        let metadata = fs::metadata(log)?;
        if metadata.len() == before && before > 0 {
            return Ok(metadata.modified()?);
        }
        before = metadata.len();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    bail!("the log goes on growing")
}

/// Every line once, in order.
fn verify(log: &Path, lines: usize) -> Result<()> {
    let (mut next, mut at_start) = (0_usize, true);
    let mut reader = BufReader::with_capacity(1 << 20, File::open(log)?);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        // timestamp, stream, tag, content; a line that was read in pieces has the tag P on all but the last.
        let mut fields = line.splitn(4, |&b| b == b' ');
        let (Some(tag), Some(content)) = (fields.nth(2), fields.next()) else { bail!("a line is not of the CRI's format") };
        if at_start {
            let number = content.get(..10).and_then(|d| std::str::from_utf8(d).ok()?.parse::<usize>().ok());
            ensure!(number == Some(next), "after line {next} of {lines} comes {number:?}");
            next += 1;
        }
        at_start = tag == b"F";
        line.clear();
    }
    ensure!(next == lines, "{} of {lines} lines are lost", lines - next.min(lines));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_line_is_noticed_and_a_split_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let line = |tag: &str, text: &str| format!("2026-01-01T00:00:00Z stdout {tag} {text}\n");
        fs::write(&log, line("P", "0000000000 xx") + &line("F", "xx") + &line("F", "0000000001 xxxx")).unwrap();
        verify(&log, 2).unwrap();
        assert!(verify(&log, 3).is_err());
        fs::write(&log, line("F", "0000000001 xxxx")).unwrap();
        assert!(verify(&log, 2).is_err());
    }
}
