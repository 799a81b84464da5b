use super::*;
use crate::chip::lapic::{base, reg};
use lodge_memory::{NoBus, RamLayout};
use std::sync::Arc;

const APIC: u64 = lapic::APIC_BASE;

fn machine(vcpus: u32) -> Arc<Shared> {
    let memory = lodge_memory::allocate(&RamLayout::new(1 << 20).unwrap()).unwrap();
    let shared = Shared::new(memory, Arc::new(NoBus), vcpus);
    for me in 0..vcpus {
        apic(&shared, me, reg::SVR, 0x1ff);
    }
    shared
}

fn apic(shared: &Shared, me: u32, offset: u32, value: u32) {
    assert!(shared.chip_mmio_write(me, APIC + u64::from(offset), &value.to_le_bytes()));
}

fn ioapic(shared: &Shared, register: u32, value: u32) {
    assert!(shared.chip_mmio_write(0, IOAPIC_BASE, &register.to_le_bytes()));
    assert!(shared.chip_mmio_write(0, IOAPIC_BASE + 0x10, &value.to_le_bytes()));
}

fn pending(shared: &Shared) -> Vec<Option<u8>> {
    shared.ports().iter().map(|p| p.lapic.pending()).collect()
}

fn attention_of(shared: &Shared) -> Vec<u32> {
    shared.ports().iter().map(|p| p.attention.swap(0, Ordering::SeqCst)).collect()
}

fn end(shared: &Shared, me: u32, vector: u8) {
    shared.ports()[me as usize].lapic.acknowledge(vector);
    apic(shared, me, reg::EOI, 0);
}

#[test]
fn ipis_by_every_shorthand() {
    let shared = machine(3);
    attention_of(&shared);
    apic(&shared, 0, reg::ICR_HIGH, 2 << 24);
    apic(&shared, 0, reg::ICR, 0x4041);
    assert_eq!(pending(&shared), [None, None, Some(0x41)]);
    assert_eq!(attention_of(&shared), [0, 0, attention::INTERRUPT]);
    apic(&shared, 1, reg::ICR, 0x4_4042);
    assert_eq!(pending(&shared), [None, Some(0x42), Some(0x41)]);
    apic(&shared, 1, reg::ICR, 0x8_4043);
    assert_eq!(pending(&shared), [Some(0x43), Some(0x43), Some(0x43)]);
    apic(&shared, 1, reg::ICR, 0xc_4044);
    assert_eq!(pending(&shared), [Some(0x44), Some(0x43), Some(0x44)]);
    attention_of(&shared);
    apic(&shared, 0, reg::ICR, 0xc_4400);
    assert_eq!(attention_of(&shared), [0, attention::NMI, attention::NMI]);
    apic(&shared, 0, reg::ICR_HIGH, 0xff00_0000);
    apic(&shared, 0, reg::ICR, 0x4045);
    assert_eq!(pending(&shared), [Some(0x45); 3], "physical broadcast");
    apic(&shared, 0, reg::ICR_HIGH, 9 << 24);
    apic(&shared, 0, reg::ICR, 0x4046);
    assert_eq!(pending(&shared), [Some(0x45); 3], "nobody there");
}

#[test]
fn start_up_as_the_manual_says() {
    let shared = machine(2);
    attention_of(&shared);
    apic(&shared, 0, reg::ICR_HIGH, 1 << 24);
    apic(&shared, 0, reg::ICR, 0xc500);
    assert_eq!(attention_of(&shared), [0, attention::INIT]);
    apic(&shared, 0, reg::ICR, 0x8500);
    assert_eq!(attention_of(&shared), [0, 0], "de-assert is nothing");
    apic(&shared, 0, reg::ICR, 0x0699);
    assert_eq!(attention_of(&shared), [0, attention::SIPI]);
    assert_eq!(shared.ports()[1].sipi_vector.load(Ordering::SeqCst), 0x99);
}

