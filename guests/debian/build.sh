#!/bin/bash
# The Debian 12 guest: a disk image that boots three ways, and a kernel beside it.
#
#   usage: build.sh OUT        as root; `cargo xtask guest debian` calls it and keeps the result
#   makes  OUT/disk.qcow2      GPT: 1 BIOS-boot (GRUB), 2 ESP (GRUB), 3 ext4 root
#          OUT/vmlinuz, OUT/initrd.img     to boot it directly with root=LABEL=lodge-root
#
# No loop device and no mount of the image: `mke2fs -d` fills the file system, mtools the ESP, and
# the boot sectors are written as bytes. Root is needed because the tree keeps real owners and
# Debian's maintainer scripts run in it (chroot).
#
# What is unusual in the guest, all to be quick on a slow CPU: no cloud-init, an initramfs with
# the few modules a virtio machine needs and without udev, no periodic jobs, sshd by its socket,
# the journal in memory, machine-id and host keys made here and not at the first boot.
# Log in as root with the password root; the passwords are for tests, never put it on a network.
set -euo pipefail

out=${1:?usage: build.sh OUT}
here=$(dirname "$(readlink -f "$0")")
suite=bookworm
size_mib=4096
root_uuid=5d1f7a52-7c5b-4e0c-9f3e-10d6e0000012
esp_volid=10D6E012
disk_guid=10d6e000-0000-4000-8000-000000000012
# The first sectors of the partitions, and the sizes of the fixed ones, in sectors of 512 bytes.
bios_start=2048 bios_size=2048
esp_start=4096 esp_size=131072
root_start=135168

# shellcheck source=../mirror.sh
. "$here/../mirror.sh"
for tool in mmdebstrap sfdisk mkfs.vfat mmd mcopy mke2fs qemu-img python3; do
    command -v "$tool" >/dev/null || { echo "guests/debian: missing tool: $tool" >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "guests/debian: must run as root (chroot, file owners)" >&2; exit 1; }
step() { printf 'guests/debian: [%3ds] %s\n' "$SECONDS" "$*" >&2; }

