//! A new checksum seed: every structure that carries a checksum gets a new one.
//!
//! This is what `tune2fs -U` does on a filesystem with `metadata_csum` but without `metadata_csum_seed`. The patch then holds all inode-table
//! blocks in use, all directory blocks, extent nodes, xattr blocks and bitmaps: about 10 MiB for a Debian root filesystem of 13,000 inodes.
//! Each structure is read (and verified) under the old seed before it is written under the new one.

use std::collections::HashSet;

use super::{Editor, alloc::Bitmap};
use crate::{
    error::Result,
    ext4::{
        csum,
        layout::{
            compat, get_u16, get_u32,
            group::{BLOCK_UNINIT, INODE_UNINIT},
            inode::{GENERATION_AT, flags, mode},
            put_u32,
        },
        read::Node,
    },
};

impl Editor {
    /// Gives everything but descriptors and superblock, which commit writes, its checksum under `new_seed`.
    pub(super) fn resum(&mut self, new_seed: u32) -> Result<()> {
        let mut xattr_blocks = HashSet::new();
        for group in 0..self.image.geo.groups {
            let per_group = self.image.geo.inodes_per_group;
            let state = self.group(group)?;
            state.dirty = true;
            if state.desc.flags & BLOCK_UNINIT == 0 {
                state.blocks = Bitmap::Changed;
            }
            let mut used = 0;
            if state.desc.flags & INODE_UNINIT == 0 {
                state.inodes = Bitmap::Changed;
                used = per_group - state.desc.itable_unused;
            }
            let table = state.desc.inode_table;
            for index in 0..used {
                self.resum_inode(table, index, group * per_group + index + 1, new_seed, &mut xattr_blocks)?;
            }
        }
        self.image.seed = new_seed;
        Ok(())
    }

    fn resum_inode(&mut self, table: u64, index: u32, ino: u32, new_seed: u32, xattr_blocks: &mut HashSet<u64>) -> Result<()> {
        let (number, at) = self.image.geo.inode_location(table, index);
        let size = usize::from(self.image.geo.inode_size);
        let block = self.image.block(number)?;
        let raw = &block[at..at + size];
        if raw.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        let in_use = get_u16(raw, 0) & mode::TYPE != 0 && get_u16(raw, 0x1a) != 0;
        if in_use {
            let node = self.image.node(ino)?;
            self.resum_content(&node, new_seed)?;
            let xattr_block = node.inode.file_acl;
            if xattr_block != 0 && xattr_blocks.insert(xattr_block) {
                self.image.block_xattrs(&node)?;
                csum::set_xattr_block(new_seed, xattr_block, self.block_mut(xattr_block)?);
            }
        }
        csum::set_inode(new_seed, ino, &mut self.block_mut(number)?[at..at + size]);
        Ok(())
    }

    /// Extent nodes, directory blocks and blocks of the orphan file.
    fn resum_content(&mut self, node: &Node, new_seed: u32) -> Result<()> {
        let seed = csum::inode_seed(new_seed, node.ino, get_u32(&node.raw, GENERATION_AT));
        let orphans = self.image.sb.has_compat(compat::ORPHAN_FILE) && self.image.sb.orphan_file_inum == node.ino;
        if node.inode.flags & flags::EXTENTS == 0 && !node.inode.is_dir() && !orphans {
            return Ok(());
        }
        let mapping = self.image.mapping(node)?;
        // Read, and verified, before the map's own checksums change.
        let mut leaves = Vec::new();
        if node.inode.is_dir() {
            for logical in 0..self.image.dir_blocks(node)? {
                let (number, block) = self.image.dir_block(node, logical)?;
                leaves.push((number, self.image.dx_kind(node, logical, &block)));
            }
        }
        for (number, kind) in leaves {
            let block = self.block_mut(number)?;
            match kind {
                Some(count_at) => csum::set_dx_block(seed, block, count_at),
                None => csum::set_dir_leaf(seed, block),
            }
        }
        if orphans {
            for run in &mapping.runs {
                for number in run.start..run.start + u64::from(run.len) {
                    let block = self.block_mut(number)?;
                    let (sum, at) = (csum::orphan_block(seed, number, block), block.len() - 4);
                    put_u32(block, at, sum);
                }
            }
        }
        if node.inode.flags & flags::EXTENTS != 0 {
            for number in mapping.meta {
                csum::set_extent_block(seed, self.block_mut(number)?);
            }
        }
        Ok(())
    }
}
