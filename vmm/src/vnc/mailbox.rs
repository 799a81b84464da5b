//! What a client's writer thread waits for: the client's own orders, which the reader thread passes on, and the display's
//! changes.
//!
//! ```text
//!   reader --- orders, in order ---+
//!                                  +--> mailbox --wait--> writer
//!   display - dirty rectangles ----+        \
//!             <------- hungry, wake ---------+
//! ```
//!
//! It has a limit: orders that a client piles up without reading the answers end its connection, and dirty rectangles
//! that are too many become the one around them.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use lodge_devices::display::{Rect, Update};

use super::message::Area;
use super::pixels::PixelFormat;
use super::tiles::around;
use crate::display::{Display, Viewer};

/// Orders that a client may have waiting. A program that waits for answers has a handful.
const MOST_ORDERS: usize = 512;
/// Rectangles that are kept apart.
const MOST_RECTS: usize = 64;

/// What a client wants of its writer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Pixels in this format from now on.
    Format(PixelFormat),
    /// These encodings from now on.
    Encodings(Vec<i32>),
    /// An update.
    Update {
        /// Only what changed.
        incremental: bool,
        /// Where.
        area: Area,
    },
    /// Updates without asking, of this area; or no longer.
    Continuous(Option<Area>),
    /// Answer this fence.
    Fence {
        /// Its flags.
        flags: u32,
        /// What goes back.
        payload: Vec<u8>,
    },
    /// The client has come to a fence of the server's.
    Arrived(Vec<u8>),
    /// The answer to a wish for this size; whether the guest was told.
    Resize {
        /// Why not, or that it was told: a status of rfbproto, ExtendedDesktopSize.
        status: u16,
    },
}

/// Where changes are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Dirty {
    /// Here.
    Rects(Vec<Rect>),
    /// Everywhere; or the picture has another size.
    #[default]
    All,
}

impl Dirty {
    const NONE: Self = Self::Rects(Vec::new());

    fn add(&mut self, update: &Update) {
        if update.resized {
            *self = Self::All;
        }
        let Self::Rects(rects) = self else { return };
        rects.extend_from_slice(&update.dirty);
        if rects.len() > MOST_RECTS
            && let Some(all) = rects.drain(..).reduce(around)
        {
            rects.push(all);
        }
    }
}

/// What there is for the writer.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mail {
    /// The client's orders, the oldest first.
    pub orders: Vec<Order>,
    /// What was drawn.
    pub dirty: Dirty,
    /// The view was pulled since the writer began to wait.
    pub fresh: bool,
}

/// The mailbox of one client.
#[derive(Default)]
pub struct Mailbox {
    inside: Mutex<Inside>,
    arrived: Condvar,
    hungry: AtomicBool,
    /// The picture's size as the client knows it: columns in the upper half, rows in the lower.
    size: AtomicU32,
    /// The client was asked for movements of its pointer instead of places.
    distances: AtomicBool,
}

#[derive(Default)]
struct Inside {
    mail: Mail,
    closed: bool,
}

impl Mailbox {
    fn inside(&self) -> MutexGuard<'_, Inside> {
        // Its fields do not depend on each other.
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes orders on, all or none. False if they are too many.
    pub fn post(&self, orders: impl IntoIterator<Item = Order>) -> bool {
        let mut inside = self.inside();
        for order in orders {
            // A view from before the question is no answer to it.
            inside.mail.fresh &= !matches!(order, Order::Update { .. });
            let merged = inside.mail.orders.last_mut().is_some_and(|last| merge(last, &order));
            if !merged {
                inside.mail.orders.push(order);
            }
        }
        self.arrived.notify_one();
        inside.mail.orders.len() <= MOST_ORDERS
    }

    /// Waits for orders or, if it wants them, for a fresh view. Nothing when it is closed.
    pub fn wait(&self, wants_view: bool, display: &Display) -> Option<Mail> {
        let mut inside = self.inside();
        if wants_view && inside.mail.orders.is_empty() && !inside.closed {
            inside.mail.fresh = false;
            self.hungry.store(true, Ordering::SeqCst);
            // The display asks who is hungry: not with this lock held.
            drop(inside);
            display.wake();
            inside = self.inside();
        }
        while !inside.closed && inside.mail.orders.is_empty() && !(wants_view && inside.mail.fresh)
        {
            inside = self.arrived.wait(inside).unwrap_or_else(PoisonError::into_inner);
        }
        self.hungry.store(false, Ordering::SeqCst);
        let mail = std::mem::replace(
            &mut inside.mail,
            Mail { orders: Vec::new(), dirty: Dirty::NONE, fresh: false },
        );
        (!inside.closed).then_some(mail)
    }

    /// Ends all waiting, for good.
    pub fn close(&self) {
        self.inside().closed = true;
        self.arrived.notify_one();
    }

    /// The client knows this size now; each side fits into 16 bits.
    pub fn set_size(&self, width: u32, height: u32) {
        self.size.store(width << 16 | height & 0xffff, Ordering::SeqCst);
    }

