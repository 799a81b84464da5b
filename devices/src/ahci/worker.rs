//! A port's I/O thread: takes commands, moves their data, and ends them.
//!
//! ```text
//!   kick --> Port::next --> Slot::fetch --> decide --+--> registers, data of the device's own --> Port::ended
//!                                                    +--> Lane --> ... disk ... --> Lane::complete --> Port::ended
//! ```

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use lodge_disk::Op;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::ata::{AtaDisk, Plan, SECTOR, Transfer, is_queued, tag};
use super::atapi;
use super::fis::{HostFis, TaskFile, dma_setup, error};
use super::port::{End, Issue, Kind, Port, Protocol, area, interrupt};
use super::slot::{Data, Slot};
use crate::storage::cdrom::data_length;
use crate::storage::{
    Action, CdRom, Cdb, Command, Ended, Fault, Job, Lane, Medium, Reply, Sense, Unit, finished,
};

/// What is connected to a port.
#[derive(Clone)]
pub enum Drive {
    /// A disk.
    Disk(AtaDisk),
    /// A CD-ROM drive.
    CdRom(Arc<CdRom>),
}

impl Drive {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Disk(_) => Kind::Ata,
            Self::CdRom(_) => Kind::Atapi,
        }
    }

    /// The medium that is in it now.
    fn medium(&self) -> Option<u64> {
        match self {
            Self::Disk(disk) => Some(disk.medium().id()),
            Self::CdRom(drive) => drive.medium(),
        }
    }
}

/// What a job is for.
enum Purpose {
    /// A command of the disk, with how its data goes, or without.
    Disk(Protocol),
    /// A queued one.
    Queued { tag: u8 },
    /// A packet; by PIO blocks of this many bytes, or DMA.
    Packet { block: Option<u64> },
}

/// A command whose job is under way.
struct Task {
    issue: Issue,
    slot: Slot,
    purpose: Purpose,
    /// PxIS bits that its data brings.
    interrupts: u32,
}

/// The thread's state.
struct Worker {
    port: Arc<Port>,
    drive: Drive,
    lane: Lane<Task>,
}

/// The thread.
pub(super) struct Thread {
    handle: Option<JoinHandle<()>>,
    port: Arc<Port>,
    quit: Arc<AtomicBool>,
}

impl Thread {
    /// Starts the I/O thread of `port` for `drive`.
    pub(super) fn start(name: String, port: &Arc<Port>, drive: Drive) -> io::Result<Self> {
        let lane = Lane::new(port.memory().clone())?;
        let epoll = Epoll::new()?;
        for fd in [port.kick.as_raw_fd(), lane.as_raw_fd()] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        let quit = Arc::new(AtomicBool::new(false));
        let (mut worker, theirs) = (Worker { port: port.clone(), drive, lane }, quit.clone());
        let handle =
            std::thread::Builder::new().name(name).spawn(move || worker.run(&epoll, &theirs))?;
        Ok(Self { handle: Some(handle), port: port.clone(), quit })
    }
}

impl Drop for Thread {
    /// Ends the thread, which finishes what it has.
    fn drop(&mut self) {
        self.quit.store(true, Ordering::SeqCst);
        self.port.wake();
        if let Some(handle) = self.handle.take() {
            let _ = handle.join(); // A thread that panicked has said so.
        }
    }
}

impl Worker {
    fn run(&mut self, epoll: &Epoll, quit: &AtomicBool) {
        let mut events = [EpollEvent::default(); 2];
        loop {
            // An error is an interruption, which only means to look around.
            let _ = epoll.wait(-1, &mut events);
            let _ = self.port.kick.read(); // Only resets the counter.
            self.complete();
            if quit.load(Ordering::SeqCst) {
                break;
            }
            self.lane.tidy(&self.drive.medium().into_iter().collect::<Vec<_>>());
            self.issue();
        }
        while self.lane.in_flight() > 0 {
            for ended in self.lane.wait() {
                self.ended(ended);
            }
        }
    }

    fn complete(&mut self) {
        for ended in self.lane.complete() {
            self.ended(ended);
        }
    }

    /// Does all commands that can be done now.
    fn issue(&mut self) {
        while let Some(issue) = self.port.next() {
            let memory = self.port.memory().clone();
            match Slot::fetch(&memory, issue.list, issue.slot) {
                Ok(slot) if slot.fis.is_valid() => self.begin(issue, slot),
                // Nothing that a device understands was sent: it answers with an error.
                Ok(slot) => self.fail(&issue, &slot.fis, error::ABORT),
                Err(_) => self.port.bus_error(issue.generation),
            }
            // What the page cache has is read by now.
            self.complete();
        }
    }

    fn begin(&mut self, issue: Issue, slot: Slot) {
        let queued =
            slot.fis.is_command() && is_queued(&slot.fis) && matches!(self.drive, Drive::Disk(_));
        if !queued && self.port.has_queued() {
            return self.port.put_back(&issue);
        }
        if !slot.fis.is_command() {
            return self.control(&issue, &slot);
        }
        match self.drive.clone() {
            Drive::Disk(disk) => self.disk_command(issue, slot, &disk),
            Drive::CdRom(drive) => self.drive_command(issue, slot, &drive),
        }
    }

