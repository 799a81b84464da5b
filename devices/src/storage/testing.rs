//! An initiator for tests: it sends a command with its data to a unit over a real image.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use lodge_disk::{Disk, Format, OpenOptions};
use lodge_memory::{GuestMemory, RamLayout, allocate};
use tempfile::NamedTempFile;

use super::unit::finished;
use super::{Action, Cdb, Command, Lane, Reply, Sense, Unit};
use crate::dma::Scatter;

/// Where data goes to and comes from.
const OUT: u64 = 0x10_0000;
const IN: u64 = 0x40_0000;

/// A raw image.
pub struct Image {
    pub file: NamedTempFile,
}

impl Image {
    /// An image whose 512-byte sectors hold their number in each word.
    pub fn numbered(bytes: u64) -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        let data: Vec<u8> =
            (0..bytes / 4).flat_map(|word| ((word / 128) as u32).to_le_bytes()).collect();
        file.as_file().write_all_at(&data, 0).unwrap();
        Self { file }
    }

    /// An image of zeroes.
    pub fn empty(bytes: u64) -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        Self { file }
    }

    pub fn open(&self, read_only: bool) -> Arc<dyn Disk> {
        let mut options = OpenOptions::new(self.file.path());
        options.format = Some(Format::Raw);
        options.read_only = read_only;
        lodge_disk::open(&options).unwrap()
    }

    pub fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.file.as_file().read_exact_at(&mut data, offset).unwrap();
        data
    }
}

/// The initiator.
pub struct Initiator {
    pub memory: Arc<GuestMemory>,
    lane: Lane<()>,
}

impl Initiator {
    pub fn new() -> Self {
        let memory = allocate(&RamLayout::new(8 << 20).unwrap()).unwrap();
        let lane = Lane::new(memory.clone()).unwrap();
        Self { memory, lane }
    }

    /// Sends a command; returns its end and what it wrote.
    pub fn ask(&mut self, unit: &dyn Unit, cdb: &[u8], out: &[u8], room: u32) -> (Reply, Vec<u8>) {
        let mut data_out = Scatter::default();
        // In two pieces, so that nobody counts on one.
        let half = (out.len() / 2) as u32;
        assert!(data_out.push(&self.memory, OUT, half));
        assert!(data_out.push(&self.memory, OUT + 0x10_0000, out.len() as u32 - half));
        data_out.write(&self.memory, 0, out);
        let mut data_in = Scatter::default();
        assert!(data_in.push(&self.memory, IN, room / 3));
        assert!(data_in.push(&self.memory, IN + 0x20_0001, room - room / 3));
        data_in.write(&self.memory, 0, &vec![0xee; room as usize]);
        let command = Command {
            cdb: Cdb::new(cdb),
            memory: &self.memory,
            data_out: &data_out,
            data_in: &data_in,
            held_sense: None,
        };
        let reply = match unit.execute(&command) {
            Action::Done(reply) => reply,
            Action::Work(medium, job) => match self.lane.start(&medium, job, ()) {
                Some(ended) => finished(&ended),
                None => finished(&self.lane.wait()[0]),
            },
        };
        let moved = reply.deliver(&self.memory, &data_in);
        let mut data = vec![0; if out.is_empty() { moved as usize } else { 0 }];
        data_in.read(&self.memory, 0, &mut data);
        (reply, data)
    }

    /// A command that must succeed: its data.
    pub fn good(&mut self, unit: &dyn Unit, cdb: &[u8], out: &[u8], room: u32) -> Vec<u8> {
        let (reply, data) = self.ask(unit, cdb, out, room);
        assert_eq!((reply.sense, reply.overrun), (None, false), "{cdb:02x?}");
        data
    }

    /// A command that must fail: key, code and qualifier.
    pub fn fails(&mut self, unit: &dyn Unit, cdb: &[u8], out: &[u8], room: u32) -> (u8, u8, u8) {
        let (reply, data) = self.ask(unit, cdb, out, room);
        let Some(Sense { key, asc, ascq, .. }) = reply.sense else {
            panic!("{cdb:02x?} did not fail: {data:02x?}")
        };
        (key, asc, ascq)
    }
}
