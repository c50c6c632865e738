# Joining: `berth join` by token, certificates from the cluster and their renewal, and kubeadm's own join with berth as its kubelet. Each
# check is a machine of its own beside the node: its /etc is an overlay, its folders, sockets and ports are its own.

# What kubeadm init leaves for joiners, once: cluster-info, the rights, and a token for everybody here.
JOIN_TOKEN=abcdef.0123456789abcdef
prepare_joining() {
  # What is started later must not hold the lock.
  ( flock 8
    [ ! -e "$WORK/joining" ] || exit 0
    kubeadm_phase bootstrap-token --kubeconfig "$KUBECONFIG"
    kubeadm token create "$JOIN_TOKEN" --kubeconfig "$KUBECONFIG" --ttl 1h
    touch "$WORK/joining" ) 8> "$WORK/joining.lock"
}
# The pin as kubeadm prints it, computed by openssl.
ca_hash() {
  printf sha256:
  openssl x509 -in "$CONTROL_PLANE/pki/ca.crt" -noout -pubkey | openssl pkey -pubin -outform der | sha256sum | cut -d' ' -f1
}

# own_number: 1, 2, … for the machines of the run: ports and addresses of their own, below the ports of outgoing connections.
own_number() {
  ( flock 8
    local number
    number=$(($(cat "$WORK/machines.number" 2> /dev/null || true) + 1))
    echo "$number" | tee "$WORK/machines.number" ) 8> "$WORK/machines.lock"
}
# new_machine NAME: a machine that joins under this name; machine COMMAND… runs there.
new_machine() {
  prepare_joining
  MACHINE=$1
  DIR=$WORK/machines/$1
  local number
  number=$(own_number)
  PORT=$((20000 + 2 * number))
  mkdir -p "$DIR"/etc "$DIR"/etc-work "$DIR"/kubelet "$DIR"/conf.d
  # The other scenarios' pods stay away from it.
  printf '%s\n' 'apiVersion: kubelet.config.k8s.io/v1beta1' 'kind: KubeletConfiguration' 'registerWithTaints: [{key: joined, effect: NoSchedule}]' \
    > "$DIR/conf.d/10-taint.conf"
  MACHINE_BERTH=("$BERTH_BIN" --root "$DIR/berth" --state "/run/berth-$1")
  NODE_OPTIONS=(--node-name "$1" --node-ip "$NODE_IP" --port "$PORT" --healthz-port $((PORT + 1)) --kubelet-root "$DIR/kubelet"
    --pod-logs-dir "$DIR/logs" --container-logs-dir "$DIR/links" --registry-config-dir "$WORK/certs.d"
    --config-dir "$DIR/conf.d" --fail-swap-on=false --fail-cgroup-v1=false --eviction-hard "memory.available<10Mi" --pod-cidr "10.245.$number.0/24")
  trap end_machine EXIT
}
machine() { (become_machine "$@"); }
# In the place of the shell, so that what `serve` knows the process id of is the command itself.
become_machine() {
  exec unshare --mount --propagation slave sh -c 'mount -t overlay overlay -o "lowerdir=/etc,upperdir=$0/etc,workdir=$0/etc-work" /etc && exec "$@"' "$DIR" "$@"
}
# join [FLAG…]: joins and stays the node, in the background.
join() { serve "join-$MACHINE" become_machine "${MACHINE_BERTH[@]}" join "$NODE_IP:6443" --token "$JOIN_TOKEN" --ca-hash "$(ca_hash)" "${NODE_OPTIONS[@]}" "$@"; }
# join_fails TEXT [FLAG…]: it ends at once and says why.
join_fails() {
  local text=$1 out
  shift
  if out=$(machine "${MACHINE_BERTH[@]}" join "$NODE_IP:6443" "${NODE_OPTIONS[@]}" --files-only "$@" 2>&1); then echo "it joined: $out"; return 1; fi
  [[ $out == *"$text"* ]] || { printf 'wanted: %s\nis: %s\n' "$text" "$out"; return 1; }
}
end_machine() {
  local pid
  pid=$(cat "$LOGS/join-$MACHINE.pid" 2> /dev/null) || return 0
  kill "$pid" 2> /dev/null || true
  within 30 dead "$pid" || true
  machine "${MACHINE_BERTH[@]}" stop --all > /dev/null 2>&1 || true
  kubectl delete node "$MACHINE" --ignore-not-found > /dev/null
}
machine_ready() {
  [ "$(kubectl get node "$MACHINE" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" = True ] ||
    { kubectl describe node "$MACHINE"; tail -n 15 "$LOGS/join-$MACHINE.log"; return 1; }
}
machine_exists() { kubectl get node "$MACHINE" > /dev/null || { tail -n 15 "$LOGS/join-$MACHINE.log"; return 1; }; }
subject() { openssl x509 -in "$DIR/kubelet/pki/kubelet-client-current.pem" -noout -subject -nameopt RFC2253; }

