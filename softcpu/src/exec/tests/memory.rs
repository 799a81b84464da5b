//! Page borders, stacks that are not there, breakpoints, invalidation.

use iced_x86::code_asm::*;

use crate::exec::testing::*;
use crate::fault::{Fault, vector};
use crate::flags;
use crate::state::{cr, reg};

const PF: u64 = vector::PF as u64;

#[test]
fn a_locked_access_across_pages() {
    let mut m = Machine::long();
    m.put_u64(0x9ffc, 0xffff_ffff);
    m.asm(|a| {
        a.lock().inc(qword_ptr(0x9ffc)).unwrap();
        a.lock().inc(qword_ptr(0x9ffc)).unwrap();
    });
    m.run(1);
    assert_eq!(m.get_u64(0x9ffc), 0x1_0000_0000);
    m.set_pte(0xa000, 0xa005);
    assert_eq!(m.step(), Err(Fault::with_error(vector::PF, 3)));
    assert_eq!(m.cpu.cr2, 0xa000);
    assert_eq!(m.get_u64(0x9ffc), 0x1_0000_0000);
}

#[test]
fn a_page_fault_on_the_inner_stack_is_the_supervisors() {
    let mut m = Machine::long().user();
    m.put_u64(TSS + 4, 0xb010);
    m.put_gate64(vector::PF, 1, 14, 0);
    m.put_u64(TSS + 0x24, STACK0);
    m.set_pte(0xa000, 0);
    m.asm(|a| a.int3().unwrap());
    // The frame of INT3 crosses into the missing page; its fault returns to INT3 itself, in ring 3.
    m.run(1);
    assert_eq!((m.vector(), m.cpu.cr2 & !0xfff), (Some(PF), 0xa000));
    let [error, from, code] = m.stack64::<3>();
    assert_eq!((error, from, code), (2, CODE, USER_CODE64.into()));
}

#[test]
fn an_inner_stack_beyond_its_limit_is_a_stack_fault_with_its_selector() {
    let mut m = Machine::protected().user();
    m.put_u64(GDT + u64::from(GATE), 0x0000_9200_0000_0fff);
    m.put(TSS + 4, &0x2000u32.to_le_bytes());
    m.put(TSS + 8, &[GATE as u8]);
    m.asm(|a| a.int(0x80).unwrap());
    assert_eq!(m.step(), Err(Fault::ss(GATE)));
    assert_eq!((m.cpu.mode.cpl, m.cpu.regs[reg::RSP]), (3, STACK3));
    // And an event from outside says EXT; here its own stack fault fails the same way.
    let second = m.cpu.interrupt(0x80);
    assert!(second.is_err());
}

#[test]
fn invlpg_forgets_a_large_page() {
    let mut m = Machine::long();
    // 2 MiB at 40000000h, onto the first page table's memory.
    m.put_u64(TABLES + 0x1008, (TABLES + 0x4000) | 7);
    m.put_u64(TABLES + 0x4000, 0x87);
    m.put(0x9000, &[0x11]);
    m.cpu.regs[reg::RBX] = 0x4000_9000;
    m.cpu.regs[reg::RDX] = 0x4010_0000;
    m.asm(|a| {
        a.mov(al, byte_ptr(rbx)).unwrap();
        a.invlpg(ptr(rdx)).unwrap();
        a.mov(al, byte_ptr(rbx)).unwrap();
    });
    m.run(1);
    assert_eq!(m.cpu.regs[reg::RAX], 0x11);
    m.put_u64(TABLES + 0x4000, 0);
    m.run(1);
    assert_eq!(m.step(), Err(Fault::with_error(vector::PF, 0)));
}

#[test]
fn invpcid_checks_its_operands() {
    let mut m = Machine::long();
    m.put_u64(0x9000, 5);
    m.put_u64(0x9008, 1 << 47);
    m.cpu.regs[reg::RBX] = 0x9000;
    m.asm(|a| a.invpcid(rax, xmmword_ptr(rbx)).unwrap());
    let mut with = |kind: u64| {
        m.cpu.regs[reg::RAX] = kind;
        m.cpu.rip = CODE;
        m.step()
    };
    // Without CR4.PCIDE only PCID 0 exists; kinds 2 and 3 have no operand to check.
    let faults = [0, 1, 2, 3, 4].map(|kind| with(kind).is_err());
    assert_eq!(faults, [true, true, false, false, true]);
}

