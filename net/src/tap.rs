//! A tap interface of the host: the kernel is at the other end, with its bridges, routes and firewall.
//!
//! The interface is made by somebody else (an administrator, `lodged`) and is never made here: opening a name
//! that does not exist would silently create an interface that leads nowhere.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::backend::{self, ETHERNET_HEADER};
use crate::{Backend, Buffer, Error, HEADER_LEN, Offloads, Result};

// linux/if_tun.h. The libc crate has these for some targets only.
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETVNETLE: libc::c_ulong = 0x4004_54dc;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;
const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;
const TUN_F_USO4: u32 = 0x20;
const TUN_F_USO6: u32 = 0x40;

/// More than the longest frame with its header: what is longer is not even shown to the kernel.
const MAX_FRAME: usize = 128 << 10;

/// One queue of a tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
    offloads: Offloads,
    /// One of several queues: the kernel spreads frames over those that are attached.
    multi_queue: bool,
    attached: bool,
}

impl Tap {
    /// Opens `queues` queues of the tap `name`, each for one queue pair of one card.
    ///
    /// # Errors
    /// Each names the interface and says what to do; see [`Error`].
    pub fn open(name: &str, queues: usize) -> Result<Vec<Self>> {
        let index = interface_index(name)?;
        // A tap made for many queues can only be opened as such, whatever we need; one made for one, as one.
        let single =
            if queues == 1 { open_queue(name, index, 0) } else { Err(not_a_tap(name, queues)) };
        let first = match single {
            Err(Error::NotATap { .. }) => open_queue(name, index, IFF_MULTI_QUEUE),
            other => other,
        };
        let mut taps = vec![first.map_err(|e| match e {
            Error::NotATap { .. } => not_a_tap(name, queues),
            other => other,
        })?];
        while taps.len() < queues {
            taps.push(open_queue(name, index, IFF_MULTI_QUEUE)?);
        }
        Ok(taps)
    }
}

fn not_a_tap(name: &str, queues: usize) -> Error {
    Error::NotATap { name: name.to_owned(), queues }
}

/// The interface's number in this thread's network namespace.
fn interface_index(name: &str) -> Result<u32> {
    let bad = || Error::BadName { name: name.to_owned() };
    let valid = (1..libc::IFNAMSIZ).contains(&name.len())
        && !name.bytes().any(|b| b == b'/' || b == b'%' || b.is_ascii_whitespace());
    if !valid {
        return Err(bad());
    }
    let text = CString::new(name).map_err(|_| bad())?;
    // SAFETY: a valid C string.
    match unsafe { libc::if_nametoindex(text.as_ptr()) } {
        0 => Err(Error::NoSuchTap { name: name.to_owned() }),
        index => Ok(index),
    }
}

