//! A container as the runtime's configuration. Pure: mounts, image and addresses come in ready.

use std::path::Path;

use berth_cri_api::v1 as cri;
use k8s_openapi::api::core::v1::{Container, Pod, VolumeMount};

use crate::config::LogLimits;
use crate::cri::keys;
use crate::env::{Variable, expand, expand_all};
use crate::logs::relative_log_path;
use crate::node::Capacity;
use crate::plan::container_hash;
use crate::pod;
use crate::resources::container_resources;
use crate::sandbox_config::identity_labels;
use crate::security::{ImageUser, container_security};

/// What a container's configuration needs besides its spec.
#[derive(Clone, Copy, Debug)]
pub struct ContainerContext<'a> {
    /// Restart count.
    pub attempt: u32,
    /// The image as found.
    pub image_ref: &'a str,
    /// The image's user.
    pub image_user: &'a ImageUser,
    /// The environment.
    pub variables: &'a [Variable],
    /// The machine.
    pub capacity: &'a Capacity,
    /// Where named seccomp profiles are.
    pub seccomp_root: &'a Path,
    /// Log rotation.
    pub log_limits: LogLimits,
    /// Mounts of volumes, hosts file and termination message, ready.
    pub mounts: &'a [cri::Mount],
}

/// The configuration of one container, or why there is none.
pub fn container_config(
    pod: &Pod,
    container: &Container,
    context: &ContainerContext<'_>,
) -> Result<cri::ContainerConfig, String> {
    let variables = context.variables;
    let security = container_security(pod, container, context.image_user, context.seccomp_root, &context.capacity.thermal_paths)?;
    let image = container.image.clone().unwrap_or_default();
    let mut labels: std::collections::HashMap<_, _> = identity_labels(pod).into();
    labels.insert(keys::CONTAINER_NAME.to_owned(), container.name.clone());
    Ok(cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: container.name.clone(), attempt: context.attempt }),
        image: Some(cri::ImageSpec {
            image: context.image_ref.to_owned(),
            user_specified_image: image,
            annotations: pod.metadata.annotations.iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect(),
            ..Default::default()
        }),
        command: expand_all(container.command.as_ref(), variables)?,
        args: expand_all(container.args.as_ref(), variables)?,
        working_dir: container.working_dir.clone().unwrap_or_default(),
        envs: variables.iter().map(|(key, value)| cri::KeyValue { key: key.clone(), value: value.clone() }).collect(),
        mounts: context.mounts.to_vec(),
        labels,
        annotations: annotations(pod, container, context),
        log_path: relative_log_path(&container.name, context.attempt),
        stdin: container.stdin == Some(true),
        stdin_once: container.stdin_once == Some(true),
        tty: container.tty == Some(true),
        linux: Some(cri::LinuxContainerConfig {
            resources: Some(container_resources(pod, container, context.capacity)),
            security_context: Some(security),
        }),
        ..Default::default()
    })
}

fn annotations(pod: &Pod, container: &Container, context: &ContainerContext<'_>) -> std::collections::HashMap<String, String> {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    let mut annotations: std::collections::HashMap<String, String> = [
        (keys::CONTAINER_HASH, container_hash(container)),
        (keys::RESTART_COUNT, context.attempt.to_string()),
        (keys::MESSAGE_PATH, text(&container.termination_message_path)),
        (keys::MESSAGE_POLICY, text(&container.termination_message_policy)),
        (keys::LOG_MAX_BYTES, context.log_limits.max_bytes.to_string()),
        (keys::LOG_MAX_FILES, context.log_limits.max_files.to_string()),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value))
    .collect();
    if let Some(grace) = pod::spec(pod).termination_grace_period_seconds {
        annotations.insert(keys::GRACE.to_owned(), grace.to_string());
    }
    if let Some(hook) = container.lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref()) {
        annotations.insert(keys::PRE_STOP.to_owned(), serde_json::to_string(hook).unwrap_or_default());
    }
    if let Some(ports) = container.ports.as_ref().filter(|p| !p.is_empty()) {
        let json = serde_json::to_string(ports).unwrap_or_default();
        annotations.insert("io.kubernetes.container.ports".to_owned(), json);
    }
    annotations
}

