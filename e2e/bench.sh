#!/bin/bash
# berth next to containerd + runc: usage: e2e/bench.sh [--rounds N] [--only NAME,…] [--quick] [--out DIR] [--keep DIR]
# Rounds go ours, peer, peer, ours; each leg has a sandbox, folders and a server of its own, and the other side's does not run. A warm-up
# round with small counts comes first and does not count. Without --only all workloads run and the results go to docs/bench; else, and
# with --quick (tiny counts), to target/bench. Workloads:
#   life1 life4 life8 life1-shared life4-shared   life cycles, so many at a time; shared: one PID namespace a pod
#   exec grace logs pull idle density20 density20-shared
#   burst density110 list restart gone            share the same 100 and 110 pods
#   critest                                       the whole suite with one seed, once a side
# --keep DIR keeps the legs' raw JSON and the servers' logs there. BERTH_BIN, BERTH_BENCH: the programs.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/lib.sh"
BERTH_BENCH=${BERTH_BENCH:-$TARGET/release/berth-bench}

# Inside a sandbox: one leg.
if [ "${1:-}" = leg ]; then
  kind=$2 dir=$3
  shift 3
  start_registry "$IMAGES/registry"
  cri_command "$kind" "$dir"
  # The containerd side is counted from outside alone: links, namespaces, cgroups, mounts.
  at_end=()
  [ "$kind" != berth ] || at_end=(--at-end "'$BERTH_BIN' --root '$dir/root' --state /run/berth leaks --settle")
  exec "$BERTH_BENCH" leg --side "$kind" --socket "$CRI_SOCKET" --dir "$dir" "${at_end[@]}" "$@" -- "${CRI_COMMAND[@]}"
fi

rounds=3 only="" quick="" out="" keep=""
while [ $# -gt 0 ]; do
  case $1 in
  --rounds) rounds=$2; shift 2 ;;
  --only) only=$2; shift 2 ;;
  --out) out=$2; shift 2 ;;
  --keep) keep=$2; shift 2 ;;
  --quick) quick=1; shift ;;
  *) sed -n '2,11s/^# //p' "$0"; exit 2 ;;
  esac
done
if [ -z "$out" ]; then
  out=$HERE/../docs/bench
  [ -z "$only$quick" ] || out=$HERE/../target/bench
fi

"$HERE/tools.sh" packages > /dev/null
work=$(make_work)
trap 'rm -rf "$work"' EXIT
legs=${keep:-$work/legs}
mkdir -p "$legs"
rm -f "$legs"/round-*.json

# leg ROUND NUMBER KIND FLAG…
leg() {
  local round=$1 number=$2 kind=$3 name=round-$1-leg-$2-$3 dir=$work/$1-$2-$3
  shift 3
  echo "round $round, leg $number: $kind" >&2
  "$(tool_bin berth-sandbox)" --shared-root "$HERE/bench.sh" leg "$kind" "$dir" --round "$round" --leg "$number" --out "$legs/$name.json" "$@" || {
    tail -n 20 "$dir/server.log" >&2 || true
    [ -z "$keep" ] || cp "$dir/server.log" "$keep/$name.log" || true
    exit 1
  }
  rm -rf "$dir"
}

# critest's whole suite, both sides with the same order of specs; its rounds are numbered from 101.
critest_leg() {
  local number=$1 kind=$2 seed=$3 dir=$work/critest-$2
  echo "critest: $kind" >&2
  mkdir -p "$dir"
  CRITEST_KEEP=$dir "$HERE/critest.sh" "$kind" "-ginkgo.seed=$seed" > "$dir/out" || { cat "$dir/out" >&2; exit 1; }
  jq -c --arg kind "$kind" --argjson leg "$number" '{side: $kind, round: 101, leg: $leg, quick: false, busy_percent: 0, failures: [], costs: {},
    metrics: {"critest.seconds": [.[0].RunTime / 1e9]}}' "$dir/report.json" > "$legs/round-101-leg-$number-$kind.json"
}

case ",$only," in
,critest,) workloads="" ;;
*)
  workloads=1
  flags=()
  [ -z "$only" ] || flags=(--only "$only")
  order=(berth containerd containerd berth)
  if [ -z "$quick" ]; then
    leg 0 1 berth --quick "${flags[@]}"
    leg 0 2 containerd --quick "${flags[@]}"
  else
    flags+=(--quick)
  fi
  for round in $(seq "$rounds"); do
    for n in 0 1 2 3; do leg "$round" $((n + 1)) "${order[n]}" "${flags[@]}"; done
  done ;;
esac
case ",$only,$quick" in
,,|*,critest,*)
  seed=$RANDOM
  critest_leg 1 berth "$seed"
  critest_leg 2 containerd "$seed" ;;
esac

about=("$(date -u +%Y-%m-%d), $(uname -sr), $(nproc) CPUs, $(awk '/MemTotal/ {printf "%.0f GiB", $2 / 1048576}' /proc/meminfo)"
  "berth $("$BERTH_BIN" version 2>/dev/null | head -n 1), $(du -L --apparent-size -m "$BERTH_BIN" | cut -f1) MiB; containerd $CONTAINERD_VERSION, runc $RUNC_VERSION, Debian's CNI plugins"
  "both: seccomp RuntimeDefault, no new privileges, masked paths, limits, a bridge network with portmap, CRI logs${workloads:+; PID namespace per container where not said otherwise}")
"$BERTH_BENCH" report --legs "$legs" --out "$out" "${about[@]/#/--about=}"
