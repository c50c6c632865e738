//! Which fields of a v1 Pod berth carries out, and which have no effect on a node without a control plane. A field that the API
//! knows and these tables do not is refused by name; nothing is ignored silently. Extend the
//! table together with the code that carries the field out.

/// `[]` stands for any index, `*` for any key, a trailing `.**` for everything below.
const POD: &[&str] = &[
    "spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.**",
    "spec.nodeSelector.*",
    "apiVersion",
    "kind",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "metadata.labels.*",
    "metadata.annotations.*",
    "metadata.generation",
    "metadata.creationTimestamp",
    "spec.activeDeadlineSeconds",
    "spec.dnsConfig.**",
    "spec.dnsPolicy",
    "spec.hostAliases.**",
    "spec.hostIPC",
    "spec.hostNetwork",
    "spec.hostPID",
    "spec.hostUsers",
    "spec.hostname",
    "spec.imagePullSecrets[].name",
    "spec.hostnameOverride",
    "spec.os.name",
    "spec.overhead.*",
    "spec.readinessGates.**",
    "spec.preemptionPolicy",
    "spec.priority",
    "spec.priorityClassName",
    "spec.resources.limits.*",
    "spec.resources.requests.*",
    "spec.restartPolicy",
    "spec.runtimeClassName",
    "spec.securityContext.fsGroup",
    "spec.securityContext.fsGroupChangePolicy",
    "spec.securityContext.runAsGroup",
    "spec.securityContext.runAsNonRoot",
    "spec.securityContext.runAsUser",
    "spec.securityContext.seLinuxOptions.**",
    "spec.securityContext.seccompProfile.**",
    "spec.securityContext.appArmorProfile.**",
    "spec.securityContext.supplementalGroups[]",
    "spec.securityContext.supplementalGroupsPolicy",
    "spec.securityContext.sysctls.**",
    "spec.serviceAccount",
    "spec.serviceAccountName",
    "spec.setHostnameAsFQDN",
    "spec.shareProcessNamespace",
    "spec.subdomain",
    "spec.terminationGracePeriodSeconds",
    "spec.volumes[].name",
    "spec.volumes[].emptyDir.medium",
    "spec.volumes[].emptyDir.sizeLimit",
    "spec.volumes[].hostPath.**",
    "spec.volumes[].configMap.**",
    "spec.volumes[].secret.**",
    "spec.volumes[].downwardAPI.**",
    "spec.volumes[].image.**",
    "spec.volumes[].persistentVolumeClaim.**",
    "spec.volumes[].nfs.**",
    "spec.volumes[].csi.**",
    "spec.volumes[].projected.defaultMode",
    "spec.volumes[].projected.sources[].configMap.**",
    "spec.volumes[].projected.sources[].secret.**",
    "spec.volumes[].projected.sources[].downwardAPI.**",
];

/// What has no effect where nobody schedules pods and no Services exist, and why. Such a field is warned of, unless it says what
/// happens anyway ([`says_nothing`]).
const MEANINGLESS: &[(&str, &str)] = &[
    ("metadata.finalizers", "nothing else has a part in the pod's end"),
    ("metadata.generateName", "a pod of a file has the name in it"),
    ("metadata.managedFields", "the file is the pod's only author"),
    ("metadata.ownerReferences", "the file is the pod's only owner"),
    ("metadata.resourceVersion", "a file has no versions"),
    ("metadata.selfLink", "a pod of a file has no address"),
    ("spec.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution", "the pod runs where its file is"),
    ("spec.affinity.podAffinity", "the pod runs where its file is"),
    ("spec.affinity.podAntiAffinity", "the pod runs where its file is"),
    ("spec.automountServiceAccountToken", "static pods have no service account"),
    ("spec.enableServiceLinks", "there are no Services to tell of"),
    ("spec.nodeName", "the pod runs where its file is"),
    ("spec.preemptionPolicy", "nothing is scheduled, so nothing is preempted for it"),
    ("spec.schedulerName", "nothing is scheduled"),
    ("spec.schedulingGroup", "nothing is scheduled"),
    ("spec.tolerations", "static pods tolerate everything"),
    ("spec.topologySpreadConstraints", "the pod runs where its file is"),
];

/// Below `spec.containers[]` and `spec.initContainers[]`.
const CONTAINER: &[&str] = &[
    "args[]",
    "command[]",
    "env[].name",
    "env[].value",
    "env[].valueFrom.configMapKeyRef.**",
    "env[].valueFrom.fieldRef.**",
    "env[].valueFrom.fileKeyRef.**",
    "env[].valueFrom.resourceFieldRef.**",
    "env[].valueFrom.secretKeyRef.**",
    "envFrom.**",
    "image",
    "imagePullPolicy",
    "name",
    "ports.**",
    "lifecycle.postStart.**",
    "lifecycle.preStop.**",
    "lifecycle.stopSignal",
    "resizePolicy.**",
    "resources.limits.*",
    "resources.requests.*",
    "restartPolicy",
    "restartPolicyRules.**",
    "securityContext.allowPrivilegeEscalation",
    "securityContext.appArmorProfile.**",
    "securityContext.capabilities.**",
    "securityContext.privileged",
    "securityContext.procMount",
    "securityContext.readOnlyRootFilesystem",
    "securityContext.runAsGroup",
    "securityContext.runAsNonRoot",
    "securityContext.runAsUser",
    "securityContext.seLinuxOptions.**",
    "securityContext.seccompProfile.**",
    "stdin",
    "stdinOnce",
    "terminationMessagePath",
    "terminationMessagePolicy",
    "tty",
    "volumeMounts[].name",
    "volumeMounts[].mountPath",
    "volumeMounts[].readOnly",
    "volumeMounts[].recursiveReadOnly",
    "volumeMounts[].mountPropagation",
    "volumeMounts[].subPath",
    "volumeMounts[].subPathExpr",
    "workingDir",
];

