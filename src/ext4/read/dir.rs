//! Directories: entries of leaf blocks, and lookup by hash in indexed ones.

use std::sync::Arc;

use super::{Image, Node, Sums};
use crate::{
    error::Result,
    ext4::{
        csum,
        hash::DirHasher,
        layout::{
            compat, corrupt,
            dir::{DX_NODE_COUNT_AT, DX_ROOT_COUNT_AT, DirEntry, DxRootInfo, TAIL_SIZE, decode_rec_len, dx_count_limit, dx_entry, read_tail},
            get_u16, get_u32,
            inode::flags,
        },
    },
};

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirItem {
    /// The name; never `.` or `..`.
    pub name: Vec<u8>,
    /// Its inode.
    pub ino: u32,
    /// The file type as the entry has it (see `layout::dir::file_type`), 0 when the filesystem does not store types.
    pub file_type: u8,
}

/// Where a name was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) ino: u32,
    /// The block on disk.
    pub(crate) block: u64,
    /// Byte of the entry in it.
    pub(crate) at: usize,
    /// Byte of the entry before it in the same block, if any.
    pub(crate) before: Option<usize>,
}

/// One level on the way from an index's root to a leaf.
#[derive(Debug, Clone)]
pub(crate) struct DxFrame {
    /// The index block on disk.
    pub(crate) block: u64,
    /// Where its count and limit are.
    pub(crate) count_at: usize,
    /// The entry that was followed.
    pub(crate) pos: usize,
    /// Entries in use.
    pub(crate) count: usize,
    /// Entries there is room for.
    pub(crate) limit: usize,
}

/// Gets position, position before, and entry; ends the walk by returning something.
pub(crate) type EntryVisitor<'a, T> = dyn FnMut(usize, Option<usize>, &DirEntry<'_>) -> Option<T> + 'a;

/// Where the entries of a leaf block end: before the checksum tail, if there is one.
pub(crate) fn leaf_end(block: &[u8], sums: Sums) -> usize {
    if sums == Sums::Metadata && read_tail(block).is_some() { block.len() - TAIL_SIZE } else { block.len() }
}

impl Image {
    /// Whether a directory has an index that this filesystem uses.
    pub(crate) fn is_indexed(&self, dir: &Node) -> bool {
        dir.inode.flags & flags::INDEX != 0 && self.sb.has_compat(compat::DIR_INDEX)
    }

    /// Blocks of a directory, from its size.
    pub(crate) fn dir_blocks(&self, dir: &Node) -> Result<u32> {
        let object = || format!("directory inode {}", dir.ino);
        if !dir.inode.is_dir() {
            return Err(corrupt(object(), "is not a directory"));
        }
        let size = u64::from(self.geo.block_size);
        let blocks = dir.inode.size / size;
        if dir.inode.size == 0 || !dir.inode.size.is_multiple_of(size) || blocks > self.geo.blocks_count {
            return Err(corrupt(object(), format!("has {} bytes", dir.inode.size)));
        }
        u32::try_from(blocks).map_err(|_| corrupt(object(), format!("has {blocks} blocks")))
    }

    /// A block of a directory: its number on disk and its bytes, the checksum (of a leaf, root or node) verified.
    pub(crate) fn dir_block(&self, dir: &Node, logical: u32) -> Result<(u64, Arc<[u8]>)> {
        let object = || format!("directory inode {}, block {logical}", dir.ino);
        let (number, written) = self.map_block(dir, logical)?.ok_or_else(|| corrupt(object(), "is a hole"))?;
        if !written || logical >= self.dir_blocks(dir)? {
            return Err(corrupt(object(), "is not written"));
        }
        let block = self.block(number)?;
        if self.sums == Sums::Metadata {
            let seed = self.inode_seed(dir);
            match self.dx_kind(dir, logical, &block) {
                Some(count_at) => {
                    let (limit, _) = dx_count_limit(&block, count_at).map_err(|error| corrupt(object(), error.message().to_owned()))?;
                    let tail = count_at + usize::from(limit) * 8;
                    let sum = csum::dx_block(seed, &block, count_at).ok_or_else(|| corrupt(object(), "has no room for its index checksum"))?;
                    self.verify(object, || (get_u32(&block, tail + 4), sum))?;
                }
                None => {
                    let stored = read_tail(&block).ok_or_else(|| corrupt(object(), "has no checksum"))?;
                    self.verify(object, || (stored, csum::dir_leaf(seed, &block)))?;
                }
            }
        }
        Ok((number, block))
    }

