//! The rules of volumes: names, kinds, and where their files may lie.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{DownwardAPIVolumeFile, KeyToPath, PodSpec, Volume};

use super::env::{validate_field, validate_resource_field};
use super::{Problems, is_dns_label, validate_amount};
use crate::quantity::Amount;
use crate::volume::atomic::is_inside;
use crate::volume::payload::is_volume_field;

/// The volumes of a pod; their names.
pub(super) fn validate_volumes<'a>(spec: &'a PodSpec, problems: &mut Problems) -> BTreeSet<&'a str> {
    let mut names = BTreeSet::new();
    for (i, volume) in spec.volumes.iter().flatten().enumerate() {
        let path = format!("spec.volumes[{i}]");
        if !is_dns_label(&volume.name) {
            problems.add(format!("{path}.name"), format!("{:?} is not a DNS label", volume.name));
        }
        if !names.insert(volume.name.as_str()) {
            problems.add(format!("{path}.name"), format!("{:?} is used twice", volume.name));
        }
        validate_volume(&path, volume, problems);
    }
    names
}

fn validate_volume(path: &str, volume: &Volume, problems: &mut Problems) {
    let kinds = [
        volume.empty_dir.is_some(),
        volume.host_path.is_some(),
        volume.config_map.is_some(),
        volume.secret.is_some(),
        volume.downward_api.is_some(),
        volume.projected.is_some(),
        volume.image.is_some(),
        volume.persistent_volume_claim.is_some(),
        volume.nfs.is_some(),
        volume.csi.is_some(),
    ];
    if kinds.iter().filter(|set| **set).count() > 1 {
        problems.add(path, "may not specify more than one volume type");
    }
    validate_files(path, volume, problems);
    if let Some(empty_dir) = &volume.empty_dir {
        let medium = empty_dir.medium.as_deref();
        let sized = medium.and_then(|m| m.strip_prefix("HugePages-")).is_some_and(|size| Amount::parse(size).is_ok());
        if !sized {
            problems.one_of(&format!("{path}.emptyDir.medium"), medium, &["", "Memory", "HugePages"]);
        }
        if let Some(limit) = &empty_dir.size_limit {
            validate_amount(&format!("{path}.emptyDir.sizeLimit"), &limit.0, problems);
        }
    }
    validate_persistent(path, volume, problems);
    if let Some(host_path) = &volume.host_path {
        let path = format!("{path}.hostPath");
        if !host_path.path.starts_with('/') {
            problems.add(format!("{path}.path"), "must be an absolute path");
        }
        if host_path.path.split('/').any(|part| part == "..") {
            problems.add(format!("{path}.path"), "must not contain '..'");
        }
        let types = ["", "DirectoryOrCreate", "Directory", "FileOrCreate", "File", "Socket", "CharDevice", "BlockDevice"];
        problems.one_of(&format!("{path}.type"), host_path.type_.as_deref(), &types);
    }
}

/// Volumes that outlive the pod.
fn validate_persistent(path: &str, volume: &Volume, problems: &mut Problems) {
    if let Some(claim) = &volume.persistent_volume_claim {
        required(&format!("{path}.persistentVolumeClaim.claimName"), &claim.claim_name, problems);
    }
    if let Some(nfs) = &volume.nfs {
        required(&format!("{path}.nfs.server"), &nfs.server, problems);
        if !nfs.path.starts_with('/') {
            problems.add(format!("{path}.nfs.path"), "must be an absolute path");
        }
    }
    if let Some(csi) = &volume.csi {
        required(&format!("{path}.csi.driver"), &csi.driver, problems);
    }
}

