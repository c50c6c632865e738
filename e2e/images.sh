#!/bin/bash
# Fills a folder with images as a registry's storage, called by tools.sh: usage: e2e/images.sh OUT: those of critest; e2e/images.sh OUT
# addons VERSIONS: a cluster's, of the programs in OUT/bin (see mkaddons), beside those of critest.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/lib.sh"
OUT=$1

if [ "${IMAGES_INSIDE:-}" = "" ]; then
  (cd "$HERE/.." && cargo build -q -p berth-testkit -p berth-e2e)
  case ${2:-} in
  addons)
    cp -r "$IMAGES/registry" "$OUT/registry"
    "$(tool_bin mkaddons)" "$OUT" "$OUT/bin" "$3" ;;
  *) "$(tool_bin mkimages)" "$OUT" > /dev/null ;;
  esac
  IMAGES_INSIDE=1 exec "$(tool_bin berth-sandbox)" "$HERE/images.sh" "$OUT"
fi

start_registry "$OUT/registry"
jq -r '.manifests[].annotations."org.opencontainers.image.ref.name"' "$OUT/layout/index.json" | while read -r name; do
  skopeo copy -q --insecure-policy --dest-tls-verify=false "oci:$OUT/layout:$name" "docker://$REGISTRY/$name"
done
rm -rf "$OUT/layout"
