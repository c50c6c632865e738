#!/bin/bash
# Runs critest: usage: e2e/critest.sh [berth|containerd] [ARGUMENT…]; the arguments go to critest, e.g. -ginkgo.focus=Streaming.
# CRITEST_HANDLER=NAME=PATH runs every pod by a RuntimeClass handler of berth, e.g. runc=$HOME/.cache/berth-tools/runc-1.5.2/runc.
# Prints the failed and skipped specs by name and a last line `critest: N passed, N failed, N known failures, N skipped`.
# A full run fails when a spec listed in critest-expected does not pass; with arguments, when any spec fails.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/lib.sh"
KIND=${1:-berth}
[ $# -eq 0 ] || shift

if [ "${CRITEST_WORK:-}" = "" ]; then
  CRITEST_WORK=$(make_work); export CRITEST_WORK
  trap 'rm -rf "$CRITEST_WORK"' EXIT
  "$(tool_bin berth-sandbox)" --shared-root "$HERE/critest.sh" "$KIND" "$@"
  exit
fi

HANDLER=()
if [ -n "${CRITEST_HANDLER:-}" ]; then
  HANDLER=(-runtime-handler "${CRITEST_HANDLER%%=*}")
  export CRI_FLAGS="--runtime-handler $CRITEST_HANDLER"
fi
start_registry "$IMAGES/registry"
start_cri "$KIND" "$CRITEST_WORK"
report=$CRITEST_WORK/report.json
code=0
(cd "$CRITEST_WORK" && timeout -k 10 "${CRITEST_TIMEOUT:-900}" "$CRI_TOOLS/critest" -runtime-endpoint "unix://$CRI_SOCKET" \
  -ginkgo.no-color -ginkgo.v -ginkgo.json-report "$report" "${HANDLER[@]}" "$@" > "$CRITEST_WORK/critest.log" 2>&1) || code=$?
if [ ! -s "$report" ]; then
  tail -n 40 "$CRITEST_WORK/critest.log" >&2
  echo "critest: did not end (exit code $code)" >&2
  exit 1
fi
[ -z "${CRITEST_KEEP:-}" ] || cp "$CRITEST_WORK/critest.log" "$report" "$CRITEST_WORK/log" "$CRITEST_KEEP/"

jq -r '.[].SpecReports[] | select(.LeafNodeType == "It")
  | [.State, ((.ContainerHierarchyTexts // []) + [.LeafNodeText] | join(" ")), (.Failure.Message // "" | gsub("\\s+"; " ") | .[0:200])] | @tsv' \
  "$report" | sort > "$CRITEST_WORK/specs"
names() { awk -F'\t' -v want="$1" '$1 ~ want {print $2}' "$CRITEST_WORK/specs" | sort -u; }
names '^passed$' > "$CRITEST_WORK/passed"
names '^(failed|panicked|timedout|interrupted|aborted)$' > "$CRITEST_WORK/failed"
names '^(skipped|pending)$' > "$CRITEST_WORK/skipped"
awk -F'\t' '$1 !~ /passed|skipped|pending/ {print "failed: " $2 ": " $3}' "$CRITEST_WORK/specs"

broken=$CRITEST_WORK/failed
if [ $# -eq 0 ]; then
  awk '{print "skipped: " $0}' "$CRITEST_WORK/skipped"
  broken=$CRITEST_WORK/broken
  sed '/^#/d' "$HERE/critest-expected" | sort -u | comm -23 - "$CRITEST_WORK/passed" > "$broken"
  awk '{print "expected to pass and did not: " $0}' "$broken"
fi
known=$(comm -23 "$CRITEST_WORK/failed" "$broken" | wc -l)
failed=$(wc -l < "$broken")
if [ "$KIND" = berth ]; then check_leaks "$CRITEST_WORK" || failed=$((failed + 1)); fi
kill "$CRI_PID" 2>/dev/null || true
echo "critest: $(wc -l < "$CRITEST_WORK/passed") passed, $failed failed, $known known failures, $(wc -l < "$CRITEST_WORK/skipped") skipped"
[ "$failed" -eq 0 ]
