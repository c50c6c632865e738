//! ExecSync of `true`, one and four at a time.

use anyhow::{Result, ensure};
use berth_cri_api::v1::ExecSyncRequest;
use futures::{StreamExt, TryStreamExt, stream};

use crate::cri::Shape;
use crate::pods::Bench;

/// Runs them in one container.
pub async fn run(bench: &Bench, counts: [usize; 2]) -> Result<()> {
    let pods = bench.up_all(1, 1, Shape::PerContainer, "").await?;
    for (key, ways, count) in [("exec1", 1, counts[0]), ("exec4", 4, counts[1])] {
        let counting = bench.accounting.begin()?;
        let one = |_| {
            let (mut runtime, container) = (bench.cri.runtime.clone(), pods[0].container.clone());
            async move {
                let request = ExecSyncRequest { container_id: container, cmd: vec!["/bin/true".to_owned()], timeout: 10 };
                let reply = bench.meter.time(&format!("{key}.ExecSync"), runtime.exec_sync(request)).await?.into_inner();
                ensure!(reply.exit_code == 0, "`true` exited {}: {}", reply.exit_code, String::from_utf8_lossy(&reply.stderr));
                anyhow::Ok(())
            }
        };
        stream::iter(0..count).map(one).buffer_unordered(ways).try_collect::<()>().await?;
        bench.meter.spent(key, count, counting.end()?);
    }
    bench.down_all(&pods, 1).await
}
