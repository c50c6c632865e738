# Sourced by the scripts of this folder: versions and places of the tools that the suites drive, and what they share.
CRI_TOOLS_VERSION=1.36.0
CONTAINERD_VERSION=2.4.2
RUNC_VERSION=1.5.2
KUBERNETES_VERSION=1.36.3
ETCD_VERSION=3.7.3
NRI_VERSION=0.12.0
# CoreDNS is the one that this kubeadm deploys. Flannel's plugin is of the last release of the CNI plugins that held it: its own module is at no proxy.
COREDNS_VERSION=1.14.2
FLANNEL_VERSION=0.28.10
FLANNEL_PLUGIN_VERSION=0.9.1
CNI_PLUGINS_VERSION=1.9.1
METRICS_SERVER_VERSION=0.9.0
IMAGES_VERSION=1 # raise when mkimages changes what an image holds

BERTH_TOOLS=${BERTH_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/berth-tools}
IMAGES=$BERTH_TOOLS/images-$IMAGES_VERSION
CRI_TOOLS=$BERTH_TOOLS/cri-tools-$CRI_TOOLS_VERSION-images-$IMAGES_VERSION # critest knows a digest of the images
CRI_BENCH=$BERTH_TOOLS/cri-bench-$CRI_TOOLS_VERSION
CONTAINERD=$BERTH_TOOLS/containerd-$CONTAINERD_VERSION
RUNC=$BERTH_TOOLS/runc-$RUNC_VERSION
KUBERNETES=$BERTH_TOOLS/kubernetes-$KUBERNETES_VERSION-etcd-$ETCD_VERSION
ADDONS=${ADDONS:-$BERTH_TOOLS/addons-$KUBERNETES_VERSION-etcd-$ETCD_VERSION-coredns-$COREDNS_VERSION-flannel-$FLANNEL_VERSION-metrics-$METRICS_SERVER_VERSION-images-$IMAGES_VERSION-2} # raise the last when mkaddons changes
NRI_PLUGIN=$BERTH_TOOLS/nri-plugin-$NRI_VERSION-2 # raise when nri-plugin/main.go changes
VM=$BERTH_TOOLS/vm-2
export BERTH_TOOLS

# The programs of this workspace that the scripts use, built by `cargo build -p berth-testkit -p berth-e2e`.
# In the guest of vm.sh there is no compiler to ask.
TARGET=${BERTH_TARGET:-${CARGO_TARGET_DIR:-$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")/target}/$(rustc -vV | sed -n "s/^host: //p")}
tool_bin() { echo "$TARGET/debug/$1"; }

# Inside a sandbox: a registry on loopback with a storage folder (first argument); it ends with the sandbox.
REGISTRY=127.0.0.1:5000
start_registry() {
  printf 'version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: "%s"}}\nhttp: {addr: "%s"}\n' \
    "$1" "$REGISTRY" > /run/registry.yml
  docker-registry serve /run/registry.yml > /run/registry.log 2>&1 &
  wait_for "the registry" curl -fs -o /dev/null "http://$REGISTRY/v2/"
}

# Writes a certs.d folder that mirrors the public registries to ours.
write_mirrors() {
  local host
  for host in registry.k8s.io gcr.io k8s.gcr.io docker.io ghcr.io; do
    mkdir -p "$1/$host"
    printf 'server = "http://%s"\n[host."http://%s"]\n  capabilities = ["pull", "resolve"]\n' "$REGISTRY" "$REGISTRY" > "$1/$host/hosts.toml"
  done
}

# wait_for WHAT COMMAND…: up to 30 s until the command succeeds.
wait_for() {
  local what=$1 n
  shift
  for n in $(seq 600); do
    if "$@" 2>/dev/null; then return; fi
    sleep 0.05
  done
  echo "gave up waiting for $what" >&2
  return 1
}

# bounded_kubectl FOLDER: no call of kubectl hangs for ever from now on; after start_control_plane, which sets PATH too.
bounded_kubectl() {
  mkdir -p "$1"
  printf '#!/bin/sh\nexec timeout --foreground -k 5 300 %s/kubectl "$@"\n' "$KUBERNETES" > "$1/kubectl"
  chmod +x "$1/kubectl"
  PATH=$1:$PATH
}

# The release binary under test.
BERTH_BIN=${BERTH_BIN:-$TARGET/release/berth}

# Makes a folder on disk for this script and removes those that killed scripts left. Call it outside the sandbox; remove it with rm_work.
make_work() {
  local parent=${BERTH_TEST_DIR:-/tmp} dir
  for dir in "$parent"/berth-e2e-*; do
    if [ -d "$dir" ] && [ ! -d "/proc/${dir##*-}" ]; then rm -rf "$dir"; fi
  done
  mkdir "$parent/berth-e2e-$$"
  echo "$parent/berth-e2e-$$"
}

# cri_command KIND DIR (CRI_FLAGS: more flags for berth): writes the files of berth or containerd to DIR; their command line is then $CRI_COMMAND and the socket $CRI_SOCKET.
cri_command() {
  local kind=$1 dir=$2
  mkdir -p "$dir"
  write_mirrors "$dir/certs.d"
  CRI_SOCKET=/run/$kind-cri.sock
  case $kind in
  berth) CRI_COMMAND=("$BERTH_BIN" --root "$dir/root" --state /run/berth cri --listen "unix://$CRI_SOCKET" --registry-config-dir "$dir/certs.d"
    ${CRI_FLAGS:-}) ;;
  containerd)
    write_containerd_config "$dir" "${RUNTIME_BINARY:-$RUNC/runc}"
    PATH=$CONTAINERD:$PATH
    CRI_COMMAND=("$CONTAINERD/containerd" --config "$dir/config.toml" --log-level warn) ;;
  esac
}

