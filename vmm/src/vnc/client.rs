//! The reader thread of a client: leads it through the handshake, then takes its messages. Input goes to the guest at
//! once, whatever the writer does; everything else goes to the writer in the order in which it came.

use std::io;
use std::sync::Arc;

use super::extensions::{SIDE_BUTTONS, fence, status};
use super::input::{Input, Motion};
use super::mailbox::{Mailbox, Order};
use super::message::{Message, Parsed, parse};
use super::peer::Peer;
use super::session::{Around, Session};

/// Bytes that are read at a time.
const READ: usize = 4096;

/// Serves a client that has been let in: what it sees in a thread of its own, what it does in this one.
///
/// # Errors
/// Why it ended, if not by the client's wish.
pub fn serve(peer: &Arc<Peer>, around: &Arc<Around>, mailbox: &Arc<Mailbox>) -> io::Result<()> {
    let session = Session::start(peer.clone(), around.clone(), mailbox.clone())?;
    peer.set_time_limit(None)?;
    let for_writer = peer.clone();
    let writer = std::thread::Builder::new().name("vnc-out".into()).spawn(move || {
        let result = session.serve();
        // The reader ends with it.
        for_writer.close();
        result
    })?;
    let read = Reader::new(around.clone(), mailbox.clone()).run(peer);
    mailbox.close();
    peer.close();
    match writer.join() {
        // The reader's complaint, if there is one, is the cause: closing made the writer fail.
        Ok(written) => read.and(written),
        Err(_) => Err(io::Error::other("its writer panicked")),
    }
}

struct Reader {
    around: Arc<Around>,
    mailbox: Arc<Mailbox>,
    input: Input,
    side_buttons: bool,
    /// A fence whose answer waits for the message after it.
    fence: Option<Order>,
}

impl Reader {
    fn new(around: Arc<Around>, mailbox: Arc<Mailbox>) -> Self {
        let input = Input::new(around.sink.clone());
        Self { around, mailbox, input, side_buttons: false, fence: None }
    }

    fn run(mut self, peer: &Peer) -> io::Result<()> {
        let mut bytes: Vec<u8> = Vec::new();
        let mut buffer = [0; READ];
        // What is still to come of a text that nobody wants.
        let mut skip = 0;
        loop {
            let n = peer.read(&mut buffer)?;
            if n == 0 {
                return Ok(());
            }
            let skipped = skip.min(n);
            skip -= skipped;
            bytes.extend_from_slice(&buffer[skipped..n]);
            let mut at = 0;
            while let Parsed::Complete(message, used) =
                parse(&bytes[at..], self.side_buttons).map_err(io::Error::other)?
            {
                at += used;
                if let Message::CutText(len) = message {
                    let len = len as usize;
                    let here = len.min(bytes.len() - at);
                    at += here;
                    skip = len - here;
                } else {
                    self.take(message)?;
                }
            }
            bytes.drain(..at);
            if bytes.is_empty() {
                bytes.shrink_to(READ);
            }
        }
    }

    fn take(&mut self, message: Message) -> io::Result<()> {
        let order = match message {
            Message::Key { keysym, scancode, down } => {
                self.input.key(keysym, scancode, down);
                None
            }
            Message::Pointer { buttons, x, y } => {
                let (width, height) = self.mailbox.size();
                let motion = match self.mailbox.distances() {
                    true => Motion::Distance,
                    false => Motion::Place(width, height),
                };
                self.input.pointer(buttons, x, y, motion);
                None
            }
            Message::CutText(_) => None,
            Message::SetPixelFormat(format) => Some(Order::Format(format)),
            Message::SetEncodings(numbers) => {
                self.side_buttons = numbers.contains(&SIDE_BUTTONS);
                Some(Order::Encodings(numbers))
            }
            Message::UpdateRequest { incremental, area } => {
                Some(Order::Update { incremental, area })
            }
            Message::ContinuousUpdates(area) => Some(Order::Continuous(area)),
            Message::Fence { flags, payload } if flags & fence::REQUEST == 0 => {
                Some(Order::Arrived(payload))
            }
            Message::Fence { flags, payload } => {
                // Two fences in a row: the first one's next message is the second.
                let order = Order::Fence { flags, payload };
                if flags & fence::SYNC_NEXT != 0 {
                    return match self.fence.replace(order) {
                        Some(first) => self.post([first]),
                        None => Ok(()),
                    };
                }
                Some(order)
            }
            Message::SetDesktopSize { width, height, simple } => {
                Some(Order::Resize { status: self.suggest(width, height, simple) })
            }
        };
        if order.is_none() {
            self.around.display.nudge();
        }
        // The fence's answer and what comes after it, with no update between them.
        let fence = self.fence.take();
        self.post(fence.into_iter().chain(order))
    }

    fn suggest(&self, width: u16, height: u16, simple: bool) -> u16 {
        if !simple || width == 0 || height == 0 {
            return status::INVALID_LAYOUT;
        }
        match self.around.display.suggest_size(width.into(), height.into()) {
            true => status::FORWARDED,
            false => status::PROHIBITED,
        }
    }

    fn post(&self, orders: impl IntoIterator<Item = Order>) -> io::Result<()> {
        match self.mailbox.post(orders) {
            true => Ok(()),
            false => Err(io::Error::other("it asks for more answers than it reads")),
        }
    }
}
