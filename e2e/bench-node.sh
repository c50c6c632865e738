#!/bin/bash
# berth's node next to the upstream kubelet on containerd + runc, both alone with static pods: usage: e2e/bench-node.sh [--rounds N]
# [--legs N] [--only NAME,…] [--quick] [--out DIR] [--keep DIR]. Rounds go ours, peer, peer, ours, each leg in a sandbox of its own;
# --legs 2 ends each after the first two. Both sides
# read the same KubeletConfiguration. Without --only and --quick the results go to docs/bench/node; else to target/bench-node. Workloads:
#   drops      a manifest dropped → its process; its process killed → its status; one pod at a time
#   idle-http  110 idle pods with an HTTP probe each, a minute
#   idle-exec  110 idle pods with an exec probe a second each, a minute
#   idle-disk  what is written to the disk in ten minutes without an agent, and with 110 idle pods (only by name)
# BERTH_BIN, BERTH_BENCH: the programs.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/lib.sh"
. "$HERE/bench-sides.sh"
BERTH_BENCH=${BERTH_BENCH:-$TARGET/release/berth-bench}

# Inside a sandbox: one leg.
if [ "${1:-}" = leg ]; then
  kind=$2 dir=$3
  shift 3
  mkdir -p "$dir/manifests"
  start_registry "$IMAGES/registry"
  write_configuration "$dir"
  cri_command "$kind" "$dir"
  case $kind in
  berth) NODE_COMMAND=("$BERTH_BIN" --root "$dir/root" --state /run/berth node --config "$dir/kubelet.yaml" --kubelet-root "$dir/kubelet"
    --container-logs-dir "$dir/links" --node-name bench --registry-config-dir "$dir/certs.d") ;;
  containerd) peer_node "$dir" bench ;;
  esac
  exec "$BERTH_BENCH" node-leg --side "$kind" --dir "$dir" "$@" -- "${NODE_COMMAND[@]}"
fi

run_sides "$HERE/bench-node.sh" node \
  "berth $("$BERTH_BIN" version 2>/dev/null | head -n 1) node; kubelet $KUBERNETES_VERSION on containerd $CONTAINERD_VERSION, runc $RUNC_VERSION; both alone, with static pods and one configuration" "$@"
