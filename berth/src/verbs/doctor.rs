//! `berth doctor`: what this machine has of what a node needs, and what will not work without it. Looks only; changes nothing.

use std::path::Path;

use anyhow::Result;
use rustix::fs::{Dir, FileType, Mode, OFlags, StatVfs, lgetxattr, statfs, statvfs};
use rustix::io::Errno;

use crate::{cli, table};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// One line: what was looked at, how it stands, what was seen, and what it means where it is not well.
struct Finding {
    name: &'static str,
    verdict: Verdict,
    seen: String,
    means: &'static str,
}

fn finding(name: &'static str, good: bool, otherwise: Verdict, seen: impl Into<String>, means: &'static str) -> Finding {
    let verdict = if good { Verdict::Ok } else { otherwise };
    Finding { name, verdict, seen: seen.into(), means: if good { "" } else { means } }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// `6.18.1-foo` → (6, 18).
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn kernel() -> Vec<Finding> {
    let release = read("/proc/sys/kernel/osrelease");
    let at = version(&release);
    vec![
        // 5.10: overlay's volatile; 5.12: mount_setattr; 5.7: CLONE_INTO_CGROUP.
        finding("kernel", at >= (5, 10), Verdict::Fail, release.clone(), "5.10 is the least: overlay mounts need `volatile`"),
        finding(
            "kernel mounts",
            at >= (5, 12),
            Verdict::Warn,
            release,
            "before 5.12: no recursive read-only mounts, no idmapped volumes",
        ),
    ]
}

fn cgroups() -> Vec<Finding> {
    let mounts = read("/proc/self/mountinfo");
    let v2 = mounts.lines().any(|l| l.contains(" - cgroup2 ") && l.contains(" /sys/fs/cgroup "));
    let v1: Vec<&str> = mounts.lines().filter(|l| l.contains(" - cgroup ")).collect();
    let available = if v2 {
        read("/sys/fs/cgroup/cgroup.controllers")
    } else {
        v1.iter().filter_map(|l| l.rsplit(' ').next()).collect::<Vec<_>>().join(",").replace("rw,", "")
    };
    let mut found = vec![finding(
        "cgroups",
        v2 || !v1.is_empty(),
        Verdict::Fail,
        if v2 {
            "v2"
        } else if v1.is_empty() {
            "none"
        } else {
            "v1"
        },
        "no containers at all: mount cgroup2 on /sys/fs/cgroup",
    )];
    for (name, means) in [
        ("memory", "no memory limits, no OOM detection"),
        ("cpu", "no CPU limits and shares"),
        ("cpuset", "no CPU pinning"),
        ("pids", "no process limits"),
    ] {
        let has = available.split([' ', ',']).any(|c| c == name);
        found.push(finding(name, has, Verdict::Warn, if has { "controller" } else { "missing" }, means));
    }
    if !v2 {
        found.push(finding(
            "cgroup version",
            false,
            Verdict::Warn,
            "v1",
            "no PSI, no memory.min/high, kill by cgroup is slower; kubelets warn from 1.35 on",
        ));
    }
    found
}

fn filesystems() -> Finding {
    let listed = read("/proc/filesystems").split_whitespace().any(|f| f == "overlay");
    let release = read("/proc/sys/kernel/osrelease");
    // A module that is there is loaded by the first mount.
    let loadable = read(&format!("/lib/modules/{release}/modules.dep")).contains("/overlay.ko");
    let means = "no container can have a root: load the module `overlay`";
    finding("overlayfs", listed || loadable, Verdict::Fail, if listed { "filesystem" } else { "not registered" }, means)
}

/// What the built-in network is made of is tried for real, in a network namespace that is gone afterwards.
fn network() -> Vec<Finding> {
    let mut found: Vec<Finding> = berth_cni::probe()
        .into_iter()
        .map(|probe| {
            let means = match probe.name {
                "nf_tables" => "no masquerade and no host ports: load nf_tables, nft_chain_nat and nft_masq",
                _ => "the built-in network does not work: load the module of this name",
            };
            let good = probe.error.is_none();
            finding(probe.name, good, Verdict::Warn, probe.error.unwrap_or_else(|| "made one".to_owned()), means)
        })
        .collect();
    let forward = read("/proc/sys/net/ipv4/ip_forward");
    let calls = match read("/proc/sys/net/bridge/bridge-nf-call-iptables") {
        absent if absent.is_empty() => "absent".to_owned(),
        value => value,
    };
    found.push(finding(
        "ip_forward",
        forward == "1",
        Verdict::Warn,
        format!("net.ipv4.ip_forward={forward}"),
        "berth sets it when the first pod is attached",
    ));
    found.push(finding(
        "bridge netfilter",
        calls == "1",
        Verdict::Warn,
        format!("bridge-nf-call-iptables={calls}"),
        "Services of kube-proxy do not reach pods on the same bridge: load the module `br_netfilter`",
    ));
    found
}

fn security() -> Vec<Finding> {
    let apparmor = read("/sys/module/apparmor/parameters/enabled");
    let users = read("/proc/sys/user/max_user_namespaces");
    let effective =
        read("/proc/self/status").lines().find_map(|l| l.strip_prefix("CapEff:\t").map(str::to_owned)).unwrap_or_default();
    let caps = u64::from_str_radix(&effective, 16).unwrap_or(0);
    // capability numbers of linux/capability.h
    let need = [(21, "SYS_ADMIN"), (12, "NET_ADMIN"), (0, "CHOWN"), (7, "SETUID"), (27, "MKNOD"), (19, "SYS_PTRACE")];
    let lacking: Vec<&str> = need.iter().filter(|(bit, _)| caps & (1 << bit) == 0).map(|(_, name)| *name).collect();
    let noexec = read("/proc/sys/vm/memfd_noexec");
    vec![
        finding(
            "capabilities",
            lacking.is_empty(),
            Verdict::Fail,
            if lacking.is_empty() { "root's".to_owned() } else { format!("without {}", lacking.join(", ")) },
            "run berth as root",
        ),
        finding(
            "CAP_SYS_RESOURCE",
            caps & (1 << 24) != 0,
            Verdict::Warn,
            effective,
            "oom_score_adj is not lowered and rlimits are not raised: containers keep berth's",
        ),
        finding(
            "seccomp",
            !read("/proc/sys/kernel/seccomp/actions_avail").is_empty(),
            Verdict::Fail,
            "filters",
            "RuntimeDefault and Localhost profiles are refused",
        ),
        finding(
            "user namespaces",
            !users.is_empty() && users != "0",
            Verdict::Warn,
            format!("max_user_namespaces={users}"),
            "pods with hostUsers: false are refused",
        ),
        finding(
            "memfd",
            noexec != "2",
            Verdict::Warn,
            format!("vm.memfd_noexec={noexec}"),
            "the shim runs from a read-only private mount instead",
        ),
        lsm_apparmor(&apparmor),
    ]
}

/// Off is no finding of its own where the machine has another security module, but profiles that are asked for are refused.
fn lsm_apparmor(enabled: &str) -> Finding {
    // Where cri-server looks for it.
    let parsers = ["/usr/sbin/apparmor_parser", "/sbin/apparmor_parser", "/usr/local/sbin/apparmor_parser"];
    let parser = parsers.iter().find(|path| Path::new(path).exists());
    let (shown, consequence) = match (enabled, parser) {
        ("Y", Some(parser)) => (format!("on, with {parser}"), ""),
        ("Y", None) => (
            "on, without apparmor_parser".to_owned(),
            "there is no default profile: containers that name none run unconfined, RuntimeDefault is refused. Install apparmor_parser",
        ),
        _ => ("off".to_owned(), "AppArmor profiles that are asked for are refused"),
    };
    finding("AppArmor", enabled == "Y" && parser.is_some(), Verdict::Warn, shown, consequence)
}

/// The nearest folder on the way to `path` that is there.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|at| at.exists()).unwrap_or(path)
}

