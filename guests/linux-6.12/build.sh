#!/bin/bash
# The small Linux: Debian's 6.12 sources with a minimal configuration, for hosts whose KVM
# emulates guest kernels at a million instructions a second. It boots in tens of millions.
#
#   usage: build.sh OUT        needs no root; `cargo xtask guest linux-6.12` keeps the result
#   needs  the package linux-source-6.12, and 4 minutes of two cores
#   makes  OUT/vmlinux         ELF with a PVH entry: nothing to unpack at the start
#          OUT/bzImage
#          OUT/initrd.img      init.c alone: prints LODGE-INIT-READY, powers off
#          OUT/config          the whole configuration
set -euo pipefail

out=${1:?usage: build.sh OUT}
here=$(dirname "$(readlink -f "$0")")
source=${LODGE_LINUX_SOURCE:-/usr/src/linux-source-6.12.tar.xz}
for tool in gcc make flex bison bc cpio lz4 xz; do
    command -v "$tool" >/dev/null || { echo "guests/linux-6.12: missing tool: $tool" >&2; exit 1; }
done
[ -f "$source" ] || { echo "guests/linux-6.12: $source is missing: apt-get install linux-source-6.12" >&2; exit 1; }
step() { printf 'guests/linux-6.12: [%3ds] %s\n' "$SECONDS" "$*" >&2; }

mkdir -p "$out"
work=$(mktemp -d "$out/work.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
step "unpack"
tar -x -C "$work" -f "$source" --strip-components=1
step "configure"
make -s -C "$work" KCONFIG_ALLCONFIG="$here/config" allnoconfig >/dev/null
# kconfig drops a wish whose dependencies are missing, and says nothing: so say it here.
missing=$(grep -E '^CONFIG_' "$here/config" | grep -vxFf "$work/.config" || true)
[ -z "$missing" ] || { printf 'guests/linux-6.12: kconfig dropped:\n%s\n' "$missing" >&2; exit 1; }
step "build"
make -s -C "$work" -j"$(nproc)" KBUILD_BUILD_TIMESTAMP=@0 KBUILD_BUILD_USER=lodge \
    KBUILD_BUILD_HOST=lodge bzImage
cp "$work/arch/x86/boot/bzImage" "$out/bzImage"
objcopy --strip-all "$work/vmlinux" "$out/vmlinux"
cp "$work/.config" "$out/config"
step "RAM disk"
mkdir "$work/ramdisk"
gcc -O2 -Wall -Werror -static -nostdlib -ffreestanding -fno-stack-protector -fno-pie -no-pie \
    -Wl,--build-id=none -o "$work/ramdisk/init" "$here/init.c"
strip "$work/ramdisk/init"
(cd "$work/ramdisk" && echo init | cpio --quiet -o -H newc --owner=0:0) > "$out/initrd.img"
step "done: $(du -h "$out/vmlinux" | cut -f 1) vmlinux"
