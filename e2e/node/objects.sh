# ConfigMaps, Secrets, tokens, service variables and claimed volumes of pods of the API.

# env_of POD: the variables of its container, sorted.
env_of() { k exec "$1" -- env | sort; }
# has_line TEXT: standard input has this line.
has_line() { grep -Fx -- "$1" > /dev/null || { echo "no line: $1"; return 1; }; }
file_is() { same "$(k exec "$1" -- cat "$2")" "$3"; }
# host_file_is POD KIND FILE TEXT: in its volume `v` of this kind, seen from the node and so at once.
host_file_is() { same "$(cat "$WORK/kubelet/pods/$(uid_of "$1")/volumes/kubernetes.io~$2/v/$3")" "$4"; }
waits_with() { same "$(pod_json "$1" '{.status.containerStatuses[0].state.waiting.reason}')" "$2" && pod_json "$1" '{.status.containerStatuses[0].state.waiting.message}' | grep -F -- "$3"; }
event_says() { pod_event "$1" "$2" | grep -F -- "$3"; }
# token_claims TOKEN: its second part.
token_claims() { local part=${1#*.}; part=${part%%.*}; printf '%s' "$part" | tr '_-' '/+' | awk '{ while (length($0) % 4) $0 = $0 "="; print }' | base64 -d; }
SLEEP='trap exit TERM; sleep 1000 & wait'

# object_pod NAME CONTAINER_FIELDS [SPEC_FIELDS]: a container `main` that sleeps, with more fields.
object_pod() {
  create_pod "$1" "{terminationGracePeriodSeconds: 1, containers: [{name: main, image: $BUSYBOX, command: [sh, -c, $(jq -nc --arg c "$SLEEP" '$c')]${2:+, $2}}]${3:+, $3}}"
}

env_from_both() {
  new_namespace
  k create configmap m --from-literal=level=one --from-literal=B=b
  k create secret generic s --from-literal=password=hunter2
  object_pod a "envFrom: [{configMapRef: {name: m}, prefix: P_}, {secretRef: {name: s}}],
    env: [{name: L, valueFrom: {configMapKeyRef: {name: m, key: level}}}, {name: W, valueFrom: {secretKeyRef: {name: s, key: password}}}, {name: X, value: '\$(L)-\$(P_B)'}]"
  within 30 pod_ready a
  local env
  env=$(env_of a)
  for line in P_level=one P_B=b password=hunter2 L=one W=hunter2 X=one-b; do has_line "$line" <<< "$env"; done
}
env_optional() {
  new_namespace
  object_pod a "envFrom: [{configMapRef: {name: none, optional: true}}, {secretRef: {name: none, optional: true}}],
    env: [{name: L, valueFrom: {configMapKeyRef: {name: none, key: level, optional: true}}}, {name: Z, value: z}]"
  within 30 pod_ready a
  local env
  env=$(env_of a)
  has_line Z=z <<< "$env"
  refute grep -q '^L=' <<< "$env"
}
env_missing_map() {
  new_namespace
  object_pod a "envFrom: [{configMapRef: {name: late}}]"
  within 30 waits_with a CreateContainerConfigError 'configmap "late" not found'
  k create configmap late --from-literal=A=now
  # Sooner than a start that failed is tried again by itself, after 10 s.
  within 6 pod_ready a
  env_of a | has_line A=now
}
env_missing_secret() {
  new_namespace
  object_pod a "env: [{name: A, valueFrom: {secretKeyRef: {name: late, key: a}}}]"
  within 30 waits_with a CreateContainerConfigError 'secret "late" not found'
  k create secret generic late --from-literal=b=x
  within 6 waits_with a CreateContainerConfigError "couldn't find key a in Secret $NS/late"
  k patch secret late --type merge -p '{"stringData": {"a": "now"}}'
  within 6 pod_ready a
  env_of a | has_line A=now
}
check "environment from ConfigMaps and Secrets, with prefixes and expansion" env_from_both
check "optional ConfigMaps and Secrets that are missing give no variables" env_optional
check "a container waits for its ConfigMap and starts within seconds of its creation" env_missing_map
check "a container waits for its Secret, then for the key in it" env_missing_secret

map_volume() {
  new_namespace
  k create configmap m --from-literal=level=one --from-literal=other=x
  object_pod a "volumeMounts: [{name: v, mountPath: /v}]" "volumes: [{name: v, configMap: {name: m, items: [{key: level, path: conf/level, mode: 0400}]}}]"
  within 30 pod_ready a
  file_is a /v/conf/level one
  same "$(k exec a -- stat -Lc %a /v/conf/level)" 400
  k patch configmap m -p '{"data": {"level": "two"}}'
  within 5 host_file_is a configmap conf/level two
  file_is a /v/conf/level two
}
secret_volume() {
  new_namespace
  k create secret generic s --from-literal=password=one
  object_pod a "volumeMounts: [{name: v, mountPath: /v}]" "volumes: [{name: v, secret: {secretName: s, defaultMode: 0440}}], securityContext: {fsGroup: 4321}"
  within 30 pod_ready a
  file_is a /v/password one
  same "$(k exec a -- stat -Lc '%a %g' /v/password)" "440 4321"
  k exec a -- grep ' /v ' /proc/mounts | grep tmpfs
  k patch secret s -p '{"stringData": {"password": "two", "more": "m"}}'
  within 5 host_file_is a secret password two
  file_is a /v/password two
  file_is a /v/more m
}
volume_missing() {
  new_namespace
  object_pod a "volumeMounts: [{name: v, mountPath: /v}]" "volumes: [{name: v, configMap: {name: late}}]"
  within 30 event_says a FailedMount 'MountVolume.SetUp failed for volume "v" : configmap "late" not found'
  k create configmap late --from-literal=a=b
  within 10 pod_ready a
  file_is a /v/a b
}
secret_missing() {
  new_namespace
  object_pod a "volumeMounts: [{name: v, mountPath: /v}]" "volumes: [{name: v, secret: {secretName: late}}]"
  within 30 event_says a FailedMount 'MountVolume.SetUp failed for volume "v" : secret "late" not found'
  k create secret generic late --from-literal=a=b
  within 10 pod_ready a
}
volume_key_missing() {
  new_namespace
  k create configmap m --from-literal=a=b
  object_pod a "volumeMounts: [{name: v, mountPath: /v}]" "volumes: [{name: v, configMap: {name: m, items: [{key: none, path: late}]}}]"
  within 30 event_says a FailedMount 'configmap references non-existent config key: none'
  k patch configmap m -p '{"data": {"none": "n"}}'
  within 10 pod_ready a
  file_is a /v/late n
}
volume_optional() {
  new_namespace
  object_pod a "volumeMounts: [{name: v, mountPath: /v}]" "volumes: [{name: v, secret: {secretName: later, optional: true}}]"
  within 30 pod_ready a
  same "$(k exec a -- ls /v)" ""
  k create secret generic later --from-literal=a=b
  within 5 host_file_is a secret a b
  file_is a /v/a b
}
deleted_map_stays() {
  new_namespace
  k create configmap m --from-literal=a=b
  object_pod a "volumeMounts: [{name: v, mountPath: /v}]" "volumes: [{name: v, configMap: {name: m}}]"
  within 30 pod_ready a
  k delete configmap m
  within 30 old_files_kept
  file_is a /v/a b
  k create configmap m --from-literal=a=c
  within 5 host_file_is a configmap a c
  file_is a /v/a c
}
old_files_kept() { grep -F "a_$NS(" "$LOGS/berth.log" | grep 'keeps its old files'; }
immutable() {
  new_namespace
  printf '{apiVersion: v1, kind: ConfigMap, metadata: {name: fixed}, immutable: true, data: {a: b}}' | k create -f -
  object_pod a "volumeMounts: [{name: v, mountPath: /v}], env: [{name: A, valueFrom: {configMapKeyRef: {name: fixed, key: a}}}]" "volumes: [{name: v, configMap: {name: fixed}}]"
  within 30 pod_ready a
  file_is a /v/a b
  env_of a | has_line A=b
  object_pod b "volumeMounts: [{name: v, mountPath: /v}]" "volumes: [{name: v, configMap: {name: fixed}}]"
  within 30 pod_ready b
  same "$(answered list configmaps fixed)" 1
}
binary_data() {
  new_namespace
  printf '\001\377' > "$WORK/bytes-$NS"
  k create configmap m --from-file=raw="$WORK/bytes-$NS"
  object_pod a "volumeMounts: [{name: v, mountPath: /v}]" "volumes: [{name: v, configMap: {name: m}}]"
  within 30 pod_ready a
  same "$(k exec a -- od -An -tx1 /v/raw | tr -d ' ')" 01ff
}
shared_watch() {
  new_namespace
  k create configmap shared --from-literal=a=one
  local i
  for i in 1 2 3; do object_pod "p$i" "volumeMounts: [{name: v, mountPath: /v}]" "volumes: [{name: v, configMap: {name: shared}}]"; done
  for i in 1 2 3; do within 40 pod_ready "p$i"; done
  same "$(answered list configmaps shared)" 1
  k patch configmap shared -p '{"data": {"a": "two"}}'
  for i in 1 2 3; do within 5 host_file_is "p$i" configmap a two; file_is "p$i" /v/a two; done
}
projected_all() {
  new_namespace
  k create configmap m --from-literal=a=map
  k create secret generic s --from-literal=b=secret
  object_pod a "volumeMounts: [{name: v, mountPath: /v}]" "volumes: [{name: v, projected: {sources: [{configMap: {name: m}}, {secret: {name: s}},
    {downwardAPI: {items: [{path: name, fieldRef: {fieldPath: metadata.name}}]}}, {serviceAccountToken: {path: token, audience: vault}}]}}]"
  within 30 pod_ready a
  file_is a /v/a map
  file_is a /v/b secret
  file_is a /v/name a
  token_claims "$(k exec a -- cat /v/token)" | jq -e '.aud == ["vault"]'
}
check "a ConfigMap volume with items and modes, and an edit of it within 5 s" map_volume
check "a Secret volume in memory, for the pod's group, and an edit of it within 5 s" secret_volume
check "a pod whose ConfigMap volume is missing says so and starts when it comes" volume_missing
check "a pod whose Secret volume is missing says so and starts when it comes" secret_missing
check "a key that is missing in a ConfigMap volume is named" volume_key_missing
check "an optional Secret volume is empty and fills when the Secret comes" volume_optional
check "a ConfigMap that is deleted leaves its files, and a new one replaces them" deleted_map_stays
check "an immutable ConfigMap is read once" immutable
check "binary data of a ConfigMap reaches the pod as it is" binary_data
check "three pods share the watch of one ConfigMap, and all see an edit" shared_watch
check "a projected volume of all sources" projected_all

