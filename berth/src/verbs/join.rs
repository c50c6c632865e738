//! `berth join`: makes this machine a node of a kubeadm cluster. Discovers the cluster, writes kubeadm's files and then is the node: the
//! same as `berth node` with them. `--check` says what would keep it from that, and does nothing.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use berth_cluster::discovery::{self, Discovered, Trust};
use berth_cluster::join::{self, Own, Places};
use berth_cluster::{Kubeconfig, Pin, Token};
use berth_kubelet::api::offline;

use crate::cluster::{SEALING_KEY, USER_AGENT, key_places};
use crate::{cli, config, log, verbs, wire};

use super::join_check::{self, Machine, Verdict};

/// The exit code of a command line that cannot be meant, as the parser of flags has it.
const USAGE: u8 = 2;
/// Where kubeadm keeps a node's kubeconfigs.
const KUBERNETES: &str = "/etc/kubernetes";

/// What the command line asks for, read.
#[derive(Debug)]
pub struct Request {
    /// Where the cluster is asked; none with a discovery file.
    pub server: Option<String>,
    pub token: Token,
    pub trust: Trust,
    pub file: Option<PathBuf>,
    pub node: String,
    pub places: Places,
}

/// The folders of this node.
pub fn places(flags: &cli::KubeletFlags, file: &config::File) -> Places {
    let root = flags.kubelet_root.clone().or_else(|| file.node.kubelet_root.clone());
    Places { kubernetes: KUBERNETES.into(), kubelet_root: root.unwrap_or_else(|| "/var/lib/kubelet".into()) }
}

/// What is on record of a join.
pub fn record(global: &cli::Global) -> PathBuf {
    global.root.join("join.json")
}

fn read(args: &cli::Join, file: &config::File) -> Result<Request> {
    let flags = &args.node.kubelet;
    if flags.kubeconfig.is_some() || flags.bootstrap_kubeconfig.is_some() {
        bail!("join writes the kubeconfigs itself: with one at hand, run `berth node --kubeconfig FILE`");
    }
    if args.server.is_none() && args.discovery_file.is_none() {
        bail!("say where the cluster is, HOST:PORT, or give a --discovery-file; one of them");
    }
    let Some(token) = &args.token else { bail!("--token is missing: `kubeadm token create --print-join-command` prints one") };
    let token: Token = token.parse().map_err(anyhow::Error::msg).context("--token")?;
    let pins = args.ca_hash.iter().map(|text| text.parse::<Pin>().map_err(anyhow::Error::msg).context("--ca-hash"));
    let trust = Trust { pins: pins.collect::<Result<_>>()? };
    match (&args.server, &args.discovery_file) {
        (Some(_), None) if trust.pins.is_empty() && !args.unsafe_skip_ca_verification => bail!(
            "--ca-hash is missing: without it whoever knows the token can pretend to be the cluster \
             (--unsafe-skip-ca-verification accepts that)"
        ),
        (Some(_), None) | (None, Some(_)) => {}
        _ => bail!("say where the cluster is, HOST:PORT, or give a --discovery-file; one of them"),
    }
    if let Some(problem) = args.server.as_deref().and_then(unfit_endpoint) {
        bail!("{problem}: say HOST:PORT, as `kubeadm token create --print-join-command` prints it (6443 is usual)");
    }
    let name = flags.node_name.clone().or_else(|| file.node.node_name.clone()).unwrap_or_else(wire::host_name);
    let node = name.trim().to_lowercase();
    if !berth_kubelet::source::validate::is_dns_subdomain(&node) {
        bail!("{node:?} is no name for a node: small letters, digits, - and . (RFC 1123); --node-name says another");
    }
    Ok(Request {
        server: args.server.clone(),
        token,
        trust,
        file: args.discovery_file.clone(),
        node,
        places: places(flags, file),
    })
}

