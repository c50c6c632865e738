#!/bin/bash
# Runs the upstream kubelet on `berth cri` under a real control plane: usage: e2e/kubernetes.sh [PATTERN]; with a pattern only the
# checks whose name matches it and those that others need.
# One line a check, then `kubernetes: N passed, N failed`. KUBERNETES_KEEP=folder: all logs are copied there.
# KUBELET_GATES=EventedPLEG=true,…: feature gates of the kubelet.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/lib.sh"
. "$HERE/controlplane.sh"

if [ "${KUBERNETES_WORK:-}" = "" ]; then
  KUBERNETES_WORK=$(make_work); export KUBERNETES_WORK
  trap 'rm -rf "$KUBERNETES_WORK"' EXIT
  "$(tool_bin berth-sandbox)" --shared-root "$HERE/kubernetes.sh" "$@"
  exit
fi

WORK=$KUBERNETES_WORK
PATTERN=${1:-}
. "$HERE/checks.sh"
pod_json() { kubectl get pod "$1" -o "jsonpath=$2"; }
pod_ready() { [ "$(pod_json "$1" '{.status.conditions[?(@.type=="Ready")].status}')" = True ] || { kubectl describe pod "$1"; return 1; }; }
# once with WebSocket, which kubectl prefers, once with SPDY
over_both() {
  KUBECTL_REMOTE_COMMAND_WEBSOCKETS=true KUBECTL_PORT_FORWARD_WEBSOCKETS=true "$@"
  KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false KUBECTL_PORT_FORWARD_WEBSOCKETS=false "$@"
}
export -f pod_ready pod_json

# What the kubelet writes into fixed folders goes to this run's; the machine's own sysctls, which it sets, stay as they are: it
# sees what it wants in a mount namespace whose other mounts are shared with berth's.
prepare_node() {
  mkdir -p "$WORK"/{var,var-work,kubelet,pod-logs,plugins,sysctl}
  mount -t overlay overlay -o "lowerdir=/var,upperdir=$WORK/var,workdir=$WORK/var-work" /var
  mount --make-shared /var
  mkdir -p /var/lib/kubelet /var/log
}
start_kubelet() {
  local name
  { cat "$HERE/kubernetes/kubelet.yaml"
    echo "authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $CONTROL_PLANE/pki/ca.crt}}"
    echo "containerRuntimeEndpoint: unix://$CRI_SOCKET"
    echo "podLogsDir: $WORK/pod-logs"
    echo "volumePluginDir: $WORK/plugins"
  } > "$WORK/kubelet.yaml"
  for name in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 kernel/keys/root_maxkeys=1000000 \
    kernel/keys/root_maxbytes=25000000; do
    mkdir -p "$WORK/sysctl/$(dirname "$name")"
    echo "${name#*=}" > "$WORK/sysctl/${name%=*}"
  done
  serve kubelet unshare --mount --propagation unchanged sh -c '
    set -e
    mount --make-private /proc
    cd "$0"
    for file in $(find . -type f); do mount --bind "$file" "/proc/sys/$file"; done
    cd /
    exec "$@"' "$WORK/sysctl" kubelet --config "$WORK/kubelet.yaml" --kubeconfig "$CONTROL_PLANE/kubelet.conf" \
    --root-dir "$WORK/kubelet" --hostname-override "$NODE_NAME" --node-ip "$NODE_IP" --v=2 ${KUBELET_GATES:+--feature-gates="$KUBELET_GATES"}
}

node_ready() { [ "$(kubectl get node "$NODE_NAME" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" = True ] || { kubectl describe node; return 1; }; }
node() { within 60 node_ready; same "$(kubectl get node "$NODE_NAME" -o 'jsonpath={.status.nodeInfo.kubeletVersion}')" "v$KUBERNETES_VERSION"; }

