//! CreateContainer: image, user, volumes, spec, then the shim makes the process, which waits at its gate. Undone in reverse at
//! the first error.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, Permissions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use berth_image::{Hold, Image, ImageConfig, Rootfs};
use berth_nri::api::Container;
use berth_shim::protocol::{CreateExt, LogSpec, PidMode, Reply, Request, Root};
use rustix::fs::OFlags;

use super::layers::Layers;
use super::mounts::Opened;
use super::{devices, image_volume, mounts, oci, security, selinux, user};
use crate::Server;
use crate::board::{ContainerFacts, RunUser};
use crate::error::{Error, file, invalid};
use crate::id::ContainerId;
use crate::nri::{self, Adjusted, PidNamespace};
use crate::records::{self, ContainerRecord};
use crate::sandbox::files;
use crate::sandbox::holdings::Live;
use crate::sandbox::state::CreatedContainer;
use crate::spec::{ContainerSpec, ImageVolume, MountSpec, NamespaceMode, SandboxSpec};
use crate::steps::Step;

/// The annotations with which our kubelet passes the limits of a log.
const LOG_BYTES: &str = "berth/log-max-bytes";
const LOG_FILES: &str = "berth/log-max-files";

/// Makes a container. Whatever fails, nothing of it is left.
pub(crate) async fn create(
    server: &Arc<Server>,
    live: &Arc<Live>,
    id: &ContainerId,
    mut spec: ContainerSpec,
    log_directory: &str,
) -> Result<CreatedContainer, Error> {
    fits(&spec, &live.spec)?;
    can_mount(server, &spec, &live.spec).await?;
    let image = find_image(server, &spec)?;
    let hold = server.images.hold(&image.id).map_err(|e| image_error("use", &spec.image.image, e))?;
    let config = hold.config();
    let rootfs = server.images.rootfs(&image.id).map_err(|e| image_error("use", &spec.image.image, e))?;
    let mut holds = hold_volumes(server, &mut spec)?;
    holds.push(hold);
    let source = Arc::new(Source { image, config, rootfs });
    let mut told = None;
    let made = match prepare(server, live, id, spec, source, log_directory, &mut told).await {
        Ok(prepared) => launch(server, live, id, prepared).await,
        Err(error) => Err(error),
    };
    match made {
        Ok((facts, created_at, pid)) => {
            if let Some(container) = told {
                nri::created(server, live, container, created_at, pid).await;
            }
            Ok(CreatedContainer { facts, created_at, pid, hold: Some(Arc::new(holds)) })
        }
        Err(error) => {
            server.progress.pin(id.as_str());
            if let Some(container) = told {
                nri::undo_create(server, live, container).await;
            }
            if let Err(undo) = super::control::remove_cgroup(server, &live.spec, id).await {
                tracing::warn!(container = %id, error = %crate::error::text(&undo), "undoing a failed container");
            }
            if let Err(undo) = super::control::erase(server, &live.id, id).await {
                tracing::warn!(container = %id, error = %crate::error::text(&undo), "undoing a failed container");
            }
            Err(error)
        }
    }
}

/// Shapes the container, lets plugins change it if there are any (`told`: what they were told), and opens what it needs.
async fn prepare(
    server: &Arc<Server>,
    live: &Arc<Live>,
    id: &ContainerId,
    spec: ContainerSpec,
    source: Arc<Source>,
    log_directory: &str,
    told: &mut Option<Container>,
) -> Result<Prepared, Error> {
    let own = || (server.clone(), live.clone(), id.clone(), source.clone());
    let log_directory = log_directory.to_owned();
    let (server_, live_, id_, source_) = own();
    if !server.nri.active() {
        let object = volume_paths(&spec);
        let work = crate::blocking(move || {
            let shaped = shape(&server_, &live_, &id_, spec, &source_)?;
            finish(&server_, &live_, &id_, shaped, &source_, &log_directory)
        });
        return server.progress.step(id.as_str(), Step::OpenVolumes, object, work).await;
    }
    let object = volume_paths(&spec);
    let shaping = crate::blocking(move || shape(&server_, &live_, &id_, spec, &source_));
    let mut shaped = server.progress.step(id.as_str(), Step::OpenVolumes, object, shaping).await?;
    let container = nri::new_container(live, id, &shaped.spec, &shaped.oci);
    let adjust = nri::create(server, live, told.insert(container).clone()).await?;
    let object = volume_paths(&shaped.spec);
    let (server_, live_, id_, source) = own();
    let work = crate::blocking(move || {
        shaped.adjusted = nri::adjust(&server_.cdi, &mut shaped.oci, &mut shaped.spec.resources, adjust)?;
        finish(&server_, &live_, &id_, shaped, &source, &log_directory)
    });
    server.progress.step(id.as_str(), Step::OpenVolumes, object, work).await
}

