//! Writing block maps: extent trees from a list of runs, and indirect blocks one pointer at a time.

use super::{Editor, no_space};
use crate::{
    error::Result,
    ext4::{
        csum,
        layout::{
            corrupt,
            extent::{ENTRY_SIZE, Extent, ExtentHeader, ExtentIndex, LEN_MAX, ROOT_MAX, block_max},
            get_u32,
            inode::{BLOCK_LEN, flags},
            put_u32,
        },
        read::{Mapping, Node, Sums},
    },
};

/// Entries of one level: first file block and node (or the extent itself at the bottom).
enum Level {
    Leaves(Vec<Extent>),
    Indexes(Vec<ExtentIndex>),
}

impl Level {
    fn len(&self) -> usize {
        match self {
            Level::Leaves(entries) => entries.len(),
            Level::Indexes(entries) => entries.len(),
        }
    }

    fn first_block(&self, i: usize) -> u32 {
        match self {
            Level::Leaves(entries) => entries[i].block,
            Level::Indexes(entries) => entries[i].block,
        }
    }

    /// Writes entries `from..to` as a node.
    fn write(&self, node: &mut [u8], from: usize, to: usize, max: u16, depth: u16) {
        ExtentHeader { entries: (to - from) as u16, max, depth, generation: 0 }.write(node);
        for i in from..to {
            match self {
                Level::Leaves(entries) => entries[i].put(node, i - from),
                Level::Indexes(entries) => entries[i].put(node, i - from),
            }
        }
    }
}

/// Without extents nothing can be allocated behind the end of a file.
fn check_free(node: &Node, pointer: u32) -> Result<()> {
    if pointer == 0 { Ok(()) } else { Err(corrupt(format!("inode {}", node.ino), format!("has block {pointer} behind its end"))) }
}

impl Editor {
    /// Makes `runs` the map of an inode with extents. Blocks of the old tree (`meta`) are used again, missing ones allocated, spare ones
    /// freed; `i_blocks` follows. The tree is always built anew: full leaves, as few levels as possible.
    pub(super) fn write_extents(&mut self, node: &mut Node, runs: &[Extent], meta: Vec<u64>) -> Result<()> {
        node.inode.flags |= flags::EXTENTS;
        let per_node = usize::from(block_max(self.image.geo.block_size));
        let seed = self.image.inode_seed(node);
        let goal = runs.first().map_or(0, |run| run.start);
        let (old, mut spare) = (meta.len() as u64, meta);
        let (mut depth, mut made) = (0, 0);
        let mut level = Level::Leaves(runs.to_vec());
        while level.len() > usize::from(ROOT_MAX) {
            let mut above = Vec::with_capacity(level.len().div_ceil(per_node));
            for from in (0..level.len()).step_by(per_node) {
                let number = if spare.is_empty() { self.alloc_block(goal)? } else { spare.remove(0) };
                made += 1;
                let mut block = vec![0; self.image.block_size()];
                level.write(&mut block, from, (from + per_node).min(level.len()), per_node as u16, depth);
                if self.image.sums == Sums::Metadata {
                    csum::set_extent_block(seed, &mut block);
                }
                self.put_block(number, block);
                above.push(ExtentIndex { block: level.first_block(from), leaf: number });
            }
            level = Level::Indexes(above);
            depth += 1;
        }
        node.inode.block = [0; BLOCK_LEN];
        level.write(&mut node.inode.block, 0, level.len(), ROOT_MAX, depth);
        debug_assert!((level.len() + 1) * ENTRY_SIZE <= BLOCK_LEN);
        for number in spare {
            self.free_blocks(number, 1)?;
        }
        self.count_blocks(node, made, old);
        Ok(())
    }

    /// Adds a written run behind all others of an inode, with extents or indirect blocks as the inode has.
    pub(super) fn add_run(&mut self, node: &mut Node, mapping: &mut Mapping, run: Extent) -> Result<()> {
        if node.inode.flags & flags::EXTENTS != 0 {
            mapping.push(run, LEN_MAX);
            return Ok(());
        }
        for i in 0..run.len {
            self.set_pointer(node, run.block + i, run.start + u64::from(i))?;
        }
        mapping.push(run, u32::MAX);
        Ok(())
    }

    /// Points one file block of an inode without extents to a disk block; indirect blocks on the way are made.
    fn set_pointer(&mut self, node: &mut Node, logical: u32, target: u64) -> Result<()> {
        let too_far = || no_space(format!("inode {}", node.ino), "the file or its block is out of reach of indirect blocks");
        let target = u32::try_from(target).map_err(|_| too_far())?;
        let (slot, path) = self.image.indirect_path(logical).ok_or_else(too_far)?;
        if path.is_empty() {
            check_free(node, get_u32(&node.inode.block, slot * 4))?;
            put_u32(&mut node.inode.block, slot * 4, target);
            return Ok(());
        }
        let mut here = u64::from(get_u32(&node.inode.block, slot * 4));
        if here == 0 {
            here = self.new_indirect(node, target)?;
            put_u32(&mut node.inode.block, slot * 4, here as u32);
        }
        for (depth, index) in path.iter().enumerate() {
            if depth + 1 == path.len() {
                let block = self.block_mut(here)?;
                check_free(node, get_u32(block, index * 4))?;
                put_u32(block, index * 4, target);
                break;
            }
            let next = u64::from(get_u32(&self.image.block(here)?, index * 4));
            here = if next == 0 {
                let made = self.new_indirect(node, target)?;
                put_u32(self.block_mut(here)?, index * 4, made as u32);
                made
            } else {
                next
            };
        }
        Ok(())
    }

    fn new_indirect(&mut self, node: &mut Node, goal: u32) -> Result<u64> {
        let number = self.alloc_block(goal.into())?;
        if number > u64::from(u32::MAX) {
            return Err(no_space(format!("inode {}", node.ino), "no block below 2^32 is free for an indirect block"));
        }
        self.put_block(number, Vec::new());
        self.count_blocks(node, 1, 0);
        Ok(number)
    }
}
