//! Mounts of every kind, as the container and a foreign tool see them.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod kit;

use std::os::unix::fs::symlink;

use berth_oci::seccomp::compile;
use berth_oci::spec::{Device, Seccomp, SeccompRule};
use berth_testkit::{Sandbox, in_namespaces};
use kit::{Bundle, mount};

/// `target fstype options` of each mount, by findmnt in the container's mount namespace.
fn findmnt(pid: i32, column: &str, target: &str) -> String {
    kit::tool("findmnt", &["-N", &pid.to_string(), "-n", "-o", column, "--mountpoint", target]).trim().to_owned()
}

#[test]
fn each_kind_of_mount_appears_with_its_options() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("exec sleep 1000");
        let volume = bundle.temp.dir("volume");
        std::fs::write(volume.join("file"), "data").unwrap();
        let (source, file) = (volume.to_string_lossy().into_owned(), volume.join("file").to_string_lossy().into_owned());
        bundle.spec.mounts.extend([
            mount("/vol/ro", "bind", &source, &["rbind", "ro", "nosuid", "rprivate"]),
            mount("/vol/rw", "", &source, &["bind"]),
            mount("/vol/slave", "bind", &source, &["bind", "rslave", "noexec", "noatime"]),
            mount("/vol/shared", "bind", &source, &["bind", "rshared"]),
            mount("/vol/unbindable", "bind", &source, &["bind", "unbindable"]),
            mount("/etc/one-file", "bind", &file, &["bind", "ro"]),
            mount("/scratch", "tmpfs", "tmpfs", &["nosuid", "nodev", "size=1m", "mode=1770"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=64k"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"]),
        ]);
        bundle.spec.root.as_mut().unwrap().readonly = true;
        bundle.write();
        bundle.detached(&["run", "-d", "c"]);
        let pid = bundle.pid("c");
        let options = |target| findmnt(pid, "VFS-OPTIONS", target);
        assert!(options("/").starts_with("ro,"), "{}", options("/"));
        assert!(options("/vol/ro").starts_with("ro,nosuid"));
        assert!(options("/vol/rw").starts_with("rw"));
        assert!(options("/vol/slave").contains("noexec") && options("/vol/slave").contains("noatime"));
        assert!(options("/etc/one-file").starts_with("ro"));
        let propagation = |target| findmnt(pid, "PROPAGATION", target);
        assert_eq!([propagation("/vol/ro"), propagation("/vol/shared")], ["private", "shared"]);
        assert_eq!(propagation("/vol/unbindable"), "private,unbindable");
        assert!(findmnt(pid, "FS-OPTIONS", "/scratch").contains("size=1024k,mode=1770"));
        for (target, kind) in
            [("/proc", "proc"), ("/sys", "sysfs"), ("/dev", "tmpfs"), ("/dev/pts", "devpts"), ("/dev/mqueue", "mqueue")]
        {
            assert_eq!(findmnt(pid, "FSTYPE", target), kind);
        }
        // The view of the control groups: read-only, and the container's own is the root.
        let out = bundle.ok(&["exec", "c", "sh", "-c", "cat /sys/fs/cgroup/pids/cgroup.procs /sys/fs/cgroup/cgroup.procs 2>/dev/null; mkdir /sys/fs/cgroup/x; mkdir /sys/fs/cgroup/pids/x; cat /etc/one-file; exit 0"]);
        assert!(out.starts_with('1') && out.contains("data"), "{out}");
        // Nothing of it is visible outside.
        assert!(!std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains("/vol/"));
        bundle.ok(&["delete", "-f", "c"]);
    });
}

#[test]
fn a_recursively_read_only_bind_covers_what_is_mounted_below_it() {
    in_namespaces(|| {
        let mut bundle =
            Bundle::new("touch /plain/sub/a && echo writable; touch /rec/sub/b || echo refused; touch /rec/c || echo refused");
        let volume = bundle.temp.dir("volume/sub");
        kit::tool("mount", &["-t", "tmpfs", "tmpfs", &volume.to_string_lossy()]);
        let source = bundle.temp.path().join("volume").to_string_lossy().into_owned();
        bundle.spec.mounts.push(mount("/plain", "bind", &source, &["rbind", "ro"]));
        bundle.spec.mounts.push(mount("/rec", "bind", &source, &["rbind", "rro"]));
        assert_eq!(bundle.run(), "writable\nrefused\nrefused\n");
    });
}

