//! Contents: the data blocks of new files, slow symlinks and directories, appending, freeing.

use super::{Editor, no_space};
use crate::{
    error::Result,
    ext4::{
        layout::{
            extent::{Extent, LEN_MAX},
            incompat,
            inode::flags,
            ro_compat,
        },
        read::{Mapping, Node},
    },
};

/// A file of this size or more needs the large_file feature.
const LARGE_FILE_MIN: u64 = 1 << 31;

impl Editor {
    /// Chooses how a new inode maps its blocks: extents if the filesystem has them.
    pub(super) fn init_map(&mut self, node: &mut Node) -> Result<()> {
        if self.image.sb.has_incompat(incompat::EXTENTS) {
            self.write_extents(node, &[], Vec::new())?;
        }
        Ok(())
    }

    /// Appends bytes to a regular file, a new directory or a slow symlink. A partly filled last block is completed in place.
    pub(super) fn append(&mut self, node: &mut Node, content: &[u8]) -> Result<()> {
        if content.is_empty() {
            return Ok(());
        }
        let block_size = self.image.block_size() as u64;
        let size = node.inode.size;
        let new_size = size.saturating_add(content.len() as u64);
        // The kernel's EXT_MAX_BLOCKS: the last number is never used.
        let last = u32::try_from((new_size - 1) / block_size).ok().filter(|last| *last < u32::MAX);
        let last = last.ok_or_else(|| no_space(format!("inode {}", node.ino), "the file would get too large"))?;
        let mut mapping = self.image.mapping(node)?;
        self.trim(node, &mut mapping, size.div_ceil(block_size))?;
        let filled = (size % block_size) as usize;
        let head = if filled == 0 { 0 } else { content.len().min(block_size as usize - filled) };
        if head > 0 {
            self.complete_last(node, &mut mapping, (size / block_size) as u32, filled, &content[..head])?;
        }
        let mut logical = size.div_ceil(block_size) as u32;
        let mut chunks = content[head..].chunks(block_size as usize);
        while u64::from(logical) * block_size < new_size {
            let goal = self.goal(node, &mapping);
            let want = (last - logical).saturating_add(1).min(LEN_MAX);
            let (start, len) = self.alloc_run(goal, want)?;
            for (block, chunk) in (start..start + u64::from(len)).zip(&mut chunks) {
                self.put_block(block, chunk.to_vec());
            }
            self.count_blocks(node, len.into(), 0);
            self.add_run(node, &mut mapping, Extent { block: logical, len, start, unwritten: false })?;
            logical += len;
        }
        self.finish_map(node, mapping)?;
        node.inode.size = new_size;
        if new_size >= LARGE_FILE_MIN {
            self.image.sb.feature_ro_compat |= ro_compat::LARGE_FILE;
        }
        Ok(())
    }

    /// Puts `mapping` into the inode, if it has extents.
    fn finish_map(&mut self, node: &mut Node, mapping: Mapping) -> Result<()> {
        if node.inode.flags & flags::EXTENTS != 0 {
            self.write_extents(node, &mapping.runs, mapping.meta)?;
        }
        Ok(())
    }

    /// Frees what is allocated behind the end of the file (fallocate(2) with FALLOC_FL_KEEP_SIZE). Only extents can have that.
    fn trim(&mut self, node: &mut Node, mapping: &mut Mapping, blocks: u64) -> Result<()> {
        while let Some(run) = mapping.runs.last_mut()
            && node.inode.flags & flags::EXTENTS != 0
        {
            let keep = blocks.saturating_sub(run.block.into()).min(run.len.into()) as u32;
            if keep == run.len {
                break;
            }
            let (start, len) = (run.start + u64::from(keep), u64::from(run.len - keep));
            run.len = keep;
            if keep == 0 {
                mapping.runs.pop();
            }
            self.free_blocks(start, len)?;
            self.count_blocks(node, 0, len);
        }
        Ok(())
    }

    /// Fills up the last, partly filled block. A hole or an unwritten block there becomes a new block with zeros before the data.
    fn complete_last(&mut self, node: &mut Node, mapping: &mut Mapping, logical: u32, filled: usize, head: &[u8]) -> Result<()> {
        if let Some((number, true)) = self.image.map_block(node, logical)? {
            let block = self.block_mut(number)?;
            block[filled..filled + head.len()].copy_from_slice(head);
            block[filled + head.len()..].fill(0);
            return Ok(());
        }
        if mapping.end() > u64::from(logical) {
            self.trim(node, mapping, logical.into())?;
        }
        let goal = self.goal(node, mapping);
        let number = self.alloc_block(goal)?;
        let mut block = vec![0; filled];
        block.extend_from_slice(head);
        self.put_block(number, block);
        self.count_blocks(node, 1, 0);
        self.add_run(node, mapping, Extent { block: logical, len: 1, start: number, unwritten: false })
    }

    /// Where the next block of a file should be: behind its last one, else in the data part of its inode's group.
    fn goal(&self, node: &Node, mapping: &Mapping) -> u64 {
        match mapping.runs.last() {
            Some(run) => run.start + u64::from(run.len),
            None => self.image.geo.group_start(self.image.geo.inode_group(node.ino).0),
        }
    }

    /// Frees all blocks of a file, those of its map too.
    pub(super) fn free_content(&mut self, node: &Node) -> Result<()> {
        let mapping = self.image.mapping(node)?;
        for run in &mapping.runs {
            self.free_blocks(run.start, run.len.into())?;
        }
        for number in mapping.meta {
            self.free_blocks(number, 1)?;
        }
        Ok(())
    }
}
