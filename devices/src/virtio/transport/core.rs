//! What virtio's registers answer, and the life of the device behind them.
//!
//! ```text
//!   status:  0 --> ACKNOWLEDGE --> DRIVER --> FEATURES_OK --> DRIVER_OK (queues run)
//!            ^                                                   |  malformed ring or chain
//!            +--- a write of 0, from everywhere -----------------+--> + DEVICE_NEEDS_RESET
//! ```
//!
//! A reset waits for what is in flight, in the vCPU's thread: a driver may go on at once, and some
//! firmware does not poll for the end of a reset.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard};

use lodge_accel::{IoEvent, Vm};
use lodge_memory::GuestMemory;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::{
    Error, Notifier, QueueResources, QueueState, VirtioDevice, feature, read_structure, status,
};
use super::interrupts::{Interrupts, NO_VECTOR};
use super::registers::{QueueRegisters, reg};
use super::{TransportState, layout};
use crate::bus::BusDevice;
use crate::pci::{EndpointState, Intx, Msix};

/// The transport's half behind the registers.
pub(super) struct Core {
    interrupts: Arc<Interrupts>,
    kicks: Vec<Arc<EventFd>>,
    vm: Arc<dyn Vm>,
    memory: Arc<GuestMemory>,
    state: Mutex<Registers>,
}

struct Registers {
    device: Box<dyn VirtioDevice>,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    /// The driver set a feature bit above 63, of which there are none.
    beyond: bool,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    paused: bool,
    /// Where the registers are, in guest-physical memory.
    base: Option<u64>,
    /// Where kick eventfds are attached: queue and guest-physical address.
    attached: Vec<(usize, u64)>,
}

