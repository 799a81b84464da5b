//! Whole runs of a vCPU in real mode: its code at 0000:7C00, handlers at 0000:4000 + 16 * vector, each HLT.

use std::sync::Arc;

use lodge_memory::{NoBus, RamLayout, allocate};

use super::*;
use crate::state::{reg, seg};

const CODE: u64 = 0x7c00;
const HANDLERS: u64 = 0x4000;
const TIERS: [Tier; 2] = [Tier::Blocks, Tier::Reference];

fn put(vcpu: &mut Vcpu, at: u64, bytes: &[u8]) {
    for (i, byte) in bytes.iter().enumerate() {
        vcpu.cpu.phys_write(at + i as u64, &[*byte]);
    }
}

fn machine(tier: Tier, code: &[u8]) -> Vcpu {
    let memory = allocate(&RamLayout::new(1 << 20).unwrap()).unwrap();
    let mut vcpu = Vcpu::new(Shared::new(memory, Arc::new(NoBus), 1), 0);
    vcpu.set_tier(tier);
    for vector in 0..256u64 {
        let at = HANDLERS + 16 * vector;
        put(&mut vcpu, 4 * vector, &(at as u32).to_le_bytes());
        put(&mut vcpu, at, &[0xf4]);
    }
    put(&mut vcpu, CODE, code);
    for segment in &mut vcpu.cpu.segs {
        segment.load_real(0);
    }
    vcpu.cpu.rip = CODE;
    vcpu.cpu.regs[reg::RSP] = 0x7000;
    vcpu.interrupt_due = false;
    vcpu
}

/// Runs to a HLT.
fn run(vcpu: &mut Vcpu) {
    vcpu.cpu.activity = Activity::Running;
    vcpu.cpu.update_mode();
    vcpu.enter();
    for _ in 0..1000 {
        if vcpu.cpu.activity != Activity::Running {
            break;
        }
        vcpu.execute().unwrap();
    }
    vcpu.shared.leave_guest(0);
    assert_eq!(vcpu.cpu.activity, Activity::Halted);
}

/// The vector whose handler has halted, and the IP that it would return to.
fn halted(vcpu: &mut Vcpu) -> (u64, u16) {
    let mut ip = [0; 2];
    let sp = vcpu.cpu.sp();
    vcpu.cpu.phys_read(sp, &mut ip);
    assert_eq!(vcpu.cpu.segs[seg::CS].base, 0);
    ((vcpu.cpu.rip - 1 - HANDLERS) / 16, u16::from_le_bytes(ip))
}

#[test]
fn the_same_offset_in_two_segments() {
    // call 1000:0010; call 2000:0010; hlt. There: inc bx, or inc dx; jmp over; nop; retf.
    let code = [0x9a, 0x10, 0, 0, 0x10, 0x9a, 0x10, 0, 0, 0x20, 0xf4];
    for tier in TIERS {
        let mut vcpu = machine(tier, &code);
        put(&mut vcpu, 0x1_0010, &[0x43, 0xeb, 1, 0x90, 0xcb]);
        put(&mut vcpu, 0x2_0010, &[0x42, 0xeb, 1, 0x90, 0xcb]);
        vcpu.cpu.regs[reg::RDX] = 0;
        for round in 1..4 {
            vcpu.cpu.rip = CODE;
            run(&mut vcpu);
            assert_eq!((vcpu.cpu.regs[reg::RBX], vcpu.cpu.regs[reg::RDX]), (round, round));
        }
    }
}

#[test]
fn decoded_code_ends_where_its_segment_does() {
    for tier in TIERS {
        let mut vcpu = machine(tier, &[0x40, 0x40, 0x40, 0x40, 0x40, 0xf4]);
        run(&mut vcpu);
        assert_eq!(vcpu.cpu.regs[reg::RAX], 5);
        vcpu.cpu.rip = CODE;
        vcpu.cpu.segs[seg::CS].limit = CODE as u32 + 2;
        run(&mut vcpu);
        assert_eq!(halted(&mut vcpu), (13, CODE as u16 + 3));
        assert_eq!(vcpu.cpu.regs[reg::RAX], 8);
    }
}

#[test]
fn what_holds_a_single_step_back() {
    for (code, ip) in [
        // sti; nop; hlt: not this one.
        (&[0xfb, 0x90, 0xf4][..], 1),
        // mov ss, ax; nop; hlt. pop ss; nop; hlt.
        (&[0x8e, 0xd0, 0x90, 0xf4], 3),
        (&[0x17, 0x90, 0xf4], 2),
        // lss sp, [9000h]; nop; hlt: neither.
        (&[0x0f, 0xb2, 0x26, 0x00, 0x90, 0x90, 0xf4], 5),
        (&[0x90, 0x90, 0xf4], 1),
    ] {
        for tier in TIERS {
            let mut vcpu = machine(tier, code);
            put(&mut vcpu, 0x9000, &[0x00, 0x70, 0, 0]);
            vcpu.cpu.sys_flags |= flags::TF;
            run(&mut vcpu);
            assert_eq!(halted(&mut vcpu), (1, CODE as u16 + ip));
            assert_eq!(vcpu.cpu.dr[6] & 0xe00f, DR6_BS);
        }
    }
}

