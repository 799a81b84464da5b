//! A raw image or block device: the guest's bytes and nothing else.
//!
//! A size that is no multiple of the block size is rounded up, as QEMU does: the bytes after the end of the file
//! read as zeroes, and a write to them makes the file longer.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::engine::{Done, Engine, EngineChoice, Engines, Io};
use crate::open::ImageFile;
use crate::request::check;
use crate::{Capabilities, Completion, Disk, DiskQueue, Error, Op, Request, Result};

/// The disk.
pub(crate) struct RawDisk {
    image: Arc<ImageFile>,
    size: u64,
    engines: Engines,
}

impl RawDisk {
    pub(crate) fn new(image: ImageFile, engine: EngineChoice) -> Result<Self> {
        let size = image
            .len
            .checked_next_multiple_of(image.block_size.into())
            .filter(|&s| s > 0 && s <= i64::MAX as u64)
            .ok_or_else(|| Error::Damaged {
                path: image.path.clone(),
                format: "raw",
                reason: "it is empty; give it a size with `truncate -s SIZE`".to_owned(),
            })?;
        Ok(Self { image: Arc::new(image), size, engines: Engines::new(engine)? })
    }
}

impl Disk for RawDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.image.read_only
    }

    fn block_size(&self) -> u32 {
        self.image.block_size
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { discard: !self.image.read_only, write_zeroes: !self.image.read_only }
    }

    fn queue(&self) -> Result<Box<dyn DiskQueue>> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(Error::queue("make an event descriptor"))?;
        let engine = self.engines.engine(&event)?;
        Ok(Box::new(RawQueue {
            engine,
            event,
            image: self.image.clone(),
            size: self.size,
            refused: Vec::new(),
            done: Vec::new(),
            in_flight: 0,
        }))
    }
}

struct RawQueue {
    /// Before `image`: dropped first, which waits for what is in flight.
    engine: Box<dyn Engine>,
    event: EventFd,
    image: Arc<ImageFile>,
    size: u64,
    /// Requests that did not reach the engine.
    refused: Vec<Completion>,
    done: Vec<Done>,
    in_flight: usize,
}

impl DiskQueue for RawQueue {
    unsafe fn submit(&mut self, request: Request) -> Result<()> {
        let Request { id, op } = request;
        if let Err(e) = check(&op, self.size, self.image.read_only) {
            self.refused.push(Completion { id, result: Err(e) });
            self.in_flight += 1;
            return self.event.write(1).map_err(Error::queue("signal a completion"));
        }
        let io = match op {
            Op::Read { offset, buffers } => {
                Io::Read { offset, buffers: crate::iov::from(&buffers) }
            }
            Op::Write { offset, buffers } => {
                Io::Write { offset, buffers: crate::iov::from(&buffers) }
            }
            Op::Flush => Io::Sync,
            Op::Discard { offset, len } => Io::Discard { offset, len },
            Op::WriteZeroes { offset, len, unmap } => Io::Zero { offset, len, unmap },
        };
        // SAFETY: the buffers stay valid until the completion is returned, by this function's own contract.
        unsafe { self.engine.submit(&self.image.file, id, io) }
            .map_err(Error::queue("submit a request"))?;
        self.in_flight += 1;
        Ok(())
    }

    fn completion_fd(&self) -> &EventFd {
        &self.event
    }

    fn complete(&mut self, out: &mut Vec<Completion>) {
        let before = out.len();
        // Nothing to read is no error: the caller may look without having been woken.
        let _: io::Result<u64> = self.event.read();
        self.engine.reap(&mut self.done);
        let ended = self.done.drain(..).map(|d| Completion { id: d.token, result: d.result });
        out.extend(self.refused.drain(..).chain(ended));
        self.in_flight -= out.len() - before;
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}
