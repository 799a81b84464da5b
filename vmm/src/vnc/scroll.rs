//! Finds text that moved up or down, so that the client copies it instead of getting it again.
//!
//! ```text
//!   what the client has       what it shall have
//!     row 0  a                  row 0  b  --- is row 1 of the old: distance 1
//!     row 1  b                  row 1  c  --- is row 2 of the old: distance 1
//!     row 2  c                  row 2  d      new
//! ```
//!
//! Rows that are unlike all others in the old picture vote for a distance; what wins is checked pixel by pixel.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;

use lodge_devices::display::{Picture, Rect};

/// A smaller change is quicker sent than looked at.
const LEAST_ROWS: u32 = 48;
const LEAST_COLUMNS: u32 = 64;
/// A shorter copy is not worth its rectangle.
const LEAST_RUN: usize = 8;

/// `rect` shall show what the client has at `from_y` in the same columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copy {
    /// Where to.
    pub rect: Rect,
    /// The row where it begins now.
    pub from_y: u32,
}

/// Looks for a movement inside `area`, which holds all differences of the two pictures. Applies it to `seen` and gives
/// the copies in the order in which the client must do them.
pub fn find(seen: &mut Picture, now: &Picture, area: Rect) -> Vec<Copy> {
    if area.height < LEAST_ROWS || area.width < LEAST_COLUMNS {
        return Vec::new();
    }
    let (old, new) = (hashes(seen, area), hashes(now, area));
    let Some(distance) = vote(&old, &new) else { return Vec::new() };
    let same = |row: usize| {
        let from = row.checked_add_signed(distance).filter(|from| *from < old.len());
        from.is_some_and(|from| {
            old[from] == new[row] && row_of(seen, area, from) == row_of(now, area, row)
        })
    };
    let moved: Vec<bool> = (0..new.len()).map(same).collect();
    let mut runs = runs(&moved);
    runs.retain(|run| run.len() >= LEAST_RUN && run.clone().any(|row| old[row] != new[row]));
    let differing = old.iter().zip(&new).filter(|(old, new)| old != new).count();
    let covered: usize = runs.iter().map(ExactSizeIterator::len).sum();
    if covered * 4 < differing {
        return Vec::new();
    }
    // A copy must not overwrite what a later one reads.
    if distance < 0 {
        runs.reverse();
    }
    let copies: Vec<Copy> = runs.into_iter().map(|run| copy(area, run, distance)).collect();
    copies.iter().for_each(|copy| apply(seen, *copy));
    copies
}

/// The copy of rows `run` of `area`; the sum is a row of the area, because those rows were compared.
fn copy(area: Rect, run: Range<usize>, distance: isize) -> Copy {
    let from = run.start.saturating_add_signed(distance) as u32;
    let rect = Rect { y: area.y + run.start as u32, height: run.len() as u32, ..area };
    Copy { rect, from_y: area.y + from }
}

/// Does to a picture what the client does.
fn apply(picture: &mut Picture, copy: Copy) {
    let stride = picture.width as usize;
    let Copy { rect, from_y } = copy;
    let mut move_row = |i: u32| {
        let from = (from_y + i) as usize * stride + rect.x as usize;
        let to = (rect.y + i) as usize * stride + rect.x as usize;
        picture.pixels.copy_within(from..from + rect.width as usize, to);
    };
    if from_y > rect.y {
        (0..rect.height).for_each(&mut move_row);
    } else {
        (0..rect.height).rev().for_each(&mut move_row);
    }
}

fn row_of(picture: &Picture, area: Rect, row: usize) -> &[u32] {
    let at = (area.y as usize + row) * picture.width as usize + area.x as usize;
    &picture.pixels[at..at + area.width as usize]
}

/// A number for each row of `area`; equal rows have equal ones.
fn hashes(picture: &Picture, area: Rect) -> Vec<u64> {
    (0..area.height as usize).map(|row| hash(row_of(picture, area, row))).collect()
}

/// Four independent lanes, so that the CPU multiplies them side by side.
fn hash(row: &[u32]) -> u64 {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let (chunks, rest) = row.as_chunks::<8>();
    let mut lanes = [1_u64, 2, 3, 4];
    for chunk in chunks {
        for (lane, pair) in lanes.iter_mut().zip(chunk.as_chunks::<2>().0) {
            let both = u64::from(pair[0]) | u64::from(pair[1]) << 32;
            *lane = (*lane ^ both).wrapping_mul(FACTOR).rotate_left(29);
        }
    }
    for (i, pixel) in rest.iter().enumerate() {
        let lane = &mut lanes[i % 4];
        *lane = (*lane ^ u64::from(*pixel)).wrapping_mul(FACTOR).rotate_left(29);
    }
    lanes.into_iter().fold(0, |hash, lane| (hash ^ lane).wrapping_mul(FACTOR).rotate_left(31))
}

