//! Growing: the last group is completed, groups are added, the descriptor table moves into its reserved blocks.
//!
//! The outcome is what resize2fs(8) and the kernel's online resize leave: `plan` decides the new shape and refuses what does not fit, `place`
//! puts the new groups' bitmaps and inode tables (per flexible group in its first new group; without flex_bg in each group), `reserved` takes
//! descriptor blocks from the resize inode, frees those that nobody will need and enters the new backups there, commit writes all backups. New groups are uninitialised where the
//! filesystem has descriptor checksums, so that they cost a descriptor each and nothing else: beyond the golden everything reads as zeros.

mod place;
mod plan;
mod reserved;

use super::{
    Backups, Editor,
    alloc::{Bitmap, Group, clear_bits, set_bits},
};
use crate::{
    error::Result,
    ext4::layout::group::{BLOCK_UNINIT, GroupDesc, INODE_UNINIT, INODE_ZEROED},
};
use place::Placed;
use plan::Plan;

/// Bytes read at once when looking for rubbish where an inode table goes.
const SCAN_BYTES: usize = 64 * 1024;

impl Editor {
    /// Grows the filesystem to `size_bytes`, rounded down to whole blocks and, when a last group would be too small to be useful, to the end
    /// of the group before it (resize2fs does the same). Nothing happens when it is that large already.
    pub(super) fn grow(&mut self, size_bytes: u64) -> Result<()> {
        let Some(plan) = plan::plan(&self.image, size_bytes)? else { return Ok(()) };
        let old = self.image.geo.clone();
        let old_last = old.groups - 1;
        let old_len = old.group_blocks(old_last);
        self.enter_shape(&plan);
        self.trim_reserved(&old)?;
        self.extend_last(old_last, old_len)?;
        if plan.gdt_blocks > old.gdt_blocks || plan.groups > old.groups {
            self.take_reserved(&old)?;
        }
        for index in old.gdt_blocks..plan.gdt_blocks {
            self.put_block(u64::from(old.first_data_block) + 1 + u64::from(index), Vec::new());
        }
        let placed = place::place(&self.image.geo, old.groups)?;
        for (group, placed) in (old.groups..plan.groups).zip(&placed) {
            self.add_group(group, placed)?;
        }
        self.backups = Backups::Tables;
        Ok(())
    }

    /// Makes geometry and superblock those of the grown filesystem, except the free counts, which follow group by group.
    fn enter_shape(&mut self, plan: &Plan) {
        let (geo, sb) = (&mut self.image.geo, &mut self.image.sb);
        let reserved = u128::from(sb.r_blocks_count()) * u128::from(plan.blocks_count) / u128::from(geo.blocks_count);
        sb.set_r_blocks_count(reserved as u64);
        sb.set_blocks_count(plan.blocks_count);
        sb.inodes_count = plan.groups * geo.inodes_per_group;
        geo.reserved_gdt_blocks -= plan.gdt_blocks - geo.gdt_blocks;
        sb.reserved_gdt_blocks = geo.reserved_gdt_blocks as u16;
        geo.blocks_count = plan.blocks_count;
        geo.groups = plan.groups;
        geo.gdt_blocks = plan.gdt_blocks;
    }

    /// Frees the blocks that the old last group gains.
    fn extend_last(&mut self, group: u32, old_len: u32) -> Result<()> {
        let gained = self.image.geo.group_blocks(group) - old_len;
        if gained == 0 {
            return Ok(());
        }
        let uninit = self.image.has_uninit();
        let state = self.group(group)?;
        if !(uninit && state.desc.flags & BLOCK_UNINIT != 0) {
            let number = self.block_bitmap(group)?;
            clear_bits(self.block_mut(number)?, old_len, gained);
            self.group(group)?.blocks = Bitmap::Changed;
        }
        let state = self.group(group)?;
        state.desc.free_blocks += gained;
        state.dirty = true;
        self.count_free(gained, 0);
        Ok(())
    }

    /// Adds a new group with its metadata where it was placed.
    fn add_group(&mut self, group: u32, placed: &Placed) -> Result<()> {
        let geo = &self.image.geo;
        let (blocks, inodes, last) = (geo.group_blocks(group), geo.inodes_per_group, group + 1 == geo.groups);
        let (table, table_blocks) = (placed.inode_table, u64::from(geo.itable_blocks()));
        let mut desc = GroupDesc {
            block_bitmap: placed.block_bitmap,
            inode_bitmap: placed.inode_bitmap,
            inode_table: placed.inode_table,
            free_blocks: blocks - placed.used,
            free_inodes: inodes,
            ..GroupDesc::default()
        };
        let mut state = Group { desc, dirty: true, blocks: Bitmap::Changed, inodes: Bitmap::Changed };
        if self.image.has_uninit() {
            desc.flags = INODE_UNINIT | INODE_ZEROED;
            desc.itable_unused = inodes;
            state.inodes = Bitmap::Unread;
            // mke2fs and resize2fs always initialise the last group's bitmap: its end has to be marked.
            if !placed.hosts_others && !last {
                desc.flags |= BLOCK_UNINIT;
                state.blocks = Bitmap::Unread;
            }
        } else {
            let bits = self.fresh_inode_bitmap();
            self.put_block(desc.inode_bitmap, bits);
        }
        if state.blocks == Bitmap::Changed {
            let mut bits = vec![0; self.image.block_size()];
            let all = bits.len() as u32 * 8;
            set_bits(&mut bits, 0, placed.used);
            set_bits(&mut bits, blocks, all - blocks);
            self.put_block(desc.block_bitmap, bits);
        }
        state.desc = desc;
        self.groups.insert(group, state);
        self.put_desc(group)?;
        self.zero_table(table, table_blocks)?;
        self.count_free(desc.free_blocks, inodes);
        if self.image.sb.overhead_clusters != 0 {
            let overhead = u64::from(self.image.geo.base_blocks_in(group)) + 2 + table_blocks;
            self.image.sb.overhead_clusters = self.image.sb.overhead_clusters.saturating_add(overhead as u32);
        }
        Ok(())
    }

    /// An inode table must read as zeros. Behind the golden's region it does; in the part of the region that the filesystem did not use so far
    /// there could be anything, and what is not zero there is overwritten.
    fn zero_table(&mut self, start: u64, blocks: u64) -> Result<()> {
        let block_size = self.image.block_size() as u64;
        let inside = (self.image.region_len().div_ceil(block_size)).min(start + blocks);
        let step = SCAN_BYTES as u64 / block_size;
        let mut at = start;
        while at < inside {
            let count = step.min(inside - at);
            let mut bytes = vec![0; (count * block_size) as usize];
            self.image.read_golden(at * block_size, &mut bytes)?;
            for (number, block) in (at..).zip(bytes.chunks(block_size as usize)) {
                if block.iter().any(|byte| *byte != 0) {
                    self.put_block(number, Vec::new());
                }
            }
            at += count;
        }
        Ok(())
    }

    fn count_free(&mut self, blocks: u32, inodes: u32) {
        let sb = &mut self.image.sb;
        sb.set_free_blocks_count(sb.free_blocks_count().saturating_add(blocks.into()));
        sb.free_inodes_count = sb.free_inodes_count.saturating_add(inodes);
    }
}
