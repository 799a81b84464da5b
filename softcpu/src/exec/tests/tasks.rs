use iced_x86::code_asm::*;

use crate::events::DR6_BT;
use crate::exec::testing::*;
use crate::fault::{Fault, vector};
use crate::flags;
use crate::state::{cr, reg, seg};

/// Fills the second TSS: a task in ring 0 at `eip`.
fn second_task(m: &mut Machine, eip: u32) {
    let mut put = |at: u64, value: u32| m.put(TSS2 + at, &value.to_le_bytes());
    put(0x20, eip);
    put(0x24, 0x202);
    put(0x28, 0xaaaa);
    put(0x38, 0x7800);
    for (i, selector) in [DATA32, CODE32, DATA32, DATA32, 0, 0].into_iter().enumerate() {
        put(0x48 + 4 * i as u64, selector.into());
    }
}

fn busy(m: &mut Machine, selector: u16) -> bool {
    m.get::<6>(GDT + u64::from(selector))[5] & 2 != 0
}

#[test]
fn a_call_to_a_task_and_iret_back() {
    let mut m = Machine::protected();
    second_task(&mut m, 0x9000);
    m.cpu.regs[reg::RAX] = 0x1234;
    m.code(&[0x9a, 0, 0, 0, 0, TSS2_SELECTOR as u8, 0]);
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.regs[reg::RSP]), (0x9000, 0x7800));
    assert_eq!((m.cpu.regs[reg::RAX], m.cpu.tr.selector), (0xaaaa, TSS2_SELECTOR));
    assert!(m.flag(flags::NT) && m.flag(flags::IF));
    assert_ne!(m.cpu.cr0 & cr::CR0_TS, 0);
    assert!(busy(&mut m, TSS_SELECTOR) && busy(&mut m, TSS2_SELECTOR));
    assert_eq!(m.get_u16(TSS2), TSS_SELECTOR);
    assert_eq!((m.get_u32(TSS + 0x20), m.get_u32(TSS + 0x28)), (CODE as u32 + 7, 0x1234));
    m.asm(|a| a.iretd().unwrap());
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.regs[reg::RAX]), (CODE + 7, 0x1234));
    assert_eq!(m.cpu.tr.selector, TSS_SELECTOR);
    assert!(busy(&mut m, TSS_SELECTOR) && !busy(&mut m, TSS2_SELECTOR));
    // The nested task's own image has NT cleared.
    assert_eq!(u64::from(m.get_u32(TSS2 + 0x24)) & flags::NT, 0);
    assert!(!m.flag(flags::NT));
}

#[test]
fn a_jump_to_a_task_leaves_the_old_one() {
    let mut m = Machine::protected();
    second_task(&mut m, 0x9000);
    m.code(&[0xea, 0, 0, 0, 0, TSS2_SELECTOR as u8, 0]);
    m.run(1);
    assert!(!busy(&mut m, TSS_SELECTOR) && busy(&mut m, TSS2_SELECTOR));
    assert!(!m.flag(flags::NT));
}

#[test]
fn a_busy_task_cannot_be_entered() {
    let mut m = Machine::protected();
    m.code(&[0xea, 0, 0, 0, 0, TSS_SELECTOR as u8, 0]);
    m.run(1);
    assert_eq!(m.vector(), Some(vector::GP.into()));
    assert_eq!(m.stack32::<1>(), [u32::from(TSS_SELECTOR)]);
}

#[test]
fn a_fault_through_a_task_gate_has_its_error_code_there() {
    let mut m = Machine::protected().user();
    second_task(&mut m, 0x9000);
    m.put_gate32(vector::GP, TSS2_SELECTOR, 0, 5, 0);
    m.asm(|a| a.hlt().unwrap());
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.mode.cpl), (0x9000, 0));
    assert_eq!((m.cpu.regs[reg::RSP], m.stack32::<1>()), (0x77fc, [0]));
    // The old task goes on at the instruction, in ring 3.
    assert_eq!(m.get_u32(TSS + 0x20), CODE as u32);
    assert_ne!(u64::from(m.get_u32(TSS + 0x24)) & flags::RF, 0);
    assert_eq!(m.get_u16(TSS + 0x4c), USER_CODE32);
    m.asm(|a| {
        a.add(esp, 4).unwrap();
        a.iretd().unwrap();
    });
    m.run(2);
    assert_eq!((m.cpu.rip, m.cpu.mode.cpl), (CODE, 3));
}