/// What is wrong with the API server's address.
fn unfit_endpoint(endpoint: &str) -> Option<String> {
    if endpoint.starts_with("http://") {
        return Some(format!("{endpoint}: an API server is spoken to over TLS only"));
    }
    let host = endpoint.trim_start_matches("https://").trim_end_matches('/');
    let port = host.rsplit_once(':').filter(|(host, _)| !host.is_empty() && (!host.contains(':') || host.ends_with(']')));
    match port.and_then(|(_, port)| port.parse::<u16>().ok()) {
        Some(_) => None,
        None => Some(format!("{endpoint} has no port")),
    }
}

impl Request {
    /// The cluster, by the token or by the file.
    pub async fn discover(&self, trust: &Trust, patience: Duration) -> berth_cluster::Result<Discovered> {
        match (&self.server, &self.file) {
            (Some(server), _) => discovery::discover(server, &self.token, trust, patience, USER_AGENT).await,
            (None, file) => {
                let path = file.as_deref().unwrap_or(Path::new(""));
                Discovered::from_kubeconfig(&Kubeconfig::load(path)?, &path.display().to_string())
            }
        }
    }
}

/// Joins, and runs until SIGTERM.
pub fn run(global: &cli::Global, args: &cli::Join) -> Result<ExitCode> {
    let begun = Instant::now();
    let file = config::load(global.config.as_deref())?;
    let request = match read(args, &file) {
        Ok(request) => request,
        Err(error) => {
            crate::note(&format!("{error:#}"));
            return Ok(ExitCode::from(USAGE));
        }
    };
    let machine = Machine::of(&args.node, &file, &request.places);
    if args.check {
        let fits = could_start(global, args, &request.places, "");
        return crate::runtime(1)?.block_on(join_check::run(&request, &machine, fits));
    }
    let _log = log::to_stderr(global.log_level.as_deref().unwrap_or(log::DEFAULT))?;
    // It is good for any node's name, and this process stays.
    crate::scrub::scrub(args.token.as_deref().unwrap_or_default()).context("hide the token from the command line")?;
    let (found, cluster) = crate::runtime(1)?.block_on(discover(&request, &machine, args))?;
    let own = Own { flags: own_flags(&request, &args.node), endpoint: endpoint(global, args, &file)? };
    let mut files = join::plan(&request.places, &found, &request.token, &cluster, &own)?;
    files.extend(sealing_key(&args.node.kubelet, &file, &record(global))?);
    could_start(global, args, &request.places, &cluster.kubelet)
        .context("the node could not start with this; nothing is written")?;
    // What another cluster last said is not this one's to start.
    offline::forget(&request.places.kubelet_root).context("removing the records of an earlier cluster's pods")?;
    let certificates = args.node.kubelet.cert_dir.clone().unwrap_or_else(|| request.places.certificates());
    join::write(&files, &std::path::absolute(&certificates).unwrap_or(certificates), &record(global))?;
    tracing::info!(server = found.server, version = cluster.version, node = request.node, "the cluster's files are written");
    let others = flags_of_berth(global, &args.node.cri);
    if !others.is_empty() {
        tracing::info!(
            flags = others.join(" "),
            "later starts need these too: kubeadm-flags.env holds the kubelet's flags alone"
        );
    }
    if args.files_only {
        for path in [request.places.bootstrap_kubeconfig(), request.places.configuration()] {
            crate::out(&path.display().to_string());
        }
        return Ok(ExitCode::SUCCESS);
    }
    let (global, node) = as_node(global, args, &request.places);
    verbs::node::be(&global, &node, Some(begun))
}

/// Judges the node's flags with the cluster's KubeletConfiguration before anything is written: a start that fails afterwards would leave a
/// machine that has half joined. `configuration` is empty where the cluster has not been asked.
pub fn could_start(global: &cli::Global, args: &cli::Join, places: &Places, configuration: &str) -> Result<()> {
    let (global, node) = as_node(global, args, places);
    let mut file = match configuration {
        "" => config::File::default(),
        text => config::parse(text, &places.kubelet_root).context("the cluster's kubelet-config")?,
    };
    file.node = config::load(global.node_config.as_deref())?.node;
    crate::runtime(1)?.block_on(async { wire::could_start(&global, &node, &file) })
}

