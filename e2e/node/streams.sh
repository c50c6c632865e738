# Streams through the API server: exec, attach, cp and port-forward, each over WebSocket and SPDY. Stands on the helpers of access.sh.

# Exec.

exec_streams() {
  new_namespace
  own_folder
  a_shell a
  over_both exec_streams_once
}
exec_streams_once() {
  local code=0
  same "$(k exec a -- sh -c 'echo out; echo error >&2' 2> "$OWN/err")" out
  same "$(cat "$OWN/err")" error
  same "$(printf 'a\nb\n' | k exec -i a -- cat)" "$(printf 'a\nb')"
  # The end of the input is the command's.
  same "$(printf 12345 | k exec -i a -- wc -c)" 5
  k exec a -- sh -c 'exit 7' 2> "$OWN/err" || code=$?
  same "$code $(cat "$OWN/err")" "7 command terminated with exit code 7"
  code=0
  k exec a -- sh -c 'kill -9 $$' 2> "$OWN/err" || code=$?
  same $code 137
  fails_with no-such-command k exec a -- no-such-command
  fails_with 'container nobody is not valid for pod a' k exec a -c nobody -- true
}
check "kubectl exec: output and errors apart, input to its end, exit codes, over WebSocket and SPDY" exec_streams

exec_binary() {
  new_namespace
  own_folder
  a_shell a
  head -c 8M /dev/urandom > "$OWN/data"
  over_both exec_binary_once
}
exec_binary_once() {
  k exec -i a -- sh -c 'cat > /data; sha256sum < /data' < "$OWN/data" > "$OWN/sum"
  same "$(cut -d' ' -f1 "$OWN/sum")" "$(sha256sum < "$OWN/data" | cut -d' ' -f1)"
  k exec a -- cat /data | cmp - "$OWN/data"
  k exec -i a -- cat < "$OWN/data" | cmp - "$OWN/data"
}
check "kubectl exec: 8 MB of any bytes pass unchanged both ways, over WebSocket and SPDY" exec_binary

terminal_sizes() {
  new_namespace
  own_folder
  a_shell a
  over_both terminal_once
}
terminal_once() {
  # The size comes after the start: the command waits for it.
  in_terminal "$KUBERNETES/kubectl" -n "$NS" exec -it a -- sh -c 'tty; until stty size | grep "33 111"; do sleep 0.1; done; echo bigger
    until stty size | grep "44 122"; do sleep 0.1; done; echo type:; read words; echo "read <$words>"; echo err >&2; exit 5' > "$OWN/shown"
  cat "$OWN/shown"
  grep -q '^/dev/pts/0$' "$OWN/shown"
  grep -q '^33 111$' "$OWN/shown"
  grep -q '^44 122$' "$OWN/shown"
  grep -q '^some words$' "$OWN/shown"
  grep -q '^read <some words>$' "$OWN/shown"
  grep -q '^err$' "$OWN/shown"
  grep -q '^code 5$' "$OWN/shown"
}
check "kubectl exec -it: a terminal of the client's size, which changes with it, over WebSocket and SPDY" terminal_sizes

exec_client_gone() {
  new_namespace
  a_shell a
  over_both exec_client_gone_once
}
# As with other runtimes: what writes finds its pipe broken, what has a terminal is hung up.
exec_client_gone_once() {
  "$KUBERNETES/kubectl" -n "$NS" exec a -- sh -c 'while :; do echo writes-on; sleep 0.1; done' > /dev/null &
  local writer=$! terminal
  script -qec "$KUBERNETES/kubectl -n $NS exec -it a -- sleep 4321" /dev/null < <(sleep 120) > /dev/null 2>&1 &
  terminal=$!
  within 30 is_there '[w]rites-on'
  within 30 is_there '[s]leep 4321'
  kill -9 $writer $terminal
  wait $writer $terminal || true
  within 30 is_gone '[w]rites-on'
  within 30 is_gone '[s]leep 4321'
}
is_there() { k exec a -- ps | has "$1"; }
is_gone() { local all; all=$(k exec a -- ps) && refute grep "$1" <<< "$all"; }
check "when kubectl is killed, its command's pipe is broken or its terminal hung up, over WebSocket and SPDY" exec_client_gone

