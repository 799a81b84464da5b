use iced_x86::code_asm::*;

use crate::exec::testing::*;
use crate::fault::{Fault, vector};
use crate::flags;
use crate::state::{Activity, reg, seg};

const GP: u64 = vector::GP as u64;

#[test]
fn an_interrupt_from_ring_3_switches_stacks_and_iret_goes_back() {
    let mut m = Machine::protected().user();
    m.cpu.sys_flags |= flags::IF;
    m.asm(|a| a.int(0x80).unwrap());
    m.run(1);
    assert_eq!(m.vector(), Some(0x80));
    assert_eq!((m.cpu.mode.cpl, m.cpu.segs[seg::SS].selector), (0, DATA32));
    let frame = [CODE as u32 + 2, USER_CODE32.into(), 0x202, STACK3 as u32, USER_DATA.into()];
    assert_eq!(m.stack32::<5>(), frame);
    assert!(!m.flag(flags::IF));
    // A data segment of ring 0 is taken away on the way out.
    m.asm(|a| {
        a.mov(eax, u32::from(DATA32)).unwrap();
        a.mov(fs, eax).unwrap();
        a.iretd().unwrap();
    });
    m.run(3);
    assert_eq!((m.cpu.rip, m.cpu.mode.cpl, m.cpu.regs[reg::RSP]), (CODE + 2, 3, STACK3));
    assert!(m.flag(flags::IF));
    assert_eq!(m.cpu.segs[seg::FS].selector, 0);
    assert_eq!(m.cpu.segs[seg::DS].selector, USER_DATA);
}

#[test]
fn a_fault_pushes_its_error_code_and_rf() {
    let mut m = Machine::protected().user();
    m.asm(|a| a.cli().unwrap());
    m.run(1);
    assert_eq!(m.vector(), Some(GP));
    let [error, eip, _, image] = m.stack32::<4>();
    assert_eq!((error, eip), (0, CODE as u32));
    assert_ne!(u64::from(image) & flags::RF, 0);
}

#[test]
fn a_gate_of_too_high_privilege_and_an_absent_one() {
    let mut m = Machine::protected().user();
    m.put_gate32(0x30, CODE32, HANDLERS, 14, 0);
    m.asm(|a| a.int(0x30).unwrap());
    assert_eq!(m.step(), Err(Fault::with_error(vector::GP, 0x30 << 3 | 2)));
    let absent = gate(CODE32, HANDLERS, 14, 3) & !(0x80 << 40);
    m.put_u64(IDT + 0x30 * 8, absent);
    assert_eq!(m.step(), Err(Fault::with_error(vector::NP, 0x30 << 3 | 2)));
    // An external interrupt ignores the gate's level and says EXT.
    m.cpu.interrupt(0x30).unwrap();
    assert_eq!(m.vector(), Some(vector::NP.into()));
    assert_eq!(m.stack32::<1>(), [0x30 << 3 | 3]);
}

#[test]
fn a_trap_gate_leaves_if_and_a_16_bit_gate_pushes_words() {
    let mut m = Machine::protected();
    m.cpu.sys_flags |= flags::IF;
    m.put_gate32(0x31, CODE32, HANDLERS, 7, 0);
    m.asm(|a| a.int(0x31).unwrap());
    m.run(1);
    assert!(m.flag(flags::IF));
    assert_eq!(m.stack16::<3>(), [CODE as u16 + 2, CODE32, 0x202]);
    assert_eq!(m.cpu.regs[reg::RSP], STACK0 - 6);
}

#[test]
fn a_double_fault_then_shutdown() {
    let mut m = Machine::protected();
    m.put_u64(IDT + 8 * GP, 0);
    m.asm(|a| a.db(&[0x2e, 0x88, 0x00]).unwrap());
    m.run(1);
    assert_eq!(m.vector(), Some(vector::DF.into()));
    assert_eq!(m.stack32::<2>(), [0, CODE as u32]);
    m.put_u64(IDT + 8 * u64::from(vector::DF), 0);
    m.cpu.rip = CODE;
    m.run(1);
    assert_eq!(m.cpu.activity, Activity::Shutdown);
}

#[test]
fn a_call_gate_copies_parameters_to_the_inner_stack() {
    let mut m = Machine::protected().user();
    m.put_u64(GDT + u64::from(GATE), gate(CODE32, 0x9000, 12, 3) | 2 << 32);
    m.asm(|a| {
        a.push(0x11).unwrap();
        a.push(0x22).unwrap();
        a.db(&[0x9a, 0, 0, 0, 0, GATE as u8 | 3, 0]).unwrap();
    });
    m.run(3);
    assert_eq!((m.cpu.rip, m.cpu.mode.cpl), (0x9000, 0));
    let frame =
        [CODE as u32 + 11, USER_CODE32.into(), 0x22, 0x11, STACK3 as u32 - 8, USER_DATA.into()];
    assert_eq!(m.stack32::<6>(), frame);
    m.asm(|a| a.retf_1(8).unwrap());
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.mode.cpl), (CODE + 11, 3));
    // Both stacks have lost the parameters.
    assert_eq!(m.cpu.regs[reg::RSP], STACK3);
    assert_eq!(m.cpu.segs[seg::SS].selector, USER_DATA);
}

