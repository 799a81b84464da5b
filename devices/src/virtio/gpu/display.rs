//! The device's state, what requests do to it, and how it becomes a picture.
//!
//! ```text
//!   SET_SCANOUT --> a part of a resource is the screen     FLUSH --> rows of it that changed
//!                                                                         |
//!   viewer --refresh--> Picture  <---- pixels of the resource ------------+
//! ```

use std::sync::Arc;

use super::protocol::{Area, Code, DISPLAY_INFO, EDID_ANSWER, HEADER, Message, SCANOUTS, request};
use super::resource::{Backing, MOST_ENTRIES, Resource, Resources};
use super::saved::{GpuCursor, GpuScanout, GpuState, Pixels};
use crate::display::edid::edid;
use crate::display::paint::Painter;
use crate::display::{Cursor, MOST_PIXELS, MOST_SIDE, Picture, Update};

/// Columns and rows of a pointer at most.
const MOST_CURSOR: u32 = 256;
/// Columns and rows of the screen at least.
const LEAST_SIDE: u32 = 64;
/// Columns of a row that were flushed: from, and up to before. Nothing if empty.
type Span = (u32, u32);

/// What requests change and the display reads.
#[derive(Default)]
pub struct Display {
    preferred: (u32, u32),
    /// The driver has yet to acknowledge a change of `preferred`.
    event: bool,
    resources: Resources,
    scanout: Option<GpuScanout>,
    /// What was flushed of each row of the scanout.
    flushed: Vec<Span>,
    /// Nothing that was drawn before is of use.
    all: bool,
    cursor: Option<Arc<Cursor>>,
    cursor_changed: bool,
    position: (u32, u32),
    /// Bytes copied since somebody last asked.
    moved: u64,
}

impl Display {
    /// A display that nothing is shown on, of a viewer who would like this size.
    pub fn new(preferred: (u32, u32)) -> Self {
        Self { preferred, all: true, cursor_changed: true, ..Self::default() }
    }

    /// As after power-on; the viewer's wish stays.
    pub fn reset(&mut self) {
        *self = Self::new(self.preferred);
    }

    /// The viewer would like this size; says whether it is another one.
    pub fn prefer(&mut self, width: u32, height: u32) -> bool {
        let width = width.clamp(LEAST_SIDE, MOST_SIDE);
        let wish = (width, height.clamp(LEAST_SIDE, MOST_SIDE.min(MOST_PIXELS / width)));
        let changed = self.preferred != wish;
        self.preferred = wish;
        self.event |= changed;
        changed
    }

    /// Whether the driver has yet to hear of another size.
    pub fn event(&self) -> bool {
        self.event
    }

    /// The driver has heard.
    pub fn acknowledge(&mut self) {
        self.event = false;
    }

    /// Whether the driver shows something.
    pub fn active(&self) -> bool {
        self.scanout.is_some()
    }

    /// Where the driver put its pointer.
    pub fn position(&self) -> (u32, u32) {
        self.position
    }

    /// How many bytes were copied since the last call.
    pub fn take_moved(&mut self) -> u64 {
        std::mem::take(&mut self.moved)
    }

    /// Does what a request asks for and answers; returns how many bytes were written.
    pub fn execute(&mut self, message: &Message<'_>, with_edid: bool) -> u32 {
        let done = match message.kind() {
            request::GET_DISPLAY_INFO => {
                return message.answer(Code::DisplayInfo, &self.information()[HEADER..]);
            }
            request::GET_EDID if with_edid => match message.words(HEADER as u64) {
                Ok([0]) => return message.answer(Code::Edid, &self.edid()[HEADER..]),
                Ok(_) => Err(Code::InvalidScanout),
                Err(code) => Err(code),
            },
            request::RESOURCE_CREATE_2D => self.create(message),
            request::RESOURCE_UNREF => self.unref(message),
            request::SET_SCANOUT => self.set_scanout(message),
            request::RESOURCE_FLUSH => self.flush(message),
            request::TRANSFER_TO_HOST_2D => self.transfer(message),
            request::RESOURCE_ATTACH_BACKING => self.attach(message),
            request::RESOURCE_DETACH_BACKING => {
                message.words(HEADER as u64).and_then(|[id]| self.resources.detach(id))
            }
            request::UPDATE_CURSOR => self.update_cursor(message),
            request::MOVE_CURSOR => self.move_cursor(message).map(|_| ()),
            _ => Err(Code::Unspecified),
        };
        message.answer(done.err().unwrap_or(Code::Ok), &[])
    }

