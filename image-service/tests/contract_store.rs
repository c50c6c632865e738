//! The store over removals, holds, restarts and damage.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Command;

use berth_image::{ErrorKind, ImageStore, Reference, StoreConfig};
use berth_testkit::registry::Registry;
use serde_json::json;
use support::{Pack, TestImage, TestLayer, TestStore, TestTar, gzip, noise};

fn base() -> TestLayer {
    TestLayer::new(TestTar::new().dir("tmp", 0o1777).file("base", noise(100_000, 1)), Pack::Gzip)
}

fn over_base(text: &str) -> TestImage {
    TestImage::new(vec![base(), TestLayer::new(TestTar::new().file("text", text), Pack::Gzip)])
}

fn layers(test: &TestStore) -> usize {
    std::fs::read_dir(test.root().join("layers")).unwrap().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_by_any_name_removes_all_names_and_then_the_data() {
    let (registry, test) = (Registry::start(), TestStore::new().await);
    let (one, two) = (over_base("one"), over_base("two"));
    let names = [one.push(&registry, "1"), one.push(&registry, "same"), two.push(&registry, "2")];
    for name in &names {
        test.pull(name).await.unwrap();
    }
    assert_eq!((test.store.list().len(), layers(&test)), (2, 3));
    test.store.remove(&names[1]).await.unwrap();
    for text in [names[0].as_str(), &names[1], &one.id()] {
        assert_eq!(test.store.status(text), None);
    }
    test.assert_clean().await;
    assert_eq!(layers(&test), 2, "the shared layer stays");
    test.store.remove(&two.id()[7..20]).await.unwrap();
    test.assert_clean().await;
    assert_eq!((layers(&test), test.store.fs_usage().bytes, test.store.fs_usage().inodes), (0, 0, 0));
    test.store.remove(&"0".repeat(64)).await.unwrap();
    test.store.remove("unknown:1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn untagging_takes_one_name_and_the_records_tell_it_without_a_store() {
    let (registry, test) = (Registry::start(), TestStore::new().await);
    let one = over_base("one");
    let names = [one.push(&registry, "1"), one.push(&registry, "same")];
    for name in &names {
        test.pull(name).await.unwrap();
    }
    assert_eq!(test.store.untag(&names[0]).await.unwrap(), names[0]);
    assert!(test.store.status(&names[0]).is_none());
    assert_eq!(test.store.status(&names[1]).unwrap().repo_tags, names[1..]);
    for refused in [&names[0], &names[1], &one.id()] {
        assert!(test.store.untag(refused).await.is_err(), "{refused} is not one name of several");
    }
    let on_record = berth_image::images_on_record(&test.root()).unwrap();
    assert_eq!(on_record.len(), 1);
    assert_eq!((on_record[0].id.to_string(), on_record[0].repo_tags.as_slice()), (one.id(), &names[1..]));
    assert!(berth_image::images_on_record(&test.root().join("none")).unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn five_removes_at_once_succeed_and_each_finds_it_gone() {
    let (registry, test) = (Registry::start(), TestStore::new().await);
    for round in 0..20 {
        let image = TestImage::small(&round.to_string());
        let name = image.push(&registry, "1");
        test.pull(&name).await.unwrap();
        let record = test.root().join("records").join(format!("{}.json", &image.id()[7..]));
        assert!(record.exists());
        let tasks: Vec<_> = (0..5)
            .map(|_| {
                let (store, id, record) = (test.store.clone(), image.id(), record.clone());
                tokio::spawn(async move {
                    store.remove(&id).await.unwrap();
                    assert!(store.status(&id).is_none() && !record.exists());
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    }
    test.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_images_layers_outlive_its_removal_and_a_restart() {
    let (registry, test) = (Registry::start(), TestStore::new().await);
    let image = over_base("held");
    let id = test.pull(&image.push(&registry, "1")).await.unwrap();
    let hold = test.store.hold(&id).unwrap();
    let second = test.store.hold(&id).unwrap();
    test.store.remove(&id.to_string()).await.unwrap();
    assert!(test.store.list().is_empty());
    test.store.settled().await;
    assert_eq!((layers(&test), hold.rootfs().lowers.len(), hold.config().user.as_str()), (2, 2, "1000:1"));
    drop((hold, second));
    test.assert_clean().await;
    assert_eq!(layers(&test), 0);
    assert_eq!(test.store.hold(&id).err().unwrap().kind(), ErrorKind::NotFound);

    test.pull(&image.push(&registry, "1")).await.unwrap();
    let hold = test.store.hold(&id).unwrap();
    test.store.remove(&id.to_string()).await.unwrap();
    let lost = over_base("lost");
    test.pull(&lost.push(&registry, "2")).await.unwrap();
    let lost_hold = test.store.hold(&lost.id().parse().unwrap()).unwrap();
    test.store.remove(&lost.id()).await.unwrap();
    // The process dies with its holds.
    std::mem::forget((hold, lost_hold));
    let test = test.reopen().await;
    assert!(test.store.list().is_empty() && test.store.problems().is_empty());
    let hold = test.store.hold(&id).unwrap();
    test.store.start_reaper();
    test.assert_clean().await;
    assert_eq!(test.read(&id, 0, "text"), "held");
    assert_eq!(layers(&test), 2, "what nobody took a hold of is gone");
    drop(hold);
    test.assert_clean().await;
    assert_eq!(layers(&test), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_but_held_image_comes_back_by_pulling_it_again() {
    let (registry, test) = (Registry::start(), TestStore::new().await);
    let image = over_base("x");
    let name = image.push(&registry, "1");
    let id = test.pull(&name).await.unwrap();
    let hold = test.store.hold(&id).unwrap();
    test.store.remove(&name).await.unwrap();
    test.pull(&name).await.unwrap();
    drop(hold);
    test.assert_clean().await;
    assert_eq!(test.store.status(&name).unwrap().repo_tags, std::slice::from_ref(&name));
    assert_eq!(test.read(&id, 0, "text"), "x");
    assert_eq!(registry.count(&image.layers[1].digest()), 1);
    let test = test.reopen().await;
    assert_eq!(test.store.status(&name).unwrap().id, id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_clears_leftovers_and_reports_damage() {
    let (registry, test) = (Registry::start(), TestStore::new().await);
    let (good, bad, cut) = (over_base("good"), TestImage::small("bad"), TestImage::small("cut"));
    let names = [good.push(&registry, "good"), bad.push(&registry, "bad"), cut.push(&registry, "cut")];
    for name in &names {
        test.pull(name).await.unwrap();
    }
    let listed = test.store.status(&names[0]).unwrap();
    let root = test.root();
    // A pull that died between placing its layer and committing its image.
    let orphan = root.join("layers").join("0".repeat(64));
    copy(&root.join("layers").join(&cut.layers[0].diff_id[7..]), &orphan);
    edit(&orphan.join("layer.json"), &cut.layers[0].diff_id[7..], &"0".repeat(64));
    std::fs::create_dir_all(root.join("staging/1-1/fs/deep")).unwrap();
    std::fs::write(root.join("staging/1-2"), "half").unwrap();
    std::fs::write(root.join("blobs/sha256").join("1".repeat(64)), "nobody's").unwrap();
    std::fs::remove_dir_all(root.join("layers").join(&cut.layers[0].diff_id[7..])).unwrap();
    std::fs::remove_file(root.join("l").join(&test.store.rootfs(&good.id().parse().unwrap()).unwrap().lowers[0])).unwrap();
    let test = test.reopen().await;
    let problems = test.store.problems();
    assert!(problems.len() == 1 && problems[0].reason.contains("missing"), "{problems:?}");
    assert_eq!((test.store.list().len(), test.store.status(&names[0])), (2, Some(listed.clone())));
    test.store.settled().await;
    assert!(!orphan.exists() && std::fs::read_dir(root.join("staging")).unwrap().count() == 0);
    assert_eq!(test.read(&listed.id, 0, "text"), "good");
    // The broken one can be pulled again.
    test.pull(&names[2]).await.unwrap();
    assert_eq!(test.store.list().len(), 3);

    let record = root.join("records").join(format!("{}.json", &bad.id()[7..]));
    for (text, reason) in [("{\"version\": 1", "EOF"), ("{\"version\": 2}", "version 2")] {
        std::fs::write(&record, text).unwrap();
        let config = StoreConfig::new(test.dir.path().join("copy"));
        copy(&root, &config.root);
        let store = ImageStore::open(config).await.unwrap();
        store.start_reaper();
        store.settled().await;
        assert_eq!(store.list().len(), 2);
        assert!(store.problems().len() == 1 && store.problems()[0].reason.contains(reason), "{:?}", store.problems());
        let kept = test.dir.path().join("copy/layers").join(&bad.layers[0].diff_id[7..]);
        assert!(kept.exists(), "what an unreadable record may name is not deleted");
        store.pull(&Reference::parse(&names[1]).unwrap(), None).await.unwrap();
        assert_eq!(store.list().len(), 3);
        drop(store);
        std::fs::remove_dir_all(test.dir.path().join("copy")).unwrap();
    }
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
}

fn edit(file: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(file).unwrap().replace(&format!("\"key\": \"{from}\""), &format!("\"key\": \"{to}\""));
    std::fs::write(file, text).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_has_one_process_at_a_time() {
    let test = TestStore::new().await;
    let error = ImageStore::open(StoreConfig::new(test.root())).await.err().unwrap();
    assert!(error.to_string().contains("another process"), "{error}");
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(test.root()).unwrap());
    assert_eq!(mode & 0o777, 0o700);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_depends_on_its_base_is_kept_for_each_base() {
    let (registry, test) = (Registry::start(), TestStore::new().await);
    let own = TestLayer::new(TestTar::new().file("tmp/x", "x").hard("link", "file"), Pack::Gzip);
    let on = |mode: u32, text: &str| {
        let base = TestLayer::new(TestTar::new().dir("tmp", mode).file("file", text), Pack::Gzip);
        TestImage::new(vec![base, own.clone()])
    };
    let (one, two) = (on(0o1777, "one"), on(0o700, "two"));
    let first = test.pull(&one.push(&registry, "1")).await.unwrap();
    let second = test.pull(&two.push(&registry, "2")).await.unwrap();
    assert_eq!((test.read(&first, 0, "link"), test.read(&second, 0, "link")), ("one".into(), "two".into()));
    let mode = |id| {
        let rootfs = test.store.rootfs(id).unwrap();
        let meta = std::fs::metadata(rootfs.links_dir.join(&rootfs.lowers[0]).join("tmp")).unwrap();
        std::os::unix::fs::MetadataExt::mode(&meta) & 0o7777
    };
    assert_eq!((mode(&first), mode(&second), layers(&test)), (0o1777, 0o700, 4));
    let asked = registry.count(&own.digest());
    test.store.remove(&one.id()).await.unwrap();
    test.assert_clean().await;
    test.pull(&two.push(&registry, "3")).await.unwrap();
    assert_eq!(registry.count(&own.digest()), asked);
}

/// Mounts an image's overlay in a mount namespace of its own and runs a command in it.
fn in_overlay(test: &TestStore, id: &berth_image::ImageId, command: &str) -> String {
    let rootfs = test.store.rootfs(id).unwrap();
    let lowers = rootfs.lowers.join(":");
    let work = test.dir.path().join("mount");
    for dir in ["upper", "work", "merged"] {
        std::fs::create_dir_all(work.join(dir)).unwrap();
    }
    let script = format!(
        "cd {links}; mount -t overlay overlay -o lowerdir={lowers},upperdir={work}/upper,workdir={work}/work {work}/merged; cd {work}/merged; {command}",
        links = rootfs.links_dir.display(),
        work = work.display(),
    );
    let out = Command::new("unshare").args(["-m", "sh", "-ec", &script]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    std::fs::remove_dir_all(&work).unwrap();
    String::from_utf8(out.stdout).unwrap()
}

const LIST: &str = "find . -mindepth 1 ! -type d -printf '%P %y %m %U %G %s %T@ %l\\n' | LC_ALL=C sort; \
                    find . -mindepth 1 -type d -printf '%P %y %m %U %G\\n' | LC_ALL=C sort";

#[tokio::test(flavor = "multi_thread")]
async fn one_hundred_and_twenty_eight_layers_mount() {
    let test = TestStore::new().await;
    let layers = (0..128)
        .map(|at| TestLayer::new(TestTar::new().file("last", format!("{at}")).file(&format!("f{at}"), "x"), Pack::Gzip))
        .collect();
    let image = TestImage::new(layers);
    let dir = test.dir.path().join("layout");
    image.layout(&dir, json!({}));
    let images = test.store.import(&dir, None).await.unwrap();
    assert_eq!(test.store.rootfs(&images[0].id).unwrap().lowers.join(":").len(), 128 * 8 - 1);
    assert_eq!(in_overlay(&test, &images[0].id, "cat last; ls | wc -l"), "127129\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mounted_image_is_what_umoci_unpacks() {
    let test = TestStore::new().await;
    let image = TestImage::new(vec![
        TestLayer::new(
            TestTar::new()
                .dir("etc", 0o755)
                .file("etc/gone", "1")
                .file("etc/kept", "1")
                .dir("opq", 0o755)
                .file("opq/old", "1")
                .dir("dir", 0o755)
                .file("dir/in", "1")
                .owned(5, 6)
                .dir("tmp", 0o1777)
                .file_mode("tmp/su", 0o4755, "s")
                .owned(0, 0)
                .symlink("link", "etc/kept")
                .fifo("pipe", 0o600)
                .device("null", 0o666, false, 1, 3)
                .file("replaced", "file"),
            Pack::Gzip,
        ),
        TestLayer::new(
            TestTar::new()
                .whiteout("etc", "gone")
                .dir("opq", 0o700)
                .opaque("opq")
                .file("opq/new", "2")
                .whiteout("", "dir")
                .file("dir2/implied", "2")
                .hard("hard", "tmp/su")
                .dir("replaced", 0o711)
                .file("replaced/now", "a folder"),
            Pack::Plain,
        ),
        TestLayer::new(
            TestTar::new().dir("dir", 0o750).file("tmp/implied", "3").whiteout("", "link").opaque("dir2").file("dir2/only", "3"),
            Pack::Zstd,
        ),
    ]);
    let dir = test.dir.path().join("layout");
    image.layout(&dir, json!({"org.opencontainers.image.ref.name": "x"}));
    let images = test.store.import(&dir, None).await.unwrap();
    assert!(images[0].repo_tags.is_empty(), "a tag alone is no name");
    let ours = in_overlay(&test, &images[0].id, LIST);
    // umoci here does not know zstd.
    let mut plain = image.clone();
    let bytes = zstd::stream::decode_all(&plain.layers[2].blob[..]).unwrap();
    plain.layers[2] = TestLayer::of(bytes, Pack::Gzip);
    let dir = test.dir.path().join("plain");
    plain.layout(&dir, json!({"org.opencontainers.image.ref.name": "x"}));
    let script = format!("umoci unpack --image plain:x bundle >&2; cd bundle/rootfs; {LIST}");
    let out = Command::new("sh").args(["-ec", &script]).current_dir(test.dir.path()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let theirs = String::from_utf8(out.stdout).unwrap();
    assert_eq!(ours, theirs);
    assert!(theirs.contains("tmp/implied") && !theirs.contains("opq/old") && !theirs.contains("dir2/implied"));
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_of_every_form_are_imported_with_their_names() {
    let image = over_base("archived");
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    image.layout(&layout, json!({"org.opencontainers.image.ref.name": "x"}));
    let sh = |command: &str| {
        let out = Command::new("sh").args(["-ec", command]).current_dir(dir.path()).output().unwrap();
        assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
    };
    let name = "reg.example/some/app:v1";
    sh(&format!("skopeo copy -q oci:layout:x docker-archive:docker.tar:{name}"));
    sh(&format!("skopeo copy -q oci:layout:x oci-archive:oci.tar:{name}"));
    sh("skopeo copy -q oci:layout:x oci-archive:unnamed.tar");
    for (file, bytes) in [
        ("docker.tar.gz", gzip(&std::fs::read(dir.path().join("docker.tar")).unwrap())),
        ("oci.tar.zst", zstd::stream::encode_all(std::fs::File::open(dir.path().join("oci.tar")).unwrap(), 1).unwrap()),
    ] {
        std::fs::write(dir.path().join(file), bytes).unwrap();
    }
    for file in ["docker.tar", "docker.tar.gz", "oci.tar", "oci.tar.zst", "unnamed.tar", "layout"] {
        let test = TestStore::new().await;
        let given = Reference::parse(name).unwrap();
        let given = matches!(file, "unnamed.tar" | "layout").then_some(given);
        let images = test.store.import(&dir.path().join(file), given).await.unwrap_or_else(|error| panic!("{file}: {error}"));
        assert_eq!((images.len(), &images[0].repo_tags), (1, &vec![name.to_string()]), "{file}");
        assert_eq!(test.read(&images[0].id, 0, "text"), "archived");
        assert_eq!(images[0].id.to_string(), image.id(), "{file}");
        assert_eq!(images[0].repo_digests.len(), usize::from(!file.starts_with("docker")));
        assert_eq!(test.store.list(), images);
        test.assert_clean().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_and_foreign_archives_are_refused_and_leave_nothing() {
    let test = TestStore::new().await;
    let image = over_base("x");
    let dir = test.dir.path().join("layout");
    image.layout(&dir, json!({}));
    let blob = |digest: &str| dir.join("blobs/sha256").join(&digest[7..]);
    let damage = |digest: &str| {
        let mut bytes = std::fs::read(blob(digest)).unwrap();
        let at = bytes.len() / 2;
        bytes[at] ^= 4;
        std::fs::write(blob(digest), bytes).unwrap();
    };
    for digest in [image.digest(), image.id(), image.layers[0].digest(), image.layers[1].digest()] {
        damage(&digest);
        assert_eq!(test.store.import(&dir, None).await.unwrap_err().kind(), ErrorKind::Corrupt, "{digest}");
        damage(&digest);
    }
    std::fs::rename(blob(&image.layers[1].digest()), dir.join("away")).unwrap();
    assert!(test.store.import(&dir, None).await.is_err());
    std::fs::rename(dir.join("away"), blob(&image.layers[1].digest())).unwrap();
    let file = test.dir.path().join("file");
    for (bytes, word) in [
        (b"no archive".repeat(200), "not an archive"),
        (TestTar::new().file("x", "y").build(), "neither"),
        (TestTar::new().file("repositories", "{}").build(), "Docker before"),
        (TestTar::new().file("manifest.json", "[]").build(), "no image"),
        (
            TestTar::new()
                .file("manifest.json", "[{\"Config\":\"../../../etc/passwd\",\"RepoTags\":null,\"Layers\":[]}]")
                .build(),
            "missing",
        ),
    ] {
        std::fs::write(&file, bytes).unwrap();
        let error = test.store.import(&file, None).await.unwrap_err();
        assert!(error.to_string().contains(word), "{word}: {error}");
    }
    assert!(test.store.list().is_empty());
    test.assert_clean().await;
    assert_eq!(test.store.fs_usage().bytes, 0);
    test.store.import(&dir, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_roots_owner_and_mode_come_from_the_topmost_layer_that_gives_them() {
    let test = TestStore::new().await;
    let image = TestImage::new(vec![
        TestLayer::new(TestTar::new().owned(1, 2).dir("./", 0o555).file("a", "x"), Pack::Gzip),
        TestLayer::new(TestTar::new().file("b", "x"), Pack::Gzip),
    ]);
    let dir = test.dir.path().join("layout");
    image.layout(&dir, json!({"io.containerd.image.name": "docker.io/library/x:1"}));
    let images = test.store.import(&dir, None).await.unwrap();
    assert_eq!(images[0].repo_tags, ["docker.io/library/x:1"]);
    let rootfs = test.store.rootfs(&images[0].id).unwrap();
    assert_eq!((rootfs.root_mode, rootfs.root_uid, rootfs.root_gid), (0o555, 1, 2));
    let hiding = TestImage::new(vec![base(), TestLayer::new(TestTar::new().opaque("").file("b", "x"), Pack::Gzip)]);
    let dir = test.dir.path().join("hiding");
    hiding.layout(&dir, json!({}));
    let images = test.store.import(&dir, None).await.unwrap();
    let rootfs = test.store.rootfs(&images[0].id).unwrap();
    assert_eq!((rootfs.lowers.len(), rootfs.root_mode), (1, 0o755), "an opaque root hides all that is below");
}
