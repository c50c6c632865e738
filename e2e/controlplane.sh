# Sourced by scripts that need an API server, after lib.sh and inside a sandbox only. start_control_plane FOLDER: etcd, the API server, the
# controller manager and the scheduler of $KUBERNETES as plain processes that end with the sandbox. Certificates, kubeconfigs and
# the cluster's first objects are made by kubeadm's phases, as on any kubeadm cluster. Exports KUBECONFIG (cluster-admin); $CONTROL_PLANE/kubelet.conf is the node's.
NODE_NAME=node1
NODE_IP=10.77.0.1
POD_CIDR=10.244.0.0/16
SERVICE_CIDR=10.96.0.0/16

# serve NAME COMMAND…: starts it in the background with its own log; its process id is in ${PIDS[NAME]}, and in $LOGS/NAME.pid for
# subshells.
declare -A PIDS
serve() {
  local name=$1
  shift
  "$@" >> "$LOGS/$name.log" 2>&1 &
  PIDS[$name]=$!
  echo $! > "$LOGS/$name.pid"
  disown
}

kubeadm_phase() { kubeadm init phase "$@" --config "$CONTROL_PLANE/kubeadm.yaml" >> "$LOGS/kubeadm.log" 2>&1; }

write_kubeadm_config() {
  cat <<YAML
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {advertiseAddress: $NODE_IP, bindPort: 6443}
nodeRegistration: {name: $NODE_NAME}
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: v$KUBERNETES_VERSION
controlPlaneEndpoint: $NODE_IP:6443
certificatesDir: $CONTROL_PLANE/pki
networking: {serviceSubnet: $SERVICE_CIDR, podSubnet: $POD_CIDR}
YAML
}

# API_FLAGS: more flags of the API server. It can be started again after `kill`.
start_api_server() {
  local pki=$CONTROL_PLANE/pki
  serve kube-apiserver kube-apiserver --etcd-servers=http://127.0.0.1:2379 --advertise-address="$NODE_IP" --secure-port=6443 \
    --service-cluster-ip-range="$SERVICE_CIDR" --allow-privileged=true --authorization-mode=Node,RBAC \
    --enable-admission-plugins=NodeRestriction --enable-bootstrap-token-auth=true --kubelet-preferred-address-types=InternalIP \
    --client-ca-file="$pki/ca.crt" --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" \
    --kubelet-client-certificate="$pki/apiserver-kubelet-client.crt" --kubelet-client-key="$pki/apiserver-kubelet-client.key" \
    --service-account-issuer=https://kubernetes.default.svc.cluster.local \
    --service-account-key-file="$pki/sa.pub" --service-account-signing-key-file="$pki/sa.key" \
    --proxy-client-cert-file="$pki/front-proxy-client.crt" --proxy-client-key-file="$pki/front-proxy-client.key" \
    --requestheader-client-ca-file="$pki/front-proxy-ca.crt" --requestheader-allowed-names=front-proxy-client \
    --requestheader-extra-headers-prefix=X-Remote-Extra- --requestheader-group-headers=X-Remote-Group --requestheader-username-headers=X-Remote-User ${API_FLAGS:-}
}

as_component() { printf '%s\n' --{,authentication-,authorization-}kubeconfig="$CONTROL_PLANE/$1.conf" --leader-elect=false; }
# QPS_FLAGS: flags of both about how often they may ask.
# start_controller_manager [FLAG…]: the controllers are kubeadm's, which sign the discovery of joining nodes and remove old tokens too.
start_controller_manager() {
  local pki=$CONTROL_PLANE/pki
  serve kube-controller-manager kube-controller-manager $(as_component controller-manager) --controllers='*,bootstrapsigner,tokencleaner' \
    --allocate-node-cidrs=true --cluster-cidr="$POD_CIDR" --use-service-account-credentials=true --root-ca-file="$pki/ca.crt" \
    --service-account-private-key-file="$pki/sa.key" --cluster-signing-cert-file="$pki/ca.crt" --cluster-signing-key-file="$pki/ca.key" ${QPS_FLAGS:-} "$@"
}
# The restarts need checks.sh.
restart_controller_manager() { end_component kube-controller-manager; start_controller_manager "$@"; }
restart_scheduler() { end_component kube-scheduler; start_scheduler; }
end_component() {
  local pid
  pid=$(cat "$LOGS/$1.pid")
  kill "$pid"
  within 30 dead "$pid"
}
start_scheduler() { serve kube-scheduler kube-scheduler $(as_component scheduler) ${QPS_FLAGS:-}; }

start_control_plane() {
  CONTROL_PLANE=$1
  LOGS=$1/log
  PATH=$KUBERNETES:$PATH
  local pki=$CONTROL_PLANE/pki name
  mkdir -p "$LOGS"
  write_kubeadm_config > "$CONTROL_PLANE/kubeadm.yaml"
  kubeadm_phase certs all
  for name in admin super-admin controller-manager scheduler kubelet; do
    kubeadm_phase kubeconfig "$name" --kubeconfig-dir "$CONTROL_PLANE"
  done
  export KUBECONFIG=$CONTROL_PLANE/super-admin.conf
  serve etcd etcd --data-dir "$CONTROL_PLANE/etcd" --unsafe-no-fsync --log-level warn
  start_api_server
  wait_for "the API server" kubectl get --raw /readyz > /dev/null || { tail -n 20 "$LOGS/kube-apiserver.log" >&2; return 1; }
  start_controller_manager
  start_scheduler
  # For exec, attach, port-forward and logs.
  kubectl create clusterrolebinding kubelet-api --clusterrole=system:kubelet-api-admin --user=kube-apiserver-kubelet-client > /dev/null
  kubeadm_phase upload-config all --kubeconfig "$KUBECONFIG"
  wait_for "the default service account" kubectl -n default get serviceaccount default > /dev/null
}
