//! A port's registers and what becomes of its commands (AHCI 1.3.1, sections 3.3 and 5).
//!
//! ```text
//!   vCPU: PxCI --> slots that wait --> I/O thread: next() --> ... --> ended, queued_ended
//!                                        one at a time, or up to 32 queued ones (NCQ)
//!   ST cleared, COMRESET, HBA reset, unplug: a new generation. What the I/O thread still has of the older ones is
//!   "stale": it touches no register when it ends, and nothing new begins before (PxCMD.CR stays set).
//! ```

use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use lodge_memory::GuestMemory;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::ata::AtaState;
use super::fis::{TaskFile, device_bits, status};
use super::hba::{Hba, SLOTS};
use crate::storage::Sense;

/// Offsets of the registers.
pub(super) mod reg {
    pub const CLB: u64 = 0x00;
    pub const CLBU: u64 = 0x04;
    pub const FB: u64 = 0x08;
    pub const FBU: u64 = 0x0c;
    pub const IS: u64 = 0x10;
    pub const IE: u64 = 0x14;
    pub const CMD: u64 = 0x18;
    pub const TFD: u64 = 0x20;
    pub const SIG: u64 = 0x24;
    pub const SSTS: u64 = 0x28;
    pub const SCTL: u64 = 0x2c;
    pub const SERR: u64 = 0x30;
    pub const SACT: u64 = 0x34;
    pub const CI: u64 = 0x38;
}

/// Bits of PxIS.
pub(super) mod interrupt {
    pub const DEVICE: u32 = 1;
    pub const PIO_SETUP: u32 = 1 << 1;
    pub const DEVICE_BITS: u32 = 1 << 3;
    pub const PRD: u32 = 1 << 5;
    pub const CONNECT_CHANGE: u32 = 1 << 6;
    pub const PHY_CHANGE: u32 = 1 << 22;
    pub const OVERFLOW: u32 = 1 << 24;
    pub const HOST_BUS: u32 = 1 << 29;
    pub const TASK_FILE: u32 = 1 << 30;
    /// Those that can be enabled.
    pub const ALL: u32 = 0xfdc0_00ff;
}

/// Bits of PxCMD.
mod cmd {
    pub const START: u32 = 1;
    pub const SPIN_UP: u32 = 1 << 1;
    pub const POWER: u32 = 1 << 2;
    pub const OVERRIDE: u32 = 1 << 3;
    pub const RECEIVE: u32 = 1 << 4;
    pub const RECEIVING: u32 = 1 << 14;
    pub const RUNNING: u32 = 1 << 15;
    pub const HOT_PLUG: u32 = 1 << 18;
    /// What the guest may set: also the flags for ATAPI and power management that have no effect.
    pub const WRITABLE: u32 = START | RECEIVE | 0xf << 24;
}

/// Bits of PxSERR: PhyRdy changed, device exchanged.
const PHY_CHANGED: u32 = 1 << 16;
const EXCHANGED: u32 = 1 << 26;
/// PxSSTS: a device at 6 Gb/s, active; seen but not yet talked to; switched off.
const ESTABLISHED: u32 = 0x133;
const SEEN: u32 = 1;
const OFFLINE: u32 = 4;
/// PxSIG without a device, and PxTFD.STS.
const NO_SIGNATURE: u32 = u32::MAX;
const NO_STATUS: u8 = 0x7f;
/// Offsets in the FIS receive area.
pub(super) mod area {
    pub const DMA_SETUP: u64 = 0x00;
    pub const PIO_SETUP: u64 = 0x20;
    pub const DEVICE: u64 = 0x40;
    pub const DEVICE_BITS: u64 = 0x58;
}

/// What kind of device is at a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Ata,
    Atapi,
}

impl Kind {
    /// The registers after a reset (ATA8-ACS, section "signature").
    pub(super) fn signature(self) -> TaskFile {
        let (lba, status) = match self {
            Self::Ata => (0x00_00_01, status::IDLE),
            Self::Atapi => (0xeb_14_01, 0),
        };
        TaskFile { status, error: 1, lba, device: 0, count: 1 }
    }