/// The machine's own sealing key, so that the node outlives its API server: where no other is named, and none is there that somebody
/// else has made.
fn sealing_key(flags: &cli::KubeletFlags, file: &config::File, record: &Path) -> Result<Option<join::File>> {
    let path = Path::new(SEALING_KEY);
    let named = flags.sealing_key_file.is_some() || file.node.sealing_key_file.is_some();
    if named || key_places(flags, file).credential().is_some() {
        return Ok(None);
    }
    let is_ours = std::fs::read_to_string(record).is_ok_and(|text| text.contains(SEALING_KEY));
    let content = match path.try_exists().context(SEALING_KEY)? {
        // An earlier join's stays that of the machine, and on record.
        true if is_ours => std::fs::read_to_string(path).context(SEALING_KEY)?,
        true => return Ok(None),
        false => offline::new_key().context("no random number")?,
    };
    Ok(Some(join::File { path: path.to_owned(), content, mode: 0o400 }))
}

/// The command line of the node that a join becomes.
fn as_node(global: &cli::Global, args: &cli::Join, places: &Places) -> (cli::Global, cli::Node) {
    let mut node = args.node.clone();
    node.kubelet.kubeconfig = Some(places.kubeconfig());
    node.kubelet.bootstrap_kubeconfig = Some(places.bootstrap_kubeconfig());
    node.kubelet.discard_bootstrap = true;
    // The administrator's own file, as `berth node` would have found it.
    let default = Path::new(config::DEFAULT);
    let node_config = global.config.clone().or_else(|| default.exists().then(|| default.to_owned()));
    (cli::Global { config: Some(places.configuration()), node_config, ..global.clone() }, node)
}

async fn discover(request: &Request, machine: &Machine, args: &cli::Join) -> Result<(Discovered, discovery::Cluster)> {
    let is_ignored =
        |name: &str| args.ignore_preflight_errors.iter().any(|ignored| ignored == "all" || ignored.eq_ignore_ascii_case(name));
    let found = request.discover(&request.trust, Duration::from_secs(args.discovery_timeout)).await?;
    let problems = machine.look(Some(&found));
    let problems: Vec<String> = problems
        .into_iter()
        .filter(|line| line.verdict == Verdict::Fail && !is_ignored(&line.name))
        .map(|line| format!("[{}] {}: {}", line.name, line.seen, line.remedy))
        .collect();
    if !problems.is_empty() {
        bail!("this machine cannot join (--ignore-preflight-errors NAME goes on nevertheless):\n{}", problems.join("\n"));
    }
    if discovery::is_ready(&found, &request.token, &request.node, USER_AGENT).await? {
        bail!(
            "the cluster has a Ready node {} already: to take its place, end that one first; for another name say --node-name",
            request.node
        );
    }
    let cluster = discovery::configuration(&found, &request.token, USER_AGENT).await?;
    Ok((found, cluster))
}