#[test]
fn a_bad_segment_is_the_new_tasks_fault() {
    let mut m = Machine::protected();
    second_task(&mut m, 0x9000);
    m.put(TSS2 + 0x54, &[0xf8]);
    m.code(&[0x9a, 0, 0, 0, 0, TSS2_SELECTOR as u8, 0]);
    m.run(1);
    assert_eq!(m.vector(), Some(vector::TS.into()));
    let [error, eip] = m.stack32::<2>();
    assert_eq!((error, eip), (0xf8, 0x9000));
    assert_eq!(m.cpu.tr.selector, TSS2_SELECTOR);
}

#[test]
fn a_16_bit_task() {
    let mut m = Machine::protected();
    m.put_u64(GDT + u64::from(TSS2_SELECTOR), system_descriptor(TSS2, 0x2b, 1, 0));
    let mut put = |at: u64, value: u16| m.put(TSS2 + at, &value.to_le_bytes());
    put(0x0e, 0x9000);
    put(0x10, 0x0002);
    put(0x12, 0xbeef);
    put(0x1a, 0x7800);
    for (i, selector) in [DATA16, CODE16, DATA16, DATA16].into_iter().enumerate() {
        put(0x22 + 2 * i as u64, selector);
    }
    m.code(&[0xea, 0, 0, 0, 0, TSS2_SELECTOR as u8, 0]);
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.mode.bits), (0x9000, 16));
    assert_eq!((m.cpu.regs[reg::RAX] & 0xffff, m.cpu.sp()), (0xbeef, 0x7800));
    assert_eq!(m.cpu.segs[seg::FS].selector, 0);
}

#[test]
fn a_task_gate_leads_to_the_gdt_only() {
    let mut m = Machine::protected();
    for selector in [TSS2_SELECTOR | 4, 4] {
        m.put_u64(GDT + u64::from(GATE), gate(selector, 0, 5, 3));
        m.code(&[0x9a, 0, 0, 0, 0, GATE as u8, 0]);
        assert_eq!(m.step(), Err(Fault::gp(selector)));
    }
}

#[test]
fn a_task_may_run_in_an_inner_conforming_segment() {
    let mut m = Machine::protected();
    second_task(&mut m, 0x9000);
    m.put_u64(GDT + u64::from(GATE), 0x00cf_9e00_0000_ffff);
    for (field, selector) in [(0x48u64, USER_DATA), (0x4c, GATE | 3), (0x50, USER_DATA)] {
        m.put(TSS2 + field, &selector.to_le_bytes());
    }
    m.put(TSS2 + 0x54, &[0]);
    m.code(&[0xea, 0, 0, 0, 0, TSS2_SELECTOR as u8, 0]);
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.mode.cpl, m.cpu.segs[seg::CS].selector), (0x9000, 3, GATE | 3));
}

#[test]
fn debugging_over_a_task_switch() {
    let mut m = Machine::protected();
    second_task(&mut m, 0x9000);
    // Global breakpoints stay, local ones go; the T bit traps before the first instruction.
    m.cpu.dr[7] |= 0x3ff;
    m.put(TSS2 + 0x64, &[1]);
    m.code(&[0xea, 0, 0, 0, 0, TSS2_SELECTOR as u8, 0]);
    m.run(1);
    assert_eq!(m.cpu.dr[7] & 0x3ff, 0x2aa);
    assert_eq!(m.cpu.pending_debug, DR6_BT);
    m.cpu.debug_trap().unwrap();
    assert_eq!((m.vector(), m.stack32::<1>()), (Some(vector::DB.into()), [0x9000]));
    assert_eq!(m.cpu.dr[6] & DR6_BT, DR6_BT);
}