token_join() {
  new_machine token1
  join
  within 60 machine_ready
  within 30 grep '^node token1 is Ready after [0-9.]* s$' "$LOGS/join-token1.log"
  same "$(subject)" "subject=CN=system:node:token1,O=system:nodes"
  # The process lives on, and whoever can list processes must not see the token.
  local pid
  pid=$(cat "$LOGS/join-token1.pid")
  words "join .*--token xxxxxx" "$(tr '\0' ' ' < "/proc/$pid/cmdline")"
  refute grep -q "$JOIN_TOKEN" "/proc/$pid/cmdline" "/proc/$pid/environ"
  # kubeadm's files, and no token left.
  [ -f "$DIR/etc/kubernetes/pki/ca.crt" ]
  [ -f "$DIR/kubelet/config.yaml" ]
  [ ! -e "$DIR/etc/kubernetes/bootstrap-kubelet.conf" ]
  # All of the kubelet's flags that were given, and no other.
  words "^KUBELET_KUBEADM_ARGS=\"--hostname-override=token1 --node-ip=$NODE_IP --root-dir=$DIR/kubelet .*--port=$PORT" "$(cat "$DIR/kubelet/kubeadm-flags.env")"
  refute grep -q pod-cidr "$DIR/kubelet/kubeadm-flags.env"
  # The kubeconfig is one for others too.
  kubectl --kubeconfig "$DIR/etc/kubernetes/kubelet.conf" get node token1 > "$WORK/token1.out" 2>&1 ||
    machine kubectl --kubeconfig /etc/kubernetes/kubelet.conf get node token1
  same "$(kubectl get csr -o 'jsonpath={range .items[?(@.spec.username=="system:bootstrap:abcdef")]}{.spec.signerName} {.spec.usages}{"\n"}{end}' | sort -u)" \
    'kubernetes.io/kube-apiserver-client-kubelet ["digital signature","client auth"]'
  # How long the certificate is good is among the node's metrics.
  local left
  left=$(kubectl get --raw /api/v1/nodes/token1/proxy/metrics | sed -n 's/^kubelet_certificate_manager_client_ttl_seconds //p')
  [ "$left" -gt 86400 ]
}
restart_after_join() {
  new_machine token2
  join
  within 60 machine_ready
  kill -9 "$(cat "$LOGS/join-token2.pid")"
  within 30 dead "$(cat "$LOGS/join-token2.pid")"
  local before renewed
  before=$(readlink "$DIR/kubelet/pki/kubelet-client-current.pem")
  renewed=$(lease_time)
  serve join-token2 become_machine "${MACHINE_BERTH[@]}" --config "$DIR/kubelet/config.yaml" node --kubeconfig /etc/kubernetes/kubelet.conf \
    --bootstrap-kubeconfig /etc/kubernetes/bootstrap-kubelet.conf "${NODE_OPTIONS[@]}"
  # Ready is what the API server remembers, and the socket lies there from before: it is this agent that answers, and renews the lease.
  within 30 curl -fsS --unix-socket /run/berth-token2/kubelet.sock http://localhost/healthz
  kill -0 "$(cat "$LOGS/join-token2.pid")"
  within 40 lease_is_renewed_after "$renewed"
  within 60 machine_ready
  same "$(readlink "$DIR/kubelet/pki/kubelet-client-current.pem")" "$before"
}
# Discovery, a certificate and all: the time is the agent's own, from its start.
# The best of three: next to other suites the machine alone may take seconds.
join_ready_soon() {
  local try
  for try in 1 2 3; do
    attempt join_in_time "fast$try"
    if [ "$STATUS" -eq 0 ]; then return; fi
  done
  return 1
}
join_in_time() {
  new_machine "$1"
  join
  within 30 grep "^node $1 is Ready after" "$LOGS/join-$1.log"
  sed -n "s/^node $1 is Ready after \([0-9.]*\) s$/\1/p" "$LOGS/join-$1.log" | awk '{ print; soon = $1 < 5.0 } END { exit !(NR == 1 && soon) }'
}
wrong_pin() {
  new_machine pin1
  join_fails "which no pin names" --token "$JOIN_TOKEN" --ca-hash "sha256:$(printf '0%.0s' $(seq 64))"
  [ ! -e "$DIR/etc/kubernetes" ]
}
wrong_secret() {
  new_machine secret1
  join_fails "has not signed" --token abcdef.0123456789abcdee --ca-hash "$(ca_hash)"
}
unknown_token() {
  new_machine unknown1
  join_fails "knows no token zzzzzz" --token zzzzzz.0123456789abcdef --ca-hash "$(ca_hash)" --discovery-timeout 1
}
expired_token() {
  new_machine expired1
  kubeadm token create expire.0123456789abcdef --kubeconfig "$KUBECONFIG" --ttl 3s
  within 60 token_is_gone expire
  join_fails "knows no token expire" --token expire.0123456789abcdef --ca-hash "$(ca_hash)" --discovery-timeout 1
}
token_is_gone() { refute kubectl -n kube-system get secret "bootstrap-token-$1" && no_signature "$1"; }
no_signature() { local all; all=$(kubectl -n kube-public get configmap cluster-info -o yaml) && refute grep "jws-kubeconfig-$1" <<< "$all"; }
taken_name() {
  new_machine "$NODE_NAME"
  MACHINE=taken1 # its end must not delete the node
  join_fails "has a Ready node $NODE_NAME already" --token "$JOIN_TOKEN" --ca-hash "$(ca_hash)"
}
discovery_file() {
  new_machine file1
  kubectl -n kube-public get configmap cluster-info -o 'jsonpath={.data.kubeconfig}' > "$DIR/cluster-info"
  machine "${MACHINE_BERTH[@]}" join --discovery-file "$DIR/cluster-info" --token "$JOIN_TOKEN" "${NODE_OPTIONS[@]}" --files-only
  grep -q "token: abcdef" "$DIR/etc/kubernetes/bootstrap-kubelet.conf"
  same "$(stat -c %a "$DIR/etc/kubernetes/bootstrap-kubelet.conf")" 600
  join_fails "FileAvailable--etc-kubernetes-bootstrap-kubelet.conf" --token "$JOIN_TOKEN" --ca-hash "$(ca_hash)"
}
check_lines() {
  new_machine check1
  local out
  out=$(machine "${MACHINE_BERTH[@]}" join "$NODE_IP:6443" --token "$JOIN_TOKEN" --ca-hash "$(ca_hash)" "${NODE_OPTIONS[@]}" --check)
  for what in reach token pin clock server KubeletVersion cidr name cgroups "Port-$PORT"; do
    grep -q "^ok *$what " <<< "$out" || { echo "no good $what in: $out"; return 1; }
  done
  out=$(machine "${MACHINE_BERTH[@]}" join "$NODE_IP:6443" --token "$JOIN_TOKEN" --ca-hash "sha256:$(printf '0%.0s' $(seq 64))" \
    "${NODE_OPTIONS[@]}" --port 6443 --check) && { echo "all well: $out"; return 1; }
  grep -q "^fail *pin .*kubeadm token create" <<< "$out" && grep -q "^fail *Port-6443" <<< "$out" || { echo "$out"; return 1; }
  # Whoever that is has not been shown the token.
  ! grep -q "^ok *server" <<< "$out" || { echo "$out"; return 1; }
  out=$(machine "${MACHINE_BERTH[@]}" join "$NODE_IP:1" --token "$JOIN_TOKEN" --ca-hash "$(ca_hash)" "${NODE_OPTIONS[@]}" --check) && return 1
  grep -q "^fail *reach .*refused" <<< "$out" || { echo "$out"; return 1; }
  grep -q "^- *token *not looked at" <<< "$out" || { echo "$out"; return 1; }
  # What no node could start with is told here too, and by a join before it writes anything.
  out=$(machine "${MACHINE_BERTH[@]}" join "$NODE_IP:6443" --token "$JOIN_TOKEN" --ca-hash "$(ca_hash)" "${NODE_OPTIONS[@]}" --pod-cidr foo --check) && return 1
  grep -q '^fail *flags .*"foo" is not a CIDR' <<< "$out" || { echo "$out"; return 1; }
  join_fails '"foo" is not a CIDR' --token "$JOIN_TOKEN" --ca-hash "$(ca_hash)" --pod-cidr foo
  [ ! -e "$DIR/etc/kubernetes" ]
}
static_pods_meanwhile() {
  new_machine static1
  # Nobody approves a client certificate for this group.
  mkdir -p "$DIR/etc/kubernetes/manifests"
  printf '{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: default}, spec: {hostNetwork: true, containers: [{name: main, image: %s, command: [sleep, "1000"]}]}}\n' "$BUSYBOX" \
    > "$DIR/etc/kubernetes/manifests/web.yaml"
  printf 'apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: "https://127.0.0.1:1", certificate-authority: %s}}]\ncontexts: [{name: x, context: {cluster: c, user: u}}]\ncurrent-context: x\nusers: [{name: u, user: {token: abcdef.0123456789abcdef}}]\n' \
    "$CONTROL_PLANE/pki/ca.crt" > "$DIR/bootstrap.conf"
  serve join-static1 become_machine "${MACHINE_BERTH[@]}" --config "$WORK/kubelet.yaml" node --kubeconfig "$DIR/kubelet.conf" \
    --bootstrap-kubeconfig "$DIR/bootstrap.conf" --manifests "$DIR/etc/kubernetes/manifests" "${NODE_OPTIONS[@]}"
  within 60 static_runs
}
static_runs() { "${MACHINE_BERTH[@]}" ps | has main || { tail -n 10 "$LOGS/join-static1.log"; return 1; }; }
reset_takes_back() {
  new_machine reset1
  join
  within 60 machine_ready
  kill "$(cat "$LOGS/join-reset1.pid")"
  within 30 dead "$(cat "$LOGS/join-reset1.pid")"
  machine "${MACHINE_BERTH[@]}" reset --kubelet-root "$DIR/kubelet"
  # The self-signed serving pair is nobody's but the node's.
  same "$(find "$DIR/etc/kubernetes" "$DIR/kubelet/pki" \( -type f -o -type l \) ! -name 'kubelet.???')" ""
  [ ! -e "$DIR/kubelet/config.yaml" ]
}
# A node that was off for longer than its certificate lived: with another token it is the same node again, and its pod's container goes on.
rejoin() {
  new_machine again1
  new_namespace
  trap 'kubectl -n "$NS" delete pods --all --force --grace-period=0 > /dev/null 2>&1 || true; kubectl delete namespace "$NS" --wait=false > /dev/null; end_machine' EXIT
  join
  within 60 machine_ready
  # What the process has made at its start, another run of it would not have.
  shell_pod stays 'cat /proc/sys/kernel/random/uuid > /tmp/run; exec sleep 3600' 'nodeName: again1'
  within 60 pod_ready stays
  local before uid
  before=$(this_run)
  uid=$(kubectl get node again1 -o 'jsonpath={.metadata.uid}')
  kill "$(cat "$LOGS/join-again1.pid")"
  within 30 dead "$(cat "$LOGS/join-again1.pid")"
  expire_certificate
  join_fails "FileAvailable--etc-kubernetes-kubelet.conf" --token "$JOIN_TOKEN" --ca-hash "$(ca_hash)"
  join_fails "has a Ready node again1 already" --token "$JOIN_TOKEN" --ca-hash "$(ca_hash)" --ignore-preflight-errors FileAvailable--etc-kubernetes-kubelet.conf
  # The cluster takes a node for lost after 50 s.
  within 90 machine_lost
  join --ignore-preflight-errors FileAvailable--etc-kubernetes-kubelet.conf
  within 60 machine_ready
  openssl x509 -in "$DIR/kubelet/pki/kubelet-client-current.pem" -noout -checkend 0
  within 30 pod_ready stays
  same "$(this_run)" "$before"
  same "$(kubectl get node again1 -o 'jsonpath={.metadata.uid}')" "$uid"
}
this_run() { pod_json stays '{.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}{"\n"}' && k exec stays -- cat /tmp/run; }
# The node's certificate again, with its key, by the cluster's authority, and over since yesterday.
expire_certificate() {
  local current
  current=$(readlink -f "$DIR/kubelet/pki/kubelet-client-current.pem")
  openssl pkey -in "$current" -out "$DIR/key"
  openssl req -new -key "$DIR/key" -subj "/O=system:nodes/CN=system:node:$MACHINE" -out "$DIR/request"
  openssl x509 -req -in "$DIR/request" -CA "$CONTROL_PLANE/pki/ca.crt" -CAkey "$CONTROL_PLANE/pki/ca.key" -set_serial 1 -days -1 -out "$DIR/expired"
  cat "$DIR/expired" "$DIR/key" > "$current"
  refute openssl x509 -in "$DIR/kubelet/pki/kubelet-client-current.pem" -noout -checkend 0
}
machine_lost() { [ "$(kubectl get node "$MACHINE" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" = Unknown ]; }
# The client certificate lives half a minute: the node goes on with the next ones.
rotation() {
  new_machine rotate1
  restart_controller_manager --cluster-signing-duration=40s
  trap 'restart_controller_manager; end_machine' EXIT
  rotates
}
rotates() {
  join --rotate-certificates=true
  within 60 machine_ready
  local first
  first=$(readlink "$DIR/kubelet/pki/kubelet-client-current.pem")
  within 60 another_than "$first"
  # Later than the first one's end the node still speaks.
  within 60 openssl_says_over "$first"
  local renewed
  renewed=$(lease_time)
  within 30 lease_is_renewed_after "$renewed"
  grep -q "new credentials are in use" "$LOGS/join-rotate1.log"
}
another_than() { local now; now=$(readlink "$DIR/kubelet/pki/kubelet-client-current.pem") && [ "$now" != "$1" ] || { tail -n 5 "$LOGS/join-rotate1.log"; return 1; }; }
openssl_says_over() { openssl x509 -in "$1" -noout && refute openssl x509 -in "$1" -noout -checkend 0; }
lease_time() { kubectl -n kube-node-lease get lease "$MACHINE" -o 'jsonpath={.spec.renewTime}'; }
lease_is_renewed_after() { local now; now=$(lease_time) && [ -n "$now" ] && [ "$now" != "$1" ]; }
serving_certificate() {
  new_machine serve1
  join --rotate-server-certificates=true
  within 60 machine_exists
  within 60 serving_request
  # Handshakes fail until somebody approves.
  refute curl -sk -o /dev/null "https://$NODE_IP:$PORT/healthz"
  kubectl certificate approve "$(serving_request)"
  within 60 serves_by_cluster
}
serving_request() { kubectl get csr -o 'jsonpath={range .items[?(@.spec.signerName=="kubernetes.io/kubelet-serving")]}{.metadata.name} {.spec.username}{"\n"}{end}' | sed -n 's/ system:node:serve1$//p' | grep . | head -n 1; }
serves_by_cluster() { [ "$(curl -s -o /dev/null -w '%{http_code}' --cacert "$CONTROL_PLANE/pki/ca.crt" "https://$NODE_IP:$PORT/healthz")" = 401 ]; }
version_as_kubelet() {
  mkdir -p "$WORK/as-kubelet"
  ln -sf "$BERTH_BIN" "$WORK/as-kubelet/kubelet"
  same "$("$WORK/as-kubelet/kubelet" --version)" "Kubernetes v$KUBERNETES_VERSION"
}
# kubeadm drives: berth is its kubelet by name, this test's systemctl starts it with kubeadm's drop-in, `berth cri` is the runtime. Ports
# and folders are kubeadm's own: the node stops meanwhile.
kubeadm_join() {
  new_machine kubeadm1
  stop_node
  trap end_kubeadm EXIT
  kubeadm_joins
}
end_kubeadm() {
  kill "$(cat "$DIR/kubelet.pid")" || true
  # The node takes its port again.
  within 30 dead "$(cat "$DIR/kubelet.pid")" || true
  end_machine
  start_node
  within 60 node_ready
}
kubeadm_joins() {
  mkdir -p "$DIR"/{bin,var,var-work}
  ln -s "$BERTH_BIN" "$DIR/bin/kubelet"
  cat > "$DIR/bin/systemctl" <<SYSTEMCTL
#!/bin/sh
# Of systemd's tool as much as kubeadm calls.
case "\$1 \$2" in
"is-active kubelet") [ -e $DIR/kubelet.pid ] && kill -0 \$(cat $DIR/kubelet.pid) ;;
"stop kubelet") [ ! -e $DIR/kubelet.pid ] || kill \$(cat $DIR/kubelet.pid) ;;
"start kubelet" | "restart kubelet")
  . /var/lib/kubelet/kubeadm-flags.env
  setsid $DIR/bin/kubelet --bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf --kubeconfig=/etc/kubernetes/kubelet.conf \\
    --config=/var/lib/kubelet/config.yaml \$KUBELET_KUBEADM_ARGS --state /run/berth-kubeadm1-kubelet --fail-swap-on=false \\
    --node-ip=$NODE_IP < /dev/null > $LOGS/kubeadm-kubelet.log 2>&1 &
  echo \$! > $DIR/kubelet.pid ;;
