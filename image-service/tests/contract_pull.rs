//! Pulling from a registry that does what the test tells it.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use berth_image::{AuthFields, Credentials, Error, ErrorKind, ImageUser, Reference};
use berth_testkit::image::digest;
use berth_testkit::registry::{Auth, Fault, Registry};
use berth_testkit::wait_until;
use serde_json::json;
use support::{INDEX, MANIFEST, Pack, TestImage, TestLayer, TestStore, TestTar, noise};

const SOON: Duration = Duration::from_secs(20);

fn kind<T>(result: Result<T, Error>) -> ErrorKind {
    match result {
        Ok(_) => panic!("it should have failed"),
        Err(error) => error.kind(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_listed_under_its_names_once_pulled() {
    let (registry, test) = (Registry::start(), TestStore::new().await);
    let image = TestImage::new(vec![
        TestLayer::new(TestTar::new().dir("etc", 0o755).file("etc/a", "one"), Pack::Gzip),
        TestLayer::new(TestTar::new().dir("etc", 0o755).file("etc/a", "two"), Pack::Zstd),
        TestLayer::new(TestTar::new().file("b", "three"), Pack::Plain),
    ]);
    let name = image.push(&registry, "latest");
    let untagged = name.strip_suffix(":latest").unwrap();
    let id = test.pull(untagged).await.unwrap();
    assert_eq!(id.to_string(), image.id());
    let listed = test.store.list();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].repo_tags, std::slice::from_ref(&name));
    assert_eq!(listed[0].repo_digests, [format!("{untagged}@{}", image.digest())]);
    assert_eq!(listed[0].user, ImageUser::Uid(1000));
    let sum: usize = image.layers.iter().map(|layer| layer.blob.len()).sum();
    assert_eq!(listed[0].size as usize, sum + image.config_bytes().len());
    let hex = id.hex();
    for text in
        [&name, untagged, &listed[0].repo_digests[0], &id.to_string(), &hex, &hex[..10], &format!("sha256:{}", &hex[..10])]
    {
        assert_eq!(test.store.status(text).as_ref(), Some(&listed[0]), "{text}");
    }
    for text in ["other", "", "sha256:", &format!("{untagged}:other"), &"0".repeat(64)] {
        assert_eq!(test.store.status(text), None, "{text}");
    }
    let config = test.store.config(&id).unwrap();
    assert_eq!((config.user.as_str(), &config.env, &config.cmd), ("1000:1", &vec!["A=b".to_string()], &vec!["sh".to_string()]));
    let rootfs = test.store.rootfs(&id).unwrap();
    assert!(rootfs.lowers.iter().all(|name| name.len() <= 8));
    assert_eq!(
        (test.read(&id, 0, "b"), test.read(&id, 1, "etc/a"), test.read(&id, 2, "etc/a")),
        ("three".into(), "two".into(), "one".into())
    );
    test.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_by_digest_gives_one_repo_digest_and_no_tag() {
    let (registry, test) = (Registry::start(), TestStore::new().await);
    let image = TestImage::small("x");
    let name = image.push(&registry, "latest");
    let repository = name.strip_suffix(":latest").unwrap();
    let by_digest = format!("{repository}@{}", image.digest());
    for text in [&by_digest, &format!("{repository}:other@{}", image.digest())] {
        test.pull(text).await.unwrap();
        let found = test.store.status(text).unwrap();
        assert_eq!((found.repo_tags.len(), found.repo_digests), (0, vec![by_digest.clone()]));
    }
    let wrong = format!("{repository}@{}", digest(b"wrong"));
    assert_eq!(kind(test.pull(&wrong).await), ErrorKind::NotFound);
    registry.put_manifest("some/thing", &digest(b"wrong"), MANIFEST, b"{}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_content_from_two_registries_is_one_image_with_two_tags() {
    let (one, two, test) = (Registry::start(), Registry::start(), TestStore::new().await);
    let image = TestImage::small("x");
    let names = [image.push(&one, "1"), image.push(&two, "1")];
    let first = test.pull(&names[0]).await.unwrap();
    let second = test.pull(&names[1]).await.unwrap();
    assert_eq!(first, second);
    let mut expected = names.to_vec();
    expected.sort();
    let listed = test.store.list();
    assert_eq!((listed.len(), &listed[0].repo_tags, listed[0].repo_digests.len()), (1, &expected, 2));
    assert_eq!(two.count(&image.layers[0].digest()), 0, "the layer was there");
    let test = test.reopen().await;
    assert_eq!(test.store.list(), listed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moved_tag_leaves_the_old_image_its_digest() {
    let (registry, test) = (Registry::start(), TestStore::new().await);
    let (old, new) = (TestImage::small("old"), TestImage::small("new"));
    let name = old.push(&registry, "1");
    let old_id = test.pull(&name).await.unwrap();
    new.push(&registry, "1");
    let new_id = test.pull(&name).await.unwrap();
    let check = |test: &TestStore| {
        assert_eq!(test.store.status(&name).unwrap().id, new_id);
        let old = test.store.status(&old_id.to_string()).unwrap();
        assert_eq!((old.repo_tags.len(), old.repo_digests.len()), (0, 1));
    };
    check(&test);
    let test = test.reopen().await;
    check(&test);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_platforms_image_is_taken_from_an_index() {
    let (registry, test) = (Registry::start(), TestStore::new().await);
    let (mine, other) = (TestImage::small("mine"), TestImage::small("other"));
    mine.push(&registry, "");
    other.push(&registry, "");
    let platform = berth_image::Platform::host();
    let entry = |image: &TestImage, architecture: &str| {
        json!({"mediaType": MANIFEST, "digest": image.digest(), "size": image.manifest_bytes().len(),
               "platform": {"os": "linux", "architecture": architecture}})
    };
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry(&other, "s390x"), entry(&mine, &platform.architecture)]});
    let index = index.to_string().into_bytes();
    registry.put_manifest("some/thing", "multi", INDEX, &index);
    let name = format!("{}/some/thing", registry.host());
    let id = test.pull(&format!("{name}:multi")).await.unwrap();
    assert_eq!(id.to_string(), mine.id());
    assert_eq!(test.store.list()[0].repo_digests, [format!("{name}@{}", digest(&index))]);
    let foreign = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry(&other, "s390x")]}).to_string();
    registry.put_manifest("some/thing", "foreign", INDEX, foreign.as_bytes());
    let error = test.pull(&format!("{name}:foreign")).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("no match for platform"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_kind_of_credentials_is_accepted_and_wrong_ones_are_refused() {
    let registry = Registry::start();
    let name = Reference::parse(&TestImage::small("x").push(&registry, "1")).unwrap();
    let open = AuthFields::default();
    let user = AuthFields { username: "user", password: "pass word", ..open };
    let auth = AuthFields { auth: "dXNlcjpwYXNzIHdvcmQ=", ..open };
    let wrong = AuthFields { username: "user", password: "wrong", ..open };
    let identity = AuthFields { identity_token: "refresh-me", ..open };
    let token = AuthFields { registry_token: "good-token", ..open };
    let elsewhere = AuthFields { server_address: "https://other.example", ..user };
    let host = registry.host();
    let here = AuthFields { server_address: &host, ..user };
    let basic = Auth::Basic { user: "user".into(), password: "pass word".into() };
    let bearer = Auth::Bearer { user: "user".into(), password: "pass word".into(), refresh_token: "refresh-me".into() };
    let anonymous = Auth::Bearer { user: String::new(), password: String::new(), refresh_token: String::new() };
    let cases = [
        (&Auth::Open, open, true),
        (&Auth::Open, wrong, true),
        (&basic, open, false),
        (&basic, user, true),
        (&basic, auth, true),
        (&basic, wrong, false),
        (&basic, elsewhere, false),
        (&basic, here, true),
        (&basic, token, false),
        (&anonymous, open, true),
        (&bearer, open, false),
        (&bearer, user, true),
        (&bearer, auth, true),
        (&bearer, wrong, false),
        (&bearer, identity, true),
        (&bearer, token, true),
        (&bearer, elsewhere, false),
    ];
    for (at, (demand, fields, works)) in cases.into_iter().enumerate() {
        registry.demand(demand.clone());
        let test = TestStore::new().await;
        let credentials = Credentials::from_fields(fields).unwrap();
        let result = test.store.pull(&name, credentials).await;
        match result {
            Ok(_) => assert!(works, "case {at} worked"),
            Err(error) => {
                assert!(!works && error.kind() == ErrorKind::Unauthorized, "case {at}: {error}");
                assert!(error.to_string().starts_with("pull access denied for "), "{error}");
                assert!(test.store.list().is_empty());
            }
        }
        test.assert_clean().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_or_out_of_reach_is_told_apart() {
    let (registry, test) = (Registry::start(), TestStore::new().await);
    let error = test.pull(&format!("{}/some/thing:none", registry.host())).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string()),
        (ErrorKind::NotFound, format!("{}/some/thing:none: not found", registry.host()))
    );
    let gone = registry.host();
    drop(registry);
    assert!(wait_until(SOON, || std::net::TcpStream::connect(&gone).is_err()));
    assert_eq!(kind(test.pull(&format!("{gone}/some/thing:1")).await), ErrorKind::Unavailable);
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_are_asked_first_and_the_registry_when_they_fail() {
    let (mirror, origin, test) = (Registry::start(), Registry::start(), TestStore::new().await);
    let image = TestImage::small("x");
    image.push(&mirror, "1");
    test.hosts(
        "reg.example",
        &format!(
            "server = 'http://{}'\n[host.'http://127.0.0.1:1']\n[host.'http://{}']\n[host.'http://{}'.header]\nx-key = 'k'",
            origin.host(),
            mirror.host(),
            mirror.host()
        ),
    );
    test.pull("reg.example/some/thing:1").await.unwrap();
    assert_eq!(test.store.list()[0].repo_tags, ["reg.example/some/thing:1"]);
    assert!(origin.received().is_empty());
    for request in mirror.received() {
        assert!(request.path.ends_with("?ns=reg.example"), "{}", request.path);
        assert_eq!(request.headers.get("x-key").map(String::as_str), Some("k"));
    }
    let second = TestImage::small("y");
    second.push(&origin, "2");
    test.pull("reg.example/some/thing:2").await.unwrap();
    assert_eq!(origin.count("manifests/2?ns=reg.example"), 1);
    let third = TestImage::small("z");
    third.push(&mirror, "3");
    third.push(&origin, "3");
    mirror.fault(&third.layers[0].digest(), Fault::Status(500));
    test.pull("reg.example/some/thing:3").await.unwrap();
    assert_eq!(origin.count(&third.layers[0].digest()), 1);
    test.hosts(
        "reg.example",
        &format!("server = 'http://{}'\n[host.'http://{}']\ncapabilities = ['pull']", origin.host(), mirror.host()),
    );
    let fourth = TestImage::small("4");
    fourth.push(&origin, "4");
    fourth.push(&mirror, "4");
    test.pull("reg.example/some/thing:4").await.unwrap();
    assert_eq!(
        (mirror.count("manifests/4"), origin.count("manifests/4")),
        (0, 1),
        "a mirror without resolve is not asked for tags"
    );
    assert_eq!(mirror.count(&fourth.layers[0].digest()), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn redirected_blobs_are_fetched_without_the_registrys_secrets() {
    let (registry, cdn, test) = (Registry::start(), Registry::start(), TestStore::new().await);
    let image = TestImage::small("x");
    let name = image.push(&registry, "1");
    let blob = &image.layers[0];
    cdn.put_blob(&blob.blob);
    registry.fault(&blob.digest(), Fault::Redirect(format!("http://{}/v2/any/blobs/{}?sig=1", cdn.host(), blob.digest())));
    registry.demand(Auth::Basic { user: "u".into(), password: "p".into() });
    test.store.pull(&Reference::parse(&name).unwrap(), Some(Credentials::basic("u", "p"))).await.unwrap();
    let requests = cdn.received();
    assert_eq!(requests.len(), 1);
    assert!(!requests[0].headers.contains_key("authorization"));
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_downloads_fail_and_leave_nothing() {
    let (registry, test) = (Registry::start(), TestStore::new().await);
    let big = TestTar::new().file("big", noise(2_000_000, 3)).build();
    for pack in [Pack::Plain, Pack::Gzip, Pack::Zstd] {
        let image = TestImage::new(vec![
            TestLayer::new(TestTar::new().file("first", format!("{}", pack as u8)), pack),
            TestLayer::of(big.clone(), pack),
        ]);
        let name = image.push(&registry, "1");
        let blob = image.layers[1].digest();
        for fault in [Fault::Damaged, Fault::Longer, Fault::BreakAfter(1000, 1000), Fault::Status(404), Fault::Status(503)] {
            registry.fault(&blob, fault.clone());
            let error = test.pull(&name).await.unwrap_err();
            let expected = match fault {
                Fault::Damaged | Fault::Longer => ErrorKind::Corrupt,
                Fault::Status(404) => ErrorKind::NotFound,
                _ => ErrorKind::Unavailable,
            };
            assert_eq!(error.kind(), expected, "{fault:?}: {error}");
            assert!(test.store.list().is_empty());
            test.assert_clean().await;
            assert_eq!(test.store.fs_usage().bytes, 0);
        }
        registry.heal();
        let id = test.pull(&name).await.unwrap();
        assert_eq!(
            std::fs::metadata(test.root().join("l").join(&test.store.rootfs(&id).unwrap().lowers[0]).join("big")).unwrap().len(),
            2_000_000
        );
        test.store.remove(&name).await.unwrap();
        test.assert_clean().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn manifests_and_configurations_are_verified() {
    let (registry, test) = (Registry::start(), TestStore::new().await);
    let image = TestImage::small("x");
    let name = image.push(&registry, "1");
    registry.fault(&image.id(), Fault::Damaged);
    assert_eq!(kind(test.pull(&name).await), ErrorKind::Corrupt);
    registry.heal();
    let mut other = image.clone();
    other.config["rootfs"]["diff_ids"] = json!([digest(b"another layer")]);
    let name = other.push(&registry, "2");
    let error = test.pull(&name).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("uncompressed"), "{error}");
    other.config["rootfs"]["diff_ids"] = json!([]);
    let name = other.push(&registry, "3");
    assert_eq!(kind(test.pull(&name).await), ErrorKind::Unsupported);
    let mut foreign = image.clone();
    foreign.config["architecture"] = json!("s390x");
    let name = foreign.push(&registry, "4");
    assert_eq!(kind(test.pull(&name).await), ErrorKind::Unsupported);
    registry.put_manifest("some/thing", "5", MANIFEST, b"not json");
    assert_eq!(kind(test.pull(&format!("{}/some/thing:5", registry.host())).await), ErrorKind::Corrupt);
    test.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_download_is_resumed_with_and_without_ranges() {
    for ranges in [true, false] {
        let (registry, test) = (Registry::start(), TestStore::new().await);
        registry.serve_ranges(ranges);
        let image = TestImage::new(vec![TestLayer::new(TestTar::new().file("big", noise(3_000_000, 9)), Pack::Gzip)]);
        let name = image.push(&registry, "1");
        let blob = image.layers[0].digest();
        registry.fault(&blob, Fault::BreakAfter(if ranges { 1_000_000 } else { 2_500_000 }, if ranges { 2 } else { 1 }));
        test.pull(&name).await.unwrap();
        let asked: Vec<_> = registry.received().into_iter().filter(|request| request.path.contains(&blob)).collect();
        assert_eq!(asked.len(), if ranges { 3 } else { 2 });
        assert!(asked[1].headers.contains_key("range"));
        test.assert_clean().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_registry_is_given_up() {
    let test = TestStore::with(|config| config.registry.stall_timeout = Duration::from_millis(200)).await;
    let registry = Registry::start();
    let image = TestImage::new(vec![TestLayer::new(TestTar::new().file("big", noise(1_000_000, 9)), Pack::Plain)]);
    let name = image.push(&registry, "1");
    registry.fault(&image.layers[0].digest(), Fault::HoldAfter(0));
    let error = test.pull(&name).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Unavailable && error.to_string().contains("no progress"), "{error}");
    test.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_caller_who_leaves_ends_the_download() {
    let (registry, test) = (Registry::start(), TestStore::new().await);
    let image = TestImage::new(vec![
        TestLayer::new(TestTar::new().file("first", "x"), Pack::Gzip),
        TestLayer::new(TestTar::new().file("big", noise(4_000_000, 5)), Pack::Gzip),
    ]);
    let name = image.push(&registry, "1");
    let blob = image.layers[1].digest();
    registry.fault(&blob, Fault::HoldAfter(3_000_000));
    let start = || {
        let (store, name) = (test.store.clone(), Reference::parse(&name).unwrap());
        tokio::spawn(async move { store.pull(&name, None).await })
    };
    let (one, two) = (start(), start());
    assert!(wait_until(SOON, || registry.count(&blob) == 1));
    one.abort();
    assert!(one.await.unwrap_err().is_cancelled());
    assert!(wait_until(SOON, || std::fs::read_dir(test.root().join("staging")).unwrap().count() > 0));
    two.abort();
    assert!(two.await.unwrap_err().is_cancelled());
    assert!(wait_until(SOON, || std::fs::read_dir(test.root().join("staging")).unwrap().count() == 0));
    assert!(wait_until(SOON, || test.store.leaks().is_empty() && test.store.fs_usage().bytes == 0));
    assert!(test.store.list().is_empty());
    // Both have asked before either can be called off.
    let asked = || {
        let (store, name) = (test.store.clone(), Reference::parse(&name).unwrap());
        Box::pin(async move { store.pull(&name, None).await })
    };
    let (mut one, mut two) = (asked(), asked());
    assert!(futures::poll!(&mut one).is_pending() && futures::poll!(&mut two).is_pending());
    let (one, two) = (tokio::spawn(one), tokio::spawn(two));
    assert!(wait_until(SOON, || registry.count(&blob) == 2));
    one.abort();
    registry.release();
    two.await.unwrap().unwrap();
    assert_eq!(registry.count(&blob), 2, "the second caller went on with the first one's download");
    assert_eq!(test.store.list().len(), 1);
    test.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_pulls_share_their_work() {
    let (registry, test) = (Registry::start(), TestStore::new().await);
    let base = TestLayer::new(TestTar::new().file("base", noise(1_000_000, 5)), Pack::Gzip);
    let names: Vec<String> = (0..4)
        .map(|at| {
            let own = TestLayer::new(TestTar::new().file("own", format!("{at}")), Pack::Gzip);
            TestImage::new(vec![base.clone(), own]).push(&registry, &format!("v{at}"))
        })
        .collect();
    let tasks: Vec<_> = (0..12)
        .map(|at| {
            let (store, name) = (test.store.clone(), Reference::parse(&names[at % 4]).unwrap());
            tokio::spawn(async move { store.pull(&name, None).await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(test.store.list().len(), 4);
    assert_eq!(registry.count(&base.digest()), 1);
    test.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_pull_asks_the_registry_and_downloads_nothing() {
    let (registry, test) = (Registry::start(), TestStore::new().await);
    let name = TestImage::small("x").push(&registry, "1");
    test.pull(&name).await.unwrap();
    let before = registry.received().len();
    test.pull(&name).await.unwrap();
    assert_eq!(registry.received().len(), before + 1);
}
