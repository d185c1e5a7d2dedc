//! A block patch: the 4 KiB blocks of a disk that differ from its golden image.

use std::collections::BTreeMap;

use crate::units::PATCH_BLOCK;

/// Changed blocks of a filesystem region or a disk, by block number (byte offset / 4096), plus the new size.
///
/// Blocks are whole: the unchanged part of a block is filled from the golden. A patch is complete in itself; applying it twice is the same as
/// applying it once.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct BlockPatch {
    blocks: BTreeMap<u64, Box<[u8]>>,
    size_bytes: u64,
}

impl BlockPatch {
    /// An empty patch of something that ends up `size_bytes` long (a multiple of 4096).
    pub fn new(size_bytes: u64) -> Self {
        BlockPatch { blocks: BTreeMap::new(), size_bytes }
    }

    /// Size of the result in bytes, at least the golden's. What lies beyond the golden and is not in the patch reads as zeros.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Sets the size of the result.
    pub fn set_size_bytes(&mut self, size_bytes: u64) {
        self.size_bytes = size_bytes;
    }

    /// How many blocks it changes.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The new content of block `number`, if the patch changes it.
    pub fn get(&self, number: u64) -> Option<&[u8]> {
        self.blocks.get(&number).map(|block| &block[..])
    }

    /// Puts a whole block. Panics when `data` is not 4096 bytes: callers own the block size.
    pub fn insert(&mut self, number: u64, data: Box<[u8]>) {
        assert_eq!(data.len() as u64, PATCH_BLOCK, "a patch block has 4096 bytes");
        self.blocks.insert(number, data);
    }

    /// The blocks in ascending order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (u64, &[u8])> {
        self.blocks.iter().map(|(number, data)| (*number, &data[..]))
    }

    /// Runs of adjacent blocks: first block number and their contents, ascending.
    pub fn runs(&self) -> Vec<(u64, Vec<&[u8]>)> {
        let mut runs: Vec<(u64, Vec<&[u8]>)> = Vec::new();
        for (number, data) in self.iter() {
            match runs.last_mut() {
                Some((first, blocks)) if *first + blocks.len() as u64 == number => blocks.push(data),
                _ => runs.push((number, vec![data])),
            }
        }
        runs
    }

    /// Moves a filesystem's patch to where its region lies on the disk (`offset` a multiple of 4096) and merges it into this one.
    pub fn merge_at(&mut self, offset: u64, inner: BlockPatch) {
        assert!(offset.is_multiple_of(PATCH_BLOCK), "regions are aligned to 4096");
        self.blocks.extend(inner.blocks.into_iter().map(|(number, data)| (number + offset / PATCH_BLOCK, data)));
    }
}

impl std::fmt::Debug for BlockPatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockPatch({} blocks, size {})", self.blocks.len(), self.size_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_neighbours_and_merge_moves() {
        let mut inner = BlockPatch::new(1 << 20);
        for number in [1, 2, 5] {
            inner.insert(number, vec![number as u8; 4096].into());
        }
        let mut disk = BlockPatch::new(2 << 20);
        disk.merge_at(8192, inner);
        let runs: Vec<(u64, usize)> = disk.runs().iter().map(|(first, blocks)| (*first, blocks.len())).collect();
        assert_eq!(runs, [(3, 2), (7, 1)]);
        assert_eq!(disk.get(7).map(|block| block[0]), Some(5));
    }
}
