//! The header of a qcow2 image (QEMU `docs/interop/qcow2.txt`, "Header"): parsed, and refused when the image has
//! something that could not be opened safely. All numbers are big-endian.
//!
//! ```text
//!   0 magic        4 version      8 backing name: offset  16 its length   20 cluster bits
//!  24 disk size   32 encryption  36 L1 entries            40 L1 offset    48 refcount table offset
//!  56 refcount table clusters    60 snapshots             64 their offset
//!  72 incompatible  80 compatible  88 auto-clear features  96 refcount order  100 header length
//! 104 compression type            ... then extensions: type, length, data padded to 8
//! ```

use super::MAGIC;

/// Bytes of the header that version 3 has at least.
const V3_LENGTH: usize = 104;
/// Longest backing file name.
const MAX_NAME: u64 = 1023;
/// Most bytes of an L1 table, as in QEMU.
const MAX_L1: u64 = 32 << 20;
/// Most bytes of a refcount table, as in QEMU.
pub(super) const MAX_REFCOUNT_TABLE: u64 = 8 << 20;

const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_BITMAPS: u32 = 0x2385_2875;
const EXT_ENCRYPTION: u32 = 0x0537_be77;
const EXT_EXTERNAL_DATA: u32 = 0x4441_5441;

/// Offset of the auto-clear features in the header.
pub(super) const AUTOCLEAR_OFFSET: u64 = 88;
/// Offset of the refcount table's offset, which its number of clusters follows.
pub(super) const REFCOUNT_TABLE_FIELD: u64 = 48;

/// Why a header is refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It breaks the format's rules.
    Damaged(String),
    /// It is fine, and uses something that is not supported here.
    Unsupported(String),
}

use Refusal::{Damaged, Unsupported};

/// What of the header is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// The guest's disk in bytes, a multiple of 512.
    pub(super) size: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u32,
    /// A refcount has `1 << refcount_order` bits.
    pub(super) refcount_order: u32,
    pub(super) backing: Option<Backing>,
    /// Auto-clear features that are set: whoever writes must clear those it does not know.
    pub(super) autoclear: u64,
}

/// The backing file as the header names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Backing {
    pub(super) name: String,
    /// `raw`, `qcow2`, ...; images of old do not tell.
    pub(super) format: Option<String>,
}

impl Header {
    /// Parses the header from the image's first cluster, of which `bytes` has as much as there is (at most 2 MiB).
    pub(super) fn parse(bytes: &[u8], file_len: u64, read_only: bool) -> Result<Self, Refusal> {
        if bytes.get(..4) != Some(&MAGIC) {
            return Err(Damaged("it does not begin as one; is it `format=raw`?".to_owned()));
        }
        let version = be32(bytes, 4)?;
        if !(2..=3).contains(&version) {
            return Err(Unsupported(format!("it is of version {version} of qcow2, not 2 or 3")));
        }
        let cluster_bits = be32(bytes, 20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(Damaged(format!("clusters of 2^{cluster_bits} bytes")));
        }
        let first_cluster = &bytes[..bytes.len().min(1 << cluster_bits)];
        let mut header = Self {
            version,
            cluster_bits,
            size: be64(bytes, 24)? / 512 * 512,
            l1_entries: be32(bytes, 36)?,
            l1_offset: be64(bytes, 40)?,
            refcount_table_offset: be64(bytes, 48)?,
            refcount_table_clusters: be32(bytes, 56)?,
            refcount_order: 4,
            backing: None,
            autoclear: 0,
        };
        header.refuse_features(bytes, read_only)?;
        let mut length = 72;
        if version == 3 {
            header.autoclear = be64(bytes, 88)?;
            header.refcount_order = be32(bytes, 96)?;
            length = be32(bytes, 100)? as usize;
            if length < V3_LENGTH || length % 8 != 0 || length > first_cluster.len() {
                return Err(Damaged(format!("a header of {length} bytes")));
            }
        }
        let format = extensions(first_cluster, length, be64(bytes, 8)?, read_only)?;
        header.backing = backing_name(first_cluster, be64(bytes, 8)?, be32(bytes, 16)?)?
            .map(|name| Backing { name, format });
        header.check_tables(file_len)?;
        Ok(header)
    }

