// What a write asks of others is looked at only where a test is about it.
#![allow(unused_must_use)]

use super::*;
use crate::clock;

fn enabled() -> Lapic {
    let lapic = Lapic::new(0);
    write(&lapic, reg::SVR, 0x1ff);
    lapic
}

fn x2apic(id: u32) -> Lapic {
    let lapic = Lapic::new(id);
    assert!(lapic.set_apic_base(lapic.apic_base() | base::X2APIC));
    write_msr(&lapic, reg::SVR, 0x1ff).unwrap();
    lapic
}

fn write(lapic: &Lapic, offset: u32, value: u32) -> Effect {
    lapic.write(offset, value, 0)
}

fn write_msr(lapic: &Lapic, offset: u32, value: u64) -> Option<Effect> {
    lapic.write_msr(0x800 + (offset >> 4), value, 0)
}

fn read_msr(lapic: &Lapic, offset: u32) -> Option<u64> {
    lapic.read_msr(0x800 + (offset >> 4), 0)
}

#[test]
fn priority_decides_and_eoi_ends() {
    let lapic = enabled();
    assert!(lapic.accept(0x41, false));
    assert!(lapic.accept(0x91, false));
    assert_eq!(lapic.pending(), Some(0x91));
    lapic.acknowledge(0x91);
    assert_eq!(lapic.read(reg::PPR, 0), 0x90);
    assert_eq!(lapic.pending(), None);
    lapic.accept(0x95, false);
    assert_eq!(lapic.pending(), None, "the same class waits");
    lapic.accept(0xa0, false);
    assert_eq!(lapic.pending(), Some(0xa0));
    lapic.acknowledge(0xa0);
    assert_eq!(lapic.read(reg::ISR + 0x50, 0), 1);
    assert_eq!(write(&lapic, reg::EOI, 0), Effect::Eoi(None));
    assert_eq!(lapic.read(reg::PPR, 0), 0x90);
    assert_eq!(write(&lapic, reg::EOI, 0), Effect::Eoi(None));
    assert_eq!(lapic.pending(), Some(0x95));
    lapic.acknowledge(0x95);
    assert_eq!(write(&lapic, reg::EOI, 0), Effect::Eoi(None));
    assert_eq!(lapic.pending(), Some(0x41));
    lapic.acknowledge(0x41);
    assert_eq!(lapic.read(reg::IRR + 0x20, 0), 0);
    assert_eq!(lapic.pending(), None);
}

#[test]
fn task_priority_holds_back() {
    let lapic = enabled();
    assert_eq!(lapic.set_tpr(0x50), Effect::None);
    lapic.accept(0x5f, false);
    assert_eq!(lapic.pending(), None);
    assert_eq!((lapic.cr8(), lapic.read(reg::PPR, 0)), (5, 0x50));
    assert_eq!(lapic.set_tpr(0x4f), Effect::Recheck);
    assert_eq!(lapic.pending(), Some(0x5f));
}

#[test]
fn level_interrupts_tell_the_ioapic() {
    let lapic = enabled();
    lapic.accept(0x61, true);
    assert_eq!(lapic.read(reg::TMR + 0x30, 0), 2);
    lapic.acknowledge(0x61);
    assert_eq!(write(&lapic, reg::EOI, 0), Effect::Eoi(Some(0x61)));
    lapic.accept(0x61, false);
    lapic.acknowledge(0x61);
    assert_eq!(write(&lapic, reg::EOI, 0), Effect::Eoi(None));
    assert_eq!(write(&lapic, reg::EOI, 0), Effect::Eoi(None), "nothing in service");
}

#[test]
fn disabled_by_software_it_takes_nothing() {
    let lapic = Lapic::new(1);
    assert!(!lapic.accept(0x40, false));
    write(&lapic, reg::LVT_TIMER, 0x40);
    assert_eq!(lapic.read(reg::LVT_TIMER, 0), 0x1_0040, "masks cannot be cleared");
    write(&lapic, reg::SVR, 0x1ff);
    write(&lapic, reg::LVT_TIMER, 0x40);
    assert_eq!(lapic.read(reg::LVT_TIMER, 0), 0x40);
    lapic.accept(0x40, false);
    write(&lapic, reg::SVR, 0xff);
    assert_eq!(lapic.read(reg::LVT_TIMER, 0), 0x1_0040);
    assert_eq!(lapic.pending(), Some(0x40), "what came before is held");
}

