# A projected token is exchanged before it ends.

# The machine's clock cannot be moved for the node alone: a token of the shortest life is due after 480 s less 10.
token_rotates() {
  new_namespace
  create_pod a "{terminationGracePeriodSeconds: 1, containers: [{name: main, image: $BUSYBOX, command: [sleep, '3600'], volumeMounts: [{name: t, mountPath: /t}]}],
    volumes: [{name: t, projected: {sources: [{serviceAccountToken: {path: token, expirationSeconds: 600}}]}}]}"
  within 30 pod_ready a
  local first
  first=$(k exec a -- cat /t/token)
  within 500 token_differs a "$first"
  review "$(k exec a -- cat /t/token)" "" | jq -e '.status.authenticated'
}
token_differs() { local now; now=$(k exec "$1" -- cat /t/token) && [ -n "$now" ] && [ "$now" != "$2" ]; }
check "a token of ten minutes is exchanged before it ends" token_rotates
