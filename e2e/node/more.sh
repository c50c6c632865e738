# What stands between the API server and a pod: admission that goes by a moment's view, mirrors that are refused, rights.

cgroup_told() { [ -e /sys/fs/cgroup/cgroup.controllers ] || within 30 node_event CgroupV1; }
check "a node with cgroup v1 says so with an event" cgroup_told

MORE_LOOP='trap "exit 0" TERM; while :; do sleep 0.1; done'
# bound_pod NAME SPEC_FIELDS [COMMAND]: on the node by its name: no scheduler looks before.
bound_pod() { shell_pod "$1" "${3:-$MORE_LOOP}" "nodeName: $NODE_NAME${2:+, $2}"; }

fresh_label() {
  new_namespace
  local n
  for n in 1 2 3; do
    kubectl label node "$NODE_NAME" "fresh-$n-$NS=yes"
    bound_pod "p$n" "nodeSelector: {fresh-$n-$NS: 'yes'}"
  done
  for n in 1 2 3; do
    within 30 pod_phase "p$n" Running
    kubectl label node "$NODE_NAME" "fresh-$n-$NS-"
  done
}
check "pods bound by labels that were set a moment ago are let in" fresh_label

# Three quarters of what pods may have, in Mi.
most_memory() { echo "$(( $(node_json '{.status.allocatable.memory}' | tr -d Ki) * 3 / 4 / 1024 ))Mi"; }
asks_memory() { echo "containers: [{name: main, image: $BUSYBOX, command: [sh, -c, '$2'], resources: {requests: {memory: $1}}}]"; }
room_of_ending() {
  new_namespace
  local most
  most=$(most_memory)
  create_pod a "{nodeName: $NODE_NAME, terminationGracePeriodSeconds: 4, $(asks_memory "$most" "trap : TERM; while :; do sleep 0.1; done")}"
  within 30 pod_phase a Running
  # By force: the API server knows nothing of it any more, while it still ends here.
  k delete pod a --force --grace-period=0
  create_pod b "{nodeName: $NODE_NAME, terminationGracePeriodSeconds: 1, $(asks_memory "$most" "$MORE_LOOP")}"
  within 30 pod_phase b Running
  status_field b '{.status.reason}' ''
}
status_field() { same "$(pod_json "$1" "$2")" "$3"; }
alone "a pod waits for the memory of one that was deleted by force and still ends" room_of_ending

port_of_ending() {
  new_namespace
  local port=$((30000 + BASHPID % 2000))
  local ports="ports: [{containerPort: 80, hostPort: $port}]"
  create_pod a "{nodeName: $NODE_NAME, terminationGracePeriodSeconds: 3, containers: [{name: main, image: $BUSYBOX, command: [sh, -c, 'trap : TERM; while :; do sleep 0.1; done'], $ports}]}"
  within 30 pod_phase a Running
  k delete pod a --force --grace-period=0
  create_pod b "{nodeName: $NODE_NAME, terminationGracePeriodSeconds: 1, containers: [{name: main, image: $BUSYBOX, command: [sh, -c, '$MORE_LOOP'], $ports}]}"
  within 30 pod_phase b Running
  create_pod c "{nodeName: $NODE_NAME, containers: [{name: main, image: $BUSYBOX, command: [sh, -c, '$MORE_LOOP'], $ports}]}"
  within 30 pod_phase c Failed
  status_field c '{.status.reason}' NodePorts
}
check "a pod waits for the host port of one that ends, and fails beside one that stays" port_of_ending

mirror_without_namespace() {
  NS=late-$BASHPID
  trap 'rm -f "$WORK/manifests/lost-$NS.yaml"; kubectl delete namespace "$NS" --ignore-not-found --wait=false > /dev/null' EXIT
  local ns=$NS name=lost-$NODE_NAME
  printf '{apiVersion: v1, kind: Pod, metadata: {name: lost, namespace: %s}, spec: {terminationGracePeriodSeconds: 1, containers: [{name: main, image: %s, command: [sh, -c, "%s"]}]}}\n' \
    "$ns" "$BUSYBOX" "while :; do sleep 0.1; done" > "$WORK/manifests/lost-$ns.yaml"
  within 30 runs_here "$ns"
  within 30 mirror_refused "$ns"
  local before
  before=$(crictl ps -q --label "io.kubernetes.pod.namespace=$ns")
  kubectl create namespace "$ns"
  within 90 pod_phase "$name" Running
  same "$(crictl ps -q --label "io.kubernetes.pod.namespace=$ns")" "$before"
  # However often it was tried.
  same "$(grep -c "mirror in the API is not made.*$ns\|$ns.*mirror in the API is not made" "$LOGS/berth.log")" 1
}
runs_here() { [ -n "$(crictl ps -q --label "io.kubernetes.pod.namespace=$1")" ]; }
mirror_refused() { grep -q "$1.*mirror in the API is not made\|mirror in the API is not made.*$1" "$LOGS/berth.log"; }
check "a static pod runs while the API server refuses its mirror, which is told once and comes when it can" mirror_without_namespace

says_shutting_down() { same "$(node_condition Ready '{.status} {.reason}: {.message}')" "False KubeletNotReady: node is shutting down"; }
# Without logind SIGTERM is the machine's end, where times are configured for it.
machine_goes_down() {
  new_namespace
  stop_node
  write_node_config "shutdownGracePeriod: 10s" "shutdownGracePeriodCriticalPods: 2s"
  start_node
  within 30 node_ready
  create_pod a "{nodeName: $NODE_NAME, terminationGracePeriodSeconds: 6, containers: [{name: main, image: $BUSYBOX, command: [sh, -c, 'trap \"sleep 3; exit 0\" TERM; while :; do sleep 0.1; done']}]}"
  within 30 pod_phase a Running
  local pid
  pid=$(node_pid)
  kill "$pid"
  within 30 says_shutting_down
  within 30 node_event Shutdown
  within 30 dead "$pid"
  write_node_config
  start_node
  within 40 node_ready
  within 30 pod_phase a Failed
  status_field a '{.status.reason}: {.status.message}' 'Terminated: Pod was terminated in response to imminent node shutdown.'
  status_field a '{.status.conditions[?(@.type=="DisruptionTarget")].reason}' TerminationByKubelet
}
alone "a machine that goes down ends its pods in their time, and the node says so" machine_goes_down
