//! Checksums of ext4 metadata.
//!
//! With `metadata_csum` every structure carries a CRC-32C that starts from a per-filesystem seed ([`seed_of`], or `s_checksum_seed` with
//! `metadata_csum_seed`), so that a block of another filesystem is noticed. With `gdt_csum` (`uninit_bg`) only group descriptors carry a
//! CRC-16. Formulas: Linux `fs/ext4/{super,bitmap,inode,extents,namei,xattr,orphan}.c`, `fs/jbd2/journal.c` and the kernel's
//! `Documentation/filesystems/ext4/checksums.rst`. The `crc32c` crate inverts before and after, the kernel's `crc32c()` doesn't; [`update`]
//! undoes that. Functions take raw little-endian bytes; a field that holds the checksum itself is skipped or counted as zero, so callers need
//! not clear it. A slice that is too short for its structure gives a checksum of what is there: the caller has checked lengths before.

/// Offset of `bg_checksum` in a group descriptor.
const GROUP_CSUM_AT: usize = 0x1e;
/// Offset of `i_checksum_lo` in an inode.
pub const INODE_CSUM_LO_AT: usize = 0x7c;
/// Offset of `i_checksum_hi` in an inode.
pub const INODE_CSUM_HI_AT: usize = 0x82;
/// Size of the fake directory entry at the end of a leaf block that holds its checksum (`struct ext4_dir_entry_tail`).
pub const DIR_TAIL_SIZE: usize = 12;
/// Offset of `h_checksum` in an xattr block.
const XATTR_CSUM_AT: usize = 16;
/// Offset of `s_checksum` in the journal's superblock.
const JOURNAL_CSUM_AT: usize = 0xfc;
/// Bytes of a superblock that its checksum covers; the checksum follows.
pub const SUPER_CSUM_AT: usize = 1020;

/// Continues a CRC-32C as the kernel's `crc32c(crc, data)` does: no inversion. Start with `!0` or a seed.
pub fn update(crc: u32, data: &[u8]) -> u32 {
    !crc32c::crc32c_append(!crc, data)
}

/// The seed of a filesystem without `metadata_csum_seed`: the CRC of its UUID.
pub fn seed_of(uuid: &[u8; 16]) -> u32 {
    update(!0, uuid)
}

/// Of the superblock (1024 bytes); the value of `s_checksum`. Needs no seed.
pub fn superblock(raw: &[u8]) -> u32 {
    update(!0, &raw[..SUPER_CSUM_AT.min(raw.len())])
}

/// Of a group descriptor (`desc` is 32 or 64 bytes) with `metadata_csum`: the value of `bg_checksum`.
pub fn group_desc(seed: u32, group: u32, desc: &[u8]) -> u16 {
    let (head, rest) = desc.split_at(GROUP_CSUM_AT.min(desc.len()));
    let mut crc = update(seed, &group.to_le_bytes());
    crc = update(crc, head);
    crc = update(crc, &[0, 0]);
    crc = update(crc, rest.get(2..).unwrap_or_default());
    (crc & 0xffff) as u16
}

/// Of a group descriptor with `gdt_csum` only (`uninit_bg`): the value of `bg_checksum`. `desc` is as long as the descriptor on disk.
pub fn group_desc_crc16(uuid: &[u8; 16], group: u32, desc: &[u8]) -> u16 {
    let (head, rest) = desc.split_at(GROUP_CSUM_AT.min(desc.len()));
    let mut crc = crc16(!0, uuid);
    crc = crc16(crc, &group.to_le_bytes());
    crc = crc16(crc, head);
    crc16(crc, rest.get(2..).unwrap_or_default())
}

/// Of a block or inode bitmap. `bitmap` holds exactly the bits of the group: blocks (or inodes) per group / 8 bytes. The low half goes to
/// `bg_*_bitmap_csum_lo`, the high half to `_hi` when descriptors have 64 bytes.
pub fn bitmap(seed: u32, bitmap: &[u8]) -> u32 {
    update(seed, bitmap)
}

