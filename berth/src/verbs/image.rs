//! `berth image …`: what the image service holds. `import` writes to the store itself, so that it works before the
//! agent's first start too; a running agent sees what was imported.

use std::path::Path;

use anyhow::{Result, anyhow};
use berth_cri_api::v1::{AuthConfig, ImageSpec, ImageStatusRequest, ListImagesRequest, PullImageRequest, RemoveImageRequest};

use crate::{cli, client, table, wire};

/// `registry:5000/app:v1` → (`registry:5000/app`, `v1`).
fn split_tag(name: &str) -> (&str, &str) {
    match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        _ => (name, "<none>"),
    }
}

/// Lists images as crictl does: one line a tag.
pub async fn ls(socket: &Path, args: &cli::Output) -> Result<()> {
    let mut client = client::images(client::connect(socket).await?);
    let images = client.list_images(ListImagesRequest::default()).await?.into_inner().images;
    if args.output == "json" {
        let list: Vec<serde_json::Value> = images
            .iter()
            .map(|i| serde_json::json!({"id": i.id, "repoTags": i.repo_tags, "repoDigests": i.repo_digests, "size": i.size, "pinned": i.pinned}))
            .collect();
        crate::out(&serde_json::to_string_pretty(&list)?);
        return Ok(());
    }
    let mut rows = Vec::new();
    for image in &images {
        let id: String = image.id.trim_start_matches("sha256:").chars().take(13).collect();
        let size = table::size(image.size);
        if image.repo_tags.is_empty() {
            let name = image.repo_digests.first().and_then(|d| d.split('@').next()).unwrap_or("<none>");
            rows.push(vec![name.to_owned(), "<none>".to_owned(), id.clone(), size.clone()]);
        }
        for tag in &image.repo_tags {
            let (repository, tag) = split_tag(tag);
            rows.push(vec![repository.to_owned(), tag.to_owned(), id.clone(), size.clone()]);
        }
    }
    rows.sort();
    crate::out(table::render(&["IMAGE", "TAG", "IMAGE ID", "SIZE"], &rows).trim_end());
    Ok(())
}

/// Pulls an image and prints its id.
pub async fn pull(socket: &Path, reference: &str, creds: Option<&str>) -> Result<()> {
    let auth = match creds.map(|c| c.split_once(':')) {
        Some(Some((username, password))) => {
            Some(AuthConfig { username: username.to_owned(), password: password.to_owned(), ..Default::default() })
        }
        Some(None) => anyhow::bail!("--creds takes USER:PASSWORD"),
        None => None,
    };
    let mut client = client::images(client::connect(socket).await?);
    let image = Some(ImageSpec { image: reference.to_owned(), ..Default::default() });
    let reply = client
        .pull_image(PullImageRequest { image, auth, sandbox_config: None })
        .await
        .map_err(|status| anyhow!("{}", status.message()))?;
    crate::out(&reply.into_inner().image_ref);
    Ok(())
}

/// Removes images; one that is not there is an error, as `crictl rmi` has it.
pub async fn rm(socket: &Path, images: &[String]) -> Result<()> {
    let mut client = client::images(client::connect(socket).await?);
    for name in images {
        let image = Some(ImageSpec { image: name.clone(), ..Default::default() });
        let found = client.image_status(ImageStatusRequest { image: image.clone(), verbose: false }).await?.into_inner().image;
        let found = found.ok_or_else(|| anyhow!("no such image {name:?}"))?;
        client.remove_image(RemoveImageRequest { image }).await.map_err(|status| anyhow!("{}", status.message()))?;
        crate::out(&found.id);
    }
    Ok(())
}

/// Loads archives into the store and prints what they held.
pub async fn import(global: &cli::Global, args: &cli::ImageImport) -> Result<()> {
    let store = wire::image_store(global).await?;
    for path in &args.paths {
        for image in store.import(path).await.map_err(|e| anyhow!(e).context(format!("importing {}", path.display())))? {
            let names = if image.repo_tags.is_empty() { "<none>".to_owned() } else { image.repo_tags.join(" ") };
            crate::out(&format!("{names} {}", image.id));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_not_a_tag() {
        assert_eq!(split_tag("localhost:5000/app:v1"), ("localhost:5000/app", "v1"));
        assert_eq!(split_tag("localhost:5000/app"), ("localhost:5000/app", "<none>"));
    }
}