    fn refuse_features(&self, bytes: &[u8], read_only: bool) -> Result<(), Refusal> {
        let unsupported = |text: &str| Err(Unsupported(text.to_owned()));
        if be32(bytes, 32)? != 0 {
            return unsupported("it is encrypted; decrypt it with `qemu-img convert`");
        }
        // To read the disk as it is now, snapshots beside it do not matter.
        if be32(bytes, 60)? != 0 && !read_only {
            return unsupported(
                "it has internal snapshots, which writing would need to keep; use `readonly`, \
                 or make a copy without them with `qemu-img convert -O qcow2`",
            );
        }
        let features = if self.version == 3 { be64(bytes, 72)? } else { 0 };
        if features & CORRUPT != 0 {
            return unsupported("it is marked corrupt; repair it with `qemu-img check -r all`");
        }
        if features & DIRTY != 0 && !read_only {
            return unsupported(
                "it was not closed (it is marked dirty); repair it with `qemu-img check -r all`",
            );
        }
        if features & EXTERNAL_DATA != 0 {
            return unsupported("its data is in another file, which is not supported");
        }
        if features & COMPRESSION != 0 {
            return unsupported(
                "it is compressed with something newer than zlib; \
                 `qemu-img convert -O qcow2` makes a copy that is not",
            );
        }
        if features & EXTENDED_L2 != 0 {
            return unsupported(
                "it has subclusters (extended L2 entries); \
                 `qemu-img convert -O qcow2 -o extended_l2=off` makes a copy that has none",
            );
        }
        match features & !(DIRTY | CORRUPT) {
            0 => Ok(()),
            unknown => {
                Err(Unsupported(format!("it has unknown incompatible features {unknown:#x}")))
            }
        }
    }

    fn check_tables(&self, file_len: u64) -> Result<(), Refusal> {
        let cluster = 1u64 << self.cluster_bits;
        if self.size == 0 {
            return Err(Damaged("the disk has no size".to_owned()));
        }
        if self.size > i64::MAX as u64 - (4 << 20) {
            return Err(Damaged(format!("a disk of {} bytes", self.size)));
        }
        if self.refcount_order > 6 {
            return Err(Damaged(format!("refcounts of 2^{} bits", self.refcount_order)));
        }
        let l1_bytes = u64::from(self.l1_entries) * 8;
        let per_table = 1u128 << (2 * self.cluster_bits - 3);
        if l1_bytes > MAX_L1 || u128::from(self.l1_entries) * per_table < self.size.into() {
            return Err(Damaged(format!(
                "an L1 table of {} entries for a disk of {} bytes",
                self.l1_entries, self.size
            )));
        }
        let table_bytes = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if table_bytes == 0 || table_bytes > MAX_REFCOUNT_TABLE.max(cluster) {
            return Err(Damaged(format!("a refcount table of {table_bytes} bytes")));
        }
        for (what, offset, len) in [
            ("L1 table", self.l1_offset, l1_bytes),
            ("refcount table", self.refcount_table_offset, table_bytes),
        ] {
            if offset % cluster != 0 || offset == 0 {
                return Err(Damaged(format!("the {what} is at {offset:#x}, where none can be")));
            }
            if offset.checked_add(len).is_none_or(|end| end > file_len) {
                return Err(Damaged(format!(
                    "the {what} ends beyond the file's {file_len} bytes; is it truncated?"
                )));
            }
        }
        Ok(())
    }
}

/// Goes through the header extensions; returns the backing file's format.
fn extensions(
    cluster: &[u8],
    start: usize,
    backing_offset: u64,
    read_only: bool,
) -> Result<Option<String>, Refusal> {
    let end = match usize::try_from(backing_offset) {
        Ok(offset) if offset > start => offset.min(cluster.len()),
        _ => cluster.len(),
    };
    let (mut at, mut format) = (start, None);
    while at + 8 <= end {
        let (kind, len) = (be32(cluster, at)?, be32(cluster, at + 4)? as usize);
        let data = at + 8..(at + 8).saturating_add(len);
        let Some(bytes) = cluster[..end].get(data.clone()) else {
            return Err(Damaged(format!("a header extension of {len} bytes at {at:#x}")));
        };
        match kind {
            0 => break,
            EXT_BACKING_FORMAT => {
                let text = std::str::from_utf8(bytes)
                    .map_err(|_| Damaged("its backing file's format is no text".to_owned()))?;
                format = Some(text.to_owned());
            }
            EXT_BITMAPS if !read_only => {
                return Err(Unsupported(
                    "it has dirty bitmaps, which writing would make wrong; remove them with \
                     `qemu-img bitmap --remove`, or use `readonly`"
                        .to_owned(),
                ));
            }
            EXT_ENCRYPTION => return Err(Unsupported("it is encrypted".to_owned())),
            EXT_EXTERNAL_DATA => {
                return Err(Unsupported(
                    "its data is in another file, which is not supported".to_owned(),
                ));
            }
            _ => {}
        }
        at = data.end.next_multiple_of(8);
    }
    Ok(format)
}

fn backing_name(cluster: &[u8], offset: u64, len: u32) -> Result<Option<String>, Refusal> {
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    let damaged = || Damaged(format!("its backing file's name is {len} bytes at {offset:#x}"));
    let start = usize::try_from(offset).map_err(|_| damaged())?;
    if u64::from(len) > MAX_NAME {
        return Err(damaged());
    }
    let range = start..start.saturating_add(len as usize);
    let bytes = cluster.get(range).ok_or_else(damaged)?;
    String::from_utf8(bytes.to_vec()).map(Some).map_err(|_| damaged())
}

