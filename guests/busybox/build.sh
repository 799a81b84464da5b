#!/bin/bash
# The busybox guest: Debian's unmodified cloud kernel and a RAM disk that is ready at once. The
# work horse of the tests.
#
#   usage: build.sh OUT        needs no root; `cargo xtask guest busybox` keeps the result
#   makes  OUT/vmlinuz         Debian 12's cloud kernel
#          OUT/initrd.img      busybox, the virtio and ext4 modules, files/init; not compressed,
#                              because unpacking costs a slow CPU more than reading
#
# What the guest does is written at the head of files/init.
set -euo pipefail

out=${1:?usage: build.sh OUT}
here=$(dirname "$(readlink -f "$0")")
suite=bookworm
# shellcheck source=../mirror.sh
. "$here/../mirror.sh"
PATH=$PATH:/usr/sbin:/sbin
for tool in mmdebstrap cpio modprobe depmod tar; do
    command -v "$tool" >/dev/null || { echo "guests/busybox: missing tool: $tool" >&2; exit 1; }
done
step() { printf 'guests/busybox: [%3ds] %s\n' "$SECONDS" "$*" >&2; }

mkdir -p "$out"
work=$(mktemp -d "$out/work.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
tree=$work/tree root=$work/root
mkdir -p "$tree" "$root"

step "fetch the kernel and busybox"
# "extract": unpacked only, no maintainer script is run.
mmdebstrap --quiet --variant=extract --include=linux-image-cloud-amd64,busybox-static \
    --aptopt='APT::Install-Recommends "false"' "$suite" "$work/packages.tar" \
    "deb $mirror $suite main" \
    "deb $mirror $suite-updates main" \
    "deb $mirror-security $suite-security main"
tar -x -C "$tree" -f "$work/packages.tar" --wildcards --no-same-owner \
    './boot/vmlinuz-*' './lib/modules/*' './bin/busybox'
version=$(ls "$tree/lib/modules")
cp "$tree/boot/vmlinuz-$version" "$out/vmlinuz"
chmod 644 "$out/vmlinuz"

step "make the RAM disk of $version"
mkdir -p "$root"/{bin,dev,etc,mnt,proc,root,run,sys,tmp} "$root/lib/modules/$version"
cp "$tree/bin/busybox" "$root/bin/"
cp -r --no-preserve=ownership "$here/files/." "$root/"
# Each module after those it needs; init loads them in this order.
depmod -b "$tree" "$version"
for module in virtio_pci virtio_blk virtio_net virtio_console virtio_rng ext4 crc32c_generic; do
    modprobe -d "$tree" -S "$version" --show-depends "$module"
done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' > "$work/modules"
while read -r module; do
    cp "$module" "$root/lib/modules/$version/"
    basename "$module"
done < "$work/modules" > "$root/lib/modules/$version/order"
(cd "$root" && find . -mindepth 1 | LC_ALL=C sort | cpio --quiet -o -H newc --owner=0:0) > "$out/initrd.img"
step "done: $(du -h "$out/initrd.img" | cut -f 1) initrd.img"