#[test]
fn a_call_gate_to_conforming_code_keeps_the_level() {
    let mut m = Machine::protected().user();
    m.put_u64(GDT + u64::from(CODE16), 0x00cf_9e00_0000_ffff);
    m.put_u64(GDT + u64::from(GATE), gate(CODE16, 0x9000, 12, 3));
    m.code(&[0x9a, 0, 0, 0, 0, GATE as u8 | 3, 0]);
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.mode.cpl), (0x9000, 3));
    assert_eq!(m.cpu.segs[seg::CS].selector, CODE16 | 3);
    assert_eq!(m.stack32::<2>(), [CODE as u32 + 7, USER_CODE32.into()]);
}

#[test]
fn a_jump_through_a_gate_to_what_is_absent() {
    let mut m = Machine::protected();
    m.put_u64(GDT + u64::from(CODE16), 0x00cf_1a00_0000_ffff);
    m.put_u64(GDT + u64::from(GATE), gate(CODE16, 0x9000, 12, 3));
    m.code(&[0xea, 0, 0, 0, 0, GATE as u8, 0]);
    assert_eq!(m.step(), Err(Fault::np(CODE16)));
}

#[test]
fn a_call_gate_with_a_bad_inner_stack_is_a_tss_fault() {
    let mut m = Machine::protected().user();
    m.put_u64(GDT + u64::from(GATE), gate(CODE32, 0x9000, 12, 3));
    m.put(TSS + 8, &[USER_DATA as u8]);
    m.code(&[0x9a, 0, 0, 0, 0, GATE as u8 | 3, 0]);
    assert_eq!(m.step(), Err(Fault::ts(USER_DATA)));
    m.put(TSS + 8, &[DATA32 as u8]);
    m.cpu.tr.limit = 9;
    assert_eq!(m.step(), Err(Fault::ts(TSS_SELECTOR)));
    assert_eq!((m.cpu.mode.cpl, m.cpu.regs[reg::RSP]), (3, STACK3));
}

#[test]
fn a_far_jump_checks_the_target() {
    let mut m = Machine::protected().user();
    let jump = |selector: u16| [0xea, 0, 0x90, 0, 0, selector as u8, 0];
    for (selector, fault) in [
        (0, Fault::GP0),
        (CODE32, Fault::gp(CODE32)),
        (USER_DATA, Fault::gp(USER_DATA)),
        (0xf8, Fault::gp(0xf8)),
    ] {
        m.code(&jump(selector));
        assert_eq!(m.step(), Err(fault));
    }
    // A conforming segment of ring 0 runs at ring 3.
    m.put_u64(GDT + u64::from(GATE), 0x00cf_9e00_0000_ffff);
    m.code(&jump(GATE));
    m.run(1);
    assert_eq!((m.cpu.mode.cpl, m.cpu.segs[seg::CS].selector), (3, GATE | 3));
    assert_eq!(m.cpu.rip, 0x9000);
    // Its descriptor is marked accessed.
    assert_eq!(m.get::<6>(GDT + u64::from(GATE))[5], 0x9f);
}

#[test]
fn segment_loads_are_checked() {
    let mut m = Machine::protected().user();
    let load = |m: &mut Machine, index: usize, selector: u16| m.cpu.load_segment(index, selector);
    assert_eq!(load(&mut m, seg::SS, 0), Err(Fault::GP0));
    assert_eq!(load(&mut m, seg::SS, DATA32), Err(Fault::gp(DATA32)));
    assert_eq!(load(&mut m, seg::DS, DATA32), Err(Fault::gp(DATA32)));
    assert_eq!(load(&mut m, seg::DS, USER_CODE32), Ok(()));
    assert_eq!(load(&mut m, seg::DS, 0), Ok(()));
    m.asm(|a| a.mov(al, byte_ptr(0x9000)).unwrap());
    assert_eq!(m.step(), Err(Fault::GP0));
    // Not present.
    m.put_u64(GDT + u64::from(GATE), 0x00cf_7200_0000_ffff);
    assert_eq!(load(&mut m, seg::DS, GATE | 3), Err(Fault::np(GATE)));
    assert_eq!(load(&mut m, seg::SS, GATE | 3), Err(Fault::ss(GATE)));
}

