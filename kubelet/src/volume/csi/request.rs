//! What is said to a driver for one volume: found in the PersistentVolume or in the pod, put into CSI's words. Asks nobody.

use std::collections::HashMap;
use std::path::Path;

use k8s_openapi::api::core::v1::{CSIPersistentVolumeSource, CSIVolumeSource, PersistentVolumeSpec, SecretReference, Volume};

use k8s_openapi::api::storage::v1::CSIDriver;

use super::drivers::Driver;
use super::wire::v1::volume_capability::access_mode::Mode;
use super::wire::v1::volume_capability::{AccessMode, AccessType, MountVolume};
use super::wire::v1::{NodePublishVolumeRequest, NodeStageVolumeRequest, VolumeCapability};
use super::{hash, pod_info};
use crate::pod;
use crate::volume::ownership::Ownership;
use crate::volume::{VolumeContext, persistent};

/// A CSI volume of a pod.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::volume) struct CsiVolume {
    /// The PersistentVolume's name, or the volume's own.
    pub(in crate::volume) name: String,
    pub(super) driver: String,
    pub(super) handle: String,
    /// It is the pod's alone and made for it.
    pub(super) ephemeral: bool,
    pub(in crate::volume) read_only: bool,
    fs_type: String,
    attributes: HashMap<String, String>,
    access_mode: String,
    options: Vec<String>,
    stage_secret: Option<SecretReference>,
    publish_secret: Option<SecretReference>,
}

impl CsiVolume {
    /// Of a PersistentVolume.
    pub(in crate::volume) fn persistent(name: &str, source: CSIPersistentVolumeSource, spec: &PersistentVolumeSpec) -> CsiVolume {
        CsiVolume {
            name: name.to_owned(),
            driver: source.driver,
            handle: source.volume_handle,
            ephemeral: false,
            read_only: source.read_only == Some(true),
            fs_type: source.fs_type.unwrap_or_default(),
            attributes: source.volume_attributes.unwrap_or_default().into_iter().collect(),
            access_mode: spec.access_modes.as_ref().and_then(|modes| modes.first().cloned()).unwrap_or_default(),
            options: spec.mount_options.clone().unwrap_or_default(),
            stage_secret: source.node_stage_secret_ref,
            publish_secret: source.node_publish_secret_ref,
        }
    }

    /// Of a pod's own; the driver has to say that it makes such volumes.
    pub(in crate::volume) fn inline(
        context: &VolumeContext<'_>,
        volume: &Volume,
        source: &CSIVolumeSource,
    ) -> Result<CsiVolume, String> {
        let driver = context.objects.csi_driver(&source.driver)?;
        let modes = driver.as_ref().and_then(|d| d.spec.volume_lifecycle_modes.clone()).unwrap_or_default();
        if !modes.iter().any(|mode| mode == "Ephemeral") {
            return Err(format!(
                "volume mode \"Ephemeral\" not supported by driver {} (only supports {modes:?}; its CSIDriver document says so)",
                source.driver
            ));
        }
        let namespace = Some(pod::namespace(context.pod).to_owned());
        let publish_secret = source.node_publish_secret_ref.as_ref();
        Ok(CsiVolume {
            name: volume.name.clone(),
            driver: source.driver.clone(),
            handle: format!("csi-{}", hash(&format!("{}{}", pod::uid(context.pod), volume.name))),
            ephemeral: true,
            read_only: source.read_only == Some(true),
            fs_type: source.fs_type.clone().unwrap_or_default(),
            attributes: source.volume_attributes.clone().unwrap_or_default().into_iter().collect(),
            access_mode: "ReadWriteOnce".to_owned(),
            options: Vec::new(),
            stage_secret: None,
            publish_secret: publish_secret.map(|secret| SecretReference { name: Some(secret.name.clone()), namespace }),
        })
    }

    fn capability(&self, driver: &Driver, context: &VolumeContext<'_>) -> VolumeCapability {
        let mode = match self.access_mode.as_str() {
            "ReadOnlyMany" => Mode::MultiNodeReaderOnly,
            "ReadWriteMany" => Mode::MultiNodeMultiWriter,
            "ReadWriteOncePod" if driver.knows_writers => Mode::SingleNodeSingleWriter,
            _ if driver.knows_writers => Mode::SingleNodeMultiWriter,
            _ => Mode::SingleNodeWriter,
        };
        let group = persistent::ownership(context, self.read_only).filter(|_| driver.gives_to_group);
        let mount = MountVolume {
            fs_type: self.fs_type.clone(),
            mount_flags: self.options.clone(),
            volume_mount_group: group.map(|o| o.group.to_string()).unwrap_or_default(),
        };
        VolumeCapability { access_mode: Some(AccessMode { mode: mode.into() }), access_type: Some(AccessType::Mount(mount)) }
    }

    /// What the attacher says of it; of one that is the pod's alone there is none.
    fn publish_context(&self, context: &VolumeContext<'_>) -> HashMap<String, String> {
        match self.ephemeral {
            true => HashMap::new(),
            false => context.objects.publish_context(&self.driver, &self.handle).into_iter().collect(),
        }
    }

