use iced_x86::code_asm::*;

use crate::exec::testing::*;
use crate::fault::{Fault, vector};
use crate::flags;
use crate::state::{Activity, cr, reg, seg};

const PF: u64 = vector::PF as u64;

#[test]
fn an_interrupt_from_ring_3_and_iretq() {
    let mut m = Machine::long().user();
    m.cpu.regs[reg::RSP] = STACK3 - 3;
    m.put_u64(TSS + 4, STACK0 + 8);
    m.asm(|a| a.int(0x80).unwrap());
    m.run(1);
    assert_eq!((m.vector(), m.cpu.mode.cpl), (Some(0x80), 0));
    // The stack is aligned to 16 bytes first; SS is null.
    assert_eq!(m.cpu.regs[reg::RSP], STACK0 - 40);
    assert_eq!(m.cpu.segs[seg::SS].selector, 0);
    let frame = [CODE + 2, USER_CODE64.into(), 2, STACK3 - 3, USER_DATA.into()];
    assert_eq!(m.stack64::<5>(), frame);
    m.asm(|a| a.iretq().unwrap());
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.mode.cpl), (CODE + 2, 3));
    assert_eq!(m.cpu.regs[reg::RSP], STACK3 - 3);
}

#[test]
fn page_faults_say_what_was_tried() {
    let mut m = Machine::long().user();
    m.cpu.cr4 |= cr::CR4_SMEP;
    let fault = |m: &mut Machine, pte: u64, code: &[u8], error: u64| {
        m.set_pte(0x9000, pte);
        m.cpu.rip = CODE;
        m.code(code);
        m.cpu.regs[reg::RBX] = 0x9123;
        let saved = (m.cpu.segs[seg::CS], m.cpu.segs[seg::SS]);
        m.run(1);
        assert_eq!(m.vector(), Some(PF));
        assert_eq!((m.stack64::<1>(), m.cpu.cr2), ([error], 0x9123));
        (m.cpu.segs[seg::CS], m.cpu.segs[seg::SS]) = saved;
        m.cpu.regs[reg::RSP] = STACK3;
        m.cpu.update_mode();
    };
    let (load, store, jump) = ([0x8a, 0x03], [0x88, 0x03], [0xff, 0xe3]);
    fault(&mut m, 0, &load, 4);
    fault(&mut m, 0, &store, 6);
    fault(&mut m, 0x9003, &load, 5);
    fault(&mut m, 0x9005, &store, 7);
    fault(&mut m, 0x9007 | 1 << 45, &load, 0xd);
    // The jump itself is fine; the fetch at its target faults.
    m.set_pte(0x9000, 0x9007 | 1 << 63);
    m.cpu.rip = CODE;
    m.code(&jump);
    m.run(2);
    assert_eq!((m.vector(), m.stack64::<2>()), (Some(PF), [0x15, 0x9123]));
}

#[test]
fn a_page_fault_while_delivering_one_is_a_double_fault() {
    let mut m = Machine::long().user();
    m.put_u64(TSS + 4, 0xa000);
    m.put_gate64(vector::DF, 1, 14, 0);
    m.put_u64(TSS + 0x24, STACK0);
    m.set_pte(0x9000, 0);
    m.cpu.regs[reg::RBX] = 0x9000;
    m.asm(|a| a.mov(al, byte_ptr(rbx)).unwrap());
    m.run(1);
    assert_eq!(m.vector(), Some(vector::DF.into()));
    assert_eq!(m.stack64::<2>(), [0, CODE]);
    assert_eq!(m.cpu.regs[reg::RSP], STACK0 - 48);
    // The stack page that was missing is the last one to be named.
    assert_eq!(m.cpu.cr2 & !0xfff, 0x9000);
}

#[test]
fn a_triple_fault() {
    let mut m = Machine::long();
    m.cpu.idtr.limit = 0;
    m.asm(|a| a.ud2().unwrap());
    m.run(1);
    assert_eq!(m.cpu.activity, Activity::Shutdown);
}

#[test]
fn syscall_and_sysret() {
    let mut m = Machine::long().user();
    m.cpu.msrs.star = u64::from(USER_CODE32 - 3 - 0x10) << 48 | u64::from(CODE64) << 32;
    m.cpu.msrs.lstar = 0x9000;
    m.cpu.msrs.sfmask = flags::IF | flags::DF;
    m.cpu.sys_flags |= flags::IF | flags::DF | flags::NT;
    m.asm(|a| a.syscall().unwrap());
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.mode.cpl, m.cpu.mode.bits), (0x9000, 0, 64));
    assert_eq!((m.cpu.regs[reg::RCX], m.cpu.regs[reg::R11]), (CODE + 2, 0x4602));
    assert!(!m.flag(flags::IF) && !m.flag(flags::DF) && m.flag(flags::NT));
    m.asm(|a| a.sysretq().unwrap());
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.mode.cpl, m.cpu.mode.bits), (CODE + 2, 3, 64));
    assert_eq!(m.cpu.rflags(), 0x4602);
    assert_eq!(m.cpu.segs[seg::CS].selector, USER_CODE32);
}

