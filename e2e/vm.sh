#!/bin/bash
# Runs tests in a small VM, whose Debian kernel has cgroup v2 with all controllers, AppArmor, PSI, swap and huge pages:
# usage: e2e/vm.sh [tests [NAME…] | critest [ARGUMENT…]]
#   tests    the tests of vm-tests; NAMEs choose among their binaries, e.g. kernel_cgroup
#   critest  the specs of vm-critest; ARGUMENTs go to critest instead, e.g. -ginkgo.focus=Streaming
# Without arguments both. The last line is `vm: N passed, N failed, N skipped`. The guest runs under TCG, about ten times slower than its host.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/lib.sh"
cd "$HERE/.."
[ "$(uname -m)" = x86_64 ] || { echo "SKIPPED vm: only an x86_64 kernel is fetched"; echo "vm: 0 passed, 0 failed, 1 skipped"; exit; }
what=${1:-all}
[ $# -eq 0 ] || shift
case $what in all | tests | critest) ;; *) sed -n '2,6s/^# //p' "$0" >&2; exit 2 ;; esac
e2e/tools.sh vm packages > /dev/null
[ "$what" = tests ] || e2e/tools.sh images cri-tools > /dev/null
WORK=$(make_work)
trap 'rm -rf "$WORK"' EXIT
root=$WORK/root
mkdir -p "$root"/{usr/share,bin,sbin,etc,proc,sys,dev,tmp,run,root,lib/modules,usr/bin,usr/sbin,var/lib,var/cache/apparmor,guest}
: > "$WORK/steps"

# What the tests know by its path is at the same path in the guest; busybox is the rest.
bring() { [ -e "$root$1" ] || { mkdir -p "$root$(dirname "$1")" && cp -rL "$1" "$root$1"; }; }

bring_tests() {
  local names="$*" folder name arguments crates=() binaries=()
  while read -r folder name arguments; do
    if [ -n "$names" ] && ! grep -qw "$name" <<< "$names"; then continue; fi
    crates+=(-p "$(sed -n 's/^name = "\(.*\)"/\1/p' "$folder/Cargo.toml" | head -n 1)")
    binaries+=(--test "$name")
    printf '%s %s %s\n' "$PWD/$folder/Cargo.toml" "$name" "$arguments"
  done < <(grep -v '^#' "$HERE/vm-tests") > "$WORK/wanted"
  # Some tests run programs of their crate, which are its examples.
  cargo build "${crates[@]}" --bins --examples --message-format=json 2> "$WORK/cargo.log" > "$WORK/json" &&
    cargo test "${crates[@]}" "${binaries[@]}" --no-run --message-format=json 2>> "$WORK/cargo.log" >> "$WORK/json" ||
    { tail -n 40 "$WORK/cargo.log"; return 1; }
  jq -r 'select(.executable) | "\(if .profile.test then "test" else "program" end) \(.manifest_path) \(.target.name) \(.executable)"' \
    "$WORK/json" | sort -u > "$WORK/built"
  local kind manifest path
  while read -r kind manifest name path; do
    bring "$path" && strip "$root$path"
    [ "$kind" = program ] || awk -v m="$manifest" -v n="$name" -v p="$path" \
      '$1 == m && $2 == n {$1 = $2 = ""; print "run_test " p " " $0}' "$WORK/wanted" >> "$WORK/steps"
  done < "$WORK/built"
}

bring_critest() {
  bring "$CRI_TOOLS/critest"
  printf 'run_critest' >> "$WORK/steps"
  if [ $# -eq 0 ]; then
    # One expression of the names, which hold no characters with a meaning but these.
    set -- "-ginkgo.focus=$(sed '/^#/d; /^$/d; s/[][().*+?^$|\\]/\\&/g' "$HERE/vm-critest" | paste -sd '|')"
  fi
  printf ' %q' "$@" >> "$WORK/steps"
  echo >> "$WORK/steps"
}

case $what in
tests) bring_tests "$@" ;;
critest) bring_critest "$@" ;;
all) bring_tests && bring_critest ;;
esac
bring "$(realpath "$BERTH_BIN")"
for path in /etc/protocols /etc/services "$CRI_TOOLS/crictl" "$IMAGES" /usr/lib/cni /usr/lib/python3.11 /usr/lib/x86_64-linux-gnu/xtables; do
  [ ! -e "$path" ] || bring "$path"
