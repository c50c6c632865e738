#!/bin/bash
# The long checks of a node under an API server: e2e/soak-node.sh [away|churn|tokens]; AWAY_SECONDS (600), CHURN_PODS (1000), CHURN_KILLS (20); tokens take 8 minutes.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
NODE_SCENARIOS=$HERE/soak exec "$HERE/node.sh" "${1:-.}"
