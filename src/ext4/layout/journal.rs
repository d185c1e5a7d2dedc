//! The journal's superblock (jbd2): the first block of inode 8, big endian.

use super::{corrupt, need};
use crate::error::Result;

/// `h_magic` of every journal block.
pub const MAGIC: u32 = 0xC03B_3998;
/// `h_blocktype` of the superblock, version 2.
pub const BLOCKTYPE_SUPERBLOCK_V2: u32 = 4;
/// `h_blocktype` of the superblock, version 1 (no features).
pub const BLOCKTYPE_SUPERBLOCK_V1: u32 = 3;
/// Bytes the checksum covers.
pub const SIZE: usize = 1024;
/// Offset of `s_checksum`.
pub const CHECKSUM_AT: usize = 0xFC;
/// Smallest journal the kernel accepts, blocks (JBD2_MIN_JOURNAL_BLOCKS).
pub const BLOCKS_MIN: u32 = 1024;

/// Bits of `s_feature_incompat`.
pub mod incompat {
    /// Revoke records.
    pub const REVOKE: u32 = 1;
    /// 64-bit block numbers.
    pub const BIT64: u32 = 2;
    /// Asynchronous commit.
    pub const ASYNC_COMMIT: u32 = 4;
    /// Checksums, version 2.
    pub const CSUM_V2: u32 = 8;
    /// Checksums, version 3.
    pub const CSUM_V3: u32 = 16;
    /// Fast commits.
    pub const FAST_COMMIT: u32 = 32;
}
/// `s_checksum_type`: crc32c.
pub const CHECKSUM_CRC32C: u8 = 4;

/// The fields that matter; the rest is zero in a new journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalSuperblock {
    /// `h_blocktype`.
    pub blocktype: u32,
    /// Block size.
    pub blocksize: u32,
    /// Blocks in the journal, this one included.
    pub maxlen: u32,
    /// First block of log.
    pub first: u32,
    /// First commit expected.
    pub sequence: u32,
    /// Block of the log's start; 0 when the journal is empty.
    pub start: u32,
    /// Error of an earlier run.
    pub errno: u32,
    /// Compatible features.
    pub feature_compat: u32,
    /// See [`incompat`].
    pub feature_incompat: u32,
    /// Read-only features.
    pub feature_ro_compat: u32,
    /// UUID: the filesystem's for an internal journal, or zero.
    pub uuid: [u8; 16],
    /// Filesystems that share it.
    pub nr_users: u32,
    /// [`CHECKSUM_CRC32C`] with checksums.
    pub checksum_type: u8,
    /// Checksum with checksums.
    pub checksum: u32,
}

fn get(bytes: &[u8], at: usize) -> u32 {
    super::get_u32(bytes, at).swap_bytes()
}
fn put(bytes: &mut [u8], at: usize, value: u32) {
    super::put_u32(bytes, at, value.swap_bytes());
}

impl JournalSuperblock {
    /// Reads and checks magic and block type.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        need(bytes, SIZE, "ext4 journal superblock")?;
        let blocktype = get(bytes, 4);
        if get(bytes, 0) != MAGIC || !(BLOCKTYPE_SUPERBLOCK_V1..=BLOCKTYPE_SUPERBLOCK_V2).contains(&blocktype) {
            return Err(corrupt("ext4 journal superblock", format!("has magic {:#010x} and type {blocktype}", get(bytes, 0))));
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&bytes[0x30..0x40]);
        let features = |at| if blocktype == BLOCKTYPE_SUPERBLOCK_V2 { get(bytes, at) } else { 0 };
        Ok(JournalSuperblock {
            blocktype,
            blocksize: get(bytes, 0xC),
            maxlen: get(bytes, 0x10),
            first: get(bytes, 0x14),
            sequence: get(bytes, 0x18),
            start: get(bytes, 0x1C),
            errno: get(bytes, 0x20),
            feature_compat: features(0x24),
            feature_incompat: features(0x28),
            feature_ro_compat: features(0x2C),
            uuid,
            nr_users: get(bytes, 0x40),
            checksum_type: bytes[0x50],
            checksum: get(bytes, CHECKSUM_AT),
        })
    }

    /// Writes the fields; other bytes stay.
    pub fn write(&self, bytes: &mut [u8]) {
        let words = [
            (0x0, MAGIC),
            (0x4, self.blocktype),
            (0xC, self.blocksize),
            (0x10, self.maxlen),
            (0x14, self.first),
            (0x18, self.sequence),
            (0x1C, self.start),
            (0x20, self.errno),
            (0x24, self.feature_compat),
            (0x28, self.feature_incompat),
            (0x2C, self.feature_ro_compat),
            (0x40, self.nr_users),
            (CHECKSUM_AT, self.checksum),
        ];
        for (at, value) in words {
            put(bytes, at, value);
        }
        bytes[0x30..0x40].copy_from_slice(&self.uuid);
        bytes[0x50] = self.checksum_type;
    }
}
