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
root=$WORK/root
mkdir -p "$root"/{bin,sbin,etc,proc,sys,dev,tmp,run,root,tests,usr/bin,lib/modules}

# Paths that the test binaries know are the same in the guest.
bring() { mkdir -p "$root$(dirname "$1")" && cp "$1" "$root$1"; }
# VM_CRATES: e.g. "-p berth-cgroup"; else all.
cargo test ${VM_CRATES:---workspace} --no-run --message-format=json 2>/dev/null |
  jq -r 'select(.executable and .profile.test and (.target.kind[0] == "test")) | "\(.target.name) \(.executable)"' |
  grep -E "^(kernel_|pod_lifecycle)" > "$WORK/tests"
while read -r name path; do
  if [ $# -gt 0 ] && ! grep -qw "$name" <<< "$*"; then continue; fi
  bring "$path"
  strip -g "$root$path"
  # Two crates may have tests of one name.
  ln -s "$path" "$root/tests/$name-$(basename "$path")"
done < "$WORK/tests"
bring "$(tool_bin demo-web)"
bring "$(tool_bin berth-sandbox)"
bring "$(realpath "$BERTH_BIN")"
cp /bin/busybox "$root/bin/busybox"
printf 'root:x:0:0:root:/root:/bin/sh\n' > "$root/etc/passwd"
printf 'root:x:0:\n' > "$root/etc/group"
version=$(basename "$VM"/lib/modules/*)
cp -r "$VM/lib/modules/$version" "$root/lib/modules/"
cat > "$root/sbin/start" <<GUEST
#!/bin/busybox sh
export PATH=/bin:/sbin:/usr/bin HOME=/root BERTH_BIN=$(realpath "$BERTH_BIN") RUST_BACKTRACE=0
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t securityfs securityfs /sys/kernel/security
for module in overlay veth bridge br_netfilter nf_tables nft_chain_nat nft_nat nft_masq nft_ct nft_redir nf_conntrack nf_conntrack_netlink \
  nft_reject_inet nft_fib_inet sch_tbf sch_ingress; do modprobe \$module || echo "no module \$module"; done
ip link set lo up
# As systemd does on a host: what is below the root may use every controller.
for controller in \$(cat /sys/fs/cgroup/cgroup.controllers); do echo +\$controller > /sys/fs/cgroup/cgroup.subtree_control; done
echo "guest: \$(uname -r), controllers \$(cat /sys/fs/cgroup/cgroup.controllers)"
for test in /tests/*; do
  echo "== \$(basename \$test)"
  timeout 600 \$test --test-threads=2 2>&1
done
echo GUEST-END
poweroff -f
GUEST
chmod +x "$root/sbin/start"

early=$WORK/early
mkdir -p "$early"/{bin,proc,dev,root,lib/modules}
cp /bin/busybox "$early/bin/"
cp -r "$VM/lib/modules/$version" "$early/lib/modules/"
find "$early/lib/modules" -name '*.ko' | grep -vE '/(virtio|virtio_blk|virtio_pci[a-z_]*|virtio_ring|virtio_mmio|ext4|jbd2|mbcache|crc16|crc32c[a-z_]*|crct10dif[a-z_]*|libcrc32c)\.ko$' | xargs rm
cat > "$early/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
for module in virtio_pci virtio_blk crc32c_generic ext4; do /bin/busybox modprobe $module; done
n=0
while [ ! -b /dev/vda ] && [ $n -lt 100 ]; do n=$((n+1)); /bin/busybox usleep 100000; done
/bin/busybox mount -t ext4 /dev/vda /root && exec /bin/busybox switch_root /root /sbin/start
/bin/busybox poweroff -f
INIT
chmod +x "$early/init"
for dir in "$root" "$early"; do
  busybox depmod -b "$dir" "$version"
done
(cd "$early" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) > "$WORK/initrd.gz"
mkfs.ext4 -q -F -d "$root" -O ^has_journal "$WORK/disk.img" "$(($(du -sm "$root" | cut -f1) + 1024))M" > /dev/null

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