/// The paths of other file systems that opening a container touches.
fn volume_paths(spec: &ContainerSpec) -> String {
    spec.mounts.iter().map(|m| m.host_path.as_str()).filter(|p| !p.is_empty()).collect::<Vec<_>>().join(", ")
}

fn image_error(action: &'static str, image: &str, error: berth_image::Error) -> Error {
    Error::Image { action, image: image.to_owned(), source: Box::new(error) }
}

/// What only both specs together can tell. Network and IPC are the pod's, whatever a container says: clients leave them out.
fn fits(spec: &ContainerSpec, sandbox: &SandboxSpec) -> Result<(), Error> {
    let (own, pod) = (&spec.security.namespaces, &sandbox.namespaces);
    if spec.security.privileged && !sandbox.privileged {
        return Err(invalid("privileged", "the pod sandbox is not privileged"));
    }
    if own.own_users() != pod.own_users() {
        return Err(invalid("namespace_options.userns_options", "differ from the pod sandbox's"));
    }
    if own.pid == NamespaceMode::Pod && pod.pid != NamespaceMode::Pod {
        return Err(invalid("namespace_options.pid", "the pod sandbox has no PID namespace to share"));
    }
    Ok(())
}

/// Recursive read-only mounts are promised to be that, or refused.
async fn can_mount(server: &Arc<Server>, spec: &ContainerSpec, sandbox: &SandboxSpec) -> Result<(), Error> {
    let handler = &sandbox.runtime_handler;
    if !spec.mounts.iter().any(|m| m.recursive_readonly)
        || server.handlers.features(handler, server.features).await?.recursive_readonly
    {
        return Ok(());
    }
    let reason = format!("the runtime handler {handler:?} does not have recursive read-only mounts");
    Err(Error::Unsupported { what: "mounts.recursive_read_only", reason })
}

fn find_image(server: &Server, spec: &ContainerSpec) -> Result<Image, Error> {
    let name = &spec.image.image;
    server.images.status(name).ok_or_else(|| Error::NotFound { kind: "image", id: name.clone() })
}

/// Looks up the images that are volumes and keeps them.
fn hold_volumes(server: &Server, spec: &mut ContainerSpec) -> Result<Vec<Hold>, Error> {
    let hold = |volume: &mut ImageVolume| {
        let fail = |source: Box<dyn std::error::Error + Send + Sync>| Error::ImageVolume {
            image: volume.image.clone(),
            sub_path: volume.sub_path.clone(),
            source,
        };
        let image = server.images.status(&volume.image).ok_or_else(|| fail("not found".into()))?;
        let hold = server.images.hold(&image.id).map_err(|e| fail(Box::new(e)))?;
        volume.id = image.id.to_string();
        Ok(hold)
    };
    spec.mounts.iter_mut().filter_map(|m| m.image.as_mut()).map(hold).collect()
}

/// The tree of a volume that is an image.
fn image_tree(server: &Server, live: &Live, volume: &ImageVolume, mount: &MountSpec) -> Result<OwnedFd, Error> {
    let users = live.spec.namespaces.own_users();
    let userns = if mount.uids.is_empty() && mount.gids.is_empty() { None } else { live.userns.as_ref().map(AsFd::as_fd) };
    if userns.is_some() && users.is_none_or(|u| u.uids != mount.uids || u.gids != mount.gids) {
        return Err(Error::Unsupported {
            what: "mounts.uidMappings",
            reason: format!("image {:?} can only have the ids of the pod's user namespace", volume.image),
        });
    }
    let id = volume.id.parse().map_err(|_| invalid("mounts.image", format!("{:?} has no ID", volume.image)))?;
    let rootfs = server.images.rootfs(&id).map_err(|e| image_error("mount", &volume.image, e))?;
    image_volume::tree(&volume.image, &rootfs, &volume.sub_path, userns)
}

