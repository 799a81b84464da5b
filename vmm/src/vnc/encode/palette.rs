//! The colours of a piece, as long as they are few.

/// Slots of the hash table: four for each colour, so that chains stay short.
const SLOTS: usize = 1024;
/// A slot without a colour.
const FREE: u16 = u16::MAX;
/// The most colours that a palette can have.
pub const MOST: usize = 256;

/// Up to [`MOST`] colours with their numbers.
pub struct Palette {
    slots: [(u32, u16); SLOTS],
    colours: Vec<u32>,
}

impl Default for Palette {
    fn default() -> Self {
        Self { slots: [(0, FREE); SLOTS], colours: Vec::with_capacity(MOST) }
    }
}

impl Palette {
    /// Forgets its colours.
    pub fn clear(&mut self) {
        self.slots.fill((0, FREE));
        self.colours.clear();
    }

    /// Its colours, by their numbers.
    pub fn colours(&self) -> &[u32] {
        &self.colours
    }

    /// Takes the colours of `values`. False as soon as they are more than `most` (at most [`MOST`]).
    pub fn fill(&mut self, values: &[u32], most: usize) -> bool {
        self.clear();
        let mut last = None;
        for &value in values {
            if last != Some(value) {
                last = Some(value);
                if !self.insert(value, most) {
                    return false;
                }
            }
        }
        true
    }

    /// Takes one colour. False if it is one more than `most`.
    pub fn insert(&mut self, value: u32, most: usize) -> bool {
        let slot = self.slot(value);
        if self.slots[slot].1 != FREE {
            return true;
        }
        if self.colours.len() >= most.min(MOST) {
            return false;
        }
        self.slots[slot] = (value, self.colours.len() as u16);
        self.colours.push(value);
        true
    }

    /// The number of a colour that it has.
    pub fn index(&self, value: u32) -> u8 {
        self.slots[self.slot(value)].1 as u8
    }

    /// Where a colour is, or would be. There is always a free slot.
    fn slot(&self, value: u32) -> usize {
        // Fibonacci hashing: the upper bits depend on all of them.
        let mut slot = (value.wrapping_mul(0x9e37_79b1) >> 22) as usize;
        while self.slots[slot].1 != FREE && self.slots[slot].0 != value {
            slot = (slot + 1) % SLOTS;
        }
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_have_numbers() {
        let mut palette = Palette::default();
        assert!(palette.fill(&[7, 7, 9, 7, u32::MAX, 0], 4));
        assert_eq!(palette.colours(), [7, 9, u32::MAX, 0]);
        assert_eq!([7, 9, u32::MAX, 0].map(|value| palette.index(value)), [0, 1, 2, 3]);
        assert!(!palette.fill(&[1, 2, 3, 4, 5], 4));
        let all: Vec<u32> = (0..256).map(|i| i * 0x0100_0000 / 3).collect();
        assert!(palette.fill(&all, 1000));
        assert!(all.iter().enumerate().all(|(i, value)| palette.index(*value) as usize == i));
        assert!(!palette.insert(0x1234_5678, 1000));
    }
}