    /// The answer to GET_DISPLAY_INFO: the first scanout is there, others are not.
    fn information(&self) -> [u8; DISPLAY_INFO] {
        const { assert!(SCANOUTS > 0) };
        let mut bytes = [0; DISPLAY_INFO];
        let words = [0, 0, self.preferred.0, self.preferred.1, 1];
        for (place, word) in bytes[HEADER..].chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The answer to GET_EDID: its size, and the block.
    fn edid(&self) -> [u8; EDID_ANSWER] {
        let mut bytes = [0; EDID_ANSWER];
        let block = edid(self.preferred.0, self.preferred.1);
        bytes[HEADER..HEADER + 4].copy_from_slice(&(block.len() as u32).to_le_bytes());
        bytes[HEADER + 8..HEADER + 8 + block.len()].copy_from_slice(&block);
        bytes
    }

    fn create(&mut self, message: &Message<'_>) -> Result<(), Code> {
        let [id, format, width, height] = message.words(HEADER as u64)?;
        self.resources.create(id, format, width, height)
    }

    fn unref(&mut self, message: &Message<'_>) -> Result<(), Code> {
        let [id] = message.words(HEADER as u64)?;
        self.resources.remove(id)?;
        if self.scanout.is_some_and(|scanout| scanout.resource == id) {
            self.show(None);
        }
        Ok(())
    }

    fn set_scanout(&mut self, message: &Message<'_>) -> Result<(), Code> {
        let Area { x, y, width, height } = message.area()?;
        let [scanout, id] = message.words(HEADER as u64 + 16)?;
        if scanout != 0 {
            return Err(Code::InvalidScanout);
        }
        if id == 0 {
            self.show(None);
            return Ok(());
        }
        let resource = self.resources.get(id)?;
        let scanout = GpuScanout { resource: id, x, y, width, height };
        if !is_showable(&scanout, resource) {
            return Err(Code::InvalidParameter);
        }
        self.show(Some(scanout));
        Ok(())
    }

    /// Another thing is on the screen.
    fn show(&mut self, scanout: Option<GpuScanout>) {
        self.scanout = scanout;
        self.flushed = vec![(0, 0); scanout.map_or(0, |scanout| scanout.height as usize)];
        self.all = true;
    }

    fn flush(&mut self, message: &Message<'_>) -> Result<(), Code> {
        let area = message.area()?;
        let [id] = message.words(HEADER as u64 + 16)?;
        let resource = self.resources.get(id)?;
        if !area.fits(resource.width, resource.height) {
            return Err(Code::InvalidParameter);
        }
        if let Some(scanout) = self.scanout.filter(|scanout| scanout.resource == id) {
            let part = |at: u32, len: u32, from: u32, most: u32| {
                (at.saturating_sub(from).min(most), (at + len).saturating_sub(from).min(most))
            };
            let (left, right) = part(area.x, area.width, scanout.x, scanout.width);
            let (top, bottom) = part(area.y, area.height, scanout.y, scanout.height);
            if left < right {
                for span in &mut self.flushed[top as usize..bottom as usize] {
                    *span = match *span {
                        (from, to) if from < to => (from.min(left), to.max(right)),
                        _ => (left, right),
                    };
                }
            }
        }
        Ok(())
    }

    fn transfer(&mut self, message: &Message<'_>) -> Result<(), Code> {
        let area = message.area()?;
        let [low, high, id] = message.words(HEADER as u64 + 16)?;
        let offset = u64::from(high) << 32 | u64::from(low);
        self.resources.get_mut(id)?.transfer(message.memory, area, offset)?;
        // It fitted into the resource, whose size is limited.
        self.moved += 4 * u64::from(area.width) * u64::from(area.height);
        Ok(())
    }

    fn attach(&mut self, message: &Message<'_>) -> Result<(), Code> {
        let [id, count] = message.words(HEADER as u64)?;
        self.resources.get(id)?;
        if count > MOST_ENTRIES {
            return Err(Code::InvalidParameter);
        }
        let mut entries = vec![0; count as usize * 16];
        if message.chain.read(message.memory, HEADER as u64 + 8, &mut entries) < entries.len() {
            return Err(Code::InvalidParameter);
        }
        let entries = entries.chunks_exact(16).map(|entry| {
            let word =
                |i: usize| u32::from_le_bytes([entry[i], entry[i + 1], entry[i + 2], entry[i + 3]]);
            (u64::from(word(4)) << 32 | u64::from(word(0)), word(8))
        });
        let backing = Backing::new(message.memory, entries)?;
        self.resources.attach(id, backing)
    }

    /// The part that both requests for the pointer have.
    fn move_cursor(&mut self, message: &Message<'_>) -> Result<[u32; 3], Code> {
        let [scanout, x, y, _] = message.words(HEADER as u64)?;
        if scanout != 0 {
            return Err(Code::InvalidScanout);
        }
        let shape = message.words(HEADER as u64 + 16)?;
        self.position = (x, y);
        Ok(shape)
    }

    fn update_cursor(&mut self, message: &Message<'_>) -> Result<(), Code> {
        let [id, hot_x, hot_y] = self.move_cursor(message)?;
        let cursor = match id {
            0 => None,
            id => {
                let resource = self.resources.get(id)?;
                if resource.width > MOST_CURSOR || resource.height > MOST_CURSOR {
                    return Err(Code::InvalidParameter);
                }
                Some(Arc::new(pointer(resource, hot_x, hot_y)))
            }
        };
        self.cursor_changed |= self.cursor != cursor;
        self.cursor = cursor;
        Ok(())
    }

    /// Draws the screen.
    pub fn refresh(&mut self, picture: &mut Picture) -> Update {
        let (width, height) = match self.scanout {
            Some(scanout) => (scanout.width, scanout.height),
            None if picture.width > 0 => (picture.width, picture.height),
            None => self.preferred,
        };
        let mut painter = Painter::new(picture, width, height);
        let all = std::mem::take(&mut self.all) || painter.fresh();
        if let Some(scanout) = self.scanout
            && let Ok(resource) = self.resources.get(scanout.resource)
        {
            let mut pixels = Vec::with_capacity(width as usize);
            for (y, span) in (0..).zip(&mut self.flushed) {
                let (from, to) = if all { (0, width) } else { *span };
                *span = (0, 0);
                if from < to {
                    pixels.clear();
                    let row = resource.row(scanout.x + from, scanout.y + y, to - from);
                    pixels.extend(row.map(|pixel| pixel & 0xff_ffff));
                    painter.row(from, y, &pixels);
                }
            }
        } else if all {
            painter.clear();
        }
        let mut update = painter.finish();
        if std::mem::take(&mut self.cursor_changed) {
            update.cursor = Some(self.cursor.clone());
        }
        update
    }

    /// The next refresh draws everything.
    pub fn redraw(&mut self) {
        self.all = true;
        self.cursor_changed = true;
    }

    /// What is saved.
    pub fn save(&self) -> GpuState {
        GpuState {
            preferred: self.preferred,
            event: self.event,
            resources: self.resources.save(),
            scanout: self.scanout,
            cursor: self.cursor.as_ref().map(|cursor| GpuCursor {
                width: cursor.width,
                height: cursor.height,
                hot: (cursor.hot_x, cursor.hot_y),
                pixels: Pixels(cursor.pixels.iter().flat_map(|p| p.to_le_bytes()).collect()),
            }),
            position: self.position,
        }
    }

    /// Takes back what was saved.
    ///
    /// # Errors
    /// It cannot have been saved by a device like this.
    pub fn restore(saved: &GpuState) -> Result<Self, Code> {
        let mut display = Self::new((0, 0));
        display.prefer(saved.preferred.0, saved.preferred.1);
        display.event = saved.event;
        display.position = saved.position;
        display.resources = Resources::restore(&saved.resources)?;
        if let Some(scanout) = saved.scanout {
            if !is_showable(&scanout, display.resources.get(scanout.resource)?) {
                return Err(Code::InvalidParameter);
            }
            display.show(Some(scanout));
        }
        display.cursor = saved.cursor.as_ref().map(restore_cursor).transpose()?.map(Arc::new);
        Ok(display)
    }
}

/// Whether a picture of the scanout can be made.
fn is_showable(scanout: &GpuScanout, resource: &Resource) -> bool {
    let GpuScanout { x, y, width, height, .. } = *scanout;
    Area { x, y, width, height }.fits(resource.width, resource.height)
        && width <= MOST_SIDE
        && height <= MOST_SIDE
        && u64::from(width) * u64::from(height) <= MOST_PIXELS.into()
}

/// The pointer that a resource shows. Drivers multiply colours with alpha beforehand (as DRM does); here they are not.
fn pointer(resource: &Resource, hot_x: u32, hot_y: u32) -> Cursor {
    let (width, height) = (resource.width, resource.height);
    let mut pixels: Vec<u32> = (0..height).flat_map(|y| resource.row(0, y, width)).collect();
    let multiplied = |pixel: &u32| {
        let [alpha, r, g, b] = pixel.to_be_bytes();
        r <= alpha && g <= alpha && b <= alpha
    };
    // A component above its alpha cannot be a product: then none is.
    if pixels.iter().all(multiplied) {
        for pixel in &mut pixels {
            let [alpha, r, g, b] = pixel.to_be_bytes();
            let divide = |c: u8| {
                u16::from(c).saturating_mul(255).checked_div(alpha.into()).unwrap_or(0) as u8
            };
            *pixel = u32::from_be_bytes([alpha, divide(r), divide(g), divide(b)]);
        }
    }
    Cursor { width, height, hot_x: hot_x.min(width - 1), hot_y: hot_y.min(height - 1), pixels }
}

fn restore_cursor(saved: &GpuCursor) -> Result<Cursor, Code> {
    let GpuCursor { width, height, hot: (hot_x, hot_y), ref pixels } = *saved;
    let sides = 1..=MOST_CURSOR;
    if !sides.contains(&width) || !sides.contains(&height) {
        return Err(Code::InvalidParameter);
    }
    let words = pixels.0.chunks_exact(4);
    let mut pixels: Vec<u32> =
        words.map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect();
    // Nothing was saved of a pointer that cannot be seen.
    pixels.resize(width as usize * height as usize, 0);
    Ok(Cursor { width, height, hot_x: hot_x.min(width - 1), hot_y: hot_y.min(height - 1), pixels })
}
