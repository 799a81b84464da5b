use crate::exec::testing::{CODE, Machine};
use crate::fault::{Fault, vector};
use crate::flags;
use crate::state::reg;

fn machine(count: u64, from: u64, to: u64) -> Machine {
    let mut m = Machine::long();
    for (index, value) in [(reg::RCX, count), (reg::RSI, from), (reg::RDI, to)] {
        m.cpu.regs[index] = value;
    }
    m
}

fn registers(m: &Machine) -> (u64, u64, u64) {
    (m.cpu.regs[reg::RCX], m.cpu.regs[reg::RSI], m.cpu.regs[reg::RDI])
}

#[test]
fn a_copy_across_pages_stops_exactly_at_the_fault() {
    let mut m = machine(0x2000, 0x2_0010, 0x3_0020);
    let data: Vec<u8> = (0..0x2000u32).map(|i| (i * 7) as u8).collect();
    m.put(0x2_0010, &data);
    m.set_pte(0x3_1000, 0);
    m.asm(|a| a.rep().movsb().unwrap());
    assert_eq!(m.step(), Err(Fault::with_error(vector::PF, 2)));
    assert_eq!(m.cpu.cr2, 0x3_1000);
    assert_eq!(registers(&m), (0x2000 - 0xfe0, 0x2_0ff0, 0x3_1000));
    m.set_pte(0x3_1000, 0x3_1007);
    assert_eq!(m.step(), Ok(()));
    assert_eq!(registers(&m), (0, 0x2_2010, 0x3_2020));
    assert_eq!(m.get::<0x2000>(0x3_0020).to_vec(), data);
}

#[test]
fn elements_that_cross_a_page_fault_as_a_whole() {
    let mut m = machine(4, 0x2_0000, 0x3_0ff4);
    m.set_pte(0x3_1000, 0);
    m.put(0x3_0ffc, &[0x55; 4]);
    m.asm(|a| a.rep().movsq().unwrap());
    assert_eq!(m.step(), Err(Fault::with_error(vector::PF, 2)));
    assert_eq!(registers(&m), (3, 0x2_0008, 0x3_0ffc));
    assert_eq!(m.get::<4>(0x3_0ffc), [0x55; 4]);
}

#[test]
fn a_copy_ahead_of_its_source_repeats_a_pattern() {
    let mut m = machine(0x1ff0, 0x2_0000, 0x2_0003);
    m.put(0x2_0000, &[1, 2, 3]);
    m.asm(|a| a.rep().movsb().unwrap());
    m.run(1);
    let copied = m.get::<0x1ff3>(0x2_0000);
    assert!(copied.iter().enumerate().all(|(i, byte)| usize::from(*byte) == i % 3 + 1));
    // With words at a distance of one byte, each word read has the byte before in it.
    let mut m = machine(3, 0x2_0000, 0x2_0001);
    m.put(0x2_0000, &[1, 2, 3, 4, 5, 6, 7]);
    m.asm(|a| a.rep().movsw().unwrap());
    m.run(1);
    assert_eq!(m.get::<7>(0x2_0000), [1, 1, 2, 2, 4, 4, 6]);
}

#[test]
fn a_copy_downwards() {
    let mut m = machine(4, 0x2_0003, 0x2_0004);
    m.put(0x2_0000, &[1, 2, 3, 4]);
    m.asm(|a| {
        a.std().unwrap();
        a.rep().movsb().unwrap();
    });
    m.run(2);
    assert_eq!(m.get::<5>(0x2_0000), [1, 1, 2, 3, 4]);
    assert_eq!(registers(&m), (0, 0x1_ffff, 0x2_0000));
}