#[test]
fn x2apic_ipis_carry_32_bits() {
    let shared = machine(20);
    for port in shared.ports() {
        assert!(port.lapic.set_apic_base(port.lapic.apic_base() | base::X2APIC));
    }
    let send = |icr: u64| {
        let effect = shared.ports()[0].lapic.write_msr(0x830, icr, 0).unwrap();
        shared.apic_effect(0, effect);
    };
    send(17 << 32 | 0x41);
    assert_eq!(shared.ports()[17].lapic.pending(), Some(0x41));
    // Logical: cluster 1, members 0 and 2.
    send(0x0001_0005 << 32 | 0x0842);
    let hit: Vec<_> = (0..20).filter(|&i| pending(&shared)[i] == Some(0x42)).collect();
    assert_eq!(hit, [16, 18]);
    send(0xffff_ffff << 32 | 0x43);
    assert!(pending(&shared).iter().all(|p| *p == Some(0x43)));
    // The window is gone.
    assert!(!shared.chip_mmio_read(0, APIC + 0x20, &mut [0; 4]));
}

#[test]
fn lowest_priority_goes_to_the_idlest_and_takes_turns() {
    let shared = machine(3);
    for me in 0..3u32 {
        apic(&shared, me, reg::LDR, 1 << (24 + me));
    }
    let msi = |mask: u64| shared.signal_msi(0xfee0_000c | mask << 12, 0x0150);
    apic(&shared, 0, reg::TPR, 0x20);
    apic(&shared, 1, reg::TPR, 0x10);
    assert!(msi(0b011));
    assert_eq!(pending(&shared), [None, Some(0x50), None]);
    end(&shared, 1, 0x50);
    apic(&shared, 1, reg::TPR, 0);
    apic(&shared, 0, reg::TPR, 0);
    let mut hits = [0; 3];
    for _ in 0..30 {
        assert!(msi(0b111));
        let me = pending(&shared).iter().position(Option::is_some).unwrap();
        hits[me] += 1;
        end(&shared, me as u32, 0x50);
    }
    assert!(hits.iter().all(|n| *n > 0), "{hits:?}");
    assert!(!shared.signal_msi(0xfee0_000c | 0x80 << 12, 0x0150), "nobody has that bit");
    assert!(!shared.signal_msi(0, 0x50), "not the LAPICs' addresses");
}

#[test]
fn lines_reach_both_controllers() {
    let shared = machine(1);
    ioapic(&shared, 0x10 + 2 * 4, 0x34);
    ioapic(&shared, 0x10 + 2 * 2, 0x30);
    shared.set_irq(4, true);
    assert_eq!(pending(&shared), [Some(0x34)]);
    end(&shared, 0, 0x34);
    shared.set_irq(0, true);
    assert_eq!(pending(&shared), [Some(0x30)], "IRQ 0 is on pin 2");
    end(&shared, 0, 0x30);
    shared.set_irq(2, true);
    assert_eq!(pending(&shared), [None]);
    let mut irr = [0];
    assert!(shared.chip_pio_read(0x20, &mut irr));
    assert_eq!(irr, [0x11]);
    shared.set_irq(999, true);
}

#[test]
fn a_level_line_returns_after_the_lapics_eoi() {
    let shared = machine(2);
    ioapic(&shared, 0x10 + 2 * 20 + 1, 1 << 24);
    ioapic(&shared, 0x10 + 2 * 20, 0x8061);
    shared.set_irq(20, true);
    assert_eq!(pending(&shared), [None, Some(0x61)]);
    end(&shared, 1, 0x61);
    assert_eq!(pending(&shared), [None, Some(0x61)], "still up");
    shared.ports()[1].lapic.acknowledge(0x61);
    shared.set_irq(20, false);
    apic(&shared, 1, reg::EOI, 0);
    assert_eq!(pending(&shared), [None, None]);
}

