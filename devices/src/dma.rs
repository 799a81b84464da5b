//! Guest RAM as devices reach it: scatter lists, checked when they are made.
//!
//! ```text
//!   descriptor chain, PRD table, ...  -->  Scatter: [gpa, len] [gpa, len] ...   all of it in RAM
//!                                             |  read, write: small things, copied
//!                                             +--> buffers: host pointers, for a disk's requests
//! ```

use lodge_disk::Buffer;
use lodge_memory::{GuestMemory, mark_written};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// A contiguous piece of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes, never 0.
    pub len: u32,
}

/// A list of pieces of guest RAM, used as if they were one buffer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scatter {
    segments: Vec<Segment>,
    len: u64,
}

impl Scatter {
    /// Appends `len` bytes at `gpa`; says whether they are RAM (if not, the list stays as it was).
    pub fn push(&mut self, memory: &GuestMemory, gpa: u64, len: u32) -> bool {
        let fits = memory.check_range(GuestAddress(gpa), len as usize);
        if fits && len > 0 {
            self.segments.push(Segment { gpa, len });
            self.len += u64::from(len);
        }
        fits
    }

    /// The pieces of `segments`, which are known to be RAM, from byte `offset` on.
    pub(crate) fn of(segments: &[Segment], offset: u64) -> Self {
        let segments: Vec<_> = slice(segments, offset, u64::MAX).collect();
        let len = length(&segments);
        Self { segments, len }
    }

    /// Bytes of all pieces together.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is not a byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies from byte `offset` on; returns how many bytes there were.
    pub fn read(&self, memory: &GuestMemory, offset: u64, data: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in slice(&self.segments, offset, data.len() as u64) {
            let part = &mut data[done..done + piece.len as usize];
            if memory.read_slice(part, GuestAddress(piece.gpa)).is_err() {
                break; // Checked when the list was made; RAM does not go away.
            }
            done += part.len();
        }
        done
    }

    /// Copies to byte `offset` and on; returns how many bytes fitted.
    pub fn write(&self, memory: &GuestMemory, offset: u64, data: &[u8]) -> usize {
        let mut done = 0;
        for piece in slice(&self.segments, offset, data.len() as u64) {
            let part = &data[done..done + piece.len as usize];
            if memory.write_slice(part, GuestAddress(piece.gpa)).is_err() {
                break; // Checked when the list was made; RAM does not go away.
            }
            done += part.len();
        }
        done
    }

    /// Where `len` bytes from `offset` on lie in this process, for as long as `memory` lives.
    pub fn buffers(&self, memory: &GuestMemory, offset: u64, len: u64) -> Option<Vec<Buffer>> {
        host(memory, slice(&self.segments, offset, len), |ptr, len| Buffer { ptr, len })
    }

    /// Notes that `len` bytes from the start on were written through their host pointers.
    pub fn wrote(&self, memory: &GuestMemory, len: u64) {
        wrote(memory, &self.segments, len);
    }
}

/// Bytes of all segments together.
pub(crate) fn length(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

/// The part of `segments` from byte `offset` on, at most `len` bytes.
pub(crate) fn slice(
    segments: &[Segment],
    mut offset: u64,
    mut len: u64,
) -> impl Iterator<Item = Segment> + '_ {
    segments.iter().filter_map(move |segment| {
        let skip = offset.min(segment.len.into());
        offset -= skip;
        let take = (u64::from(segment.len) - skip).min(len);
        len -= take;
        (take > 0).then_some(Segment { gpa: segment.gpa + skip, len: take as u32 })
    })
}

/// Where `segments` lie in this process: for each a pointer and a length. Pointers stay valid for as
/// long as `memory` lives. `None` if one is not in RAM.
pub(crate) fn host<T>(
    memory: &GuestMemory,
    segments: impl Iterator<Item = Segment>,
    make: impl Fn(*mut u8, usize) -> T,
) -> Option<Vec<T>> {
    let mut buffers = Vec::with_capacity(segments.size_hint().1.unwrap_or(0));
    for segment in segments {
        // A segment may cross from one region into an adjacent one.
        let slices = memory.get_slices(GuestAddress(segment.gpa), segment.len as usize);
        for slice in slices {
            let slice = slice.ok()?;
            buffers.push(make(slice.ptr_guard_mut().as_ptr(), slice.len()));
        }
    }
    Some(buffers)
}

/// Notes that the first `len` bytes of `segments` were written through their host pointers.
pub(crate) fn wrote(memory: &GuestMemory, segments: &[Segment], len: u64) {
    for piece in slice(segments, 0, len) {
        mark_written(memory, piece.gpa, piece.len.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lodge_memory::{RamLayout, allocate};

    #[test]
    fn a_list_is_one_buffer_and_lies_in_ram() {
        let memory = allocate(&RamLayout::new(1 << 16).unwrap()).unwrap();
        let mut list = Scatter::default();
        assert!(list.push(&memory, 0x1ffe, 2));
        assert!(list.push(&memory, 0x100, 0));
        assert!(list.push(&memory, 0xfffe, 2));
        assert!(!list.push(&memory, 0xfffe, 3));
        assert!(!list.push(&memory, u64::MAX, 2));
        assert_eq!(list.len(), 4);
        assert_eq!(list.write(&memory, 1, &[1, 2, 3, 4]), 3);
        let mut data = [9; 6];
        assert_eq!(list.read(&memory, 0, &mut data), 4);
        assert_eq!(data, [0, 1, 2, 3, 9, 9]);
        let lengths: Vec<_> =
            list.buffers(&memory, 1, 9).unwrap().iter().map(|part| part.len).collect();
        assert_eq!(lengths, [1, 2]);
        assert!(Scatter::of(&[Segment { gpa: 0, len: 4 }], 4).is_empty());
    }
}