#[test]
fn filling_lets_interrupts_in_after_a_while() {
    let mut m = machine(0x3000, 0, 0x2_0000);
    m.cpu.regs[reg::RAX] = 0x0102_0304_0506_0708;
    m.asm(|a| a.rep().stosq().unwrap());
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.regs[reg::RCX]), (CODE, 0x1000));
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.regs[reg::RCX]), (CODE + 3, 0));
    assert_eq!(m.get_u64(0x2_0000), 0x0102_0304_0506_0708);
    assert_eq!(m.get_u64(0x3_7ff8), 0x0102_0304_0506_0708);
    assert_eq!(m.get_u64(0x3_8000), 0);
}

#[test]
fn scanning_and_comparing_stop_where_they_must() {
    let mut m = machine(u64::MAX, 0, 0x2_0ffd);
    m.put(0x2_0ffd, b"abcdef\0xyz");
    m.asm(|a| a.repne().scasb().unwrap());
    m.run(1);
    assert_eq!(m.cpu.regs[reg::RDI], 0x2_1004);
    assert_eq!(m.cpu.regs[reg::RCX], u64::MAX - 7);
    assert!(m.flag(flags::ZF));
    let mut m = machine(8, 0x2_0000, 0x3_0ffe);
    m.put(0x2_0000, b"abcdefgh");
    m.put(0x3_0ffe, b"abcdeFgh");
    m.asm(|a| a.repe().cmpsb().unwrap());
    m.run(1);
    assert_eq!(registers(&m), (2, 0x2_0006, 0x3_1004));
    // 'f' is above 'F'.
    assert!(!m.flag(flags::ZF) && !m.flag(flags::CF));
}

#[test]
fn a_count_of_zero_changes_nothing() {
    let mut m = machine(0, 0xdead_0000_0000, 0xdead_0000_0000);
    let before = m.cpu.rflags();
    m.asm(|a| a.repe().cmpsb().unwrap());
    assert_eq!(m.step(), Ok(()));
    assert_eq!(m.cpu.rflags(), before);
}

#[test]
fn offsets_of_16_bits_wrap() {
    let mut m = Machine::real();
    m.cpu.regs[reg::RCX] = 0xffff_0004;
    m.cpu.regs[reg::RDI] = 0xabcd_fffe;
    m.cpu.regs[reg::RAX] = 0x5a;
    m.cpu.segs[0].load_real(0x2000);
    m.asm(|a| a.rep().stosb().unwrap());
    m.run(1);
    assert_eq!(m.cpu.regs[reg::RCX], 0xffff_0000);
    assert_eq!(m.cpu.regs[reg::RDI], 0xabcd_0002);
    assert_eq!(m.get::<2>(0x2_fffe), [0x5a; 2]);
    assert_eq!(m.get::<3>(0x2_0000), [0x5a, 0x5a, 0]);
    // A word at FFFFh does not wrap: it faults.
    m.cpu.rip = CODE;
    m.cpu.regs[reg::RDI] = 0xffff;
    m.asm(|a| a.stosw().unwrap());
    assert_eq!(m.step(), Err(Fault::GP0));
}

#[test]
fn single_stepping_goes_by_elements() {
    let mut m = machine(3, 0x2_0000, 0x3_0000);
    m.cpu.sys_flags |= flags::TF;
    m.asm(|a| a.rep().movsb().unwrap());
    m.run(1);
    assert_eq!((m.cpu.rip, m.cpu.regs[reg::RCX]), (CODE, 2));
    m.run(2);
    assert_eq!((m.cpu.rip, m.cpu.regs[reg::RCX]), (CODE + 2, 0));
}

#[test]
fn input_from_a_port_to_a_bad_address_reads_nothing() {
    let mut m = machine(2, 0, 0x3_0fff);
    m.cpu.regs[reg::RDX] = 0x1f0;
    m.set_pte(0x3_1000, 0);
    m.asm(|a| a.rep().insw().unwrap());
    assert_eq!(m.step(), Err(Fault::with_error(vector::PF, 2)));
    assert_eq!(registers(&m), (2, 0, 0x3_0fff));
}
