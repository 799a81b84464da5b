//! An accelerator for tests: it runs nothing and writes down every interrupt.

use std::sync::Mutex;

use lodge_accel::state::ChipState;
use lodge_accel::{
    Capabilities, Error, IoEvent, MemorySlot, Msi, Result, Trigger, Vcpu, VcpuSetup, Vm,
};
use vmm_sys_util::eventfd::EventFd;

/// The recorder.
#[derive(Default)]
pub struct TestVm {
    irqs: Mutex<Vec<(u32, bool)>>,
    msis: Mutex<Vec<Msi>>,
    ioevents: Mutex<Vec<IoEvent>>,
    ioeventfd: bool,
    slots: Mutex<[Option<MemorySlot>; 16]>,
}

#[allow(dead_code)] // Each test program uses a part of it.
impl TestVm {
    /// A recorder; `ioeventfd` says whether eventfds can be attached to guest writes.
    pub fn new(ioeventfd: bool) -> Self {
        Self { ioeventfd, ..Self::default() }
    }

    /// Every change of a line, in order.
    pub fn irqs(&self) -> Vec<(u32, bool)> {
        self.irqs.lock().unwrap().clone()
    }

    /// Every message, in order.
    pub fn msis(&self) -> Vec<Msi> {
        self.msis.lock().unwrap().clone()
    }

    /// What slot `slot` shows, and where.
    pub fn slot(&self, slot: u32) -> Option<MemorySlot> {
        self.slots.lock().unwrap()[slot as usize]
    }

    /// Where eventfds are attached.
    pub fn ioevents(&self) -> Vec<IoEvent> {
        self.ioevents.lock().unwrap().clone()
    }
}

fn unsupported<T>() -> Result<T> {
    Err(Error::Invalid("not in this test".into()))
}

impl Vm for TestVm {
    fn capabilities(&self) -> Capabilities {
        Capabilities { name: "test", ioeventfd: self.ioeventfd, max_vcpus: 0, physical_bits: 40 }
    }
    fn create_vcpu(&self, _index: u32, _setup: VcpuSetup) -> Result<Box<dyn Vcpu>> {
        unsupported()
    }
    fn set_irq(&self, gsi: u32, level: bool) -> Result<()> {
        self.irqs.lock().unwrap().push((gsi, level));
        Ok(())
    }
    fn signal_msi(&self, msi: Msi) -> Result<()> {
        self.msis.lock().unwrap().push(msi);
        Ok(())
    }
    fn add_irqfd(&self, _fd: &EventFd, _trigger: Trigger) -> Result<()> {
        unsupported()
    }
    fn remove_irqfd(&self, _fd: &EventFd, _trigger: Trigger) -> Result<()> {
        unsupported()
    }
    fn add_ioeventfd(&self, _fd: &EventFd, at: IoEvent) -> Result<()> {
        let mut ioevents = self.ioevents.lock().unwrap();
        assert!(self.ioeventfd && !ioevents.contains(&at), "{at:?} attached twice");
        ioevents.push(at);
        Ok(())
    }
    fn remove_ioeventfd(&self, _fd: &EventFd, at: IoEvent) -> Result<()> {
        let mut ioevents = self.ioevents.lock().unwrap();
        let found = ioevents.iter().position(|other| *other == at);
        ioevents.remove(found.expect("only what was attached is detached"));
        Ok(())
    }
    unsafe fn set_memory(&self, slot: u32, memory: Option<MemorySlot>) -> Result<()> {
        self.slots.lock().unwrap()[slot as usize] = memory;
        Ok(())
    }
    fn take_slot_dirty(&self, slot: u32) -> Result<Vec<u64>> {
        let pages = self.slot(slot).map_or(0, |slot| slot.bytes.div_ceil(4096) as usize);
        Ok(vec![0; pages.div_ceil(64)])
    }
    fn set_dirty_log(&self, _on: bool) -> Result<()> {
        unsupported()
    }
    fn take_dirty(&self) -> Result<Vec<Vec<u64>>> {
        unsupported()
    }
    fn chip_state(&self) -> Result<ChipState> {
        unsupported()
    }
    fn set_chip_state(&self, _state: &ChipState) -> Result<()> {
        unsupported()
    }
}