ACCOUNT=/var/run/secrets/kubernetes.io/serviceaccount
token_reviewed() {
  new_namespace
  object_pod a ""
  within 30 pod_ready a
  local token reviewed
  token=$(k exec a -- cat "$ACCOUNT/token")
  reviewed=$(review "$token" "")
  jq -e --arg u "system:serviceaccount:$NS:default" '.status.authenticated and .status.user.username == $u' <<< "$reviewed"
  same "$(jq -r '.status.user.extra["authentication.kubernetes.io/pod-uid"][0]' <<< "$reviewed")" "$(pod_json a '{.metadata.uid}')"
  file_is a "$ACCOUNT/namespace" "$NS"
  same "$(k exec a -- cat "$ACCOUNT/ca.crt")" "$(cat "$CONTROL_PLANE/pki/ca.crt")"
}
token_ends_with_pod() {
  new_namespace
  object_pod a ""
  within 30 pod_ready a
  local token
  token=$(k exec a -- cat "$ACCOUNT/token")
  k delete pod a
  within 30 not_authenticated "$token"
}
not_authenticated() { review "$1" "" | jq -e '.status.authenticated != true'; }
token_audience() {
  new_namespace
  k create serviceaccount robot
  object_pod a "volumeMounts: [{name: t, mountPath: /t}]" "serviceAccountName: robot, automountServiceAccountToken: false,
    volumes: [{name: t, projected: {sources: [{serviceAccountToken: {path: token, audience: vault, expirationSeconds: 900}}]}}]"
  within 30 pod_ready a
  local token
  token=$(k exec a -- cat /t/token)
  review "$token" vault | jq -e --arg u "system:serviceaccount:$NS:robot" '.status.authenticated and .status.user.username == $u'
  token_claims "$token" | jq -e '.exp - .iat == 900'
  not_authenticated "$token"
}
token_modes() {
  new_namespace
  local volume="volumes: [{name: t, projected: {sources: [{serviceAccountToken: {path: token}}]}}]" mount="volumeMounts: [{name: t, mountPath: /t}]"
  object_pod plain "$mount" "$volume"
  object_pod user "$mount" "$volume, securityContext: {runAsUser: 1234}"
  object_pod group "$mount" "$volume, securityContext: {runAsUser: 1234, fsGroup: 4321}"
  within 30 pod_ready plain
  within 30 pod_ready user
  within 30 pod_ready group
  same "$(k exec plain -- stat -Lc '%a %u' /t/token)" "644 0"
  same "$(k exec user -- stat -Lc '%a %u' /t/token)" "600 1234"
  same "$(k exec group -- stat -Lc '%a %u %g' /t/token)" "640 1234 4321"
  k exec user -- cat /t/token > /dev/null
}
no_account() {
  new_namespace
  object_pod a "" "automountServiceAccountToken: false"
  within 30 pod_ready a
  refute k exec a -- ls "$ACCOUNT"
}
# With the pod's own token and certificate. From outside: the image's programs speak no TLS of today.
in_cluster() {
  new_namespace
  k create rolebinding look --clusterrole=view --serviceaccount="$NS:default"
  object_pod a ""
  within 30 pod_ready a
  k exec a -- cat "$ACCOUNT/token" > "$WORK/token-$NS"
  k exec a -- cat "$ACCOUNT/ca.crt" > "$WORK/ca-$NS"
  same "$(kubectl --kubeconfig /dev/null --server "https://$NODE_IP:6443" --certificate-authority "$WORK/ca-$NS" --token "$(cat "$WORK/token-$NS")" -n "$NS" get pods -o name)" pod/a
}
check "a pod's token is its service account's, bound to the pod, beside the namespace and the cluster's certificate" token_reviewed
check "a token ends with its pod" token_ends_with_pod
check "a projected token has the audience, the life and the account that were asked for" token_audience
check "a token's file is the only user's and the group's, and everybody's without them" token_modes
check "a pod that wants no token has none" no_account
check "a pod reads the API with what is mounted in it" in_cluster

