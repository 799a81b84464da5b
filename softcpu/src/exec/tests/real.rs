use iced_x86::code_asm::*;

use crate::exec::testing::{CODE, HANDLERS, Machine};
use crate::fault::{Fault, vector};
use crate::flags;
use crate::state::{Activity, reg, seg};

#[test]
fn an_interrupt_and_its_return() {
    let mut m = Machine::real();
    m.cpu.sys_flags |= flags::IF | flags::TF;
    m.asm(|a| a.int(0x21).unwrap());
    m.run(1);
    assert_eq!(m.vector(), Some(0x21));
    assert!(!m.flag(flags::IF) && !m.flag(flags::TF));
    assert_eq!(m.stack16::<3>(), [CODE as u16 + 2, 0, 0x302]);
    m.asm(|a| a.iret().unwrap());
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.regs[reg::RSP]), (CODE + 2, 0x7000));
    assert!(m.flag(flags::IF) && m.flag(flags::TF));
}

#[test]
fn an_exception_has_no_error_code_and_returns_to_the_instruction() {
    let mut m = Machine::real();
    m.cpu.regs[reg::RBX] = 0xffff;
    m.asm(|a| a.mov(ax, word_ptr(bx)).unwrap());
    m.run(1);
    assert_eq!(m.vector(), Some(vector::GP.into()));
    assert_eq!(m.stack16::<2>(), [CODE as u16, 0]);
}

#[test]
fn the_stack_wraps() {
    let mut m = Machine::real();
    m.cpu.regs[reg::RSP] = 0xabcd_0002;
    m.asm(|a| {
        a.push(ax).unwrap();
        a.push(bx).unwrap();
    });
    m.cpu.regs[reg::RBX] = 0x5678;
    m.run(2);
    assert_eq!(m.cpu.regs[reg::RSP], 0xabcd_fffe);
    assert_eq!(m.get_u16(0xfffe), 0x5678);
}

#[test]
fn far_calls_and_returns() {
    let mut m = Machine::real();
    // call 0x0900:0x0010; there: retf 4
    m.code(&[0x9a, 0x10, 0x00, 0x00, 0x09]);
    m.put(0x9010, &[0xca, 0x04, 0x00]);
    m.run(1);
    assert_eq!(m.cpu.segs[seg::CS].base, 0x9000);
    assert_eq!(m.cpu.rip, 0x10);
    m.run(1);
    assert_eq!((m.cpu.segs[seg::CS].base, m.cpu.rip), (0, CODE + 5));
    assert_eq!(m.cpu.regs[reg::RSP], 0x7004);
}

#[test]
fn what_crosses_the_end_of_a_segment_faults() {
    let load = |m: &mut Machine, code: &[u8]| {
        m.code(code);
        let rip = m.cpu.rip;
        let result = m.step();
        m.cpu.rip = rip;
        result
    };
    let mut m = Machine::real();
    m.cpu.regs[reg::RBX] = 0xfffe;
    m.cpu.regs[reg::RBP] = 0xfffd;
    // mov ax, [bx]; [bx+1]; mov eax, [bx-2]; [bx-1]; mov al, [bx+1].
    assert_eq!(load(&mut m, &[0x8b, 0x07]), Ok(()));
    assert_eq!(load(&mut m, &[0x8b, 0x47, 1]), Err(Fault::GP0));
    assert_eq!(load(&mut m, &[0x66, 0x8b, 0x47, 0xfe]), Ok(()));
    assert_eq!(load(&mut m, &[0x66, 0x8b, 0x47, 0xff]), Err(Fault::GP0));
    assert_eq!(load(&mut m, &[0x8a, 0x47, 1]), Ok(()));
    // The stack's: mov eax, [bp]; push ax with SP 1; pop ax with SP FFFFH; lodsw, stosd, movsw.
    assert_eq!(load(&mut m, &[0x66, 0x8b, 0x46, 0]), Err(Fault::SS0));
    m.cpu.regs[reg::RSP] = 1;
    assert_eq!(load(&mut m, &[0x50]), Err(Fault::SS0));
    m.cpu.regs[reg::RSP] = 0xffff;
    assert_eq!(load(&mut m, &[0x58]), Err(Fault::SS0));
    assert_eq!(m.cpu.regs[reg::RSP], 0xffff);
    (m.cpu.regs[reg::RSI], m.cpu.regs[reg::RDI]) = (0xffff, 0xfffd);
    for code in [&[0xad][..], &[0x66, 0xab], &[0xa5], &[0xf3, 0xa5]] {
        m.cpu.regs[reg::RCX] = 1;
        assert_eq!(load(&mut m, code), Err(Fault::GP0), "{code:x?}");
    }
    // Addresses of 32 bits do not wrap: mov al, [ebx].
    m.cpu.regs[reg::RBX] = 0x1_0000;
    assert_eq!(load(&mut m, &[0x67, 0x8a, 0x03]), Err(Fault::GP0));
    // Code: its last byte may be at FFFFH; the next instruction is beyond.
    m.cpu.rip = 0xffff;
    m.code(&[0x90]);
    assert_eq!(m.step(), Ok(()));
    assert_eq!(m.cpu.rip, 0x1_0000);
    assert_eq!(m.step(), Err(Fault::GP0));
    m.cpu.rip = 0xffff;
    m.code(&[0xb0]);
    assert_eq!(m.step(), Err(Fault::GP0));
    // No room for the frame of that fault: no way on.
    m.cpu.regs[reg::RSP] = 3;
    m.run(1);
    assert_eq!(m.cpu.activity, Activity::Shutdown);
}

