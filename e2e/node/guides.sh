# The guides' commands do what the guides say: every ```sh block of a guide is run as it stands, in one shell, on a machine that has an /etc and a
# /usr/local/bin of its own. Beside it stands what the reader has: crictl, kubectl and berth in PATH, a kubeconfig, a registry that answers for the
# public ones.

# guide NAME: the script of a guide; what a line waits for has an end.
guide() { echo 'set -eux -o pipefail'; awk '/^```sh$/ {on = 1; next} /^```$/ {on = 0} on' "$HERE/../docs/guide/$1.md"; }
# guide_machine NAME: as new_machine, with registries and a PATH of its own in $DIR/bin.
guide_machine() {
  new_machine "$1"
  mkdir -p "$DIR/bin" "$DIR/etc/berth" "$DIR/local"
  cp -r "$WORK/certs.d" "$DIR/etc/berth/certs.d"
  ln -s "$CRI_TOOLS/crictl" "$DIR/bin/crictl"
}
# run_guide SECONDS NAME [PREPARE…]: the guide on the machine, after commands that make it what the reader has before him.
run_guide() {
  local limit=$1 name=$2
  shift 2
  { printf '%s\n' "$@"; guide "$name"; } > "$DIR/guide.sh"
  machine unshare --uts env NODE="$NODE_NAME" PATH="$DIR/bin:$PATH" timeout -k 5 "$limit" bash "$DIR/guide.sh" > "$DIR/told" 2>&1 || { tail -n 25 "$DIR/told"; return 1; }
}

crictl_guide() {
  guide_machine crictl1
  # The node of this run has its images and records elsewhere than a node of its own would.
  printf '#!/bin/sh\ncase " $* " in *" --root "*) exec %s "$@" ;; esac\nexec %s "$@"\n' "$BERTH_BIN" "${BERTH[*]}" > "$DIR/bin/berth"
  chmod +x "$DIR/bin/berth"
  run_guide 400 crictl
  told_all 'NetworkReady true' 'line 1' 'from outside' 'made by hand' CONTAINER_EXITED 'configmap "settings" not found' 'no settings here' '"example.com/hold"' \
    'namespace "shop" deleted'
}
# told_all TEXT…: what the guide says that its commands say.
told_all() {
  local text
  cp "$DIR/told" "$LOGS/$MACHINE.told"
  for text; do grep -q "^[^+]*$text" "$DIR/told" || { echo "not told: $text"; tail -n 40 "$DIR/told"; return 1; }; done
}
alone "every command of the guide for crictl does what it says" crictl_guide

# The reader's machine has nothing of berth but what `make install` puts there, and has the node's own folders and ports: the run's node goes
# away meanwhile. systemd is played by init/systemctl, which starts the units as they stand; docker, by a script that runs what it is
# given on the "control plane", where kubeadm is.
join_guide() {
  all_gone
  stop_node
  "${BERTH[@]}" stop --all
  kubectl delete node "$NODE_NAME" --ignore-not-found
  guide_machine guide1
  attempt follow_join_guide
  end_guided_node
  # Not there when the guide was not come to.
  { iptables -F DOCKER-USER && iptables -X DOCKER-USER; } || true
  start_node
  within 60 node_ready
  return $STATUS
}
# Flags for what a test's machine is: its swap, its full disk, its cgroups, its lack of a default route.
GUIDE_FLAGS='--fail-swap-on=false --fail-cgroup-v1=false --eviction-hard=memory.available<10Mi'
follow_join_guide() {
  local name
  for name in usr var; do mkdir -p "$DIR/$name" "$DIR/$name-work"; done
  mkdir -p "$DIR/root" "$DIR/init" "$DIR/etc/default"
  ln -s "$HERE/node/init/systemctl" "$DIR/bin/systemctl"
  printf '#!/bin/sh\ncase $1 in exec) shift 2; exec "$@" ;; inspect) echo %s ;; cp) cp /usr/lib/cni/ptp /usr/lib/cni/host-local "$3" ;; esac\n' "$NODE_IP" > "$DIR/bin/docker"
  # What kubeadm finds wrong with the test's own machine: cgroup v1 without an init system.
  printf '#!/bin/sh\n[ "$1" != join ] || set -- "$@" --ignore-preflight-errors=SystemVerification,Swap,Service-Kubelet\nexec %s/kubeadm "$@"\n' "$KUBERNETES" > "$DIR/bin/kubeadm"
  cat > "$DIR/bin/berth" <<SCRIPT
#!/bin/sh
case " \$* " in *" --node-ip "*) address= ;; *) address="--node-ip $NODE_IP" ;; esac
case " \$* " in *" --check "*) ;; *" --no-built-in-network "*) $DIR/bin/kindnet & ;; esac
[ "\$1" != join ] || set -- "\$@" \$address ${GUIDE_FLAGS/</\\<}
exec /usr/local/bin/berth "\$@"
SCRIPT
  # What kind's network does on a node, for the node's Ready: its configuration comes when the node has a range of addresses.
  cat > "$DIR/bin/kindnet" <<'SCRIPT'