/// The distance that most rows have moved: row `i` of the new is row `i + distance` of the old. Only rows that are there
/// once in the old, and that differ, have a say.
fn vote(old: &[u64], new: &[u64]) -> Option<isize> {
    let mut places: HashMap<u64, Option<usize>> = HashMap::with_capacity(old.len());
    for (row, hash) in old.iter().enumerate() {
        match places.entry(*hash) {
            Entry::Occupied(mut twice) => _ = twice.insert(None),
            Entry::Vacant(once) => _ = once.insert(Some(row)),
        }
    }
    let mut votes: HashMap<isize, usize> = HashMap::new();
    for (row, hash) in new.iter().enumerate().filter(|(row, hash)| old[*row] != **hash) {
        if let Some(Some(from)) = places.get(hash) {
            *votes.entry(*from as isize - row as isize).or_default() += 1;
        }
    }
    // The nearest of the best, so that the result does not depend on the table's order.
    let best =
        votes.into_iter().max_by_key(|(distance, count)| (*count, -distance.abs(), *distance));
    best.filter(|(distance, count)| *distance != 0 && *count >= LEAST_RUN / 2)
        .map(|(distance, _)| distance)
}

/// Ranges of rows that are true.
fn runs(rows: &[bool]) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let mut start = 0;
    for part in rows.chunk_by(|a, b| a == b) {
        if part[0] {
            runs.push(start..start + part.len());
        }
        start += part.len();
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Rows of text: each has its own pixels, every fourth is empty.
    fn text(width: u32, rows: impl Iterator<Item = u32>) -> Picture {
        let row = |n: u32| {
            (0..width).map(move |x| if n.is_multiple_of(4) { 0 } else { n * 7919 % (x + 3) })
        };
        let pixels: Vec<u32> = rows.flat_map(row).collect();
        Picture { width, height: pixels.len() as u32 / width, pixels }
    }

    fn whole(picture: &Picture) -> Rect {
        picture.whole().unwrap()
    }

    #[test]
    fn a_scroll_is_a_copy() {
        for (from, to) in [(0, 16), (16, 0)] {
            let mut seen = text(100, from + 100..from + 300);
            let now = text(100, to + 100..to + 300);
            let area = whole(&now);
            let copies = find(&mut seen, &now, area);
            let (y, from_y) = if to > from { (0, 16) } else { (16, 0) };
            assert_eq!(copies, [Copy { rect: Rect { y, height: 184, ..area }, from_y }]);
            let rows = y as usize * 100..(y as usize + 184) * 100;
            assert!(seen.pixels[rows.clone()] == now.pixels[rows]);
        }
    }

    #[test]
    fn what_stands_still_between_stays() {
        // A line in the middle that does not move.
        let mut seen = text(100, 100..300);
        let mut now = text(100, 110..310);
        let line = 80 * 100..90 * 100;
        seen.pixels[line.clone()].fill(0xabcdef);
        now.pixels[line].fill(0xabcdef);
        let area = whole(&now);
        let copies = find(&mut seen, &now, area);
        assert_eq!(copies.len(), 2, "{copies:?}");
        assert!(copies.iter().all(|copy| copy.from_y == copy.rect.y + 10));
    }

    #[test]
    fn what_is_all_new_is_no_copy() {
        let mut seen = text(100, 100..300);
        let before = seen.clone();
        let now = text(100, 1000..1200);
        let area = whole(&now);
        assert_eq!(find(&mut seen, &now, area), []);
        assert!(seen == before);
        assert_eq!(find(&mut seen, &before, area), []);
    }

    proptest! {
        /// Whatever is found, doing it leads to the picture that it claims.
        #[test]
        fn copies_are_right(
            old in proptest::collection::vec(0_u32..12, 60..120),
            new in proptest::collection::vec(0_u32..12, 120),
            shift in 0_usize..40,
            patch in 0_usize..60,
        ) {
            let height = old.len();
            let mut rows: Vec<u32> = (0..height).map(|i| old[(i + shift) % height] + (i as u32 % 5) * 100).collect();
            rows[patch] = new[patch];
            let base: Vec<u32> = (0..height).map(|i| old[i] + ((i + height - shift % height) as u32 % 5) * 100).collect();
            let mut seen = text(80, base.into_iter());
            let before = seen.clone();
            let now = text(80, rows.into_iter());
            let area = whole(&now);
            let copies = find(&mut seen, &now, area);
            let mut client = before;
            for copy in copies {
                apply(&mut client, copy);
                for row in copy.rect.y..copy.rect.y + copy.rect.height {
                    let row = row as usize;
                    prop_assert!(row_of(&client, area, row) == row_of(&now, area, row));
                }
            }
            prop_assert!(client == seen);
        }
    }
}
