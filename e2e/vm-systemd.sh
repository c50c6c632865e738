#!/bin/bash
# The systemd cgroup driver against a real systemd: boots the Debian kernel of vm.sh with this machine's systemd as pid 1 (under TCG), and there runs
# e2e/vm-systemd/check. Usage: [VM_APPEND=systemd.log_level=debug] e2e/vm-systemd.sh [v1], with `v1` on the hybrid layout; VM_APPEND ends the kernel's
# command line. Its last line is `vm-systemd: N passed, N failed, N skipped`.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/lib.sh"
cd "$HERE/.."
skip() { echo "SKIPPED vm-systemd: $1"; echo "vm-systemd: 0 passed, 0 failed, 1 skipped"; exit; }
[ "$(uname -m)" = x86_64 ] || skip "only an x86_64 kernel is fetched"
for needed in /lib/systemd/systemd /usr/bin/dbus-daemon /usr/bin/systemd-cgls; do
  [ -x $needed ] || skip "Debian's packages systemd and dbus are not installed"
done
e2e/tools.sh vm > /dev/null
[ -x "$CRI_TOOLS/crictl" ] || e2e/tools.sh cri-tools > /dev/null
WORK=$(make_work)
trap 'rm -rf "$WORK"' EXIT
version=$(basename "$VM"/lib/modules/*)
root=$WORK/root
mkdir -p "$root"/{usr/bin,usr/sbin,usr/lib,usr/lib64,etc/systemd/system,proc,sys,dev,tmp,run,root,var/lib,var/log,var/tmp}
for folder in bin sbin lib lib64; do ln -s usr/$folder "$root/$folder"; done

bring() { [ -e "$root$1" ] || { mkdir -p "$root$(dirname "$1")" && cp -rL "$1" "$root$1"; }; }
program() { # PATH: with its libraries
  bring "$(realpath "$1")"
  [ -e "$root$1" ] || { mkdir -p "$root$(dirname "$1")" && ln -s "$(realpath "$1")" "$root$1"; }
  { ldd "$1" 2>/dev/null | grep -o "/[^ ]*" || true; } | while read -r library; do bring "$library"; done
}
cp -a /lib/systemd "$root/usr/lib/systemd"
for binary in /lib/systemd/systemd /lib/systemd/systemd-*; do [ ! -x "$binary" ] || [ -d "$binary" ] || program "$binary"; done
for name in bash systemctl busctl systemd-tmpfiles systemd-cgls systemd-run journalctl dbus-daemon dbus-send mount umount jq ip; do
  program "$(PATH=/usr/sbin:/usr/bin:/sbin:/bin command -v $name)"
done
mkdir -p "$root/usr/share" && cp -a /usr/share/dbus-1 "$root/usr/share/dbus-1"
cp /bin/busybox "$root/bin/busybox"
cp "$BERTH_BIN" "$root/usr/bin/berth" && strip -g "$root/usr/bin/berth"
cp "$CRI_TOOLS/crictl" "$root/usr/bin/crictl"
cp e2e/vm-systemd/check "$root/usr/bin/check"
printf 'root:x:0:0:root:/root:/bin/sh\nmessagebus:x:100:100::/nonexistent:/bin/false\n' > "$root/etc/passwd"
printf 'root:x:0:\nmessagebus:x:100:\n' > "$root/etc/group"
printf '127.0.0.1 localhost\n' > "$root/etc/hosts"
printf '%032d\n' 7 > "$root/etc/machine-id"
: > "$root/etc/resolv.conf"
# What a guest without hardware, users and time needs not.
for unit in systemd-udevd.service systemd-udev-trigger.service systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-udev-settle.service \
  systemd-hwdb-update.service systemd-timesyncd.service systemd-logind.service systemd-random-seed.service systemd-update-utmp.service getty.target \
  systemd-modules-load.service systemd-sysusers.service systemd-binfmt.service dev-hugepages.mount systemd-pstore.service kmod-static-nodes.service; do
  ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
cat > "$root/etc/systemd/system/check.service" <<'UNIT'
[Unit]
After=basic.target dbus.socket
Wants=dbus.socket
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=oneshot
ExecStart=/usr/bin/check
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
Environment=PATH=/usr/bin:/bin:/usr/sbin:/sbin
TimeoutStartSec=900
UNIT
sed -e 's,/usr/local/bin/berth node,/usr/bin/berth cri --cgroup-driver systemd,' manifests/berth.service > "$root/etc/systemd/system/berth.service"

# An image of busybox, as `docker save` writes it.
image=$WORK/image
mkdir -p "$image/layer/bin" "$image/layer/proc" "$image/layer/dev" "$image/layer/sys"
cp /bin/busybox "$image/layer/bin/"
for applet in sh sleep cat echo mknod head; do ln -s busybox "$image/layer/bin/$applet"; done
tar -C "$image/layer" --owner=0 --group=0 -cf "$image/layer.tar" .
printf '{"architecture":"amd64","os":"linux","config":{"Env":["PATH=/bin"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
  "$(sha256sum "$image/layer.tar" | cut -d' ' -f1)" > "$image/config.json"
printf '[{"Config":"config.json","RepoTags":["localhost/busybox:1"],"Layers":["layer.tar"]}]' > "$image/manifest.json"
tar -C "$image" -cf "$root/image.tar" manifest.json config.json layer.tar
mkdir -p "$root/bundle/rootfs" && cp -a "$image/layer/." "$root/bundle/rootfs/"

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
for module in autofs4 virtio_pci virtio_blk crc32c_generic ext4 overlay veth bridge br_netfilter nf_tables nft_chain_nat nft_nat nft_masq nft_ct nft_redir \
  nft_fib_inet nft_reject_inet nf_conntrack nf_conntrack_netlink; do modprobe $module || echo "no module $module"; done
n=0
while [ ! -b /dev/vda ] && [ $n -lt 100 ]; do n=$((n+1)); usleep 100000; done
mount -t ext4 /dev/vda /root
chroot /root /bin/busybox --install -s /bin 2>/dev/null
umount /proc
exec switch_root /root /lib/systemd/systemd
INIT
chmod +x "$early/init"
(cd "$early" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) > "$WORK/initrd.gz"
mkfs.ext4 -q -F -d "$root" -O ^has_journal "$WORK/disk.img" "$(($(du -sm "$root" | cut -f1) + 1024))M" > /dev/null

# no_timer_check: as in vm.sh, for a host that is busy.
kernel="console=ttyS0 quiet panic=-1 no_timer_check systemd.unit=check.service systemd.show_status=0 systemd.log_target=console systemd.log_level=warning"
case ${1:-} in v1) kernel="$kernel systemd.unified_cgroup_hierarchy=0 SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1" ;; esac
log=target/test-logs/vm-systemd${1:+-$1}.log
mkdir -p target/test-logs
timeout "${VM_TIMEOUT:-1200}" qemu-system-x86_64 -M q35 -accel tcg,thread=multi -cpu max -smp 2 -m 2048 -nographic -no-reboot \
  -kernel "$VM/vmlinuz" -initrd "$WORK/initrd.gz" -drive "file=$WORK/disk.img,format=raw,if=virtio,cache=unsafe" -nic none \
  -append "$kernel ${VM_APPEND:-}" < /dev/null 2>&1 | tr -d '\r' > "$log" || true
grep -E '^(guest:|no module|FAILED |NOTE |SKIPPED )' "$log" || true
if ! grep -q '^GUEST-END' "$log"; then
  tail -n 60 "$log"
  echo "the guest did not come to its end" >&2
  echo "vm-systemd: 0 passed, 1 failed, 0 skipped"
  exit 1
fi
awk '/^ok / {p++} /^FAILED / {f++} /^SKIPPED / {s++} END {print "vm-systemd: " p + 0 " passed, " f + 0 " failed, " s + 0 " skipped"; exit f > 0}' "$log"
