//! Limits through the CRI as a container and its kernel see them with cgroup v2: what `cat` prints, and what happens at the limits.
//! On a machine with v1 controllers these are skipped; `e2e/vm.sh` runs them in its guest.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use berth_e2e::cri::{PidShape, container, file, sandbox};
use berth_e2e::crictl::Crictl;
use berth_e2e::node::{Berth, Half};
use berth_e2e::{SOON, text};
use berth_testkit::{Sandbox, skip, wait_for, wait_until};
use serde_json::{Value, json};

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");
const MIB: u64 = 1 << 20;

fn has_v2() -> bool {
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    ["cpu", "memory", "pids"].iter().all(|name| controllers.split_whitespace().any(|have| have == *name))
}

/// Starts a pod of its own name with one container of these resources and mounts.
fn start(berth: &Berth, crictl: &Crictl, name: &str, script: &str, resources: Value, mounts: Value) -> String {
    let pod_file = file(&berth.dir, &format!("{name}-pod.json"), &sandbox(&berth.dir, name, PidShape::PerContainer));
    let mut config = container(name, PidShape::PerContainer, script);
    config["linux"]["resources"] = resources;
    config["mounts"] = mounts;
    let container_file = file(&berth.dir, &format!("{name}-container.json"), &config);
    let pod = crictl.run(&["runp", &pod_file]);
    let id = crictl.run(&["create", &pod, &container_file, &pod_file]);
    crictl.run(&["start", &id]);
    id
}

/// Files of the container's own cgroup, read inside.
fn own<const N: usize>(crictl: &Crictl, id: &str, names: [&str; N]) -> [String; N] {
    let script = format!("cd /sys/fs/cgroup && for f in {}; do cat $f || echo none; done", names.join(" "));
    let text = crictl.run(&["exec", "-s", id, "sh", "-c", &script]);
    let mut lines = text.lines().map(str::to_owned);
    names.map(|_| lines.next().unwrap_or_default())
}

#[test]
fn limits_are_in_the_containers_cgroup_and_follow_updates() {
    if !has_v2() {
        skip!("needs the controllers of cgroup v2");
    }
    Sandbox::new().test(|| {
        let berth = Berth::start(Half::Cri, WEB);
        let crictl = berth.crictl();
        let resources = json!({
            "cpu_period": 100_000, "cpu_quota": 50_000, "cpu_shares": 1024, "cpuset_cpus": "0",
            "memory_limit_in_bytes": 64 * MIB, "memory_swap_limit_in_bytes": 96 * MIB,
            "hugepage_limits": [{"page_size": "2MB", "limit": 4 * MIB}],
            "unified": {"memory.min": "1048576", "memory.high": "50331648", "memory.oom.group": "1", "pids.max": "77"},
        });
        let id = start(&berth, &crictl, "limits", "exec sleep 1000", resources, json!([]));
        let names = [
            "cpu.max",
            "cpu.weight",
            "cpuset.cpus",
            "memory.max",
            "memory.swap.max",
            "memory.min",
            "memory.high",
            "memory.oom.group",
            "pids.max",
        ];
        let want = ["50000 100000", "39", "0", "67108864", "33554432", "1048576", "50331648", "1", "77"];
        assert_eq!(own(&crictl, &id, names), want);
        if has_hugetlb() {
            assert_eq!(own(&crictl, &id, ["hugetlb.2MB.max"]), ["4194304"]);
        }
        crictl.run(&["update", "--memory", &(128 * MIB).to_string(), "--cpu-period", "100000", "--cpu-quota", "20000", &id]);
        // What the update does not name stays.
        let updated = own(&crictl, &id, ["memory.max", "cpu.max", "memory.min", "pids.max"]);
        assert_eq!(updated, ["134217728", "20000 100000", "1048576", "77"]);

        // Nodes may be made, but only the devices of every container opened: the filter is a program on the cgroup.
        let script = "mknod /disk b 254 0 && ls -l /disk; head -c 1 /disk; head -c 1 /dev/zero | wc -c";
        let opened = crictl.attempt(&["exec", "-s", &id, "sh", "-c", script]);
        let said = text(&opened.stdout) + &text(&opened.stderr);
        assert!(said.starts_with("br") && said.contains("\n1\n"), "{said}");
        assert!(said.contains("/disk: Operation not permitted"), "{said}");

        let stats = crictl.json(&["stats", "--id", &id]);
        let stats = &stats["stats"][0];
        assert!(number(&stats["memory"]["workingSetBytes"]["value"]) > 0, "{stats}");
        if Path::new("/proc/pressure/cpu").exists() {
            for resource in ["cpu", "memory", "io"] {
                let psi = &stats[resource]["psi"];
                assert!(psi["Some"].is_object() || psi["some"].is_object(), "{resource}: {stats}");
            }
        }
        berth.finish();
    });
}

