# Life without the API server over a reboot: the pods that it last wanted start again from disk, and are the same when it is back.

# What a power cut does, as far as a sandbox can play it: every process of the pods and the agent die, what is on tmpfs and the network
# of this boot are gone, and the kernel tells another boot's ID, which stays: pods run in that boot. Only what this run has started is ended: by its pods' cgroups.
reboot_node() {
  local uids pid uid mount link
  uids=$(crictl pods -o json | jq -r '.items[].metadata.uid' | sort -u)
  pid=$(node_pid)
  kill -9 "$pid"
  within 30 dead "$pid"
  for uid in $uids; do within 30 pod_processes_dead "$uid"; done
  awk '{print $5}' /proc/self/mountinfo | grep -E "^(/run/berth|$WORK/kubelet|$WORK/berth)(/|\$)" | sort -r | while read -r mount; do umount -l "$mount" || true; done
  find /run/berth -mindepth 1 -delete
  nft flush ruleset
  for link in $( (ip -o link show type veth; ip -o link show type bridge) | awk -F'[:@ ]+' '{print $2}' | grep -E '^(v[0-9a-f]|berth-)'); do
    ip link delete "$link" 2> /dev/null || true
  done
  [ -e "$WORK/boot_id" ] || { echo 00000000-1111-2222-3333-444444444444 > "$WORK/boot_id"; mount --bind "$WORK/boot_id" /proc/sys/kernel/random/boot_id; }
  cat /proc/sys/kernel/random/uuid > "$WORK/boot_id"
}
pod_processes_dead() {
  local left
  left=$(find /sys/fs/cgroup -path "*pod$1*" -name cgroup.procs -exec cat {} + 2> /dev/null | sort -u)
  [ -z "$left" ] || { kill -9 $left 2> /dev/null || true; return 1; }
}

sealing_key() { [ -e "$WORK/sealing.key" ] || { head -c 32 /dev/urandom | base64 > "$WORK/sealing.key"; chmod 0400 "$WORK/sealing.key"; }; }
# offline_node [FLAG…]: the node's agent anew, with the key.
offline_node() { sealing_key; stop_node; start_node --sealing-key-file "$WORK/sealing.key" --offline-after 2s "$@"; within 30 node_ready; }
records() { find "$WORK/kubelet/api-pods/$1" -name '*.json' 2> /dev/null | wc -l; }
has_record() { [ -e "$WORK/kubelet/api-pods/pods/$1.json" ] && { [ -z "${2:-}" ] || [ -e "$WORK/kubelet/api-pods/tokens/$1.json" ]; }; }
# running_of UID: the running container of a pod, by the runtime alone.
running_of() { crictl ps -q --no-trunc --label "io.kubernetes.pod.uid=$1"; }
runs() { [ -n "$(running_of "$1")" ] || { tail -n 5 "$LOGS/berth.log"; return 1; }; }
in_pod() { local id; id=$(running_of "$1"); shift; crictl exec "$id" "$@"; }
away_log() { tail -n +"$((LOG_MARK + 1))" "$LOGS/berth.log"; }
mark_log() { LOG_MARK=$(wc -l < "$LOGS/berth.log"); }

# A value that is nowhere else.
SECRET_VALUE="hunter2-$BASHPID-opensesame"
offline_objects() {
  new_namespace
  k create configmap settings --from-literal=colour=teal
  k create secret generic login --from-literal=password="$SECRET_VALUE"
}
FIVE="plain shows reads hidden token"
five_pods() {
  shell_pod plain 'exec sleep 3600' 'automountServiceAccountToken: false'
  create_pod shows "{terminationGracePeriodSeconds: 1, automountServiceAccountToken: false, volumes: [{name: v, configMap: {name: settings}}], containers: [{name: main, image: $BUSYBOX, command: [sleep, '3600'], volumeMounts: [{name: v, mountPath: /v}], envFrom: [{configMapRef: {name: settings}}]}]}"
  create_pod reads "{terminationGracePeriodSeconds: 1, automountServiceAccountToken: false, containers: [{name: main, image: $BUSYBOX, command: [sleep, '3600'], env: [{name: PASSWORD, valueFrom: {secretKeyRef: {name: login, key: password}}}]}]}"
  create_pod hidden "{terminationGracePeriodSeconds: 1, automountServiceAccountToken: false, volumes: [{name: v, secret: {secretName: login}}], containers: [{name: main, image: $BUSYBOX, command: [sleep, '3600'], volumeMounts: [{name: v, mountPath: /v}]}]}"
  shell_pod token 'exec sleep 3600'
  local name
  for name in $FIVE; do within 60 pod_ready "$name"; done
}

