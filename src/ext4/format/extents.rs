//! The extent tree of a new file: up to four extents in the inode, else full leaves and as many index levels as they need.

use super::{Blocks, Writer, no_space, shape::Run};
use crate::{
    error::Result,
    ext4::{
        csum,
        layout::{
            BLOCK_SIZE,
            extent::{Extent, ExtentHeader, ExtentIndex, LEN_MAX, ROOT_MAX, block_max},
            inode::BLOCK_LEN,
        },
    },
};

/// What the inode gets.
pub struct Root {
    /// `i_block`.
    pub block: [u8; BLOCK_LEN],
    /// Blocks of the tree outside the inode.
    pub tree_blocks: u64,
}

/// Builds the tree of the ascending `runs`; blocks outside the inode are taken from `blocks` and written. With `inode_seed` they get checksums.
pub fn build(runs: &[Run], inode_seed: Option<u32>, blocks: &mut Blocks, writer: &mut Writer) -> Result<Root> {
    let mut root = Root { block: [0; BLOCK_LEN], tree_blocks: 0 };
    let extents = join(runs);
    if extents.len() <= usize::from(ROOT_MAX) {
        put_node(&mut root.block, 0, ROOT_MAX, extents.len(), |node, i| extents[i].put(node, i));
        return Ok(root);
    }
    let per_block = usize::from(block_max(BLOCK_SIZE));
    let mut node = vec![0; BLOCK_SIZE as usize];
    let mut write = |depth: u16, first: u32, count: usize, put: &dyn Fn(&mut [u8], usize)| -> Result<ExtentIndex> {
        let leaf = blocks.take(1).ok_or_else(|| no_space("an extent block", 1, 0))?.start;
        node.fill(0);
        put_node(&mut node, depth, per_block as u16, count, put);
        if let Some(seed) = inode_seed {
            csum::set_extent_block(seed, &mut node);
        }
        root.tree_blocks += 1;
        writer.put_at(leaf * u64::from(BLOCK_SIZE), &node)?;
        Ok(ExtentIndex { block: first, leaf })
    };
    let mut level = Vec::new();
    for part in extents.chunks(per_block) {
        level.push(write(0, part[0].block, part.len(), &|node, i| part[i].put(node, i))?);
    }
    let mut depth = 1;
    while level.len() > usize::from(ROOT_MAX) {
        let mut above = Vec::new();
        for part in level.chunks(per_block) {
            above.push(write(depth, part[0].block, part.len(), &|node, i| part[i].put(node, i))?);
        }
        (level, depth) = (above, depth + 1);
    }
    put_node(&mut root.block, depth, ROOT_MAX, level.len(), |node, i| level[i].put(node, i));
    Ok(root)
}

fn put_node(node: &mut [u8], depth: u16, max: u16, entries: usize, put: impl Fn(&mut [u8], usize)) {
    ExtentHeader { entries: entries as u16, max, depth, generation: 0 }.write(node);
    for i in 0..entries {
        put(node, i);
    }
}

/// Extents of at most 32768 blocks from runs; runs that continue each other in the file and on disk become one.
fn join(runs: &[Run]) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for run in runs {
        let (mut block, mut start, mut left) = (run.logical, run.start, run.len);
        while left > 0 {
            let room = match extents.last_mut() {
                Some(last) if last.block + last.len == block && last.start + u64::from(last.len) == start && last.len < LEN_MAX => {
                    let len = left.min(LEN_MAX - last.len);
                    last.len += len;
                    len
                }
                _ => {
                    let len = left.min(LEN_MAX);
                    extents.push(Extent { block, len, start, unwritten: false });
                    len
                }
            };
            left -= room;
            // Only advanced when something is left, so the last block number of a file can't overflow.
            if left > 0 {
                (block, start) = (block + room, start + u64::from(room));
            }
        }
    }
    extents
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_runs_join_and_long_ones_are_cut() {
        let runs = [Run { logical: 0, len: 3, start: 10 }, Run { logical: 3, len: 2, start: 13 }, Run { logical: 9, len: 70000, start: 15 }];
        let got: Vec<(u32, u32, u64)> = join(&runs).iter().map(|e| (e.block, e.len, e.start)).collect();
        assert_eq!(got, [(0, 5, 10), (9, 32768, 15), (32777, 32768, 32783), (65545, 4464, 65551)]);
    }
}