#[test]
fn propagation_reaches_exactly_where_it_is_asked_for() {
    Sandbox::new().shared_root().test(|| {
        let mut bundle = Bundle::new("exec sleep 1000");
        let volume = bundle.temp.dir("volume");
        kit::tool("mount", &["-t", "tmpfs", "tmpfs", &volume.to_string_lossy()]);
        kit::tool("mount", &["--make-shared", &volume.to_string_lossy()]);
        let source = volume.to_string_lossy().into_owned();
        for name in ["private", "slave", "shared"] {
            bundle.spec.mounts.push(mount(&format!("/{name}"), "bind", &source, &["rbind", &format!("r{name}")]));
        }
        bundle.write();
        bundle.detached(&["run", "-d", "c"]);
        // From the machine into the container.
        std::fs::create_dir(volume.join("from-host")).unwrap();
        kit::tool("mount", &["-t", "tmpfs", "tmpfs", &volume.join("from-host").to_string_lossy()]);
        let pid = bundle.pid("c").to_string();
        let inside = kit::tool("findmnt", &["-N", &pid, "-n", "-l", "-o", "TARGET"]);
        assert!(
            inside.contains("/slave/from-host") && inside.contains("/shared/from-host") && !inside.contains("/private/from-host"),
            "{inside}"
        );
        // And back.
        for name in ["slave", "shared"] {
            let target = format!("/{name}/from-{name}");
            std::fs::create_dir(volume.join(format!("from-{name}"))).unwrap();
            kit::tool("nsenter", &["-t", &pid, "-m", "mount", "-t", "tmpfs", "tmpfs", &target]);
        }
        let outside = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(outside.contains("volume/from-shared") && !outside.contains("volume/from-slave"), "{outside}");
        // The container's own mounts stay its own.
        assert!(!outside.contains("devpts /dev/pts newinstance"));
        bundle.ok(&["delete", "-f", "c"]);
    });
}

#[test]
fn links_in_the_image_are_followed_inside_the_root_only() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("cat /real/target/file; ls -d /etc/outside 2>/dev/null; exit 0");
        let volume = bundle.temp.dir("volume");
        std::fs::write(volume.join("file"), "followed").unwrap();
        let outside = bundle.temp.dir("outside");
        symlink("/real", bundle.rootfs().join("alias")).unwrap();
        std::fs::create_dir(bundle.rootfs().join("real")).unwrap();
        // Absolute and upward: outside the root, these would be folders of the machine.
        symlink(&outside, bundle.rootfs().join("escape")).unwrap();
        symlink("../../../../../../../..", bundle.rootfs().join("up")).unwrap();
        let source = volume.to_string_lossy().into_owned();
        bundle.spec.mounts.push(mount("/alias/target", "bind", &source, &["bind"]));
        bundle.spec.mounts.push(mount("/up/in-root", "bind", &source, &["bind"]));
        assert!(bundle.run().starts_with("followed"));
        assert!(bundle.rootfs().join("in-root").is_dir());
        bundle.spec.mounts.push(mount("/escape/made", "bind", &source, &["bind"]));
        // The link's target does not exist inside, and is not made outside.
        let _ = bundle.output(&["run", "c"]);
        bundle.write();
        let _ = bundle.output(&["run", "c"]);
        assert_eq!(std::fs::read_dir(outside).unwrap().count(), 0);
    });
}

#[test]
fn devices_are_made_and_the_default_ones_cannot_be_something_else() {
    in_namespaces(|| {
        let mut bundle = Bundle::new(
            "ls -l /dev/null /dev/fuse2 /dev/stdout /dev/ptmx; echo x > /dev/null; head -c4 /dev/zero | od -An -tx1; stat -c '%u:%g %a' /dev/fuse2",
        );
        bundle.spec.linux.devices.push(Device {
            kind: "c".into(),
            path: "/dev/fuse2".into(),
            major: 10,
            minor: 229,
            file_mode: Some(0o640),
            uid: Some(7),
            gid: Some(8),
        });
        // Without a /dev of its own, the image's folder is filled: its files do not stand in for devices.
        bundle.spec.mounts.retain(|mount| !mount.destination.starts_with("/dev"));
        std::fs::write(bundle.rootfs().join("dev/null"), "a file").unwrap();
        symlink("/etc/passwd", bundle.rootfs().join("dev/zero")).unwrap();
        let out = bundle.run();
        assert!(out.contains("1,   3") && out.contains("10, 229") && out.contains("7:8 640"), "{out}");
        assert!(out.contains("00 00 00 00") && out.contains("/proc/self/fd/1") && out.contains("pts/ptmx"), "{out}");
        assert!(std::fs::read_to_string(bundle.rootfs().join("etc/passwd")).unwrap().contains("root:x"));
    });
}

#[test]
fn without_any_rule_only_the_default_devices_can_be_opened() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("head -c 1 /dev/zero | wc -c; (: < /dev/a-fuse) || echo denied");
        bundle.spec.linux.devices.push(berth_oci::spec::Device {
            kind: "c".into(),
            path: "/dev/a-fuse".into(),
            major: 10,
            minor: 229,
            ..berth_oci::spec::Device::default()
        });
        let out = bundle.run();
        assert!(out.starts_with("1\n") && out.contains("denied"), "{out}");
        bundle.spec.linux.resources = Some(berth_cgroup::Resources {
            devices: vec![berth_cgroup::DeviceRule { allow: true, ..berth_cgroup::DeviceRule::default() }],
            ..berth_cgroup::Resources::default()
        });
        let out = bundle.run();
        assert!(!out.contains("denied"), "{out}");
    });
}

