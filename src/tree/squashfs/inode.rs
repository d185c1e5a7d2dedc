//! Inodes: fourteen kinds, seven of which only have wider fields than the other seven.

use super::{
    super::{EntryKind, archive::Limits},
    Checked, Refusal,
    data::Content,
    table::{Cursor, Fields, Image, Stored},
};

/// An inode without extended attributes, and a file without a fragment.
pub(super) const NONE: u32 = u32::MAX;
/// Longest target of a symlink.
const TARGET_LEN_MAX: usize = 4095;
/// Blocks of one file: 2 TiB in the usual blocks of 128 KiB, 64 GiB in the smallest. Their sizes are held in memory.
const BLOCKS_MAX: u64 = 16 << 20;

/// Where the names of a directory are.
#[derive(Debug)]
pub(super) struct Listing {
    pub block: u32,
    pub offset: u16,
    pub len: u32,
}

/// What an inode is.
#[derive(Debug)]
pub(super) enum InodeKind {
    Directory(Listing),
    File(Content),
    /// Everything without content.
    Other(EntryKind),
}

/// An inode.
#[derive(Debug)]
pub(super) struct Inode {
    pub mode: u16,
    /// Numbers in the table of owners.
    pub owner: u16,
    pub group: u16,
    pub mtime: u32,
    /// Names that it has; 1 where the kind has no room for it.
    pub links: u32,
    /// Number of its extended attributes, or [`NONE`].
    pub xattrs: u32,
    pub kind: InodeKind,
}

impl Inode {
    /// Reads the inode at a reference.
    pub fn read(image: &mut Image<'_>, reference: u64, limits: &Limits) -> Checked<Inode> {
        let mut cursor = image.inode_cursor(reference)?;
        let header = image.take_array::<16>(&mut cursor)?;
        let mut fields = Fields(&header);
        let (kind, mode, owner, group, mtime) = (fields.u16()?, fields.u16()?, fields.u16()?, fields.u16()?, fields.u32()?);
        let at = &mut cursor;
        let (links, xattrs, kind) = match kind {
            1 => directory(image, at)?,
            8 => wide_directory(image, at)?,
            2 => file(image, at, limits)?,
            9 => wide_file(image, at, limits)?,
            3 | 10 => symlink(image, at, kind == 10)?,
            4 | 5 | 11 | 12 => device(image, at, kind)?,
            6 | 7 | 13 | 14 => {
                let bytes = image.take_array::<4>(at)?;
                let links = u32::from_le_bytes(bytes);
                let xattrs = wide_xattrs(image, at, kind > 7)?;
                (links, xattrs, InodeKind::Other(if matches!(kind, 6 | 13) { EntryKind::Fifo } else { EntryKind::Socket }))
            }
            other => return Err(Refusal::corrupt(format!("an inode of kind {other}"))),
        };
        Ok(Inode { mode, owner, group, mtime, links, xattrs, kind })
    }
}

type Parts = (u32, u32, InodeKind);

fn wide_xattrs(image: &mut Image<'_>, at: &mut Cursor, is_wide: bool) -> Checked<u32> {
    if is_wide { Ok(u32::from_le_bytes(image.take_array(at)?)) } else { Ok(NONE) }
}

/// The lengths of directories count three bytes for `.` and `..`, which are not stored.
fn listing(block: u32, offset: u16, len: u32) -> InodeKind {
    InodeKind::Directory(Listing { block, offset, len: len.saturating_sub(3) })
}

fn directory(image: &mut Image<'_>, at: &mut Cursor) -> Checked<Parts> {
    let bytes = image.take_array::<16>(at)?;
    let mut fields = Fields(&bytes);
    let (block, links, len, offset) = (fields.u32()?, fields.u32()?, fields.u16()?, fields.u16()?);
    Ok((links, NONE, listing(block, offset, u32::from(len))))
}

