#!/bin/bash
# The add-ons of a cluster on berth's node: usage: e2e/addons.sh [PATTERN]. kube-proxy and CoreDNS as kubeadm deploys them, metrics-server, flannel,
# and a pod of the shape of kind's network, from images built here, under a control plane of plain processes. With a pattern only the checks
# whose sentence matches run, besides those that others stand on. One line a check, then `addons: N passed, N failed`. NODE_KEEP=folder: all logs
# are copied there.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/lib.sh"
. "$HERE/controlplane.sh"

if [ "${NODE_WORK:-}" = "" ]; then
  NODE_WORK=$(make_work); export NODE_WORK
  trap 'rm -rf "$NODE_WORK"' EXIT
  "$(tool_bin berth-sandbox)" --shared-root "$HERE/addons.sh" "$@"
  exit
fi

WORK=$NODE_WORK
PATTERN=${1:-}
CHECK_JOBS=1
. "$HERE/checks.sh"
. "$HERE/node/lib.sh"
NS=default
# The built-in network has a range of its own here: flannel takes the node's, and pods of both live side by side.
BUILT_IN=10.99.0
OWN_NETWORK="--pod-cidr $BUILT_IN.0/24 --cni-bin-dir /opt/cni/bin"
NO_NETWORK="--no-built-in-network --cni-bin-dir /opt/cni/bin"
CLIENT=10.78.0.2

# apply FILE: an add-on's objects, with this run's versions.
apply() {
  sed -e "s#@METRICS_SERVER_VERSION@#$METRICS_SERVER_VERSION#g; s#@FLANNEL_VERSION@#$FLANNEL_VERSION#g; s#@COREDNS_VERSION@#$COREDNS_VERSION#g
    s#@CNI_PLUGINS_VERSION@#$CNI_PLUGINS_VERSION#g; s#@BUSYBOX@#$BUSYBOX#g; s#@SHELL_COMMAND@#$SHELL_COMMAND#g; s#@NODE_IP@#$NODE_IP#g" "$HERE/addons/manifests/$1.yaml" | kubectl apply -f - > /dev/null
}
# rolled_out NAMESPACE KIND/NAME LABEL: all its pods are Ready.
rolled_out() {
  kubectl -n "$1" rollout status "$2" --timeout 240s || { kubectl -n "$1" describe pods -l "$3" | tail -n 20; kubectl -n "$1" logs -l "$3" --tail 10; return 1; }
}
# A machine outside, which knows the node's address alone.
start_client() {
  ip netns add client
  ip link add client0 type veth peer name eth0 netns client
  ip addr add 10.78.0.1/24 dev client0
  ip link set client0 up
  ip -n client addr add $CLIENT/24 dev eth0
  ip -n client link set eth0 up
  ip -n client route add default via 10.78.0.1
}
in_shell() { k exec shell -- "$@"; }
page() { in_shell timeout 3 /tmp/wget -q -O - "http://$1/"; }
outside() { ip netns exec client curl -s -m 3 "http://$1/"; }
cluster_ip() { k get service "$1" -o 'jsonpath={.spec.clusterIP}'; }
web_pods() { k get pods -l app=web -o 'jsonpath={range .items[*]}{.metadata.name}{"\n"}{end}' | sort; }
# pod_address NAME PREFIX
pod_address() { [[ $(pod_json "$1" '{.status.podIP}') == "$2".* ]] || { k get pod "$1" -o wide; return 1; }; }
# answers_of COMMAND…: who answers in 30 calls.
answers_of() { local n; for n in $(seq 30); do "$@" || true; done | sort -u; }

# Before there is a network.

