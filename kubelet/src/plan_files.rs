//! What manifests would do, without doing it: the pure entry behind `berth plan FILE|DIR`. Reads the named files only.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;

use crate::pod::{CONFIG_SEEN, FullName};
use crate::source::manifest::{is_manifest_name, read_manifest};
use crate::source::static_pod::Origin;

/// What a set of manifest files amounts to.
#[derive(Clone, Debug, Default)]
pub struct PlanReport {
    /// The pods, named, defaulted and with their UIDs, in file order.
    pub pods: Vec<(PathBuf, Pod)>,
    /// Errors, each with `file:line`: what they name would not run.
    pub errors: Vec<String>,
    /// Warnings, each with `file:line`: unknown fields and the like.
    pub warnings: Vec<String>,
}

/// Reads manifests (files, or folders of them) as the file source would for the node `node_name`.
pub fn plan_files(paths: &[PathBuf], node_name: &str) -> PlanReport {
    let mut report = PlanReport::default();
    let mut owners: BTreeMap<FullName, PathBuf> = BTreeMap::new();
    for path in paths.iter().flat_map(|path| files_of(path)) {
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) => {
                report.errors.push(format!("{}: {e}", path.display()));
                continue;
            }
        };
        let origin = Origin {
            path: &path,
            node_name: &node_name.to_lowercase(),
            seen: Timestamp::UNIX_EPOCH,
            allowed_unsafe_sysctls: &[],
        };
        let manifest = read_manifest(&bytes, &origin, &[]);
        report.warnings.extend(manifest.warnings);
        report.errors.extend(manifest.errors);
        for mut pod in manifest.pods {
            let name = pod.full_name();
            // A time that belongs to a running source; a plan of the same files is always the same text.
            pod.pod.metadata.annotations.get_or_insert_default().remove(CONFIG_SEEN);
            match owners.get(&name) {
                Some(owner) => {
                    report.errors.push(format!("{}: pod {name} is already defined by {}", path.display(), owner.display()))
                }
                None => {
                    owners.insert(name, path.clone());
                    report.pods.push((path.clone(), pod.pod));
                }
            }
        }
    }
    report
}

/// The file itself, or the manifests of a folder by name.
fn files_of(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(path) else { return vec![path.to_owned()] };
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| is_manifest_name(p) && p.is_file()).collect();
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str =
        "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec:\n  containers: [{name: c, image: i, imagePullPolcy: x}]\n";

    #[test]
    fn a_folder_is_planned_file_by_file_with_errors_and_warnings() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(root.path().join(name), text).unwrap();
        write("a.yaml", POD);
        write("b.yml", POD);
        write("c.json", "{\"apiVersion\": \"v1\", \"kind\": \"Service\"}");
        write(".hidden.yaml", "broken: [");
        write("readme.txt", "not a manifest");
        let report = plan_files(&[root.path().to_owned()], "Edge");
        assert_eq!(report.pods.len(), 1);
        assert_eq!(report.pods[0].1.metadata.name.as_deref(), Some("web-edge"));
        assert_eq!(crate::pod::annotation(&report.pods[0].1, CONFIG_SEEN), None, "a plan carries no time");
        let file = |name: &str| root.path().join(name).display().to_string();
        assert_eq!(
            report.errors,
            [
                format!("{}: pod default/web-edge is already defined by {}", file("b.yml"), file("a.yaml")),
                format!(
                    "{}:1: v1 Service does not run on a node: only Pod, ConfigMap, Secret, ServiceAccount, PersistentVolume, \
                 PersistentVolumeClaim, StorageClass, CSIDriver, RuntimeClass, PriorityClass and List",
                    file("c.json")
                ),
            ]
        );
        let warning = "unknown field spec.containers[0].imagePullPolcy: it has no effect";
        assert_eq!(report.warnings[0], format!("{}:5: {warning}", file("a.yaml")));
    }

    #[test]
    fn the_sample_manifests_have_neither_errors_nor_warnings() {
        let samples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests");
        let report = plan_files(&[samples], "edge-1");
        assert_eq!((report.errors, report.warnings), (Vec::new(), Vec::new()));
        assert!(!report.pods.is_empty());
    }

    #[test]
    fn a_missing_file_is_an_error() {
        let report = plan_files(&[PathBuf::from("/nonexistent/x.yaml")], "n");
        assert!(report.errors[0].starts_with("/nonexistent/x.yaml: No such file"));
    }
}