done
for path in "$HERE"/*.sh "$HERE/conformance" "$HERE"/vm-critest "$HERE"/critest-expected; do bring "$path"; done
for program in bash ip nft iptables iptables-nft ip6tables ip6tables-nft findmnt python3 docker-registry skopeo curl jq umount mount nsenter unshare setpriv ipcmk comm; do
  found=$(PATH=/usr/sbin:/usr/bin:$PATH command -v $program) || continue
  bring "$(realpath "$found")"
  [ -e "$root$found" ] || { mkdir -p "$root$(dirname "$found")" && ln -s "$(realpath "$found")" "$root$found"; }
  { ldd "$found" 2>/dev/null | grep -o "/[^ ]*" || true; } | while read -r library; do bring "$library"; done
done
cp "$VM/sbin/apparmor_parser" "$root/usr/sbin/"
cp -r "$VM"/etc/apparmor* "$root/etc/"
cp -r "$VM/usr/share/apparmor-features" "$root/usr/share/"
# critest loads its profiles with it.
printf '#!/bin/bash\nexec "$@"\n' > "$root/usr/bin/sudo"
chmod +x "$root/usr/bin/sudo"
cp /bin/busybox "$root/bin/busybox"
ln -s /usr/bin/bash "$root/bin/bash"
printf 'root:x:0:0:root:/root:/bin/sh\n' > "$root/etc/passwd"
printf 'root:x:0:\n' > "$root/etc/group"
printf '127.0.0.1 localhost\n' > "$root/etc/hosts"
: > "$root/etc/resolv.conf"

version=$(basename "$VM"/lib/modules/*)
early=$WORK/early
mkdir -p "$early"/{bin,proc,dev,root,lib/modules}
cp /bin/busybox "$early/bin/"
cp -r "$VM/lib/modules/$version" "$early/lib/modules/"
rm -rf "$early/lib/modules/$version"/kernel/{drivers/{gpu,infiniband,scsi,hv,nvme,media,md,net/ethernet},sound,net/{bluetooth,wireless,sctp,tipc}}
busybox depmod -b "$early" "$version"
cp "$HERE/vm-init" "$early/init"
cp "$HERE/vm-guest" "$early/start"
printf 'export HOME=%q BERTH_BIN=%q BERTH_TOOLS=%q BERTH_TARGET=%q E2E=%q\n' \
  "$HOME" "$(realpath "$BERTH_BIN")" "$BERTH_TOOLS" "$TARGET" "$HERE" > "$root/guest/env"
mv "$WORK/steps" "$root/guest/steps"
chmod +x "$early/init" "$early/start"
(cd "$early" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) > "$WORK/initrd.gz"
mkfs.ext4 -q -F -d "$root" -O ^has_journal "$WORK/disk.img" "$(($(du -sm "$root" | cut -f1) + 2048))M" > /dev/null
rm -rf "$root"

# no_timer_check: on a host that is busy the emulated timer may miss the few ticks that the kernel waits for, and it panics.
log=target/test-logs/vm.log
mkdir -p target/test-logs
: > "$log"
timeout "${VM_TIMEOUT:-3600}" qemu-system-x86_64 -M q35 -accel tcg,thread=multi -cpu max -smp 2 -m 3072 -no-reboot \
  -display none -monitor none -serial "file:$log" -kernel "$VM/vmlinuz" -initrd "$WORK/initrd.gz" \
  -drive "file=$WORK/disk.img,format=raw,if=virtio,cache=unsafe" -nic none \
  -append "console=ttyS0 quiet panic=-1 no_timer_check apparmor=1 security=apparmor psi=1 hugepages=16 ${VM_APPEND:-}" < /dev/null || true
tr -d '\r\0' < "$log" > "$log.clean" && mv "$log.clean" "$log"
sed 's,.*guest:,guest:,' "$log" | grep -E '^(guest:|no module|== |test .* FAILED|SKIPPED |MEASURED |test result:|failed: |critest: )' || true
sed -n '/^failures:$/,/^test result:/p' "$log"
if ! grep -q '^GUEST-END' "$log"; then
  tail -n 40 "$log"
  echo "the guest did not come to its end" >&2
  echo "vm: 0 passed, 1 failed, 0 skipped"
  exit 1
fi
# A step that ended without a result has failed too.
awk '/^test result:/ {p += $4; f += $6; s += $8; ended++} /^SKIPPED / {p--; s++} /^== / {begun++}
  /^critest: [0-9]+ passed/ {gsub(",", ""); p += $2; f += $4 + $6; ended++}
  END {f += begun - ended; print "vm: " p + 0 " passed, " f + 0 " failed, " s + 0 " skipped"; exit f > 0}' "$log"