no_network() {
  within 30 node_not_ready
  node_condition Ready '{.message}' | has "NetworkReady=false.*no network configuration in"
}
unfinished_network() {
  echo '{"cniVersion": "1.0.0", "name": ' > /etc/cni/net.d/90-unfinished.conflist
  within 30 not_ready_for 90-unfinished.conflist
}
not_ready_for() { node_condition Ready '{.message}' | grep "$1" || { node_condition Ready '{.message}'; return 1; }; }
proxy_before_network() {
  node_not_ready
  kubeadm init phase addon kube-proxy --config "$WORK/addons.yaml" --kubeconfig "$KUBECONFIG" >> "$LOGS/kubeadm.log" 2>&1
  rolled_out kube-system daemonset/kube-proxy k8s-app=kube-proxy
  node_not_ready
}
own_network_waits() {
  shell_pod early 'exec sleep 600' 'tolerations: [{operator: Exists}]'
  within 20 pod_event early NetworkNotReady
  pod_phase early Pending
}
kindnet() {
  apply kindnet
  rolled_out kube-system daemonset/kindnet app=kindnet
  within 30 node_ready
}
kindnet_pods() {
  within 30 pod_ready early
  pod_address early 10.244.0
}
kindnet_goes() {
  kubectl -n kube-system delete daemonset kindnet --timeout 30s
  k delete pod early --timeout 30s
  rm /etc/cni/net.d/*
  within 30 node_not_ready
}
own_network() {
  restart_node
  within 30 node_ready
  shell_pod later 'exec sleep 600'
  within 30 pod_ready later
  pod_address later $BUILT_IN
  within 20 node_ready
  k delete pod later --timeout 30s
}

hint() { iptables-nft-save -t mangle | grep ":KUBE-IPTABLES-HINT - "; }

# Services.

services() {
  apply services
  apply metrics-server # it needs a while for its first figures
  kubeadm init phase addon coredns --config "$WORK/addons.yaml" --kubeconfig "$KUBECONFIG" >> "$LOGS/kubeadm.log" 2>&1
  rolled_out default deployment/web app=web
  within 30 pod_ready shell
}
# Each of the four: every backend answers, by the Service of this name.
by_cluster_ip() {
  within 20 page "$(cluster_ip "$1")"
  same "$(answers_of page "$(cluster_ip "$1")")" "$(web_pods)"
}
by_itself() {
  local pod
  pod=$(web_pods | head -n 1)
  within 20 k exec "$pod" -- timeout 3 /tmp/wget -q -O - "http://$(cluster_ip "$1")/"
  same "$(answers_of k exec "$pod" -- timeout 3 /tmp/wget -q -O - "http://$(cluster_ip "$1")/")" "$(web_pods)"
}
from_the_node() { same "$(answers_of curl -s -m 3 "http://$(cluster_ip "$1")/")" "$(web_pods)"; }
by_node_port() {
  local port
  port=$(k get service "$1" -o 'jsonpath={.spec.ports[0].nodePort}')
  within 20 outside "$NODE_IP:$port"
  same "$(answers_of outside "$NODE_IP:$port")" "$(web_pods)"
}
# kube-proxy's other mode, which kubeadm deploys where nothing is said. What follows has it.
proxy_changes_mode() {
  nft list table ip kube-proxy > /dev/null
  kubectl -n kube-system get configmap kube-proxy -o json | jq '.data["config.conf"] |= sub("mode: nftables"; "mode: iptables")' | kubectl replace -f -
  kubectl -n kube-system rollout restart daemonset/kube-proxy
  rolled_out kube-system daemonset/kube-proxy k8s-app=kube-proxy
  within 20 rules_are_iptables
}
rules_are_iptables() {
  local tables
  tables=$(nft list tables) && ! grep kube-proxy <<< "$tables" && iptables-nft-save -t nat | grep -e '-A KUBE-SERVICES .*default/web cluster IP'
}
later_service() {
  k expose deployment web --name later --port 80 --target-port http --type NodePort
  by_cluster_ip later
  by_itself later
  from_the_node later
  by_node_port later
}
sticky() { same "$(answers_of page "$(cluster_ip sticky)" | wc -l)" 1; }
endpoints_follow() {
  k scale deployment web --replicas 1
  within 120 one_answers
  k scale deployment web --replicas 0
  within 120 nobody_answers
  k scale deployment web --replicas 2
  within 120 both_answer
}
one_answers() { [ "$(web_pods | wc -l)" = 1 ] && same "$(answers_of page "$(cluster_ip web)")" "$(web_pods)"; }
nobody_answers() { ! page "$(cluster_ip web)"; }
both_answer() { [ "$(web_pods | wc -l)" = 2 ] && same "$(answers_of page "$(cluster_ip web)")" "$(web_pods)"; }

# Names.

coredns() { rolled_out kube-system deployment/coredns k8s-app=kube-dns; }
cluster_names() {
  within 20 in_shell /tmp/nslookup kubernetes.default.svc.cluster.local
  in_shell /tmp/nslookup kubernetes.default.svc.cluster.local | has "10.96.0.1$"
  within 20 page web
  page web.default.svc.cluster.local
}
outside_names() {
  within 20 pod_ready resolver
  within 20 k exec node-names -- /tmp/nslookup outside.test
  k exec node-names -- /tmp/nslookup outside.test | has 192.0.2.77
  k exec node-names -- cat /etc/resolv.conf | has -x "nameserver $NODE_IP"
  ! k exec node-names -- /tmp/nslookup -timeout=2 kubernetes.default.svc.cluster.local
}
outside_through_cluster() { within 20 in_shell /tmp/nslookup outside.test; in_shell /tmp/nslookup outside.test | has 192.0.2.77; }

# Figures.

top_node() { within 60 kubectl top node "$NODE_NAME"; kubectl top node "$NODE_NAME" --no-headers | grep -E "^$NODE_NAME +[0-9]+m +[0-9]+% +[0-9]+Mi +[0-9]+%"; }
top_pods() {
  within 60 top_has shell
  within 60 top_has_containers # kube-proxy has just begun anew
}
top_has_containers() { kubectl top pods -n kube-system --containers --no-headers | grep -E "^kube-proxy-\S+ +kube-proxy +[0-9]+m +[1-9][0-9]*Mi"; }
top_has() { kubectl top pods --no-headers | grep -E "^$1 +[0-9]+m +[0-9]+Mi" || { kubectl top pods; return 1; }; }

# flannel.

flannel() {
  shell_pod before "$SHELL_COMMAND"
  within 20 pod_ready before
  apply flannel
  rolled_out kube-flannel daemonset/kube-flannel-ds app=flannel
  within 20 node_ready
}
flannels_pods() {
  shell_pod flannel1 "$SHELL_COMMAND"
  within 30 pod_ready flannel1
  pod_address flannel1 10.244.0
  pod_address before $BUILT_IN
  # Both reach a Service and each other.
  same "$(k exec flannel1 -- timeout 3 /tmp/wget -q -O - "http://$(cluster_ip web)/" | grep -c web-)" 1
  same "$(k exec before -- timeout 3 /tmp/wget -q -O - "http://$(cluster_ip web)/" | grep -c web-)" 1
  k exec before -- ping -c 1 -W 3 "$(pod_json flannel1 '{.status.podIP}')"
  k exec flannel1 -- ping -c 1 -W 3 "$(pod_json before '{.status.podIP}')"
}
flannel_goes() {
  kubectl delete namespace kube-flannel --timeout 60s
  rm /etc/cni/net.d/10-flannel.conflist
  shell_pod after 'exec sleep 600'
  within 30 pod_ready after
  pod_address after $BUILT_IN
  within 20 node_ready
  # What flannel's plugin made goes by flannel's plugin.
  k delete pod flannel1 --timeout 30s
  same "$(ls /var/lib/cni/networks/cbr0 | grep -c '^10\.')" 0
}

# DaemonSets and Deployments would make them again.
all_pods_gone() {
  kubectl delete deployments,daemonsets -A --all --timeout 60s
  all_gone
}

keep_logs() { [ -z "${NODE_KEEP:-}" ] || { mkdir -p "$NODE_KEEP" && cp -rT "$LOGS" "$NODE_KEEP"; }; }
own_folders
mkdir -p /etc/cni/net.d /opt/cni/bin "$WORK/audit" "$WORK/manifests"
cp /usr/lib/cni/{ptp,host-local} /opt/cni/bin/ # as kind's nodes have them
ln -s /etc/cni/net.d "$WORK/net.d"
printf 'nameserver %s\n' "$NODE_IP" > "$WORK/resolv.conf"
start_registry "$ADDONS/registry"
disown
start_control_plane "$WORK/cp"
bounded_kubectl "$WORK/bin"
{ write_kubeadm_config
  printf -- '---\napiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\nclusterCIDR: ""\n'
  # The table of connections is the machine's: its size is not to be set from here.
  printf 'conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}\n'
} > "$WORK/addons.yaml"
trap keep_logs EXIT
write_node_config "resolvConf: $WORK/resolv.conf"
NODE_FLAGS=$NO_NETWORK
start_node
start_client

need "without the built-in network a node is not Ready, and says why" no_network
need "a CNI configuration that is half written does not make it Ready, and is named" unfinished_network
need "kube-proxy, a privileged pod on the host's network, runs before there is a network" proxy_before_network
need "a pod with a network of its own waits meanwhile, and its event says for what" own_network_waits
need "a pod of kindnet's shape starts before there is a network, and what it writes makes the node Ready" kindnet
need "the waiting pod gets an address of that network" kindnet_pods
check "containers find by a chain which iptables the host uses" hint
need "without that configuration the node is not Ready again" kindnet_goes
NODE_FLAGS=$OWN_NETWORK
need "started with the built-in network, the node is Ready without any configuration" own_network
need "two backends with Services run" services
check "a ClusterIP reaches every backend from a pod" by_cluster_ip web
check "a backend reaches its own Service, itself included" by_itself web
check "a ClusterIP reaches every backend from the node" from_the_node web
check "a NodePort reaches every backend from another machine" by_node_port outside
check "with session affinity one client stays with one backend" sticky
check "the Service follows its endpoints down to none and back" endpoints_follow
need "kube-proxy changes to its mode iptables, and its other rules go" proxy_changes_mode
check "a Service made then reaches every backend, from a pod, a backend, the node and another machine" later_service
need "CoreDNS is Ready by its probes at named ports" coredns
check "a pod resolves the cluster's names and short names of Services" cluster_names
check "a pod with dnsPolicy Default asks the node's resolver" outside_names
check "names outside are resolved through CoreDNS" outside_through_cluster
check "kubectl top node shows the node's figures" top_node
check "kubectl top pod shows the pods' and containers' figures" top_pods
need "flannel's DaemonSet runs and the node stays Ready" flannel
check "new pods get flannel's addresses, old ones keep theirs, and all reach each other" flannels_pods
check "without flannel's configuration the built-in network takes over again" flannel_goes
need "deleted pods go, with their sandboxes" all_pods_gone
need "nothing is left without an owner" no_leaks
stop_node
finish_checks addons
