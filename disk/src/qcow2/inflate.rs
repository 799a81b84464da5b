//! Compressed clusters (raw deflate), and the last few that were inflated: guests read them in small pieces.

use std::collections::VecDeque;
use std::io;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};

use super::corrupt;

/// Most inflated bytes that are kept.
const CACHE: usize = 512 << 10;

/// Where a cluster is; the generation tells whether something else may be there by now.
type Key = (usize, u64, u64);

/// Inflates, and remembers.
#[derive(Default)]
pub(super) struct Inflater {
    cache: VecDeque<(Key, Box<[u8]>)>,
    state: Box<DecompressorOxide>,
}

impl Inflater {
    /// A cluster that was inflated lately.
    pub(super) fn cached(&self, layer: usize, offset: u64, generation: u64) -> Option<&[u8]> {
        let key = key(layer, offset, generation);
        self.cache.iter().find(|(k, _)| *k == key).map(|(_, bytes)| &bytes[..])
    }

    /// Inflates `data` to a cluster of `size` bytes. What follows the deflated stream is ignored.
    pub(super) fn inflate(
        &mut self,
        layer: usize,
        offset: u64,
        generation: u64,
        data: &[u8],
        size: usize,
    ) -> io::Result<&[u8]> {
        let mut bytes = vec![0; size].into_boxed_slice();
        self.state.init();
        let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let (status, _, written) = decompress(&mut self.state, data, &mut bytes, 0, flags);
        let ended = matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput);
        if !ended || written != size {
            return Err(corrupt("a compressed cluster that does not inflate"));
        }
        while self.cache.iter().map(|(_, b)| b.len()).sum::<usize>() + size > CACHE.max(size) {
            self.cache.pop_front();
        }
        self.cache.push_back((key(layer, offset, generation), bytes));
        Ok(self.cache.back().map(|(_, b)| &b[..]).unwrap_or_default())
    }
}

fn key(layer: usize, offset: u64, generation: u64) -> Key {
    // Files below the image do not change.
    (layer, offset, if layer == 0 { generation } else { 0 })
}