/// The seed for everything that belongs to one inode: its extent and directory blocks and the inode itself.
pub fn inode_seed(seed: u32, ino: u32, generation: u32) -> u32 {
    update(update(seed, &ino.to_le_bytes()), &generation.to_le_bytes())
}

/// Of an inode (`raw` is as long as inodes of the filesystem are). The low half goes to `i_checksum_lo`, the high half to `i_checksum_hi`
/// when [`inode_has_hi`].
pub fn inode(seed: u32, ino: u32, generation: u32, raw: &[u8]) -> u32 {
    let mut crc = inode_seed(seed, ino, generation);
    crc = update(crc, &raw[..INODE_CSUM_LO_AT]);
    crc = update(crc, &[0, 0]);
    crc = update(crc, &raw[INODE_CSUM_LO_AT + 2..128]);
    if raw.len() > 128 {
        crc = update(crc, &raw[128..INODE_CSUM_HI_AT]);
        let mut rest = INODE_CSUM_HI_AT;
        if inode_has_hi(raw) {
            crc = update(crc, &[0, 0]);
            rest += 2;
        }
        crc = update(crc, &raw[rest..]);
    }
    crc
}

/// Whether an inode has the high half of its checksum: `i_extra_isize` reaches past it.
pub fn inode_has_hi(raw: &[u8]) -> bool {
    raw.len() > 128 && usize::from(u16::from_le_bytes([raw[0x80], raw[0x81]])) >= INODE_CSUM_HI_AT + 2 - 128
}

/// Writes the checksum of an inode into it.
pub fn set_inode(seed: u32, ino: u32, raw: &mut [u8]) {
    let generation = u32::from_le_bytes([raw[0x64], raw[0x65], raw[0x66], raw[0x67]]);
    let crc = inode(seed, ino, generation, raw).to_le_bytes();
    raw[INODE_CSUM_LO_AT..INODE_CSUM_LO_AT + 2].copy_from_slice(&crc[..2]);
    if inode_has_hi(raw) {
        raw[INODE_CSUM_HI_AT..INODE_CSUM_HI_AT + 2].copy_from_slice(&crc[2..]);
    }
}

/// Where the checksum of an extent block lies: right after `eh_max` entries. `None` when that is outside the block.
pub fn extent_tail_at(block: &[u8]) -> Option<usize> {
    let max = usize::from(u16::from_le_bytes([*block.get(4)?, *block.get(5)?]));
    let at = 12 + 12 * max;
    (at + 4 <= block.len()).then_some(at)
}

/// Of an extent block; `inode_seed` from [`inode_seed`]. `None` when `eh_max` points outside the block.
pub fn extent_block(inode_seed: u32, block: &[u8]) -> Option<u32> {
    Some(update(inode_seed, &block[..extent_tail_at(block)?]))
}

