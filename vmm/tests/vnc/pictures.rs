//! Pictures to send: text, a photograph, noise, areas of one colour.

use lodge_devices::display::Picture;

/// Numbers that look random and are always the same.
pub struct Random(pub u32);

impl Random {
    pub fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }
}

fn from(width: u32, height: u32, mut pixel: impl FnMut(u32, u32) -> u32) -> Picture {
    let mut picture = Picture::black(width, height);
    for y in 0..height {
        for x in 0..width {
            picture.pixels[(y * width + x) as usize] = pixel(x, y) & 0xff_ffff;
        }
    }
    picture
}

/// A console's text, from some line on: letters of 8 x 16 that are the same for the same line.
pub fn text(width: u32, height: u32, first_line: u32) -> Picture {
    let letter = |line: u32, column: u32| {
        let length = 10 + line.wrapping_mul(2_654_435_761) % 100;
        let code = (line.wrapping_mul(31) + column.wrapping_mul(17)) ^ line << 3;
        if column < length { 1 + code % 90 } else { 0 }
    };
    from(width, height, |x, y| {
        let code = letter(first_line + y / 16, x / 8);
        let bits = code.wrapping_mul(0x9e37_79b1).rotate_left((y % 16) * 2);
        let ink = code != 0 && y % 16 > 2 && bits >> (x % 8) & 1 != 0;
        if ink { 0xaa_aaaa } else { 0 }
    })
}

/// Smooth colours with a little noise, as in a photograph.
pub fn photo(width: u32, height: u32) -> Picture {
    let mut random = Random(7);
    from(width, height, |x, y| {
        let noise = random.next() % 4;
        let wave =
            |f: f64, p: f64| ((f64::from(x) * f + f64::from(y) * p).sin() * 100.0 + 128.0) as u32;
        (wave(0.01, 0.02) + noise) << 16 | (wave(0.02, 0.005) + noise) << 8 | wave(0.013, 0.017)
    })
}

pub fn noise(width: u32, height: u32) -> Picture {
    let mut random = Random(99);
    from(width, height, |_, _| random.next())
}

/// Something of everything: areas of few colours, of runs, text, a photograph, noise.
pub fn mixed(width: u32, height: u32) -> Picture {
    let (text, photo, noise) = (text(width, height, 5), photo(width, height), noise(width, height));
    let at = |picture: &Picture, x, y| picture.pixels[(y * width + x) as usize];
    from(width, height, |x, y| match (x / 70 + y / 90 * 3) % 8 {
        0 => 0x33_6699,
        1 => at(&text, x, y),
        2 => at(&photo, x, y),
        3 => at(&noise, x, y),
        4 => (x / 9 + y / 7) % 5 * 0x2f_1b0d,
        5 => x % 14 * 0x0f_0d0b,
        6 => (x + y * 13) % 200 * 0x01_0203,
        _ => y * 0x03_0201 + x / 30,
    })
}
