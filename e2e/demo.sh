#!/bin/bash
# The demo: usage: e2e/demo.sh [run]. A static pod from its manifest to its removal, on throw-away folders in namespaces of its own.
# With `run`, the same node stays in the foreground until Ctrl-C. Needs root and the built binaries; no network, no other program.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/lib.sh"

if [ "${DEMO_OUTER:-}" = "" ]; then
  DEMO_OUTER=$$ exec "$(tool_bin berth-sandbox)" --shared-root "$HERE/demo.sh" "$@"
fi

DIR=/run/t/demo # gone with the sandbox
mkdir -p "$DIR/manifests"
berth() { "$BERTH_BIN" --root "$DIR/root" --state /run/berth "$@"; }
say() { printf '\n== %s\n' "$*"; }
show() { printf '$ berth %s\n' "$*"; berth "$@"; }
get() { # ADDRESS PORT PATH, by bash alone
  exec 3<>"/dev/tcp/$1/$2" || return 1
  printf 'GET %s HTTP/1.0\r\n\r\n' "$3" >&3
  sed '1,/^\r$/d' <&3
  exec 3>&-
}
pod() { berth pods 2>/dev/null | awk -v column="$1" '$2 ~ /^web-/ {print $column}'; }
running() { [ "$(pod 3) $(pod 4)" = "1/1 Running" ]; }
restarted() { running && [ "$(pod 5)" = 1 ]; }
replaced() { running && get "$(pod 7)" 8080 / 2>/dev/null | grep -q '^hello again'; }
no_pods() { [ "$(pod 2)" = "" ]; }
failed() {
  echo "the demo failed; the end of the node's log:" >&2
  tail -n 30 "$DIR/log" >&2
}
trap failed ERR

"$(tool_bin demo-image)" "$(tool_bin demo-web)" "$DIR/web.tar"
show image import "$DIR/web.tar"
berth node --manifests "$DIR/manifests" --kubelet-root "$DIR/kubelet" --pod-logs-dir "$DIR/logs" \
  --container-logs-dir "$DIR/links" --node-name demo --registry-config-dir "$DIR" > "$DIR/log" 2>&1 &
node=$!
trap 'trap - ERR; kill $node 2>/dev/null || true' EXIT
wait_for "the node" test -S /run/berth/kubelet.sock

say "a manifest is dropped into the folder"
cp "$HERE/../manifests/web.yaml" "$DIR/manifests/"
wait_for "the pod to run" running
show pods
show ps
ip=$(pod 7)

say "its page, through the pod's address $ip and through the host port"
get "$ip" 8080 /
get 10.77.0.1 18080 /through-the-host-port

if [ "${1:-}" = run ]; then
  say "the node runs until Ctrl-C; from another terminal:"
  echo "nsenter -a -t \$(pgrep -P $DEMO_OUTER) $BERTH_BIN --root $DIR/root pods"
  echo "manifests: $DIR/manifests, inside"
  trap : INT TERM
  tail -n +1 -f "$DIR/log" &
  wait "$node" || true
  kill $! 2>/dev/null || true
  say "ending the pods"
  berth stop --all
  exit
fi

say "its log, and a command in its container"
show logs web-demo
show exec web-demo -- /bin/demo-web whoami

say "the web process is killed: the container starts again"
for file in /proc/[0-9]*/comm; do
  pid=${file%/comm}
  if [ "$(cat "$file" 2>/dev/null)" = demo-web ]; then kill -9 "${pid#/proc/}"; fi
done
wait_for "the restart" restarted
show pods
get "$(pod 7)" 8080 /after-the-restart

say "the manifest is edited: another pod takes its place"
sed 's/hello from berth/hello again/' "$HERE/../manifests/web.yaml" > "$DIR/manifests/.new"
mv "$DIR/manifests/.new" "$DIR/manifests/web.yaml"
wait_for "the replacement" replaced
show pods
get 10.77.0.1 18080 /

say "the manifest is removed"
rm "$DIR/manifests/web.yaml"
wait_for "the pod's end" no_pods
show pods

say "the node ends, and nothing is left"
berth stop --all
wait "$node" || true
show leaks --settle
left=$(berth leaks --settle)
[ -z "$left" ]
echo "done"