    /// For a block of the index, where its count and limit are; nothing for a leaf. An inner node hides behind one empty entry that spans the
    /// block, which a leaf with a checksum tail can't have and a leaf without one has only when it is empty; then the limit tells.
    pub(crate) fn dx_kind(&self, dir: &Node, logical: u32, block: &[u8]) -> Option<usize> {
        if !self.is_indexed(dir) {
            return None;
        }
        if logical == 0 {
            return Some(DX_ROOT_COUNT_AT);
        }
        let spans = get_u32(block, 0) == 0 && block[6] == 0 && decode_rec_len(get_u16(block, 4), self.geo.block_size) == block.len();
        let tail = if self.sums == Sums::Metadata { 8 } else { 0 };
        let full = (block.len() - DX_NODE_COUNT_AT - tail) / 8;
        (spans && usize::from(get_u16(block, DX_NODE_COUNT_AT)) == full).then_some(DX_NODE_COUNT_AT)
    }

    /// Calls `each` with position, position before, and entry of a leaf block (or of the root of an index: `.` and `..`) in order, free ones
    /// (inode 0) too, until it returns something.
    pub(crate) fn leaf_entries<T>(&self, dir: &Node, block: &[u8], each: &mut EntryVisitor<'_, T>) -> Result<Option<T>> {
        let end = leaf_end(block, self.sums);
        let (mut at, mut before) = (0, None);
        while at < end {
            let entry = DirEntry::parse(block, at).map_err(|error| corrupt(format!("directory inode {}", dir.ino), error.message().to_owned()))?;
            if at + entry.rec_len > end {
                return Err(corrupt(format!("directory inode {}", dir.ino), format!("entry at byte {at} runs over the end of its block")));
            }
            if let Some(value) = each(at, before, &entry) {
                return Ok(Some(value));
            }
            before = Some(at);
            at += entry.rec_len;
        }
        Ok(None)
    }

