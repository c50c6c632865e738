//! The life cycle of pods with one container, some at a time.

use anyhow::Result;
use futures::{StreamExt, TryStreamExt, stream};

use crate::cri::Shape;
use crate::pods::{Bench, three_of};

/// Makes, checks and ends pods. The cost is counted until nothing of them is left.
pub async fn run(bench: &Bench, key: &str, ways: usize, shape: Shape, count: usize) -> Result<()> {
    let plans = (0..count).map(|_| bench.plan(shape)).collect::<Result<Vec<_>>>()?;
    let looked_at = three_of(count);
    let counting = bench.accounting.begin()?;
    let one = |(n, plan)| {
        let looked_at = &looked_at;
        async move {
            let pod = bench.up(plan, key).await?;
            if looked_at.contains(&n) {
                bench.check(&pod, key).await?;
            }
            bench.down(&pod, key).await?;
            anyhow::Ok(pod)
        }
    };
    let pods: Vec<_> = stream::iter(plans.iter().enumerate()).map(one).buffer_unordered(ways).try_collect().await?;
    bench.settle(key, pods.iter()).await;
    bench.meter.spent(key, count, counting.end()?);
    Ok(())
}