fn wide_directory(image: &mut Image<'_>, at: &mut Cursor) -> Checked<Parts> {
    let bytes = image.take_array::<24>(at)?;
    let mut fields = Fields(&bytes);
    let (links, len, block, _parent, _index, offset, xattrs) =
        (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?, fields.u16()?, fields.u16()?, fields.u32()?);
    Ok((links, xattrs, listing(block, offset, len)))
}

fn file(image: &mut Image<'_>, at: &mut Cursor, limits: &Limits) -> Checked<Parts> {
    let bytes = image.take_array::<16>(at)?;
    let mut fields = Fields(&bytes);
    let (start, fragment, offset, size) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
    let content = content(image, at, limits, u64::from(start), u64::from(size), (fragment, offset))?;
    Ok((1, NONE, InodeKind::File(content)))
}

fn wide_file(image: &mut Image<'_>, at: &mut Cursor, limits: &Limits) -> Checked<Parts> {
    let bytes = image.take_array::<40>(at)?;
    let mut fields = Fields(&bytes);
    let (start, size, _sparse) = (fields.u64()?, fields.u64()?, fields.u64()?);
    let (links, fragment, offset, xattrs) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
    let content = content(image, at, limits, start, size, (fragment, offset))?;
    Ok((links, xattrs, InodeKind::File(content)))
}

fn content(image: &mut Image<'_>, at: &mut Cursor, limits: &Limits, start: u64, size: u64, (fragment, offset): (u32, u32)) -> Checked<Content> {
    if size > limits.file_bytes {
        return Err(Refusal::limit(format!("the file has {size} bytes, the limit is {}", limits.file_bytes)));
    }
    let block_len = u64::from(image.block_len());
    let count = if fragment == NONE { size.div_ceil(block_len) } else { size / block_len };
    if count > BLOCKS_MAX {
        return Err(Refusal::limit(format!("the file has {count} blocks, the limit is {BLOCKS_MAX}")));
    }
    let mut blocks = Vec::new();
    let mut place = start;
    for _ in 0..count {
        let word = u32::from_le_bytes(image.take_array(at)?);
        let stored = Stored { offset: place, word };
        place = place.checked_add(u64::from(stored.len())).ok_or_else(|| Refusal::corrupt("a block is nowhere"))?;
        blocks.push(stored);
    }
    let tail = (fragment != NONE && !size.is_multiple_of(block_len)).then_some((fragment, offset));
    Ok(Content { size, block_len, blocks, tail })
}

fn symlink(image: &mut Image<'_>, at: &mut Cursor, is_wide: bool) -> Checked<Parts> {
    let bytes = image.take_array::<8>(at)?;
    let mut fields = Fields(&bytes);
    let (links, len) = (fields.u32()?, fields.u32()? as usize);
    if !(1..=TARGET_LEN_MAX).contains(&len) {
        return Err(Refusal::corrupt(format!("a symlink target of {len} bytes: 1 to {TARGET_LEN_MAX} are allowed")));
    }
    let mut target = vec![0; len];
    image.take(at, &mut target)?;
    if target.contains(&0) {
        return Err(Refusal::corrupt("a symlink target with a NUL in it"));
    }
    let xattrs = wide_xattrs(image, at, is_wide)?;
    Ok((links, xattrs, InodeKind::Other(EntryKind::Symlink { target })))
}

fn device(image: &mut Image<'_>, at: &mut Cursor, kind: u16) -> Checked<Parts> {
    let bytes = image.take_array::<8>(at)?;
    let mut fields = Fields(&bytes);
    let (links, device) = (fields.u32()?, fields.u32()?);
    // include/linux/kdev_t.h, new_decode_dev.
    let (major, minor) = ((device >> 8) & 0xfff, (device & 0xff) | ((device >> 12) & 0xf_ff00));
    let xattrs = wide_xattrs(image, at, kind > 7)?;
    let kind = if matches!(kind, 4 | 11) { EntryKind::BlockDevice { major, minor } } else { EntryKind::CharDevice { major, minor } };
    Ok((links, xattrs, InodeKind::Other(kind)))
}
