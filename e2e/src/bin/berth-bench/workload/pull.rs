//! PullImage of a small image from a registry on loopback, removed before each pull.

use anyhow::Result;
use berth_cri_api::v1::{ImageSpec, PullImageRequest, RemoveImageRequest};

use crate::pods::Bench;

const IMAGE: &str = "registry.k8s.io/e2e-test-images/nginx:1.14-2";

/// Pulls and removes.
pub async fn run(bench: &Bench, count: usize) -> Result<()> {
    let mut images = bench.cri.images.clone();
    let image = Some(ImageSpec { image: IMAGE.to_owned(), ..Default::default() });
    let counting = bench.accounting.begin()?;
    for _ in 0..count {
        let request = PullImageRequest { image: image.clone(), ..Default::default() };
        bench.meter.time("pull.PullImage", images.pull_image(request)).await?;
        let request = RemoveImageRequest { image: image.clone() };
        bench.meter.time("pull.RemoveImage", images.remove_image(request)).await?;
    }
    bench.meter.spent("pull", count, counting.end()?);
    Ok(())
}
