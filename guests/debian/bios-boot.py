"""Writes GRUB's BIOS boot code into a GPT disk image.

usage: bios-boot.py IMAGE BOOT_IMG CORE_IMG FIRST_SECTOR SECTORS

What grub-bios-setup does on a real disk:
- boot.img goes into the MBR's code (bytes 0 to 0x1b7). At 0x5c it holds the first sector of
  core.img as 64 bits; the two bytes at 0x66 are a jump that is patched out for hard disks, so
  that the BIOS's drive number is trusted.
- core.img goes into the BIOS-boot partition. Its first sector ends in a block list of
  {u64 sector, u16 count, u16 segment} for the rest of it.
"""

import struct
import sys

SECTOR = 512


def main():
    image, boot_path, core_path = sys.argv[1:4]
    first, room = int(sys.argv[4]), int(sys.argv[5])
    with open(boot_path, "rb") as file:
        boot = bytearray(file.read())
    with open(core_path, "rb") as file:
        core = bytearray(file.read())
    core += bytes(-len(core) % SECTOR)
    count = len(core) // SECTOR
    if len(boot) != SECTOR or not 2 <= count <= room:
        sys.exit(f"bios-boot: boot.img has {len(boot)} bytes, core.img {count} of {room} sectors")
    struct.pack_into("<Q", boot, 0x5C, first)
    boot[0x66:0x68] = b"\x90\x90"
    struct.pack_into("<QHH", core, SECTOR - 12, first + 1, count - 1, 0x820)
    with open(image, "r+b") as file:
        mbr = bytearray(file.read(SECTOR))
        mbr[0:0x1B8] = boot[0:0x1B8]
        mbr[0x1FE:0x200] = b"\x55\xaa"
        file.seek(0)
        file.write(mbr)
        file.seek(first * SECTOR)
        file.write(core)


main()
