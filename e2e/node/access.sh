# Access to pods and to the node through the API server: logs, debug, events, what /proxy shows. What streams.sh has of exec and its like stands on
# the helpers here.

ACCESS_LOOP='trap "exit 0" TERM; while :; do sleep 0.1; done'

# over_both COMMAND…: once over WebSocket, which kubectl prefers, once over SPDY.
over_both() {
  KUBECTL_REMOTE_COMMAND_WEBSOCKETS=true KUBECTL_PORT_FORWARD_WEBSOCKETS=true "$@"
  KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false KUBECTL_PORT_FORWARD_WEBSOCKETS=false "$@"
}
# own_folder: one for this scenario's files, in $OWN.
own_folder() { OWN=$WORK/access/$BASHPID; mkdir -p "$OWN"; }
# a_shell NAME [FIELDS]: a running pod.
a_shell() { shell_pod "$1" "$ACCESS_LOOP" "${2:-}"; within 60 pod_phase "$1" Running; }
says() { local out; out=$("${@:2}" 2>&1) || true; [[ $out == *"$1"* ]] || { printf 'wanted: %s\nis: %s\n' "$1" "$out"; return 1; }; }
# fails_with TEXT COMMAND…
fails_with() {
  local out
  if out=$("${@:2}" 2>&1); then echo "it succeeded: $out"; return 1; fi
  [[ $out == *"$1"* ]] || { printf 'wanted: %s\nis: %s\n' "$1" "$out"; return 1; }
}

# in_terminal COMMAND…: as in a terminal of 33 rows and 111 columns that becomes one of 44 and 122 when the command says `bigger`, types what
# it is asked for, and shows what the terminal shows.
in_terminal() {
  python3 - "$@" <<'PYTHON'
import fcntl, os, pty, select, signal, struct, sys, termios, time

def size(fd, rows, columns):
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

pid, fd = pty.fork()
if pid == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
size(fd, 33, 111)
os.kill(pid, signal.SIGWINCH)
shown, bigger, typed, end = b"", False, False, time.monotonic() + 60
while time.monotonic() < end:
    if not select.select([fd], [], [], 1)[0]:
        continue
    try:
        read = os.read(fd, 65536)
    except OSError:
        break
    if not read:
        break
    shown += read
    if b"bigger\r\n" in shown and not bigger:
        bigger = True
        size(fd, 44, 122)
        os.kill(pid, signal.SIGWINCH)
    if b"type:" in shown and not typed:
        typed = True
        os.write(fd, b"some words\n")
else:
    os.kill(pid, signal.SIGKILL)
sys.stdout.write(shown.decode(errors="replace").replace("\r\n", "\n"))
_, status = os.waitpid(pid, 0)
print("code", os.waitstatus_to_exitcode(status))
PYTHON
}

# Logs.

logs_cut() {
  new_namespace
  shell_pod a "for n in 1 2 3 4 5; do echo line \$n; done; sleep 2; echo late; $ACCESS_LOOP"
  within 60 says late k logs a
  same "$(k logs a)" "$(printf 'line %s\n' 1 2 3 4 5; echo late)"
  same "$(k logs a --tail=2)" "$(printf 'line 5\nlate')"
  same "$(k logs a --tail=0)" ""
  same "$(k logs a --tail=-1 | wc -l)" 6
  same "$(k logs a --limit-bytes=10)" "$(printf 'line 1\nlin')"
  same "$(k logs a --since=1h | wc -l)" 6
  local stamped
  stamped=$(k logs a --timestamps | tail -n 1)
  [[ $stamped =~ ^20[0-9-]+T[0-9:]+\.[0-9]+(Z|[+-][0-9:]+)\ late$ ]] || { echo "$stamped"; return 1; }
  same "$(k logs a --since-time="$(date -u -d "${stamped% late}" +%Y-%m-%dT%H:%M:%SZ)")" late
  same "$(k logs a --since-time="$(date -u -d '+1 hour' +%Y-%m-%dT%H:%M:%SZ)")" ""
  fails_with 'at most one of' k logs a --since=1s --since-time=2020-01-01T00:00:00Z
}
check "kubectl logs: --tail, --limit-bytes, --since, --since-time and --timestamps" logs_cut