deployment() {
  kubectl rollout status deployment/web --timeout=180s
  same "$(kubectl get pods -l app=web --field-selector status.phase=Running -o name | wc -l)" 20
  same "$(kubectl get pods -l app=web -o 'jsonpath={.items[*].status.podIP}' | tr ' ' '\n' | sort -u | wc -l)" 20
}
exec_plain() {
  same "$(kubectl exec shell -- sh -c 'echo out; echo error >&2' 2> "$WORK/exec.err")" out
  grep -q '^error$' "$WORK/exec.err"
  same "$(printf 'a\nb\n' | kubectl exec -i shell -- cat)" "$(printf 'a\nb')"
  local code=0
  kubectl exec shell -- sh -c 'exit 7' || code=$?
  same "$code" 7
}
exec_tty() {
  local out
  # An input that says nothing and does not end.
  [ -p "$WORK/quiet" ] || mkfifo "$WORK/quiet"
  exec 6<> "$WORK/quiet"
  out=$(script -qec 'stty rows 33 cols 111; kubectl exec -it shell -- sh -c "tty; until stty size | grep -qx \"33 111\"; do sleep 0.1; done; stty size; exit 5"; echo code $?' /dev/null <&6 | tr -d '\r')
  echo "$out"
  grep -q '^/dev/pts/0$' <<< "$out"
  grep -q '^33 111$' <<< "$out"
  grep -q '^code 5$' <<< "$out"
}
attach() {
  # The container ends when its input does not: the client is ended after it heard its answer.
  local out=$WORK/attach.out client
  rm -f "$WORK/attach.in"
  mkfifo "$WORK/attach.in"
  kubectl attach -i echo -c main < "$WORK/attach.in" > "$out" 2>&1 &
  client=$!
  exec 8> "$WORK/attach.in"
  sleep 1
  echo "$1" >&8
  within 15 grep -q "^heard $1\$" "$out"
  exec 8>&-
  kill $client 2>/dev/null || true
  wait $client || true
}
attach_both() {
  KUBECTL_REMOTE_COMMAND_WEBSOCKETS=true attach one
  KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false attach two
}
attach_tty() {
  local out=$WORK/attach-tty.out client
  [ -p "$WORK/typed" ] || mkfifo "$WORK/typed"
  # Never at its end: that would end the shell in the container.
  exec 5<> "$WORK/typed"
  script -qec 'kubectl attach -it terminal' /dev/null <&5 > "$out" 2>&1 &
  client=$!
  within 15 grep -q 'press' "$out"
  echo 'echo $((6 * 7)); tty' >&5
  within 15 grep -q '^42.$' "$out"
  within 15 grep -q '^/dev/pts/0.$' "$out"
  kill -9 $client
  same "$(pod_json terminal '{.status.containerStatuses[0].restartCount}')" 0
}
copy() {
  [ -f "$WORK/big" ] || head -c 200M /dev/urandom > "$WORK/big"
  local sum
  sum=$(sha256sum < "$WORK/big")
  kubectl cp "$WORK/big" shell:/big/file
  same "$(kubectl exec shell -- sha256sum /big/file | cut -d' ' -f1)" "${sum%% *}"
  kubectl cp shell:/big/file "$WORK/back"
  same "$(sha256sum < "$WORK/back")" "$sum"
  kubectl exec shell -- rm /big/file
  rm "$WORK/back"
}
port_forward() {
  local pod forward n
  pod=$(kubectl get pods -l app=web -o 'jsonpath={.items[0].metadata.name}')
  kubectl port-forward "pod/$pod" 18080:80 > "$WORK/forward.out" 2>&1 &
  forward=$!
  within 10 curl -fsS -o /dev/null http://127.0.0.1:18080/
  for n in $(seq 100); do curl -fsS http://127.0.0.1:18080/ | has 'Welcome to nginx'; done
  same "$(seq 64 | xargs -P 16 -I{} curl -fsS -o /dev/null -w '%{http_code}\n' http://127.0.0.1:18080/ | sort | uniq -c | tr -s ' ')" " 64 200"
  kill $forward
  wait $forward || true
}
logs_follow() {
  local out=$WORK/follow.out uid logs
  within 60 pod_ready writer
  timeout 90 kubectl logs -f writer > "$out" &
  logs=$!
  within 10 grep -q ready "$out"
  kubectl exec writer -- touch /go
  wait $logs
  same "$(awk '$1 == "line" {print $2}' "$out" | sort -nu | wc -l) of $(wc -l < "$out")" "6000 of 6001"
  uid=$(pod_json writer '{.metadata.uid}')
  ls -l "$WORK"/pod-logs/default_writer_"$uid"/main/
  [ "$(ls "$WORK"/pod-logs/default_writer_"$uid"/main/ | wc -l)" -ge 3 ]
}
debug() {
  kubectl debug shell --image=registry.k8s.io/e2e-test-images/busybox:1.37.0-1 --target=main -c debugger --profile=general \
    -- sh -c 'tr "\0" " " < /proc/1/cmdline; echo; ls /proc/1/root/big; sleep 3600'
  within 60 sh -c 'kubectl logs shell -c debugger | grep "shell is up"'
  same "$(kubectl exec shell -c debugger -- sh -c 'tr "\0" " " < /proc/1/cmdline | cut -c1-5')" "sh -c"
}
resize() {
  local id
  id=$(pod_json shell '{.status.containerStatuses[0].containerID}')
  kubectl patch pod shell --subresource resize -p \
    '{"spec":{"containers":[{"name":"main","resources":{"requests":{"cpu":"200m","memory":"128Mi"},"limits":{"cpu":"750m","memory":"384Mi"}}}]}}'
  within 60 resized
  same "$(pod_json shell '{.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}')" "$id 0"
  if [ -d /sys/fs/cgroup/memory ]; then
    same "$(kubectl exec shell -c main -- cat /sys/fs/cgroup/memory/memory.limit_in_bytes)" $((384 << 20))
    same "$(kubectl exec shell -c main -- cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us)" 75000
  else
    same "$(kubectl exec shell -c main -- cat /sys/fs/cgroup/memory.max)" $((384 << 20))
    same "$(kubectl exec shell -c main -- cat /sys/fs/cgroup/cpu.max)" "75000 100000"
  fi
}
resized() {
  local out
  out=$(pod_json shell '{.status.containerStatuses[0].resources.limits.cpu} {.status.containerStatuses[0].resources.limits.memory} {.status.containerStatuses[0].resources.requests.cpu} {.status.conditions[?(@.type=="PodResizePending")].message}{.status.conditions[?(@.type=="PodResizeInProgress")].message}')
  same "$out" "750m 384Mi 200m "
}
mapped() {
  within 60 pod_ready mapped
  local map
  map=$(kubectl exec mapped -- sh -c 'set -- $(cat /proc/self/uid_map); echo $1 $2 $3')
  echo "$map"
  [ "${map%% *}" = 0 ]
  [ "$(cut -d' ' -f2 <<< "$map")" -ge 65536 ]
  same "$(kubectl exec mapped -- cat /data/user)" 0
  same "$(kubectl exec mapped -- stat -c %u /data/user /bin/sh /tool/usr/bin/nnp /var/run/secrets/kubernetes.io/serviceaccount/token)" \
    "$(printf '0\n0\n0\n0')"
}
image_volume() {
  within 60 pod_ready image-volume
  kubectl exec image-volume -- /tool/usr/bin/nnp | grep 'Effective uid: 0'
  kubectl exec image-volume -- sh -c '[ -f /only-etc/passwd ] && [ ! -e /only-etc/etc ]'
  kubectl exec image-volume -- sh -c 'touch /tool/x 2>&1 || true; touch /only-etc/x 2>&1 || true' | grep -c 'Read-only file system' | has -x 2
}

