//! Resources: pictures that the driver fills from its memory and puts on the screen.
//!
//! ```text
//!   guest RAM   [page][page]..[page]    backing: pieces in the driver's order, attached and detached
//!                      |  transfer (a rectangle, from an offset)
//!                      v
//!   host        width * height * 4 bytes     counted against a limit: the guest chooses how many there are
//! ```

use std::collections::BTreeMap;

use lodge_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::protocol::{Area, Code, Format};
use super::saved::{GpuResource, Pixels};

/// Host memory that all resources of a device may have.
const MOST_BYTES: u64 = 256 << 20;
/// What a resource counts at least, so that there are not too many small ones.
const LEAST_BYTES: u64 = 4096;
/// What a piece of a backing counts.
const ENTRY_BYTES: u64 = 32;
/// The most pieces of a backing.
pub const MOST_ENTRIES: u32 = 16384;
/// The most columns or rows.
const MOST_SIDE: u32 = 16384;
/// Bytes of a pixel, in all formats.
const PIXEL: u64 = 4;

/// A piece of guest RAM, and where it begins in the backing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    start: u64,
    gpa: u64,
    len: u32,
}

/// What a resource gets its pixels from.
#[derive(Debug, Clone, Default)]
pub struct Backing {
    pieces: Vec<Piece>,
    bytes: u64,
}

impl Backing {
    /// Pieces of guest RAM: address and bytes of each.
    ///
    /// # Errors
    /// One is not in RAM.
    pub fn new(
        memory: &GuestMemory,
        entries: impl Iterator<Item = (u64, u32)>,
    ) -> Result<Self, Code> {
        let mut backing = Self::default();
        for (gpa, len) in entries {
            if len == 0 {
                continue;
            }
            if !memory.check_range(GuestAddress(gpa), len as usize) {
                return Err(Code::InvalidParameter);
            }
            backing.pieces.push(Piece { start: backing.bytes, gpa, len });
            backing.bytes += u64::from(len);
        }
        Ok(backing)
    }

    /// Reads from `offset` on; the caller has checked that there is as much.
    fn read(&self, memory: &GuestMemory, offset: u64, mut data: &mut [u8]) -> Result<(), Code> {
        let first = self.pieces.partition_point(|piece| piece.start <= offset).saturating_sub(1);
        let mut skip = offset;
        for piece in self.pieces.get(first..).unwrap_or_default() {
            let into = skip.saturating_sub(piece.start);
            let count = (u64::from(piece.len) - into).min(data.len() as u64) as usize;
            let (part, rest) = data.split_at_mut(count);
            let from = GuestAddress(piece.gpa + into);
            memory.read_slice(part, from).map_err(|_| Code::InvalidParameter)?;
            if rest.is_empty() {
                return Ok(());
            }
            (data, skip) = (rest, 0);
        }
        Err(Code::InvalidParameter)
    }
}

/// A resource.
pub struct Resource {
    /// The format's number.
    pub number: u32,
    pub format: Format,
    pub width: u32,
    pub height: u32,
    data: Vec<u8>,
    backing: Option<Backing>,
}

impl Resource {
    /// What it counts against the limit.
    fn cost(&self) -> u64 {
        let entries = self.backing.as_ref().map_or(0, |backing| backing.pieces.len() as u64);
        (self.data.len() as u64).max(LEAST_BYTES) + entries * ENTRY_BYTES
    }

    /// Row `y`'s pixels from column `x` on, as 0xAARRGGBB.
    pub fn row(&self, x: u32, y: u32, width: u32) -> impl Iterator<Item = u32> + '_ {
        let start = (y as usize * self.width as usize + x as usize) * PIXEL as usize;
        let bytes = self.data.get(start..).unwrap_or_default();
        let pixels = bytes.chunks_exact(PIXEL as usize).take(width as usize);
        pixels.map(|pixel| self.format.convert([pixel[0], pixel[1], pixel[2], pixel[3]]))
    }

    /// Copies `area` from the backing, where its first pixel is at `offset`.
    pub fn transfer(&mut self, memory: &GuestMemory, area: Area, offset: u64) -> Result<(), Code> {
        let backing = self.backing.as_ref().ok_or(Code::Unspecified)?;
        if !area.fits(self.width, self.height) {
            return Err(Code::InvalidParameter);
        }
        let stride = u64::from(self.width) * PIXEL;
        let row_bytes = u64::from(area.width) * PIXEL;
        let bytes = stride * u64::from(area.height - 1) + row_bytes;
        if offset.checked_add(bytes).is_none_or(|end| end > backing.bytes) {
            return Err(Code::InvalidParameter);
        }
        let first = (u64::from(area.y) * stride + u64::from(area.x) * PIXEL) as usize;
        if row_bytes == stride {
            return backing.read(memory, offset, &mut self.data[first..first + bytes as usize]);
        }
        for row in 0..u64::from(area.height) {
            let at = first + (row * stride) as usize;
            let data = &mut self.data[at..at + row_bytes as usize];
            backing.read(memory, offset + row * stride, data)?;
        }
        Ok(())
    }
}