fn has_hugetlb() -> bool {
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    controllers.split_whitespace().any(|name| name == "hugetlb")
}

/// crictl prints 64-bit numbers as text.
fn number(value: &Value) -> u64 {
    value.as_u64().or_else(|| value.as_str()?.parse().ok()).unwrap_or(0)
}

#[test]
fn out_of_memory_takes_the_whole_container_exactly_where_the_group_is_asked_for() {
    if !has_v2() {
        skip!("needs the controllers of cgroup v2");
    }
    Sandbox::new().test(|| {
        let berth = Berth::start(Half::Cri, WEB);
        let crictl = berth.crictl();
        // A child eats the memory, and its parent would live on.
        let script = "tail /dev/zero & wait; echo survived; exec sleep 1000";
        let limit = |group: &str| {
            json!({"memory_limit_in_bytes": 24 * MIB, "memory_swap_limit_in_bytes": 24 * MIB, "unified": {"memory.oom.group": group}})
        };
        let together = start(&berth, &crictl, "together", script, limit("1"), json!([]));
        let alone = start(&berth, &crictl, "alone", script, limit("0"), json!([]));
        let status = |id: &str| crictl.json(&["inspect", id])["status"].clone();
        let ended = wait_for(SOON, || Some(status(&together)).filter(|s| s["state"] == "CONTAINER_EXITED")).unwrap();
        assert_eq!((&ended["reason"], &ended["exitCode"]), (&json!("OOMKilled"), &json!(137)), "{ended}");
        assert!(wait_until(SOON, || crictl.run(&["logs", &alone]).contains("survived")));
        assert_eq!(status(&alone)["state"], "CONTAINER_RUNNING");
        berth.finish();
    });
}

#[test]
fn huge_pages_are_taken_up_to_the_limit() {
    let pages = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages").unwrap_or_default();
    if !has_v2() || !has_hugetlb() || pages.trim().parse::<u32>().unwrap_or(0) < 4 {
        skip!("needs cgroup v2 and four huge pages of 2 MiB");
    }
    Sandbox::new().test(|| {
        let berth = Berth::start(Half::Cri, WEB);
        let crictl = berth.crictl();
        let huge = berth.dir.dir("huge");
        // As the kubelet prepares a volume of medium HugePages-2Mi.
        berth_e2e::output(std::process::Command::new("mount").args(["-t", "hugetlbfs", "-o", "pagesize=2M", "none"]).arg(&huge));
        let mounts = json!([{"container_path": "/huge", "host_path": huge}]);
        let resources = json!({"hugepage_limits": [{"page_size": "2MB", "limit": 4 * MIB}]});
        let id = start(&berth, &crictl, "huge", "exec sleep 1000", resources, mounts);
        crictl.run(&["exec", "-s", &id, "fallocate", "-l", "4194304", "/huge/a"]);
        assert_eq!(own(&crictl, &id, ["hugetlb.2MB.current"]), ["4194304"]);
        let more = crictl.attempt(&["exec", "-s", &id, "fallocate", "-l", "2097152", "/huge/b"]);
        assert!(!more.status.success(), "beyond the limit");
        crictl.run(&["exec", "-s", &id, "rm", "-f", "/huge/a", "/huge/b"]);
        crictl.run(&["rmp", "-f", "-a"]);
        berth_e2e::output(std::process::Command::new("umount").arg(&huge));
        berth.finish();
    });
}