# Everything that tells a restarted pod or container from one that went on.
footprint() {
  kubectl get pods --field-selector status.phase=Running -o 'jsonpath={range .items[*]}{.metadata.name} {.status.podIP} {range .status.containerStatuses[*]}{.containerID} {.restartCount} {.state.running.startedAt}{end}{"\n"}{end}' | sort
  crictl pods -q --no-trunc --state ready | sort
  crictl ps -q --no-trunc | sort
}
kubelet_restarted() {
  local before
  before=$(footprint)
  kill -9 "${PIDS[kubelet]}"
  within 10 dead "${PIDS[kubelet]}"
  start_kubelet
  echo "${PIDS[kubelet]}" > "$WORK/kubelet.pid"
  within 30 kubectl exec shell -c main -- true
  sleep 10
  within 60 node_ready
  same "$(footprint)" "$before"
}
agent_killed() {
  local before
  before=$(footprint)
  kill -9 "$CRI_PID"
  within 10 dead "$CRI_PID"
  start_cri berth "$WORK/cri"
  echo "$CRI_PID" > "$WORK/cri.pid"
  # The kubelet tries its connection again after some seconds.
  within 30 kubectl exec shell -c main -- true
  # Two relists and a status update of the kubelet.
  sleep 15
  within 60 node_ready
  same "$(footprint)" "$before"
  within 30 sh -c 'kubectl logs shell -c main | grep "shell is up"'
  curl -fsS "http://$(kubectl get pods -l app=web -o 'jsonpath={.items[0].status.podIP}')/" | has 'Welcome to nginx'
}
gone() {
  kubectl delete deployment web --wait=false
  kubectl delete pods --all --wait=false
  within 60 sh -c 'p=$(kubectl get pods -o name) && echo "$p" && [ -z "$p" ]'
  within 10 none_ready
  # Sandboxes go with the kubelet's next collection, once a minute.
  within 90 sandboxes_gone
}
none_ready() { local left; left=$(crictl pods -q --state ready; crictl ps -q); echo "$left"; [ -z "$left" ]; }
sandboxes_gone() { local left; left=$(crictl pods -q); echo "$left"; [ -z "$left" ]; }
no_leaks() {
  local left
  left=$("$BERTH_BIN" --root "$WORK/cri/root" --state /run/berth leaks --settle 2>&1) || true
  same "$left" ""
}

