//! Flags, the configuration file and defaults become the configurations of the CRI server and the kubelet. Pure but for
//! looking the machine up; starts nothing.

use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use berth_cri_server::RuntimeHandler;
use berth_image::ImageStore;
use berth_kubelet::addresses::AddressSource;
use berth_kubelet::configuration::Configuration;
use berth_linux::instance::InstanceId;
use tonic::transport::Channel;

use crate::{cli, config, shim};

/// The CNI plugin types that this binary is, when called by their name.
pub const PLUGINS: [&str; 4] = ["bridge", "host-local", "loopback", "portmap"];

/// The instance whose pods live in the upstream's place, `/kubepods`; others keep to a cgroup of their own.
const DEFAULT_STATE: &str = "/run/berth";

/// The `certs.d` trees: what was named, else ours, else containerd's.
fn registry_dirs(flags: &[PathBuf], file: &config::File) -> Vec<PathBuf> {
    if !flags.is_empty() {
        return flags.to_vec();
    }
    file.node.registry_config_dirs.clone().unwrap_or_else(|| vec!["/etc/berth/certs.d".into(), "/etc/containerd/certs.d".into()])
}

/// The RuntimeClass handlers: the file's, of which a flag replaces the one of its name.
fn runtime_handlers(flags: &[(String, PathBuf)], file: &config::File) -> Result<Vec<RuntimeHandler>> {
    let mut handlers = Vec::new();
    for handler in file.node.runtime_handlers.iter().flatten() {
        let deadline = match &handler.timeout {
            Some(text) => {
                Some(config::duration(text).with_context(|| format!("runtimeHandlers: timeout of {:?}", handler.name))?)
            }
            None => None,
        };
        let config::RuntimeHandler { name, path, args, .. } = handler.clone();
        if !flags.iter().any(|(other, _)| *other == name) {
            handlers.push(RuntimeHandler { name, path, args, deadline });
        }
    }
    let from_flag =
        |(name, path): &(String, PathBuf)| RuntimeHandler { name: name.clone(), path: path.clone(), ..Default::default() };
    handlers.extend(flags.iter().map(from_flag));
    Ok(handlers)
}

/// The CRI server's configuration.
///
/// # Errors
/// When the file holds values that cannot be meant.
pub fn cri(global: &cli::Global, flags: &cli::Cri, file: &config::File) -> Result<berth_cri_server::Config> {
    let mut config = berth_cri_server::Config::new(&global.root, &global.state, shim::PROGRAM);
    config.registry_config_dirs = registry_dirs(&flags.registry_config_dir, file);
    if let Some(dir) = flags.cni_conf_dir.as_ref().or(file.node.cni_conf_dir.as_ref()) {
        config.cni_conf_dir.clone_from(dir);
    }
    if !flags.cni_bin_dir.is_empty() {
        config.cni_bin_dirs.clone_from(&flags.cni_bin_dir);
    } else if let Some(dirs) = &file.node.cni_bin_dirs {
        config.cni_bin_dirs.clone_from(dirs);
    }
    if let Some(dirs) = &file.node.cdi_spec_dirs {
        config.cdi_spec_dirs.clone_from(dirs);
    }
    if let Some(driver) = flags.cgroup_driver.or(file.node.cgroup_driver) {
        config.cgroup_driver = match driver {
            cli::CgroupDriver::Cgroupfs => berth_cri_server::CgroupDriver::Cgroupfs,
            cli::CgroupDriver::Systemd => berth_cri_server::CgroupDriver::Systemd,
        };
    }
    config.built_in_network = !flags.no_built_in_network && file.node.built_in_network.unwrap_or(true);
    if let Some(cidr) = flags.pod_cidr.as_ref().or(file.node.pod_cidr.as_ref()) {
        config.pod_cidrs = cidr.split(',').map(|c| c.trim().to_owned()).collect();
    }
    let (limits, named) = (&mut config.deadlines, &file.node.deadlines);
    limits.cni_plugin = named.cni_plugin.unwrap_or(limits.cni_plugin);
    limits.create_container = named.create_container.unwrap_or(limits.create_container);
    limits.start_container = named.start_container.unwrap_or(limits.start_container);
    limits.storage = named.storage.unwrap_or(limits.storage);
    config.runtime_handlers = runtime_handlers(&flags.runtime_handler, file)?;
    Ok(config)
}

