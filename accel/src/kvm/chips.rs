//! The kernel's PIC pair, IOAPIC, PIT and clock, saved and restored.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_FLAGS_SPEAKER_DATA_ON, kvm_clock_data, kvm_ioapic_state, kvm_irqchip, kvm_pic_state,
    kvm_pit_channel_state, kvm_pit_state2,
};
use kvm_ioctls::VmFd;

use super::refused;
use super::routes::PINS;
use crate::error::{Error, Result};
use crate::state::{ChipState, IoapicState, PicState, PitChannelState, PitState};

/// Where a PC's I/O APIC is (82093AA, 3.0).
const IOAPIC_BASE: u64 = 0xfec0_0000;

pub(super) fn save(vm: &VmFd) -> Result<ChipState> {
    let chip = |chip_id| -> Result<kvm_irqchip> {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(refused("reading the interrupt controllers"))?;
        Ok(chip)
    };
    // SAFETY: the kernel filled the union as the chip's id says; all are plain numbers.
    let (master, slave, ioapic) = unsafe {
        (
            chip(KVM_IRQCHIP_PIC_MASTER)?.chip.pic,
            chip(KVM_IRQCHIP_PIC_SLAVE)?.chip.pic,
            chip(KVM_IRQCHIP_IOAPIC)?.chip.ioapic,
        )
    };
    let pit = vm.get_pit2().map_err(refused("reading the PIT"))?;
    let clock = vm.get_clock().map_err(refused("reading the guest's clock"))?;
    Ok(ChipState {
        pics: [pic_from(&master), pic_from(&slave)],
        ioapic: IoapicState {
            id: ioapic.id,
            select: ioapic.ioregsel,
            irr: ioapic.irr,
            // SAFETY: a union of one number and its bit fields.
            redirection: ioapic.redirtbl.iter().map(|entry| unsafe { entry.bits }).collect(),
        },
        pit: PitState {
            channels: pit.channels.map(|channel| channel_from(&channel)),
            speaker_data_on: pit.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0,
        },
        clock: Some(clock.clock),
    })
}

pub(super) fn restore(vm: &VmFd, state: &ChipState) -> Result<()> {
    let mut ioapic = kvm_ioapic_state {
        base_address: IOAPIC_BASE,
        ioregsel: state.ioapic.select,
        id: state.ioapic.id,
        irr: state.ioapic.irr,
        ..Default::default()
    };
    if state.ioapic.redirection.len() != PINS as usize {
        return Err(Error::Invalid(format!(
            "a saved I/O APIC with {} pins, not {PINS}",
            state.ioapic.redirection.len()
        )));
    }
    for (entry, bits) in ioapic.redirtbl.iter_mut().zip(&state.ioapic.redirection) {
        entry.bits = *bits;
    }
    // The PIT and the clock first: what they raise is in the controllers' saved state already.
    let mut pit = kvm_pit_state2 {
        channels: state.pit.channels.map(|channel| channel_to(&channel)),
        ..Default::default()
    };
    if state.pit.speaker_data_on {
        pit.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON;
    }
    vm.set_pit2(&pit).map_err(refused("setting the PIT"))?;
    if let Some(clock) = state.clock {
        let clock = kvm_clock_data { clock, ..Default::default() };
        vm.set_clock(&clock).map_err(refused("setting the guest's clock"))?;
    }
    let set = |chip_id, fill: &dyn Fn(&mut kvm_irqchip)| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        fill(&mut chip);
        vm.set_irqchip(&chip).map_err(refused("setting the interrupt controllers"))
    };
    set(KVM_IRQCHIP_PIC_MASTER, &|chip| chip.chip.pic = pic_to(&state.pics[0]))?;
    set(KVM_IRQCHIP_PIC_SLAVE, &|chip| chip.chip.pic = pic_to(&state.pics[1]))?;
    set(KVM_IRQCHIP_IOAPIC, &|chip| chip.chip.ioapic = ioapic)
}

fn pic_from(pic: &kvm_pic_state) -> PicState {
    PicState {
        last_irr: pic.last_irr,
        irr: pic.irr,
        imr: pic.imr,
        isr: pic.isr,
        priority_add: pic.priority_add,
        irq_base: pic.irq_base,
        read_reg_select: pic.read_reg_select != 0,
        poll: pic.poll != 0,
        special_mask: pic.special_mask != 0,
        init_state: pic.init_state,
        auto_eoi: pic.auto_eoi != 0,
        rotate_on_auto_eoi: pic.rotate_on_auto_eoi != 0,
        special_fully_nested: pic.special_fully_nested_mode != 0,
        init4: pic.init4 != 0,
        elcr: pic.elcr,
        elcr_mask: pic.elcr_mask,
    }
}

fn pic_to(pic: &PicState) -> kvm_pic_state {
    kvm_pic_state {
        last_irr: pic.last_irr,
        irr: pic.irr,
        imr: pic.imr,
        isr: pic.isr,
        priority_add: pic.priority_add,
        irq_base: pic.irq_base,
        read_reg_select: pic.read_reg_select.into(),
        poll: pic.poll.into(),
        special_mask: pic.special_mask.into(),
        init_state: pic.init_state,
        auto_eoi: pic.auto_eoi.into(),
        rotate_on_auto_eoi: pic.rotate_on_auto_eoi.into(),
        special_fully_nested_mode: pic.special_fully_nested.into(),
        init4: pic.init4.into(),
        elcr: pic.elcr,
        elcr_mask: pic.elcr_mask,
    }
}

fn channel_from(channel: &kvm_pit_channel_state) -> PitChannelState {
    PitChannelState {
        count: channel.count,
        latched_count: channel.latched_count,
        count_latched: channel.count_latched,
        status_latched: channel.status_latched != 0,
        status: channel.status,
        read_state: channel.read_state,
        write_state: channel.write_state,
        write_latch: channel.write_latch,
        rw_mode: channel.rw_mode,
        mode: channel.mode,
        bcd: channel.bcd != 0,
        gate: channel.gate != 0,
        load_time: channel.count_load_time,
    }
}

fn channel_to(channel: &PitChannelState) -> kvm_pit_channel_state {
    kvm_pit_channel_state {
        count: channel.count,
        latched_count: channel.latched_count,
        count_latched: channel.count_latched,
        status_latched: channel.status_latched.into(),
        status: channel.status,
        read_state: channel.read_state,
        write_state: channel.write_state,
        write_latch: channel.write_latch,
        rw_mode: channel.rw_mode,
        mode: channel.mode,
        bcd: channel.bcd.into(),
        gate: channel.gate.into(),
        count_load_time: channel.load_time,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pic_and_pit_survive_the_round_trip() {
        let pic = PicState { irr: 3, poll: true, init_state: 2, elcr: 0xc0, ..Default::default() };
        assert_eq!(pic_from(&pic_to(&pic)), pic);
        let channel = PitChannelState {
            count: 65536,
            mode: 2,
            gate: true,
            load_time: -7,
            ..Default::default()
        };
        assert_eq!(channel_from(&channel_to(&channel)), channel);
    }
}
