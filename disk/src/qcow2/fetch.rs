//! Bringing bytes from where they are, for guests and for clusters that keep a part of what they were.

use std::io;

use libc::iovec;

use super::chain::{Chain, Source};
use super::inflate::Inflater;
use crate::engine::Io;
use crate::iov;

/// What is left to do.
pub(super) enum Fetch {
    /// The bytes are there.
    Done,
    /// Read this from the layer; with `then`, inflate what was read.
    Read { layer: usize, io: Io, then: Option<Deflated> },
}

/// Compressed bytes on their way.
pub(super) struct Deflated {
    data: Box<[u8]>,
    layer: usize,
    offset: u64,
    within: usize,
    generation: u64,
    target: Vec<iovec>,
}

// SAFETY: `target` is addresses, whose use is settled by the contract of `fetch`, on any thread.
unsafe impl Send for Deflated {}

/// Brings `source` to `target`, as far as that can be done at once.
///
/// # Safety
/// `target` must be valid for writes until all of what is returned was done or dropped.
pub(super) unsafe fn fetch(
    source: Source,
    target: Vec<iovec>,
    inflater: &Inflater,
    generation: u64,
) -> Fetch {
    match source {
        Source::Zero => {
            // SAFETY: the caller's promise.
            unsafe { iov::zero(&target) };
            Fetch::Done
        }
        Source::File { layer, offset } => {
            Fetch::Read { layer, io: Io::Read { offset, buffers: target }, then: None }
        }
        Source::Compressed { layer, offset, len, within } => {
            let within = within as usize;
            if let Some(bytes) = inflater.cached(layer, offset, generation) {
                // SAFETY: the caller's promise; what was inflated is elsewhere.
                unsafe { iov::copy(&bytes[within..], &target) };
                return Fetch::Done;
            }
            let mut data = vec![0; len].into_boxed_slice();
            let buffers = vec![iovec { iov_base: data.as_mut_ptr().cast(), iov_len: len }];
            let then = Deflated { data, layer, offset, within, generation, target };
            Fetch::Read { layer, io: Io::Read { offset, buffers }, then: Some(then) }
        }
    }
}

impl Deflated {
    /// Inflates what was read.
    pub(super) fn finish(self, chain: &Chain, inflater: &mut Inflater) -> io::Result<()> {
        let Self { data, layer, offset, within, generation, target } = self;
        let size = chain.layers[layer].map.as_ref().map_or(0, |m| m.geometry.cluster_size());
        let bytes = inflater.inflate(layer, offset, generation, &data, size as usize)?;
        // SAFETY: the promise made to `fetch`.
        unsafe { iov::copy(&bytes[within..], &target) };
        Ok(())
    }
}
