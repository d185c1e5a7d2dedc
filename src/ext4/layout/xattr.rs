//! Extended attributes: in the inode behind its fields, and in one block that inodes with equal attributes may share.
//!
//! Entries grow upwards from the header, values downwards from the end, both padded to 4 bytes; four zero bytes end the entries. Value
//! offsets count from the first entry in an inode, and from the start of the block in a block. The kernel searches blocks (not inodes) by the
//! order (name index, name length, name), so blocks must be sorted that way. POSIX ACLs are stored in a shorter form than `getxattr(2)` gives.

use super::{corrupt, get_u16, get_u32, le_struct, need, put_u16, put_u32};
use crate::error::Result;

/// Magic of both headers.
pub const MAGIC: u32 = 0xEA02_0000;
/// Bytes of the header in an inode: the magic.
pub const IBODY_HEADER_SIZE: usize = 4;
/// Bytes of an entry before its name.
pub const ENTRY_SIZE: usize = 16;
/// The most inodes that share a block (EXT4_XATTR_REFCOUNT_MAX).
pub const REFCOUNT_MAX: u32 = 1024;

le_struct! {
    /// Header of an xattr block.
    XattrBlockHeader, 32, {
        /// [`MAGIC`].
        magic: u32 = 0x0,
        /// Inodes that share the block.
        refcount: u32 = 0x4,
        /// Blocks, always 1.
        blocks: u32 = 0x8,
        /// Hash of all entries, 0 when not shareable.
        hash: u32 = 0xC,
        /// Checksum with metadata_csum.
        checksum: u32 = 0x10,
        /// Unused.
        reserved: [u32; 3] = 0x14,
    }
}

/// Offset of the checksum in the block header.
pub const BLOCK_CHECKSUM_AT: usize = 0x10;

impl XattrBlockHeader {
    /// Reads and checks magic and block count.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        need(bytes, Self::SIZE, "ext4 xattr block")?;
        let header = Self::get(bytes);
        if header.magic != MAGIC || header.blocks != 1 {
            return Err(corrupt("ext4 xattr block", format!("has magic {:#010x} and {} blocks", header.magic, header.blocks)));
        }
        Ok(header)
    }
}

/// An entry; its value is elsewhere in the same area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XattrEntry<'a> {
    /// Prefix of the name, see [`split_name`].
    pub index: u8,
    /// Rest of the name.
    pub name: &'a [u8],
    /// Where the value is; 0 when it is empty.
    pub value_offs: u16,
    /// Inode that holds the value (ea_inode), 0 for none.
    pub value_inum: u32,
    /// Bytes of the value.
    pub value_size: u32,
    /// Hash of name and value; 0 in inodes.
    pub hash: u32,
}

impl<'a> XattrEntry<'a> {
    /// Reads the entry at byte `at`; nothing when the list ends there.
    pub fn parse(bytes: &'a [u8], at: usize) -> Result<Option<Self>> {
        let room = bytes.get(at..).unwrap_or_default();
        // IS_LAST_ENTRY: four zero bytes. An area that is full to the last byte still needs them.
        need(room, 4, "ext4 xattr entry")?;
        if get_u32(room, 0) == 0 {
            return Ok(None);
        }
        need(room, ENTRY_SIZE, "ext4 xattr entry")?;
        let name_len = usize::from(room[0]);
        need(room, ENTRY_SIZE + name_len, "ext4 xattr entry")?;
        Ok(Some(XattrEntry {
            index: room[1],
            name: &room[ENTRY_SIZE..ENTRY_SIZE + name_len],
            value_offs: get_u16(room, 2),
            value_inum: get_u32(room, 4),
            value_size: get_u32(room, 8),
            hash: get_u32(room, 12),
        }))
    }

    /// Writes it at byte `at`; the padding of the name stays as it is.
    pub fn write(&self, bytes: &mut [u8], at: usize) {
        bytes[at] = self.name.len() as u8;
        bytes[at + 1] = self.index;
        put_u16(bytes, at + 2, self.value_offs);
        put_u32(bytes, at + 4, self.value_inum);
        put_u32(bytes, at + 8, self.value_size);
        put_u32(bytes, at + 12, self.hash);
        bytes[at + ENTRY_SIZE..at + ENTRY_SIZE + self.name.len()].copy_from_slice(self.name);
    }

    /// Bytes to the next entry.
    pub fn len(name_len: usize) -> usize {
        (ENTRY_SIZE + name_len).next_multiple_of(4)
    }
}

