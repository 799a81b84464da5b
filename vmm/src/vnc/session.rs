//! The writer thread of a client: what the client has, what it wants, and the updates that it gets.
//!
//! ```text
//!             +--------- orders: formats, fences, wishes ---------+
//!             v                                                   |
//!   waiting --+-- a question (or continuous updates) --> hungry --+-- fresh view --> compare with `seen`
//!      ^                                                               |                  |
//!      |                                                   nothing new |                  | copies, changed tiles
//!      |                                                               v                  v
//!      +------------------------------------------------------------ hungry <---- encode, write, `seen` is new
//! ```
//!
//! - `seen` is the client's picture, pixel by pixel (but for JPEG's losses, which are made good when the picture rests).
//!   The view is locked only while it is compared with `seen` and copied, never while bytes are made or written.
//! - A client that reads slowly blocks this thread and nobody else. When it is ready again, it gets what is
//!   there then: pictures in between are never made.
//! - With continuous updates, at most [`MOST_ON_THEIR_WAY`] are between server and client, which fences tell.

use std::borrow::Cow;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lodge_devices::display::{Cursor, Picture, Rect};

use super::encode::{EMPTY, Encoder, copy_rect, cursor_with_alpha};
use super::extensions::{END_OF_CONTINUOUS_UPDATES, Extensions, Extras, fence, fence_message};
use super::input::InputSink;
use super::mailbox::{Dirty, Mail, Mailbox, Order};
use super::message::Area;
use super::peer::Peer;
use super::pixels::PixelFormat;
use super::scroll::{self, Copy};
use super::tiles::{self, Tiles, around, clip};
use crate::display::{Display, View};

/// A client sees so much of a larger picture, in each direction. The protocol's own limit is 65535.
const LONGEST_SIDE: u32 = 16384;
/// What a client sees where there is no picture yet.
const NO_PICTURE: (u32, u32) = (640, 480);
/// Continuous updates that a client has not confirmed.
const MOST_ON_THEIR_WAY: u32 = 4;
/// The payload of fences that follow updates.
const AFTER_UPDATE: &[u8] = &[1];
/// Bytes that are collected before they are written.
const WRITE_AT: usize = 64 << 10;
/// A picture that rests so long is sent again where it lost something.
const REST: Duration = Duration::from_millis(500);
/// So many pixels at a time, so that what is new need not wait.
const REFINED: u32 = 1 << 18;
/// Rectangles of an update; 65535 means something else to those who know LastRect.
const MOST_RECTS: usize = 65534;
/// A larger cursor is none.
const LARGEST_CURSOR: u32 = 512;

/// What all sessions of a server share.
pub struct Around {
    /// The picture.
    pub display: Arc<Display>,
    /// Where input goes.
    pub sink: Arc<dyn InputSink>,
    /// The desktop's name.
    pub name: Mutex<Arc<str>>,
}

