# The node's own object at the API server: what it says, when it is sent, what becomes of it.

# Under the name of the node, which is in every field selector of its events.
node_line() { kubectl get node "$NODE_NAME" --no-headers -o wide; }
node_shows() { local line; line=$(node_line); echo "$line"; grep -q " Ready .*v$KUBERNETES_VERSION .*$NODE_IP .*berth://" <<< "$line"; }
check "kubectl get node shows it Ready, with a level of Kubernetes, its address and its runtime" node_shows

node_labels() {
  local arch
  case $(uname -m) in x86_64) arch=amd64 ;; aarch64) arch=arm64 ;; esac
  same "$(node_json '{.metadata.labels.kubernetes\.io/hostname} {.metadata.labels.kubernetes\.io/os} {.metadata.labels.beta\.kubernetes\.io/os} {.metadata.labels.kubernetes\.io/arch} {.metadata.labels.beta\.kubernetes\.io/arch}')" \
    "$NODE_NAME linux linux $arch $arch"
}
check "the node has the labels that every node has, in both forms" node_labels

node_attach() { same "$(node_json '{.metadata.annotations.volumes\.kubernetes\.io/controller-managed-attach-detach}')" true; }
check "the node leaves the attaching of volumes to the controller" node_attach

node_addresses() { same "$(node_json '{range .status.addresses[*]}{.type}={.address} {end}')" "InternalIP=$NODE_IP Hostname=$NODE_NAME "; }
check "the node's addresses are its IP and its name" node_addresses

# bytes_of JSONPATH: a quantity of the node as a plain number.
bytes_of() { node_json "$1" | numfmt --from=auto; }
memory_bytes() { echo $(( $(awk '/MemTotal/ {print $2}' /proc/meminfo) * 1024 )); }
node_capacity() {
  same "$(node_json '{.status.capacity.cpu}')" "$(nproc --all)"
  same "$(bytes_of '{.status.capacity.memory}')" "$(memory_bytes)"
  same "$(node_json '{.status.capacity.pods} {.status.allocatable.pods}')" "110 110"
}
check "the capacity is what the machine has, and maxPods" node_capacity

node_allocatable() {
  same "$(node_json '{.status.allocatable.cpu}')" "$(( $(nproc --all) * 1000 - 100 ))m"
  # 128Mi are reserved, 50Mi are the threshold of eviction.
  same "$(bytes_of '{.status.allocatable.memory}')" "$(( $(memory_bytes) - (178 << 20) ))"
}
check "what is reserved, and the threshold of eviction, is not allocatable" node_allocatable

node_storage() {
  local bytes
  bytes=$(df --output=size -B 1 "$WORK/kubelet" | tail -n 1 | tr -d ' ')
  same "$(bytes_of '{.status.capacity.ephemeral-storage}')" "$bytes"
  # 1% is the threshold of eviction.
  [ "$(bytes_of '{.status.allocatable.ephemeral-storage}')" -le $((bytes - bytes / 101)) ]
}
check "disk space is counted" node_storage