exec_at_once() {
  new_namespace
  own_folder
  a_shell a
  over_both exec_at_once_round
}
exec_at_once_round() {
  local n pids=()
  for n in $(seq 20); do k exec a -- sh -c "head -c 100000 /dev/zero | wc -c; echo $n" > "$OWN/$n" & pids+=($!); done
  for n in "${pids[@]}"; do wait "$n"; done
  for n in $(seq 20); do same "$(cat "$OWN/$n")" "$(printf '100000\n%s' "$n")"; done
}
check "twenty commands at once, over WebSocket and SPDY" exec_at_once

exec_not_running() {
  new_namespace
  create_pod ended "{restartPolicy: Never, containers: [{name: main, image: $BUSYBOX, command: ['true']}]}"
  create_pod other "{terminationGracePeriodSeconds: 1, containers: [{name: done, image: $BUSYBOX, command: ['true']}, {name: up, image: $BUSYBOX, command: [sh, -c, '$ACCESS_LOOP']}], restartPolicy: OnFailure}"
  within 60 pod_phase ended Succeeded
  within 60 says Completed k get pod other -o 'jsonpath={.status.containerStatuses[0].state.terminated.reason}'
  fails_with 'cannot exec into a container in a completed pod' k exec ended -- true
  over_both fails_with 'container not found ("done")' k exec other -c done -- true
}
check "kubectl exec says when there is no running container" exec_not_running

# Attach.

attach_to_running() {
  new_namespace
  own_folder
  a_pod_that_answers a
  over_both attach_once
  # One who only listens hears what another says.
  k attach a > "$OWN/listens" 2>&1 &
  local listener=$!
  rm -f "$OWN"/{in,out}
  mkfifo "$OWN/in"
  k attach -i a < "$OWN/in" > "$OWN/out" 2>&1 &
  local speaker=$!
  exec 8> "$OWN/in"
  within 30 listener_hears
  kill $listener $speaker
  wait $listener $speaker || true
  exec 8>&-
}
listener_hears() { echo aloud >&8; sleep 0.3; grep '^heard aloud$' "$OWN/listens"; }
a_pod_that_answers() {
  create_pod "$1" "{terminationGracePeriodSeconds: 1, containers: [{name: main, image: $BUSYBOX, stdin: true, command: [sh, -c, 'while read l; do echo \"heard \$l\"; echo \"err \$l\" >&2; done; sleep 0.2; exit 3']}]${2:+, $2}}"
  within 60 pod_phase "$1" Running
}
attach_once() {
  rm -f "$OWN"/{in,out,err}
  mkfifo "$OWN/in"
  k attach -i a < "$OWN/in" > "$OWN/out" 2> "$OWN/err" &
  local client=$!
  exec 8> "$OWN/in"
  # What comes before the attachment is nobody's: it is said again until it is heard.
  within 30 heard_word
  within 30 grep -q '^err word$' "$OWN/err"
  # The container's input stays open: the client goes away in the middle.
  kill $client
  wait $client || true
  exec 8>&-
  same "$(pod_json a '{.status.containerStatuses[0].restartCount}')" 0
}
heard_word() { echo word >&8; sleep 0.3; grep -q '^heard word$' "$OWN/out"; }
check "kubectl attach -i: a running container hears and answers, and outlives its client, over WebSocket and SPDY" attach_to_running

attach_stdin_once() {
  new_namespace
  own_folder
  over_both attach_stdin_once_round
}
attach_stdin_once_round() {
  create_pod once "{terminationGracePeriodSeconds: 1, restartPolicy: Never, containers: [{name: main, image: $BUSYBOX, stdin: true, stdinOnce: true, command: [sh, -c, 'wc -c; exit 6']}]}"
  within 60 pod_phase once Running
  printf 0123456789 | k attach -i once > "$OWN/once" 2>&1 || true
  within 30 pod_phase once Failed
  same "$(k logs once)" 10
  same "$(pod_json once '{.status.containerStatuses[0].state.terminated.exitCode}')" 6
  k delete pod once
}
check "with stdinOnce the first client's end of input is the container's, over WebSocket and SPDY" attach_stdin_once

run_attached() {
  new_namespace
  own_folder
  over_both run_attached_once
}
run_attached_once() {
  local code=0
  echo 'echo from stdin; exit 4' | k run -i --rm --restart=Never --image="$BUSYBOX" once -- sh > "$OWN/out" 2> "$OWN/err" || code=$?
  same $code 4
  grep -q '^from stdin$' "$OWN/out"
  within 30 pod_gone once
}
check "kubectl run -i --rm: input, output, exit code, and the pod is gone" run_attached

