//! One vCPU's decoded blocks: found by where they lie and how they run, linked with each other, dropped when
//! their bytes change.
//!
//! ```text
//! (gpa, rip, mode, segment) --map--> block --link--> block
//!   gpa's page --pages--> the blocks that lie in it, to be dropped when it is written
//! ```
//!
//! Memory of dropped blocks stays until the cache is emptied, because a link or the jump cache of the current
//! epoch may still lead there; the cache is emptied when it is full, between two blocks.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::Ordering;

use iced_x86::{Decoder, DecoderOptions, Instruction};

use super::lower::{Finished, Lowering};
use super::op::{Link, MAX_INSTRUCTIONS, Op};
use crate::fault::{Exec, Fault};
use crate::state::{Cpu, seg};

/// Bytes of decoded code that a vCPU keeps.
const CAPACITY: usize = 7 << 20;

/// Where code lies and how it runs.
#[derive(PartialEq, Eq, Hash, Clone, Copy)]
struct Key {
    gpa: u64,
    rip: u64,
    mode: u64,
    segment: u64,
}

struct Block {
    key: Key,
    code: Finished,
    /// The page that the last instruction reaches into, if it is another one.
    next_page: Option<u64>,
    /// Links that lead here.
    incoming: Vec<(*mut Link, usize)>,
}

impl Block {
    fn entry(&self) -> *const Op {
        // The header is first.
        (&raw const self.code.slots[1]).cast()
    }
}

/// Multiplies and rotates: keys are addresses, nobody attacks their own cache.
#[derive(Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64((*byte).into());
        }
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(23) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

type Map<K, V> = HashMap<K, V, BuildHasherDefault<AddressHasher>>;

/// One vCPU's decoded blocks.
#[derive(Default)]
pub(crate) struct Cache {
    blocks: Vec<Block>,
    map: Map<Key, usize>,
    pages: Map<u64, Vec<usize>>,
    bytes: usize,
    /// Blocks decoded since the beginning.
    pub decoded: u64,
}

// SAFETY: the pointers inside lead to blocks of the same cache, which moves to another thread as a whole.
unsafe impl Send for Cache {}

/// A block, and until when a link may lead to it.
#[derive(Clone, Copy)]
pub(crate) struct Found {
    pub entry: *const Op,
    index: usize,
    /// It reaches into another page.
    crosses: bool,
}

impl Cache {
    /// The block at `cpu.rip`. None if there is none to be had: the instruction there is executed by itself.
    /// The fault is what fetching the first byte raises.
    pub fn find(&mut self, cpu: &mut Cpu) -> Exec<Option<Found>> {
        let lin = cpu.code_address();
        if cpu.mode.bits == 64 && !crate::mem::canonical(lin) {
            return Err(Fault::GP0);
        }
        let gpa = cpu.fetch_gpa(lin)?;
        let (mode, segment) = (cpu.code_mode(), cpu.code_segment());
        let key = Key { gpa, rip: cpu.rip, mode, segment };
        if let Some(&index) = self.map.get(&key) {
            let block = &self.blocks[index];
            let found = Found { entry: block.entry(), index, crosses: block.next_page.is_some() };
            let Some(page) = block.next_page else { return Ok(Some(found)) };
            match cpu.fetch_gpa((lin | 0xfff).wrapping_add(1)) {
                Ok(now) if now == page => return Ok(Some(found)),
                // A fault belongs to the crossing instruction, which may not be the first one.
                Err(_) => return Ok(None),
                Ok(_) => self.drop_block(index),
            }
        }
        Ok(self.decode(cpu, lin, key))
    }

    /// Makes `cpu`'s jump cache, and the link it stopped at if any, lead to `found`.
    pub fn connect(&mut self, cpu: &mut Cpu, found: Found, link: Option<(*mut Link, usize)>) {
        let (rip, segment) = (cpu.rip, cpu.code_segment());
        cpu.jumps[super::flow_ops::jump_index(rip)] =
            super::flow_ops::Jump { rip, key: cpu.jump_key, segment, target: found.entry };
        let Some((link, way)) = link else { return };
        let block = &mut self.blocks[found.index];
        // SAFETY: the link belongs to a block of this cache, which is only emptied between `find` and here. The
        // operation that follows it stands before it.
        unsafe {
            let near = (*link.cast::<Op>().sub(1)).scale >> way & 1 != 0 && !found.crosses;
            (*link).target[way] = found.entry;
            (*link).epoch[way] = if near { u64::MAX } else { cpu.epoch };
        }
        block.incoming.push((link, way));
    }

    /// Drops the code that lies in a guest-physical page.
    pub fn drop_page(&mut self, page: u64) {
        for index in self.pages.remove(&(page >> 12)).unwrap_or_default() {
            self.drop_block(index);
        }
    }

    fn drop_block(&mut self, index: usize) {
        let block = &mut self.blocks[index];
        if self.map.get(&block.key) == Some(&index) {
            self.map.remove(&block.key);
        }
        for (link, way) in block.incoming.drain(..) {
            // SAFETY: links live as long as the blocks they are part of: until the cache is emptied.
            unsafe { (*link).epoch[way] = 0 };
        }
    }

