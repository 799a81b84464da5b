//! ELF kernels by PVH (Xen's docs/misc/pvh.pandoc; `struct hvm_start_info` in
//! xen/include/public/arch-x86/hvm/start_info.h).
//!
//! The entry is a physical address in a note of the file, in 32-bit mode without paging, with EBX at
//! the start info, which leads to command line, initrd, memory map and RSDP.

use linux_loader::loader::elf::start_info::XEN_HVM_START_MAGIC_VALUE;

use super::files::Source;
use super::{EntryState, Error, Target, at};

/// What an ELF file begins with.
pub(super) const MAGIC: &[u8] = b"\x7fELF";

const HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// XEN_ELFNOTE_PHYS32_ENTRY.
const PVH_NOTE: u32 = 18;
const PVH_OWNER: &[u8] = b"Xen\0";
/// A kernel's notes are some hundred bytes; more are not looked at.
const MAX_NOTES: u64 = 64 << 10;
/// A kernel has a handful of program headers.
const MAX_PROGRAM_HEADERS: u16 = 256;
/// The longest command line that Linux takes (COMMAND_LINE_SIZE), its final zero apart.
const MAX_COMMAND_LINE: usize = 2047;
const RBX: usize = 3;

/// Little-endian numbers at fixed places; what is not there is 0.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn number(&self, offset: usize, bytes: usize) -> u64 {
        let field = offset.checked_add(bytes).and_then(|end| self.0.get(offset..end));
        field.unwrap_or_default().iter().rev().fold(0, |value, &b| value << 8 | u64::from(b))
    }
    fn u16(&self, offset: usize) -> u16 {
        self.number(offset, 2) as u16
    }
    fn u32(&self, offset: usize) -> u32 {
        self.number(offset, 4) as u32
    }
    fn u64(&self, offset: usize) -> u64 {
        self.number(offset, 8)
    }
}

/// Loads the kernel.
pub(super) fn load(
    target: &Target<'_>,
    kernel: &mut Source,
    initrd: Option<Source>,
) -> Result<EntryState, Error> {
    let headers = program_headers(kernel)?;
    let mut entry = None;
    let mut end = at::KERNEL;
    for header in headers.chunks_exact(PROGRAM_HEADER as usize) {
        let header = Fields(header);
        match header.u32(0) {
            PT_LOAD => end = end.max(load_segment(target, kernel, &header)?),
            PT_NOTE if entry.is_none() => entry = find_entry(kernel, &header)?,
            _ => {}
        }
    }
    let Some(entry) = entry else {
        return Err(kernel.not_a_kernel("it is an ELF file without a PVH entry (CONFIG_PVH)"));
    };
    target.write_cmdline(kernel, MAX_COMMAND_LINE)?;
    let initrd =
        initrd.map(|initrd| target.load_initrd(initrd, end, u32::MAX.into())).transpose()?;
    write_start_info(target, initrd)?;
    let mut state = EntryState::protected_mode(target, entry.into())?;
    state.gprs[RBX] = at::PVH_INFO;
    Ok(state)
}

/// Checks the ELF header (ELF-64 Object File Format, 3) and reads the program headers.
fn program_headers(kernel: &mut Source) -> Result<Vec<u8>, Error> {
    kernel.require(HEADER)?;
    let bytes = kernel.read_at(0, HEADER)?;
    let header = Fields(&bytes);
    let refuse = |reason| Err(kernel.not_a_kernel(reason));
    if bytes[4] != CLASS_64 || bytes[5] != LITTLE_ENDIAN || header.u16(18) != X86_64 {
        return refuse("it is an ELF file, but not for x86-64");
    }
    let (offset, size, count) = (header.u64(32), header.u16(54), header.u16(56));
    if u64::from(size) != PROGRAM_HEADER || count == 0 || count > MAX_PROGRAM_HEADERS {
        return refuse("it is an ELF file without usable program headers");
    }
    kernel.read_at(offset, u64::from(count) * PROGRAM_HEADER)
}

/// Loads a PT_LOAD segment; returns where it ends.
fn load_segment(target: &Target<'_>, kernel: &Source, header: &Fields<'_>) -> Result<u64, Error> {
    let (offset, start) = (header.u64(8), header.u64(24));
    let (in_file, in_memory) = (header.u64(32), header.u64(40));
    if in_file > in_memory {
        return Err(kernel.not_a_kernel("a segment of it is larger in the file than in memory"));
    }
    let end = start.checked_add(in_memory).filter(|end| *end <= target.low_ram);
    let (Some(end), true) = (end, start >= at::KERNEL || in_memory == 0) else {
        let ends = target.low_ram;
        let why = format!("at {start:#x}, where memory for it is from 0x100000 to {ends:#x}");
        return Err(kernel.no_room(in_memory, why));
    };
    if in_memory == 0 {
        return Ok(0);
    }
    kernel.read_into(target.memory, offset, in_file, start)?;
    kernel.zero(target.memory, start + in_file, in_memory - in_file)?;
    Ok(end)
}

/// Looks for the PVH entry in a PT_NOTE segment.
fn find_entry(kernel: &mut Source, header: &Fields<'_>) -> Result<Option<u32>, Error> {
    let (offset, bytes) = (header.u64(8), header.u64(32));
    let notes = kernel.read_at(offset, bytes.min(MAX_NOTES))?;
    // Linux aligns names and contents of notes to 4 bytes even in 64-bit files.
    let mut rest = &notes[..];
    while rest.len() >= 12 {
        let note = Fields(rest);
        let (name_len, content_len) = (note.u32(0) as usize, note.u32(4) as usize);
        let content = 12usize.saturating_add(name_len.saturating_add(3) & !3);
        let next = content.saturating_add(content_len.saturating_add(3) & !3);
        let is_xen = rest.get(12..).is_some_and(|r| r.starts_with(PVH_OWNER));
        if note.u32(8) == PVH_NOTE && name_len == PVH_OWNER.len() && is_xen && content_len >= 4 {
            return Ok(rest.get(content..).map(|r| Fields(r).u32(0)));
        }
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(None)
}

/// The start info (version 1), its list of one module, and the memory map behind it.
fn write_start_info(target: &Target<'_>, initrd: Option<(u64, u64)>) -> Result<(), Error> {
    const INFO_BYTES: u64 = 56;
    const MODULE_BYTES: u64 = 32;
    const VERSION: u32 = 1;
    let modules = at::PVH_INFO + INFO_BYTES;
    let map = modules + MODULE_BYTES;
    let mut bytes = Vec::new();
    for value in [XEN_HVM_START_MAGIC_VALUE, VERSION, 0, u32::from(initrd.is_some())] {
        bytes.extend(value.to_le_bytes());
    }
    let modules = if initrd.is_some() { modules } else { 0 };
    for value in [modules, at::COMMAND_LINE, at::RSDP, map] {
        bytes.extend(value.to_le_bytes());
    }
    bytes.extend((target.map.len() as u32).to_le_bytes());
    bytes.extend([0; 4]);
    let (start, len) = initrd.unwrap_or_default();
    for value in [start, len, 0, 0] {
        bytes.extend(value.to_le_bytes());
    }
    for range in target.map {
        bytes.extend(range.start.to_le_bytes());
        bytes.extend(range.bytes.to_le_bytes());
        bytes.extend(range.kind.number().to_le_bytes());
        bytes.extend([0; 4]);
    }
    target.write("PVH start info", at::PVH_INFO, &bytes)
}