    /// Looks a name up.
    pub(crate) fn dir_find(&self, dir: &Node, name: &[u8]) -> Result<Option<Found>> {
        if self.is_indexed(dir) && name != b"." && name != b".." {
            return self.dx_find(dir, name);
        }
        for logical in 0..self.dir_blocks(dir)? {
            let (number, block) = self.dir_block(dir, logical)?;
            if let Some(found) = self.leaf_find(dir, number, &block, name)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn leaf_find(&self, dir: &Node, number: u64, block: &[u8], name: &[u8]) -> Result<Option<Found>> {
        self.leaf_entries(dir, block, &mut |at, before, entry| {
            (entry.inode != 0 && entry.name == name).then_some(Found { ino: entry.inode, block: number, at, before })
        })
    }

    /// Reads the root of an index: the hasher, and the levels below the root.
    pub(crate) fn dx_root(&self, dir: &Node) -> Result<(DirHasher, u8)> {
        let (_, root) = self.dir_block(dir, 0)?;
        let object = || format!("index of directory inode {}", dir.ino);
        let info = DxRootInfo::parse(&root).map_err(|error| corrupt(object(), error.message().to_owned()))?;
        if info.indirect_levels > self.dx_levels_max() {
            return Err(corrupt(object(), format!("has {} levels", info.indirect_levels)));
        }
        let hasher = self.hasher(info.hash_version).ok_or_else(|| corrupt(object(), format!("has hash version {}", info.hash_version)))?;
        Ok((hasher, info.indirect_levels))
    }

    /// Walks the index from the root to the leaf that `hash` belongs to: the frames, and the leaf's file block.
    pub(crate) fn dx_probe(&self, dir: &Node, levels: u8, hash: u32) -> Result<(Vec<DxFrame>, u32)> {
        let (mut frames, mut logical) = (Vec::new(), 0);
        for level in 0..=levels {
            let (number, block) = self.dir_block(dir, logical)?;
            let count_at = if level == 0 { DX_ROOT_COUNT_AT } else { DX_NODE_COUNT_AT };
            let frame = self.dx_frame(dir, number, &block, count_at, |index| dx_entry(&block, count_at, index).0 <= hash)?;
            logical = self.dx_child(dir, &block, &frame)?;
            frames.push(frame);
        }
        Ok((frames, logical))
    }

    fn dx_frame(&self, dir: &Node, block: u64, bytes: &[u8], count_at: usize, goes_right: impl Fn(usize) -> bool) -> Result<DxFrame> {
        let (limit, count) =
            dx_count_limit(bytes, count_at).map_err(|error| corrupt(format!("directory inode {}", dir.ino), error.message().to_owned()))?;
        let (limit, count) = (usize::from(limit), usize::from(count));
        // Binary search for the last entry whose hash is not above; entry 0 has none and always qualifies.
        let (mut low, mut high) = (1, count);
        while low < high {
            let middle = low + (high - low) / 2;
            if goes_right(middle) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(DxFrame { block, count_at, pos: low - 1, count, limit })
    }

    /// The file block that a frame's entry points to. The upper bits of the number are reserved (`dx_get_block`).
    fn dx_child(&self, dir: &Node, block: &[u8], frame: &DxFrame) -> Result<u32> {
        let child = dx_entry(block, frame.count_at, frame.pos).1 & 0x0fff_ffff;
        if child == 0 || child >= self.dir_blocks(dir)? {
            return Err(corrupt(format!("index of directory inode {}", dir.ino), format!("points to block {child} of the directory")));
        }
        Ok(child)
    }

    fn dx_find(&self, dir: &Node, name: &[u8]) -> Result<Option<Found>> {
        let (hasher, levels) = self.dx_root(dir)?;
        let hash = hasher.hash(name);
        let (mut frames, mut leaf) = self.dx_probe(dir, levels, hash)?;
        // Names with one hash may go on in the next leaf; each step moves right, so there are at most as many as the directory has blocks.
        loop {
            let (number, block) = self.dir_block(dir, leaf)?;
            if let Some(found) = self.leaf_find(dir, number, &block, name)? {
                return Ok(Some(found));
            }
            match self.dx_next(dir, &mut frames, hash)? {
                Some(next) => leaf = next,
                None => return Ok(None),
            }
        }
    }

    /// The next leaf, if it continues names of the same hash.
    pub(crate) fn dx_next(&self, dir: &Node, frames: &mut [DxFrame], hash: u32) -> Result<Option<u32>> {
        let Some(level) = frames.iter().rposition(|frame| frame.pos + 1 < frame.count) else { return Ok(None) };
        frames[level].pos += 1;
        let block = self.block(frames[level].block)?;
        if dx_entry(&block, frames[level].count_at, frames[level].pos).0 & !1 != hash {
            return Ok(None);
        }
        let mut logical = self.dx_child(dir, &block, &frames[level])?;
        for frame in &mut frames[level + 1..] {
            let (number, block) = self.dir_block(dir, logical)?;
            *frame = DxFrame { pos: 0, ..self.dx_frame(dir, number, &block, DX_NODE_COUNT_AT, |_| false)? };
            logical = self.dx_child(dir, &block, frame)?;
        }
        Ok(Some(logical))
    }

    /// All names of a directory except `.` and `..`, in the order of its blocks.
    pub(crate) fn dir_items(&self, dir: &Node) -> Result<Vec<DirItem>> {
        let mut items = Vec::new();
        for logical in 0..self.dir_blocks(dir)? {
            let (_, block) = self.dir_block(dir, logical)?;
            if logical > 0 && self.dx_kind(dir, logical, &block).is_some() {
                continue;
            }
            self.leaf_entries(dir, &block, &mut |_, _, entry| {
                if entry.inode != 0 && entry.name != b"." && entry.name != b".." {
                    items.push(DirItem { name: entry.name.to_vec(), ino: entry.inode, file_type: entry.file_type });
                }
                None::<()>
            })?;
        }
        Ok(items)
    }
}
