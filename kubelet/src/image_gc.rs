//! Images that nobody uses go when their file system is full, or when nobody has used them for long. What is known of images is
//! counted in monotonic time from the kubelet's start: a clock that jumps removes nothing. Never a pinned image, never one in use.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use berth_cri_api::v1 as cri;
use k8s_openapi::api::core::v1::Pod;
use tokio::time::Instant;

use crate::care::Care;
use crate::config::ImageGc;
use crate::cri as calls;
use crate::eviction::judge::Observation;
use crate::eviction::signals::{Places, file_system};
use crate::metrics::families;
use crate::record::Weight;
use crate::{image_name, pod};

/// What is known of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    first: Instant,
    used: Option<Instant>,
    bytes: i64,
    /// In use or pinned when it was last looked at.
    kept: bool,
}

/// What is known of all images, by ID.
#[derive(Clone, Debug, Default)]
pub struct Memory(BTreeMap<String, Seen>);

impl Memory {
    /// Takes note of the images that there are and those in use.
    pub fn note(&mut self, images: &[cri::Image], used: &BTreeSet<String>, now: Instant) {
        self.0.retain(|id, _| images.iter().any(|image| image.id == *id));
        for image in images {
            let in_use = used.contains(&image.id);
            let bytes = i64::try_from(image.size).unwrap_or(i64::MAX);
            let seen = self.0.entry(image.id.clone()).or_insert(Seen { first: now, used: None, bytes, kept: false });
            seen.kept = in_use || image.pinned;
            seen.bytes = bytes;
            if in_use {
                seen.used = Some(now);
            }
        }
    }

    /// Images that may go, the longest unused first; those never used before all others, the older first.
    fn candidates(&self, min_age: Duration, now: Instant) -> Vec<(&String, &Seen)> {
        let old = |seen: &Seen| {
            let age = now.saturating_duration_since(seen.first);
            age >= min_age && seen.used.is_none_or(|used| used < now)
        };
        let mut found: Vec<_> = self.0.iter().filter(|(_, seen)| !seen.kept && old(seen)).collect();
        found.sort_by_key(|(_, seen)| (seen.used, seen.first));
        found
    }

    /// Images that were not used for longer than the configuration wants.
    pub fn too_old(&self, gc: &ImageGc, now: Instant) -> Vec<String> {
        let Some(most) = gc.max_age else { return Vec::new() };
        let unused = |seen: &Seen| now.saturating_duration_since(seen.used.unwrap_or(seen.first));
        self.candidates(gc.min_age, now).into_iter().filter(|(_, seen)| unused(seen) > most).map(|(id, _)| id.clone()).collect()
    }

    /// All that may go.
    pub fn unused(&self, gc: &ImageGc, now: Instant) -> Vec<(String, i64)> {
        self.candidates(gc.min_age, now).into_iter().map(|(id, seen)| (id.clone(), seen.bytes)).collect()
    }
}

/// How many bytes have to be freed; 0: the file system is not full.
pub fn bytes_to_free(gc: &ImageGc, seen: Observation) -> i64 {
    // A threshold of 100 % switches this off, as upstream.
    if seen.capacity <= 0 || gc.high_percent >= 100 {
        return 0;
    }
    let percent = |part: i64| i128::from(seen.capacity) * i128::from(part) / 100;
    let used_percent = 100 - i128::from(seen.available) * 100 / i128::from(seen.capacity);
    if used_percent < i128::from(gc.high_percent) {
        return 0;
    }
    let wanted = percent(100 - i64::from(gc.low_percent)) - i128::from(seen.available);
    i64::try_from(wanted.max(0)).unwrap_or(i64::MAX)
}