impl Around {
    fn name(&self) -> Arc<str> {
        self.name.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A client after the handshake.
pub struct Session {
    peer: Arc<Peer>,
    around: Arc<Around>,
    mailbox: Arc<Mailbox>,
    encoder: Encoder,
    known: Extensions,
    /// The client's picture.
    seen: Picture,
    /// Where it may differ from the view.
    pending: Tiles,
    /// Where the client wants it whatever it has.
    forced: Tiles,
    /// Where it lost something.
    lossy: Tiles,
    last_change: Instant,
    /// Where the client waits for an update.
    asked: Option<Rect>,
    continuous: Option<Rect>,
    on_their_way: u32,
    /// What was told, to tell only what is new.
    told: Told,
    out: Vec<u8>,
}

#[derive(Default)]
struct Told {
    name: Option<Arc<str>>,
    cursor: Option<Option<Arc<Cursor>>>,
    /// Whether movements are wanted.
    distances: Option<bool>,
    extended_keys: bool,
    side_buttons: bool,
    fence: bool,
    continuous_updates: bool,
}

impl Session {
    /// A session for a client that has said `ClientInit`; answers with `ServerInit`.
    ///
    /// # Errors
    /// The connection's.
    pub fn start(peer: Arc<Peer>, around: Arc<Around>, mailbox: Arc<Mailbox>) -> io::Result<Self> {
        around.display.fresh();
        let size = size_of(&around.display.view());
        let mut session = Self {
            peer,
            around,
            mailbox,
            encoder: Encoder::new(),
            known: Extensions::default(),
            seen: Picture::default(),
            pending: Tiles::none(0, 0),
            forced: Tiles::none(0, 0),
            lossy: Tiles::none(0, 0),
            last_change: Instant::now(),
            asked: None,
            continuous: None,
            on_their_way: 0,
            told: Told::default(),
            out: Vec::new(),
        };
        session.set_size(size);
        let name = session.around.name();
        let out = &mut session.out;
        out.extend((size.0 as u16).to_be_bytes());
        out.extend((size.1 as u16).to_be_bytes());
        out.extend(PixelFormat::NATIVE.to_bytes());
        out.extend((name.len() as u32).to_be_bytes());
        out.extend(name.as_bytes());
        session.told.name = Some(name);
        session.flush(0)?;
        Ok(session)
    }

    /// The client's picture is black and has this size.
    fn set_size(&mut self, (width, height): (u32, u32)) {
        self.seen = Picture::black(width, height);
        let none = Tiles::none(width, height);
        self.pending = none.clone();
        self.mark_all();
        self.lossy = none;
        self.forced = self.pending.clone();
        self.mailbox.set_size(width, height);
    }

    fn mark_all(&mut self) {
        if let Some(whole) = self.seen.whole() {
            self.pending.mark(whole);
        }
    }

    /// Serves the client until its connection ends or its mailbox is closed.
    ///
    /// # Errors
    /// The connection's.
    pub fn serve(mut self) -> io::Result<()> {
        while let Some(mail) = self.mailbox.wait(self.wants(), &self.around.display) {
            let Mail { orders, dirty, fresh } = mail;
            match dirty {
                Dirty::Rects(rects) => rects.iter().for_each(|rect| self.pending.mark(*rect)),
                Dirty::All => self.mark_all(),
            }
            for order in orders {
                self.obey(order);
                self.flush(WRITE_AT)?;
            }
            if fresh && self.wants() {
                self.answer()?;
            }
            self.flush(0)?;
        }
        Ok(())
    }

    /// Whether the client waits for something to see.
    fn wants(&self) -> bool {
        let room = !self.known.fence || self.on_their_way < MOST_ON_THEIR_WAY;
        self.asked.is_some() || self.continuous.is_some() && room
    }

    /// Writes what was collected, if it is more than `least` bytes.
    fn flush(&mut self, least: usize) -> io::Result<()> {
        if self.out.len() > least {
            self.peer.write_all(&self.out)?;
            self.out.clear();
            self.out.shrink_to(2 * WRITE_AT);
        }
        Ok(())
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Format(format) => {
                self.encoder.set_format(format);
                self.out.extend(format.colour_map().unwrap_or_default());
                // The pointer's shape is in the client's format too.
                self.told.cursor = None;
            }
            Order::Encodings(numbers) => self.learn(&numbers),
            Order::Update { incremental, area } => self.ask(incremental, area),
            Order::Continuous(area) => {
                self.continuous = area.map(rect_of);
                self.on_their_way = 0;
                if self.continuous.is_none() {
                    self.out.push(END_OF_CONTINUOUS_UPDATES);
                }
            }
            Order::Fence { flags, payload } => {
                fence_message(flags & fence::KNOWN, &payload, &mut self.out);
            }
            Order::Arrived(payload) => {
                if payload == AFTER_UPDATE {
                    self.on_their_way = self.on_their_way.saturating_sub(1);
                }
            }
            Order::Resize { status } => {
                if self.known.extended_desktop_size {
                    self.tell_size(1, status);
                }
            }
        }
    }

    /// What the client knows from now on.
    fn learn(&mut self, numbers: &[i32]) {
        self.known = Extensions::parse(numbers);
        self.encoder.set(self.known.settings);
        let (known, told) = (self.known, &mut self.told);
        if known.fence && !std::mem::replace(&mut told.fence, true) {
            fence_message(fence::REQUEST, &[], &mut self.out);
        }
        if known.continuous_updates && !std::mem::replace(&mut told.continuous_updates, true) {
            self.out.push(END_OF_CONTINUOUS_UPDATES);
        }
        if !known.fence {
            self.on_their_way = 0;
        }
        if !known.pointer_motion {
            told.distances = None;
            self.mailbox.set_distances(false);
        }
    }

    fn ask(&mut self, incremental: bool, area: Area) {
        let area = rect_of(area);
        if incremental && self.continuous.is_some() {
            return;
        }
        if !incremental {
            if self.known.extended_desktop_size {
                self.tell_size(0, 0);
            }
            self.pending.mark(area);
            self.forced.mark(area);
        }
        // An area outside of the picture still asks for what is not pixels.
        let size = (self.seen.width, self.seen.height);
        let area = clip(area, size.0, size.1).unwrap_or(EMPTY);
        self.asked = Some(match self.asked {
            Some(asked) if asked != EMPTY && area != EMPTY => around(asked, area),
            Some(asked) if area == EMPTY => asked,
            _ => area,
        });
    }

    /// An update of its own that tells the picture's size.
    fn tell_size(&mut self, reason: u16, status: u16) {
        let mut extras = Extras::default();
        let size = (self.seen.width, self.seen.height);
        extras.desktop_size(self.known.extended_desktop_size, reason, status, size);
        update_header(extras.count, &mut self.out);
        self.out.extend(extras.bytes);
    }

    /// Sends what is new, if anything is.
    fn answer(&mut self) -> io::Result<()> {
        let around = self.around.clone();
        let view = around.display.view();
        let size = size_of(&view);
        if size != (self.seen.width, self.seen.height) && self.known.resizes() {
            drop(view);
            self.set_size(size);
            self.tell_size(0, 0);
            // The client asks anew, for a picture of the new size.
            self.asked = None;
            return Ok(());
        }
        let area = match (self.asked, self.continuous) {
            (Some(asked), Some(area)) => tiles::around(asked, area),
            (Some(area), None) | (None, Some(area)) => area,
            (None, None) => return Ok(()),
        };
        let (copies, mut changed) =
            self.compare(&fit(&view.picture, size_of_picture(&self.seen)), area);
        let cursor = view.cursor.clone();
        drop(view);
        changed.add(&self.forced.take(area));
        let extras = self.extras(cursor);
        if changed.any() || !copies.is_empty() {
            self.last_change = Instant::now();
            let rects = changed.rects();
            return self.update(&extras, &copies, &rects, false);
        }
        if self.lossy.any() && self.last_change.elapsed() >= REST {
            let rects = self.lossy.take_some(REFINED);
            return self.update(&extras, &[], &rects, true);
        }
        if extras.count > 0 {
            return self.update(&extras, &[], &[], false);
        }
        Ok(())
    }

    /// Brings `seen` up to date in `area`; what of it can be copied, and what changed beside.
    fn compare(&mut self, now: &Picture, area: Rect) -> (Vec<Copy>, Tiles) {
        let whole = self.seen.whole() == Some(area);
        let mut copies = Vec::new();
        if whole
            && self.known.copy_rect
            && !self.forced.any()
            && let Some(differs) = tiles::difference(&self.seen, now, &self.pending)
        {
            copies = scroll::find(&mut self.seen, now, differs);
            // Copied rows may have been right before, and may not be pending.
            copies.iter().for_each(|copy| self.pending.mark(copy.rect));
            if self.lossy.any() {
                copies.iter().for_each(|copy| self.lossy.mark(copy.rect));
            }
        }
        let changed = tiles::update(&mut self.seen, now, &mut self.pending, area);
        (copies, changed)
    }

    /// What is to be told beside pixels.
    fn extras(&mut self, cursor: Option<Option<Arc<Cursor>>>) -> Extras {
        let mut extras = Extras::default();
        let (known, told) = (self.known, &mut self.told);
        if known.extended_keys && !std::mem::replace(&mut told.extended_keys, true) {
            extras.extended_keys();
        }
        if known.side_buttons && !std::mem::replace(&mut told.side_buttons, true) {
            extras.side_buttons();
        }
        let distances = !self.around.sink.takes_places();
        if known.pointer_motion && told.distances != Some(distances) {
            told.distances = Some(distances);
            self.mailbox.set_distances(distances);
            extras.pointer_motion(distances);
        }
        let name = self.around.name();
        if known.desktop_name && told.name.as_ref() != Some(&name) {
            extras.desktop_name(&name);
            told.name = Some(name);
        }
        if (known.cursor || known.cursor_with_alpha) && told.cursor != cursor {
            let shape = cursor.as_ref().and_then(|cursor| cursor.as_deref()).filter(is_sound);
            if known.cursor_with_alpha {
                extras.add(|out| cursor_with_alpha(shape, out));
            } else {
                extras.add(|out| self.encoder.cursor(shape, out));
            }
            told.cursor = cursor;
        }
        extras
    }

    /// Sends an update. `exact` loses nothing.
    fn update(
        &mut self,
        extras: &Extras,
        copies: &[Copy],
        rects: &[Rect],
        exact: bool,
    ) -> io::Result<()> {
        let pieces = |session: &Self, rects: &[Rect]| -> Vec<Rect> {
            rects.iter().flat_map(|rect| session.encoder.pieces(*rect)).collect()
        };
        let mut parts = pieces(self, rects);
        if extras.count + copies.len() + parts.len() > MOST_RECTS {
            let all = rects.iter().copied().reduce(around);
            parts = pieces(self, all.as_slice());
        }
        update_header(extras.count + copies.len() + parts.len(), &mut self.out);
        self.out.extend_from_slice(&extras.bytes);
        for copy in copies {
            copy_rect(copy.rect, copy.from_y, &mut self.out);
        }
        for part in parts {
            let lossy = self.encoder.encode(&self.seen, part, exact, &mut self.out);
            self.lossy.set(part, lossy);
            self.flush(WRITE_AT)?;
        }
        self.asked = None;
        if self.continuous.is_some() && self.known.fence {
            let flags = fence::REQUEST | fence::BLOCK_BEFORE;
            fence_message(flags, AFTER_UPDATE, &mut self.out);
            self.on_their_way += 1;
        }
        Ok(())
    }
}

fn update_header(rects: usize, out: &mut Vec<u8>) {
    out.extend([0, 0]);
    // At most MOST_RECTS.
    out.extend((rects as u16).to_be_bytes());
}

fn rect_of(area: Area) -> Rect {
    let [x, y, width, height] = [area.x, area.y, area.width, area.height].map(u32::from);
    Rect { x, y, width, height }
}

fn size_of_picture(picture: &Picture) -> (u32, u32) {
    (picture.width, picture.height)
}

/// The size that clients are told.
fn size_of(view: &View) -> (u32, u32) {
    match size_of_picture(&view.picture) {
        (0, _) | (_, 0) => NO_PICTURE,
        (width, height) => (width.min(LONGEST_SIDE), height.min(LONGEST_SIDE)),
    }
}

/// The picture's upper left part in this size, black where it has nothing.
fn fit(picture: &Picture, (width, height): (u32, u32)) -> Cow<'_, Picture> {
    if size_of_picture(picture) == (width, height) {
        return Cow::Borrowed(picture);
    }
    let mut fitted = Picture::black(width, height);
    let common = picture.width.min(width) as usize;
    if common > 0 {
        let from = picture.pixels.chunks_exact(picture.width as usize);
        let to = fitted.pixels.chunks_exact_mut(width as usize);
        to.zip(from).for_each(|(to, from)| to[..common].copy_from_slice(&from[..common]));
    }
    Cow::Owned(fitted)
}