esac
SYSTEMCTL
  cat > "$DIR/run" <<RUN
set -e
mount -t overlay overlay -o "lowerdir=/var,upperdir=$DIR/var,workdir=$DIR/var-work" /var
# What an administrator does; the rest that it finds is named.
echo 1 > /proc/sys/net/ipv4/ip_forward
PATH=$DIR/bin:\$PATH
${MACHINE_BERTH[@]} cri --registry-config-dir $WORK/certs.d &
for n in \$(seq 200); do [ -S /run/berth-kubeadm1/berth.sock ] && break; sleep 0.1; done
kubeadm join $NODE_IP:6443 --token $JOIN_TOKEN --discovery-token-ca-cert-hash $(ca_hash) --node-name kubeadm1 \\
  --cri-socket unix:///run/berth-kubeadm1/berth.sock --ignore-preflight-errors=SystemVerification
touch $DIR/joined
wait
RUN
  chmod +x "$DIR/bin/systemctl"
  serve join-kubeadm1 become_machine bash "$DIR/run"
  within 120 kubeadm_is_through
  within 60 machine_ready
  same "$(kubectl get node kubeadm1 -o 'jsonpath={.status.nodeInfo.kubeletVersion}')" "v$KUBERNETES_VERSION"
}
kubeadm_is_through() { [ -e "$DIR/joined" ] || { tail -n 8 "$LOGS/join-kubeadm1.log" "$LOGS/kubeadm-kubelet.log"; return 1; }; }

