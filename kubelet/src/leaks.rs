//! What of a kubelet is on the machine without a pod that owns it: folders, mounts, staged volumes. Changes nothing.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::source::accepted::AcceptedStore;
use crate::volume::{self, csi, mounts};

/// One line for each. `running` are the UIDs of the pods that a kubelet has, where one runs; pods of accepted manifests are owners
/// too. What other kubelets have in the same folders is theirs. Blocking.
pub fn leaks(kubelet_root: &Path, running: &[String]) -> Vec<String> {
    let accepted = AcceptedStore::below(kubelet_root).load();
    let wanted = accepted.iter().flat_map(|file| &file.pods).filter_map(|pod| pod.pod.metadata.uid.clone());
    let owners: BTreeSet<String> = running.iter().cloned().chain(wanted).collect();
    let mut lines = Vec::new();
    let pods = fs::read_dir(kubelet_root.join("pods")).into_iter().flatten().flatten();
    let orphans = pods.filter(|pod| !owners.contains(&*pod.file_name().to_string_lossy()) && volume::is_ours(&pod.path()));
    for folder in orphans.map(|pod| pod.path()) {
        lines.push(format!("pod folder {}", folder.display()));
        lines.extend(mounts::below(&folder).unwrap_or_default().iter().map(|mount| format!("mount {}", mount.display())));
    }
    lines.extend(csi::orphans(kubelet_root).iter().map(|folder| format!("staged volume {}", folder.display())));
    lines.sort();
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_without_a_pod_are_named_unless_they_are_anothers() {
        let root = tempfile::tempdir().unwrap();
        for uid in ["runs", "left", "foreign"] {
            let folder = volume::pod_dir(root.path(), uid);
            fs::create_dir_all(&folder).unwrap();
            if uid != "foreign" {
                volume::mark_ours(&folder).unwrap();
            }
        }
        let lines = leaks(root.path(), &["runs".to_owned()]);
        assert_eq!(lines, [format!("pod folder {}", root.path().join("pods/left").display())]);
    }
}