service_variables() {
  new_namespace
  k create service clusterip my-shop --tcp=80:8080 --tcp=443:8443
  object_pod a ""
  within 30 pod_ready a
  local env ip
  env=$(env_of a)
  ip=$(k get service my-shop -o 'jsonpath={.spec.clusterIP}')
  has_line "MY_SHOP_SERVICE_HOST=$ip" <<< "$env"
  has_line "MY_SHOP_SERVICE_PORT=80" <<< "$env"
  has_line "MY_SHOP_PORT=tcp://$ip:80" <<< "$env"
  has_line "MY_SHOP_PORT_443_TCP_ADDR=$ip" <<< "$env"
  has_line "KUBERNETES_SERVICE_HOST=$(kubectl -n default get service kubernetes -o 'jsonpath={.spec.clusterIP}')" <<< "$env"
  has_line KUBERNETES_SERVICE_PORT=443 <<< "$env"
}
no_service_links() {
  new_namespace
  k create service clusterip shop --tcp=80:8080
  object_pod a "env: [{name: HOST, value: '\$(KUBERNETES_SERVICE_HOST)'}]" "enableServiceLinks: false"
  within 30 pod_ready a
  local env
  env=$(env_of a)
  refute grep -q '^SHOP_' <<< "$env"
  grep -q '^KUBERNETES_SERVICE_HOST=' <<< "$env"
  has_line "HOST=$(kubectl -n default get service kubernetes -o 'jsonpath={.spec.clusterIP}')" <<< "$env"
}
host_network_services() {
  new_namespace
  object_pod a "" "hostNetwork: true"
  within 30 pod_ready a
  env_of a | has '^KUBERNETES_SERVICE_HOST='
}
spec_hides_service() {
  new_namespace
  k create service clusterip shop --tcp=80:8080
  object_pod a "env: [{name: SHOP_SERVICE_HOST, value: mine}]"
  within 30 pod_ready a
  env_of a | has_line SHOP_SERVICE_HOST=mine
}
check "a container is told of the services of its namespace and of the API server's" service_variables
check "without service links it is told of the API server's alone, which its own variables may use" no_service_links
check "a pod of the host's network has service variables too" host_network_services
check "a variable of the spec hides a service's" spec_hides_service

