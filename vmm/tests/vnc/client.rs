//! A small VNC client, written after the specification and not after the server: it keeps the picture that it was sent,
//! as pixel values of its own format.

use std::io::{Read, Write};

use flate2::{Decompress, FlushDecompress};

pub use super::format::Format;
use super::format::zrle_tile;

pub const RAW: i32 = 0;
pub const COPY_RECT: i32 = 1;
pub const ZLIB: i32 = 6;
pub const TIGHT: i32 = 7;
pub const ZRLE: i32 = 16;
pub const DESKTOP_SIZE: i32 = -223;
pub const CURSOR: i32 = -239;
pub const POINTER_MOTION: i32 = -257;
pub const EXTENDED_KEYS: i32 = -258;
pub const DESKTOP_NAME: i32 = -307;
pub const EXTENDED_DESKTOP_SIZE: i32 = -308;
pub const FENCE: i32 = -312;
pub const CONTINUOUS: i32 = -313;
pub const CURSOR_WITH_ALPHA: i32 = -314;
pub const SIDE_BUTTONS: i32 = -316;

pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// A rectangle of an update.
#[derive(Clone, Debug, PartialEq)]
pub struct Got {
    pub x: usize,
    pub y: usize,
    pub width: usize,
    pub height: usize,
    pub encoding: i32,
    /// What comes with a rectangle that has no pixels.
    pub data: Vec<u8>,
}

/// What the server says.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    Update(Vec<Got>),
    ColourMap(Vec<u8>),
    EndOfContinuous,
    Fence(u32, Vec<u8>),
}

pub struct Client {
    pub stream: Box<dyn Stream>,
    pub name: String,
    pub width: usize,
    pub height: usize,
    pub format: Format,
    pub pixels: Vec<u32>,
    /// Bytes so far.
    pub received: usize,
    pub jpegs: usize,
    zlib: Inflater,
    zrle: Inflater,
    tight: [Inflater; 4],
}

struct Inflater(Decompress);

impl Default for Inflater {
    fn default() -> Self {
        Self(Decompress::new(true))
    }
}

impl Inflater {
    /// All that these bytes say, which is at most `most`.
    fn inflate(&mut self, mut bytes: &[u8], most: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(most + 64);
        loop {
            let (used, had) = (self.0.total_in(), out.len());
            self.0.decompress_vec(bytes, &mut out, FlushDecompress::Sync).expect("zlib");
            bytes = &bytes[(self.0.total_in() - used) as usize..];
            assert!(out.len() <= most, "more pixels than the rectangle has");
            if bytes.is_empty() {
                return out;
            }
            assert!(out.len() > had, "zlib stands still");
        }
    }
}

impl Client {
    /// After security: `ClientInit` and `ServerInit`.
    pub fn start(mut stream: Box<dyn Stream>, shared: bool) -> Self {
        stream.write_all(&[shared.into()]).unwrap();
        let mut client = Self {
            stream,
            name: String::new(),
            width: 0,
            height: 0,
            format: Format::NATIVE,
            pixels: Vec::new(),
            received: 0,
            jpegs: 0,
            zlib: Inflater::default(),
            zrle: Inflater::default(),
            tight: Default::default(),
        };
        let (width, height) = (client.u16(), client.u16());
        client.resize(width, height);
        assert_eq!(client.bytes(16), Format::NATIVE.bytes());
        let len = client.u32() as usize;
        client.name = String::from_utf8(client.bytes(len)).unwrap();
        client
    }