    /// A write to device control: a software reset begins or ends.
    fn control(&mut self, issue: &Issue, slot: &Slot) {
        self.port.sent(issue, |inner, memory| {
            let began = std::mem::replace(&mut inner.regs.in_reset, slot.fis.resets());
            if inner.regs.in_reset {
                if slot.clears_busy() {
                    inner.regs.status &= !super::fis::status::BUSY;
                }
            } else if began {
                inner.soft_reset(memory);
            } else {
                inner.regs.status &= !super::fis::status::BUSY;
            }
        });
    }

    fn fail(&mut self, issue: &Issue, fis: &HostFis, error: u8) {
        let tf = TaskFile::failed(fis, error);
        self.end(issue, tf, Protocol::Plain, 0);
    }

    fn end(&mut self, issue: &Issue, tf: TaskFile, protocol: Protocol, interrupts: u32) {
        self.port.ended(issue, &End { tf, protocol, interrupts }, |_| {});
    }

    fn disk_command(&mut self, issue: Issue, slot: Slot, disk: &AtaDisk) {
        let plan = disk.decide(&slot.fis, &mut self.port.lock().regs.ata);
        match plan {
            // A queued command that is wrong ends as queued ones do.
            Plan::End(tf) if is_queued(&slot.fis) => {
                self.port.take_queued(&issue, tag(&slot.fis));
                self.port.queued_ended(issue.generation, tag(&slot.fis), &tf, 0);
            }
            Plan::End(tf) => self.end(&issue, tf, Protocol::Plain, 0),
            Plan::Send { data, pio } => self.send(issue, &slot, &data, pio),
            Plan::Flush => {
                let purpose = Purpose::Disk(Protocol::Plain);
                let task = Task { issue, slot, purpose, interrupts: 0 };
                self.start(disk.medium(), Job::flush(), task);
            }
            Plan::Read(transfer) => self.transfer(issue, slot, disk, transfer, false),
            Plan::Write(transfer) => self.transfer(issue, slot, disk, transfer, true),
            Plan::Trim(bytes) => self.trim(issue, slot, disk, bytes),
        }
    }

    /// Sends data of the device's own.
    fn send(&mut self, issue: Issue, slot: &Slot, bytes: &[u8], pio: bool) {
        let memory = self.port.memory().clone();
        let Ok(data) = slot.data(&memory, bytes.len() as u64) else {
            return self.port.bus_error(issue.generation);
        };
        let moved = data.list.write(&memory, 0, bytes) as u64;
        slot.moved(&memory, moved);
        let interrupts = interrupts(&data, moved < bytes.len() as u64);
        let protocol = match pio {
            true => Protocol::PioIn(bytes.len() as u16),
            false => Protocol::Plain,
        };
        self.end(&issue, TaskFile::good(&slot.fis), protocol, interrupts);
    }

    fn transfer(
        &mut self,
        issue: Issue,
        slot: Slot,
        disk: &AtaDisk,
        transfer: Transfer,
        write: bool,
    ) {
        let memory = self.port.memory().clone();
        let Ok(data) = slot.data(&memory, transfer.len) else {
            return self.port.bus_error(issue.generation);
        };
        let short = data.list.len() < transfer.len;
        if let Some(tag) = transfer.tag {
            if !self.port.take_queued(&issue, tag) || write && short {
                let tf = TaskFile::failed(&slot.fis, error::ABORT);
                return self.port.queued_ended(issue.generation, tag, &tf, 0);
            }
            let setup = dma_setup(tag, !write, transfer.len as u32);
            self.port.receive(issue.generation, area::DMA_SETUP, &setup);
        } else if write && short {
            // The host has less than it said it would send.
            return self.fail(&issue, &slot.fis, error::ABORT);
        }
        // What the host has no room for is lost, and it is told.
        let len = data.list.len().min(transfer.len);
        let job = match write {
            true => Job::write(transfer.offset, len, &data.list),
            false => Job::read(transfer.offset, len, &data.list, disk.sectors() * SECTOR),
        };
        let job = if write && transfer.durable { job.then(Job::flush()) } else { job };
        let purpose = match (transfer.tag, transfer.block) {
            (Some(tag), _) => Purpose::Queued { tag },
            (None, None) => Purpose::Disk(Protocol::Plain),
            (None, Some(block)) => {
                let last = last_block(transfer.len, block);
                let protocol = if write { Protocol::PioOut(last) } else { Protocol::PioIn(last) };
                Purpose::Disk(protocol)
            }
        };
        let task = Task { issue, slot, purpose, interrupts: interrupts(&data, short) };
        self.start(disk.medium(), job, task);
    }