# claim NAME PV_SOURCE: a PersistentVolume and a claim that is bound to it.
claimed() {
  printf '{apiVersion: v1, kind: PersistentVolume, metadata: {name: %s-%s}, spec: {capacity: {storage: 1Mi}, accessModes: [ReadWriteOnce], persistentVolumeReclaimPolicy: Retain, storageClassName: none-%s, %s}}' "$NS" "$1" "$NS" "$2" | kubectl create -f -
  printf '{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {name: %s}, spec: {accessModes: [ReadWriteOnce], storageClassName: none-%s, resources: {requests: {storage: 1Mi}}}}' "$1" "$NS" | k create -f -
}
claim_bound() { same "$(k get pvc "$1" -o 'jsonpath={.status.phase}')" Bound; }
drop_volumes() { kubectl delete pv "$NS-$1" --wait=false > /dev/null; }
host_path_claim() {
  new_namespace
  mkdir -p "$WORK/disk-$NS"
  echo there > "$WORK/disk-$NS/file"
  claimed data "hostPath: {path: $WORK/disk-$NS}"
  within 30 claim_bound data
  object_pod a "volumeMounts: [{name: d, mountPath: /d}]" "volumes: [{name: d, persistentVolumeClaim: {claimName: data}}]"
  within 30 pod_ready a
  file_is a /d/file there
  k exec a -- sh -c 'echo back > /d/answer'
  same "$(cat "$WORK/disk-$NS/answer")" back
  k delete pod a
  drop_volumes data
}
local_claim() {
  new_namespace
  mkdir -p "$WORK/disk-$NS"
  claimed data "local: {path: $WORK/disk-$NS}, nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [$NODE_NAME]}]}]}}"
  within 30 claim_bound data
  object_pod a "volumeMounts: [{name: d, mountPath: /d}]" "securityContext: {fsGroup: 4321}, volumes: [{name: d, persistentVolumeClaim: {claimName: data}}]"
  within 30 pod_ready a
  same "$(k exec a -- stat -c %g /d)" 4321
  k exec a -- sh -c 'echo kept > /d/file'
  k delete pod a
  object_pod b "volumeMounts: [{name: d, mountPath: /d}]" "volumes: [{name: d, persistentVolumeClaim: {claimName: data, readOnly: true}}]"
  within 30 pod_ready b
  file_is b /d/file kept
  refute k exec b -- touch /d/no
  k delete pod b
  drop_volumes data
}
# A pod that is put on the node by its name: no scheduler waits for its claim.
unbound_claim() {
  new_namespace
  printf '{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {name: data}, spec: {accessModes: [ReadWriteOnce], storageClassName: none-%s, resources: {requests: {storage: 1Mi}}}}' "$NS" | k create -f -
  object_pod a "volumeMounts: [{name: d, mountPath: /d}]" "nodeName: $NODE_NAME, volumes: [{name: d, persistentVolumeClaim: {claimName: data}}]"
  within 30 event_says a FailedMount "PVC is not bound"
  mkdir -p "$WORK/disk-$NS"
  printf '{apiVersion: v1, kind: PersistentVolume, metadata: {name: %s-data}, spec: {capacity: {storage: 1Mi}, accessModes: [ReadWriteOnce], storageClassName: none-%s, hostPath: {path: %s}}}' "$NS" "$NS" "$WORK/disk-$NS" | kubectl create -f -
  within 60 pod_ready a
  k delete pod a
  drop_volumes data
}
missing_claim() {
  new_namespace
  object_pod a "volumeMounts: [{name: d, mountPath: /d}]" "nodeName: $NODE_NAME, volumes: [{name: d, persistentVolumeClaim: {claimName: none}}]"
  within 30 event_says a FailedMount 'persistentvolumeclaims "none" not found'
}
check "a hostPath volume through a claim" host_path_claim
check "a local volume through a claim, for the pod's group, then read-only" local_claim
check "a pod whose claim is not bound says so and starts when it is" unbound_claim
check "a claim that is not there is named" missing_claim

