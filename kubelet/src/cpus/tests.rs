//! Giving processors to pods of a machine with hyperthreads: two sockets of two cores of two threads, core n has n and n + 4.

use super::topology::Place;
use super::*;
use crate::node::parse_cpu_list;
use crate::source::{defaults::apply_defaults, parse::parse_manifest};

fn set(text: &str) -> CpuSet {
    parse_cpu_list(text).unwrap()
}

fn inner(full_cores: bool) -> Inner {
    let place = |cpu: u32| Place { node: cpu % 4 / 2, socket: cpu % 4 / 2, core: cpu % 4 };
    let topology = Topology { cpus: (0..8).map(|cpu| (cpu, place(cpu))).collect() };
    let (control, _) = PodControl::new();
    Inner {
        reserved: set("0"),
        full_cores,
        state: Mutex::new(CpuState { shared: topology.all(), ..CpuState::default() }),
        topology,
        written: Mutex::default(),
        path: PathBuf::new(),
        control,
        metrics: Metrics::default(),
    }
}

fn pod(uid: &str, spec: &str) -> Pod {
    let text = format!("{{apiVersion: v1, kind: Pod, metadata: {{name: a, uid: {uid}}}, spec: {spec}}}");
    let mut pod = parse_manifest(&text).unwrap().pods.remove(0).pod;
    apply_defaults(&mut pod);
    pod
}

fn wanting(uid: &str, cpus: &[&str]) -> Pod {
    let container =
        |(i, cpu): (usize, &&str)| format!("{{name: c{i}, image: i, resources: {{limits: {{cpu: {cpu}, memory: 1Gi}}}}}}");
    let containers: Vec<_> = cpus.iter().enumerate().map(container).collect();
    pod(uid, &format!("{{containers: [{}]}}", containers.join(", ")))
}

/// What each container gets, and what is shared then; or why nothing.
fn given(inner: &Inner, pod: &Pod) -> String {
    let before = inner.lock().clone();
    match inner.plan(&before, pod) {
        Ok(next) => {
            let own = next.entries.get(pod::uid(pod)).into_iter().flatten();
            let mut text: Vec<_> = own.map(|(name, cpus)| format!("{name}={}", format_cpu_list(cpus))).collect();
            text.push(format_cpu_list(&next.shared));
            *inner.lock() = next;
            text.join(" ")
        }
        Err(rejection) => format!("{}: {}", rejection.reason, rejection.message),
    }
}

#[test]
fn whole_processors_of_guaranteed_pods_are_theirs_alone() {
    let one = inner(false);
    assert_eq!(given(&one, &wanting("fraction", &["1500m"])), "0-7");
    assert_eq!(given(&one, &pod("burst", "{containers: [{name: c, image: i, resources: {requests: {cpu: 2}}}]}")), "0-7");
    // Half of core 0 is reserved: its other half is taken first, and the reserved one by nobody.
    assert_eq!(given(&one, &wanting("u1", &["1"])), "c0=4 0-3,5-7");
    assert_eq!(given(&one, &wanting("u2", &["2", "500m"])), "c0=1,5 0,2-3,6-7");
    assert_eq!(given(&one, &wanting("u2", &["2", "500m"])), "c0=1,5 0,2-3,6-7");
    assert_eq!(given(&one, &wanting("u3", &["4"])), "c0=2-3,6-7 0");
    let none = "not enough cpus available to satisfy request: requested=1, available=0";
    let text = format!("UnexpectedAdmissionError: Allocate failed due to {none}, which is unexpected");
    assert_eq!(given(&one, &wanting("u4", &["1"])), text);
    one.lock().retain(|uid| uid != "u3");
    assert_eq!(given(&one, &wanting("u4", &["1"])), "c0=2 0,3,6-7");
}

