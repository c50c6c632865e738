//! Makes the images of a whole cluster out of static programs, as one OCI layout whose reference names are the images' names without
//! a registry: `mkaddons FOLDER PROGRAMS VERSIONS`. PROGRAMS holds the programs; VERSIONS is `name=version` pairs by comma: etcd,
//! kubernetes, coredns, flannel, cni-plugin, metrics-server. Owns what each image holds; the names and commands are the upstreams'.
#![allow(clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use berth_testkit::image::{Layer, Layout, PATH_ENV};
use berth_testkit::rootfs::{BUSYBOX, GROUP, PASSWD, busybox_applets};
use serde_json::json;

/// The user that distroless images name `nonroot`.
const NONROOT: &str = "65532:65532";
/// Where Debian's iptables finds its matches and targets, below the folder of the machine's libraries.
const XTABLES: &str = "xtables";

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: mkaddons FOLDER PROGRAMS VERSIONS";
    let out = PathBuf::from(arguments.next().context(usage)?);
    let programs = PathBuf::from(arguments.next().context(usage)?);
    let versions = arguments.next().context(usage)?;
    let versions: BTreeMap<_, _> = versions.split(',').filter_map(|pair| pair.split_once('=')).collect();
    let version = |name: &str| versions.get(name).copied().with_context(|| format!("no version of {name}"));
    let program = |name: &str| programs.join(name);
    let mut layout = Layout::create(&out.join("layout"));

    let kubernetes = version("kubernetes")?;
    for name in ["kube-apiserver", "kube-controller-manager", "kube-scheduler"] {
        let layer = one_program(&program(name), &format!("usr/local/bin/{name}"));
        layout.image(
            &format!("{name}:v{kubernetes}"),
            &[layer],
            &json!({"Env": [PATH_ENV], "Entrypoint": [format!("/usr/local/bin/{name}")]}),
        );
    }
    // The suffix is the image's revision, as kubeadm names it.
    let etcd = one_program(&program("etcd"), "usr/local/bin/etcd");
    layout.image(&format!("etcd:{}-0", version("etcd")?), &[etcd], &json!({"Env": [PATH_ENV]}));
    let coredns = one_program(&program("coredns"), "coredns");
    let config = json!({"Env": [PATH_ENV], "Entrypoint": ["/coredns"], "User": NONROOT, "WorkingDir": "/"});
    layout.image(&format!("coredns/coredns:v{}", version("coredns")?), &[coredns], &config);
    let metrics = one_program(&program("metrics-server"), "metrics-server");
    let config = json!({"Env": [PATH_ENV], "Entrypoint": ["/metrics-server"], "User": "65534"});
    layout.image(&format!("metrics-server/metrics-server:v{}", version("metrics-server")?), &[metrics], &config);

    let tables = packet_filters()?;
    let proxy = Layer::new().copy("usr/local/bin/kube-proxy", 0o755, &program("kube-proxy")).into_tar();
    layout.image(
        &format!("kube-proxy:v{kubernetes}"),
        &[tables.clone(), proxy],
        &json!({"Env": [PATH_ENV], "Entrypoint": ["/usr/local/bin/kube-proxy"]}),
    );
    let flannel = Layer::new()
        .dir("opt", 0o755)
        .dir("opt/bin", 0o755)
        .copy("opt/bin/flanneld", 0o755, &program("flanneld"))
        .copy("opt/bin/install-conf", 0o755, &program("install-conf"))
        .into_tar();
    let config = json!({"Env": [PATH_ENV], "Entrypoint": ["/opt/bin/flanneld"]});
    layout.image(&format!("flannel-io/flannel:v{}", version("flannel")?), &[tables.clone(), flannel], &config);
    // One image carries flannel's plugin and those that it delegates to: nothing else here brings them to a node.
    let mut plugins = Layer::new();
    for name in ["flannel", "bridge", "host-local", "portmap"] {
        plugins = plugins.copy(name, 0o755, &program(&format!("cni/{name}")));
    }
    let config = json!({"Env": [PATH_ENV], "Cmd": ["sh"]});
    layout.image(&format!("flannel-io/flannel-cni-plugin:v{}", version("cni-plugin")?), &[tables, plugins.into_tar()], &config);
    Ok(())
}

/// The layer of an image that holds a static program and what a program expects of a root.
fn one_program(program: &Path, path: &str) -> Vec<u8> {
    let mut layer = Layer::new().dir("etc", 0o755).dir("tmp", 0o1777);
    for dir in ["usr", "usr/local", "usr/local/bin"] {
        layer = layer.dir(dir, 0o755);
    }
    layer.file("etc/passwd", 0o644, PASSWD).file("etc/group", 0o644, GROUP).copy(path, 0o755, program).into_tar()
}

/// A shell, and the packet filter's tools of this machine with their libraries. `iptables` speaks nf_tables, as the node does.
fn packet_filters() -> Result<Vec<u8>> {
    let mut layer = Layer::new();
    for dir in [
        "bin",
        "sbin",
        "etc",
        "dev",
        "proc",
        "sys",
        "run",
        "lib",
        "lib64",
        "usr",
        "usr/bin",
        "usr/sbin",
        "usr/lib",
        "usr/local",
        "usr/local/bin",
    ] {
        layer = layer.dir(dir, 0o755);
    }
    layer = layer.dir("tmp", 0o1777).dir("root", 0o700).copy("bin/busybox", 0o755, Path::new(BUSYBOX));
    for applet in busybox_applets().iter().filter(|a| *a != "busybox") {
        layer = layer.symlink(&format!("bin/{applet}"), "busybox");
    }
    layer = layer.file("etc/passwd", 0o644, PASSWD).file("etc/group", 0o644, GROUP);
    let xtables = Path::new("/usr/sbin/xtables-nft-multi");
    let tools: Vec<PathBuf> = [xtables.to_path_buf(), "/usr/sbin/nft".into(), "/usr/sbin/conntrack".into()]
        .into_iter()
        .filter(|path| path.exists())
        .collect();
    let mut files = with_libraries(&tools)?;
    // The extensions lie beside the library that loads them.
    let extensions = files
        .iter()
        .filter_map(|file| file.parent())
        .map(|dir| Path::new("/usr").join(dir.strip_prefix("/").unwrap_or(dir)).join(XTABLES));
    let dirs: BTreeSet<_> =
        extensions.chain(files.iter().filter_map(|f| f.parent().map(|d| d.join(XTABLES)))).filter(|dir| dir.is_dir()).collect();
    let mut extensions = Vec::new();
    for dir in dirs {
        for entry in fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))? {
            extensions.push(entry?.path());
        }
    }
    // Some need more than the tools do: `statistic`, which shares a Service between its backends, needs libm.
    files.extend(with_libraries(&extensions)?);
    for file in files {
        layer = layer.copy(&file.to_string_lossy(), 0o755, &file);
    }
    for name in ["iptables", "ip6tables"] {
        for suffix in ["", "-save", "-restore"] {
            layer = layer.symlink(&format!("usr/sbin/{name}{suffix}"), "xtables-nft-multi");
        }
    }
    Ok(layer.into_tar())
}

/// Programs or libraries, and what the loader opens for them: the absolute paths that `ldd` names.
fn with_libraries(files: &[PathBuf]) -> Result<BTreeSet<PathBuf>> {
    let output = Command::new("ldd").args(files).output().context("run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let libraries = text.split_whitespace().filter(|w| w.starts_with('/') && !w.ends_with(':')).map(PathBuf::from);
    Ok(libraries.chain(files.iter().cloned()).collect())
}
