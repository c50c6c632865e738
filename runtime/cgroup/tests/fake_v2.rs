//! Limits and statistics in the files of v2, on a folder that only looks like a hierarchy: this machine's has no controllers.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::Path;

use berth_cgroup::{Cgroup, CgroupPath, Error, Layout, Resources};
use berth_testkit::TempState;

const FILES: [&str; 24] = [
    "cgroup.procs",
    "cgroup.controllers",
    "cgroup.subtree_control",
    "cgroup.freeze",
    "memory.max",
    "memory.low",
    "memory.swap.max",
    "memory.current",
    "memory.oom.group",
    "cpu.weight",
    "cpu.max",
    "cpu.max.burst",
    "cpu.idle",
    "cpu.stat",
    "cpuset.cpus",
    "cpuset.mems",
    "pids.max",
    "pids.current",
    "io.weight",
    "io.max",
    "io.stat",
    "hugetlb.2MB.max",
    "hugetlb.2MB.rsvd.max",
    "memory.events",
];

/// A tree `/a/b` with all files in every folder.
fn fake() -> (TempState, Cgroup) {
    let state = TempState::new();
    let root = state.dir("v2");
    for dir in ["", "a", "a/b"] {
        let dir = root.join(dir);
        fs::create_dir_all(&dir).unwrap();
        for file in FILES {
            fs::write(dir.join(file), "").unwrap();
        }
        fs::write(dir.join("cgroup.controllers"), "cpuset cpu io memory hugetlb pids\n").unwrap();
    }
    fs::write(root.join("a/cgroup.subtree_control"), "cpu memory\n").unwrap();
    let layout = Layout::V2 { mount: root };
    let cgroup = Cgroup::create(&layout, &CgroupPath::parse("/a/b").unwrap()).unwrap();
    (state, cgroup)
}

fn resources(json: &str) -> Resources {
    serde_json::from_str(json).unwrap()
}

fn read(dir: &Path, file: &str) -> String {
    // A write to a real file of v2 replaces; to a fake one it overwrites the beginning, so that only the first line counts.
    fs::read_to_string(dir.join(file)).unwrap()
}

#[test]
fn parents_give_their_children_all_controllers() {
    let (state, cgroup) = fake();
    assert!(cgroup.is_v2());
    assert_eq!(read(&state.path().join("v2"), "cgroup.subtree_control"), "+cpuset +cpu +io +memory +hugetlb +pids");
    assert!(read(&state.path().join("v2/a"), "cgroup.subtree_control").starts_with("+cpuset +io +hugetlb +pids"));
    assert_eq!(read(cgroup.v2_dir().unwrap(), "cgroup.subtree_control"), "", "a leaf gives nothing, or it could hold no process");
    assert!(cgroup.dirfd().unwrap().is_some());
}

#[test]
fn every_limit_has_its_file() {
    let (_state, cgroup) = fake();
    let dir = cgroup.v2_dir().unwrap();
    fs::write(dir.join("cpu.max"), "max 10000\n").unwrap();
    let json = r#"{"memory":{"limit":104857600,"swap":157286400,"reservation":52428800},
        "cpu":{"shares":1024,"period":50000,"burst":1000,"cpus":"0-1","mems":"0"},"pids":{"limit":-1},
        "blockIO":{"weight":1000,"throttleWriteBpsDevice":[{"major":8,"minor":16,"rate":1048576}]},
        "hugepageLimits":[{"pageSize":"2MB","limit":0},{"pageSize":"1GB","limit":0}],"unified":{"memory.oom.group":"1"}}"#;
    cgroup.apply(&resources(json)).unwrap();
    for (file, value) in [
        ("memory.max", "104857600"),
        ("memory.swap.max", "52428800"),
        ("memory.low", "52428800"),
        ("cpu.weight", "39"),
        ("cpu.max", "max 50000\n"),
        ("cpu.max.burst", "1000"),
        ("cpuset.cpus", "0-1"),
        ("cpuset.mems", "0"),
        ("pids.max", "max"),
        ("io.weight", "default 10000"),
        ("io.max", "8:16 wbps=1048576"),
        ("hugetlb.2MB.max", "0"),
        ("hugetlb.2MB.rsvd.max", "0"),
        ("memory.oom.group", "1"),
    ] {
        assert_eq!(read(dir, file).trim_end(), value.trim_end(), "{file}");
    }
}