# start_cri KIND DIR: starts berth or containerd with its files in DIR and the socket in $CRI_SOCKET. Inside a sandbox only.
start_cri() {
  local kind=$1 dir=$2
  cri_command "$kind" "$dir"
  "${CRI_COMMAND[@]}" > "$dir/log" 2>&1 &
  CRI_PID=$!
  wait_for "$kind's socket" crictl_ready || { tail -n 20 "$dir/log" >&2; return 1; }
}

crictl() { "$CRI_TOOLS/crictl" --config /dev/null --timeout 60s --runtime-endpoint "unix://$CRI_SOCKET" --image-endpoint "unix://$CRI_SOCKET" "$@"; }
crictl_ready() { [ "$(crictl info 2>/dev/null | jq '[.status.conditions[] | select(.status)] | length')" -ge 2 ]; }

write_containerd_config() {
  local dir=$1 runtime=$2
  mkdir -p "$dir/net.d"
  cat > "$dir/net.d/10-test.conflist" <<'CNI'
{"cniVersion": "1.0.0", "name": "test", "plugins": [
  {"type": "bridge", "bridge": "peer0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
CNI
  cat > "$dir/config.toml" <<TOML
version = 3
root = '$dir/root'
state = '/run/peer'
[grpc]
address = '$CRI_SOCKET'
[plugins.'io.containerd.cri.v1.images'.registry]
config_path = '$dir/certs.d'
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = 'registry.k8s.io/pause:3.10'
[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ['/usr/lib/cni', '/opt/cni/bin']
conf_dir = '$dir/net.d'
[plugins.'io.containerd.cri.v1.runtime'.containerd]
default_runtime_name = 'runc'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = '$runtime'
TOML
}

# What a pod of our busybox image runs in which names are resolved: the image's static busybox cannot, its shell is a busybox that can.
SHELL_COMMAND='for tool in wget nslookup; do ln -s /bin/sh /tmp/$tool; done; exec sleep 86400'

# After a suite: end the pods of berth and show what is left without an owner; fails when that is anything.
check_leaks() {
  local left
  "$BERTH_BIN" --root "$1/root" --state /run/berth stop --all > "$1/stop.log" 2>&1 || { cat "$1/stop.log" >&2; return 1; }
  left=$("$BERTH_BIN" --root "$1/root" --state /run/berth leaks --settle 2>&1) || true
  if [ -n "$left" ]; then
    printf 'leaks:\n%s\n' "$left" >&2
    return 1
  fi
}

# own_folders: inside a sandbox, what add-ons and kubeadm write to becomes the run's own, in $WORK. /usr is one of them for the folder of volume
# plugins, and for /lib/modules, which pods mount though a machine may have none.
own_folders() {
  # What a sandbox has and a machine has not: a variable in the caller's environment may have brought a script here.
  [ -d /run/t ] || { echo "own_folders: this is no sandbox" >&2; return 1; }
  local top
  for top in etc var usr opt; do
    mkdir -p "$WORK/over/$top" "$WORK/over-work/$top"
    mount -t overlay overlay -o "lowerdir=/$top,upperdir=$WORK/over/$top,workdir=$WORK/over-work/$top" "/$top"
  done
  rm -rf /etc/kubernetes /etc/cni /var/lib/kubelet /var/lib/etcd /var/lib/cni /opt/cni
}