/// What a start by kubeadm's unit has to be told of this join.
fn own_flags(request: &Request, node: &cli::Node) -> Vec<String> {
    let mut flags = Vec::new();
    if request.node != wire::host_name().to_lowercase() {
        flags.push(format!("--hostname-override={}", request.node));
    }
    if !node.kubelet.node_ip.is_empty() {
        let addresses: Vec<String> = node.kubelet.node_ip.iter().map(ToString::to_string).collect();
        flags.push(format!("--node-ip={}", addresses.join(",")));
    }
    let kubelet = &node.kubelet;
    let folders = [
        ("pod-manifest-path", &kubelet.manifests),
        ("root-dir", &kubelet.kubelet_root),
        ("pod-logs-dir", &kubelet.pod_logs_dir),
        ("container-logs-dir", &kubelet.container_logs_dir),
        ("cert-dir", &kubelet.cert_dir),
        ("config-dir", &kubelet.config_dir),
        ("sealing-key-file", &kubelet.sealing_key_file),
    ];
    let given = folders.into_iter().filter_map(|(name, folder)| Some((name, std::path::absolute(folder.as_ref()?).ok()?)));
    flags.extend(given.map(|(name, folder)| format!("--{name}={}", folder.display())));
    flags.extend(kubelet.healthz_port.map(|port| format!("--healthz-port={port}")));
    let times = [("offline-max-age", kubelet.offline_max_age), ("offline-after", kubelet.offline_after)];
    flags.extend(times.into_iter().filter_map(|(name, time)| Some(format!("--{name}={}ms", time?.as_millis()))));
    flags.extend(kubelet.upstream.0.iter().map(|(name, value)| format!("--{name}={value}")));
    flags
}

/// What was given of the flags that are not the kubelet's.
fn flags_of_berth(global: &cli::Global, cri: &cli::Cri) -> Vec<&'static str> {
    // By name, so that a new one is not forgotten.
    let cli::Cri {
        listen,
        registry_config_dir,
        cni_conf_dir,
        cni_bin_dir,
        runtime_handler,
        cgroup_driver,
        pod_cidr,
        no_built_in_network,
    } = cri;
    let given = [
        ("--config", global.config.is_some()),
        ("--root", global.root != Path::new(cli::DEFAULT_ROOT)),
        ("--state", global.state != Path::new(cli::DEFAULT_STATE)),
        ("--listen", listen.is_some()),
        ("--registry-config-dir", !registry_config_dir.is_empty()),
        ("--cni-conf-dir", cni_conf_dir.is_some()),
        ("--cni-bin-dir", !cni_bin_dir.is_empty()),
        ("--runtime-handler", !runtime_handler.is_empty()),
        ("--cgroup-driver", cgroup_driver.is_some()),
        ("--pod-cidr", pod_cidr.is_some()),
        ("--no-built-in-network", *no_built_in_network),
    ];
    given.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect()
}