#[test]
fn a_jump_beyond_the_segment_faults() {
    let mut m = Machine::real();
    m.cpu.regs[reg::RAX] = 0x1_0000;
    m.asm(|a| a.jmp(eax).unwrap());
    assert_eq!(m.step(), Err(Fault::GP0));
}

#[test]
fn big_real_mode_keeps_the_limit() {
    let mut m = Machine::real();
    m.cpu.segs[seg::DS].limit = u32::MAX;
    m.cpu.regs[reg::RAX] = 0x100;
    m.cpu.regs[reg::RBX] = 0xf_0000;
    m.asm(|a| {
        a.mov(ds, ax).unwrap();
        a.mov(byte_ptr(ebx), 0x5a).unwrap();
    });
    m.run(2);
    assert_eq!(m.get::<1>(0xf_1000), [0x5a]);
}

#[test]
fn without_a_vector_table_the_processor_shuts_down() {
    let mut m = Machine::real();
    m.cpu.idtr.limit = 0;
    m.asm(|a| a.ud2().unwrap());
    m.run(1);
    assert_eq!(m.cpu.activity, Activity::Shutdown);
}

#[test]
fn an_external_interrupt_ends_hlt() {
    let mut m = Machine::real();
    m.cpu.sys_flags |= flags::IF;
    m.asm(|a| a.hlt().unwrap());
    m.run(1);
    assert_eq!((m.cpu.activity, m.cpu.rip), (Activity::Halted, CODE + 1));
    m.cpu.interrupt(8).unwrap();
    assert_eq!((m.cpu.activity, m.cpu.rip), (Activity::Running, HANDLERS + 0x80));
    assert_eq!(m.stack16::<1>(), [CODE as u16 + 1]);
}

#[test]
fn from_real_to_protected_mode_and_back() {
    let mut m = Machine::protected();
    // Undo what the machine did but for the GDT.
    m.cpu.cr0 &= !1;
    m.cpu.segs[seg::CS].attr = 0x9b;
    m.cpu.segs[seg::CS].load_real(0);
    m.cpu.segs[seg::DS].load_real(0);
    m.cpu.update_mode();
    assert_eq!(m.cpu.mode.bits, 16);
    m.asm(|a| {
        a.mov(eax, cr0).unwrap();
        a.or(al, 1).unwrap();
        a.mov(cr0, eax).unwrap();
        // jmp dword 08:8020
        a.db(&[0x66, 0xea, 0x20, 0x80, 0, 0, 8, 0]).unwrap();
    });
    m.run(4);
    assert_eq!((m.cpu.mode.bits, m.cpu.rip), (32, 0x8020));
    m.asm(|a| {
        a.mov(eax, cr0).unwrap();
        a.and(al, -2).unwrap();
        a.mov(cr0, eax).unwrap();
    });
    m.run(3);
    assert!(!m.cpu.mode.protected);
    // The code segment's size stays until CS is loaded.
    assert_eq!(m.cpu.mode.bits, 32);
}