node_huge_pages() {
  local folder size
  for folder in /sys/kernel/mm/hugepages/hugepages-*; do
    [ -d "$folder" ] || continue
    size=${folder##*-} size=${size%kB}
    if [ $((size % 1048576)) -eq 0 ]; then size=$((size / 1048576))Gi; elif [ $((size % 1024)) -eq 0 ]; then size=$((size / 1024))Mi; else size=${size}Ki; fi
    kubectl get node "$NODE_NAME" -o json | jq -e --arg name "hugepages-$size" '.status.capacity[$name] and .status.allocatable[$name]'
  done
}
check "each size of huge pages is a resource" node_huge_pages

node_info() {
  same "$(node_json '{.status.nodeInfo.kernelVersion} {.status.nodeInfo.bootID} {.status.nodeInfo.operatingSystem}')" \
    "$(uname -r) $(cat /proc/sys/kernel/random/boot_id) linux"
  same "$(node_json '{.status.nodeInfo.osImage}')" "$(. /etc/os-release; echo "$PRETTY_NAME")"
  same "$(node_json '{.status.nodeInfo.kubeletVersion}')" "v$KUBERNETES_VERSION"
}
check "the node says what its kernel, its boot and its system are" node_info

node_endpoint() {
  same "$(node_json '{.status.daemonEndpoints.kubeletEndpoint.Port}')" 10250
  same "$(kubectl get --raw "/api/v1/nodes/$NODE_NAME/proxy/healthz")" ok
}
check "the API server reaches the kubelet by the port that the node names" node_endpoint

node_conditions() {
  same "$(node_json '{range .status.conditions[?(@.reason)]}{.type} {.status} {.reason}: {.message}{"\n"}{end}' | grep -v KernelDeadlock)" \
    "MemoryPressure False KubeletHasSufficientMemory: kubelet has sufficient memory available
DiskPressure False KubeletHasNoDiskPressure: kubelet has no disk pressure
PIDPressure False KubeletHasSufficientPID: kubelet has sufficient PID available
Ready True KubeletReady: kubelet is posting ready status"
}
check "the four conditions have the upstream's reasons and messages" node_conditions

node_images() {
  new_namespace
  shell_pod a 'exec sleep 60'
  within 60 pod_phase a Running
  within 60 node_has_image
}
node_has_image() {
  kubectl get node "$NODE_NAME" -o json | jq -e '.status.images | length <= 50 and any(.[]; any(.names[]; contains("busybox"))) and all(.[]; .sizeBytes > 0)' ||
    { kubectl get node "$NODE_NAME" -o json | jq -c .status.images; return 1; }
}
check "an image that was pulled is among the node's, with its size" node_images

node_handlers() { kubectl get node "$NODE_NAME" -o json | jq -e '.status.runtimeHandlers | any((.name // "") == "" and (.features | has("recursiveReadOnlyMounts") and has("userNamespaces")))'; }
check "the runtime's default handler is told with its features" node_handlers

node_features() {
  same "$(node_json '{.status.features.supplementalGroupsPolicy}')" true
  same "$(node_json '{.status.declaredFeatures}')" '["ExtendWebSocketsToKubelet","RestartAllContainersOnContainerExits"]'
}
check "the node declares the features that it has" node_features

node_lease() {
  same "$(lease_json '{.spec.holderIdentity} {.spec.leaseDurationSeconds} {.metadata.ownerReferences[0].kind} {.metadata.ownerReferences[0].uid}')" \
    "$NODE_NAME 40 Node $(node_json '{.metadata.uid}')"
}
check "the node's lease holds for 40 seconds and belongs to the node" node_lease

node_lease_renewed() {
  local before
  before=$(lease_json '{.spec.renewTime}')
  within 12 lease_differs "$before"
}
lease_differs() { local now; now=$(lease_json '{.spec.renewTime}') && [ -n "$now" ] && [ "$now" != "$1" ]; }
check "the lease is renewed in a quarter of its time" node_lease_renewed

node_csi() {
  same "$(kubectl get csinode "$NODE_NAME" -o 'jsonpath={.metadata.ownerReferences[0].kind} {.metadata.ownerReferences[0].uid} {.spec.drivers}')" \
    "Node $(node_json '{.metadata.uid}') null"
}
check "the node has a CSINode object of its own" node_csi

node_pod_cidr() {
  new_namespace
  shell_pod a 'exec sleep 60'
  within 60 pod_phase a Running
  local ip range
  ip=$(pod_json a '{.status.podIP}') range=$(node_json '{.spec.podCIDR}')
  echo "$ip in $range"
  python3 -c 'import ipaddress, sys; sys.exit(ipaddress.ip_address(sys.argv[1]) not in ipaddress.ip_network(sys.argv[2]))' "$ip" "$range"
}
check "pods get addresses of the range that the node was given" node_pod_cidr

node_starting() { within 30 node_event Starting; within 30 node_event NodeHasSufficientMemory; }
check "the agent's start and the first conditions are events of the node" node_starting

node_extended() {
  kubectl patch node "$NODE_NAME" --subresource=status --type=json -p '[{"op": "add", "path": "/status/capacity/example.com~1dongle", "value": "3"}]'
  within 30 node_allocates '"3"'
  kubectl patch node "$NODE_NAME" --subresource=status --type=json -p '[{"op": "remove", "path": "/status/capacity/example.com~1dongle"}]'
  within 30 node_allocates null
}
node_allocates() { same "$(kubectl get node "$NODE_NAME" -o json | jq '.status.allocatable["example.com/dongle"]')" "$1"; }
check "a resource that somebody puts into the capacity can be allocated, until it is taken out" node_extended

node_other_condition() {
  kubectl patch node "$NODE_NAME" --subresource=status -p '{"status": {"conditions": [{"type": "KernelDeadlock", "status": "False", "reason": "KernelHasNoDeadlock"}]}}'
  # Something else changes: a status is sent.
  kubectl patch node "$NODE_NAME" --subresource=status --type=json -p '[{"op": "add", "path": "/status/capacity/example.com~1probe", "value": "1"}]'
  within 30 sh -c 'kubectl get node "$0" -o json | jq -e ".status.allocatable[\"example.com/probe\"]"' "$NODE_NAME"
  same "$(node_condition KernelDeadlock '{.status} {.reason}')" "False KernelHasNoDeadlock"
  kubectl patch node "$NODE_NAME" --subresource=status --type=json -p '[{"op": "remove", "path": "/status/capacity/example.com~1probe"}]'
}
check "conditions of others stay when a status is sent" node_other_condition

node_selected() {
  new_namespace
  kubectl label node "$NODE_NAME" "disk-$NS=ssd"
  shell_pod a 'exec sleep 60' "nodeSelector: {disk-$NS: ssd}"
  within 60 pod_phase a Running
  kubectl label node "$NODE_NAME" "disk-$NS-"
}
check "a pod that selects the node by a label given to it later is let in" node_selected

refused_at_start() {
  local text=$1 out code=0
  shift
  out=$(timeout 20 "$BERTH_BIN" --root "$WORK/refused" --state "$WORK/refused-state" --config "$WORK/kubelet.yaml" node --kubeconfig "$CONTROL_PLANE/kubelet.conf" \
    --kubelet-root "$WORK/refused-kubelet" "$@" 2>&1) || code=$?
  echo "$out"
  # 124: it went on until its time was over.
  [ $code -ne 0 ]
  [ $code -ne 124 ]
  grep -q "$text" <<< "$out"
}
check "a label that a node may not give itself is refused at start" refused_at_start 'node-role.kubernetes.io/worker' --node-labels node-role.kubernetes.io/worker=
check "a cloud provider that is not external is refused at start" refused_at_start 'neither empty nor external' --cloud-provider aws

# Alone: what follows changes the node.

node_cordoned() {
  kubectl cordon "$NODE_NAME"
  within 30 node_event NodeNotSchedulable
  kubectl uncordon "$NODE_NAME"
  within 30 node_event NodeSchedulable
}
alone "cordon and uncordon are events of the node" node_cordoned

node_lease_again() {
  kubectl -n kube-node-lease delete lease "$NODE_NAME"
  within 30 lease_json '{.spec.holderIdentity}'
  node_lease
}
alone "a lease that somebody deletes is made again" node_lease_again

node_idle() {
  local all leases seen="$WORK/checks/idle-audit"
  # Statuses of the scenarios before are through.
  within 60 quiet_for_two_periods
  all=$(wc -l < "$AUDIT")
  sleep 25
  tail -n +$((all + 1)) "$AUDIT" > "$seen"
  jq -r '[.verb, .requestURI] | join(" ")' "$seen" | sort | uniq -c
  same "$(AUDIT=$seen calls patch nodes/status)" 0
  leases=$(AUDIT=$seen calls update leases)
  [ "$leases" -ge 2 ]
  [ "$leases" -le 3 ]
}
quiet_for_two_periods() { local before; before=$(calls patch nodes/status); sleep 5; [ "$(calls patch nodes/status)" -eq "$before" ]; }
alone "an idle node sends no status for twelve of its periods, and a lease in ten seconds" node_idle

node_resident() { new_namespace; trap - EXIT; shell_pod resident 'trap "exit 0" TERM; while :; do sleep 0.1; done'; within 60 pod_phase resident Running; }
no_namespace_ends() { local left; left=$(kubectl get namespaces -o json | jq -r '.items[] | select(.status.phase == "Terminating") | .metadata.name') && same "$left" ""; }
node_restarted() {
  node_resident
  # What others have left would end in the midst of this.
  within 60 no_namespace_ends
  local before since starts
  before=$(footprint) since=$(node_condition Ready '{.lastTransitionTime}') starts=$(node_events Starting)
  restart_node "$1"
  within 30 more_node_events Starting "$starts"
  sleep 3
  within 30 node_ready
  same "$(node_condition Ready '{.lastTransitionTime}')" "$since"
  same "$(footprint)" "$before"
}
alone "a restart of the agent keeps the node Ready and its pods" node_restarted TERM
alone "kill -9 of the agent and its restart keep the node Ready and its pods" node_restarted KILL

node_line_up() {
  stop_node
  kubectl label node "$NODE_NAME" --overwrite kubernetes.io/hostname=wrong disk=ssd
  kubectl annotate node "$NODE_NAME" volumes.kubernetes.io/controller-managed-attach-detach-
  start_node --node-labels disk=hdd
  within 30 node_labels
  node_attach
  same "$(node_json '{.metadata.labels.disk}')" ssd
  kubectl label node "$NODE_NAME" disk-
}
alone "an object that was there is brought into line, but for labels of the command line" node_line_up

node_absent() { local left; left=$(kubectl get node "$NODE_NAME" --ignore-not-found -o name) && same "$left" ""; }
node_deleted() {
  local sandboxes pid
  sandboxes=$(crictl ps -q --no-trunc | sort) pid=$(node_pid)
  kubectl delete node "$NODE_NAME"
  sleep 6
  node_absent
  same "$(crictl ps -q --no-trunc | sort)" "$sandboxes"
  kill -0 "$pid"
  restart_node
  within 30 node_ready
  same "$(crictl ps -q --no-trunc | sort)" "$sandboxes"
}
alone "a deleted node stays deleted until the agent starts again, and no container ends" node_deleted

# A node that is registered anew with these flags.
new_node() {
  stop_node
  kubectl delete node "$NODE_NAME" --ignore-not-found
  kubectl wait --for=delete node/"$NODE_NAME" --timeout=20s
  start_node "$@"
}
node_ready_soon() {
  stop_node
  kubectl delete node "$NODE_NAME"
  local begun=$EPOCHREALTIME took
  start_node
  within 60 node_ready
  took=$(( (${EPOCHREALTIME/./} - ${begun/./}) / 1000 ))
  echo "Ready $took ms after its start"
  [ $took -lt 5000 ]
}
alone "a new node is Ready in under 5 s from its start" node_ready_soon

node_flags() {
  new_node --register-with-taints dedicated=gpu:NoSchedule,quiet:PreferNoSchedule --node-labels disk=ssd,node.kubernetes.io/pool=a --provider-id cloud://7
  within 30 node_ready
  same "$(node_json '{range .spec.taints[*]}{.key}={.value}:{.effect} {end}')" "dedicated=gpu:NoSchedule quiet=:PreferNoSchedule "
  same "$(node_json '{.metadata.labels.disk} {.metadata.labels.node\.kubernetes\.io/pool} {.spec.providerID}')" "ssd a cloud://7"
}
alone "a new node has the taints, labels and provider ID of the command line" node_flags

node_taints_stay() {
  refute has dedicated <<< "$(node_json '{.spec.taints[*].key}')" || kubectl taint node "$NODE_NAME" dedicated-
  stop_node
  kubectl annotate node "$NODE_NAME" volumes.kubernetes.io/controller-managed-attach-detach-
  start_node --register-with-taints dedicated=gpu:NoSchedule
  within 30 node_ready
  # The object has been brought into line by then.
  within 30 node_attach
  refute grep -q dedicated <<< "$(node_json '{.spec.taints[*].key}')"
}
alone "taints of the command line are not given to an object that is there" node_taints_stay

node_cloud() {
  new_node --cloud-provider external
  within 30 node_ready
  same "$(node_json '{.spec.taints[?(@.key=="node.cloudprovider.kubernetes.io/uninitialized")].effect}')" NoSchedule
  same "$(node_json '{.metadata.annotations.alpha\.kubernetes\.io/provided-node-ip}')" "$NODE_IP"
  kubectl patch node "$NODE_NAME" --subresource=status -p '{"status": {"addresses": [{"type": "ExternalIP", "address": "198.51.100.7"}]}}'
  # Two of the status's periods and the lease's work are over then.
  sleep 5
  node_json '{.status.addresses[*].address}' | grep -w 198.51.100.7
}
alone "with an external cloud the node waits for its controller and leaves it the addresses" node_cloud

node_unregistered() {
  new_node --register-node=false
  sleep 4
  node_absent
  printf '{apiVersion: v1, kind: Node, metadata: {name: %s}}\n' "$NODE_NAME" | kubectl create -f -
  within 30 node_ready
}
alone "with registerNode: false an administrator makes the node, and it becomes Ready" node_unregistered

node_configured() {
  stop_node
  kubectl delete node "$NODE_NAME"
  write_node_config "nodeStatusMaxImages: 0" "nodeLeaseDurationSeconds: 20" "providerID: cloud://8" \
    "registerWithTaints: [{key: a, value: b, effect: NoSchedule}]"
  start_node
  within 30 node_ready
  same "$(node_json '{.status.images} {.spec.providerID} {.spec.taints[?(@.key=="a")].value}')" " cloud://8 b"
  within 30 lease_holds 20
}
lease_holds() { same "$(lease_json '{.spec.leaseDurationSeconds}')" "$1"; }
alone "the node's fields of KubeletConfiguration are acted on" node_configured

node_pressed() {
  stop_node
  write_node_config "evictionPressureTransitionPeriod: 1s"
  sed -i "s/memory.available: 50Mi/memory.available: 99%/" "$WORK/kubelet.yaml"
  start_node
  within 40 node_has_pressure True
  within 30 node_event NodeHasInsufficientMemory
  within 30 sh -c 'kubectl get node "$0" -o json | jq -e ".spec.taints | any(.key == \"node.kubernetes.io/memory-pressure\")"' "$NODE_NAME"
  stop_node
  write_node_config
  start_node
  within 40 node_has_pressure False
}
node_has_pressure() { same "$(node_condition MemoryPressure '{.status}')" "$1"; }
alone "memory that runs out is a condition, an event and the controller's taint" node_pressed

node_network() {
  within 30 node_ready
  local unready ready
  unready=$(node_events NodeNotReady) ready=$(node_events NodeReady)
  printf '{"cniVersion": "1.1.0", "name": "broken", "plugins": [{"type": "no-such-plugin"}]}\n' > "$WORK/net.d/00-broken.conflist"
  within 30 node_not_ready
  within 30 more_node_events NodeNotReady "$unready"
  node_condition Ready '{.reason}: {.message}' | grep '^KubeletNotReady: container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:'
  rm "$WORK/net.d/00-broken.conflist"
  within 30 node_ready
  within 30 more_node_events NodeReady "$ready"
}
alone "the node is not Ready while the runtime's network is not, and says why" node_network

node_server_away() {
  new_node
  within 30 node_ready
  node_resident
  local before
  before=$(footprint)
  stop_api_server
  sleep 10
  same "$(crictl ps -q --no-trunc | sort)" "$(tail -n "$(crictl ps -q | wc -l)" <<< "$before")"
  resume_api_server
  within 30 node_ready
  within 30 sh -c '[ "$(kubectl -n kube-node-lease get lease "$0" -o jsonpath={.spec.holderIdentity})" = "$0" ]' "$NODE_NAME"
  same "$(footprint)" "$before"
}
alone "while the API server is away nothing restarts, and the node is Ready when it is back" node_server_away