# no_secret_on_disk TOKEN: what is planted beside the pods' files is found, and nothing else.
no_secret_on_disk() {
  local secrets one planted=() found
  secrets=("$SECRET_VALUE" "$(printf %s "$SECRET_VALUE" | base64 -w 0)" "$1" "$(cat "$WORK/sealing.key")")
  for one in "${!secrets[@]}"; do
    planted+=("$WORK/berth/planted-$one" "$WORK/kubelet/planted-$one")
    printf '%s' "${secrets[one]}" | tee "$WORK/berth/planted-$one" > "$WORK/kubelet/planted-$one"
  done
  found=$(find "$WORK/kubelet" "$WORK/berth" -xdev -type f -print0 | xargs -0 grep -lF "${secrets[@]/#/-e}") || true
  rm "${planted[@]}"
  same "$(sort <<< "$found")" "$(printf '%s\n' "${planted[@]}" | sort)"
}

offline_reboot() {
  offline_node
  trap 'kubectl delete namespace "$NS" --wait=false > /dev/null' EXIT
  offline_objects
  trap 'kubectl delete namespace "$NS" --wait=false > /dev/null' EXIT
  five_pods
  shell_pod once 'exit 0' 'restartPolicy: Never, automountServiceAccountToken: false'
  within 60 pod_phase once Succeeded
  local name uids once token before begun took
  uids=$(for name in $FIVE; do uid_of "$name"; done) once=$(uid_of once)
  for name in $uids; do within 30 has_record "$name"; done
  within 30 has_record "$(uid_of token)" token
  within 30 grep -q Succeeded "$WORK/kubelet/api-pods/pods/$once.json"
  token=$(k exec token -- cat /var/run/secrets/kubernetes.io/serviceaccount/token)
  no_secret_on_disk "$token"
  before=$(k get pods -o 'jsonpath={range .items[*]}{.metadata.name} {.metadata.uid}{"\n"}{end}' | sort)

  stop_api_server
  reboot_node
  mark_log
  begun=$EPOCHREALTIME
  start_node --sealing-key-file "$WORK/sealing.key"
  within 60 all_run $uids
  took=$(( (${EPOCHREALTIME/./} - ${begun/./}) / 1000 ))
  echo "5 of 5 run $took ms after the agent's start"
  [ $took -lt 10000 ] || { away_log | tail -n 20; return 1; }
  same "$(running_of "$once")" ""
  set -- $uids
  same "$(in_pod "$2" cat /v/colour) $(in_pod "$2" sh -c 'echo $colour')" "teal teal"
  same "$(in_pod "$3" sh -c 'echo $PASSWORD')" "$SECRET_VALUE"
  same "$(in_pod "$4" cat /v/password)" "$SECRET_VALUE"
  same "$(in_pod "$5" cat /var/run/secrets/kubernetes.io/serviceaccount/token)" "$token"
  same "$(in_pod "$1" sh -c 'echo $KUBERNETES_SERVICE_HOST')" 10.96.0.1
  no_secret_on_disk "$token"

  local containers
  containers=$(crictl ps -q --no-trunc | sort)
  resume_api_server
  within 30 node_ready
  for name in $FIVE; do within 30 pod_ready "$name"; done
  same "$(k get pods -o 'jsonpath={range .items[*]}{.metadata.name} {.metadata.uid}{"\n"}{end}' | sort)" "$before"
  same "$(crictl ps -q --no-trunc | sort)" "$containers"
  for name in $FIVE; do same "$name $(pod_json "$name" '{.status.containerStatuses[0].restartCount}')" "$name 1"; done
  pod_phase once Succeeded
  same "$(k get pod once -o 'jsonpath={.status.containerStatuses[0].restartCount}')" 0
}
all_run() { local uid; for uid; do [ -n "$(running_of "$uid")" ] || return 1; done; }
alone "after a reboot without the API server 5 of 5 pods run in 10 s with their objects, and are the same when it is back" offline_reboot

offline_deleted() {
  offline_node
  offline_objects
  trap 'kubectl delete namespace "$NS" --wait=false > /dev/null' EXIT
  shell_pod stays 'exec sleep 3600'
  shell_pod goes 'exec sleep 3600'
  within 60 pod_ready stays
  within 60 pod_ready goes
  local stays goes
  stays=$(uid_of stays) goes=$(uid_of goes)
  within 30 has_record "$goes" token
  within 30 has_record "$stays" token
  reboot_node
  k delete pod goes --force --grace-period=0
  stop_api_server
  start_node --sealing-key-file "$WORK/sealing.key" --offline-after 1s
  within 30 all_run "$stays" "$goes"
  local container
  container=$(running_of "$stays")
  resume_api_server
  within 30 sh -c '[ -z "$('"$CRI_TOOLS"'/crictl --config /dev/null --timeout 60s --runtime-endpoint unix://'"$CRI_SOCKET"' ps -q --label io.kubernetes.pod.uid='"$goes"')" ]'
  within 30 test ! -e "$WORK/kubelet/api-pods/pods/$goes.json"
  within 30 pod_ready stays
  same "$(running_of "$stays")" "$container"
}
alone "a pod that was deleted while the node was away ends when the API server is back, and no other" offline_deleted