/// The CRI server's configuration where it serves: with NRI plugins.
///
/// # Errors
/// When the file holds values that cannot be meant.
pub fn serving_cri(global: &cli::Global, flags: &cli::Cri, file: &config::File) -> Result<berth_cri_server::Config> {
    Ok(berth_cri_server::Config { nri: nri(global, file)?, ..cri(global, flags, file)? })
}

/// NRI as containerd has it; an instance other than the default one has a socket of its own, and starts no installed plugins
/// unless it is told where they are.
fn nri(global: &cli::Global, file: &config::File) -> Result<berth_cri_server::NriConfig> {
    let mut nri = berth_cri_server::NriConfig::default();
    if global.state != Path::new(DEFAULT_STATE) {
        nri.socket_path = global.state.join("nri.sock");
        nri.plugin_path = PathBuf::new();
    }
    let Some(asked) = &file.node.nri else { return Ok(nri) };
    nri.disable = asked.disable;
    for (to, from) in [
        (&mut nri.socket_path, &asked.socket_path),
        (&mut nri.plugin_path, &asked.plugin_path),
        (&mut nri.plugin_config_path, &asked.plugin_config_path),
    ] {
        if let Some(from) = from {
            to.clone_from(from);
        }
    }
    for (to, from, name) in [
        (&mut nri.registration_timeout, &asked.registration_timeout, "nri.registrationTimeout"),
        (&mut nri.request_timeout, &asked.request_timeout, "nri.requestTimeout"),
    ] {
        if let Some(from) = from {
            *to = config::duration(from).context(name)?;
        }
    }
    Ok(nri)
}

/// The socket that the CRI is served on.
///
/// # Errors
/// When something else than a unix socket is asked for.
pub fn listen(global: &cli::Global, flags: &cli::Cri, file: &config::File) -> Result<PathBuf> {
    match flags.listen.as_ref().or(file.node.listen.as_ref()) {
        Some(endpoint) => crate::client::socket_path(endpoint).context("listen"),
        None => Ok(global.state.join("berth.sock")),
    }
}

