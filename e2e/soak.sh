#!/bin/bash
# The long checks of a node under an API server (soak-node.sh), then critest and the scenarios ROUNDS (10) times; ends at the first failure. Prints what a round took and left.
set -euo pipefail
export BERTH_ROUNDS=200
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/lib.sh"
cd "$HERE/.."
"$HERE/soak-node.sh"
for round in $(seq "${ROUNDS:-10}"); do
  begun=$SECONDS
  KILL_ROUNDS=50 LOG_ROTATIONS=100 cargo test -q -p berth-e2e --tests > target/soak.log 2>&1 || { tail -n 80 target/soak.log; exit 1; }
  "$HERE/critest.sh" berth > target/soak.log 2>&1 || { cat target/soak.log; exit 1; }
  echo "round $round: $((SECONDS - begun)) s, $(tail -n 1 target/soak.log), cgroups left: $(find /sys/fs/cgroup -maxdepth 3 -name '*berth*' | wc -l)"
done
