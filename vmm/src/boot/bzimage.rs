//! bzImage kernels by the Linux boot protocol (Documentation/arch/x86/boot.rst in Linux).
//!
//! ```text
//!   file:   setup code and header (setup_sects + 1 sectors) | protected-mode code (syssize)
//!   guest:  zero page with the header at 1F1                | at `load`, entered at load + 200H
//! ```

use linux_loader::loader::bootparam::{
    LOADED_HIGH, XLF_KERNEL_64, boot_e820_entry, boot_params, setup_header,
};
use vm_memory::ByteValued;

use super::files::Source;
use super::{EntryState, Error, Target, at};

const HEADER: usize = 0x1f1;
/// The header's magic number "HdrS", and the word AA55H before it.
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// The header ends where its first instruction, a short jump, leads to.
const JUMP: usize = 0x200;
const AFTER_JUMP: usize = JUMP + 2;
const SECTOR: u64 = 512;
const DEFAULT_SETUP_SECTORS: u8 = 4;
/// Paragraphs in `syssize`.
const PARAGRAPH: u64 = 16;
const OLDEST: u16 = 0x0206;
/// From this version on the header has `pref_address` and `init_size`; from the next `xloadflags`.
const WITH_INIT_SIZE: u16 = 0x020a;
const WITH_XLOADFLAGS: u16 = 0x020c;
/// The 64-bit entry's offset in the protected-mode code.
const ENTRY_64: u64 = 0x200;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const VIDEO_MODE_NORMAL: u16 = 0xffff;
const RSI: usize = 6;

/// Loads the kernel whose first bytes are `head`.
pub(super) fn load(
    target: &Target<'_>,
    kernel: &mut Source,
    head: &[u8],
    initrd: Option<Source>,
) -> Result<EntryState, Error> {
    let header = parse(kernel, head)?;
    let sectors = if header.setup_sects == 0 { DEFAULT_SETUP_SECTORS } else { header.setup_sects };
    let setup = (u64::from(sectors) + 1) * SECTOR;
    let syssize = header.syssize;
    let code = u64::from(syssize) * PARAGRAPH;
    // syssize is rounded up to a paragraph, the file need not be.
    kernel.require((setup + code).saturating_sub(PARAGRAPH - 1))?;
    let code = code.min(kernel.bytes().saturating_sub(setup));
    if code == 0 {
        return Err(kernel.not_a_kernel("there is no code after its setup header"));
    }
    let (load, end) = place(target, kernel, &header, code)?;
    kernel.read_into(target.memory, setup, code, load)?;
    target.write_cmdline(kernel, header.cmdline_size as usize)?;

    let mut params = boot_params { hdr: header, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.vid_mode = VIDEO_MODE_NORMAL;
    params.hdr.code32_start = load as u32;
    params.hdr.cmd_line_ptr = at::COMMAND_LINE as u32;
    params.acpi_rsdp_addr = at::RSDP;
    if let Some(initrd) = initrd {
        let (start, bytes) = target.load_initrd(initrd, end, header.initrd_addr_max.into())?;
        // Both are below 4 GiB, as low RAM is.
        params.hdr.ramdisk_image = start as u32;
        params.hdr.ramdisk_size = bytes as u32;
    }
    fill_e820(&mut params, target);
    target.write("zero page", at::ZERO_PAGE, params.as_slice())?;

    let mut entry = if is_64_bit(&header) {
        EntryState::long_mode(target, load + ENTRY_64)?
    } else {
        EntryState::protected_mode(target, load)?
    };
    entry.gprs[RSI] = at::ZERO_PAGE;
    Ok(entry)
}

/// The setup header, as far as this kernel has it.
fn parse(kernel: &Source, head: &[u8]) -> Result<setup_header, Error> {
    let refuse = |reason| Err(kernel.not_a_kernel(reason));
    let magic =
        |offset: usize, bytes: &[u8]| head.get(offset..).is_some_and(|h| h.starts_with(bytes));
    if magic(0x1fe, &BOOT_FLAG.to_le_bytes()) && magic(AFTER_JUMP, &HEADER_MAGIC.to_le_bytes()) {
        let mut header = setup_header::default();
        let bytes = header.as_mut_slice();
        let end = AFTER_JUMP + usize::from(head.get(JUMP + 1).copied().unwrap_or(0));
        let have = head.get(HEADER..end.min(head.len())).unwrap_or_default();
        let len = have.len().min(bytes.len());
        bytes[..len].copy_from_slice(&have[..len]);
        return check(kernel, header);
    }
    match () {
        () if head.is_empty() => refuse("it is empty"),
        () if magic(0, &[0x1f, 0x8b]) => refuse("it is compressed with gzip; decompress it first"),
        () if magic(0x38, b"ARM\x64") => refuse("it is a kernel for ARM"),
        () if magic(0, b"MZ") => refuse("it is an EFI program without a Linux setup header"),
        () => refuse("it has no Linux setup header"),
    }
}

fn check(kernel: &Source, header: setup_header) -> Result<setup_header, Error> {
    let [minor, major] = header.version.to_le_bytes();
    if header.version < OLDEST {
        return Err(Error::TooOld { path: kernel.path().into(), major, minor });
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(kernel.not_a_kernel("it is a zImage, which is loaded below 1 MiB"));
    }
    Ok(header)
}

fn is_64_bit(header: &setup_header) -> bool {
    header.version >= WITH_XLOADFLAGS && header.xloadflags & XLF_KERNEL_64 != 0
}

/// Where the code goes, and the end of the memory that it uses before it knows the memory map.
fn place(
    target: &Target<'_>,
    kernel: &Source,
    header: &setup_header,
    code: u64,
) -> Result<(u64, u64), Error> {
    let modern = header.version >= WITH_INIT_SIZE;
    let needs = if modern { code.max(header.init_size.into()) } else { code };
    let preferred = if modern { header.pref_address } else { at::KERNEL };
    let fits = |load: u64| {
        load.checked_add(needs).filter(|end| load >= at::KERNEL && *end <= target.low_ram)
    };
    if let Some(end) = fits(preferred) {
        return Ok((preferred, end));
    }
    // A relocatable kernel runs at any address with its alignment.
    let alignment = u64::from(header.kernel_alignment).max(1);
    let lowest = at::KERNEL.next_multiple_of(alignment);
    if header.relocatable_kernel != 0
        && let Some(end) = fits(lowest)
    {
        return Ok((lowest, end));
    }
    let ends = target.low_ram;
    Err(kernel.no_room(needs, format!("it starts at {preferred:#x}, memory ends at {ends:#x}")))
}

fn fill_e820(params: &mut boot_params, target: &Target<'_>) {
    let mut table = params.e820_table;
    let mut count = 0;
    // A machine has some ten ranges; the zero page has room for 128.
    for (slot, range) in table.iter_mut().zip(target.map) {
        *slot =
            boot_e820_entry { addr: range.start, size: range.bytes, r#type: range.kind.number() };
        count += 1;
    }
    params.e820_table = table;
    params.e820_entries = count;
}
