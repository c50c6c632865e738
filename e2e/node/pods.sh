# Pods from the API server: their life, their deletion, their statuses, their mirrors, their events.

LOOP='trap "exit 0" TERM; while :; do sleep 0.1; done'

# status_is NAME JSONPATH VALUE
status_is() { local is; is=$(pod_json "$1" "$2") && same "$is" "$3" || { k get pod "$1" -o yaml; return 1; }; }
no_sandbox_of() { local left; left=$(crictl pods -q --label "io.kubernetes.pod.uid=$1") && same "$left" ""; }
running() { shell_pod "$1" "$LOOP" "${2:-}"; within 30 pod_phase "$1" Running; }

runs_and_is_ready() {
  new_namespace
  running a
  within 30 pod_ready a
  status_is a '{.status.qosClass}' BestEffort
  status_is a '{.status.hostIP}' "$NODE_IP"
  [ -n "$(pod_json a '{.status.podIP}')" ]
  [ -n "$(pod_json a '{.status.startTime}')" ]
  same "$(pod_json a '{.status.podIPs[0].ip}')" "$(pod_json a '{.status.podIP}')"
  status_is a '{.status.containerStatuses[0].restartCount}' 0
  [[ $(pod_json a '{.status.containerStatuses[0].containerID}') =~ ^[a-z]+://[0-9a-f]{64}$ ]]
  status_is a '{range .status.conditions[*]}{.type}={.status} {end}' \
    "PodReadyToStartContainers=True Initialized=True Ready=True ContainersReady=True PodScheduled=True "
}
check "a pod made at the API server runs and its status says so" runs_and_is_ready

logs_and_exec() {
  new_namespace
  shell_pod a "echo hello from a; $LOOP"
  within 30 pod_phase a Running
  within 30 logs_say a "hello from a"
  same "$(k exec a -- sh -c 'echo from exec; hostname')" "$(printf 'from exec\na')"
  local code=0
  k exec a -- sh -c 'exit 7' || code=$?
  same $code 7
}
logs_say() { same "$(k logs "$1")" "$2"; }
check "logs and exec go through the API server" logs_and_exec

deleted_is_gone() {
  new_namespace
  running a
  local uid begun took
  uid=$(pod_json a '{.metadata.uid}')
  begun=$EPOCHREALTIME
  k delete pod a
  took=$(( (${EPOCHREALTIME/./} - ${begun/./}) / 1000 ))
  echo "deleted in $took ms"
  within 30 no_sandbox_of "$uid"
  within 30 test ! -e "$WORK/kubelet/pods/$uid"
}
check "a deleted pod ends, and leaves the API server and the node" deleted_is_gone

grace_is_given() {
  new_namespace
  shell_pod a 'trap "sleep 2; echo ended >&2; exit 0" TERM; while :; do sleep 0.1; done'
  within 30 pod_phase a Running
  local begun=$SECONDS
  k delete pod a --grace-period=40
  [ $((SECONDS - begun)) -ge 2 ]
  [ $((SECONDS - begun)) -lt 40 ]
}
grace_is_cut() {
  new_namespace
  shell_pod a 'trap "" TERM; while :; do sleep 0.1; done'
  within 30 pod_phase a Running
  local begun=$SECONDS
  k delete pod a --grace-period=60 --wait=false
  k delete pod a --grace-period=1
  [ $((SECONDS - begun)) -lt 20 ]
}
check "the grace asked for at deletion is given" grace_is_given
check "a second deletion can only shorten the grace" grace_is_cut

force_deleted_ends() {
  new_namespace
  running a
  local uid
  uid=$(pod_json a '{.metadata.uid}')
  k delete pod a --force --grace-period=0
  within 30 no_sandbox_of "$uid"
}
check "a pod that is deleted by force is ended all the same" force_deleted_ends

finalizer_holds() {
  new_namespace
  create_pod held "{terminationGracePeriodSeconds: 1, restartPolicy: Always, containers: [{name: main, image: $BUSYBOX, command: [sh, -c, '$LOOP']}]}" 'finalizers: [berth.test/hold]'
  within 30 pod_phase held Running
  k delete pod held --wait=false
  within 30 pod_phase held Succeeded
  within 30 asked_for_once held
  status_is held '{.metadata.finalizers[0]}' berth.test/hold
  sleep 11
  asked_for_once held
  k patch pod held --type=merge -p '{"metadata":{"finalizers":null}}'
  within 30 pod_gone held
}
asked_for_once() { same "$(calls delete pods "$1")" 1; }
check "a finalizer keeps the object, which is asked for deletion once" finalizer_holds

recreated_waits() {
  new_namespace
  create_pod a "{terminationGracePeriodSeconds: 8, containers: [{name: main, image: $BUSYBOX, command: [sh, -c, 'trap \"sleep 2; exit 0\" TERM; while :; do sleep 0.1; done']}]}"
  within 30 pod_phase a Running
  local uid
  uid=$(pod_json a '{.metadata.uid}')
  k delete pod a --force --grace-period=0
  shell_pod a "$LOOP"
  within 40 pod_phase a Running
  [ "$(pod_json a '{.metadata.uid}')" != "$uid" ]
  no_sandbox_of "$uid"
}
check "a pod made anew under the same name waits for the old one's end" recreated_waits

restarts_after_crash() {
  new_namespace
  shell_pod a 'exit 3'
  within 40 status_is a '{.status.containerStatuses[0].state.waiting.reason}' CrashLoopBackOff
  status_is a '{.status.containerStatuses[0].lastState.terminated.exitCode}' 3
  status_is a '{.status.phase}' Running
  within 30 pod_event a BackOff
}
ends() { # POLICY COMMAND PHASE EXIT CODE
  new_namespace
  shell_pod a "$2" "restartPolicy: $1"
  within 40 pod_phase a "$3"
  status_is a '{.status.containerStatuses[0].state.terminated.exitCode}' "$4"
  status_is a '{.status.containerStatuses[0].restartCount}' 0
}
check "a container that crashes is started again and waits longer each time" restarts_after_crash
check "a pod that may not restart fails with its container" ends Never 'exit 4' Failed 4
check "a pod whose containers have done their work succeeds" ends OnFailure 'exit 0' Succeeded 0

init_order() {
  new_namespace
  create_pod a "{terminationGracePeriodSeconds: 1, volumes: [{name: v, emptyDir: {}}], initContainers: [{name: one, image: $BUSYBOX, command: [sh, -c, 'echo one > /v/f'], volumeMounts: [{name: v, mountPath: /v}]}], containers: [{name: main, image: $BUSYBOX, command: [sh, -c, 'cat /v/f; $LOOP'], volumeMounts: [{name: v, mountPath: /v}]}]}"
  within 40 pod_phase a Running
  within 30 logs_say a one
  status_is a '{.status.initContainerStatuses[0].state.terminated.reason}' Completed
}
check "init containers run before the others and their statuses stay" init_order

deadline_passes() {
  new_namespace
  shell_pod a "$LOOP" 'activeDeadlineSeconds: 2'
  within 30 pod_phase a Failed
  status_is a '{.status.reason}' DeadlineExceeded
}
check "a pod fails when its deadline has passed" deadline_passes

gates_count() {
  new_namespace
  shell_pod a "$LOOP" 'readinessGates: [{conditionType: berth.test/up}]'
  within 30 status_is a '{.status.conditions[?(@.type=="ContainersReady")].status}' True
  status_is a '{.status.conditions[?(@.type=="Ready")].reason}' ReadinessGatesNotReady
  k patch pod a --subresource=status --type=strategic -p '{"status":{"conditions":[{"type":"berth.test/up","status":"True"}]}}'
  within 30 pod_ready a
  status_is a '{.status.conditions[?(@.type=="berth.test/up")].status}' True
}
check "a readiness gate that others set makes the pod ready, and stays" gates_count

labels_reach_the_pod() {
  new_namespace
  create_pod a "{terminationGracePeriodSeconds: 1, volumes: [{name: v, downwardAPI: {items: [{path: l, fieldRef: {fieldPath: \"metadata.labels['l']\"}}]}}], containers: [{name: main, image: $BUSYBOX, command: [sh, -c, '$LOOP'], volumeMounts: [{name: v, mountPath: /v}]}]}" 'labels: {l: one}'
  within 30 pod_phase a Running
  same "$(k exec a -- cat /v/l)" one
  k label pod a --overwrite l=two
  within 30 label_is two
  status_is a '{.status.containerStatuses[0].restartCount}' 0
}
label_is() { same "$(k exec a -- cat /v/l)" "$1"; }
check "a label that changes reaches the running pod" labels_reach_the_pod

debug_container_starts() {
  new_namespace
  running a
  local before
  before=$(pod_json a '{.status.containerStatuses[0].containerID}')
  k debug a --image="$BUSYBOX" -c eye --target=main --profile=general -- sh -c 'ps; sleep 300'
  within 30 eye_runs
  within 30 eye_sees
  same "$(pod_json a '{.status.containerStatuses[0].containerID}')" "$before"
  pod_ready a
}
eye_runs() { [ -n "$(pod_json a '{.status.ephemeralContainerStatuses[0].state.running.startedAt}')" ]; }
eye_sees() { k logs a -c eye | grep 'while :'; }
check "a debug container is added to the running pod and sees its processes" debug_container_starts

resized_in_place() {
  new_namespace
  create_pod a "{terminationGracePeriodSeconds: 1, containers: [{name: main, image: $BUSYBOX, command: [sh, -c, '$LOOP'], resources: {requests: {cpu: 50m, memory: 32Mi}, limits: {cpu: 100m, memory: 64Mi}}}]}"
  within 30 pod_phase a Running
  local before
  before=$(pod_json a '{.status.containerStatuses[0].containerID}')
  has_quota a 10000
  k patch pod a --subresource resize -p '{"spec":{"containers":[{"name":"main","resources":{"requests":{"cpu":"60m"},"limits":{"cpu":"200m"}}}]}}'
  within 30 status_is a '{.status.containerStatuses[0].resources.limits.cpu}' 200m
  within 30 status_is a '{.status.conditions[?(@.type=="PodResizeInProgress")].status}' ''
  has_quota a 20000
  same "$(pod_json a '{.status.containerStatuses[0].containerID}')" "$before"
  within 30 pod_event a ResizeCompleted
}
# has_quota POD MICROSECONDS: what the kernel gives the container of every 100 ms.
has_quota() { same "$(k exec "$1" -- sh -c 'cd /sys/fs/cgroup; if [ -e cpu.max ]; then cut -d" " -f1 cpu.max; else cat cpu/cpu.cfs_quota_us; fi')" "$2"; }
resize_waits() {
  new_namespace
  create_pod other "{terminationGracePeriodSeconds: 1, containers: [{name: main, image: $BUSYBOX, command: [sh, -c, '$LOOP'], resources: {requests: {memory: $1}}}]}"
  create_pod a "{terminationGracePeriodSeconds: 1, containers: [{name: main, image: $BUSYBOX, command: [sh, -c, '$LOOP'], resources: {requests: {memory: 32Mi}}}]}"
  within 30 pod_phase a Running
  within 30 pod_phase other Running
  k patch pod a --subresource resize -p "{\"spec\":{\"containers\":[{\"name\":\"main\",\"resources\":{\"requests\":{\"memory\":\"$1\"}}}]}}"
  within 30 status_is a '{.status.conditions[?(@.type=="PodResizePending")].reason}' Deferred
  within 30 pod_event a ResizeDeferred
  k delete pod other
  within 30 status_is a '{.status.conditions[?(@.type=="PodResizePending")].reason}' ''
  within 30 status_is a '{.status.containerStatuses[0].resources.requests.memory}' "$1"
}
# more_than_half: of the node's memory.
more_than_half() { echo "$(( $(node_json '{.status.allocatable.memory}' | tr -d Ki) * 6 / 10 / 1024 ))Mi"; }
check "resources change in the running container" resized_in_place
check "a resize that the node has no room for waits until there is" resize_waits "$(more_than_half)"

rejected_stays() { # FIELDS REASON
  new_namespace
  create_pod a "{nodeName: $NODE_NAME, containers: [{name: main, image: $BUSYBOX}], $1}"
  within 30 pod_phase a Failed
  status_is a '{.status.reason}' "$2"
  within 30 pod_event a "$2"
  status_is a '{.status.containerStatuses}' ''
  k delete pod a
}
check "a pod whose node selector does not fit is rejected and can be deleted" rejected_stays 'nodeSelector: {no: where}' NodeAffinity
check "a pod that asks for what the node cannot do is rejected by name" rejected_stays 'resourceClaims: [{name: g, resourceClaimName: g}]' PodFeatureUnsupported
check "a forbidden sysctl is rejected" rejected_stays 'securityContext: {sysctls: [{name: kernel.msgmax, value: "1"}]}' SysctlForbidden

events_in_order() {
  new_namespace
  running a
  within 30 pod_event a Started
  local message
  message=$(pod_event a Created)
  same "$message" "Container created"
  same "$(k get events --field-selector involvedObject.name=a,reason=Started -o 'jsonpath={.items[0].involvedObject.fieldPath} {.items[0].source.component} {.items[0].source.host} {.items[0].reportingComponent}')" "spec.containers{main} kubelet $NODE_NAME kubelet"
  same "$(k get events --field-selector involvedObject.name=a,reason=Started -o 'jsonpath={.items[0].involvedObject.uid}')" "$(pod_json a '{.metadata.uid}')"
  k delete pod a
  within 30 pod_event a Killing
}
events_are_counted() {
  new_namespace
  create_pod b "{terminationGracePeriodSeconds: 1, containers: [{name: main, image: $BUSYBOX, command: [sh, -c, '$LOOP'], readinessProbe: {exec: {command: ['false']}, periodSeconds: 1, timeoutSeconds: 30}}]}"
  within 30 probe_counted
  same "$(k get events --field-selector involvedObject.name=b,reason=Unhealthy -o name | wc -l)" 1
}
probe_counted() { [ "$(k get events --field-selector involvedObject.name=b,reason=Unhealthy -o 'jsonpath={.items[0].count}')" -ge 3 ]; }
check "a pod's events say what has been done for it" events_in_order
check "an event that happens again is counted" events_are_counted

# Static pods and their mirrors.
static_manifest() { # NAME NAMESPACE TEXT
  printf '{apiVersion: v1, kind: Pod, metadata: {name: %s, namespace: %s}, spec: {terminationGracePeriodSeconds: 1, containers: [{name: main, image: %s, command: [sh, -c, "echo %s; while :; do sleep 0.1; done"]}]}}\n' "$1" "$2" "$BUSYBOX" "$3" > "$WORK/manifests/$1-$2.new"
  mv "$WORK/manifests/$1-$2.new" "$WORK/manifests/$1-$2.yaml"
}
mirror_appears() {
  new_namespace
  static_manifest s "$NS" one
  local name=s-$NODE_NAME
  within 30 pod_phase "$name" Running
  status_is "$name" '{.metadata.ownerReferences[0].kind} {.metadata.ownerReferences[0].name}' "Node $NODE_NAME"
  [ -n "$(pod_json "$name" '{.metadata.annotations.kubernetes\.io/config\.mirror}')" ]
  within 30 logs_say "$name" one
  local uid started
  uid=$(pod_json "$name" '{.metadata.uid}')
  started=$(pod_json "$name" '{.status.containerStatuses[0].containerID}')
  k delete pod "$name" --wait=false
  within 30 mirror_is_new "$name" "$uid"
  within 30 pod_phase "$name" Running
  status_is "$name" '{.status.containerStatuses[0].containerID}' "$started"
  uid=$(pod_json "$name" '{.metadata.uid}')
  static_manifest s "$NS" two
  within 30 mirror_is_new "$name" "$uid"
  within 30 pod_phase "$name" Running
  within 30 logs_say "$name" two
  rm "$WORK/manifests/s-$NS.yaml"
  within 30 pod_gone "$name"
}
mirror_is_new() { [ "$(pod_json "$1" '{.metadata.uid}')" != "$2" ] && [ -n "$(pod_json "$1" '{.metadata.uid}')" ]; }
check "a static pod has a mirror, which comes again, changes with it and goes with it" mirror_appears

# By themselves: these disturb the node.
agent_restart_keeps() {
  new_namespace
  running a
  shell_pod done 'exit 0' 'restartPolicy: Never'
  within 30 pod_phase done Succeeded
  static_manifest r "$NS" one
  within 30 pod_phase "r-$NODE_NAME" Running
  local before mirror
  before=$(footprint)
  mirror=$(pod_json "r-$NODE_NAME" '{.metadata.uid}')
  restart_node KILL
  running b
  same "$(pod_json a '{.status.containerStatuses[0].restartCount}')" 0
  k delete pod b
  within 30 same_footprint "$before"
  same "$(pod_json "r-$NODE_NAME" '{.metadata.uid}')" "$mirror"
  pod_phase done Succeeded
  rm "$WORK/manifests/r-$NS.yaml"
}
same_footprint() { same "$(footprint)" "$1"; }
alone "an agent that is killed and started again touches no running pod" agent_restart_keeps

deleted_while_agent_away() {
  new_namespace
  running a
  running b
  local uid
  uid=$(pod_json a '{.metadata.uid}')
  stop_node
  k delete pod a --wait=false
  k delete pod b --force --grace-period=0
  start_node
  within 30 pod_gone a
  within 30 no_sandbox_of "$uid"
}
alone "pods that were deleted while the agent was away end when it comes back" deleted_while_agent_away

server_away() {
  new_namespace
  running a
  static_manifest w "$NS" one
  within 30 pod_phase "w-$NODE_NAME" Running
  shell_pod crash 'sleep 3; exit 1'
  within 30 pod_phase crash Running
  local before ran
  before=$(pod_json a '{.status.containerStatuses[0].containerID}')
  ran=$(running_containers a)
  same "$ran" "${before##*://}"
  stop_api_server
  sleep 8
  resume_api_server
  within 30 crashed
  same "$(running_containers a)" "$ran"
  status_is a '{.status.containerStatuses[0].containerID}' "$before"
  status_is a '{.status.containerStatuses[0].restartCount}' 0
  running b
}
# running_containers POD: by the runtime's word, which also knows those that have ended.
running_containers() { crictl ps -q --no-trunc --state running --label "io.kubernetes.pod.name=$1" --label "io.kubernetes.pod.namespace=$NS"; }
crashed() { [ "$(pod_json crash '{.status.containerStatuses[0].restartCount}')" -ge 1 ]; }
alone "pods go on while the API server is away, and what happened is told when it is back" server_away

restart_without_server() {
  new_namespace
  running a
  local before ran
  before=$(pod_json a '{.status.containerStatuses[0].containerID}')
  ran=$(running_containers a)
  same "$ran" "${before##*://}"
  stop_api_server
  restart_node KILL
  static_manifest l "$NS" one
  within 30 container_runs l
  same "$(running_containers a)" "$ran"
  resume_api_server
  # The mirror shows that statuses are told again; the pod's is then the one that this agent found.
  within 30 pod_phase "l-$NODE_NAME" Running
  same "$(running_containers a)" "$ran"
  status_is a '{.status.containerStatuses[0].containerID}' "$before"
  status_is a '{.status.containerStatuses[0].restartCount}' 0
  rm "$WORK/manifests/l-$NS.yaml"
}
container_runs() { [ -n "$(crictl ps -q --label "io.kubernetes.pod.name=$1-$NODE_NAME" --label "io.kubernetes.pod.namespace=$NS")" ]; }
alone "an agent that starts without the API server runs its manifests and leaves the other pods alone" restart_without_server