/// Volumes whose files come from objects or from the pod.
fn validate_files(path: &str, volume: &Volume, problems: &mut Problems) {
    if let Some(image) = &volume.image {
        required(&format!("{path}.image.reference"), image.reference.as_deref().unwrap_or_default(), problems);
        let policy = image.pull_policy.as_deref();
        problems.one_of(&format!("{path}.image.pullPolicy"), policy, &["Always", "IfNotPresent", "Never"]);
    }
    if let Some(source) = &volume.config_map {
        let path = format!("{path}.configMap");
        required(&format!("{path}.name"), &source.name, problems);
        validate_items(&path, source.items.as_deref(), source.default_mode, problems);
    }
    if let Some(source) = &volume.secret {
        let path = format!("{path}.secret");
        required(&format!("{path}.secretName"), source.secret_name.as_deref().unwrap_or_default(), problems);
        validate_items(&path, source.items.as_deref(), source.default_mode, problems);
    }
    if let Some(source) = &volume.downward_api {
        let path = format!("{path}.downwardAPI");
        validate_mode(&format!("{path}.defaultMode"), source.default_mode, problems);
        validate_downward(&path, source.items.as_deref().unwrap_or_default(), problems);
    }
    let Some(projected) = &volume.projected else { return };
    validate_mode(&format!("{path}.projected.defaultMode"), projected.default_mode, problems);
    for (i, part) in projected.sources.iter().flatten().enumerate() {
        let path = format!("{path}.projected.sources[{i}]");
        let kinds = [part.config_map.is_some(), part.secret.is_some(), part.downward_api.is_some()];
        if kinds.iter().filter(|set| **set).count() != 1 {
            problems.add(path.clone(), "must have one of configMap, secret and downwardAPI");
        }
        if let Some(source) = &part.config_map {
            let path = format!("{path}.configMap");
            required(&format!("{path}.name"), &source.name, problems);
            validate_items(&path, source.items.as_deref(), None, problems);
        }
        if let Some(source) = &part.secret {
            let path = format!("{path}.secret");
            required(&format!("{path}.name"), &source.name, problems);
            validate_items(&path, source.items.as_deref(), None, problems);
        }
        if let Some(source) = &part.downward_api {
            validate_downward(&format!("{path}.downwardAPI"), source.items.as_deref().unwrap_or_default(), problems);
        }
    }
}

fn required(path: &str, name: &str, problems: &mut Problems) {
    if name.is_empty() {
        problems.add(path, "is required");
    }
}

fn validate_mode(path: &str, mode: Option<i32>, problems: &mut Problems) {
    if mode.is_some_and(|mode| !(0..=0o777).contains(&mode)) {
        problems.add(path, "must be between 0 and 0777 (octal)");
    }
}

fn validate_path(path: &str, file: &str, taken: &mut BTreeSet<String>, problems: &mut Problems) {
    if !is_inside(file) {
        problems.add(path, format!("{file:?} is not a path inside the volume"));
    }
    if !taken.insert(file.to_owned()) {
        problems.add(path, format!("{file:?} is used twice"));
    }
}

fn validate_items(path: &str, items: Option<&[KeyToPath]>, mode: Option<i32>, problems: &mut Problems) {
    validate_mode(&format!("{path}.defaultMode"), mode, problems);
    let mut taken = BTreeSet::new();
    for (i, item) in items.unwrap_or_default().iter().enumerate() {
        let path = format!("{path}.items[{i}]");
        required(&format!("{path}.key"), &item.key, problems);
        validate_path(&format!("{path}.path"), &item.path, &mut taken, problems);
        validate_mode(&format!("{path}.mode"), item.mode, problems);
    }
}

fn validate_downward(path: &str, items: &[DownwardAPIVolumeFile], problems: &mut Problems) {
    let mut taken = BTreeSet::new();
    for (i, item) in items.iter().enumerate() {
        let path = format!("{path}.items[{i}]");
        validate_path(&format!("{path}.path"), &item.path, &mut taken, problems);
        validate_mode(&format!("{path}.mode"), item.mode, problems);
        if let Some(field) = &item.field_ref {
            validate_field(&format!("{path}.fieldRef"), field, problems);
        }
        match (&item.field_ref, &item.resource_field_ref) {
            (Some(field), None) if is_volume_field(&field.field_path) => {}
            (Some(field), None) => {
                let message = format!("{:?} is not a field that a volume can show", field.field_path);
                problems.add(format!("{path}.fieldRef.fieldPath"), message);
            }
            (None, Some(resource)) => {
                let name = resource.container_name.as_deref().unwrap_or_default();
                required(&format!("{path}.resourceFieldRef.containerName"), name, problems);
                validate_resource_field(&format!("{path}.resourceFieldRef"), resource, problems);
            }
            _ => problems.add(path, "must have one of fieldRef and resourceFieldRef"),
        }
    }
}
