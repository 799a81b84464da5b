//! What is behind the devices in tests: a disk in memory, a network cable to the test, a terminal.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use lodge_disk::{Buffer as DiskBuffer, Capabilities, Completion, Disk, DiskQueue, Op, Request};
use lodge_net::{Backend, Buffer, Offloads};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A disk in memory. Requests are done by a thread of each queue, out of order where they may be.
pub struct MemoryDisk {
    pub data: Mutex<Vec<u8>>,
    /// What was asked, by name and offset, in the order of completion.
    pub log: Mutex<Vec<(&'static str, u64)>>,
    pub read_only: bool,
    /// Requests at this offset fail.
    pub bad: Option<u64>,
}

impl MemoryDisk {
    pub fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            data: Mutex::new(vec![0; bytes]),
            log: Mutex::default(),
            read_only: false,
            bad: None,
        })
    }

    fn execute(&self, op: &Op) -> io::Result<u64> {
        let mut data = self.data.lock().unwrap();
        let (name, offset) = match op {
            Op::Read { offset, .. } => ("read", *offset),
            Op::Write { offset, .. } => ("write", *offset),
            Op::Flush => ("flush", 0),
            Op::Discard { offset, .. } => ("discard", *offset),
            Op::WriteZeroes { offset, .. } => ("zero", *offset),
        };
        self.log.lock().unwrap().push((name, offset));
        if self.bad == Some(offset) && name != "flush" {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let mut at = offset as usize;
        let mut each = |buffers: &[DiskBuffer], to_guest: bool| {
            for buffer in buffers {
                let disk = &mut data[at..at + buffer.len];
                // SAFETY: the submitter's promise: valid until the completion, which comes later.
                unsafe {
                    if to_guest {
                        std::ptr::copy_nonoverlapping(disk.as_ptr(), buffer.ptr, buffer.len);
                    } else {
                        std::ptr::copy_nonoverlapping(buffer.ptr, disk.as_mut_ptr(), buffer.len);
                    }
                }
                at += buffer.len;
            }
            at as u64 - offset
        };
        Ok(match op {
            Op::Read { buffers, .. } => each(buffers, true),
            Op::Write { buffers, .. } => each(buffers, false),
            Op::Flush => 0,
            Op::Discard { len, .. } | Op::WriteZeroes { len, .. } => {
                data[at..at + *len as usize].fill(0);
                *len
            }
        })
    }
}

/// The device takes an `Arc<dyn Disk>`, queues need the concrete one.
pub struct SharedDisk(pub Arc<MemoryDisk>);

impl Disk for SharedDisk {
    fn size(&self) -> u64 {
        self.0.data.lock().unwrap().len() as u64
    }
    fn read_only(&self) -> bool {
        self.0.read_only
    }
    fn block_size(&self) -> u32 {
        512
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities { discard: true, write_zeroes: true }
    }
    fn queue(&self) -> lodge_disk::Result<Box<dyn DiskQueue>> {
        let (requests, inbox) = channel::<Request>();
        let done = Arc::new(Mutex::new(Vec::new()));
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        let (disk, theirs, wake) = (self.0.clone(), done.clone(), fd.try_clone().unwrap());
        let thread = std::thread::spawn(move || {
            let mut turn = 0u32;
            while let Ok(first) = inbox.recv() {
                // What has piled up is done from the end, sometimes after a while.
                let mut batch: Vec<Request> =
                    std::iter::once(first).chain(inbox.try_iter()).collect();
                turn = turn.wrapping_add(1);
                if turn.is_multiple_of(5) {
                    std::thread::sleep(std::time::Duration::from_micros(300));
                }
                batch.reverse();
                for Request { id, op } in batch {
                    let result = disk.execute(&op);
                    theirs.lock().unwrap().push(Completion { id, result });
                    wake.write(1).unwrap();
                }
            }
        });
        Ok(Box::new(MemoryQueue {
            requests: Some(requests),
            done,
            fd,
            thread: Some(thread),
            in_flight: 0,
        }))
    }
}