#[test]
fn a_data_breakpoint_stops_a_string_after_the_element() {
    let mut m = Machine::protected();
    m.cpu.dr[0] = 0x9002;
    m.cpu.dr[7] |= 0x0001_0001;
    m.cpu.update_mode();
    m.cpu.regs[reg::RCX] = 4;
    m.cpu.regs[reg::RDI] = 0x9000;
    m.asm(|a| a.rep().stosb().unwrap());
    m.run(2);
    assert_eq!(m.cpu.pending_debug, 0);
    m.run(1);
    assert_eq!((m.cpu.pending_debug, m.cpu.regs[reg::RCX], m.cpu.rip), (1, 1, CODE));
    m.cpu.debug_trap().unwrap();
    assert_eq!((m.vector(), m.cpu.dr[6] & 15), (Some(vector::DB.into()), 1));
    // The handler comes back into the instruction, past its breakpoints.
    let [eip, _, image] = m.stack32::<3>();
    assert_eq!(eip, CODE as u32);
    assert_ne!(u64::from(image) & flags::RF, 0);
}

#[test]
fn an_alignment_check_in_ring_3() {
    let mut m = Machine::long().user();
    m.cpu.cr0 |= cr::CR0_AM;
    m.cpu.change_flags(flags::AC, flags::AC);
    m.asm(|a| a.mov(eax, dword_ptr(0x9002)).unwrap());
    assert_eq!(m.step(), Err(Fault::with_error(vector::AC, 0)));
    m.asm(|a| a.mov(ax, word_ptr(0x9002)).unwrap());
    assert_eq!(m.step(), Ok(()));
}

#[test]
fn a_store_across_a_page_border_happens_as_a_whole() {
    let mut m = Machine::long();
    m.set_pte(0xa000, 0);
    m.put(0x9ffe, &[0x77; 2]);
    m.cpu.regs[reg::RAX] = 0x1122_3344;
    m.asm(|a| a.mov(dword_ptr(0x9ffe), eax).unwrap());
    m.run(1);
    assert_eq!((m.vector(), m.cpu.cr2), (Some(PF), 0xa000));
    assert_eq!(m.get::<2>(0x9ffe), [0x77; 2]);
}

#[test]
fn lmsw_sets_but_does_not_clear_pe() {
    let mut m = Machine::protected();
    m.cpu.regs[reg::RAX] = 8;
    m.asm(|a| {
        a.lmsw(ax).unwrap();
        a.smsw(ecx).unwrap();
        a.clts().unwrap();
    });
    m.run(2);
    assert_eq!(m.cpu.regs[reg::RCX] & 0xf, 9);
    m.run(1);
    assert_eq!(m.cpu.cr0 & cr::CR0_TS, 0);
}

#[test]
fn mov_ss_and_lss() {
    let mut m = Machine::protected();
    m.put(0x9000, &[0x00, 0x50, 0, 0, DATA16 as u8, 0]);
    m.cpu.regs[reg::RAX] = DATA16.into();
    m.asm(|a| {
        a.lss(esp, fword_ptr(0x9000)).unwrap();
        a.mov(ss, eax).unwrap();
        a.push(ecx).unwrap();
    });
    m.run(1);
    assert_eq!((m.cpu.regs[reg::RSP], m.cpu.mode.stack_mask), (0x5000, 0xffff));
    assert!(!m.cpu.inhibit.shadow);
    m.run(1);
    assert!(m.cpu.inhibit.shadow);
    // A 16-bit stack wraps at 64 KiB; a dword at FFFEh is beyond the limit.
    m.cpu.regs[reg::RSP] = 0xabcd_0002;
    assert_eq!(m.step(), Err(Fault::SS0));
    m.cpu.regs[reg::RSP] = 0xabcd_0000;
    assert_eq!(m.step(), Ok(()));
    assert_eq!(m.cpu.regs[reg::RSP], 0xabcd_fffc);
}
