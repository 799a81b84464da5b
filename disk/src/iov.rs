//! Lists of buffers: cut pieces out of them, fill them, copy into them.

use libc::iovec;

use crate::Buffer;

/// The form that system calls take.
pub(crate) fn from(buffers: &[Buffer]) -> Vec<iovec> {
    buffers.iter().map(|b| iovec { iov_base: b.ptr.cast(), iov_len: b.len }).collect()
}

/// `len` bytes of the list from `skip` on; less where the list ends.
pub(crate) fn slice(buffers: &[Buffer], skip: u64, len: u64) -> Vec<iovec> {
    let (mut skip, mut left) = (skip, len);
    let mut out = Vec::new();
    for b in buffers {
        let size = b.len as u64;
        if skip >= size {
            skip -= size;
            continue;
        }
        if left == 0 {
            break;
        }
        let take = (size - skip).min(left);
        // `skip` and `take` are within this buffer, whose length is a usize.
        let iov_base = b.ptr.wrapping_add(skip as usize).cast();
        out.push(iovec { iov_base, iov_len: take as usize });
        left -= take;
        skip = 0;
    }
    out
}

/// Writes zeroes to all of the list.
///
/// # Safety
/// The memory must be valid for writes.
pub(crate) unsafe fn zero(list: &[iovec]) {
    for v in list {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::write_bytes(v.iov_base.cast::<u8>(), 0, v.iov_len) };
    }
}

/// Copies `data` to the list; what is longer is left alone.
///
/// # Safety
/// The memory must be valid for writes and not overlap `data`.
pub(crate) unsafe fn copy(mut data: &[u8], list: &[iovec]) {
    for v in list {
        let n = data.len().min(v.iov_len);
        // SAFETY: `n` is at most both lengths; the rest is the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), v.iov_base.cast(), n) };
        data = &data[n..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_cross_buffers_and_stop_at_the_end() {
        let mut bytes = [0u8; 30];
        let at = bytes.as_mut_ptr();
        let list: Vec<Buffer> =
            (0..3).map(|i| Buffer { ptr: at.wrapping_add(i * 10), len: 10 }).collect();
        let lens = |v: Vec<iovec>| v.iter().map(|v| v.iov_len).collect::<Vec<_>>();
        assert_eq!(lens(slice(&list, 5, 10)), [5, 5]);
        assert_eq!(lens(slice(&list, 10, 10)), [10]);
        assert_eq!(lens(slice(&list, 0, 30)), [10, 10, 10]);
        assert_eq!(lens(slice(&list, 25, 100)), [5]);
        // SAFETY: the pieces lie in `bytes`.
        unsafe { copy(b"abcdefgh", &slice(&list, 8, 8)) };
        assert_eq!(&bytes[7..17], b"\0abcdefgh\0");
    }
}