self_checks() {
  kubectl apply -f "$HERE/kubernetes/self-checks.yaml"
  within 60 ended config rights together host message greedy
  local pod
  for pod in config rights together host; do
    [ "$(pod_json $pod '{.status.phase}')" = Succeeded ] || { kubectl get pod $pod -o wide; kubectl logs $pod --all-containers --prefix | tail -n 8; failed=1; }
  done
  [ $failed = 0 ]
  same "$(pod_json message '{.status.containerStatuses[0].state.terminated.exitCode} {.status.containerStatuses[0].state.terminated.reason} {.status.containerStatuses[0].state.terminated.message}')" "3 Error farewell"
  same "$(pod_json greedy '{.status.containerStatuses[0].state.terminated.exitCode} {.status.containerStatuses[0].state.terminated.reason}')" "137 OOMKilled"
}
ended() {
  local pod
  for pod; do case $(pod_json "$pod" '{.status.phase}') in Succeeded | Failed) ;; *) kubectl get pod "$pod"; return 1 ;; esac; done
}
liveness() { within 60 restarted lively; within 30 sh -c 'kubectl get events --field-selector involvedObject.name=lively | grep Unhealthy'; kubectl delete pod lively; }
restarted() { [ "$(pod_json "$1" '{.status.containerStatuses[0].restartCount}')" -ge 1 ] || { kubectl describe pod "$1"; return 1; }; }
# What metrics-server and eviction read.
stats() { within 60 all_counted; }
all_counted() {
  kubectl get --raw "/api/v1/nodes/$NODE_NAME/proxy/stats/summary" > "$WORK/summary.json"
  jq -r '[.pods[] | select(.podRef.name | startswith("web-"))
    | .containers[] | select(.memory.workingSetBytes > 0 and .cpu.usageCoreNanoSeconds > 0 and .rootfs.usedBytes != null and .logs != null)] | length' \
    "$WORK/summary.json" | has -x 20 || { jq -c '.pods[0]' "$WORK/summary.json"; return 1; }
  jq -e '.node.runtime.imageFs.usedBytes > 0' "$WORK/summary.json"
}

keep_logs() { [ -z "${KUBERNETES_KEEP:-}" ] || { mkdir -p "$KUBERNETES_KEEP" && cp -rT "$LOGS" "$KUBERNETES_KEEP" && cp "$WORK/cri/log" "$KUBERNETES_KEEP/berth.log"; }; }
prepare_node
start_registry "$IMAGES/registry"
start_cri berth "$WORK/cri"
disown # bash would tell of its end
start_control_plane "$WORK/cp"
bounded_kubectl "$WORK/bin"
trap keep_logs EXIT
start_kubelet

need "the node is Ready" node
kubectl apply -f "$HERE/kubernetes/pods.yaml" > "$WORK/apply.log"
need "a Deployment of 20 pods runs, each with an address of its own" deployment
for pod in shell echo terminal; do need "pod $pod is Ready" within 60 pod_ready $pod; done
check "exec: output, input, exit code (WebSocket and SPDY)" over_both exec_plain
check "exec -it: a terminal with the client's size (WebSocket and SPDY)" over_both exec_tty
check "attach -i (WebSocket and SPDY)" attach_both
check "attach -it" attach_tty
check "cp of 200 MB, both ways" copy
check "port-forward, one and sixteen connections at a time (WebSocket and SPDY)" over_both port_forward
check "logs -f over rotations misses no line" logs_follow
check "an ephemeral container sees its target's processes" debug
check "a resize in place of CPU and memory" resize
check "a pod with user namespaces (hostUsers: false)" mapped
check "an image volume, whole and by sub-path" image_volume
check "pods that look at their files, rights, namespaces and ends" self_checks
check "a failed liveness probe restarts the container" liveness
check "the stats of every container" stats
check "kill -9 of berth cri and its restart restart nothing" agent_killed
[ ! -f "$WORK/cri.pid" ] || CRI_PID=$(cat "$WORK/cri.pid")
check "kill -9 of the kubelet and its restart restart nothing" kubelet_restarted
[ ! -f "$WORK/kubelet.pid" ] || PIDS[kubelet]=$(cat "$WORK/kubelet.pid")
need "deleted pods go" gone
need "nothing is left without an owner" no_leaks
kill "${PIDS[kubelet]}" 2>/dev/null || true
kill "$CRI_PID" 2>/dev/null || true
finish_checks kubernetes
