//! Entropy device (VIRTIO 1.2, section 5.4): the host's random numbers.

use vmm_sys_util::epoll::EventSet;

use super::worker::{Handler, Poll, Worker};
use super::{DeviceState, Error, QueueResources, QueueState, VirtioDevice, Virtqueue};

const DEVICE_TYPE: u16 = 4;
const QUEUE_SIZE: u16 = 64;
/// The most that one request is given; a driver asks again.
const MOST: usize = 4096;

/// The device.
pub struct Rng {
    worker: Worker<RngQueue>,
}

impl Rng {
    /// A source of randomness. `name` is that of its thread.
    pub fn new(name: &str) -> Self {
        Self { worker: Worker::new(name, RngQueue::default()) }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }
    fn class(&self) -> u32 {
        0x00_ff_00
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }
    fn set_features(&mut self, _features: u64) {}
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn start_queue(
        &mut self,
        _index: u16,
        resources: QueueResources,
        state: QueueState,
    ) -> Result<(), Error> {
        self.worker.start(0, &resources, state)
    }
    fn stop_queue(&mut self, _index: u16) -> Option<QueueState> {
        self.worker.stop(0)
    }
    fn reset(&mut self) {}
    fn state(&self) -> DeviceState {
        DeviceState::Rng
    }
    fn restore(&mut self, state: &DeviceState) -> Result<(), Error> {
        match state {
            DeviceState::Rng => Ok(()),
            _ => Err(Error::State("it is not one of a random number generator")),
        }
    }
}

#[derive(Default)]
struct RngQueue(Option<Virtqueue>);

impl Handler for RngQueue {
    fn start(&mut self, _slot: usize, queue: Virtqueue, _poll: &Poll) -> Result<(), Error> {
        self.0 = Some(queue);
        Ok(())
    }

    fn kicked(&mut self, _slot: usize, _poll: &Poll) {
        let Some(queue) = &mut self.0 else { return };
        queue.process(|queue, chain| {
            let mut random = [0; MOST];
            let wanted = usize::try_from(chain.writable_len()).map_or(MOST, |len| len.min(MOST));
            let got = fill(&mut random[..wanted]);
            let written = chain.write(queue.memory(), 0, &random[..got]);
            queue.push(chain.head, written as u32);
            true
        });
    }

    fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) {}

    fn stop(&mut self, _slot: usize, _poll: &Poll) -> Option<Virtqueue> {
        self.0.take()
    }
}

/// Fills `data` with the host's randomness; returns how much there was (all of it, in practice).
fn fill(data: &mut [u8]) -> usize {
    let mut done = 0;
    while done < data.len() {
        let rest = &mut data[done..];
        // SAFETY: the pointer and the length are those of a slice that is ours to write.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        if got > 0 {
            done += got as usize;
        } else if std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
            break;
        }
    }
    done
}
