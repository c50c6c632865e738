//! The images that the scenarios and the demo run, made of programs of the workspace and the machine's busybox.

use std::path::{Path, PathBuf};

use berth_testkit::TempState;
use berth_testkit::image::{Layer, Layout, PATH_ENV};
use berth_testkit::rootfs::{BUSYBOX, GROUP, PASSWD, busybox_applets};
use serde_json::json;

/// The name of the web image; its program is `demo-web`, on port 8080.
pub const WEB: &str = "berth.test/web:1";
/// The name of the busybox image.
pub const BUSYBOX_IMAGE: &str = "berth.test/busybox:1";

/// Writes an OCI archive with both images and returns its path. `web` is the `demo-web` program.
#[must_use]
pub fn archive(state: &TempState, web: &Path) -> PathBuf {
    let mut layout = Layout::create(&state.dir("layout"));
    let base = busybox();
    let web = Layer::new().copy("bin/demo-web", 0o755, web).into_tar();
    layout.image(
        WEB,
        &[base.clone(), web],
        &json!({"Env": [PATH_ENV], "Entrypoint": ["/bin/demo-web", "8080"], "ExposedPorts": {"8080/tcp": {}}, "User": "33:33"}),
    );
    layout.image(BUSYBOX_IMAGE, &[base], &json!({"Env": [PATH_ENV], "Cmd": ["sh"]}));
    let path = state.path().join("images.tar");
    layout.archive(&path);
    path
}

fn busybox() -> Vec<u8> {
    let mut layer = Layer::new();
    for dir in ["bin", "etc", "dev", "proc", "sys", "usr", "usr/bin", "usr/sbin", "sbin", "var", "home", "run"] {
        layer = layer.dir(dir, 0o755);
    }
    layer = layer.dir("tmp", 0o1777).dir("root", 0o700).copy("bin/busybox", 0o755, Path::new(BUSYBOX));
    for applet in busybox_applets().iter().filter(|a| *a != "busybox") {
        layer = layer.symlink(&format!("bin/{applet}"), "busybox");
    }
    layer.file("etc/passwd", 0o644, PASSWD).file("etc/group", 0o644, format!("{GROUP}crew:x:4242:www-data\n")).into_tar()
}
