//! User namespaces: new ones, joined ones, what they own, idmapped mounts.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod kit;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::process::{Child, Command, Stdio};

use berth_oci::spec::{IdMapping, NamespaceType, User};
use berth_testkit::in_namespaces;
use kit::{Bundle, mount, namespace};

const BASE: u32 = 100_000;

fn mapping() -> Vec<IdMapping> {
    vec![IdMapping { container_id: 0, host_id: BASE, size: 65536 }]
}

fn mapped(script: &str) -> Bundle {
    let mut bundle = Bundle::new(script);
    bundle.spec.linux.namespaces.push(namespace(NamespaceType::User));
    bundle.spec.linux.uid_mappings = mapping();
    bundle.spec.linux.gid_mappings = mapping();
    kit::tool("chown", &["-R", "-h", &format!("{BASE}:{BASE}"), &bundle.rootfs().to_string_lossy()]);
    bundle
}

/// The id of the user namespace that owns another namespace, through a program in C's stead: `NS_GET_USERNS` by python.
fn owner(pid: i32, kind: &str) -> u64 {
    let script = "import fcntl,os,sys\nf=os.open(sys.argv[1],os.O_RDONLY)\nprint(os.fstat(fcntl.ioctl(f,0xb701)).st_ino)";
    kit::tool("python3", &["-c", script, &format!("/proc/{pid}/ns/{kind}")]).trim().parse().unwrap()
}

#[test]
fn a_new_user_namespace_owns_all_the_others() {
    in_namespaces(|| {
        let mut bundle = mapped("exec sleep 1000");
        bundle.spec.mounts.push(mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]));
        bundle.spec.mounts.push(mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"]));
        bundle.spec.linux.sysctl.insert("net.ipv4.ip_forward".into(), "1".into());
        bundle.spec.hostname = "mapped".into();
        bundle.process().user = User { uid: 33, gid: 34, umask: None, additional_gids: vec![35] };
        bundle.write();
        bundle.detached(&["run", "-d", "c"]);
        let pid = bundle.pid("c");
        let own = std::fs::metadata(format!("/proc/{pid}/ns/user")).unwrap().ino();
        for kind in ["pid", "net", "ipc", "uts", "mnt", "cgroup"] {
            assert_eq!(owner(pid, kind), own, "{kind}");
        }
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(kit::field(&status, "Uid").starts_with(&format!("{}", BASE + 33)), "{status}");
        assert_eq!(kit::field(&status, "Groups"), format!("{}", BASE + 35));
        // What the namespaces own belongs to the container's root, not to nobody.
        let out = bundle.ok(&["exec", "--user", "0:0", "c", "sh", "-c",
            "id -u; stat -c '%u %n' /dev/mqueue /proc/1 /proc/sys/net/ipv4 /sys /dev/pts/ptmx; echo x > /dev/null && echo null works; cat /proc/sys/net/ipv4/ip_forward; hostname; cat /proc/self/setgroups"]);
        for words in ["0 /dev/mqueue", "0 /proc/sys/net/ipv4", "null works", "\n1\n", "mapped", "allow"] {
            assert!(out.contains(words), "{words}: {out}");
        }
        bundle.ok(&["delete", "-f", "c"]);
    });
}

#[test]
fn groups_cannot_be_dropped_where_setgroups_is_denied() {
    in_namespaces(|| {
        // A user namespace as an unprivileged starter makes it: setgroups is denied for good.
        let pod = Pod::start(
            "echo deny > /proc/$PID/setgroups; echo 0 100000 65536 > /proc/$PID/gid_map; echo 0 100000 65536 > /proc/$PID/uid_map",
        );
        let mut bundle = Bundle::new("cat /proc/self/setgroups; grep Groups /proc/self/status");
        bundle
            .spec
            .linux
            .namespaces
            .retain(|ns| !matches!(ns.kind, NamespaceType::Network | NamespaceType::Ipc | NamespaceType::Uts));
        bundle.spec.linux.uid_mappings = mapping();
        bundle.spec.linux.gid_mappings = mapping();
        let out = bundle.launch_ok(serde_json::json!({ "join": pod.pid() }));
        assert!(out.starts_with("deny"), "{out}");
        bundle.process().user.additional_gids = vec![7];
        let output = bundle.launch(serde_json::json!({ "join": pod.pid() }));
        assert!(!output.status.success());
        assert!(String::from_utf8_lossy(&output.stderr).contains("setgroups is denied"), "{output:?}");
    });
}

/// A process that holds user, net, ipc and uts namespaces, as a pod's shim does.
struct Pod(Child);

