//! The rows of the table: which metric, which way is better, what the target is.

/// What is aimed at.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    /// So many times better than the peer.
    Ratio(f64),
    /// Our value is at most this.
    AtMost(f64),
    /// Shown only.
    None,
}

/// Which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// Time, memory.
    Less,
    /// Rates.
    More,
}

/// A row.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// The metric's name in the legs.
    pub metric: &'static str,
    /// What people call it.
    pub label: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// Which way is better.
    pub better: Better,
    /// The workload whose CPU time is shown with it.
    pub cost: Option<&'static str>,
    /// What is aimed at.
    pub target: Target,
}

const fn row(metric: &'static str, label: &'static str, unit: &'static str, better: Better, target: Target) -> Row {
    Row { metric, label, unit, better, cost: None, target }
}

const fn time(metric: &'static str, label: &'static str, ratio: f64) -> Row {
    row(metric, label, "ms", Better::Less, if ratio > 0.0 { Target::Ratio(ratio) } else { Target::None })
}

const fn mib(metric: &'static str, label: &'static str, target: Target) -> Row {
    row(metric, label, "MiB", Better::Less, target)
}

impl Row {
    const fn cost(mut self, workload: &'static str) -> Self {
        self.cost = Some(workload);
        self
    }
}

/// All rows, in the table's order. The targets are the project's: see docs/bench/README.md.
pub const ROWS: &[Row] = &[
    time("life1.RunPodSandbox", "RunPodSandbox, 1 at a time", 8.0),
    time("life1.Create+Start", "CreateContainer + StartContainer, 1", 5.0),
    time("life1.up", "pod up, 1", 6.0).cost("life1"),
    time("life1.StopContainer", "StopContainer, 1", 8.0),
    time("life1.StopPodSandbox", "StopPodSandbox, 1", 15.0),
    time("life1.RemoveContainer", "RemoveContainer, 1", 0.0),
    time("life1.RemovePodSandbox", "RemovePodSandbox, 1", 2.5),
    time("life4.RunPodSandbox", "RunPodSandbox, 4", 8.0),
    time("life4.Create+Start", "CreateContainer + StartContainer, 4", 5.0),
    time("life4.up", "pod up, 4", 6.0).cost("life4"),
    time("life4.StopContainer", "StopContainer, 4", 8.0),
    time("life4.StopPodSandbox", "StopPodSandbox, 4", 15.0),
    time("life4.RemoveContainer", "RemoveContainer, 4", 0.0),
    time("life4.RemovePodSandbox", "RemovePodSandbox, 4", 2.5),
    time("life8.RunPodSandbox", "RunPodSandbox, 8", 8.0),
    time("life8.Create+Start", "CreateContainer + StartContainer, 8", 5.0),
    time("life8.up", "pod up, 8", 6.0).cost("life8"),
    time("life8.StopContainer", "StopContainer, 8", 8.0),
    time("life8.StopPodSandbox", "StopPodSandbox, 8", 15.0),
    time("life8.RemovePodSandbox", "RemovePodSandbox, 8", 2.5),
    time("life1-shared.RunPodSandbox", "RunPodSandbox, shared PID namespace, 1", 8.0),
    time("life1-shared.Create+Start", "CreateContainer + StartContainer, shared, 1", 5.0),
    time("life1-shared.StopPodSandbox", "StopPodSandbox, shared, 1", 15.0),
    time("life1-shared.RemovePodSandbox", "RemovePodSandbox, shared, 1", 2.5).cost("life1-shared"),
    time("life4-shared.RunPodSandbox", "RunPodSandbox, shared, 4", 8.0),
    time("life4-shared.Create+Start", "CreateContainer + StartContainer, shared, 4", 5.0),
    time("life4-shared.StopPodSandbox", "StopPodSandbox, shared, 4", 15.0),
    time("life4-shared.RemovePodSandbox", "RemovePodSandbox, shared, 4", 2.5).cost("life4-shared"),
    row("burst.pods/s", "burst of 100 pods", "pods/s", Better::More, Target::Ratio(6.0)).cost("burst"),
    time("gone.gone", "100 pods stopped until nothing is left", 4.0).cost("gone"),
    time("exec1.ExecSync", "ExecSync true, 1", 8.0).cost("exec1"),
    time("exec4.ExecSync", "ExecSync true, 4", 8.0).cost("exec4"),
    time("list.ListPodSandbox", "ListPodSandbox at 110", 10.0).cost("list.ListPodSandbox"),
    time("list.ListContainers", "ListContainers at 110", 10.0).cost("list.ListContainers"),
    time("list.ListPodSandboxStats", "ListPodSandboxStats at 110", 10.0),
    time("list.ListContainerStats", "ListContainerStats at 110", 10.0).cost("list"),
    time("list.ListImages", "ListImages", 0.0),
    time("list.Version", "Version, a call that does nothing", 0.0),
    time("list.read pods", "of ListPodSandbox, the client's reading", 0.0),
    time("list.read containers", "of ListContainers, the client's reading", 0.0),
    row("restart.lists", "restart with 110 pods: lists whole", "ms", Better::Less, Target::AtMost(200.0)),
    row("restart.all", "restart with 110 pods: every status answered", "ms", Better::Less, Target::AtMost(200.0)).cost("restart"),
    row("logs.MBps", "log throughput", "MB/s", Better::More, Target::Ratio(3.0)).cost("logs"),
    time("grace.over", "stop of a container that ignores SIGTERM, over its grace", 0.0),
    time("pull.PullImage", "PullImage, 3 MB", 2.5).cost("pull"),
    mib("idle.PSS", "server alone, PSS", Target::AtMost(15.0)),
    mib("density20.PSS/pod", "user memory per idle pod at 20, PSS", Target::AtMost(0.5)),
    mib("density110.PSS/pod", "user memory per idle pod at 110, PSS", Target::AtMost(0.5)),
    mib("density20-shared.PSS/pod", "the same at 20, shared PID namespace", Target::AtMost(0.5)),
    mib("density110.PSS daemon", "server with 110 pods, PSS", Target::None),
    mib("density20.MemAvailable/pod", "MemAvailable per idle pod at 20", Target::None),
    mib("density110.MemAvailable/pod", "MemAvailable per idle pod at 110", Target::None),
    row("drop.started", "manifest dropped until its process runs", "ms", Better::Less, Target::AtMost(60.0)),
    time("drop.running", "manifest dropped until its status is running", 0.0),
    row("exit.status", "process exits until its status says so", "ms", Better::Less, Target::AtMost(50.0)),
    row("idle-http.all ready", "110 pods dropped until all are ready", "s", Better::Less, Target::None),
    mib(
        "idle-http.PSS agents",
        "110 idle pods with an HTTP probe: PSS of the agent, or of kubelet and containerd",
        Target::AtMost(40.0),
    ),
    mib("idle-http.PSS", "110 idle pods with an HTTP probe: PSS of the side, shims and all", Target::None),
    mib("idle-http.PSS", "the same, against the peer", Target::Ratio(5.0)),
    row("idle-http.CPU", "110 idle pods with an HTTP probe: CPU of the side", "% of a core", Better::Less, Target::AtMost(1.0)),
    row("idle-http.CPU", "the same, against the peer", "% of a core", Better::Less, Target::Ratio(8.0)),
    row("idle-http.written", "of these, written to disk in the first minute", "KiB", Better::Less, Target::None),
    row("idle-disk.written", "written to disk by the side in ten minutes", "KiB", Better::Less, Target::AtMost(0.0)),
    row("idle-disk.disk", "written to the disk by everybody meanwhile", "KiB", Better::Less, Target::None),
    row("idle-disk.control", "the same in ten minutes before without an agent", "KiB", Better::Less, Target::None),
    row(
        "idle-exec.CPU",
        "110 idle pods with an exec probe a second: CPU without the commands'",
        "% of a core",
        Better::Less,
        Target::AtMost(15.0),
    ),
    mib("idle-exec.PSS", "110 idle pods with an exec probe: PSS of the side", Target::None),
    row("single.running", "pod created until a watch shows it running", "ms", Better::Less, Target::AtMost(100.0)),
    row(
        "single.gone over grace",
        "pod deleted until a watch shows it gone, over its grace",
        "ms",
        Better::Less,
        Target::AtMost(150.0),
    ),
    row("burst50.fake", "deployment of 50 pods on an instant fake kubelet", "s", Better::Less, Target::None),
    row("burst50.all", "deployment of 50 pods until all run", "s", Better::Less, Target::None),
    row("burst50.net", "the same without the fake kubelet's time", "s", Better::Less, Target::Ratio(5.0)),
    row("api-idle.calls", "110 idle pods: calls of the API server a minute", "", Better::Less, Target::Ratio(1.0)),
    mib("api-idle.PSS agents", "110 idle pods of the API: PSS of the agent, or of kubelet and containerd", Target::AtMost(50.0)),
    mib("api-idle.PSS", "the same with shims and all", Target::None),
    row("api-idle.CPU", "110 idle pods of the API: CPU of the side", "% of a core", Better::Less, Target::None),
    row("critest.seconds", "critest, same seed", "s", Better::Less, Target::Ratio(1.0)),
];
