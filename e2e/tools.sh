#!/bin/bash
# Installs what the suites drive, outside the checkout: usage: e2e/tools.sh [NAME…]; without names, all that the tests need.
#   packages   Debian packages: registry, skopeo, jq, iproute2, nftables, …
#   cri-tools  crictl and critest (critest pulls one image by digest: it is built with the digest of our own copy)
#   containerd containerd, its shim and ctr, the peer we measure against and the caller of `berth oci`
#   runc       the peer's OCI runtime
#   nri-plugin a plugin made with NRI's stock stub
#   images     the images of critest, as a registry's storage folder
#   vm         qemu, and for its guest Debian's cloud kernel and AppArmor parser
#   kubernetes the control plane, kubelet, kubeadm and kubectl, and etcd (ten minutes of two cores, once)
#   addons     kube-proxy, CoreDNS, flannel, metrics-server and CNI plugins; their images and the control plane's, as a registry's storage
#   cri-bench  critest again, whose benchmark's pods have a PID namespace per container, as a kubelet's have (for `make bench` only)
# Each tool lives in $BERTH_TOOLS/<name>-<version> and is built once; prints one line a tool. Safe to run twice at once.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/lib.sh"
export GOFLAGS=-mod=mod GOTOOLCHAIN=${GOTOOLCHAIN:-local}
mkdir -p "$BERTH_TOOLS"
exec 9>"$BERTH_TOOLS/.lock"
flock 9
rm -rf "$BERTH_TOOLS"/.src.* "$BERTH_TOOLS"/.out.* # of a killed run

PACKAGES="busybox-static protobuf-compiler docker-registry skopeo jq curl gcc libc6-dev libseccomp-dev pkg-config procps util-linux
  iproute2 iputils-ping nftables iptables containernetworking-plugins umoci
  nginx-light apache2-bin"

# A build appears under its final name only when it is complete.
publish() { chmod 755 "$1" && mv -T "$1" "$2"; echo "tools: $2"; }

# Prints a fresh writable copy of a Go module's source: module@version.
go_source() {
  local dir copy
  dir=$(go mod download -json "$1" | jq -r .Dir)
  copy=$(mktemp -d "$BERTH_TOOLS/.src.XXXXXX")
  cp -r "$dir/." "$copy" && chmod -R u+w "$copy"
  echo "$copy"
}