mkdir -p "$out"
work=$(mktemp -d "$out/work.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
tree=$work/tree
# Packages' own directories must be open to all (mktemp's is not).
chmod 755 "$work"

# ------------------------------------------------------------------------------------ packages
packages=systemd,systemd-sysv,systemd-resolved,udev,dbus,libpam-systemd,kmod,procps,iproute2
packages+=,iputils-ping,openssh-server,linux-image-cloud-amd64,initramfs-tools,python3,curl
packages+=,ca-certificates,pciutils,less,fdisk,ethtool
packages+=,grub-common,grub2-common,grub-pc-bin,grub-efi-amd64-bin
step "install Debian ($suite) into a directory"
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
mmdebstrap --quiet --mode=root --variant=minbase --include="$packages" \
    --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --aptopt='APT::Install-Recommends "false"' \
    --aptopt='APT::Sandbox::User "root"' \
    --essential-hook="cp -r '$here/files/etc/initramfs-tools' \"\$1/etc/\"" \
    "$suite" "$tree" \
    "deb $mirror $suite main" \
    "deb $mirror $suite-updates main" \
    "deb $mirror-security $suite-security main"

# ------------------------------------------------------------------------------------ settings
step "settings"
in_tree() { chroot "$tree" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 "$@"; }
cp -r --no-preserve=ownership "$here/files/." "$tree/"
sed -i "s/@ROOT_UUID@/$root_uuid/; s/@ESP_VOLID@/${esp_volid:0:4}-${esp_volid:4}/" "$tree/etc/fstab"
echo 'root:root' | in_tree chpasswd
in_tree systemctl -q enable systemd-networkd ssh.socket
in_tree systemctl -q disable ssh.service
in_tree systemctl -q mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
    e2scrub_all.timer e2scrub_reap.service fstrim.timer systemd-networkd-wait-online.service \
    systemd-pstore.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount \
    sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount \
    sys-fs-fuse-connections.mount dev-mqueue.mount dev-hugepages.mount kmod-static-nodes.service \
    systemd-network-generator.service systemd-random-seed.service systemd-modules-load.service \
    modprobe@configfs.service modprobe@fuse.service modprobe@dm_mod.service \
    modprobe@drm.service modprobe@loop.service modprobe@efi_pstore.service
# The login prompt waits for neither the resolver nor the network; both come up beside it.
units=$tree/lib/systemd/system
sed 's/sysinit\.target/multi-user.target/; /^Before=multi-user/d' "$units/systemd-resolved.service" \
    > "$tree/etc/systemd/system/systemd-resolved.service"
sed 's/ network\.target//' "$units/systemd-user-sessions.service" \
    > "$tree/etc/systemd/system/systemd-user-sessions.service"
in_tree systemctl -q reenable systemd-resolved
ln -sf ../run/systemd/resolve/stub-resolv.conf "$tree/etc/resolv.conf"
# An identity now, and not at each first boot of each copy.
in_tree systemd-machine-id-setup >/dev/null 2>&1
rm -f "$tree/var/lib/dbus/machine-id"
# The builder's mirror is not the guest's.
printf 'deb http://deb.debian.org/debian %s main\n' "$suite" "$suite-updates" > "$tree/etc/apt/sources.list"
printf 'deb http://deb.debian.org/debian-security %s-security main\n' "$suite" >> "$tree/etc/apt/sources.list"
in_tree update-initramfs -u >/dev/null 2>&1
rm -rf "$tree"/var/cache/apt/*.bin "$tree"/var/cache/apt/archives/*.deb "$tree"/var/lib/apt/lists/* \
    "$tree"/var/log/*.log "$tree"/var/log/apt/*
# "Updated": systemd need not rebuild its databases at the first boot.
touch "$tree/etc/.updated" "$tree/var/.updated"

# ------------------------------------------------------------------------------------ boot loader
step "boot loader"
mkdir -p "$tree/boot/efi" "$tree/boot/grub" "$tree/tmp/grub"
sed "s/@ROOT_UUID@/$root_uuid/" "$here/grub.cfg" > "$tree/boot/grub/grub.cfg"
printf 'search.fs_uuid %s root\nset prefix=($root)/boot/grub\n' "$root_uuid" > "$tree/tmp/grub/load.cfg"
modules="part_gpt ext2 search search_fs_uuid normal configfile linux serial terminal test echo ls cat reboot halt"
# shellcheck disable=SC2086
in_tree grub-mkimage -O i386-pc -c /tmp/grub/load.cfg -p /boot/grub -o /tmp/grub/core.img biosdisk $modules
# shellcheck disable=SC2086
in_tree grub-mkimage -O x86_64-efi -c /tmp/grub/load.cfg -p /boot/grub -o /tmp/grub/bootx64.efi fat efi_gop $modules
cp -r "$tree/usr/lib/grub/i386-pc" "$tree/usr/lib/grub/x86_64-efi" "$tree/boot/grub/"
rm -f "$tree"/boot/grub/*/*.module "$tree"/boot/grub/*/kernel.exec
cp "$tree"/tmp/grub/core.img "$tree"/tmp/grub/bootx64.efi "$tree"/usr/lib/grub/i386-pc/boot.img "$work/"
rm -rf "$tree/tmp/grub"
cp "$tree"/boot/vmlinuz-* "$out/vmlinuz"
cp "$tree"/boot/initrd.img-* "$out/initrd.img"

# ------------------------------------------------------------------------------------ the disk
step "disk image"
raw=$work/disk.raw
truncate -s "${size_mib}M" "$raw"
sfdisk -q "$raw" <<F
label: gpt
label-id: $disk_guid
unit: sectors
1 : start=$bios_start, size=$bios_size, type=21686148-6449-6E6F-744E-656564454649, name=biosboot
2 : start=$esp_start, size=$esp_size, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name=esp
3 : start=$root_start, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, name=root
F
truncate -s $((esp_size * 512)) "$work/esp.img"
mkfs.vfat -F 32 -n ESP -i "$esp_volid" "$work/esp.img" >/dev/null
mmd -i "$work/esp.img" ::/EFI ::/EFI/BOOT ::/EFI/debian
mcopy -i "$work/esp.img" "$work/bootx64.efi" ::/EFI/BOOT/BOOTX64.EFI
mcopy -i "$work/esp.img" "$work/bootx64.efi" ::/EFI/debian/grubx64.efi
dd if="$work/esp.img" of="$raw" bs=512 seek=$esp_start conv=notrunc,sparse status=none
root_size=$(sfdisk -q -J "$raw" | python3 -c 'import json,sys; print(json.load(sys.stdin)["partitiontable"]["partitions"][2]["size"])')
mke2fs -q -F -t ext4 -L lodge-root -U "$root_uuid" -m 1 -d "$tree" \
    -E offset=$((root_start * 512)),lazy_itable_init=0 "$raw" $((root_size / 8 * 4))k
python3 "$here/bios-boot.py" "$raw" "$work/boot.img" "$work/core.img" $bios_start $bios_size
qemu-img convert -O qcow2 "$raw" "$out/disk.qcow2"
step "done: $(du -h "$out/disk.qcow2" | cut -f 1) disk.qcow2"