#[test]
fn an_nmi_waits_for_iret() {
    // nop; hlt. The handler: nop; iret.
    for tier in TIERS {
        let mut vcpu = machine(tier, &[0x90, 0xf4]);
        put(&mut vcpu, HANDLERS + 0x20, &[0x43, 0xf4, 0xcf]);
        vcpu.set_nmi_pending(true);
        run(&mut vcpu);
        assert_eq!(vcpu.cpu.rip, HANDLERS + 0x22);
        assert!(!vcpu.nmi_pending() && vcpu.cpu.inhibit.nmi);
        // Another one comes after the IRET, before the next instruction.
        vcpu.set_nmi_pending(true);
        assert!(!vcpu.event_due());
        run(&mut vcpu);
        assert_eq!((vcpu.cpu.rip, vcpu.cpu.regs[reg::RBX]), (HANDLERS + 0x22, 2));
        run(&mut vcpu);
        assert_eq!(vcpu.cpu.rip, CODE + 2);
    }
}

#[test]
fn a_fault_has_hit_no_breakpoint() {
    // movsb; hlt, from a watched byte to beyond the limit.
    for tier in TIERS {
        let mut vcpu = machine(tier, &[0xa4, 0xf4]);
        (vcpu.cpu.regs[reg::RSI], vcpu.cpu.regs[reg::RDI]) = (0x9000, 0x9001);
        vcpu.cpu.segs[seg::ES].limit = 0x9000;
        (vcpu.cpu.dr[0], vcpu.cpu.dr[7]) = (0x9000, 0x3_0401);
        run(&mut vcpu);
        assert_eq!(halted(&mut vcpu), (13, CODE as u16));
        assert_eq!((vcpu.cpu.dr[6] & 15, vcpu.cpu.pending_debug), (0, 0));
        vcpu.cpu.segs[seg::ES].limit = 0xffff;
        vcpu.cpu.rip = CODE;
        run(&mut vcpu);
        assert_eq!((halted(&mut vcpu), vcpu.cpu.dr[6] & 15), ((1, CODE as u16 + 1), 1));
    }
}

#[test]
fn one_instruction_is_in_the_shadow_of_sti() {
    for (code, rip) in [
        // sti; nop; nop. sti; sti; nop. sti; mov ss, ax; nop: the second one holds nothing back, or its own.
        (&[0xfbu8, 0x90, 0x90][..], CODE + 2),
        (&[0xfb, 0xfb, 0x90], CODE + 2),
        (&[0xfb, 0x8e, 0xd0, 0x90, 0x90], CODE + 4),
        // sti; int 30h, whose handler has a shadow of its own: sti; nop.
        (&[0xfb, 0xcd, 0x30], HANDLERS + 0x302),
    ] {
        for tier in TIERS {
            let mut vcpu = machine(tier, code);
            put(&mut vcpu, HANDLERS + 0x300, &[0xfb, 0x90, 0x90]);
            interrupt_due(&mut vcpu, 0x41);
            run(&mut vcpu);
            assert_eq!(halted(&mut vcpu), (0x41, rip as u16), "{code:x?}");
        }
    }
}

/// The local APIC has an interrupt that waits for IF.
fn interrupt_due(vcpu: &mut Vcpu, vector: u8) {
    let lapic = &vcpu.port().lapic;
    // Enabled by software.
    let _ = lapic.write(0xf0, 0x1ff, 0);
    assert!(lapic.accept(vector, false));
    vcpu.interrupt_due = true;
}

#[test]
fn locked_accesses_to_what_is_no_memory_end() {
    // lock inc byte [10h]; xchg [11h], ax; lock cmpxchg [0fh], ax; hlt, in FFFFH: at 1 MiB nobody answers, and the last
    // one is half in memory.
    let code =
        [0xf0, 0xfe, 0x06, 0x10, 0, 0x87, 0x06, 0x11, 0, 0xf0, 0x0f, 0xb1, 0x1e, 0x0f, 0, 0xf4];
    for tier in TIERS {
        let mut vcpu = machine(tier, &code);
        vcpu.cpu.segs[seg::DS].load_real(0xffff);
        vcpu.cpu.regs[reg::RAX] = 0x1234;
        vcpu.cpu.regs[reg::RBX] = 0x5678;
        put(&mut vcpu, 0xf_ffff, &[0xff]);
        run(&mut vcpu);
        assert_eq!(vcpu.cpu.rip, CODE + code.len() as u64);
        assert_eq!(vcpu.cpu.regs[reg::RAX], 0xffff);
        let mut last = [0];
        vcpu.cpu.phys_read(0xf_ffff, &mut last);
        assert_eq!(last, [0x78], "the comparison held");
    }
}
