//! The ZRLE encoding (RFC 6143, section 7.7.6): tiles of 64 x 64, each in the shortest of four ways, then deflated.

use super::palette::Palette;
use super::zlib::Deflater;
use super::{Piece, cut, with_length};
use crate::vnc::pixels::Wire;

/// A tile's side.
pub const TILE: usize = 64;
/// The most colours of a palette with runs, and of one without.
const MOST_RUNS: usize = 127;
const MOST_PACKED: usize = 16;
const RUNS: u8 = 128;

/// The stream and scratch memory of a connection.
#[derive(Default)]
pub struct Zrle {
    stream: Option<Deflater>,
    palette: Palette,
    tile: Vec<u32>,
    plain: Vec<u8>,
}

impl Zrle {
    /// Appends a piece without its header.
    pub fn encode(&mut self, piece: &Piece<'_>, level: u32, out: &mut Vec<u8>) {
        self.plain.clear();
        let wire = piece.format.cpixel();
        let most = TILE as u32;
        for (y, height) in cut(0, piece.height as u32, most) {
            for (x, width) in cut(0, piece.width as u32, most) {
                self.tile.clear();
                let rows = piece.values.chunks_exact(piece.width);
                for row in rows.skip(y as usize).take(height as usize) {
                    self.tile.extend_from_slice(&row[x as usize..(x + width) as usize]);
                }
                self.tile(width as usize, wire);
            }
        }
        let stream = self.stream.get_or_insert_with(|| Deflater::new(level));
        with_length(out, |out| stream.append(&self.plain, level, out));
    }

    fn tile(&mut self, width: usize, wire: Wire) {
        let (tile, out) = (&self.tile[..], &mut self.plain);
        self.palette.clear();
        let mut few = true;
        let (mut single, mut long, mut tails) = (0, 0, 0);
        for run in runs(tile) {
            few = few && self.palette.insert(run[0], MOST_RUNS);
            match run.len() {
                1 => single += 1,
                len => {
                    long += 1;
                    tails += (len - 1) / 255;
                }
            }
        }
        let colours = self.palette.colours();
        if let (true, &[colour]) = (few, colours) {
            out.push(1);
            return wire.put(colour, out);
        }
        // How long each way is, in bytes.
        let raw = tile.len() * wire.bytes();
        let plain_runs = (single + long) * (wire.bytes() + 1) + tails;
        let table = colours.len() * wire.bytes();
        let palette_runs = if few { table + single + 2 * long + tails } else { usize::MAX };
        let bits = bits(colours.len());
        let packed = match few && colours.len() <= MOST_PACKED {
            true => table + (width * bits).div_ceil(8) * (tile.len() / width),
            false => usize::MAX,
        };
        match raw.min(plain_runs).min(palette_runs).min(packed) {
            best if best == packed => {
                out.push(colours.len() as u8);
                wire.put_all(colours, out);
                pack(tile, width, bits, &self.palette, out);
            }
            best if best == palette_runs => {
                out.push(RUNS + colours.len() as u8);
                wire.put_all(colours, out);
                for run in runs(tile) {
                    let index = self.palette.index(run[0]);
                    if run.len() == 1 {
                        out.push(index);
                    } else {
                        out.push(index | RUNS);
                        run_length(run.len(), out);
                    }
                }
            }
            best if best == plain_runs => {
                out.push(RUNS);
                for run in runs(tile) {
                    wire.put(run[0], out);
                    run_length(run.len(), out);
                }
            }
            _ => {
                out.push(0);
                wire.put_all(tile, out);
            }
        }
    }
}

/// Runs of one colour, also from the end of a row to the next.
fn runs(tile: &[u32]) -> impl Iterator<Item = &[u32]> {
    tile.chunk_by(|a, b| a == b)
}

/// Bits for the number of one of so many colours.
fn bits(colours: usize) -> usize {
    match colours {
        0..=2 => 1,
        3..=4 => 2,
        _ => 4,
    }
}

fn pack(tile: &[u32], width: usize, bits: usize, palette: &Palette, out: &mut Vec<u8>) {
    let mut last = (tile[0], palette.index(tile[0]));
    for row in tile.chunks(width) {
        out.extend(row.chunks(8 / bits).map(|pixels| {
            let mut byte = 0;
            for (i, &value) in pixels.iter().enumerate() {
                if value != last.0 {
                    last = (value, palette.index(value));
                }
                byte |= last.1 << (8 - bits * (i + 1));
            }
            byte
        }));
    }
}

fn run_length(len: usize, out: &mut Vec<u8>) {
    out.extend(std::iter::repeat_n(255, (len - 1) / 255));
    out.push(((len - 1) % 255) as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vnc::pixels::PixelFormat;

    /// A tile's bytes before they are deflated.
    fn tile(values: &[u32], width: usize) -> Vec<u8> {
        let mut zrle = Zrle { tile: values.to_vec(), ..Zrle::default() };
        zrle.tile(width, PixelFormat::NATIVE.cpixel());
        zrle.plain
    }

    #[test]
    fn each_tile_goes_the_shortest_way() {
        assert_eq!(tile(&[0x0a_0b0c; 4096], 64), [1, 0x0c, 0x0b, 0x0a]);
        // Two colours in turn: a bit each, rows padded to bytes.
        let turns: Vec<u32> = (0..30).map(|i| i % 2).collect();
        assert_eq!(
            tile(&turns, 10),
            [&[2, 0, 0, 0, 1, 0, 0][..], &[0x55, 0x40].repeat(3)].concat()
        );
        // A long run of each of two colours, then two of each.
        let halves = [vec![5; 2048], vec![6; 2048]].concat();
        let run = |pixel: &[u8]| [pixel, &[255; 8], &[7]].concat();
        let expected = [&[128][..], &run(&[5, 0, 0]), &run(&[6, 0, 0])].concat();
        assert_eq!(tile(&halves, 64), expected);
        let quarters = [vec![5; 1024], vec![6; 1024]].concat().repeat(2);
        let run = |index: u8| [index | 128, 255, 255, 255, 255, 3];
        let both = [run(0), run(1)].concat();
        let expected = [&[130, 5, 0, 0, 6, 0, 0][..], &both, &both].concat();
        assert_eq!(tile(&quarters, 64), expected);
        // All different.
        let noise: Vec<u32> = (0..4096).collect();
        assert_eq!(tile(&noise, 64).len(), 1 + 3 * 4096);
        assert_eq!(tile(&noise, 64)[0], 0);
        // Runs of more colours than a palette has.
        let steps: Vec<u32> = (0..4096).map(|i| i / 16).collect();
        assert_eq!(tile(&steps, 64)[..5], [128, 0, 0, 0, 15]);
        assert_eq!(tile(&steps, 64).len(), 1 + 256 * 4);
    }

    #[test]
    fn run_lengths_are_sums() {
        let of = |len| {
            let mut out = Vec::new();
            run_length(len, &mut out);
            out
        };
        assert_eq!(of(1), [0]);
        assert_eq!(of(255), [254]);
        assert_eq!(of(256), [255, 0]);
        assert_eq!(of(510), [255, 254]);
        assert_eq!(of(511), [255, 255, 0]);
    }
}
