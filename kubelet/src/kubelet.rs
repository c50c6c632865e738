//! The node agent as a whole: checks its configuration, finds the runtime, runs API and main loop until it is stopped.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api::ApiServer;
use crate::api::node::NodeAgent;
use crate::api::node::machine::Machine;
use crate::api::objects::ApiObjects;
use crate::care::{self, Care};
use crate::cgroup::{AllLimits, Driver, PodCgroups};
use crate::control::{Order, PodControl};
use crate::cpus::Cpus;
use crate::cri::Runtime;
use crate::devices::Devices;
use crate::doing::Doing;
use crate::execute::{Executor, host_resolver};
use crate::main_loop::Main;
use crate::node::{Capacity, NodeView, Reserved};
use crate::node_state::NodeState;
use crate::pod_objects::PodObjects;
use crate::record::{Recorder, Weight};
use crate::server::{self, Health};
use crate::shutdown::Shutdown;
use crate::table::PodTable;
use crate::userns::HostIds;
use crate::volume::Services;
use crate::volume::bindings::Bindings;
use crate::volume::csi::drivers::Drivers;
use crate::{Config, Error, Result, addresses, devices, pod_resources};

/// A node agent that is ready to run.
#[derive(Debug)]
pub struct Kubelet {
    config: Config,
    control: PodControl,
    orders: mpsc::UnboundedReceiver<Order>,
    recorder: Recorder,
    state: NodeState,
    shutdown: Shutdown,
}

impl Kubelet {
    /// Checks the configuration; touches nothing yet.
    pub fn new(config: Config) -> Result<Kubelet> {
        let wrong = |field, problem: &str| Err(Error::Config { field, problem: problem.to_owned() });
        if !crate::source::validate::is_dns_subdomain(&config.node_name) {
            return wrong("node_name", "is not a DNS subdomain");
        }
        for (field, path) in [("kubelet_root", &config.kubelet_root), ("pod_logs_dir", &config.pod_logs_dir)] {
            if !path.is_absolute() {
                return wrong(field, "is not an absolute path");
            }
        }
        let (control, orders) = PodControl::new();
        let recorder = Recorder::new(&config.node_name, config.clock.clone());
        let state = NodeState::new(control.clone());
        let shutdown = Shutdown::new(&config.shutdown_steps, state.clone(), recorder.clone());
        Ok(Kubelet { config, control, orders, recorder, state, shutdown })
    }

    /// By which shutdown, eviction and `stop --all` end this kubelet's pods.
    pub fn control(&self) -> PodControl {
        self.control.clone()
    }

    /// By which the end of the machine ends this kubelet's pods.
    pub fn shutdown(&self) -> Shutdown {
        self.shutdown.clone()
    }

    /// Where this kubelet's events are.
    pub fn recorder(&self) -> Recorder {
        self.recorder.clone()
    }

    /// Runs until `shutdown` is cancelled. The pods keep running.
    pub async fn run(self, shutdown: CancellationToken) -> Result<()> {
        let watcher = self.shutdown.clone();
        let mut config = self.config;
        crate::volume::create_private_dir(&config.kubelet_root)
            .map_err(|source| Error::CreateDir { path: config.kubelet_root.clone(), source })?;
        let capacity = Capacity::read(&config.kubelet_root, &config.sys_devices);
        crate::preflight::run(&config, &capacity)?;
        config.max_pods = crate::preflight::most_pods(&config, &capacity);
        let config = Arc::new(config);
        let health = Health::new(config.timing.stuck);
        let runtime = Runtime::new(config.cri.clone(), config.timing);
        let cpus = Cpus::load(&config, self.control.clone(), runtime.metrics().clone())?;
        let table = PodTable::counted(runtime.metrics().clone());
        let stop = shutdown.child_token();
        let _stop_all = stop.clone().drop_guard();
        let server = server::start(&config, table.clone(), runtime.clone(), health.clone(), stop.clone()).await?;
        let told = (self.recorder, table.doing());
        let Some(executor) = connect(&config, runtime, told, (self.control.clone(), cpus), &stop).await else {
            server.stopped().await;
            return Ok(());
        };
        if let Some(server) = &config.api {
            crate::api::events::start(&executor.recorder, server.events.clone(), &stop);
        }
        let care = Care {
            config: config.clone(),
            runtime: executor.runtime.clone(),
            table: table.clone(),
            state: self.state,
            recorder: executor.recorder.clone(),
            cgroups: executor.cgroups.clone(),
            images: Arc::default(),
        };
        care::start(&care, &executor.node.runtime_name, &stop);
        if let (_, Some(notice)) = host_resolver(&config) {
            executor.recorder.node_event(Weight::Warning, "HostResolver", &notice);
        }
        let (now, addresses) = tokio::sync::watch::channel(config.node_ips.clone());
        let look = addresses::run(config.clone(), self.control.clone(), now);
        tokio::spawn(stop.clone().run_until_cancelled_owned(look));
        if let Some(api) = &config.api {
            node_agent(api, &care, (&executor, &health), addresses).start(&stop);
        }
        tokio::spawn(watcher.watch(stop.clone()));
        let (devices, cpus) = (executor.devices.clone(), executor.cpus.clone());
        tokio::spawn(devices.clone().run(stop.clone()));
        tokio::spawn(pod_resources::run(config.kubelet_root.clone(), (devices, cpus), table.clone(), stop.clone()));
        let mut main = Main::new(executor, table, health, (self.control, self.orders), stop);
        main.run().await;
        main.stop().await;
        server.stopped().await;
        Ok(())
    }
}

