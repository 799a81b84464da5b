//! A zlib stream (RFC 1950) that lasts as long as its connection: what was sent before helps to compress what comes.

use flate2::{Compress, Compression, FlushCompress};

/// One stream of a connection.
pub struct Deflater {
    stream: Compress,
    level: u32,
}

impl Deflater {
    /// A new stream; `level` is zlib's, 1 (quick) to 9 (small).
    pub fn new(level: u32) -> Self {
        Self { stream: Compress::new(Compression::new(level), true), level }
    }

    /// Compresses `data` to the end of `out`, so that the client can read all of it.
    pub fn append(&mut self, data: &[u8], level: u32, out: &mut Vec<u8>) {
        if level != self.level && self.stream.set_level(Compression::new(level)).is_ok() {
            self.level = level;
        }
        let start = self.stream.total_in();
        loop {
            let used = (self.stream.total_in() - start) as usize;
            let left = data.get(used..).unwrap_or_default();
            out.reserve(left.len() / 2 + 64);
            let before = out.len();
            // The only errors are those of a stream's misuse: there is no dictionary, and nothing was finished.
            let status = self.stream.compress_vec(left, out, FlushCompress::Sync);
            debug_assert!(status.is_ok(), "{status:?}");
            // Room that is left, or nothing written: everything is out.
            if out.len() < out.capacity() || out.len() == before {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Decompress, FlushDecompress};

    #[test]
    fn each_part_can_be_read_at_once() {
        let mut inflate = Decompress::new(true);
        let mut deflate = Deflater::new(1);
        let mut noise = 1_u32;
        for (i, len) in [0, 1, 100, 70_000, 5, 0, 300_000, 64, 128, 129].into_iter().enumerate() {
            let data: Vec<u8> = (0..len)
                .map(|_| {
                    noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (noise >> 24) as u8
                })
                .collect();
            let mut packed = Vec::new();
            deflate.append(&data, if i > 4 { 6 } else { 1 }, &mut packed);
            let mut plain = Vec::with_capacity(len + 1);
            inflate.decompress_vec(&packed, &mut plain, FlushDecompress::Sync).unwrap();
            assert_eq!(plain.len(), len, "part {i}");
            assert!(plain == data);
        }
    }
}