/// IDs of the images that containers or pods use: what containers were made of, running or dead, and what pods that have not ended
/// name, for their containers and for volumes.
pub fn used_images(images: &[cri::Image], containers: &[cri::Container], pods: &[Arc<Pod>]) -> BTreeSet<String> {
    let mut names: BTreeSet<String> = BTreeSet::new();
    for container in containers {
        let spec = container.image.iter().flat_map(|image| [image.image.clone(), image.user_specified_image.clone()]);
        names.extend([container.image_ref.clone(), container.image_id.clone()].into_iter().chain(spec));
    }
    for pod in pods.iter().filter(|pod| !crate::host_ports::is_over(pod.status.as_ref())) {
        let spec = pod::spec(pod);
        let of_containers = spec.containers.iter().chain(pod::init_containers(pod)).filter_map(|c| c.image.as_deref());
        let of_volumes = spec.volumes.iter().flatten().filter_map(|v| v.image.as_ref()?.reference.as_deref());
        names.extend(of_containers.chain(of_volumes).filter_map(|name| image_name::normalize(name).ok()));
    }
    let is_named = |image: &&cri::Image| {
        let tags = image.repo_tags.iter().chain(&image.repo_digests);
        // Runtimes list `docker.io/library/busybox:1` for what pods call `busybox:1`.
        names.contains(&image.id)
            || tags.into_iter().any(|tag| names.contains(tag) || short_names(tag).any(|name| names.contains(name)))
    };
    images.iter().filter(is_named).map(|image| image.id.clone()).collect()
}

fn short_names(tag: &str) -> impl Iterator<Item = &str> {
    let hub = tag.strip_prefix("docker.io/");
    hub.into_iter().chain(hub.and_then(|rest| rest.strip_prefix("library/")))
}

/// Looks at images every [`crate::Timing::image_gc`]. Never returns.
pub(crate) async fn run(care: Care) {
    let mut failures = 0;
    // The first look only takes note: ages count from it.
    let _ = look(&care).await;
    loop {
        tokio::time::sleep(care.config.timing.image_gc).await;
        match collect(&care).await {
            Ok(None) => failures = 0,
            Ok(Some(text)) => {
                failures += 1;
                care.recorder.node_event(Weight::Warning, "FreeDiskSpaceFailed", &text);
                if failures > 1 {
                    care.recorder.node_event(Weight::Warning, "ImageGCFailed", &text);
                }
            }
            Err(error) => tracing::warn!(error = %calls::message(&error), "images cannot be looked at"),
        }
    }
}

async fn look(care: &Care) -> crate::Result<()> {
    let images = care.runtime.list_images().await?;
    let containers = care.runtime.list_containers(None).await?;
    let used = used_images(&images, &containers, &care.table.list());
    care.images.lock().unwrap_or_else(PoisonError::into_inner).note(&images, &used, Instant::now());
    Ok(())
}

/// One collection; the text says why it could not free enough.
async fn collect(care: &Care) -> crate::Result<Option<String>> {
    look(care).await?;
    let gc = care.config.image_gc;
    let memory = || care.images.lock().unwrap_or_else(PoisonError::into_inner);
    let old = memory().too_old(&gc, Instant::now());
    for id in old {
        remove(care, &id, Why::Age).await;
    }
    let places = Places::ask(&care.runtime).await?;
    let Some(seen) = places.images.as_deref().and_then(file_system).map(|[bytes, _]| bytes) else { return Ok(None) };
    let wanted = bytes_to_free(&gc, seen);
    if wanted == 0 {
        return Ok(None);
    }
    let unused = memory().unused(&gc, Instant::now());
    let eligible: i64 = unused.iter().map(|(_, bytes)| *bytes).fold(0, i64::saturating_add);
    let mut freed = 0i64;
    for (id, bytes) in unused {
        if freed >= wanted {
            break;
        }
        if remove(care, &id, Why::Space("the file system of images is full")).await {
            freed = freed.saturating_add(bytes);
        }
    }
    Ok((freed < wanted).then(|| {
        format!("Failed to garbage collect required amount of images. Attempted to free {wanted} bytes, but only found {eligible} bytes eligible to free.")
    }))
}

/// Removes every image that may go; how many went.
pub(crate) async fn remove_unused(care: &Care) -> usize {
    if let Err(error) = look(care).await {
        tracing::warn!(error = %calls::message(&error), "images cannot be looked at");
        return 0;
    }
    let unused = care.images.lock().unwrap_or_else(PoisonError::into_inner).unused(&care.config.image_gc, Instant::now());
    let mut removed = 0;
    for (id, _) in unused {
        removed += usize::from(remove(care, &id, Why::Space("the node's disk is full")).await);
    }
    removed
}

