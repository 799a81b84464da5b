use iced_x86::code_asm::*;

use crate::exec::testing::Machine;
use crate::fault::Fault;
use crate::flags;
use crate::state::reg;

#[test]
fn a_lock_prefix_on_a_register_is_undefined() {
    let mut m = Machine::long();
    // lock add eax, ecx; lock mov [rax], ecx
    m.code(&[0xf0, 0x01, 0xc8]);
    assert_eq!(m.step(), Err(Fault::UD));
    m.code(&[0xf0, 0x89, 0x08]);
    assert_eq!(m.step(), Err(Fault::UD));
}

#[test]
fn an_instruction_of_16_bytes_is_a_protection_fault() {
    let mut m = Machine::long();
    let mut bytes = [0x66; 16];
    bytes[15] = 0x90;
    m.code(&bytes);
    assert_eq!(m.step(), Err(Fault::GP0));
    m.code(&bytes[1..]);
    assert_eq!(m.step(), Ok(()));
    assert_eq!(m.cpu.rip, 0x800f);
}

#[test]
fn bits_beyond_a_memory_operand_are_reached() {
    let mut m = Machine::long();
    m.put_u64(0x9000, 0);
    m.cpu.regs[reg::RBX] = 0x9010;
    m.cpu.regs[reg::RCX] = (-125i64) as u64;
    m.asm(|a| {
        a.bts(dword_ptr(rbx), ecx).unwrap();
        a.bt(dword_ptr(rbx), ecx).unwrap();
        a.lock().btr(word_ptr(rbx), cx).unwrap();
    });
    m.run(1);
    assert_eq!(m.get_u64(0x9000), 8);
    assert!(!m.flag(flags::CF));
    m.run(1);
    assert!(m.flag(flags::CF));
    m.run(1);
    assert_eq!(m.get_u64(0x9000), 0);
}

#[test]
fn compare_and_exchange_of_16_bytes() {
    let mut m = Machine::long();
    m.put_u64(0x9000, 1);
    m.put_u64(0x9008, 2);
    m.cpu.regs[reg::RAX] = 1;
    m.cpu.regs[reg::RDX] = 2;
    m.cpu.regs[reg::RBX] = 3;
    m.cpu.regs[reg::RCX] = 4;
    m.cpu.regs[reg::RSI] = 0x9000;
    m.asm(|a| {
        a.lock().cmpxchg16b(ptr(rsi)).unwrap();
        a.lock().cmpxchg16b(ptr(rsi)).unwrap();
        a.cmpxchg16b(ptr(rsi + 8)).unwrap();
    });
    m.run(1);
    assert_eq!((m.get_u64(0x9000), m.get_u64(0x9008)), (3, 4));
    assert!(m.flag(flags::ZF));
    m.run(1);
    assert_eq!((m.cpu.regs[reg::RAX], m.cpu.regs[reg::RDX]), (3, 4));
    assert!(!m.flag(flags::ZF));
    assert_eq!(m.step(), Err(Fault::GP0));
    // Alignment comes before a stack address that is not canonical.
    m.cpu.regs[reg::RBP] = 1 << 62;
    m.asm(|a| {
        a.cmpxchg16b(ptr(rbp + 1)).unwrap();
        a.cmpxchg16b(ptr(rbp)).unwrap();
    });
    assert_eq!(m.step(), Err(Fault::GP0));
    m.cpu.rip = m.cpu.next_rip;
    assert_eq!(m.step(), Err(Fault::SS0));
}

#[test]
fn division_faults_leave_the_registers() {
    let mut m = Machine::long();
    m.cpu.regs[reg::RAX] = 5;
    m.cpu.regs[reg::RDX] = 7;
    m.cpu.regs[reg::RCX] = 7;
    m.asm(|a| a.div(rcx).unwrap());
    assert_eq!(m.step(), Err(Fault::DE));
    m.cpu.regs[reg::RDX] = 1 << 63;
    m.cpu.regs[reg::RAX] = 0;
    m.cpu.regs[reg::RCX] = u64::MAX;
    m.asm(|a| a.idiv(rcx).unwrap());
    assert_eq!(m.step(), Err(Fault::DE));
    assert_eq!(m.cpu.regs[reg::RAX], 0);
}

#[test]
fn a_failed_pop_to_memory_leaves_the_stack_pointer() {
    let mut m = Machine::long();
    m.asm(|a| a.pop(qword_ptr(0x7fff_0000)).unwrap());
    let before = m.cpu.regs[reg::RSP];
    assert!(m.step().is_err());
    assert_eq!(m.cpu.regs[reg::RSP], before);
    // The address is computed after the stack pointer has moved.
    m.put_u64(0x7000, 0x1234);
    m.asm(|a| a.pop(qword_ptr(rsp)).unwrap());
    m.run(1);
    assert_eq!(m.get_u64(0x7008), 0x1234);
}

#[test]
fn enter_copies_frame_pointers() {
    let mut m = Machine::protected();
    m.cpu.regs[reg::RBP] = 0x6800;
    m.put(0x67fc, &[1, 0, 0, 0]);
    m.put(0x67f8, &[2, 0, 0, 0]);
    m.asm(|a| {
        a.enter(0x10, 3).unwrap();
        a.leave().unwrap();
    });
    m.run(1);
    assert_eq!(m.cpu.regs[reg::RBP], 0x6ffc);
    assert_eq!(m.cpu.regs[reg::RSP], 0x6ffc - 12 - 0x10);
    let frame = [0x6800, 1, 2, 0x6ffc].map(|v: u32| v);
    for (i, value) in frame.into_iter().enumerate() {
        assert_eq!(m.get_u32(0x6ffc - 4 * i as u64), value);
    }
    m.run(1);
    assert_eq!((m.cpu.regs[reg::RBP], m.cpu.regs[reg::RSP]), (0x6800, 0x7000));
}

#[test]
fn sti_holds_interrupts_back_for_one_instruction() {
    let mut m = Machine::long();
    m.asm(|a| {
        a.sti().unwrap();
        a.sti().unwrap();
    });
    m.run(1);
    assert!(m.cpu.inhibit.shadow && m.cpu.leave);
    m.run(1);
    assert!(!m.cpu.inhibit.shadow);
}

#[test]
fn flags_that_popf_may_change_depend_on_the_level() {
    let mut m = Machine::protected().user();
    m.set_iopl(1);
    m.asm(|a| a.popfd().unwrap());
    m.put(0x6000, &0x0024_7fd7u32.to_le_bytes());
    m.run(1);
    // IF and IOPL stay, as do VM and the reserved bits.
    assert_eq!(m.cpu.rflags(), 0x0024_5dd7);
}
