#!/bin/bash
# critest's benchmark over berth and containerd + runc in turn, in both pod shapes (PID namespace shared by the pod, crictl's
# default; one per container, as kubelets ask), each run on fresh folders in a sandbox of its own: usage: e2e/bench.sh [DIR]
# Prints the median of each operation over all rounds, and containerd's divided by berth's. DIR keeps the raw results.
# ROUNDS (2), PARALLEL (1): how often, and how many at a time. COUNT (40): pods and containers.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/lib.sh"

if [ "${BENCH_WORK:-}" = "" ]; then
  "$HERE/tools.sh" packages cri-bench > /dev/null
  BENCH_WORK=$(make_work); export BENCH_WORK
  trap 'rm -rf "$BENCH_WORK"' EXIT
  out=${1:-$BENCH_WORK/results}
  mkdir -p "$out"
  for round in $(seq "${ROUNDS:-2}"); do
    for shape in shared per-container; do
      for kind in berth containerd; do
        echo "round $round: $kind, $shape" >&2
        "$(tool_bin berth-sandbox)" --shared-root "$HERE/bench.sh" "$kind" "$shape" "$out/$shape/$kind/$round"
      done
    done
  done
  for shape in shared per-container; do
    echo "PID namespace $shape, ${PARALLEL:-1} at a time; median ms over ${ROUNDS:-2} rounds"
    jq -rn --arg dir "$out/$shape" '
      def median: sort | if length == 0 then null else .[(length / 2 | floor)] end;
      def ms: if . == null then "-" else (. / 10000 | round / 100 | tostring) end;
      [inputs | {kind: (input_filename | ltrimstr($dir + "/") | split("/")[0]), report: .} | select(.report.operationsNames)
       | .kind as $kind | .report as $r | $r.operationsNames | to_entries[]
       | {kind: $kind, name: .value, ns: [.key as $k | $r.datapoints[].operationsDurationsNs[$k]]}]
      | group_by(.name)[] | {name: .[0].name,
         berth: ([.[] | select(.kind == "berth").ns[]] | median), containerd: ([.[] | select(.kind == "containerd").ns[]] | median)}
      | [.name, (.berth | ms), (.containerd | ms), (if .berth and .containerd then (.containerd / .berth * 10 | round / 10 | tostring) + "x" else "-" end)]
      | @tsv' "$out/$shape"/*/*/*.json | { printf 'operation\tberth\tcontainerd\tratio\n'; cat; } | expand -t 24,36,50
  done
  exit
fi

kind=$1 shape=$2 out=$3
dir=$BENCH_WORK/$kind-$shape-$(basename "$out")
mkdir -p "$out"
start_registry "$IMAGES/registry"
start_cri "$kind" "$dir"
cat > "$out/params.yaml" <<YAML
containersNumber: ${COUNT:-40}
containersNumberParallel: ${PARALLEL:-1}
podsNumber: ${COUNT:-40}
podsNumberParallel: ${PARALLEL:-1}
imagesNumber: 10
imagesNumberParallel: ${PARALLEL:-1}
imagePullingBenchmarkImage: "registry.k8s.io/e2e-test-images/nginx:1.14-2"
imageListingBenchmarkImages: ["registry.k8s.io/e2e-test-images/busybox:1.29-2", "registry.k8s.io/e2e-test-images/nginx:1.14-2"]
YAML
critest=$CRI_TOOLS/critest
[ "$shape" = shared ] || critest=$CRI_BENCH/critest
(cd "$dir" && "$critest" -runtime-endpoint "unix://$CRI_SOCKET" -benchmark -benchmarking-params-file "$out/params.yaml" \
  -benchmarking-output-dir "$out" -ginkgo.no-color > "$dir/bench.log" 2>&1) || { tail -n 40 "$dir/bench.log" >&2; exit 1; }
if [ "$kind" = berth ]; then check_leaks "$dir"; fi
kill "$CRI_PID" 2>/dev/null || true
