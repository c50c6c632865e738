# CHURN_PODS (1000) pods made and deleted while the agent is killed CHURN_KILLS (20) times.

churn_batch() {
  local from=$1 to=$2 i
  for i in $(seq "$from" "$to"); do
    printf -- '---\n{apiVersion: v1, kind: Pod, metadata: {name: p%s}, spec: {terminationGracePeriodSeconds: 1, containers: [{name: main, image: %s, command: [sleep, "3600"]}]}}\n' "$i" "$BUSYBOX"
  done | k create -f - > /dev/null
}
none_left() { local left; left=$(k get pods -o name) && same "$left" ""; }
# most_run NUMBER: four of five of so many are running, so that what ends now has containers.
most_run() {
  local running
  running=$(k get pods --field-selector status.phase=Running -o name | wc -l)
  echo "$running of $1 pods are running"
  [ "$running" -ge $((($1 * 4 + 4) / 5)) ]
}
# What another check has left may end still: both numbers move.
a_sandbox_a_pod() {
  local sandboxes pods
  sandboxes=$(crictl pods -q | wc -l)
  pods=$(kubectl get pods -A --field-selector status.phase=Running -o name | wc -l)
  same "$sandboxes sandboxes" "$pods sandboxes"
}
soak_churn() {
  new_namespace
  local pods=${CHURN_PODS:-1000} kills=${CHURN_KILLS:-20} each round
  each=$((pods / kills))
  [ "$each" -le 100 ] || each=100
  for round in $(seq "$kills"); do
    churn_batch $(((round - 1) * each + 1)) $((round * each))
    if [ $((round % 2)) -eq 1 ]; then
      # In the midst of starts.
      restart_node KILL
      k delete pods --all --wait=false > /dev/null
    else
      # In the midst of ends.
      within 60 most_run "$each"
      k delete pods --all --wait=false > /dev/null
      restart_node KILL
    fi
    within 120 none_left
    echo "round $round of $kills: $((round * each)) pods"
  done
  within 60 node_ready
  within 60 a_sandbox_a_pod
}
alone "pods made and deleted while the agent is killed: none is stuck, nothing is left" soak_churn