#[test]
fn what_v2_cannot_do_is_refused_by_name() {
    let (_state, cgroup) = fake();
    fs::remove_file(cgroup.v2_dir().unwrap().join("memory.max")).unwrap();
    for (json, part) in [
        (r#"{"memory":{"swappiness":60}}"#, "linux.resources.memory.swappiness"),
        (r#"{"memory":{"disableOOMKiller":true}}"#, "linux.resources.memory.disableOOMKiller"),
        (r#"{"cpu":{"realtimeRuntime":1000}}"#, "linux.resources.cpu.realtimeRuntime"),
        (r#"{"memory":{"swap":1000}}"#, "linux.resources.memory.swap"),
        (r#"{"memory":{"limit":1000}}"#, "needs the cgroup controller memory,"),
        (r#"{"hugepageLimits":[{"pageSize":"1GB","limit":5}]}"#, "hugepageLimits[1GB] needs the cgroup controller hugetlb,"),
        (r#"{"hugepageLimits":[{"pageSize":"../x","limit":5}]}"#, "hugepageLimits[../x]"),
        (r#"{"unified":{"misc.max":"1"}}"#, "controller misc,"),
    ] {
        let error = cgroup.apply(&resources(json)).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    for harmless in
        [r#"{"memory":{"disableOOMKiller":false,"limit":0,"swap":0}}"#, r#"{"cpu":{"quota":0,"period":0,"shares":0,"cpus":""}}"#]
    {
        cgroup.apply(&resources(harmless)).unwrap();
    }
}

#[test]
fn a_refused_update_sets_the_old_values_back() {
    let (_state, cgroup) = fake();
    let dir = cgroup.v2_dir().unwrap();
    fs::write(dir.join("memory.max"), "1048576").unwrap();
    fs::write(dir.join("memory.current"), "500000\n").unwrap();
    let error = cgroup.update(&resources(r#"{"memory":{"limit":400000}}"#)).unwrap_err();
    assert!(matches!(error, Error::BelowUsage { limit: 400_000, usage: 500_000 }));
    cgroup.update(&resources(r#"{"memory":{"limit":2097152},"unified":{"misc.max":"1"}}"#)).unwrap_err();
    assert_eq!(read(dir, "memory.max"), "1048576");
}

#[test]
fn statistics_are_read_from_the_files() {
    let (_state, cgroup) = fake();
    let dir = cgroup.v2_dir().unwrap();
    for (file, text) in [
        ("cpu.stat", "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 4\nnr_throttled 1\nthrottled_usec 7\n"),
        ("memory.current", "1000000\n"),
        ("memory.max", "max\n"),
        ("memory.stat", "anon 400000\nfile 500000\nkernel 50\nfile_mapped 60\ninactive_file 300000\npgfault 5\npgmajfault 2\n"),
        ("memory.events", "low 0\nhigh 0\nmax 9\noom 3\noom_kill 2\noom_group_kill 0\n"),
        ("memory.pressure", "some avg10=1.00 avg60=0.00 avg300=0.00 total=5\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"),
        ("pids.current", "3\n"),
        ("pids.max", "10\n"),
        ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n"),
        ("hugetlb.2MB.current", "2097152\n"),
        ("hugetlb.2MB.rsvd.current", "0\n"),
    ] {
        fs::write(dir.join(file), text).unwrap();
    }
    let stats = cgroup.stats().unwrap();
    assert_eq!((stats.cpu.usage_ns, stats.cpu.throttled_ns, stats.cpu.psi.clone()), (1_500_000, 7_000, None));
    assert_eq!((stats.memory.usage, stats.memory.working_set, stats.memory.rss), (1_000_000, 700_000, 400_000));
    assert_eq!((stats.memory.limit, stats.memory.limit_hits, stats.memory.oom_kills), (u64::MAX, 9, 2));
    assert_eq!(stats.memory.psi.as_ref().unwrap().some.total_ns, 5_000);
    let brief = cgroup.brief_stats().unwrap();
    assert_eq!((brief.cpu, brief.memory.working_set, brief.memory.psi), (stats.cpu, 700_000, stats.memory.psi));
    assert_eq!((stats.pids.current, stats.pids.limit), (3, 10));
    assert_eq!((stats.io.devices[0].read_bytes, stats.io.devices[0].writes), (1, 4));
    assert_eq!(stats.hugetlb.keys().collect::<Vec<_>>(), ["2MB"]);
    assert_eq!(cgroup.oom_kills().unwrap(), 2);
    assert!(cgroup.oom_event_fd().unwrap().is_some());
}

#[test]
fn a_process_is_attached_by_one_write() {
    let (_state, cgroup) = fake();
    cgroup.attach(berth_linux::Pid::from_raw(1234).unwrap()).unwrap();
    assert_eq!(read(cgroup.v2_dir().unwrap(), "cgroup.procs"), "1234");
    assert_eq!(cgroup.procs().unwrap().len(), 1);
}
