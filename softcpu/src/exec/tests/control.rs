use crate::exec::testing::*;
use crate::fault::Fault;
use crate::state::cr;

#[test]
fn control_registers_refuse_what_cannot_be() {
    let mut m = Machine::long();
    let (cr0, cr4) = (m.cpu.cr0, m.cpu.cr4);
    // Paging without protection; write-through without caching off; the upper half.
    for value in [cr0 & !cr::CR0_PE, cr0 & !cr::CR0_CD | cr::CR0_NW, cr0 | 1 << 32] {
        assert_eq!(m.cpu.set_cr0(value), Err(Fault::GP0), "{value:x}");
    }
    // No way out of 64-bit code by clearing PG; nor out of long mode by clearing PAE.
    assert_eq!(m.cpu.set_cr0(cr0 & !cr::CR0_PG), Err(Fault::GP0));
    assert_eq!(m.cpu.set_cr4(cr4 & !cr::CR4_PAE), Err(Fault::GP0));
    // LA57, VMXE, SMXE, PKE, CET and what nobody has.
    for bit in [12, 13, 14, 15, 19, 22, 23, 24, 32, 63] {
        assert_eq!(m.cpu.set_cr4(cr4 | 1 << bit), Err(Fault::GP0), "bit {bit}");
    }
    // PCIDs only with one of 0.
    m.cpu.cr3 |= 5;
    assert_eq!(m.cpu.set_cr4(cr4 | cr::CR4_PCIDE), Err(Fault::GP0));
    assert_eq!(m.cpu.set_cr3(1 << 52), Err(Fault::GP0));
    assert_eq!((m.cpu.cr0, m.cpu.cr4), (cr0, cr4));
    // Bits of CR0 that nobody has are ignored, ET stays set.
    m.cpu.set_cr0(cr0 | 1 << 6 | 1 << 28).unwrap();
    assert_eq!(m.cpu.cr0, cr0 | cr::CR0_ET);
}

#[test]
fn xsetbv_takes_what_cpuid_tells() {
    let mut m = Machine::long();
    assert_eq!(m.cpu.set_xcr0(3), Ok(()));
    for value in [0, 2, 7, 1 << 62 | 3, 1 << 63 | 1] {
        assert_eq!(m.cpu.set_xcr0(value), Err(Fault::GP0), "{value:x}");
    }
    m.asm(|a| a.xsetbv().unwrap());
    assert_eq!(m.step(), Err(Fault::UD), "without CR4.OSXSAVE");
}
