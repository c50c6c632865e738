# The API server away for AWAY_SECONDS (600) while containers come and go.

away_pod() { k create -f - <<< "{apiVersion: v1, kind: Pod, metadata: {name: $1}, spec: {terminationGracePeriodSeconds: 1, restartPolicy: $2, containers: [{name: main, image: $BUSYBOX, command: [sh, -c, '$3']}]}}"; }
# Each container's attempt and state, as the runtime has them and as the API has them.
told_by_runtime() {
  crictl ps -a -o json | jq -r --arg ns "$NS" '[.containers[] | select(.labels["io.kubernetes.pod.namespace"] == $ns)] | group_by(.labels["io.kubernetes.pod.name"])
    | map(max_by(.metadata.attempt)) | .[] | [.labels["io.kubernetes.pod.name"], .metadata.attempt, (if .state == "CONTAINER_RUNNING" then "runs" else "ended" end)] | join(" ")' | sort
}
told_by_api() {
  k get pods -o json | jq -r '.items[] | [.metadata.name, .status.containerStatuses[0].restartCount, (if .status.containerStatuses[0].state.running then "runs" else "ended" end)] | join(" ")' | sort
}
both_say_the_same() { same "$(told_by_api)" "$(told_by_runtime)"; }

soak_away() {
  new_namespace
  local i before seconds=${AWAY_SECONDS:-600}
  for i in $(seq 10); do away_pod "steady-$i" Always 'exec sleep 100000'; done
  for i in $(seq 10); do away_pod "crash-$i" Always "sleep $((5 + i)); exit 1"; done
  for i in $(seq 5); do away_pod "done-$i" Never "sleep $((seconds / 2 + i))"; done
  for i in $(seq 10); do within 60 pod_ready "steady-$i"; done
  before=$(k get pods -o 'jsonpath={range .items[*]}{.metadata.name} {.metadata.uid}{"\n"}{end}' | sort)
  local running
  running=$(for i in $(seq 10); do crictl ps -q --no-trunc --label "io.kubernetes.pod.name=steady-$i" --label "io.kubernetes.pod.namespace=$NS"; done)
  stop_api_server
  sleep "$seconds"
  start_api_server
  wait_for "the API server" kubectl get --raw /readyz > /dev/null
  local begun=$SECONDS
  # A container may end between the two answers: they agree at some moment.
  within 5 both_say_the_same
  echo "statuses are right $((SECONDS - begun)) s after the API server"
  restart_controller_manager
  restart_scheduler
  same "$(for i in $(seq 10); do crictl ps -q --no-trunc --label "io.kubernetes.pod.name=steady-$i" --label "io.kubernetes.pod.namespace=$NS"; done)" "$running"
  same "$(k get pods -o 'jsonpath={range .items[*]}{.metadata.name} {.metadata.uid}{"\n"}{end}' | sort)" "$before"
  for i in $(seq 5); do pod_phase "done-$i" Succeeded; done
}
alone "the API server away while containers come and go: statuses are right in 5 s when it is back, nothing restarts, nothing is deleted" soak_away
