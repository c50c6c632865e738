//! Limits and statistics on the machine's own v1 controllers, device rules on v1 and v2, and real out-of-memory kills.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use berth_cgroup::{Cgroup, Error, Layout, Resources};
use berth_testkit::{in_namespaces, wait_until};
use common::{PATIENCE, Shell, create, layouts};

fn resources(json: &str) -> Resources {
    serde_json::from_str(json).unwrap()
}

/// The layout, when it is v1 with what the tests below limit.
fn v1_layout() -> Option<Layout> {
    let layout = Layout::detect().unwrap();
    let wanted = ["memory", "cpu", "cpuset", "pids", "devices"];
    wanted.iter().all(|name| layout.v1_mount(name).is_some()).then_some(layout)
}

fn value(cgroup: &Cgroup, file: &str) -> String {
    let controller = file.split('.').next().unwrap();
    fs::read_to_string(cgroup.v1_dir(controller).unwrap().join(file)).unwrap().trim().to_owned()
}

const MIB: i64 = 1 << 20;

#[test]
fn memory_and_swap_limits_go_up_and_down() {
    in_namespaces(|| {
        let Some(layout) = v1_layout() else { return };
        let cgroup = create(&layout);
        let swap = cgroup.v1_dir("memory").unwrap().join("memory.memsw.limit_in_bytes").exists();
        for (limit, both) in [(100, 100), (300, 400), (50, 60), (50, 200), (200, 200), (20, 20)] {
            let json = format!(r#"{{"memory":{{"limit":{},"swap":{}}}}}"#, limit * MIB, both * MIB);
            cgroup.update(&resources(&json)).unwrap();
            assert_eq!(value(&cgroup, "memory.limit_in_bytes"), (limit * MIB).to_string());
            if swap {
                assert_eq!(value(&cgroup, "memory.memsw.limit_in_bytes"), (both * MIB).to_string());
            }
            assert_eq!(cgroup.stats().unwrap().memory.limit, (limit * MIB) as u64);
        }
        // 0 and absent leave what is there; -1 takes the limit away.
        cgroup.update(&resources(r#"{"memory":{"limit":0,"swap":0}}"#)).unwrap();
        assert_eq!(value(&cgroup, "memory.limit_in_bytes"), (20 * MIB).to_string());
        cgroup.update(&resources(r#"{"memory":{"limit":-1}}"#)).unwrap();
        assert_eq!(cgroup.stats().unwrap().memory.limit, u64::MAX);
    });
}

#[test]
fn processor_and_process_limits_are_set() {
    in_namespaces(|| {
        let Some(layout) = v1_layout() else { return };
        let cgroup = create(&layout);
        let json = r#"{"cpu":{"shares":512,"quota":50000,"period":100000,"cpus":"0"},"pids":{"limit":17},"memory":{"reservation":8388608}}"#;
        cgroup.apply(&resources(json)).unwrap();
        for (file, wanted) in [
            ("cpu.shares", "512"),
            ("cpu.cfs_quota_us", "50000"),
            ("cpu.cfs_period_us", "100000"),
            ("cpuset.cpus", "0"),
            ("pids.max", "17"),
            ("memory.soft_limit_in_bytes", "8388608"),
        ] {
            assert_eq!(value(&cgroup, file), wanted, "{file}");
        }
        // Each order of change that the kernel's checks make hard: burst up and down with the quota.
        for json in [
            r#"{"cpu":{"quota":40000,"burst":40000}}"#,
            r#"{"cpu":{"quota":10000,"burst":5000}}"#,
            r#"{"cpu":{"quota":90000,"burst":80000,"period":50000}}"#,
            r#"{"cpu":{"burst":0}}"#,
        ] {
            cgroup.update(&resources(json)).unwrap_or_else(|error| panic!("{json}: {error}"));
        }
        assert_eq!((value(&cgroup, "cpu.cfs_burst_us"), value(&cgroup, "cpu.cfs_quota_us")), ("0".into(), "90000".into()));
        cgroup.update(&resources(r#"{"cpu":{"quota":-1},"pids":{"limit":-1}}"#)).unwrap();
        assert_eq!((value(&cgroup, "cpu.cfs_quota_us"), value(&cgroup, "pids.max")), ("-1".into(), "max".into()));
    });
}

#[test]
fn a_refused_update_changes_nothing() {
    in_namespaces(|| {
        let Some(layout) = v1_layout() else { return };
        let cgroup = create(&layout);
        cgroup.apply(&resources(r#"{"memory":{"limit":104857600,"swap":104857600},"cpu":{"shares":512}}"#)).unwrap();
        let before = (value(&cgroup, "memory.limit_in_bytes"), value(&cgroup, "cpuset.cpus"), value(&cgroup, "cpu.shares"));
        let json = r#"{"memory":{"limit":209715200,"swap":209715200},"cpu":{"shares":2000,"cpus":"4000"}}"#;
        let error = cgroup.update(&resources(json)).unwrap_err().to_string();
        assert!(error.starts_with("write \"4000\" to ") && error.ends_with("cpuset.cpus"), "{error}");
        let after = (value(&cgroup, "memory.limit_in_bytes"), value(&cgroup, "cpuset.cpus"), value(&cgroup, "cpu.shares"));
        assert_eq!(after, before);
    });
}

#[test]
fn limits_without_their_controller_are_named() {
    in_namespaces(|| {
        let Some(layout) = v1_layout() else { return };
        let cgroup = create(&layout);
        if layout.v1_mount("hugetlb").is_none() {
            cgroup.apply(&resources(r#"{"hugepageLimits":[{"pageSize":"2MB","limit":0}]}"#)).unwrap();
            let error = cgroup.apply(&resources(r#"{"hugepageLimits":[{"pageSize":"2MB","limit":2097152}]}"#)).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("hugepageLimits[2MB]") && text.contains("controller hugetlb"), "{text}");
        }
        let error = cgroup.apply(&resources(r#"{"unified":{"memory.high":"1000"}}"#)).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        let without: Vec<_> =
            layout.hierarchies().iter().filter(|one| !one.controllers.contains(&"pids".to_owned())).cloned().collect();
        let cgroup = Cgroup::at(&Layout::V1 { hierarchies: without }, cgroup.path()).unwrap();
        let error = cgroup.apply(&resources(r#"{"pids":{"limit":5}}"#)).unwrap_err().to_string();
        assert_eq!(error, "linux.resources.pids.limit needs the cgroup controller pids, which is not available");
    });
}

#[test]
fn device_rates_are_set_for_a_device_of_the_machine() {
    in_namespaces(|| {
        let Some(layout) = v1_layout() else { return };
        let cgroup = create(&layout);
        let device = fs::read_dir("/sys/block").unwrap().flatten().find_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let real = !name.starts_with("loop") && !name.starts_with("ram");
            if real { fs::read_to_string(entry.path().join("dev")).ok() } else { None }
        });
        let (Some(device), Some(dir)) = (device, cgroup.v1_dir("blkio")) else { return };
        let (major, minor) = device.trim().split_once(':').unwrap();
        let json = format!(
            r#"{{"blockIO":{{"throttleReadBpsDevice":[{{"major":{major},"minor":{minor},"rate":1048576}}],
                "throttleWriteIOPSDevice":[{{"major":{major},"minor":{minor},"rate":50}}]}}}}"#
        );
        cgroup.apply(&resources(&json)).unwrap();
        let read = fs::read_to_string(dir.join("blkio.throttle.read_bps_device")).unwrap();
        assert_eq!(read.trim(), format!("{major}:{minor} 1048576"));
        let write = fs::read_to_string(dir.join("blkio.throttle.write_iops_device")).unwrap();
        assert_eq!(write.trim(), format!("{major}:{minor} 50"));
    });
}

#[test]
fn device_rules_hold_for_processes_on_v1_and_v2_and_can_be_replaced() {
    in_namespaces(|| {
        for (name, layout) in layouts() {
            let cgroup = create(&layout);
            let state = berth_testkit::TempState::new();
            let mut shell = Shell::start_in(&cgroup);
            shell.send(&format!("DIR={}", state.path().display()));
            let mut can = |script: &str| shell.ask(&format!("( {script} ) >/dev/null 2>&1 && echo yes || echo no"));
            assert_eq!(can("head -c1 /dev/zero"), "yes", "{name}");
            let rules = r#"{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":1,"minor":3,"access":"rwm"},
                {"allow":true,"type":"c","access":"m"},{"allow":true,"type":"c","major":1,"minor":8,"access":"r"}]}"#;
            cgroup.apply(&resources(rules)).unwrap_or_else(|error| panic!("{name}: {error}"));
            for (script, answer) in [
                ("head -c1 /dev/zero", "no"),
                ("head -c1 /dev/null", "yes"),
                ("echo x > /dev/null", "yes"),
                ("head -c1 /dev/random", "yes"),
                ("echo x > /dev/random", "no"),
                ("mknod $DIR/c c 1 5 && rm $DIR/c", "yes"),
                ("mknod $DIR/b b 7 0 && rm $DIR/b", "no"),
            ] {
                assert_eq!(can(script), answer, "{name}: {script}");
            }
            let all = r#"{"devices":[{"allow":true,"access":"rwm"}]}"#;
            cgroup.update(&resources(all)).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(can("head -c1 /dev/zero"), "yes", "{name}");
            // An update without rules leaves them.
            cgroup.update(&resources(rules)).unwrap();
            cgroup.update(&Resources::default()).unwrap();
            assert_eq!(can("head -c1 /dev/zero"), "no", "{name}");
        }
    });
}

/// Fills memory until the kernel stops it.
const EAT: &str = "exec awk 'BEGIN { s = \"0123456789abcdef\"; while (1) { s = s s } }'";

#[test]
fn a_process_that_runs_out_of_memory_is_counted_and_announced() {
    in_namespaces(|| {
        let Some(layout) = v1_layout() else { return };
        let cgroup = create(&layout);
        let json = format!(r#"{{"memory":{{"limit":{0},"swap":{0}}}}}"#, 15 * MIB);
        cgroup.apply(&resources(&json)).unwrap();
        let watch = cgroup.oom_event_fd().unwrap().unwrap();
        assert_eq!(cgroup.oom_kills().unwrap(), 0);
        let poll = |timeout: Duration| {
            let timeout = rustix::event::Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: 0 };
            let fd = watch.as_fd();
            let mut fds = [rustix::event::PollFd::from_borrowed_fd(fd, watch.interest())];
            rustix::event::poll(&mut fds, Some(&timeout)).unwrap() > 0
        };
        assert!(!poll(Duration::ZERO));

        let mut shell = Shell::start_in(&cgroup);
        shell.send(EAT);
        assert_eq!(shell.child.wait().unwrap().signal(), Some(9));
        assert!(poll(PATIENCE));
        watch.rearm();
        assert!(!poll(Duration::ZERO));
        assert_eq!(cgroup.oom_kills().unwrap(), 1);
        assert_eq!(cgroup.stats().unwrap().memory.oom_kills, 1);

        // One in a cgroup below counts too, and a process that is killed for another reason does not.
        let below = Cgroup::create(&layout, &cgroup.path().child("below").unwrap()).unwrap();
        let mut shell = Shell::start_in(&below);
        shell.send(EAT);
        assert_eq!(shell.child.wait().unwrap().signal(), Some(9));
        assert_eq!(cgroup.oom_kills().unwrap(), 2);
        let shell = Shell::start_in(&cgroup);
        cgroup.kill_all().unwrap();
        assert_eq!(shell.end().signal(), Some(9));
        assert_eq!(cgroup.oom_kills().unwrap(), 2);

        cgroup.delete().unwrap();
        assert!(poll(PATIENCE));
        assert_eq!(cgroup.oom_kills().unwrap(), 0);
    });
}

#[test]
fn a_memory_limit_below_the_use_is_refused() {
    in_namespaces(|| {
        let Some(layout) = v1_layout() else { return };
        let cgroup = create(&layout);
        let mut shell = Shell::start_in(&cgroup);
        assert_eq!(shell.ask("x=$(head -c 20000000 /dev/zero | tr '\\0' x); echo ok"), "ok");
        let error = cgroup.update(&resources(r#"{"memory":{"limit":4194304}}"#)).unwrap_err();
        assert!(matches!(error, Error::BelowUsage { limit: 4_194_304, .. }), "{error}");
        assert_eq!(cgroup.stats().unwrap().memory.limit, u64::MAX);
    });
}

#[test]
fn statistics_tell_what_a_process_uses() {
    in_namespaces(|| {
        let Some(layout) = v1_layout() else { return };
        let cgroup = create(&layout);
        let mut shell = Shell::start_in(&cgroup);
        let busy = "x=$(head -c 8000000 /dev/zero | tr '\\0' x); i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo ok";
        assert_eq!(shell.ask(busy), "ok");
        let stats = cgroup.stats().unwrap();
        assert!(stats.cpu.usage_ns > 1_000_000, "{stats:?}");
        assert!(stats.memory.usage > 0 && stats.memory.rss > 0 && stats.memory.page_faults > 0, "{stats:?}");
        assert!(stats.memory.working_set <= stats.memory.usage);
        assert_eq!((stats.pids.current, stats.pids.limit, stats.memory.limit), (1, u64::MAX, u64::MAX));
        let brief = cgroup.brief_stats().unwrap();
        let cpu = brief.cpu;
        assert!(cpu.usage_ns >= stats.cpu.usage_ns);
        let in_use = |m: &berth_cgroup::MemoryStats| (m.limit, m.swap_limit, m.usage > 0, m.rss > 0, m.page_faults > 0);
        assert_eq!(in_use(&brief.memory), in_use(&stats.memory));
        assert_eq!(cgroup.process_count().unwrap(), cgroup.procs().unwrap().len());
        // A second look is later: rates can be made of two.
        assert_eq!(shell.ask("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo ok"), "ok");
        assert!(wait_until(PATIENCE, || cgroup.stats().unwrap().cpu.usage_ns > cpu.usage_ns));
        shell.end();
        assert!(cgroup.wait_empty(PATIENCE).unwrap());
        cgroup.delete().unwrap();
        assert_eq!(cgroup.stats().unwrap().cpu.usage_ns, 0);
    });
}
