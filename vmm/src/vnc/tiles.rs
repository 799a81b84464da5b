//! Which parts of a picture changed: a grid of tiles, and the comparison of two pictures.
//!
//! ```text
//!   dirty rectangles --mark--> pending tiles --compare with what the client has--> changed tiles --> rectangles
//! ```
//!
//! What a guest drew is not always a change: a page was written, a character was drawn again. The client's own picture
//! tells.

use lodge_devices::display::{Picture, Rect};

/// A tile's side, in pixels.
pub const TILE: u32 = 16;
/// Changed tiles this near to each other in a row are sent as one rectangle: its header costs more than they do.
const NEAR: u32 = 2;

/// Some of a picture's tiles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tiles {
    /// The picture's size.
    width: u32,
    height: u32,
    columns: u32,
    tiles: Vec<bool>,
}

impl Tiles {
    /// No tile of a picture of this size.
    pub fn none(width: u32, height: u32) -> Self {
        let (columns, rows) = (width.div_ceil(TILE), height.div_ceil(TILE));
        Self { width, height, columns, tiles: vec![false; columns as usize * rows as usize] }
    }

    /// Adds every tile that `rect` touches; what is outside of the picture is ignored.
    pub fn mark(&mut self, rect: Rect) {
        self.set(rect, true);
    }

    /// Adds or removes every tile that `rect` touches.
    pub fn set(&mut self, rect: Rect, to: bool) {
        let Some(rect) = clip(rect, self.width, self.height) else { return };
        let columns = rect.x / TILE..(rect.x + rect.width).div_ceil(TILE);
        for row in rect.y / TILE..(rect.y + rect.height).div_ceil(TILE) {
            let start = (row * self.columns) as usize;
            self.tiles[start + columns.start as usize..start + columns.end as usize].fill(to);
        }
    }

    /// Adds all of `other`, which is of the same size.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.tiles.iter_mut().zip(&other.tiles) {
            *mine |= theirs;
        }
    }

    /// Removes all of `other`, which is of the same size.
    pub fn remove(&mut self, other: &Self) {
        for (mine, theirs) in self.tiles.iter_mut().zip(&other.tiles) {
            *mine &= !theirs;
        }
    }

    /// Takes out those that `area` touches.
    pub fn take(&mut self, area: Rect) -> Self {
        let mut taken = Self::none(self.width, self.height);
        taken.mark(area);
        for (taken, mine) in taken.tiles.iter_mut().zip(&mut self.tiles) {
            *taken &= *mine;
            *mine &= !*taken;
        }
        taken
    }

    /// Whether there is any.
    pub fn any(&self) -> bool {
        self.tiles.contains(&true)
    }

    fn get(&self, column: u32, row: u32) -> bool {
        self.tiles[(row * self.columns + column) as usize]
    }

    fn rows(&self) -> u32 {
        self.height.div_ceil(TILE)
    }

    /// Runs of tiles in a row that are at most `gap` apart, from left to right: (first column, one after the last).
    fn runs(&self, row: u32, gap: u32) -> Vec<(u32, u32)> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for column in (0..self.columns).filter(|column| self.get(*column, row)) {
            match runs.last_mut() {
                Some((_, end)) if column - *end <= gap => *end = column + 1,
                _ => runs.push((column, column + 1)),
            }
        }
        runs
    }

    /// Few rectangles, without overlaps, that cover these tiles (and here and there one between two).
    pub fn rects(&self) -> Vec<Rect> {
        let mut rects: Vec<Rect> = Vec::new();
        // Where those that reach down to the row above begin.
        let mut open: Vec<usize> = Vec::new();
        for row in 0..self.rows() {
            let y = row * TILE;
            let height = TILE.min(self.height - y);
            let runs = self.runs(row, NEAR);
            let mut reached = Vec::with_capacity(runs.len());
            for (start, end) in runs {
                let x = start * TILE;
                let width = (end * TILE).min(self.width) - x;
                let above = open.iter().find(|&&i| rects[i].x == x && rects[i].width == width);
                match above {
                    Some(&i) => {
                        rects[i].height += height;
                        reached.push(i);
                    }
                    None => {
                        reached.push(rects.len());
                        rects.push(Rect { x, y, width, height });
                    }
                }
            }
            open = reached;
        }
        rects
    }

    /// Takes the first rectangles of about this many pixels out of it.
    pub fn take_some(&mut self, pixels: u32) -> Vec<Rect> {
        let mut rects = Vec::new();
        let mut left = pixels;
        for rect in self.rects() {
            // Whole rows of tiles, as many as fit, at least one.
            let rows = (left / (rect.width * TILE)).max(1);
            let height = rect.height.min(rows * TILE);
            rects.push(Rect { height, ..rect });
            left = left.saturating_sub(rect.width * height);
            if left == 0 {
                break;
            }
        }
        let mut taken = Self::none(self.width, self.height);
        rects.iter().for_each(|rect| taken.mark(*rect));
        self.remove(&taken);
        rects
    }
}