    /// Empties the cache if it is full; says whether. Only between two blocks. No link into it may be used afterwards.
    pub fn make_room(&mut self, cpu: &mut Cpu) -> bool {
        if self.bytes <= CAPACITY {
            return false;
        }
        cpu.next_epoch();
        *self = Self { decoded: self.decoded, ..Self::default() };
        true
    }

    fn decode(&mut self, cpu: &mut Cpu, lin: u64, key: Key) -> Option<Found> {
        let next_page = cpu.fetch_gpa((lin | 0xfff).wrapping_add(1)).ok();
        loop {
            let mut code = Code::read(cpu, key.gpa, next_page);
            let (finished, len) = code.lower(cpu, lin)?;
            let crosses = code.first < len;
            watch(cpu, key.gpa, len.min(code.first));
            if crosses && let Some(next) = next_page {
                watch(cpu, next, len - code.first);
            }
            // Between the first look and the watch somebody may have written.
            if !Code::read(cpu, key.gpa, next_page).same(&code, len) {
                continue;
            }
            let next_page = next_page.filter(|_| crosses);
            return Some(self.insert(key, finished, next_page));
        }
    }

    fn insert(&mut self, key: Key, code: Finished, next_page: Option<u64>) -> Found {
        let index = self.blocks.len();
        // A block's places in the maps take about as much as the block's own record.
        self.bytes +=
            size_of_val(&*code.slots) + size_of_val(&*code.insns) + 2 * size_of::<Block>();
        self.decoded += 1;
        self.map.insert(key, index);
        self.pages.entry(key.gpa >> 12).or_default().push(index);
        if let Some(next) = next_page {
            self.pages.entry(next >> 12).or_default().push(index);
        }
        let block = Block { key, code, next_page, incoming: Vec::new() };
        let found = Found { entry: block.entry(), index, crosses: next_page.is_some() };
        self.blocks.push(block);
        found
    }
}

fn watch(cpu: &mut Cpu, gpa: u64, len: usize) {
    let phys = cpu.phys.clone();
    if let Some(page) = phys.page(gpa) {
        cpu.shared.clone().watch_code(cpu.index, gpa, len as u64, page.state);
        std::sync::atomic::fence(Ordering::SeqCst);
        cpu.take_mail();
    }
}

/// The bytes that a block may be made of: to the end of the page, and a little of the next.
struct Code {
    bytes: [u8; MAX_INSTRUCTIONS * 15 + 16],
    len: usize,
    /// How many of them are in the first page.
    first: usize,
}

impl Code {
    fn read(cpu: &mut Cpu, gpa: u64, next_page: Option<u64>) -> Self {
        let mut code = Self { bytes: [0; MAX_INSTRUCTIONS * 15 + 16], len: 0, first: 0 };
        let Some(page) = cpu.phys.page(gpa) else { return code };
        let room = 4096 - (gpa & 0xfff) as usize;
        code.first = room.min(code.bytes.len() - 16);
        // SAFETY: within one mapped page of guest memory.
        unsafe {
            let at = page.host.add((gpa & 0xfff) as usize);
            std::ptr::copy_nonoverlapping(at, code.bytes.as_mut_ptr(), code.first);
        }
        code.len = code.first;
        if code.first == room
            && let Some(next) = next_page.and_then(|next| cpu.phys.page(next))
        {
            // SAFETY: the beginning of a mapped page; 16 bytes of room are kept for it.
            unsafe {
                let to = code.bytes.as_mut_ptr().add(code.first);
                std::ptr::copy_nonoverlapping(next.host, to, 16);
            }
            code.len += 16;
        }
        code
    }

    fn same(&self, other: &Self, len: usize) -> bool {
        self.len >= len && other.len >= len && self.bytes[..len] == other.bytes[..len]
    }

    /// Decodes instructions up to the first that ends the block, or begins in the next page. None if there is no
    /// complete valid instruction. Gives the block and its length in bytes.
    fn lower(&mut self, cpu: &Cpu, lin: u64) -> Option<(Finished, usize)> {
        let (bits, rip) = (u32::from(cpu.mode.bits), cpu.rip);
        let bytes = &self.bytes[..self.len];
        let mut decoder = Decoder::with_ip(bits, bytes, rip, DecoderOptions::NONE);
        let mut lowering = Lowering::new(rip, lin, bits);
        let mut insn = Instruction::default();
        let mut len = 0;
        // Outside of 64-bit mode the segment ends somewhere; an instruction near the end is executed by itself.
        let limit = match bits {
            64 => u64::MAX,
            32 => u64::from(cpu.segs[seg::CS].limit),
            _ => u64::from(cpu.segs[seg::CS].limit).min(0xffff),
        };
        for _ in 0..MAX_INSTRUCTIONS {
            let at = rip.wrapping_add(len as u64);
            if len >= self.first || !decoder.can_decode() {
                break;
            }
            decoder.decode_out(&mut insn);
            if insn.is_invalid() || bits != 64 && at.saturating_add(15) > limit {
                break;
            }
            // So is a branch that leaves the segment. (No branch: 0.)
            if bits != 64 && insn.near_branch_target() > limit {
                break;
            }
            len = decoder.position();
            if lowering.add(&insn) || lowering.ops.len() > 120 {
                break;
            }
        }
        (len != 0).then(|| (lowering.finish(rip.wrapping_add(len as u64)), len))
    }
}