    /// PxSIG.
    pub(super) fn sig(self) -> u32 {
        let tf = self.signature();
        (tf.lba as u32) << 8 | u32::from(tf.count)
    }
}

/// What is saved of a port.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PortState {
    /// PxCLB and PxCLBU.
    pub clb: u64,
    /// PxFB and PxFBU.
    pub fb: u64,
    /// PxIS, without the bits that mirror PxSERR.
    pub is: u32,
    /// PxIE.
    pub ie: u32,
    /// The writable bits of PxCMD.
    pub cmd: u32,
    /// PxTFD: status.
    pub status: u8,
    /// PxTFD: error.
    pub error: u8,
    /// PxSIG.
    pub sig: u32,
    /// PxSSTS.
    pub ssts: u32,
    /// PxSCTL.
    pub sctl: u32,
    /// PxSERR.
    pub serr: u32,
    /// PxSACT.
    pub sact: u32,
    /// PxCI: commands that have not begun, and one that failed.
    pub ci: u32,
    /// The slot that was looked at last since the port was started.
    pub last: Option<u32>,
    /// Nothing is done until the port is stopped and started.
    pub halted: bool,
    /// The signature waits for the FIS receive area.
    pub signature_waits: bool,
    /// The host holds the device in a software reset.
    pub in_reset: bool,
    /// The disk's own registers.
    pub ata: AtaState,
    /// The CD-ROM drive's sense data, which the host has not asked for yet.
    pub sense: Option<Sense>,
}

/// A command that the I/O thread shall look at.
#[derive(Debug, Clone, Copy)]
pub(super) struct Issue {
    pub slot: u32,
    pub list: u64,
    pub generation: u64,
}

/// What of the commands is under way.
#[derive(Default)]
struct Progress {
    generation: u64,
    /// Commands that the I/O thread has, of every generation.
    outstanding: usize,
    /// Those of older generations.
    stale: usize,
    /// A command that is not a queued one is being done.
    busy: bool,
    /// Queued commands that the device has taken, by tag.
    queued: u32,
    /// A command that is not a queued one waits for those.
    waits_for_queue: bool,
    paused: bool,
}

pub(super) struct Inner {
    pub regs: PortState,
    device: Option<Kind>,
    progress: Progress,
}

/// How a command's data went, for the FISes that tell of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    /// No data, or DMA.
    Plain,
    /// PIO to the host; the last block has this many bytes.
    PioIn(u16),
    /// PIO to the device.
    PioOut(u16),
    /// PIO of an ATAPI command to the host: the registers follow.
    PacketIn(u16),
}

/// A command's end.
#[derive(Debug, Clone, Copy)]
pub(super) struct End {
    pub tf: TaskFile,
    pub protocol: Protocol,
    /// More PxIS bits.
    pub interrupts: u32,
}

/// A port.
pub(super) struct Port {
    index: usize,
    inner: Mutex<Inner>,
    /// Signalled when commands have ended.
    idle: Condvar,
    /// Wakes the I/O thread.
    pub kick: EventFd,
    hba: Arc<Hba>,
    memory: Arc<GuestMemory>,
}