logs_of_many() {
  new_namespace
  create_pod a "{terminationGracePeriodSeconds: 1, initContainers: [{name: first, image: $BUSYBOX, command: [echo, from first]}], containers: [
    {name: one, image: $BUSYBOX, command: [sh, -c, 'echo from one; $ACCESS_LOOP']}, {name: two, image: $BUSYBOX, command: [sh, -c, 'echo from two; $ACCESS_LOOP']}]}" \
    'annotations: {kubectl.kubernetes.io/default-container: two}'
  within 60 pod_phase a Running
  within 30 says 'from two' k logs a
  same "$(k logs a -c one) $(k logs a -c first)" "from one from first"
  same "$(k logs a --all-containers --prefix | sort)" "$(printf '[pod/a/first] from first\n[pod/a/one] from one\n[pod/a/two] from two')"
  fails_with 'container nobody is not valid for pod a' k logs a -c nobody
}
check "kubectl logs: -c, --all-containers, --prefix, an init container's and the default container's" logs_of_many

logs_of_all() {
  new_namespace
  k create deployment web --image="$BUSYBOX" --replicas=6 -- sh -c "hostname; $ACCESS_LOOP"
  within 60 k rollout status deployment/web --timeout=1s
  within 30 six_hosts -l app=web
  within 30 six_hosts deployment/web --all-pods
  fails_with 'maximum allowed concurrency is 5, use --max-log-requests' k logs -f -l app=web
  k logs -f -l app=web --max-log-requests=6 > "$WORK/checks/follow-$NS" &
  local follower=$!
  within 30 lines_are "$WORK/checks/follow-$NS" 6
  k delete deployment web
  # Each pod's end is the end of its log.
  wait $follower
  rm "$WORK/checks/follow-$NS"
}
six_hosts() { same "$(k logs "$@" | grep -c '^\(\[.*\] \)\?web-')" 6; }
lines_are() { same "$(wc -l < "$1")" "$2"; }
check "kubectl logs: -l, --all-pods and --max-log-requests over six pods, until they end" logs_of_all

logs_previous() {
  new_namespace
  create_pod a "{terminationGracePeriodSeconds: 1, containers: [{name: main, image: $BUSYBOX, volumeMounts: [{name: data, mountPath: /data}],
    command: [sh, -c, 'n=\$(cat /data/n 2> /dev/null || echo 0); echo run \$n; echo 1 > /data/n; [ \$n = 1 ] || exit 3; while :; do sleep 0.1; done']}], volumes: [{name: data, emptyDir: {}}]}"
  within 60 says 'run 1' k logs a
  same "$(k logs a -p)" "run 0"
  same "$(k logs a --previous --timestamps | cut -d' ' -f2-)" "run 0"
  create_pod ended "{restartPolicy: Never, containers: [{name: main, image: $BUSYBOX, command: [sh, -c, 'echo out; echo err >&2; exit 4']}]}"
  within 60 pod_phase ended Failed
  same "$(k logs ended | sort)" "$(printf 'err\nout')"
  same "$(k logs -f ended | sort)" "$(printf 'err\nout')"
  fails_with 'previous terminated container "main" in pod "ended" not found' k logs ended -p
}
check "kubectl logs: of the run before, and of a container that has ended" logs_previous

logs_none() {
  new_namespace
  create_pod pull "{containers: [{name: main, image: registry.k8s.io/no-such-image:1}]}"
  create_pod map "{containers: [{name: main, image: $BUSYBOX, envFrom: [{configMapRef: {name: none}}]}]}"
  within 60 fails_with 'container "main" in pod "pull" is waiting to start: ' k logs pull
  within 60 fails_with "container \"main\" in pod \"pull\" is waiting to start: trying and failing to pull image" k logs pull
  within 60 fails_with 'container "main" in pod "map" is waiting to start: CreateContainerConfigError' k logs map
}
check "kubectl logs says why a container has no log yet" logs_none

logs_follow_ends() {
  new_namespace
  own_folder
  create_pod a "{restartPolicy: Never, containers: [{name: main, image: $BUSYBOX, command: [sh, -c, 'echo begin; while [ ! -e /go ]; do sleep 0.1; done; for n in \$(seq 2000); do echo line \$n; done; echo end']}]}"
  within 60 pod_phase a Running
  k logs -f a > "$OWN/out" &
  local follower=$!
  within 30 grep -q begin "$OWN/out"
  k exec a -- touch /go
  wait $follower
  same "$(wc -l < "$OWN/out") $(tail -n 1 "$OWN/out")" "2002 end"
  # What is followed from now on.
  k logs -f --since=1h --tail=1 a > "$OWN/last"
  same "$(wc -l < "$OWN/last")" 1
}
check "kubectl logs -f ends with the container and has every line" logs_follow_ends