#[test]
fn a_non_canonical_address_faults_by_segment() {
    let mut m = Machine::long();
    m.cpu.regs[reg::RBX] = 1 << 47;
    m.cpu.regs[reg::RBP] = 1 << 47;
    m.asm(|a| a.mov(al, byte_ptr(rbx)).unwrap());
    assert_eq!(m.step(), Err(Fault::GP0));
    m.asm(|a| a.mov(al, byte_ptr(rbp)).unwrap());
    assert_eq!(m.step(), Err(Fault::SS0));
    m.asm(|a| a.jmp(rbx).unwrap());
    assert_eq!(m.step(), Err(Fault::GP0));
}

#[test]
fn user_pages_under_smap() {
    let mut m = Machine::long();
    for page in 0..256 {
        m.put_u64(Machine::pte(page << 12), page << 12 | 3);
    }
    m.set_pte(0x9000, 0x9007);
    m.cpu.cr4 |= cr::CR4_SMAP;
    m.cpu.update_mode();
    m.cpu.regs[reg::RBX] = 0x9000;
    m.asm(|a| {
        a.stac().unwrap();
        a.mov(al, byte_ptr(rbx)).unwrap();
        a.clac().unwrap();
        a.mov(al, byte_ptr(rbx)).unwrap();
    });
    m.run(3);
    assert_eq!(m.step(), Err(Fault::with_error(vector::PF, 1)));
}

#[test]
fn a_far_return_to_compatibility_mode() {
    let mut m = Machine::long();
    m.asm(|a| {
        a.push(i32::from(USER_DATA)).unwrap();
        a.push(STACK3 as i32).unwrap();
        a.push(i32::from(USER_CODE32)).unwrap();
        a.push(0x9000).unwrap();
        a.db(&[0x48, 0xcb]).unwrap();
    });
    m.run(5);
    assert_eq!((m.cpu.rip, m.cpu.mode.bits, m.cpu.mode.cpl), (0x9000, 32, 3));
    // 32-bit code takes interrupts to 64-bit handlers.
    m.asm(|a| a.int3().unwrap());
    m.run(1);
    assert_eq!((m.vector(), m.cpu.mode.bits), (Some(3), 64));
    assert_eq!(m.stack64::<2>(), [0x9001, USER_CODE32.into()]);
}

#[test]
fn a_call_gate_of_16_bytes() {
    let mut m = Machine::long().user();
    m.put_u64(GDT + u64::from(GATE), gate(CODE64, 0x9000, 12, 3));
    m.put_u64(GDT + u64::from(GATE) + 8, 0);
    m.put_u64(0xa000, u64::from(GATE | 3) << 32);
    // call far m16:32 at a000h
    m.code(&[0xff, 0x1c, 0x25, 0, 0xa0, 0, 0]);
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.mode.cpl), (0x9000, 0));
    let frame = [CODE + 7, USER_CODE64.into(), STACK3, USER_DATA.into()];
    assert_eq!(m.stack64::<4>(), frame);
    m.asm(|a| a.db(&[0x48, 0xcb]).unwrap());
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.mode.cpl, m.cpu.regs[reg::RSP]), (CODE + 7, 3, STACK3));
}

#[test]
fn entering_long_mode_from_protected_mode() {
    let mut m = Machine::long();
    // Back to 32-bit code without paging, then in again as a kernel does it.
    m.cpu.efer = 0;
    m.cpu.cr0 &= !cr::CR0_PG;
    m.cpu.cr4 = 0;
    m.cpu.segs[seg::CS] = m.cpu.descriptor(CODE32).unwrap().unwrap().segment(CODE32);
    m.cpu.update_mode();
    m.asm(|a| {
        a.mov(eax, 0x20).unwrap();
        a.mov(cr4, eax).unwrap();
        a.mov(ecx, 0xc000_0080u32).unwrap();
        a.mov(eax, 0x100).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.mov(eax, cr0).unwrap();
        a.or(eax, 0x8000_0000u32 as i32).unwrap();
        a.mov(cr0, eax).unwrap();
        a.db(&[0xea, 0, 0x90, 0, 0, CODE64 as u8, 0]).unwrap();
    });
    m.run(9);
    assert!(m.cpu.mode.long && m.cpu.mode.bits == 32);
    m.run(1);
    assert_eq!((m.cpu.mode.bits, m.cpu.rip), (64, 0x9000));
    assert_ne!(m.cpu.efer & cr::EFER_LMA, 0);
}

#[test]
fn an_nmi_is_blocked_until_iret() {
    let mut m = Machine::long();
    m.cpu.nmi().unwrap();
    assert!(m.cpu.inhibit.nmi);
    assert_eq!(m.vector(), Some(2));
    m.asm(|a| a.iretq().unwrap());
    m.run(1);
    assert!(!m.cpu.inhibit.nmi);
    assert_eq!(m.cpu.rip, CODE);
}