    fn trim(&mut self, issue: Issue, slot: Slot, disk: &AtaDisk, bytes: u64) {
        let memory = self.port.memory().clone();
        let Ok(data) = slot.data(&memory, bytes) else {
            return self.port.bus_error(issue.generation);
        };
        let mut list = vec![0; bytes as usize];
        if data.list.read(&memory, 0, &mut list) < list.len() {
            return self.fail(&issue, &slot.fis, error::ABORT);
        }
        let ranges = match disk.ranges(&list) {
            Ok(ranges) => ranges,
            Err(error) => return self.fail(&issue, &slot.fis, error),
        };
        let ops: VecDeque<_> =
            ranges.into_iter().map(|(offset, len)| Op::Discard { offset, len }).collect();
        let purpose = Purpose::Disk(Protocol::Plain);
        let task = Task { issue, slot, purpose, interrupts: interrupts(&data, false) };
        self.start(disk.medium(), Job::ops(ops), task);
    }

    fn drive_command(&mut self, issue: Issue, slot: Slot, drive: &Arc<CdRom>) {
        let plan = atapi::decide(&slot.fis, drive.serial(), &mut self.port.lock().regs.ata);
        match plan {
            atapi::Plan::End(tf) => self.end(&issue, tf, Protocol::Plain, 0),
            atapi::Plan::Send(data) => self.send(issue, &slot, &data, true),
            atapi::Plan::Packet { block } => self.packet(issue, slot, drive, block),
        }
    }

    fn packet(&mut self, issue: Issue, slot: Slot, drive: &Arc<CdRom>, block: Option<u64>) {
        let memory = self.port.memory().clone();
        let cdb = Cdb::new(&slot.packet);
        // Not more: SeaBIOS gives commands without data a list that covers all kinds of things.
        let Ok(data) = slot.data(&memory, data_length(&cdb)) else {
            return self.port.bus_error(issue.generation);
        };
        let interrupts = interrupts(&data, false);
        let none = crate::dma::Scatter::default();
        let (data_out, data_in) =
            if slot.writes() { (&data.list, &none) } else { (&none, &data.list) };
        let held_sense = self.port.lock().regs.sense;
        let action =
            drive.execute(&Command { cdb, memory: &memory, data_out, data_in, held_sense });
        match action {
            Action::Done(reply) => {
                let moved = reply.deliver(&memory, data_in);
                self.packet_ended(&issue, &slot, &reply, moved, block, interrupts);
            }
            Action::Work(medium, job) => {
                let task = Task { issue, slot, purpose: Purpose::Packet { block }, interrupts };
                self.start(&medium, job, task);
            }
        }
    }

    fn packet_ended(
        &mut self,
        issue: &Issue,
        slot: &Slot,
        reply: &Reply,
        moved: u64,
        block: Option<u64>,
        interrupts: u32,
    ) {
        slot.moved(self.port.memory(), moved);
        let sense = match reply.overrun {
            true => Some(Sense::PARAMETER_LENGTH),
            false => reply.sense,
        };
        let protocol = match block {
            Some(block) if moved > 0 && slot.writes() => Protocol::PioOut(last_block(moved, block)),
            Some(block) if moved > 0 => Protocol::PacketIn(last_block(moved, block)),
            _ => Protocol::Plain,
        };
        let end = End { tf: atapi::ended(&slot.fis, sense), protocol, interrupts };
        // Sense is kept until the next command, which may ask for it.
        self.port.ended(issue, &end, |regs| regs.sense = sense);
    }

    fn start(&mut self, medium: &Medium, job: Job, task: Task) {
        if let Some(ended) = self.lane.start(medium, job, task) {
            self.ended(ended);
        }
    }

    fn ended(&mut self, ended: Ended<Task>) {
        let Task { issue, slot, purpose, interrupts } = &ended.tag;
        let tf = match &ended.result {
            Ok(()) => TaskFile::good(&slot.fis),
            Err(Fault::Read(_)) => TaskFile::failed(&slot.fis, error::UNCORRECTABLE),
            Err(_) => TaskFile::failed(&slot.fis, error::ABORT),
        };
        let moved = ended.job.transferred();
        match purpose {
            Purpose::Disk(protocol) => {
                slot.moved(self.port.memory(), moved);
                self.end(issue, tf, *protocol, *interrupts);
            }
            Purpose::Queued { tag } => {
                self.port.queued_ended(issue.generation, *tag, &tf, *interrupts);
            }
            Purpose::Packet { block } => {
                let reply = finished(&ended);
                self.packet_ended(issue, slot, &reply, moved, *block, *interrupts);
            }
        }
    }
}

/// The PxIS bits that a command's data brings.
fn interrupts(data: &Data, overflow: bool) -> u32 {
    let prd = if data.interrupt { interrupt::PRD } else { 0 };
    prd | if overflow { interrupt::OVERFLOW } else { 0 }
}

/// Bytes of the last of the blocks that a PIO transfer is cut into.
fn last_block(len: u64, block: u64) -> u16 {
    match len % block.max(1) {
        0 => block.min(len) as u16,
        rest => rest as u16,
    }
}