impl Port {
    pub(super) fn new(
        index: usize,
        kick: EventFd,
        hba: Arc<Hba>,
        memory: Arc<GuestMemory>,
    ) -> Arc<Self> {
        let mut inner =
            Inner { regs: PortState::default(), device: None, progress: Progress::default() };
        inner.power_on();
        Arc::new(Self { index, inner: Mutex::new(inner), idle: Condvar::new(), kick, hba, memory })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    pub(super) fn wake(&self) {
        let _ = self.kick.write(1); // Fails when full: then the thread is on its way.
    }

    /// Tells the controller whether there is something to tell the guest.
    fn follow(&self, inner: &Inner) {
        self.hba.set_pending(self.index, inner.is() & inner.regs.ie != 0);
    }

    pub(super) fn read(&self, offset: u64) -> u32 {
        self.lock().read(offset)
    }

    pub(super) fn write(&self, offset: u64, value: u32) {
        let mut inner = self.lock();
        inner.write(&self.memory, offset, value);
        self.follow(&inner);
        drop(inner);
        if matches!(offset, reg::CI | reg::CMD | reg::SCTL) {
            self.wake();
        }
    }

    /// A reset of the controller; commands under way are stale.
    pub(super) fn reset(&self) {
        let mut inner = self.lock();
        inner.power_on();
        self.follow(&inner);
    }

    /// Commands of before the last reset are under way.
    pub(super) fn is_draining(&self) -> bool {
        self.lock().progress.stale > 0
    }

    /// Returns when the I/O thread has no command.
    fn wait_idle<'a>(&self, mut inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        while inner.progress.outstanding > 0 {
            inner = self.idle.wait(inner).unwrap_or_else(|e| e.into_inner());
        }
        inner
    }

    /// Returns when the I/O thread has no command left of before.
    pub(super) fn wait_drained(&self) {
        let mut inner = self.lock();
        while inner.progress.stale > 0 {
            inner = self.idle.wait(inner).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// Takes no more commands; returns when those under way have ended.
    pub(super) fn pause(&self) {
        let mut inner = self.lock();
        inner.progress.paused = true;
        drop(self.wait_idle(inner));
    }

    pub(super) fn resume(&self) {
        self.lock().progress.paused = false;
        self.wake();
    }

    pub(super) fn state(&self) -> Option<PortState> {
        let inner = self.lock();
        inner.progress.paused.then(|| inner.regs.clone())
    }

    pub(super) fn restore(&self, state: &PortState) {
        let mut inner = self.lock();
        inner.progress.paused = true;
        inner.abandon();
        let mut inner = self.wait_idle(inner);
        inner.regs = state.clone();
        self.follow(&inner);
    }

    /// A device appears, while the guest runs or before.
    pub(super) fn plug(&self, kind: Kind) {
        let mut inner = self.lock();
        inner.device = Some(kind);
        inner.regs.serr |= PHY_CHANGED;
        inner.establish(&self.memory);
        self.follow(&inner);
    }

    /// The device is gone; its commands never end for the guest. Returns when the I/O thread has none.
    pub(super) fn unplug(&self) {
        let mut inner = self.lock();
        inner.device = None;
        inner.abandon();
        inner.lose();
        inner.regs.serr |= PHY_CHANGED | EXCHANGED;
        self.follow(&inner);
        drop(self.wait_idle(inner));
    }

    /// The next command for the I/O thread. Each must be ended.
    pub(super) fn next(&self) -> Option<Issue> {
        let mut inner = self.lock();
        let issue = inner.next();
        if issue.is_some() {
            inner.progress.outstanding += 1;
        }
        issue
    }

    /// The end of the I/O thread's work on a command of this generation: `then` changes the registers, unless
    /// they are another generation's.
    fn finish(&self, generation: u64, then: impl FnOnce(&mut Inner, &GuestMemory)) {
        let mut inner = self.lock();
        inner.progress.outstanding = inner.progress.outstanding.saturating_sub(1);
        if inner.progress.generation == generation {
            then(&mut inner, &self.memory);
            self.follow(&inner);
        } else {
            inner.progress.stale = inner.progress.stale.saturating_sub(1);
        }
        self.idle.notify_all();
    }

    /// A command is none of those that can be done now: it waits for the queued ones.
    pub(super) fn put_back(&self, issue: &Issue) {
        self.finish(issue.generation, |inner, _| {
            inner.progress.busy = false;
            inner.progress.waits_for_queue = true;
            inner.regs.status &= !status::BUSY;
            // It comes first when its turn has come.
            inner.regs.last = issue.slot.checked_sub(1);
        });
    }

    /// Whether queued commands are under way that this one has to wait for.
    pub(super) fn has_queued(&self) -> bool {
        self.lock().progress.queued != 0
    }

    /// The command's header, table or data is not in RAM.
    pub(super) fn bus_error(&self, generation: u64) {
        self.finish(generation, |inner, _| {
            inner.progress.busy = false;
            inner.regs.status &= !(status::BUSY | status::DRQ);
            inner.regs.is |= interrupt::HOST_BUS;
            inner.halt();
        });
    }

    /// The end of a command that is not a queued one. `before` is called first, with the registers.
    pub(super) fn ended(&self, issue: &Issue, end: &End, before: impl FnOnce(&mut PortState)) {
        self.finish(issue.generation, |inner, memory| {
            before(&mut inner.regs);
            inner.progress.busy = false;
            inner.ended(memory, issue.slot, end);
        });
    }

    /// The end of a FIS that nothing answers: a software reset.
    pub(super) fn sent(&self, issue: &Issue, then: impl FnOnce(&mut Inner, &GuestMemory)) {
        self.finish(issue.generation, |inner, memory| {
            inner.progress.busy = false;
            inner.regs.ci &= !(1 << issue.slot);
            then(inner, memory);
        });
    }

    /// The device takes a queued command; `false` if it has one with this tag, or another generation's.
    pub(super) fn take_queued(&self, issue: &Issue, tag: u8) -> bool {
        let mut inner = self.lock();
        let bit = 1u32 << (tag & 31);
        let current = inner.progress.generation == issue.generation;
        if current {
            inner.progress.busy = false;
        }
        if !current || inner.progress.queued & bit != 0 {
            return false;
        }
        inner.progress.queued |= bit;
        inner.regs.ci &= !(1 << issue.slot);
        let tf = TaskFile { status: status::IDLE, ..TaskFile::default() };
        inner.receive(&self.memory, area::DEVICE, &tf.to_host(false));
        (inner.regs.status, inner.regs.error) = (tf.status, tf.error);
        true
    }

    /// The end of a queued command.
    pub(super) fn queued_ended(&self, generation: u64, tag: u8, tf: &TaskFile, interrupts: u32) {
        self.finish(generation, |inner, memory| {
            inner.regs.is |= interrupts;
            inner.queued_ended(memory, tag, tf);
        });
    }

    /// Puts something into the FIS receive area, for a command of this generation.
    pub(super) fn receive(&self, generation: u64, offset: u64, fis: &[u8]) {
        let mut inner = self.lock();
        if inner.progress.generation == generation {
            inner.receive(&self.memory, offset, fis);
        }
    }
}

impl Inner {
    /// PxIS with what mirrors PxSERR.
    fn is(&self) -> u32 {
        let mut is = self.regs.is;
        if self.regs.serr & EXCHANGED != 0 {
            is |= interrupt::CONNECT_CHANGE;
        }
        if self.regs.serr & PHY_CHANGED != 0 {
            is |= interrupt::PHY_CHANGE;
        }
        is
    }

    fn read(&self, offset: u64) -> u32 {
        let regs = &self.regs;
        match offset {
            reg::CLB => regs.clb as u32,
            reg::CLBU => (regs.clb >> 32) as u32,
            reg::FB => regs.fb as u32,
            reg::FBU => (regs.fb >> 32) as u32,
            reg::IS => self.is(),
            reg::IE => regs.ie,
            reg::CMD => self.command(),
            reg::TFD => u32::from(regs.error) << 8 | u32::from(regs.status),
            reg::SIG => regs.sig,
            reg::SSTS => regs.ssts,
            reg::SCTL => regs.sctl,
            reg::SERR => regs.serr,
            reg::SACT => regs.sact,
            reg::CI => regs.ci,
            _ => 0,
        }
    }

    /// PxCMD.
    fn command(&self) -> u32 {
        let mut value = self.regs.cmd | cmd::SPIN_UP | cmd::POWER | cmd::HOT_PLUG;
        if self.regs.cmd & cmd::START != 0 {
            value |= self.regs.last.unwrap_or(0) << 8;
        }
        if self.regs.cmd & cmd::START != 0 || self.progress.stale > 0 {
            value |= cmd::RUNNING;
        }
        if self.regs.cmd & cmd::RECEIVE != 0 {
            value |= cmd::RECEIVING;
        }
        value
    }

    fn write(&mut self, memory: &GuestMemory, offset: u64, value: u32) {
        let low = |old: u64, value: u32| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64, value: u32| old & 0xffff_ffff | u64::from(value) << 32;
        let regs = &mut self.regs;
        match offset {
            reg::CLB => regs.clb = low(regs.clb, value & !0x3ff),
            reg::CLBU => regs.clb = high(regs.clb, value),
            reg::FB => regs.fb = low(regs.fb, value & !0xff),
            reg::FBU => regs.fb = high(regs.fb, value),
            reg::IS => regs.is &= !value,
            reg::IE => regs.ie = value & interrupt::ALL,
            reg::CMD => self.set_command(memory, value),
            reg::SCTL => self.set_control(memory, value),
            reg::SERR => regs.serr &= !value,
            reg::SACT if regs.cmd & cmd::START != 0 => regs.sact |= value,
            reg::CI if regs.cmd & cmd::START != 0 => regs.ci |= value,
            _ => {}
        }
    }

    fn set_command(&mut self, memory: &GuestMemory, value: u32) {
        let before = self.regs.cmd;
        self.regs.cmd = value & cmd::WRITABLE;
        if value & cmd::OVERRIDE != 0 {
            self.regs.status &= !(status::BUSY | status::DRQ);
        }
        if before & cmd::START != 0 && value & cmd::START == 0 {
            self.abandon();
        }
        if self.regs.cmd & cmd::RECEIVE != 0 {
            self.send_signature(memory);
        }
    }

    /// PxSCTL: COMRESET and switching the port off.
    fn set_control(&mut self, memory: &GuestMemory, value: u32) {
        const DETECTION: u32 = 0xf;
        let (before, now) = (self.regs.sctl & DETECTION, value & DETECTION);
        self.regs.sctl = value & 0xfff;
        if before == now {
            return;
        }
        match now {
            1 => {
                self.abandon();
                self.lose();
                self.regs.ssts = if self.device.is_some() { SEEN } else { 0 };
            }
            4 => {
                self.abandon();
                self.lose();
                self.regs.ssts = OFFLINE;
            }
            0 if matches!(before, 1 | 4) => match self.device {
                Some(_) => self.establish(memory),
                None => self.regs.ssts = 0,
            },
            _ => {}
        }
    }

    /// As after power-on, or a reset of the controller. The device is reset too.
    fn power_on(&mut self) {
        self.abandon();
        self.regs = PortState::default();
        self.lose();
        if let Some(kind) = self.device {
            self.arrived(kind);
        }
    }

    /// Nothing of the commands issued so far is the guest's any more.
    fn abandon(&mut self) {
        let progress = &mut self.progress;
        progress.generation += 1;
        progress.stale = progress.outstanding;
        progress.busy = false;
        progress.queued = 0;
        progress.waits_for_queue = false;
        let regs = &mut self.regs;
        (regs.ci, regs.sact, regs.halted, regs.last) = (0, 0, false, None);
    }

    /// The link is down.
    fn lose(&mut self) {
        let regs = &mut self.regs;
        (regs.ssts, regs.sig, regs.status, regs.error) = (0, NO_SIGNATURE, NO_STATUS, 0);
        regs.signature_waits = false;
    }

    /// The link comes up, with a device that has just been reset.
    fn establish(&mut self, memory: &GuestMemory) {
        if let Some(kind) = self.device {
            self.arrived(kind);
            if self.regs.cmd & cmd::RECEIVE != 0 {
                self.send_signature(memory);
            }
        }
    }

    fn arrived(&mut self, kind: Kind) {
        let regs = &mut self.regs;
        regs.ssts = ESTABLISHED;
        regs.serr |= EXCHANGED;
        regs.ata = AtaState::default();
        regs.in_reset = false;
        self.sign(kind);
    }

    /// The device has its registers as after a reset, and tells so when it can.
    fn sign(&mut self, kind: Kind) {
        let tf = kind.signature();
        let regs = &mut self.regs;
        (regs.status, regs.error, regs.sig) = (tf.status, tf.error, kind.sig());
        regs.signature_waits = true;
    }

    fn send_signature(&mut self, memory: &GuestMemory) {
        if let Some(kind) = self.device
            && std::mem::take(&mut self.regs.signature_waits)
        {
            self.receive(memory, area::DEVICE, &kind.signature().to_host(false));
        }
    }

    /// The end of a software reset.
    pub(super) fn soft_reset(&mut self, memory: &GuestMemory) {
        if let Some(kind) = self.device {
            self.regs.ata.soft_reset();
            self.sign(kind);
            if self.regs.cmd & cmd::RECEIVE != 0 {
                self.send_signature(memory);
            }
        }
    }

    /// Puts a FIS into the receive area.
    fn receive(&mut self, memory: &GuestMemory, offset: u64, fis: &[u8]) {
        if self.regs.cmd & cmd::RECEIVE == 0 {
            return;
        }
        let at = self.regs.fb.checked_add(offset).map(GuestAddress);
        let there = at.filter(|at| memory.check_range(*at, fis.len()));
        if there.is_none_or(|at| memory.write_slice(fis, at).is_err()) {
            self.regs.is |= interrupt::HOST_BUS;
            self.halt();
        }
    }

    /// Nothing more is done until the port is stopped and started.
    fn halt(&mut self) {
        self.regs.halted = true;
    }

    fn next(&mut self) -> Option<Issue> {
        let progress = &mut self.progress;
        progress.waits_for_queue &= progress.queued != 0;
        let regs = &mut self.regs;
        let ready = self.device.is_some()
            && regs.cmd & cmd::START != 0
            && regs.ssts == ESTABLISHED
            && !regs.halted
            && !progress.paused
            && !progress.busy
            && !progress.waits_for_queue
            && progress.stale == 0
            && regs.ci != 0;
        if !ready {
            return None;
        }
        // From the slot after the last one, around.
        let first = regs.last.map_or(0, |last| last + 1);
        let slot =
            (first..first + SLOTS).map(|slot| slot % SLOTS).find(|s| regs.ci >> s & 1 != 0)?;
        regs.last = Some(slot);
        regs.status |= status::BUSY;
        progress.busy = true;
        Some(Issue { slot, list: regs.clb, generation: progress.generation })
    }

    fn ended(&mut self, memory: &GuestMemory, slot: u32, end: &End) {
        let tf = &end.tf;
        (self.regs.status, self.regs.error) = (tf.status, tf.error);
        self.regs.is |= end.interrupts;
        if tf.is_error() {
            self.receive(memory, area::DEVICE, &tf.to_host(true));
            self.regs.is |= interrupt::DEVICE | interrupt::TASK_FILE;
            self.halt();
            return;
        }
        let (setup, registers) = match end.protocol {
            Protocol::Plain => (None, true),
            Protocol::PioIn(bytes) => (Some((true, bytes)), false),
            Protocol::PioOut(bytes) => (Some((false, bytes)), true),
            Protocol::PacketIn(bytes) => (Some((true, bytes)), true),
        };
        if let Some((to_host, bytes)) = setup {
            self.receive(memory, area::PIO_SETUP, &tf.pio_setup(to_host, bytes));
            self.regs.is |= interrupt::PIO_SETUP;
        }
        if registers {
            self.receive(memory, area::DEVICE, &tf.to_host(true));
            self.regs.is |= interrupt::DEVICE;
        }
        self.regs.ci &= !(1 << slot);
    }

    fn queued_ended(&mut self, memory: &GuestMemory, tag: u8, tf: &TaskFile) {
        let bit = 1u32 << (tag & 31);
        (self.regs.status, self.regs.error) = (tf.status, tf.error);
        if !tf.is_error() {
            self.progress.queued &= !bit;
            self.regs.sact &= !bit;
            self.receive(memory, area::DEVICE_BITS, &device_bits(tf, bit));
            self.regs.is |= interrupt::DEVICE_BITS;
            return;
        }
        // All queued commands are lost with it; which one it was is told by the log.
        self.receive(memory, area::DEVICE_BITS, &device_bits(tf, 0));
        self.regs.is |= interrupt::DEVICE_BITS | interrupt::TASK_FILE;
        let (ci, sact, last) = (self.regs.ci, self.regs.sact, self.regs.last);
        self.abandon();
        (self.regs.ci, self.regs.sact, self.regs.last) = (ci, sact, last);
        self.regs.ata.queue_error = Some((tag, *tf));
        self.halt();
    }
}
