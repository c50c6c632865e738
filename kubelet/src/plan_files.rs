//! What manifests would do, without doing it: the pure entry behind `berth plan FILE|DIR`. Reads the named files only.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;

use crate::objects::{LocalObjects, Object, ObjectName};
use crate::pod::{CONFIG_SEEN, FullName};
use crate::source::manifest::{is_manifest_name, read_manifest};
use crate::source::references::Reference;
use crate::source::static_pod::Origin;
use crate::volume::bindings::Bindings;

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

/// One file after the other.
#[derive(Default)]
struct Reader {
    report: PlanReport,
    owners: BTreeMap<FullName, PathBuf>,
    objects: BTreeMap<ObjectName, (PathBuf, Object)>,
    references: Vec<(String, Reference)>,
    sysctls: Vec<String>,
    node: String,
}

/// The node that manifests are read for.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlanNode<'a> {
    /// Its name.
    pub name: &'a str,
    /// The folder of its manifests: what a file refers to may stand there.
    pub manifests: Option<&'a Path>,
    /// Unsafe sysctls that its pods may set.
    pub allowed_unsafe_sysctls: &'a [String],
}

/// Reads manifests (files, or folders of them) as the file source of the node would.
pub fn plan_files(paths: &[PathBuf], node: PlanNode<'_>) -> PlanReport {
    let node_name = node.name.to_lowercase();
    let mut reader = Reader { sysctls: node.allowed_unsafe_sysctls.to_vec(), node: node_name.clone(), ..Reader::default() };
    reader.report.warnings.extend(paths.iter().flat_map(|path| left_out(path)));
    for path in paths.iter().flat_map(|path| files_of(path)) {
        match fs::read(&path) {
            Ok(bytes) => reader.read(&path, &bytes, &node_name),
            Err(e) => reader.report.errors.push(format!("{}: {e}", path.display())),
        }
    }
    for path in node.manifests.into_iter().filter(|folder| folder.is_dir()).flat_map(files_of) {
        let bytes = fs::read(&path).unwrap_or_default();
        let manifest = read_manifest(&bytes, &origin(&path, &node_name), &[]);
        for object in manifest.objects {
            reader.objects.entry(object.name()).or_insert_with(|| (path.clone(), object));
        }
    }
    reader.finish()
}

fn origin<'a>(path: &'a Path, node_name: &'a str) -> Origin<'a> {
    Origin { path, node_name, seen: Timestamp::UNIX_EPOCH, allowed_unsafe_sysctls: &[] }
}

impl Reader {
    fn read(&mut self, path: &Path, bytes: &[u8], node_name: &str) {
        let allowed_unsafe_sysctls = &self.sysctls;
        let manifest = read_manifest(bytes, &Origin { allowed_unsafe_sysctls, ..origin(path, node_name) }, &[]);
        self.report.warnings.extend(manifest.warnings);
        self.report.errors.extend(manifest.errors);
        self.references.extend(manifest.references);
        for object in manifest.objects {
            let name = object.name();
            match self.objects.entry(name.clone()) {
                Entry::Vacant(free) => _ = free.insert((path.to_owned(), object)),
                Entry::Occupied(taken) => self.report.errors.push(twice(path, &name.to_string(), &taken.get().0)),
            }
        }
        for pod in manifest.pods {
            let name = pod.full_name();
            // A time that belongs to a running source; a plan of the same files is always the same text.
            let mut pod = Arc::unwrap_or_clone(pod.pod);
            pod.metadata.annotations.get_or_insert_default().remove(CONFIG_SEEN);
            if let Some(owner) = self.owners.get(&name) {
                self.report.errors.push(twice(path, &format!("pod {name}"), owner));
                continue;
            }
            self.owners.insert(name, path.to_owned());
            self.report.pods.push((path.to_owned(), pod));
        }
    }

    fn finish(mut self) -> PlanReport {
        let objects = LocalObjects::default();
        objects.replace(self.objects.values().map(|(_, object)| object.clone()).collect());
        // As on a node where nothing is bound yet.
        let bindings = Bindings::default();
        for (place, Reference { path, object, key, needed }) in &self.references {
            let missing = match (self.objects.get(object), key) {
                (None, _) => format!("no file has {object}"),
                (Some((_, held)), Some(key)) if !held.has_key(key) => format!("{object} has no key {key}"),
                (Some((_, Object::PersistentVolumeClaim(_))), _) => {
                    match bindings.volume_of(&object.namespace, &object.name, &objects, &self.node) {
                        Err(why) => why,
                        Ok(_) => continue,
                    }
                }
                _ => continue,
            };
            match needed {
                true => self.report.errors.push(format!("{place}: {path}: {missing}, and the pod waits for it")),
                false => self.report.warnings.push(format!("{place}: {path}: {missing}")),
            }
        }
        self.report
    }
}