/// `OVERLAYFS_SUPER_MAGIC` of linux/magic.h.
const OVERLAY: i128 = 0x794c_7630;

/// What a file system is that would hold the containers' upper layers.
struct Holder {
    /// Its magic number, as statfs(2) tells it.
    magic: i128,
    /// It takes the attributes by which an overlay marks folders.
    has_xattr: bool,
    /// readdir(3) tells what its entries are: overlayfs asks for that.
    has_d_type: bool,
}

impl Holder {
    fn of(at: &Path) -> rustix::io::Result<Holder> {
        // Of all architectures the type differs, the number does not: 32 bits.
        let magic = i128::from(statfs(at)?.f_type) & 0xffff_ffff;
        // Any name does: a file system without attributes refuses the name space, others say that there is none.
        let asked = lgetxattr(at, "trusted.overlay.opaque", &mut [0_u8; 16]);
        let has_xattr = !matches!(asked, Err(Errno::OPNOTSUPP));
        let folder = rustix::fs::open(at, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let has_d_type = Dir::new(folder)?.flatten().all(|entry| entry.file_type() != FileType::Unknown);
        Ok(Holder { magic, has_xattr, has_d_type })
    }

    /// What it is that keeps it from holding upper layers, with what to do; `None`: it can. Pure.
    fn lacks(&self) -> Option<(&'static str, &'static str)> {
        if self.magic == OVERLAY {
            let why = "an overlay, which cannot hold another one's upper layer";
            return Some((why, "no container can start: mount a disk or a tmpfs there, or name a folder on one by --root"));
        }
        if !self.has_xattr {
            let why = "no extended attributes (trusted.*)";
            return Some((why, "no container can start as its image says: name a folder on ext4, XFS, btrfs or tmpfs by --root"));
        }
        let why = "its folders do not tell what their entries are (d_type)";
        (!self.has_d_type).then_some((why, "no container can start: make the file system anew (XFS: mkfs.xfs -n ftype=1)"))
    }
}

/// Whether the folder of images and containers lies where an overlay can be written.
fn upper_layers(root: &Path) -> Finding {
    const NAME: &str = "root file system";
    let at = existing(root);
    let holder = match Holder::of(at) {
        Ok(holder) => holder,
        Err(error) => {
            return finding(NAME, false, Verdict::Fail, format!("{}: {error}", at.display()), "berth cannot look at it");
        }
    };
    match holder.lacks() {
        None => finding(NAME, true, Verdict::Fail, format!("{} holds upper layers", at.display()), ""),
        Some((why, means)) => finding(NAME, false, Verdict::Fail, format!("{}: {why}", at.display()), means),
    }
}

fn room(name: &'static str, path: &Path, least: u64) -> Finding {
    let at = existing(path);
    match statvfs(at) {
        Ok(StatVfs { f_bavail, f_frsize, f_favail, .. }) => {
            let free = f_bavail * f_frsize;
            finding(
                name,
                free >= least && f_favail != 0,
                Verdict::Warn,
                format!("{} free at {}", table::size(free), at.display()),
                "pulls will soon fail for want of space",
            )
        }
        Err(error) => Finding {
            name,
            verdict: Verdict::Fail,
            seen: format!("{}: {error}", at.display()),
            means: "berth cannot keep anything there",
        },
    }
}

fn limits_and_clock() -> Vec<Finding> {
    let watches: u64 = read("/proc/sys/fs/inotify/max_user_instances").parse().unwrap_or(0);
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let swap = read("/proc/swaps").lines().count() > 1;
    vec![
        finding(
            "inotify",
            watches >= 128,
            Verdict::Warn,
            format!("max_user_instances={watches}"),
            "log followers in many pods run out of watches",
        ),
        finding("open files", files >= 4096, Verdict::Warn, format!("{files}"), "each pod holds about eight descriptors"),
        // 2025-01-01: before that the clock was never set.
        finding("clock", now > 1_735_689_600, Verdict::Warn, date(now), "certificates look as if they were not yet valid"),
        finding("swap", !swap, Verdict::Warn, if swap { "on" } else { "off" }, "memory limits are soft while swap is on"),
    ]
}

/// Seconds since 1970 as a date and time in UTC.
fn date(seconds: u64) -> String {
    let at = i64::try_from(seconds).ok().and_then(|s| time::OffsetDateTime::from_unix_timestamp(s).ok());
    let text = at.and_then(|at| at.format(&time::format_description::well_known::Rfc3339).ok());
    text.unwrap_or_else(|| format!("{seconds} s since 1970"))
}

/// What no node works without and this machine does not have: name, what was seen, what it means.
pub fn failures() -> Vec<(&'static str, String, &'static str)> {
    let all = kernel().into_iter().chain(cgroups()).chain([filesystems()]);
    all.filter(|found| found.verdict == Verdict::Fail).map(|found| (found.name, found.seen, found.means)).collect()
}

/// Which version of cgroups this machine has.
pub fn cgroup_version() -> String {
    cgroups().into_iter().find(|found| found.name == "cgroups").map(|found| found.seen).unwrap_or_default()
}

/// Prints the findings; the exit code is 1 when one of them is a failure.
pub fn run(root: &Path, state: &Path, args: &cli::Output) -> Result<std::process::ExitCode> {
    let mut all = kernel();
    all.extend(cgroups());
    all.push(filesystems());
    all.push(upper_layers(root));
    all.extend(network());
    all.extend(security());
    all.push(room("space", root, 1 << 30));
    all.push(room("state", state, 16 << 20));
    all.extend(limits_and_clock());
    let word = |v: Verdict| match v {
        Verdict::Ok => "ok",
        Verdict::Warn => "warn",
        Verdict::Fail => "fail",
    };
    if args.output == "json" {
        let list: Vec<serde_json::Value> = all
            .iter()
            .map(|f| serde_json::json!({"name": f.name, "verdict": word(f.verdict), "seen": f.seen, "means": f.means}))
            .collect();
        crate::out(&serde_json::to_string_pretty(&list)?);
    } else {
        let rows: Vec<Vec<String>> =
            all.iter().map(|f| vec![word(f.verdict).to_owned(), f.name.to_owned(), f.seen.clone(), f.means.to_owned()]).collect();
        crate::out(table::render(&["", "WHAT", "SEEN", "WITHOUT IT"], &rows).trim_end());
    }
    Ok(if all.iter().any(|f| f.verdict == Verdict::Fail) {
        std::process::ExitCode::FAILURE
    } else {
        std::process::ExitCode::SUCCESS
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_is_told_as_a_date() {
        assert_eq!(date(1_767_225_600), "2026-01-01T00:00:00Z");
    }

    #[test]
    fn a_file_system_that_holds_no_upper_layer_is_named_with_what_to_do() {
        let lacks = |magic, has_xattr, has_d_type| Holder { magic, has_xattr, has_d_type }.lacks();
        // ext4
        assert_eq!(lacks(0xef53, true, true), None);
        for (lack, why, means) in [
            (lacks(OVERLAY, true, true), "an overlay", "--root"),
            (lacks(0x6969, false, true), "no extended attributes", "--root"),
            (lacks(0x5846_5342, true, false), "d_type", "ftype=1"),
        ] {
            let (seen, fix) = lack.expect(why);
            assert!(seen.contains(why) && fix.contains(means), "{seen}: {fix}");
        }
        // procfs has no attributes, on any machine.
        assert!(!Holder::of(Path::new("/proc")).expect("looked at").has_xattr);
        assert_eq!(upper_layers(Path::new("/proc/no/such")).means, lacks(0x9fa0, false, true).expect("refused").1);
    }

    #[test]
    fn kernel_releases_compare_as_numbers() {
        assert_eq!(version("6.18.1-foo"), (6, 18));
        assert_eq!(version("5.4.0"), (5, 4));
        assert!(version("5.10.209") >= (5, 10));
        assert!(version("5.9") < (5, 10));
        assert_eq!(version(""), (0, 0));
    }
}
