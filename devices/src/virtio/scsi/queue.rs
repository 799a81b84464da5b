//! One request queue, in its thread: chains in, commands to units, jobs to disks, answers back.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::epoll::EventSet;

use super::super::chain::Malformed;
use super::super::worker::{Handler, Poll};
use super::super::{Error, Virtqueue};
use super::request::{Request, response};
use super::targets::{Found, Mailbox, Match, Message, Shared, TaskAction};
use crate::storage::{
    Action, Command, Ended, Lane, Reply, Sense, Unit, finished, opcode, report_luns,
};

/// Tokens of the lane's descriptor and of the mailbox's.
const LANE: u32 = 0;
const MAILBOX: u32 = 1;

/// A command whose job is under way.
struct Task {
    request: Request,
    unit: Arc<dyn Unit>,
    /// The response it gets instead of its own.
    ended_by: Option<u8>,
    /// Dropped when it ends.
    waited_for: Vec<Sender<()>>,
}

/// What exists while the queue runs.
struct Running {
    /// Before `queue`: dropping it waits for what is in flight.
    lane: Lane<Task>,
    queue: Virtqueue,
    messages: Receiver<Message>,
    /// Dropped when no medium is open that is gone.
    tidying: Vec<Sender<()>>,
}

/// The handler of one queue.
pub(super) struct Requests {
    shared: Arc<Shared>,
    index: usize,
    running: Option<Running>,
}

impl Requests {
    pub(super) fn new(shared: Arc<Shared>, index: usize) -> Self {
        Self { shared, index, running: None }
    }

    fn mailbox(&self) -> &Mailbox {
        // The device makes as many mailboxes as handlers.
        &self.shared.mailboxes[self.index]
    }
}

impl Running {
    /// Takes what the driver offers and starts it.
    fn take(&mut self, shared: &Shared) {
        let Self { lane, queue, .. } = self;
        let cdb_size = shared.cdb_size.load(Ordering::Relaxed);
        let sense_size = shared.sense_size.load(Ordering::Relaxed);
        queue.process(|queue, chain| {
            match Request::parse(queue.memory(), chain, cdb_size, sense_size) {
                Some(request) => begin(shared, lane, queue, request),
                None => queue.fail(Malformed::Request),
            }
            true
        });
        // What the page cache has is read by now: no need to sleep first.
        if lane.in_flight() > 0 {
            self.complete(shared);
        }
    }

    /// Answers what the disks have finished.
    fn complete(&mut self, shared: &Shared) {
        for ended in self.lane.complete() {
            end(&mut self.queue, ended);
        }
        self.queue.notify();
        self.tidy(shared);
    }

    fn tidy(&mut self, shared: &Shared) {
        if !self.tidying.is_empty() && self.lane.tidy(&shared.media()) {
            self.tidying.clear();
        }
    }

    fn messages(&mut self, shared: &Shared) {
        while let Ok(message) = self.messages.try_recv() {
            match message {
                Message::Tasks { matches, action, answer } => {
                    // The driver may mean one that lies in the ring still.
                    self.take(shared);
                    self.tasks(&matches, action, &answer);
                }
                Message::Tidy(answer) => self.tidying.push(answer),
            }
        }
        self.tidy(shared);
    }

    fn tasks(&mut self, matches: &Match, action: TaskAction, answer: &Sender<()>) {
        for task in self.lane.tags().filter(|task| task.request.matches(matches)) {
            match action {
                TaskAction::Query => {
                    let _ = answer.send(()); // Who asked waits.
                    return;
                }
                TaskAction::End(response) => {
                    task.ended_by = Some(response);
                    task.waited_for.push(answer.clone());
                }
                TaskAction::Wait => task.waited_for.push(answer.clone()),
            }
        }
    }
}

/// Starts a command, or answers it at once.
fn begin(shared: &Shared, lane: &mut Lane<Task>, queue: &mut Virtqueue, request: Request) {
    let two_ways = !request.data_in.is_empty() && !request.data_out.is_empty();
    let found = match request.at {
        Some(at) => shared.find(at),
        None => Found::NoTarget,
    };
    let unit = match found {
        _ if two_ways => return fail(queue, &request, response::FAILURE), // Not offered.
        Found::NoTarget => return fail(queue, &request, response::BAD_TARGET),
        Found::NoUnit => return answer(queue, &request, &without_unit(shared, &request), false),
        Found::Unit(unit) => unit,
    };
    if request.cdb.opcode() == opcode::REPORT_LUNS {
        let reply = report_luns(&request.cdb, &luns(shared, &request));
        return answer(queue, &request, &reply, unit.descriptor_sense());
    }
    let memory = queue.memory().clone();
    let action = unit.execute(&Command {
        cdb: request.cdb,
        memory: &memory,
        data_out: &request.data_out,
        data_in: &request.data_in,
        held_sense: None,
    });
    match action {
        Action::Done(reply) => answer(queue, &request, &reply, unit.descriptor_sense()),
        Action::Work(medium, job) => {
            let task = Task { request, unit, ended_by: None, waited_for: Vec::new() };
            if let Some(ended) = lane.start(&medium, job, task) {
                end(queue, ended);
            }
        }
    }
}

