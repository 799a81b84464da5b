//! The interrupt controllers' state, between the software CPU's form and the common one.

use lodge_softcpu::chip::ioapic;
use lodge_softcpu::chip::pic::Pic;
use lodge_softcpu::chip::pit::Channel;
use lodge_softcpu::chip::{self};

use crate::error::{Error, Result};
use crate::state::{ChipState, IoapicState, PicState, PitChannelState, PitState};

pub(super) fn from_soft(state: &chip::ChipState) -> ChipState {
    ChipState {
        pics: state.pics.map(pic_from),
        ioapic: IoapicState {
            id: state.ioapic.id,
            select: state.ioapic.select,
            irr: state.ioapic.irr,
            redirection: state.ioapic.redirection.to_vec(),
        },
        pit: PitState { channels: state.pit.map(channel_from), speaker_data_on: state.speaker },
        clock: None,
    }
}

/// A kvmclock in `state` is left out: the software CPU does not show one.
pub(super) fn to_soft(state: &ChipState) -> Result<chip::ChipState> {
    let redirection = state.ioapic.redirection.as_slice().try_into().map_err(|_| {
        Error::Invalid(format!(
            "a saved I/O APIC with {} pins, not {}",
            state.ioapic.redirection.len(),
            ioapic::PINS
        ))
    })?;
    Ok(chip::ChipState {
        pics: state.pics.map(pic_to),
        ioapic: ioapic::IoapicState {
            id: state.ioapic.id,
            select: state.ioapic.select,
            irr: state.ioapic.irr,
            redirection,
        },
        pit: state.pit.channels.map(channel_to),
        speaker: state.pit.speaker_data_on,
    })
}

/// Both forms have the same fields.
macro_rules! convert {
    ($name:ident: $from:ty => $to:ident { $($field:ident),* } $($more:tt)*) => {
        fn $name(from: $from) -> $to {
            $to { $($field: from.$field,)* $($more)* }
        }
    };
}

convert!(pic_from: Pic => PicState {
    last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select, poll, special_mask,
    init_state, auto_eoi, rotate_on_auto_eoi, special_fully_nested, init4, elcr, elcr_mask
});
convert!(pic_to: PicState => Pic {
    last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select, poll, special_mask,
    init_state, auto_eoi, rotate_on_auto_eoi, special_fully_nested, init4, elcr, elcr_mask
});
convert!(channel_from: Channel => PitChannelState {
    count, latched_count, count_latched, status_latched, status, read_state, write_state,
    write_latch, rw_mode, mode, bcd, gate, load_time
});
convert!(channel_to: PitChannelState => Channel {
    count, latched_count, count_latched, status_latched, status, read_state, write_state,
    write_latch, rw_mode, mode, bcd, gate, load_time
} paused_at: None);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_survives_the_round_trip() {
        let mut state = ChipState::default();
        state.ioapic.redirection = (0..24).map(|i| 0x0300_0000_0001_0030 + i).collect();
        state.ioapic.id = 4;
        state.pics[1] = PicState { irr: 3, elcr: 8, elcr_mask: 0xde, poll: true, ..state.pics[1] };
        state.pit.channels[2] =
            PitChannelState { count: 77, gate: true, load_time: 5, mode: 3, ..Default::default() };
        state.pit.speaker_data_on = true;
        assert_eq!(from_soft(&to_soft(&state).unwrap()), state);
        state.ioapic.redirection.pop();
        assert!(to_soft(&state).is_err());
    }
}
