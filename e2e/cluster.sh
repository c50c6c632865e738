#!/bin/bash
# A whole Kubernetes on this machine: usage: e2e/cluster.sh [--once]. `kubeadm init` with berth as kubelet and runtime: etcd, the API server, the
# controller manager and the scheduler are berth's static pods, kube-proxy and CoreDNS its pods, from images built here; then a sample
# app. It stays until Ctrl-C; with --once it goes on to the end. The end is `kubeadm reset`, and nothing is left. Needs root; everything is in
# namespaces of its own, with overlays over the folders that kubeadm writes to.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/lib.sh"

if [ "${CLUSTER_WORK:-}" = "" ]; then
  CLUSTER_WORK=$(make_work); export CLUSTER_WORK CLUSTER_OUTER=$$
  trap 'rm -rf "$CLUSTER_WORK"' EXIT
  # What is inside ends itself, and is waited for again after the signal that says so.
  "$(tool_bin berth-sandbox)" --shared-root "$HERE/cluster.sh" "$@" &
  child=$!
  trap 'kill -TERM $child 2> /dev/null || true' INT TERM
  while true; do
    code=0
    wait $child || code=$?
    kill -0 $child 2> /dev/null || exit $code
  done
fi

WORK=$CLUSTER_WORK
PATTERN=""
LOGS=$WORK/log
NODE=node1
ADDRESS=10.77.0.1
POD_SUBNET=10.244.0.0/16
APP_IMAGE=registry.k8s.io/e2e-test-images/nginx:1.14-2
SHELL_IMAGE=registry.k8s.io/e2e-test-images/busybox:1.37.0-1
. "$HERE/checks.sh"
mkdir -p "$LOGS" "$WORK/bin"
CRI_SOCKET=/run/berth/berth.sock
BERTH=("$BERTH_BIN" --root "$WORK/berth" --state /run/berth)
PATH=$KUBERNETES:$PATH
bounded_kubectl "$WORK/bin"
export KUBECONFIG=/etc/kubernetes/admin.conf

# What kubeadm refuses and may be so here: SystemVerification, because the machine may have cgroup v1.
IGNORED=SystemVerification

# Of systemd's tool as much as kubeadm calls. The kubelet's unit is kubeadm's, by hand: its drop-in names these files.
write_init() {
  ln -sf "$BERTH_BIN" "$WORK/bin/kubelet"
  cat > "$WORK/bin/systemctl" <<SYSTEMCTL
#!/bin/sh
running() { [ -e $WORK/kubelet.pid ] && kill -0 \$(cat $WORK/kubelet.pid) 2> /dev/null; }
stop() {
  running || return 0
  kill \$(cat $WORK/kubelet.pid)
  for n in \$(seq 300); do running || return 0; sleep 0.1; done
  echo "the kubelet does not end" >&2
  exit 1
}
case "\$1 \$2" in
"is-active kubelet") running ;;
"stop kubelet") stop ;;
"start kubelet" | "restart kubelet")
  stop
  . /var/lib/kubelet/kubeadm-flags.env
  setsid $WORK/bin/kubelet --bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf --kubeconfig=/etc/kubernetes/kubelet.conf \\
    --config=/var/lib/kubelet/config.yaml \$KUBELET_KUBEADM_ARGS --state /run/berth-kubelet < /dev/null >> $LOGS/kubelet.log 2>&1 &
  echo \$! > $WORK/kubelet.pid ;;
esac
SYSTEMCTL
  chmod +x "$WORK/bin/systemctl"
}
write_kubeadm_config() {
  cat > "$WORK/kubeadm.yaml" <<YAML
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {advertiseAddress: $ADDRESS}
nodeRegistration:
  name: $NODE
  criSocket: unix://$CRI_SOCKET
  taints: [] # the only node runs everything
  kubeletExtraArgs: [{name: node-ip, value: $ADDRESS}]
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: v$KUBERNETES_VERSION
networking: {podSubnet: $POD_SUBNET}
etcd: {local: {imageTag: $ETCD_VERSION-0}} # the one that is built here
---
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs # no systemd runs here
failCgroupV1: false
failSwapOn: false
# The disk is the machine's, not the cluster's.
evictionHard: {memory.available: 50Mi, nodefs.available: 1%, nodefs.inodesFree: 1%, imagefs.available: 1%, imagefs.inodesFree: 1%}
imageGCHighThresholdPercent: 100
---
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
# The mode is the one that kubeadm's clusters have, iptables. The table of connections is the machine's: its size is not to be set from here.
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
YAML
}
start_runtime() {
  setsid "${BERTH[@]}" cri --registry-config-dir "$WORK/certs.d" < /dev/null >> "$LOGS/cri.log" 2>&1 &
  echo $! > "$WORK/cri.pid"
  disown
  wait_for "the runtime" crictl_ready
}
running_pods() { kubectl -n kube-system get pods -o 'jsonpath={range .items[*]}{.metadata.name} {.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}'; }