fn endpoint(global: &cli::Global, args: &cli::Join, file: &config::File) -> Result<String> {
    Ok(format!("unix://{}", wire::listen(global, &args.node.cri, file)?.display()))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Verb};

    const TOKEN: &str = "--token=abcdef.0123456789abcdef";

    fn parsed(args: &[&str]) -> (cli::Global, cli::Join) {
        let cli = Cli::try_parse_from(["berth", "join"].iter().chain(args)).expect("parsed");
        match cli.verb {
            Verb::Join(join) => (cli.global, *join),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_join_by_kubeadms_command_line_is_understood() {
        let pin = format!("sha256:{}", "0a".repeat(32));
        let (_, args) =
            parsed(&["cp:6443", TOKEN, "--discovery-token-ca-cert-hash", &pin, "--ignore-preflight-errors=Swap,Port-10250"]);
        let request = read(&args, &config::File::default()).expect("valid");
        assert_eq!((request.server.as_deref(), request.trust.pins.len()), (Some("cp:6443"), 1));
        assert_eq!(args.ignore_preflight_errors, ["Swap", "Port-10250"]);
    }

    #[test]
    fn what_would_not_be_safe_or_makes_no_sense_is_refused() {
        for (args, problem) in [
            (&["cp:6443", TOKEN][..], "--ca-hash is missing"),
            (&["cp:6443", "--unsafe-skip-ca-verification"], "--token is missing"),
            (&["cp:6443", "--token=K10aa::server:x", "--unsafe-skip-ca-verification"], "k3s"),
            (&[TOKEN], "say where the cluster is"),
            (&["cp:6443", TOKEN, "--discovery-file=/f"], "one of them"),
            (&["cp:6443", TOKEN, "--ca-hash=sha256:1"], "64 hex digits"),
            (&["cp:6443", TOKEN, "--kubeconfig=/k"], "berth node --kubeconfig"),
            (&["cp", TOKEN, "--unsafe-skip-ca-verification"], "cp has no port"),
            (&["fd00::1", TOKEN, "--unsafe-skip-ca-verification"], "has no port"),
            (&["http://cp:6443", TOKEN, "--unsafe-skip-ca-verification"], "over TLS only"),
            (&["cp:6443", TOKEN, "--unsafe-skip-ca-verification", "--node-name=bad_name"], "RFC 1123"),
        ] {
            let error = format!("{:#}", read(&parsed(args).1, &config::File::default()).expect_err("refused"));
            assert!(error.contains(problem), "{error}");
        }
    }

    #[test]
    fn endpoints_are_taken_as_kubeadm_prints_and_people_write_them() {
        for endpoint in ["cp:6443", "https://cp:6443", "https://10.0.0.1:6443/", "[fd00::1]:6443", "https://[fd00::1]:6443"] {
            assert_eq!(unfit_endpoint(endpoint), None, "{endpoint}");
        }
    }

    #[test]
    fn flags_that_no_node_could_start_with_are_told_before_anything_is_written() {
        for (flag, problem) in [
            ("--node-labels=node-role.kubernetes.io/worker=", "node-labels"),
            ("--register-with-taints=foo", "taint"),
            ("--pod-cidr=foo", "foo"),
            ("--node-ip=10.0.0.1,10.0.0.2", "more than one address"),
            ("--sealing-key-file=/dev/null/none", "sealing key"),
        ] {
            let (global, args) = parsed(&["cp:6443", TOKEN, "--unsafe-skip-ca-verification", flag]);
            let places = places(&args.node.kubelet, &config::File::default());
            let error = format!("{:#}", could_start(&global, &args, &places, "").expect_err(flag));
            assert!(error.contains(problem), "{flag}: {error}");
        }
        let (global, args) = parsed(&["cp:6443", TOKEN, "--node-labels=a=b", "--pod-cidr=10.9.0.0/16"]);
        let places = places(&args.node.kubelet, &config::File::default());
        could_start(&global, &args, &places, "").expect("a node");
    }

    #[test]
    fn the_node_that_it_becomes_has_its_own_flags_and_the_joins_files() {
        let (global, args) =
            parsed(&["cp:6443", TOKEN, "--node-name=N1", "--node-ip=10.0.0.1", "--node-labels=a=b", "--config=/mine.yaml"]);
        let request = read(&args, &config::File::default());
        assert!(request.is_err());
        let places = places(&args.node.kubelet, &config::File::default());
        let (global, node) = as_node(&global, &args, &places);
        assert_eq!(global.config.as_deref(), Some(Path::new("/var/lib/kubelet/config.yaml")));
        assert_eq!(global.node_config.as_deref(), Some(Path::new("/mine.yaml")));
        assert_eq!(node.kubelet.kubeconfig.as_deref(), Some(Path::new("/etc/kubernetes/kubelet.conf")));
        assert!(node.kubelet.discard_bootstrap);
        let args = cli::Join { unsafe_skip_ca_verification: true, ..args };
        let request = read(&args, &config::File::default()).expect("valid");
        assert_eq!(request.node, "n1");
        assert_eq!(own_flags(&request, &node), ["--hostname-override=n1", "--node-ip=10.0.0.1", "--node-labels=a=b"]);
        let (_, args) = parsed(&["cp:6443", TOKEN, "--sealing-key-file=/k", "--offline-max-age=1h", "--offline-after=500ms"]);
        let flags = own_flags(&request, &args.node);
        assert_eq!(flags[1..], ["--sealing-key-file=/k", "--offline-max-age=3600000ms", "--offline-after=500ms"]);
    }
}