attach_terminal() {
  new_namespace
  own_folder
  over_both attach_terminal_once
}
attach_terminal_once() {
  # It begins when somebody is there.
  create_pod t "{terminationGracePeriodSeconds: 1, restartPolicy: Never, containers: [{name: main, image: $BUSYBOX, stdin: true, tty: true,
    command: [sh, -c, 'until stty size | grep \"33 111\"; do sleep 0.1; done; echo bigger; until stty size | grep \"44 122\"; do sleep 0.1; done; echo type:; read w; echo \"read <\$w>\"']}]}"
  within 60 pod_phase t Running
  in_terminal "$KUBERNETES/kubectl" -n "$NS" attach -it t > "$OWN/shown"
  cat "$OWN/shown"
  grep -q '^44 122$' "$OWN/shown"
  grep -q '^read <some words>$' "$OWN/shown"
  k delete pod t
}
check "kubectl attach -it: a terminal with the client's size, over WebSocket and SPDY" attach_terminal

# cp.

copied() {
  new_namespace
  own_folder
  a_shell a
  mkdir -p "$OWN/tree/sub/deep"
  echo one > "$OWN/tree/one"
  printf '#!/bin/sh\n' > "$OWN/tree/sub/run"
  chmod 755 "$OWN/tree/sub/run"
  : > "$OWN/tree/sub/deep/empty"
  echo 'with spaces' > "$OWN/tree/a name"
  head -c 1000000 /dev/urandom > "$OWN/tree/sub/random"
  truncate -s 20M "$OWN/tree/sparse"
  printf tail >> "$OWN/tree/sparse"
  over_both copied_once
  # kubectl may end before it has heard what tar says of it.
  k cp a:/no/such/file "$OWN/none" || true
  [ ! -s "$OWN/none" ]
}
copied_once() {
  rm -rf "$OWN/back"
  k exec a -- rm -rf /tree
  k cp "$OWN/tree" a:/tree
  same "$(k exec a -- sh -c 'cd /tree; find . -type f | sort | xargs -d "\n" sha256sum' 2> /dev/null || k exec a -- sh -c 'cd /tree; find . -type f -exec sha256sum {} \;' | sort -k 2)" \
    "$(cd "$OWN/tree"; find . -type f -exec sha256sum {} \; | sort -k 2)"
  k exec a -- test -x /tree/sub/run
  k cp a:/tree "$OWN/back"
  diff -r "$OWN/tree" "$OWN/back"
  k cp "$OWN/tree/one" a:/tmp/file -c main
  same "$(k exec a -- cat /tmp/file)" one
}
check "kubectl cp: a folder with sparse, empty and random files both ways, over WebSocket and SPDY" copied

copied_big() {
  new_namespace
  own_folder
  a_shell a
  head -c 100M /dev/urandom > "$OWN/big"
  over_both copied_big_once
  rm -f "$OWN"/big*
}
copied_big_once() {
  k cp "$OWN/big" a:/big
  same "$(k exec a -- sha256sum /big | cut -d' ' -f1)" "$(sha256sum < "$OWN/big" | cut -d' ' -f1)"
  k cp a:/big "$OWN/big-back"
  cmp "$OWN/big" "$OWN/big-back"
}
check "kubectl cp: 100 MB both ways, over WebSocket and SPDY" copied_big

# Port-forward.

# a_server NAME [METADATA]: a pod with HTTP servers on 8080 and 8081 that say their port, with a file of 32 MB.
a_server() {
  create_pod "$1" "{terminationGracePeriodSeconds: 1, containers: [{name: main, image: $BUSYBOX, ports: [{name: web, containerPort: 8080}],
    command: [sh, -c, 'mkdir -p /w1 /w2; echo 8080 > /w1/port; echo 8081 > /w2/port; head -c 32000000 /dev/urandom > /w1/big; httpd -p 8080 -h /w1; httpd -p 8081 -h /w2; trap \"exit 0\" TERM; while :; do sleep 0.1; done'],
    readinessProbe: {httpGet: {port: 8081, path: /port}, periodSeconds: 1}}]}" "${2:-}"
  within 60 pod_ready "$1"
}
# forward ARGUMENT…: port-forward in the background, $FORWARD, as it has said in $OWN/forward; forwarded REMOTE prints the local port of it.
forward() {
  : > "$OWN/forward"
  "$KUBERNETES/kubectl" -n "$NS" port-forward "$@" > "$OWN/forward" 2>&1 &
  FORWARD=$!
  within 30 grep -q '^Forwarding from 127' "$OWN/forward"
}
end_forward() { kill "$FORWARD" 2> /dev/null || true; wait "$FORWARD" 2> /dev/null || true; }
forwarded() { sed -n "s/^Forwarding from 127.0.0.1:\([0-9]*\) -> $1\$/\1/p" "$OWN/forward"; }