impl Core {
    pub(super) fn new(
        mut device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemory>,
        vm: Arc<dyn Vm>,
        intx: Arc<Intx>,
    ) -> Result<Arc<Self>, Error> {
        let mut sizes = device.queue_sizes();
        sizes.truncate(layout::MAX_QUEUES);
        let msix = Msix::new(vm.clone(), sizes.len() as u16 + 1);
        let interrupts = Arc::new(Interrupts::new(sizes.len(), msix, intx));
        device.set_notifier(interrupts.clone());
        let kicks = sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new))
            .collect::<Result<_, _>>()
            .map_err(Error::host("create an eventfd"))?;
        let state = Registers {
            device,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            beyond: false,
            queue_select: 0,
            queues: sizes.into_iter().map(QueueRegisters::new).collect(),
            paused: false,
            base: None,
            attached: Vec::new(),
        };
        Ok(Arc::new(Self { interrupts, kicks, vm, memory, state: Mutex::new(state) }))
    }

    pub(super) fn interrupts(&self) -> &Arc<Interrupts> {
        &self.interrupts
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Whether queues shall run.
    fn live(&self, state: &Registers) -> bool {
        let status = self.interrupts.status();
        status & status::DRIVER_OK != 0 && !state.paused
    }

    /// Starts every enabled queue that does not run.
    fn start_queues(&self, state: &mut Registers) {
        for index in 0..state.queues.len() {
            if state.queues[index].enabled && !state.queues[index].running {
                self.start_queue(state, index);
            }
        }
        self.attach_kicks(state);
    }

    fn start_queue(&self, state: &mut Registers, index: usize) {
        let queue = &state.queues[index];
        let resources = self.resources(state, index);
        match state.device.start_queue(index as u16, resources, queue.position) {
            Ok(()) => state.queues[index].running = true,
            Err(error) => {
                match error {
                    Error::Queue { .. } => {
                        tracing::debug!(%error, "a virtio queue cannot be started");
                    }
                    // The host's affair, not a mistake of the guest.
                    _ => tracing::error!(queue = index, %error, "a virtio queue cannot be started"),
                }
                self.interrupts.needs_reset();
            }
        }
    }

    fn resources(&self, state: &Registers, index: usize) -> QueueResources {
        let queue = &state.queues[index];
        QueueResources {
            index: index as u16,
            size: queue.size,
            descriptors: queue.descriptors,
            driver: queue.driver,
            device: queue.device,
            event_idx: state.driver_features & feature::EVENT_IDX != 0,
            indirect: state.driver_features & feature::INDIRECT_DESC != 0,
            memory: self.memory.clone(),
            kick: self.kicks[index].clone(),
            notifier: self.interrupts.clone(),
        }
    }

    /// Stops every queue that runs, and keeps where it stands.
    fn stop_queues(&self, state: &mut Registers) {
        for index in 0..state.queues.len() {
            if state.queues[index].running {
                let position = state.device.stop_queue(index as u16);
                let queue = &mut state.queues[index];
                queue.running = false;
                match position {
                    Some(position) => queue.position = position,
                    // The device's thread is gone: the driver has to start over.
                    None => self.interrupts.needs_reset(),
                }
            }
        }
    }

    /// Attaches kick eventfds to the notify addresses, where the accelerator can and queues run.
    fn attach_kicks(&self, state: &mut Registers) {
        if !self.vm.capabilities().ioeventfd {
            return;
        }
        let wanted: Vec<(usize, u64)> = match state.base {
            Some(base) => (0..state.queues.len())
                .filter(|index| state.queues[*index].running)
                .map(|index| (index, base + layout::NOTIFY + layout::NOTIFY_STEP * index as u64))
                .collect(),
            None => Vec::new(),
        };
        let (vm, kicks) = (&self.vm, &self.kicks);
        state.attached.retain(|at| {
            let keep = wanted.contains(at);
            if !keep && let Err(error) = vm.remove_ioeventfd(&kicks[at.0], IoEvent::Mmio(at.1)) {
                tracing::warn!(%error, "an eventfd cannot be detached");
            }
            keep
        });
        for at in wanted {
            if state.attached.contains(&at) {
                continue;
            }
            // Without it, the write comes to the bus and signals the same eventfd there.
            match vm.add_ioeventfd(&kicks[at.0], IoEvent::Mmio(at.1)) {
                Ok(()) => state.attached.push(at),
                Err(error) => tracing::debug!(%error, "an eventfd cannot be attached"),
            }
        }
    }

    /// The registers answer at another place, or no more.
    pub(super) fn bar_moved(&self, base: Option<u64>) {
        let mut state = self.lock();
        state.base = base;
        self.attach_kicks(&mut state);
    }

    /// Back to power-on, from every state.
    pub(super) fn reset(&self) {
        self.reset_locked(&mut self.lock());
    }

    fn reset_locked(&self, state: &mut Registers) {
        self.stop_queues(state);
        self.attach_kicks(state);
        state.device.reset();
        state.device_feature_select = 0;
        state.driver_feature_select = 0;
        state.driver_features = 0;
        state.beyond = false;
        state.queue_select = 0;
        for (queue, kick) in state.queues.iter_mut().zip(&self.kicks) {
            *queue = QueueRegisters::new(queue.max_size);
            let _ = kick.read(); // Empties it; there may be nothing.
        }
        self.interrupts.reset();
    }

    pub(super) fn pause(&self) {
        let mut state = self.lock();
        state.paused = true;
        self.stop_queues(&mut state);
        self.attach_kicks(&mut state);
    }

    pub(super) fn resume(&self) {
        let mut state = self.lock();
        state.paused = false;
        if self.live(&state) {
            self.start_queues(&mut state);
        }
    }

    fn offered(state: &Registers) -> u64 {
        state.device.features() | feature::TRANSPORT
    }

    pub(super) fn state(&self, pci: EndpointState) -> Result<TransportState, Error> {
        let state = self.lock();
        if !state.paused {
            return Err(Error::State("the device is not paused"));
        }
        let mut queues = state.queues.clone();
        for (index, queue) in queues.iter_mut().enumerate() {
            queue.vector = self.interrupts.queue_vector(index);
        }
        Ok(TransportState {
            pci,
            status: self.interrupts.status(),
            isr: self.interrupts.isr(),
            generation: self.interrupts.generation(),
            device_feature_select: state.device_feature_select,
            driver_feature_select: state.driver_feature_select,
            driver_features: state.driver_features,
            device_features: Self::offered(&state),
            queue_select: state.queue_select,
            config_vector: self.interrupts.config_vector(),
            queues,
            device: state.device.state(),
            vga: None,
        })
    }

    pub(super) fn restore(&self, saved: &TransportState) -> Result<(), Error> {
        let mut state = self.lock();
        state.paused = true;
        self.reset_locked(&mut state);
        if saved.queues.len() > state.queues.len() {
            return Err(Error::State("it had more queues"));
        }
        let fits = |(own, saved): (&QueueRegisters, &QueueRegisters)| {
            saved.size <= own.max_size && saved.size.is_power_of_two()
        };
        if !state.queues.iter().zip(&saved.queues).all(fits) {
            return Err(Error::State("it had larger queues"));
        }
        if saved.status & status::FEATURES_OK != 0 {
            if saved.driver_features & !Self::offered(&state) != 0 {
                return Err(Error::State("its driver uses features that are not offered here"));
            }
            state.device.set_features(saved.driver_features);
        }
        state.device.restore(&saved.device)?;
        state.device_feature_select = saved.device_feature_select;
        state.driver_feature_select = saved.driver_feature_select;
        state.driver_features = saved.driver_features;
        state.queue_select = saved.queue_select;
        self.interrupts.set_config_vector(saved.config_vector);
        for (index, (own, saved)) in state.queues.iter_mut().zip(&saved.queues).enumerate() {
            *own = QueueRegisters { max_size: own.max_size, running: false, ..saved.clone() };
            self.interrupts.set_queue_vector(index, saved.vector);
        }
        self.interrupts.restore(saved.status, saved.isr, saved.generation);
        Ok(())
    }

    /// The driver writes the status.
    fn set_status(&self, state: &mut Registers, value: u8) {
        if value == 0 {
            self.reset_locked(state);
            return;
        }
        let before = self.interrupts.status();
        if before & !status::NEEDS_RESET & !value != 0 {
            tracing::debug!(before, value, "a driver cleared status bits without a reset");
            return;
        }
        let mut added = value & !before & !status::NEEDS_RESET;
        let steps = [status::ACKNOWLEDGE, status::DRIVER, status::FEATURES_OK, status::DRIVER_OK];
        // Each step needs the ones before it; a bit that skips one is not taken.
        let mut reached = before;
        for step in steps {
            let complete = reached & below(step) == below(step);
            if added & step != 0 && (!complete || !self.enter(state, step)) {
                added &= !step;
            }
            reached |= added & step;
        }
        self.interrupts.add_status(added);
        if added & status::DRIVER_OK != 0 && self.live(state) {
            self.start_queues(state);
        }
    }

    /// Whether the device goes along with a step of the status.
    fn enter(&self, state: &mut Registers, step: u8) -> bool {
        if step != status::FEATURES_OK {
            return true;
        }
        let features = state.driver_features;
        let good = features & !Self::offered(state) == 0
            && !state.beyond
            && features & feature::VERSION_1 != 0
            && state.device.accepts(features);
        if good {
            state.device.set_features(features);
        }
        good
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        let state = &mut *state;
        let select = usize::from(state.queue_select);
        match (offset, data) {
            (reg::DEVICE_FEATURE_SELECT, &[a, b, c, d]) => {
                state.device_feature_select = u32::from_le_bytes([a, b, c, d]);
            }
            (reg::DRIVER_FEATURE_SELECT, &[a, b, c, d]) => {
                state.driver_feature_select = u32::from_le_bytes([a, b, c, d]);
            }
            (reg::DRIVER_FEATURE, &[a, b, c, d]) => {
                self.set_driver_feature(state, u32::from_le_bytes([a, b, c, d]));
            }
            (reg::CONFIG_VECTOR, &[a, b]) => {
                self.interrupts.set_config_vector(u16::from_le_bytes([a, b]));
            }
            (reg::STATUS, &[value]) => self.set_status(state, value),
            (reg::QUEUE_SELECT, &[a, b]) => state.queue_select = u16::from_le_bytes([a, b]),
            (reg::QUEUE_SIZE, &[a, b]) => {
                if let Some(queue) = state.queues.get_mut(select) {
                    queue.set_size(u16::from_le_bytes([a, b]));
                }
            }
            (reg::QUEUE_VECTOR, &[a, b]) => {
                self.interrupts.set_queue_vector(select, u16::from_le_bytes([a, b]));
            }
            (reg::QUEUE_ENABLE, &[1, 0]) => self.enable_queue(state, select),
            (reg::QUEUE_DESC..reg::QUEUE_NOTIFY_DATA, _) => {
                if let Some(queue) = state.queues.get_mut(select) {
                    write_address(queue, offset, data);
                }
            }
            _ => {}
        }
    }

    fn set_driver_feature(&self, state: &mut Registers, value: u32) {
        if self.interrupts.status() & status::FEATURES_OK != 0 {
            return;
        }
        match state.driver_feature_select {
            half @ (0 | 1) => {
                let shift = half * 32;
                state.driver_features &= !(u64::from(u32::MAX) << shift);
                state.driver_features |= u64::from(value) << shift;
            }
            _ => state.beyond |= value != 0,
        }
    }

    fn enable_queue(&self, state: &mut Registers, index: usize) {
        if index >= state.queues.len() || state.queues[index].enabled {
            return;
        }
        // What cannot work is refused now, where the driver can see it: the register stays 0.
        if let Err(error) =
            super::super::Virtqueue::new(&self.resources(state, index), QueueState::default())
        {
            tracing::debug!(%error, "a virtio queue is not enabled");
            self.interrupts.needs_reset();
            return;
        }
        state.queues[index].enabled = true;
        if self.live(state) {
            self.start_queues(state);
        }
    }

    /// The common configuration structure as it reads now.
    fn common(&self) -> [u8; reg::END] {
        let state = self.lock();
        let mut image = [0; reg::END];
        let mut put = |at: u64, bytes: &[u8]| {
            image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        };
        let half = |features: u64, select: u32| match select {
            0 | 1 => (features >> (select * 32)) as u32,
            _ => 0,
        };
        let offered = half(Self::offered(&state), state.device_feature_select);
        let chosen = half(state.driver_features, state.driver_feature_select);
        put(reg::DEVICE_FEATURE_SELECT, &state.device_feature_select.to_le_bytes());
        put(reg::DEVICE_FEATURE, &offered.to_le_bytes());
        put(reg::DRIVER_FEATURE_SELECT, &state.driver_feature_select.to_le_bytes());
        put(reg::DRIVER_FEATURE, &chosen.to_le_bytes());
        put(reg::CONFIG_VECTOR, &self.interrupts.config_vector().to_le_bytes());
        put(reg::NUM_QUEUES, &(state.queues.len() as u16).to_le_bytes());
        put(reg::STATUS, &[self.interrupts.status()]);
        put(reg::GENERATION, &[self.interrupts.generation()]);
        put(reg::QUEUE_SELECT, &state.queue_select.to_le_bytes());
        put(reg::QUEUE_VECTOR, &NO_VECTOR.to_le_bytes());
        // A queue that does not exist has size 0.
        if let Some(queue) = state.queues.get(usize::from(state.queue_select)) {
            let vector = self.interrupts.queue_vector(state.queue_select.into());
            put(reg::QUEUE_SIZE, &queue.size.to_le_bytes());
            put(reg::QUEUE_VECTOR, &vector.to_le_bytes());
            put(reg::QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(reg::QUEUE_NOTIFY_OFF, &state.queue_select.to_le_bytes());
            put(reg::QUEUE_DESC, &queue.descriptors.to_le_bytes());
            put(reg::QUEUE_DRIVER, &queue.driver.to_le_bytes());
            put(reg::QUEUE_DEVICE, &queue.device.to_le_bytes());
            put(reg::QUEUE_NOTIFY_DATA, &state.queue_select.to_le_bytes());
        }
        image
    }

    fn notify(&self, offset: u64) {
        let index = usize::try_from(offset / layout::NOTIFY_STEP).unwrap_or(usize::MAX);
        if let Some(kick) = self.kicks.get(index)
            && let Err(error) = kick.write(1)
        {
            // Only a full counter, and then the worker is already on its way.
            tracing::trace!(fd = kick.as_raw_fd(), %error, "a kick is lost");
        }
    }
}

/// The status bits that must be set before `step`.
fn below(step: u8) -> u8 {
    match step {
        status::DRIVER => status::ACKNOWLEDGE,
        status::FEATURES_OK => status::ACKNOWLEDGE | status::DRIVER,
        status::DRIVER_OK => status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK,
        _ => 0,
    }
}

/// A write to the 64-bit address registers: a half, or all of one.
fn write_address(queue: &mut QueueRegisters, offset: u64, data: &[u8]) {
    if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
        return;
    }
    for (half, value) in data.chunks_exact(4).enumerate() {
        let value = u32::from_le_bytes([value[0], value[1], value[2], value[3]]);
        queue.set_address(offset + 4 * half as u64, value);
    }
}

impl BusDevice for Core {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let within = offset & 0xfff;
        match offset & !0xfff {
            layout::COMMON => read_structure(&self.common(), within, data),
            layout::ISR => {
                data.fill(0);
                if within == 0
                    && let Some(first) = data.first_mut()
                {
                    *first = self.interrupts.take_isr();
                }
            }
            layout::DEVICE => self.lock().device.read_config(within, data),
            layout::MSIX_TABLE => self.interrupts.msix().read_table(within, data),
            layout::MSIX_PENDING => self.interrupts.msix().read_pending(within, data),
            _ => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let within = offset & 0xfff;
        match offset & !0xfff {
            layout::COMMON => self.write_common(within, data),
            layout::DEVICE => self.lock().device.write_config(within, data),
            layout::NOTIFY => self.notify(within),
            layout::MSIX_TABLE => self.interrupts.msix().write_table(within, data),
            _ => {}
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        self.reset();
    }
}