/// The part of `rect` that is in a picture of this size.
pub fn clip(rect: Rect, width: u32, height: u32) -> Option<Rect> {
    let right = rect.x.saturating_add(rect.width).min(width);
    let bottom = rect.y.saturating_add(rect.height).min(height);
    let clipped =
        Rect { width: right.checked_sub(rect.x)?, height: bottom.checked_sub(rect.y)?, ..rect };
    (clipped.width > 0 && clipped.height > 0).then_some(clipped)
}

/// The smallest rectangle around both.
pub fn around(a: Rect, b: Rect) -> Rect {
    let (x, y) = (a.x.min(b.x), a.y.min(b.y));
    let right = (a.x + a.width).max(b.x + b.width);
    let bottom = (a.y + a.height).max(b.y + b.height);
    Rect { x, y, width: right - x, height: bottom - y }
}

/// Brings `seen` up to date with `now`, a picture of the same size, where tiles are `pending` inside `area`. Gives
/// the tiles that differed; tiles that are wholly inside are no longer pending.
pub fn update(seen: &mut Picture, now: &Picture, pending: &mut Tiles, area: Rect) -> Tiles {
    let mut changed = Tiles::none(seen.width, seen.height);
    let Some(area) = clip(area, seen.width, seen.height) else { return changed };
    let stride = seen.width as usize;
    for row in area.y / TILE..(area.y + area.height).div_ceil(TILE) {
        for (start, end) in pending.runs(row, 0) {
            let left = (start * TILE).max(area.x);
            let right = (end * TILE).min(area.x + area.width);
            let top = (row * TILE).max(area.y);
            let bottom = ((row + 1) * TILE).min(area.y + area.height);
            if left >= right {
                continue;
            }
            for y in top..bottom {
                let at = y as usize * stride;
                let span = at + left as usize..at + right as usize;
                if seen.pixels[span.clone()] != now.pixels[span] {
                    copy_row(seen, now, y, left..right, &mut changed);
                }
            }
        }
        settle(pending, row, area);
    }
    changed
}

/// Copies the tiles' parts of one row of pixels that differ.
fn copy_row(
    seen: &mut Picture,
    now: &Picture,
    y: u32,
    columns: std::ops::Range<u32>,
    changed: &mut Tiles,
) {
    let at = y as usize * seen.width as usize;
    let first = (y / TILE * changed.columns) as usize;
    for column in columns.start / TILE..columns.end.div_ceil(TILE) {
        let left = (column * TILE).max(columns.start) as usize;
        let right = ((column + 1) * TILE).min(columns.end) as usize;
        let (old, new) = (at + left..at + right, at + left..at + right);
        if seen.pixels[old.clone()] != now.pixels[new.clone()] {
            seen.pixels[old].copy_from_slice(&now.pixels[new]);
            changed.tiles[first + column as usize] = true;
        }
    }
}

/// Tiles of this row that are wholly inside of `area` are no longer pending.
fn settle(pending: &mut Tiles, row: u32, area: Rect) {
    let bottom = ((row + 1) * TILE).min(pending.height);
    if row * TILE < area.y || bottom > area.y + area.height {
        return;
    }
    let end = match area.x + area.width {
        right if right == pending.width => pending.columns,
        right => right / TILE,
    };
    let start = area.x.div_ceil(TILE);
    if start < end {
        let first = (row * pending.columns) as usize;
        pending.tiles[first + start as usize..first + end as usize].fill(false);
    }
}