impl Pod {
    /// Starts it; `maps` writes the maps of process `$PID` from outside.
    fn start(maps: &str) -> Self {
        let script = "import ctypes,os,sys,time
libc=ctypes.CDLL(None,use_errno=True)
def unshare(flags):
    if libc.unshare(flags): raise OSError(ctypes.get_errno(),'unshare')
unshare(0x10000000)
print('made',flush=True); sys.stdin.readline()
os.setresgid(0,0,0); os.setresuid(0,0,0)
unshare(0x40000000|0x08000000|0x04000000)
print('ready',flush=True); time.sleep(1000)";
        let mut command = Command::new("python3");
        command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut pod = Self(command.spawn().unwrap());
        let mut lines = BufReader::new(pod.0.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "made");
        let status = Command::new("sh").args(["-c", maps]).env("PID", pod.pid().to_string()).status().unwrap();
        assert!(status.success());
        pod.0.stdin.take().unwrap().write_all(b"go\n").unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        pod
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_container_in_a_pods_user_namespace_gets_a_pid_namespace_owned_by_it() {
    in_namespaces(|| {
        let pod = Pod::start("echo 0 100000 65536 > /proc/$PID/gid_map; echo 0 100000 65536 > /proc/$PID/uid_map");
        let mut bundle = Bundle::new(
            "echo pid $$; id -u; cat /proc/self/uid_map; stat -c '%u' /proc/1; touch /new; stat -c '%u' /new; for n in user net ipc uts pid; do readlink /proc/self/ns/$n; done",
        );
        bundle.spec.linux.uid_mappings = mapping();
        bundle.spec.linux.gid_mappings = mapping();
        bundle.temp.dir("l");
        symlink("../b/rootfs", bundle.temp.path().join("l/a")).unwrap();
        // Each overlay is mounted once.
        let request = |name: &str, creator: bool| {
            let (upper, work) = (bundle.temp.dir(&format!("{name}/upper")), bundle.temp.dir(&format!("{name}/work")));
            let overlay =
                serde_json::json!({ "dir": bundle.temp.path().join("l"), "lowers": ["a"], "upper": upper, "work": work });
            serde_json::json!({ "join": pod.pid(), "creator": creator, "overlay": overlay })
        };
        for (name, creator) in [("one", false), ("two", true)] {
            let out = bundle.launch_ok(request(name, creator));
            assert!(out.starts_with("pid 1\n0\n"), "{out}");
            for kind in ["user", "net", "ipc", "uts"] {
                let link = std::fs::read_link(format!("/proc/{}/ns/{kind}", pod.pid())).unwrap();
                assert!(out.contains(&*link.to_string_lossy()), "{kind}: {out}");
            }
            let lines: Vec<&str> = out.lines().collect();
            assert_eq!(lines[3..5], ["0", "0"], "{out}");
        }
        // Stored with the machine's ids of the namespace; the image's own files are untouched and seen as root's inside.
        assert_eq!(std::fs::metadata(bundle.temp.path().join("two/upper/new")).unwrap().uid(), BASE);
        assert_eq!(std::fs::metadata(bundle.rootfs().join("bin/busybox")).unwrap().uid(), 0);
        let request = request("three", false);
        bundle.process().args = vec!["stat".into(), "-c".into(), "%u %g".into(), "/bin/busybox".into()];
        assert_eq!(bundle.launch_ok(request), "0 0\n");
    });
}

#[test]
fn an_idmapped_volume_shows_and_stores_mapped_ids() {
    in_namespaces(|| {
        let mut bundle = mapped("stat -c %u /mapped/file /own/file /plain/file; touch /mapped/new; stat -c %u /mapped/new");
        let volume = bundle.temp.dir("volume");
        std::fs::write(volume.join("file"), "").unwrap();
        chown(volume.join("file"), Some(7), Some(7)).unwrap();
        let source = volume.to_string_lossy().into_owned();
        let mut explicit = mount("/mapped", "bind", &source, &["rbind", "ridmap"]);
        explicit.uid_mappings = mapping();
        explicit.gid_mappings = mapping();
        // Without a mapping of its own, the container's is meant.
        bundle.spec.mounts.push(explicit);
        bundle.spec.mounts.push(mount("/own", "bind", &source, &["bind", "idmap"]));
        bundle.spec.mounts.push(mount("/plain", "bind", &source, &["bind"]));
        assert_eq!(bundle.run(), "7\n7\n65534\n0\n");
        assert_eq!(std::fs::metadata(volume.join("new")).unwrap().uid(), 0);
    });
}
