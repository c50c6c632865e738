//! The stop of containers that ignore SIGTERM: how long it takes over the grace.

use std::time::Instant;

use anyhow::Result;
use futures::future::try_join_all;

use crate::cri::Shape;
use crate::pods::Bench;

const GRACE_SECONDS: i64 = 1;

/// Stops them at once: they wait for the same second.
pub async fn run(bench: &Bench, count: usize) -> Result<()> {
    let mut pods = Vec::new();
    for _ in 0..count {
        // A second process, so that something is left to be killed when the first is.
        let plan = bench.plan_script(Shape::PerContainer, "trap '' TERM; echo up; sleep 100000 & wait")?;
        pods.push(bench.up(&plan, "").await?);
    }
    let stop = async |pod| {
        let begun = Instant::now();
        bench.stop_container(pod, "", GRACE_SECONDS).await?;
        bench.meter.add("grace.over", begun.elapsed().as_secs_f64() * 1e3 - GRACE_SECONDS as f64 * 1e3);
        anyhow::Ok(())
    };
    try_join_all(pods.iter().map(stop)).await?;
    if bench.meter.min("grace.over").is_some_and(|least| least < 0.0) {
        bench.meter.fail("grace: a container was killed before its grace was over".to_owned());
    }
    bench.down_all(&pods, count).await
}