/// All resources of a device.
#[derive(Default)]
pub struct Resources {
    map: BTreeMap<u32, Resource>,
    bytes: u64,
}

impl Resources {
    /// A resource of zeroes.
    pub fn create(&mut self, id: u32, number: u32, width: u32, height: u32) -> Result<(), Code> {
        let format = Format::new(number).ok_or(Code::InvalidParameter)?;
        let sides = 1..=MOST_SIDE;
        if id == 0 || self.map.contains_key(&id) {
            return Err(Code::InvalidResource);
        }
        if !sides.contains(&width) || !sides.contains(&height) {
            return Err(Code::InvalidParameter);
        }
        let bytes = u64::from(width) * u64::from(height) * PIXEL;
        if self.bytes + bytes.max(LEAST_BYTES) > MOST_BYTES {
            return Err(Code::OutOfMemory);
        }
        let data = vec![0; bytes as usize];
        let resource = Resource { number, format, width, height, data, backing: None };
        self.bytes += resource.cost();
        self.map.insert(id, resource);
        Ok(())
    }

    /// Forgets a resource.
    pub fn remove(&mut self, id: u32) -> Result<(), Code> {
        let resource = self.map.remove(&id).ok_or(Code::InvalidResource)?;
        self.bytes -= resource.cost();
        Ok(())
    }

    /// The resource with this number.
    pub fn get(&self, id: u32) -> Result<&Resource, Code> {
        self.map.get(&id).ok_or(Code::InvalidResource)
    }

    /// The resource with this number.
    pub fn get_mut(&mut self, id: u32) -> Result<&mut Resource, Code> {
        self.map.get_mut(&id).ok_or(Code::InvalidResource)
    }

    /// Attaches a backing to a resource that has none.
    pub fn attach(&mut self, id: u32, backing: Backing) -> Result<(), Code> {
        let resource = self.map.get_mut(&id).ok_or(Code::InvalidResource)?;
        if resource.backing.is_some() {
            return Err(Code::Unspecified);
        }
        let cost = backing.pieces.len() as u64 * ENTRY_BYTES;
        if self.bytes + cost > MOST_BYTES {
            return Err(Code::OutOfMemory);
        }
        self.bytes += cost;
        resource.backing = Some(backing);
        Ok(())
    }

    /// Takes the backing away.
    pub fn detach(&mut self, id: u32) -> Result<(), Code> {
        let resource = self.map.get_mut(&id).ok_or(Code::InvalidResource)?;
        let before = resource.cost();
        resource.backing = None;
        self.bytes -= before - resource.cost();
        Ok(())
    }

    /// What is saved.
    pub fn save(&self) -> Vec<GpuResource> {
        let each = |(id, resource): (&u32, &Resource)| GpuResource {
            id: *id,
            format: resource.number,
            width: resource.width,
            height: resource.height,
            backing: resource
                .backing
                .as_ref()
                .map(|backing| backing.pieces.iter().map(|piece| (piece.gpa, piece.len)).collect()),
            pixels: Pixels(resource.data.clone()),
        };
        self.map.iter().map(each).collect()
    }

