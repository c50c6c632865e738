#!/bin/bash
# `berth node` under a real control plane: usage: e2e/node.sh [PATTERN]; with a pattern only the checks whose sentence matches it, or
# whose file in e2e/node/ does. One line a check, then `node: N passed, N failed`. NODE_KEEP=folder: all logs are copied there.
# NODE_SCENARIOS: another folder of scenarios. NODE_FLAGS: more flags of berth node. CHECK_JOBS: so many checks side by side in a lane.
#
# Scenarios are the files e2e/node/*.sh, sourced here after node/lib.sh: functions (their names are unique over all files) and lines
#   check "what it shows" function ARGUMENT…    beside others; it makes what it needs in a namespace of its own (new_namespace)
#   alone "what it shows" function ARGUMENT…    by itself at the end: it restarts, cuts off or changes the node
# The files of a lane share a node. Lanes run side by side, each in a sandbox with a control plane of its own, so that what a check that
# needs the node alone waits for is not added up. Files that no lane names belong to the last; with a pattern there is one lane.
LANES=("node" "join pods" "objects streams more" "access guides" "offline reviews")
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/lib.sh"
. "$HERE/controlplane.sh"
SCENARIO_FOLDER=${NODE_SCENARIOS:-$HERE/node}

# files_of LANE: the scenario files that exist, of this lane; without one, those of all.
files_of() {
  local file name
  for file in "$SCENARIO_FOLDER"/*.sh; do
    name=$(basename "$file" .sh)
    if [ "$name" = lib ]; then continue; fi
    if [ $# -eq 0 ] || [[ " $1 " == *" $name "* ]]; then printf '%s ' "$name"; fi
  done
}
unnamed_files() {
  local name
  for name in $(files_of); do [[ " ${LANES[*]} " == *" $name "* ]] || printf '%s ' "$name"; done
}
# run_lanes [PATTERN]: each lane is this script again. The sum is made of their folders.
run_lanes() {
  local number failed=0 lanes=("${LANES[@]}")
  lanes[-1]+=" $(unnamed_files)"
  [ -z "${1:-}" ] || lanes=("$(files_of)")
  for number in "${!lanes[@]}"; do
    mkdir "$ALL_LANES/$number"
    NODE_WORK=$ALL_LANES/$number NODE_FILES=$(files_of "${lanes[number]}") CHECK_JOBS=${CHECK_JOBS:-$((8 / ${#lanes[@]} + 1))} \
      NODE_KEEP=${NODE_KEEP:+$NODE_KEEP/$number} "$(tool_bin berth-sandbox)" --shared-root "$HERE/node.sh" "$@" &
    LANE_PIDS+=($!)
  done
  # A lane that breaks off has failed whatever it counted.
  for number in "${!LANE_PIDS[@]}"; do
    wait "${LANE_PIDS[number]}" || grep -qs '^fail' "$ALL_LANES/$number/checks/results" || failed=$((failed + 1))
  done
  LANE_PIDS=()
  failed=$((failed + $(cat "$ALL_LANES"/*/checks/results | { grep -c '^fail' || true; })))
  echo "node: $(cat "$ALL_LANES"/*/checks/results | { grep -c '^pass' || true; }) passed, $failed failed"
  [ $failed -eq 0 ]
}
end_lanes() { [ ${#LANE_PIDS[@]} -eq 0 ] || kill "${LANE_PIDS[@]}" 2> /dev/null || true; wait; rm -rf "$ALL_LANES"; }

if [ "${NODE_WORK:-}" = "" ]; then
  ALL_LANES=$(make_work)
  LANE_PIDS=()
  trap end_lanes EXIT
  run_lanes "$@"
  exit
fi

WORK=$NODE_WORK
PATTERN=${1:-}
CHECK_JOBS=${CHECK_JOBS:-8}
. "$HERE/checks.sh"
. "$HERE/node/lib.sh"

keep_logs() { [ -z "${NODE_KEEP:-}" ] || { mkdir -p "$NODE_KEEP" && cp -rT "$LOGS" "$NODE_KEEP"; }; }
start_registry "$IMAGES/registry"
disown # bash would tell of its end
mkdir -p "$WORK/audit" "$WORK/manifests"
API_FLAGS="--audit-policy-file=$HERE/node/audit.yaml --audit-log-path=$AUDIT"
start_control_plane "$WORK/cp"
bounded_kubectl "$WORK/bin"
trap keep_logs EXIT
cp "$CONTROL_PLANE/kubelet.conf" "$WORK/kubelet.conf"
write_node_config
start_node

need "the node is Ready" within 30 node_ready
# Scenarios use functions of each other's files; their checks are those of this lane alone.
in_this_lane() { [[ " $NODE_FILES " == *" $SCENARIOS "* ]]; }
LANE_CHECKS=in_this_lane
for SCENARIOS in $(files_of); do . "$SCENARIO_FOLDER/$SCENARIOS.sh"; done
SCENARIOS=""
settle_checks
begun=$SECONDS
AFTER_FAILURE=set_right run_alone
alone=$((SECONDS - begun))
need "nothing that the node has asked for was refused" none_refused
need "deleted pods go, with their sandboxes" all_gone
need "nothing is left without an owner" no_leaks
stop_node
echo "lane of ${NODE_FILES% }: $SECONDS s, of these $alone s with one check at a time"
finish_checks "lane of ${NODE_FILES% }"
