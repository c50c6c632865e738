//! `berth exec`: a command in a container, its output and its exit code.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use berth_cri_api::v1::ExecSyncRequest;

use crate::{cli, client, find};

/// Runs the command and passes its output and exit code on.
pub async fn run(socket: &Path, args: &cli::Exec) -> Result<ExitCode> {
    let mut client = client::runtime(client::connect(socket).await?);
    let container = find::container(&mut client, &args.name, args.container.as_deref(), false).await?;
    let reply = client
        .exec_sync(ExecSyncRequest { container_id: container.id.clone(), cmd: args.command.clone(), timeout: args.timeout })
        .await
        .map_err(|status| anyhow::anyhow!("{}", status.message()))
        .with_context(|| format!("exec in container {} failed", &container.id[..container.id.len().min(13)]))?
        .into_inner();
    std::io::stdout().write_all(&reply.stdout)?;
    std::io::stderr().write_all(&reply.stderr)?;
    Ok(ExitCode::from(u8::try_from(reply.exit_code).unwrap_or(255)))
}
