# Sourced by suites of shell functions. check "sentence" COMMAND… runs it and prints one line: `pass:` or `FAIL:` with the end of its
# output. LANE_CHECKS: a command that says whether the file's checks are run here. Needs $WORK; only checks whose sentence or file matches $PATTERN run. With CHECK_JOBS > 1 checks run side by side, up to so many;
# those declared by `alone` wait until the others are through; AFTER_FAILURE: a command that puts things right when one of them has failed. The suite ends with finish_checks NAME.
CHECK_JOBS=${CHECK_JOBS:-1}
SCENARIOS=""
CHECKING=()
ALONE=()
mkdir -p "$WORK/checks"
: > "$WORK/checks/results"

# check SENTENCE COMMAND…: the command runs under `set -e` in a subshell.
check() {
  wanted "$1" || return 0
  if [ "$CHECK_JOBS" -le 1 ]; then need "$@"; return; fi
  while [ ${#CHECKING[@]} -ge "$CHECK_JOBS" ]; do
    wait -n "${CHECKING[@]}" || true
    forget_checked
  done
  judge "$@" &
  CHECKING+=($!)
}
# alone SENTENCE COMMAND…: a check that disturbs the node; it runs by itself, in run_alone.
alone() {
  wanted "$1" || return 0
  local IFS=$'\x1f'
  ALONE+=("$*")
}
# need SENTENCE COMMAND…: a check that others stand on: it runs whatever the pattern is, and at once.
need() { judge "$@"; }
wanted() { ${LANE_CHECKS:-true} && [[ $1 =~ $PATTERN || $SCENARIOS =~ $PATTERN ]]; }

forget_checked() {
  local pid still=()
  for pid in "${CHECKING[@]}"; do if kill -0 "$pid" 2> /dev/null; then still+=("$pid"); fi; done
  CHECKING=("${still[@]}")
}
settle_checks() {
  local pid
  for pid in "${CHECKING[@]}"; do wait "$pid" || true; done
  CHECKING=()
}
run_alone() {
  settle_checks
  local one words
  for one in "${ALONE[@]}"; do
    IFS=$'\x1f' read -r -d '' -a words <<< "$one" || true
    words[-1]=${words[-1]%$'\n'}
    need "${words[@]}"
    # What it has left half done is not to be the next one's.
    if [ "$(tail -n 1 "$WORK/checks/results")" = fail ]; then ${AFTER_FAILURE:-true} > /dev/null 2>&1 || true; fi
  done
  ALONE=()
}

judge() {
  local what=$1 code start=$EPOCHREALTIME out tenths
  shift
  out=$(mktemp "$WORK/checks/XXXXXX")
  set +e
  (failed=0; set -e; "$@") > "$out" 2>&1 < /dev/null
  code=$?
  set -e
  tenths=$(( (${EPOCHREALTIME/./} - ${start/./}) / 100000 ))
  if [ $code -eq 0 ]; then
    echo pass >> "$WORK/checks/results"
    echo "pass: $what ($((tenths / 10)).$((tenths % 10)) s)"
  else
    echo fail >> "$WORK/checks/results"
    printf 'FAIL: %s (%s s)\n%s\n' "$what" "$((tenths / 10)).$((tenths % 10))" "$(tail -n 15 "$out" | sed 's/^/      /')"
  fi
  rm -f "$out"
}

# finish_checks NAME: the last line; fails when a check has failed.
finish_checks() {
  settle_checks
  local passed failed
  passed=$(grep -c '^pass' "$WORK/checks/results") || true
  failed=$(grep -c '^fail' "$WORK/checks/results") || true
  echo "$1: $passed passed, $failed failed"
  [ "$failed" -eq 0 ]
}

# within SECONDS COMMAND…: polls until the command succeeds; shows its last output when it never does. The command is a job of its own, so that
# each line of a function counts: in a condition only the last would.
within() {
  local deadline=$((SECONDS + $1)) out code
  shift
  out=$(mktemp "$WORK/checks/XXXXXX")
  while true; do
    code=0
    (set -e; "$@") > "$out" 2>&1 &
    wait $! || code=$?
    if [ $code -eq 0 ]; then break; fi
    if [ $SECONDS -ge $deadline ]; then printf 'gave up on: %s\n%s\n' "$*" "$(cat "$out")"; break; fi
    sleep 0.2
  done
  rm -f "$out"
  return $code
}
# has PATTERN: what is piped in has such a line. It reads all: `grep -q` ends at the first, and pipefail takes what that does to the writer for a failure.
has() { local text; text=$(cat); grep -q "$@" <<< "$text"; }
same() { [ "$1" = "$2" ] || { diff <(echo "$2") <(echo "$1") | sed 's/^</wanted:/; s/^>/is:    /'; return 1; }; }
dead() { ! kill -0 "$1" 2> /dev/null; }
