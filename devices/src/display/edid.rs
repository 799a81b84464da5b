//! What a monitor says of itself (VESA E-EDID 1.4, base block): 128 bytes that guests' drivers read to choose a mode.
//!
//! ```text
//!   00 header | 08 who, when | 12 1.4 | 14 kind | 19 colours | 23 established, 26 standard timings
//!   36 preferred mode | 48 ranges | 5a name | 6c unused | 7e extensions: none | 7f checksum
//! ```

/// Bytes of the block.
pub const EDID_BYTES: usize = 128;
/// The largest width or height that a detailed timing can say.
const MOST: u32 = 4095;
/// Pixels of horizontal blanking: front porch, sync, all (CVT 1.2, reduced blanking).
const H_FRONT: u32 = 48;
const H_SYNC: u32 = 32;
const H_BLANK: u32 = 160;
/// Lines of vertical front porch and sync, and the shortest vertical blanking in microseconds.
const V_FRONT: u32 = 3;
const V_SYNC: u32 = 6;
const V_BLANK_US: u64 = 460;
/// Units of 10 kHz that the pixel clock's field can hold.
const MOST_CLOCK: u64 = 0xffff;
/// Frames a second.
const RATE: u64 = 60;
/// Widths of standard timings and the code of the height's ratio to them (0 16:10, 1 4:3, 2 5:4, 3 16:9).
const STANDARD: [(u32, u8); 8] =
    [(1920, 3), (1280, 2), (1600, 1), (1440, 0), (1280, 0), (1680, 0), (1280, 3), (1600, 3)];

/// The block of a monitor that likes `width` by `height` (at most 4095 each) best, at 60 Hz.
pub fn edid(width: u32, height: u32) -> [u8; EDID_BYTES] {
    let (width, height) = (width.clamp(64, MOST), height.clamp(64, MOST));
    let mut block = [0; EDID_BYTES];
    block[1..7].fill(0xff);
    // Three letters of five bits: LDG.
    block[8..10].copy_from_slice(&(12u16 << 10 | 4 << 5 | 7).to_be_bytes());
    block[10..12].copy_from_slice(&1u16.to_le_bytes());
    block[17] = 2026u16.wrapping_sub(1990) as u8;
    block[18..20].copy_from_slice(&[1, 4]);
    // Digital, 8 bits for each colour, DisplayPort.
    block[20] = 0xa5;
    // Centimetres, at 96 dots an inch.
    block[21] = (width * 254 / 9600).min(255) as u8;
    block[22] = (height * 254 / 9600).min(255) as u8;
    block[23] = 220 - 100; // gamma 2.2
    block[24] = 0x07; // sRGB, the preferred mode is the native one, any frequency in range
    block[25..35].copy_from_slice(&[0xee, 0x91, 0xa3, 0x54, 0x4c, 0x99, 0x26, 0x0f, 0x50, 0x54]);
    block[35] = 0x21; // 640x480 and 800x600 at 60 Hz
    block[36] = 0x08; // 1024x768 at 60 Hz
    for (slot, (wide, ratio)) in block[38..54].chunks_exact_mut(2).zip(STANDARD) {
        slot.copy_from_slice(&[(wide / 8 - 31) as u8, ratio << 6]);
    }
    block[54..72].copy_from_slice(&detailed_timing(width, height));
    // Vertical 50..125 Hz, horizontal 30..160 kHz, up to 660 MHz; the limits are all there is to say.
    block[72..90].copy_from_slice(&descriptor(0xfd, [50, 125, 30, 160, 66, 1], b'\n', b' '));
    block[90..108].copy_from_slice(&descriptor(0xfc, *b"Lodge\n", b' ', b' '));
    block[108..126].copy_from_slice(&descriptor(0x10, [0; 6], 0, 0));
    let sum = block.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    block[127] = sum.wrapping_neg();
    block
}

/// A display descriptor: what it is, six bytes, and how it is filled up.
fn descriptor(tag: u8, data: [u8; 6], end: u8, fill: u8) -> [u8; 18] {
    let mut bytes = [fill; 18];
    bytes[..5].copy_from_slice(&[0, 0, 0, tag, 0]);
    bytes[5..11].copy_from_slice(&data);
    bytes[11] = end;
    bytes
}

/// The mode as a detailed timing descriptor.
fn detailed_timing(width: u32, height: u32) -> [u8; 18] {
    // So many lines that the blanking is long enough at this rate.
    let frame_us = 1_000_000 / RATE;
    let blank = u64::from(height) * V_BLANK_US / (frame_us - V_BLANK_US) + 1;
    let v_blank = (blank as u32).max(V_FRONT + V_SYNC + 6);
    let total = u64::from(width + H_BLANK) * u64::from(height + v_blank);
    let clock = (total * RATE / 10_000).min(MOST_CLOCK) as u16;
    let high = |a: u32, b: u32| ((a >> 8) << 4 | b >> 8) as u8;
    let (width_mm, height_mm) = ((width * 254 / 960).min(4095), (height * 254 / 960).min(4095));
    let [clock_low, clock_high] = clock.to_le_bytes();
    [
        clock_low,
        clock_high,
        width as u8,
        H_BLANK as u8,
        high(width, H_BLANK),
        height as u8,
        v_blank as u8,
        high(height, v_blank),
        H_FRONT as u8,
        H_SYNC as u8,
        (V_FRONT << 4 | V_SYNC) as u8,
        0,
        width_mm as u8,
        height_mm as u8,
        high(width_mm, height_mm),
        0,
        0,
        0x1a, // digital separate syncs, horizontal positive
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_says_the_mode_and_sums_to_zero() {
        for (width, height) in [(1280, 800), (1024, 768), (3840, 2160), (0, 0), (u32::MAX, 70000)] {
            let block = edid(width, height);
            assert_eq!(block[..8], [0, 255, 255, 255, 255, 255, 255, 0]);
            assert_eq!(block.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            assert_eq!(block[126], 0);
            let timing = &block[54..72];
            let wide = u32::from(timing[2]) | u32::from(timing[4] >> 4) << 8;
            let high = u32::from(timing[5]) | u32::from(timing[7] >> 4) << 8;
            assert_eq!((wide, high), (width.clamp(64, 4095), height.clamp(64, 4095)));
            assert_ne!(timing[..2], [0, 0]);
        }
        let block = edid(1280, 800);
        // 1440 by 823 at 60 Hz.
        assert_eq!(u16::from_le_bytes([block[54], block[55]]), (1440 * 823 * 60 / 10_000) as u16);
        assert_eq!(&block[95..102], b"Lodge\n ");
        // 1920 by 9/16 at 60 Hz.
        assert_eq!(block[38..40], [0xd1, 0xc0]);
    }
}