#[test]
fn bad_vectors_and_registers_are_errors() {
    let lapic = enabled();
    write(&lapic, reg::LVT_ERROR, 0xfe);
    assert!(!lapic.accept(5, false));
    assert_eq!(lapic.pending(), Some(0xfe));
    assert_eq!(lapic.read(reg::ESR, 0), 0, "until it is written");
    write(&lapic, reg::ICR, 0x3);
    lapic.read(0x3d0, 0);
    write(&lapic, reg::ESR, 0);
    let expected = error::RECEIVE_VECTOR | error::SEND_VECTOR | error::REGISTER;
    assert_eq!(lapic.read(reg::ESR, 0), expected);
    write(&lapic, reg::ESR, 0);
    assert_eq!(lapic.read(reg::ESR, 0), 0);
    // An error vector that is itself bad does not go round for ever.
    write(&lapic, reg::LVT_ERROR, 3);
    assert!(!lapic.accept(5, false));
}

#[test]
fn the_mode_changes_as_the_manual_draws_it() {
    let lapic = Lapic::new(3);
    let on = APIC_BASE | base::ENABLE;
    assert_eq!(lapic.apic_base(), on, "not the boot processor");
    assert!(!lapic.set_apic_base(APIC_BASE | base::X2APIC), "x2APIC alone");
    assert!(!lapic.set_apic_base(on | 1), "reserved");
    assert!(!lapic.set_apic_base(on | 1 << PHYSICAL_BITS), "reserved");
    assert!(lapic.set_apic_base(on | base::X2APIC));
    assert!(!lapic.set_apic_base(on), "back to xAPIC");
    assert_eq!(lapic.window(), None);
    assert!(lapic.set_apic_base(APIC_BASE));
    assert!(!lapic.enabled());
    assert!(!lapic.set_apic_base(on | base::X2APIC), "from off to x2APIC");
    assert!(lapic.set_apic_base(0xfed0_0000 | base::ENABLE));
    assert_eq!(lapic.window(), Some(0xfed0_0000));
}

#[test]
fn x2apic_registers() {
    let lapic = x2apic(0x23);
    assert_eq!(read_msr(&lapic, reg::ID), Some(0x23));
    assert_eq!(read_msr(&lapic, reg::LDR), Some(0x0002_0008));
    assert_eq!(read_msr(&lapic, reg::VERSION), Some(0x5_0014));
    for (offset, value) in [
        (reg::ID, 0),
        (reg::VERSION, 0),
        (reg::LDR, 0),
        (reg::DFR, 0),
        (reg::EOI, 1),
        (reg::ESR, 1),
        (reg::TPR, 0x100),
        (reg::SVR, 0x200),
        (reg::LVT_TIMER, 1 << 19),
        (reg::INITIAL_COUNT, 1 << 32),
        (reg::ICR_HIGH, 0),
        (reg::ICR, 1 << 20),
        (0x2f0, 0),
    ] {
        assert_eq!(write_msr(&lapic, offset, value), None, "register {offset:#x}");
    }
    for offset in [reg::DFR, reg::EOI, reg::ICR_HIGH, reg::SELF_IPI, 0, 0x3d0] {
        assert_eq!(read_msr(&lapic, offset), None, "register {offset:#x}");
    }
    let icr = 0x1234_5678_0000_40f1;
    assert_eq!(write_msr(&lapic, reg::ICR, icr), Some(Effect::Ipi(icr)));
    assert_eq!(read_msr(&lapic, reg::ICR), Some(icr));
    assert_eq!(write_msr(&lapic, reg::SELF_IPI, 0x77), Some(Effect::Ipi(0x4_4077)));
    assert_eq!(read_msr(&lapic, reg::ICR), Some(icr));
    assert_eq!(Lapic::new(0).read_msr(0x802, 0), None, "only in x2APIC mode");
}

#[test]
fn xapic_commands_take_the_destination_from_the_high_half() {
    let lapic = enabled();
    assert_eq!(write(&lapic, reg::ICR_HIGH, 0x0500_0000), Effect::None);
    assert_eq!(write(&lapic, reg::ICR, 0x4630), Effect::Ipi(0x0500_0000_0000_4630));
    assert_eq!(lapic.read(reg::ICR_HIGH, 0), 0x0500_0000);
    assert_eq!(lapic.read(reg::ICR, 0), 0x4630);
    assert_eq!(lapic.read(reg::ID, 0), 0);
}

