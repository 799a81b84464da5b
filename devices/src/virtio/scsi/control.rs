//! The control queue, with task management functions, and the event queue, in one thread (section 5.6.6.2).

use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::super::chain::{Chain, Malformed};
use super::super::worker::{Handler, Poll};
use super::super::{Error, Virtqueue};
use super::request::{address, response};
use super::targets::{Found, Match, Shared, TaskAction};
use super::{CONTROL, EVENT};

/// Token of the events' eventfd.
const EVENTS: u32 = 0;
/// Types of requests.
const TMF: u32 = 0;
const AN_QUERY: u32 = 1;
const AN_SUBSCRIBE: u32 = 2;
/// Bytes of a task management request, and of one about asynchronous notification.
const TMF_BYTES: usize = 24;
const AN_BYTES: usize = 16;
/// Task management functions.
const ABORT_TASK: u32 = 0;
const ABORT_TASK_SET: u32 = 1;
const CLEAR_TASK_SET: u32 = 3;
const I_T_NEXUS_RESET: u32 = 4;
const LOGICAL_UNIT_RESET: u32 = 5;
const QUERY_TASK: u32 = 6;
const QUERY_TASK_SET: u32 = 7;

/// The handler of both queues.
pub(super) struct Control {
    shared: Arc<Shared>,
    control: Option<Virtqueue>,
    events: Option<Virtqueue>,
}

impl Control {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, control: None, events: None }
    }

    fn queue(&mut self, slot: usize) -> &mut Option<Virtqueue> {
        if slot == usize::from(CONTROL) { &mut self.control } else { &mut self.events }
    }

    fn deliver(&mut self) {
        if let Some(queue) = &mut self.events {
            self.shared.events.deliver(queue);
        }
    }
}

/// Answers one request; `None` if it is not one.
fn request(shared: &Shared, queue: &Virtqueue, chain: &Chain) -> Option<u32> {
    let mut data = [0; TMF_BYTES];
    let len = chain.read(queue.memory(), 0, &mut data);
    let [a, b, c, d, rest @ ..] = data;
    match u32::from_le_bytes([a, b, c, d]) {
        TMF if len >= TMF_BYTES && chain.writable_len() >= 1 => {
            let answer = task_management(shared, &rest);
            chain.write(queue.memory(), 0, &[answer]);
            Some(1)
        }
        AN_QUERY | AN_SUBSCRIBE if len >= AN_BYTES && chain.writable_len() >= 5 => {
            let mut lun = [0; 8];
            lun.copy_from_slice(&rest[..8]);
            let answer = match find(shared, lun) {
                Ok(_) => response::OK,
                Err(answer) => answer,
            };
            // There are no asynchronous notifications of the media kind: drives are polled.
            chain.write(queue.memory(), 0, &[0, 0, 0, 0, answer]);
            Some(5)
        }
        _ => None,
    }
}

/// The unit that a request is for, or the response for one that is not there.
fn find(shared: &Shared, lun: [u8; 8]) -> Result<(u8, u16), u8> {
    let at = address(lun).ok_or(response::BAD_TARGET)?;
    match shared.find(at) {
        Found::Unit(_) => Ok(at),
        Found::NoUnit => Err(response::INCORRECT_LUN),
        Found::NoTarget => Err(response::BAD_TARGET),
    }
}

/// Does a task management function; returns the response.
fn task_management(shared: &Shared, request: &[u8; TMF_BYTES - 4]) -> u8 {
    let [a, b, c, d, lun @ .., i0, i1, i2, i3, i4, i5, i6, i7] = *request;
    let subtype = u32::from_le_bytes([a, b, c, d]);
    let id = Some(u64::from_le_bytes([i0, i1, i2, i3, i4, i5, i6, i7]));
    let (target, lun) = match find(shared, lun) {
        Ok(at) => at,
        // A reset of the target needs no unit.
        Err(response::INCORRECT_LUN) if subtype == I_T_NEXUS_RESET => (lun[1], 0),
        Err(answer) => return answer,
    };
    let unit = Match { target, lun: Some(lun), id: None };
    let task = Match { id, ..unit };
    match subtype {
        ABORT_TASK => end(shared, task, response::ABORTED),
        ABORT_TASK_SET | CLEAR_TASK_SET => end(shared, unit, response::ABORTED),
        LOGICAL_UNIT_RESET => {
            end(shared, unit, response::RESET);
            if let Found::Unit(unit) = shared.find((target, lun)) {
                unit.reset();
            }
        }
        I_T_NEXUS_RESET => {
            end(shared, Match { target, lun: None, id: None }, response::RESET);
            shared.units_of(target).iter().for_each(|unit| unit.reset());
        }
        QUERY_TASK | QUERY_TASK_SET => {
            let wanted = if subtype == QUERY_TASK { task } else { unit };
            if shared.tasks(wanted, TaskAction::Query) {
                return response::FUNCTION_SUCCEEDED;
            }
        }
        _ => return response::FUNCTION_REJECTED,
    }
    response::FUNCTION_COMPLETE
}

/// Ends commands with this response, and waits until they have ended.
fn end(shared: &Shared, matches: Match, response: u8) {
    shared.tasks(matches, TaskAction::End(response));
}

impl Handler for Control {
    fn start(&mut self, slot: usize, queue: Virtqueue, poll: &Poll) -> Result<(), Error> {
        if slot == usize::from(EVENT) {
            poll.add(self.shared.events.wake.as_raw_fd(), EventSet::IN, EVENTS)
                .map_err(Error::host("wait for an eventfd"))?;
        }
        *self.queue(slot) = Some(queue);
        Ok(())
    }

    fn kicked(&mut self, slot: usize, _poll: &Poll) {
        if slot == usize::from(EVENT) {
            return self.deliver();
        }
        let Some(queue) = &mut self.control else { return };
        let shared = &self.shared;
        queue.process(|queue, chain| {
            match request(shared, queue, &chain) {
                Some(written) => queue.push(chain.head, written),
                None => queue.fail(Malformed::Request),
            }
            true
        });
    }

    fn ready(&mut self, _token: u64, _events: EventSet, _poll: &Poll) {
        self.deliver();
    }

    fn stop(&mut self, slot: usize, poll: &Poll) -> Option<Virtqueue> {
        if slot == usize::from(EVENT) {
            poll.remove(self.shared.events.wake.as_raw_fd());
        }
        self.queue(slot).take()
    }
}