    /// What was saved. Backings are checked against RAM when a transfer uses them.
    ///
    /// # Errors
    /// It cannot have been saved by a device like this.
    pub fn restore(saved: &[GpuResource]) -> Result<Self, Code> {
        let mut resources = Self::default();
        for saved in saved {
            resources.create(saved.id, saved.format, saved.width, saved.height)?;
            let data = &mut resources.get_mut(saved.id)?.data;
            if !saved.pixels.0.is_empty() {
                if data.len() != saved.pixels.0.len() {
                    return Err(Code::InvalidParameter);
                }
                data.copy_from_slice(&saved.pixels.0);
            }
            if let Some(pieces) = &saved.backing {
                let mut backing = Backing::default();
                for &(gpa, len) in pieces {
                    backing.pieces.push(Piece { start: backing.bytes, gpa, len });
                    backing.bytes += u64::from(len);
                }
                resources.attach(saved.id, backing)?;
            }
        }
        Ok(resources)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lodge_memory::{RamLayout, allocate};

    const WHOLE: Area = Area { x: 0, y: 0, width: 4, height: 4 };

    fn filled(memory: &GuestMemory) {
        let bytes: Vec<u8> = (0..=255).collect();
        memory.write_slice(&bytes, GuestAddress(0x1000)).unwrap();
    }

    fn first_bytes(resource: &Resource) -> Vec<u8> {
        resource.data.chunks(4).map(|pixel| pixel[0]).collect()
    }

    #[test]
    fn transfers_gather_pieces() {
        let memory = allocate(&RamLayout::new(1 << 16).unwrap()).unwrap();
        filled(&memory);
        let mut resources = Resources::default();
        resources.create(1, 2, 4, 4).unwrap();
        let entries = [(0x1080, 24), (0, 0), (0x1000, 3), (0x1003, 61)];
        let backing = Backing::new(&memory, entries.into_iter()).unwrap();
        resources.attach(1, backing).unwrap();
        let resource = resources.get_mut(1).unwrap();
        resource.transfer(&memory, WHOLE, 0).unwrap();
        let expected = [128, 132, 136, 140, 144, 148, 0, 4, 8, 12, 16, 20, 24, 28, 32, 36];
        assert_eq!(first_bytes(resource), expected);
        // Two columns of two rows, from the second row of the backing.
        resource.transfer(&memory, Area { x: 1, y: 2, width: 2, height: 2 }, 20).unwrap();
        assert_eq!(first_bytes(resource)[8..], [8, 148, 0, 20, 24, 12, 16, 36]);
        for (area, offset) in [
            (WHOLE, 25),
            (WHOLE, u64::MAX),
            (Area { x: 1, ..WHOLE }, 0),
            (Area { height: 0, ..WHOLE }, 0),
            (Area { y: u32::MAX, ..WHOLE }, 0),
        ] {
            assert_eq!(resource.transfer(&memory, area, offset), Err(Code::InvalidParameter));
        }
        resources.detach(1).unwrap();
        let again = resources.get_mut(1).unwrap().transfer(&memory, WHOLE, 0);
        assert_eq!(again, Err(Code::Unspecified));
        let outside = Backing::new(&memory, [(0xfff8, 16)].into_iter());
        assert_eq!(outside.unwrap_err(), Code::InvalidParameter);
    }

    #[test]
    fn memory_is_limited_and_given_back() {
        let mut resources = Resources::default();
        assert_eq!(resources.create(0, 1, 1, 1), Err(Code::InvalidResource));
        assert_eq!(resources.create(1, 9, 1, 1), Err(Code::InvalidParameter));
        assert_eq!(resources.create(1, 1, 0, 1), Err(Code::InvalidParameter));
        assert_eq!(resources.create(1, 1, 1, 16385), Err(Code::InvalidParameter));
        resources.create(1, 1, 8192, 4096).unwrap();
        assert_eq!(resources.create(1, 1, 1, 1), Err(Code::InvalidResource));
        resources.create(2, 1, 8192, 4095).unwrap();
        assert_eq!(resources.create(3, 1, 8192, 1).err(), None);
        assert_eq!(resources.create(4, 1, 1, 1), Err(Code::OutOfMemory));
        let memory = allocate(&RamLayout::new(1 << 16).unwrap()).unwrap();
        let backing = Backing::new(&memory, [(0, 4096)].into_iter()).unwrap();
        assert_eq!(resources.attach(2, backing.clone()), Err(Code::OutOfMemory));
        resources.remove(3).unwrap();
        resources.attach(2, backing.clone()).unwrap();
        assert_eq!(resources.attach(2, backing), Err(Code::Unspecified));
        resources.detach(2).unwrap();
        resources.remove(1).unwrap();
        resources.remove(2).unwrap();
        assert_eq!((resources.bytes, resources.remove(2)), (0, Err(Code::InvalidResource)));
        for id in 1..=65536 {
            resources.create(id, 1, 1, 1).unwrap();
        }
        assert_eq!(resources.create(65537, 1, 1, 1), Err(Code::OutOfMemory));
    }
}