packages() {
  local need=() p
  for p in $PACKAGES; do dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || need+=("$p"); done
  if [ ${#need[@]} -gt 0 ]; then
    apt-get update -qq
    # RUNLEVEL=1 keeps the packages' services from being started.
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${need[@]}" >/dev/null
  fi
  echo "tools: packages"
}

cri-tools() {
  local src out
  [ -x "$CRI_TOOLS/critest" ] && return
  images
  src=$(go_source "sigs.k8s.io/cri-tools@v$CRI_TOOLS_VERSION"); out=$(mktemp -d "$BERTH_TOOLS/.out.XXXXXX")
  sed -i "s#test-image-digest@sha256:[0-9a-f]*\"#test-image-digest@$(cat "$IMAGES/DIGEST")\"#" "$src/pkg/validate/consts.go"
  (cd "$src" && export CGO_ENABLED=0 &&
    go build -o "$out/crictl" -ldflags "-X sigs.k8s.io/cri-tools/pkg/version.Version=v$CRI_TOOLS_VERSION" ./cmd/crictl &&
    go test -c -o "$out/critest" ./cmd/critest)
  rm -rf "$src"
  publish "$out" "$CRI_TOOLS"
}

cri-bench() {
  local src out
  [ -x "$CRI_BENCH/critest" ] && return
  src=$(go_source "sigs.k8s.io/cri-tools@v$CRI_TOOLS_VERSION"); out=$(mktemp -d "$BERTH_TOOLS/.out.XXXXXX")
  local pid='NamespaceOptions: \&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}'
  sed -i "s#\(CgroupParent: common.GetCgroupParent(ctx, r\?c),\)#\1 SecurityContext: \&runtimeapi.LinuxSandboxSecurityContext{$pid},#
    s#runtimeapi.LinuxContainerConfig{}#runtimeapi.LinuxContainerConfig{SecurityContext: \&runtimeapi.LinuxContainerSecurityContext{$pid}}#" \
    "$src"/pkg/benchmark/*.go "$src/pkg/framework/util.go"
  (cd "$src" && CGO_ENABLED=0 go test -c -o "$out/critest" ./cmd/critest)
  rm -rf "$src"
  publish "$out" "$CRI_BENCH"
}

containerd() {
  local src out pkg
  [ -x "$CONTAINERD/ctr" ] && return
  src=$(go_source "github.com/containerd/containerd/v2@v$CONTAINERD_VERSION"); out=$(mktemp -d "$BERTH_TOOLS/.out.XXXXXX")
  for pkg in containerd containerd-shim-runc-v2 ctr; do
    (cd "$src" && CGO_ENABLED=0 go build -trimpath -o "$out/$pkg" \
      -ldflags "-s -w -X github.com/containerd/containerd/v2/version.Version=v$CONTAINERD_VERSION" "./cmd/$pkg")
  done
  rm -rf "$src"
  publish "$out" "$CONTAINERD"
}

runc() {
  local src out
  [ -x "$RUNC/runc" ] && return
  src=$(go_source "github.com/opencontainers/runc@v$RUNC_VERSION"); out=$(mktemp -d "$BERTH_TOOLS/.out.XXXXXX")
  (cd "$src" && CGO_ENABLED=1 go build -trimpath -tags seccomp -ldflags "-s -w -X main.version=$RUNC_VERSION" -o "$out/runc" .)
  rm -rf "$src"
  publish "$out" "$RUNC"
}

nri-plugin() {
  local src out
  [ -x "$NRI_PLUGIN/nri-plugin" ] && return
  src=$(mktemp -d "$BERTH_TOOLS/.src.XXXXXX"); out=$(mktemp -d "$BERTH_TOOLS/.out.XXXXXX")
  cp "$HERE"/nri-plugin/* "$src"
  (cd "$src" && GOWORK=off CGO_ENABLED=0 go build -trimpath -o "$out/nri-plugin" -ldflags "-s -w" .)
  rm -rf "$src"
  publish "$out" "$NRI_PLUGIN"
}

kubernetes() {
  local src out name
  [ -x "$KUBERNETES/kubectl" ] && [ -x "$KUBERNETES/kubeadm" ] && return
  out=$(mktemp -d "$BERTH_TOOLS/.out.XXXXXX")
  export GOWORK=off CGO_ENABLED=0
  # Their repositories build their own modules from folders that the published modules do not hold: take those published too.
  src=$(go_source "go.etcd.io/etcd/server/v3@v$ETCD_VERSION")
  sed -i '/^replace/,/^)/d' "$src/go.mod"
  (cd "$src" && nice -n 15 go build -trimpath -ldflags "-s -w" -o "$out/etcd" .)
  rm -rf "$src"
  src=$(kubernetes_source)
  for name in kubectl kubeadm kubelet kube-apiserver kube-controller-manager kube-scheduler; do
    (cd "$src" && nice -n 15 go build -trimpath -o "$out/$name" -ldflags "$KUBERNETES_FLAGS" "./cmd/$name")
  done
  rm -rf "$src"
  unset GOWORK CGO_ENABLED
  rm -rf "$KUBERNETES"
  publish "$out" "$KUBERNETES"
}

# kubernetes_source: a copy of Kubernetes' source that builds from published modules; KUBERNETES_FLAGS: what its programs say of themselves.
KUBERNETES_FLAGS="-s -w
  -X k8s.io/component-base/version.gitVersion=v$KUBERNETES_VERSION -X k8s.io/component-base/version.gitTreeState=clean
  -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36"
kubernetes_source() {
  local src
  src=$(go_source "k8s.io/kubernetes@v$KUBERNETES_VERSION")
  sed -i "s#=> ./staging/src/\(k8s.io/.*\)#=> \1 v0.${KUBERNETES_VERSION#*.}#" "$src/go.mod"
  echo "$src"
}

# timed NAME COMMAND…: says how long a build took, which is minutes with a cold cache.
timed() {
  local name=$1 begun=$SECONDS
  shift
  "$@"
  echo "tools: $name built in $((SECONDS - begun)) s"
}
# go_program OUT PACKAGE [LDFLAGS]: a static program of the module in this folder.
go_program() { timed "$(basename "$1")" nice -n 15 go build -trimpath -ldflags "-s -w ${3:-}" -o "$1" "$2"; }

addons() {
  local src out name versions
  [ -d "$ADDONS/registry" ] && return
  images
  kubernetes
  out=$(mktemp -d "$BERTH_TOOLS/.out.XXXXXX")
  mkdir -p "$out/bin/cni"
  export GOWORK=off CGO_ENABLED=0
  for name in etcd kube-apiserver kube-controller-manager kube-scheduler; do ln -s "$KUBERNETES/$name" "$out/bin/$name"; done
  src=$(kubernetes_source)
  (cd "$src" && go_program "$out/bin/kube-proxy" ./cmd/kube-proxy "$KUBERNETES_FLAGS")
  rm -rf "$src"
  # One module for the two: with the client libraries that Kubernetes was just built with, they are compiled once.
  src=$(mktemp -d "$BERTH_TOOLS/.src.XXXXXX")
  cp "$HERE"/addons/*.go "$HERE"/addons/go.* "$src"
  (cd "$src" && go_program "$out/bin/coredns" . && go_program "$out/bin/metrics-server" sigs.k8s.io/metrics-server/cmd/metrics-server)
  rm -rf "$src"
  src=$(go_source "github.com/flannel-io/flannel@v$FLANNEL_VERSION")
  # Without the backend of one cloud, whose client library is at no proxy, and the one that takes a C compiler; with the client libraries of above.
  sed -i '/backend\/\(tencentvpc\|udp\)"/d' "$src/main.go"
  (cd "$src" && for name in api apimachinery client-go; do go mod edit -require="k8s.io/$name@v0.${KUBERNETES_VERSION#*.}"; done &&
    go_program "$out/bin/flanneld" . "-X github.com/flannel-io/flannel/pkg/version.Version=v$FLANNEL_VERSION" &&
    go_program "$out/bin/install-conf" ./cmd/install_conf)
  rm -rf "$src"
  src=$(go_source "github.com/containernetworking/plugins@v$FLANNEL_PLUGIN_VERSION")
  (cd "$src" && go_program "$out/bin/cni/flannel" ./plugins/meta/flannel)
  rm -rf "$src"
  src=$(go_source "github.com/containernetworking/plugins@v$CNI_PLUGINS_VERSION")
  (cd "$src" && for name in main/bridge ipam/host-local meta/portmap; do go_program "$out/bin/cni/${name#*/}" "./plugins/$name"; done)
  rm -rf "$src"
  unset GOWORK CGO_ENABLED
  versions=kubernetes=$KUBERNETES_VERSION,etcd=$ETCD_VERSION,coredns=$COREDNS_VERSION,flannel=$FLANNEL_VERSION
  versions+=,cni-plugin=$CNI_PLUGINS_VERSION,metrics-server=$METRICS_SERVER_VERSION
  timed "the add-ons' images" "$HERE/images.sh" "$out" addons "$versions"
  rm -rf "$out/bin"
  publish "$out" "$ADDONS"
}

vm() {
  local out package
  # With several names `command -v` is content with one.
  { command -v qemu-system-x86_64 && command -v mkfs.ext4; } > /dev/null || {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends qemu-system-x86 e2fsprogs > /dev/null
  }
  [ -f "$VM/vmlinuz" ] && return
  out=$(mktemp -d "$BERTH_TOOLS/.out.XXXXXX")
  package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: //p')
  (cd "$out" && apt-get -o APT::Sandbox::User=root download -qq "$package" apparmor &&
    for package in ./*.deb; do dpkg -x "$package" .; done && rm ./*.deb && mv boot/vmlinuz-* vmlinuz)
  publish "$out" "$VM"
}

images() {
  local out
  [ -f "$IMAGES/DIGEST" ] && return
  out=$(mktemp -d "$BERTH_TOOLS/.out.XXXXXX")
  "$HERE/images.sh" "$out"
  publish "$out" "$IMAGES"
}

[ $# -gt 0 ] || set -- packages runc containerd nri-plugin images cri-tools
[ "$1" != all ] || set -- packages runc containerd nri-plugin images cri-tools kubernetes addons # what `make test` needs
for tool in "$@"; do "$tool"; done
