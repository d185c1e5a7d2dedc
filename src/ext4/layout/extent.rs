//! Extent trees: a 12-byte header, then 12-byte entries; leaves map file blocks, index nodes point to nodes one level down.
//!
//! The root has room for four entries in `i_block`. Nodes fill a block and, with metadata_csum, end in a 4-byte checksum tail.

use super::{corrupt, get_u16, get_u32, need, put_u16, put_u32};
use crate::error::Result;

/// `eh_magic`.
pub const MAGIC: u16 = 0xF30A;
/// Bytes of the header and of each entry.
pub const ENTRY_SIZE: usize = 12;
/// Entries of the root in `i_block`.
pub const ROOT_MAX: u16 = 4;
/// The most blocks of a written extent; longer lengths mean unwritten.
pub const LEN_MAX: u32 = 32768;
/// Deepest tree the kernel accepts (EXT4_MAX_EXTENT_DEPTH).
pub const DEPTH_MAX: u16 = 5;

/// Header of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentHeader {
    /// Entries in use.
    pub entries: u16,
    /// Entries there is room for.
    pub max: u16,
    /// 0 for leaves.
    pub depth: u16,
    /// Unused.
    pub generation: u32,
}

impl ExtentHeader {
    /// Reads and checks the header of a node of `bytes.len()` bytes: magic, depth, and that `max` entries fit.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        need(bytes, ENTRY_SIZE, "ext4 extent header")?;
        let header = ExtentHeader { entries: get_u16(bytes, 2), max: get_u16(bytes, 4), depth: get_u16(bytes, 6), generation: get_u32(bytes, 8) };
        let bad = |what: String| Err(corrupt("ext4 extent header", what));
        if get_u16(bytes, 0) != MAGIC {
            return bad(format!("has magic {:#06x}, not {MAGIC:#06x}", get_u16(bytes, 0)));
        }
        if header.depth > DEPTH_MAX {
            return bad(format!("has depth {}, the limit is {DEPTH_MAX}", header.depth));
        }
        if header.entries > header.max || (usize::from(header.max) + 1) * ENTRY_SIZE > bytes.len() {
            return bad(format!("has {} of {} entries in {} bytes", header.entries, header.max, bytes.len()));
        }
        Ok(header)
    }

    /// Writes the 12 bytes.
    pub fn write(&self, bytes: &mut [u8]) {
        put_u16(bytes, 0, MAGIC);
        put_u16(bytes, 2, self.entries);
        put_u16(bytes, 4, self.max);
        put_u16(bytes, 6, self.depth);
        put_u32(bytes, 8, self.generation);
    }
}

/// Entry of an index node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentIndex {
    /// First file block below it.
    pub block: u32,
    /// The node one level down.
    pub leaf: u64,
}

impl ExtentIndex {
    /// Reads entry `i` of a node whose header was checked.
    pub fn get(node: &[u8], i: usize) -> Self {
        let at = (i + 1) * ENTRY_SIZE;
        ExtentIndex { block: get_u32(node, at), leaf: u64::from(get_u32(node, at + 4)) | u64::from(get_u16(node, at + 8)) << 32 }
    }

    /// Writes entry `i` of a node.
    pub fn put(&self, node: &mut [u8], i: usize) {
        let at = (i + 1) * ENTRY_SIZE;
        put_u32(node, at, self.block);
        put_u32(node, at + 4, self.leaf as u32);
        put_u16(node, at + 8, (self.leaf >> 32) as u16);
        put_u16(node, at + 10, 0);
    }
}

/// Entry of a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First file block.
    pub block: u32,
    /// Blocks, 1..=32768 (32767 when unwritten).
    pub len: u32,
    /// First block on disk.
    pub start: u64,
    /// Allocated but reads as zeros.
    pub unwritten: bool,
}

impl Extent {
    /// Reads entry `i` of a leaf whose header was checked.
    pub fn get(node: &[u8], i: usize) -> Self {
        let at = (i + 1) * ENTRY_SIZE;
        let raw = u32::from(get_u16(node, at + 4));
        let unwritten = raw > LEN_MAX;
        Extent {
            block: get_u32(node, at),
            len: if unwritten { raw - LEN_MAX } else { raw },
            start: u64::from(get_u32(node, at + 8)) | u64::from(get_u16(node, at + 6)) << 32,
            unwritten,
        }
    }

    /// Writes entry `i` of a leaf.
    pub fn put(&self, node: &mut [u8], i: usize) {
        let at = (i + 1) * ENTRY_SIZE;
        put_u32(node, at, self.block);
        put_u16(node, at + 4, if self.unwritten { self.len + LEN_MAX } else { self.len } as u16);
        put_u16(node, at + 6, (self.start >> 32) as u16);
        put_u32(node, at + 8, self.start as u32);
    }
}

/// Entries of a node that fills a block. The checksum tail needs 4 bytes, and the kernel always leaves room for it where it can: 340 for 4 KiB.
pub fn block_max(block_size: u32) -> u16 {
    ((block_size - ENTRY_SIZE as u32) / ENTRY_SIZE as u32) as u16
}

/// Where the checksum tail of a node is: right behind its `max` entries.
pub fn tail_at(max: u16) -> usize {
    (usize::from(max) + 1) * ENTRY_SIZE
}
