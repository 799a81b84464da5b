//! The ports of a VGA (IBM VGA, "Registers"): what each reads as and what a write to it does.
//!
//! ```text
//!   3C0, 3C1 attribute controller     3C2, 3CC miscellaneous output    3C4, 3C5 sequencer
//!   3C6..3C9 DAC                      3CE, 3CF graphics controller
//!   3D4, 3D5 CRT controller           3DA input status 1, feature control (3B4, 3B5, 3BA on a monochrome one)
//! ```

use super::state::{MISC_COLOR, VgaState, attribute, crtc};

/// Which bits of the sequencer's and the graphics controller's registers exist.
const SEQUENCER_BITS: [u8; 8] = [0x03, 0x3d, 0x0f, 0x3f, 0x0e, 0, 0, 0xff];
const GRAPHICS_BITS: [u8; 16] =
    [0x0f, 0x0f, 0x0f, 0x1f, 0x03, 0x7b, 0x0f, 0x0f, 0xff, 0, 0, 0, 0, 0, 0, 0];
/// Which bits of the attribute controller's registers exist, from 10H on; those of the palette before are 3FH.
const ATTRIBUTE_BITS: [u8; 5] = [0xef, 0xff, 0x3f, 0x0f, 0x0f];
/// CRT controller 11H: registers 0 to 7 cannot be written, except the line compare bit.
const PROTECT: u8 = 1 << 7;
const OVERFLOW_LINE_COMPARE: u8 = 1 << 4;
/// Input status 0: a monitor answers.
const SWITCH_SENSE: u8 = 1 << 4;
/// The feature control register's bits.
const FEATURE_BITS: u8 = 0x03;

/// Input status 1 at `nanos` since some time: bit 0 no pixels are being drawn, bit 3 vertical retrace.
///
/// Frames are of 60 Hz and 525 lines. The retrace is told for all of the vertical blanking, so that a guest that
/// looks rarely does not miss it.
pub(super) fn input_status(nanos: u64) -> u8 {
    const FRAME: u64 = 1_000_000_000 / 60;
    const LINE: u64 = FRAME / 525;
    let into_frame = nanos % FRAME;
    if into_frame >= 480 * LINE {
        return 0x09;
    }
    u8::from(into_frame % LINE >= LINE * 4 / 5)
}

impl VgaState {
    /// Whether a port is one of the CRT controller's that answers for the other kind of monitor.
    fn is_elsewhere(&self, port: u16) -> bool {
        let other = if self.misc & MISC_COLOR != 0 { 0x3b0 } else { 0x3d0 };
        port & 0xfff0 == other
    }

    /// Reads a port; `status` is input status 1.
    pub(super) fn read_port(&mut self, port: u16, status: u8) -> u8 {
        if self.is_elsewhere(port) {
            return 0xff;
        }
        match port {
            0x3b4 | 0x3d4 => self.crtc_index,
            0x3b5 | 0x3d5 => self.crtc.get(usize::from(self.crtc_index)).copied().unwrap_or(0),
            0x3ba | 0x3da => {
                self.attribute_data = false;
                status
            }
            0x3c0 => self.attribute_index,
            0x3c1 => {
                let index = usize::from(self.attribute_index & 0x1f);
                self.attribute.get(index).copied().unwrap_or(0)
            }
            0x3c2 => SWITCH_SENSE,
            0x3c3 => self.enable,
            0x3c4 => self.sequencer_index,
            0x3c5 => self.sequencer[usize::from(self.sequencer_index & 7)],
            0x3c6 => self.dac_mask,
            0x3c7 => self.dac_mode,
            0x3c8 => self.dac_write,
            0x3c9 => self.read_dac(),
            0x3ca => self.feature,
            0x3cc => self.misc,
            0x3ce => self.graphics_index,
            0x3cf => self.graphics[usize::from(self.graphics_index & 15)],
            _ => 0xff,
        }
    }

    /// Writes a port.
    pub(super) fn write_port(&mut self, port: u16, value: u8) {
        if self.is_elsewhere(port) {
            return;
        }
        match port {
            0x3b4 | 0x3d4 => self.crtc_index = value,
            0x3b5 | 0x3d5 => self.write_crtc(value),
            0x3ba | 0x3da => self.feature = value & FEATURE_BITS,
            0x3c0 => self.write_attribute(value),
            0x3c2 => self.misc = value & !0x10,
            0x3c3 => self.enable = value & 1,
            0x3c4 => self.sequencer_index = value & 7,
            0x3c5 => {
                let index = usize::from(self.sequencer_index & 7);
                self.sequencer[index] = value & SEQUENCER_BITS[index];
            }
            0x3c6 => self.dac_mask = value,
            0x3c7 => (self.dac_read, self.dac_step, self.dac_mode) = (value, 0, 3),
            0x3c8 => (self.dac_write, self.dac_step, self.dac_mode) = (value, 0, 0),
            0x3c9 => self.write_dac(value),
            0x3ce => self.graphics_index = value & 15,
            0x3cf => {
                let index = usize::from(self.graphics_index & 15);
                self.graphics[index] = value & GRAPHICS_BITS[index];
            }
            _ => {}
        }
    }