/// Which of two files has a name the agent decides by what it met before: that is not to be seen here.
fn twice(path: &Path, name: &str, other: &Path) -> String {
    let (path, other) = (path.display(), other.display());
    format!("{path}: {name} is also defined by {other}: the file that an agent already has it from keeps it, else the latter")
}

/// What in a folder looks like a manifest by its name and is none that is read, and why.
fn left_out(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for path in fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
        let said = |why: &str| format!("{}: {why}", path.display());
        let lower = PathBuf::from(path.file_name().unwrap_or_default().to_ascii_lowercase());
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() && !is_manifest_name(&path) && is_manifest_name(&lower) => {
                found.push(said("not read: its name has to end in .yaml, .yml or .json, in lower case"));
            }
            Ok(metadata) if !metadata.is_file() && is_manifest_name(&path) => found.push(said("not a regular file: skipped")),
            Err(error) if is_manifest_name(&path) => found.push(said(&format!("skipped: {error}"))),
            _ => {}
        }
    }
    found.sort();
    found
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

    fn on<'a>(name: &'a str, manifests: Option<&'a Path>) -> PlanNode<'a> {
        PlanNode { name, manifests, ..PlanNode::default() }
    }

    #[test]
    fn a_claim_that_no_volume_fits_is_an_error_and_an_allowed_sysctl_is_none() {
        let root = tempfile::tempdir().unwrap();
        let claim = "{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {name: data}, spec: {accessModes: [ReadWriteOnce], \
                     storageClassName: \"\", resources: {requests: {storage: 1Gi}}}}";
        let volume = "{apiVersion: v1, kind: PersistentVolume, metadata: {name: disk}, spec: {accessModes: [ReadWriteOnce], \
                      capacity: {storage: 2Gi}, hostPath: {path: /srv}}}";
        let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec:\n  securityContext: {sysctls: [{name: net.core.somaxconn, value: \"9\"}]}\n  \
                   volumes: [{name: v, persistentVolumeClaim: {claimName: data}}]\n  \
                   containers: [{name: c, image: i, volumeMounts: [{name: v, mountPath: /v}]}]\n";
        fs::write(root.path().join("a.yaml"), format!("{pod}---\n{claim}\n")).unwrap();
        let sysctls = ["net.core.*".to_owned()];
        let node = PlanNode { name: "n", allowed_unsafe_sysctls: &sysctls, ..PlanNode::default() };
        let errors = plan_files(&[root.path().to_owned()], node).errors;
        assert!(
            errors.len() == 1 && errors[0].contains("PVC is not bound") && errors[0].ends_with("the pod waits for it"),
            "{errors:?}"
        );
        fs::write(root.path().join("v.yaml"), volume).unwrap();
        assert_eq!(plan_files(&[root.path().to_owned()], node).errors, [""; 0]);
        assert!(plan_files(&[root.path().to_owned()], on("n", None)).errors[0].contains("somaxconn"));
    }

    #[test]
    fn a_folder_is_planned_file_by_file_with_errors_and_warnings() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(root.path().join(name), text).unwrap();
        write("a.yaml", POD);
        write("b.yml", POD);
        write("c.json", "{\"apiVersion\": \"v1\", \"kind\": \"Service\"}");
        write(".hidden.yaml", "broken: [");
        write("readme.txt", "not a manifest");
        let report = plan_files(&[root.path().to_owned()], on("Edge", None));
        assert_eq!(report.pods.len(), 1);
        assert_eq!(report.pods[0].1.metadata.name.as_deref(), Some("web-edge"));
        assert_eq!(crate::pod::annotation(&report.pods[0].1, CONFIG_SEEN), None, "a plan carries no time");
        let file = |name: &str| root.path().join(name).display().to_string();
        assert_eq!(
            report.errors,
            [
                twice(Path::new(&file("b.yml")), "pod default/web-edge", Path::new(&file("a.yaml"))),
                format!(
                    "{}:1: v1 Service has no effect: it does not run on a node, only Pod, ConfigMap, Secret, ServiceAccount, \
                     PersistentVolume, PersistentVolumeClaim, StorageClass, CSIDriver, RuntimeClass, PriorityClass and List",
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
        let report = plan_files(&[samples], on("edge-1", None));
        assert_eq!((report.errors, report.warnings), (Vec::new(), Vec::new()));
        assert!(!report.pods.is_empty());
    }

    #[test]
    fn a_missing_object_is_an_error_where_the_pod_waits_for_it() {
        let root = tempfile::tempdir().unwrap();
        let (folder, file) = (root.path().join("node"), root.path().join("a.yaml"));
        fs::create_dir(&folder).unwrap();
        let spec = "containers: [{name: c, image: i, volumeMounts: [{name: v, mountPath: /v}]}]\n  imagePullSecrets: [{name: s}]\n  volumes:\n  - {name: v, configMap: {name: m}}\n";
        fs::write(&file, format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: web}}\nspec:\n  {spec}")).unwrap();
        let report = plan_files(std::slice::from_ref(&file), on("n", Some(&folder)));
        let at = file.display();
        let error = format!("{at}:8: spec.volumes[0].configMap.name: no file has ConfigMap default/m, and the pod waits for it");
        assert_eq!(report.errors, [error]);
        assert_eq!(report.warnings, [format!("{at}:6: spec.imagePullSecrets[0].name: no file has Secret default/s")]);
        fs::write(folder.join("m.yaml"), "{apiVersion: v1, kind: ConfigMap, metadata: {name: m}}").unwrap();
        assert_eq!(plan_files(&[file], on("n", Some(&folder))).errors, [""; 0]);
    }

    #[test]
    fn a_missing_key_and_a_second_object_are_told_and_an_unused_volume_is_no_error() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(root.path().join(name), text).unwrap();
        let env = |key: &str| format!("{{name: A, valueFrom: {{configMapKeyRef: {{name: m, key: {key}}}}}}}");
        write(
            "a.yaml",
            &format!(
                "{{apiVersion: v1, kind: Pod, metadata: {{name: web}}, spec: {{volumes: [{{name: v, secret: {{secretName: none}}}}], \
                 containers: [{{name: c, image: i, env: [{}, {}]}}]}}}}",
                env("there"),
                env("gone")
            ),
        );
        write("m.yaml", "{apiVersion: v1, kind: ConfigMap, metadata: {name: m}, data: {there: x}}");
        write("n.yaml", "{apiVersion: v1, kind: ConfigMap, metadata: {name: m}}");
        let report = plan_files(&[root.path().to_owned()], on("n", None));
        let (first, second) = (root.path().join("m.yaml"), root.path().join("n.yaml"));
        assert_eq!(report.errors[0], twice(&second, "ConfigMap default/m", &first));
        assert!(report.errors.len() == 2, "{:?}", report.errors);
        assert!(
            report.errors[1].ends_with("ConfigMap default/m has no key gone, and the pod waits for it"),
            "{:?}",
            report.errors
        );
        assert!(
            report.warnings.len() == 1 && report.warnings[0].ends_with("no file has Secret default/none"),
            "{:?}",
            report.warnings
        );
    }

    #[test]
    fn what_looks_like_a_manifest_and_is_not_read_is_told() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("x.YAML"), POD).unwrap();
        fs::write(root.path().join("readme.txt"), "no manifest").unwrap();
        fs::create_dir(root.path().join("f.yaml")).unwrap();
        std::os::unix::fs::symlink("none", root.path().join("l.yaml")).unwrap();
        let warnings = plan_files(&[root.path().to_owned()], on("n", None)).warnings;
        let of = |name: &str| warnings.iter().find(|w| w.starts_with(&root.path().join(name).display().to_string())).unwrap();
        assert_eq!(warnings.len(), 3, "{warnings:?}");
        assert!(of("f.yaml").ends_with("not a regular file: skipped") && of("l.yaml").contains("skipped: No such file"));
        assert!(of("x.YAML").contains("in lower case"));
    }

    #[test]
    fn a_missing_file_is_an_error() {
        let report = plan_files(&[PathBuf::from("/nonexistent/x.yaml")], on("n", None));
        assert!(report.errors[0].starts_with("/nonexistent/x.yaml: No such file"));
    }
}