#[test]
fn init_containers_hand_their_processors_on_and_sidecars_keep_theirs() {
    let spec = "{initContainers: [\
        {name: first, image: i, resources: {limits: {cpu: 2, memory: 1Gi}}}, \
        {name: side, image: i, restartPolicy: Always, resources: {limits: {cpu: 1, memory: 1Gi}}}], \
        containers: [{name: main, image: i, resources: {limits: {cpu: 3, memory: 1Gi}}}]}";
    assert_eq!(given(&inner(false), &pod("u1", spec)), "first=1,5 main=1-2,5 side=4 0,3,6-7");
}

#[test]
fn with_full_cores_only_whole_ones_are_given() {
    let one = inner(true);
    let odd = "SMTAlignmentError: SMT Alignment Error: requested 3 cpus not multiple cpus per core = 2";
    assert_eq!(given(&one, &wanting("u1", &["3"])), odd);
    assert_eq!(given(&one, &wanting("u1", &["4"])), "c0=2-3,6-7 0-1,4-5");
    let broken = "SMTAlignmentError: SMT Alignment Error: not enough free physical CPUs: available physical CPUs = 2, requested CPUs = 4, CPUs per core = 2";
    assert_eq!(given(&one, &wanting("u2", &["4"])), broken);
    assert_eq!(given(&one, &wanting("u2", &["2"])), "c0=1,5 0,4");
}

fn config(root: &std::path::Path, reserved: &str) -> Config {
    let mut config = Config::new("n", tonic::transport::Endpoint::from_static("http://unused").connect_lazy());
    config.kubelet_root = root.to_owned();
    config.sys_devices = root.to_owned();
    config.cpu_manager.policy = CpuPolicy::Static;
    config.reservations.kube.insert("cpu".to_owned(), crate::quantity::Amount::parse(reserved).unwrap());
    fs::create_dir_all(root.join("cpu")).unwrap();
    fs::write(root.join("cpu/online"), "0-3\n").unwrap();
    config
}

#[tokio::test]
async fn what_was_given_survives_a_restart_and_a_state_that_does_not_fit_ends_the_start() {
    let root = tempfile::tempdir().unwrap();
    let load = |config: &Config| Cpus::load(config, PodControl::new().0, Metrics::default());
    let config = config(root.path(), "500m");
    let cpus = load(&config).unwrap();
    assert_eq!(cpus.allocatable(), [1, 2, 3], "what is reserved is rounded up");
    let web = wanting("u1", &["2", "100m"]);
    assert!(cpus.lacks(&web));
    cpus.allocate(&web).unwrap();
    assert!(!cpus.lacks(&web));
    let again = load(&config).unwrap();
    assert_eq!((again.list_of("u1", "c0").as_deref(), again.list_of("u1", "c1").as_deref()), (Some("1-2"), Some("0,3")));
    assert!(again.fits(&web, &web.spec.as_ref().unwrap().containers[0]));
    let more = wanting("u1", &["3", "100m"]);
    assert!(!again.fits(&more, &more.spec.as_ref().unwrap().containers[0]));
    // Another machine, another reservation, another policy.
    fs::write(root.path().join("cpu/online"), "0-7\n").unwrap();
    assert!(load(&config).unwrap_err().to_string().contains("doesn't match with CPUs in state \"0-3\", please drain this node"));
    fs::write(root.path().join("cpu/online"), "0-3\n").unwrap();
    let mut other = config.clone();
    other.reservations.cpus = Some(set("0-1"));
    assert!(load(&other).unwrap_err().to_string().contains("not all reserved cpus"));
    other.reservations.cpus = Some(set("9"));
    assert!(load(&other).unwrap_err().to_string().contains("reservedSystemCPUs 9 are not all among"));
    other.cpu_manager.policy = CpuPolicy::None;
    assert!(load(&other).unwrap_err().to_string().contains("differs from state checkpoint policy"));
    again.0.as_ref().unwrap().lock().retain(|_| false);
    again.save();
    assert_eq!(load(&other).unwrap().list_of("u1", "c0"), None);
    other.cpu_manager.policy = CpuPolicy::Static;
    (other.reservations.cpus, other.reservations.kube) = (None, Default::default());
    assert!(load(&other).unwrap_err().to_string().contains("to be greater than zero"));
}
