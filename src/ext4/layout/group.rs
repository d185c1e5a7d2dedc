//! Group descriptors: 32 bytes, or 64 with the 64bit feature (high halves in the second part).

use super::{get_u16, get_u32, join, need, put_u16, put_u32};
use crate::error::Result;

/// Bytes of a descriptor without 64bit.
pub const SIZE_32: u16 = 32;
/// Bytes of a descriptor with 64bit (the least; `s_desc_size` may say more).
pub const SIZE_64: u16 = 64;
/// `bg_flags`: the inode bitmap and table are not initialised (all free).
pub const INODE_UNINIT: u16 = 1;
/// `bg_flags`: the block bitmap is not initialised (computed from the layout).
pub const BLOCK_UNINIT: u16 = 2;
/// `bg_flags`: the inode table is zeroed on disk.
pub const INODE_ZEROED: u16 = 4;
/// Offset of `bg_checksum`.
pub const CHECKSUM_AT: usize = 0x1E;

/// A group descriptor with joined halves. Counts above 65535 and checksums' high halves exist only in 64-byte descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GroupDesc {
    /// Block of the block bitmap.
    pub block_bitmap: u64,
    /// Block of the inode bitmap.
    pub inode_bitmap: u64,
    /// First block of the inode table.
    pub inode_table: u64,
    /// Free blocks.
    pub free_blocks: u32,
    /// Free inodes.
    pub free_inodes: u32,
    /// Directories.
    pub used_dirs: u32,
    /// [`INODE_UNINIT`] and others.
    pub flags: u16,
    /// Snapshot exclusion bitmap, unused.
    pub exclude_bitmap: u64,
    /// Checksum of the block bitmap (16 bits in short descriptors).
    pub block_bitmap_csum: u32,
    /// Checksum of the inode bitmap (16 bits in short descriptors).
    pub inode_bitmap_csum: u32,
    /// Inodes at the end of the table that were never used.
    pub itable_unused: u32,
    /// Checksum of the descriptor.
    pub checksum: u16,
}

impl GroupDesc {
    /// Reads a descriptor of `bytes.len()` bytes: 64 and more with high halves, 32 to 63 without.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        need(bytes, usize::from(SIZE_32), "ext4 group descriptor")?;
        let wide = bytes.len() >= usize::from(SIZE_64);
        let hi32 = |at| if wide { get_u32(bytes, at) } else { 0 };
        let hi16 = |at| if wide { u32::from(get_u16(bytes, at)) << 16 } else { 0 };
        Ok(GroupDesc {
            block_bitmap: join(get_u32(bytes, 0x0), hi32(0x20)),
            inode_bitmap: join(get_u32(bytes, 0x4), hi32(0x24)),
            inode_table: join(get_u32(bytes, 0x8), hi32(0x28)),
            free_blocks: u32::from(get_u16(bytes, 0xC)) | hi16(0x2C),
            free_inodes: u32::from(get_u16(bytes, 0xE)) | hi16(0x2E),
            used_dirs: u32::from(get_u16(bytes, 0x10)) | hi16(0x30),
            flags: get_u16(bytes, 0x12),
            exclude_bitmap: join(get_u32(bytes, 0x14), hi32(0x34)),
            block_bitmap_csum: u32::from(get_u16(bytes, 0x18)) | hi16(0x38),
            inode_bitmap_csum: u32::from(get_u16(bytes, 0x1A)) | hi16(0x3A),
            itable_unused: u32::from(get_u16(bytes, 0x1C)) | hi16(0x32),
            checksum: get_u16(bytes, CHECKSUM_AT),
        })
    }

    /// Writes all fields; the high halves when `bytes` has at least 64 bytes. Panics below 32.
    pub fn write(&self, bytes: &mut [u8]) {
        put_u32(bytes, 0x0, self.block_bitmap as u32);
        put_u32(bytes, 0x4, self.inode_bitmap as u32);
        put_u32(bytes, 0x8, self.inode_table as u32);
        put_u16(bytes, 0xC, self.free_blocks as u16);
        put_u16(bytes, 0xE, self.free_inodes as u16);
        put_u16(bytes, 0x10, self.used_dirs as u16);
        put_u16(bytes, 0x12, self.flags);
        put_u32(bytes, 0x14, self.exclude_bitmap as u32);
        put_u16(bytes, 0x18, self.block_bitmap_csum as u16);
        put_u16(bytes, 0x1A, self.inode_bitmap_csum as u16);
        put_u16(bytes, 0x1C, self.itable_unused as u16);
        put_u16(bytes, CHECKSUM_AT, self.checksum);
        if bytes.len() >= usize::from(SIZE_64) {
            put_u32(bytes, 0x20, (self.block_bitmap >> 32) as u32);
            put_u32(bytes, 0x24, (self.inode_bitmap >> 32) as u32);
            put_u32(bytes, 0x28, (self.inode_table >> 32) as u32);
            put_u16(bytes, 0x2C, (self.free_blocks >> 16) as u16);
            put_u16(bytes, 0x2E, (self.free_inodes >> 16) as u16);
            put_u16(bytes, 0x30, (self.used_dirs >> 16) as u16);
            put_u16(bytes, 0x32, (self.itable_unused >> 16) as u16);
            put_u32(bytes, 0x34, (self.exclude_bitmap >> 32) as u32);
            put_u16(bytes, 0x38, (self.block_bitmap_csum >> 16) as u16);
            put_u16(bytes, 0x3A, (self.inode_bitmap_csum >> 16) as u16);
        }
    }
}