/// Writes the checksum of an extent block.
pub fn set_extent_block(inode_seed: u32, block: &mut [u8]) {
    if let Some(at) = extent_tail_at(block) {
        let crc = update(inode_seed, &block[..at]);
        block[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Of a directory leaf block, over all but its tail.
pub fn dir_leaf(inode_seed: u32, block: &[u8]) -> u32 {
    update(inode_seed, &block[..block.len() - DIR_TAIL_SIZE])
}

/// Whether a directory leaf block ends with a checksum tail: an unused entry of 12 bytes with the file type 0xde.
pub fn has_dir_tail(block: &[u8]) -> bool {
    block.len() > DIR_TAIL_SIZE && block[block.len() - DIR_TAIL_SIZE..][..8] == [0, 0, 0, 0, 12, 0, 0, 0xde]
}

/// Writes the tail of a directory leaf block: the fake entry and the checksum.
pub fn set_dir_leaf(inode_seed: u32, block: &mut [u8]) {
    let crc = dir_leaf(inode_seed, block);
    let at = block.len() - DIR_TAIL_SIZE;
    block[at..at + 8].copy_from_slice(&[0, 0, 0, 0, 12, 0, 0, 0xde]);
    block[at + 8..].copy_from_slice(&crc.to_le_bytes());
}

/// Of an htree root (`count_at` 0x20) or inner node (`count_at` 8): over `count` entries and the tail with its checksum as zero. The tail (4
/// reserved bytes, then the checksum) lies after `limit` entries. `None` when count or limit don't fit the block.
pub fn dx_block(inode_seed: u32, block: &[u8], count_at: usize) -> Option<u32> {
    let (used, tail) = dx_span(block, count_at)?;
    let mut crc = update(inode_seed, &block[..used]);
    crc = update(crc, &block[tail..tail + 4]);
    Some(update(crc, &[0; 4]))
}

/// Writes the checksum of an htree root or node.
pub fn set_dx_block(inode_seed: u32, block: &mut [u8], count_at: usize) {
    if let (Some(crc), Some((_, tail))) = (dx_block(inode_seed, block, count_at), dx_span(block, count_at)) {
        block[tail + 4..tail + 8].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Where the used entries end and where the tail starts.
pub fn dx_span(block: &[u8], count_at: usize) -> Option<(usize, usize)> {
    let number = |at: usize| Some(usize::from(u16::from_le_bytes([*block.get(at)?, *block.get(at + 1)?])));
    let (limit, count) = (number(count_at)?, number(count_at + 2)?);
    let tail = count_at + 8 * limit;
    (count <= limit && tail + 8 <= block.len()).then_some((count_at + 8 * count, tail))
}

/// Of an xattr block that lies at physical block `number`: the value of `h_checksum`.
pub fn xattr_block(seed: u32, number: u64, block: &[u8]) -> u32 {
    let mut crc = update(seed, &number.to_le_bytes());
    crc = update(crc, &block[..XATTR_CSUM_AT]);
    crc = update(crc, &[0; 4]);
    update(crc, &block[XATTR_CSUM_AT + 4..])
}

/// Writes the checksum of an xattr block.
pub fn set_xattr_block(seed: u32, number: u64, block: &mut [u8]) {
    let crc = xattr_block(seed, number, block);
    block[XATTR_CSUM_AT..XATTR_CSUM_AT + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Of a block of the orphan file at physical block `number`: over all but its tail (magic, checksum), whose last four bytes it is.
pub fn orphan_block(inode_seed: u32, number: u64, block: &[u8]) -> u32 {
    update(update(inode_seed, &number.to_le_bytes()), &block[..block.len() - 8])
}

/// Of the journal's superblock (1024 bytes) with checksum version 2 or 3: the value of `s_checksum`, big-endian on disk. Needs no seed.
pub fn journal_superblock(raw: &[u8]) -> u32 {
    let mut crc = update(!0, &raw[..JOURNAL_CSUM_AT]);
    crc = update(crc, &[0; 4]);
    update(crc, &raw[JOURNAL_CSUM_AT + 4..1024])
}

/// CRC-16 (polynomial 0x8005 reflected, as the kernel's `lib/crc16.c`).
fn crc16(mut crc: u16, data: &[u8]) -> u16 {
    for byte in data {
        crc = (crc >> 8) ^ CRC16_TABLE[usize::from((crc ^ u16::from(*byte)) & 0xff)];
    }
    crc
}

const CRC16_TABLE: [u16; 256] = crc16_table();

const fn crc16_table() -> [u16; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u16;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xa001 } else { crc >> 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crcs_match_their_published_check_values() {
        // Catalogue of parametrised CRC algorithms: CRC-32/ISCSI and CRC-16/ARC (which starts from 0).
        assert_eq!(!update(!0, b"123456789"), 0xe306_9283);
        assert_eq!(crc16(0, b"123456789"), 0xbb3d);
    }

    #[test]
    fn updating_in_pieces_is_updating_at_once() {
        let data: Vec<u8> = (0..=255).collect();
        assert_eq!(update(update(7, &data[..100]), &data[100..]), update(7, &data));
    }

    #[test]
    fn tails_outside_the_block_are_refused() {
        let mut block = vec![0; 1024];
        block[4..6].copy_from_slice(&u16::MAX.to_le_bytes());
        assert_eq!(extent_tail_at(&block), None);
        block[8..10].copy_from_slice(&u16::MAX.to_le_bytes());
        assert_eq!(dx_span(&block, 8), None);
        assert_eq!(dx_span(&block, 1023), None);
    }
}