forward_ports() {
  new_namespace
  own_folder
  a_server a 'labels: {app: web}'
  k create service clusterip web --tcp=80:web
  over_both forward_ports_once
}
forward_ports_once() {
  forward pod/a :8080 :8081
  same "$(curl -fsS "http://127.0.0.1:$(forwarded 8080)/port") $(curl -fsS "http://127.0.0.1:$(forwarded 8081)/port")" "8080 8081"
  end_forward
  # A Service's port is its pod's.
  forward service/web :80
  same "$(curl -fsS "http://127.0.0.1:$(forwarded 8080)/port")" 8080
  end_forward
}
check "kubectl port-forward: two ports of a pod, and a Service's, over WebSocket and SPDY" forward_ports

forward_much() {
  new_namespace
  own_folder
  a_server a
  over_both forward_much_once
}
forward_much_once() {
  local sum url
  sum=$(k exec a -- sha256sum /w1/big | cut -d' ' -f1)
  forward pod/a :8080
  url=http://127.0.0.1:$(forwarded 8080)
  same "$(curl -fsS "$url/big" | sha256sum | cut -d' ' -f1)" "$sum"
  same "$(seq 64 | xargs -P 16 -I{} curl -fsS "$url/port" | sort | uniq -c | tr -s ' ')" " 64 8080"
  same "$(seq 4 | xargs -P 4 -I{} sh -c "curl -fsS $url/big | sha256sum | cut -d' ' -f1" | sort -u)" "$sum"
  # A client that goes in the middle harms nobody.
  curl -s --max-filesize 100 -m 5 "$url/big" > /dev/null || true
  curl -s "$url/big" | head -c 1000 > /dev/null || true
  same "$(curl -fsS "$url/port")" 8080
  end_forward
}
check "kubectl port-forward: 32 MB, and 64 connections by sixteen, over WebSocket and SPDY" forward_much

forward_closed() {
  new_namespace
  own_folder
  a_server a
  over_both forward_closed_once
}
forward_closed_once() {
  forward pod/a :8099 :8080
  ! curl -sS -m 10 "http://127.0.0.1:$(forwarded 8099)/" || return 1
  within 30 grep -q 'error.*8099' "$OWN/forward"
  cat "$OWN/forward"
  grep -qi 'connection refused' "$OWN/forward"
  end_forward
}
check "kubectl port-forward says that a port of the pod is closed, over WebSocket and SPDY" forward_closed

forward_dying() {
  new_namespace
  own_folder
  over_both forward_dying_once
}
forward_dying_once() {
  a_server a
  forward pod/a :8080
  same "$(curl -fsS "http://127.0.0.1:$(forwarded 8080)/port")" 8080
  k delete pod a --now
  # kubectl notices at the latest with the next connection.
  within 30 forward_has_ended
  refute wait $FORWARD
  grep -qi 'lost connection to pod\|error' "$OWN/forward"
}
forward_has_ended() {
  curl -s -m 5 -o /dev/null "http://127.0.0.1:$(forwarded 8080)/port" || true
  ! kill -0 "$FORWARD" 2> /dev/null || { cat "$OWN/forward"; return 1; }
}
check "kubectl port-forward ends with its pod, over WebSocket and SPDY" forward_dying

# Older API servers, and those whose gate is off, translate WebSocket for the node; this one otherwise passes it through.
translated() {
  new_namespace
  own_folder
  a_server a
  head -c 2M /dev/urandom > "$OWN/data"
  local flags=$API_FLAGS
  API_FLAGS="$flags --feature-gates=ExtendWebSocketsToKubelet=false"
  stop_api_server
  resume_api_server
  within 30 k exec a -- true
  attempt translated_once
  API_FLAGS=$flags
  stop_api_server
  resume_api_server
  within 30 k exec a -- true
  return $STATUS
}
translated_once() {
  over_both exec_streams_once
  over_both exec_binary_once
  over_both terminal_once
  over_both forward_closed_once
}
alone "exec and port-forward work where the API server translates WebSocket itself" translated