/// Below the same, for each kind of probe; of init containers only sidecars have them.
const PROBE: &[&str] = &[
    "exec.command[]",
    "grpc.port",
    "grpc.service",
    "httpGet.host",
    "httpGet.httpHeaders.**",
    "httpGet.path",
    "httpGet.port",
    "httpGet.scheme",
    "tcpSocket.host",
    "tcpSocket.port",
    "initialDelaySeconds",
    "timeoutSeconds",
    "periodSeconds",
    "successThreshold",
    "failureThreshold",
    "terminationGracePeriodSeconds",
];
const PROBES: &[&str] = &["livenessProbe", "readinessProbe", "startupProbe"];

/// Whether berth carries out the field at `path` (`spec.containers[0].image`). Inner nodes count when something below
/// them does.
pub fn is_supported(path: &str) -> bool {
    let segments = split(path);
    for list in ["containers", "initContainers"] {
        if let Some(below) = strip(&segments, &["spec", list, "[]"]) {
            let probe = below.first().is_some_and(|field| PROBES.contains(field));
            let of_probe = |below: &[&str]| below.is_empty() || PROBE.iter().any(|p| matches(p, below));
            return below.is_empty() || CONTAINER.iter().any(|p| matches(p, below)) || probe && of_probe(&below[1..]);
        }
    }
    let lists = [["spec", "containers"], ["spec", "initContainers"]];
    lists.iter().any(|l| segments == *l) || POD.iter().any(|p| matches(p, &segments))
}

/// Why the field at `path` has no effect on a node without a control plane, where that is so.
pub fn meaningless(path: &str) -> Option<&'static str> {
    let segments = split(path);
    MEANINGLESS.iter().find(|(field, _)| segments == split(field)).map(|(_, why)| *why)
}

/// Whether a field without effect asks for nothing else than what happens: what clusters fill in by default.
pub fn says_nothing(path: &str, value: &serde_json::Value) -> bool {
    match path {
        "spec.automountServiceAccountToken" => value == false,
        "spec.enableServiceLinks" => value == false,
        "spec.schedulerName" => value == "default-scheduler",
        "spec.preemptionPolicy" => value == "PreemptLowerPriority",
        _ => false,
    }
}

/// Every supported field with its full path, for the documentation and `berth explain`-like tools.
pub fn supported() -> impl Iterator<Item = String> {
    let below = |prefix: &'static str, fields: &'static [&'static str]| fields.iter().map(move |f| format!("{prefix}{f}"));
    let probes = |prefix: &'static str| {
        PROBES.iter().flat_map(move |probe| PROBE.iter().map(move |field| format!("{prefix}{probe}.{field}")))
    };
    let lists = ["spec.containers[].", "spec.initContainers[]."];
    let containers = lists.into_iter().flat_map(move |prefix| below(prefix, CONTAINER).chain(probes(prefix)));
    POD.iter().map(|f| (*f).to_owned()).chain(containers)
}

/// Path segments; every index becomes `[]`.
fn split(path: &str) -> Vec<&str> {
    let mut segments = Vec::new();
    for part in path.split('.') {
        let mut rest = part;
        if let Some(bracket) = part.find('[') {
            segments.push(&part[..bracket]);
            rest = &part[bracket..];
            segments.extend(std::iter::repeat_n("[]", rest.matches('[').count()));
        } else {
            segments.push(rest);
        }
    }
    segments
}

fn strip<'a, 'b>(segments: &'a [&'b str], prefix: &[&str]) -> Option<&'a [&'b str]> {
    (segments.len() >= prefix.len() && segments[..prefix.len()] == *prefix).then(|| &segments[prefix.len()..])
}

fn matches(pattern: &str, path: &[&str]) -> bool {
    let (pattern, deep) = match pattern.strip_suffix(".**") {
        Some(p) => (p, true),
        None => (pattern, false),
    };
    let pattern = split(pattern);
    let same = pattern.iter().zip(path).all(|(p, s)| *p == "*" || p == s);
    // Longer than the pattern: only below a `**`, or inside a key with dots of its own (`labels.a.b/c`).
    let open_key = pattern.last() == Some(&"*");
    same && (path.len() <= pattern.len() || deep || open_key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn supported_fields_and_their_parents_pass_and_others_do_not() {
        for path in [
            "spec",
            "spec.containers",
            "spec.containers[0]",
            "spec.containers[12].image",
            "spec.initContainers[0].env[1].valueFrom",
            "spec.containers[0].env[1].valueFrom.fieldRef.fieldPath",
            "spec.containers[0].command[2]",
            "metadata.labels.app.kubernetes.io/name",
            "spec.volumes[0].hostPath.type",
            "spec.containers[0].ports[0].hostPort",
            "spec.containers[0].livenessProbe",
            "spec.containers[0].readinessProbe.httpGet.httpHeaders[0].name",
        ] {
            assert!(is_supported(path), "{path}");
        }
        for path in [
            "spec.schedulingGates",
            "spec.volumes[0].iscsi",
            "spec.volumes[0].ephemeral",
            "spec.volumes[0].projected.sources[0].serviceAccountToken",
            "spec.containers[0].volumeDevices",
            "spec.containers[0].livenessProbe.grpc.nothing",
            "spec.initContainers[0].nothing",
            "spec.ephemeralContainers",
            "metadata.nothing",
            "spec.containers[0].image.nested",
        ] {
            assert!(!is_supported(path), "{path}");
        }
    }

    #[test]
    fn the_table_lists_init_containers_too() {
        assert!(supported().any(|f| f == "spec.initContainers[].image"));
    }
}