/// What of a volume a container gets.
#[derive(Clone, Debug, PartialEq)]
pub enum MountSource {
    /// A path of the host.
    Path(String),
    /// A path of the host that no container may write, whatever the mount says.
    ReadOnlyPath(String),
    /// An image, or a folder of one.
    Image {
        /// Its id.
        image: cri::ImageSpec,
        /// The folder; empty for all of it.
        sub_path: String,
    },
}

/// The mounts of a container's volumes: `source` gives each mount's source, by its place among the container's.
pub fn volume_mounts(
    container: &Container,
    mut source: impl FnMut(usize, &VolumeMount) -> Result<Option<MountSource>, String>,
) -> Result<Vec<cri::Mount>, String> {
    let mut mounts = Vec::new();
    for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
        let source = source(index, mount)?
            .ok_or_else(|| format!("cannot find volume {:?} to mount into container {:?}", mount.name, container.name))?;
        let container_path = match mount.mount_path.starts_with('/') {
            true => mount.mount_path.clone(),
            false => format!("/{}", mount.mount_path),
        };
        let propagation = match mount.mount_propagation.as_deref() {
            Some("HostToContainer") => cri::MountPropagation::PropagationHostToContainer,
            Some("Bidirectional") => cri::MountPropagation::PropagationBidirectional,
            _ => cri::MountPropagation::PropagationPrivate,
        };
        // An image is never written, and runtimes refuse to mount one otherwise.
        let always = matches!(source, MountSource::ReadOnlyPath(_) | MountSource::Image { .. });
        let readonly = always || mount.read_only == Some(true);
        let (host_path, image, image_sub_path) = match source {
            MountSource::Path(path) | MountSource::ReadOnlyPath(path) => (path, None, String::new()),
            MountSource::Image { image, sub_path } => (String::new(), Some(image), sub_path),
        };
        mounts.push(cri::Mount {
            container_path,
            host_path,
            image,
            image_sub_path,
            readonly,
            propagation: propagation.into(),
            recursive_read_only: matches!(mount.recursive_read_only.as_deref(), Some("Enabled" | "IfPossible")),
            ..Default::default()
        });
    }
    Ok(mounts)
}

/// Fits mounts to a runtime that cannot make them read-only with everything below them: where the container wants it if
/// possible it goes without, where it demands it the container may not start.
pub fn without_recursive_read_only(container: &Container, mounts: &mut [cri::Mount]) -> Result<(), String> {
    let demanded = container.volume_mounts.iter().flatten().find(|m| m.recursive_read_only.as_deref() == Some("Enabled"));
    if let Some(mount) = demanded {
        return Err(format!("volume mount {:?}: the runtime does not support recursiveReadOnly: Enabled", mount.name));
    }
    mounts.iter_mut().for_each(|mount| mount.recursive_read_only = false);
    Ok(())
}

/// Whether the container mounts something of its own at `path`.
pub fn mounts_at(container: &Container, path: &str) -> bool {
    container.volume_mounts.iter().flatten().any(|m| m.mount_path.trim_end_matches('/') == path)
}

