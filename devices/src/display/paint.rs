//! Drawing into a [`Picture`]: rows and rectangles go in, and out comes what really changed.
//!
//! ```text
//!   drawn rows  . . x x x . .      bands: rectangles of all columns that changed in neighbouring rows,
//!               . . . x x . .      one above the other, so that none overlaps another
//!               . . . . . . .
//!               x x . . . . .
//! ```

use super::{Picture, Rect, Update};

/// Pixels by which two bands may be larger together than apart and still become one.
const SLACK: u64 = 2048;

/// Draws one refresh of a picture.
pub(crate) struct Painter<'a> {
    picture: &'a mut Picture,
    resized: bool,
    dirty: Vec<Rect>,
}

impl<'a> Painter<'a> {
    /// Begins with a picture of this size: if it has another one, it becomes black and all of it is to be drawn.
    pub fn new(picture: &'a mut Picture, width: u32, height: u32) -> Self {
        let size = (picture.width, picture.height);
        let resized = size != (width, height) || picture.pixels.len() != area(width, height);
        if resized {
            *picture = Picture::black(width, height);
        }
        Self { picture, resized, dirty: Vec::new() }
    }

    /// Whether nothing of what was drawn before is left.
    pub fn fresh(&self) -> bool {
        self.resized
    }

    /// Row `y`, from column `x` on, for drawing without comparing; tell what was drawn by [`Painter::mark`].
    /// Empty outside of the picture.
    pub fn line(&mut self, x: u32, y: u32) -> &mut [u32] {
        let width = self.picture.width as usize;
        let start = y as usize * width;
        let row = self.picture.pixels.get_mut(start..start + width).unwrap_or_default();
        row.get_mut(x as usize..).unwrap_or_default()
    }

    /// These pixels are in row `y` from column `x` on; what does not fit is dropped. Rows must come in order.
    pub fn row(&mut self, x: u32, y: u32, pixels: &[u32]) {
        let line = self.line(x, y);
        let count = line.len().min(pixels.len());
        let (line, pixels) = (&mut line[..count], &pixels[..count]);
        if line == pixels {
            return;
        }
        let differs = |i: &usize| line[*i] != pixels[*i];
        let first = (0..count).find(differs).unwrap_or(0);
        let last = (0..count).rev().find(differs).unwrap_or(count - 1);
        line[first..=last].copy_from_slice(&pixels[first..=last]);
        self.mark(Rect { x: x + first as u32, y, width: (last - first) as u32 + 1, height: 1 });
    }

    /// This rectangle was drawn. It lies inside, and its rows below those of the one before, or in the same ones.
    pub fn mark(&mut self, rect: Rect) {
        if self.resized {
            return;
        }
        if let Some(band) = self.dirty.last_mut() {
            let both = union(*band, rect);
            let apart = band.size() + rect.size();
            // Bands that share a row become one in any case: they must not overlap.
            if rect.y < band.y + band.height || both.size() <= apart + apart / 3 + SLACK {
                *band = both;
                return;
            }
        }
        self.dirty.push(rect);
    }

    /// Everything is black.
    pub fn clear(&mut self) {
        let black = vec![0; self.picture.width as usize];
        for y in 0..self.picture.height {
            self.row(0, y, &black);
        }
    }

    /// The end: what changed.
    pub fn finish(self) -> Update {
        let dirty = match self.resized {
            true => self.picture.whole().into_iter().collect(),
            false => self.dirty,
        };
        Update { resized: self.resized, dirty, cursor: None }
    }
}

fn area(width: u32, height: u32) -> usize {
    width as usize * height as usize
}

impl Rect {
    /// Pixels.
    fn size(&self) -> u64 {
        u64::from(self.width) * u64::from(self.height)
    }
}

/// The smallest rectangle with both in it.
pub(crate) fn union(a: Rect, b: Rect) -> Rect {
    let (x, y) = (a.x.min(b.x), a.y.min(b.y));
    let right = (a.x + a.width).max(b.x + b.width);
    let bottom = (a.y + a.height).max(b.y + b.height);
    Rect { x, y, width: right - x, height: bottom - y }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rect(x: u32, y: u32, width: u32, height: u32) -> Rect {
        Rect { x, y, width, height }
    }

    #[test]
    fn only_what_differs_is_dirty() {
        let mut picture = Picture::default();
        let mut painter = Painter::new(&mut picture, 1000, 600);
        assert!(painter.fresh());
        painter.row(0, 0, &[1; 1000]);
        let update = painter.finish();
        assert_eq!((update.resized, update.dirty), (true, vec![rect(0, 0, 1000, 600)]));
        let mut painter = Painter::new(&mut picture, 1000, 600);
        painter.row(0, 0, &[1; 1000]);
        painter.row(10, 1, &[0, 5, 0, 5, 0]);
        painter.row(10, 2, &[5, 0, 0, 0, 5]);
        painter.row(0, 500, &[7; 2000]);
        painter.row(0, 600, &[7]);
        painter.row(1000, 5, &[7]);
        let update = painter.finish();
        assert_eq!(update.dirty, [rect(10, 1, 5, 2), rect(0, 500, 1000, 1)]);
        assert_eq!(picture.pixels[1010..1016], [0, 5, 0, 5, 0, 0]);
    }

    #[test]
    fn bands_do_not_overlap() {
        let mut picture = Picture::black(4000, 4000);
        let mut painter = Painter::new(&mut picture, 4000, 4000);
        for y in 0..4000u32 {
            if y % 7 < 3 {
                painter.row((y * 37) % 3900, y, &[y + 1; 50]);
            }
        }
        let update = painter.finish();
        for pair in update.dirty.windows(2) {
            assert!(pair[0].y + pair[0].height <= pair[1].y);
        }
        for (y, row) in picture.pixels.chunks(4000).enumerate() {
            let covered = |x: usize| {
                update.dirty.iter().any(|r| {
                    let (x, y) = (x as u32, y as u32);
                    (r.x..r.x + r.width).contains(&x) && (r.y..r.y + r.height).contains(&y)
                })
            };
            assert!(row.iter().enumerate().all(|(x, pixel)| *pixel == 0 || covered(x)));
        }
    }

    #[test]
    fn a_cleared_picture_is_black() {
        let mut picture = Picture::black(10, 10);
        picture.pixels[55] = 1;
        let mut painter = Painter::new(&mut picture, 10, 10);
        painter.clear();
        assert_eq!(painter.finish().dirty, [rect(5, 5, 1, 1)]);
        assert_eq!(picture, Picture::black(10, 10));
    }
}