/// Everything the shim's request needs.
struct Prepared {
    facts: Arc<ContainerFacts>,
    json: Vec<u8>,
    ext: CreateExt,
    fds: Vec<OwnedFd>,
}

fn log_path(spec: &ContainerSpec, log_directory: &str) -> String {
    if log_directory.is_empty() || spec.log_path.is_empty() {
        return String::new();
    }
    // Below the directory, whatever it begins with: an absolute path would take the directory's place.
    Path::new(log_directory).join(spec.log_path.trim_start_matches('/')).to_string_lossy().into_owned()
}

/// What a container will be, before anything of it is made.
struct Shaped {
    spec: ContainerSpec,
    oci: berth_oci::spec::Spec,
    volumes: Vec<Opened>,
    user: RunUser,
    image_name: String,
    cgroup: String,
    /// By plugins, as far as it is not in the OCI spec.
    adjusted: Adjusted,
}

/// The image as it is needed here.
struct Source {
    image: Image,
    config: Arc<ImageConfig>,
    rootfs: Rootfs,
}

/// The part that looks things up. Blocking.
fn shape(server: &Server, live: &Live, id: &ContainerId, spec: ContainerSpec, source: &Source) -> Result<Shaped, Error> {
    let Source { image, config, rootfs } = source;
    let layers = Layers::open(&rootfs.links_dir, &rootfs.lowers).map_err(file("open the layers in", &rootfs.links_dir))?;
    let resolved = user::resolve(&spec.security, &config.user, &layers)?;
    drop(layers);
    let (caps, ambient) = security::capabilities(&spec.security, server.bounding)?;
    let seccomp = security::seccomp(&spec.security, caps)?;
    let apparmor = server.apparmor.profile(&spec.security, |warning| {
        if server.is_news(warning) {
            tracing::warn!("{warning}");
        }
    })?;
    let mut granted = if spec.security.privileged { devices::all() } else { Vec::new() };
    granted.extend(devices::requested(&spec.devices)?);
    let labels = server.selinux.of_container(&spec, &live.spec.labels_of_pod);
    let volumes = mounts::open(&spec.mounts, |volume, mount| image_tree(server, live, volume, mount))?;
    let cgroup = server.cgroups.container(&live.spec.cgroup_parent, id);
    let image_name = image.repo_tags.first().or(image.repo_digests.first()).cloned().unwrap_or_else(|| image.id.to_string());
    let mut oci = oci::build(oci::Inputs {
        sandbox_id: &live.id,
        sandbox: &live.spec,
        spec: &spec,
        image: config,
        image_name: &image_name,
        user: &resolved,
        volumes: volumes.iter().map(|v| v.mount.clone()).collect(),
        devices: granted,
        caps,
        ambient,
        seccomp,
        apparmor,
        labels,
        cgroup: cgroup.clone(),
        unified: server.cgroups.is_v2(),
    })?;
    server.cdi.inject(&mut oci, &spec.cdi_devices)?;
    Ok(Shaped { spec, oci, volumes, user: resolved.user, image_name, cgroup, adjusted: Adjusted::default() })
}