# Who calls the node's server is asked of the API server.
token_review() {
  new_namespace
  local token
  kubectl create clusterrole "$NS" --verb=get --resource=nodes/metrics
  kubectl create clusterrolebinding "$NS" --clusterrole="$NS" --serviceaccount="$NS:default"
  token=$(k create token default)
  status_of() { curl -sk -o /dev/null -w '%{http_code}' -H "Authorization: Bearer $1" "https://$NODE_IP:10250$2"; }
  within 30 answers_with 200 "$token" /metrics
  answers_with 403 "$token" /pods
  answers_with 401 "$token-not" /metrics
  kubectl delete clusterrolebinding,clusterrole "$NS"
}
answers_with() { local is; is=$(status_of "$2" "$3"); [ "$is" = "$1" ] || { echo "$3: $is"; return 1; }; }

check "a service account's token opens what its role allows, and no other does" token_review
check "a token join makes kubeadm's files, gets a certificate and is Ready; the token is gone" token_join
check "after kill -9 the joined node starts with the files of the join" restart_after_join
check "a join with a wrong pin is refused and writes nothing" wrong_pin
check "a join with a wrong token secret is refused" wrong_secret
check "a join with an unknown token is refused" unknown_token
check "a join with an expired token is refused" expired_token
check "a join by the name of a Ready node is refused" taken_name
check "a join by a discovery file needs no pin, and a second one is refused" discovery_file
check "join --check says how each thing stands and what to do" check_lines
check "static pods run while there is no certificate and no API server" static_pods_meanwhile
check "a reset takes back what the join has left" reset_takes_back
check "a join over an expired certificate is the same node again, and its pod's container goes on" rejoin
check "a serving certificate is asked for, and served when it is approved" serving_certificate
check "called kubelet, berth tells its version as kubeadm reads it" version_as_kubelet
alone "a join on a fresh state is Ready in under 5 s" join_ready_soon
alone "kubeadm join makes a node of berth that is called kubelet" kubeadm_join
alone "the client certificate is renewed in time and the node goes on" rotation
