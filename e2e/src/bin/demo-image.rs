//! Writes the demo's image, made of nothing but a program of this workspace: `demo-image PROGRAM ARCHIVE`.

use std::path::Path;

use anyhow::{Context, Result};
use berth_e2e::image::WEB;
use berth_testkit::TempState;
use berth_testkit::image::{Layer, Layout, PATH_ENV};
use serde_json::json;

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let usage = "usage: demo-image PROGRAM ARCHIVE";
    let (program, archive) = (arguments.next().context(usage)?, arguments.next().context(usage)?);
    let work = TempState::new();
    let mut layout = Layout::create(work.path());
    let layer = Layer::new().dir("bin", 0o755).copy("bin/demo-web", 0o755, Path::new(&program)).into_tar();
    layout.image(
        WEB,
        &[layer],
        &json!({"Env": [PATH_ENV], "Entrypoint": ["/bin/demo-web", "8080"], "ExposedPorts": {"8080/tcp": {}}, "User": "33:33"}),
    );
    layout.archive(Path::new(&archive));
    Ok(())
}
