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
BERTH_BENCH=${BERTH_BENCH:-$TARGET/release/berth-bench}

# Both sides' configuration; the disk is the machine's, not the benchmark's.
write_configuration() {
  cat > "$1/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
staticPodPath: $1/manifests
readOnlyPort: 10255
address: 127.0.0.1
podLogsDir: $1/pod-logs
authentication: {anonymous: {enabled: false}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
maxPods: 112
evictionHard: {memory.available: 50Mi}
imageGCHighThresholdPercent: 100
registryPullQPS: 0
YAML
}

# Without --node-ip it would ask the DNS for its name, ten seconds for each pod that it lets in. What a kubelet writes into fixed folders goes to this leg's; the machine's sysctls stay as they are.
peer_node() {
  local dir=$1 name
  mkdir -p "$dir"/{var,var-work,sysctl}
  mount -t overlay overlay -o "lowerdir=/var,upperdir=$dir/var,workdir=$dir/var-work" /var
  mount --make-shared /var
  mkdir -p /var/lib/kubelet /var/log
  for name in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 kernel/keys/root_maxkeys=1000000 \
    kernel/keys/root_maxbytes=25000000; do
    mkdir -p "$dir/sysctl/$(dirname "$name")"
    echo "${name#*=}" > "$dir/sysctl/${name%=*}"
  done
  NODE_COMMAND=(sh -c '
    dir=$1 socket=$2
    shift 2
    "$@" &
    exec unshare --mount --propagation unchanged sh -c "
      set -e
      mount --make-private /proc
      cd $dir/sysctl
      for file in \$(find . -type f); do mount --bind \$file /proc/sys/\$file; done
      cd /
      exec '"$KUBERNETES"'/kubelet --config $dir/kubelet.yaml --root-dir $dir/kubelet --hostname-override bench --node-ip=10.77.0.1 --v=1"
    ' sh "$dir" "$CRI_SOCKET" "${CRI_COMMAND[@]}")
  echo "containerRuntimeEndpoint: unix://$CRI_SOCKET" >> "$dir/kubelet.yaml"
  echo "volumePluginDir: $dir/plugins" >> "$dir/kubelet.yaml"
}

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
  containerd) peer_node "$dir" ;;
  esac
  exec "$BERTH_BENCH" node-leg --side "$kind" --dir "$dir" "$@" -- "${NODE_COMMAND[@]}"
fi

rounds=2 legs_each=4 only="" quick="" out="" keep=""
while [ $# -gt 0 ]; do
  case $1 in
  --rounds) rounds=$2; shift 2 ;;
  --legs) legs_each=$2; shift 2 ;;
  --only) only=$2; shift 2 ;;
  --out) out=$2; shift 2 ;;
  --keep) keep=$2; shift 2 ;;
  --quick) quick=1; shift ;;
  *) sed -n '2,9s/^# //p' "$0"; exit 2 ;;
  esac
done
if [ -z "$out" ]; then
  out=$HERE/../docs/bench/node
  [ -z "$only$quick" ] || out=$HERE/../target/bench-node
fi

"$HERE/tools.sh" packages > /dev/null
work=$(make_work)
trap 'rm -rf "$work"' EXIT
legs=${keep:-$work/legs}
mkdir -p "$legs"
rm -f "$legs"/round-*.json
flags=()
[ -z "$only" ] || flags+=(--only "$only")
[ -z "$quick" ] || flags+=(--quick)
order=(berth containerd containerd berth)
for round in $(seq "$rounds"); do
  for n in $(seq 0 $((legs_each - 1))); do
    kind=${order[n]} name=round-$round-leg-$((n + 1))-${order[n]} dir=$work/$round-$n
    echo "round $round, leg $((n + 1)): $kind" >&2
    "$(tool_bin berth-sandbox)" --shared-root "$HERE/bench-node.sh" leg "$kind" "$dir" --round "$round" --leg $((n + 1)) --out "$legs/$name.json" \
      "${flags[@]}" || {
      tail -n 20 "$dir/server.log" >&2 || true
      [ -z "$keep" ] || cp "$dir/server.log" "$keep/$name.log" || true
      exit 1
    }
    rm -rf "$dir"
  done
done
about=("$(date -u +%Y-%m-%d), $(uname -sr), $(nproc) CPUs, $(awk '/MemTotal/ {printf "%.0f GiB", $2 / 1048576}' /proc/meminfo)"
  "berth $("$BERTH_BIN" version 2>/dev/null | head -n 1) node; kubelet $KUBERNETES_VERSION on containerd $CONTAINERD_VERSION, runc $RUNC_VERSION; both alone, with static pods and one configuration")
"$BERTH_BENCH" report --legs "$legs" --out "$out" "${about[@]/#/--about=}"