#[test]
fn limits_of_expand_down_segments() {
    let mut m = Machine::protected();
    // Expand-down, byte granularity, limit FFFh, 16-bit: valid from 1000h to FFFFh.
    m.put_u64(GDT + u64::from(GATE), 0x0000_9600_0000_0fff);
    m.cpu.load_segment(seg::DS, GATE).unwrap();
    let read = |m: &mut Machine, at: u32| {
        m.asm(|a| a.mov(ax, word_ptr(at)).unwrap());
        let rip = m.cpu.rip;
        let result = m.step();
        m.cpu.rip = rip;
        result
    };
    assert_eq!(read(&mut m, 0xfff), Err(Fault::GP0));
    assert_eq!(read(&mut m, 0x1000), Ok(()));
    assert_eq!(read(&mut m, 0xfffe), Ok(()));
    assert_eq!(read(&mut m, 0xffff), Err(Fault::GP0));
}

#[test]
fn ports_by_iopl_and_map() {
    let mut m = Machine::protected().user();
    m.cpu.regs[reg::RDX] = 0x83;
    m.asm(|a| a.in_(ax, dx).unwrap());
    assert_eq!(m.step(), Err(Fault::GP0));
    m.set_iopl(3);
    assert_eq!(m.step(), Ok(()));
    m.set_iopl(0);
    m.cpu.rip = CODE;
    // The map follows the TSS: ports 83h and 84h are bits 3 and 4 of byte 10h.
    m.cpu.tr.limit = 0x68 + 0x20;
    m.put(TSS + 0x68, &[0xff; 0x21]);
    m.put(TSS + 0x68 + 0x10, &[!0x18]);
    assert_eq!(m.step(), Ok(()));
    m.cpu.rip = CODE;
    m.put(TSS + 0x68 + 0x10, &[!0x08]);
    assert_eq!(m.step(), Err(Fault::GP0));
}

#[test]
fn sysenter_and_sysexit() {
    let mut m = Machine::protected().user();
    m.cpu.msrs.sysenter_cs = CODE32.into();
    m.cpu.msrs.sysenter_esp = STACK0;
    m.cpu.msrs.sysenter_eip = 0x9000;
    m.asm(|a| a.sysenter().unwrap());
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.mode.cpl, m.cpu.regs[reg::RSP]), (0x9000, 0, STACK0));
    m.cpu.regs[reg::RDX] = CODE;
    m.cpu.regs[reg::RCX] = STACK3;
    m.asm(|a| a.sysexit().unwrap());
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.mode.cpl, m.cpu.regs[reg::RSP]), (CODE, 3, STACK3));
    assert_eq!(m.cpu.segs[seg::CS].selector, USER_CODE32);
}

#[test]
fn what_lar_lsl_verr_and_verw_see() {
    let mut m = Machine::protected().user();
    m.cpu.regs[reg::RCX] = DATA32.into();
    m.cpu.regs[reg::RDX] = USER_DATA.into();
    m.cpu.regs[reg::RBX] = USER_CODE32.into();
    m.asm(|a| {
        a.lar(eax, ecx).unwrap();
        a.lar(eax, edx).unwrap();
        a.lsl(esi, edx).unwrap();
        a.verw(bx).unwrap();
        a.verr(bx).unwrap();
        a.verw(dx).unwrap();
    });
    let mut seen = Vec::new();
    for _ in 0..6 {
        m.run(1);
        seen.push(m.flag(flags::ZF));
    }
    assert_eq!(seen, [false, true, true, false, true, true]);
    assert_eq!((m.cpu.regs[reg::RAX], m.cpu.regs[reg::RSI]), (0xc0_f200, 0xffff_ffff));
}

#[test]
fn debug_registers_under_general_detect() {
    let mut m = Machine::protected();
    m.cpu.dr[7] |= 1 << 13;
    m.asm(|a| a.mov(dr0, eax).unwrap());
    m.run(1);
    assert_eq!(m.vector(), Some(vector::DB.into()));
    assert_eq!((m.cpu.dr[6] & 0x2000, m.cpu.dr[7] & 0x2000), (0x2000, 0));
    assert_eq!(m.stack32::<1>(), [CODE as u32]);
}

#[test]
fn a_single_step_trap_points_behind_the_instruction() {
    let mut m = Machine::protected();
    m.asm(|a| a.nop().unwrap());
    m.cpu.sys_flags |= flags::TF;
    m.run(1);
    m.cpu.pending_debug |= crate::events::DR6_BS;
    m.cpu.debug_trap().unwrap();
    assert_eq!(m.vector(), Some(vector::DB.into()));
    let [eip, _, image] = m.stack32::<3>();
    assert_eq!((eip, image), (CODE as u32 + 1, 0x102));
    assert!(!m.flag(flags::TF));
    assert_eq!((m.cpu.dr[6] & 0x4000, m.cpu.pending_debug), (0x4000, 0));
}