fn be32(bytes: &[u8], at: usize) -> Result<u32, Refusal> {
    let field = bytes.get(at..).and_then(|b| b.first_chunk());
    field.map(|b| u32::from_be_bytes(*b)).ok_or_else(|| Damaged("it is truncated".to_owned()))
}

fn be64(bytes: &[u8], at: usize) -> Result<u64, Refusal> {
    let field = bytes.get(at..).and_then(|b| b.first_chunk());
    field.map(|b| u64::from_be_bytes(*b)).ok_or_else(|| Damaged("it is truncated".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header of version 3 as `qemu-img create` writes it, for a disk of 1 GiB.
    fn good() -> Vec<u8> {
        let mut b = vec![0; 65536];
        b[..4].copy_from_slice(&MAGIC);
        let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
        put(4, &3u32.to_be_bytes());
        put(20, &16u32.to_be_bytes());
        put(24, &(1u64 << 30).to_be_bytes());
        put(36, &2u32.to_be_bytes());
        put(40, &0x30000u64.to_be_bytes());
        put(48, &0x10000u64.to_be_bytes());
        put(56, &1u32.to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &112u32.to_be_bytes());
        b
    }

    fn with(at: usize, bytes: &[u8], read_only: bool) -> Result<Header, Refusal> {
        let mut b = good();
        b[at..at + bytes.len()].copy_from_slice(bytes);
        Header::parse(&b, 0x40000, read_only)
    }

    #[test]
    fn a_plain_header_is_read() {
        let header = with(0, &MAGIC, false).unwrap();
        assert_eq!((header.size, header.cluster_bits, header.l1_entries), (1 << 30, 16, 2));
        assert_eq!(header.backing, None);
    }

    #[test]
    fn what_cannot_be_opened_safely_is_refused() {
        let unsupported: [(usize, &[u8], bool); 10] = [
            (4, &[0, 0, 0, 4], true),
            (32, &[0, 0, 0, 1], true),
            (60, &[0, 0, 0, 1], false),
            (79, &[1], false),
            (79, &[2], true),
            (79, &[4], true),
            (79, &[8], true),
            (79, &[16], true),
            (79, &[32], true),
            (112, &[0x23, 0x85, 0x28, 0x75, 0, 0, 0, 0], false),
        ];
        for (at, bytes, read_only) in unsupported {
            let result = with(at, bytes, read_only);
            assert!(matches!(result, Err(Unsupported(_))), "{at}: {bytes:?}: {result:?}");
        }
        for at in [60, 76] {
            assert!(with(at, &[0, 0, 0, 1], true).is_ok(), "reading does not mind {at}");
        }
    }

    #[test]
    fn what_breaks_the_rules_is_damaged() {
        let damaged: [(usize, &[u8]); 14] = [
            (0, b"X"),
            (20, &[0, 0, 0, 8]),
            (20, &[0, 0, 0, 22]),
            (24, &[0xff; 8]),
            (24, &[0; 8]),
            (36, &[0xff; 4]),
            (36, &[0, 0, 0, 1]),
            (40, &[0xff; 8]),
            (40, &[0; 8]),
            (55, &[1]),
            (56, &[0xff; 4]),
            (96, &[0, 0, 0, 7]),
            (100, &[0, 0, 0, 103]),
            (112, &[1, 2, 3, 4, 0xff, 0xff, 0xff, 0xff]),
        ];
        for (at, bytes) in damaged {
            let result = with(at, bytes, false);
            assert!(matches!(result, Err(Damaged(_))), "{at}: {bytes:?}: {result:?}");
        }
        let whole = good();
        for len in 0..120 {
            assert!(Header::parse(&whole[..len], 0x40000, false).is_err() || len >= 112);
        }
        assert!(Header::parse(&whole, 0x30008, false).is_err(), "the L1 table must be there");
    }

    #[test]
    fn the_backing_file_and_its_format_are_found() {
        let mut b = good();
        b[112..116].copy_from_slice(&EXT_BACKING_FORMAT.to_be_bytes());
        b[116..125].copy_from_slice(b"\0\0\0\x05qcow2");
        b[200..208].copy_from_slice(b"base.img");
        b[8..16].copy_from_slice(&200u64.to_be_bytes());
        b[16..20].copy_from_slice(&8u32.to_be_bytes());
        let backing = Header::parse(&b, 0x40000, false).unwrap().backing.unwrap();
        assert_eq!((backing.name.as_str(), backing.format.as_deref()), ("base.img", Some("qcow2")));
        b[16..20].copy_from_slice(&2000u32.to_be_bytes());
        assert!(Header::parse(&b, 0x40000, false).is_err());
    }
}
