#!/bin/bash
# Fills a folder with the images of critest as a registry's storage: usage: e2e/images.sh OUT. Called by tools.sh.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/lib.sh"
OUT=$1

if [ "${2:-}" != inside ]; then
  (cd "$HERE/.." && cargo build -q -p berth-testkit -p berth-e2e)
  "$(tool_bin mkimages)" "$OUT" >/dev/null
  exec "$(tool_bin berth-sandbox)" "$HERE/images.sh" "$OUT" inside
fi

start_registry "$OUT/registry"
jq -r '.manifests[].annotations."org.opencontainers.image.ref.name"' "$OUT/layout/index.json" | while read -r name; do
  skopeo copy -q --insecure-policy --dest-tls-verify=false "oci:$OUT/layout:$name" "docker://$REGISTRY/$name"
done
rm -rf "$OUT/layout"
