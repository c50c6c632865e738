//! Root filesystems made of the machine's static busybox.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

/// The machine's static busybox (Debian's `busybox-static`).
pub const BUSYBOX: &str = "/bin/busybox";

/// The names of busybox's applets on this machine.
///
/// # Panics
/// When busybox is not installed.
#[must_use]
pub fn busybox_applets() -> Vec<String> {
    let out = Command::new(BUSYBOX).arg("--list").output().expect("run /bin/busybox (package busybox-static)");
    String::from_utf8_lossy(&out.stdout).lines().map(str::to_owned).collect()
}

/// Fills `root` with busybox, links for all its applets, the usual empty folders, and passwd and group files with `root`,
/// `www-data` (33) and `nobody` (65534).
///
/// # Panics
/// When busybox is not installed or `root` cannot be written.
pub fn busybox_rootfs(root: &Path) {
    for dir in ["bin", "sbin", "usr/bin", "usr/sbin", "etc", "dev", "proc", "sys", "run", "var/log", "home", "lib", "mnt"] {
        std::fs::create_dir_all(root.join(dir)).expect("make a folder of the root filesystem");
    }
    for (dir, mode) in [("tmp", 0o1777), ("root", 0o700)] {
        std::fs::create_dir_all(root.join(dir)).expect("make a folder of the root filesystem");
        std::fs::set_permissions(root.join(dir), PermissionsExt::from_mode(mode)).expect("set a folder's mode");
    }
    std::fs::copy(BUSYBOX, root.join("bin/busybox")).expect("copy /bin/busybox (package busybox-static)");
    for applet in busybox_applets().iter().filter(|a| *a != "busybox") {
        symlink("busybox", root.join("bin").join(applet)).expect("link an applet");
    }
    std::fs::write(root.join("etc/passwd"), PASSWD).expect("write etc/passwd");
    std::fs::write(root.join("etc/group"), GROUP).expect("write etc/group");
}

/// The passwd file of [`busybox_rootfs`].
pub const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\n\
www-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n";
/// The group file of [`busybox_rootfs`].
pub const GROUP: &str = "root:x:0:\ndaemon:x:1:\nwww-data:x:33:\nnogroup:x:65534:\n";