#[test]
fn control_registers_refuse_nonsense() {
    let mut m = Machine::long();
    let now = m.cpu.cr0;
    assert_eq!(m.cpu.set_cr0(now & !cr::CR0_PE), Err(Fault::GP0));
    assert_eq!(m.cpu.set_cr0(now & !cr::CR0_PG), Err(Fault::GP0));
    assert_eq!(m.cpu.set_cr0(now | 1 << 32), Err(Fault::GP0));
    assert_eq!(m.cpu.set_cr4(0), Err(Fault::GP0));
    assert_eq!(m.cpu.set_cr4(cr::CR4_PAE | 1 << 30), Err(Fault::GP0));
    assert_eq!(m.cpu.set_cr3(1 << 50), Err(Fault::GP0));
    assert_eq!(m.cpu.set_cr8(16), Err(Fault::GP0));
    assert_eq!(m.cpu.set_cr4(cr::CR4_PAE | cr::CR4_PCIDE), Ok(()));
    assert_eq!(m.cpu.set_cr3(TABLES | 5 | 1 << 63), Ok(()));
    assert_eq!(m.cpu.cr3, TABLES | 5);
}

#[test]
fn swapgs_and_the_base_instructions() {
    let mut m = Machine::long();
    m.cpu.msrs.kernel_gs_base = 0x5000;
    m.cpu.regs[reg::RAX] = 0x7777;
    m.asm(|a| {
        a.wrgsbase(rax).unwrap();
        a.swapgs().unwrap();
        a.rdgsbase(rcx).unwrap();
    });
    assert_eq!(m.step(), Err(Fault::UD));
    m.cpu.cr4 |= cr::CR4_FSGSBASE;
    m.run(3);
    assert_eq!((m.cpu.regs[reg::RCX], m.cpu.msrs.kernel_gs_base), (0x5000, 0x7777));
}

#[test]
fn an_instruction_across_a_missing_page() {
    let mut m = Machine::long();
    m.set_pte(0x9000, 0);
    m.cpu.rip = 0x8ffe;
    // mov eax, imm32 begins on one page and ends on the next.
    m.code(&[0xb8, 1]);
    m.run(1);
    assert_eq!((m.vector(), m.cpu.cr2), (Some(PF), 0x9000));
    assert_eq!(m.stack64::<2>(), [0x10, 0x8ffe]);
    // One that ends with the page does not look further.
    m.cpu.rip = 0x8ffe;
    m.code(&[0x90, 0x90]);
    assert_eq!((m.step(), m.step()), (Ok(()), Ok(())));
}

#[test]
fn a_call_gate_to_ring_1() {
    let mut m = Machine::long().user();
    m.put_u64(GDT + u64::from(CODE16), 0x00af_ba00_0000_ffff);
    m.put_u64(GDT + u64::from(GATE), gate(CODE16, 0x9000, 12, 3));
    m.put_u64(GDT + u64::from(GATE) + 8, 0);
    m.put_u64(TSS + 12, STACK0);
    // call far [rip]
    m.code(&[0xff, 0x1d, 0, 0, 0, 0, 0, 0, 0, 0, GATE as u8 | 3, 0]);
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.mode.cpl), (0x9000, 1));
    assert_eq!([seg::CS, seg::SS].map(|i| m.cpu.segs[i].selector), [CODE16 | 1, 1]);
    assert_eq!(m.stack64::<4>(), [CODE + 6, USER_CODE64.into(), STACK3, USER_DATA.into()]);
    m.asm(|a| a.clts().unwrap());
    assert_eq!(m.step(), Err(Fault::GP0));
    // A stack that is not canonical.
    let mut m = Machine::long().user();
    m.put_u64(GDT + u64::from(GATE), gate(CODE64, 0x9000, 12, 3));
    m.put_u64(GDT + u64::from(GATE) + 8, 0);
    m.put_u64(TSS + 4, 1 << 63);
    m.code(&[0xff, 0x1d, 0, 0, 0, 0, 0, 0, 0, 0, GATE as u8 | 3, 0]);
    assert_eq!(m.step(), Err(Fault::SS0));
}

#[test]
fn lar_and_lsl_know_the_types_of_long_mode() {
    for kind in 0..16u64 {
        let mut m = Machine::long();
        m.put_u64(GDT + u64::from(GATE), 0x8000_0000_1234 | kind << 40);
        m.cpu.regs[reg::RCX] = GATE.into();
        m.asm(|a| {
            a.lar(eax, ecx).unwrap();
            a.lsl(eax, ecx).unwrap();
        });
        let seen = [0; 2].map(|_| {
            m.run(1);
            m.flag(flags::ZF)
        });
        assert_eq!(seen, [matches!(kind, 2 | 9 | 11 | 12), matches!(kind, 2 | 9 | 11)], "{kind}");
    }
}