#!/bin/sh
for try in $(seq 200); do
  range=$(kubectl get node guide1 -o 'jsonpath={.spec.podCIDR}') && [ -n "$range" ] && break
  sleep 0.2
done
mkdir -p /etc/cni/net.d
printf '{"cniVersion": "0.3.1", "name": "kindnet", "plugins": [{"type": "ptp", "ipMasq": false, "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam-state",
  "routes": [{"dst": "0.0.0.0/0"}], "ranges": [[{"subnet": "%s"}]]}}]}' "$range" > /etc/cni/net.d/.10-kindnet.conflist
mv /etc/cni/net.d/.10-kindnet.conflist /etc/cni/net.d/10-kindnet.conflist
SCRIPT
  chmod +x "$DIR"/bin/{docker,kubeadm,berth,kindnet}
  echo "BERTH_ARGS=\"--node-ip $NODE_IP $GUIDE_FLAGS\"" > "$DIR/etc/default/berth"
  echo "KUBELET_EXTRA_ARGS=\"--node-ip=$NODE_IP $GUIDE_FLAGS\"" > "$DIR/etc/default/kubelet"
  cp "$BERTH_BIN" "$DIR/newer"
  iptables -N DOCKER-USER
  # Whole folders of its own: /usr, /var and /opt, and /var/lib/berth, which has overlays in it.
  run_guide 400 join "export NODE=guide1 NEW=$DIR/newer TEST_INIT=$DIR/init" "hostname guide1" \
    "mount -t overlay overlay -o lowerdir=/usr,upperdir=$DIR/usr,workdir=$DIR/usr-work /usr" \
    "mount -t overlay overlay -o lowerdir=/var,upperdir=$DIR/var,workdir=$DIR/var-work /var" \
    "mount -t tmpfs none /opt" \
    "mkdir -p /var/lib/berth /var/lib/kubelet && mount --bind $DIR/root /var/lib/berth" \
    "make --no-print-directory -C $HERE/.. -o build install BERTH_BIN=$BERTH_BIN PREFIX=/usr/local"
  told_all 'node guide1 is Ready after' 'removed /etc/kubernetes/kubelet.conf' 'pod/stays condition met' 'issuer=CN = kubernetes' "IP Address:$NODE_IP" Unauthorized \
    "Kubernetes v$KUBERNETES_VERSION" 'This node has joined the cluster' "$NODE_IP"
  same "$(grep -c '^node "guide1" deleted' "$DIR/told")" 4
}
end_guided_node() {
  local file
  for file in "$DIR"/init/*.pid; do kill "$(cat "$file" 2> /dev/null)" 2> /dev/null || true; done
  # Whatever the guide has left, had it failed in the middle.
  machine sh -c "mkdir -p /var/lib/berth; mount --bind $DIR/root /var/lib/berth; $BERTH_BIN stop --all; rm -rf /run/berth" > /dev/null 2>&1 || true
  kubectl delete node guide1 --ignore-not-found
}
alone "every command of the guide for joining does what it says, the node goes by all three ways" join_guide