struct MemoryQueue {
    requests: Option<Sender<Request>>,
    done: Arc<Mutex<Vec<Completion>>>,
    fd: EventFd,
    thread: Option<JoinHandle<()>>,
    in_flight: usize,
}

impl DiskQueue for MemoryQueue {
    unsafe fn submit(&mut self, request: Request) -> lodge_disk::Result<()> {
        self.in_flight += 1;
        self.requests.as_ref().unwrap().send(request).unwrap();
        Ok(())
    }
    fn completion_fd(&self) -> &EventFd {
        &self.fd
    }
    fn complete(&mut self, out: &mut Vec<Completion>) {
        let _ = self.fd.read();
        let mut done = self.done.lock().unwrap();
        self.in_flight -= done.len();
        out.append(&mut done);
    }
    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for MemoryQueue {
    fn drop(&mut self) {
        self.requests = None;
        let _ = self.thread.take().unwrap().join();
    }
}

/// The test's end of a network cable.
pub struct Cable {
    pub sent: Mutex<Vec<Vec<u8>>>,
    incoming: Mutex<VecDeque<Vec<u8>>>,
    wake: EventFd,
    pub accepted: Mutex<Offloads>,
    /// Frames that find room before the network says "not now"; then it takes some more.
    pub room: Mutex<usize>,
    pub active: Mutex<bool>,
}

impl Cable {
    pub fn new() -> Arc<Self> {
        let wake = EventFd::new(EFD_NONBLOCK).unwrap();
        Arc::new(Self {
            sent: Mutex::default(),
            incoming: Mutex::default(),
            wake,
            accepted: Mutex::default(),
            room: Mutex::new(usize::MAX),
            active: Mutex::new(true),
        })
    }

    /// A frame for the guest.
    pub fn deliver(&self, payload: &[u8]) {
        let mut frame = vec![0; 12];
        frame[10] = 1;
        frame.extend_from_slice(payload);
        self.incoming.lock().unwrap().push_back(frame);
        self.wake.write(1).unwrap();
    }

    /// Frames the guest has not got yet.
    pub fn waiting(&self) -> usize {
        self.incoming.lock().unwrap().len()
    }
}

/// The device's end.
pub struct Plug(pub Arc<Cable>);

impl AsRawFd for Plug {
    fn as_raw_fd(&self) -> RawFd {
        self.0.wake.as_raw_fd()
    }
}

impl Backend for Plug {
    unsafe fn receive(&mut self, bufs: &mut [Buffer]) -> io::Result<Option<usize>> {
        let mut incoming = self.0.incoming.lock().unwrap();
        let Some(frame) = incoming.pop_front() else {
            let _ = self.0.wake.read();
            return Ok(None);
        };
        let mut done = 0;
        for buffer in bufs {
            let part = &frame[done..frame.len().min(done + buffer.len)];
            // SAFETY: the caller's promise.
            unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), buffer.ptr, part.len()) };
            done += part.len();
        }
        assert_eq!(done, frame.len(), "a frame that fits");
        Ok(Some(done))
    }

    unsafe fn send(&mut self, bufs: &[Buffer]) -> io::Result<bool> {
        let mut room = self.0.room.lock().unwrap();
        if *room == 0 {
            *room = 3;
            return Ok(false);
        }
        *room -= 1;
        let mut frame = Vec::new();
        for buffer in bufs {
            // SAFETY: the caller's promise; a copy, no reference.
            unsafe {
                let at = frame.len();
                frame.resize(at + buffer.len, 0);
                std::ptr::copy_nonoverlapping(buffer.ptr, frame[at..].as_mut_ptr(), buffer.len);
            }
        }
        self.0.sent.lock().unwrap().push(frame);
        Ok(true)
    }

    fn offloads(&self) -> Offloads {
        Offloads::all()
    }

    fn set_offloads(&mut self, accepted: Offloads) -> io::Result<()> {
        *self.0.accepted.lock().unwrap() = accepted;
        Ok(())
    }

    fn set_active(&mut self, active: bool) -> io::Result<()> {
        *self.0.active.lock().unwrap() = active;
        Ok(())
    }
}

/// Keeps what is written.
#[derive(Clone, Default)]
pub struct Screen(pub Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
