use iced_x86::code_asm::*;

use crate::exec::testing::*;
use crate::fault::{Fault, vector};
use crate::flags;
use crate::state::{cr, reg, seg};

/// Enters virtual-8086 mode at 0900:0000 with SS:SP 0A00:0100 by IRET.
fn v86(iopl: u32) -> Machine {
    let mut m = Machine::protected();
    m.asm(|a| {
        for value in [0x6666u32, 0x5555, 0x4444, 0x3333, 0xa00, 0x100] {
            a.push(value as i32).unwrap();
        }
        a.push(0x20202 | (iopl << 12) as i32).unwrap();
        a.push(0x900).unwrap();
        a.push(0).unwrap();
        a.iretd().unwrap();
    });
    m.run(10);
    m
}

#[test]
fn iret_enters_it() {
    let m = v86(0);
    assert!(m.cpu.mode.v86);
    assert_eq!((m.cpu.mode.bits, m.cpu.mode.cpl), (16, 3));
    let bases = [0x3333u64, 0x900, 0xa00, 0x4444, 0x5555, 0x6666].map(|s| s << 4);
    assert_eq!(m.cpu.segs.map(|s| s.base), bases);
    assert_eq!((m.cpu.rip, m.cpu.sp()), (0, 0x100));
}

#[test]
fn sensitive_instructions_go_to_the_monitor() {
    let mut m = v86(0);
    for code in [&[0xfa][..], &[0xcd, 0x21], &[0xcf], &[0x9c], &[0x9d], &[0xf4]] {
        m.code(code);
        assert_eq!(m.step(), Err(Fault::GP0));
    }
    m.run(1);
    assert_eq!(m.vector(), Some(vector::GP.into()));
    assert!(!m.cpu.mode.v86);
    let frame = m.stack32::<10>();
    let image = 0x3_0202;
    assert_eq!(frame, [0, 0, 0x900, image, 0x100, 0xa00, 0x3333, 0x4444, 0x5555, 0x6666]);
    assert_eq!(m.cpu.segs[seg::DS].selector, 0);
    // And back.
    m.asm(|a| {
        a.add(esp, 4).unwrap();
        a.iretd().unwrap();
    });
    m.run(2);
    assert!(m.cpu.mode.v86);
    assert_eq!(m.cpu.segs[seg::GS].base, 0x6_6660);
}

#[test]
fn with_iopl_3_interrupts_go_through_the_idt() {
    let mut m = v86(3);
    m.code(&[0xfa, 0xcd, 0x21]);
    m.run(1);
    assert!(!m.flag(flags::IF));
    m.run(1);
    assert_eq!((m.vector(), m.cpu.mode.cpl), (Some(0x21), 0));
    assert_eq!(m.stack32::<1>(), [3]);
}

#[test]
fn with_vme_the_program_handles_its_own_interrupts() {
    let mut m = v86(0);
    m.cpu.cr4 |= cr::CR4_VME;
    m.cpu.sys_flags |= flags::VIF;
    m.cpu.tr.limit = 0x88 + 0x20;
    // The redirection map lies below the I/O map; all zero.
    m.put(TSS + 0x66, &[0x88]);
    m.put(TSS + 0x68, &[0; 0x20]);
    m.put(0x21 * 4, &[0x34, 0x00, 0x00, 0x0b]);
    m.code(&[0xcd, 0x21]);
    m.run(1);
    assert!(m.cpu.mode.v86);
    assert_eq!((m.cpu.segs[seg::CS].base, m.cpu.rip), (0xb000, 0x34));
    assert!(!m.flag(flags::VIF) && m.flag(flags::IF));
    assert_eq!(m.get_u16(0xa0fe), 0x3202);
    assert_eq!(m.cpu.regs[reg::RSP], 0xfa);
    // A bit set sends it to the monitor, by IOPL.
    m.put(TSS + 0x68 + 4, &[2]);
    m.code(&[0xcd, 0x21]);
    assert_eq!(m.step(), Err(Fault::GP0));
}

#[test]
fn only_ring_0_enters_it() {
    let mut m = Machine::protected().user();
    m.asm(|a| {
        a.push(0x2_0002).unwrap();
        a.push(i32::from(USER_CODE32)).unwrap();
        a.push(0x9000).unwrap();
        a.iretd().unwrap();
    });
    m.run(4);
    assert_eq!((m.cpu.mode.v86, m.cpu.rip, m.cpu.mode.cpl), (false, 0x9000, 3));
}

#[test]
fn its_instruction_pointer_has_16_bits() {
    let mut m = Machine::protected();
    m.asm(|a| {
        for value in [0u32, 0, 0, 0, 0xa00, 0x100, 0x2_0002, 0x900, 0x1_0000] {
            a.push(value as i32).unwrap();
        }
        a.iretd().unwrap();
    });
    m.run(9);
    assert_eq!(m.step(), Err(Fault::GP0));
    let mut m = v86(3);
    m.asm(|a| {
        for value in [2u32, 0x900, 0x1_0010] {
            a.mov(eax, value).unwrap();
            a.push(eax).unwrap();
        }
        a.iretd().unwrap();
    });
    m.run(6);
    assert_eq!(m.step(), Err(Fault::GP0));
}