#[test]
fn logical_destinations() {
    let lapic = enabled();
    write(&lapic, reg::LDR, 0x1200_0000);
    assert!(lapic.matches_logical(0x10, false));
    assert!(!lapic.matches_logical(0x20 | 0x04, false));
    assert!(lapic.matches_logical(0xff, false));
    write(&lapic, reg::DFR, 0x0fff_ffff);
    assert!(lapic.matches_logical(0x13, false), "cluster 1, member 2");
    assert!(!lapic.matches_logical(0x23, false));
    assert!(!lapic.matches_logical(0x11, false));
    assert!(lapic.matches_logical(0xf2, false), "all clusters");

    let lapic = x2apic(0x23);
    assert!(lapic.matches_logical(0x0002_0008, true));
    assert!(!lapic.matches_logical(0x0002_0004, true));
    assert!(!lapic.matches_logical(0x0001_0008, true));
    assert!(lapic.matches_logical(u32::MAX, true));
    assert!(!lapic.matches_logical(0x08, false));
    assert!(x2apic(3).matches_logical(0x08, false), "a device's 8 bits reach cluster 0");
}

#[test]
fn the_boot_processor_hears_the_pic() {
    let lapic = Lapic::new(0);
    assert!(lapic.hears_pic());
    assert!(!Lapic::new(1).hears_pic());
    write(&lapic, reg::SVR, 0x1ff);
    write(&lapic, reg::LVT_LINT0, 0x31);
    assert!(!lapic.hears_pic());
    assert_eq!(lapic.lint0(), Lint::Interrupt);
    assert_eq!(lapic.pending(), Some(0x31));
    write(&lapic, reg::LVT_LINT0, 0x400);
    assert_eq!(lapic.lint0(), Lint::Nmi);
    write(&lapic, reg::LVT_LINT0, 0x1_0700);
    assert!(!lapic.hears_pic());
    assert_eq!(lapic.lint0(), Lint::Nothing);
    assert!(lapic.set_apic_base(APIC_BASE | base::BSP));
    assert!(lapic.hears_pic(), "without a LAPIC the wire goes straight in");
}

#[test]
fn the_timer_interrupts_by_its_entry() {
    let lapic = enabled();
    let ms = clock::nanos_to_ticks(1_000_000);
    lapic.write(reg::DIVIDE, 0xb, 0);
    lapic.write(reg::LVT_TIMER, 0x2_0040, 0);
    lapic.write(reg::INITIAL_COUNT, 1_000_000, 0);
    assert_eq!(lapic.deadline(), ms);
    assert!(!lapic.run_timer(ms - 1));
    assert!(lapic.run_timer(ms));
    assert_eq!(lapic.pending(), Some(0x40));
    assert_eq!(lapic.deadline(), 2 * ms);
    // Masked, it counts on without a word; unmasked later, what was missed does not come.
    lapic.write(reg::LVT_TIMER, 0x3_0041, 2 * ms - 1);
    assert_eq!(lapic.deadline(), NEVER);
    lapic.write(reg::LVT_TIMER, 0x2_0041, 5 * ms / 2);
    assert_eq!(lapic.deadline(), 3 * ms);
    let current = lapic.read(reg::CURRENT_COUNT, 5 * ms / 2);
    assert!((499_000..=501_000).contains(&current), "{current}");
    lapic.write(reg::INITIAL_COUNT, 0, 3 * ms - 1);
    assert_eq!(lapic.deadline(), NEVER);
    assert_eq!(lapic.read(reg::CURRENT_COUNT, 4 * ms), 0);
}

#[test]
fn a_new_divider_keeps_the_count() {
    let lapic = enabled();
    let us = clock::nanos_to_ticks(1000);
    lapic.write(reg::LVT_TIMER, 0x40, 0);
    lapic.write(reg::DIVIDE, 0xb, 0);
    lapic.write(reg::INITIAL_COUNT, 1_000_000, 0);
    lapic.write(reg::DIVIDE, 0x0, 500 * us);
    let current = lapic.read(reg::CURRENT_COUNT, 500 * us);
    assert!((499_000..=501_000).contains(&current), "{current}");
    assert!(lapic.deadline().abs_diff(1500 * us) < 20 * us);
}