/// The part that opens and makes files. Blocking.
fn finish(
    server: &Server,
    live: &Live,
    id: &ContainerId,
    shaped: Shaped,
    source: &Source,
    log_directory: &str,
) -> Result<Prepared, Error> {
    let Source { image, config, rootfs } = source;
    let Shaped { spec, oci, volumes, user, image_name, cgroup, adjusted } = shaped;
    let filter = oci.linux.seccomp.as_ref().map(|profile| server.filters.get(profile)).transpose()?;
    let mut fds = Vec::new();
    let mut pass = |fd: OwnedFd| {
        fds.push(fd);
        fds.len() as u32 // Index 0 is the spec.
    };
    selinux::relabel_volumes(&spec.mounts, &volumes, &oci.linux.mount_label)?;
    let mut trees: BTreeMap<String, u32> = BTreeMap::new();
    added_files(server, live, &oci, &mut trees, &mut pass)?;
    host_trees(&oci, volumes, &mut trees, &mut pass)?;
    let kept = writable_layer(server, id, rootfs)?;
    let links =
        rustix::fs::open(&rootfs.links_dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, rustix::fs::Mode::empty())
            .map_err(|e| file("open", &rootfs.links_dir)(e.into()))?;
    let filter = match filter {
        // Opened anew: a duplicate would share its position with every other reader.
        Some(compiled) => {
            let reopened = berth_linux::memfd::reopen(compiled.memfd.as_fd(), OFlags::RDONLY | OFlags::CLOEXEC);
            Some(pass(reopened.map_err(file("open", "seccomp filter"))?))
        }
        None => None,
    };
    let log = log_path(&spec, log_directory);
    let number = |name: &str| spec.annotations.get(name).and_then(|t| t.parse::<u64>().ok());
    let ext = CreateExt {
        bundle: server.paths.live_container(&live.id, id),
        runner: server.handlers.runner(&live.spec.runtime_handler, &server.paths.live_sandbox(&live.id), &cgroup)?,
        root: Root::Overlay {
            dir: pass(links),
            lowers: rootfs.lowers.clone(),
            upper: kept.join("upper"),
            work: kept.join("work"),
            volatile: true,
        },
        filter,
        cgroup: cgroup.clone(),
        log: (!log.is_empty()).then(|| LogSpec {
            path: log.clone().into(),
            max_bytes: number(LOG_BYTES).unwrap_or(0),
            max_files: number(LOG_FILES).and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
        }),
        stdin: spec.stdin,
        stdin_once: spec.stdin_once,
        tty: spec.tty,
        console_size: (0, 0),
        shm: pod_shm(&oci, &live.spec),
        mounts: trees,
        pid: match (adjusted.pid, spec.security.namespaces.pid) {
            (Some(PidNamespace::Host), _) => PidMode::Node,
            (Some(PidNamespace::Spec), _) | (None, NamespaceMode::Container) => PidMode::Container,
            (None, NamespaceMode::Pod) => PidMode::Pod,
            (None, NamespaceMode::Node) => PidMode::Node,
            (None, NamespaceMode::Target) => PidMode::Target(spec.security.namespaces.target_id.clone()),
        },
        stay_out: adjusted.stay_out,
    };
    let json = serde_json::to_vec(&oci).map_err(|e| invalid("config", e.to_string()))?;
    let stop_signal = crate::convert::signal::linux_number(spec.stop_signal)
        .or_else(|| crate::convert::signal::parse(&config.stop_signal))
        .unwrap_or(15);
    let facts = Arc::new(ContainerFacts {
        image_id: image.id.to_string(),
        image_name,
        image_ref: image.repo_digests.first().cloned().unwrap_or_else(|| image.id.to_string()),
        user,
        stop_signal,
        log_path: log,
        cgroup,
        spec,
    });
    Ok(Prepared { facts, json, ext, fds })
}

/// Whether the spec's /dev/shm is the pod's.
fn pod_shm(oci: &berth_oci::spec::Spec, sandbox: &SandboxSpec) -> bool {
    sandbox.namespaces.ipc != NamespaceMode::Node && oci.mounts.iter().any(|m| m.destination == oci::SHM && m.source == oci::SHM)
}

/// The trees of what the runtime itself mounts: the sandbox's files, and the host's shared memory.
fn added_files(
    server: &Server,
    live: &Live,
    oci: &berth_oci::spec::Spec,
    trees: &mut BTreeMap<String, u32>,
    pass: &mut impl FnMut(OwnedFd) -> u32,
) -> Result<(), Error> {
    let folder = server.paths.live_sandbox(&live.id);
    for name in files::NAMES {
        let destination = format!("/etc/{name}");
        if oci.mounts.iter().any(|m| m.destination == destination && m.source == name) {
            selinux::relabel_file(&folder.join(name), &oci.linux.mount_label)?;
            trees.insert(destination, pass(mounts::tree(&folder.join(name))?));
        }
    }
    if live.spec.namespaces.ipc == NamespaceMode::Node && !trees.contains_key(oci::SHM) {
        trees.insert(oci::SHM.into(), pass(mounts::tree(Path::new(oci::SHM))?));
    }
    Ok(())
}

