//! Volumes as users have them, with the real node: data that outlives its pods, secrets that no disk sees, and nothing left behind.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use berth_e2e::node::{Berth, Half};
use berth_e2e::{SOON, image};
use berth_testkit::{Sandbox, report_measured, wait_until};

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");

/// Files below a folder whose content has the text; what is on another filesystem is not looked at.
fn holding(folder: &Path, text: &[u8], found: &mut Vec<PathBuf>) {
    let device = fs::metadata(folder).unwrap().dev();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let (path, Ok(metadata)) = (entry.path(), entry.metadata()) else { continue };
        if metadata.is_dir() && metadata.dev() == device {
            holding(&path, text, found);
        } else if metadata.is_file() && fs::read(&path).is_ok_and(|bytes| bytes.windows(text.len()).any(|part| part == text)) {
            found.push(path);
        }
    }
}

const SECRET_POD: &str = "
apiVersion: v1
kind: Secret
metadata: {name: key}
stringData: {password: correct-horse-battery}
---
apiVersion: v1
kind: Pod
metadata: {name: secret}
spec:
  terminationGracePeriodSeconds: 0
  volumes:
  - {name: key, secret: {secretName: key, defaultMode: 0400}}
  - {name: all, projected: {sources: [{secret: {name: key}}]}}
  containers:
  - name: app
    image: IMAGE
    command: [sh, -c, 'exec sleep 100000']
    env: [{name: KEY, valueFrom: {secretKeyRef: {name: key, key: password}}}]
    volumeMounts: [{name: key, mountPath: /key}, {name: all, mountPath: /all}]
";

#[test]
fn a_secret_in_a_volume_or_the_environment_reaches_a_pod_in_time_and_no_disk() {
    Sandbox::new().shared_root().test(|| {
        let berth = Berth::start(Half::Node, WEB);
        let manifest = SECRET_POD.replace("IMAGE", image::BUSYBOX_IMAGE);
        berth.write_manifest("secret.yaml", &manifest);
        let pod = berth.wait_running("secret");
        let run = |command: &str| berth.run(&["exec", "secret-e2e", "--", "sh", "-c", command]);
        assert_eq!(run("cat /key/password /all/password"), "correct-horse-batterycorrect-horse-battery");
        assert_eq!(run("echo $KEY").trim(), "correct-horse-battery");
        let begun = Instant::now();
        berth.write_manifest("secret.yaml", &manifest.replace("correct-horse-battery", "staple-of-the-horse"));
        assert!(wait_until(SOON, || run("cat /key/password /all/password") == "staple-of-the-horsestaple-of-the-horse"));
        report_measured(&format!("edit of a Secret to its volumes: {:?}", begun.elapsed()));
        let after = berth.wait_running("secret");
        assert_eq!(after["status"]["containerStatuses"][0]["containerID"], pod["status"]["containerStatuses"][0]["containerID"]);
        assert_eq!(after["status"]["containerStatuses"][0]["restartCount"], 0);
        for secret in ["correct-horse-battery", "staple-of-the-horse"] {
            let mut found = Vec::new();
            for folder in ["root", "kubelet", "logs", "links", "agent.log"].map(|name| berth.dir.path().join(name)) {
                if folder.is_dir() {
                    holding(&folder, secret.as_bytes(), &mut found);
                } else if fs::read_to_string(&folder).is_ok_and(|text| text.contains(secret)) {
                    found.push(folder);
                }
            }
            // The accepted manifest is the manifest's own copy, for a start with a broken file.
            found.retain(|path| !path.starts_with(berth.dir.path().join("kubelet/static-pods")));
            assert!(found.is_empty(), "{secret} is on disk: {found:?}");
        }
        berth.finish();
    });
}

const CLAIM_POD: &str = "
apiVersion: v1
kind: PersistentVolume
metadata: {name: disk}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  storageClassName: local
  local: {path: DISK}
  nodeAffinity:
    required:
      nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [e2e]}]}]
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data}
spec: {accessModes: [ReadWriteOnce], storageClassName: local, resources: {requests: {storage: 500Mi}}}
---
apiVersion: v1
kind: Pod
metadata: {name: claim}
spec:
  terminationGracePeriodSeconds: 0
  securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: 4000}
  volumes: [{name: v, persistentVolumeClaim: {claimName: data}}, {name: mem, emptyDir: {medium: Memory, sizeLimit: 1Mi}}]
  containers:
  - name: app
    image: IMAGE
    command: [sh, -c, 'date +%N >> /data/starts; exec sleep 100000']
    volumeMounts: [{name: v, mountPath: /data}, {name: v, mountPath: /sub, subPath: deep/er}, {name: mem, mountPath: /mem}]
";

#[test]
fn a_claims_data_outlives_its_pods_and_agents_and_nothing_else_is_left() {
    Sandbox::new().shared_root().test(|| {
        let mut berth = Berth::start(Half::Node, WEB);
        let disk = berth.dir.dir("disk");
        let manifest = CLAIM_POD.replace("IMAGE", image::BUSYBOX_IMAGE).replace("DISK", &disk.to_string_lossy());
        berth.write_manifest("claim.yaml", &manifest);
        berth.wait_running("claim");
        let starts = || fs::read_to_string(disk.join("starts")).unwrap_or_default().lines().count();
        assert!(wait_until(SOON, || starts() == 1), "the pod's user may write by its group");
        berth.run(&["exec", "claim-e2e", "--", "sh", "-c", "echo kept > /sub/file"]);
        assert_eq!(fs::read_to_string(disk.join("deep/er/file")).unwrap(), "kept\n");
        berth.kill_agent();
        berth.launch();
        berth.wait_running("claim");
        assert_eq!(starts(), 1);
        // Killed while its pod ends: the next agent takes down what is there.
        berth.remove_manifest("claim.yaml");
        let ends = |pod: &serde_json::Value| pod["metadata"]["deletionTimestamp"].is_string();
        assert!(wait_until(SOON, || berth.pods().iter().all(ends)));
        berth.kill_agent();
        berth.launch();
        assert!(wait_until(SOON, || berth.pods().is_empty()), "{:?}", berth.pods());
        let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(
            wait_until(SOON, || !mounts().contains("kubernetes.io~") && !mounts().contains("volume-subpaths")),
            "{}",
            mounts()
        );
        assert_eq!((starts(), fs::read_to_string(disk.join("deep/er/file")).unwrap().as_str()), (1, "kept\n"));
        berth.write_manifest("claim.yaml", &manifest);
        berth.wait_running("claim");
        assert!(wait_until(SOON, || starts() == 2), "the same disk");
        berth.finish();
    });
}