/// Whether a guest's cursor can be shown at all.
fn is_sound(cursor: &&Cursor) -> bool {
    let sides = 1..=LARGEST_CURSOR;
    sides.contains(&cursor.width)
        && sides.contains(&cursor.height)
        && cursor.pixels.len() == (cursor.width * cursor.height) as usize
        && cursor.hot_x < cursor.width
        && cursor.hot_y < cursor.height
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_fitted() {
        let picture = Picture { width: 3, height: 2, pixels: vec![1, 2, 3, 4, 5, 6] };
        assert!(matches!(fit(&picture, (3, 2)), Cow::Borrowed(_)));
        assert_eq!(fit(&picture, (2, 3)).pixels, [1, 2, 4, 5, 0, 0]);
        assert_eq!(fit(&picture, (4, 1)).pixels, [1, 2, 3, 0]);
        assert_eq!(fit(&Picture::default(), (2, 2)).pixels, [0; 4]);
        assert_eq!(size_of(&View::default()), NO_PICTURE);
    }

    #[test]
    fn impossible_cursors_are_not_shown() {
        let good = Cursor { width: 2, height: 1, hot_x: 1, hot_y: 0, pixels: vec![0; 2] };
        assert!(is_sound(&&good));
        for bad in [
            Cursor { width: 0, ..good.clone() },
            Cursor { width: 1, ..good.clone() },
            Cursor { hot_y: 1, ..good.clone() },
            Cursor { width: u32::MAX, height: u32::MAX, ..good.clone() },
        ] {
            assert!(!is_sound(&&bad), "{bad:?}");
        }
    }
}