fn open_queue(name: &str, index: u32, extra: u16) -> Result<Tap> {
    let denied = |source| Error::TapDenied { name: name.to_owned(), source };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => denied(source),
            _ => Error::io("open /dev/net/tun (is the kernel's module tun loaded?)")(source),
        })?;
    // SAFETY: `ifreq` is plain data, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The name is at most 15 bytes: the zero after it stays.
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | extra) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, &mut request) } < 0 {
        let source = io::Error::last_os_error();
        return Err(match source.raw_os_error() {
            Some(libc::EINVAL) => not_a_tap(name, 1),
            Some(libc::EBUSY) => Error::TapBusy { name: name.to_owned() },
            Some(libc::EPERM | libc::EACCES) => denied(source),
            _ => Error::io(format!("attach to the tap {name}"))(source),
        });
    }
    // It may have been removed since it was looked up; then the kernel made a new one, which goes with `file`.
    if interface_index(name)? != index {
        return Err(Error::NoSuchTap { name: name.to_owned() });
    }
    let set = |request, value: libc::c_int, what: &str| {
        // SAFETY: both requests read one int.
        match unsafe { libc::ioctl(file.as_raw_fd(), request, &value) } {
            0.. => Ok(()),
            _ => {
                Err(Error::io(format!("set {what} of the tap {name}"))(io::Error::last_os_error()))
            }
        }
    };
    set(TUNSETVNETHDRSZ as _, HEADER_LEN as libc::c_int, "the header length")?;
    set(TUNSETVNETLE as _, 1, "the header's byte order")?;
    let mut tap = Tap {
        file,
        offloads: Offloads::all(),
        multi_queue: extra & IFF_MULTI_QUEUE != 0,
        attached: true,
    };
    // Kernels before 6.2 know no large UDP.
    if tap.set_offloads(tap.offloads).is_err() {
        tap.offloads.remove(Offloads::USO);
    }
    tap.set_offloads(Offloads::empty())
        .map_err(Error::io(format!("set the offloads of the tap {name}")))?;
    Ok(tap)
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Backend for Tap {
    unsafe fn receive(&mut self, bufs: &mut [Buffer]) -> io::Result<Option<usize>> {
        let bufs = &bufs[..bufs.len().min(backend::MAX_BUFFERS)];
        let room = backend::total(bufs);
        // One byte more than there is room for tells a frame that fits from one that was cut.
        let mut spill = 0u8;
        let mut list = backend::iovecs(bufs);
        list.push(libc::iovec { iov_base: (&raw mut spill).cast(), iov_len: 1 });
        let count = list.len().try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the caller's promise for `bufs`; `spill` lives longer than the call.
        let n = unsafe { libc::readv(self.as_raw_fd(), list.as_ptr(), count) };
        let Ok(n) = usize::try_from(n) else {
            let e = io::Error::last_os_error();
            return match e.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => Ok(None),
                Some(libc::EBADFD | libc::ENODEV) => Err(io::ErrorKind::UnexpectedEof.into()),
                Some(libc::EINVAL | libc::EFAULT) => {
                    Err(io::Error::new(io::ErrorKind::InvalidData, e))
                }
                _ => Err(e),
            };
        };
        if n > room || n < HEADER_LEN {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a frame longer than the buffers",
            ));
        }
        // The kernel fills the header up to the number of buffers, and leaves that alone.
        // SAFETY: the caller's promise.
        unsafe { backend::write_at(bufs, HEADER_LEN - 2, &[1, 0]) };
        Ok(Some(n))
    }

    unsafe fn send(&mut self, bufs: &[Buffer]) -> io::Result<bool> {
        let len = backend::total(bufs);
        if !(HEADER_LEN + ETHERNET_HEADER..=MAX_FRAME).contains(&len) {
            let text = "the frame is too short or too long";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        if bufs.len() > backend::MAX_BUFFERS {
            // SAFETY: the caller's promise; `whole` outlives the call.
            let mut whole = unsafe { backend::gather(bufs) };
            // SAFETY: as above.
            return unsafe { self.send(&[Buffer { ptr: whole.as_mut_ptr(), len }]) };
        }
        let list = backend::iovecs(bufs);
        let count = list.len().try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the caller's promise.
        if unsafe { libc::writev(self.as_raw_fd(), list.as_ptr(), count) } >= 0 {
            return Ok(true);
        }
        let e = io::Error::last_os_error();
        match e.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR | libc::ENOBUFS | libc::ENOMEM) => Ok(false),
            // The interface is down: the cable is pulled, and frames are lost as they would be there.
            Some(libc::EIO | libc::ENETDOWN) => Ok(true),
            Some(libc::EBADFD | libc::ENODEV) => Err(io::Error::new(io::ErrorKind::BrokenPipe, e)),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, e)),
        }
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_offloads(&mut self, accepted: Offloads) -> io::Result<()> {
        backend::check_offloads(accepted, self.offloads)?;
        if !self.attached {
            return Ok(()); // They are the interface's: a queue that is attached sets them for all.
        }
        let flags = [
            (Offloads::CHECKSUM, TUN_F_CSUM),
            (Offloads::TSO4, TUN_F_TSO4),
            (Offloads::TSO6, TUN_F_TSO6),
            (Offloads::ECN, TUN_F_TSO_ECN),
            (Offloads::USO, TUN_F_USO4 | TUN_F_USO6),
        ];
        let bits = flags.iter().filter(|(o, _)| accepted.contains(*o)).fold(0, |b, (_, f)| b | f);
        // SAFETY: TUNSETOFFLOAD takes its bits as the argument itself.
        let set =
            unsafe { libc::ioctl(self.as_raw_fd(), TUNSETOFFLOAD as _, libc::c_ulong::from(bits)) };
        if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn set_active(&mut self, active: bool) -> io::Result<()> {
        if !self.multi_queue || active == self.attached {
            return Ok(());
        }
        // SAFETY: `ifreq` is plain data, for which zeroes are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let flag = if active { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = flag as libc::c_short;
        // SAFETY: TUNSETQUEUE reads one `ifreq`.
        if unsafe { libc::ioctl(self.as_raw_fd(), TUNSETQUEUE as _, &request) } < 0 {
            return Err(io::Error::last_os_error());
        }
        self.attached = active;
        Ok(())
    }
}