    fn resize(&mut self, width: usize, height: usize) {
        (self.width, self.height) = (width, height);
        self.pixels = vec![0xdead_beef; width * height];
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).expect("the connection");
        self.received += len;
        bytes
    }

    fn u8(&mut self) -> u8 {
        self.bytes(1)[0]
    }

    fn u16(&mut self) -> usize {
        u16::from_be_bytes(self.bytes(2).try_into().unwrap()).into()
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.bytes(4).try_into().unwrap())
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn set_format(&mut self, format: Format) {
        self.format = format;
        self.send(&[&[0, 0, 0, 0][..], &format.bytes()].concat());
    }

    pub fn set_encodings(&mut self, encodings: &[i32]) {
        let mut message = vec![2, 0];
        message.extend((encodings.len() as u16).to_be_bytes());
        encodings.iter().for_each(|encoding| message.extend(encoding.to_be_bytes()));
        self.send(&message);
    }

    pub fn ask(&mut self, incremental: bool) {
        self.ask_area(incremental, [0, 0, self.width as u16, self.height as u16]);
    }

    pub fn ask_area(&mut self, incremental: bool, area: [u16; 4]) {
        let area = area.map(u16::to_be_bytes);
        self.send(&[&[3, incremental.into()][..], area.as_flattened()].concat());
    }

    pub fn continuous(&mut self, on: bool) {
        let area = [0, 0, self.width as u16, self.height as u16].map(u16::to_be_bytes);
        self.send(&[&[150, on.into()][..], area.as_flattened()].concat());
    }

    pub fn fence(&mut self, flags: u32, payload: &[u8]) {
        let flags = flags.to_be_bytes();
        self.send(&[&[248, 0, 0, 0][..], &flags, &[payload.len() as u8], payload].concat());
    }

    pub fn key(&mut self, keysym: u32, down: bool) {
        self.send(&[&[4, down.into(), 0, 0][..], &keysym.to_be_bytes()].concat());
    }

    pub fn pointer(&mut self, buttons: u8, x: u16, y: u16) {
        let [x, y] = [x, y].map(u16::to_be_bytes);
        self.send(&[5, buttons, x[0], x[1], y[0], y[1]]);
    }

    /// What the server says next. Answers its fences.
    pub fn listen(&mut self) -> Said {
        match self.u8() {
            0 => {
                self.u8();
                let count = self.u16();
                Said::Update((0..count).map(|_| self.rectangle()).collect())
            }
            1 => {
                let head = self.bytes(5);
                let count = u16::from_be_bytes([head[3], head[4]]);
                Said::ColourMap(self.bytes(6 * usize::from(count)))
            }
            150 => Said::EndOfContinuous,
            248 => {
                self.bytes(3);
                let flags = self.u32();
                let len = self.u8().into();
                let payload = self.bytes(len);
                if flags >> 31 != 0 {
                    self.fence(flags & 0x7fff_ffff, &payload);
                }
                Said::Fence(flags, payload)
            }
            other => panic!("the server says {other}"),
        }
    }

    /// The next update.
    pub fn update(&mut self) -> Vec<Got> {
        loop {
            if let Said::Update(rects) = self.listen() {
                return rects;
            }
        }
    }

    /// Asks and listens until `done`.
    pub fn until(&mut self, mut done: impl FnMut(&Self) -> bool) {
        while !done(self) {
            self.ask(true);
            self.update();
        }
    }

    fn rectangle(&mut self) -> Got {
        let (x, y, width, height) = (self.u16(), self.u16(), self.u16(), self.u16());
        let encoding = self.u32() as i32;
        let mut got = Got { x, y, width, height, encoding, data: Vec::new() };
        if (0..=16).contains(&encoding) {
            assert!(width > 0 && height > 0, "an empty rectangle: {got:?}");
            assert!(x + width <= self.width && y + height <= self.height, "outside: {got:?}");
            let values = match encoding {
                RAW => self.raw(width * height),
                COPY_RECT => self.copied(width, height),
                ZLIB => self.zlib(width * height),
                ZRLE => self.zrle(width, height),
                TIGHT => self.tight(width, height),
                other => panic!("encoding {other} was not offered"),
            };
            assert_eq!(values.len(), width * height);
            for (i, row) in values.chunks(width).enumerate() {
                let at = (y + i) * self.width + x;
                self.pixels[at..at + width].copy_from_slice(row);
            }
            return got;
        }
        match encoding {
            DESKTOP_SIZE => self.resize(width, height),
            EXTENDED_DESKTOP_SIZE => {
                let screens = usize::from(self.bytes(4)[0]);
                got.data = self.bytes(16 * screens);
                if (self.width, self.height) != (width, height) {
                    self.resize(width, height);
                }
            }
            CURSOR => {
                let pixel = usize::from(self.format.bits / 8);
                got.data = self.bytes(width * height * pixel + width.div_ceil(8) * height);
            }
            CURSOR_WITH_ALPHA => {
                assert_eq!(self.u32(), 0, "a cursor that is not raw");
                got.data = self.bytes(width * height * 4);
            }
            DESKTOP_NAME => {
                let len = self.u32() as usize;
                got.data = self.bytes(len);
            }
            POINTER_MOTION | EXTENDED_KEYS | SIDE_BUTTONS => {}
            other => panic!("rectangle {other} was not offered"),
        }
        got
    }

    fn raw(&mut self, count: usize) -> Vec<u32> {
        let pixel = usize::from(self.format.bits / 8);
        let bytes = self.bytes(count * pixel);
        bytes.chunks(pixel).map(|bytes| self.format.read(bytes)).collect()
    }

    fn copied(&mut self, width: usize, height: usize) -> Vec<u32> {
        let (x, y) = (self.u16(), self.u16());
        assert!(x + width <= self.width && y + height <= self.height);
        let row = |row: usize| &self.pixels[row * self.width + x..][..width];
        (y..y + height).flat_map(row).copied().collect()
    }

    fn zlib(&mut self, count: usize) -> Vec<u32> {
        let len = self.u32() as usize;
        let bytes = self.bytes(len);
        let pixel = usize::from(self.format.bits / 8);
        let plain = self.zlib.inflate(&bytes, count * pixel);
        plain.chunks(pixel).map(|bytes| self.format.read(bytes)).collect()
    }

    fn zrle(&mut self, width: usize, height: usize) -> Vec<u32> {
        let len = self.u32() as usize;
        let bytes = self.bytes(len);
        let plain = self.zrle.inflate(&bytes, width * height * 5 + 4096);
        let mut left = &plain[..];
        let mut values = vec![0; width * height];
        for top in (0..height).step_by(64) {
            for start in (0..width).step_by(64) {
                let (w, h) = (64.min(width - start), 64.min(height - top));
                let tile = zrle_tile(&self.format, &mut left, w, h);
                assert_eq!(tile.len(), w * h);
                for (i, row) in tile.chunks(w).enumerate() {
                    values[(top + i) * width + start..][..w].copy_from_slice(row);
                }
            }
        }
        assert!(left.is_empty(), "{} bytes too many", left.len());
        values
    }

    fn tight(&mut self, width: usize, height: usize) -> Vec<u32> {
        assert!(width <= 2048);
        let control = self.u8();
        assert_eq!(control & 0xf, 0, "streams are never reset");
        let format = self.format;
        let pixel = format.tpixel_len();
        match control >> 4 {
            8 => {
                let colour = format.read_tpixel(&self.bytes(pixel));
                vec![colour; width * height]
            }
            9 => {
                assert!(format.bits > 8, "JPEG for 8 bits");
                let len = self.compact_length();
                let bytes = self.bytes(len);
                self.jpeg(&bytes, width, height)
            }
            stream @ 0..8 => {
                let filter = if stream & 4 != 0 { self.u8() } else { 0 };
                let stream = usize::from(stream & 3);
                match filter {
                    0 => {
                        let plain = self.tight_data(stream, width * height * pixel);
                        plain.chunks(pixel).map(|bytes| format.read_tpixel(bytes)).collect()
                    }
                    1 => self.tight_palette(stream, width, height),
                    other => panic!("filter {other}"),
                }
            }
            other => panic!("control {other:#x}"),
        }
    }

    fn tight_palette(&mut self, stream: usize, width: usize, height: usize) -> Vec<u32> {
        let count = usize::from(self.u8()) + 1;
        let (format, pixel) = (self.format, self.format.tpixel_len());
        let bytes = self.bytes(count * pixel);
        let palette: Vec<u32> = bytes.chunks(pixel).map(|b| format.read_tpixel(b)).collect();
        if count > 2 {
            let plain = self.tight_data(stream, width * height);
            return plain.iter().map(|index| palette[usize::from(*index)]).collect();
        }
        let stride = width.div_ceil(8);
        let plain = self.tight_data(stream, stride * height);
        let bit = |x: usize, row: &[u8]| usize::from(row[x / 8] >> (7 - x % 8) & 1);
        let row = |row: &[u8]| (0..width).map(|x| palette[bit(x, row)]).collect::<Vec<_>>();
        plain.chunks(stride).flat_map(row).collect()
    }

    fn tight_data(&mut self, stream: usize, len: usize) -> Vec<u8> {
        if len < 12 {
            return self.bytes(len);
        }
        let packed = self.compact_length();
        let bytes = self.bytes(packed);
        let plain = self.tight[stream].inflate(&bytes, len);
        assert_eq!(plain.len(), len);
        plain
    }

    fn compact_length(&mut self) -> usize {
        let mut len = 0;
        for shift in [0, 7, 14] {
            let byte = usize::from(self.u8());
            if shift == 14 {
                return len | byte << 14;
            }
            len |= (byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        len
    }

    fn jpeg(&mut self, bytes: &[u8], width: usize, height: usize) -> Vec<u32> {
        let mut decoder = jpeg_decoder::Decoder::new(bytes);
        let rgb = decoder.decode().expect("JPEG");
        let info = decoder.info().unwrap();
        assert_eq!((usize::from(info.width), usize::from(info.height)), (width, height));
        self.jpegs += 1;
        let format = self.format;
        rgb.chunks(3).map(|p| format.value(u32::from_be_bytes([0, p[0], p[1], p[2]]))).collect()
    }
}
