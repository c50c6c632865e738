#!/bin/bash
# Runs the kernel tests of the crates and the pod scenario in a small VM, whose Debian kernel has cgroup v2 and AppArmor: usage: e2e/vm.sh [NAME…]
# NAMEs choose test binaries, e.g. kernel_cgroup. The guest runs under TCG (about ten times slower); prints as make test does.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/lib.sh"
cd "$HERE/.."
[ "$(uname -m)" = x86_64 ] || { echo "SKIPPED vm: only an x86_64 kernel is fetched"; exit; }
e2e/tools.sh vm > /dev/null
WORK=$(make_work)
trap 'rm -rf "$WORK"' EXIT
version=$(basename "$VM"/lib/modules/*)
root=$WORK/root
mkdir -p "$root"/{bin,sbin,etc,proc,sys,dev,tmp,run,root,lib/modules,usr/bin,var/lib}

# What the tests know by its path is at the same path in the guest; busybox is the rest.
bring() { [ -e "$root$1" ] || { mkdir -p "$root$(dirname "$1")" && cp -rL "$1" "$root$1"; }; }
# VM_CRATES: e.g. "-p berth-cgroup"; else all.
cargo test ${VM_CRATES:---workspace} --no-run --message-format=json 2>/dev/null |
  jq -r 'select(.executable) | "\(if .profile.test then .target.kind[0] else "program" end) \(.target.name) \(.executable)"' > "$WORK/built"
while read -r kind name path; do
  case "$kind $name" in
  program*) bring "$path" ;;
  'test kernel_'* | 'test pod_lifecycle' | 'test crictl_verbs' | 'test density')
    if [ $# -eq 0 ] || grep -qw "$name" <<< "$*"; then bring "$path" && strip -g "$root$path" && echo "$path"; fi ;;
  esac
done < "$WORK/built" > "$WORK/tests"
bring "$(realpath "$BERTH_BIN")"
for path in "$CRI_TOOLS/crictl" "$IMAGES" "$HERE/lib.sh" /usr/lib/cni /usr/lib/python3.11 /usr/lib/x86_64-linux-gnu/xtables; do
  [ ! -e "$path" ] || bring "$path"
done
for program in bash ip nft iptables python3 docker-registry skopeo curl jq umount mount nsenter unshare setpriv; do
  found=$(PATH=/usr/sbin:/usr/bin:$PATH command -v $program) || continue
  bring "$(realpath "$found")"
  [ -e "$root$found" ] || { mkdir -p "$root$(dirname "$found")" && ln -s "$(realpath "$found")" "$root$found"; }
  { ldd "$found" 2>/dev/null | grep -o "/[^ ]*" || true; } | while read -r library; do bring "$library"; done
done
cp /bin/busybox "$root/bin/busybox"
printf 'root:x:0:0:root:/root:/bin/sh\n' > "$root/etc/passwd"
printf 'root:x:0:\n' > "$root/etc/group"
printf '127.0.0.1 localhost\n' > "$root/etc/hosts"
: > "$root/etc/resolv.conf"

early=$WORK/early
mkdir -p "$early"/{bin,proc,dev,root,lib/modules}
cp /bin/busybox "$early/bin/"
cp -r "$VM/lib/modules/$version" "$early/lib/modules/"
rm -rf "$early/lib/modules/$version"/kernel/{drivers/{gpu,infiniband,scsi,hv,nvme,media,md,net/ethernet},sound,net/{bluetooth,wireless,sctp,tipc}}
busybox depmod -b "$early" "$version"
cat > "$early/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in virtio_pci virtio_blk crc32c_generic ext4 overlay veth bridge br_netfilter nf_tables nft_chain_nat nft_nat nft_masq \
  nft_ct nft_redir nft_limit nft_fib_inet nft_reject_inet nf_conntrack nf_conntrack_netlink nft_compat xt_MASQUERADE xt_comment xt_conntrack \
  xt_addrtype xt_mark xt_nat xt_multiport xt_tcpudp sch_tbf sch_ingress; do modprobe $module || echo "no module $module"; done
n=0
while [ ! -b /dev/vda ] && [ $n -lt 100 ]; do n=$((n+1)); usleep 100000; done
mount -t ext4 /dev/vda /root
cp /start /root/start
exec switch_root /root /start
INIT
cat > "$early/start" <<GUEST
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=$HOME BERTH_BIN=$(realpath "$BERTH_BIN") BERTH_TOOLS=$BERTH_TOOLS \
  RUST_BACKTRACE=0
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t securityfs securityfs /sys/kernel/security
# As systemd does on a host: what is below the root may use every controller.
for controller in \$(cat /sys/fs/cgroup/cgroup.controllers); do echo +\$controller > /sys/fs/cgroup/cgroup.subtree_control; done
ip link set lo up
echo "guest: \$(uname -r), controllers \$(cat /sys/fs/cgroup/cgroup.controllers), AppArmor \$(cat /sys/module/apparmor/parameters/enabled)"
while read -r test; do
  echo "== \$(basename "\$test")"
  timeout 600 "\$test" --test-threads=2 < /dev/null 2>&1
done <<LIST
$(cat "$WORK/tests")
LIST
echo GUEST-END
busybox poweroff -f
GUEST
chmod +x "$early/init" "$early/start"
(cd "$early" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) > "$WORK/initrd.gz"
mkfs.ext4 -q -F -d "$root" -O ^has_journal "$WORK/disk.img" "$(($(du -sm "$root" | cut -f1) + 2048))M" > /dev/null

log=target/test-logs/vm.log
mkdir -p target/test-logs
timeout "${VM_TIMEOUT:-1500}" qemu-system-x86_64 -M q35 -accel tcg,thread=multi -cpu max -smp 2 -m 3072 -nographic -no-reboot \
  -kernel "$VM/vmlinuz" -initrd "$WORK/initrd.gz" -drive "file=$WORK/disk.img,format=raw,if=virtio,cache=unsafe" -nic none \
  -append "console=ttyS0 quiet panic=-1" < /dev/null 2>&1 | tr -d '\r' > "$log" || true
sed 's,.*guest:,guest:,' "$log" | grep -E '^(guest:|no module|== |test .* FAILED|SKIPPED |test result:)' || true
sed -n '/^failures:$/,/^test result:/p' "$log"
if ! grep -q '^GUEST-END' "$log"; then
  tail -n 40 "$log"
  echo "the guest did not come to its end" >&2
  exit 1
fi
awk '/^test result:/ {p += $4; f += $6} /^SKIPPED / {p--; s++} END {print p + 0 " passed, " f + 0 " failed, " s + 0 " skipped"; exit f > 0}' "$log"