/// The address that packets for elsewhere leave from; connecting a datagram socket sends nothing.
fn default_address(family: Option<IpAddr>) -> Option<IpAddr> {
    // Addresses for documentation (RFC 5737, RFC 3849): never contacted, only looked up in the routing table.
    let ways = [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")];
    let reverse = family.is_some_and(|family| family.is_ipv6());
    for (from, to) in if reverse { [ways[1], ways[0]] } else { ways } {
        let Ok(socket) = UdpSocket::bind(from) else { continue };
        if socket.connect(to).is_ok()
            && let Ok(address) = socket.local_addr()
            && !address.ip().is_unspecified()
        {
            return Some(address.ip());
        }
    }
    None
}

/// This host's name, the default name of the node.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The kubelet's configuration.
///
/// # Errors
/// When the file holds values that cannot be meant.
pub fn kubelet(
    global: &cli::Global,
    flags: &cli::KubeletFlags,
    file: &config::File,
    kubelet: &Configuration,
    cri: Channel,
) -> Result<berth_kubelet::Config> {
    let name = flags.node_name.clone().or_else(|| file.node.node_name.clone()).unwrap_or_else(host_name);
    let mut config = berth_kubelet::Config::new(&name, cri);
    (config.node_ips, config.node_ip_source) = node_ips(&flags.node_ip, file.node.node_ip)?;
    config.node.addresses_given = config.node_ip_source.is_none();
    config.manifests = Some("/etc/kubernetes/manifests".into());
    if global.state != Path::new(DEFAULT_STATE) {
        config.cgroup_root = Some(format!("/berth-{}", InstanceId::of_state_dir(&global.state)));
    }
    kubelet.apply(&mut config)?;
    config.eviction.static_pods = file.node.evict_static_pods;
    if let Some(manifests) = flags.manifests.clone().or_else(|| file.node.manifests.clone()) {
        config.manifests = Some(manifests);
    }
    if let Some(root) = flags.kubelet_root.clone().or_else(|| file.node.kubelet_root.clone()) {
        config.kubelet_root = root;
    }
    if let Some(logs) = flags.pod_logs_dir.clone() {
        config.pod_logs_dir = logs;
    }
    if let Some(links) = &flags.container_logs_dir {
        config.container_logs_dir = Some(links.clone());
    }
    if let Some(port) = flags.healthz_port {
        config.healthz_port = Some(port).filter(|port| *port != 0);
    }
    config.server.configz = Arc::new(in_effect(kubelet, &config));
    config.socket = Some(global.state.join("kubelet.sock"));
    config.server.tls.cert_dir.clone_from(&flags.cert_dir);
    Ok(config)
}

/// What `/configz` shows: the configuration with what our own flags and defaults have made of it.
fn in_effect(kubelet: &Configuration, config: &berth_kubelet::Config) -> serde_json::Value {
    let mut shown = kubelet.effective();
    shown["podLogsDir"] = config.pod_logs_dir.display().to_string().into();
    shown["staticPodPath"] = config.manifests.as_deref().map_or(String::new(), |path| path.display().to_string()).into();
    // Unlike the upstream's no port is opened that was not asked for.
    shown["port"] = config.server.port.unwrap_or(0).into();
    shown["healthzPort"] = config.healthz_port.unwrap_or(0).into();
    shown
}

/// The kubeconfig that was named; an empty name means none, as in the upstream.
pub fn kubeconfig(flags: &cli::KubeletFlags) -> Option<&PathBuf> {
    flags.kubeconfig.as_ref().filter(|path| !path.as_os_str().is_empty())
}

/// KubeletConfiguration as a whole: the file's document, the drop-ins, the flags. What it names as without effect is logged.
///
/// # Errors
/// When a part of it cannot be meant, or asks for what berth does not have.
pub fn kubelet_configuration(flags: &cli::KubeletFlags, file: &config::File) -> Result<Configuration> {
    let (configuration, notices) = assembled(flags, file)?;
    for notice in notices {
        tracing::warn!("KubeletConfiguration: {notice}");
    }
    Ok(configuration)
}

/// With what is to be told of it.
fn assembled(flags: &cli::KubeletFlags, file: &config::File) -> Result<(Configuration, Vec<String>)> {
    let mut configuration = file.kubelet.clone();
    if let Some(folder) = &flags.config_dir {
        configuration.add_drop_ins(folder).context("--config-dir")?;
    }
    for (flag, text) in &flags.upstream.0 {
        configuration.set_flag(flag, text)?;
    }
    if kubeconfig(flags).is_some() {
        configuration.join_cluster();
    }
    let notices = configuration.check().context("KubeletConfiguration")?;
    Ok((configuration, notices))
}

/// Whether a node could start with these, as far as it can be told without starting one. Needs a runtime of tokio's.
///
/// # Errors
/// With what it could not start with.
pub fn could_start(global: &cli::Global, node: &cli::Node, file: &config::File) -> Result<()> {
    let runtime = serving_cri(global, &node.cri, file)?;
    runtime.check().context("--pod-cidr")?;
    let (configuration, _) = assembled(&node.kubelet, file)?;
    let nobody = tonic::transport::Endpoint::from_static("http://localhost").connect_lazy();
    let config = kubelet(global, &node.kubelet, file, &configuration, nobody)?;
    let key = crate::cluster::key_places(&node.kubelet, file).find(&[&global.root, &config.kubelet_root]);
    key.context("the sealing key").map(|_| ())
}

/// The node's addresses: those that are named; an unspecified one names its family alone. What is not named is found, and looked for
/// again while the agent runs.
fn node_ips(flags: &[IpAddr], file: Option<IpAddr>) -> Result<(Vec<IpAddr>, Option<AddressSource>)> {
    let named: Vec<IpAddr> = if flags.is_empty() { file.into_iter().collect() } else { flags.to_vec() };
    match named.as_slice() {
        [] => {}
        [family] if family.is_unspecified() => {}
        [_] => return Ok((named, None)),
        [one, other] if one.is_unspecified() || other.is_unspecified() => {
            bail!("dual-stack --node-ip cannot include '0.0.0.0' or '::'")
        }
        [one, other] if one.is_ipv4() != other.is_ipv4() => return Ok((named, None)),
        _ => bail!("--node-ip names more than one address of a family: {named:?}"),
    }
    let family = named.first().copied();
    let address = default_address(family);
    if address.is_none() {
        tracing::warn!(
            "this machine has no route anywhere: host-network pods get the address 127.0.0.1 until it has one; --node-ip sets another"
        );
    }
    let source = AddressSource::from_fn(move || default_address(family).into_iter().collect());
    Ok((vec![address.unwrap_or(IpAddr::from([127, 0, 0, 1]))], Some(source)))
}

/// The node's addresses as far as they are known before a start: those that are named, else the default route's.
pub fn named_or_default_addresses(flags: &cli::KubeletFlags, file: &config::File) -> Vec<IpAddr> {
    let named = flags.node_ip.iter().copied().chain(file.node.node_ip).filter(|address| !address.is_unspecified());
    let named: Vec<IpAddr> = named.collect();
    if named.is_empty() { default_address(None).into_iter().collect() } else { named }
}

/// The image store of this instance, for verbs that work without an agent.
pub async fn image_store(global: &cli::Global) -> Result<Arc<ImageStore>> {
    let file = config::load(global.config.as_deref())?;
    let mut store = berth_image::StoreConfig::new(global.root.join("images"));
    store.registry.config_dirs = registry_dirs(&[], &file);
    ImageStore::open(store).await.with_context(|| format!("opening the images below {}", global.root.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_one_address_of_each_family() {
        let [a, b, six] = ["10.0.0.1", "10.0.0.2", "fd00::1"].map(|text| text.parse::<IpAddr>().expect("an address"));
        assert_eq!(node_ips(&[a, six], None).expect("taken").0, [a, six]);
        assert_eq!(node_ips(&[], Some(b)).expect("taken").0, [b]);
        assert_eq!(node_ips(&[a], Some(b)).expect("taken").0, [a]);
        assert!(node_ips(&[a, IpAddr::from([0u16; 8])], None).is_err(), "an unspecified address is nobody's");
        for refused in [[a, b].as_slice(), &[a, a], &[a, six, b]] {
            let error = format!("{:#}", node_ips(refused, None).expect_err("refused"));
            assert!(error.contains("more than one address of a family"), "{error}");
        }
    }

    #[test]
    fn a_flag_replaces_the_files_handler_of_its_name() {
        let text = "apiVersion: berth/v1alpha1\nkind: NodeConfiguration\nruntimeHandlers:\n- {name: a, path: /a, args: [x], timeout: 7s}\n- {name: b, path: /b}\n";
        let file = config::parse(text, Path::new("/")).expect("valid");
        let handlers = runtime_handlers(&[("b".into(), "/other".into()), ("c".into(), "/c".into())], &file).expect("valid");
        let seen: Vec<_> = handlers.iter().map(|h| (h.name.as_str(), h.path.to_str().unwrap_or(""), h.deadline)).collect();
        let seven = Some(std::time::Duration::from_secs(7));
        assert_eq!(seen, [("a", "/a", seven), ("b", "/other", None), ("c", "/c", None)]);
        assert_eq!(handlers[0].args, ["x"]);

        let file = config::parse(&text.replace("7s", "soon"), Path::new("/")).expect("valid");
        let error = format!("{:#}", runtime_handlers(&[], &file).expect_err("refused"));
        assert!(error.contains("timeout of \"a\""), "{error}");
    }
}
