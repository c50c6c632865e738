#!/bin/bash
# berth's node next to the upstream kubelet on containerd + runc, each under a control plane of its own: usage: e2e/bench-api.sh [--rounds N]
# [--legs N] [--only NAME,…] [--quick] [--out DIR] [--keep DIR], as bench-node.sh; results go to docs/bench/api or target/bench-api. Controllers and
# scheduler may ask 500 times a second. Workloads:
#   single    a pod created → seen running by a watch; deleted with a second of grace → seen gone; one at a time
#   burst50   a deployment of 50 pods → all running; the time of an instant fake kubelet is taken off
#   api-idle  110 idle pods with an HTTP probe each: calls of the API server in three minutes, memory, CPU
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/lib.sh"
. "$HERE/controlplane.sh"
. "$HERE/bench-sides.sh"
BERTH_BENCH=${BERTH_BENCH:-$TARGET/release/berth-bench}

# Inside a sandbox: one leg.
if [ "${1:-}" = leg ]; then
  kind=$2 dir=$3
  shift 3
  mkdir -p "$dir"/{manifests,shared,audit}
  start_registry "$IMAGES/registry"
  API_FLAGS="--audit-policy-file=$HERE/node/audit.yaml --audit-log-path=$dir/audit/log"
  QPS_FLAGS="--kube-api-qps=500 --kube-api-burst=1000"
  start_control_plane "$dir/cp"
  serve proxy kubectl proxy --port=8001
  wait_for "kubectl's proxy" curl -fs -o /dev/null http://127.0.0.1:8001/readyz
  write_configuration "$dir" "$CONTROL_PLANE/pki/ca.crt"
  cri_command "$kind" "$dir"
  case $kind in
  berth) NODE_COMMAND=("$BERTH_BIN" --root "$dir/root" --state /run/berth node --config "$dir/kubelet.yaml" --kubelet-root "$dir/kubelet"
    --container-logs-dir "$dir/links" --node-name "$NODE_NAME" --node-ip "$NODE_IP" --registry-config-dir "$dir/certs.d"
    --kubeconfig "$CONTROL_PLANE/kubelet.conf") ;;
  containerd) peer_node "$dir" "$NODE_NAME" "--kubeconfig=$CONTROL_PLANE/kubelet.conf" ;;
  esac
  exec "$BERTH_BENCH" api-leg --side "$kind" --dir "$dir" --server http://127.0.0.1:8001 --audit "$dir/audit/log" --node "$NODE_NAME" "$@" -- \
    "${NODE_COMMAND[@]}"
fi

run_sides "$HERE/bench-api.sh" api \
  "berth $("$BERTH_BIN" version 2>/dev/null | head -n 1) node; kubelet $KUBERNETES_VERSION on containerd $CONTAINERD_VERSION, runc $RUNC_VERSION; each under its own control plane $KUBERNETES_VERSION" "$@"