/// `$(VAR)` in one text with literal variables only, as probes and hooks see them.
pub fn expand_literal(container: &Container, text: &str) -> String {
    let literal = container.env.iter().flatten().filter_map(|e| Some((e.name.as_str(), e.value.as_deref()?)));
    expand(text, &literal.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{defaults::apply_defaults, parse::parse_manifest};

    const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, uid: u1}
spec:
  terminationGracePeriodSeconds: 7
  volumes: [{name: data}, {name: host, hostPath: {path: /srv}}]
  containers:
  - name: c
    image: web:1
    command: [/bin/web, --port=$(PORT)]
    args: [$(MISSING)]
    workingDir: /w
    tty: true
    env: [{name: PORT, value: '80'}]
    ports: [{containerPort: 80}]
    volumeMounts:
    - {name: data, mountPath: data}
    - {name: host, mountPath: /srv, readOnly: true, mountPropagation: HostToContainer}
";

    fn pod() -> Pod {
        let mut pod = parse_manifest(POD).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        pod
    }

    #[test]
    fn recursive_read_only_is_demanded_or_only_wished() {
        let fit = |kind: &str| {
            let mut pod = pod();
            let container = &mut pod.spec.as_mut().unwrap().containers[0];
            container.volume_mounts.as_mut().unwrap()[1].recursive_read_only = Some(kind.to_owned());
            let mut mounts = volume_mounts(container, |_, _| Ok(Some(MountSource::Path("/x".into())))).unwrap();
            assert_eq!(mounts[1].recursive_read_only, kind != "Disabled");
            without_recursive_read_only(container, &mut mounts).map(|()| mounts[1].recursive_read_only)
        };
        assert_eq!(fit("IfPossible"), Ok(false));
        assert_eq!(fit("Disabled"), Ok(false));
        assert!(fit("Enabled").unwrap_err().starts_with("volume mount \"host\": "));
    }

    #[test]
    fn the_configuration_is_the_contracts() {
        let pod = pod();
        let capacity = Capacity::default();
        let context = ContainerContext {
            attempt: 2,
            image_ref: "sha256:abc",
            image_user: &ImageUser::default(),
            variables: &[("PORT".to_owned(), b"80".to_vec())],
            capacity: &capacity,
            seccomp_root: Path::new("/k/seccomp"),
            log_limits: LogLimits::default(),
            mounts: &[],
        };
        let config = container_config(&pod, &pod::spec(&pod).containers[0], &context).unwrap();
        let image = config.image.unwrap();
        assert_eq!((image.image.as_str(), image.user_specified_image.as_str()), ("sha256:abc", "web:1"));
        assert_eq!(config.command, ["/bin/web", "--port=80"]);
        assert_eq!(config.args, ["$(MISSING)"]);
        assert_eq!(config.log_path, "c/2.log");
        assert!(config.tty);
        assert_eq!(config.envs, [cri::KeyValue { key: "PORT".into(), value: b"80".to_vec() }]);
        for (key, value) in [
            (keys::RESTART_COUNT, "2"),
            (keys::MESSAGE_PATH, "/dev/termination-log"),
            (keys::MESSAGE_POLICY, "File"),
            (keys::GRACE, "7"),
            (keys::LOG_MAX_BYTES, "10485760"),
            (keys::LOG_MAX_FILES, "5"),
        ] {
            assert_eq!(config.annotations[key], value, "{key}");
        }
        assert_eq!(config.labels.len(), 4);
        assert_eq!(config.labels[keys::CONTAINER_NAME], "c");
    }

    #[test]
    fn volume_mounts_keep_their_order_and_options() {
        let pod = pod();
        let container = &pod::spec(&pod).containers[0];
        let source = |_, mount: &VolumeMount| {
            let paths = [("data", "/k/data"), ("host", "/srv")];
            Ok(paths.iter().find(|(name, _)| *name == mount.name).map(|(_, path)| MountSource::Path((*path).to_owned())))
        };
        let mounts = volume_mounts(container, source).unwrap();
        assert_eq!((mounts[0].container_path.as_str(), mounts[0].host_path.as_str()), ("/data", "/k/data"));
        assert!(mounts[1].readonly);
        assert_eq!(mounts[1].propagation(), cri::MountPropagation::PropagationHostToContainer);
        let error = volume_mounts(container, |_, _| Ok(None)).unwrap_err();
        assert_eq!(error, "cannot find volume \"data\" to mount into container \"c\"");
    }
}