logs_long_line() {
  new_namespace
  create_pod a "{restartPolicy: Never, containers: [{name: main, image: $BUSYBOX, command: [sh, -c, 'head -c 200000 /dev/zero | tr \"\\\\0\" x; echo; printf unended']}]}"
  within 60 pod_phase a Succeeded
  same "$(k logs a | head -n 1 | tr -d '\n' | wc -c)" 200000
  same "$(k logs a | tail -n 1)" unended
  same "$(k logs a --tail=1)" unended
}
check "kubectl logs: a line of 200 KB is one line, and an unended one is there" logs_long_line

# debug.

debug_pod() {
  new_namespace
  a_shell a
  k exec a -- sh -c 'echo secret > /of-main'
  k debug a --image="$BUSYBOX" -c eye --target=main --profile=general -- sh -c 'cat /proc/1/root/of-main; sleep 300'
  within 30 says secret k logs a -c eye
  same "$(k exec a -c eye -- cat /proc/1/root/of-main)" secret
  # With a terminal, as people do it; what was said before the attachment is not shown.
  own_folder
  in_terminal "$KUBERNETES/kubectl" -n "$NS" debug -it a --image="$BUSYBOX" -c typed --profile=general -- \
    sh -c 'until read -t 1 w; do echo type:; done; echo "read <$w>"; exit 2' > "$OWN/shown"
  cat "$OWN/shown"
  grep -q '^read <some words>$' "$OWN/shown"
  within 30 same_code a typed 2
  same "$(pod_json a '{.status.containerStatuses[0].restartCount}')" 0
}
same_code() { same "$(pod_json "$1" "{.status.ephemeralContainerStatuses[?(@.name==\"$2\")].state.terminated.exitCode}")" "$3"; }
check "kubectl debug: a container that sees its target's files, and one with a terminal" debug_pod

debug_copy() {
  new_namespace
  shell_pod a 'exit 1'
  within 30 pod_event a BackOff
  k debug a --copy-to=b --container=main --profile=general -- sh -c "echo copied; $ACCESS_LOOP"
  within 30 says copied k logs b
  k debug a --copy-to=c --share-processes --image="$BUSYBOX" -c eye --profile=general -- sh -c "echo beside; sleep 300"
  within 30 says beside k logs c -c eye
  same "$(pod_json c '{.spec.shareProcessNamespace}')" true
}
check "kubectl debug --copy-to: the copy runs another command, or has another container" debug_copy

debug_node() {
  new_namespace
  local pod
  k debug "node/$NODE_NAME" --image="$BUSYBOX" --profile=sysadmin -- sh -c "hostname; cat /host/proc/sys/kernel/random/boot_id; ls -d /host/etc; $ACCESS_LOOP"
  pod=$(k get pods -o name | head -n 1)
  within 30 k exec "$pod" -- true
  same "$(k get "$pod" -o 'jsonpath={.spec.hostPID} {.spec.hostNetwork} {.spec.hostIPC} {.spec.containers[0].securityContext.privileged}')" "true true true true"
  within 30 says "$(cat /proc/sys/kernel/random/boot_id)" k logs "$pod"
  # Process 1 is the machine's, and so are the interfaces.
  same "$(k exec "$pod" -- readlink /proc/1/ns/pid)" "$(readlink /proc/self/ns/pid)"
  same "$(k exec "$pod" -- readlink /proc/self/ns/net)" "$(readlink /proc/self/ns/net)"
  same "$(k exec "$pod" -- chroot /host sha256sum /etc/os-release | cut -d' ' -f1)" "$(sha256sum < /etc/os-release | cut -d' ' -f1)"
}
check "kubectl debug node/NAME --profile=sysadmin: the machine's processes, network and files" debug_node

# What the node shows.

node_get() { kubectl get --raw "/api/v1/nodes/$NODE_NAME/proxy/$1"; }
for_top() {
  new_namespace
  a_shell a
  within 30 counted_in_resource
  within 30 counted_in_summary
}
counted_in_resource() {
  local text
  text=$(node_get metrics/resource)
  grep -q "^container_cpu_usage_seconds_total{container=\"main\",namespace=\"$NS\",pod=\"a\"} " <<< "$text" &&
    grep -q "^container_memory_working_set_bytes{container=\"main\",namespace=\"$NS\",pod=\"a\"} [1-9]" <<< "$text" &&
    grep -q "^pod_memory_working_set_bytes{namespace=\"$NS\",pod=\"a\"} [1-9]" <<< "$text" &&
    grep -q '^node_cpu_usage_seconds_total [1-9]' <<< "$text" && grep -q '^node_memory_working_set_bytes [1-9]' <<< "$text" || { grep "$NS\|^node" <<< "$text"; return 1; }
}
counted_in_summary() {
  node_get stats/summary | jq -e --arg ns "$NS" '.node.memory.workingSetBytes > 0 and .node.cpu.usageCoreNanoSeconds > 0
    and any(.pods[]; .podRef.namespace == $ns and .memory.workingSetBytes > 0 and .containers[0].name == "main")'
  node_get 'stats/summary?only_cpu_and_memory=true' | jq -e 'all(.pods[]; .volume == null) and .node.fs == null'
}
check "what kubectl top is made of: /metrics/resource and /stats/summary have the pod and the node" for_top

node_pages() {
  new_namespace
  a_shell a
  same "$(node_get healthz)" ok
  node_get metrics | has '^kubelet_running_pods '
  within 30 says "namespace=\"$NS\"" node_get metrics/cadvisor
  node_get metrics/probes > /dev/null
  node_get configz | jq -e '.kubeletconfig | .kind == "KubeletConfiguration" and .maxPods == 110 and .authentication.anonymous.enabled == false'
  node_get pods | jq -e --arg ns "$NS" '.kind == "PodList" and any(.items[]; .metadata.namespace == $ns and .status.phase == "Running")'
  node_get runningpods/ | jq -e --arg ns "$NS" 'any(.items[]; .metadata.namespace == $ns and .spec.containers[0].name == "main")'
  node_get logs/ | has '<a href='
  fails_with 'NotFound' node_get no-such-page
  same "$(kubectl get --raw "/api/v1/nodes/$NODE_NAME:10250/proxy/healthz" 2> /dev/null || node_get healthz)" ok
}
check "nodes/NAME/proxy: healthz, metrics, cadvisor, probes, configz, pods, runningpods and logs" node_pages

# What people look at when something fails.

described() {
  new_namespace
  create_pod pull "{containers: [{name: main, image: registry.k8s.io/no-such-image:1}]}"
  shell_pod crash 'exit 3'
  create_pod map "{containers: [{name: main, image: $BUSYBOX, command: [sleep, '100'], volumeMounts: [{name: v, mountPath: /v}]}], volumes: [{name: v, configMap: {name: none}}]}"
  create_pod command "{containers: [{name: main, image: $BUSYBOX, command: [/no/such/program]}]}"
  create_pod probe "{terminationGracePeriodSeconds: 1, containers: [{name: main, image: $BUSYBOX, command: [sh, -c, '$ACCESS_LOOP'], livenessProbe: {exec: {command: ['false']}, periodSeconds: 1, failureThreshold: 1}}]}"
  within 30 told pull 'Failed to pull image "registry.k8s.io/no-such-image:1"'
  within 30 told pull 'Error: ErrImagePull'
  within 60 told pull 'Back-off pulling image "registry.k8s.io/no-such-image:1"'
  within 60 told pull 'Error: ImagePullBackOff'
  within 30 told crash 'Back-off restarting failed container main in pod crash_'
  within 30 told map 'MountVolume.SetUp failed for volume "v" : configmap "none" not found'
  within 30 told command '/no/such/program'
  within 30 told probe 'Liveness probe failed'
  within 30 told probe 'Container main failed liveness probe, will be restarted'
  within 30 says 'CrashLoopBackOff' k describe pod crash
  same "$(k get pod crash -o 'jsonpath={.status.containerStatuses[0].lastState.terminated.exitCode}')" 3
  k get pod command | has 'StartError\|RunContainerError\|CrashLoopBackOff'
}
told() { says "$2" k events --for "pod/$1" && says "$2" k describe pod "$1"; }
check "kubectl events and describe say what fails: image, crash, volume, command, probe" described
