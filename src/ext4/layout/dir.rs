//! Directory blocks: linear entries, and the hashed-tree index that hides behind entries old code takes for empty.

use super::{corrupt, get_u16, get_u32, need, put_u16, put_u32};
use crate::error::Result;

/// Bytes of an entry before its name.
pub const HEADER_SIZE: usize = 8;
/// Bytes of the checksum tail of a leaf block, shaped like an entry with inode 0 and no name.
pub const TAIL_SIZE: usize = 12;
/// `file_type` of the checksum tail.
pub const TAIL_FILE_TYPE: u8 = 0xDE;
/// Longest name.
pub const NAME_MAX: usize = 255;

/// Values of `file_type`.
pub mod file_type {
    /// Not known.
    pub const UNKNOWN: u8 = 0;
    /// Regular file.
    pub const FILE: u8 = 1;
    /// Directory.
    pub const DIR: u8 = 2;
    /// Character device.
    pub const CHAR: u8 = 3;
    /// Block device.
    pub const BLOCK: u8 = 4;
    /// FIFO.
    pub const FIFO: u8 = 5;
    /// Socket.
    pub const SOCKET: u8 = 6;
    /// Symbolic link.
    pub const SYMLINK: u8 = 7;
}

/// The `file_type` for the type bits of an `i_mode`.
pub fn file_type_of(mode: u16) -> u8 {
    use super::inode::mode as m;
    match mode & m::TYPE {
        m::FILE => file_type::FILE,
        m::DIR => file_type::DIR,
        m::CHAR => file_type::CHAR,
        m::BLOCK => file_type::BLOCK,
        m::FIFO => file_type::FIFO,
        m::SOCKET => file_type::SOCKET,
        m::SYMLINK => file_type::SYMLINK,
        _ => file_type::UNKNOWN,
    }
}

/// The shortest `rec_len` for a name: header and name, rounded up to 4.
pub fn rec_len_for(name_len: usize) -> usize {
    (HEADER_SIZE + name_len).next_multiple_of(4)
}

/// `rec_len` as stored. Only blocks of 64 KiB need a special form (0xffff or 0 for 65536).
pub fn decode_rec_len(raw: u16, block_size: u32) -> usize {
    if block_size == 65536 && (raw == 0xffff || raw == 0) { 65536 } else { usize::from(raw) }
}

/// An entry of a linear directory block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// Inode, 0 when the entry is free.
    pub inode: u32,
    /// Distance to the next entry.
    pub rec_len: usize,
    /// See [`file_type`].
    pub file_type: u8,
    /// The name.
    pub name: &'a [u8],
}

impl<'a> DirEntry<'a> {
    /// Reads and checks the entry at byte `at` of a directory block (with its tail, if any: the tail parses as an entry with inode 0 and
    /// file type [`TAIL_FILE_TYPE`]).
    pub fn parse(block: &'a [u8], at: usize) -> Result<Self> {
        let room = block.get(at..).unwrap_or_default();
        need(room, HEADER_SIZE, "ext4 directory entry")?;
        let rec_len = decode_rec_len(get_u16(room, 4), block.len() as u32);
        let name_len = usize::from(room[6]);
        if rec_len < rec_len_for(name_len) || !rec_len.is_multiple_of(4) || rec_len > room.len() {
            return Err(corrupt(
                "ext4 directory entry",
                format!("at byte {at}: record of {rec_len} bytes for a name of {name_len} in {} bytes", room.len()),
            ));
        }
        Ok(DirEntry { inode: get_u32(room, 0), rec_len, file_type: room[7], name: &room[HEADER_SIZE..HEADER_SIZE + name_len] })
    }

    /// Writes header and name at byte `at`; what is between name and `rec_len` stays. Panics when it does not fit.
    pub fn write(&self, block: &mut [u8], at: usize) {
        put_u32(block, at, self.inode);
        put_u16(block, at + 4, self.rec_len as u16);
        block[at + 6] = self.name.len() as u8;
        block[at + 7] = self.file_type;
        block[at + HEADER_SIZE..at + HEADER_SIZE + self.name.len()].copy_from_slice(self.name);
    }
}

/// Writes the checksum tail of a leaf block with `checksum`.
pub fn write_tail(block: &mut [u8], checksum: u32) {
    let at = block.len() - TAIL_SIZE;
    put_u32(block, at, 0);
    put_u16(block, at + 4, TAIL_SIZE as u16);
    block[at + 6] = 0;
    block[at + 7] = TAIL_FILE_TYPE;
    put_u32(block, at + 8, checksum);
}

