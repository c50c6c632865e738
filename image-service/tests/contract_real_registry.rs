//! Against Docker's registry, filled and checked by foreign tools: `docker-registry`, skopeo, umoci.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use berth_image::{ErrorKind, Reference};
use berth_testkit::wait_until;
use serde_json::json;
use support::{Pack, TestImage, TestLayer, TestStore, TestTar, noise};

/// A registry process; killed when dropped.
struct RealRegistry {
    child: Child,
    host: String,
}

impl Drop for RealRegistry {
    fn drop(&mut self) {
        // Its own child: it may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn start(dir: &Path) -> Option<RealRegistry> {
    if Command::new("docker-registry").arg("--version").output().is_err() {
        return None;
    }
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = free.local_addr().unwrap().to_string();
    drop(free);
    let config = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{host}'}}\n",
        dir.join("registry").display()
    );
    std::fs::write(dir.join("registry.yml"), config).unwrap();
    let child = Command::new("docker-registry")
        .arg("serve")
        .arg(dir.join("registry.yml"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let registry = RealRegistry { child, host };
    assert!(wait_until(Duration::from_secs(20), || std::net::TcpStream::connect(&registry.host).is_ok()));
    Some(registry)
}

/// Every path with type, mode, owner, size, time, link target and content.
fn list(root: &Path) -> String {
    let find = "find . ! -type d -printf '%P %y %m %U %G %n %s %T@ %l\\n' | LC_ALL=C sort; \
                find . -mindepth 1 -type d -printf '%P %y %m %U %G\\n' | LC_ALL=C sort; \
                find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum";
    let out = Command::new("sh").args(["-ec", find]).current_dir(root).output().unwrap();
    assert!(out.status.success());
    String::from_utf8(out.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_dockers_registry_is_what_umoci_unpacks() {
    let test = TestStore::new().await;
    let dir = test.dir.path();
    let Some(registry) = start(dir) else {
        berth_testkit::report_skip("an_image_of_dockers_registry_is_what_umoci_unpacks", "docker-registry is not installed");
        return;
    };
    let image = TestImage::new(vec![
        TestLayer::new(
            TestTar::new()
                .dir("bin", 0o755)
                .file_mode("bin/busybox", 0o4755, noise(700_000, 1))
                .hard("bin/ls", "bin/busybox")
                .symlink("bin/link", "busybox")
                .owned(3, 4)
                .dir("d", 0o755)
                .fifo("d/pipe", 0o640),
            Pack::Gzip,
        ),
        TestLayer::new(TestTar::new().dir("d", 0o700).file("d/new", "text"), Pack::Gzip),
    ]);
    image.layout(&dir.join("layout"), json!({"org.opencontainers.image.ref.name": "x"}));
    let sh = |command: String| {
        let out = Command::new("sh").arg("-ec").arg(&command).current_dir(dir).output().unwrap();
        assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
    };
    // Once as it is and once as Docker's own media types.
    let host = &registry.host;
    sh(format!("skopeo copy -q --dest-tls-verify=false oci:layout:x docker://{host}/some/oci:1"));
    sh(format!("skopeo copy -q --dest-tls-verify=false --format v2s2 oci:layout:x docker://{host}/some/docker:1"));
    sh("umoci unpack --image layout:x bundle".into());
    let expected = list(&dir.join("bundle/rootfs"));
    for repository in ["oci", "docker"] {
        let name = format!("{host}/some/{repository}:1");
        let id = test.store.pull(&Reference::parse(&name).unwrap(), None).await.unwrap();
        assert_eq!(test.store.status(&name).unwrap().id, id);
        let rootfs = test.store.rootfs(&id).unwrap();
        assert_eq!(rootfs.lowers.len(), 2);
        let merged = dir.join(repository);
        std::fs::create_dir(&merged).unwrap();
        for lower in rootfs.lowers.iter().rev() {
            sh(format!("cp -a {}/. {}/", rootfs.links_dir.join(lower).display(), merged.display()));
        }
        assert_eq!(list(&merged), expected, "{repository}");
        test.store.remove(&name).await.unwrap();
        test.assert_clean().await;
    }
    let missing = Reference::parse(&format!("{host}/some/none:1")).unwrap();
    assert_eq!(test.store.pull(&missing, None).await.unwrap_err().kind(), ErrorKind::NotFound);
}
