//! How a host file is read and written asynchronously: io_uring, or threads where that is not allowed.
//!
//! ```text
//!   submit ── Job::next ──> one system call ──> Job::advance ─┬─> ended: Done, eventfd
//!                 ^          (ring or thread)                 │
//!                 └──────────── short, or try another way ────┘
//! ```
//!
//! What a job is made of ([`job`]) is the same for both, and so is what they do.

mod job;
mod pool;
mod uring;

use std::fs::File;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

pub(crate) use job::Io;

use crate::{Error, Result};

/// How the host's files are read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring where the host allows it, else threads.
    #[default]
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// Threads.
    Threads,
}

/// The end of one job.
#[derive(Debug)]
pub(crate) struct Done {
    /// What the submitter called it.
    pub(crate) token: u64,
    /// Bytes, all that were asked for, or why not.
    pub(crate) result: io::Result<u64>,
}

/// Runs jobs; one for each queue. Dropping it waits for what is in flight.
pub(crate) trait Engine: Send {
    /// Starts a job on `file`. Never blocks on the file.
    ///
    /// # Safety
    /// The memory that `io` points to must be valid until the job was returned by `reap`, or the engine was dropped.
    unsafe fn submit(&mut self, file: &Arc<File>, token: u64, io: Io) -> io::Result<()>;

    /// Appends the jobs that ended; never blocks.
    fn reap(&mut self, out: &mut Vec<Done>);
}

/// Makes engines of one disk: the choice is made once.
pub(crate) enum Engines {
    Uring,
    Threads(Arc<pool::Pool>),
}

impl Engines {
    /// Settles on one kind.
    pub(crate) fn new(choice: EngineChoice) -> Result<Self> {
        match choice {
            EngineChoice::Threads => {}
            EngineChoice::IoUring => {
                uring::probe().map_err(Error::queue("set up io_uring"))?;
                return Ok(Self::Uring);
            }
            EngineChoice::Auto => match uring::probe() {
                Ok(()) => return Ok(Self::Uring),
                Err(e) => tracing::info!(error = %e, "no io_uring here: disks use threads"),
            },
        }
        let pool = pool::Pool::new().map_err(Error::queue("start threads"))?;
        Ok(Self::Threads(Arc::new(pool)))
    }

    /// An engine that signals `event` when something ended.
    pub(crate) fn engine(&self, event: &EventFd) -> Result<Box<dyn Engine>> {
        match self {
            Self::Uring => uring::Uring::new(event)
                .map(|e| Box::new(e) as Box<dyn Engine>)
                .map_err(Error::queue("set up io_uring")),
            Self::Threads(pool) => pool::PoolEngine::new(pool.clone(), event)
                .map(|e| Box::new(e) as Box<dyn Engine>)
                .map_err(Error::queue("share an event descriptor")),
        }
    }
}