/// Waits for the runtime and asks it what it is; `None` when the kubelet is stopped before it answers.
async fn connect(
    config: &Arc<Config>,
    runtime: Runtime,
    (recorder, doing): (Recorder, Doing),
    (control, cpus): (PodControl, Cpus),
    shutdown: &CancellationToken,
) -> Option<Executor> {
    let began = Instant::now();
    let mut pause = Duration::from_millis(100);
    let version = loop {
        let error = match runtime.version().await {
            Ok(version) => break version,
            Err(error) => error,
        };
        if pause >= Duration::from_secs(1) {
            tracing::warn!(%error, "waiting for the runtime");
        }
        tokio::select! {
            () = shutdown.cancelled() => return None,
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_secs(5)),
        }
    };
    let driver = match runtime.cgroup_driver().await {
        Ok(Some(berth_cri_api::v1::CgroupDriver::Systemd)) => {
            if !berth_cgroup::systemd::is_running() {
                tracing::warn!("the runtime wants slices, but no systemd runs here: the pods' own cgroups carry no limits");
            }
            Driver::Systemd
        }
        Ok(_) => Driver::Cgroupfs,
        Err(error) => {
            tracing::warn!(%error, "the runtime does not tell its cgroup driver: cgroupfs");
            Driver::Cgroupfs
        }
    };
    let node = NodeView {
        name: config.node_name.clone(),
        host_ips: config.node_ips.iter().map(ToString::to_string).collect(),
        runtime_name: version.runtime_name.clone(),
        capacity: Capacity {
            policy: config.policy,
            reserved: Reserved::of(&config.reservations),
            ..Capacity::read(&config.kubelet_root, &config.sys_devices)
        },
        own: config.own_node.clone(),
    };
    tracing::info!(node = node.name, runtime = version.runtime_name, version = version.runtime_version, "kubelet runs");
    let all = all_limits(config, &node.capacity);
    let cgroups = config.cgroup_root.as_deref().map(|root| PodCgroups::new(root, driver).limited(all));
    let volumes = Services {
        node_name: config.node_name.clone(),
        claims: Bindings::load(&config.kubelet_root),
        drivers: Drivers::default(),
    };
    let [subuid, subgid] = &config.subordinate_ids;
    let host_ids = HostIds::new(&config.kubelet_root, subuid, subgid, config.max_pods);
    let devices = Devices::load(&config.kubelet_root, control.clone(), runtime.metrics().clone());
    tokio::spawn(volumes.drivers.clone().run(config.kubelet_root.clone(), devices.clone(), shutdown.clone()));
    let objects = PodObjects::new(
        config.api.as_ref().map(|api| ApiObjects::start(config, api.client.clone(), node.own.clone(), control.clone(), shutdown)),
    );
    let (config, node) = (config.clone(), Arc::new(node));
    Some(Executor { began, config, runtime, node, objects, volumes, cgroups, doing, recorder, host_ids, devices, cpus })
}

/// The tasks of the node's object.
fn node_agent(
    api: &ApiServer,
    care: &Care,
    (executor, health): (&Executor, &Health),
    addresses: tokio::sync::watch::Receiver<Vec<std::net::IpAddr>>,
) -> NodeAgent {
    NodeAgent {
        config: care.config.clone(),
        api: api.clone(),
        runtime: care.runtime.clone(),
        recorder: care.recorder.clone(),
        state: care.state.clone(),
        health: health.clone(),
        devices: executor.devices.clone(),
        drivers: executor.volumes.drivers.clone(),
        own: executor.node.own.clone(),
        addresses,
        capacity: executor.node.capacity.clone(),
        machine: Arc::new(Machine::read()),
        fresh_devices: !devices::has_checkpoint(&care.config.kubelet_root),
        csi: Arc::default(),
    }
}

/// What all pods may have together, where something is reserved and the pods' share is enforced.
fn all_limits(config: &Config, capacity: &Capacity) -> Option<AllLimits> {
    let reserved = capacity.reserved;
    if !config.reservations.enforce_pods || reserved == Reserved::default() {
        return None;
    }
    let most = std::fs::read_to_string("/proc/sys/kernel/pid_max").ok().and_then(|text| text.trim().parse::<i64>().ok());
    Some(AllLimits {
        memory: (capacity.memory_bytes - reserved.memory_bytes).max(0),
        cpu_millis: (capacity.cpu_millis - reserved.cpu_millis).max(0),
        pids: most.filter(|_| reserved.pids > 0).map(|most| (most - reserved.pids).max(0)),
    })
}