#[test]
fn tsc_deadline_mode() {
    let lapic = enabled();
    lapic.set_tsc_deadline(1000, 0);
    assert_eq!((lapic.tsc_deadline(), lapic.deadline()), (0, NEVER), "another mode");
    lapic.write(reg::LVT_TIMER, 0x4_0040, 0);
    lapic.set_tsc_deadline(1000, 200);
    assert_eq!((lapic.tsc_deadline(), lapic.deadline()), (1000, 800));
    lapic.write(reg::INITIAL_COUNT, 5, 0);
    assert_eq!(lapic.deadline(), 800, "the initial count is ignored");
    assert!(lapic.run_timer(800));
    assert_eq!(lapic.tsc_deadline(), 0);
    lapic.set_tsc_deadline(1000, 0);
    lapic.write(reg::LVT_TIMER, 0x40, 0);
    assert_eq!(lapic.deadline(), NEVER, "leaving the mode disarms");
}

#[test]
fn init_keeps_the_base_and_forgets_the_rest() {
    let lapic = x2apic(5);
    lapic.accept(0x40, false);
    lapic.init();
    assert!(lapic.x2apic());
    assert_eq!(lapic.pending(), None);
    assert_eq!(read_msr(&lapic, reg::SVR), Some(0xff));
    assert_eq!(read_msr(&lapic, reg::LDR), Some(0x20));
}

#[test]
fn the_page_survives() {
    let lapic = enabled();
    let ms = clock::nanos_to_ticks(1_000_000);
    lapic.write(reg::DIVIDE, 0xb, 0);
    lapic.write(reg::LVT_TIMER, 0x2_0040, 0);
    lapic.write(reg::INITIAL_COUNT, 1_000_000, 0);
    lapic.write(reg::LDR, 0x0200_0000, 0);
    lapic.write(reg::LVT_LINT0, 0x1_0700, 0);
    lapic.set_tpr(0x10);
    for vector in [0x55, 0x91] {
        lapic.accept(vector, vector == 0x91);
    }
    lapic.acknowledge(0x91);
    let page = lapic.page(ms / 2);
    let copy = Lapic::new(0);
    assert!(copy.restore(lapic.apic_base(), &page, ms / 2));
    assert_eq!(copy.page(ms / 2), page);
    assert!(copy.deadline().abs_diff(ms) < clock::nanos_to_ticks(10_000));
    assert_eq!(write(&copy, reg::EOI, 0), Effect::Eoi(Some(0x91)));
    assert_eq!(copy.pending(), Some(0x55));

    let x2 = x2apic(17);
    let page = x2.page(0);
    let copy = Lapic::new(17);
    assert!(copy.restore(x2.apic_base(), &page, 0));
    assert_eq!(read_msr(&copy, reg::LDR), Some(0x0001_0002));
    assert!(!copy.restore(base::X2APIC, &page, 0));
    assert!(copy.x2apic(), "nothing has changed");
}

#[test]
fn absurd_pages_do_no_harm() {
    let lapic = Lapic::new(0);
    assert!(lapic.restore(APIC_BASE | base::ENABLE, &[0xff; PAGE], 0));
    assert_eq!(lapic.pending(), None);
    for _ in 0..300 {
        write(&lapic, reg::EOI, 0);
    }
    lapic.set_tpr(0);
    for _ in 0..300 {
        if let Some(vector) = lapic.pending() {
            lapic.acknowledge(vector);
            write(&lapic, reg::EOI, 0);
        }
    }
    assert_eq!(lapic.pending(), None);
    lapic.run_timer(u64::MAX);
}

#[test]
fn interrupts_from_other_threads_are_not_lost() {
    let lapic = enabled();
    let rounds = 20_000;
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            for i in 0..rounds {
                lapic.accept(0x40 + (i % 32) as u8, false);
                if i % 32 == 31 {
                    while lapic.pending().is_some() {
                        std::hint::spin_loop();
                    }
                }
            }
        });
        while !sender.is_finished() || lapic.pending().is_some() {
            if let Some(vector) = lapic.pending() {
                lapic.acknowledge(vector);
                lapic.write(reg::EOI, 0, 0);
            }
        }
    });
    assert_eq!(lapic.read(reg::IRR + 0x20, 0), 0);
}