#[test]
fn the_pic_interrupts_through_lint0() {
    let shared = machine(2);
    for (port, value) in [(0x20, 0x11), (0x21, 8), (0x21, 4), (0x21, 1), (0x21, 0)] {
        assert!(shared.chip_pio_write(port, &[value]));
    }
    attention_of(&shared);
    shared.set_irq(1, true);
    assert_eq!(attention_of(&shared), [attention::INTERRUPT, 0]);
    assert!(shared.extint(0) && !shared.extint(1));
    assert_eq!(shared.chip.acknowledge_pic(), 9);
    assert!(!shared.extint(0));
    // A wire to a fixed interrupt instead.
    apic(&shared, 0, reg::LVT_LINT0, 0x7a);
    shared.chip_pio_write(0x20, &[0x20]);
    shared.set_irq(3, true);
    assert!(!shared.extint(0));
    assert_eq!(pending(&shared), [Some(0x7a), None]);
}

#[test]
fn the_pit_raises_irq_0() {
    let shared = machine(1);
    ioapic(&shared, 0x10 + 2 * 2, 0x30);
    assert_eq!(shared.chip.deadline(), NEVER);
    // One shot of 12 ticks (10 us) that soon is over.
    for (port, value) in [(0x43, 0x30), (0x40, 12), (0x40, 0)] {
        assert!(shared.chip_pio_write(port, &[value]));
    }
    while shared.chip.deadline() != NEVER {
        shared.poll_pit(clock::host_tsc());
    }
    assert_eq!(pending(&shared), [Some(0x30)]);
}

#[test]
fn wide_port_accesses_are_bytes() {
    let shared = machine(1);
    assert!(shared.chip_pio_write(0x4d0, &0x0e20u16.to_le_bytes()));
    let mut both = [0; 2];
    assert!(shared.chip_pio_read(0x4d0, &mut both));
    assert_eq!(both, [0x20, 0x0e]);
    assert!(!shared.chip_pio_read(0x60, &mut both));
    let mut odd = [0; 4];
    assert!(shared.chip_pio_read(0xa1, &mut odd));
    assert_eq!(odd[1..], [0xff; 3]);
}

#[test]
fn odd_register_accesses() {
    let shared = machine(1);
    let mut wide = [0xaa; 8];
    assert!(shared.chip_mmio_read(0, APIC + 0x30, &mut wide));
    assert_eq!(wide, [0x14, 0, 5, 0, 0, 0, 0, 0]);
    let mut byte = [0];
    assert!(shared.chip_mmio_read(0, APIC + 0x32, &mut byte));
    assert_eq!(byte, [5]);
    assert!(shared.chip_mmio_write(0, APIC + 0x80, &[0x50]));
    assert_eq!(shared.ports()[0].lapic.tpr(), 0);
    for offset in 0..0x1000 {
        shared.chip_mmio_read(0, APIC + offset, &mut wide);
        shared.chip_mmio_read(0, IOAPIC_BASE + offset, &mut wide);
    }
    assert!(!shared.chip_mmio_read(0, APIC + 0x1000, &mut wide));
    assert!(!shared.chip_mmio_read(0, APIC - 1, &mut byte));
}

#[test]
fn state_of_the_whole_survives() {
    let shared = machine(1);
    for (port, value) in
        [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x43, 0x34), (0x40, 0), (0x40, 0x80)]
    {
        shared.chip_pio_write(port, &[value]);
    }
    ioapic(&shared, 0x10 + 2 * 20, 0x8061);
    shared.set_irq(20, true);
    shared.set_irq(5, true);
    let state = shared.chip_state();
    let copy = machine(1);
    copy.set_chip_state(&state);
    assert_eq!(copy.chip_state(), state);
    assert!(copy.extint(0));
    assert_ne!(copy.chip.deadline(), NEVER);
    copy.reset_chip();
    assert_eq!(copy.chip_state(), machine(1).chip_state());
}
