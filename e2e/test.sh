#!/bin/bash
# Every test of the project; BERTH_BIN is the built binary (`make test`). The last line is the sum: N passed, N failed, N skipped.
# Skipped are tests that said why they cannot run here, specs that critest skips here, and critest's failures that are not in
# critest-expected; all are listed by name.
set -uo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
cd "$HERE/.."
. "$HERE/lib.sh"
export RUST_BACKTRACE=0 CARGO_TERM_COLOR=never
LOGS=$PWD/target/test-logs
mkdir -p "$LOGS"
passed=0 failed=0 skipped=0

# suite NAME COMMAND…: a suite of cargo test.
suite() {
  local name=$1 log=$LOGS/$1.log begun=$SECONDS code=0 counts p f s
  shift
  "$@" > "$log" 2>&1 || code=$?
  counts=$(awk '/^test result:/ {p += $4; f += $6; s += $8} /^SKIPPED / {p--; s++} END {print p + 0, f + 0, s + 0}' "$log")
  read -r p f s <<< "$counts"
  # A suite that broke off, or did not compile, has failed whatever it counted.
  if [ $code -ne 0 ] && [ "$f" -eq 0 ]; then f=1; tail -n 60 "$log"; fi
  grep -E '^(SKIPPED|MEASURED) ' "$log"
  [ "$f" -eq 0 ] || sed -n '/^failures:$/,/^test result:/p' "$log"
  report "$name" "$p" "$f" "$s" $((SECONDS - begun))
}

report() {
  passed=$((passed + $2)) failed=$((failed + $3)) skipped=$((skipped + $4))
  echo "$1: $2 passed, $3 failed, $4 skipped in $5 s"
}

# critest NAME ARGUMENT…: a run of critest. With arguments only what they choose counts, and the rest is not named as skipped.
critest() {
  local name=$1 log=$LOGS/$1.log begun=$SECONDS p f k s
  shift
  "$HERE/critest.sh" berth "$@" > "$log" 2>&1
  grep -v '^critest: [0-9]* passed' "$log"
  if read -r p f k s < <(sed -n 's/^critest: \([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) known failures, \([0-9]*\) skipped$/\1 \2 \3 \4/p' "$log"); then
    [ $# -eq 0 ] || k=0 s=0
    report "$name" "$p" "$f" $((k + s)) $((SECONDS - begun))
  else
    report "$name" 0 1 0 $((SECONDS - begun))
  fi
}

# checks NAME COMMAND…: a script that ends with `NAME: N passed, N failed`.
checks() {
  local name=$1 log=$LOGS/$1.log begun=$SECONDS p f
  shift
  "$@" > "$log" 2>&1
  if read -r p f < <(sed -n "s/^$name: \([0-9]*\) passed, \([0-9]*\) failed.*/\1 \2/p" "$log"); then
    [ "$f" -eq 0 ] || cat "$log"
    report "$name" "$p" "$f" 0 $((SECONDS - begun))
  else
    tail -n 40 "$log"
    report "$name" 0 1 0 $((SECONDS - begun))
  fi
}

# vm NAME: what this machine may lack, in a small VM by NAME.sh, which ends with `NAME: N passed, N failed, N skipped`.
vm() {
  local name=$1 log=$LOGS/$1-suite.log begun=$SECONDS p f s
  "$HERE/$name.sh" > "$log" 2>&1
  if read -r p f s < <(sed -n "s/^$name: \([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) skipped$/\1 \2 \3/p" "$log"); then
    [ "$f" -eq 0 ] || grep -vE "^$name: " "$log"
    grep -E '^SKIPPED ' "$log"
    report "$name" "$p" "$f" "$s" $((SECONDS - begun))
  else
    tail -n 30 "$log"
    report "$name" 0 1 0 $((SECONDS - begun))
  fi
}

# beside FUNCTION NAME ARGUMENT…: a suite next to the ones that follow, until `beside_ends`.
beside() {
  "$@" > "$LOGS/$2.beside" 2>&1 &
  BESIDE+=("$!:$2")
}

# What the suites beside have printed, and their sums.
beside_ends() {
  local suite name p f s
  for suite in "${BESIDE[@]}"; do
    name=${suite#*:}
    wait "${suite%%:*}"
    cat "$LOGS/$name.beside"
    if read -r p f s < <(sed -n "s/^$name: \([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) skipped in .*/\1 \2 \3/p" "$LOGS/$name.beside"); then
      passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    else
      report "$name" 0 1 0 0
    fi
  done
  BESIDE=()
}
BESIDE=()

if ! "$HERE/tools.sh" all > "$LOGS/tools.log" 2>&1; then
  tail -n 30 "$LOGS/tools.log"
  report tools 0 1 0 "$SECONDS"
fi
# Some kernel tests run programs of their crate, which are its examples.
cargo build --workspace --examples > "$LOGS/examples.log" 2>&1 || { tail -n 30 "$LOGS/examples.log"; report examples 0 1 0 "$SECONDS"; }
# Tests of the CRI server start this shim: built here and not in a test's time.
cargo build --quiet -p berth-shim --bin berth-shim > "$LOGS/shim.log" 2>&1 || { tail -n 30 "$LOGS/shim.log"; report shim 0 1 0 "$SECONDS"; }
suite crates cargo test --workspace --exclude berth-e2e --lib --bins --tests --no-fail-fast
# One at a time: some of them measure.
suite e2e cargo test -p berth-e2e --lib --bins --tests --no-fail-fast -- --test-threads=1
# systemd as the owner of the cgroups.
vm vm-systemd
# cgroup v2 with controllers, AppArmor, PSI, swap, huge pages: the guest keeps one processor busy, and the suites next to it mostly wait.
beside vm vm
critest critest
critest critest-websocket -ginkgo.focus=Streaming -websocket-exec -websocket-attach -websocket-portforward
checks kubernetes "$HERE/kubernetes.sh"
checks node "$HERE/node.sh"
checks addons "$HERE/addons.sh"
checks cluster "$HERE/cluster.sh" --once
beside_ends
if [ "$skipped" -gt 0 ]; then
  echo "$passed passed, $failed failed, $skipped skipped"
else
  echo "$passed passed, $failed failed"
fi
[ "$failed" -eq 0 ]