missing_pull_secret() {
  new_namespace
  create_pod a "{terminationGracePeriodSeconds: 1, imagePullSecrets: [{name: none}], containers: [{name: main, image: $BUSYBOX, imagePullPolicy: Always, command: [sleep, '1000']}]}"
  within 30 pod_ready a
  event_says a FailedToRetrieveImagePullSecret 'Unable to retrieve some image pull secrets (none); attempting to pull the image may not succeed.'
}
present_pull_secret() {
  new_namespace
  k create secret docker-registry pull --docker-server=registry.example --docker-username=u --docker-password=p
  k patch serviceaccount default -p '{"imagePullSecrets": [{"name": "pull"}]}'
  create_pod a "{terminationGracePeriodSeconds: 1, containers: [{name: main, image: $BUSYBOX, imagePullPolicy: Always, command: [sleep, '1000']}]}"
  within 30 pod_ready a
  same "$(pod_json a '{.spec.imagePullSecrets[0].name}')" pull
  refute pod_event a FailedToRetrieveImagePullSecret
}
runtime_class_missing() {
  new_namespace
  printf '{apiVersion: node.k8s.io/v1, kind: RuntimeClass, metadata: {name: rc-%s}, handler: none-such}' "$NS" | kubectl create -f -
  object_pod a "" "runtimeClassName: rc-$NS"
  within 30 event_says a FailedCreatePodSandBox none-such
  kubectl delete runtimeclass "rc-$NS"
}
check "a pull secret that is missing is told of, and the pull goes on" missing_pull_secret
check "the pull secret of a service account is used without a word" present_pull_secret
check "the handler of a RuntimeClass reaches the runtime" runtime_class_missing