    /// The size that the client knows.
    pub fn size(&self) -> (u32, u32) {
        let size = self.size.load(Ordering::SeqCst);
        (size >> 16, size & 0xffff)
    }

    /// The client was asked for movements (or for places).
    pub fn set_distances(&self, distances: bool) {
        self.distances.store(distances, Ordering::SeqCst);
    }

    /// Whether the client was asked for movements.
    pub fn distances(&self) -> bool {
        self.distances.load(Ordering::SeqCst)
    }
}

impl Viewer for Mailbox {
    fn is_hungry(&self) -> bool {
        self.hungry.load(Ordering::SeqCst)
    }

    fn pulled(&self, update: &Update) {
        let mut inside = self.inside();
        inside.mail.dirty.add(update);
        inside.mail.fresh = true;
        if self.hungry.load(Ordering::SeqCst) {
            self.arrived.notify_one();
        }
    }
}

/// Makes one of two orders where both together mean one; a client that asks again and again costs nothing then.
fn merge(last: &mut Order, next: &Order) -> bool {
    match (last, next) {
        (
            Order::Update { incremental: a, area: old },
            Order::Update { incremental: b, area: new },
        ) if a == b => {
            let right = (u32::from(old.x) + u32::from(old.width))
                .max(u32::from(new.x) + u32::from(new.width));
            let bottom = (u32::from(old.y) + u32::from(old.height))
                .max(u32::from(new.y) + u32::from(new.height));
            let (x, y) = (old.x.min(new.x), old.y.min(new.y));
            // What is beyond 16 bits is outside of every picture.
            let side = |end: u32, start: u16| (end - u32::from(start)).min(0xffff) as u16;
            *old = Area { x, y, width: side(right, x), height: side(bottom, y) };
            true
        }
        (last @ Order::Format(_), Order::Format(_))
        | (last @ Order::Encodings(_), Order::Encodings(_)) => {
            last.clone_from(next);
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lodge_devices::display::{Picture, Screen};
    use std::sync::Arc;

    struct Blank;

    impl Screen for Blank {
        fn refresh(&self, _: &mut Picture) -> Update {
            Update::default()
        }

        fn suggest_size(&self, _: u32, _: u32) -> bool {
            false
        }
    }

    fn update(incremental: bool, x: u16) -> Order {
        Order::Update { incremental, area: Area { x, y: 1, width: 10, height: 10 } }
    }

    #[test]
    fn questions_of_a_kind_are_one() {
        let mailbox = Mailbox::default();
        assert!((0..10_000).all(|i| mailbox.post([update(true, i % 50)])));
        assert!(mailbox.post([update(false, 0xffff), update(false, 0)]));
        let area = Area { x: 0, y: 1, width: 59, height: 10 };
        let wide = Area { width: 0xffff, ..area };
        let expected = [
            Order::Update { incremental: true, area },
            Order::Update { incremental: false, area: wide },
        ];
        assert_eq!(mailbox.inside().mail.orders, expected);
    }

    #[test]
    fn orders_have_a_limit() {
        let mailbox = Mailbox::default();
        let fence = || Order::Fence { flags: 0, payload: Vec::new() };
        assert_eq!((0..1000).take_while(|_| mailbox.post([fence()])).count(), MOST_ORDERS);
    }

    #[test]
    fn many_rectangles_become_one() {
        let mut dirty = Dirty::NONE;
        for i in 0..1000 {
            let rect = Rect { x: i, y: 2 * i, width: 1, height: 1 };
            dirty.add(&Update { dirty: vec![rect], ..Update::default() });
            let Dirty::Rects(rects) = &dirty else { panic!() };
            assert!(rects.len() <= MOST_RECTS);
        }
        let Dirty::Rects(rects) = &dirty else { panic!() };
        let all = rects.iter().copied().reduce(around);
        assert_eq!(all, Some(Rect { x: 0, y: 0, width: 1000, height: 1999 }));
        dirty.add(&Update { resized: true, ..Update::default() });
        assert_eq!(dirty, Dirty::All);
    }

    #[test]
    fn a_view_is_fresh_only_after_the_question() {
        let display = Display::start(Arc::new(Blank)).unwrap();
        let mailbox = Arc::new(Mailbox::default());
        let viewer: Arc<dyn Viewer> = mailbox.clone();
        display.attach(Arc::downgrade(&viewer));
        display.fresh();
        mailbox.post([update(true, 0)]);
        let mail = mailbox.wait(true, &display).unwrap();
        assert_eq!((mail.orders.len(), mail.fresh, mail.dirty), (1, false, Dirty::All));
        let mail = mailbox.wait(true, &display).unwrap();
        assert_eq!((mail.orders.len(), mail.fresh, mail.dirty), (0, true, Dirty::NONE));
        mailbox.close();
        assert_eq!(mailbox.wait(false, &display), None);
    }
}