/// Why an image goes.
#[derive(Clone, Copy)]
enum Why {
    /// Nobody used it for long.
    Age,
    /// Something is full.
    Space(&'static str),
}

async fn remove(care: &Care, id: &str, why: Why) -> bool {
    let (label, why) = match why {
        Why::Age => ("age", "it was not used for too long"),
        Why::Space(what) => ("space", what),
    };
    match care.runtime.remove_image(id).await {
        Ok(()) => {
            care.runtime.metrics().count(&families::IMAGE_GARBAGE, &[label]);
            tracing::info!(image = id, "image is removed: {why}");
            true
        }
        Err(error) => {
            tracing::warn!(image = id, error = %calls::message(&error), "image stays");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(id: &str, tag: &str, size: u64, pinned: bool) -> cri::Image {
        cri::Image { id: id.into(), repo_tags: vec![tag.into()], size, pinned, ..Default::default() }
    }

    fn set(ids: &[&str]) -> BTreeSet<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    #[test]
    fn the_longest_unused_images_go_first_and_pinned_used_and_young_ones_stay() {
        let gc = ImageGc::default();
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut images = vec![image("used", "u:1", 1, false), image("pinned", "p:1", 1, true), image("once", "o:1", 10, false)];
        let mut memory = Memory::default();
        memory.note(&images, &set(&["used", "once"]), at(0));
        images.push(image("never", "n:1", 20, false));
        memory.note(&images, &set(&["used"]), at(100));
        images.push(image("young", "y:1", 30, false));
        memory.note(&images, &set(&["used"]), at(200));
        let ids = |now| memory.unused(&gc, now).into_iter().map(|(id, _)| id).collect::<Vec<_>>().join(" ");
        assert_eq!(ids(at(219)), "once");
        assert_eq!(ids(at(220)), "never once");
        assert_eq!(ids(at(320)), "never young once");
        let old = ImageGc { max_age: Some(Duration::from_secs(300)), ..gc };
        assert_eq!((memory.too_old(&gc, at(9999)).len(), memory.too_old(&old, at(320))), (0, vec!["once".to_owned()]));
    }

    #[test]
    fn a_full_file_system_is_freed_down_to_the_low_threshold() {
        let gc = ImageGc::default();
        let free = |available: i64| bytes_to_free(&gc, Observation { available, capacity: 1000 });
        assert_eq!((free(500), free(160), free(150), free(10), free(1000)), (0, 0, 50, 190, 0));
        assert_eq!(bytes_to_free(&gc, Observation { available: 0, capacity: 0 }), 0);
        let off = ImageGc { high_percent: 100, ..gc };
        assert_eq!(bytes_to_free(&off, Observation { available: 0, capacity: 1000 }), 0);
    }

    #[test]
    fn what_containers_and_pods_name_is_in_use() {
        let images = [
            image("sha256:a", "docker.io/library/busybox:1", 1, false),
            image("sha256:b", "r.example/b:2", 1, false),
            image("sha256:c", "r.example/c:3", 1, false),
            image("sha256:d", "r.example/d:latest", 1, false),
            image("sha256:e", "r.example/e:1", 1, false),
        ];
        let container = cri::Container { image_ref: "sha256:b".into(), ..Default::default() };
        let text = "{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: [{name: c, image: \"busybox:1\"}], volumes: [{name: v, image: {reference: r.example/d}}]}}";
        let pod = crate::source::parse::parse_manifest(text).unwrap().pods.remove(0).pod;
        let mut over = pod.clone();
        over.spec.as_mut().unwrap().containers[0].image = Some("r.example/e:1".into());
        over.status = Some(k8s_openapi::api::core::v1::PodStatus { phase: Some("Failed".into()), ..Default::default() });
        let used = used_images(&images, &[container], &[Arc::new(pod), Arc::new(over)]);
        assert_eq!(used, set(&["sha256:a", "sha256:b", "sha256:d"]));
    }
}