    fn write_crtc(&mut self, value: u8) {
        let index = usize::from(self.crtc_index);
        let protected = self.crtc[crtc::V_SYNC_END] & PROTECT != 0 && index <= crtc::OVERFLOW;
        let Some(register) = self.crtc.get_mut(index) else { return };
        match protected {
            true if index == crtc::OVERFLOW => {
                let bit = OVERFLOW_LINE_COMPARE;
                *register = *register & !bit | value & bit;
            }
            true => {}
            false => *register = value,
        }
    }

    /// The one port for index and data, in turn.
    fn write_attribute(&mut self, value: u8) {
        if !self.attribute_data {
            self.attribute_index = value & 0x3f;
        } else {
            let index = usize::from(self.attribute_index & 0x1f);
            let bits = match index.checked_sub(attribute::MODE) {
                Some(beyond) => ATTRIBUTE_BITS.get(beyond).copied(),
                // The palette; a real VGA refuses this while the screen uses it, and some software forgets that.
                None => Some(0x3f),
            };
            if let (Some(register), Some(bits)) = (self.attribute.get_mut(index), bits) {
                *register = value & bits;
            }
        }
        self.attribute_data = !self.attribute_data;
    }

    fn read_dac(&mut self) -> u8 {
        let at = usize::from(self.dac_read) * 3 + usize::from(self.dac_step);
        let value = self.dac.get(at).copied().unwrap_or(0);
        self.dac_step = (self.dac_step + 1) % 3;
        if self.dac_step == 0 {
            self.dac_read = self.dac_read.wrapping_add(1);
        }
        value
    }

    /// A colour changes when its third component is written.
    fn write_dac(&mut self, value: u8) {
        let value = if self.dispi.dac_8bit() { value } else { value & 0x3f };
        if let Some(pending) = self.dac_pending.get_mut(usize::from(self.dac_step)) {
            *pending = value;
            self.dac_step += 1;
            return;
        }
        let at = usize::from(self.dac_write) * 3;
        let [red, green] = self.dac_pending;
        if let Some(color) = self.dac.get_mut(at..at + 3) {
            color.copy_from_slice(&[red, green, value]);
        }
        self.dac_step = 0;
        self.dac_write = self.dac_write.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn color() -> VgaState {
        VgaState { misc: MISC_COLOR, ..VgaState::default() }
    }

    #[test]
    fn attribute_port_takes_turns() {
        let mut vga = color();
        vga.read_port(0x3da, 0);
        for (index, value) in [(0, 0xff), (0x10, 0xff), (0x13, 0xff), (0x1f, 5)] {
            vga.write_port(0x3c0, index);
            vga.write_port(0x3c0, value);
        }
        assert_eq!((vga.attribute[0], vga.attribute[0x10], vga.attribute[0x13]), (0x3f, 0xef, 15));
        vga.write_port(0x3c0, 1);
        vga.read_port(0x3da, 0);
        vga.write_port(0x3c0, 2);
        assert_eq!(vga.attribute_index, 2, "reading 3DA begins with the index again");
    }

    #[test]
    fn the_crt_controller_is_where_the_monitor_is() {
        let mut vga = color();
        vga.write_port(0x3b4, 5);
        vga.write_port(0x3d4, 7);
        assert_eq!((vga.read_port(0x3d4, 0), vga.read_port(0x3b4, 0)), (7, 0xff));
        assert_eq!((vga.read_port(0x3da, 9), vga.read_port(0x3ba, 9)), (9, 0xff));
        vga.write_port(0x3d4, 0x11);
        vga.write_port(0x3d5, 0x80);
        for index in 0..8 {
            vga.write_port(0x3d4, index);
            vga.write_port(0x3d5, 0xff);
        }
        assert_eq!(vga.crtc[..8], [0, 0, 0, 0, 0, 0, 0, 0x10], "write protection");
        vga.write_port(0x3c2, 0);
        assert_eq!((vga.read_port(0x3b4, 0), vga.read_port(0x3d4, 0)), (7, 0xff));
    }

    #[test]
    fn colors_are_written_and_read_in_threes() {
        let mut vga = color();
        vga.write_port(0x3c8, 255);
        for value in [1, 2, 0x43, 4, 5, 6, 7] {
            vga.write_port(0x3c9, value);
        }
        assert_eq!((&vga.dac[765..], &vga.dac[..6]), (&[1, 2, 3][..], &[4, 5, 6, 0, 0, 0][..]));
        assert_eq!(vga.read_port(0x3c7, 0), 0);
        vga.write_port(0x3c7, 255);
        let read: Vec<u8> = (0..6).map(|_| vga.read_port(0x3c9, 0)).collect();
        assert_eq!(read, [1, 2, 3, 4, 5, 6]);
        assert_eq!(vga.read_port(0x3c7, 0), 3);
    }

    #[test]
    fn retraces_come_and_go() {
        let seen: Vec<u8> = (0..100_000).map(|n| input_status(n * 1000)).collect();
        for status in [0, 1, 9] {
            assert!(seen.contains(&status), "{status}");
        }
        let retraces = seen.windows(2).filter(|pair| pair[0] & 8 < pair[1] & 8).count();
        assert_eq!(retraces, 6, "in 100 ms");
    }
}