objects_without_api() {
  new_namespace
  k create configmap m --from-literal=a=one
  k create secret generic s --from-literal=b=two
  object_pod a "volumeMounts: [{name: v, mountPath: /v}], envFrom: [{configMapRef: {name: m}}, {secretRef: {name: s}}]" "volumes: [{name: v, configMap: {name: m}}]"
  within 30 pod_ready a
  local uid
  uid=$(pod_json a '{.metadata.uid}')
  stop_api_server
  crictl stop "$(crictl ps -q --label "io.kubernetes.pod.uid=$uid")"
  within 30 restarted_here "$uid"
  resume_api_server
  within 60 restarted_there
  env_of a | has_line b=two
  k patch configmap m -p '{"data": {"a": "three"}}'
  within 35 file_is a /v/a three
}
restarted_here() { [ -n "$(crictl ps -q --state running --label "io.kubernetes.pod.uid=$1")" ]; }
restarted_there() { same "$(pod_json a '{.status.containerStatuses[0].restartCount}')" 1; }
alone "without the API server a container restarts with what was read last, and an edit reaches it afterwards" objects_without_api
after_restart() {
  new_namespace
  k create configmap m --from-literal=a=one
  object_pod a "volumeMounts: [{name: v, mountPath: /v}]" "volumes: [{name: v, configMap: {name: m}}]"
  within 30 pod_ready a
  restart_node
  k patch configmap m -p '{"data": {"a": "two"}}'
  within 30 file_is a /v/a two
}
alone "an edit reaches a volume after the agent has been restarted" after_restart