/// Whether a leaf block ends in a checksum tail, and its checksum.
pub fn read_tail(block: &[u8]) -> Option<u32> {
    let at = block.len().checked_sub(TAIL_SIZE)?;
    let right = get_u32(block, at) == 0 && get_u16(block, at + 4) == TAIL_SIZE as u16 && block[at + 6] == 0 && block[at + 7] == TAIL_FILE_TYPE;
    right.then(|| get_u32(block, at + 8))
}

/// Offset of `dx_root_info` in the first block of a hashed directory: behind `.` and `..`.
pub const DX_INFO_AT: usize = 24;
/// Bytes of `dx_root_info`.
pub const DX_INFO_LEN: u8 = 8;
/// Offset of count and limit in the first block.
pub const DX_ROOT_COUNT_AT: usize = 32;
/// Offset of count and limit in an inner node: behind an empty entry that covers the block.
pub const DX_NODE_COUNT_AT: usize = 8;
/// Bytes of an index entry: hash, block.
pub const DX_ENTRY_SIZE: usize = 8;
/// Bytes of the checksum tail of index blocks: reserved, checksum.
pub const DX_TAIL_SIZE: usize = 8;

/// `dx_root_info`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DxRootInfo {
    /// Hash, see `hash`.
    pub hash_version: u8,
    /// Levels of inner nodes below the root: 0, 1 (2 with largedir).
    pub indirect_levels: u8,
}

impl DxRootInfo {
    /// Reads and checks it from the first block of a hashed directory.
    pub fn parse(block: &[u8]) -> Result<Self> {
        need(block, DX_ROOT_COUNT_AT + DX_ENTRY_SIZE, "ext4 directory index")?;
        let (reserved, info_len) = (get_u32(block, DX_INFO_AT), block[DX_INFO_AT + 5]);
        if reserved != 0 || info_len != DX_INFO_LEN {
            return Err(corrupt("ext4 directory index", format!("has info length {info_len} and reserved word {reserved:#x}")));
        }
        Ok(DxRootInfo { hash_version: block[DX_INFO_AT + 4], indirect_levels: block[DX_INFO_AT + 6] })
    }

    /// Writes it into the first block.
    pub fn write(&self, block: &mut [u8]) {
        put_u32(block, DX_INFO_AT, 0);
        block[DX_INFO_AT + 4] = self.hash_version;
        block[DX_INFO_AT + 5] = DX_INFO_LEN;
        block[DX_INFO_AT + 6] = self.indirect_levels;
        block[DX_INFO_AT + 7] = 0;
    }
}

/// Room for index entries at `count_at` of a block, the one that holds count and limit included.
pub fn dx_limit(block_size: u32, count_at: usize, has_tail: bool) -> u16 {
    ((block_size as usize - count_at - if has_tail { DX_TAIL_SIZE } else { 0 }) / DX_ENTRY_SIZE) as u16
}

/// Reads limit and count at `count_at` and checks that they fit the block.
pub fn dx_count_limit(block: &[u8], count_at: usize) -> Result<(u16, u16)> {
    need(block, count_at + DX_ENTRY_SIZE, "ext4 directory index")?;
    let (limit, count) = (get_u16(block, count_at), get_u16(block, count_at + 2));
    if count == 0 || count > limit || count_at + usize::from(limit) * DX_ENTRY_SIZE > block.len() {
        return Err(corrupt("ext4 directory index", format!("has {count} of {limit} entries at byte {count_at}")));
    }
    Ok((limit, count))
}

/// Writes limit and count.
pub fn put_dx_count_limit(block: &mut [u8], count_at: usize, limit: u16, count: u16) {
    put_u16(block, count_at, limit);
    put_u16(block, count_at + 2, count);
}

/// Hash and block of index entry `i`. Entry 0 has no hash of its own (count and limit are in its place): it counts as 0.
pub fn dx_entry(block: &[u8], count_at: usize, i: usize) -> (u32, u32) {
    let at = count_at + i * DX_ENTRY_SIZE;
    (if i == 0 { 0 } else { get_u32(block, at) }, get_u32(block, at + 4))
}

/// Writes index entry `i`; the hash of entry 0 is ignored.
pub fn put_dx_entry(block: &mut [u8], count_at: usize, i: usize, hash: u32, target: u32) {
    let at = count_at + i * DX_ENTRY_SIZE;
    if i != 0 {
        put_u32(block, at, hash);
    }
    put_u32(block, at + 4, target);
}

/// Where the checksum tail of an index block is: behind `limit` entries. Its checksum is 4 bytes further.
pub fn dx_tail_at(count_at: usize, limit: u16) -> usize {
    count_at + usize::from(limit) * DX_ENTRY_SIZE
}
