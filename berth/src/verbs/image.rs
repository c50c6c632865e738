//! `berth image …`: what the image service holds. `import` is asked of the agent where one runs; else it writes to the
//! store itself, so that it works before the agent's first start too.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use berth_cri_api::v1::{
    AuthConfig, ImageSpec, ImageStatusRequest, ListContainersRequest, ListImagesRequest, PullImageRequest, RemoveImageRequest,
};
use tokio::net::UnixStream;

use crate::{admin, cli, client, find, state_dir, table, wire};

/// `registry:5000/app:v1` → (`registry:5000/app`, `v1`).
fn split_tag(name: &str) -> (&str, &str) {
    match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        _ => (name, "<none>"),
    }
}

/// One image as `ls` shows it.
struct Shown {
    id: String,
    tags: Vec<String>,
    digests: Vec<String>,
    size: u64,
    pinned: bool,
}

/// The agent's images; where none runs, those on record.
async fn images(global: &cli::Global, socket: &Path) -> Result<Vec<Shown>> {
    if state_dir::holder(&global.state, state_dir::Half::Runtime).is_none() && UnixStream::connect(socket).await.is_err() {
        let root = global.root.join("images");
        let images =
            berth_image::images_on_record(&root).with_context(|| format!("reading the images below {}", root.display()))?;
        let shown = images.into_iter().map(|i| Shown {
            id: i.id.to_string(),
            tags: i.repo_tags,
            digests: i.repo_digests,
            size: i.size,
            pinned: i.pinned,
        });
        return Ok(shown.collect());
    }
    let mut client = client::images(client::connect(socket).await?);
    let images = client.list_images(ListImagesRequest::default()).await?.into_inner().images;
    let shown = images.into_iter().map(|i| Shown {
        id: i.id,
        tags: i.repo_tags,
        digests: i.repo_digests,
        size: i.size,
        pinned: i.pinned,
    });
    Ok(shown.collect())
}

/// Lists images as crictl does: one line a tag.
pub async fn ls(global: &cli::Global, socket: &Path, args: &cli::Output) -> Result<()> {
    let images = images(global, socket).await?;
    if args.output == "json" {
        let list: Vec<serde_json::Value> = images
            .iter()
            .map(|i| serde_json::json!({"id": i.id, "repoTags": i.tags, "repoDigests": i.digests, "size": i.size, "pinned": i.pinned}))
            .collect();
        crate::out(&serde_json::to_string_pretty(&list)?);
        return Ok(());
    }
    let mut rows = Vec::new();
    for image in &images {
        let id: String = image.id.trim_start_matches("sha256:").chars().take(13).collect();
        let size = table::size(image.size);
        if image.tags.is_empty() {
            let name = image.digests.first().and_then(|d| d.split('@').next()).unwrap_or("<none>");
            rows.push(vec![name.to_owned(), "<none>".to_owned(), id.clone(), size.clone()]);
        }
        for tag in &image.tags {
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

/// What removing `wanted` means for an image of these tags: only a name is taken from one that has others.
fn is_only_untagged(wanted: &str, tags: &[String]) -> bool {
    let is_name = |tag: &String| tag == wanted || tag.strip_suffix(wanted).is_some_and(|rest| rest.ends_with('/'));
    let with_tag = format!("{wanted}:latest");
    let is_latest = |tag: &String| *tag == with_tag || tag.strip_suffix(&with_tag).is_some_and(|rest| rest.ends_with('/'));
    tags.len() > 1 && tags.iter().any(|tag| is_name(tag) || is_latest(tag))
}

/// Removes names and images and says which; one that is not there is an error, as `crictl rmi` has it, and so is one that
/// a container uses, as docker has it.
pub async fn rm(global: &cli::Global, socket: &Path, images: &[String], force: bool) -> Result<()> {
    let channel = client::connect(socket).await?;
    let mut client = client::images(channel.clone());
    let mut runtime = client::runtime(channel);
    for name in images {
        let image = Some(ImageSpec { image: name.clone(), ..Default::default() });
        let found = client.image_status(ImageStatusRequest { image: image.clone(), verbose: false }).await?.into_inner().image;
        let found = found.ok_or_else(|| anyhow!("no such image {name:?}"))?;
        if is_only_untagged(name, &found.repo_tags) {
            for line in admin::ask(&global.state, &admin::Request::Untag { name: name.clone() }).await? {
                crate::out(&format!("untagged: {line}"));
            }
            continue;
        }
        let containers = runtime.list_containers(ListContainersRequest::default()).await?.into_inner().containers;
        let users: Vec<String> = containers
            .iter()
            .filter(|c| c.image_id == found.id || c.image_ref == found.id)
            .map(|c| match find::pod_of(c) {
                (_, "") => find::container_name(c).to_owned(),
                (namespace, pod) => format!("{} of pod {namespace}/{pod}", find::container_name(c)),
            })
            .collect();
        if !users.is_empty() && !force {
            anyhow::bail!("image {name:?} is used by {}: --force removes it nevertheless", users.join(", "));
        }
        client.remove_image(RemoveImageRequest { image }).await.map_err(|status| anyhow!("{}", status.message()))?;
        for tag in &found.repo_tags {
            crate::out(&format!("untagged: {tag}"));
        }
        crate::out(&format!("deleted: {}", found.id));
    }
    Ok(())
}

/// Loads archives into the store and prints what they held.
pub async fn import(global: &cli::Global, args: &cli::ImageImport) -> Result<()> {
    let paths = args.paths.iter().map(|p| p.canonicalize().with_context(|| format!("opening {}", p.display())));
    let paths = paths.collect::<Result<Vec<_>>>()?;
    if state_dir::holder(&global.state, state_dir::Half::Runtime).is_some() {
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
    fn only_a_name_among_several_is_untagged() {
        let tags = ["docker.io/library/a:1".to_owned(), "docker.io/library/a:latest".to_owned()];
        for (wanted, untagged) in
            [("a:1", true), ("a", true), ("library/a:1", true), ("sha256:abc", false), ("abc", false), ("b", false)]
        {
            assert_eq!(is_only_untagged(wanted, &tags), untagged, "{wanted}");
        }
        assert!(!is_only_untagged("a:1", &tags[..1]), "with its last name the image goes");
    }

    #[test]
    fn a_port_is_not_a_tag() {
        assert_eq!(split_tag("localhost:5000/app:v1"), ("localhost:5000/app", "v1"));
        assert_eq!(split_tag("localhost:5000/app"), ("localhost:5000/app", "<none>"));
    }
}
