# What the scenarios of node.sh share. The node is $NODE_NAME; $WORK is the run's folder, $LOGS has all logs.
AUDIT=$WORK/audit/log
CRI_SOCKET=/run/berth/berth.sock
BERTH=("$BERTH_BIN" --root "$WORK/berth" --state /run/berth)
# An image that is in the registry: a shell with the usual commands.
BUSYBOX=registry.k8s.io/e2e-test-images/busybox:1.37.0-1

# The node.

# write_node_config [YAML LINE…]: the configuration, with more lines at its end.
write_node_config() {
  { cat "$HERE/node/kubelet.yaml"
    echo "authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $CONTROL_PLANE/pki/ca.crt}}"
    echo "staticPodPath: $WORK/manifests"
    echo "podLogsDir: $WORK/pod-logs"
    [ $# -eq 0 ] || printf '%s\n' "$@"
  } > "$WORK/kubelet.yaml"
}
# start_node [FLAG…]: starts the agent; its process id is what node_pid prints. The node's name may be another: --node-name comes last.
start_node() {
  mkdir -p "$WORK/net.d"
  date -u +%Y-%m-%dT%H:%M:%S.%6NZ > "$WORK/started"
  write_mirrors "$WORK/certs.d"
  serve berth "${BERTH[@]}" --config "$WORK/kubelet.yaml" node --kubeconfig "$CONTROL_PLANE/kubelet.conf" \
    --kubelet-root "$WORK/kubelet" --container-logs-dir "$WORK/links" --registry-config-dir "$WORK/certs.d" --cni-conf-dir "$WORK/net.d" \
    --node-name "$NODE_NAME" --node-ip "$NODE_IP" ${NODE_FLAGS:-} "$@"
}
node_pid() { cat "$LOGS/berth.pid"; }
# stop_node [SIGNAL]: ends the agent and waits for its end; the pods stay.
stop_node() {
  local pid
  pid=$(node_pid)
  kill -"${1:-TERM}" "$pid" 2> /dev/null || true
  within 30 dead "$pid"
}
# restart_node [SIGNAL]: another agent on the same folders.
restart_node() { stop_node "${1:-TERM}"; start_node; }
# node_ready: by the word of this agent: what an earlier one has said holds until its lease ends.
node_ready() {
  [ "$(node_condition Ready '{.status}')" = True ] && [[ $(lease_json '{.spec.renewTime}') > $(cat "$WORK/started") ]] ||
    { kubectl describe node "$NODE_NAME"; tail -n 5 "$LOGS/berth.log"; return 1; }
}
node_not_ready() { [ "$(node_condition Ready '{.status}')" = False ] || { kubectl describe node "$NODE_NAME"; return 1; }; }
# node_json JSONPATH, node_condition TYPE JSONPATH
node_json() { kubectl get node "$NODE_NAME" -o "jsonpath=$1"; }
lease_json() { kubectl -n kube-node-lease get lease "$NODE_NAME" -o "jsonpath=$1"; }
node_condition() { node_json "{range .status.conditions[?(@.type==\"$1\")]}$2{end}"; }

# The API server.

stop_api_server() {
  local pid
  pid=$(cat "$LOGS/kube-apiserver.pid")
  kill -9 "$pid"
  within 30 dead "$pid"
}
# With controllers anew: those that ran look again only after half a minute.
resume_api_server() {
  start_api_server
  wait_for "the API server" kubectl get --raw /readyz > /dev/null
  restart_controller_manager
  restart_scheduler
}
# The node and its control plane as a check expects them, after one that broke off.
set_right() {
  kill -0 "$(cat "$LOGS/kube-apiserver.pid")" 2> /dev/null || resume_api_server
  stop_node KILL
  rm -f "$WORK"/net.d/* "$WORK"/manifests/*
  cp "$WORK/kubelet.conf" "$CONTROL_PLANE/kubelet.conf"
  write_node_config
  start_node
  within 30 node_ready
}
# calls VERB RESOURCE[/SUBRESOURCE] [NAME]: how often the node has asked for it so far.
calls() {
  jq -r --arg verb "$1" --arg what "$2" --arg name "${3:-}" 'select(.verb == $verb and $name == (if $name == "" then "" else .objectRef.name end)
    and $what == .objectRef.resource + (if .objectRef.subresource then "/" + .objectRef.subresource else "" end)) | .verb' "$AUDIT" | wc -l
}
# answered VERB RESOURCE NAME: those that got what they asked for. A node may be refused an object of its pod for a moment: the API server learns
# of the pod by a watch of its own.
answered() {
  jq -r --arg verb "$1" --arg what "$2" --arg name "$3" 'select(.verb == $verb and .objectRef.resource == $what and .objectRef.name == $name
    and .responseStatus.code == 200) | .verb' "$AUDIT" | wc -l
}
# all_calls: a line for each kind of call, with its number.
all_calls() { jq -r '[.verb, .objectRef.resource, .objectRef.subresource // ""] | join(" ")' "$AUDIT" | sort | uniq -c | sort -rn; }

# Pods, in this scenario's namespace.

# new_namespace: an empty one with its service account, in $NS, where `k` works; it goes with its pods when the scenario ends.
new_namespace() {
  NS=t-$BASHPID
  kubectl create namespace "$NS" > /dev/null
  trap 'kubectl delete namespace "$NS" --wait=false > /dev/null' EXIT
  within 30 kubectl -n "$NS" get serviceaccount default > /dev/null
}
k() { kubectl -n "$NS" "$@"; }
# create_pod NAME SPEC [METADATA]: a pod of a JSON or flow YAML spec.
create_pod() { printf '{apiVersion: v1, kind: Pod, metadata: {name: %s, %s}, spec: %s}\n' "$1" "${3:-}" "$2" | k create -f -; }
# shell_pod NAME COMMAND [FIELDS]: one container `main` of busybox that runs the command with sh -c; more fields of the spec as flow YAML.
shell_pod() {
  create_pod "$1" "{terminationGracePeriodSeconds: 1, containers: [{name: main, image: $BUSYBOX, command: [sh, -c, $(jq -nc --arg c "$2" '$c')]}]${3:+, $3}}"
}
pod_json() { k get pod "$1" -o "jsonpath=$2"; }
uid_of() { pod_json "$1" '{.metadata.uid}{"\n"}'; }
pod_ready() { [ "$(pod_json "$1" '{.status.conditions[?(@.type=="Ready")].status}')" = True ] || { k describe pod "$1"; return 1; }; }
# pod_phase NAME PHASE
pod_phase() { [ "$(pod_json "$1" '{.status.phase}')" = "$2" ] || { k describe pod "$1"; return 1; }; }
pod_gone() { local left; left=$(k get pod "$1" --ignore-not-found -o name) && same "$left" ""; }
# pod_event NAME REASON: the messages of such events, one a line; fails without any.
pod_event() { k get events --field-selector "involvedObject.name=$1,reason=$2" -o 'jsonpath={range .items[*]}{.message}{"\n"}{end}' | grep .; }
node_event() { kubectl -n default get events --field-selector "involvedObject.kind=Node,involvedObject.name=$NODE_NAME,reason=$1" -o 'jsonpath={range .items[*]}{.message}{"\n"}{end}' | grep .; }
# node_events REASON: how often that was told of the node. more_node_events REASON NUMBER: oftener than so.
node_events() { kubectl -n default get events --field-selector "involvedObject.kind=Node,involvedObject.name=$NODE_NAME,reason=$1" -o json | jq '[.items[] | .count // 1] | add // 0'; }
more_node_events() { local now; now=$(node_events "$1") && [ "$now" -gt "$2" ]; }
# footprint: everything that tells a restarted pod or container from one that went on.
footprint() {
  kubectl get pods -A --field-selector status.phase=Running -o 'jsonpath={range .items[*]}{.metadata.uid} {.status.podIP} {range .status.containerStatuses[*]}{.containerID} {.restartCount} {.state.running.startedAt}{end}{"\n"}{end}' | sort
  crictl pods -q --no-trunc --state ready | sort
  crictl ps -q --no-trunc | sort
}

# review TOKEN AUDIENCE: what the API server says of it, as JSON.
review() {
  jq -nc --arg t "$1" --arg a "$2" '{apiVersion: "authentication.k8s.io/v1", kind: "TokenReview", spec: {token: $t, audiences: (if $a == "" then null else [$a] end)}}' |
    kubectl create -f - -o json
}

# words PATTERN TEXT: the text has something that matches.
words() { [[ $2 =~ $1 ]] || { printf 'wanted: %s\nis: %s\n' "$1" "$2"; return 1; }; }
# refute COMMAND…: it has to fail, which `!` does not tell set -e.
refute() { if "$@"; then echo "did not fail: $*"; return 1; fi; }
# attempt COMMAND…: its exit code is in $STATUS, so that what it has changed can be undone; inside, unlike behind `||`, the first failure ends it.
attempt() {
  "$@" &
  STATUS=0
  wait $! || STATUS=$?
}

# The end.

# none_refused: of what the node has asked for so far the API server has refused nothing, but for a moment: it learns which objects a node's pods
# refer to, and which pods are the node's, by watches of its own, and in a namespace that goes nothing is made.
none_refused() {
  local refused
  refused=$(jq -c --arg user "system:node:$NODE_NAME" 'select(.user.username == $user and (.responseStatus.code == 403 or .objectRef.subresource == "token"))' "$AUDIT" |
    jq -rs '(map(select(.responseStatus.code < 300) | .requestURI)) as $given | .[] | select(.responseStatus.code == 403)
    | select(((.objectRef.resource | IN("configmaps", "secrets", "persistentvolumeclaims", "persistentvolumes", "volumeattachments"))
      and .annotations["authorization.k8s.io/decision"] == "forbid") | not)
    | select((.objectRef.subresource == "token" and .annotations["authorization.k8s.io/decision"] == "forbid") | not)
    | select((.responseStatus.message // "" | contains("bound to a pod scheduled on a different node")) and IN(.requestURI; $given[]) | not)
    | select((.responseStatus.message // "" | contains("because it is being terminated")) | not)
    | [.verb, .requestURI, .responseStatus.message] | join(" ")' | sort | uniq -c | head -n 20)
  same "$refused" ""
}

all_gone() {
  rm -f "$WORK"/manifests/*
  kubectl delete pods -A --all --wait=false
  within 60 no_pods
  within 90 no_sandboxes
}
no_pods() { local left; left=$(kubectl get pods -A -o name) && same "$left" ""; }
no_sandboxes() { local left; left=$(crictl pods -q) && same "$left" ""; }
no_leaks() { "${BERTH[@]}" leaks --settle; }