initialize() {
  timeout 400 kubeadm init --config "$WORK/kubeadm.yaml" --ignore-preflight-errors "$IGNORED" > "$LOGS/kubeadm.log" 2>&1 ||
    { tail -n 25 "$LOGS/kubeadm.log"; tail -n 20 "$LOGS/kubelet.log"; return 1; }
  grep -q "Your Kubernetes control-plane has initialized successfully" "$LOGS/kubeadm.log"
  touch "$WORK/initialized"
}
static_pods() {
  local name
  for name in etcd kube-apiserver kube-controller-manager kube-scheduler; do
    within 60 pod_is_ready "$name-$NODE"
    # berth's own, which the API server shows by a mirror.
    [ "$(kubectl -n kube-system get pod "$name-$NODE" -o 'jsonpath={.metadata.annotations.kubernetes\.io/config\.source}')" = file ]
    [ -n "$(crictl ps -q --name "^$name\$" --state running)" ]
  done
}
pod_is_ready() { running_pods | has "^$1 True$" || { running_pods; kubectl -n kube-system describe pod "$1" | tail -n 15; return 1; }; }
node_is_ready() {
  [ "$(kubectl get node "$NODE" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}/{.spec.taints}')" = True/ ] ||
    { kubectl describe node "$NODE"; tail -n 5 "$LOGS/kubelet.log"; return 1; }
}
addons_run() {
  kubectl -n kube-system rollout status daemonset/kube-proxy --timeout 240s || { kubectl -n kube-system describe pods -l k8s-app=kube-proxy; kubectl -n kube-system logs -l k8s-app=kube-proxy; return 1; }
  kubectl -n kube-system rollout status deployment/coredns --timeout 240s || { kubectl -n kube-system describe pods -l k8s-app=kube-dns; kubectl -n kube-system logs -l k8s-app=kube-dns; return 1; }
}
deploy_app() {
  kubectl create deployment web --image "$APP_IMAGE" --replicas 2
  kubectl expose deployment web --port 80
  kubectl run shell --image "$SHELL_IMAGE" --restart Never --command -- sh -c "$SHELL_COMMAND"
  kubectl rollout status deployment/web --timeout 240s
  kubectl wait pod/shell --for condition=Ready --timeout 240s
}
by_cluster_ip() { kubectl exec shell -- timeout 5 /tmp/wget -q -O - "http://$(kubectl get service web -o 'jsonpath={.spec.clusterIP}')" | grep "Welcome to nginx"; }
by_name() { kubectl exec shell -- timeout 5 /tmp/wget -q -O - "http://$1" | grep "Welcome to nginx"; }
by_names() {
  within 30 by_name web
  by_name web.default.svc.cluster.local
  kubectl exec shell -- /tmp/nslookup kubernetes.default.svc.cluster.local | grep "10.96.0.1$"
}
reset_all() {
  timeout 120 kubeadm reset --force --cri-socket "unix://$CRI_SOCKET" > "$LOGS/reset.log" 2>&1 || { cat "$LOGS/reset.log"; return 1; }
  [ ! -e /etc/kubernetes/admin.conf ]
  [ ! -e /etc/kubernetes/manifests/etcd.yaml ]
  same "$(ls /var/lib/kubelet 2> /dev/null)" ""
  same "$(crictl pods -q)" ""
}
nothing_left() {
  "${BERTH[@]}" stop --all > "$LOGS/stop.log" 2>&1 || { cat "$LOGS/stop.log"; return 1; }
  "${BERTH[@]}" leaks --settle
}
keep_logs() { [ -z "${CLUSTER_KEEP:-}" ] || { mkdir -p "$CLUSTER_KEEP" && cp -rT "$LOGS" "$CLUSTER_KEEP"; }; }

own_folders
# What an administrator does before kubeadm.
echo 1 > /proc/sys/net/ipv4/ip_forward
echo "$ADDRESS $NODE" >> /etc/hosts
write_init
write_mirrors "$WORK/certs.d"
write_kubeadm_config
start_registry "$ADDONS/registry"
disown
trap keep_logs EXIT
start_runtime
need "kubeadm init is through, with berth as its kubelet and its runtime" initialize
[ -e "$WORK/initialized" ] || { nothing_left || true; finish_checks cluster; exit 1; }
need "etcd, the API server, the controller manager and the scheduler are static pods of berth" static_pods
need "the node is Ready and has no taint" within 60 node_is_ready
need "kube-proxy and CoreDNS run as kubeadm deploys them" addons_run
need "a sample app is deployed" deploy_app
need "the app's Service answers by its cluster address" within 30 by_cluster_ip
need "the app's Service answers by its name" by_names
kubectl get nodes -o wide || true
kubectl get pods -A -o wide || true

if [ "${1:-}" != --once ]; then
  echo "The cluster runs until Ctrl-C; from another terminal:"
  echo "  nsenter -a -t \$(pgrep -P \$(pgrep -P $CLUSTER_OUTER berth-sandbox)) env KUBECONFIG=$KUBECONFIG $KUBERNETES/kubectl get pods -A"
  trap : INT TERM
  sleep infinity &
  wait $! || true
  kill $! 2> /dev/null || true
fi

need "kubeadm reset takes the cluster back" reset_all
need "nothing is left without an owner" nothing_left
finish_checks cluster