/// The trees of everything that is bound from the host, opened in the host's mount namespace: volumes as they were opened
/// first, and what was added to the spec since.
fn host_trees(
    oci: &berth_oci::spec::Spec,
    mut volumes: Vec<Opened>,
    trees: &mut BTreeMap<String, u32>,
    pass: &mut impl FnMut(OwnedFd) -> u32,
) -> Result<(), Error> {
    for mount in &oci.mounts {
        let same = |v: &Opened| v.mount.source == mount.source && oci::clean(&v.mount.destination) == mount.destination;
        if let Some(at) = volumes.iter().position(same) {
            trees.insert(mount.destination.clone(), pass(volumes.swap_remove(at).tree));
        } else if oci::is_bind(mount) && mount.source.starts_with('/') && !trees.contains_key(&mount.destination) {
            if mount.destination == oci::SHM && mount.source == oci::SHM {
                continue; // The pod's own, which the shim has.
            }
            let recursive = mount.options.iter().any(|o| o == "rbind");
            trees.insert(mount.destination.clone(), pass(mounts::tree_of(Path::new(&mount.source), recursive)?));
        }
    }
    Ok(())
}

/// The folders of the container's writable layer. The upper folder is the container's `/`: it takes the image's mode and owner.
fn writable_layer(server: &Server, id: &ContainerId, rootfs: &Rootfs) -> Result<std::path::PathBuf, Error> {
    let kept = server.paths.kept_container(id);
    DirBuilder::new().mode(0o700).recursive(true).create(&kept).map_err(file("create", &kept))?;
    let (upper, work) = (kept.join("upper"), kept.join("work"));
    for folder in [&upper, &work] {
        std::fs::create_dir(folder).map_err(file("create", folder))?;
    }
    std::fs::set_permissions(&upper, Permissions::from_mode(rootfs.root_mode)).map_err(file("set the mode of", &upper))?;
    if (rootfs.root_uid, rootfs.root_gid) != (0, 0) {
        std::os::unix::fs::chown(&upper, Some(rootfs.root_uid), Some(rootfs.root_gid))
            .map_err(file("set the owner of", &upper))?;
    }
    Ok(kept)
}

/// Records it and lets the shim make it.
async fn launch(
    server: &Arc<Server>,
    live: &Arc<Live>,
    id: &ContainerId,
    prepared: Prepared,
) -> Result<(Arc<ContainerFacts>, i64, i32), Error> {
    let Prepared { facts, json, ext, fds } = prepared;
    let created_at = crate::clock::now_ns();
    let record = ContainerRecord {
        version: records::VERSION,
        id: id.clone(),
        sandbox: live.id.clone(),
        boot: server.boot.clone(),
        created_at,
        started_at: 0,
        resources: facts.spec.resources.clone().unwrap_or_default(),
        exit: None,
        forlorn: false,
        facts: (*facts).clone(),
    };
    let folder = server.paths.live_container(&live.id, id);
    let spec_path = server.paths.oci_spec(&live.id, id);
    let object = spec_path.display().to_string();
    let work = crate::blocking(move || {
        std::fs::create_dir_all(&folder).map_err(file("create", &folder))?;
        berth_linux::file::write(&spec_path, &json, berth_linux::file::PRIVATE).map_err(file("write", &spec_path))?;
        records::write(&crate::paths::record(&folder), &records::encode(&record))?;
        berth_linux::memfd::sealed_memfd("oci-spec", &json, false).map_err(file("make", "oci-spec"))
    });
    let memfd = server.progress.step(id.as_str(), Step::WriteRecord, object, work).await?;
    let mut all = vec![memfd];
    all.extend(fds);
    let shim = live.shim()?;
    let answer = shim.call("create container", Request::Create { id: id.as_str().into(), ext }, all).await?;
    let Reply::Created { pid, warnings } = answer.reply else { return Err(shim.unexpected("create container")) };
    for warning in warnings {
        if server.is_news(&warning) {
            tracing::info!(container = %id, warning, "container made, not all as asked (said once)");
        } else {
            tracing::debug!(container = %id, warning, "container made, not all as asked");
        }
    }
    Ok((facts, created_at, pid))
}
