# Sourced by bench-node.sh and bench-api.sh after lib.sh: both sides' configuration, the upstream's kubelet, and the order of the legs.

# write_configuration DIR [CA]: both sides' configuration, with the authority of clients if there is one. The disk is the machine's, not the benchmark's.
write_configuration() {
  cat > "$1/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
staticPodPath: $1/manifests
readOnlyPort: 10255
address: 127.0.0.1
podLogsDir: $1/pod-logs
authentication: {anonymous: {enabled: false}, webhook: {enabled: false}${2:+, x509: {clientCAFile: $2\}}}
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

# peer_node DIR NODE [FLAG]: its command line is then $NODE_COMMAND. Without --node-ip it would ask the DNS for its name, ten seconds for each pod that it lets in. What a kubelet writes into fixed folders goes to this leg's; the machine's sysctls stay as they are.
peer_node() {
  local dir=$1 node=$2 flags=${3:-} name
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
      exec '"$KUBERNETES"'/kubelet --config $dir/kubelet.yaml --root-dir $dir/kubelet --hostname-override '"$node"' --node-ip=10.77.0.1 --v=1 '"$flags"'"
    ' sh "$dir" "$CRI_SOCKET" "${CRI_COMMAND[@]}")
  echo "containerRuntimeEndpoint: unix://$CRI_SOCKET" >> "$dir/kubelet.yaml"
  echo "volumePluginDir: $dir/plugins" >> "$dir/kubelet.yaml"
}

# run_sides SCRIPT NAME ABOUT FLAG…: runs `SCRIPT leg` for each leg and writes the report.
run_sides() {
  local script=$1 name_of_all=$2 about_sides=$3 rounds=2 legs_each=4 only="" quick="" out="" keep=""
  shift 3
  while [ $# -gt 0 ]; do
    case $1 in
    --rounds) rounds=$2; shift 2 ;;
    --legs) legs_each=$2; shift 2 ;;
    --only) only=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --keep) keep=$2; shift 2 ;;
    --quick) quick=1; shift ;;
    *) sed -n '2,9s/^# //p' "$script"; exit 2 ;;
    esac
  done
  if [ -z "$out" ]; then
    out=$HERE/../docs/bench/$name_of_all
    [ -z "$only$quick" ] || out=$HERE/../target/bench-$name_of_all
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
      "$(tool_bin berth-sandbox)" --shared-root "$script" leg "$kind" "$dir" --round "$round" --leg $((n + 1)) --out "$legs/$name.json" \
        "${flags[@]}" || {
        tail -n 20 "$dir/server.log" >&2 || true
        [ -z "$keep" ] || cp "$dir/server.log" "$keep/$name.log" || true
        exit 1
      }
      # Its folder goes with all others at the end: an ext4 without a journal passes over inodes that were deleted in the last minutes one by
      # one, which took every seventh moment of the next leg.
    done
  done
  about=("$(date -u +%Y-%m-%d), $(uname -sr), $(nproc) CPUs, $(awk '/MemTotal/ {printf "%.0f GiB", $2 / 1048576}' /proc/meminfo)"
    "$about_sides")
  "$BERTH_BENCH" report --legs "$legs" --out "$out" "${about[@]/#/--about=}"
}
