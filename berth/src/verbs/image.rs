//! `berth image …`: what the image service holds. `import` is asked of the agent where one runs; else it writes to the
//! store itself, so that it works before the agent's first start too.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use berth_cri_api::v1::{AuthConfig, ImageSpec, ImageStatusRequest, ListImagesRequest, PullImageRequest, RemoveImageRequest};

use crate::{admin, cli, client, state_dir, table, wire};

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
    let paths = args.paths.iter().map(|p| p.canonicalize().with_context(|| format!("opening {}", p.display())));
    let paths = paths.collect::<Result<Vec<_>>>()?;
    if state_dir::holder(&global.state).is_some() {
        for path in paths {
            for line in admin::ask(&global.state, &admin::Request::Import { path }).await? {
                crate::out(&line);
            }
        }
        return Ok(());
    }
    let _root = state_dir::hold_root(&global.root)?;
    let store = wire::image_store(global).await?;
    for path in &paths {
        for image in store.import(path, None).await.with_context(|| format!("importing {}", path.display()))? {
            crate::out(&admin::image_line(&image.id.to_string(), &image.repo_tags));
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