#[test]
fn an_overlay_is_mounted_for_the_container_alone() {
    in_namespaces(|| {
        let bundle = Bundle::new("cat /marker; echo changed > /marker; mount | grep ' / '");
        std::fs::write(bundle.rootfs().join("marker"), "bottom").unwrap();
        let temp = &bundle.temp;
        std::fs::create_dir_all(temp.dir("l")).unwrap();
        std::fs::write(temp.dir("top").join("marker"), "top\n").unwrap();
        symlink("../b/rootfs", temp.path().join("l/bbbbbbbb")).unwrap();
        symlink("../top", temp.path().join("l/aaaaaaaa")).unwrap();
        let overlay = |lowers: Vec<String>, name: &str| {
            let (upper, work) = (temp.dir(&format!("{name}/upper")), temp.dir(&format!("{name}/work")));
            serde_json::json!({ "overlay": { "dir": temp.path().join("l"), "lowers": lowers, "upper": upper, "work": work } })
        };
        let out = bundle.launch_ok(overlay(vec!["aaaaaaaa".into(), "bbbbbbbb".into()], "one"));
        assert!(out.starts_with("top\n") && out.contains("overlay on / type overlay") && out.contains("volatile"), "{out}");
        assert_eq!(std::fs::read_to_string(temp.path().join("one/upper/marker")).unwrap(), "changed\n");
        assert_eq!(std::fs::read_to_string(temp.path().join("top/marker")).unwrap(), "top\n");
        // As many layers as an image can have.
        let mut lowers = vec!["aaaaaaaa".to_owned()];
        for number in 0..126 {
            let name = format!("n{number:07}");
            std::fs::create_dir_all(temp.dir(&format!("layers/{number}"))).unwrap();
            symlink(format!("../layers/{number}"), temp.path().join("l").join(&name)).unwrap();
            lowers.push(name);
        }
        lowers.push("bbbbbbbb".into());
        assert!(bundle.launch_ok(overlay(lowers, "many")).starts_with("top\n"));
        // As the shim does it: a fork that ends makes the container, and the caller reaps it.
        let mut request = overlay(vec!["aaaaaaaa".into(), "bbbbbbbb".into()], "three");
        request["creator"] = true.into();
        assert!(bundle.launch_ok(request).starts_with("top\n"));
    });
}

#[test]
fn trees_that_are_brought_along_are_mounted_at_their_destination() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("cat /vol/file; touch /vol/x || echo refused");
        let volume = bundle.temp.dir("volume");
        std::fs::write(volume.join("file"), "brought\n").unwrap();
        // The source in the spec is of another mount namespace and means nothing here.
        bundle.spec.mounts.push(mount("/vol", "bind", "/not/here", &["rbind", "ro", "rprivate"]));
        let out = bundle.launch_ok(serde_json::json!({ "trees": { "/vol": volume } }));
        assert_eq!(out, "brought\nrefused\n");
    });
}

#[test]
fn kernels_without_the_new_mount_calls_are_served_by_the_old_ones() {
    in_namespaces(|| {
        let mut bundle = Bundle::new("cat /proc/1/mounts; touch /ro/x || echo refused");
        let volume = bundle.temp.dir("volume");
        bundle.spec.mounts.push(mount("/ro", "bind", &volume.to_string_lossy(), &["bind", "ro", "nosuid", "rprivate"]));
        bundle.spec.linux.readonly_paths.push("/proc/sys".into());
        bundle.spec.linux.masked_paths.push("/proc/keys".into());
        bundle.spec.root.as_mut().unwrap().readonly = true;
        bundle.write();
        // The same program under a filter that says that these calls do not exist.
        let mut old = bundle.oci(&["run", "c"]);
        let output = without_calls(&mut old, &["fsopen", "fsconfig", "fsmount", "mount_setattr"]);
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(
            out.contains("refused") && out.contains("proc /proc/sys proc ro") && out.contains("/ro ext4 ro,nosuid")
                || out.contains("/ro tmpfs ro,nosuid"),
            "{out}"
        );
        assert!(out.lines().next().is_some_and(|root| root.contains(" / ") && root.contains(" ro")), "{out}");
    });
}

/// Runs a command in a thread that has lost some calls.
fn without_calls(command: &mut std::process::Command, calls: &[&str]) -> std::process::Output {
    let rule = SeccompRule {
        names: calls.iter().map(|call| (*call).to_owned()).collect(),
        action: "SCMP_ACT_ERRNO".into(),
        errno_ret: Some(38),
        ..SeccompRule::default()
    };
    let filter =
        compile(&Seccomp { default_action: "SCMP_ACT_ALLOW".into(), syscalls: vec![rule], ..Seccomp::default() }).unwrap();
    let program: Vec<_> =
        filter.instructions.iter().map(|&(code, jt, jf, k)| berth_linux::seccomp::SockFilter { code, jt, jf, k }).collect();
    std::thread::scope(|scope| {
        let run = || {
            berth_linux::seccomp::load(&program, berth_linux::seccomp::SeccompFlags::empty()).unwrap();
            command.output().unwrap()
        };
        scope.spawn(run).join().unwrap()
    })
}