/// The smallest rectangle around all pixels that differ where tiles are `pending`.
pub fn difference(seen: &Picture, now: &Picture, pending: &Tiles) -> Option<Rect> {
    let stride = seen.width as usize;
    let mut found: Option<Rect> = None;
    for row in 0..pending.rows() {
        let runs = pending.runs(row, 0);
        let (Some(&(start, _)), Some(&(_, end))) = (runs.first(), runs.last()) else { continue };
        let (left, right) = (start * TILE, (end * TILE).min(seen.width));
        for y in row * TILE..((row + 1) * TILE).min(seen.height) {
            let at = y as usize * stride;
            let span = at + left as usize..at + right as usize;
            let (old, new) = (&seen.pixels[span.clone()], &now.pixels[span]);
            if old == new {
                continue;
            }
            let differ = |(a, b): (&u32, &u32)| a != b;
            let first = old.iter().zip(new).position(differ).unwrap_or(0) as u32;
            let last = old.iter().zip(new).rposition(differ).unwrap_or(0) as u32;
            let rect = Rect { x: left + first, y, width: last - first + 1, height: 1 };
            found = Some(found.map_or(rect, |found| around(found, rect)));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rect(x: u32, y: u32, width: u32, height: u32) -> Rect {
        Rect { x, y, width, height }
    }

    #[test]
    fn rectangles_cover_the_tiles() {
        let mut tiles = Tiles::none(100, 70);
        assert!(tiles.rects().is_empty() && !tiles.any());
        tiles.mark(rect(0, 0, 100, 70));
        assert_eq!(tiles.rects(), [rect(0, 0, 100, 70)]);
        assert_eq!(tiles.take(rect(0, 0, 64, 80)).rects(), [rect(0, 0, 64, 70)]);
        assert_eq!(tiles.take(rect(63, 0, 1, 1)), Tiles::none(100, 70));
        assert_eq!(tiles.rects(), [rect(64, 0, 36, 70)]);
        let mut tiles = Tiles::none(100, 70);
        tiles.mark(rect(15, 15, 2, 2));
        assert_eq!(tiles.rects(), [rect(0, 0, 32, 32)]);
        // At the edges, and outside.
        let mut tiles = Tiles::none(100, 70);
        tiles.mark(rect(99, 69, 1000, u32::MAX));
        tiles.mark(rect(100, 0, 5, 5));
        tiles.mark(rect(u32::MAX, 0, u32::MAX, 5));
        assert_eq!(tiles.rects(), [rect(96, 64, 4, 6)]);
        // Near tiles are one rectangle, far ones are two.
        let mut tiles = Tiles::none(100, 70);
        tiles.mark(rect(0, 0, 1, 1));
        tiles.mark(rect(48, 0, 1, 1));
        assert_eq!(tiles.rects(), [rect(0, 0, 64, 16)]);
        let mut tiles = Tiles::none(100, 70);
        tiles.mark(rect(0, 0, 1, 1));
        tiles.mark(rect(64, 0, 1, 20));
        assert_eq!(tiles.rects(), [rect(0, 0, 16, 16), rect(64, 0, 16, 32)]);
    }

    #[test]
    fn only_what_differs_is_taken() {
        let mut seen = Picture::black(100, 70);
        let mut now = seen.clone();
        now.pixels[3 * 100 + 40] = 1;
        now.pixels[69 * 100 + 99] = 2;
        let mut pending = Tiles::none(100, 70);
        pending.mark(rect(0, 0, 100, 70));
        assert_eq!(difference(&seen, &now, &pending), Some(rect(40, 3, 60, 67)));
        let changed = update(&mut seen, &now, &mut pending, rect(0, 0, 100, 70));
        assert_eq!(changed.rects(), [rect(32, 0, 16, 16), rect(96, 64, 4, 6)]);
        assert!(seen == now && !pending.any());
        assert_eq!(difference(&seen, &now, &pending), None);
    }

    #[test]
    fn tiles_partly_outside_of_the_area_stay_pending() {
        let mut seen = Picture::black(64, 64);
        let now = Picture { pixels: vec![1; 64 * 64], ..seen };
        let mut pending = Tiles::none(64, 64);
        pending.mark(rect(0, 0, 64, 64));
        let area = rect(8, 16, 40, 40);
        let changed = update(&mut seen, &now, &mut pending, area);
        assert_eq!(changed.rects(), [rect(0, 16, 48, 48)]);
        let inside = seen.pixels.iter().filter(|pixel| **pixel == 1).count();
        assert_eq!(inside, 40 * 40);
        // Whole tiles: columns 1 and 2, rows 1 and 2.
        assert_eq!(pending.tiles.iter().filter(|set| **set).count(), 16 - 4);
        update(&mut seen, &now, &mut pending, rect(0, 0, 64, 64));
        assert!(seen == now && !pending.any());
    }

    #[test]
    fn some_are_taken_until_none_is_left() {
        let mut tiles = Tiles::none(256, 256);
        tiles.mark(rect(0, 0, 256, 256));
        let mut total = 0;
        while tiles.any() {
            let rects = tiles.take_some(10_000);
            let pixels: u32 = rects.iter().map(|rect| rect.width * rect.height).sum();
            assert!(pixels > 0 && pixels <= 10_000);
            total += pixels;
        }
        assert_eq!(total, 256 * 256);
    }
}
