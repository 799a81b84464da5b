//! How the boot processor starts: registers, descriptors and page tables.

use lodge_accel::state::{Activity, Segment, TableRegister, VcpuState};

use super::{Error, Target, at};

/// The registers in which a kernel is entered; all others stay as after a reset.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EntryState {
    /// General-purpose registers in the encoding's order.
    pub gprs: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Code segment.
    pub code: Segment,
    /// All data segments.
    pub data: Segment,
    /// Task register.
    pub task: Segment,
    /// Global descriptor table.
    pub gdtr: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS' bit that is always set; interrupts are off.
const RFLAGS: u64 = 1 << 1;

/// The Linux boot protocol's selectors, __BOOT_CS and __BOOT_DS.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
/// Descriptor bits 40..56: present, code or data, and the granularity and size bits.
const CODE_64: u16 = 0xa09b;
const CODE_32: u16 = 0xc09b;
const DATA: u16 = 0xc093;
const BUSY_TASK: u16 = 0x008b;
const TASK_LIMIT: u32 = 0x67;

const CS: usize = 1;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
const TABLE: u64 = 4096;
/// 4 GiB are mapped, a page directory for each.
const DIRECTORIES: u64 = 4;
const ENTRIES: u64 = 512;

fn segment(selector: u16, attributes: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attributes }
}

/// A descriptor in memory (SDM volume 3, 3.4.5). Those here have base 0.
fn descriptor(segment: &Segment) -> u64 {
    let pages = segment.attributes & 1 << 15 != 0;
    let limit = u64::from(if pages { segment.limit >> 12 } else { segment.limit });
    limit & 0xffff | (limit >> 16 & 0xf) << 48 | u64::from(segment.attributes) << 40
}

impl EntryState {
    /// 64-bit mode, memory mapped one to one.
    pub(super) fn long_mode(target: &Target<'_>, rip: u64) -> Result<Self, Error> {
        target.write("page tables", at::PAGE_TABLES, &page_tables())?;
        let mut this = Self::new(target, CODE_64, rip)?;
        this.cr0 |= CR0_PG;
        this.cr3 = at::PAGE_TABLES;
        this.cr4 = CR4_PAE;
        this.efer = EFER_LME | EFER_LMA;
        Ok(this)
    }

    /// 32-bit protected mode without paging.
    pub(super) fn protected_mode(target: &Target<'_>, rip: u64) -> Result<Self, Error> {
        Self::new(target, CODE_32, rip)
    }

    fn new(target: &Target<'_>, code: u16, rip: u64) -> Result<Self, Error> {
        let code = segment(CODE_SELECTOR, code);
        let data = segment(DATA_SELECTOR, DATA);
        let task = Segment { limit: TASK_LIMIT, ..segment(TASK_SELECTOR, BUSY_TASK) };
        // A task descriptor is 16 bytes long in 64-bit mode.
        let gdt = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task), 0];
        let bytes: Vec<u8> = gdt.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        target.write("descriptor table", at::GDT, &bytes)?;
        let gdtr = TableRegister { base: at::GDT, limit: bytes.len() as u16 - 1 };
        let cr0 = CR0_PE | CR0_ET;
        Ok(Self { rip, code, data, task, gdtr, cr0, ..Self::default() })
    }

    /// Puts the registers into `state`, which is the boot processor's after a reset.
    pub fn apply(&self, state: &mut VcpuState) {
        state.gprs = self.gprs;
        state.rip = self.rip;
        state.rflags = RFLAGS;
        state.segments = [self.data; 6];
        state.segments[CS] = self.code;
        state.ldtr = Segment::default();
        state.tr = self.task;
        state.gdtr = self.gdtr;
        state.idtr = TableRegister::default();
        state.cr0 = self.cr0;
        state.cr2 = 0;
        state.cr3 = self.cr3;
        state.cr4 = self.cr4;
        state.efer = self.efer;
        state.activity = Activity::Running;
    }
}

/// Leaves a processor as firmware would, the others as well as the boot processor: all memory is write-back unless
/// the page tables say otherwise (IA32_MTRR_DEF_TYPE, SDM volume 3, 12.11.2.1).
pub fn prepare(state: &mut VcpuState) {
    const MTRR_DEF_TYPE: u32 = 0x2ff;
    const ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
    state.msrs.retain(|(index, _)| *index != MTRR_DEF_TYPE);
    state.msrs.push((MTRR_DEF_TYPE, ENABLED_WRITE_BACK));
}

/// The first 4 GiB one to one, in pages of 2 MiB.
fn page_tables() -> Vec<u8> {
    let pml4 = [(at::PAGE_TABLES + TABLE) | PRESENT_WRITABLE];
    let first_directory = at::PAGE_TABLES + 2 * TABLE;
    let pointers = (0..DIRECTORIES).map(|i| (first_directory + i * TABLE) | PRESENT_WRITABLE);
    let pages = (0..DIRECTORIES * ENTRIES).map(|i| i << 21 | LARGE_PAGE | PRESENT_WRITABLE);
    let padded = |entries: &mut dyn Iterator<Item = u64>| {
        entries.chain(std::iter::repeat(0)).take(ENTRIES as usize).collect::<Vec<_>>()
    };
    let tables = [padded(&mut pml4.into_iter()), padded(&mut pointers.into_iter())];
    tables.into_iter().flatten().chain(pages).flat_map(u64::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_ones() {
        assert_eq!(descriptor(&segment(0, CODE_64)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(0, CODE_32)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(0, DATA)), 0x00cf_9300_0000_ffff);
        let task = Segment { limit: TASK_LIMIT, ..segment(0, BUSY_TASK) };
        assert_eq!(descriptor(&task), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn page_tables_map_every_address_to_itself() {
        let bytes = page_tables();
        assert_eq!(bytes.len() as u64, (2 + DIRECTORIES) * TABLE);
        assert!(at::PAGE_TABLES + bytes.len() as u64 <= at::COMMAND_LINE);
        let entry = |table: u64, index: u64| {
            let offset = (table - at::PAGE_TABLES + index * 8) as usize;
            u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
        };
        for address in [0u64, 0x20_0000, 0x3fff_ffff, 0x4000_0000, 0xb000_1234, 0xffff_ffff] {
            let mut table = at::PAGE_TABLES;
            for shift in [39, 30] {
                let next = entry(table, address >> shift & 511);
                assert_eq!(next & 0xfff, PRESENT_WRITABLE);
                table = next & !0xfff;
            }
            let page = entry(table, address >> 21 & 511);
            assert_eq!(page, address & !0x1f_ffff | LARGE_PAGE | PRESENT_WRITABLE);
        }
        assert_eq!(entry(at::PAGE_TABLES, 1), 0);
    }
}
