//! Tiny guests: a few instructions in an ELF file that starts through PVH.

const CODE_AT: u32 = 0x10_0000;
/// XEN_ELFNOTE_PHYS32_ENTRY of Xen's `include/public/elfnote.h`.
const PHYS32_ENTRY: u32 = 18;

/// An ELF64 file whose note names `code` as its PVH entry: 32-bit protected mode, paging off. The
/// code is at 1 MiB + 4 KiB.
pub fn pvh_payload(code: &[u8]) -> Vec<u8> {
    let entry = CODE_AT + 0x1000;
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for half in [2u16, 62] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes());
    for word in [u64::from(entry), 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 2, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let note_at = 64 + 2 * 56;
    let size = 0x1000 + code.len() as u64;
    let mut segment = |kind: u32, flags: u32, offset: u64, gpa: u64, size: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(flags.to_le_bytes());
        for word in [offset, gpa, gpa, size, size, 4] {
            file.extend(word.to_le_bytes());
        }
    };
    segment(1, 7, 0, CODE_AT.into(), size);
    segment(4, 4, note_at, u64::from(CODE_AT) + note_at, 20);
    for word in [4, 4, PHYS32_ENTRY] {
        file.extend(word.to_le_bytes());
    }
    file.extend(b"Xen\0");
    file.extend(entry.to_le_bytes());
    file.resize(0x1000, 0);
    file.extend(code);
    file
}