    pub(super) fn stage_request(
        &self,
        driver: &Driver,
        mount: &Path,
        secrets: &Secrets,
        context: &VolumeContext<'_>,
    ) -> NodeStageVolumeRequest {
        NodeStageVolumeRequest {
            volume_id: self.handle.clone(),
            publish_context: self.publish_context(context),
            staging_target_path: mount.to_string_lossy().into_owned(),
            volume_capability: Some(self.capability(driver, context)),
            secrets: secrets.stage.clone(),
            volume_context: self.attributes.clone(),
        }
    }

    pub(super) fn publish_request(
        &self,
        driver: &Driver,
        staged: Option<&Path>,
        target: &Path,
        secrets: &Secrets,
        context: &VolumeContext<'_>,
    ) -> NodePublishVolumeRequest {
        let mut volume_context = self.attributes.clone();
        volume_context.extend(secrets.pod_info.clone());
        NodePublishVolumeRequest {
            volume_id: self.handle.clone(),
            publish_context: self.publish_context(context),
            staging_target_path: staged.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
            target_path: target.to_string_lossy().into_owned(),
            volume_capability: Some(self.capability(driver, context)),
            readonly: self.read_only,
            secrets: secrets.publish.clone(),
            volume_context,
        }
    }

    /// What the kubelet gives the files to, by the driver's `fsGroupPolicy`; nothing where the driver does it.
    pub(super) fn ownership(
        &self,
        driver: &Driver,
        document: Option<&CSIDriver>,
        context: &VolumeContext<'_>,
    ) -> Option<Ownership> {
        let policy = document.and_then(|d| d.spec.fs_group_policy.as_deref()).unwrap_or("ReadWriteOnceWithFSType");
        let wanted = match policy {
            "None" => false,
            "File" => true,
            _ => !self.fs_type.is_empty() && self.access_mode == "ReadWriteOnce",
        };
        persistent::ownership(context, self.read_only).filter(|_| wanted && !driver.gives_to_group && !self.read_only)
    }
}

/// What a volume's calls are given besides what the volume says: Secrets, and what its driver asks to know of the pod.
#[derive(Default)]
pub(super) struct Secrets {
    stage: HashMap<String, String>,
    publish: HashMap<String, String>,
    pod_info: HashMap<String, String>,
}

/// Under which the pod's tokens are handed over.
const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// The life of a token whose request names none, which is the API server's own default.
const TOKEN_SECONDS: i64 = 3600;

/// The tokens that a driver asks for: audience and life of each.
pub(crate) fn token_requests(document: &CSIDriver) -> impl Iterator<Item = (&str, i64)> {
    let requests = document.spec.token_requests.iter().flatten();
    requests.map(|request| (request.audience.as_str(), request.expiration_seconds.unwrap_or(TOKEN_SECONDS)))
}

fn tokens(document: &CSIDriver, context: &VolumeContext<'_>) -> Result<Option<String>, String> {
    let mut tokens = serde_json::Map::new();
    for (audience, seconds) in token_requests(document) {
        let token = context.objects.token(context.pod, audience, seconds)?;
        let entry = serde_json::json!({ "token": token.text, "expirationTimestamp": token.expires.to_string() });
        tokens.insert(audience.to_owned(), entry);
    }
    Ok((!tokens.is_empty()).then(|| serde_json::Value::Object(tokens).to_string()))
}

impl Secrets {
    pub(super) fn of(volume: &CsiVolume, document: Option<&CSIDriver>, context: &VolumeContext<'_>) -> Result<Secrets, String> {
        let read = |what: &str, reference: &Option<SecretReference>| -> Result<HashMap<String, String>, String> {
            let Some(reference) = reference else { return Ok(HashMap::new()) };
            let (namespace, name) = (
                reference.namespace.as_deref().unwrap_or_else(|| pod::namespace(context.pod)),
                reference.name.as_deref().unwrap_or_default(),
            );
            let secret = context
                .objects
                .secret(namespace, name)?
                .ok_or_else(|| format!("fetching {what} {namespace}/{name} failed: secrets {name:?} not found"))?;
            let text =
                |(key, value): (&String, &k8s_openapi::ByteString)| (key.clone(), String::from_utf8_lossy(&value.0).into_owned());
            Ok(secret.data.iter().flatten().map(text).collect())
        };
        let stage = read("NodeStageSecretRef", &volume.stage_secret)?;
        let mut publish = read("NodePublishSecretRef", &volume.publish_secret)?;
        let mut info = HashMap::new();
        if document.is_some_and(|d| d.spec.pod_info_on_mount == Some(true)) {
            info.extend(pod_info(context, volume.ephemeral));
        }
        if let Some(document) = document
            && let Some(tokens) = tokens(document, context)?
        {
            let hidden = document.spec.service_account_token_in_secrets == Some(true);
            let place = if hidden { &mut publish } else { &mut info };
            place.insert(TOKENS.to_owned(), tokens);
        }
        Ok(Secrets { stage, publish, pod_info: info })
    }
}