offline_restart() {
  offline_node
  offline_objects
  trap 'kubectl delete namespace "$NS" --wait=false > /dev/null' EXIT
  shell_pod stays 'exec sleep 3600'
  shell_pod ends 'sleep 12; exit 3'
  within 60 pod_ready stays
  within 60 has_record "$(uid_of ends)" token
  local stays ends before
  stays=$(uid_of stays) ends=$(uid_of ends) before=$(running_of "$(uid_of stays)")
  within 30 has_record "$stays" token
  stop_api_server
  stop_node KILL
  local since
  since=$(date +%s%N)
  start_node --sealing-key-file "$WORK/sealing.key" --offline-after 1s
  # The agent of this boot looks after them, though nobody has told it.
  within 60 restarted_offline "$ends" "$since"
  same "$(running_of "$stays")" "$before"
  resume_api_server
  within 30 pod_ready stays
  same "$(running_of "$stays")" "$before"
}
# restarted_offline UID SINCE: a container of the pod was made since then, in nanoseconds.
restarted_offline() { crictl ps -a -o json --label "io.kubernetes.pod.uid=$1" | jq -e --argjson since "$2" '[.containers[].createdAt | tonumber] | max > $since'; }
alone "an agent that starts without the API server keeps the pods' containers up" offline_restart

offline_keyless() {
  stop_node
  start_node
  within 30 node_ready
  offline_objects
  trap 'kubectl delete namespace "$NS" --wait=false > /dev/null' EXIT
  five_pods
  local name plain shows
  plain=$(uid_of plain) shows=$(uid_of shows)
  within 30 has_record "$shows"
  for name in $FIVE; do within 30 has_record "$(uid_of "$name")"; done
  # Those of earlier pods go with them.
  within 30 no_tokens_kept
  local uids
  uids=$(for name in $FIVE; do uid_of "$name"; done)
  stop_api_server
  reboot_node
  mark_log
  start_node --offline-after 1s
  within 30 all_run "$plain" "$shows"
  set -- $uids
  same "$(running_of "$3")$(running_of "$4")$(running_of "$5")" ""
  for name in reads hidden token; do within 30 named_away "$name"; done
  away_log | grep 'is not started while the API server is away' | has 'there is none'
  resume_api_server
  for name in $FIVE; do within 60 pod_ready "$name"; done
  same "$(for name in $FIVE; do uid_of "$name"; done)" "$uids"
}
no_tokens_kept() { same "$(records tokens)" 0; }
named_away() { away_log | grep "not started while the API server is away" | grep "$1_$NS"; }
alone "without a sealing key pods without secrets start, and the others are named until the API server is back" offline_keyless

offline_old() {
  offline_node
  offline_objects
  trap 'kubectl delete namespace "$NS" --wait=false > /dev/null' EXIT
  shell_pod short 'exec sleep 3600'
  create_pod long "{terminationGracePeriodSeconds: 1, containers: [{name: main, image: $BUSYBOX, command: [sleep, '3600']}]}" 'annotations: {berth/offline-max-age: unlimited}'
  within 60 pod_ready short
  within 60 pod_ready long
  local short long
  short=$(uid_of short) long=$(uid_of long)
  within 30 has_record "$short" token
  within 30 has_record "$long" token
  stop_api_server
  reboot_node
  sleep 2
  mark_log
  start_node --sealing-key-file "$WORK/sealing.key" --offline-after 1s --offline-max-age 1s
  within 30 all_run "$long"
  within 30 named_away short
  same "$(running_of "$short")" ""
  resume_api_server
  within 60 pod_ready short
  same "$(uid_of short)" "$short"
}
alone "a pod older than its limit is not started, and is named; it starts when the API server is back" offline_old

offline_key_refused() {
  mkdir -p "$WORK/refused"
  head -c 32 /dev/urandom | base64 > "$WORK/refused/key"
  chmod 0400 "$WORK/refused/key"
  refused_at_start 'lies below' --sealing-key-file "$WORK/refused/key"
  cp "$WORK/refused/key" "$WORK/open.key"
  chmod 0444 "$WORK/open.key"
  refused_at_start 'lets others read it' --sealing-key-file "$WORK/open.key"
}
check "a sealing key below the root, or open to others, is refused at start" offline_key_refused

offline_over() { stop_node; start_node; within 30 node_ready; }
alone "the node goes on without a key" offline_over
