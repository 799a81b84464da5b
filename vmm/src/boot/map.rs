//! The memory map that a guest is given (E820; ACPI 6.5, 15), computed once from where RAM is and what
//! is reserved.

use std::ops::Range;

use lodge_memory::RamLayout;

/// What a range of guest-physical addresses is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapKind {
    /// Free to use.
    Ram,
    /// Not to be touched.
    Reserved,
}

impl MapKind {
    /// The number in E820's and PVH's maps (ACPI 6.5, table 15.3).
    pub fn number(self) -> u32 {
        match self {
            Self::Ram => 1,
            Self::Reserved => 2,
        }
    }
}

/// A range of guest-physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    /// First address.
    pub start: u64,
    /// Bytes, more than 0.
    pub bytes: u64,
    /// What it is.
    pub kind: MapKind,
}

/// The extended BIOS data area, empty, where a PC has it.
const EBDA: Range<u64> = 0x9_fc00..0xa_0000;
/// Display memory and option ROMs: nothing is said of them, PCI has a window there.
const DISPLAY: Range<u64> = 0xa_0000..0xe_0000;
/// Firmware's place below 1 MiB: ACPI and SMBIOS tables.
const FIRMWARE: Range<u64> = 0xe_0000..0x10_0000;

/// The map, ascending, without overlaps: RAM without what a PC has below 1 MiB and without
/// `reserved`, which may lie anywhere and overlap.
pub fn memory_map(ram: &RamLayout, reserved: &[Range<u64>]) -> Vec<MapEntry> {
    let ram = ram.regions.iter().map(|(start, bytes)| *start..start.saturating_add(*bytes));
    let listed: Vec<_> = reserved.iter().cloned().chain([EBDA, FIRMWARE]).collect();
    let taken: Vec<_> = listed.iter().cloned().chain([DISPLAY]).collect();
    let free = subtract(ram.collect(), &taken).into_iter().map(|range| (range, MapKind::Ram));
    let listed = union(listed).into_iter().map(|range| (range, MapKind::Reserved));
    let mut map: Vec<_> = free
        .chain(listed)
        .map(|(range, kind)| MapEntry { start: range.start, bytes: range.end - range.start, kind })
        .collect();
    map.sort_by_key(|entry| entry.start);
    map
}

/// `ranges` without `taken`.
fn subtract(ranges: Vec<Range<u64>>, taken: &[Range<u64>]) -> Vec<Range<u64>> {
    taken.iter().fold(ranges, |ranges, hole| {
        let cut = |range: Range<u64>| {
            let below = range.start..range.end.min(hole.start);
            let above = range.start.max(hole.end)..range.end;
            // An empty hole would split a range in two.
            if hole.is_empty() { [range, 0..0] } else { [below, above] }
        };
        ranges.into_iter().flat_map(cut).filter(|range| !range.is_empty()).collect()
    })
}

/// The same addresses in ascending ranges that neither overlap nor touch.
fn union(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(bytes: u64, reserved: &[Range<u64>]) -> Vec<(u64, u64, u32)> {
        let map = memory_map(&RamLayout::new(bytes).unwrap(), reserved);
        map.iter().map(|e| (e.start, e.start + e.bytes, e.kind.number())).collect()
    }

    #[test]
    fn a_pc_of_3_gib() {
        let expected = [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0xa_0000, 2),
            (0xe_0000, 0x10_0000, 2),
            (0x10_0000, 0x8000_0000, 1),
            (0xb000_0000, 0xc000_0000, 2),
            (0x1_0000_0000, 0x1_4000_0000, 1),
        ];
        let ecam = 0xb000_0000..0xc000_0000;
        assert_eq!(map(3 << 30, &[ecam]), expected);
    }

    #[test]
    fn whatever_is_reserved_is_never_free() {
        let everything = 0..u64::MAX;
        let lists: [&[Range<u64>]; 5] = [
            &[],
            &[0x20_0000..0x20_0000, 0x7ff_f000..0x800_0000],
            &[0x20_0000..0x30_0000, 0x28_0000..0x40_0000, 0x40_0000..0x50_0000],
            &[everything],
            &[0x1000..0x2000, 0..0x9_0000, 0xf_0000..0x20_0000],
        ];
        for reserved in lists {
            for bytes in [4096, 1 << 20, 128 << 20, 5 << 30] {
                let map = map(bytes, reserved);
                assert!(map.windows(2).all(|w| w[0].1 <= w[1].0), "{map:x?}");
                assert!(map.iter().all(|(start, end, _)| start < end));
                let overlaps = |r: &Range<u64>, start, end| r.start.max(start) < r.end.min(end);
                for &(start, end, kind) in &map {
                    assert!(kind == 2 || !reserved.iter().any(|r| overlaps(r, start, end)));
                    assert!(kind == 2 || !overlaps(&DISPLAY, start, end));
                }
            }
        }
    }
}