fn luns(shared: &Shared, request: &Request) -> Vec<u16> {
    request.at.map(|(target, _)| shared.luns(target)).unwrap_or_default()
}

/// What a target answers for a unit that it does not have (SPC-4, section 5.13).
fn without_unit(shared: &Shared, request: &Request) -> Reply {
    const NOT_THERE: u8 = 0x7f; // qualifier 3, type 1FH
    match request.cdb.opcode() {
        opcode::INQUIRY if request.cdb.u8(1) & 1 == 0 => {
            let mut data = vec![0; 36];
            data[0] = NOT_THERE;
            data[2] = 5;
            data[3] = 2;
            data[4] = 31;
            Reply::data(data, request.cdb.u16(3).into())
        }
        opcode::REPORT_LUNS => report_luns(&request.cdb, &luns(shared, request)),
        opcode::REQUEST_SENSE => {
            let descriptor = request.cdb.u8(1) & 1 != 0;
            Reply::data(Sense::NO_UNIT.encode(descriptor), request.cdb.u8(4).into())
        }
        _ => Reply::check(Sense::NO_UNIT),
    }
}

/// Gives a chain back with a response that is not the unit's.
fn fail(queue: &mut Virtqueue, request: &Request, response: u8) {
    let written = request.answer(queue.memory(), response, None, 0);
    queue.push(request.chain.head, written);
}

/// Gives a chain back with the unit's reply.
fn answer(queue: &mut Virtqueue, request: &Request, reply: &Reply, descriptor: bool) {
    if reply.overrun {
        return fail(queue, request, response::OVERRUN);
    }
    let moved = reply.deliver(queue.memory(), &request.data_in);
    let sense = reply.sense.map(|sense| (sense, descriptor));
    let written = request.answer(queue.memory(), response::OK, sense, moved);
    queue.push(request.chain.head, written);
}

/// A command's job has ended.
fn end(queue: &mut Virtqueue, ended: Ended<Task>) {
    let reply = finished(&ended);
    let Task { request, unit, ended_by, .. } = &ended.tag;
    match ended_by {
        Some(response) => fail(queue, request, *response),
        None => answer(queue, request, &reply, unit.descriptor_sense()),
    }
    // The chain is used before those who wait for the command hear of its end, when `ended` is dropped.
    drop(ended);
}

impl Handler for Requests {
    fn start(&mut self, _slot: usize, queue: Virtqueue, poll: &Poll) -> Result<(), Error> {
        let lane =
            Lane::new(queue.memory().clone()).map_err(Error::host("create an epoll instance"))?;
        poll.add(lane.as_raw_fd(), EventSet::IN, LANE).map_err(Error::host("wait for disks"))?;
        let mailbox = self.mailbox();
        poll.add(mailbox.wake.as_raw_fd(), EventSet::IN, MAILBOX)
            .map_err(Error::host("wait for an eventfd"))?;
        let (sender, messages) = channel();
        *mailbox.inbox.lock().unwrap_or_else(|e| e.into_inner()) = Some(sender);
        self.running = Some(Running { lane, queue, messages, tidying: Vec::new() });
        Ok(())
    }

    fn kicked(&mut self, _slot: usize, _poll: &Poll) {
        if let Some(running) = &mut self.running {
            running.take(&self.shared);
        }
    }

    fn ready(&mut self, token: u64, _events: EventSet, _poll: &Poll) {
        let _ = (token == u64::from(MAILBOX)).then(|| self.mailbox().wake.read());
        let Some(running) = &mut self.running else { return };
        if token == u64::from(MAILBOX) {
            running.messages(&self.shared);
        } else {
            running.complete(&self.shared);
        }
    }

    fn stop(&mut self, _slot: usize, poll: &Poll) -> Option<Virtqueue> {
        // No messages from here on; those that have come are heard before the queue is idle.
        *self.mailbox().inbox.lock().unwrap_or_else(|e| e.into_inner()) = None;
        poll.remove(self.mailbox().wake.as_raw_fd());
        let mut running = self.running.take()?;
        poll.remove(running.lane.as_raw_fd());
        running.messages(&self.shared);
        while running.lane.in_flight() > 0 {
            for ended in running.lane.wait() {
                end(&mut running.queue, ended);
            }
        }
        running.queue.notify();
        Some(running.queue)
    }
}