/// Name prefixes by index, longest match first where one is a prefix of another.
const PREFIXES: [(u8, &[u8]); 6] =
    [(2, b"system.posix_acl_access"), (3, b"system.posix_acl_default"), (1, b"user."), (4, b"trusted."), (6, b"security."), (7, b"system.")];
/// Index of the access ACL.
pub const INDEX_ACL_ACCESS: u8 = 2;
/// Index of the default ACL.
pub const INDEX_ACL_DEFAULT: u8 = 3;

/// Index and rest of a full name; nothing when ext4 has no index for the namespace or the rest is empty or too long.
pub fn split_name(full: &[u8]) -> Option<(u8, &[u8])> {
    for (index, prefix) in PREFIXES {
        let Some(rest) = full.strip_prefix(prefix) else { continue };
        let whole = index == INDEX_ACL_ACCESS || index == INDEX_ACL_DEFAULT;
        if whole && rest.is_empty() || !whole && !rest.is_empty() && rest.len() <= 255 {
            return Some((index, rest));
        }
    }
    None
}

/// The full name of an entry; nothing for an unknown index.
pub fn join_name(index: u8, rest: &[u8]) -> Option<Vec<u8>> {
    let (_, prefix) = PREFIXES.iter().find(|(known, _)| *known == index)?;
    Some([prefix, rest].concat())
}

/// `e_hash` of an entry in a block: over the name's bytes and the value's 32-bit words (padded with zeros).
pub fn entry_hash(name: &[u8], value: &[u8]) -> u32 {
    let hash = name.iter().fold(0u32, |hash, byte| hash.rotate_left(5) ^ u32::from(*byte));
    value.chunks(4).fold(hash, |hash, chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        hash.rotate_left(16) ^ u32::from_le_bytes(word)
    })
}

/// `h_hash` of a block from the hashes of its entries in order; one entry without a hash makes the block unshareable (0).
pub fn block_hash(entry_hashes: impl IntoIterator<Item = u32>) -> u32 {
    let mut hash = 0u32;
    for entry in entry_hashes {
        if entry == 0 {
            return 0;
        }
        hash = hash.rotate_left(16) ^ entry;
    }
    hash
}

const ACL_XATTR_VERSION: u32 = 2;
const ACL_DISK_VERSION: u32 = 1;
const ACL_USER: u16 = 0x02;
const ACL_GROUP: u16 = 0x08;

/// A POSIX ACL as `getxattr(2)` gives it (version 2, entries of tag, permissions, id) in the form on disk (version 1, ids only where they mean
/// something). `Err` says what is wrong with the value.
pub fn acl_to_disk(value: &[u8]) -> std::result::Result<Vec<u8>, String> {
    if value.len() < 4 || get_u32(value, 0) != ACL_XATTR_VERSION || !(value.len() - 4).is_multiple_of(8) {
        return Err(format!("is not a POSIX ACL of version {ACL_XATTR_VERSION} ({} bytes)", value.len()));
    }
    let mut disk = ACL_DISK_VERSION.to_le_bytes().to_vec();
    for entry in value[4..].chunks_exact(8) {
        let named = match get_u16(entry, 0) {
            ACL_USER | ACL_GROUP => true,
            0x01 | 0x04 | 0x10 | 0x20 => false,
            tag => return Err(format!("has an ACL entry with unknown tag {tag:#x}")),
        };
        disk.extend_from_slice(&entry[..if named { 8 } else { 4 }]);
    }
    Ok(disk)
}

/// The opposite of [`acl_to_disk`].
pub fn acl_from_disk(disk: &[u8]) -> std::result::Result<Vec<u8>, String> {
    if disk.len() < 4 || get_u32(disk, 0) != ACL_DISK_VERSION {
        return Err(format!("is not an ACL of version {ACL_DISK_VERSION} ({} bytes)", disk.len()));
    }
    let mut value = ACL_XATTR_VERSION.to_le_bytes().to_vec();
    let mut rest = &disk[4..];
    while !rest.is_empty() {
        let tag = if rest.len() >= 4 { get_u16(rest, 0) } else { 0 };
        let len = match tag {
            ACL_USER | ACL_GROUP if rest.len() >= 8 => 8,
            0x01 | 0x04 | 0x10 | 0x20 => 4,
            _ => return Err(format!("has a bad ACL entry (tag {tag:#x}, {} bytes left)", rest.len())),
        };
        value.extend_from_slice(&rest[..len]);
        if len == 4 {
            value.extend_from_slice(&u32::MAX.to_le_bytes());
        }
        rest = &rest[len..];
    }
    Ok(value)
}
